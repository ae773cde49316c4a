"""Training as a whole, on a model small enough to learn something in seconds."""

import dataclasses
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from checkpoints import GDN, byte_tokenizer, same
from forkserver import command
from mlx.utils import tree_flatten
from mlx_lm.models import phi3, qwen3
from mlx_lm.models.cache import KVCache
from several import GIVEN_UP, environments, last_words

import ahn_mlx
from ahn_mlx import AHNError, load_model
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.measure.compare import compare, silenced, stream
from ahn_mlx.model.augment import memory_layers
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.train import layerwise, loop, metrics, validation
from ahn_mlx.train.data import Sequences
from ahn_mlx.train.output import load_base
from ahn_mlx.train.settings import Settings, draw_window
from ahn_mlx.train.streams import install, trainable

BOOK = Path(__file__).parent.parent / "ahn_mlx/demo/pride-and-prejudice.txt"
MEMORIES = ("gated_deltanet", "deltanet", "mamba2")
SETTINGS = Settings(
    window=12,
    sinks=4,
    seq_len=128,
    steps=150,
    lr=3e-3,
    loss="kl",
    layerwise=0,
    accumulate=1,
    warmup=5,
    weight_decay=0.0,
    random_window=False,
    grad_checkpoint=False,
    seed=0,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a base, a text to train on, and one held out."""
    place = tmp_path_factory.mktemp("training")
    shutil.copytree(GDN / "base", place / "base")
    shutil.copytree(byte_tokenizer(place / "tokenizer"), place / "base", dirs_exist_ok=True)
    text = BOOK.read_text().encode("ascii", "ignore").decode()
    (place / "text.txt").write_text(text[:50_000])
    (place / "held.txt").write_text(text[50_000:52_000])
    return place


def base_model(place, memory="gated_deltanet", router=False, window_gain=False):
    options = {"memory": memory, "window": 12, "sinks": 4, "sink_positions": "absolute"}
    options |= {"router": router, "window_gain": window_gain, "dtype": "float32", "seed": 0}
    return load_base({**options, "base": str(place / "base")})[:2]


def sequences(place, tokenizer, file="text.txt", length=128):
    return Sequences((str(place / file),), tokenizer, length, 0)


def held_out(place, tokenizer):
    data = sequences(place, tokenizer, "held.txt")
    return [data[n] for n in range(8)]


def train(place, out, *args, **options):
    return command(*train_arguments(place, out, *args), **options)


def train_arguments(place, out, *args):
    common = ["--data", place / "text.txt", "--window", 12, "--sinks", 4, "--seq-len", 96]
    rate = [] if ("--steps", 0) in itertools.pairwise(args) else ["--lr", 1e-3]
    return [
        str(x) for x in ("train", "--model", place / "base", "--out", out, *rate, *common, *args)
    ]


def losses_of(out):
    return [line["loss"] for line in metrics.read_metrics(out / metrics.METRICS)]


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_tiny_model_learns_to_remember(place, memory):
    model, tokenizer = base_model(place, memory)
    held = held_out(place, tokenizer)
    before = compare(model, held, 12, 4)
    assert before.ratio == 1  # zero output matrices: a fresh memory changes nothing
    start = {n: x for n, x in mlx_flat(model).items() if ".ahn." not in n}
    trainer = loop.Trainer(model, sequences(place, tokenizer), SETTINGS)
    begin = time.monotonic()
    for _ in range(SETTINGS.steps):
        trainer.train_step()
    assert time.monotonic() - begin < 60
    after = compare(model, held, 12, 4)
    assert after.total.kl["memory"] < 0.7 * before.total.kl["memory"]
    assert after.total.kl["window"] == pytest.approx(before.total.kl["window"], rel=1e-5)
    assert same(start, {n: x for n, x in mlx_flat(model).items() if ".ahn." not in n})


def test_the_model_is_of_the_last_step(place):
    model, tokenizer = base_model(place)
    trainer = loop.Trainer(model, sequences(place, tokenizer), SETTINGS)
    trainer.train_step()
    assert same(trainable(model), loop.fold(trainer.parameters, trainer.sizes))


def mlx_flat(model):
    return dict(tree_flatten(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_layerwise_gates_explain_more(place, memory, monkeypatch):
    model, tokenizer = base_model(place, memory)
    data = sequences(place, tokenizer)
    fitted = layerwise.fit(model, data, 60, 12, 4)
    monkeypatch.setattr(layerwise, "GATE_STEPS", 0)
    constant = layerwise.fit(model, data, 60, 12, 4)
    assert fitted == constant if memory == "mamba2" else fitted > 1.02 * constant


@pytest.mark.parametrize("memory", MEMORIES)
def test_layerwise_matrices_are_those_of_the_fitted_gates(place, memory):
    model, tokenizer = base_model(place, memory)
    data = sequences(place, tokenizer)
    layerwise.fit(model, data, 4, 12, 4)
    layer = model.layers[0]
    attention, weight = layer.self_attn, layer.self_attn.ahn.o_proj.weight
    read, missed = [], []
    for n in range(4):
        h = layer.input_layernorm(model.model.embed_tokens(data[n]))
        full = attention.heads(h, AHNCache(1000, 0))
        r, m = layerwise._read(attention, h, full, 12, 4)
        gate = mx.ones(r.shape[:2])
        if memory != "mamba2":
            gate = nn.silu(h[0, 16:] @ attention.ahn.g_proj.weight.T).T
        read.append(r * gate[..., None])
        missed.append(m)
    projected = memory == "gated_deltanet"  # which has a query projection
    best = layerwise._matrices(tuple(read), tuple(missed), projected)
    assert mx.allclose(best, weight, rtol=1e-3, atol=1e-5)


def test_output_matrices_are_drawn_to_the_scaled_identity():
    keys = mx.random.split(mx.random.key(0), 2)
    read = mx.random.normal((2, 200, 8), key=keys[0])
    exact = mx.stack([0.7 * mx.eye(8), -0.2 * mx.eye(8)])
    # Of few tokens, no better matrix is there to be found; of many, any is.
    few, many = (read[:, :4],), (read,)
    assert mx.allclose(layerwise._matrices(few, (few[0] @ exact,), True), exact, atol=1e-4)
    any_matrix = mx.random.normal((2, 8, 8), key=keys[1])
    found = layerwise._matrices(many, (read @ any_matrix,), True)
    assert (found - any_matrix).square().mean() < 0.1 * any_matrix.square().mean()
    assert not mx.allclose(layerwise._matrices(few, (few[0] @ exact,), False), exact, atol=1e-2)


@pytest.mark.parametrize("rows", [7, 1000])
def test_looked_at_counts_squared_attention_from_beyond_the_window(place, rows, monkeypatch):
    model, tokenizer = base_model(place)
    monkeypatch.setattr(layerwise, "ROWS", rows)
    attention, (W, S, L) = model.layers[0].self_attn, (12, 4, 40)
    h = model.layers[0].input_layernorm(
        model.model.embed_tokens(sequences(place, tokenizer, length=L)[0])
    )
    q, k = (np.array(attention.rope(x))[0] for x in attention.project(h)[:2])
    expected = np.zeros((q.shape[0], L))
    for head in range(q.shape[0]):
        key = k[head // (q.shape[0] // k.shape[0])]
        for t in range(W + S, L):
            scores = np.exp(key[: t + 1] @ q[head, t] * attention.scale)
            expected[head, : t - W + 1] += (scores / scores.sum())[: t - W + 1] ** 2
    found = np.array(layerwise._looked_at(attention, h, W, S))
    np.testing.assert_allclose(found, expected[:, S : L - W], rtol=1e-4)


def test_what_is_looked_at_is_written_most(place):
    model, tokenizer = base_model(place)
    data = sequences(place, tokenizer)
    layer = model.layers[1]
    normed = [layer.input_layernorm(model.model.embed_tokens(data[n])) for n in range(20)]
    b = layerwise._write_what_is_looked_at(layer.self_attn, normed, 12, 4)
    looked = [layerwise._looked_at(layer.self_attn, h, 12, 4) for h in normed]
    mean = mx.concatenate(looked, axis=1).mean(axis=1, keepdims=True)
    h, mine = normed[0][0, 4:-12], looked[0]
    wanted = mx.clip(0.1 * mine / mean, 0.002, 0.95)
    wanted = np.array(mx.log(wanted / (1 - wanted)))
    given = np.array((h @ b.T).T)
    for head in range(len(wanted)):
        assert np.corrcoef(wanted[head], given[head])[0, 1] > 0.3


def test_queries_lose_what_far_keys_share(place):
    """Against rotations written out, for every distance."""
    model, tokenizer = base_model(place)
    attention, W, L = model.layers[0].self_attn, 12, 128
    data = sequences(place, tokenizer)
    normed = [model.layers[0].input_layernorm(model.model.embed_tokens(data[n])) for n in range(3)]
    keep = np.array(layerwise._without_common_key(attention, normed, W))
    H, D = keep.shape[:2]
    k = np.mean([np.array(attention.project(h)[1])[0].mean(axis=1) for h in normed], axis=0)
    frequency = attention.rope.base ** (-np.arange(D // 2) / (D // 2))
    seen = np.zeros_like(k)
    for distance in range(W + 1, L + 1):
        cos, sin = np.cos(distance * frequency), np.sin(distance * frequency)
        a, b = k[:, : D // 2], k[:, D // 2 :]
        seen += np.concatenate([a * cos + b * sin, b * cos - a * sin], axis=1)
    for head in range(H):
        direction = seen[head // (H // len(k))]
        direction = direction / np.linalg.norm(direction)
        np.testing.assert_allclose(keep[head] @ direction, 0, atol=1e-4)
        np.testing.assert_allclose(keep[head] @ keep[head], keep[head], atol=1e-4)
        assert np.trace(keep[head]) == pytest.approx(D - 1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_layerwise_is_a_regression_of_what_the_window_misses(place, memory):
    model, tokenizer = base_model(place, memory)
    data = sequences(place, tokenizer)
    claimed = layerwise.fit(model, data, 60, 12, 4)

    def missed(sequences):
        """Squared errors of the heads with memory, and without, at the teacher's states."""
        errors = np.zeros(2)
        for tokens in sequences:
            x = model.model.embed_tokens(tokens)
            for layer in model.layers:
                h = layer.input_layernorm(x)
                full = layer.self_attn.heads(h, AHNCache(1000, 0))
                ours = layer.self_attn.heads(h, AHNCache(12, 4))
                with silenced(model):
                    local = layer.self_attn.heads(h, AHNCache(12, 4))
                errors += [((a - full)[:, :, 16:] ** 2).sum().item() for a in (ours, local)]
                x = layer(x, cache=AHNCache(1000, 0))
        return errors

    ours, local = missed(data[n] for n in range(60))
    assert 1 - ours / local == pytest.approx(claimed, abs=1e-4) and claimed > 0.05
    ours, local = missed(held_out(place, tokenizer))
    assert ours < local


@pytest.mark.slow
def test_kill_ctrl_c_and_a_closed_terminal_change_no_loss(place, tmp_path):
    options = ("--steps", 14, "--layerwise", 2, "--save-every", 3, "--accumulate", 2)
    options += ("--batch-size", 2, "--window", "8+2@48")
    done = train(place, tmp_path / "once", *options)
    assert done.returncode == 0, done.stderr
    expected = losses_of(tmp_path / "once")
    assert len(expected) == 14 and len(set(expected)) == 14
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGHUP):
        out = tmp_path / number.name
        words = [sys.executable, "-m", "ahn_mlx", *train_arguments(place, out, *options)]
        child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        while len(losses_of(out)) < 5:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        message = child.communicate(timeout=60)[1]
        if number != signal.SIGKILL:
            assert child.returncode == 130 and "--resume goes on" in message
        done = train(place, out, *options, "--resume")
        assert done.returncode == 0, done.stderr
        assert losses_of(out) == expected
        assert same(
            mx.load(str(out / "model.safetensors")),
            mx.load(str(tmp_path / "once" / "model.safetensors")),
        )


