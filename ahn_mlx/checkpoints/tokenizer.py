"""The tokenizer of a model directory or of a GGUF file."""

import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as mlx_lm_load
from transformers.utils import logging

from ..errors import AHNError, foreign
from .directory import check_member, copy_files, has_bom, read_json
from .ggufile import GGUFile

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
READ = (".json", ".jinja", ".txt", ".model")
# Left unsaid, transformers asks whether to run a directory's own code, and takes a piped text for
# the answer.
NO_CODE = {"trust_remote_code": False}
# mlx-lm keeps a list as long as the largest number of a token.
MOST_TOKENS = 1 << 24
MOST_GROWTH = 1 << 12  # characters that are made of one
_ALONE = threading.RLock()  # what is silent for one thread is for all
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_vocabulary(path: Path) -> bool:
    """Whether a directory has what a tokenizer can be made of."""
    return any((path / name).is_file() for name in VOCABULARIES)


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """That of a directory or a GGUF file, which ends where config says, too. Raises AHNError
    without one."""
    if path.is_file():
        with unheard():
            tokenizer = gguf_tokenizer(path)
    else:
        _check_vocabulary(path)
        _check_tables(path)
        tokenizer = _of_directory(path)
        _check_vocabulary(path)  # it may have been deleted meanwhile
    with _reading(path):
        tokenizer.encode("", add_special_tokens=True)  # some fail at anything
    tokenizer.eos_token_ids |= set(config.get("eos_token_id") or ())
    return tokenizer


def _check_vocabulary(path: Path) -> None:
    """Raise AHNError without any: transformers would make up an empty tokenizer."""
    if not has_vocabulary(path):
        raise AHNError(f"{path}: no usable tokenizer; copy tokenizer.json from the base model")


def _check_tables(path: Path) -> None:
    """Raise AHNError for a token whose number no vocabulary has, and for steps that make a book of
    a word."""
    for file in (path / name for name in ("tokenizer.json", "vocab.json", "added_tokens.json")):
        if not file.is_file():
            continue
        table = read_json(file)
        if big := next((n for n in _numbers(table) if n >= MOST_TOKENS), None):
            raise AHNError(f"{file}: a token has the number {big:,}; copy the base's files")
        for name in ("normalizer", "pre_tokenizer", "decoder"):
            if (growth := _growth(table.get(name))) > MOST_GROWTH:
                found = f"its {name} makes {growth:.3g} characters of one"
                raise AHNError(f"{file}: {found}; copy the base's files")


def _growth(part: Any) -> float:
    """How many characters a step of a tokenizer, and the steps in it, make of one at most."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    growth = math.prod(map(_growth, inner))
    if isinstance(part, dict):
        pattern, content = part.get("pattern"), part.get("content", part.get("prepend", ""))
        old = pattern.get("String") if isinstance(pattern, dict) else None
        if part.get("type") == "ByteLevel":
            growth *= 2
        elif isinstance(content, str):
            growth *= max(1, len(content) / (len(old) if isinstance(old, str) and old else 1))
    return min(growth, 1e18)


def _numbers(found: Any) -> Iterator[int]:
    """All whole numbers of vocabularies and added tokens, wherever they are."""
    if isinstance(found, dict):
        model, added = found.get("model"), found.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else found
        numbers = vocabulary.values() if isinstance(vocabulary, dict) else ()
        more = (
            (x.get("id") for x in added if isinstance(x, dict)) if isinstance(added, list) else ()
        )
        yield from (n for n in (*numbers, *more) if type(n) is int)


def _of_directory(path: Path) -> TokenizerWrapper:
    for file in sorted(path.iterdir()):
        if file.suffix in READ:  # by transformers, which looks at no link and waits for any pipe
            check_member(file)
    names = (*TOKENIZER_FILES, "config.json")
    with _reading(path):
        if not any(has_bom(path / name) for name in names) and not _has_text_ends(path):
            return mlx_lm_load(path, NO_CODE)
        # Files that transformers would not read.
        with TemporaryDirectory() as directory:
            copy_files(TOKENIZER_FILES, [path], Path(directory))
            if (path / "config.json").is_file():
                kind = {"model_type": read_json(path / "config.json").get("model_type")}
                (Path(directory) / "config.json").write_text(json.dumps(kind))
            return mlx_lm_load(Path(directory), NO_CODE)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    def unusable(why: str) -> str:
        return f"{path}: no usable tokenizer ({why}); copy the base's files"

    with foreign(unusable), unheard():
        yield


@contextmanager
def unheard() -> Iterator[None]:
    """Around what reads a stranger's tokenizer: transformers warns in the words of its files, which
    a terminal may obey, so does Rust of settings, and of a panic it tells in a hundred lines."""
    with _ALONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL + 1)
        try:
            with _nowhere(1, sys.__stdout__), _nowhere(2, sys.__stderr__):
                yield
        finally:
            logging.set_verbosity(before)


@contextmanager
def _nowhere(number: int, stream: TextIO | None) -> Iterator[None]:
    """What a process writes there, as Rust does past Python. stream: None if the process began
    without; the number may be any file's by now."""
    if stream is None:
        yield
        return
    with suppress(OSError, ValueError):  # whoever writes to it next is told
        stream.flush()
    kept, nothing = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, number)
        yield
    finally:
        with suppress(OSError, ValueError):
            stream.flush()
        os.dup2(kept, number)
        os.close(kept)
        os.close(nothing)


def _has_text_ends(path: Path) -> bool:
    """Whether config.json names end tokens by their text."""
    if not (path / "config.json").is_file():
        return False
    ends = read_json(path / "config.json").get("eos_token_id")
    return any(isinstance(end, str) for end in (ends if isinstance(ends, list) else [ends]))


def gguf_tokenizer(path: Path) -> TokenizerWrapper:
    """The tokenizer inside a GGUF file. Raises AHNError if there is none that we know."""
    return GGUFile(path).tokenizer()
