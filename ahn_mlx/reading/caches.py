"""The caches of a model one by one: ours, mlx-lm's where attention is full, and those of its own
that layers with a window or a recurrence keep. A layer may have several, as a list."""

import copy
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from ..errors import AHNError
from ..model.cache import AHNCache

# Of layers without a memory that never saw all tokens.
Own = RotatingKVCache | ArraysCache

Cache = AHNCache | KVCache | Own


def make_caches(model: nn.Module, kv_bits: int | None = None, group_size: int = 64) -> list[Any]:
    """Empty ones of each layer. Only windows are quantized, not full attention."""
    caches: list[Any] = model.make_cache()
    if odd := [type(c).__name__ for c in each(caches) if not isinstance(c, Cache)]:
        raise AHNError(
            f"a {model.args.model_type} model has caches ({odd[0]}) that cannot be saved with a"
            " text; generate and compare run it"
        )
    if model.ranks is not None and model.own_layers:
        raise AHNError(
            f"a {model.args.model_type} model has caches of mlx-lm's own, which several processes"
            " cannot divide; run it in one"
        )
    return caches if kv_bits is None else quantized(caches, kv_bits, group_size)


def quantized(caches: list[Any], bits: int, group_size: int) -> list[Any]:
    """The same, with windows of so many bits."""
    windows = (
        c.to_quantized(group_size, bits) if isinstance(c, AHNCache) else c for c in each(caches)
    )
    return joined(caches, windows)


def each(caches: Iterable[Any]) -> list[Any]:
    """All of them, those of a list one after the other."""
    return [
        one
        for cache in caches
        for one in (each(cache.caches) if isinstance(cache, CacheList) else [cache])
    ]


def joined(like: Iterable[Any], parts: Iterable[Any]) -> list[Any]:
    """What `each` takes apart, put together again."""
    rest = iter(parts)

    def fill(caches: Iterable[Any]) -> list[Any]:
        return [
            CacheList(*fill(c.caches)) if isinstance(c, CacheList) else next(rest) for c in caches
        ]

    return fill(like)


def held(cache: Cache) -> tuple[mx.array, ...]:
    """Of a window: keys, values and gates, each of the first two three arrays if quantized; of
    attention, keys and values; of a recurrence, its states. Nothing before the first token."""
    if isinstance(cache, AHNCache):
        return cache.buffers or ()
    if isinstance(cache, ArraysCache):
        states: list[Any] = [*cache.cache]
        return tuple(x for x in states if x is not None)
    keys, values = cache.keys, cache.values
    return () if keys is None or values is None else (keys, values)


def most_bytes(cache: Own, step: int) -> int:
    """What a cache of mlx-lm's own, which has read a token, will hold at most when it reads so many
    at a time."""
    if isinstance(cache, ArraysCache):
        return sum(x.nbytes for x in held(cache))
    return sum(x.nbytes // x.shape[2] * (cache.max_size + step) for x in held(cache))


def fork(caches: Iterable[Any]) -> list[Any]:
    """Caches of their own on the same arrays: MLX copies a buffer that two of them hold
    before one writes to it."""
    return [_forked(cache) for cache in caches]


def _forked(cache: Any) -> Any:
    other = copy.copy(cache)
    if isinstance(other, CacheList):
        other.caches = tuple(fork(cache.caches))
    elif isinstance(other, ArraysCache):
        states: Any = [None if x is None else mx.array(x) for x in cache.cache]
        other.cache = states
    elif isinstance(other, KVCache | RotatingKVCache) and not other.empty():
        # It assigns to slices, which changes the very array object.
        other.keys, other.values = mx.array(cache.keys), mx.array(cache.values)
    return other
