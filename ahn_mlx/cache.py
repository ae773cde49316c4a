"""The windowed cache of one layer: sinks, a ring of recent tokens, gates, memory state.

It knows tokens and slots, no maths. Token t < S sits in slot t for ever; later
tokens share W ring slots, token t in slot S + (t - S) % W, so that token t takes the
place of token t - W, which is what leaves the window. Until W + S tokens have come
that is simply slot t, and the buffers grow as they fill.

Keys and values may be kept quantized, in mlx-lm's format. New tokens are quantized
before anything reads them, so results do not depend on how a prompt was cut.
"""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from .errors import AHNError
from .ops.window import Stored

# Slots added at a time while the window fills.
GROWTH = 256


class Update(NamedTuple):
    """What a layer sees after new tokens came.

    keys, values: [B, Hkv, K, D]. After one token: every token kept, in slot order, as
    stored. After several: the sinks, then every token that one of the new ones can see,
    in order of time, dequantized. evicted: (keys, values [B, Hkv, T, D], gates [B, H, T, G]) of the
    T tokens that left the window, oldest first, or None; the last T new tokens read.
    """

    keys: Stored
    values: Stored
    evicted: tuple[mx.array, ...] | None


class AHNCache(_BaseCache):
    """Fixed-size cache of one attention layer, in mlx-lm's cache protocol.

    window, sinks: W >= 1 and S >= 0 tokens. Batch rows have equal lengths.
    bits, group_size: how keys and values are quantized; bits None keeps them as they are.
    `memory` is the recurrent state [B, H, D, D] float32, None before the first eviction.
    """

    def __init__(self, window: int, sinks: int, bits: int | None = None, group_size: int = 64):
        self.window = window
        self.sinks = sinks
        self.bits = bits
        self.group_size = group_size
        self.offset = 0
        # keys, values (each three arrays if quantized), gates: [B, heads, slots, width].
        self.buffers: tuple[mx.array, ...] | None = None
        self.memory: mx.array | None = None
        # Copies of what leaves next, one slot of each buffer.
        self._next: tuple[mx.array, ...] | None = None

    @property
    def capacity(self) -> int:
        """Tokens kept losslessly once the window is full."""
        return self.window + self.sinks

    def update(self, keys: mx.array, values: mx.array, gates: mx.array) -> Update:
        """Append L tokens: keys, values [B, Hkv, L, D] (rotated), gates [B, H, L, G]."""
        new = self._pack(keys, values, gates)
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
        seen = [buffer[:, :, :kept] for buffer in self.buffers[:-1]]
        # The token that leaves next is read now, in the same evaluation as attention: a
        # reader still waiting when its slot is written would force a copy of the window.
        # Gates are not part of attention; without this their writes would pile up.
        pending = list(self.buffers[-1:])
        self._next = None
        if self.offset + 1 >= self.capacity:
            self._next = read_slot(self.buffers, self._slot(self.offset + 1))
            pending += self._next
        seen = mx.depends(seen, pending)
        if self.bits is None:
            return Update(seen[0], seen[1], evicted)
        return Update(tuple(seen[:3]), tuple(seen[3:]), evicted and self._unpack(evicted))

    def _append(self, new: tuple[mx.array, ...], evicts: int) -> Update:
        past = self._in_time()
        if past is None:
            seen = new
        else:
            seen = tuple(mx.concatenate([p, n], axis=2) for p, n in zip(past, new, strict=True))
        seen = self._unpack(seen)
        evicted = None
        if evicts:
            # The oldest token behind the sinks leaves first.
            evicted = tuple(x[:, :, self.sinks : self.sinks + evicts] for x in seen)
        self._next = None
        self._store(new)
        return Update(seen[0], seen[1], evicted)

    def _pack(self, keys: mx.array, values: mx.array, gates: mx.array) -> tuple[mx.array, ...]:
        """What the buffers hold of some tokens."""
        if self.bits is None:
            return keys, values, gates
        if keys.shape[-1] % self.group_size:
            raise AHNError(
                f"a key/value group size of {self.group_size} does not divide the head size"
                f" {keys.shape[-1]}; use 32, or do not quantize the window"
            )
        return *mx.quantize(keys, **self._format), *mx.quantize(values, **self._format), gates

    def _unpack(self, held: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """Keys, values and gates of what was held, in the dtype they came in."""
        if self.bits is None:
            return held
        kp, ks, kb, vp, vs, vb, gates = held  # packed, scales, biases
        keys = mx.dequantize(kp, ks, kb, **self._format)
        values = mx.dequantize(vp, vs, vb, **self._format)
        return keys, values, gates

    @property
    def _format(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits}

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
        settings = (self.window, self.sinks, self.bits, self.group_size)
        return self.memory, self.offset, *settings, *(self.buffers or ())

    @state.setter
    def state(self, value: Any) -> None:
        self.memory, self.offset, self.window, self.sinks, *rest = value
        self.bits, self.group_size, *buffers = rest
        self.buffers = tuple(buffers) or None
        self._next = None

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "AHNCache":
        """A cache with the same tokens, quantized; as mlx-lm's caches do it.

        Raises AHNError if the group size does not divide the head size.
        """
        assert self.bits is None
        cache = AHNCache(self.window, self.sinks, bits, group_size)
        cache.offset, cache.memory = self.offset, self.memory
        if self.buffers is not None:
            keys, values, gates = self.buffers
            cache.buffers = cache._pack(keys, values, gates)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes held: sinks, window, gates and memory state."""
        arrays = [*(self.buffers or ()), *(self._next or ())]
        arrays += [] if self.memory is None else [self.memory]
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
