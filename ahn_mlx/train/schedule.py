"""How far a run is, by steps or by the clock, and how large its next step may be."""

import math
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from .settings import Settings

# What is left of a learning rate in the end.
LAST = 0.1


class Schedule:
    """step: steps made. seconds: that the run has made steps for, before this program's. now:
    a clock, in seconds."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic):
        self.settings, self._now = settings, now
        self.step, self._before, self.agreed = 0, 0.0, 0.0
        self._begun: float | None = None

    def resume(self, step: int, seconds: float) -> None:
        """Go on from there."""
        self.step, self._before, self.agreed = step, seconds, seconds

    def begin(self) -> None:
        """The clock runs from the first step on."""
        if self._begun is None:
            self._begun = self._now()

    @property
    def seconds(self) -> float:
        """That the run has taken so far."""
        return self._before + (0.0 if self._begun is None else self._now() - self._begun)

    @property
    def share(self) -> float:
        """The part of the minutes that is used, or of the steps that is made. agreed: seconds of
        one machine, which count for all of them."""
        s = self.settings
        if s.minutes:
            return min(1.0, self.agreed / (60 * s.minutes))
        return self.step / s.steps if s.steps else 1.0

    @property
    def done(self) -> bool:
        return self.share >= 1

    def said(self) -> str:
        """How far it is, in words."""
        s = self.settings
        if s.minutes:
            return f"{self.step} steps, {self.agreed / 60:.1f} of {s.minutes:g} minutes"
        return f"{self.step} of {s.steps} steps"

    def of(self, factor: float) -> Callable[[mx.array], mx.array] | float:
        """What an optimizer takes as learning rate, `factor` times --lr at its peak: a function
        of the step, or by the clock a number, which `by_clock` says anew for each step."""
        s = self.settings
        peak, warmup = factor * s.lr, min(s.warmup, s.steps)
        if s.minutes:
            return self.by_clock(factor)
        cosine = optim.cosine_decay(peak, max(1, s.steps - warmup), end=LAST * peak)
        if not warmup:
            return cosine
        rise = optim.linear_schedule(peak / (warmup + 1), peak, warmup)
        return optim.join_schedules([rise, cosine], [warmup])

    def by_clock(self, factor: float) -> float:
        """The learning rate of this step."""
        s = self.settings
        rise = min(1.0, (self.step + 1) / (s.warmup + 1))
        fall = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * self.share))
        return factor * s.lr * rise * fall
