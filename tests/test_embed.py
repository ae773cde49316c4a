"""The library in embed/ against the same models in Python: numbers, texts and memory files.

What is expected comes from the model with caches, from `ahn-mlx` itself, or from the exported
function run by Python's MLX.
"""

import hashlib
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GOLDEN, chat_tokenizer, make_base, memory_of, talking_model
from mlx.utils import tree_flatten

from ahn_mlx import load, load_model
from ahn_mlx.apps.export import export_app
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.model.pure import initial_state
from ahn_mlx.reading.generate import Run, make_prompt
from ahn_mlx.reading.sampling import Sampling
from ahn_mlx.reading.session import Session
from embed import logits, needs_tools, refused, run, sample

pytestmark = needs_tools

VARIANTS = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
IDS = [(7 * n + n * n) % 251 for n in range(200)]
# Filling, just full, crossing, wrapping a window of 12 + 4.
CUTS = (1, 1, 7, 12, 1, 3, 1, 40, 12, 1, 1)


def golden(variant: str, out: Path, **options) -> Path:
    folder = GOLDEN / variant
    parts = (folder / "base", folder / "ahn_only")
    convert(*parts if parts[0].is_dir() else (None, folder / "merged"), out, **options)
    return out


def runs(cuts=CUTS):
    at, found = 0, []
    for n in cuts:
        found.append(IDS[at : at + n])
        at += n
    return found


def by_python(directory: Path, model, parts: list[list[int]]) -> np.ndarray:
    """The exported function, called by Python as the library calls it: in the longest traces
    that are filled, or the shortest that takes the rest."""
    manifest = json.loads((directory / "manifest.json").read_text())
    step = mx.import_function(str(directory / "model.mlxfn"))
    weights = mx.load(str(directory / "weights.safetensors"))
    state, at, found = initial_state(model), 0, []
    lengths = manifest["lengths"]
    for part in parts:
        while part:
            L = next((x for x in lengths if x >= len(part)), lengths[-1])
            if lengths.index(L) >= 2 and 2 * len(part) < L:
                L = lengths[lengths.index(L) - 1]
            n = min(L, len(part))
            ids = mx.array([part[:n] + [0] * (L - n)])
            out, *state = step(ids, mx.array([at]), mx.array([n]), *state, **weights)
            mx.eval(out, state)
            part, at = part[n:], at + n
        found.append(np.array(out[0].astype(mx.float32)))
    return np.stack(found)


def by_model(model, parts: list[list[int]]) -> np.ndarray:
    cache, found = model.make_cache(), []
    for part in parts:
        out = model(mx.array([part]), cache=cache)
        mx.eval(out, [c.state for c in cache])
        found.append(np.array(out[0, -1].astype(mx.float32)))
    return np.stack(found)


def check_numbers(directory: Path, model, parts):
    found = logits(directory, parts)
    assert np.array_equal(found, by_python(directory, model, parts))
    expected = by_model(model, parts)
    assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_memories(variant, tmp_path):
    model, _ = load_model(golden(variant, tmp_path / "model"), dtype="float32")
    export_app(model, chat_tokenizer(), tmp_path / "app")
    check_numbers(tmp_path / "app", model, runs())


def test_a_base_of_four_bits(tmp_path):
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "trained")
    convert(base, memory, tmp_path / "model", q_bits=4)
    model, _ = load_model(tmp_path / "model", window=12, dtype="float32")
    assert any(name.endswith("scales") for name, _ in tree_flatten(model.parameters()))
    export_app(model, chat_tokenizer(), tmp_path / "app")
    check_numbers(tmp_path / "app", model, runs())


