"""Tokens in slots: sinks stay, later tokens share a ring, new ones stand in a chunk.

Token t < S sits in slot t for ever; later tokens share W ring slots, token t in slot
S + (t - S) % W, so that token t takes the place of token t - W, which is what leaves.
"""

from typing import NamedTuple

import mlx.core as mx


def slot_of(token: int, window: int, sinks: int) -> int:
    """The slot of a token, while it is there."""
    return token if token < sinks else sinks + (token - sinks) % window


class Update(NamedTuple):
    """A chunk of L new tokens, and the ring as it was before they came.

    chunk, ring: keys, values [B, Hkv, L or slots, D] and gates [B, H, L or slots, G], not
    quantized; ring is None before the first token. offset: tokens before the chunk.
    """

    ring: tuple[mx.array, ...] | None
    chunk: tuple[mx.array, ...]
    offset: int
    window: int
    sinks: int

    @property
    def end(self) -> int:
        """Tokens after the chunk."""
        return self.offset + self.chunk[0].shape[2]

    @property
    def oldest(self) -> int:
        """The first token behind the sinks that was still there."""
        return max(self.sinks, self.offset - self.window)

    @property
    def evicts(self) -> int:
        """Tokens T that leave the window; the last T new ones read the memory."""
        capacity = self.window + self.sinks
        return max(0, self.end - max(self.offset, capacity))

    def seen(self) -> tuple[mx.array, ...]:
        """Keys and values [B, Hkv, K, D]: the sinks, then every token that one of the new
        ones can see, in order of time."""
        sinks = self._span(0, min(self.sinks, self.end))
        rest = self._span(self.oldest, self.end)
        return tuple(_join(a + b) for a, b in zip(sinks[:2], rest[:2], strict=True))

    def evicted(self) -> tuple[mx.array, ...]:
        """Keys, values and gates of the tokens that leave, oldest first."""
        first = self.end - self.evicts - self.window
        return tuple(map(_join, self._span(first, first + self.evicts)))

    def _span(self, first: int, last: int) -> list[list[mx.array]]:
        """Runs of slots and of the chunk that hold first ... last - 1, for each array."""
        runs: list[list[mx.array]] = [[] for _ in self.chunk]
        while first < last:
            if first >= self.offset or self.ring is None:
                source, start, n = self.chunk, first - self.offset, last - first
            else:
                start = slot_of(first, self.window, self.sinks)
                stop = self.sinks if first < self.sinks else self.window + self.sinks
                source, n = self.ring, min(last, self.offset, first + stop - start) - first
            for run, x in zip(runs, source, strict=True):
                run.append(x[:, :, start : start + n])
            first += n
        return runs


def _join(runs: list[mx.array]) -> mx.array:
    return runs[0] if len(runs) == 1 else mx.concatenate(runs, axis=2)
