"""What a memory file says of caches that mlx-lm gives layers of its own: windows, whose keys stand
in a ring, and the states of recurrences. Both are of fixed size and are written whole, once as they
were after the last full step, and once after the tail."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from ..checkpoints.safetensors import FLOATS, WRITTEN
from ..errors import show
from .caches import Own, held
from .shapes import ANY, Found, Wanted, exactly

# Names of the kinds in a file.
ROTATING, STATES = "rotating", "states"
MOST = 8  # states of a layer


def kind_of(cache: Any) -> str | None:
    """How a file calls such a cache; None: it has another description there."""
    if isinstance(cache, RotatingKVCache):
        return ROTATING
    return STATES if isinstance(cache, ArraysCache) else None


def is_entry(value: list[Any]) -> bool:
    """[rotating, B, size, keep, place] and perhaps the place after the tail; or [states, B, n]."""
    kind, *numbers = value
    if not isinstance(kind, str):
        return False
    whole = all(type(n) is int and 0 <= n <= 1 << 30 for n in numbers)
    if kind == STATES:
        return whole and len(numbers) == 2 and 1 <= numbers[1] <= MOST
    return whole and kind == ROTATING and len(numbers) in (4, 5)


def entry(cache: Any, tokens: int, after: Any = None) -> list[Any]:
    """What a file says of a cache after so many tokens. after: the same after the tail."""
    if isinstance(cache, ArraysCache):
        return [STATES, tokens, len(cache.cache)]
    places = [c._idx for c in (cache, after) if c is not None]
    return [ROTATING, tokens, cache.max_size, cache.keep, *places]


def right(layer: list[Any], offset: int, tail: int) -> list[Any]:
    """The entry, where the numbers that follow from others are what they must be."""
    if layer[0] == STATES:
        return [STATES, offset, layer[2]]
    places = [*layer[4:], 0][: 2 if tail else 1]
    return [ROTATING, offset, max(1, layer[2]), layer[3], *places]


def of_one_token(cache: Any) -> tuple[Wanted, ...]:
    """Its arrays once it has read one token."""
    arrays = held(cache)
    if isinstance(cache, ArraysCache) and len(arrays) < len(cache.cache):
        raise ValueError("it has states that one token does not begin")
    return tuple(Wanted((WRITTEN[x.dtype],), tuple(map(exactly, x.shape))) for x in arrays)


def of_any(layer: list[Any]) -> tuple[Wanted, ...]:
    """Its arrays as far as they can be told without the model."""
    if layer[0] == STATES:
        return (Wanted(FLOATS, None),) * layer[2]
    return (Wanted(FLOATS, (exactly(1), ANY, ANY, ANY)),) * 2


def arrays(
    name: str, layer: list[Any], kept: tuple[Wanted, ...], tokens: int, step: int
) -> dict[str, Wanted]:
    """Those after so many tokens, by name."""
    if not tokens:
        return {}
    if layer[0] == ROTATING:
        # In what comes as a chunk each token sees a whole window; what comes alone has a ring.
        slots = range(min(tokens, layer[2]), layer[2] + step)
        kept = tuple(Wanted(d, (*s[:2], slots, s[3])) for d, s in kept if s is not None)
    return {f"{name}{j}": wanted for j, wanted in enumerate(kept)}


def check_place(
    name: str, layer: list[Any], place: int, tokens: int, found: Mapping[str, Found]
) -> None:
    """Raise ValueError unless the ring's next slot is one of it."""
    if not tokens:
        fits = place == 0
    else:
        slots = found[f"{name}0"][1][2]
        full = tokens >= slots
        fits = place == slots or (full and 1 <= place < slots <= layer[2])
        fits = fits if full else place == tokens and slots <= layer[2]
    if not fits:
        raise ValueError(f"{name.rstrip('.')} is at slot {show(place)}, which it has not")


def restored(
    layer: list[Any], tokens: int, arrays: tuple[mx.array, ...], place: int | None = None
) -> Own:
    """The cache that they are of, from what has been checked."""
    if layer[0] == STATES:
        states: Any = ArraysCache(layer[2])
        if arrays:
            states.cache = list(arrays)
        return states
    ring = RotatingKVCache(layer[2], layer[3])
    if arrays:
        ring.keys, ring.values = arrays
        ring.offset, ring._idx = tokens, layer[4] if place is None else place
    return ring
