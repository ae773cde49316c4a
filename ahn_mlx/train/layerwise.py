"""A first memory without a backward pass through the network: each layer on its own.

What a head misses is the difference between full attention and its window, at the
teacher's own hidden states. What far queries look at is written most (delta rules), and
queries lose what all keys have in common (where they have a projection). The output matrix
of each head is then the ridge regression of that difference on what the memory reads, and
its output gate, where it is a factor, says for which tokens that helps.
"""

import math
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from tqdm import tqdm

from ..memory.layers import GateProjection
from ..model.attention import AHNAttention
from ..model.augment import memory_layers
from ..model.cache import AHNCache
from ..ops.exp import exp
from .data import Sequences
from .streams import walk

# Write strength of a token that is looked at as much as the mean, and its bounds.
STRENGTH, STRENGTHS = 0.1, (0.002, 0.95)

# Log decay per token, from head to head.
DECAYS = (1e-4, 1e-3)

# Queries at a time whose attention is looked at.
ROWS = 256

# Ridge, as a part of the mean square of what is read.
RIDGE = 0.2

# Of Adam over all tokens at once; more of it fits the gates to these texts only.
GATE_STEPS, GATE_RATE = 60, 0.03

# What opens an output gate: silu(OPEN) = 1.
OPEN = 1.27846454


def fit(model: nn.Module, data: Sequences, count: int, window: int, sinks: int) -> float:
    """Set all parameters of the memories from the first `count` sequences, in place.

    Returns the part of the squared difference that the memories explain, over all layers.
    """
    model.eval()
    layers = dict(memory_layers(model))
    begun = [walk(model, data[n]) for n in range(count)]
    streams, calls = [x for x, _ in begun], [how for _, how in begun]
    explained, total = mx.zeros(()), mx.zeros(())
    progress = tqdm(
        model.layers, desc="layer-wise", unit=" layers", disable=not sys.stderr.isatty()
    )
    for i, layer in enumerate(progress):
        caches = []
        for n, x in enumerate(streams):
            cache = AHNCache(x.shape[1], 0)  # a window that nothing leaves
            cache.watched = []
            streams[n] = calls[n][i](layer, x, cache)
            caches.append(cache)
        if i in layers:
            watched = [cache.watched[0] for cache in caches if cache.watched]
            normed, full = [w.x for w in watched], [w.heads for w in watched]
            mx.eval(full)
            parts = _fit_layer(layers[i], normed, full, window, sinks)
            explained, total = explained + parts[0], total + parts[1]
        mx.eval(streams, explained, total)
    return float((explained / total).item())  # type: ignore[arg-type]


def _fit_layer(
    attention: AHNAttention,
    normed: list[mx.array],
    full: list[mx.array],
    window: int,
    sinks: int,
) -> tuple[mx.array, mx.array]:
    """normed: [1, L, C] of each sequence, full: [1, H, L, D]. Returns how much of the squares
    that the window misses the memory explains, and all of them."""
    memory, far = attention.ahn, slice(window + sinks, None)
    h = mx.concatenate([x[0, far] for x in normed]).astype(mx.float32)
    mean = h.mean(axis=0)
    # Where a projection has no bias, the mean hidden state stands in.
    _constant_gates(memory, mean / mean.square().sum())
    if memory.kind != "mamba2":
        memory.b_proj.weight = _write_what_is_looked_at(attention, normed, window, sinks)
    if attention.config.query_projection:
        memory.q_proj.weight = _without_common_key(attention, normed, window)
    read, missed = zip(
        *(_read(attention, x, y, window, sinks) for x, y in zip(normed, full, strict=True)),
        strict=True,
    )
    projected = attention.config.query_projection
    weight = _scaled_identity(read, missed) if projected else _matrices(read, missed, projected)
    if memory.kind != "mamba2":  # there, the norm comes after the gate
        ungated = read
        for _ in range(2):
            gate = _fit_gate(memory.g_proj.weight, h, ungated, missed, weight)
            memory.g_proj.weight = gate
            read = _gated(ungated, normed, gate, far)
            weight = _matrices(read, missed, projected)
    memory.o_proj.weight = weight
    left = [(m - r @ weight).square().sum() for r, m in zip(read, missed, strict=True)]
    total = mx.stack([m.square().sum() for m in missed]).sum()
    return total - mx.stack(left).sum(), total


