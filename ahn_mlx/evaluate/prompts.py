"""The wording of the suites' questions, which is not in this project: fetched at first use from
the paper's repository at one commit, checked, and read as data; or a user's own files."""

import ast
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AHNError, show
from ..hub.datasets import checked_text

SOURCE = (
    "https://raw.githubusercontent.com/ByteDance-Seed/AHN/"
    "3d2d1746ceb1cd6808861a36f4ac497e0ec25aa6/eval/"
)
# Of each suite: where the file is in there, how its check sum begins, the table in it.
FILES = {
    "longbench": ("longbench/configs/dataset2prompt.json", "a4bc4c129b9b5b6b", ""),
    "infinitebench": ("longbench/configs/dataset2prompt.json", "a4bc4c129b9b5b6b", ""),
    "lveval": ("lveval/config.py", "df129558b5170474", "DATASET_PROMPT"),
}
# How the check sums of the templates begin, by what they are for.
TEMPLATES = {
    **dict.fromkeys(("hotpotqa", "musique", "2wikimqa"), "9ec4ae308865bd0c"),
    "narrativeqa": "aada7ed24b06abac",
    "qmsum": "dca23b678fe0183b",
    "triviaqa": "00a802e6377e72fc",
    "dureader": "ae53329f51b17908",
    "infinitebench": "019c00056fe79a24",
    "hotpotwikiqa_mixup": "c8b75e076f014e87",
    **dict.fromkeys(
        ("loogle_SD_mixup", "loogle_CR_mixup", "loogle_MIR_mixup", "multifieldqa_en_mixup"),
        "dea26bcf80f439ac",
    ),
    "multifieldqa_zh_mixup": "7427f4ffbc307206",
    "factrecall_en": "95b795444370c103",
    "factrecall_zh": "d71ee6028140eeb4",
    **dict.fromkeys(("cmrc_mixup", "dureader_mixup"), "5017b8321e45769f"),
    "lic_mixup": "a546c25719e3ac10",
}


class Prompts(NamedTuple):
    """Templates by name. whole: whether they are, all of them, the paper's file."""

    texts: dict[str, str]
    whole: bool

    def is_published(self, name: str) -> bool:
        """Whether a template is known to be, byte for byte, the paper's."""
        found = hashlib.sha256(self.texts[name].encode()).hexdigest()
        return self.whole or found[:16] == TEMPLATES.get(name)


def prompts_name(suite: str) -> str:
    """Of the file with a suite's prompts."""
    return Path(FILES[suite][0]).name


def read_prompts(suite: str, directory: Path | None, source: str = SOURCE) -> Prompts:
    """directory: where a file of the published name is, else it is fetched.
    Raises AHNError if there is none, or it is no table of texts."""
    path, sha256, table = FILES[suite]
    if directory is None:
        try:
            text, where = checked_text(source + path, sha256), source + path
        except AHNError as e:
            raise AHNError(f"{e}; or give --prompts DIR with {prompts_name(suite)}") from None
    else:
        file = directory / prompts_name(suite)
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as e:
            reason = getattr(e, "strerror", None) or "it is no UTF-8"
            raise AHNError(f"{file}: cannot be read ({reason}); it holds the prompts") from None
    found = _table(text, where, table)
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in found.items()):
        raise AHNError(f"{where}: prompts must be texts by name")
    return Prompts(found, hashlib.sha256(text.encode()).hexdigest().startswith(sha256))


def _table(text: str, where: str, table: str) -> dict[str, Any]:
    """A JSON object; or, of Python, the one that is assigned to a name, as a literal."""
    try:
        if not table:
            found = json.loads(text)
        else:
            value = next(
                node.value
                for node in ast.parse(text).body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table
            )
            found = ast.literal_eval(value)
        if isinstance(found, dict):
            return found
    except (ValueError, SyntaxError, StopIteration, RecursionError, MemoryError):
        pass
    raise AHNError(f"{where}: has no table of prompts{f' {table}' if table else ''}")


def fill(template: str, record: dict[str, Any]) -> str:
    """The template with the record's texts, in which braces are braces. Raises AHNError for a
    field that is not there."""

    def field(found: "re.Match[str]") -> str:
        value = record.get(found[1])
        if not isinstance(value, str):
            raise AHNError(f"has no text {show(found[1])}")
        return value

    return re.sub(r"\{(context|input)\}", field, template)
