"""Memory files of the library in embed/ and of Python: the same, both ways."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import make_base, memory_of

from ahn_mlx import load
from ahn_mlx.apps.export import export_app
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.reading.session import Session
from embed import contents, needs_tools, refused, said, sample, save_memory, talks, text, text_file

pytestmark = needs_tools


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return talks(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def file(tmp_path):
    return text_file(tmp_path)


@pytest.mark.parametrize("n", [5, 36, 37, 100])
def test_memories_of_python_are_asked_here(talking, n, tmp_path):
    """Less than the window, full steps, and a tail that crosses."""
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12)
    session.read(text(n))
    session.save(tmp_path / "a.ahn")
    expected = said(session.fork(), "Why?")
    found = sample(app, "--load", tmp_path / "a.ahn", "--max-tokens", 20, "--ask", "Why?")
    assert found == expected + "\n"
    # And read on, from the last full step.
    (tmp_path / "more.txt").write_text(text(30))
    session.read(text(30))
    expected = said(session, "Why?")
    options = ("--load", tmp_path / "a.ahn", "--read", tmp_path / "more.txt", "--max-tokens", 20)
    assert sample(app, *options, "--ask", "Why?") == expected + "\n"


@pytest.mark.parametrize("n", [5, 36, 37, 100])
def test_memories_from_here_are_asked_in_python(talking, n, tmp_path):
    model, tokenizer, app = talking
    (tmp_path / "text.txt").write_text(text(n))
    options = ("--read", tmp_path / "text.txt", "--max-tokens", 20)
    found = sample(app, *options, "--save", tmp_path / "b.ahn", "--ask", "Why?")
    session = Session.load(tmp_path / "b.ahn", model, tokenizer)
    assert session.tokens == n + len("[user]")
    assert session.texts[0]["name"] == "text.txt"
    python = Session(model, tokenizer, step=12)
    python.read(text(n))
    assert session.tail.ids == python.tail.ids and session.turn == "read"
    for ours, theirs in zip(session.caches, python.caches, strict=True):
        for a, b in zip(ours.buffers, theirs.buffers, strict=True):
            assert mx.abs(a - b).max() < 1e-4
        if theirs.memory is not None:
            assert mx.abs(ours.memory - theirs.memory).max() < 1e-4
    assert said(session.fork(), "Why?") + "\n" == found
    # Back again, after an answer.
    said(session, "Why?")
    session.save(tmp_path / "c.ahn")
    expected = said(session, "More?")
    options = ("--load", tmp_path / "c.ahn", "--max-tokens", 20, "--ask", "More?")
    assert sample(app, *options) == expected + "\n"


def test_what_is_saved_again_is_the_same(talking, file, tmp_path):
    """A file that is loaded and saved differs in nothing but the time."""
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12, system="")
    session.read(text(100))
    session.save(tmp_path / "a.ahn")
    sample(app, "--load", tmp_path / "a.ahn", "--save", tmp_path / "b.ahn")
    a, b = (contents(tmp_path / name) for name in ("a.ahn", "b.ahn"))
    assert a[0].keys() == b[0].keys()
    assert all(mx.array_equal(a[0][k], b[0][k]) for k in a[0])
    facts = [json.loads(x[1]["ahn"]) for x in (a, b)]
    for x in facts:
        x.pop("saved")
    assert facts[0] == facts[1]


def seen_in(file: Path) -> set[int]:
    """Ids whose bits are set, by the rule of docs/memory-format.md."""
    packed = np.array(contents(file)[0]["seen"])
    return {t for t in range(8 * len(packed)) if packed[t // 8] >> t % 8 & 1}


def test_tokens_that_were_seen(talking, file, tmp_path):
    """Read, asked and said, here as in Python, whoever wrote the file before."""
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12)
    session.read(text(100))
    session.save(tmp_path / "a.ahn")
    more = tmp_path / "more.txt"
    more.write_text("XYZ")
    for start in (("--read", file), ("--load", tmp_path / "a.ahn")):
        fork = session.fork()
        sample(app, *start, "--save", tmp_path / "b.ahn")
        assert seen_in(tmp_path / "b.ahn") == seen_in(tmp_path / "a.ahn")
        fork.read("XYZ")
        said(fork, "QRS?")
        fork.save(tmp_path / "c.ahn")
        options = (*start, "--read", more, "--max-tokens", 20, "--ask", "QRS?")
        sample(app, *options, "--save", tmp_path / "b.ahn")
        assert seen_in(tmp_path / "b.ahn") == seen_in(tmp_path / "c.ahn")
        assert len(seen_in(tmp_path / "c.ahn")) > len(seen_in(tmp_path / "a.ahn"))
    # One that does not know stays so.
    session.seen = None
    session.save(tmp_path / "old.ahn")
    sample(app, "--load", tmp_path / "old.ahn", "--read", more, "--save", tmp_path / "b.ahn")
    assert "seen" not in contents(tmp_path / "b.ahn")[0]


def test_wrong_flags_of_what_was_seen(talking, tmp_path):
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12)
    session.read(text(50))
    session.save(tmp_path / "a.ahn")
    arrays, metadata = contents(tmp_path / "a.ahn")
    size = arrays["seen"].size
    assert session.tail.ids
    for seen, words in (
        (mx.zeros(size + 1, mx.uint8), f"not U8 ({size},)"),
        (mx.zeros(size, mx.uint32), f"not U8 ({size},)"),
        (mx.zeros((1, size), mx.uint8), f"not U8 ({size},)"),
        (mx.zeros(size, mx.uint8), "has not seen the tokens of its tail"),
    ):
        save_memory(tmp_path / "x.ahn", {**arrays, "seen": seen}, metadata)
        assert words in refused(app, "--load", tmp_path / "x.ahn")


def test_bits_beyond_the_vocabulary(tmp_path):
    """Of 262 tokens the last byte has six."""
    base = make_base(tmp_path / "base", vocab_size=262)
    convert(base, memory_of(base, tmp_path / "trained"), tmp_path / "model")
    model, tokenizer = load(tmp_path / "model", window=12, dtype="float32")
    export_app(model, tokenizer, tmp_path / "app", chunk=12)
    session = Session(model, tokenizer, step=12, chat=False)
    session.read_ids([261, 0, 7, 8])
    session.save(tmp_path / "a.ahn")
    sample(tmp_path / "app", "--load", tmp_path / "a.ahn", "--save", tmp_path / "b.ahn")
    assert seen_in(tmp_path / "b.ahn") == {0, 7, 8, 261}
    arrays, metadata = contents(tmp_path / "a.ahn")
    for byte, fits in ((0x3F, True), (0x7F, False), (0xBF, False)):
        seen = np.array(arrays["seen"])
        seen[-1] = byte
        save_memory(tmp_path / "x.ahn", {**arrays, "seen": mx.array(seen)}, metadata)
        options = ("--load", tmp_path / "x.ahn")
        if fits:
            sample(tmp_path / "app", *options)
        else:
            assert "other tokens than the 262" in refused(tmp_path / "app", *options)


def test_a_file_of_version_1(talking, tmp_path):
    """Its tokens that wait are read when it is loaded."""
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12)
    session.read(text(30 - len("[user]")))
    expected = said(session.fork(), "Why?")
    ids = list(session.tail.ids)
    session.save(tmp_path / "2.ahn")
    arrays, metadata = contents(tmp_path / "2.ahn")
    facts = json.loads(metadata["ahn"])
    arrays = {k: v for k, v in arrays.items() if "tail" not in k}
    arrays["pending"] = mx.array(ids, dtype=mx.uint32)
    facts = {k: v for k, v in facts.items() if k not in ("memory", "base", "texts")}
    words = json.dumps({**facts, "version": 1})
    old = tmp_path / "1.ahn"
    save_memory(old, arrays, {"format": "mlx", "ahn": words})
    assert len(ids) == 6
    assert sample(app, "--load", old, "--max-tokens", 20, "--ask", "Why?") == expected + "\n"