def test_output_is_the_published_layout_and_converts(place, tmp_path):
    done = train(place, tmp_path / "out", "--steps", 3, "--layerwise", 2)
    assert done.returncode == 0, done.stderr
    release = GDN.with_name("qwen2-gdn-qproj") / "ahn_only/model.safetensors"
    theirs = set(mx.load(str(release)))
    ours = set(mx.load(str(tmp_path / "out/model.safetensors")))
    # D is in every release and read by nobody.
    assert ours == {name for name in theirs if not name.endswith(".D")}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["_ahn_implementation"] == "GatedDeltaNet" and config["sliding_window"] == 12
    assert config["use_q_proj"] is True
    assert "trained with a window of 12 tokens" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    convert(place / "base", tmp_path / "out", tmp_path / "model")
    converted, _ = load_model(tmp_path / "model", dtype="float32")
    assert converted.ahn.sink_positions == "clamped"
    trained, _ = ahn_mlx.load(place / "base", ahn=tmp_path / "out", dtype="float32")
    tokens = mx.arange(100)[None] * 7 % 256
    assert mx.allclose(converted(tokens), trained(tokens), atol=1e-5)
    with silenced(trained):
        assert not mx.allclose(converted(tokens), trained(tokens), atol=1e-2)


@pytest.mark.slow
def test_a_trained_memory_is_trained_on(place, tmp_path):
    first, on = tmp_path / "first", tmp_path / "on"
    done = train(place, first, "--steps", 3, "--layerwise", 2)
    assert done.returncode == 0, done.stderr
    done = train(place, on, "--steps", 0, "--ahn", first)
    assert done.returncode == 0, done.stderr
    assert same(*(mx.load(str(out / "model.safetensors")) for out in (first, on)))


