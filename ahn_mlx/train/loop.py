"""The training loop: teacher, student, loss, optimizer, and what is saved of them.

A run is a function of its settings: sequence and window of a step follow from seed and
step number, so parameters, optimizer and step are all there is to resume.
"""

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.directory import load_safetensors
from ..checkpoints.safetensors import mended, not_finite, read_header_and_metadata
from ..errors import AHNError, show
from ..model.augment import memory_layers
from ..outputs.files import replacing
from . import layerwise, losses
from .data import Sequences
from .streams import Parameters, install, study, teach, trainable

STATE, METRICS = "training.safetensors", "metrics.jsonl"

# Learning rates as multiples of --lr. A head's gain scales its whole output matrix, which is
# trained in units of its first size: from head to head that differs by a factor of 256.
RATES = {"gain": 400.0, "o_proj.weight": 200.0, "q_proj.weight": 10.0}

# Size of an output matrix that starts at zero.
FRESH = 1e-3


@dataclass(frozen=True)
class Settings:
    """What a run is made of. loss: one of losses.NAMES. lr: of the gates' projections.
    random_window: draw window and sinks anew each step, as the paper does. steps: alone may
    grow or shrink when a run goes on: the learning rates of what is left are those of a run that
    had so many from its start."""

    window: int
    sinks: int
    seq_len: int
    steps: int
    lr: float
    loss: str
    layerwise: int
    accumulate: int
    warmup: int
    weight_decay: float
    random_window: bool
    grad_checkpoint: bool
    seed: int


def draw_window(settings: Settings, step: int) -> tuple[int, int]:
    """Window and sinks of a step.

    Drawn as in the PyTorch release: W + S one of 32, 64 ... 8192 between L/8 and L, sinks
    one of 0, 32 ... 4096 up to half of it.
    """
    if not settings.random_window:
        return settings.window, settings.sinks
    pick = random.Random(f"{settings.seed} {step}")
    L = settings.seq_len
    total = pick.choice([1 << n for n in range(5, 14) if L / 8 < 1 << n < L])
    sinks = pick.choice([s for s in (0, 32, 64, 128, 512, 2048, 4096) if s <= total / 2])
    return total - sinks, sinks


