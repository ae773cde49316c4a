"""Texts as people have them: files, standard input, lines of JSON, and what is typed.

Whatever is read as text comes in here, so that byte order marks, line ends and files that
are no text mean the same to every command. Line ends become line feeds.
"""

import codecs
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import AHNError, show

# Longest first: UTF-32 begins as UTF-16 does.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
NO_TEXT = {
    b"%PDF-": "a PDF; save it as plain text, as with pdftotext",
    b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are; save it as plain text",
    b"\xd0\xcf\x11\xe0": "an old Office document; save it as plain text",
    b"{\\rtf": "an RTF document; save it as plain text",
    b"\x1f\x8b": "compressed; gunzip it first",
}
# The last is also used of other JSON, which is named rather than trained on as a text.
JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_document(file: str | None, has_prompt: bool) -> str:
    """The text of a file; "-" is standard input, and None what is piped in, if anything.

    Raises AHNError, naming the file, if it cannot be read, is empty, or is no text.
    """
    if file is None:
        if sys.stdin is None or sys.stdin.isatty():
            if not has_prompt:
                raise AHNError("nothing to read; give --prompt-file, --prompt or pipe in a text")
            return ""
        file = "-"
    if file != "-":
        return read_file(file)
    try:
        data = sys.stdin.buffer.read()
    except OSError as e:
        raise AHNError(f"standard input: {e.strerror}") from None
    return newlines(decode(data, "standard input"))


def read_file(file: str | Path) -> str:
    """The text of a file. Raises AHNError as read_document does."""
    return newlines(_read(file))


def read_texts(file: Path) -> Iterator[str]:
    """The text of a file, or those of a file of JSON: an object with "text" in each line.

    Raises AHNError, naming the file and the line.
    """
    if file.suffix.lower() not in JSON_LINES:
        yield read_file(file)
        return
    # At line feeds only: other line ends may stand within a string.
    for n, line in enumerate(_read(file).split("\n"), 1):
        line = line.removeprefix("\ufeff").strip()
        if line:
            yield newlines(_text_of(line, f"{file}: line {n}"))


def _text_of(line: str, name: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
        raise AHNError(f"{name} is not JSON ({show(reason)})") from None
    if not isinstance(value, dict):
        raise AHNError(f'{name} is {_kind(value)}, not an object with "text"')
    if "text" not in value:
        raise AHNError(f'{name} has no "text"')
    text = value["text"]
    if not isinstance(text, str):
        raise AHNError(f'{name}: "text" is {_kind(text)}, not a string')
    return text


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _read(file: str | Path) -> str:
    try:
        data = Path(file).read_bytes()
    except OSError as e:
        raise AHNError(f"{file}: {e.strerror}") from None
    except ValueError as e:  # a name with a NUL in it
        raise AHNError(f"{show(str(file))}: {e}") from None
    text = decode(data, str(file))
    if not text.strip():
        raise AHNError(f"{file}: is empty; give a text to read")
    return text


def decode(data: bytes, name: str) -> str:
    """Text from bytes: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is dropped.

    Raises AHNError saying what else it is. name: of the file, for the message.
    """
    for start, what in NO_TEXT.items():
        if data.startswith(start):
            raise AHNError(f"{name}: is {what}")
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    encoding = MARKS.get(mark, "UTF-8")
    if not mark and (wide := _unmarked(data[:4096])):
        raise AHNError(f"{name}: is {wide} without a byte order mark; iconv -f {wide} -t utf-8")
    if encoding == "UTF-8" and b"\0" in data:
        raise AHNError(f"{name}: is a binary file, not text (byte {data.index(0):,} is NUL)")
    try:
        text = data.decode("utf-8-sig" if encoding == "UTF-8" else encoding)
    except UnicodeDecodeError as e:
        cut = e.reason in ("unexpected end of data", "truncated data")
        if cut and (mark or not data[: e.start].isascii()):
            raise AHNError(
                f"{name}: not {encoding} text to its end, it is cut off within a character"
            ) from None
        if not mark and (begin := _begin_of_text(data)):
            why = f"begins within a character of UTF-8; cut off {begin} bytes"
            raise AHNError(f"{name}: {why}") from None
        mend = "" if mark else "; convert it from what it is, as iconv -f WINDOWS-1252 -t utf-8"
        raise AHNError(f"{name}: not {encoding} text (byte {e.start:,}){mend}") from None
    if "\0" in text:
        raise AHNError(f"{name}: is a binary file, not text (character {text.index(chr(0)):,})")
    return text


def _begin_of_text(data: bytes) -> int:
    """How many bytes of a character stand before UTF-8 text, as `tail -c` leaves them."""
    begin = next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        rest = data[begin:].decode()
    except UnicodeDecodeError:
        return 0
    return begin if not rest.isascii() else 0


def _unmarked(data: bytes) -> str:
    """UTF-16LE or UTF-16BE if every other byte is nearly always zero, as in Western texts."""
    even, odd = data[0::2], data[1::2]
    if len(data) >= 8:
        for zeros, others, name in ((odd, even, "UTF-16LE"), (even, odd, "UTF-16BE")):
            if zeros.count(0) > 0.7 * len(zeros) and others.count(0) < 0.1 * len(others):
                return name
    return ""


def newlines(text: str) -> str:
    """Line ends of Windows and old Macs become line feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def readable(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes. They stand for bytes that
    were typed where Python expected another encoding, or are left of a character that JSON
    cut in two; what cannot be read becomes U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # not from bytes
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_SURROGATE = re.compile("[\ud800-\udfff]")


def typed_line(line: str) -> str:
    """A line that was typed or piped in, without a byte order mark and what surrounds it."""
    return line.strip().removeprefix("\ufeff").strip()


def typed_path(typed: str) -> str:
    """A path as a shell would take it: quoted, with escaped spaces, or from the home
    directory; or the URL of a file. One that is there as it was typed is taken so."""
    words = _words(typed)
    plain = re.sub(r"\\(.)", r"\1", typed)
    ways = [_path(way) for way in (typed, *(words if len(words) == 1 else ()), plain)]
    return next((way for way in ways if os.path.exists(way)), ways[1])


def typed_paths(typed: str) -> list[str]:
    """As typed_path, of several with spaces between them, of which one at least is there."""
    words = [_path(word) for word in _words(typed)]
    whole = typed_path(typed)
    several = len(words) > 1 and not os.path.exists(whole) and any(map(os.path.exists, words))
    return words if several else [whole]


def _words(typed: str) -> list[str]:
    """As a shell would split them; none if it could not."""
    try:
        return shlex.split(typed)
    except ValueError:  # an apostrophe
        return []


def _path(word: str) -> str:
    if word.lower().startswith("file://"):
        word = "/" + unquote(word[7:].partition("/")[2])  # after the host
    return word if os.path.exists(word) else os.path.expanduser(word)
