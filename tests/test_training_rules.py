"""What a step of training and a comparison do, by hand: rates, decay, order, losses, verdicts.
Each number here follows from a formula that is written again, or from another way to it."""

import dataclasses
import itertools
import json
import math
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import TRAINING, make_base
from mlx.utils import tree_flatten
from test_model import IDS, tiny
from test_training import SETTINGS, base_model, place, sequences  # noqa: F401

from ahn_mlx import AHNError
from ahn_mlx.measure import compare as measured
from ahn_mlx.measure import ranks
from ahn_mlx.measure.cost import Shape
from ahn_mlx.memory import MEMORIES
from ahn_mlx.model.augment import head, memory_layers
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.config import AHNConfig
from ahn_mlx.train import layerwise, loop, losses, metrics, output, validation
from ahn_mlx.train.data import Sequences
from ahn_mlx.train.output import load_base
from ahn_mlx.train.schedule import Schedule
from ahn_mlx.train.settings import Window, batch_of, draw_window
from ahn_mlx.train.streams import Stream, silenced, study, teach, trainable


def changed(**values):
    return dataclasses.replace(SETTINGS, **values)


def test_rates_rise_with_the_warm_up_and_fall_to_a_tenth():
    rate = Schedule(changed(lr=1e-3, steps=13, warmup=3)).of(2.0)
    found = [float(rate(mx.array(step)).item()) for step in range(15)]
    falls = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * n / 10)) for n in range(11)]
    assert found == pytest.approx([2e-3 * x for x in (0.25, 0.5, 0.75, *falls, 0.1)])


def test_rates_without_a_warm_up_and_with_nothing_else():
    rate = Schedule(changed(lr=1e-3, steps=10, warmup=0)).of(1.0)
    expected = [1e-3, 1e-3 * 0.55, 1e-4]
    assert [rate(mx.array(n)).item() for n in (0, 5, 10)] == pytest.approx(expected)
    rate = Schedule(changed(lr=1e-3, steps=4, warmup=9)).of(1.0)
    found = [rate(mx.array(n)).item() for n in range(4)]
    assert found == pytest.approx([1e-3 * x for x in (0.2, 0.4, 0.6, 0.8)])


def test_how_far_a_run_is():
    schedule = Schedule(changed(steps=4))
    assert (schedule.step, schedule.seconds, schedule.share, schedule.done) == (0, 0, 0, False)
    schedule.resume(3, 7.5)
    assert (schedule.share, schedule.seconds, schedule.done) == (0.75, 7.5, False)
    schedule.resume(4, 8.0)
    assert schedule.done and schedule.said() == "4 of 4 steps"
    assert Schedule(changed(steps=0)).done and Schedule(changed(steps=0)).share == 1
    clock = [100.0]
    timed = Schedule(changed(steps=0, minutes=2.0), lambda: clock[0])
    timed.resume(1, 30.0)
    clock[0] = 103.0
    timed.begin()
    clock[0] = 105.0
    timed.begin()
    assert timed.seconds == 32.0 and timed.share == 0.25
    timed.agreed = 119.0
    assert not timed.done
    timed.agreed = 500.0
    assert timed.done and timed.share == 1.0


@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2"])
def test_weights_decay_by_their_own_rates(place, memory):  # noqa: F811
    """Along a gradient of 0 nothing else happens, from the first, small step on."""
    model, tokenizer = base_model(place, memory)
    for decay in (0.0, 0.5):
        settings = changed(lr=1e-3, warmup=3, weight_decay=decay)
        trainer = loop.Trainer(model, sequences(place, tokenizer), settings)
        before = {n: mx.random.normal(x.shape) for n, x in trainer.parameters.items()}
        trainer.parameters = dict(before)
        nothing = loop._tree({n: mx.zeros_like(x) for n, x in before.items()})
        after = trainer.updated(nothing)
        assert after.keys() == before.keys()
        rates = set()
        for name, x in before.items():
            factor = {"gain": 400, "o_proj.weight": 200, "q_proj.weight": 10}.get(
                name.split(".ahn.")[1], 1
            )
            left = 1 - decay * factor * 1e-3 / 4
            assert mx.allclose(after[name], left * x, rtol=1e-5, atol=0), name
            rates.add(factor)
        assert {1, 200, 400} <= rates


def test_a_first_step_is_as_long_as_its_rate(place):  # noqa: F811
    """AdamW, corrected for its short memory: along the sign of the gradient, whatever its size."""
    model, tokenizer = base_model(place)
    trainer = loop.Trainer(model, sequences(place, tokenizer), changed(lr=1e-3, warmup=1))
    before = dict(trainer.parameters)
    after = trainer.updated(loop._tree({n: mx.full(x.shape, 7.0) for n, x in before.items()}))
    name = next(n for n in before if n.endswith("a_proj.weight"))
    assert mx.allclose(before[name] - after[name], mx.array(0.5e-3), rtol=1e-2)


def test_a_run_begins_with_the_model_as_it_is(place):  # noqa: F811
    """In units of its size a matrix is of size one, and folded it is the same to the bit."""
    model, tokenizer = base_model(place, "gated_deltanet")
    for _, attention in memory_layers(model):
        shape = attention.ahn.o_proj.weight.shape
        attention.ahn.o_proj.weight = mx.random.normal(shape) / 300
    before = {name: mx.array(x) for name, x in trainable(model).items()}
    trainer = loop.Trainer(model, sequences(place, tokenizer), changed(layerwise=0))
    for name, x in trainable(model).items():
        assert mx.array_equal(x, before[name]), name
    for name, x in trainer.parameters.items():
        if name.endswith("o_proj.weight"):
            size = x.square().mean(axis=(1, 2)).sqrt()
            assert (size > 0.7).all() and (size < 1.42).all(), name


def test_a_run_that_goes_on_is_fitted_by_no_layer_again(place, tmp_path, monkeypatch):  # noqa: F811
    settings = changed(layerwise=1, steps=2)
    model, tokenizer = base_model(place, "deltanet")
    first = loop.Trainer(model, sequences(place, tokenizer), settings)
    assert first.explained is not None
    first.train_step()
    first.save(tmp_path)
    monkeypatch.setattr(layerwise, "fit", lambda *_: pytest.fail("fitted again"))
    again = loop.Trainer(model, sequences(place, tokenizer), settings, saved=tmp_path)
    assert (again.explained, again.step) == (None, 1)
    assert all(mx.array_equal(x, first.parameters[n]) for n, x in again.parameters.items())


