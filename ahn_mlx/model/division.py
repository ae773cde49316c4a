"""How a model is divided among ranks: by heads, or by layers. Numbers alone, so that what a rank
would hold and send can be counted without a model."""

from typing import NamedTuple

from ..errors import AHNError


class Part(NamedTuple):
    """Of an array: indices start ... stop - 1 of an axis, filled up with zeros to `size`."""

    axis: int
    start: int
    stop: int
    size: int


def part_of(whole: tuple[int, ...], held: tuple[int, ...], rank: int) -> Part | None:
    """What a rank has, if it is one of equal parts along the axis that is shorter than in the
    whole; None if several are, or none.

    >>> from ahn_mlx.model.division import part_of
    >>> part_of((5, 8), (3, 8), 1)
    Part(axis=0, start=3, stop=5, size=3)
    """
    axes = [i for i, (a, b) in enumerate(zip(whole, held, strict=True)) if a != b]
    if len(axes) != 1:
        return None
    length, size = whole[axes[0]], held[axes[0]]
    return Part(axes[0], min(rank * size, length), min((rank + 1) * size, length), size)


def heads_of_each(kv_heads: int, ranks: int) -> int:
    """Key/value heads of each rank. Raises AHNError if they cannot have as many.

    >>> from ahn_mlx.model.division import heads_of_each
    >>> heads_of_each(8, 2)
    4
    """
    if kv_heads % ranks == 0:
        return kv_heads // ranks
    fits = [str(n) for n in range(2, kv_heads + 1) if kv_heads % n == 0]
    mend = f"start {' or '.join(fits)}, or take --pipeline" if fits else "take --pipeline"
    raise AHNError(f"{kv_heads} key/value heads cannot be divided among {ranks} ranks; {mend}")


def rows_of_each(vocabulary: int, ranks: int) -> int:
    """Rows of the embedding that each rank has; the last one's are filled up with zeros."""
    return -(-vocabulary // ranks)


def layers_of_each(layers: int, ranks: int) -> list[range]:
    """The layers of each rank; rank 0 has the last ones. Raises AHNError if there are too few.

    >>> from ahn_mlx.model.division import layers_of_each
    >>> layers_of_each(30, 4)
    [range(22, 30), range(14, 22), range(7, 14), range(0, 7)]
    """
    if ranks > layers:
        raise AHNError(f"{layers} layers cannot be run by {ranks} ranks; start at most {layers}")
    even, more = divmod(layers, ranks)
    found, end = [], layers
    for rank in range(ranks):
        first = end - even - (rank < more)
        found.append(range(first, end))
        end = first
    return found
