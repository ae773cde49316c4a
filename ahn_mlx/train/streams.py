"""One model as teacher and as student (paper, section 3.2).

The teacher sees all tokens; the student a window, sinks and the memory. Both run the same
frozen layers on their own hidden states, from the same embeddings.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..model.attention import AHNAttention
from ..model.augment import memory_layers
from ..model.cache import AHNCache

# Parameters of memories and routers, by their names in the model.
Parameters = dict[str, mx.array]


class Stream(NamedTuple):
    """hidden: [B, L, C] after the final norm. heads: of each memory layer, [B, H, L, D]
    before o_proj, if they were asked for."""

    hidden: mx.array
    heads: list[mx.array]


def teach(model: nn.Module, tokens: mx.array, keep_heads: bool = False) -> Stream:
    """Full attention over tokens [B, L]."""
    model.eval()
    # A window that nothing leaves.
    return _run(model, tokens, lambda: AHNCache(tokens.shape[1], 0), keep_heads, False)


def study(
    model: nn.Module,
    tokens: mx.array,
    window: int,
    sinks: int,
    keep_heads: bool = False,
    checkpoint: bool = False,
    inference: bool = False,
) -> Stream:
    """Window, sinks and memory over tokens [B, L].

    checkpoint: keep only the input of each layer for the backward pass. inference: there
    will be none; the router, too, then counts as it does when the model is used.
    """
    model.train(not inference)
    return _run(model, tokens, lambda: AHNCache(window, sinks), keep_heads, checkpoint)


def _run(
    model: nn.Module,
    tokens: mx.array,
    cache: Callable[[], AHNCache],
    keep_heads: bool,
    checkpoint: bool,
) -> Stream:
    x = model.model.embed_tokens(tokens)
    kept = []
    for layer in model.layers:
        x, heads = _layer(layer, x, cache, checkpoint)
        if keep_heads and heads is not None:
            kept.append(heads)
    return Stream(model.model.norm(x), kept)


def _layer(
    layer: nn.Module, x: mx.array, cache: Callable[[], AHNCache], checkpoint: bool
) -> tuple[mx.array, mx.array | None]:
    """The layer's output, and its heads where it has a memory."""
    if not isinstance(layer.self_attn, AHNAttention):
        return layer(x, mask="causal"), None

    def forward(parameters: dict[str, Any], x: mx.array) -> tuple[mx.array, mx.array]:
        layer.self_attn.update(parameters)
        heads = layer.self_attn.heads(layer.input_layernorm(x), cache())
        x = x + layer.self_attn.merge(heads)
        return x + layer.mlp(layer.post_attention_layernorm(x)), heads

    if checkpoint:
        forward = mx.checkpoint(forward)
    return forward(layer.self_attn.trainable_parameters(), x)


def trainable(model: nn.Module) -> Parameters:
    """Freeze all but memories and routers, whose parameters are returned."""
    model.freeze()
    for _, attention in memory_layers(model):
        attention.ahn.unfreeze()
        if attention.config.router:
            attention.router.unfreeze()
    flat: Any = tree_flatten(model.trainable_parameters())
    return dict(flat)


def install(model: nn.Module, parameters: Parameters) -> None:
    """Put these parameters into the model."""
    model.update(tree_unflatten(list(parameters.items())))


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """The memory adds nothing in here: a window alone."""
    parameters = trainable(model)
    zeros = {n: mx.zeros_like(x) for n, x in parameters.items() if n.endswith("o_proj.weight")}
    install(model, zeros)
    try:
        yield
    finally:
        install(model, parameters)
