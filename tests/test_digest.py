"""What digest says and refuses, and what memory says of its files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import talking_model
from click.testing import CliRunner

from ahn_mlx import AHNError, Session, load
from ahn_mlx.cli import terminal
from ahn_mlx.cli.digest import digest, load_as_read
from ahn_mlx.cli.memory import memory
from ahn_mlx.outputs.directories import check_out
from ahn_mlx.outputs.files import OutFile
from ahn_mlx.reading import memoryfile

TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))


def run(command: Any, *args: object) -> Any:
    done = CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture
def book(directory, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was the best of times. " * 3)
    run(digest, "--prompt-file", "book.txt", "--model", directory, "-o", "book.ahn")
    return tmp_path / "book.ahn"


def test_the_last_line_has_a_unit_that_fits(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.txt").write_text("Hi")
    options = ("--model", directory, "--ignore-chat-template", "-o", "tiny.ahn")
    line = run(digest, "--prompt-file", "tiny.txt", *options).stderr.splitlines()[-1]
    size = Path("tiny.ahn").stat().st_size
    assert line == f"tiny.ahn: 2 tokens in {size / 1000:.1f} KB" and size < 10**6
    shown = [terminal.in_bytes(n) for n in (0, 999, 1000, 56_940_000, 7 * 10**9)]
    assert shown == ["0 bytes", "999 bytes", "1.0 KB", "56.9 MB", "7.0 GB"]


def test_info_lists_what_was_read(directory, book):
    Path("two\x1b[2J.txt").write_text("And more.")
    run(digest, "--prompt-file", "two\x1b[2J.txt", "-o", "book.ahn", "--append")
    again = run(digest, "--prompt-file", "book.txt", "-o", "book.ahn", "--append")
    assert "note: book.txt was read before, 20" in again.stderr
    text = run(memory, "info", "book.ahn").stdout
    assert "\x1b" not in text
    rows = [line[:20].rstrip() + "|" + line[21:] for line in text.splitlines()]
    read = [row.split("  ", 1)[1] for row in rows if row.startswith("read|")]
    assert read == ["84 tokens  book.txt", "9 tokens  two [2J.txt", "78 tokens  book.txt"]
    for row in (
        f"model|{directory}",
        "memory|gated_deltanet, float32",
        "window + sinks|12 + 4 tokens",
        "tokens|171, 171 of them since the last step of 512",
        f"file|{book.stat().st_size / 1000:.1f} KB",
        "begins|It was the best of times. It was the best of times. It was the best of times.",
    ):
        assert row in rows
    assert "system message" not in text and "unfinished" not in text


def test_info_as_json_says_the_same_of_any_memory(directory, tmp_path):
    model, tokenizer = load(directory)
    session = Session(model, tokenizer, system="Be brief.", step=16)
    session.read("It was the best of times. " * 21, name="book.txt")
    session.save(tmp_path / "a.ahn", job="x", done=5)
    found = json.loads(run(memory, "info", "--json", tmp_path / "a.ahn").stdout)
    sizes, kept = found.pop("bytes"), session.caches[0]
    assert found == {
        "file": str(tmp_path / "a.ahn"),
        "version": 2,
        "model": str(directory),
        "kind": "gated_deltanet",
        "dtype": "float32",
        "bits": None,
        "window_bits": None,
        "window": 12,
        "sinks": 4,
        "system": "Be brief.",
        "tokens": session.tokens,
        "step": 16,
        "tail": session.tokens % 16,
        "turn": "read",
        "unfinished": True,
        "saved": memoryfile.read_facts(tmp_path / "a.ahn")["saved"],
        "texts": session.texts,
        "earlier_texts": 0,
        "begins": session.preview,
    }
    assert found["texts"][0]["name"] == "book.txt" and found["tail"] > 0
    state = 3 * kept.memory.nbytes
    assert sizes["state"] == state and sizes["tail"] > state
    assert sizes["window, sinks, gates"] == 3 * sum(x.nbytes for x in kept.buffers)
    header = sizes["file"] - sum(v for k, v in sizes.items() if k != "file")
    assert 0 < header < 10_000
    text = run(memory, "info", tmp_path / "a.ahn").stdout
    assert "system message       Be brief." in text and "digest was stopped" in text


def test_info_of_a_memory_of_version_1():
    file = Path(__file__).parent / "memories/version-1.ahn"
    text = run(memory, "info", file).stdout
    assert "version 1 does not say" in text and "tokens               301\n" in text


def test_more_texts_than_are_listed(directory, tmp_path):
    session = Session(*load(directory))
    for n in range(103):
        session.note_text(f"{n}.txt", 1)
    session.save(tmp_path / "a.ahn")
    session = Session.load(tmp_path / "a.ahn", session.model, session.tokenizer)
    session.note_text("last.txt", 1)
    session.save(tmp_path / "a.ahn")
    lines = run(memory, "info", tmp_path / "a.ahn").stdout.splitlines()
    read = [line.split()[1:] for line in lines if line.startswith("read")]
    assert read[0] == ["4", "earlier", "texts"] and len(read) == 101
    assert read[1][-1] == "4.txt" and read[-1][-1] == "last.txt"
    assert session.last_read("3.txt") is None and session.last_read("4.txt")


def test_a_day_that_no_calendar_has(directory, tmp_path):
    session = Session(*load(directory))
    session.texts = [{"name": "a", "read": 1 << 53, "tokens": 1}]
    session.save(tmp_path / "a.ahn")
    assert "  1 tokens  a\n" in run(memory, "info", tmp_path / "a.ahn").stdout


def test_verify_looks_at_the_tail_too(book):
    run(memory, "verify", book)
    data = bytearray(book.read_bytes())
    data[-3] ^= 64  # whatever is last: of such a text all is tail
    book.write_bytes(data)
    with pytest.raises(AHNError, match=r"book\.ahn: damaged"):
        run(memory, "verify", book)


def test_a_memory_that_was_cut_is_to_be_digested_again(book):
    whole = book.read_bytes()
    for size in (5, 100, len(whole) - 1):
        book.write_bytes(whole[:size])
        with pytest.raises(AHNError, match=r"book\.ahn: damaged .*; digest the text again$"):
            memoryfile.verify(book)


def test_an_empty_text_is_not_read(directory):
    session = Session(*load(directory))
    with pytest.raises(AHNError, match="the text is empty"):
        session.read("")
    assert session.tokens == 0 and session.texts == []


def test_a_model_that_has_moved_is_asked_for(directory, tmp_path):
    facts = {"model": {"name": str(tmp_path / "gone")}, "window": 12, "sinks": 4}
    with pytest.raises(AHNError, match=r"gone', is not there; --model says where it is now"):
        load_as_read(facts, None)
    facts["model"]["name"] = "no-such-model"
    with pytest.raises(AHNError, match=r"no-such-model.*--model says where"):
        load_as_read(facts, None)
    assert load_as_read(facts, str(directory))[0].ahn.window == 12


@pytest.mark.parametrize("text", ["", " \n\t\u00a0\u3000\n"])
def test_nothing_but_white_space_is_refused(directory, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    options = ("--model", directory, "-o", tmp_path / "a.ahn")
    with pytest.raises(AHNError, match="empty; give a text to read"):
        run(digest, "--prompt-file", tmp_path / "a.txt", *options)
    assert not (tmp_path / "a.ahn").exists()


def test_standard_output_is_no_files_name(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Hi")
    with pytest.raises(AHNError, match="standard output is not written to"):
        run(digest, "--prompt-file", "a.txt", "--model", directory, "-o", "-")
    for refuses in (
        lambda: OutFile(Path("-"), "a page", lambda _: True, force=True).check(),
        lambda: check_out(Path("-"), [], force=True),
    ):
        with pytest.raises(AHNError, match="standard output is not written to"):
            refuses()
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("args", [("digest", "-o", "a.ahn"), ("digest", "-o", "/x/../a.ahn")])
def test_a_directory_that_has_vanished_is_named(tmp_path, args):
    here = tmp_path / "here"
    here.mkdir()
    shell = f'cd "{here}" && rmdir "{here}" && exec "$0" -m ahn_mlx "$@" --prompt-file a.txt'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{here}: the working directory is not there any more" in done.stderr


@pytest.fixture(scope="module")
def trimming(tmp_path_factory) -> Path:
    """Its template trims messages, as many do."""
    directory = talking_model("qwen2-gdn", tmp_path_factory.mktemp("trimming"))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TRIMS}))
    return directory


def test_a_text_that_is_refused_leaves_no_trace(trimming):
    session = Session(*load(trimming), step=1000)
    session.read("One. \n")

    def state() -> list[Any]:
        return [session.tail.ids, session.space, session.preview, session.turn, session.texts]

    def refuse(*pieces: str) -> list[int]:
        """As an encoder does that cannot tell a text from a control token."""
        raise AHNError("take it out of the text")

    before, session.encoder = state(), refuse
    with pytest.raises(AHNError, match="take it out"):
        session.read("Two.", name="two.txt")
    assert state() == before and session.space == " \n"


@pytest.mark.parametrize("question", ["", "  Why? \n"])
@pytest.mark.parametrize("texts", [["One. \n\n"], ["One \n", " two\n", "\n"], ["  One"]])
def test_what_is_read_in_pieces_is_what_the_template_trims(trimming, texts, question, tmp_path):
    """White space at the end of a text stays only if more follows."""
    model, tokenizer = load(trimming)
    session = Session(model, tokenizer, step=1000)
    for text in texts:
        session.read(text)
        session.save(tmp_path / "a.ahn")
        session = Session.load(tmp_path / "a.ahn", model, tokenizer)
    said = tokenizer.decode([*session.tail.ids, *session._question(question)])
    content = "".join(texts) + (f"\n\n{question}" if question else "")
    message = [{"role": "user", "content": content}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert said == expected
    list(session.ask(question, max_tokens=1))
    assert session.space == ""
