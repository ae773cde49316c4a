"""What a training goes on from may be damaged: one line, and nothing is lost."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import pytest
from test_training import SETTINGS, base_model, place, sequences  # noqa: F401

from ahn_mlx import AHNError
from ahn_mlx.train import loop
from ahn_mlx.train.curves import write_curves
from ahn_mlx.train.metrics import METRICS, Metrics, read_metrics
from ahn_mlx.train.settings import Window

SHORT = dataclasses.replace(SETTINGS, steps=3, seq_len=64, window=8, sinks=2)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):  # noqa: F811
    """Trainers of one model, and what they say after two steps of three."""
    model, tokenizer = base_model(place)
    data = sequences(place, tokenizer, length=64)

    def new(saved: Path | None = None, **settings) -> loop.Trainer:
        return loop.Trainer(model, data, dataclasses.replace(SHORT, **settings), saved)

    trainer = new()
    for _ in range(2):
        trainer.train_step()
    directory = tmp_path_factory.mktemp("run")
    trainer.save(directory)
    return new, directory


def parts(directory: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    state, facts = mx.load(str(directory / loop.STATE), return_metadata=True)
    mx.eval(state)
    return state, facts


GAIN = "parameters.model.layers.1.self_attn.ahn.gain"
MATRIX = "model.layers.1.self_attn.ahn.o_proj.weight"
MEAN = f"optimizer.states.1.{MATRIX}.v"


def named(state: dict[str, mx.array], end: str) -> str:
    return next(name for name in sorted(state) if name.endswith(end))


def put(end, change):
    def damage(state, facts):
        name = named(state, end)
        state[name] = change(state[name])

    return damage


DAMAGE = {
    "a setting of another type": (
        lambda state, facts: facts.update(
            settings=json.dumps({**json.loads(facts["settings"]), "window": True})
        ),
        "not a training state ('its window is True')",
    ),
    "another shape": (put("1.self_attn.ahn.gain", lambda x: x[:2]), "gain is"),
    "another dtype": (put("1.self_attn.ahn.gain", lambda x: x.astype(mx.float16)), "gain is"),
    "no number": (put("1.self_attn.ahn.gain", lambda x: x * mx.nan), "gain holds NaN"),
    "an infinite mean": (put("o_proj.weight.m", lambda x: x + mx.inf), "holds NaN or infinity"),
    "a negative square": (put("o_proj.weight.v", lambda x: x - 1), "is not positive"),
    "one negative square": (
        put("o_proj.weight.v", lambda x: mx.where(mx.arange(x.size).reshape(x.shape) == 5, -1, x)),
        "is not positive",
    ),
    "one size less": (
        put("sizes." + MATRIX, lambda x: x * (mx.arange(x.size).reshape(x.shape) > 0)),
        "is not positive",
    ),
    "no size": (put("sizes." + MATRIX, lambda x: x * 0), "is not positive"),
    "an optimizer of another step": (put("states.2.step", lambda x: x + 10**12), "step is 10"),
    "an optimizer's step that is no number": (
        put("states.2.step", lambda x: mx.array([1, 2], mx.uint64)),
        "step is mlx.core.uint64 (2,)",
    ),
    "a tensor less": (
        lambda state, facts: state.pop(named(state, "o_proj.weight.m")),
        "of another model",
    ),
    "a tensor more": (
        lambda state, facts: state.update({"optimizer.states.9.step": mx.array(2)}),
        "of another model",
    ),
    "a negative step": (lambda state, facts: facts.update(step="-1"), "of step -1 of 3"),
    "a step beyond the last": (lambda state, facts: facts.update(step="4"), "of step 4 of 3"),
    "a step that is none": (lambda state, facts: facts.update(step="two"), "not a training state"),
    "the first step, with means of later ones": (
        lambda state, facts: facts.update(step="0"),
        "of another model",
    ),
    "no settings": (lambda state, facts: facts.pop("settings"), "not a training state"),
    "settings in a list": (lambda state, facts: facts.update(settings="[]"), "not a training"),
    "deep settings": (lambda state, facts: facts.update(settings="[" * 10**5), "not a training"),
    "a setting in control characters": (
        lambda state, facts: facts.update(
            settings=json.dumps({**json.loads(facts["settings"]), "loss": "\x1b[2J"})
        ),
        r"not a training state (",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused_in_one_line(run, tmp_path, damage, message):
    new, directory = run
    state, facts = parts(directory)
    damage(state, facts)
    file = tmp_path / loop.STATE
    mx.save_safetensors(str(file), state, facts)
    before = file.read_bytes()
    with pytest.raises(AHNError) as error:
        new(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{file}: ") and message in text and text.isprintable(), text
    assert file.read_bytes() == before


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_state_that_was_cut_short(run, tmp_path, size):
    new, directory = run
    (tmp_path / loop.STATE).write_bytes((directory / loop.STATE).read_bytes()[:size])
    with pytest.raises(AHNError, match=loop.STATE):
        new(tmp_path)


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_honest_state_is_gone_on_from(run, tmp_path, steps, warmup):
    new, _ = run
    once = new(warmup=warmup)
    for _ in range(steps):
        once.train_step()
    once.save(tmp_path)
    before = parts(tmp_path)
    again = new(tmp_path, warmup=warmup)
    assert again.step == steps
    again.save(tmp_path)
    after = parts(tmp_path)
    assert before[1] == after[1] and before[0].keys() == after[0].keys()
    assert all(mx.array_equal(x, after[0][name]) for name, x in before[0].items())
    if steps < 3:
        assert again.train_step() == once.train_step()


def rates(trainer, steps: int) -> list[float]:
    """Learning rates of the gates at the next steps."""
    schedule = trainer.schedule.of(1.0)
    return [schedule(mx.array(trainer.step + n)).item() for n in range(steps)]


@pytest.mark.parametrize("steps", [4, 2])
def test_a_run_goes_on_to_another_end(run, steps):
    """Its last steps are those of a run that had so many from the start."""
    new, directory = run
    longer = new(directory, steps=steps)
    assert longer.step == 2
    assert rates(longer, steps - 2) == rates(new(steps=steps), steps)[2:]
    before = parts(directory)[0]
    again = new(directory)
    assert all(mx.array_equal(x, before[name]) for name, x in again._state().items())
    losses = [longer.train_step() for _ in range(steps - 2)]
    assert len(losses) == steps - 2
    if losses:
        # What it has seen, and the rate at which it learned: the first is as without more steps.
        assert losses[0] == again.train_step()


def test_a_longer_run_can_be_interrupted_again(run, tmp_path):
    new, directory = run
    once = new(directory, steps=4)
    expected = [once.train_step() for _ in range(2)]
    twice = new(directory, steps=4)
    first = twice.train_step()
    twice.save(tmp_path)
    assert [first, new(tmp_path, steps=4).train_step()] == expected


def test_fewer_steps_than_were_made_are_refused(run):
    new, directory = run
    with pytest.raises(AHNError, match="has made 2 steps; give --steps 2 or more"):
        new(directory, steps=1)
    with pytest.raises(AHNError, match=r"trained with --window 8, not 9"):
        new(directory, window=9)


LINE = {"step": 0, "loss": 2.0, "window": 8, "sinks": 2, "tokens_per_second": 5.0}


def metrics(file: Path, *lines: object, end: str = "") -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return file


def test_of_metrics_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    lines = [{**LINE, "step": n} for n in range(4)]
    file = metrics(tmp_path / "metrics.jsonl", *lines, end='{"step": 4, "lo')
    assert read_metrics(file) == lines
    Metrics(file, 3)
    assert read_metrics(file) == lines[:3]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_whose_first_lines_are_gone_go_on_at_their_step(tmp_path):
    file = metrics(tmp_path / "metrics.jsonl", *({**LINE, "step": n} for n in range(5, 9)))
    Metrics(file, 7).write(7, 1.0, 64, Window(8, 2, 64))
    assert [line["step"] for line in read_metrics(file)] == [5, 6, 7]


@pytest.mark.parametrize(
    "line",
    [
        *(5, None, [], "text", {}, {"step": 1}, {**LINE, "loss": None}, {**LINE, "loss": "low"}),
        *({**LINE, "step": -1}, {**LINE, "step": True}, {**LINE, "step": 10**400}),
        *({**LINE, "loss": float("nan")}, {**LINE, "loss": float("inf")}, {**LINE, "step": 1.5}),
    ],
)
def test_other_damage_to_metrics_is_named_and_nothing_is_lost(tmp_path, line):
    file = metrics(tmp_path / METRICS, LINE, line, {**LINE, "step": 2})
    before = file.read_bytes()
    for act in (lambda: Metrics(file, 3), lambda: write_curves(tmp_path, "kl")):
        with pytest.raises(AHNError, match=r"metrics\.jsonl: line 2 says no step and loss"):
            act()
    assert file.read_bytes() == before and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("data", [b"\xff\xfe\n", b"\0" * 64 + b"\n", b"[" * 10**5 + b"\n"])
def test_metrics_that_are_no_text(tmp_path, data):
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with pytest.raises(AHNError, match="line 1 says no"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("step", "seconds", "settings", "said"),
    [
        (0, None, {}, ""),
        (3, "0.5", {}, ""),
        (4, "0", {}, "damaged, it is of step 4 of 3"),
        (-1, "0", {}, "damaged, it is of step -1 of 3"),
        (4, "0", {"minutes": 1.0}, ""),
        (-1, "0", {"minutes": 1.0}, "damaged, it is of step -1 of 3"),
        (0, "0", {"seed": (1 << 63) - 1}, ""),
        (0, "0", {"seed": 1 << 63}, "its seed is 9223372036854775808"),
        (0, "0", {"loss": "mse"}, "its loss is .*mse"),
        (0, "0", {"grad_checkpoint": 1}, "its grad_checkpoint is 1"),
    ],
)
def test_facts_of_a_state_that_can_be(tmp_path, step, seconds, settings, said):
    facts = {"settings": json.dumps({**dataclasses.asdict(SHORT), **settings}), "step": str(step)}
    facts |= {} if seconds is None else {"seconds": seconds}
    mx.save_safetensors(str(tmp_path / loop.STATE), {"a": mx.zeros(1)}, facts)
    if said:
        with pytest.raises(AHNError, match=said):
            loop._read_facts(tmp_path)
    else:
        theirs, found, taken = loop._read_facts(tmp_path)
        assert theirs == {**dataclasses.asdict(SHORT), **settings}
        assert (found, taken) == (step, float(seconds or 0))


def test_a_state_of_an_older_version_says_less(tmp_path):
    settings = dataclasses.asdict(SHORT)
    for name in ("batch_size", "minutes", "windows"):
        del settings[name]
    facts = {"settings": json.dumps(settings), "step": "1"}
    mx.save_safetensors(str(tmp_path / loop.STATE), {"a": mx.zeros(1)}, facts)
    assert loop.read_settings(tmp_path) == (dataclasses.asdict(SHORT), 1)
