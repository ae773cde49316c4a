"""The windowed cache of one layer: sinks, a ring of recent tokens, gates, memory state.

It keeps tokens in slots, as ops/ring.py says, and does no maths. Until W + S tokens have
come token t is in slot t, and the buffers grow as they fill.

Keys and values may be kept quantized, in mlx-lm's format. New tokens are quantized
before anything reads them, so results do not depend on how a prompt was cut.
"""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache, create_attention_mask

from ..errors import AHNError
from ..ops.ring import Update, slot_of
from ..ops.window import Stored
from .trace import Trace

# Slots added at a time while the window fills.
GROWTH = 256


class Turn(NamedTuple):
    """One token in, one out, as arrays only: what a compiled decoding step carries on.

    buffers: as in AHNCache. leaving: copies of what the token evicts, one slot of each
    buffer. slot, following: [1], where it goes, and what the token after it will evict.
    """

    buffers: tuple[mx.array, ...]
    leaving: tuple[mx.array, ...]
    slot: mx.array
    following: mx.array

    def put(self, token: tuple[mx.array, ...]) -> tuple["Turn", tuple[Stored, Stored]]:
        """Overwrite the slot, in place. Returns what comes of it, and all keys and values."""
        buffers = write_slot(self.buffers, token, self.slot)
        # What leaves next is read now, in the same evaluation as attention: a reader
        # still waiting when its slot is written would force a copy of the window. Gates
        # are not part of attention; without this their writes would pile up.
        leaving = read_slot(buffers, self.following)
        seen = mx.depends(list(buffers[:-1]), [buffers[-1], *leaving])
        return self._replace(buffers=buffers, leaving=leaving), split(*seen)


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
        # Set by whoever wants to know what the memory does.
        self.trace: Trace | None = None
        # Copies of what leaves next, one slot of each buffer.
        self._next: tuple[mx.array, ...] | None = None

    @property
    def capacity(self) -> int:
        """Tokens kept losslessly once the window is full."""
        return self.window + self.sinks

    @property
    def full(self) -> bool:
        """Whether the next token evicts one."""
        return self.offset >= self.capacity

    def update(self, keys: mx.array, values: mx.array, gates: mx.array) -> Update:
        """Append L tokens: keys, values [B, Hkv, L, D] (rotated), gates [B, H, L, G]."""
        new = pack(keys, values, gates, self.bits, self.group_size)
        ring, chunk = (
            None if held is None else unpack(held, self.bits, self.group_size)
            for held in (self.buffers, new)
        )
        assert chunk is not None
        update = Update(ring, chunk, self.offset, self.window, self.sinks)
        self._store(new)
        self.offset = update.end
        return update

    def fill(self, keys: mx.array, values: mx.array, gates: mx.array) -> tuple[Stored, Stored]:
        """Append one token while there is room. Returns all that is kept, not copied."""
        self._store(pack(keys, values, gates, self.bits, self.group_size))
        self.offset += 1
        assert self.buffers is not None
        *kept, gates = (buffer[:, :, : self.offset] for buffer in self.buffers)
        # Gates are not part of attention; without this their writes would pile up.
        return split(*mx.depends(kept, [gates]))

    def turn(self) -> Turn:
        """Where the next single token goes, once the window is full."""
        assert self.full and self.buffers is not None
        slot, following = (
            slot_of(t, self.window, self.sinks) for t in (self.offset, self.offset + 1)
        )
        if self._next is None:
            self._next = read_slot(self.buffers, mx.array([slot]))
        return Turn(self.buffers, self._next, mx.array([slot]), mx.array([following]))

    def turned(self, turn: Turn) -> None:
        """Take over the buffers in which `turn` put its token."""
        self.buffers, self._next = turn.buffers, turn.leaving
        self.offset += 1

    def _store(self, new: tuple[mx.array, ...]) -> None:
        """Write all new tokens that stay, as at most three runs of slots."""
        self._next = None
        end = self.offset + new[0].shape[2]
        self._reserve(new, min(end, self.capacity))
        assert self.buffers is not None
        token = self.offset
        while token < end:
            if token >= self.sinks:
                token = max(token, end - self.window)
            slot = slot_of(token, self.window, self.sinks)
            last = self.sinks if token < self.sinks else self.capacity
            n = min(end - token, last - slot)
            rows = slice(token - self.offset, token - self.offset + n)
            part = tuple(x[:, :, rows] for x in new)
            self.buffers = write_slot(self.buffers, part, mx.array([slot]))
            token += n

    def _reserve(self, new: tuple[mx.array, ...], slots: int) -> None:
        """Make room for `slots` slots."""
        have = 0 if self.buffers is None else self.buffers[0].shape[2]
        if have >= slots:
            return
        grown = grown_to(slots, self.capacity)
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
            cache.buffers = pack(keys, values, gates, bits, group_size)
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


def grown_to(tokens: int, capacity: int) -> int:
    """Slots that a cache has, when it has kept so many tokens."""
    return min(capacity, -(-tokens // GROWTH) * GROWTH)


def read_slot(buffers: tuple[mx.array, ...], slot: mx.array) -> tuple[mx.array, ...]:
    """A copy of one slot of each buffer, [B, heads, 1, width]."""
    return tuple(mx.take(buffer, slot, axis=2) for buffer in buffers)


def write_slot(
    buffers: tuple[mx.array, ...], token: tuple[mx.array, ...], slot: mx.array
) -> tuple[mx.array, ...]:
    """Put [B, heads, n, width] from `slot` on; in place, once nothing else reads the buffer."""
    return tuple(
        mx.slice_update(buffer, x.astype(buffer.dtype), slot, (2,))
        for buffer, x in zip(buffers, token, strict=True)
    )


def pack(
    keys: mx.array, values: mx.array, gates: mx.array, bits: int | None, group_size: int
) -> tuple[mx.array, ...]:
    """What buffers hold of some tokens. Raises AHNError if the group size does not fit."""
    if bits is None:
        return keys, values, gates
    if keys.shape[-1] % group_size:
        raise AHNError(
            f"a key/value group size of {group_size} does not divide the head size"
            f" {keys.shape[-1]}; use 32, or do not quantize the window"
        )
    options: dict[str, Any] = {"group_size": group_size, "bits": bits}
    return *mx.quantize(keys, **options), *mx.quantize(values, **options), gates


def split(*held: mx.array) -> tuple[Stored, Stored]:
    """Keys and values, as stored, of two arrays or, if quantized, six."""
    return held if len(held) == 2 else (held[:3], held[3:])


def unpack(held: tuple[mx.array, ...], bits: int | None, group_size: int) -> tuple[mx.array, ...]:
    """Keys, values and gates of what buffers hold, in the dtype they came in."""
    if bits is None:
        return held
    options: dict[str, Any] = {"group_size": group_size, "bits": bits}
    keys, values = split(*held[:-1])
    return mx.dequantize(*keys, **options), mx.dequantize(*values, **options), held[-1]