def test_a_run_goes_on_as_it_was_asked_to_begin(place, tmp_path):  # noqa: F811
    settings = changed(windows="8+2@64 12+4@64")
    model, tokenizer = base_model(place, "deltanet")
    loop.Trainer(model, sequences(place, tokenizer), settings).save(tmp_path)
    for other, option in (
        ({"seed": 5}, "--seed 0, not 5"),
        ({"windows": "8+2@64 16+4@64"}, r"--window '8\+2@64 12\+4@64', not 8\+2@64 16\+4@64"),
        ({"lr": 0.5}, "--lr"),
    ):
        with pytest.raises(AHNError, match=f"trained with {option}"):
            loop.Trainer(
                model,
                sequences(place, tokenizer),
                dataclasses.replace(settings, **other),
                saved=tmp_path,
            )
    more = dataclasses.replace(settings, steps=settings.steps + 3)
    assert loop.Trainer(model, sequences(place, tokenizer), more, saved=tmp_path).step == 0


def test_a_loss_is_of_what_is_behind_window_and_sinks(place, monkeypatch):  # noqa: F811
    model, tokenizer = base_model(place, "deltanet")
    trainer = loop.Trainer(model, sequences(place, tokenizer), changed(loss="kl"))
    told, whole = [], losses.LOSSES["kl"]

    def noted(*given):
        told.append(given[-1])
        return whole(*given)

    monkeypatch.setitem(losses.LOSSES, "kl", noted)
    trainer.train_step()
    assert set(told) == {trainer.settings.window + trainer.settings.sinks}


def test_accumulated_gradients_are_a_mean(place, monkeypatch):  # noqa: F811
    model, tokenizer = base_model(place)
    data, given = sequences(place, tokenizer), []
    for accumulate in (1, 4):
        trainer = loop.Trainer(model, data, changed(accumulate=accumulate, warmup=0))
        ones = {n: mx.full(x.shape, 3.0) for n, x in trainer.parameters.items()}
        monkeypatch.setattr(trainer, "_gradients", lambda *_, g=ones: (mx.array(2.0), g))
        monkeypatch.setattr(
            trainer, "updated", lambda g, t=trainer: given.append(g) or t.parameters
        )
        assert trainer.train_step() == 2.0 and trainer.step == 1
    for tree in given:
        assert all(mx.allclose(x, mx.array(3.0)) for _, x in tree_flatten(tree))


def test_the_order_of_the_texts_follows_the_seed(place):  # noqa: F811
    tokenizer = base_model(place)[1]
    path = (str(place / "held.txt"),)
    orders = {}
    for seed in (0, 1):
        data = Sequences(path, tokenizer, 128, seed)
        for epoch in (0, 1):
            rows = [data[epoch * data.count + n] for n in range(data.count)]
            orders[seed, epoch] = [tuple(row[0].tolist()) for row in rows]
    assert len({tuple(order) for order in orders.values()}) == 4
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_checkpointing_runs_each_layer_again(place, asked):  # noqa: F811
    """Forward once, and once more for the gradient: then nothing of a layer was kept."""
    model, tokenizer = base_model(place)
    data = sequences(place, tokenizer, length=40)
    trainer = loop.Trainer(model, data, changed(seq_len=40, grad_checkpoint=asked))
    calls = []

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __call__(self, x):
            calls.append(x.shape)
            return self.inner(x)

    for layer in model.layers:
        layer.mlp = Counted(layer.mlp)
    tokens = data[0]
    teacher = teach(model, tokens)
    mx.eval(teacher)
    calls.clear()
    _, gradients = trainer.gradients_of(teacher, tokens, 12, 4)
    mx.eval(gradients)
    assert len(calls) == (2 if asked else 1) * len(model.layers)


def test_sequences_of_a_step_have_as_many_tokens():
    settings = changed(seq_len=100, batch_size=3)
    found = [batch_of(settings, Window(8, 0, n)) for n in (100, 101, 150, 151, 300, 301, 50)]
    assert found == [3, 2, 2, 1, 1, 1, 6]


@pytest.mark.parametrize("number", [mx.float32, mx.bfloat16])
def test_divergence_is_its_sum(number):
    p, q = (5 * mx.random.normal((3, 4, 50)).astype(number) for _ in range(2))
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (p, q))
    a, b = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (a, b))
    found = losses.divergence(p, q)
    assert found.dtype == mx.float32
    assert np.allclose(np.array(found), (np.exp(a) * (a - b)).sum(axis=-1), rtol=1e-3, atol=1e-4)
    assert mx.abs(losses.divergence(p, p + 3)).max() < (1e-4 if number == mx.float32 else 1)


def test_losses_count_what_is_behind_the_window_and_labelled():
    _, model = tiny(window=10, sinks=3)
    taught, hidden = (mx.random.normal((2, 20, 64)) for _ in range(2))
    labels = np.random.default_rng(0).integers(0, 100, (2, 20))
    labels[0, 15] = labels[1, 19] = -100
    p, q = (np.array(nn.log_softmax(head(model, x), axis=-1)) for x in (taught, hidden))
    rows = [(b, t) for b in range(2) for t in range(13, 20) if labels[b, t] != -100]
    teacher, student = Stream(taught, []), Stream(hidden, [])
    expected = np.mean([(np.exp(p[at]) * (p[at] - q[at])).sum() for at in rows])
    found = losses.kl(model, teacher, student, mx.array(labels), 13)
    assert found.item() == pytest.approx(expected, rel=1e-3)
    # Each label by the position that is counted before it; within one sequence, or of both.
    for loss, pairs in (
        (losses.ce, list(itertools.pairwise(rows))),
        (losses.ce_apart, [(a, b) for a, b in itertools.pairwise(rows) if a[0] == b[0]]),
    ):
        own = [[-q[a][labels[b]] for a, b in pairs if a[0] == n] for n in range(2)]
        expected = np.mean(own[0] + own[1]) if loss is losses.ce else np.mean([*map(np.mean, own)])
        found = loss(model, teacher, student, mx.array(labels), 13)
        assert found.item() == pytest.approx(expected, rel=1e-3)
    assert losses.kl(model, teacher, student, mx.array(labels), 20).item() == 0