class Trainer:
    """model: an AHN model, whose memories are changed in place. saved: the directory of a run
    to go on with; otherwise the layer-wise stage comes first, if there is one.

    explained: what that stage returned.
    """

    def __init__(
        self, model: nn.Module, data: Sequences, settings: Settings, saved: Path | None = None
    ):
        self.model, self.data, self.settings = model, data, settings
        self.step = 0
        self.explained: float | None = None
        if settings.layerwise and saved is None:
            self.explained = layerwise.fit(
                model, data, settings.layerwise, settings.window, settings.sinks
            )
        self.parameters = {n: x.astype(mx.float32) for n, x in trainable(model).items()}
        layers = list(memory_layers(model))
        # Together, those that the first layers were fitted do harm: they grow where they help.
        early = len(layers) // 3 if settings.layerwise else 0
        self.sizes: Parameters = {}
        for n, (i, attention) in enumerate(layers):
            gain = f"model.layers.{i}.self_attn.ahn.gain"
            start = mx.zeros if n < early else mx.ones
            self.parameters[gain] = start(attention.n_heads)
            matrix = gain.removesuffix("gain") + "o_proj.weight"
            self.sizes[matrix] = _sizes(self.parameters[matrix])
            self.parameters[matrix] = self.parameters[matrix] / self.sizes[matrix]
        rates = [*RATES.values(), 1.0]
        self.optimizer = optim.MultiOptimizer(
            [self._adamw(r) for r in rates],
            [partial(_ends_with, suffix) for suffix in RATES],
        )
        self.world = mx.distributed.init()
        if saved is not None:
            self._resume(saved)
        install(model, fold(self.parameters, self.sizes))
        mx.eval(model.parameters())

    def _adamw(self, rate: float) -> optim.AdamW:
        # Uncorrected, the first hundred steps are three to six times as long.
        return optim.AdamW(
            self._schedule(rate), weight_decay=self.settings.weight_decay, bias_correction=True
        )

    def _schedule(self, rate: float) -> Callable[[mx.array], mx.array]:
        s = self.settings
        peak, warmup = rate * s.lr, min(s.warmup, s.steps)
        cosine = optim.cosine_decay(peak, max(1, s.steps - warmup), end=0.1 * peak)
        if not warmup:
            return cosine
        rise = optim.linear_schedule(peak / (warmup + 1), peak, warmup)
        return optim.join_schedules([rise, cosine], [warmup])

    def train_step(self) -> float:
        """One update from `accumulate` sequences per machine. Returns the mean loss.

        Raises AHNError when the loss is not finite, with parameters as before, and when
        another machine is lost.
        """
        s, machines = self.settings, self.world.size()
        window, sinks = draw_window(s, self.step)
        total, gradients = mx.zeros(()), None
        for a in range(s.accumulate):
            n = (self.step * s.accumulate + a) * machines + self.world.rank()
            # On those of the layer-wise stage, the memory looks better than it is.
            loss, new = self._gradients(self.data[s.layerwise + n], window, sinks)
            total = total + loss
            gradients = new if gradients is None else {k: gradients[k] + new[k] for k in new}
            mx.eval(total, gradients)
        assert gradients is not None
        try:
            value = self._update(total, gradients)
        except RuntimeError as e:
            if machines == 1:
                raise
            raise AHNError(
                f"training on {machines} machines failed at step {self.step} ({e});"
                " --resume goes on from the last save"
            ) from None
        install(self.model, fold(self.parameters, self.sizes))  # what is saved of it is of now
        self.step += 1
        return value

    def _update(self, total: mx.array, gradients: Parameters) -> float:
        """Raises AHNError when the mean loss, which is returned, is not finite."""
        s, machines = self.settings, self.world.size()
        # Sorted: machines must agree on the order, and MLX's optimizers do not keep it.
        mean = nn.average_gradients(
            _tree({k: g / s.accumulate for k, g in sorted(gradients.items())})
        )
        value = float(mx.distributed.all_sum(total).item()) / (machines * s.accumulate)  # type: ignore[arg-type]
        if not math.isfinite(value):
            raise AHNError(f"the loss is {value} at step {self.step}; try a smaller --lr")
        updated: Any = tree_flatten(self.optimizer.apply_gradients(mean, _tree(self.parameters)))
        self.parameters = dict(updated)
        mx.eval(self.parameters, self.optimizer.state)
        return value

    def _gradients(self, tokens: mx.array, window: int, sinks: int) -> tuple[mx.array, Parameters]:
        s, model = self.settings, self.model
        keep = s.loss == "distill"
        teacher = teach(model, tokens, keep)
        mx.eval(teacher)

        def objective(parameters: Parameters) -> mx.array:
            install(model, fold(parameters, self.sizes))
            student = study(model, tokens, window, sinks, keep, s.grad_checkpoint)
            return losses.LOSSES[s.loss](model, teacher, student, tokens, window + sinks)

        value, gradients = mx.value_and_grad(objective)(self.parameters)
        # Nothing of the trace may stay in the model.
        install(model, fold(self.parameters, self.sizes))
        return value, gradients

    def save(self, directory: Path) -> None:
        """Parameters, optimizer and step, under their final name only when complete."""
        facts = {"settings": json.dumps(asdict(self.settings)), "step": str(self.step)}
        with replacing(directory / STATE) as part, part.open("wb") as file:
            mx.save_safetensors(file, self._state(), facts)

    def _state(self) -> Parameters:
        """All that a run goes on from, but its step."""
        flat: Any = tree_flatten(self.optimizer.state)
        return {
            **{f"parameters.{n}": x for n, x in self.parameters.items()},
            **{f"sizes.{n}": x for n, x in self.sizes.items()},
            **{f"optimizer.{n}": x for n, x in flat},
        }

    def _resume(self, directory: Path) -> None:
        """Go on from a saved state. Raises AHNError if it is of a run with other settings, or
        anything that this run could not have saved."""
        file = directory / STATE
        theirs, step = read_settings(directory)
        _check_same(file, theirs, step, self.settings)
        if step:  # before the first step it has nothing of the parameters
            self.optimizer.init(_tree(self.parameters))
        state, fresh = load_safetensors(file), self._state()
        if state.keys() != fresh.keys():
            raise AHNError(
                f"{file}: of another model, or an older version; choose another --out,"
                f" and --ahn {directory} to start from its memory"
            )
        if wrong := _wrong(state, fresh, step):
            raise AHNError(
                f"{file}: damaged, {wrong}; choose another --out,"
                f" and --ahn {directory} to start from its memory"
            )
        self.parameters, self.sizes = _under("parameters.", state), _under("sizes.", state)
        self.optimizer.state = _tree(_under("optimizer.", state))
        self.step = step


