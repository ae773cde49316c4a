"""Records of a suite: lines of JSON in a file or in an archive, read as data, one at a time;
some files have a gigabyte."""

import codecs
import hashlib
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..checkpoints.directory import check_depth
from ..errors import AHNError, show

LONGEST = 1 << 26  # bytes of a line
ONE = "each line is one object"
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


def spaced(n: int, limit: int | None) -> list[int]:
    """At most `limit` of n numbers, evenly over all of them: what is asked moves with them."""
    count = n if limit is None else min(n, limit)
    return [i * n // count for i in range(count)]


def count_records(file: Path, member: str | None) -> int:
    """How many lines a file or a member of an archive has that are not empty."""
    return sum(1 for _ in _lines(file, member))


def read_records(
    file: Path, member: str | None, wanted: set[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records with these numbers, from 0. member: the base name of a file in an archive.
    Raises AHNError for what is no record, or a damaged file."""
    for number, line in enumerate(_lines(file, member)):
        if number not in wanted:
            continue
        yield number, parse_line(line, f"{_name(file, member)}: record {number}")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8, with or without a byte order mark. Raises AHNError for what is
    none, with its encoding if it is known."""
    try:
        if line.startswith(UTF_16) or line.count(b"\0") * 3 > len(line):
            raise AHNError(f"{where} is UTF-16, not UTF-8; save the file as UTF-8")
        found = json.loads(line.decode("utf-8-sig"))
        check_depth(found)
    except UnicodeDecodeError as e:
        # Latin-1 has no letters there, Windows' code page has.
        ansi = any(0x80 <= byte < 0xA0 for byte in line)
        name = "Windows-1252 or another" if ansi else "Latin-1"
        raise AHNError(
            f"{where} is no UTF-8 (byte 0x{line[e.start]:02x} in column {e.start + 1}; is it"
            f" {name}?); save the file as UTF-8"
        ) from None
    except AHNError:
        raise
    except json.JSONDecodeError as e:
        raise AHNError(f"{where} is no JSON ({e.msg}, column {e.colno}); {ONE}") from None
    except (ValueError, RecursionError) as e:
        raise AHNError(f"{where} is no JSON ({e})") from None
    if not isinstance(found, dict):
        raise AHNError(f"{where} is no JSON object; {ONE}")
    return found


def digest(file: Path) -> str:
    """SHA-256 of a file. Raises AHNError if it cannot be read."""
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise AHNError(f"{file}: {e.strerror or e}; --data has the suite's files") from None


def _lines(file: Path, member: str | None) -> Iterator[bytes]:
    with _named(file, member), _opened(file, member) as f:
        while line := f.readline(LONGEST):
            if len(line) == LONGEST:
                raise AHNError(f"{_name(file, member)}: has a line without end")
            if line.strip():
                yield line


@contextmanager
def _opened(file: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is None or file.suffix != ".zip":
        with file.open("rb") as f:
            yield f
        return
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if PurePosixPath(n).name == member]
        if not names:
            raise AHNError(f"{file}: has no {member}; is it of another revision?")
        with archive.open(names[0]) as f:
            yield f


@contextmanager
def _named(file: Path, member: str | None) -> Iterator[None]:
    try:
        yield
    except AHNError:
        raise
    except Exception as e:  # zipfile and what unpacks for it have many kinds
        if isinstance(e, OSError) and e.strerror:  # of the system, and not of a library
            raise AHNError(f"{_name(file, member)}: {e.strerror}") from None
        reason = show(str(e) or "it ends early")
        raise AHNError(f"{file}: is damaged ({reason}); delete it and get it again") from None


def _name(file: Path, member: str | None) -> str:
    return f"{file} {member}" if member else str(file)
