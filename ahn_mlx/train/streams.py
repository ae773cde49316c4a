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
from mlx_lm.models.cache import CacheList

from ..model.attention import AHNAttention
from ..model.augment import hidden_states, memory_layers
from ..model.cache import AHNCache
from ..model.pipeline import is_away

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
    x, calls = walk(model, tokens)
    kept = []
    for layer, call in zip(model.layers, calls, strict=True):
        x, heads = _layer(layer, x, call, cache, checkpoint)
        if keep_heads and heads is not None:
            kept.append(heads)
    return Stream(finish(model, tokens, x), kept)


class Call(NamedTuple):
    """How a model calls one of its layers, beside the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, layer: nn.Module, x: mx.array, cache: AHNCache | None) -> mx.array:
        """The layer's output, where `cache` stands for the one that it was called with."""

        def own(value: Any) -> Any:
            if isinstance(value, tuple):  # of a layer that has several
                return tuple(map(own, value))
            return cache if isinstance(value, AHNCache) else value

        named = {name: own(value) for name, value in self.named.items()}
        out: mx.array = layer(x, *map(own, self.positional), **named)
        return out


def walk(model: nn.Module, tokens: mx.array) -> tuple[mx.array, list[Call]]:
    """What the first layer gets for tokens [B, L], and how each is called."""
    seen: list[mx.array] = []
    calls: list[Call] = []

    def note(x: mx.array, *positional: Any, **named: Any) -> mx.array:
        seen.append(x)
        calls.append(Call(positional, named))
        return x

    caches = [_stand_in(cache) for cache in model.make_cache()]
    _instead(model, tokens, caches, note)
    return seen[0], calls


def _stand_in(cache: Any) -> Any:
    """What is recognised in a layer's arguments; where it has no memory, no cache."""
    if isinstance(cache, CacheList):
        return tuple(map(_stand_in, cache.caches))
    return AHNCache(1, 0) if isinstance(cache, AHNCache) else None


def finish(model: nn.Module, tokens: mx.array, x: mx.array) -> mx.array:
    """What the model makes of the last layer's output."""
    return _instead(model, tokens, None, lambda *_, **__: x)


def _instead(
    model: nn.Module, tokens: mx.array, caches: list[Any] | None, does: Callable[..., mx.array]
) -> mx.array:
    """The model's decoder with something else in place of each layer's work."""
    stands = [_Stand(layer, does) for layer in model.layers]
    return hidden_states(model, tokens, caches, stands)


class _Stand:
    """In a layer's place; whatever the model asks of it, the layer answers."""

    def __init__(self, layer: nn.Module, does: Callable[..., mx.array]):
        self._layer, self._does = layer, does

    def __call__(self, *arguments: Any, **named: Any) -> mx.array:
        return self._does(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _layer(
    layer: nn.Module, x: mx.array, call: Call, cache: Callable[[], AHNCache], checkpoint: bool
) -> tuple[mx.array, mx.array | None]:
    """The layer's output, and its heads where it has a memory."""
    if not isinstance(getattr(layer, "self_attn", None), AHNAttention):
        return call(layer, x, None), None
    if is_away(layer):
        return call(layer, x, cache()), None

    def forward(parameters: dict[str, Any], x: mx.array) -> tuple[mx.array, mx.array]:
        layer.self_attn.update(parameters)
        own = cache()
        own.watched = []
        x = call(layer, x, own)
        return x, own.watched[0].heads

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