@pytest.mark.parametrize("size", [3, 7, 1000])
def test_a_loss_and_its_gradient_are_of_all_blocks_of_rows(size, monkeypatch):
    monkeypatch.setattr(losses, "rows_at_once", lambda words: size)
    _, model = tiny(window=10, sinks=3)
    taught, hidden = (mx.random.normal((1, 20, 64)) for _ in range(2))
    labels = mx.arange(20)[None]

    def plain_kl(x):
        return losses.divergence(head(model, taught[0, 13:]), head(model, x[0, 13:])).mean()

    def plain_ce(x):
        return nn.losses.cross_entropy(head(model, x[0, 13:19]), labels[0, 14:]).mean()

    for loss, plain in ((losses.kl, plain_kl), (losses.ce, plain_ce)):

        def ours(x, loss=loss):
            return 3 * loss(model, Stream(taught, []), Stream(x, []), labels, 13)

        value, gradient = mx.value_and_grad(ours)(hidden)
        expected = mx.value_and_grad(lambda x, plain=plain: 3 * plain(x))(hidden)
        assert value.item() == pytest.approx(expected[0].item(), rel=1e-4)
        assert mx.allclose(gradient, expected[1], rtol=1e-3, atol=1e-6)
        assert mx.abs(gradient).max() > 1e-3


def test_losses_of_one_position_and_of_two():
    _, model = tiny(window=10, sinks=3)
    taught, hidden = (mx.random.normal((1, 20, 64)) for _ in range(2))
    teacher, student, labels = Stream(taught, []), Stream(hidden, []), mx.arange(20)[None]
    last = losses.divergence(head(model, taught[0, 19:]), head(model, hidden[0, 19:])).item()
    assert losses.kl(model, teacher, student, labels, 19).item() == pytest.approx(last, rel=1e-4)
    assert losses.ce(model, teacher, student, labels, 19).item() == 0
    pair = -nn.log_softmax(head(model, hidden[0, 18:19]), axis=-1)[0, 19].item()
    found = losses.ce(model, teacher, student, labels, 18).item()
    assert found == pytest.approx(pair, rel=1e-4)
    assert losses.ce(model, teacher, student, labels, 20).item() == 0