def test_a_memory_without_query_projection_is_trained_on(place, tmp_path):
    release = GDN / "ahn_only"
    done = train(place, tmp_path / "on", "--steps", 1, "--ahn", release)
    assert done.returncode == 0, done.stderr
    theirs, ours = (set(mx.load(str(d / "model.safetensors"))) for d in (release, tmp_path / "on"))
    assert ours == {name for name in theirs if not name.endswith(".D")}


def another_base(place, directory, module, **config):
    """A base of random parameters, with the tokenizer of the other."""
    config = {**json.loads((place / "base/config.json").read_text()), **config}
    model = module.Model(module.ModelArgs.from_dict(config))
    shutil.copytree(place / "base", directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(directory / "model.safetensors"), dict(tree_flatten(model.parameters()))
    )
    return directory


def test_wider_heads_have_no_query_projection(place, tmp_path):
    base = another_base(
        place,
        tmp_path / "wide",
        qwen3,
        model_type="qwen3",
        head_dim=32,
        max_position_embeddings=512,
    )
    done = train(place, tmp_path / "out", "--model", base, "--steps", 1, "--layerwise", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["use_q_proj"] is False


def test_another_family_learns(place, tmp_path):
    base = another_base(place, tmp_path / "fused", phi3, model_type="phi3")
    done = train(place, tmp_path / "out", "--model", base, "--steps", 1, "--layerwise", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "phi3"


def test_steps_go_on_where_the_layerwise_fit_ended(place):
    """With its own sequences, and with the memories of the first layers silent."""
    model, tokenizer = base_model(place)
    data, asked = sequences(place, tokenizer), []

    class Asked(Sequences):
        def __init__(self):
            self.__dict__ = data.__dict__

        def __getitem__(self, n):
            asked.append(n)
            return super().__getitem__(n)

    settings = dataclasses.replace(SETTINGS, layerwise=2, steps=2, accumulate=2)
    trainer = loop.Trainer(model, Asked(), settings)
    loud = [a.ahn.o_proj.weight.abs().sum().item() > 0 for _, a in memory_layers(model)]
    assert loud == [False, True, True]
    trainer.train_step()
    trainer.train_step()
    assert asked == [0, 1, 2, 3, 4, 5]
    assert all(a.ahn.o_proj.weight.abs().sum().item() > 0 for _, a in memory_layers(model))


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_sequences(place, tmp_path):
    done = train(
        *(place, tmp_path / "one", "--steps", 3, "--layerwise", 2, "--lr", 1e-5),
        *("--accumulate", 2, "--batch-size", 2),
    )
    assert done.returncode == 0, done.stderr
    launch = Path(sys.executable).with_name("mlx.launch")
    arguments = train_arguments(
        *(place, tmp_path / "two", "--steps", 3, "--layerwise", 2, "--lr", 1e-5),
        *("--batch-size", 2),
    )
    words = [launch, "-n", "2", "--", sys.executable, "-m", "ahn_mlx", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_a_lost_machine_ends_the_others_in_one_line(place, tmp_path):
    arguments = train_arguments(place, tmp_path / "out", "--steps", 10**6, "--layerwise", 0)
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "ahn_mlx", *arguments],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in environments(2, tmp_path)
    ]
    while len(losses_of(tmp_path / "out")) < 2:
        assert machines[0].poll() is None
        time.sleep(0.05)
    machines[1].kill()
    machines[1].communicate()
    message = last_words(machines[0])
    assert "Traceback" not in message, message
    if machines[0].returncode == -signal.SIGTERM:
        assert GIVEN_UP in message, message
    else:
        assert machines[0].returncode == 2 and "--resume goes on" in message, message


@pytest.mark.slow
def test_options_are_refused_in_one_line(place, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfa")
    cases = [
        (("--data", tmp_path / "absent.txt"), "absent.txt: No such file"),
        (("--data", tmp_path / "bytes.txt"), "bytes.txt: not UTF-8"),
        (("--data", tmp_path / "bad.jsonl"), "bad.jsonl: line 2"),
        (("--seq-len", 17), "nothing leaves a window of 16"),
        (("--seq-len", 10**6), "smaller --seq-len"),
        (("--lr", 0), "--lr must be above 0"),
        (("--model", tmp_path), "config.json"),
        (("--resume",), "train without --resume"),
    ]
    for args, message in cases:
        done = train(place, tmp_path / "out", "--steps", 1, "--layerwise", 0, *args)
        assert done.returncode == 2 and message in done.stderr, (args, done.stderr)
        assert "Traceback" not in done.stderr
    done = train(place, tmp_path / "made", "--steps", 2, "--layerwise", 0)
    assert done.returncode == 0, done.stderr
    done = train(place, tmp_path / "made", "--steps", 2, "--layerwise", 0)
    assert done.returncode == 2 and "has a training already" in done.stderr
    done = train(place, tmp_path / "made", "--steps", 1, "--layerwise", 0, "--resume")
    assert done.returncode == 2 and "give --steps 2 or more" in done.stderr
    done = train(place, tmp_path / "made", "--layerwise", 1, "--resume")
    assert done.returncode == 2 and "--layerwise 0, not 1" in done.stderr
    state: Any = mx.load(str(tmp_path / "made" / loop.STATE), return_metadata=True)
    older = {n: x for n, x in state[0].items() if not n.startswith("sizes.")}
    mx.eval(older)
    mx.save_safetensors(str(tmp_path / "made" / loop.STATE), older, state[1])
    done = train(place, tmp_path / "made", "--steps", 2, "--layerwise", 0, "--resume")
    assert done.returncode == 2 and "or an older version" in done.stderr


def test_from_training_to_use(place, tmp_path):
    """What is printed last can be typed, and --resume knows what was typed before."""
    out, text = tmp_path / "my memory", place / "held.txt"
    done = train(place, out, "--steps", 1, "--layerwise", 0, "--kind", "mamba2")
    assert done.returncode == 0, done.stderr
    short = ["train", "--data", place / "text.txt", "--out", out, "--resume", "--steps", 3]
    done = command(*short)
    assert done.returncode == 0, done.stderr
    assert len(losses_of(out)) == 3
    settings, step = loop.read_settings(out)
    assert (settings["window"], settings["lr"], settings["steps"], step) == (12, 1e-3, 3, 3)
    measured = validation.read_validation(out / validation.VALIDATION)
    assert [line["step"] for line in measured] == [0, 1, 3]
    assert f"KL {measured[-1]['kl']:.4f} with the memory" in done.stderr
    lines = [shlex.split(line) for line in done.stderr.splitlines() if line.startswith("  ahn-mlx")]
    assert [line[1] for line in lines] == ["generate", "compare"]
    for line in lines:
        words = [{"FILE": str(text), "QUESTION": "Why?"}.get(word, word) for word in line[1:]]
        words = [str(tmp_path / "c.png") if word == "compare.png" else word for word in words]
        few = ["--max-tokens", 2] if words[0] == "generate" else ["--segments", 2, "--seq-len", 99]
        done = command(*words, *few)
        assert done.returncode == 0, done.stderr
    assert "The memory " in done.stdout or "No difference" in done.stdout
    assert f"wrote {tmp_path / 'c.png'}" in done.stderr


def test_a_step_that_was_saved_but_not_measured_is_measured_on_the_way_on(place, tmp_path):
    """The run was killed between the two."""
    out, given = tmp_path / "out", ("--save-every", 2, "--layerwise", 0)
    done = train(place, out, "--steps", 2, *given)
    assert done.returncode == 0, done.stderr
    file = out / validation.VALIDATION
    measured = validation.read_validation(file)
    file.write_text(json.dumps(measured[0]) + "\n")
    done = train(place, out, "--steps", 3, *given, "--resume")
    assert done.returncode == 0, done.stderr
    now = validation.read_validation(file)
    assert [line["step"] for line in now] == [0, 2, 3] and now[:2] == measured


def test_validation_is_the_divergence_of_what_was_held_out(place, tmp_path):
    model, tokenizer = base_model(place)
    data = sequences(place, tokenizer)
    layerwise.fit(model, data, 2, 12, 4)
    file = tmp_path / "validation.jsonl"
    measuring = validation.Validation(file, model, data, SETTINGS, 0)
    measuring.measure(0)
    measuring.measure(0)
    (line,) = validation.read_validation(file)
    plain, _ = mlx_lm.utils.load_model(place / "base")
    model.eval()
    assert len(data.held_out) == 2
    found = {"kl": [], "window_kl": []}
    for row in data.held_out:
        tokens = mx.array(row)[None]
        p = nn.log_softmax(plain(tokens, cache=[KVCache() for _ in plain.layers])[0, 16:], axis=-1)
        with silenced(model):
            alone = model(tokens)[0, 16:]
        for name, logits in (("kl", model(tokens)[0, 16:]), ("window_kl", alone)):
            q = nn.log_softmax(logits, axis=-1)
            found[name].append((mx.exp(p) * (p - q)).sum(axis=-1).mean().item())
    for name, values in found.items():
        assert line[name] == pytest.approx(np.mean(values), rel=1e-3)
    again = validation.Validation(file, model, data, SETTINGS, 0)
    again.measure(0)
    again.measure(4)
    assert [x["step"] for x in again.lines] == [0, 4]
    for step, kept in ((4, [0, 4]), (3, [0])):
        validation.Validation(file, model, data, SETTINGS, step)
        assert [x["step"] for x in validation.read_validation(file)] == kept


def test_what_is_held_out_is_not_trained_on(place):
    _, tokenizer = base_model(place)
    data = sequences(place, tokenizer)
    seen = {data[n].tolist()[0].__str__() for n in range(data.count)}
    held = {row.tolist().__str__() for row in data.held_out}
    assert len(held) == 2 and not held & seen
    few = sequences(place, tokenizer, "held.txt")  # of fewer than 20 all are needed
    assert few.count == 15 and not len(few.held_out)


def test_every_token_is_seen_once_an_epoch(place):
    _, tokenizer = base_model(place)
    data = sequences(place, tokenizer)
    epochs = [
        np.stack([np.array(data[e * data.count + n][0]) for n in range(data.count)]) for e in (0, 1)
    ]
    for epoch in epochs:
        assert (np.sort(epoch, axis=0) == np.sort(data.tokens, axis=0)).all()
    assert (epochs[0] != epochs[1]).any()
    assert (np.array(sequences(place, tokenizer)[5]) == np.array(data[5])).all()


def test_windows_are_drawn_as_in_the_release():
    settings = Settings(**{**SETTINGS.__dict__, "random_window": True, "seq_len": 2048})
    drawn = {draw_window(settings, step) for step in range(300)}
    assert {w + s for w, s, _ in drawn} == {512, 1024}  # strictly between 256 and 2048
    assert {s for w, s, _ in drawn if w + s == 512} == {0, 32, 64, 128}
    assert {s for w, s, _ in drawn if w + s == 1024} == {0, 32, 64, 128, 512}


@pytest.mark.parametrize("loss", ["ce", "distill"])
def test_other_losses_train_too(place, loss):
    model, tokenizer = base_model(place)
    changed = {**SETTINGS.__dict__, "loss": loss, "steps": 30, "layerwise": 2}
    trainer = loop.Trainer(model, sequences(place, tokenizer), Settings(**changed))
    seen = [trainer.train_step() for _ in range(30)]
    assert sum(seen[-5:]) < sum(seen[:5])


def test_a_loss_that_is_not_finite_stops(place):
    model, tokenizer = base_model(place)
    trainer = loop.Trainer(model, sequences(place, tokenizer), SETTINGS)
    name = next(n for n in trainer.parameters if n.endswith("o_proj.weight"))
    trainer.parameters[name] = mx.full(trainer.parameters[name].shape, mx.nan)
    with pytest.raises(AHNError, match="the loss is nan at step 0"):
        trainer.train_step()


def test_compare_is_what_the_models_say(place):
    """Against plain mlx-lm for full attention, and the model's own forward pass."""
    model, tokenizer = base_model(place)
    layerwise.fit(model, sequences(place, tokenizer), 2, 12, 4)
    tokens = held_out(place, tokenizer)[0]
    result = compare(model, [tokens], 12, 4)
    plain, _ = mlx_lm.utils.load_model(place / "base")
    model.eval()
    logits = {"full": plain(tokens, cache=[KVCache() for _ in plain.layers])[0]}
    logits["memory"] = model(tokens)[0]
    with silenced(model):
        logits["window"] = model(tokens)[0]
    targets = tokens[0, 17:]
    log_p = {kind: nn.log_softmax(x[16:-1], axis=-1) for kind, x in logits.items()}
    for kind, x in log_p.items():
        nll = -mx.take_along_axis(x, targets[:, None], axis=-1).mean()
        assert result.total.nll[kind] == pytest.approx(nll.item(), rel=1e-4)
    for kind in ("window", "memory"):
        divergence = (mx.exp(log_p["full"]) * (log_p["full"] - log_p[kind])).sum(axis=-1).mean()
        assert result.total.kl[kind] == pytest.approx(divergence.item(), rel=1e-4)
    assert [(b.first, b.end) for b in result.buckets] == [(16, 32), (32, 64), (64, 127)]
    whole = sum(b.kl["memory"] * b.tokens for b in result.buckets) / 111
    assert whole == pytest.approx(result.total.kl["memory"], rel=1e-4)
    assert result.ratios == [pytest.approx(result.ratio, rel=1e-5)]
    streamed = stream(model, tokens, 16)
    for kind in ("window", "memory"):
        assert streamed[0].nll[kind] == pytest.approx(result.total.nll[kind], rel=1e-4)


@pytest.mark.slow
def test_compare_command(place, tmp_path):
    model = tmp_path / "model"
    convert(GDN / "base", GDN / "ahn_only", model)
    shutil.copytree(place / "tokenizer", model, dirs_exist_ok=True)
    whole = ["compare", "--model", model, "--text", place / "held.txt"]
    parts = [*whole, "--segments", 3, "--seq-len", 128]
    done = command(*parts, "--json", "--out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["kl_ratio_by_segment"]) == 3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    done = command(*parts)
    assert f"KL with memory is {facts['kl_ratio']:.3f}" in done.stdout
    done = command(*whole, "--stream", 1000, "--stream-from", 500)
    assert "500 to 999" in done.stdout, done.stderr
    done = command(*parts, "--seq-len", 4096)
    assert done.returncode == 2 and "fewer than 3 segments of 4,096 tokens" in done.stderr


def test_only_the_memory_is_trained(place):
    model, _ = base_model(place)
    names = trainable(model)
    assert names and all(".ahn." in name for name in names)
    assert len(list(memory_layers(model))) == 3
    install(model, {n: x + 1 for n, x in names.items()})
    assert all(mx.array_equal(x, names[n] + 1) for n, x in trainable(model).items())