def _constant_gates(memory: Any, direction: mx.array) -> None:
    """direction [C]: its product with a hidden state is 1 on average."""
    H = memory.o_proj.weight.shape[0]
    slow, fast = (math.log(rate) for rate in DECAYS)
    decays = mx.exp(mx.linspace(slow, fast, H))
    if memory.kind == "mamba2":
        memory.dt_proj.weight = mx.zeros_like(memory.dt_proj.weight)
        memory.dt_bias = mx.full(H, math.log(math.expm1(STRENGTH)))
        memory.A_log = mx.log(decays / STRENGTH)
        memory.g_proj.weight = mx.zeros_like(memory.g_proj.weight)
        memory.g_proj.bias = mx.full(H, OPEN)
    else:
        memory.g_proj.weight = mx.repeat(direction[None], H, axis=0)
    if memory.kind == "gated_deltanet":
        memory.a_proj.weight = mx.zeros_like(memory.a_proj.weight)
        memory.dt_bias = mx.log(mx.expm1(decays))
        memory.A_log = mx.zeros(H)


def _write_what_is_looked_at(
    attention: AHNAttention, normed: list[mx.array], window: int, sinks: int
) -> mx.array:
    """b_proj [H, C]: ridge regression of the log odds of each token's write strength, which
    grows with the squared attention that it gets once it has left the window."""
    leaving = [x[0, sinks:-window].astype(mx.float32) for x in normed]
    looked = mx.concatenate([_looked_at(attention, x, window, sinks) for x in normed], axis=1)
    strength = STRENGTH * looked / (looked.mean(axis=1, keepdims=True) + 1e-9)
    strength = mx.clip(strength, *STRENGTHS)
    h = mx.concatenate(leaving)
    odds = mx.log(strength / (1 - strength)).T
    hh = h.T @ h
    ridge = hh + 0.02 * mx.diagonal(hh).mean() * mx.eye(hh.shape[0])
    return mx.linalg.solve(ridge, h.T @ odds, stream=mx.cpu).T


def _looked_at(attention: AHNAttention, h: mx.array, window: int, sinks: int) -> mx.array:
    """h [1, L, C] -> [H, L - window - sinks] float32: by how much, squared and summed over
    the queries beyond the window, full attention looks at each token between sinks and window."""
    q, k = attention.project(h)[:2]
    q, k = attention.fit.turn_queries(attention, q, 0), attention.fit.turn_keys(attention, k, 0)
    L, D = q.shape[2:]
    H, groups = k.shape[1], q.shape[1] // k.shape[1]
    q, key = q[0].reshape(H, groups, L, D), mx.arange(L)
    squares = mx.zeros((H, groups, L))
    for first in range(window + sinks, L, ROWS):
        query = mx.arange(first, min(L, first + ROWS))[:, None]
        scores = q[:, :, first : first + ROWS] @ k[0, :, None].swapaxes(-1, -2)
        scores = (scores * attention.scale).astype(mx.float32)
        if attention.logits is not None:
            scores = attention.logits.capped(scores)
        scores = mx.where(key <= query, scores, -mx.inf)
        mass = exp(scores - scores.max(axis=-1, keepdims=True))
        p = mx.where(key <= query - window, mass / mass.sum(axis=-1, keepdims=True), 0)
        squares = squares + p.square().sum(axis=2)
        mx.eval(squares)
    return squares.reshape(-1, L)[:, sinks : L - window]