class World:
    """What MLX says of so many machines."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def by_hand(model, tokens, window, sinks):
    """Of each position t >= W: NLL of token t + 1 with full attention, KL from it of the window
    alone, and with the memory; the router as it is in use."""
    W, logits = window + sinks, []
    with silenced(model):
        alone = study(model, tokens, window, sinks, inference=True).hidden
    memory = study(model, tokens, window, sinks, inference=True).hidden
    for hidden in (teach(model, tokens).hidden, alone, memory):
        x = np.array(head(model, hidden[0]).astype(mx.float32), dtype=np.float64)
        logits.append(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))
    full = logits[0]
    nll = [-full[t, tokens[0, t + 1].item()] for t in range(W, tokens.shape[1] - 1)]
    kls = [(np.exp(full) * (full - x)).sum(axis=-1)[W:] for x in logits[1:]]
    return np.array(nll), *kls


def test_what_is_held_out_is_measured_as_it_is_in_use(place, tmp_path):  # noqa: F811
    """By a router, which in training counts sinks too: here all is as it is used."""
    model, tokenizer = base_model(place, router=True)
    mx.random.seed(3)
    for _, attention in memory_layers(model):
        attention.ahn.o_proj.weight = mx.random.normal(attention.ahn.o_proj.weight.shape) * 0.2
        attention.router.update({n: mx.random.normal(x.shape) for n, x in attention.router.items()})
    data, file = sequences(place, tokenizer), tmp_path / validation.VALIDATION
    found = validation.Validation(file, model, data, changed(), 0)
    found.measure(7)
    (line,) = found.lines
    assert json.loads(file.read_text()) == line and line["step"] == 7
    rows = [by_hand(model, mx.array(row)[None], 12, 4)[1:] for row in data.held_out]
    alone, memory = (float(np.mean([row[n] for row in rows])) for n in (0, 1))
    assert (line["window_kl"], line["kl"]) == pytest.approx((alone, memory), rel=1e-3)
    assert memory != pytest.approx(alone, rel=0.05)
    assert f"(ratio {memory / alone:.3f})" in found.summary()
    found.measure(7)  # it has been
    assert len(found.lines) == 1
    # Behind a window as long as a sequence there is nothing.
    long = validation.Validation(tmp_path / "b", model, data, changed(window=124), 0)
    long.measure(1)
    assert (long.tokens, long.lines, long.summary()) == ([], [], "")
    assert validation.Validation(file, model, data, changed(), 7).lines == [line]
    assert validation.Validation(file, model, data, changed(), 6).lines == []
    assert file.read_text() == ""


def test_a_comparison_is_of_the_next_token(place):  # noqa: F811
    model, tokenizer = base_model(place, "mamba2")
    for _, attention in memory_layers(model):
        attention.ahn.o_proj.weight = mx.random.normal(attention.ahn.o_proj.weight.shape) * 0.2
    tokens = sequences(place, tokenizer)[0]
    total = measured.compare(model, [tokens], 12, 4).total
    nll, alone, memory = by_hand(model, tokens, 12, 4)
    assert total.nll["full"] == pytest.approx(nll.mean(), rel=1e-4)
    assert total.kl["window"] == pytest.approx(alone[:-1].mean(), rel=1e-3)
    assert total.kl["memory"] == pytest.approx(memory[:-1].mean(), rel=1e-3)


def test_machines_share_the_sequences_of_a_step(place, monkeypatch):  # noqa: F811
    model, tokenizer = base_model(place)
    data, seen = sequences(place, tokenizer, length=64), {}
    settings = changed(seq_len=64, accumulate=2, batch_size=2)
    for rank in (0, 1):
        trainer = loop.Trainer(model, data, settings)
        trainer.world, asked = World(rank, 2), []
        nothing = {n: mx.zeros_like(x) for n, x in trainer.parameters.items()}

        def look(tokens, window, sinks, asked=asked, nothing=nothing):
            asked.extend(tokens.tolist())
            return mx.zeros(()), nothing

        monkeypatch.setattr(trainer, "_gradients", look)
        trainer.schedule._before = 7.5
        for _ in range(2):
            trainer.train_step()
            # The first of them has the clock.
            assert (trainer.schedule.agreed >= 7.5) if rank == 0 else trainer.schedule.agreed == 0
        seen[rank] = asked
    expected = [data[n][0].tolist() for n in range(16)]
    for rank in (0, 1):
        own = [n for n in range(16) if n // 2 % 2 == rank]
        assert seen[rank] == [expected[n] for n in own]


@pytest.mark.parametrize(("machines", "error"), [(1, RuntimeError), (2, AHNError)])
def test_a_step_that_fails_says_whose_it_was(place, monkeypatch, machines, error):  # noqa: F811
    model, tokenizer = base_model(place)
    trainer = loop.Trainer(model, sequences(place, tokenizer, length=64), changed(seq_len=64))
    trainer.world = World(0, machines)

    def fail(*_):
        raise RuntimeError("a peer is gone")

    monkeypatch.setattr(trainer, "_update", fail)
    with pytest.raises(error, match="a peer is gone") as raised:
        trainer.train_step()
    assert type(raised.value) is error
    assert ("training on 2 machines failed at step 0" in str(raised.value)) == (machines == 2)


def test_checkpointing_changes_no_gradient(place):  # noqa: F811
    model, tokenizer = base_model(place)
    data, found = sequences(place, tokenizer, length=40), []
    for asked in (False, True):
        trainer = loop.Trainer(model, data, changed(seq_len=40, grad_checkpoint=asked))
        found.append(trainer._gradients(data[0], 12, 4))
    (loss, plain), (again, checkpointed) = found
    assert loss.item() == pytest.approx(again.item(), rel=1e-5) and plain.keys() == (
        checkpointed.keys()
    )
    heard = [name for name, x in plain.items() if mx.abs(x).max() > 0]
    assert heard
    for name, x in plain.items():
        assert mx.allclose(x, checkpointed[name], rtol=1e-3, atol=1e-7), name


def test_of_two_layers_both_are_loud_after_the_layerwise_fit(tmp_path):
    """Of three, or four, the first is not."""
    (tmp_path / "a.txt").write_text("It is a far, far better thing that I do. " * 20)
    for layers, loud in ((2, [1, 1]), (3, [0, 1, 1]), (4, [0, 1, 1, 1])):
        base = make_base(tmp_path / str(layers), num_hidden_layers=layers)
        options = {**TRAINING, "base": str(base), "window": 12, "sinks": 4}
        model, tokenizer = load_base(options)[:2]
        data = Sequences((str(tmp_path / "a.txt"),), tokenizer, 64, 0)
        for count, expected in ((1, loud), (0, [1] * layers)):
            trainer = loop.Trainer(model, data, changed(seq_len=64, layerwise=count))
            gains = [x for name, x in trainer.parameters.items() if name.endswith(".gain")]
            assert [x.mean().item() for x in gains] == expected
            assert (trainer.explained is not None) == bool(count)


def test_distilled_heads_are_of_length_one():
    ours, theirs = ([mx.random.normal((2, 3, 9, 4)) for _ in range(2)] for _ in range(2))
    each = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = (np.array(x)[:, :, 5:].transpose(0, 2, 1, 3).reshape(2, 4, 12) for x in (a, b))
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        each.append(((a - b) ** 2).mean())
    nothing = mx.zeros((2, 9, 1))
    found = losses.distill(nn.Module(), Stream(nothing, theirs), Stream(nothing, ours), nothing, 5)
    assert found.item() == pytest.approx(np.mean(each), rel=1e-4)


def bucket(nll, kl, **error):
    kinds = ("full", "window", "memory")
    error = {
        "nll": 0.1,
        "kl": 0.1,
        "gap": 0.1,
        **{k.removeprefix("of_"): x for k, x in error.items()},
    }
    of_kl = dict(zip(kinds[1:], kl, strict=True))
    return measured.Bucket(4, 9, 5, dict(zip(kinds, nll, strict=True)), of_kl, error)


def test_the_part_of_the_gap_that_is_closed():
    total = bucket((2.0, 3.0, 2.25), (0.8, 0.2))
    found = measured.Comparison([], total, [])
    assert found.gap_closed == pytest.approx(0.75) and found.ratio == pytest.approx(0.25)
    worse = measured.Comparison([], bucket((2.0, 3.0, 3.5), (0.2, 0.8)), [])
    assert worse.gap_closed == pytest.approx(-0.5) and worse.ratio == pytest.approx(4)


def test_verdicts_at_their_bounds():
    judged = [measured.judge(d, 0.25) for d in (-0.51, -0.5, 0.0, 0.5, 0.51, math.nan)]
    assert judged == ["helps", "noise", "noise", "noise", "harms", "noise"]
    assert bucket((0, 0, 0), (0.8, 0.2), of_kl=0.29).verdict == "helps"
    assert bucket((0, 0, 0), (0.8, 0.2), of_kl=0.31).verdict == "noise"
    assert bucket((0, 0, 0), (0.2, 0.8), of_kl=0.29).verdict == "harms"
    gaps = [bucket((2.0, window, 2.0), (1, 1), of_gap=0.25).has_gap for window in (2.5, 2.51, 1.0)]
    assert gaps == [False, True, False]


def test_buckets_are_means_and_their_errors_standard_ones():
    table = mx.random.normal((3, 5, 7)).astype(mx.float32)
    found, x = measured._bucket(table, 16, 23), np.array(table, dtype=np.float64)
    assert (found.first, found.end, found.tokens) == (16, 23, 21)
    means = dict(zip(("full", "window", "memory"), x.mean(axis=(0, 2)), strict=False))
    assert found.nll == pytest.approx(means, rel=1e-4)
    assert found.kl == pytest.approx({"window": x[:, 3].mean(), "memory": x[:, 4].mean()}, rel=1e-4)
    for name, (a, b) in {"nll": (2, 1), "kl": (4, 3), "gap": (1, 0)}.items():
        error = (x[:, a] - x[:, b]).std(ddof=1) / math.sqrt(21)
        assert found.error[name] == pytest.approx(error, rel=1e-4)
    assert math.isnan(measured._error(mx.ones(1))) and measured._error(mx.ones(2)) == 0


def test_segments_lie_evenly_in_a_text():
    ids = list(range(100))
    found = measured.segments(ids, [7, 8], 12, 4)
    assert [x.shape for x in found] == 4 * [(1, 12)]
    rows = [x[0].tolist() for x in found]
    assert [row[:3] for row in rows] == [[7, 8, 0], [7, 8, 30], [7, 8, 60], [7, 8, 90]]
    assert rows[-1][-1] == 99
    assert measured.segments(ids, [], 100, 1)[0][0].tolist() == ids
    assert [x[0, 0].item() for x in measured.segments(ids, [], 10, 2)] == [0, 90]


@pytest.mark.parametrize("memory", ["gated_deltanet", "mamba2"])
def test_comparing_takes_the_router_as_it_is_used(memory):
    """Not as in training, which counts sinks; one segment after the other."""
    _, model = tiny(memory=memory, window=10, sinks=6, router=True)
    for layer in model.layers:
        layer.self_attn.router.alpha = mx.ones(4)
    texts = [IDS[:, :49], IDS[:, 11:]]
    result = measured.compare(model, texts, 10, 6)
    model.eval()
    said = []
    for tokens in texts:
        full = teach(model, tokens).hidden[0, 16:-1]
        full = nn.log_softmax(head(model, full), axis=-1)
        mine = nn.log_softmax(model(tokens)[0, 16:-1], axis=-1)
        said.append((mx.exp(full) * (full - mine)).sum(axis=-1))
    assert result.total.kl["memory"] == pytest.approx(mx.stack(said).mean().item(), rel=1e-3)
    assert [(b.first, b.end) for b in result.buckets] == [(16, 32), (32, 48)]
    with silenced(model):
        alone = [model(tokens)[0, 16:-1] for tokens in texts]
    for n, tokens in enumerate(texts):
        full = nn.log_softmax(head(model, teach(model, tokens).hidden[0, 16:-1]), axis=-1)
        q = nn.log_softmax(alone[n], axis=-1)
        kl = (mx.exp(full) * (full - q)).sum(axis=-1).sum().item()
        assert result.ratios[n] == pytest.approx(said[n].sum().item() / kl, rel=1e-3)
    with pytest.raises(AHNError, match="segments of 17 tokens"):
        measured.compare(model, [IDS[:, :17]], 10, 6)
    assert measured.compare(model, [IDS[:, :18]], 10, 6).total.tokens == 1


def test_positions_are_parted_at_powers_of_two_and_judged_in_rows(monkeypatch):
    _, model = tiny(window=10, sinks=6)
    for length, edges in ((33, [16, 32]), (34, [16, 32, 33]), (49, [16, 32, 48])):
        texts, left = [IDS[:, :length], IDS[:, 60 - length :]], iter((1, 2))
        found = measured.compare(model, texts, 10, 6, left.__next__)
        assert list(left) == []
        assert [(b.first, b.end) for b in found.buckets] == list(itertools.pairwise(edges))
        assert [b.tokens for b in found.buckets] == [2 * (b.end - b.first) for b in found.buckets]
        total = found.total
        assert (total.first, total.end, total.tokens) == (16, length - 1, 2 * (length - 17))
        for kind in ("full", "window", "memory"):
            sums = sum(b.nll[kind] * b.tokens for b in found.buckets)
            assert sums == pytest.approx(total.nll[kind] * total.tokens, rel=1e-5)
        # The first bucket is what is measured of texts that end there.
        short = measured.compare(model, [x[:, : edges[1] + 1] for x in texts], 10, 6).total
        assert found.buckets[0].nll == pytest.approx(short.nll, rel=1e-4)
        assert found.buckets[0].kl == pytest.approx(short.kl, rel=1e-3)
        monkeypatch.setattr(measured, "ROWS", 16)
        rows = measured.compare(model, texts, 10, 6)
        monkeypatch.undo()
        assert rows.total.nll == pytest.approx(total.nll, rel=1e-5)
        assert rows.total.kl == pytest.approx(total.kl, rel=1e-4)
        assert rows.ratios == pytest.approx(found.ratios, rel=1e-4)


def test_a_student_in_training_and_in_use_differ_by_the_router_alone():
    _, model = tiny(window=10, sinks=6, router=True)
    for layer in model.layers:
        layer.self_attn.router.alpha = mx.ones(4)
    used = study(model, IDS, 10, 6, inference=True).hidden
    trained = study(model, IDS, 10, 6).hidden
    assert mx.allclose(used[:, :16], trained[:, :16], atol=1e-5)
    assert mx.abs(used - trained).max() > 1e-3
    for layer in model.layers:
        layer.self_attn.router.alpha = mx.zeros(4)
    used = study(model, IDS, 10, 6, inference=True).hidden
    assert mx.allclose(used, study(model, IDS, 10, 6).hidden, atol=1e-4)


def test_a_silent_memory_speaks_again_even_after_a_failure():
    _, model = tiny(window=10, sinks=3)
    before = model(IDS)
    with pytest.raises(KeyError), silenced(model):
        assert mx.abs(model(IDS) - before).max() > 1e-3
        raise KeyError
    assert mx.array_equal(model(IDS), before)


@pytest.mark.parametrize("projected", [False, True])
def test_output_matrices_are_a_ridge_regression(projected):
    """Towards the best multiple of the identity, or 0; two texts of unequal length as one."""
    read, missed = ([mx.random.normal((3, n, 4)) for n in (30, 17)] for _ in range(2))
    found = layerwise._matrices(tuple(read), tuple(missed), projected)
    r, m = (np.concatenate([np.array(x, dtype=np.float64) for x in y], 1) for y in (read, missed))
    for h in range(3):
        scale = (r[h] * m[h]).sum() / (r[h] ** 2).sum() if projected else 0.0
        gram = r[h].T @ r[h]
        ridge = gram + 0.2 * np.diag(gram).mean() * np.eye(4)
        expected = scale * np.eye(4) + np.linalg.solve(ridge, r[h].T @ (m[h] - scale * r[h]))
        assert np.allclose(np.array(found[h]), expected, rtol=1e-3, atol=1e-4)


def test_gates_that_are_fitted_come_nearer():
    h, read = mx.random.normal((40, 6)), mx.random.normal((3, 40, 4))
    weight, w = mx.random.normal((3, 4, 4)), mx.random.normal((3, 6))
    missed = (read @ weight) * nn.silu(h @ w.T).T[..., None]

    def error(w):
        return ((read @ weight) * nn.silu(h @ w.T).T[..., None] - missed).square().sum().item()

    start = w + 0.3
    found = layerwise._fit_gate(
        start, h, (read[:, :25], read[:, 25:]), (missed[:, :25], missed[:, 25:]), weight
    )
    assert error(found) < 0.1 * error(start)


def test_gates_are_fitted_by_sixty_steps_of_adam():
    """Along the gradient of the squared error, of each head by the mean square of its output."""
    h, read = mx.random.normal((40, 6)), mx.random.normal((3, 40, 4))
    weight, start = mx.random.normal((3, 4, 4)), mx.random.normal((3, 6))
    missed = mx.random.normal((3, 40, 4))
    found = layerwise._fit_gate(
        start, h, (read[:, :25], read[:, 25:]), (missed[:, :25], missed[:, 25:]), weight
    )
    x, w, y, m = (np.array(a, dtype=np.float64) for a in (h, start, read @ weight, missed))
    squares, products = (y * y).sum(axis=-1).T, (y * m).sum(axis=-1).T
    scale = squares.mean(axis=0)
    first, second = np.zeros_like(w), np.zeros_like(w)
    for n in range(1, 61):
        z = x @ w.T
        sigmoid = 1 / (1 + np.exp(-z))
        slope = 2 * (squares * z * sigmoid - products) / scale
        gradient = (slope * sigmoid * (1 + z * (1 - sigmoid))).T @ x / 40
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**n) / (np.sqrt(second / (1 - 0.999**n)) + 1e-8)
        w = w - 0.03 * step
    assert np.abs(np.array(found) - np.array(start)).min() < 0.5 < np.abs(w - start).max()
    assert np.allclose(np.array(found), w, rtol=1e-3, atol=1e-3)


def normed_states(place):  # noqa: F811
    """A model, its texts, and the first layer's normed hidden states of one of them."""
    model, tokenizer = base_model(place)
    data, layer = sequences(place, tokenizer), model.layers[0]
    layer.self_attn.k_proj.weight = 8 * layer.self_attn.k_proj.weight  # it looks at few tokens
    return model, data, lambda n: layer.input_layernorm(model.model.embed_tokens(data[n]))


