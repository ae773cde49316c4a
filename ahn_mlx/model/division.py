"""How a model is divided among ranks: by heads, or by layers. Numbers alone, so that what a rank
would hold and send can be counted without a model."""

from ..errors import AHNError


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
