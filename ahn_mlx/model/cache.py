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
from ..ops.ring import Place, Update, place_of, read_slots, slot_of
from ..ops.window import Stored, split
from .slots import Rows, head_size, pack, unpack, write_run
from .trace import Trace

# Slots added at a time while the window fills.
GROWTH = 256


class Watched(NamedTuple):
    """Of one call of a layer. x: [B, L, C], its normed input. heads: [B, H, L, D], before their
    output projection."""

    x: mx.array
    heads: mx.array


class AHNCache(_BaseCache):
    """Fixed-size cache of one attention layer, in mlx-lm's cache protocol.

    window, sinks: W >= 1 and S >= 0 tokens. Batch rows have equal lengths (else BatchAHNCache).
    bits, group_size: how keys and values are quantized; bits None keeps them as they are.
    `memory` is the recurrent state [B, H, D, D] float32, None before the first eviction.
    """

    # Set by whoever wants to know what the memory does, and what went into a layer's heads.
    trace: Trace | None = None
    watched: list[Watched] | None = None

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

    def turn(self, L: int = 1) -> tuple[Rows, Place]:
        """What the next single token finds once the window is full, and where it goes."""
        assert L == 1 and self.full and self.buffers is not None
        B = self.buffers[0].shape[0]
        place = place_of((self.offset,) * B, None, 1, self.capacity, self.window, self.sinks)
        if self._next is None:
            self._next = read_slots(self.buffers, place.slots)
        return Rows(self.buffers, self._next, self.memory), place

    def turned(self, rows: Rows, L: int = 1) -> None:
        """Take over what came of the token."""
        self.buffers, self._next, self.memory = rows
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
            self.buffers = write_run(self.buffers, part, slot)
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
        """A cache with the same tokens, quantized; this one, if it is so already, since
        mlx-lm asks after every step.

        Raises AHNError if the group size does not divide the head size, or if this one is
        quantized otherwise.
        """
        if self.bits is not None:
            if (self.bits, self.group_size) != (bits, group_size):
                raise AHNError(
                    f"the window is quantized to {self.bits} bits in groups of {self.group_size}"
                    f" already, and cannot become {bits} bits in groups of {group_size}"
                )
            return self
        cache = AHNCache(self.window, self.sinks, bits, group_size)
        cache.offset, cache.memory, cache.trace = self.offset, self.memory, self.trace
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
        """Never: nothing can be taken out of the memory, and who asks at the start, before
        anything has left the window, means to trim later."""
        return False

    def merge(self, caches: list["AHNCache"]) -> "BatchAHNCache":
        """These as rows of one batch; they stay as they are. Raises AHNError if their windows
        differ."""
        return BatchAHNCache.of(caches)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of full attention, for layers without memory; AHN layers ignore it."""
        return create_attention_mask(
            N, offset=self.offset, return_array=return_array, window_size=window_size
        )


def grown_to(tokens: int, capacity: int) -> int:
    """Slots that a cache has, when it has kept so many tokens."""
    return min(capacity, -(-tokens // GROWTH) * GROWTH)


class PureCache:
    """What one layer finds in a step that is a pure function of arrays, and what it leaves:
    all rows, and where their tokens go."""

    bits, group_size = None, 0

    def __init__(self, window: int, sinks: int, place: Place, rows: Rows):
        self.window, self.sinks = window, sinks
        self.place, self.rows = place, rows

    def make_mask(self, *args: Any, **options: Any) -> None:
        """None: AHN layers decide visibility themselves."""


class BatchAHNCache(_BaseCache):
    """AHNCaches of one layer side by side, each at its own position, in mlx-lm's batch protocol.

    offsets: tokens of each row. rows: their arrays, with as many slots as the longest needs;
    None while all are empty.
    """

    def __init__(
        self, window: int, sinks: int, bits: int | None, group_size: int, offsets: list[int]
    ):
        self.window, self.sinks = window, sinks
        self.bits, self.group_size = bits, group_size
        self.offsets = offsets
        self.rows: Rows | None = None
        # Tokens of each row that are still to come of prompts that were padded.
        self._left: list[int] | None = None

    @property
    def capacity(self) -> int:
        """Tokens that a row keeps losslessly once its window is full."""
        return self.window + self.sinks

    @classmethod
    def of(cls, caches: list[AHNCache], slots: int = 0) -> "BatchAHNCache":
        """A batch of copies, with so many slots at least. Raises AHNError unless all have the
        same window and bits."""
        first = caches[0]
        batch = cls(first.window, first.sinks, first.bits, first.group_size, [])
        for cache in caches:
            batch._check_like(cache)
        batch.offsets = [cache.offset for cache in caches]
        batch._join([(1, cache.buffers, cache.memory) for cache in caches], slots=slots)
        return batch

    def start(self, token: tuple[mx.array, ...]) -> None:
        """Make room, before the first token. token: zeros [1, heads, 1, width] as buffers
        hold them."""
        self._join([(len(self.offsets), None, None)], token)

    def turn(self, L: int = 1) -> tuple[Rows, Place]:
        """What the next L <= W tokens find, and where they go."""
        count = self._count(L)
        new = count or [L] * len(self.offsets)
        assert self.rows is not None
        needed = max(a + b for a, b in zip(self.offsets, new, strict=True))
        slots = self._wanted(needed)
        if self.rows.buffers[0].shape[2] < slots:
            grown = tuple(_resized(x, len(self.offsets), slots) for x in self.rows.buffers)
            self.rows = self.rows._replace(buffers=grown)
        held = self.rows.buffers[0].shape[2]
        counts = None if count is None else tuple(count)
        at = tuple(self.offsets)
        return self.rows, place_of(at, counts, L, held, self.window, self.sinks)

    def turned(self, rows: Rows, L: int = 1) -> None:
        """Take over what came of L tokens."""
        count = self._count(L) or [L] * len(self.offsets)
        self.rows = rows
        self.offsets = [a + b for a, b in zip(self.offsets, count, strict=True)]
        if self._left is not None:
            self._left = [a - b for a, b in zip(self._left, count, strict=True)]

    def _count(self, L: int) -> list[int] | None:
        """How many of the next L tokens of each row are no padding; None: all."""
        return None if self._left is None else [min(n, L) for n in self._left]

    def _wanted(self, tokens: int) -> int:
        """Slots for so many tokens and the one after them; they double up to the window."""
        have = 0 if self.rows is None else self.rows.buffers[0].shape[2]
        if have > tokens or have == self.capacity:
            return have
        return min(self.capacity, max(2 * have, grown_to(tokens + 1, self.capacity)))

    def _join(
        self,
        parts: list[tuple[int, tuple[mx.array, ...] | None, mx.array | None]],
        like: tuple[mx.array, ...] | None = None,
        slots: int = 0,
    ) -> None:
        """Hold parts of several rows each: their number, buffers and memory, None for zeros."""
        like = like or next((held for _, held, _ in parts if held is not None), None)
        if like is None:
            return  # no row has read anything
        self.rows = None
        slots = max(slots, self._wanted(max(self.offsets)))
        columns = [
            tuple(x[:1, :, :0] for x in like) if held is None else held for _, held, _ in parts
        ]
        counts = [n for n, *_ in parts]
        buffers = tuple(
            mx.concatenate([_resized(x, n, slots) for n, x in zip(counts, column, strict=True)])
            for column in zip(*columns, strict=True)
        )
        H, D = like[-1].shape[1], head_size(like, self.bits)
        memory = mx.concatenate([mx.zeros((n, H, D, D)) if m is None else m for n, _, m in parts])
        held = buffers[0].shape[2]
        place = place_of(tuple(self.offsets), None, 1, held, self.window, self.sinks)
        self.rows = Rows(buffers, read_slots(buffers, place.slots), memory)

    def _check_like(self, other: "AHNCache | BatchAHNCache") -> None:
        for name in ("window", "sinks", "bits", "group_size"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise AHNError(f"rows of one batch differ: {name} {ours} and {theirs}")

    # mlx-lm's protocol

    @property
    def state(self) -> Any:
        """What mlx-lm evaluates after each step; a row is saved by itself, after extract."""
        return self.rows or ()

    @state.setter
    def state(self, value: Any) -> None:
        raise AHNError("a batch cannot be restored; extract its rows and save those")

    @property
    def nbytes(self) -> int:
        """Bytes held: sinks, windows, gates and memory states."""
        if self.rows is None:
            return 0
        arrays = (*self.rows.buffers, *self.rows.leaving, self.rows.memory)
        return sum(x.nbytes for x in arrays if x is not None)

    def size(self) -> int:
        return min(max(self.offsets), self.capacity)

    def empty(self) -> bool:
        return not any(self.offsets)

    def make_mask(self, *args: Any, **options: Any) -> None:
        """None: AHN layers decide visibility themselves."""

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Announce prompts of these lengths, padded to the right."""
        if left_padding is not None:
            raise AHNError("prompts padded on the left are not supported; pad on the right")
        self._left = None if lengths is None else list(lengths)

    def finalize(self) -> None:
        """The prompts have been read."""
        self._left = None

    def extract(self, row: int) -> AHNCache:
        """A copy of one row, which keeps nothing of the batch alive."""
        cache = AHNCache(self.window, self.sinks, self.bits, self.group_size)
        cache.offset = self.offsets[row]
        if self.rows is not None and cache.offset:
            slots = grown_to(cache.offset, self.capacity)
            part = slice(row, row + 1)
            cache.buffers = tuple(mx.contiguous(x[part, :, :slots]) for x in self.rows.buffers)
            if cache.offset > self.capacity and self.rows.memory is not None:
                cache.memory = mx.contiguous(self.rows.memory[part])
            # A view still to be copied would make the next step copy the whole batch.
            mx.async_eval(cache.buffers, cache.memory)
        return cache

    def filter(self, keep: list[int]) -> None:
        """Keep these rows, in this order."""
        self.offsets = [self.offsets[i] for i in keep]
        if self._left is not None:
            self._left = [self._left[i] for i in keep]
        if self.rows is not None:
            rows = mx.array(keep)
            buffers, leaving, memory = self.rows
            self.rows = Rows(
                tuple(mx.take(x, rows, axis=0) for x in buffers),
                tuple(mx.take(x, rows, axis=0) for x in leaving),
                None if memory is None else mx.take(memory, rows, axis=0),
            )

    def extend(self, other: "BatchAHNCache") -> None:
        """Take in the rows of another batch."""
        self._check_like(other)
        parts = [
            (len(b.offsets), *((b.rows.buffers, b.rows.memory) if b.rows else (None, None)))
            for b in (self, other)
        ]
        slots = max((held[0].shape[2] for _, held, _ in parts if held is not None), default=0)
        self.offsets = [*self.offsets, *other.offsets]
        self._join(parts, slots=slots)


def _resized(x: mx.array, rows: int, slots: int) -> mx.array:
    """x [B or 1, heads, n, width] with zeros behind its slots, or without those that are too
    many; with no slots at all, zeros for so many rows."""
    B, heads, n, width = x.shape
    if n == 0:
        return mx.zeros((rows, heads, slots, width), dtype=x.dtype)
    if n >= slots:
        return x[:, :, :slots]
    return mx.pad(x, [(0, 0), (0, 0), (0, slots - n), (0, 0)])