def test_strengths_are_a_ridge_regression_of_log_odds(place):  # noqa: F811
    model, _, state = normed_states(place)
    attention, normed = model.layers[0].self_attn, [state(n) for n in range(3)]
    found = layerwise._write_what_is_looked_at(attention, normed, 12, 4)
    looked = [np.array(layerwise._looked_at(attention, x, 12, 4)) for x in normed]
    looked = np.concatenate(looked, axis=1, dtype=np.float64)
    strength = 0.1 * looked / looked.mean(axis=1, keepdims=True)
    assert strength.min() < 0.002 and strength.max() > 0.95
    strength = strength.clip(0.002, 0.95)
    h = np.concatenate([np.array(x[0, 4:-12], dtype=np.float64) for x in normed])
    gram = h.T @ h
    ridge = gram + 0.02 * np.diag(gram).mean() * np.eye(len(gram))
    expected = np.linalg.solve(ridge, h.T @ np.log(strength / (1 - strength)).T).T
    assert np.allclose(np.array(found), expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("memory", ["gated_deltanet", "deltanet"])
def test_gates_and_matrices_are_fitted_in_turn_and_twice(place, memory):  # noqa: F811
    model, tokenizer = base_model(place, memory)
    data, layer = sequences(place, tokenizer), model.layers[0]
    attention, ours = layer.self_attn, layer.self_attn.ahn
    layerwise.fit(model, data, 2, 12, 4)
    fitted, matrices = ours.g_proj.weight, ours.o_proj.weight
    normed = [layer.input_layernorm(model.model.embed_tokens(data[n])) for n in range(2)]
    full = [attention.heads(x, AHNCache(1000, 0)) for x in normed]
    open_, missed = zip(
        *(layerwise._read(attention, x, y, 12, 4) for x, y in zip(normed, full, strict=True)),
        strict=True,
    )
    h = mx.concatenate([x[0, 16:] for x in normed])
    mean = h.mean(axis=0)
    gate = mx.repeat((mean / mean.square().sum())[None], len(fitted), axis=0)
    projected = attention.config.query_projection
    assert projected == (memory == "gated_deltanet")
    weight = layerwise._matrices(open_, missed, False)
    if projected:
        weight = layerwise._scaled_identity(open_, missed)
    for _ in range(2):
        gate = layerwise._fit_gate(gate, h, open_, missed, weight)
        gates = [nn.silu(x[0, 16:] @ gate.T).T[..., None] for x in normed]
        weight = layerwise._matrices(
            tuple(r * g for r, g in zip(open_, gates, strict=True)), missed, projected
        )
    assert mx.allclose(fitted, gate, rtol=1e-3, atol=1e-4)
    assert mx.allclose(matrices, weight, rtol=1e-3, atol=1e-4)


def test_first_gates_are_as_strong_as_they_say(place):  # noqa: F811
    """Slow to fast decay from head to head; gates that are open where a text is as usual."""
    x = mx.random.normal((6,))
    direction = x / x.square().sum()
    for kind in ("gated_deltanet", "deltanet", "mamba2"):
        memory = MEMORIES[kind](6, 3, 4)
        layerwise._constant_gates(memory, direction)
        gates, z = memory.project(x[None, None], memory.derive())
        assert np.allclose(np.array(z), 1.27846454 if kind == "mamba2" else 1.0, rtol=1e-4)
        decays = np.geomspace(1e-4, 1e-3, 3)
        if kind == "gated_deltanet":
            assert np.allclose(np.array(gates[0, 0, :, 1]), -decays, rtol=1e-2)
        if kind == "mamba2":
            assert np.allclose(np.array(gates[0, 0, :, 0]), 0.1, rtol=1e-4)
            assert np.allclose(np.exp(np.array(memory.A_log)) * 0.1, decays, rtol=1e-3)


def test_sizes_are_powers_of_two():
    matrix = mx.stack([mx.zeros((4, 4)), mx.full((4, 4), -3.1), mx.full((4, 4), 0.26)])
    found = loop._sizes(matrix).flatten().tolist()
    assert found == [2.0**-10, 4.0, 0.25]


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ('{"step": 0, "loss": 1.5}', True),
        ('{"step": 9007199254740991, "loss": -1.5}', True),
        ('{"step": 9007199254740992, "loss": 1.5}', False),
        ('{"step": -1, "loss": 1.5}', False),
        ('{"step": true, "loss": 1.5}', False),
        ('{"step": 1.0, "loss": 1.5}', False),
        ('{"step": 1, "loss": 1}', False),
        ('{"step": 1, "loss": NaN}', False),
        ('{"step": 1, "loss": Infinity}', False),
        ('{"step": 1}', False),
        ('{"loss": 1.5}', False),
        ("[1, 1.5]", False),
        ("", False),
    ],
)
def test_a_line_of_metrics_says_its_numbers_or_is_named(tmp_path, line, good):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "loss": 0.5}\n' + line + "\n")
    if good:
        assert [x["loss"] for x in metrics.read_metrics(file)] == [0.5, float(line[-5:-1])]
    else:
        with pytest.raises(AHNError, match="line 2 says no step and loss"):
            metrics.read_metrics(file)
    file.write_text('{"step": 0, "loss": 0.5}\n' + line)  # the last one may be cut short
    assert len(metrics.read_metrics(file)) == 1 + good
    assert metrics.read_metrics(tmp_path / "absent") == []


