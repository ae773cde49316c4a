"""Conversations that decode together, each with arrays of its own.

What all tokens share, the linear maps, is one product of a fixed number of rows; windows and
memories are stepped one by one. So what a row computes depends on nothing but itself, bit for
bit, and joining or leaving copies nothing. A BatchAHNCache is for hosts that want one array.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..ops.ring import Place, place_of, read_slots
from .cache import GROWTH, AHNCache, grown_to
from .slots import Rows, head_size


class RowsCache:
    """One layer of n conversations, of the same window, during one step of one token each.

    caches: those of the layer. place: of n tokens and of padding to the rows that are computed.
    each: the place of each by itself.
    """

    def __init__(self, caches: list[AHNCache], place: Place, each: list[Place]):
        self.caches, self.place, self.each = caches, place, each
        self.sinks = caches[0].sinks

    def rows(self, n: int) -> Rows:
        """What a conversation finds."""
        cache = self.caches[n]
        if cache._next is None:
            assert cache.buffers is not None
            cache._next = read_slots(cache.buffers, self.each[n].slots)
        assert cache.buffers is not None
        return Rows(cache.buffers, cache._next, cache.memory)

    def make_mask(self, *args: Any, **options: Any) -> None:
        """None: AHN layers decide visibility themselves."""


def together(rows: Sequence[Sequence[AHNCache]], width: int) -> list[RowsCache]:
    """The layers of these conversations, for model(ids [width, 1], cache=...).

    rows: caches of each, that were prepared. width: rows that are computed, at least as many.
    """
    first = rows[0][0]
    window, sinks = first.window, first.sinks
    at = [caches[0].offset for caches in rows]
    each = [
        place_of((n,), None, 1, _slots(caches[0]), window, sinks)
        for n, caches in zip(at, rows, strict=True)
    ]
    padded = (*at, *[0] * (width - len(at)))
    place = place_of(padded, None, 1, 1, window, sinks)
    return [RowsCache(list(layer), place, each) for layer in zip(*rows, strict=True)]


def prepare(caches: Sequence[AHNCache]) -> None:
    """Room for the next token. Slots double up to the window, so that few shapes are compiled."""
    for cache in caches:
        assert cache.buffers is not None
        have = _slots(cache)
        if have > cache.offset or have == cache.capacity:
            wanted = _doubled(cache) if cache.memory is None else have
        else:
            wanted = min(cache.capacity, 2 * have)
        if wanted > have:
            more = [(0, 0), (0, 0), (0, wanted - have), (0, 0)]
            cache.buffers = tuple(mx.pad(x, more) for x in cache.buffers)
            cache._next = None
        if cache.memory is None:
            gates = cache.buffers[-1]
            D = head_size(cache.buffers, cache.bits)
            cache.memory = mx.zeros((gates.shape[0], gates.shape[1], D, D))


def give_back(caches: Sequence[AHNCache]) -> None:
    """As they are when nothing but their own tokens made them: no slots too many, and no
    memory before something has left."""
    for cache in caches:
        slots = grown_to(cache.offset, cache.capacity)
        assert cache.buffers is not None
        if slots < _slots(cache):
            cache.buffers = tuple(mx.contiguous(x[:, :, :slots]) for x in cache.buffers)
        if cache.offset <= cache.capacity:
            cache.memory = None
        cache._next = None


def _slots(cache: AHNCache) -> int:
    assert cache.buffers is not None
    return cache.buffers[0].shape[2]


def _doubled(cache: AHNCache) -> int:
    slots = GROWTH
    while slots <= cache.offset:
        slots *= 2
    return min(cache.capacity, slots)
