"""A first memory without a backward pass: each layer on its own.

What a head misses is the difference between full attention and its window, at the
teacher's own hidden states. Gates start at small constants; the output matrix of each
head is then the ridge regression of that difference on what the memory reads.
"""

import math
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ..attention import AHNAttention
from ..cache import AHNCache
from .data import Sequences
from .streams import memory_layers

# Write strength, and log decay per token from head to head: the output norm hides how
# full a memory is, so that one that fills slowly is read the same, and keeps more.
STRENGTH = 0.1
DECAYS = (1e-4, 1e-3)

# Ridge, as a part of the mean square of what is read.
RIDGE = 0.5


def fit(model: nn.Module, data: Sequences, count: int, window: int, sinks: int) -> float:
    """Set all parameters of the memories from the first `count` sequences, in place.

    Returns the part of the squared difference that the memories explain, over all layers.
    """
    model.eval()
    layers = dict(memory_layers(model))
    _start(model, layers, data[0])
    sums: dict[int, tuple[mx.array, ...]] = {}
    for n in tqdm(range(count), desc="layer-wise", unit=" seq", disable=not sys.stderr.isatty()):
        x = model.model.embed_tokens(data[n])
        for i, layer in enumerate(model.layers):
            if i not in layers:
                x = layer(x, mask="causal")
            else:
                h = layer.input_layernorm(x)
                full = layers[i].heads(h, AHNCache(h.shape[1], 0))
                new = _products(layers[i], h, full, window, sinks)
                sums[i] = tuple(a + b for a, b in zip(sums[i], new, strict=True)) if n else new
                x = x + layers[i].merge(full)
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            mx.eval(x, sums.get(i, ()))
    explained, total = mx.zeros(()), mx.zeros(())
    for i, attention in layers.items():
        weight, part = _solve(*sums[i])
        attention.ahn.o_proj.weight = weight
        explained, total = explained + part, total + sums[i][2]
    return float((explained / total).item())  # type: ignore[arg-type]


def _start(model: nn.Module, layers: dict[int, AHNAttention], tokens: mx.array) -> None:
    """Constant gates. Where a projection has no bias, the mean hidden state stands in."""
    x = model.model.embed_tokens(tokens)
    for i, layer in enumerate(model.layers):
        if i in layers:
            h = layer.input_layernorm(x)[0].astype(mx.float32)
            mean = h.mean(axis=0)
            _constant_gates(layers[i].ahn, mean / mean.square().sum())
        x = layer(x, mask="causal", cache=AHNCache(x.shape[1], 0) if i in layers else None)
        mx.eval(x)


def _constant_gates(memory: Any, direction: mx.array) -> None:
    """direction [C]: its product with a hidden state is 1 on average."""
    H, D = memory.o_proj.weight.shape[:2]
    slow, fast = (math.log(rate) for rate in DECAYS)
    decays = mx.exp(mx.linspace(slow, fast, H))
    if memory.kind == "mamba2":
        memory.dt_proj.weight = mx.zeros_like(memory.dt_proj.weight)
        memory.dt_bias = mx.full(H, math.log(math.expm1(STRENGTH)))
        memory.A_log = mx.log(decays / STRENGTH)
        memory.g_proj.weight = mx.zeros_like(memory.g_proj.weight)
        memory.g_proj.bias = mx.ones(H)
    else:
        logit = math.log(STRENGTH / (1 - STRENGTH))
        memory.b_proj.weight = mx.repeat(logit * direction[None], H, axis=0)
        memory.g_proj.weight = mx.repeat(direction[None], H, axis=0)
    if memory.kind == "gated_deltanet":
        memory.a_proj.weight = mx.zeros_like(memory.a_proj.weight)
        memory.dt_bias = mx.log(mx.expm1(decays))
        memory.A_log = mx.zeros(H)
    # The identity, for _products to see what the output matrix will get.
    memory.o_proj.weight = mx.broadcast_to(mx.eye(D), (H, D, D))


def _products(
    attention: AHNAttention, h: mx.array, full: mx.array, window: int, sinks: int
) -> tuple[mx.array, ...]:
    """For the tokens beyond window and sinks: X^T X and X^T Y [H, D, D] of what each head
    reads and misses, and the square of the latter."""
    far = slice(window + sinks, None)
    weight = attention.ahn.o_proj.weight
    with_memory = attention.heads(h, AHNCache(window, sinks))
    attention.ahn.o_proj.weight = mx.zeros_like(weight)
    local = attention.heads(h, AHNCache(window, sinks))
    attention.ahn.o_proj.weight = weight
    read, missed = ((a - local)[:, :, far].astype(mx.float32) for a in (with_memory, full))
    readT = read.swapaxes(-1, -2)
    return (readT @ read).sum(axis=0), (readT @ missed).sum(axis=0), missed.square().sum()


def _solve(xx: mx.array, xy: mx.array, yy: mx.array) -> tuple[mx.array, mx.array]:
    """Output matrices [H, D, D], and how much of the missed squares they explain."""
    H, D, _ = xx.shape
    diagonal = mx.diagonal(xx, axis1=-2, axis2=-1).mean(axis=-1)
    ridge = xx + (RIDGE * diagonal + 1e-9)[:, None, None] * mx.eye(D)
    weight = mx.linalg.solve(ridge, xy, stream=mx.cpu)
    explained = 2 * (weight * xy).sum() - (weight * (xx @ weight)).sum()
    return weight, explained
