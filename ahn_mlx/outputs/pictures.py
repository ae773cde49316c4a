"""Pictures as files, drawn by matplotlib where it is installed."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AHNError
from ..platform import pip_install
from .files import OutFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a picture of ours says of itself: matplotlib's name for that, and its bytes in the file.
MARKS = {
    ".png": ("Software", b"tEXtSoftware\0ahn-mlx"),
    ".svg": ("Creator", b"<dc:title>ahn-mlx</dc:title>"),
    ".pdf": ("Creator", b"/Creator (ahn-mlx)"),
}
LARGEST = 1 << 26  # bytes of a file that may be a picture


def picture(path: Path, reads: tuple[Path, ...] = (), force: bool | None = None) -> OutFile:
    """A picture that can be written. Raises AHNError if it cannot, or without matplotlib."""
    check_drawing(str(path))
    out = OutFile(path, "a picture of ours", is_picture, reads, force, tuple(MARKS))
    out.check()
    return out


def check_drawing(what: str) -> None:
    """Raise AHNError, which says what helps, unless pictures can be drawn here: before hours of
    work that end in one."""
    figure = new_figure(1, 1, what)
    with _drawing(what):
        figure.subplots()  # its axes have numbers
        figure.savefig(io.BytesIO())


def is_picture(file: Path) -> bool:
    """Whether a file is a picture that we have written."""
    if file.suffix.lower() not in MARKS or file.stat().st_size > LARGEST:
        return False
    return MARKS[file.suffix.lower()][1] in file.read_bytes()


def new_figure(width: float, height: float, what: str = "a picture") -> "Figure":
    """An empty figure, in inches. Raises AHNError without a matplotlib that works."""
    with _drawing(what):
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height), layout="constrained")


def save_picture(figure: "Figure", out: OutFile, dpi: int = 150) -> None:
    """Draw it into its file. Raises AHNError if it cannot be drawn or written."""
    kind = out.path.suffix.lower()
    metadata: dict[str, Any] = {MARKS[kind][0]: "ahn-mlx"}
    with out.writing() as part, part.open("wb") as file, _drawing(str(out.path)):
        figure.savefig(file, format=kind[1:], dpi=dpi, metadata=metadata)


@contextmanager
def _drawing(what: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise AHNError(f"{what} needs matplotlib: {pip_install('matplotlib')}") from None
    except OSError:  # the file's
        raise
    except Exception as e:  # whatever fonts, backends and settings make of it
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise AHNError(f"{what}: matplotlib cannot draw it ({reason})") from None
