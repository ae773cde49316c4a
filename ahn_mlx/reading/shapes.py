"""Dtypes and shapes that arrays of a file may have, compared with those that they have."""

from typing import NamedTuple

from ..checkpoints.safetensors import MAX_DIM

# Dtype, as a file names it, and shape.
Found = tuple[str, tuple[int, ...]]


class Wanted(NamedTuple):
    """Allowed dtypes, as a file names them, and sizes of each dimension; None: any shape."""

    dtypes: tuple[str, ...]
    shape: tuple[range, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return " or ".join(self.dtypes)
        sizes = (f"{r[0]}" if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in self.shape)
        return f"{' or '.join(self.dtypes)} [{', '.join(sizes)}]"


def exactly(n: int) -> range:
    return range(n, n + 1)


ANY = range(1, MAX_DIM + 1)


def compare(name: str, found: dict[str, Found], wanted: Wanted) -> None:
    """Raise ValueError unless the array is there and is like this."""
    if name not in found:
        raise ValueError(f"array {name} is missing")
    (dtype, shape), sizes = found[name], wanted.shape
    fits = sizes is None or (
        len(shape) == len(sizes) and all(n in r for n, r in zip(shape, sizes, strict=True))
    )
    if dtype not in wanted.dtypes or not fits:
        raise ValueError(f"array {name} is {dtype} {list(shape)}, not {wanted}")
