"""Conversations that decode together: those with slots of one kind are rows of one array.

What a row computes does not depend on the others, bit for bit: products with weights have a fixed
number of rows, every other product is a row's own, and how many slots it attends over follows
from nothing but the tokens it has read.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..ops.ring import Place, place_of
from .cache import GROWTH, AHNCache, BatchAHNCache

Caches = list[AHNCache]
Kind = tuple[int, int | None, int]  # of slots: how many, their bits, in groups of


class RowsCache:
    """One layer of all conversations, during one step of one token each.

    parts: their rows, in order. place: of all, and of padding to the rows that are computed.
    """

    def __init__(self, parts: list[BatchAHNCache], place: Place):
        self.parts, self.place = parts, place
        self.sinks = parts[0].sinks

    def make_mask(self, *args: Any, **options: Any) -> None:
        """None: AHN layers decide visibility themselves."""


class Together:
    """While a conversation is here its caches hold nothing; what they held are rows."""

    def __init__(self) -> None:
        self._groups: dict[Kind, _Group] = {}

    def layers(self, rows: Sequence[Caches], width: int) -> tuple[list[int], list[RowsCache]]:
        """The layers of these conversations, for model(ids [width, 1], cache=...), and which of
        them each row is. Who is not here comes in; who is here and not among them is dropped.

        rows: caches of each, that have read something. width: rows that are computed, at least
        as many.
        """
        new: dict[Kind, list[tuple[Caches, Caches]]] = {}
        for group in self._groups.values():
            group.keep(rows)
            for caches, held in group.grown():
                new.setdefault(_kind(held[0]), []).append((caches, held))
        here = [caches for group in self._groups.values() for caches in group.members]
        here += [caches for moved in new.values() for caches, _ in moved]
        for caches in rows:
            if not _among(here, caches):
                new.setdefault(_kind(caches[0]), []).append((caches, caches))
        for kind, joining in new.items():
            self._groups.setdefault(kind, _Group(kind[0])).join(joining)
        self._groups = {kind: group for kind, group in self._groups.items() if group.members}
        groups = self._groups.values()
        order = [_index(rows, caches) for group in groups for caches in group.members]
        first = next(iter(groups)).layers[0]
        at = [t for group in groups for t in group.layers[0].offsets]
        padded = (*at, *[0] * (width - len(at)))
        place = place_of(padded, None, 1, 1, first.window, first.sinks)
        parts = zip(*(group.layers for group in groups), strict=True)
        return order, [RowsCache(list(layer), place) for layer in parts]

    def held(self) -> list[Any]:
        """Everything that a step has made."""
        return [layer.state for group in self._groups.values() for layer in group.layers]

    def leave(self, caches: Caches) -> None:
        """Give a conversation back what its caches held, if it is here, as they are when nothing
        but its own tokens made them."""
        for group in self._groups.values():
            if _among(group.members, caches):
                row = _index(group.members, caches)
                for cache, copy in zip(caches, group.copied(row), strict=True):
                    cache.offset = copy.offset
                    cache.buffers, cache.memory = copy.buffers, copy.memory
                group.members[row] = []  # nobody's, until the next step drops it

    def clear(self) -> None:
        """Nobody is here any more."""
        self._groups = {}


class _Group:
    """Conversations with slots of one kind; layers are made when the first ones come."""

    def __init__(self, slots: int):
        self.slots = slots
        self.members: list[Caches] = []
        self.layers: list[BatchAHNCache] = []

    def keep(self, rows: Sequence[Caches]) -> None:
        """Drop who is not among these."""
        stay = [i for i, caches in enumerate(self.members) if _among(rows, caches)]
        if len(stay) == len(self.members):
            return
        self.members = [self.members[i] for i in stay]
        for layer in self.layers if stay else []:
            layer.filter(stay)
            mx.eval(layer.state)

    def grown(self) -> list[tuple[Caches, Caches]]:
        """Take out those that need more slots, and what they hold."""
        if not self.members:
            return []
        first = self.layers[0]
        out = [
            (caches, self.copied(i))
            for i, caches in enumerate(self.members)
            if _wanted(first.offsets[i], first.capacity) > self.slots
        ]
        gone = [caches for caches, _ in out]
        self.keep([caches for caches in self.members if not _among(gone, caches)])
        return out

    def join(self, joining: list[tuple[Caches, Caches]]) -> None:
        """Take these in, layer by layer, so that no more than one is there twice."""
        layers = self.layers if self.members else []
        self.layers = []
        for i in range(len(joining[0][1])):
            layer = BatchAHNCache.of([held[i] for _, held in joining], self.slots)
            if layers:
                layers[i].extend(layer)
                layer = layers[i]
            mx.eval(layer.state)
            self.layers.append(layer)
            for _, held in joining:
                held[i].buffers = held[i].memory = held[i]._next = None
        self.members += [caches for caches, _ in joining]

    def copied(self, row: int) -> Caches:
        """What a row holds."""
        return [layer.extract(row) for layer in self.layers]


def _kind(cache: AHNCache) -> Kind:
    return _wanted(cache.offset, cache.capacity), cache.bits, cache.group_size


def _wanted(offset: int, capacity: int) -> int:
    """Slots for so many tokens, the next one and what leaves after it: few sizes, so that few
    shapes are compiled."""
    slots = GROWTH
    while slots < offset + 2:
        slots *= 2
    return min(capacity, slots)


def _index(rows: Sequence[Caches], caches: Caches) -> int:
    """Where these very caches are: all that are here are equal lists."""
    return next(i for i, row in enumerate(rows) if row is caches)


def _among(rows: Sequence[Caches], caches: Caches) -> bool:
    return any(row is caches for row in rows)
