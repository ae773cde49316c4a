"""A file on its way out: it is judged before the work begins, written beside its final name
and takes it when complete. Nothing is replaced that the command did not make, or that it reads."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import AHNError, is_utf8, show
from .parts import is_part, new_part


@dataclass(frozen=True)
class OutFile:
    """A file to be written.

    kind: what may be replaced, in words, and is_ours: whether a file is that. reads: files
    and directories that are read meanwhile. force: replace other files too, but none of
    those; None if there is no such option. endings: one of which the name must have, if any.
    """

    path: Path
    kind: str
    is_ours: Callable[[Path], bool]
    reads: tuple[Path, ...] = ()
    force: bool | None = None
    endings: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise AHNError unless the file can be written and nothing is lost by it."""
        check_named(self.path)
        real = real_path(self.path)
        # A pipe has no real path, and a path through what is not there has no other.
        for path in (self.path, real):
            try:
                self._check_replaced(path, path.stat().st_mode)
            except FileNotFoundError:
                continue
            except OSError as e:
                reason = f"cannot be written ({e.strerror})"
                raise AHNError(f"{self.path}: {reason}; choose another name") from None
        if self.endings and self.path.suffix.lower() not in self.endings:
            raise AHNError(f"{self.path}: give a name that ends in {', '.join(self.endings)}")
        check_writable(real.parent)

    def _check_replaced(self, path: Path, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise AHNError(f"{path}: is a directory; give the name of a file")
        if not stat.S_ISREG(mode):
            raise AHNError(f"{path}: is not a regular file; give the name of one")
        if is_read(path, self.reads):
            raise AHNError(f"{path}: is what this command reads; choose another name")
        if self.force:
            return
        advice = "choose another name" + (", or --force" if self.force is False else "")
        if not self.is_ours(path):
            raise AHNError(f"{path}: is there and is not {self.kind}; {advice}")
        if not mode & 0o222:
            raise AHNError(f"{path}: is read-only; {advice}")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A name beside the file, to be written to; it takes the file's place at the end, or
        vanishes. The file is judged again. Raises AHNError if it cannot be written."""
        self.check()
        with replacing(self.path) as part:
            yield part
            self.check()


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside `file`, to be written to, that takes its place at the end, or vanishes. What
    writers that were killed have left of `file` vanishes too.

    Raises AHNError if the disk is full, or whatever else the system says.
    """
    file = real_path(file)
    try:
        with new_part(file, _empty_file) as part:
            try:
                yield part
                sync(part)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
    except OSError as e:
        # Of another file: not ours to explain.
        named = Path(os.fsdecode(e.filename or file))
        if named != file and not is_part(named, file):
            raise
        reason = e.strerror or str(e) or type(e).__name__
        raise AHNError(
            f"{file}: cannot be written ({reason}); free some space or choose another place"
        ) from None


def _empty_file(path: Path) -> None:
    path.touch(exist_ok=False)


def sync(file: Path) -> None:
    """See that what is in a file is on the disk, before its name says so."""
    with file.open("rb") as f:
        os.fsync(f.fileno())


def check_named(path: Path) -> None:
    """Raise AHNError for "-", which elsewhere is standard output and here would be a file's
    name, for what no file is named, and for what could be written and not be read again."""
    if str(path) == "-":
        raise AHNError("-: standard output is not written to; give the name of a file")
    if "\0" in str(path):
        raise AHNError(f"{show(str(path))}: has a character that no name has; give another")
    if not is_utf8(path):
        raise AHNError(f"{path}: is not UTF-8, and MLX would not read it again; give another name")


def real_path(path: Path) -> Path:
    """Where a path leads: a link stays, and what it names is replaced."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # of a NUL, which no file has in its name
        return path


def same_file(a: Path, b: Path) -> bool:
    """Whether both are there and one, whatever their spelling."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


def is_read(path: Path, reads: Iterable[Path]) -> bool:
    """Whether a file is one of these, or lies in one of these directories."""
    for read in reads:
        inside = read.iterdir() if read.is_dir() else (read,)
        if any(same_file(path, p) for p in inside):
            return True
    return False


def check_writable(directory: Path) -> None:
    """Raise AHNError unless files can be made in there."""
    if not os.path.lexists(directory):
        raise AHNError(f"{directory}: no such directory; make it first")
    if not directory.is_dir():
        raise AHNError(f"{directory}: is not a directory; choose another place")
    try:
        # Permissions alone do not tell: root has them on a disk that is read-only.
        with new_part(directory / "probe", _empty_file) as probe:
            probe.unlink()
    except OSError as e:
        raise AHNError(
            f"{directory}: cannot be written to ({e.strerror}); choose another place"
        ) from None
