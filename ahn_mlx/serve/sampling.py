"""How the next token is chosen: by settings of the request and by numbers of its own, so that
a seed gives the same answer whatever else runs."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..reading.penalty import Seen
from ..reading.sampling import Sampling


@dataclass(frozen=True)
class Wish:
    """sampling: as everywhere. As in mlx-lm, top_p, min_p and top_k look at probabilities before
    the temperature. bias: added to logits of these tokens. presence, frequency: taken off the
    logits of tokens that the answer has, once, and for each time. top_logprobs: how many others
    to report; None reports nothing.
    """

    sampling: Sampling
    bias: dict[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    top_logprobs: int | None = None


class Chosen(NamedTuple):
    """A token, not evaluated: its id, its log probability, and the most likely ones."""

    token: mx.array
    logprob: mx.array | None = None
    top: mx.array | None = None
    top_logprobs: mx.array | None = None


class Sampler:
    """Of one answer. seed: of this answer. seen: which tokens were read before it. Raises
    AHNError if that is needed and not known."""

    def __init__(self, wish: Wish, seed: int, seen: Seen | None):
        self.wish = wish
        self._penalty, self._last = wish.sampling.penalty(seen), mx.array([], dtype=mx.int32)
        self.counts: dict[int, int] = {}
        self._key = mx.random.key(seed) if wish.sampling.temp > 0 else None

    @property
    def plain(self) -> bool:
        """Whether the largest logit is all that is asked."""
        w = self.wish
        changed = w.bias or w.presence or w.frequency or self._penalty
        return w.sampling.temp == 0 and w.top_logprobs is None and not changed

    def __call__(self, logits: mx.array) -> Chosen:
        """logits: [V]."""
        s, logits = self.wish, logits.astype(mx.float32)
        if self._penalty:
            logits = self._penalty(self._last, logits[None])[0]
        offsets = dict(s.bias)
        if s.presence or s.frequency:
            for known, n in self.counts.items():
                offsets[known] = offsets.get(known, 0.0) - s.presence - n * s.frequency
        if offsets:
            logits = logits.at[mx.array(list(offsets))].add(mx.array(list(offsets.values())))
        logprobs = logits - mx.logsumexp(logits)
        if self._key is None:
            token: mx.array = mx.argmax(logprobs)
        else:
            self._key, now = mx.random.split(self._key)
            kept = _filtered(logprobs, s.sampling)
            token = mx.random.categorical(kept * (1 / s.sampling.temp), key=now)
        if s.top_logprobs is None:
            return Chosen(token)
        if s.top_logprobs == 0:
            return Chosen(token, logprobs[token])
        n = s.top_logprobs
        top = mx.argpartition(-logprobs, kth=n - 1)[:n]
        top = top[mx.argsort(-logprobs[top])]
        return Chosen(token, logprobs[token], top, logprobs[top])

    def took(self, token: int) -> None:
        """It became part of the answer."""
        self._last = mx.array([token])
        if self.wish.presence or self.wish.frequency:
            self.counts[token] = self.counts.get(token, 0) + 1


def _filtered(logprobs: mx.array, s: Sampling) -> mx.array:
    """Minus infinity for what is not to be chosen. Not compiled, as mlx-lm's filters are: each
    value that a client thinks of would stay in the compiler's cache."""
    if s.top_p < 1 or 0 < s.top_k < logprobs.size:
        descending = -mx.sort(-logprobs)
        last: Any = logprobs.size - 1
        if s.top_p < 1:
            before = mx.cumsum(mx.exp(descending)) - mx.exp(descending)
            last = mx.maximum((before < s.top_p).sum() - 1, 0)
        if 0 < s.top_k < logprobs.size:
            last = mx.minimum(last, s.top_k - 1)
        logprobs = mx.where(logprobs < descending[last], -mx.inf, logprobs)
    if s.min_p > 0:
        least = mx.max(logprobs) + mx.log(mx.array(s.min_p))
        logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
    return logprobs


def begun(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of a text may be the begin of one of these."""
    longest = max(map(len, marks), default=0)
    for n in range(min(len(text), longest - 1), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0
