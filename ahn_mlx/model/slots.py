"""What one layer keeps of its conversations, as arrays: how slots are read and written, and
how keys and values are packed in them. No maths, and no numbers that depend on the past."""

from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import AHNError
from ..ops.ring import Place, read_slots, write_slots
from ..ops.window import Stored, split


class Rows(NamedTuple):
    """What one layer keeps of B conversations, as arrays of fixed shapes only: zero where
    nothing was written, so that filling and full windows are one and the same.

    buffers: keys, values (each three arrays if quantized), gates [B, heads, slots, width].
    leaving: copies of the slot that the next token takes. memory: [B, H, D, D] float32.
    """

    buffers: tuple[mx.array, ...]
    leaving: tuple[mx.array, ...]
    memory: mx.array | None

    def put_chunk(
        self, tokens: tuple[mx.array, ...], place: Place
    ) -> tuple["Rows", Stored, Stored, tuple[mx.array, ...]]:
        """L <= W tokens in. Returns what comes of it; the keys and values before, then the
        new; and what has left, with gates of zero where nothing has."""
        left = read_slots(self.buffers, place.slots)
        pairs = zip(self.buffers[:-1], tokens[:-1], strict=True)
        kept = split(*(mx.concatenate([old, new], axis=2) for old, new in pairs))
        if place.valid is not None:
            valid = place.valid[:, None, :, None]
            tokens = tuple(mx.where(valid, x, old) for x, old in zip(tokens, left, strict=True))
            left = (*left[:-1], mx.where(valid, left[-1], 0))
        buffers = write_slots(self.buffers, tokens, place.slots)
        leaving = read_slots(buffers, place.following)
        return Rows(buffers, leaving, self.memory), *kept, left


def write_run(
    buffers: tuple[mx.array, ...], tokens: tuple[mx.array, ...], slot: int
) -> tuple[mx.array, ...]:
    """Put tokens [B, heads, n, width] from one slot on, in all rows; in place, once nothing
    else reads the buffer."""
    written = tuple(buffer[...] for buffer in buffers)  # other arrays than the caller's
    for buffer, x in zip(written, tokens, strict=True):
        buffer[:, :, slot : slot + x.shape[2]] = x
    return written


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


def unpack(held: tuple[mx.array, ...], bits: int | None, group_size: int) -> tuple[mx.array, ...]:
    """Keys, values and gates of what buffers hold, in the dtype they came in."""
    if bits is None:
        return held
    options: dict[str, Any] = {"group_size": group_size, "bits": bits}
    keys, values = split(*held[:-1])
    return mx.dequantize(*keys, **options), mx.dequantize(*values, **options), held[-1]


def head_size(buffers: tuple[mx.array, ...], bits: int | None) -> int:
    """D of the keys in these buffers."""
    width = buffers[0].shape[-1]
    return width if bits is None else width * 32 // bits
