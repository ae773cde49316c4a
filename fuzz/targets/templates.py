"""Chat templates and tokenizers, which are programs and tables of strangers."""

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from checkpoints import CHATML, byte_tokenizer, chat_tokenizer
from jinja2 import Environment, TemplateSyntaxError
from serving import TOOLS

from ahn_mlx.apps.tokenizer import NoTable, pack_tokenizer
from ahn_mlx.checkpoints.tokenizer import load_tokenizer
from ahn_mlx.reading import template
from ahn_mlx.reading.template import Template
from ahn_mlx.reading.tokens import Encoder

from ..mutate import of_json
from ..oracle import Target

_JINJA = Environment(extensions=["jinja2.ext.loopcontrols"])
JINJA = (
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if ",
        "{% endif %}",
        "{{ m.content }}",
        "{%- ",
    ),
    *("{{ m.role }}", "add_generation_prompt", "loop.first", "loop.last", "loop.index0 % 2", "-%}"),
    *("raise_exception('x')", "strftime_now('%S')", "tojson", "| trim", "namespace(x=1)", "range("),
    *(
        "{% set x = ",
        "{% macro f() %}",
        "{% endmacro %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
    ),
    *("''.__class__.__mro__", "self.__init__.__globals__", "cycler.__init__", "lipsum", "| attr("),
    *(
        "999999999",
        "* 99999",
        "bos_token",
        "eos_token",
        "messages[0]['content']",
        "~",
        "is defined",
    ),
    *("{% generation %}", "tools", "documents", "{% break %}", "{% continue %}", "|e", "\\n"),
)


@cache
def _tokenizer() -> Any:
    return chat_tokenizer()


def _template(data: bytes, place: Path) -> str:
    return data.decode("utf-8", "replace")


def _take_apart(text: str, place: Path, out: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer._tokenizer.chat_template = text
    tokenizer.has_chat_template = bool(text)
    for system in ("", "Be brief."):
        try:
            found = Template(tokenizer, system)
        except template.AHNError:
            if system or not _parses(text):  # a message before it changes nothing then
                raise
            continue
        json.dumps(found.facts())
        for turn in ("start", "read", "answered", "cut"):
            with contextlib.suppress(template.TemplateError):
                found.opening(turn)
                Encoder(tokenizer)(*found.question(turn, "Why?"))
        found.begin(" x ")
        found.end(" x ")


def _parses(text: str) -> bool:
    try:
        _JINJA.parse(text)
    except TemplateSyntaxError:
        return False
    return True


def written() -> list[bytes]:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    listed = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}{{ bos_token }}"
    llama = (
        "{% if messages[0].role == 'system' %}<<SYS>>{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[answer]<think>{% endif %}"
    )
    return [x.encode() for x in (CHATML, TOOLS, plain, listed, llama, plain + "{{ 1/0 }}")]


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
TABLES = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "model"),
    *("post_processor", "decoder", "type", "BPE", "ByteLevel", "Sequence", "Split", "Regex", "NFC"),
    *("WordPiece", "Unigram", "vocab", "merges", "unk_token", "ignore_merges", "byte_fallback"),
    *("add_prefix_space", "use_regex", "special", "normalized", "content", "id", "eos_token"),
    *("tokenizer_class", "PreTrainedTokenizerFast", "LlamaTokenizer", "chat_template", "auto_map"),
    *("model_max_length", "bos_token", "trust_remote_code", "tokenizer_file", "tool_parser_type"),
)


def _directory(data: bytes, place: Path) -> Path:
    """JSON has files by name, as objects or texts; M: a tokenizer.model."""
    path = place / "model"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if data.startswith(b"M"):
        (path / "tokenizer.model").write_bytes(data[1:])
        return path
    try:
        given = json.loads(data)
        for name in FILES:
            if name in given:
                value = given[name]
                text = value if isinstance(value, str) else json.dumps(value)
                (path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    except (ValueError, TypeError, RecursionError):
        (path / "tokenizer.json").write_bytes(data)
    return path


def _load(path: Path, place: Path, out: Path) -> None:
    tokenizer = load_tokenizer(path, {"eos_token_id": [3]})
    encoder = Encoder(tokenizer)
    ids = encoder("", "It is 42 \u00e9\n")
    tokenizer.decode(ids)
    with contextlib.suppress(NoTable):
        pack_tokenizer(tokenizer)


@cache
def _small() -> dict[str, Any]:
    """The tables of bytes, with some merges and tokens that are added."""
    import tempfile

    path = byte_tokenizer(Path(tempfile.mkdtemp()) / "tokenizer")
    table = json.loads((path / "tokenizer.json").read_text())
    table["model"]["merges"] = [["a", "b"]]
    table["model"]["vocab"]["ab"] = 256
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table["added_tokens"] = [{"id": 257, "content": "<|end|>", "special": True, **added}]
    config = json.loads((path / "tokenizer_config.json").read_text())
    return {"tokenizer.json": table, "tokenizer_config.json": {**config, "eos_token": "<|end|>"}}


def tables() -> list[bytes]:
    small = _small()
    few = json.loads(json.dumps(small))
    few["tokenizer.json"]["model"]["vocab"] = {"a": 0, "b": 1, "ab": 2, "\u0120": 3}
    return [json.dumps(x).encode() for x in (small, few)] + [b"M" + b"\n\x0b\n\x05<unk>"]


TARGETS = [
    Target("template", _template, _take_apart, written, ("reading/template.py",), JINJA),
    Target(
        "tokenizer",
        _directory,
        _load,
        tables,
        ("checkpoints/tokenizer.py", "apps/tokenizer.py", "reading/tokens.py"),
        TABLES,
        of_json(TABLES),
        longest=1 << 15,
    ),
]
