"""The library in embed/ against the same models in Python: numbers, texts and memory files.

What is expected comes from the model with caches, from `ahn-mlx` itself, or from the exported
function run by Python's MLX.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GOLDEN, chat_tokenizer, make_base, memory_of
from mlx.utils import tree_flatten

from ahn_mlx import load_model
from ahn_mlx.apps.export import export_app
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.model.pure import initial_state
from ahn_mlx.reading.generate import Run, make_prompt
from ahn_mlx.reading.sampling import Sampling
from ahn_mlx.reading.session import Session
from embed import logits, needs_tools, rewrite, run, said, sample, talks, text, text_file

pytestmark = needs_tools

VARIANTS = sorted(p.name for p in GOLDEN.glob("qwen*"))
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
    return talks(tmp_path_factory.mktemp("talking"))


@pytest.fixture
def file(tmp_path):
    return text_file(tmp_path)


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
    files = json.loads((app / "manifest.json").read_text())["files"]
    for name in ("model.mlxfn", "plain.mlxfn"):
        files[name] = hashlib.sha256((app / name).read_bytes()).hexdigest()
    rewrite(app, files=files)
    expected = by_model(plain, runs())
    assert np.abs(logits(app, runs()) - expected).max() < 1e-4
    assert sound or np.abs(by_model(kernels, runs()) - expected).max() > 1e-2


def test_buffers_are_written_in_place(talking):
    """None of 100 steps copies a window."""
    _, _, app = talking
    done = run("ahn-probe", "decode", app, 100)
    moved, peak, _ = done.stdout.split()
    assert int(moved) == 0


def test_no_compiler_is_needed(talking, tmp_path):
    """Where MLX finds none it fuses nothing, and the answer is the same."""
    _, _, app = talking
    options = (app, "--ask", "Why?", "--max-tokens", 10)
    bare = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    assert sample(*options, env=bare) == sample(*options)
    assert not list(tmp_path.iterdir())