def test_the_speed_of_a_step_is_that_since_the_one_before(tmp_path, monkeypatch):
    now = [5.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    lines = metrics.Metrics(tmp_path / "metrics.jsonl", 0)
    for step, seconds, tokens, speed in ((0, 0.75, 100, 400 / 3), (1, 0.5, 64, 128.0)):
        now[0] += seconds
        drawn = Window(8, 2, 64)
        assert lines.write(step, 1.5, tokens, drawn) == pytest.approx(speed)
        line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        assert line == {
            **{"step": step, "loss": 1.5, "window": 8, "sinks": 2},
            "tokens_per_second": round(speed, 1),
        }
    lines.file, now[0] = tmp_path / "gone/metrics.jsonl", 9.0
    with pytest.raises(AHNError, match=r"cannot be written \(No such file .*\); --resume"):
        lines.write(2, 1.5, 64, drawn)


def measuring(tmp_path, *lines, **values):
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, model = tiny(window=12, sinks=4)

    class Held:
        held_out = np.zeros((2, 128), dtype=np.int32)

    return validation.Validation(file, model, Held(), changed(**values), 9)


def test_what_a_training_is_worth_in_words(tmp_path):
    line = {"step": 3, "kl": 0.25, "window_kl": 0.5}
    found = measuring(tmp_path, {**line, "kl": 0.4}, line)
    assert found.summary() == (
        "held out: KL 0.2500 with the memory, 0.5000 of the window alone (ratio 0.500)"
    )
    assert measuring(tmp_path, {**line, "window_kl": 0.0}).summary().endswith("(ratio 1.000)")
    nothing = measuring(tmp_path, seq_len=16)  # that fits
    assert nothing.summary() == "" and nothing.tokens == []
    nothing.measure(4)
    assert nothing.lines == [] and len(measuring(tmp_path, seq_len=17).tokens) == 2
    for number in ("kl", "window_kl"):
        lacks = {k: v for k, v in line.items() if k != number}
        with pytest.raises(AHNError, match=f"line 1 says no step and {number}"):
            measuring(tmp_path, lacks, line)
    found.file = tmp_path / "gone/validation.jsonl"
    with pytest.raises(AHNError, match=r"cannot be written \(No such file .*\); --resume"):
        found.measure(4)


@pytest.mark.parametrize(
    ("seq_len", "totals"),
    [
        (64, {32}),
        (65, {32, 64}),
        (256, {64, 128}),
        (20_000, {4096, 8192}),
        (9000, {2048, 4096, 8192}),
    ],
)
def test_random_windows_are_powers_of_two_below_a_sequence(seq_len, totals):
    settings = changed(random_window=True, seq_len=seq_len)
    drawn = {draw_window(settings, step) for step in range(400)}
    assert {w + s for w, s, _ in drawn} == totals and {n for *_, n in drawn} == {seq_len}
    most = max(totals)
    sinks = {s for w, s, _ in drawn if w + s == most}
    assert sinks == {s for s in (0, 32, 64, 128, 512, 2048, 4096) if 2 * s <= most}


def test_fresh_memories_follow_the_seed_and_the_device(place, monkeypatch):  # noqa: F811
    options = {**TRAINING, "base": str(place / "base"), "dtype": None}
    made = [load_base({**options, "seed": seed}).model for seed in (0, 0, 1)]
    first, again, other = (trainable(model) for model in made)
    assert all(mx.array_equal(x, again[name]) for name, x in first.items())
    assert not all(mx.array_equal(x, other[name]) for name, x in first.items())
    assert made[0].model.norm.weight.dtype == mx.float32 and made[0].ahn.query_projection
    # As on a GPU: 16 bits, but of what is packed the bits that it has.
    monkeypatch.setattr(output, "on_cpu", lambda: False)
    assert output._fast_dtype(made[0]) == "bfloat16"
    nn.quantize(made[1], class_predicate=lambda name, _: name.endswith("down_proj"))
    assert output._fast_dtype(made[1]) is None


def written(out, **names):
    for name, text in names.items():
        (out / name.replace("__", ".")).write_text(text)
    return out


def test_a_training_is_written_where_nothing_is_lost(tmp_path):
    options = {"base": str(tmp_path / "base"), "ahn": None, "data": [], "resume": False}
    for name in ("base", "ahn", "new", "mine", "full", "killed"):
        (tmp_path / name).mkdir()
    written(tmp_path / "mine", training__safetensors="x")
    written(tmp_path / "full", thesis__txt="years")
    killed = written(tmp_path / "killed", README__md="x", config__json='{"ahn_base": "b"}')
    (killed / ".lock").touch()
    (killed / ".model.safetensors.01ab.part").touch()
    written(tmp_path / "new", curves__png="x")
    for name, changes, said in (
        ("base", {}, "is what the training begins from"),
        ("ahn", {"ahn": str(tmp_path / "ahn")}, "is what the training begins from"),
        ("mine", {}, "has a training already; --resume"),
        ("full", {}, "the directory is not empty"),
        ("full", {"resume": True}, "training.safetensors: no such file; train without --resume"),
        ("absent", {"resume": True}, "training.safetensors: no such file"),
        ("new", {}, "the directory is not empty"),
        ("mine", {"resume": True, "data": [f"{tmp_path}/mine/*"]}, "is what --data reads"),
    ):
        with pytest.raises(AHNError, match=said):
            output.check_out(tmp_path / name, {**options, **changes})
    output.check_out(tmp_path / "mine", {**options, "resume": True})
    (tmp_path / "new/curves.png").unlink()
    for name in ("new", "killed", "deep/er/absent"):
        output.check_out(tmp_path / name, options)
    (killed / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(AHNError, match="the directory is not empty"):
        output.check_out(killed, options)
    output.clear(killed)
    assert not (killed / ".model.safetensors.01ab.part").exists() and (killed / ".lock").exists()


def test_a_card_of_a_memory_says_what_it_was_trained_with(place, tmp_path):  # noqa: F811
    options = {**TRAINING, "base": str(place / "base"), "data": ["x/a.txt", "b*"], "lr": 0.5}
    base, saved = load_base(options), []
    output.write_checkpoint(
        tmp_path, base, {**options, "out": "elsewhere", "save_every": 7}, saved.append
    )
    assert saved == [tmp_path]
    text = (tmp_path / "README.md").read_text()
    weights = mx.load(str(tmp_path / "model.safetensors"))
    count = sum(x.size for x in weights.values())
    for part in (
        "base_model: base\nlicense: other\n",
        f"GatedDeltaNet, {count:,} parameters, trained with a window of 60 tokens and\n4 sinks on",
        "on a.txt, b*.",
        f"--ahn {tmp_path.name}\n",
        "memory gated_deltanet, window 60, sinks 4",
        "lr 0.5",
    ):
        assert part in text, part
    assert "save_every" not in text and "elsewhere" not in text
    with open(tmp_path / "model.safetensors", "rb") as file:
        assert b'"format":"pt"' in file.read(20_000)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["ahn_base"] == str(place / "base") and config["save_ahn_only"] is True
    assert config["ahn"]["sink_positions"] == "clamped"


SHAPE = Shape(
    ahn=AHNConfig(memory="mamba2", window=8, fa_layer_ids=(0, 4)),
    layers=5,
    hidden=12,
    heads=12,
    kv_heads=6,
    head_dim=2,
    projections=5 * 300,
    mlp=5 * 90,
    gates=3 * 60,
    readout=3 * 120,
    vectors=5 * 7,
    memory_vectors=3 * 11,
    embedding=100 * 12,
    tied=False,
)


def test_parts_of_a_model_by_heads_and_by_layers():
    part = ranks.part(SHAPE, 3, 1, False)
    assert (part.heads, part.kv_heads, part.projections, part.mlp) == (4, 2, 500, 150)
    assert (part.gates, part.readout, part.embedding) == (60, 120, 34 * 12)
    assert (part.layers, part.vectors, part.memory_vectors) == (5, 35, 33)
    # Rank 0 of two has the last three layers, 2 to 4; of the five, 1 to 3 remember.
    last, first = (ranks.part(SHAPE, 2, rank, True) for rank in (0, 1))
    assert (last.layers, last.memory_layers, first.layers, first.memory_layers) == (3, 2, 2, 1)
    assert (last.projections, first.projections) == (900, 600)
    assert (last.gates, first.gates, last.memory_vectors, first.memory_vectors) == (120, 60, 22, 11)
    assert (last.readout, last.vectors, last.mlp) == (240, 21, 270)
    assert last.embedding == first.embedding == 1200
    middle = ranks.part(SHAPE, 5, 2, True)
    assert (middle.layers, middle.embedding, middle.tied) == (1, 0, True)


def test_what_ranks_send():
    """Twice round a ring, a part of each sum at a time; the logits once."""
    found = ranks.sent(SHAPE, "full", 2, False, 2)
    assert found.payload == 11 * 12 * 2 + 4 + 4 + 50 * 2
    assert found.ring == 11 * (2 * 6 * 2) + 2 * (2 * 4) + 50 * 2
    with_memory = ranks.sent(SHAPE, "ahn", 3, False, 2)
    plain = ranks.sent(SHAPE, "full", 3, False, 2)
    assert with_memory.payload - plain.payload == 3 * 4
    assert with_memory.ring - plain.ring == 3 * 2 * 2 * 4
    assert plain.ring == 11 * 2 * 2 * 4 * 2 + 2 * (2 * 2 * 4) + 2 * 34 * 2
    line = ranks.sent(SHAPE, "ahn", 5, True, 2)
    assert line == (24 + 4, 24 + 2 * 4 * 4)


def test_what_cannot_be_divided_is_refused_before_it_is_counted():
    for ask in (
        *(lambda: ranks.part(SHAPE, 4, 0, False), lambda: ranks.sent(SHAPE, "ahn", 4, False)),
        *(lambda: ranks.part(SHAPE, 6, 0, True), lambda: ranks.sent(SHAPE, "ahn", 6, True)),
    ):
        with pytest.raises(AHNError, match=r"cannot be (divided among 4|run by 6) ranks"):
            ask()
    gates = []
    for whole in ((0, 1, 2, 3), (0, 1, 2, 3, 4)):
        shape = dataclasses.replace(SHAPE, ahn=AHNConfig(memory="mamba2", fa_layer_ids=whole))
        gates.append([ranks.part(shape, 2, rank, True).gates for rank in (0, 1)])
    # The one layer that has a memory is of rank 0; nobody has what nothing has.
    assert gates == [[SHAPE.gates, 0], [0, 0]]


def test_a_stream_is_read_in_steps_and_judged_in_rows(monkeypatch):
    monkeypatch.setattr(measured, "STEP", 16)
    monkeypatch.setattr(measured, "ROWS", 7)
    _, model = tiny(window=10, sinks=3)
    model.train()
    for length in (60, 49, 50):
        ids = IDS[:, :length]
        (found,) = measured.stream(model, ids, 21)
        assert (found.first, found.end) == (21, length - 1) and not model.training
        with silenced(model):
            said = {"window": model(ids)}
        said["memory"] = model(ids)
        each = {
            kind: np.array(nn.losses.cross_entropy(logits[0, 21:-1], ids[0, 22:]))
            for kind, logits in said.items()
        }
        for kind, nll in each.items():
            assert found.nll[kind] == pytest.approx(nll.mean(), rel=1e-4)
        difference = each["memory"] - each["window"]
        assert found.difference == pytest.approx(difference.mean(), rel=1e-3, abs=1e-5)
        error = difference.std(ddof=1) / math.sqrt(length - 22)
        assert found.error == pytest.approx(error, rel=1e-3)
    assert teach(model, IDS).heads == []
    assert ranks.sent(SHAPE, "full", 2, False) == ranks.sent(SHAPE, "full", 2, False, 2)


def test_a_long_stream_is_judged_in_stretches(monkeypatch):
    _, model = tiny(window=10, sinks=3)
    read = []
    found = measured.stream(model, mx.arange(8200)[None] % 100, 3, read.append)
    assert [stretch[:2] for stretch in found] == [(3, 8195), (8195, 8199)]
    assert read == 2 * [2048, 2048, 2048, 2048, 7]
    assert all(stretch.error > 0 and stretch.difference for stretch in found)
    (end,) = measured.stream(model, mx.arange(8200)[None] % 100, 8195)
    assert end.nll == pytest.approx(found[1].nll, rel=1e-4)
    assert end.error == pytest.approx(found[1].error, rel=1e-3)
    monkeypatch.setattr(measured, "ROWS", 8192)
    whole = measured._stream(model, mx.arange(8200)[None] % 100, 3, lambda n: None)
    assert found[0].nll["memory"] == pytest.approx(whole[:8192].mean().item(), rel=1e-4)


def test_a_teacher_is_as_in_use_and_a_student_as_it_is_asked_to_be():
    _, model = tiny(window=10, sinks=3)
    for run, training in (
        (lambda: study(model, IDS, 10, 3), True),
        (lambda: teach(model, IDS), False),
        (lambda: study(model, IDS, 10, 3, inference=True), False),
    ):
        run()
        assert all(layer.self_attn.training is training for layer in model.layers)


def test_heads_are_kept_of_layers_with_a_memory_where_they_are_asked_for():
    _, model = tiny(window=10, sinks=3, fa_layer_ids=(1,))
    remembering = len(model.layers) - 1
    for kept, asked in ((remembering, True), (0, False)):
        found = teach(model, IDS, asked), study(model, IDS, 10, 3, asked)
        for stream in found:
            assert [x.shape for x in stream.heads] == kept * [(1, 4, 60, 16)]
        assert all(
            mx.allclose(a[:, :, :13], b[:, :, :13], atol=1e-5)
            for a, b in zip(*(s.heads[:1] for s in found), strict=True)
        )
