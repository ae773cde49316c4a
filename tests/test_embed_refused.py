"""What the library in embed/ and its sample refuse, each in one line that says what to do."""

import json
import resource
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import talking_model

from ahn_mlx import load
from ahn_mlx.reading.session import Session
from embed import contents, needs_tools, refused, rewrite, run, sample, talks, text, text_file

pytestmark = needs_tools


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return talks(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def file(tmp_path):
    return text_file(tmp_path)


def damaged(app: Path, out: Path, name: str, change) -> Path:
    shutil.copytree(app, out)
    data = (out / name).read_bytes()
    (out / name).write_bytes(change(data))
    return out


CHANGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a byte": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "noise": lambda data: bytes(i * 7 % 256 for i in range(1000)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["manifest.json", "model.mlxfn", "weights.safetensors", "tokenizer.bin"]
)
def test_damaged_models(talking, name, change, tmp_path):
    app = damaged(talking[2], tmp_path / "app", name, CHANGES[change])
    message = refused(app, "--ask", "a")
    assert str(app) in message and "export" in message


def test_every_bit_of_the_manifest(talking, tmp_path):
    """All that can be flipped unnoticed is white space for other white space."""
    app = shutil.copytree(talking[2], tmp_path / "app")
    rewrite(app, name='caf\u00e9 \U0001f600 "\\/\x7f\n\t\x01')  # whatever JSON has to write
    file = app / "manifest.json"
    data = file.read_bytes()
    done = run("ahn-probe", "manifest", file)
    assert done.returncode == 0, done.stderr.decode()
    for bit in map(int, done.stdout.split()):
        at = bit // 8
        flipped = data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]
        assert json.loads(flipped) == json.loads(data)


def test_fields_that_belong_together(talking, tmp_path):
    """A window and sinks of the same sum would fit all shapes."""
    app = shutil.copytree(talking[2], tmp_path / "app")
    file = app / "manifest.json"
    manifest = json.loads(file.read_text())
    for change in ({"window": 13, "sinks": 3}, {"heads": 2, "head_dim": 32}, {"name": "other"}):
        file.write_text(json.dumps({**manifest, **change}))
        message = refused(app, "--ask", "a")
        assert message == f"{file}: damaged, its checksum does not fit what it says; " + (
            "export the model again\n"
        )
    file.write_text(json.dumps(manifest, indent=1))  # says the same
    sample(app, "--ask", "a", "--max-tokens", 1)


