"""A file on its way out: it is judged before the work begins, written beside its final name
and takes it when complete. Nothing is replaced that the command did not make, or that it reads."""

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import AHNError


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
                break
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
        with _held(file, _empty_file) as part:
            try:
                yield part
                sync(part)
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
    except OSError as e:
        # Of another file: not ours to explain.
        named = Path(os.fsdecode(e.filename or file))
        if named != file and not _is_part(named, file):
            raise
        reason = e.strerror or str(e) or type(e).__name__
        raise AHNError(
            f"{file}: cannot be written ({reason}); free some space or choose another place"
        ) from None


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, which whoever asks gives its name or deletes. What
    writers that were killed have left of it vanishes."""
    with _held(directory, os.mkdir) as part:
        yield part


def _empty_file(path: Path) -> None:
    path.touch(exist_ok=False)


@contextmanager
def _held(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new part of `path`. It is locked, by which clear_parts knows that somebody writes it."""
    clear_parts(path)
    while True:
        part = part_of(path)
        make(part)
        # clear_parts may have come between: then it is another's, or nobody's.
        if (held := _lock(part)) is not None and _is_open_at(held, part):
            break
        if held is not None:
            os.close(held)
    try:
        yield part
    finally:
        os.close(held)


def clear_parts(path: Path) -> None:
    """Delete what writers of `path` that were killed have left beside it, and nothing that
    somebody writes now."""
    for part in parts_of(path):
        clear_part(part)


def clear_part(part: Path) -> None:
    """Delete it, unless somebody writes it."""
    if part.is_symlink():
        part.unlink(missing_ok=True)
        return
    try:
        held = _lock(part)
    except OSError:  # it is not ours, or just gone
        return
    if held is None:
        return
    try:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    except OSError:
        pass  # whoever writes there is told why he cannot
    finally:
        os.close(held)


def _lock(path: Path) -> int | None:
    """A file or directory that nobody has locked, locked until it is closed; None if somebody
    has."""
    held = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:  # of a file system without locks
        pass
    return held


def _is_open_at(held: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def working_on(path: Path) -> Iterator[None]:
    """Be the only process that writes a file from what it reads there, or a directory over some
    time. Raises AHNError if one does already. What a killed one leaves of its lock is no harm."""
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    while True:
        lock.touch()
        try:
            held = _lock(lock)
        except FileNotFoundError:  # whoever had it has just ended
            continue
        if held is None:
            raise AHNError(f"{path}: another process works on it; wait for it or choose another")
        if _is_open_at(held, lock):
            break
        os.close(held)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(held)


def sync(file: Path) -> None:
    """See that what is in a file is on the disk, before its name says so."""
    with file.open("rb") as f:
        os.fsync(f.fileno())


def check_named(path: Path) -> None:
    """Raise AHNError for "-", which elsewhere is standard output and here would be a file's
    name."""
    if str(path) == "-":
        raise AHNError("-: standard output is not written to; give the name of a file")


def part_of(path: Path) -> Path:
    """A new name beside `path`, hidden, for as long as it is not complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def parts_of(path: Path) -> list[Path]:
    """What there is beside `path` that is not complete, as far as that can be seen."""
    return [part for part in parts_in(path.parent) if _is_part(part, path)]


def parts_in(directory: Path) -> list[Path]:
    """The same of all paths in a directory."""
    try:
        return [p for p in directory.iterdir() if _PART.fullmatch(p.name)]
    except OSError:
        return []


_PART = re.compile(r"\.(.+)\.[0-9a-f]+\.part", re.DOTALL)


def _is_part(part: Path, path: Path) -> bool:
    name = _PART.fullmatch(part.name)
    return part.parent == path.parent and name is not None and name[1] == path.name


def real_path(path: Path) -> Path:
    """Where a path leads: a link stays, and what it names is replaced."""
    return Path(os.path.realpath(path))


def same_file(a: Path, b: Path) -> bool:
    """Whether both are there and one, whatever their spelling."""
    try:
        return os.path.samefile(a, b)
    except OSError:
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
    probe = part_of(directory / "probe")
    try:
        # Permissions alone do not tell: root has them on a disk that is read-only.
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as e:
        raise AHNError(
            f"{directory}: cannot be written to ({e.strerror}); choose another place"
        ) from None
