"""What a run is made of, and what follows from it for a step: window, sinks, sequences."""

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..errors import AHNError, show

_SPELLED = re.compile(r"([0-9]{1,9})(?:\+([0-9]{1,9}))?(?:@([0-9]{1,9}))?")


class Window(NamedTuple):
    """Tokens kept losslessly, first tokens kept for ever, and tokens of a sequence that is
    trained on with these. Spelled WINDOW+SINKS@TOKENS."""

    window: int
    sinks: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.window}+{self.sinks}@{self.seq_len}"

    @classmethod
    def spelled(cls, text: str, sinks: int, seq_len: int) -> "Window":
        """What "1024", "1024+64" or "1024+64@4096" says; the rest is as given here. Raises
        AHNError for another spelling."""
        found = _SPELLED.fullmatch(text)
        if found is None:
            raise AHNError(
                f"--window must be TOKENS, TOKENS+SINKS or TOKENS+SINKS@SEQUENCE, as in"
                f" 1024+64@4096, not {show(text)}"
            )
        window, own_sinks, own_length = found.groups()
        return cls(int(window), int(own_sinks or sinks), int(own_length or seq_len))


@dataclass(frozen=True)
class Settings:
    """What a run is made of. loss: one of losses.NAMES. lr: of the gates' projections.
    random_window: draw window and sinks anew each step, as the paper does. batch_size: sequences
    of seq_len tokens at once; of others so many that a step has as many tokens. minutes: if not
    0, how long steps are made, instead of how many. windows: spelled, with a blank between, those
    that a step draws from, of which the first is window, sinks and seq_len; "" for that one.

    steps and minutes alone may change when a run goes on: the learning rates of what is left are
    those of a run that had so many from its start.
    """

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
    batch_size: int = 1
    minutes: float = 0.0
    windows: str = ""


@lru_cache
def choices(settings: Settings) -> tuple[Window, ...]:
    """The windows that a step draws from; one that is there twice is drawn twice as often.

    Raises AHNError if they are not spelled so, or nothing leaves one.
    """
    own = Window(settings.window, settings.sinks, settings.seq_len)
    several = tuple(Window.spelled(text, *own[1:]) for text in settings.windows.split())
    if settings.random_window:
        if several:
            raise AHNError("--random-window draws windows of its own; give one --window")
        if settings.seq_len < 64:
            raise AHNError(
                f"--random-window needs --seq-len of at least 64, not {settings.seq_len}"
            )
        return (own,)
    for window, sinks, length in several or (own,):
        if length <= window + sinks + 1:
            raise AHNError(
                f"--seq-len {length}: nothing leaves a window of {window + sinks} tokens;"
                " take longer sequences or a smaller --window"
            )
        if window < 1:
            raise AHNError(f"--window must be at least 1, not {window}")
    return several or (own,)


def draw_window(settings: Settings, step: int) -> Window:
    """Those of a step.

    Random ones are drawn as in the PyTorch release: W + S one of 32, 64 ... 8192 between L/8
    and L, sinks one of 0, 32 ... 4096 up to half of it.
    """
    given = choices(settings)
    if not settings.random_window and len(given) == 1:
        return given[0]
    pick = random.Random(f"{settings.seed} {step}")
    if not settings.random_window:
        return pick.choice(given)
    L = settings.seq_len
    total = pick.choice([1 << n for n in range(5, 14) if L / 8 < 1 << n < L])
    sinks = pick.choice([s for s in (0, 32, 64, 128, 512, 2048, 4096) if s <= total / 2])
    return Window(total - sinks, sinks, L)


def batch_of(settings: Settings, drawn: Window) -> int:
    """Sequences at once."""
    return max(1, settings.batch_size * settings.seq_len // drawn.seq_len)
