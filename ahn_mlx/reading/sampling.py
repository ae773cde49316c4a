"""How an answer is drawn and where it ends: the settings, judged once for the command line,
Python and a server, and the cutter that ends an answer at a text.

Samplers are mlx-lm's. Nothing here imports MLX before an answer begins.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..errors import AHNError, show

if TYPE_CHECKING:
    from ..model.ranks import Ranks
    from .penalty import Seen, WholeTextPenalty


def _whole(low: int, high: float = math.inf) -> Callable[[Any], str]:
    def wrong(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int):
            return "a whole number"
        return "" if low <= value <= high else _range(low, high)

    return wrong


def _real(fits: Callable[[float], bool], said: str) -> Callable[[Any], str]:
    def wrong(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number"
        # A whole number may be too large for a float, which all of these are for MLX.
        return "" if abs(value) < 1e30 and fits(value) else said

    return wrong


def _range(low: int, high: float) -> str:
    return f"at least {low}" if high == math.inf else f"from {low} to 2**64 - 1"


def _texts(value: Any) -> str:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        return "a text or a list of texts"
    return "" if all(value) else "texts that are not empty"


# What a value must be, or "" if it is. Below 0.001 logits divided by it may be infinite.
_WRONG: dict[str, Callable[[Any], str]] = {
    "max_tokens": _whole(1),
    "temp": _real(lambda x: x == 0 or x >= 0.001, "0, which is greedy, or from 0.001 to 1e30"),
    "top_p": _real(lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": _whole(0),
    "min_p": _real(lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": _real(lambda x: x > 0, "above 0 and finite; 1 is none"),
    "repetition_context_size": _whole(0),
    "seed": _whole(0, 2**64 - 1),
    "stop": _texts,
}


def complaint(name: str, value: Any) -> str:
    """What is wrong with a setting, to be read after its name, or ""."""
    if name == "seed" and value is None:
        return ""
    must = _WRONG[name](value)
    if name == "stop" and isinstance(value, tuple) and "" in value:
        value = ""  # of several, that one
    return (
        f"must be {must}, not {value if isinstance(value, int | float) else show(value)}"
        if must
        else ""
    )


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    max_tokens: of the longest answer. temp: temperature; 0 takes the likeliest token, whatever
    top_p, top_k and min_p say. top_p: draw from the likeliest tokens that have this probability
    together. top_k: from so many; 0: from all. min_p: from those that have this part of the
    likeliest one's probability. repetition_penalty: for tokens among the last
    repetition_context_size of prompt and answer, or with 0 for all that were ever read; 1 is
    none. seed: of MLX's random numbers when the answer begins.
    stop: texts where the answer ends, without them; one of them may be given as it is.

    Raises AHNError for a value of another type or out of range.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for field in fields(self):
            if wrong := complaint(field.name, getattr(self, field.name)):
                raise AHNError(f"{field.name} {wrong}")

    def penalty(self, seen: "Seen | None") -> "WholeTextPenalty | None":
        """The penalty over all that was read, if that was asked for. Raises AHNError if it is
        not known what was."""
        if self.repetition_penalty == 1 or self.repetition_context_size:
            return None
        if seen is None:
            raise AHNError(
                "repetition_context_size 0: this memory does not say which tokens it has read;"
                " digest the text again, or give a number of tokens to look back"
            )
        from .penalty import WholeTextPenalty

        return WholeTextPenalty(self.repetition_penalty, seen)

    def begin(
        self, vocabulary: int, seen: "Seen | None", ranks: "Ranks | None" = None
    ) -> dict[str, Any]:
        """Seed MLX if that was asked for; what mlx-lm's stream_generate takes of these.

        vocabulary: tokens that there are. seen: which of them were read before the answer, if
        that is known. ranks: that take what the first one draws. Raises AHNError if it is not
        known and is needed.
        """
        import mlx.core as mx
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        if self.seed is not None:
            mx.random.seed(self.seed)
        penalty = None if self.repetition_penalty == 1 else self.repetition_penalty
        processors = make_logits_processors(
            repetition_penalty=penalty,
            repetition_context_size=self.repetition_context_size,
        )
        if (penalty_of_all := self.penalty(seen)) is not None:
            processors = [penalty_of_all]
        sampler = make_sampler(
            temp=self.temp,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k < vocabulary else 0,
            min_p=self.min_p,
        )
        return {
            "max_tokens": self.max_tokens,
            "sampler": sampler if ranks is None else lambda x: ranks.first(sampler(x)),
            "logits_processors": processors,
        }


class Cutter:
    """Ends a text that comes in pieces at the first of some stop texts, and gives out nothing
    that may be the beginning of one.

    Of several the one that is complete first counts, and then the longest, so that it makes no
    difference where pieces end.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.found, self._held = stops, False, ""
        self.stop = ""  # the one that was found

    def add(self, piece: str) -> str:
        """What can be given out now."""
        if self.found:
            return ""
        self._held += piece
        ends = [(at + len(s), at) for s in self.stops if (at := self._held.find(s)) >= 0]
        if ends:
            end, at = min(ends)
            self.found, self.stop = True, self._held[at:end]
            return self._release(at)
        most = min(len(self._held), max(map(len, self.stops), default=1) - 1)
        begun = next((n for n in range(most, 0, -1) if self._begins(self._held[-n:])), 0)
        return self._release(len(self._held) - begun)

    def rest(self) -> str:
        """What was held back, when no more comes."""
        return self._release(len(self._held))

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self.stops)

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], "" if self.found else self._held[count:]
        return out
