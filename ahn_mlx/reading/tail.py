"""The tail of what was read: tokens after the last full step, and how caches go back before them.

Caches hold the tail. Beside it each layer keeps what the tail has overwritten, so that more can be
read from the last full step on, and a file can have both states.
"""

import copy
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..model.cache import AHNCache, grown_to
from ..model.trace import Trace
from ..ops.ring import read_slots, slot_of, stay, write_slots
from .caches import Cache, Own, fork, held

Buffers = tuple[mx.array, ...]
Plain = AHNCache | KVCache  # that are no layer's own


class Before(NamedTuple):
    """One layer before the tail. offset: tokens. room: slots of its buffers. contents: of the
    slots among these that the tail changes, [1, heads, n, width] of each buffer."""

    offset: int
    room: int
    contents: Buffers
    memory: mx.array | None
    trace: Trace | None


class Tail(NamedTuple):
    """Ids of the tokens since the last full step, and each cache before them; all of it where it
    is mlx-lm's own, whose size is fixed."""

    ids: tuple[int, ...] = ()
    before: tuple[Before | Cache, ...] = ()


def before(cache: Cache, n: int) -> Before | Cache:
    """What undo needs once n more tokens have come. It is computed before the call returns."""
    if isinstance(cache, Own):
        past: Cache = fork([cache])[0]
        mx.eval(held(past))
        return past
    buffers = held(cache)
    room = buffers[0].shape[2] if buffers else 0
    slots = [slot for slot in _slots(cache, cache.offset, cache.offset + n) if slot < room]
    contents = read_slots(buffers, mx.array([slots])) if slots else ()
    mx.eval(contents)  # else the buffers could not be written in place
    return Before(cache.offset, room, contents, *_memory(cache))


def undo(cache: Cache, past: Before | Cache) -> Cache:
    """Another cache: this one before the tail."""
    if not isinstance(past, Before):
        other: Cache = fork([past])[0]
        return other
    assert isinstance(cache, AHNCache | KVCache)
    slots = [slot for slot in _slots(cache, past.offset, cache.offset) if slot < past.room]
    buffers = tuple(x[:, :, : past.room] for x in held(cache)) if past.room else ()
    return _with(cache, past.offset, _put(buffers, past.contents, slots), past.memory, past.trace)


def changed(cache: Plain, offset: int) -> Buffers:
    """What is kept of the tokens from `offset` on, in their order, of each buffer."""
    return read_slots(held(cache), mx.array([_slots(cache, offset, cache.offset)]))


def redo(
    cache: Plain, n: int, tokens: Buffers, memory: mx.array | None, trace: Trace | None
) -> Cache:
    """Another cache: this one after a tail of n tokens. tokens: as `changed` gives them.
    memory, trace: after it, None if it changed neither."""
    end = cache.offset + n
    if isinstance(cache, KVCache):
        other = type(cache)()
        if not cache.empty():
            other.state = (*map(mx.array, held(cache)), cache.offset)  # it changes these
        other.update_and_fetch(*tokens)
        return other
    slots = grown_to(min(end, cache.capacity), cache.capacity)
    buffers = held(cache) or tuple(x[:, :, :0] for x in tokens)
    buffers = tuple(
        mx.pad(x, [(0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)])
        if x.shape[2]
        else mx.zeros((*x.shape[:2], slots, x.shape[3]), dtype=x.dtype)
        for x in buffers
    )
    buffers = _put(buffers, tokens, _slots(cache, cache.offset, end))
    held_memory, held_trace = _memory(cache)
    return _with(
        cache,
        end,
        buffers,
        held_memory if memory is None else memory,
        held_trace if trace is None else trace,
    )


def _slots(cache: Plain, first: int, end: int) -> list[int]:
    """Where those of the tokens first ... end - 1 are that stay until the last of them."""
    if isinstance(cache, KVCache):
        return list(range(first, end))
    window, sinks = cache.window, cache.sinks
    return [slot_of(token, window, sinks) for token in stay(first, end, window, sinks)]


def _put(buffers: Buffers, contents: Buffers, slots: list[int]) -> Buffers:
    return write_slots(buffers, contents, mx.array([slots])) if slots else buffers


def _memory(cache: Plain) -> tuple[mx.array | None, Trace | None]:
    return (cache.memory, cache.trace) if isinstance(cache, AHNCache) else (None, None)


def _with(
    cache: Plain, offset: int, buffers: Buffers, memory: mx.array | None, trace: Trace | None
) -> Cache:
    """A cache with the settings of this one."""
    if isinstance(cache, KVCache):
        full = type(cache)()
        if buffers:
            full.state = (*buffers, offset)
        return full
    other = copy.copy(cache)
    other.trace = trace
    other.state = (
        memory,
        offset,
        *(cache.window, cache.sinks, cache.bits, cache.group_size),
        *buffers,
    )
    return other