def test_a_manifest_of_the_first_version(talking, tmp_path):
    app = shutil.copytree(talking[2], tmp_path / "app")
    manifest = json.loads((app / "manifest.json").read_text())
    del manifest["sha256"]
    (app / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    assert "is of version 1, this library reads 2; export" in refused(app, "--ask", "a")
    (app / "manifest.json").write_text(json.dumps(manifest))
    assert "damaged, it does not say its sha256" in refused(app, "--ask", "a")


def test_one_bit_of_the_weights(talking, tmp_path):
    """The first and the last byte after the header, and one in between."""
    app = shutil.copytree(talking[2], tmp_path / "app")
    file = app / "weights.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in (start, (start + len(data)) // 2, len(data) - 1):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        message = refused(app, "--ask", "a")
        assert f"{file}: damaged" in message and "export the model again" in message
    file.write_bytes(data)
    sample(app, "--ask", "a", "--max-tokens", 1)


@pytest.mark.parametrize(
    "change",
    [
        *({"window": 512}, {"window": 13}, {"sinks": 2}, {"sinks": 5}, {"layers": 1}),
        *({"heads": 8}, {"head_dim": 8}, {"gates": 3}, {"dtype": "bfloat16"}),
        *({"vocabulary": 300}, {"lengths": [1, 7]}, {"ends": [1000]}),
        *({"files": {}}, {"weights": "0"}, {"weights": -1}),
    ],
    ids=str,
)
def test_manifests_that_do_not_fit(talking, change, tmp_path):
    app = shutil.copytree(talking[2], tmp_path / "app")
    rewrite(app, **change)
    message = refused(app, "--ask", "a")
    assert message.startswith(f"{app}/manifest.json: damaged, ") and message.count("\n") == 1
    assert "export the model again" in message and "::" not in message


def test_files_that_nobody_knows(talking, tmp_path):
    app = shutil.copytree(talking[2], tmp_path / "app")
    files = json.loads((app / "manifest.json").read_text())["files"]
    rewrite(app, files={**files, "more.bin": "0"})
    assert "it lists the file 'more.bin'" in refused(app, "--ask", "a")


def test_another_version_and_device(talking, tmp_path):
    app = shutil.copytree(talking[2], tmp_path / "app")
    before = (app / "manifest.json").read_text()
    for change, words in (
        ({"mlx": "0.31.2"}, "manifest.json: was exported by MLX '0.31.2', this app has"),
        ({"device": "gpu"}, "was exported for a GPU"),
        ({"version": 7}, "is of version 7"),
    ):
        rewrite(app, **change)
        assert words in refused(app, "--ask", "a")
        (app / "manifest.json").write_text(before)
    assert "cannot be read" in refused(tmp_path / "nowhere")


# The sample


def test_options_stand_anywhere(talking, file):
    _, _, app = talking
    before = sample(app, "--read", file, "--max-tokens", 5, "--plain", "--ask", "a")
    assert sample(app, "--ask", "a", "--max-tokens", 5) != before
    after = sample(app, "--read", file, "--ask", "a", "--plain", "--max-tokens", 5)
    assert after == before
    whole = sample(app, "--read", file, "--plain", "--ask", "a")
    assert whole.startswith(before.strip("\n")) and len(whole) > len(before)


def test_wrong_options(talking, file, tmp_path):
    """Before a model is opened, so that nothing has been read in vain."""
    nowhere = tmp_path / "nowhere"
    for options, words in (
        (("--bogus",), "--bogus: there is no such option"),
        (("--bogus", "1"), "--bogus: there is no such option"),
        (("book.txt",), "book.txt: there is no such option"),
        (("--ask",), "--ask: lacks its value"),
        (("--ask", "a", "--max-tokens", "abc"), "--max-tokens: not a whole number from 1 on"),
        (("--max-tokens", "0"), "--max-tokens: not"),
        (("--max-tokens", "-5"), "--max-tokens: not"),
        (("--max-tokens", "5x"), "--max-tokens: not"),
        (("--max-tokens", "9" * 30), "--max-tokens: not"),
        (("--seed", ""), "--seed: not a whole number from 0 on"),
        (("--temperature", "hot"), "--temperature: not a number"),
        (("--top-p", "0.5,"), "--top-p: not a number"),
        (("--read", file, "--load", "a.ahn"), "--load: comes once, before"),
        (("--load", "a.ahn", "--plain"), "drop --plain"),
    ):
        assert words in refused(nowhere, *options)
    assert "a model comes first" in refused("--read", file)
    assert "a model comes first" in refused()
    for options in (("--help",), ("-h",), (nowhere, "--help"), (nowhere, "--ask", "a", "--help")):
        assert "--max-tokens N" in sample(*options)


def test_texts_that_cannot_be_read(talking, tmp_path):
    _, _, app = talking
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    for name, words in (
        ("", "directory"),
        ("nowhere.txt", "No such file"),
        ("bad.txt", "byte 3 belongs to no character"),
    ):
        message = refused(app, "--read", tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: ") and words in message


def test_memories_of_others(talking, tmp_path):
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12)
    session.read(text(60))
    session.save(tmp_path / "a.ahn")
    data = (tmp_path / "a.ahn").read_bytes()
    for n, (name, change) in enumerate(CHANGES.items()):
        if name != "a byte":
            (tmp_path / f"{n}.ahn").write_bytes(change(data))
            assert f"{n}.ahn: " in refused(app, "--load", tmp_path / f"{n}.ahn")
    for at in (len(data) - 1, len(data) - 20_000):
        (tmp_path / "x.ahn").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert "checksum" in refused(app, "--load", tmp_path / "x.ahn")
    other, its = load(talking_model("qwen2-dn", tmp_path / "other"), dtype="float32")
    Session(other, its, step=12).save(tmp_path / "other.ahn")
    assert "of another model" in refused(app, "--load", tmp_path / "other.ahn")
    arrays, metadata = contents(tmp_path / "a.ahn")
    facts = json.loads(metadata["ahn"])
    facts["layers"] = [[*layer[:3], 8, 32] for layer in facts["layers"]]
    quantized = tmp_path / "q.safetensors"
    mx.save_safetensors(str(quantized), arrays, {**metadata, "ahn": json.dumps(facts)})
    assert "--kv-bits" in refused(app, "--load", quantized)


def test_saving_where_it_cannot_be(talking, file, tmp_path):
    _, _, app = talking
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not a memory" in refused(app, "--read", file, "--save", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "cannot be made" in refused(app, "--read", file, "--save", tmp_path / "no/where.ahn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "text.txt"]


def test_a_full_disk(talking, file, tmp_path):
    """Nothing is left of what could not be written, and what was there stays."""
    _, _, app = talking
    out = tmp_path / "book.ahn"
    sample(app, "--read", file, "--save", out)
    before = out.read_bytes()

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # Python has SIGXFSZ ignored, so that writing says EFBIG.
    full = {"preexec_fn": small, "restore_signals": False}
    words = refused(app, "--read", file, "--read", file, "--save", out, **full)
    assert "free some space, nothing was written" in words
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.ahn", "text.txt"]


def test_texts_that_are_none(talking, tmp_path):
    _, _, app = talking
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    assert "byte 3 belongs to no character" in refused(app, "--read", tmp_path / "bad.txt")
    assert "nothing to continue from" in refused(app, "--plain", "--ask", "")
