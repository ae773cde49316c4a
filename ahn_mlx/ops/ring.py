"""Tokens in slots: sinks stay, later tokens share a ring, new ones stand in a chunk.

Token t < S sits in slot t for ever; later tokens share W ring slots, token t in slot
S + (t - S) % W, so that token t takes the place of token t - W, which is what leaves.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


def slot_of(token: int, window: int, sinks: int) -> int:
    """The slot of a token, while it is there."""
    return token if token < sinks else sinks + (token - sinks) % window


def stay(first: int, end: int, window: int, sinks: int) -> list[int]:
    """Which of the tokens from first to end - 1 are kept after the last of them, in order."""
    ring = range(max(first, sinks, end - window), end)
    return [*range(first, min(end, sinks)), *ring]


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


def read_slots(buffers: tuple[mx.array, ...], slots: mx.array) -> tuple[mx.array, ...]:
    """Copies of slots [B, n] of each buffer, [B, heads, n, width]."""
    return tuple(mx.take_along_axis(b, _spread(slots, b), axis=2) for b in buffers)


def write_slots(
    buffers: tuple[mx.array, ...], tokens: tuple[mx.array, ...], slots: mx.array
) -> tuple[mx.array, ...]:
    """Put tokens [B, heads, n, width] into slots [B, n]; in place, once nothing else reads
    the buffer."""
    pairs = [(b, x.astype(b.dtype)) for b, x in zip(buffers, tokens, strict=True)]
    return tuple(mx.put_along_axis(b, _spread(slots, b), x, axis=2) for b, x in pairs)


def _spread(slots: mx.array, buffer: mx.array) -> mx.array:
    """slots [B, n] for every head and number of a slot."""
    B, heads, _, width = buffer.shape
    return mx.broadcast_to(slots[:, None, :, None], (B, heads, slots.shape[1], width))


class Place(NamedTuple):
    """Where L new tokens of each of B rows belong, as arrays: row b stands at its own position.

    at: [B], position of the first one. near: [B, L], positions seen from the sinks, at most
    W + S. both: [2 B], at, then near of the first ones. slots: [B, L]. following: [B, 1], slot
    of the token after them. evicted: [B, L], tokens that have left by then, at least 1. valid:
    bool [B, L], or None if all are: what is not valid changes nothing. filled: [B], slots in use
    after one token. seen: bool [B, 1, L, K], which keys a query sees, or None for all: those of
    the slots after the token was written, if it is one that is valid; else those of the slots
    before, then the new.
    """

    at: mx.array
    near: mx.array
    both: mx.array
    slots: mx.array
    following: mx.array
    evicted: mx.array
    valid: mx.array | None
    filled: mx.array
    seen: mx.array | None


def place(at: Any, count: Any, L: int, held: int, window: int, sinks: int, np: Any = mx) -> Place:
    """A pure function of arrays at, count [B] int32: positions, and how many of L tokens are
    valid (None: all). L > 1 must not exceed W. held: slots that there are. np: mlx.core, or
    numpy for positions that the host knows."""
    capacity = window + sinks

    def slot_of(t: Any) -> Any:
        return np.where(t < sinks, t, sinks + (t - sinks) % window)

    at = at[:, None]
    new = np.arange(L)[None]
    t = at + new
    valid = None if count is None else new < count[:, None]
    end = at + (L if count is None else count[:, None])
    slots = np.arange(held)[None]
    filled = np.minimum(t[:, :1] + 1, capacity)
    alone = L == 1 and count is None
    if alone:
        seen = slots < filled
    else:
        # The last token before these that came to each slot, if any did.
        last = np.where(slots < sinks, slots, at - 1 - (at - 1 - slots) % window)
        there = (last < at) & (last >= np.minimum(slots, sinks))
        old = there[:, None] & ((slots < sinks)[:, None] | (t[:, :, None] - last[:, None] < window))
        own = np.broadcast_to(new[..., None] >= new[:, None], (*t.shape, L))
        seen = np.concatenate([old, own], axis=2)
    near = np.minimum(t, capacity)
    return Place(
        at[:, 0],
        near,
        np.concatenate([at[:, 0], near[:, 0]]),
        slot_of(t),
        slot_of(end),
        np.maximum(t + 1 - capacity, 1),
        valid,
        filled[:, 0],
        seen[:, None, None] if alone else seen[:, None],
    )


@lru_cache(maxsize=32)  # every layer of a model asks for the same few
def place_of(
    at: tuple[int, ...], count: tuple[int, ...] | None, L: int, held: int, window: int, sinks: int
) -> Place:
    """As place, on the host: nothing is launched, and nothing belongs to a thread."""
    sees_all = L == 1 and count is None and min(at) + 1 >= window + sinks
    rows, counts = (None if x is None else np.array(x, dtype=np.int32) for x in (at, count))
    found: Any = place(rows, counts, L, 0 if sees_all else held, window, sinks, np)
    arrays: Any = (x if x is None or x.dtype == bool else x.astype(np.int32) for x in found)
    made = Place(*(None if x is None else mx.array(x) for x in arrays))  # type: ignore[arg-type]
    return made._replace(seen=None) if sees_all else made
