"""The windowed cache of one layer: sinks, a ring of recent tokens, gates, memory state.

It knows tokens and slots, no maths. Token t < S sits in slot t for ever; later
tokens share W ring slots, token t in slot S + (t - S) % W, so that token t takes the
place of token t - W, which is what leaves the window. Until W + S tokens have come
that is simply slot t, and the buffers grow as they fill.
"""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_attention_mask

# Slots added at a time while the window fills.
GROWTH = 256


class Update(NamedTuple):
    """What a layer sees after new tokens came.

    keys, values: [B, Hkv, K, D]. After one token: every token kept, in slot order.
    After several: the sinks, then every token that one of the new ones can see, in
    order of time. evicted: (keys, values [B, Hkv, T, D], gates [B, H, T, G]) of the
    T tokens that left the window, oldest first, or None; the last T new tokens read.
    """

    keys: mx.array
    values: mx.array
    evicted: tuple[mx.array, ...] | None


class AHNCache(_BaseCache):
    """Fixed-size cache of one attention layer, in mlx-lm's cache protocol.

    window, sinks: W >= 1 and S >= 0 tokens. Batch rows have equal lengths.
    `memory` is the recurrent state [B, H, D, D] float32, None before the first eviction.
    """

    def __init__(self, window: int, sinks: int):
        self.window = window
        self.sinks = sinks
        self.offset = 0
        # keys, values, gates: each [B, heads, slots, width].
        self.buffers: tuple[mx.array, ...] | None = None
        self.memory: mx.array | None = None
        # Copies of what leaves next: keys, values, gates of one token.
        self._next: tuple[mx.array, ...] | None = None

    @property
    def capacity(self) -> int:
        """Tokens kept losslessly once the window is full."""
        return self.window + self.sinks

    def update(self, keys: mx.array, values: mx.array, gates: mx.array) -> Update:
        """Append L tokens: keys, values [B, Hkv, L, D] (rotated), gates [B, H, L, G]."""
        new = (keys, values, gates)
        L = keys.shape[2]
        evicts = min(L, max(0, self.offset + L - self.capacity))
        update = self._append_one(new, evicts) if L == 1 else self._append(new, evicts)
        self.offset += L
        return update

    def _append_one(self, new: tuple[mx.array, ...], evicts: int) -> Update:
        self._reserve(new, min(self.offset + 1, self.capacity))
        assert self.buffers is not None
        evicted = None
        if evicts:
            evicted = self._next or read_slot(self.buffers, self._slot(self.offset))
        self.buffers = write_slot(self.buffers, new, self._slot(self.offset))
        kept = min(self.offset + 1, self.capacity)
        seen = [buffer[:, :, :kept] for buffer in self.buffers[:2]]
        # The token that leaves next is read now, in the same evaluation as attention: a
        # reader still waiting when its slot is written would force a copy of the window.
        # Gates are not part of attention; without this their writes would pile up.
        pending = list(self.buffers[2:])
        self._next = None
        if self.offset + 1 >= self.capacity:
            self._next = read_slot(self.buffers, self._slot(self.offset + 1))
            pending += self._next
        keys, values = mx.depends(seen, pending)
        return Update(keys, values, evicted)

    def _append(self, new: tuple[mx.array, ...], evicts: int) -> Update:
        past = self._in_time()
        if past is None:
            seen = new
        else:
            seen = tuple(mx.concatenate([p, n], axis=2) for p, n in zip(past, new, strict=True))
        evicted = None
        if evicts:
            # The oldest token behind the sinks leaves first.
            evicted = tuple(x[:, :, self.sinks : self.sinks + evicts] for x in seen)
        self._next = None
        self._store(new)
        return Update(seen[0], seen[1], evicted)

    def _slot(self, token: int) -> int:
        if token < self.sinks:
            return token
        return self.sinks + (token - self.sinks) % self.window

    def _in_time(self) -> tuple[mx.array, ...] | None:
        """The kept tokens in order of time: sinks, then the ring from its oldest on."""
        if self.buffers is None:
            return None
        if self.offset <= self.capacity:
            return tuple(buffer[:, :, : self.offset] for buffer in self.buffers)
        oldest = self._slot(self.offset)  # the next to be overwritten
        S = self.sinks
        return tuple(
            mx.concatenate([b[:, :, :S], b[:, :, oldest:], b[:, :, S:oldest]], axis=2)
            for b in self.buffers
        )

    def _store(self, new: tuple[mx.array, ...]) -> None:
        """Write all new tokens that stay, as at most three runs of slots."""
        end = self.offset + new[0].shape[2]
        self._reserve(new, min(end, self.capacity))
        assert self.buffers is not None
        token = self.offset
        while token < end:
            if token >= self.sinks:
                token = max(token, end - self.window)
            slot = self._slot(token)
            last = self.sinks if token < self.sinks else self.capacity
            n = min(end - token, last - slot)
            rows = slice(token - self.offset, token - self.offset + n)
            self.buffers = write_slot(self.buffers, tuple(x[:, :, rows] for x in new), slot)
            token += n

    def _reserve(self, new: tuple[mx.array, ...], slots: int) -> None:
        """Make room for `slots` slots."""
        have = 0 if self.buffers is None else self.buffers[0].shape[2]
        if have >= slots:
            return
        grown = min(self.capacity, -(-slots // GROWTH) * GROWTH)
        zeros = tuple(
            mx.zeros((x.shape[0], x.shape[1], grown - have, x.shape[3]), dtype=x.dtype) for x in new
        )
        if self.buffers is not None:
            zeros = tuple(
                mx.concatenate([b, z], axis=2) for b, z in zip(self.buffers, zeros, strict=True)
            )
        self.buffers = zeros

    # mlx-lm's protocol

    @property
    def state(self) -> Any:
        return self.buffers or (), self.memory, self.offset, self.window, self.sinks

    @state.setter
    def state(self, value: Any) -> None:
        buffers, self.memory, self.offset, self.window, self.sinks = value
        self.buffers = tuple(buffers) or None
        self._next = None

    @property
    def nbytes(self) -> int:
        """Bytes held: sinks, window, gates and memory state."""
        arrays = list(self.buffers or ()) + ([] if self.memory is None else [self.memory])
        return sum(a.nbytes for a in arrays)

    def size(self) -> int:
        return min(self.offset, self.capacity)

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        """Only while every token is still there: nothing can be taken out of the memory."""
        return self.offset <= self.capacity

    def trim(self, n: int) -> int:
        if not self.is_trimmable():
            return 0
        n = min(self.offset, n)
        self.offset -= n
        self._next = None
        return n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of full attention, for layers without memory; AHN layers ignore it."""
        return create_attention_mask(
            N, offset=self.offset, return_array=return_array, window_size=window_size
        )


def read_slot(buffers: tuple[mx.array, ...], slot: int) -> tuple[mx.array, ...]:
    """A copy of one slot of each buffer, [B, heads, 1, width]."""
    index = mx.array([slot])
    return tuple(mx.take(buffer, index, axis=2) for buffer in buffers)


def write_slot(
    buffers: tuple[mx.array, ...], token: tuple[mx.array, ...], slot: int
) -> tuple[mx.array, ...]:
    """Put [B, heads, n, width] from `slot` on; in place, once nothing else reads the buffer."""
    index = mx.array([slot])
    return tuple(
        mx.slice_update(buffer, x.astype(buffer.dtype), index, (2,))
        for buffer, x in zip(buffers, token, strict=True)
    )
