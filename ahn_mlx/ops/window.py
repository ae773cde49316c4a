"""Softmax attention over sinks and a sliding window, for one chunk of queries.

Token t sees the tokens j <= t with j < S or t - j < W (paper, section 2). Queries go
in tiles; a tile touches the sinks and the keys it can see, nothing else.

Clamped sinks: past position W + S a sink is scored with a second copy of the query,
rotated at W + S, so that sinks never drift out of the range the model was trained on.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..platform import on_cpu, tiles
from . import window_kernels
from .band import banded
from .chunks import pieces
from .exp import exp
from .kernels import Check, Sizes, chosen
from .ring import Place, Update, read_slots, slot_of
from .window_kernels import Shares

# With fewer queries per key/value head, OpenBLAS is faster at k q^T than at q k^T.
FEW_ROWS = 16

# Of two, stacked in front of the last two axes.
FIRST = mx.array([[[True]], [[False]]])

# Keys or values [B, Hkv, K, D]: an array, or (packed, scales, biases) of mx.quantize.
Stored = Any


class Logits(NamedTuple):
    """What is done with scaled scores s before their softmax. cap: they become
    cap tanh(s / cap). sinks: [H], a logit of each head that takes its share and gives nothing."""

    cap: float | None
    sinks: mx.array | None

    def capped(self, s: mx.array) -> mx.array:
        return s if self.cap is None else mx.tanh(s / self.cap) * self.cap

    def softmax(self, s: mx.array) -> mx.array:
        """s [B, Hkv, R, K], where R are the rows of the query heads below each other."""
        if self.sinks is None:
            return mx.softmax(s, axis=-1, precise=True)
        B, Hkv, R, _ = s.shape
        rows = self.sinks.reshape(Hkv, -1, 1).astype(s.dtype)
        rows = mx.repeat(rows, R // rows.shape[1], axis=1)
        s = mx.concatenate([s, mx.broadcast_to(rows[None], (B, Hkv, R, 1))], axis=-1)
        return mx.softmax(s, axis=-1, precise=True)[..., :-1]


def attend(
    q: mx.array,
    k: Stored,
    v: Stored,
    scale: float,
    mask: mx.array | None = None,
    q_sink: mx.array | None = None,
    sinks: int = 0,
    plain: bool = False,
    logits: Logits | None = None,
) -> mx.array:
    """Softmax attention; the first `sinks` keys may be scored by a query of their own.

    q, q_sink: [B, H, L, D]; k, v: [B, Hkv, K, D], or quantized so; mask: bool [L, K],
    [B, 1, L, K] or None; plain: only by operations that mx.export_function can write. Returns
    [B, H, L, D].
    """
    if q_sink is None or sinks == 0:
        q_sink, sinks = q, 0
    if not on_cpu() and logits is None:
        return few_launches(q, k, v, scale, mask, q_sink, sinks)
    B, H, L, D = q.shape
    Hkv = _rows(k)[0].shape[1]
    # One product per key/value head: its query heads stand below each other.
    q, q_sink = (_scaled(x, scale).reshape(B, Hkv, -1, D) for x in (q, q_sink))
    s = _scores(q, _rows(k, sinks), plain)
    if sinks:
        s = mx.concatenate([_scores(q_sink, _rows(k, 0, sinks), plain), s], axis=-1)
    if logits is not None:
        s = logits.capped(s)
    if mask is not None:
        # Added, not selected: a tenth of the time on the CPU.
        bias = mx.where(mask, 0.0, mx.finfo(s.dtype).min).astype(s.dtype)
        s = (s.reshape(B, H, L, -1) + bias).reshape(s.shape)
    if logits is not None:
        o = _mix(logits.softmax(s), v, D)
    elif s.dtype == mx.float32 and not plain:
        p = exp(s - mx.stop_gradient(s.max(axis=-1, keepdims=True)))
        o = _mix(p, v, D) / p.sum(axis=-1, keepdims=True)
    else:
        o = _mix(mx.softmax(s, axis=-1, precise=True), v, D)
    return o.reshape(B, H, L, D)


def _scaled(q: mx.array, scale: float) -> mx.array:
    return q if scale == 1.0 else q * scale


def few_launches(
    q: mx.array,
    k: Stored,
    v: Stored,
    scale: float,
    mask: mx.array | None,
    q_sink: mx.array,
    sinks: int,
) -> mx.array:
    """attend, for a GPU; q_sink counts for the first `sinks` keys, if there are any."""
    if sinks == 0 and isinstance(k, mx.array):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    B, H, L, D = q.shape
    keys = _rows(k)
    grouped = (B, keys[0].shape[1], -1, D)
    if sinks and L == 1:
        # All keys are scored by both queries: one product and two selections.
        pair = [x.reshape(grouped)[:, :, None] for x in (q, q_sink)]
        both = _stack(pair[0], pair[1], scale)
        scores = _scores(both.flatten(2, 3), keys, True).reshape(*both.shape[:4], -1)
        s = _select(scores, _leading(sinks, scores.shape[-1]), mask)
    else:
        s = _scores(_scaled(q, scale).reshape(grouped), _rows(k, sinks), True)
        if sinks:
            near = _scaled(q_sink, scale).reshape(grouped)
            s = mx.concatenate([_scores(near, _rows(k, 0, sinks), True), s], axis=-1)
        s = _masked(s, mask, L)
    return _mix(mx.softmax(s, axis=-1, precise=True), v, D).reshape(B, H, L, D)


@mx.compile
def _stack(q: mx.array, q_sink: mx.array, scale: float) -> mx.array:
    """Two of [B, Hkv, 1, G, D] -> [B, Hkv, 2, G, D]."""
    return mx.where(FIRST, q, q_sink) * scale


@mx.compile
def _select(s: mx.array, are_sinks: mx.array, mask: mx.array | None) -> mx.array:
    """Scores [B, Hkv, 2, G, K] by both queries; mask [B, 1, 1, K] -> [B, Hkv, G, K]."""
    s = mx.where(are_sinks, s[:, :, 1], s[:, :, 0])
    return s if mask is None else mx.where(mask, s, mx.finfo(s.dtype).min)


@mx.compile
def _masked(s: mx.array, mask: mx.array | None, L: int) -> mx.array:
    """Scores [B, Hkv, G L, K]; mask [L, K] or [B, 1, L, K]."""
    if mask is None:
        return s
    B, Hkv, _, K = s.shape
    s = s.reshape(B, Hkv, -1, L, K)
    mask = mask if mask.ndim == 2 else mask[:, :, None]
    return mx.where(mask, s, mx.finfo(s.dtype).min).reshape(B, Hkv, -1, K)


@lru_cache(maxsize=16)
def _leading(n: int, of: int) -> mx.array:
    """Bool [of], of which the first n are true."""
    return mx.array(np.arange(of) < n)


def attend_to_all(
    q: mx.array,
    buffers: tuple[mx.array, ...],
    scale: float,
    q_sink: mx.array | None,
    sinks: int,
    place: Place,
    plain: bool = False,
    logits: Logits | None = None,
) -> tuple[mx.array | Shares, tuple[mx.array, ...]]:
    """One token (L = 1), which has been written, and all slots in use.

    buffers: keys and values, as attend takes them, and gates. Otherwise as attend. Returns
    heads, perhaps still to be merged, and copies of the slots that the next tokens take: read
    now, since a reader still waiting when its slot is written would force a copy of the window.
    """
    where = place.filled, place.following, place.seen
    if not plain and logits is None and len(buffers) == 3:
        k = buffers[0]
        window = max(1, k.shape[2] - sinks)
        if chosen(DECODE, Sizes.of(q, k, window, sinks, q_sink is not None)):
            return window_kernels.decode(q, buffers, *where[:2], scale, q_sink, sinks)
    return _attend_to_all_ops(q, buffers, scale, q_sink, sinks, *where, plain, logits)


def _attend_to_all_ops(
    q: mx.array,
    buffers: tuple[mx.array, ...],
    scale: float,
    q_sink: mx.array | None,
    sinks: int,
    filled: mx.array,
    following: mx.array,
    seen: mx.array | None,
    plain: bool = False,
    logits: Logits | None = None,
) -> tuple[mx.array, tuple[mx.array, ...]]:
    leaving = read_slots(buffers, following)
    # Gates are not part of attention; without this their writes would pile up.
    k, v = split(*mx.depends(list(buffers[:-1]), [buffers[-1], *leaving]))
    return attend(q, k, v, scale, seen, q_sink, sinks, plain, logits), leaving


def split(*held: mx.array) -> tuple[Stored, Stored]:
    """Keys and values, as stored, of two arrays or, if quantized, six."""
    return held if len(held) == 2 else (held[:3], held[3:])


def _rows(x: Stored, start: int = 0, stop: int | None = None) -> tuple[mx.array, ...]:
    """The array, or the three of a quantized one, with keys start ... stop - 1."""
    return tuple(a[:, :, start:stop] for a in ((x,) if isinstance(x, mx.array) else x))


def _scores(q: mx.array, k: tuple[mx.array, ...], plain: bool = False) -> mx.array:
    """q [B, Hkv, R, D], k of K keys -> [B, Hkv, R, K]."""
    if len(k) == 3:
        packed, scales, biases = k
        return mx.quantized_matmul(q, packed, scales, biases, **_format(k, q.shape[-1]))
    if q.shape[2] < FEW_ROWS and not plain:
        return (k[0] @ mx.contiguous(q.swapaxes(-1, -2))).swapaxes(-1, -2)
    return q @ k[0].swapaxes(-1, -2)


def _mix(p: mx.array, v: Stored, D: int) -> mx.array:
    """Weights p [B, Hkv, R, K] times values -> [B, Hkv, R, D]."""
    if isinstance(v, mx.array):
        return p @ v
    packed, scales, biases = v
    return mx.quantized_matmul(p, packed, scales, biases, transpose=False, **_format(v, D))


def _format(x: tuple[mx.array, ...], D: int) -> dict[str, Any]:
    """How rows of D numbers were quantized, read off their shapes."""
    return {"group_size": D // x[1].shape[-1], "bits": 32 * x[0].shape[-1] // D}


def window_attention(
    q: mx.array,
    update: Update,
    scale: float,
    q_sink: mx.array | None = None,
    gradients: bool = False,
    logits: Logits | None = None,
) -> mx.array:
    """Attention of a chunk of tokens to sinks and window.

    q, q_sink: [B, H, L, D], rotated; q_sink holds the queries for the sinks (clamped
    positions) or is None. gradients: only by operations that have them.
    Returns [B, H, L, D].
    """
    k, clamped = update.chunk[0], q_sink is not None
    sizes = Sizes.of(q, k, update.window, update.sinks, clamped)
    if not gradients and logits is None and chosen(PREFILL, sizes):
        return window_kernels.prefill(q, update, scale, q_sink)
    if not on_cpu() and logits is None and update.ring is None:
        keys, values = update.chunk[:2]
        if update.end <= update.window:
            return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask="causal")
        if gradients:
            parts = {"window": update.window, "sinks": update.sinks, "tile": tiles().query}
            return banded(q, keys, values, scale=scale, q_sink=q_sink, **parts)
    return _window_attention_ops(q, update, scale, q_sink, logits)


def _window_attention_ops(
    q: mx.array,
    update: Update,
    scale: float,
    q_sink: mx.array | None,
    logits: Logits | None = None,
) -> mx.array:
    keys, values = update.seen()
    offset, window, sinks = update.offset, update.window, update.sinks
    return tiled(
        q,
        keys,
        values,
        offset=offset,
        window=window,
        sinks=sinks,
        scale=scale,
        q_sink=q_sink,
        logits=logits,
    )


def tiled(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    offset: int,
    window: int,
    sinks: int,
    scale: float,
    q_sink: mx.array | None = None,
    tile: int | None = None,
    logits: Logits | None = None,
) -> mx.array:
    """Attention of the tokens offset ... offset + L - 1, `tile` of them at a time, by default
    as many as suits the device: larger tiles compute more scores outside the window.

    k, v: [B, Hkv, K, D], the sinks that exist and then all tokens from some position up
    to offset + L - 1, without a gap in the window. Otherwise as window_attention.
    """
    L, K = q.shape[2], k.shape[2]
    end = offset + L
    S = min(sinks, end)
    first = end - (K - S)  # position of the first key behind the sinks
    outputs, tile = [], tile or tiles().query
    # Once for all tiles.
    q, q_sink = _scaled(q, scale), None if q_sink is None else _scaled(q_sink, scale)
    starts = range(offset, end, tile)
    queries = pieces(q, tile, 2)
    near = [None] * len(starts) if q_sink is None else pieces(q_sink, tile, 2)
    k_sinks, v_sinks = k[..., :S, :], v[..., :S, :]
    for n, t0 in enumerate(starts):
        t1 = min(t0 + tile, end)
        lo, hi = max(S, t0 - window + 1), max(S, t1)  # keys some query of the tile sees
        a, b = S + lo - first, S + hi - first
        if a == S:
            kt, vt = k[..., :b, :], v[..., :b, :]
        else:
            kt = mx.concatenate([k_sinks, k[..., a:b, :]], axis=2)
            vt = mx.concatenate([v_sinks, v[..., a:b, :]], axis=2)
        mask = _tile_mask(t1 - t0, t0 - S, t0 - lo, hi - lo, S, window)
        second = near[n] if t1 > window + sinks else None
        outputs.append(attend(queries[n], kt, vt, 1.0, mask, second, S, logits=logits))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _tile_mask(n: int, past_sinks: int, past_lo: int, keys: int, S: int, window: int) -> mx.array:
    """Bool [n, S + keys] for n queries, the first at distance past_lo from key lo."""
    # All that matters of the distance to the sinks is whether a query stands among them.
    return _mask(n, min(past_sinks, 0), past_lo, keys, S, window)


@lru_cache(maxsize=16)
def _mask(n: int, past_sinks: int, past_lo: int, keys: int, S: int, window: int) -> mx.array:
    row = mx.arange(n)[:, None]
    sink = row + past_sinks + S >= mx.arange(S)[None] if past_sinks else mx.ones((n, S), mx.bool_)
    distance = row + past_lo - mx.arange(keys)[None]
    mask = mx.concatenate([sink, (distance >= 0) & (distance < window)], axis=1)
    mx.eval(mask)
    return mask


def sequential(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    offset: int,
    window: int,
    sinks: int,
    scale: float,
    q_sink: mx.array | None = None,
) -> mx.array:
    """The oracle: every token 0 ... offset + L - 1 in k and v, one query at a time."""
    group = q.shape[1] // k.shape[1]
    k, v = (mx.repeat(x.astype(mx.float32), group, axis=1) for x in (k, v))
    outputs = []
    for i in range(q.shape[2]):
        t = offset + i
        seen = [j for j in range(t + 1) if j < sinks or t - j < window]
        scores = []
        for j in seen:
            clamped = j < sinks and t >= window + sinks
            query = q_sink if q_sink is not None and clamped else q
            scores.append(mx.sum(query[:, :, i] * k[:, :, j], axis=-1) * scale)
        weights = mx.softmax(mx.stack(scores, axis=-1).astype(mx.float32), axis=-1)
        outputs.append((weights[..., None] * v[:, :, mx.array(seen)]).sum(axis=2))
    return mx.stack(outputs, axis=2)


def _prefill_example(sizes: Sizes, before: int) -> tuple[Any, ...]:
    """What the ring keeps of the tokens before, a chunk, and its queries."""
    D, heads, kv_heads, L = sizes.D, sizes.heads, sizes.kv_heads, sizes.chunk
    held = min(before, sizes.capacity)
    ring, chunk = (_random(sizes, 2, 1, kv_heads, n, D) for n in (held, L))
    update = Update(tuple(ring), tuple(chunk), before, sizes.window, sizes.sinks)
    q, q_sink = _random(sizes, 2, 1, heads, L, D)
    return q, update, D**-0.5, q_sink if sizes.clamped else None


def _decode_example(sizes: Sizes, before: int) -> tuple[Any, ...]:
    """Slots of which those of the tokens before and of one more are in use."""
    D, slots = sizes.D, sizes.capacity
    k, v = _random(sizes, 2, 1, sizes.kv_heads, slots, D)
    gates = _random(sizes, 1, sizes.heads, slots, 2)
    q, q_sink = _random(sizes, 2, 1, sizes.heads, 1, D)
    filled = min(before + 1, slots)
    following = mx.array([[slot_of(before + 1, sizes.window, sizes.sinks)]])
    seen = None if filled == slots else (mx.arange(slots) < filled)[None, None, None]
    far = q_sink if sizes.clamped else None
    where = mx.array([filled]), following, seen
    return q, (k, v, gates), D**-0.5, far, sizes.sinks, *where


def _random(sizes: Sizes, *shape: int) -> mx.array:
    return mx.random.normal(shape).astype(sizes.dtype)


def _decode_kernel(
    q: mx.array,
    buffers: tuple[mx.array, ...],
    scale: float,
    q_sink: mx.array | None,
    sinks: int,
    filled: mx.array,
    following: mx.array,
    seen: mx.array | None,
) -> tuple[mx.array, ...]:
    shares, leaving = window_kernels.decode(q, buffers, filled, following, scale, q_sink, sinks)
    return window_kernels.merge(shares, q.dtype), *leaving


def _decode_ops(*arguments: Any) -> tuple[mx.array, ...]:
    heads, leaving = _attend_to_all_ops(*arguments)
    return heads, *leaving


PREFILL = Check(
    name="window_prefill",
    files=("window_prefill.metal",),
    dispatches=1,
    example=_prefill_example,
    ours=window_kernels.prefill,
    theirs=_window_attention_ops,
)

DECODE = Check(
    name="window_decode",
    files=("window_decode.metal", "window_decode_merge.metal"),
    dispatches=2,
    example=_decode_example,
    ours=_decode_kernel,
    theirs=_decode_ops,
)
