"""Records of a suite: lines of a file or of an archive, one at a time, and what is none."""

import json
import re
from pathlib import Path

import pytest
import suites

from ahn_mlx import AHNError
from ahn_mlx.evaluate.records import LONGEST, count_records, digest, parse_line, read_records

MADE = [{"n": n} for n in range(5)]


def plain(path: Path) -> tuple[Path, None]:
    path.write_bytes(suites.jsonl(MADE[:2]) + b"\n \n" + suites.jsonl(MADE[2:]))
    return path, None


def archive(path: Path) -> tuple[Path, str]:
    """Its member is somewhere in a folder, beside another."""
    path = path.with_suffix(".zip")
    path.write_bytes(suites.zipped(**{"b.jsonl": b"{}", "data/a.jsonl": suites.jsonl(MADE)}))
    return path, "a.jsonl"


@pytest.mark.parametrize("made", [plain, archive])
def test_records_are_read_by_their_numbers(tmp_path, made) -> None:
    file, member = made(tmp_path / "a.jsonl")
    assert count_records(file, member) == 5
    for wanted in (set(), {1}, {0, 4}, {1, 3}, set(range(9))):
        found = list(read_records(file, member, wanted))
        assert found == [(n, {"n": n}) for n in sorted(wanted) if n < 5]


def test_what_was_taken_out_of_its_archive_is_read_too(tmp_path) -> None:
    file, _ = plain(tmp_path / "a.jsonl")
    assert count_records(file, "a.jsonl") == 5


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    file = tmp_path / "a.zip"
    for use in (digest, lambda file: count_records(file, "a.jsonl")):
        with pytest.raises(AHNError, match=r"a\.zip( a\.jsonl)?: No such file or directory"):
            use(file)
    with pytest.raises(AHNError, match=r"a\.zip a\.jsonl: No such"):
        count_records(file, "a.jsonl")
    with pytest.raises(AHNError, match=r"a\.zip: No such"):
        count_records(file, None)
    file.write_bytes(b"<html>")
    with pytest.raises(AHNError, match=r"a\.zip: is damaged \('File is not a zip file'\); delete"):
        count_records(file, "a.jsonl")
    file.write_bytes(suites.zipped(**{"b.jsonl": b""}))
    with pytest.raises(AHNError, match=r"a\.zip: has no a\.jsonl; is it of another revision\?"):
        count_records(file, "a.jsonl")


def test_a_line_without_end_is_refused(tmp_path) -> None:
    """64 MiB of nothing, which take no room on the disk."""
    file = tmp_path / "a.jsonl"
    for length in ((64 << 20) - 1, 64 << 20):
        with file.open("wb") as f:
            f.truncate(length)
        if length < LONGEST:
            assert count_records(file, None) == 1
        else:
            with pytest.raises(AHNError, match=r"a\.jsonl: has a line without end"):
                count_records(file, None)


LINES = {
    "five zeros of fifteen": (b'{"ab": "' + 5 * b"\0" + b'"}', "is no JSON (Invalid control"),
    "six zeros of sixteen": (b'{"ab": "' + 6 * b"\0" + b'"}', "is UTF-16, not UTF-8; save"),
    "UTF-16 of an island": ("\ufeff{是是是是}".encode("utf-16-le"), "is UTF-16, not UTF-8"),
    "a euro": (b'{"a": "\x80"}', "(byte 0x80 in column 8; is it Windows-1252 or another?)"),
    "a Y": (b'{"a": "\x9f"}', "is it Windows-1252 or another?"),
    "a space": (b'{"a": "\xa0"}', "is it Latin-1?"),
    "an accent and a delete": (b'{"a": "\x7f\xe9"}', "(byte 0xe9 in column 9; is it Latin-1?)"),
    "a list": (b"[]", "is no JSON object; each line is one object"),
    "no JSON": (b"{", "is no JSON (Expecting property name"),
    "a number of many digits": (b'{"a": ' + 5000 * b"9" + b"}", "is no JSON (Exceeds the limit"),
    "lists in lists": (b'{"a": ' + 900 * b"[" + 900 * b"]" + b"}", "is no JSON (nested deeper"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_a_line_that_is_no_record_is_named(line, message) -> None:
    with pytest.raises(AHNError, match="^here .*" + re.escape(message)):
        parse_line(line, "here")


def test_a_byte_order_mark_is_no_text() -> None:
    assert parse_line(b"\xef\xbb\xbf" + json.dumps({"a": "é"}).encode(), "here") == {"a": "é"}
