"""Launches of the attention kernels; each kernel's file says what it does."""

import mlx.core as mx

from . import kernels
from .ring import Update

SIMDGROUPS = 8  # per threadgroup of decoding
SHARE = 256  # slots that one threadgroup of decoding looks at
QUERY_SIMDGROUPS = 4  # per threadgroup of prefill, eight queries each
KEYS = 16  # per block of prefill: with 128 columns 27 KB of threadgroup memory, 15 in 16 bits


def decode(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    filled: mx.array,
    scale: float,
    q_sink: mx.array | None = None,
    sinks: int = 0,
) -> mx.array:
    """Softmax attention of one token to the first filled[b] slots, in two dispatches.

    q, q_sink: [B, H, 1, D]; q_sink scores the first `sinks` slots, or is None.
    k, v: [B, Hkv, slots, D]. filled: [B] int32. Returns [B, H, 1, D].
    """
    B, H, _, D = q.shape
    Hkv, slots = k.shape[1:3]
    splits = -(-slots // SHARE)
    inputs = {
        "q": q,
        "q_sink": q if q_sink is None else q_sink,
        "k": k,
        "v": v,
        "filled": filled,
        "scale": mx.array([scale], dtype=mx.float32),
    }
    template = [("D", D), ("SPLITS", splits)]
    options = [("HKV", Hkv), ("G", H // Hkv), ("SG", SIMDGROUPS)]
    options.append(("SINKS", 0 if q_sink is None else sinks))
    parts, stats = kernels.kernel("window_decode", tuple(inputs), ("parts", "stats"))(
        inputs=list(inputs.values()),
        template=[*template, *options],
        grid=(32 * SIMDGROUPS, splits, B * Hkv),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(B, H, splits, D), (B, H, splits, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    (heads,) = kernels.kernel("window_decode_merge", ("parts", "stats"), ("heads",))(
        inputs=[parts, stats],
        template=[("T", q.dtype), *template],
        grid=(D, B * H, 1),
        threadgroup=(D, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return heads


def prefill(
    q: mx.array,
    update: Update,
    scale: float,
    q_sink: mx.array | None = None,
    offsets: mx.array | None = None,
) -> mx.array:
    """Attention of a chunk to sinks and window, as ops.window_attention.

    offsets: [B] int32, tokens before the chunk in each row; by default the update's in all.
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
        "offset": mx.array([update.offset] * B) if offsets is None else offsets,
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
