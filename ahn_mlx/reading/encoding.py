"""Characters from bytes, by one rule for every command: UTF-8, or whatever a byte order mark
or a page of HTML says; bytes that are something else are named, never guessed at."""

import codecs
import os
import re
import shlex

from ..errors import AHNError, show

# Longest first: UTF-32 begins as UTF-16 does.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# <meta charset=x>, <meta ... content="text/html; charset=x"> and <?xml ... encoding="x"?>.
_CHARSET = re.compile(rb"""<(?:meta\b[^>]{0,300}?\bcharset|\?xml\b[^>]{0,80}?\bencoding)
    \s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE | re.VERBOSE)  # fmt: skip

# Python's codecs that no page is written in: they fail, take for ever, or make bytes of text.
_NO_PAGE = ("idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7")


def decode(data: bytes, name: str) -> str:
    """Text from bytes: UTF-8, or UTF-16 or UTF-32 with a byte order mark, which is dropped.

    Raises AHNError saying what else it is. name: of the file, for the message.
    """
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    encoding = MARKS.get(mark, "UTF-8")
    if not mark and (wide := unmarked(data[:4096])):
        raise AHNError(f"{name}: is {wide} without a byte order mark; {_iconv(wide, name)}")
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
        command = _iconv("WINDOWS-1252", name)
        mend = "" if mark else f"; convert it from what it is, as {command}"
        raise AHNError(f"{name}: not {encoding} text (byte {e.start:,}){mend}") from None
    if "\0" in text:
        raise AHNError(f"{name}: is a binary file, not text (character {text.index(chr(0)):,})")
    return text


def decode_page(data: bytes, name: str) -> str:
    """HTML or XHTML from bytes: by byte order mark, then by what the page says, then UTF-8.

    Raises AHNError as decode does, and for an encoding that Python does not know.
    """
    said = _CHARSET.search(data[:4096])
    if said is None or data.startswith(tuple(MARKS)):
        return decode(data, name)
    label = said[1].decode("ascii", "replace")
    try:
        encoding = codecs.lookup(label)
        if encoding.name.replace("_", "-") in _NO_PAGE:
            raise LookupError
        # What calls itself Latin-1 is Windows-1252 on the web; who writes UTF-16 in bytes of
        # ASCII is wrong.
        if encoding.name in ("iso8859-1", "ascii"):
            return data.decode("windows-1252", "replace").replace("\0", "\ufffd")
        if encoding.name.startswith(("utf-8", "utf-16", "utf-32")):
            return decode(data, name)
        return data.decode(encoding.name, "replace").replace("\0", "\ufffd")
    except LookupError:  # unknown, or no encoding of text
        raise AHNError(
            f"{name}: says that it is in {show(label)}, which is no known encoding; "
            "save it as UTF-8"
        ) from None


def _iconv(encoding: str, name: str) -> str:
    """The command that makes UTF-8 of it; of a file that is there, to be pasted."""
    command = f"iconv -f {encoding} -t utf-8"
    if not os.path.isfile(name):
        return command
    stem, ending = os.path.splitext(name)
    return f"{command} {shlex.quote(name)} > {shlex.quote(f'{stem}.utf8{ending}')}"


def _begin_of_text(data: bytes) -> int:
    """How many bytes of a character stand before UTF-8 text, as `tail -c` leaves them."""
    begin = next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    try:
        rest = data[begin:].decode()
    except UnicodeDecodeError:
        return 0
    return begin if not rest.isascii() else 0


def unmarked(data: bytes) -> str:
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
