"""Attention to sinks and window of a whole text at once, in few launches: for gradients on a GPU.

Queries stand in tiles, beside each tile the keys of its own tokens and of the blocks before it that
it can see. All tiles are one product; what a query does not see of them is masked.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np


def banded(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    window: int,
    sinks: int,
    scale: float,
    tile: int,
    q_sink: mx.array | None = None,
) -> mx.array:
    """Attention of all tokens of a text that begins here.

    q, q_sink: [B, H, L, D]; k, v: [B, Hkv, L, D]; q_sink, which scores the sinks, may be None
    for q; tile: queries beside each other. Returns [B, H, L, D].
    """
    B, H, L, D = q.shape
    Hkv, S, n = k.shape[1], min(sinks, L), -(-L // tile)
    back = min(n - 1, -(-(window - 1) // tile))  # blocks before its own that a tile sees
    q = _tiles(q * scale, n, tile).reshape(B, Hkv, -1, n, tile, D)
    both = mx.stack([k, v])[:, :, :, None]  # what is done with them is done once
    keys, values = _neighbours(both, n, tile, back)
    s = q @ keys.swapaxes(-1, -2)
    if S:
        near = q
        if q_sink is not None:
            near = _tiles(q_sink * scale, n, tile).reshape(q.shape)
        k_sinks, v_sinks = both[..., None, :S, :]
        s = mx.concatenate([near @ k_sinks.swapaxes(-1, -2), s], axis=-1)
    s = mx.where(_mask(L, n, tile, back, S, window), s, mx.finfo(s.dtype).min)
    p = mx.softmax(s, axis=-1, precise=True)
    if S:
        sinks_p, p = mx.split(p, [S], axis=-1)
        o = mx.addmm(p @ values, sinks_p, v_sinks)
    else:
        o = p @ values
    return o.reshape(B, H, n * tile, D)[:, :, :L]


def _tiles(x: mx.array, n: int, tile: int) -> mx.array:
    """[B, heads, L, D], zeros behind L up to n tiles."""
    rest = n * tile - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (0, rest), (0, 0)]) if rest else x


def _neighbours(x: mx.array, n: int, tile: int, back: int) -> mx.array:
    """[..., L, D] -> [..., n, (back + 1) tile, D]: each block behind those before it."""
    rest = (back * tile, n * tile - x.shape[-2])
    x = mx.pad(x, [(0, 0)] * (x.ndim - 2) + [rest, (0, 0)]) if any(rest) else x
    x = x.reshape(*x.shape[:-2], back + n, tile, x.shape[-1])
    return mx.concatenate([x[..., i : i + n, :, :] for i in range(back + 1)], axis=-2)


@lru_cache(maxsize=4)
def _mask(L: int, n: int, tile: int, back: int, sinks: int, window: int) -> mx.array:
    """Bool [n, tile, sinks + (back + 1) tile]: which keys a query sees."""
    query = np.arange(n * tile).reshape(n, tile, 1)
    key = (np.arange(n)[:, None] - back) * tile + np.arange((back + 1) * tile)
    key = key[:, None]
    band = (key >= sinks) & (key <= query) & (query - key < window)
    # Rows behind the text see what they see: nobody reads them.
    mask = mx.array(np.concatenate([np.arange(sinks) <= query, band], axis=-1))
    mx.eval(mask)
    return mask
