"""What the recurrences share: cutting time into chunks, decays inside one, and what one token
needs of its key and query.

Shapes inside a chunked form: [B, Hkv, G, N, C, D] with G = H / Hkv query heads
for each key/value head, N chunks of C tokens.
"""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..platform import tiles

FIRST = mx.array([[True], [False]])


def chunk_size(T: int, most: int | None = None) -> int:
    """The smallest power of two that holds T tokens, from 8 up to `most`, by default the
    device's: large enough for matrix products, small enough for C x C decays."""
    return min(most or tiles().chunk, max(8, 1 << (T - 1).bit_length()))


def to_chunks(x: mx.array, groups: int, C: int) -> mx.array:
    """[B, T, H, ...] -> [B, H / groups, groups, N, C, ...], float32, zeros behind T.

    Zero keys and gates write nothing and decay nothing, so a ragged tail is exact.
    """
    B, T, H = x.shape[:3]
    pad = -T % C
    if pad:
        x = mx.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = x.astype(mx.float32).reshape(B, (T + pad) // C, C, H // groups, groups, *x.shape[3:])
    rest = range(5, x.ndim)
    return x.transpose(0, 3, 4, 1, 2, *rest)


def from_chunks(x: mx.array, T: int) -> mx.array:
    """[B, Hkv, G, N, C, D] -> [B, T, H, D]."""
    B, Hkv, G, N, C, D = x.shape
    return x.transpose(0, 3, 4, 1, 2, 5).reshape(B, N * C, Hkv * G, D)[:, :T]


def each(x: mx.array) -> list[mx.array]:
    """The N chunks of [B, Hkv, G, N, ...]."""
    return [y.squeeze(3) for y in pieces(x, 1, 3)]


def pieces(x: mx.array, size: int, axis: int) -> list[mx.array]:
    """x cut into pieces of this size, the last perhaps smaller. The gradient of a split joins
    pieces; that of slices, which MLX makes of more than ten, adds up as many arrays of zeros."""
    n = -(-x.shape[axis] // size)
    if n > 10:
        first, rest = mx.split(x, [n // 2 * size], axis)
        return pieces(first, size, axis) + pieces(rest, size, axis)
    parts: Any = mx.split(x, [size * i for i in range(1, n)], axis) if n > 1 else [x]
    return list(parts)


@cache
def causal(C: int, diagonal: int = 0) -> mx.array:
    """[C, C] bool: row i sees column j where j <= i + diagonal."""
    return mx.array(np.tri(C, C, diagonal, dtype=bool))


def decay_matrix(g: mx.array) -> mx.array:
    """Log decays [..., C] -> [..., C, C], exp(g_{j+1} + ... + g_i) below the diagonal.

    Each sum is formed on its own: a difference of two long sums would lose the
    small decays that follow a strong one. Above the diagonal it is 0.
    """
    C = g.shape[-1]
    terms = mx.where(causal(C, -1), g[..., :, None], 0.0)
    sums = mx.cumsum(terms, axis=-2)
    return mx.exp(mx.where(causal(C), sums, -mx.inf))


def stacked(k: mx.array, q: mx.array) -> mx.array:
    """k [B, 1, Hkv, D] and q [B, 1, H, D] of one token -> [B, Hkv, G, 2, D] float32."""
    B, _, Hkv, D = k.shape
    k, q = k.reshape(B, Hkv, 1, 1, D), q.reshape(B, Hkv, -1, 1, D)
    # Selected, not concatenated: one launch instead of three.
    return mx.where(FIRST, k, q).astype(mx.float32)


def products(both: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """k . k, k . q and q . q of both [..., 2, D], each [..., 1, 1]."""
    gram = both @ both.swapaxes(-1, -2)
    return gram[..., :1, :1], gram[..., :1, 1:], gram[..., 1:, 1:]
