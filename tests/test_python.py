"""What someone sees who uses the package from Python: names, docstrings, and their examples."""

import doctest
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import talking_model

import ahn_mlx
from ahn_mlx import AHNConfig, Session
from ahn_mlx.reading import memoryfile

METHODS = ("read", "ask", "stream", "fork", "save", "load")
PUBLIC = [name for name in ahn_mlx.__all__ if name != "__version__"]
NAMES = [*PUBLIC, *(f"Session.{name}" for name in METHODS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))


def test_all_names_are_listed_before_they_are_used():
    program = "import ahn_mlx; print(*dir(ahn_mlx))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert set(ahn_mlx.__all__) <= set(done.stdout.split()), done.stderr
    for name in ahn_mlx.__all__:
        assert getattr(ahn_mlx, name)
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        ahn_mlx.Sesion  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_an_example_that_works(name, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thing = found(name)
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    assert examples, f"{name} has no example"
    model, tokenizer = ahn_mlx.load(directory)
    session = Session(model, tokenizer)
    shutil.copytree(directory, tmp_path / "path/to/converted/model")
    known = {"ahn_mlx": ahn_mlx, "model": model, "tokenizer": tokenizer, "session": session}
    for example in examples:
        compile(example.source, name, "exec")
    examples = [e for e in examples if "ahn-gdn-3b" not in e.source]  # of several gigabytes
    test = doctest.DocTest(examples, known, name, None, 0, None)
    said: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed
    assert not failed, "".join(said)


def found(name: str) -> object:
    thing: object = ahn_mlx
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def test_what_is_printed_of_objects_is_one_readable_line(directory, tmp_path):
    config = AHNConfig(memory="mamba2", window=40, sinks=4, fa_layer_ids=(1,))
    assert eval(repr(config)) == config and "\n" not in repr(config)
    session = Session(*ahn_mlx.load(directory))
    assert repr(session) == f"<Session of {directory}: 0 tokens, turn 'start'>"
    session.read("Hi.")
    assert repr(session).endswith(f"{session.tokens} tokens, turn 'read'>")


def test_a_model_knows_how_it_was_loaded(directory, tmp_path, monkeypatch):
    """So that a memory made in Python is one that ask can load, from anywhere."""
    monkeypatch.chdir(directory.parent)
    model, tokenizer = ahn_mlx.load(directory.name, window=20, sinks=2, dtype="float32")
    monkeypatch.chdir(tmp_path)
    session = Session(model, tokenizer)
    session.read("It was the best of times. " * 3, name="a\nbook\udce4.txt")
    session.save("book.ahn")
    facts = memoryfile.read_facts(Path("book.ahn"))
    known = {k: facts["model"][k] for k in ("name", "dtype", "q_bits")}
    assert known == {"name": str(directory), "dtype": "float32", "q_bits": None}
    assert [t["name"] for t in facts["texts"]] == ["a book\ufffd.txt"]
    command = [sys.executable, "-m", "ahn_mlx", "ask", "--memory", "book.ahn", "Why?"]
    done = subprocess.run([*command, "--max-tokens", "2"], capture_output=True, text=True)
    assert done.returncode == 0 and "first token after" in done.stderr, done.stderr
    assert Session.load("book.ahn", model, tokenizer).origin["name"] == str(directory)


def test_a_memory_whose_model_has_moved_goes_on_where_it_is_now(directory, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(directory, old)
    session = Session(*ahn_mlx.load(old))
    session.save(tmp_path / "a.ahn")
    old.rename(new)
    moved = Session.load(tmp_path / "a.ahn", *ahn_mlx.load(new))
    assert moved.origin["name"] == str(new)
    moved.save(tmp_path / "a.ahn")
    assert memoryfile.read_facts(tmp_path / "a.ahn")["model"]["name"] == str(new)
