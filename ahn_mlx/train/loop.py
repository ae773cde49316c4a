"""The training loop: teacher, student, loss, optimizer, and what is saved of them.

A run is a function of its settings: sequences and window of a step follow from seed and
step number, so parameters, optimizer, step and time are all there is to resume.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from functools import cached_property, partial
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
from ..model.ranks import join
from ..outputs.files import replacing
from ..platform import on_cpu
from . import layerwise, losses
from .data import Sequences
from .schedule import Schedule
from .settings import Settings, Window, batch_of, choices, draw_window
from .streams import Parameters, Stream, install, study, teach, trainable

STATE = "training.safetensors"

# Learning rates as multiples of --lr. A head's gain scales its whole output matrix, which is
# trained in units of its first size: from head to head that differs by a factor of 256.
RATES = {"gain": 400.0, "o_proj.weight": 200.0, "q_proj.weight": 10.0}
OF_ROUTER = {"router.alpha": 400.0, "router.beta": 400.0}
OF_GAIN = {"router.gamma": 400.0}

# Size of an output matrix that starts at zero.
FRESH = 1e-3


class Trainer:
    """model: an AHN model, whose memories are changed in place. saved: the directory of a run
    to go on with; otherwise the layer-wise stage comes first, if there is one.

    explained: what that stage returned. Raises AHNError if the texts are too short for a window.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Sequences,
        settings: Settings,
        saved: Path | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.model, self.settings = model, settings
        self.texts = {w.seq_len: data.of(w.seq_len) for w in choices(settings)}
        self.schedule = Schedule(settings, now)
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
        rates = RATES | (OF_ROUTER if model.ahn.router else {})
        rates |= OF_GAIN if model.ahn.window_gain else {}
        self.factors = (*rates.values(), 1.0)
        self.optimizer = optim.MultiOptimizer(
            [self._adamw(factor) for factor in self.factors],
            [partial(_ends_with, suffix) for suffix in rates],
        )
        join()  # which says so if the others cannot be reached
        self.world = mx.distributed.init()
        if saved is not None:
            self._resume(saved)
        # Sequences of each length that the steps so far have seen.
        self.seen: Counter[int] = Counter()
        if len(self.texts) == 1:
            self.seen[settings.seq_len] = self.step * self._each(choices(settings)[0])
        else:
            for step in range(self.step):
                self._sees(draw_window(settings, step))
        install(model, fold(self.parameters, self.sizes))
        mx.eval(model.parameters())

    @property
    def step(self) -> int:
        """Steps made."""
        return self.schedule.step

    def _adamw(self, factor: float) -> optim.AdamW:
        # Uncorrected, the first hundred steps are three to six times as long.
        rate: Any = self.schedule.of(factor)
        return optim.AdamW(rate, weight_decay=self.settings.weight_decay, bias_correction=True)

    def _sees(self, drawn: Window) -> int:
        """Count the sequences of a step, and return how many there were before."""
        before = self.seen[drawn.seq_len]
        self.seen[drawn.seq_len] += self._each(drawn)
        return before

    def _each(self, drawn: Window) -> int:
        """Sequences of such a step, on all machines."""
        return batch_of(self.settings, drawn) * self.settings.accumulate * self.world.size()

    def train_step(self) -> float:
        """One update from `accumulate` batches per machine. Returns the mean loss.

        Raises AHNError when the loss is not finite, with parameters as before, and when
        another machine is lost.
        """
        s, machines = self.settings, self.world.size()
        self.schedule.begin()
        drawn = draw_window(s, self.step)
        texts, size = self.texts[drawn.seq_len], batch_of(s, drawn)
        # On those of the layer-wise stage, the memory looks better than it is.
        first = s.layerwise + self._sees(drawn)
        total, gradients = mx.zeros(()), None
        for a in range(s.accumulate):
            n = first + (a * machines + self.world.rank()) * size
            tokens = mx.concatenate([texts[n + i] for i in range(size)])
            loss, new = self._gradients(tokens, drawn.window, drawn.sinks)
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
        self.schedule.step += 1
        return value

    def _update(self, total: mx.array, gradients: Parameters) -> float:
        """Raises AHNError when the mean loss, which is returned, is not finite."""
        s, machines = self.settings, self.world.size()
        if s.accumulate > 1:
            gradients = {k: g / s.accumulate for k, g in gradients.items()}
        # Sorted: machines must agree on the order, and MLX's optimizers do not keep it.
        mean = nn.average_gradients(_tree(dict(sorted(gradients.items()))))
        seconds = self.schedule.seconds if self.world.rank() == 0 else 0.0
        sums: Any = mx.distributed.all_sum(mx.stack([total, mx.array(seconds)])).tolist()
        value = sums[0] / (machines * s.accumulate)
        if not math.isfinite(value):
            raise AHNError(f"the loss is {value} at step {self.step}; try a smaller --lr")
        self.schedule.agreed = sums[1]
        if s.minutes:
            for factor, part in zip(self.factors, self.optimizer.optimizers, strict=True):
                part.learning_rate = self.schedule.by_clock(factor)
        self.parameters = self.updated(mean)
        mx.eval(self.parameters, self.optimizer.state)
        return value

    def updated(self, gradients: Any) -> Parameters:
        """The parameters after a step along these gradients, a tree."""
        flat: Any = tree_flatten(self._apply(gradients, _tree(self.parameters)))
        return dict(flat)

    @cached_property
    def _apply(self) -> Callable[[Any, Any], Any]:
        """What the optimizer does, in one launch for each parameter on a GPU instead of twenty."""
        if on_cpu():
            return self.optimizer.apply_gradients
        self.optimizer.init(_tree(self.parameters))
        states = [each.state for each in self.optimizer.optimizers]
        apply: Any = mx.compile(self.optimizer.apply_gradients, inputs=states, outputs=states)
        return apply

    def _gradients(self, tokens: mx.array, window: int, sinks: int) -> tuple[mx.array, Parameters]:
        teacher = teach(self.model, tokens, self.settings.loss == "distill")
        mx.eval(teacher)
        found = self.gradients_of(teacher, tokens, window, sinks)
        # Nothing of the trace may stay in the model.
        install(self.model, fold(self.parameters, self.sizes))
        return found

    def gradients_of(
        self, teacher: Stream, tokens: mx.array, window: int, sinks: int
    ) -> tuple[mx.array, Parameters]:
        """The mean loss of tokens [B, L], and its gradient. Leaves a trace in the model."""
        s, model = self.settings, self.model

        def objective(parameters: Parameters) -> mx.array:
            install(model, fold(parameters, self.sizes))
            keep = s.loss == "distill"
            student = study(model, tokens, window, sinks, keep, s.grad_checkpoint)
            return losses.LOSSES[s.loss](model, teacher, student, tokens, window + sinks)

        found: tuple[mx.array, Parameters] = mx.value_and_grad(objective)(self.parameters)
        return found

    def save(self, directory: Path) -> None:
        """Parameters, optimizer and step, under their final name only when complete."""
        facts = {"settings": json.dumps(asdict(self.settings)), "step": str(self.step)}
        facts["seconds"] = str(self.schedule.agreed)
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
        theirs, step, seconds = _read_facts(directory)
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
        self.schedule.resume(step, seconds)