def read_settings(directory: Path) -> tuple[dict[str, Any], int]:
    """Settings of the run that was saved there, and how many steps it has made.

    Raises AHNError if there is none, or what no run can have had.
    """
    file = directory / STATE
    if not file.is_file():
        raise AHNError(f"{file}: no such file; train without --resume")
    with mended("train without --resume, into another --out"):
        _, facts = read_header_and_metadata(file)
    try:
        found, step = json.loads(facts["settings"]), int(facts["step"])
        theirs = {field.name: found[field.name] for field in fields(Settings)}
        for field in fields(Settings):
            if type(theirs[field.name]) is not field.type:
                raise ValueError(f"its {field.name} is {theirs[field.name]!r}")
        if theirs["loss"] not in losses.NAMES:
            raise ValueError(f"its loss is {theirs['loss']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise AHNError(f"{file}: not a training state ({show(str(e))})") from None
    if not 0 <= step <= theirs["steps"]:
        raise AHNError(f"{file}: damaged, it is of step {step} of {theirs['steps']}")
    return theirs, step


def _check_same(file: Path, theirs: dict[str, Any], step: int, settings: Settings) -> None:
    """Raise AHNError unless a run of these settings can go on from that step."""
    for name, ours in asdict(settings).items():
        if theirs[name] != ours and name != "steps":
            option = name.replace("_", "-")
            raise AHNError(f"{file}: trained with --{option} {show(theirs[name])}, not {ours}")
    if step > settings.steps:
        raise AHNError(f"{file}: has made {step} steps; give --steps {step} or more")


def _wrong(state: Parameters, fresh: Parameters, step: int) -> str:
    """What a run could not have saved at this step, in tensors of the same names, or ""."""
    for name, x in state.items():
        expected = fresh[name]
        if (x.dtype, x.shape) != (expected.dtype, expected.shape):
            return f"{name} is {x.dtype} {x.shape}, not {expected.dtype} {expected.shape}"
    if bad := not_finite(state.items()):
        return f"{bad} holds NaN or infinity"
    for name, x in state.items():
        # Means of squares, and what matrices were divided by.
        negative = name.endswith(".v") and (x < 0).any()
        if negative or (name.startswith("sizes.") and (x <= 0).any()):
            return f"{name} is not positive"
        if name.endswith(".step") and x.item() != step:
            return f"{name} is {x.item()}, not {step}"
    return ""


def _tree(parameters: Parameters) -> Any:
    return tree_unflatten(list(parameters.items()))


def _under(prefix: str, state: Parameters) -> Parameters:
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


def _ends_with(suffix: str, name: str, _: mx.array) -> bool:
    return name.endswith(suffix)


def fold(parameters: Parameters, sizes: Parameters) -> Parameters:
    """The model's own parameters: output matrices times their sizes and gains."""
    folded = dict(parameters)
    for matrix, size in sizes.items():
        gain = folded.pop(matrix.removesuffix("o_proj.weight") + "gain")
        folded[matrix] = folded[matrix] * (size * gain[:, None, None])
    return folded


def _sizes(matrix: mx.array) -> mx.array:
    """Root mean square [H, 1, 1] of each head's matrix [H, D, D], as a power of two."""
    size = matrix.square().mean(axis=(1, 2), keepdims=True).sqrt()
    size = mx.where(size > 0, size, FRESH)
    return mx.power(2.0, mx.round(mx.log2(size)))


class Metrics:
    """A line of JSON per step. Of an earlier run, the steps before `step` are kept."""

    def __init__(self, file: Path, step: int):
        self.file = file
        if file.is_file():
            lines = [line for line in read_metrics(file) if line["step"] < step]
            with replacing(file) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.last = time.perf_counter()

    def write(self, step: int, loss: float, tokens: int, window: int, sinks: int) -> float:
        """Returns tokens per second of this step."""
        now = time.perf_counter()
        speed, self.last = tokens / (now - self.last), now
        line = {"step": step, "loss": loss, "window": window, "sinks": sinks}
        try:
            with self.file.open("a") as out:
                out.write(json.dumps({**line, "tokens_per_second": round(speed, 1)}) + "\n")
        except OSError as e:
            raise AHNError(f"{self.file}: cannot be written ({e.strerror}); --resume") from None
        return speed


def read_metrics(file: Path, number: str = "loss") -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one that was cut short is left out.

    Raises AHNError for any other line that does not say a step and this number.
    """
    lines = []
    found = file.read_bytes().split(b"\n") if file.is_file() else []
    for n, line in enumerate(found, 1):
        try:
            lines.append(_metric(json.loads(line), number))
        except (ValueError, RecursionError):
            if n < len(found):
                raise AHNError(
                    f"{file}: line {n} says no step and {number}; mend it, or move the file away"
                ) from None
    return lines


def _metric(line: Any, number: str) -> Any:
    """The line, if it says a step and this number."""
    step, value = (line.get("step"), line.get(number)) if isinstance(line, dict) else (None, None)
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise ValueError
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError
    return line