# Texts


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A small model that talks, in Python and exported."""
    folder = tmp_path_factory.mktemp("talking")
    model, tokenizer = load(talking_model("qwen2-gdn", folder), dtype="float32")
    export_app(model, tokenizer, folder / "app", chunk=12)
    return model, tokenizer, folder / "app"


def text(n: int) -> str:
    return "".join(" " if i % 6 == 5 else chr(97 + (7 * i + i * i // 3) % 26) for i in range(n))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "text.txt").write_text(text(100))
    return tmp_path / "text.txt"


def said(session, question, n=20) -> str:
    return "".join(session.ask(question, max_tokens=n))


def test_reads_and_answers_as_python_does(talking, file):
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12)
    session.read(text(100))
    session.read(" more")
    answers = [said(session, "Why?"), said(session, "And then?")]
    more = file.with_name("more.txt")
    more.write_text(" more")
    found = sample(
        app,
        *("--read", file, "--read", more, "--max-tokens", 20),
        *("--ask", "Why?", "--ask", "And then?"),
    )
    assert found == "".join(f"{answer}\n" for answer in answers)


def test_plain_continuation(talking, file):
    model, tokenizer, app = talking
    session = Session(model, tokenizer, step=12, chat=False)
    session.read(text(100))
    expected = said(session, "")
    assert (
        sample(app, "--plain", "--read", file, "--max-tokens", 20, "--ask", "") == expected + "\n"
    )


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


def contents(file: Path):
    """Arrays and metadata."""
    return mx.load(str(file), format="safetensors", return_metadata=True)


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


def test_sampling_is_that_of_python(talking, file):
    model, tokenizer, app = talking
    prompt = make_prompt(tokenizer, question="Tell me")
    sampling = Sampling(max_tokens=30, temp=0.8, top_p=0.9, seed=7)
    expected = "".join(Run(model, tokenizer, prompt, sampling))
    found = sample(
        app,
        *("--temperature", 0.8, "--top-p", 0.9, "--seed", 7, "--max-tokens", 30),
        *("--ask", "Tell me"),
    )
    assert found == expected + "\n"


def test_a_stop_ends_the_answer_and_is_not_said(talking, file):
    _, _, app = talking
    options = ("--read", file, "--max-tokens", 20)
    whole = sample(app, *options, "--ask", "Why?")
    stop = whole[7:10]
    found = sample(app, *options, "--stop", stop, "--ask", "Why?")
    assert found == whole[: whole.index(stop)] + "\n"


# What goes wrong


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
    if name == "manifest.json" and change == "a byte":
        return  # of a number, perhaps
    message = refused(app, "--ask", "a")
    assert str(app) in message and "export" in message


def test_another_version_and_device(talking, tmp_path):
    app = shutil.copytree(talking[2], tmp_path / "app")
    manifest = json.loads((app / "manifest.json").read_text())
    for change, words in (
        ({"mlx": "0.31.2"}, "was exported by MLX"),
        ({"device": "gpu"}, "was exported for a GPU"),
        ({"version": 7}, "is of version 7"),
    ):
        (app / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert words in refused(app, "--ask", "a")
    assert "cannot be read" in refused(tmp_path / "nowhere")


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
    sums = hashlib.sha256(words.encode())
    for name in sorted(arrays):
        x = arrays[name]
        sums.update(f"{name} {x.dtype} {x.shape}".encode() + np.array(x).tobytes())
    old = tmp_path / "1.safetensors"
    known = {"format": "mlx", "ahn": words, "sha256": sums.hexdigest()}
    mx.save_safetensors(str(old), arrays, known)
    assert len(ids) == 6
    assert sample(app, "--load", old, "--max-tokens", 20, "--ask", "Why?") == expected + "\n"


def exported(variant: str, out: Path, dtype="float32", **settings):
    model, _ = load_model(golden(variant, out / "model"), dtype=dtype)
    for layer in model.layers:
        layer.self_attn.config = replace(layer.self_attn.config, **settings)
    export_app(model, chat_tokenizer(), out / "app")
    return model, out / "app"


def test_half_precision(tmp_path):
    model, app = exported("qwen2-gdn", tmp_path, dtype="bfloat16")
    assert np.array_equal(logits(app, runs()), by_python(app, model, runs()))


@pytest.mark.parametrize("sound", [True, False])
def test_a_step_with_kernels_that_do_not_agree_does_not_serve(sound, tmp_path):
    """Stood in for by one that differs beyond a full window only."""
    plain, app = exported("qwen2-gdn", tmp_path, sink_positions="absolute")
    other = "absolute" if sound else "clamped"
    kernels, with_kernels = exported("qwen2-gdn", tmp_path / "k", sink_positions=other)
    shutil.copy(app / "model.mlxfn", app / "plain.mlxfn")
    shutil.copy(with_kernels / "model.mlxfn", app / "model.mlxfn")
    manifest = json.loads((app / "manifest.json").read_text())
    for name in ("model.mlxfn", "plain.mlxfn"):
        manifest["files"][name] = hashlib.sha256((app / name).read_bytes()).hexdigest()
    (app / "manifest.json").write_text(json.dumps(manifest))
    expected = by_model(plain, runs())
    assert np.abs(logits(app, runs()) - expected).max() < 1e-4
    assert sound or np.abs(by_model(kernels, runs()) - expected).max() > 1e-2


def test_texts_that_are_none(talking, tmp_path):
    _, _, app = talking
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    assert "byte 3 belongs to no character" in refused(app, "--read", tmp_path / "bad.txt")
    assert "nothing to continue from" in refused(app, "--plain", "--ask", "")


def test_buffers_are_written_in_place(talking):
    """None of 100 steps copies a window."""
    _, _, app = talking
    done = run("ahn-probe", "decode", app, 100)
    moved, peak, _ = done.stdout.split()
    assert int(moved) == 0
