"""Runs of batches, of several windows and by the clock."""

import dataclasses
import itertools
import json
from collections import Counter

import click
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from forkserver import command
from hypothesis import given
from hypothesis import strategies as st
from test_batch import loud
from test_training import SETTINGS, base_model, losses_of, place, sequences  # noqa: F401

from ahn_mlx import AHNConfig, AHNError, augment
from ahn_mlx.cli import cli
from ahn_mlx.train import loop, losses
from ahn_mlx.train.output import load_base
from ahn_mlx.train.settings import Settings, Window, batch_of, choices, draw_window
from ahn_mlx.train.streams import study, teach, trainable

WINDOWS = "12+4@96 8+2@48 12+4@96"
MANY = dataclasses.replace(
    SETTINGS, seq_len=96, windows=WINDOWS, batch_size=3, accumulate=2, steps=9, lr=1e-3
)


def changed(settings: Settings, **values) -> Settings:
    return dataclasses.replace(settings, **values)


def counting_calls():
    """A clock by which each step takes a second: it is asked once in a step."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


VARIANTS = [
    ("gated_deltanet", {"query_projection": True}, "kl"),
    ("gated_deltanet", {"router": True, "sink_positions": "clamped"}, "kl"),
    ("gated_deltanet", {}, "ce"),
    ("deltanet", {"router": True, "window_gain": True}, "kl"),
    ("deltanet", {}, "distill"),
    ("mamba2", {"sink_positions": "clamped"}, "kl"),
]


@pytest.mark.parametrize(("memory", "options", "loss"), VARIANTS)
def test_a_batch_has_the_gradients_of_its_sequences(place, memory, options, loss):  # noqa: F811
    mx.random.seed(3)
    tokenizer = base_model(place)[1]
    plain, _ = mlx_lm.utils.load_model(place / "base")
    model = loud(augment(plain, AHNConfig(memory=memory, window=12, sinks=4, **options)))
    model.set_dtype(mx.float32)
    data = sequences(place, tokenizer, length=64)
    trainer = loop.Trainer(model, data, changed(SETTINGS, seq_len=64, loss=loss))
    tokens = [data[n] for n in range(8)]
    for window, sinks in ((12, 4), (7, 0)):
        value, together = trainer._gradients(mx.concatenate(tokens), window, sinks)
        singles = [trainer._gradients(one, window, sinks) for one in tokens]
        mean = sum(one.item() for one, _ in singles) / 8
        assert value.item() == pytest.approx(mean, rel=1e-5)
        heard = 0
        for name, gradient in together.items():
            expected = sum(one[name] for _, one in singles) / 8
            # Of sequences whose gradients cancel, float32 keeps what they are, not what is left.
            size = sum(mx.linalg.norm(one[name].flatten()).item() for _, one in singles) / 8
            difference = mx.linalg.norm((gradient - expected).flatten()).item()
            assert difference <= 1e-5 * size, name
            heard += size > 0
        assert heard >= 0.9 * len(together)


@pytest.mark.parametrize("minutes", [0.0, 0.15])
def test_a_run_of_all_settings_goes_on_bit_for_bit(place, tmp_path, minutes):  # noqa: F811
    model, tokenizer = base_model(place)
    data, settings = sequences(place, tokenizer, length=96), changed(MANY, minutes=minutes)
    once = loop.Trainer(model, data, settings, now=counting_calls())
    expected = [once.train_step() for _ in range(6)]
    state = {name: mx.array(x) for name, x in once._state().items()}
    twice = loop.Trainer(base_model(place)[0], data, settings, now=counting_calls())
    found = [twice.train_step() for _ in range(4)]
    twice.save(tmp_path)
    twice.train_step()  # which is lost
    again = loop.Trainer(base_model(place)[0], data, settings, tmp_path, counting_calls())
    found += [again.train_step() for _ in range(2)]
    assert found == expected and len(set(found)) == 6
    assert again._state().keys() == state.keys()
    assert all(mx.array_equal(x, state[name]) for name, x in again._state().items())


def test_a_run_of_an_older_version_goes_on(place, tmp_path):  # noqa: F811
    model, tokenizer = base_model(place)
    data = sequences(place, tokenizer)
    run = loop.Trainer(model, data, SETTINGS)
    run.train_step()
    run.save(tmp_path)
    expected = run.train_step()
    state, facts = mx.load(str(tmp_path / loop.STATE), return_metadata=True)
    mx.eval(state)
    since = ("batch_size", "minutes", "windows")
    settings = {k: v for k, v in json.loads(facts["settings"]).items() if k not in since}
    facts = {"settings": json.dumps(settings), "step": facts["step"]}
    mx.save_safetensors(str(tmp_path / loop.STATE), state, facts)
    again = loop.Trainer(base_model(place)[0], data, SETTINGS, tmp_path)
    assert again.train_step() == expected


def test_by_the_clock_rates_fall_with_the_time_that_is_used(place):  # noqa: F811
    model, tokenizer = base_model(place)
    settings = changed(SETTINGS, minutes=1.0, warmup=3)
    time = [0.0]
    trainer = loop.Trainer(model, sequences(place, tokenizer), settings, now=lambda: time[0])

    def rate() -> float:
        trainer.train_step()
        return trainer.optimizer.optimizers[-1].learning_rate.item()

    # While the clock stands still they rise with the warm-up, and then stay.
    rates = [rate() for _ in range(5)]
    assert rates == pytest.approx([settings.lr * x for x in (0.25, 0.5, 0.75, 1, 1)])
    time[0] = 30.0
    assert rate() == pytest.approx(settings.lr * 0.55) and not trainer.schedule.done
    gains = trainer.optimizer.optimizers[0].learning_rate.item()
    assert gains == pytest.approx(400 * settings.lr * 0.55)
    time[0] = 61.0
    assert rate() == pytest.approx(settings.lr * 0.1) and trainer.schedule.done
    assert trainer.schedule.said() == "7 steps, 1.0 of 1 minutes"


def test_minutes_that_are_used_are_not_given_again(place, tmp_path):  # noqa: F811
    model, tokenizer = base_model(place)
    data, settings = sequences(place, tokenizer), changed(SETTINGS, minutes=0.05)
    run = loop.Trainer(model, data, settings, now=counting_calls())
    while not run.schedule.done:
        run.train_step()
    assert run.step == 3
    run.save(tmp_path)
    assert loop.Trainer(model, data, settings, tmp_path).schedule.done
    longer = loop.Trainer(model, data, changed(settings, minutes=0.1), tmp_path, counting_calls())
    assert not longer.schedule.done and longer.schedule.share == pytest.approx(0.5)
    by_steps = loop.Trainer(model, data, changed(SETTINGS, steps=4), tmp_path)
    assert not by_steps.schedule.done


@pytest.mark.slow
def test_the_command_by_the_clock(place, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    common = ["--out", out, "--data", place / "text.txt"]
    first = ["train", *common, "--model", place / "base", "--window", "12+4@64", "--layerwise", 0]
    done = command(*first, "--window", "8+2@32", "--batch-size", 2, "--minutes", 0.01)
    assert done.returncode == 0, done.stderr
    made = len(losses_of(out))
    settings, step = loop.read_settings(out)
    assert step == made >= 1 and settings["minutes"] == 0.01
    assert settings["windows"] == "12+4@64 8+2@32" and settings["batch_size"] == 2
    assert "sequence" not in done.stderr and "held out: KL" in done.stderr
    done = command("train", *common, "--resume")
    assert done.returncode == 0 and len(losses_of(out)) == made, done.stderr
    done = command("train", *common, "--resume", "--steps", made + 2)
    assert done.returncode == 0 and len(losses_of(out)) == made + 2, done.stderr
    done = command("train", *common, "--resume", "--window", "12+4@64")
    assert done.returncode == 2 and "--window '12+4@64 8+2@32', not 12" in done.stderr


def test_windows_are_drawn_as_often_as_they_are_given():
    assert choices(MANY) == (Window(12, 4, 96), Window(8, 2, 48), Window(12, 4, 96))
    drawn = [draw_window(MANY, step) for step in range(900)]
    counts = Counter(drawn)
    assert set(counts) == set(choices(MANY))
    assert 520 < counts[Window(12, 4, 96)] < 680
    assert drawn == [draw_window(MANY, step) for step in range(900)]
    assert drawn != [draw_window(changed(MANY, seed=1), step) for step in range(900)]
    # As many tokens in each step.
    assert [batch_of(MANY, w) for w in choices(MANY)] == [3, 6, 3]
    assert batch_of(MANY, Window(8, 2, 10**6)) == 1


def test_of_each_length_every_sequence_is_seen_once_an_epoch(place, monkeypatch):  # noqa: F811
    model, tokenizer = base_model(place)
    data, asked = sequences(place, tokenizer, length=96), []
    trainer = loop.Trainer(model, data, changed(MANY, layerwise=1))
    nothing = {n: mx.zeros_like(x) for n, x in trainer.parameters.items()}

    def look(tokens, window, sinks):
        asked.append((tokens, window))
        return mx.zeros(()), nothing

    monkeypatch.setattr(trainer, "_gradients", look)
    for _ in range(6):
        trainer.train_step()
    for length, window in ((96, 12), (48, 8)):
        seen = mx.concatenate([x for x, w in asked if w == window])
        expected = [data.of(length)[1 + n] for n in range(len(seen))]
        assert mx.array_equal(seen, mx.concatenate(expected)) and len(seen) >= 12


def test_no_length_trains_on_what_is_held_out(place):  # noqa: F811
    _, tokenizer = base_model(place)
    data = sequences(place, tokenizer)
    assert data.of(128) is data
    held = [bytes(row.astype(np.uint8)) for row in data.held_out]
    for length in (32, 100, 300):
        other = data.of(length)
        rows = [bytes(row.astype(np.uint8)) for row in other.tokens]
        assert other.tokens.shape == (other.count, length)
        assert len(data._all) // length - other.count <= 2 * (128 // length + 2)
        for row in rows:
            assert not any(row[at : at + 32] in text for text in held for at in (0, length - 32))
        # What is left is the text, in its order and without a gap between neighbours.
        text = bytes(data._all.astype(np.uint8))
        assert all(row in text for row in rows)
    with pytest.raises(AHNError, match=r"no sequence of 90,000 tokens, it has .* give more text"):
        data.of(90_000)
    with pytest.raises(AHNError, match="no sequence of 49,000 tokens beside what is held out"):
        data.of(49_000)


BAD = [
    *("", "1,024", "1024+", "+64", "1024@", "1024+64@", "1024@4096+64", "1_024", "1e3", "0x10"),
    *(
        "-5",
        "1024-64",
        "1024 + 64",
        "1024+64@4096@1",
        "\u0661\u0662",
        "9" * 5000,
        "1024\u00d764",
        "nan",
    ),
]


def refusal(*options: object) -> str:
    given = ["train", "--data", "absent.txt", "--out", "absent", *map(str, options)]
    with pytest.raises((AHNError, click.UsageError)) as caught:
        cli.main(given, standalone_mode=False)
    return str(caught.value)


@pytest.mark.parametrize("text", BAD)
def test_another_spelling_of_a_window_is_one_line(text):
    said = refusal(f"--window={text}")
    assert said.startswith("--window") and "\n" not in said and len(said) < 300


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--window", "0"], "--window must be at least 1, not 0"),
        (["--window", "8", "--window", "0+4"], "--window must be at least 1, not 0"),
        (["--window", "8", "--window", "64+64@128"], "--seq-len 128: nothing leaves a window"),
        (["--window", "8", "--window", "9", "--random-window"], "give one --window"),
        (["--window", "8", "--window", "9", "--steps", 0], "one --window has an effect"),
        (["--window", "8+2", "--sinks", 4], "--sinks has no effect where each --window says"),
        (["--window", "8+2@64", "--seq-len", 96], "--seq-len has no effect where each --window"),
        (["--minutes", 0], "--minutes must be above 0, not 0"),
        (["--minutes", -1], "--minutes must be above 0, not -1"),
        (["--minutes", "nan"], "--minutes must be above 0, not nan"),
        (["--minutes", "inf"], "--minutes must be above 0, not inf"),
        (["--minutes", "1e-400"], "--minutes must be above 0, not 0"),
        (["--batch-size", 0], "--batch-size must be at least 1, not 0"),
        (["--minutes", 1, "--steps", 2], "--steps has no effect with --minutes"),
    ],
)
def test_settings_that_no_run_can_have_are_one_line(options, said):
    found = refusal(*options)
    assert said in found and "\n" not in found


@given(st.text("0123456789+@ -.,x", max_size=24) | st.text(max_size=8))
def test_a_window_is_what_it_says_or_refused(text):
    try:
        window = Window.spelled(text, 4, 96)
    except AHNError as e:
        assert "\n" not in str(e)
        return
    assert Window.spelled(str(window), 0, 1) == window
    numbers = text.replace("@", "+").split("+")
    assert window.window == int(numbers[0]) and {window.sinks, window.seq_len} <= {
        *(4, 96),
        *map(int, numbers[1:]),
    }


DAMAGE = {
    "windows that are none": ({"windows": "12+4@96 8+"}, {}, "--window must be"),
    "a window that nothing leaves": (
        {"windows": "12+4@96 79+16@96"},
        {},
        "nothing leaves a window",
    ),
    "a window of nothing": (
        {"windows": "0+4@96 12+4@96"},
        {},
        "--window must be at least 1, not 0",
    ),
    "random windows of a few tokens": (
        {"windows": "", "random_window": True, "seq_len": 63},
        {},
        "--random-window needs --seq-len of at least 64, not 63",
    ),
    "windows of both kinds": ({"random_window": True}, {}, "draws windows of its own"),
    "windows that are a number": ({"windows": 8}, {}, "its windows is 8"),
    "minutes that are a word": ({"minutes": "1"}, {}, "its minutes is '1'"),
    "a time that is none": ({}, {"seconds": "nan"}, "has taken nan seconds"),
    "a time before the start": ({}, {"seconds": "-1"}, "has taken -1.0 seconds"),
    "a time in words": ({}, {"seconds": "soon"}, "not a training state"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_one_line(place, tmp_path, name):  # noqa: F811
    settings, others, said = DAMAGE[name]
    facts = {"settings": json.dumps({**dataclasses.asdict(MANY), **settings}), "step": "1"}
    mx.save_safetensors(str(tmp_path / loop.STATE), {"a": mx.zeros(1)}, {**facts, **others})
    with pytest.raises(AHNError) as caught:
        loop.read_settings(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_memory_is_float32_on_a_base_of_16_bits(place):  # noqa: F811
    """And what the base computes stays in 16."""
    options = {"memory": "gated_deltanet", "window": 12, "sinks": 4, "sink_positions": "clamped"}
    options |= {"router": False, "window_gain": False}
    base = load_base({**options, "base": str(place / "base"), "dtype": "bfloat16", "seed": 0})
    model = loud(base.model)
    assert {x.dtype for x in trainable(model).values()} == {mx.float32}
    trainer = loop.Trainer(model, sequences(place, base.tokenizer, length=64), SETTINGS)
    tokens = trainer.texts[SETTINGS.seq_len][0]
    assert teach(model, tokens).hidden.dtype == mx.bfloat16
    assert study(model, tokens, 12, 4).hidden.dtype == mx.bfloat16
    gradients = trainer._gradients(tokens, 12, 4)[1]
    assert {x.dtype for x in gradients.values()} == {mx.float32}


@pytest.mark.parametrize("minutes", [0.0, 0.15])
def test_a_compiled_optimizer_does_the_same(place, monkeypatch, minutes):  # noqa: F811
    """As on a GPU; rates that change are not those of the first step for ever."""
    tokenizer = base_model(place)[1]
    data, settings = sequences(place, tokenizer, length=64), changed(SETTINGS, seq_len=64)
    settings = changed(settings, minutes=minutes, steps=9, weight_decay=0.1)
    ends = []
    for compiled in (False, True):
        monkeypatch.setattr(loop, "on_cpu", lambda compiled=compiled: not compiled)
        model = base_model(place)[0]
        trainer = loop.Trainer(model, data, settings, now=counting_calls())
        gradients = {
            n: mx.sin(mx.arange(x.size)).reshape(x.shape) for n, x in trainer.parameters.items()
        }
        for _ in range(4):
            trainer.schedule.begin()
            trainer._update(mx.zeros(()), gradients)
            trainer.schedule.step += 1
        ends.append(trainer._state())
    assert ends[0].keys() == ends[1].keys()
    for name, x in ends[0].items():
        assert mx.allclose(x, ends[1][name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize(
    ("memory", "words", "rows"),
    [(0, 49152, 128), (80 << 30, 49152, 2048), (80 << 30, 151936, 512), (16 << 30, 151936, 128)],
)
def test_rows_of_logits_are_as_many_as_a_gpu_holds(monkeypatch, memory, words, rows):
    monkeypatch.setattr(losses, "gpu_bytes", lambda: memory)
    assert losses.rows_at_once(words) == rows
    assert memory == 0 or rows == 128 or 25 * 4 * words * rows <= memory / 8