def _without_common_key(attention: AHNAttention, normed: list[mx.array], window: int) -> mx.array:
    """q_proj [H, D, D] that takes the mean key, as seen from afar, out of a raw query.

    Softmax ignores what all keys share; a linear memory answers to it, and to little else.
    """
    means = [attention.project(x)[1].astype(mx.float32).mean(axis=2) for x in normed]
    mean = mx.stack(means).mean(axis=0)
    # Seen from position 0, the keys that have left the window stand at -L ... -window - 1.
    L = normed[0].shape[1]
    there = mx.repeat(mean[:, :, None], L - window, axis=2)
    seen = attention.turn(there, -L).mean(axis=2)[0]
    seen = seen / mx.linalg.norm(seen, axis=-1, keepdims=True)
    keep = mx.eye(seen.shape[-1]) - seen[:, :, None] * seen[:, None]
    return mx.repeat(keep, attention.n_heads // attention.n_kv_heads, axis=0)


def _read(
    attention: AHNAttention, h: mx.array, full: mx.array, window: int, sinks: int
) -> tuple[mx.array, mx.array]:
    """For the tokens beyond window and sinks, [H, T, D] float32: what the output matrix of
    each head gets with its gate open, and what the head misses."""
    memory, far = attention.ahn, slice(window + sinks, None)
    H, D = memory.o_proj.weight.shape[:2]
    gate, memory.g_proj = memory.g_proj, _open(h.shape[-1], H)
    memory.o_proj.weight = mx.broadcast_to(mx.eye(D), (H, D, D))
    with_memory = attention.heads(h, AHNCache(window, sinks))
    memory.g_proj, memory.o_proj.weight = gate, mx.zeros((H, D, D))
    local = attention.heads(h, AHNCache(window, sinks))
    read, missed = ((a - local)[0, :, far].astype(mx.float32) for a in (with_memory, full))
    mx.eval(read, missed)
    return read, missed


def _open(hidden: int, heads: int) -> GateProjection:
    """A gate that is 1 for every token."""
    gate = GateProjection(hidden, heads, bias=True)
    gate.weight, gate.bias = mx.zeros_like(gate.weight), mx.full(heads, OPEN)
    return gate


def _matrices(
    read: tuple[mx.array, ...], missed: tuple[mx.array, ...], projected: bool
) -> mx.array:
    """Output matrices [H, D, D]: ridge regression towards zero, or the scaled identity."""
    towards = _scaled_identity(read, missed) if projected else mx.zeros(())
    pairs = [(r.swapaxes(-1, -2), r, m) for r, m in zip(read, missed, strict=True)]
    xx = sum((rT @ r for rT, r, _ in pairs), mx.zeros(()))
    xy = sum((rT @ (m - r @ towards if projected else m) for rT, r, m in pairs), mx.zeros(()))
    diagonal = mx.diagonal(xx, axis1=-2, axis2=-1).mean(axis=-1)
    ridge = xx + (RIDGE * diagonal + 1e-9)[:, None, None] * mx.eye(xx.shape[-1])
    return towards + mx.linalg.solve(ridge, xy, stream=mx.cpu)


def _scaled_identity(read: tuple[mx.array, ...], missed: tuple[mx.array, ...]) -> mx.array:
    """[H, D, D]. What is read are values, and so is what is missed."""
    both = mx.stack([(r * m).sum(axis=(1, 2)) for r, m in zip(read, missed, strict=True)])
    squares = mx.stack([r.square().sum(axis=(1, 2)) for r in read])
    scale = both.sum(axis=0) / (squares.sum(axis=0) + 1e-9)
    return scale[:, None, None] * mx.eye(read[0].shape[-1])


def _gated(
    read: tuple[mx.array, ...], normed: list[mx.array], w: mx.array, far: slice
) -> tuple[mx.array, ...]:
    """read [H, T, D] times the gates of projection w [H, C]."""
    gates = [nn.silu(x[0, far].astype(mx.float32) @ w.T).T for x in normed]
    return tuple(r * g[..., None] for r, g in zip(read, gates, strict=True))


def _fit_gate(
    start: mx.array,
    h: mx.array,
    read: tuple[mx.array, ...],
    missed: tuple[mx.array, ...],
    weight: mx.array,
) -> mx.array:
    """Projections [H, C] of h [N, C] whose silu, times read @ weight, is closest to missed."""
    outputs = [r @ weight for r in read]
    squares = mx.concatenate([y.square().sum(axis=-1) for y in outputs], axis=1).T
    products = [(y * m).sum(axis=-1) for y, m in zip(outputs, missed, strict=True)]
    scale = squares.mean(axis=0) + 1e-9
    squares, product = squares / scale, mx.concatenate(products, axis=1).T / scale

    def loss(w: mx.array) -> mx.array:
        gate = nn.silu(h @ w.T)
        return (gate * (squares * gate - 2 * product)).mean(axis=0).sum()

    w, optimizer = {"w": start}, optim.Adam(GATE_RATE, bias_correction=True)
    for _ in range(GATE_STEPS):
        w = optimizer.apply_gradients({"w": mx.grad(loss)(w["w"])}, w)
        mx.eval(w, optimizer.state)
    return w["w"]
