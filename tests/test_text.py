"""Texts as people have them: what is read, and what is named in one line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import REPO, talking_model

from ahn_mlx import AHNError
from ahn_mlx.cli import main
from ahn_mlx.reading.text import (
    read_documents,
    read_file,
    read_texts,
    readable,
    typed_line,
    typed_path,
    typed_paths,
)

TEXT = "Caf\u00e9 \u4e16\u754c\nnext\n"


def file(path: Path, data: bytes, name: str = "book.txt") -> Path:
    (path / name).write_bytes(data)
    return path / name


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-16-le", "utf-32-be"]
)
def test_whatever_the_encoding_the_text_is_the_same(tmp_path, encoding):
    mark = "\ufeff" if encoding[-2:] in ("be", "le") else ""
    data = (mark + TEXT.replace("\n", "\r\n")).encode(encoding)
    assert read_file(file(tmp_path, data)) == TEXT


def test_line_ends_of_windows_and_old_macs(tmp_path):
    assert read_file(file(tmp_path, b"a\r\nb\rc\nd\r\re")) == "a\nb\nc\nd\n\ne"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "old Office document"),
        (b"{\\rtf1\\ansi", "RTF"),
        (b"\x1f\x8b\x08\0", "gunzip"),
        (b"\x89png\r\n\x1a\n\0\0", r"binary file.*byte 8 is NUL"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3\).*from what it is.*iconv"),
        ("\u4e16 caf\u00e9".encode()[1:], "begins within a character of UTF-8; cut off 2 bytes"),
        (b"\x93quoted\x94", r"not UTF-8 text \(byte 0\).*iconv"),
        (b"\x93quoted", r"not UTF-8 text \(byte 0\).*iconv"),
        ("caf\u00e9 \u4e16".encode()[:-1], "cut off within a character"),
        ("h\u00e9".encode("utf-16")[:-1], "not UTF-16 text to its end"),
        (b"\xff\xfe\x00\xd8\x00\x00", r"not UTF-16 text \(byte 2\)"),
        (b"\xff\xfeh\0\0\0", "binary file"),
        ("hello there".encode("utf-16-le"), "UTF-16LE without a byte order mark"),
        ("hello there".encode("utf-16-be"), "UTF-16BE without a byte order mark"),
        (b"\xed\xa0\xbd", r"not UTF-8 text \(byte 0\)"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n\r\n", "is empty"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, data, what):
    with pytest.raises(AHNError, match=rf"book\.txt: .*{what}"):
        read_file(file(tmp_path, data))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(AHNError, match="Is a directory"):
        read_file(tmp_path)
    with pytest.raises(AHNError, match=r"absent\.txt: No such file"):
        read_file(tmp_path / "absent.txt")
    with pytest.raises(AHNError, match="null byte"):
        read_file("a\0b")


def test_standard_input_is_read_alike(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("\ufeffOne\r\ntwo".encode("utf-16-le")), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_documents(["-"], has_prompt=False) == "One\ntwo"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{\\rtf1"), "utf-8"))
    with pytest.raises(AHNError, match="standard input: is an RTF document"):
        read_documents([], has_prompt=True)


# Unicode and Python know more ends of a line than JSON lines do.
@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_jsonl_is_split_at_line_feeds_only(tmp_path, sign):
    lines = [json.dumps({"text": f"one{sign}more"}, ensure_ascii=False), '{"text": "two"}', ""]
    if sign < " ":  # JSON does not allow these as they are
        lines[0] = lines[0].replace(sign, json.dumps(sign)[1:-1])
    data = "\ufeff" + "\r\n\n".join(lines)
    found = list(read_texts(file(tmp_path, data.encode(), "a.jsonl")))
    assert found == [f"one{sign}more", "two"]


def test_jsonl_of_two_files_with_byte_order_marks(tmp_path):
    line = '\ufeff{"text": "one\\r\\ntwo"}\n'
    assert list(read_texts(file(tmp_path, (line * 2).encode(), "a.JSONL"))) == ["one\ntwo"] * 2


def test_json_by_its_other_names_is_not_read_as_a_text(tmp_path):
    line = b'{"text": "one"}\n'
    for name in ("a.ndjson", "a.json"):
        assert list(read_texts(file(tmp_path, line * 2, name))) == ["one", "one"]
    with pytest.raises(AHNError, match=r"b\.json: line 1 is a list, not an object"):
        list(read_texts(file(tmp_path, b'["one"]', "b.json")))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": null}', '"text" is null, not a string'),
        ('{"text": 3}', '"text" is a number, not a string'),
        ('{"text": ["a"]}', '"text" is a list, not a string'),
        ('{"text": {"a": 1}}', '"text" is an object, not a string'),
        ('{"words": 1}', 'has no "text"'),
        ('["a"]', "is a list, not an object"),
        ('"text"', "is a string, not an object"),
        ("null", "is null, not an object"),
        ('{"text": "a', "is not JSON .*Unterminated string.*column 10"),
        ('{"text": "a"}{"text": "b"}', "is not JSON .*Extra data"),
        ("plain words", "is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ("9" * 10**4, "is not JSON"),
    ],
)
def test_a_line_that_is_no_text_is_named_with_its_cause(tmp_path, line, what):
    data = '{"text": "fine"}\n\n' + line + "\n"
    texts = read_texts(file(tmp_path, data.encode(), "a.jsonl"))
    assert next(texts) == "fine"
    with pytest.raises(AHNError, match=rf"a\.jsonl: line 3:? {what}") as refusal:
        next(texts)
    assert len(str(refusal.value)) < 300


def test_lone_surrogates_become_readable():
    assert readable("plain \U0001f600") == "plain \U0001f600"
    assert readable("cut \ud83d off") == "cut \ufffd off"
    assert readable("\ude00 and \ud83d\ude00") == "\ufffd and \U0001f600"
    assert readable(b"caf\xc3\xa9".decode("ascii", "surrogateescape")) == "caf\u00e9"
    assert readable(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\ufffd"


def test_typed_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    for typed in ('"my book.txt"', "'my book.txt'", r"my\ book.txt", "my book.txt"):
        assert typed_path(typed) == "my book.txt"
    assert typed_path("~/book.txt") == "/home/me/book.txt"
    assert typed_path(r"~/my\ book.txt") == "/home/me/my book.txt"
    assert typed_path("it's.txt") == "it's.txt"
    assert typed_path("/a/it\\'s\\ my\\ book.txt ") == "/a/it's my book.txt"
    assert typed_path("'~/my book.txt'") == "/home/me/my book.txt"
    assert typed_path("file:///a/My%20Book%20%231.pdf") == "/a/My Book #1.pdf"
    assert typed_path("'file://localhost/a/b.pdf'") == "/a/b.pdf"
    assert typed_path("file://elsewhere/b.pdf") == "file://elsewhere/b.pdf"
    assert typed_path("'/Volumes/A b/it'\\''s.txt'") == "/Volumes/A b/it's.txt"
    Path('"odd".txt').touch()
    assert typed_path('"odd".txt') == '"odd".txt'


def test_typed_paths_of_several_files_and_urls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "my book.txt", "my other book.txt"):
        Path(name).touch()
    assert typed_paths("my book.txt") == ["my book.txt"]
    assert typed_paths(r"a.txt my\ book.txt absent.txt") == ["a.txt", "my book.txt", "absent.txt"]
    assert typed_paths("'a.txt' \"my book.txt\"") == ["a.txt", "my book.txt"]
    assert typed_paths("no such.txt") == ["no such.txt"]
    assert typed_path(r"my other\ book.txt") == "my other book.txt"  # half completed
    assert typed_path(f"file://{tmp_path}/my%20book.txt") == f"{tmp_path}/my book.txt"
    assert typed_path(f"file://localhost{tmp_path}/a.txt") == f"{tmp_path}/a.txt"


def test_typed_lines():
    assert typed_line(" \ufeff /read a.txt \r\n") == "/read a.txt"


def test_a_terminal_that_cannot_show_a_text(monkeypatch, capsys):
    out = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    monkeypatch.setattr(sys, "argv", ["ahn-mlx", "--version"])
    with pytest.raises(SystemExit):
        main()
    print("caf\u00e9 \ud83d")
    assert out.buffer.getvalue().endswith(b"caf? ?\n")
    assert readable(input()) == "caf\ufffd"


def test_bytes_typed_at_a_prompt_and_a_terminal_of_ascii(tmp_path):
    """A conversation and a memory's facts, both beyond what the terminal can show."""
    model = talking_model("qwen2-gdn", tmp_path)
    book = file(tmp_path, "\u201cCaf\u00e9\u201d \u4e16\u754c. ".encode() * 40, "my book.txt")
    typed = b"caf\xe9 \xff\n/read my\\ book.txt\n/save c.ahn\n/read \xff.txt\n/stats\n"
    env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}

    def run(*args: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "ahn_mlx", *map(str, args)]
        return subprocess.run(
            command, input=stdin, env=env, cwd=tmp_path, capture_output=True, timeout=100
        )

    said = run("chat", "--model", model, "--max-tokens", 3, stdin=typed)
    assert said.returncode == 0, said.stderr
    assert b"Traceback" not in said.stderr and b"No such file" in said.stderr
    assert b"read " in said.stderr and book.exists()
    assert run("ask", "--memory", "c.ahn", "--interactive", stdin=b"\xff\xfe?\n").returncode == 0
    info = run("memory", "info", "c.ahn")
    assert (info.returncode, info.stderr) == (0, b"")


def test_of_files_that_are_named_none_is_left_out(tmp_path, capsys):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("Good.")
    bad.write_bytes(b"caf\xe9")
    for names in ([good, bad], [bad, good]):
        with pytest.raises(AHNError, match=r"bad\.txt: not UTF-8 text"):
            read_documents(list(map(str, names)), has_prompt=True)
    assert "Good." in read_documents([str(tmp_path)], has_prompt=True)  # of a folder one may be
    assert "left out" in capsys.readouterr().err
