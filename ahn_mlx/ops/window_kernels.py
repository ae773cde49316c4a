"""Launches of the attention kernels; each kernel's file says what it does."""

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import kernels
from .ring import Update

SIMDGROUPS = 8  # per threadgroup of decoding
SHARE = 256  # slots that one threadgroup of decoding looks at
QUERY_SIMDGROUPS = 4  # per threadgroup of prefill, eight queries each
KEYS = 16  # per block of prefill: with 128 columns 27 KB of threadgroup memory, 15 in 16 bits


class Shares(NamedTuple):
    """What each share of the window gave: parts [B, H, n, D], sums that are not divided, and
    stats [B, H, n, 2] float32, largest score and sum of weights."""

    parts: mx.array
    stats: mx.array


@cache
def _undivided(B: int, H: int) -> mx.array:
    return mx.array(np.tile(np.array([0, 1], dtype=np.float32), (B, H, 1, 1)))


def whole(heads: mx.array) -> Shares:
    """Heads [B, H, 1, D] as the only share."""
    return Shares(heads, _undivided(*heads.shape[:2]))


def decode(
    q: mx.array,
    buffers: tuple[mx.array, ...],
    filled: mx.array,
    following: mx.array,
    scale: float,
    q_sink: mx.array | None = None,
    sinks: int = 0,
) -> tuple[Shares, tuple[mx.array, ...]]:
    """Softmax attention of one token to the first filled[b] slots, not yet merged.

    q, q_sink: [B, H, 1, D]; q_sink scores the first `sinks` slots, or is None.
    buffers: keys, values [B, Hkv, slots, D] and gates [B, H, slots, G]. filled: [B] int32.
    following: [B, 1] int32. Returns shares, and copies of the slots following[b].
    """
    k, v, gates = buffers
    B, H, _, D = q.shape
    Hkv, slots = k.shape[1:3]
    splits = -(-slots // SHARE)
    inputs = {
        "q": q,
        "q_sink": q if q_sink is None else q_sink,
        "k": k,
        "v": v,
        "gates": gates,
        "filled": filled,
        "following": following,
        "scale": mx.array([scale], dtype=mx.float32),
    }
    outputs = ("parts", "stats", "next_k", "next_v", "next_gates")
    template = [("D", D), ("SPLITS", splits), ("HKV", Hkv), ("G", H // Hkv), ("SG", SIMDGROUPS)]
    template += [("SINKS", 0 if q_sink is None else sinks), ("GATES", gates.shape[3])]
    kv, heads = (B, Hkv, 1, D), (B, H, splits)
    parts, stats, *leaving = kernels.kernel("window_decode", tuple(inputs), outputs)(
        inputs=list(inputs.values()),
        template=template,
        grid=(32 * SIMDGROUPS, splits, B * Hkv),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(*heads, D), (*heads, 2), kv, kv, (B, H, 1, gates.shape[3])],
        output_dtypes=[mx.float32, mx.float32, k.dtype, v.dtype, gates.dtype],
    )
    return Shares(parts, stats), tuple(leaving)


def merge(shares: Shares, dtype: mx.Dtype) -> mx.array:
    """Heads [B, H, 1, D]."""
    B, H, splits, D = shares.parts.shape
    (heads,) = kernels.kernel("window_decode_merge", ("parts", "stats"), ("heads",))(
        inputs=list(shares),
        template=[("T", dtype), ("D", D), ("SPLITS", splits)],
        grid=(D, B * H, 1),
        threadgroup=(D, 1, 1),
        output_shapes=[(B, H, 1, D)],
        output_dtypes=[dtype],
    )
    return heads


def prefill(
    q: mx.array,
    update: Update,
    scale: float,
    q_sink: mx.array | None = None,
    offsets: tuple[int, ...] | None = None,
) -> mx.array:
    """Attention of a chunk to sinks and window, as ops.window_attention.

    offsets: tokens before the chunk in each row; by default the update's in all.
    """
    B, H, L, D = q.shape
    ring = update.chunk if update.ring is None else update.ring
    inputs = {
        "q": q,
        "q_sink": q if q_sink is None else q_sink,
        "ring_k": ring[0],
        "ring_v": ring[1],
        "chunk_k": update.chunk[0],
        "chunk_v": update.chunk[1],
        "offset": mx.array(offsets or (update.offset,) * B),
        "scale": mx.array([scale], dtype=mx.float32),
    }
    rows = 8 * QUERY_SIMDGROUPS
    (heads,) = kernels.kernel("window_prefill", tuple(inputs), ("heads",))(
        inputs=list(inputs.values()),
        template=[
            ("T", q.dtype),
            ("D", D),
            ("H", H),
            ("HKV", ring[0].shape[1]),
            ("SG", QUERY_SIMDGROUPS),
            ("BK", KEYS),
            ("W", update.window),
            ("S", update.sinks),
        ],
        grid=(32 * QUERY_SIMDGROUPS, -(-L // rows), B * H),
        threadgroup=(32 * QUERY_SIMDGROUPS, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return heads