def read_settings(directory: Path) -> tuple[dict[str, Any], int]:
    """Settings of the run that was saved there, and how many steps it has made.

    Raises AHNError if there is none, or what no run can have had.
    """
    return _read_facts(directory)[:2]


# What runs of older versions did not say.
_SINCE = {f.name: f.default for f in fields(Settings) if f.default is not MISSING}


def _read_facts(directory: Path) -> tuple[dict[str, Any], int, float]:
    """As read_settings, and how many seconds its steps took."""
    file = directory / STATE
    if not file.is_file():
        raise AHNError(f"{file}: no such file; train without --resume")
    with mended("train without --resume, into another --out"):
        _, facts = read_header_and_metadata(file)
    try:
        found, step = {**_SINCE, **json.loads(facts["settings"])}, int(facts["step"])
        seconds = float(facts.get("seconds", 0))
        theirs = {field.name: found[field.name] for field in fields(Settings)}
        for field in fields(Settings):
            value = theirs[field.name]
            number = field.type in (int, float)
            if type(value) is not field.type or (number and not 0 <= value < 1 << 63):
                raise ValueError(f"its {field.name} is {show(value)}")
        if theirs["loss"] not in losses.NAMES:
            raise ValueError(f"its loss is {theirs['loss']!r}")
        choices(Settings(**theirs))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise AHNError(f"{file}: not a training state ({show(str(e))})") from None
    if step < 0 or (step > theirs["steps"] and not theirs["minutes"]):
        raise AHNError(f"{file}: damaged, it is of step {step} of {theirs['steps']}")
    if not 0 <= seconds < math.inf:
        raise AHNError(f"{file}: damaged, it has taken {seconds} seconds")
    return theirs, step, seconds


def _check_same(file: Path, theirs: dict[str, Any], step: int, settings: Settings) -> None:
    """Raise AHNError unless a run of these settings can go on from that step."""
    before, now = (_comparable(each) for each in (Settings(**theirs), settings))
    for name, ours in now.items():
        if before[name] != ours:
            option = name.replace("_", "-")
            raise AHNError(f"{file}: trained with --{option} {show(before[name])}, not {ours}")
    if step > settings.steps and not settings.minutes:
        raise AHNError(f"{file}: has made {step} steps; give --steps {step} or more")


def _comparable(settings: Settings) -> dict[str, Any]:
    """What has to stay the same, by the names of options."""
    found = {k: v for k, v in asdict(settings).items() if k not in ("steps", "minutes", "windows")}
    if settings.windows:
        found["window"] = " ".join(map(str, choices(settings)))
    return found


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
