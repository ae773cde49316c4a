"""A repository, or a directory, of which nothing is what it should be: it costs its user one line
of error, and nothing in it is run, believed, or followed out of its directory."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from checkpoints import Evil, pickled
from faultcases import NAME, Place, one_line

from ahn_mlx.hub.published import MODELS

TRACE = "trace"


def evil(place: Place) -> dict[str, bytes]:
    """A file of each name that is looked at, all of them hostile."""
    trace = place.path / TRACE
    code = f"open({str(trace)!r}, 'w')\n"
    pickled(place.path / "evil.bin", Evil(str(trace)))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}"
    out = "../" * 9 + str(place.path / "secret.json").lstrip("/")
    config = {
        **{"model_type": "../../\x1b[31mevil\n", "auto_map": {"AutoConfig": "evil.Config"}},
        **{"architectures": ["evil.Model"], "hidden_size": 1 << 60, "num_hidden_layers": -1},
        **{"model_file": "evil.py", "ahn": {"memory": "__class__", "window": 1e308}},
        **{"eos_token_id": [-1, "\x1b[2J"], "name\x1b]0;owned\x07\n": "\n" * 99},
    }
    tokenizer = {"tokenizer_class": "evil.Tokenizer", "chat_template": escape}
    auto = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": {"a\n\x1b[2J": out}}).encode(),
        "model.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
        "model-00001-of-99999.safetensors": b"[" * 100_000,
        "pytorch_model.bin": (place.path / "evil.bin").read_bytes(),
        "tokenizer.json": b'{"model":' * 50_000,
        "tokenizer_config.json": json.dumps({**tokenizer, **auto}).encode(),
        "special_tokens_map.json": b'{"eos_token": {"content": 5}}',
        "chat_template.jinja": (loop + escape).encode(),
        "generation_config.json": b'{"eos_token_id": 1e999, "repetition_penalty": "NaN"}',
        "README.md": b"---\nlicense: !!python/object/apply:os.system ['id']\n---\n\x1b[2J"
        + b"#" * 99,
        "evil.py": code.encode(),
        "ahn_model.py": code.encode(),
        "Config.json": b"{}",
    }


def refused(place: Place, *words: object) -> str:
    run = place.server.run(*words, timeout=300)
    said = one_line(run)
    assert said.isprintable() and len(said) < 1000, said
    if "pull" not in words and "me/evil" not in words:  # which say more while they fetch
        assert all(x.startswith(("error: ", "note: ")) for x in run.said.splitlines()), run.said
    assert "of the user" not in said and not (place.path / TRACE).exists()
    return said


def test_all_of_it_at_once_and_less_and_less_of_it(place: Place) -> None:
    """When a file is mended, the next is found."""
    place.clear()
    sound = {f.name: f.read_bytes() for f in place.model.iterdir()}
    bad = evil(place)
    mended: dict[str, bytes] = {}
    order = ("config.json", "generation_config.json", "model.safetensors.index.json")
    order += ("model.safetensors",)
    order += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    said = []
    for n in range(len(order)):
        mended = {name: sound[name] for name in order[:n] if name in sound}
        place.hub.repos["me/evil"] = {**bad, **mended}
        place.clear()
        said.append(refused(place, "generate", "Why?", "--model", "me/evil", "-m", 1))
    assert "/config.json" in said[0] and "generation_config.json" in said[1]
    assert "index.json" in said[2] and "claims 1152921504606846976 bytes" in said[3]
    assert "tokenizer" in said[4]
    place.hub.repos["me/evil"] = {**bad, **sound}
    place.clear()
    run = place.server.run("generate", "Why?", "--model", "me/evil", "-m", 1)
    assert run.status in (0, 2) and "Traceback" not in run.said
    assert not (place.path / TRACE).exists()


@pytest.mark.parametrize("whose", ["memory", "base"])
def test_a_published_name_whose_repository_was_taken_over(place: Place, whose: str) -> None:
    entry = MODELS[NAME]
    repo = entry.repo if whose == "memory" else entry.base.repo
    before = dict(place.hub.repos[repo])
    place.clear()
    place.hub.repos[repo] = evil(place)
    try:
        assert "config.json" in refused(place, "pull", NAME)
    finally:
        place.hub.repos[repo] = before
    models = place.out / "cache/ahn-mlx/models"
    assert [p.name for p in models.iterdir() if p.suffix != ".lock"] == []


def taken(place: Place, name: str, kind: str) -> Path:
    """A sound model with one file that is none."""
    at = place.out / "given"
    shutil.copytree(place.model, at)
    (at / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(at / name)
    elif kind == "a device":
        (at / name).symlink_to("/dev/zero")
    else:
        (at / name).symlink_to(place.path / "secret.json")
    return at


def test_files_that_make_libraries_speak(place: Place) -> None:
    """transformers of a kind of model that it does not know, and Rust of a panic."""
    place.clear()
    model = place.out / "given"
    shutil.copytree(place.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "\x1b[31mevil\n"}))
    (model / "generation_config.json").write_text('{"eos_token_id": "none such"}')
    for words in (("generate", "Why?"), ("chat",), ("bench",), ("estimate",), ("serve",)):
        assert "'none such'" in refused(place, *words, "--model", model)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(place.model / name, model / name)
    table = json.loads((model / "tokenizer.json").read_text())
    table["model"]["continuing_subword_prefix"] = "##"
    table["model"]["merges"] = [["a", "b"]]
    (model / "tokenizer.json").write_text(json.dumps(table))
    for words in (("generate", "Why?"), ("chat",), ("serve",)):
        assert "no usable tokenizer" in refused(place, *words, "--model", model)


NAMES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")
NAMES += ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
NAMES += ("added_tokens.json", "generation_config.json", "vocab.json")


@pytest.mark.parametrize("kind", ["a link out", "a pipe", "a device"])
@pytest.mark.parametrize("name", NAMES)
def test_one_file_that_is_none(place: Place, name: str, kind: str) -> None:
    place.clear()
    model = taken(place, name, kind)
    assert name in refused(place, "generate", "Why?", "--model", model, "-m", 1)


@pytest.mark.parametrize("kind", ["a link out", "a pipe", "a device"])
@pytest.mark.parametrize("name", ["config.json", "README.md", "LICENSE", "id.json", "notes.txt"])
def test_nothing_that_lies_elsewhere_is_uploaded(place: Place, name: str, kind: str) -> None:
    place.clear()
    model = taken(place, name, kind)
    assert name in refused(place, "upload", model, "--repo", "me/mine")
    assert not place.hub.repos.get("me/mine") and not place.hub.stored
