"""What is written now, under hidden names beside the final one, and locks by which processes know
of each other. Locks end with their process: a part without one is of a process that was killed.

Disks without locks (some of a network) have no such signs: there nothing is deleted, and nobody
waits.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AHNError

_PART = re.compile(r"\.(.+)\.[0-9a-f]+\.part", re.DOTALL)


def part_of(path: Path) -> Path:
    """A new name beside `path`, hidden, for as long as it is not complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def is_part(part: Path, path: Path) -> bool:
    name = _PART.fullmatch(part.name)
    return part.parent == path.parent and name is not None and name[1] == path.name


def parts_of(path: Path) -> list[Path]:
    """What there is beside `path` that is not complete, as far as that can be seen."""
    return [part for part in parts_in(path.parent) if is_part(part, path)]


def parts_in(directory: Path) -> list[Path]:
    """The same of all paths in a directory."""
    try:
        return [p for p in directory.iterdir() if _PART.fullmatch(p.name)]
    except OSError:
        return []


@contextmanager
def new_part(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A new part of `path`, locked: whoever asks renames or deletes it. make: makes an empty one.
    What writers of `path` that were killed have left vanishes first."""
    clear_parts(path)
    while True:
        part = part_of(path)
        make(part)
        with suppress(FileNotFoundError):
            held = _open(part)
            # Between the two lines somebody may have taken it for one of a killed writer.
            if _lock(held) is not False and _is_open_at(held, part):
                break
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
    with suppress(OSError):  # not ours, or just gone: whoever needs its name is told
        held = _open(part)
        try:
            if _lock(held):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        finally:
            os.close(held)


@contextmanager
def working_on(path: Path) -> Iterator[None]:
    """Be the only process that writes a file from what it reads there, or a directory over some
    time. Raises AHNError if one does already. What a killed one leaves of its lock is no harm."""
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    while True:
        lock.touch()
        with suppress(FileNotFoundError):  # whoever had it has just ended
            held = _open(lock)
            free = _lock(held) is not False
            if free and _is_open_at(held, lock):
                break
            os.close(held)
            if not free:
                mend = "wait for it, or choose another"
                raise AHNError(f"{path}: another process works on it; {mend}")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(held)


def share(directory: Path) -> tuple[int, bool]:
    """Be one of the processes that work in a directory, until the number that is returned is
    closed. Also whether there was no other: then what is half-made there is nobody's."""
    held = _open(directory)
    alone = _lock(held) is True
    with suppress(OSError):  # a disk without locks: one never knows
        fcntl.flock(held, fcntl.LOCK_SH)
    return held, alone


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)


def _lock(held: int) -> bool | None:
    """Whether it is ours now, until it is closed; None if the disk knows no locks."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_open_at(held: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held), os.stat(path))
    except FileNotFoundError:
        return False
