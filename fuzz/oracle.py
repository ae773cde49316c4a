"""What every target must keep to, whatever it is given: a refusal of one line or success, in
bounded time and memory, and nothing written but where it was told to."""

import io
import logging
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ahn_mlx.errors import AHNError

SECONDS = 5.0  # of the processor, for one input
SPARE = 200 << 20  # bytes of memory, beside TIMES the input
TIMES = 4
LONGEST = 2000  # characters of a message
EVERY = 200  # inputs between two looks at what memory is in use

# What makes, renames, links or removes: which arguments are paths, and of each the directory that
# it is in if it is a name alone.
_WRITES: dict[str, tuple[tuple[int, int | None], ...]] = {
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.rename", "os.link"), ((0, 2), (1, 3))),
    **{"os.truncate": ((0, None),), "os.symlink": ((0, None), (1, 2))},
}
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
_REACHES = ("socket.connect", "socket.sendto", "socket.gethostbyname", "socket.getaddrinfo")


@dataclass(frozen=True)
class Target:
    """prepare: writes an input to a directory, as files, and returns what `parse` takes beside
    that directory and one for its output. refusals: what it may raise. words: of a dictionary.
    files: whose lines it is to reach. mutate: makes an input of another; None leaves that to
    libFuzzer."""

    name: str
    prepare: Callable[[bytes, Path], Any]
    parse: Callable[[Any, Path, Path], object]
    seeds: Callable[[], list[bytes]]
    files: tuple[str, ...]
    words: tuple[str, ...] = ()
    mutate: Callable[[bytes, int, int], bytes] | None = None
    longest: int = 1 << 14
    refusals: tuple[type[BaseException], ...] = (AHNError,)


class Broken(Exception):
    """A promise that was not kept. key: tells one kind of fault from another."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.key = key


@contextmanager
def also() -> Iterator[None]:
    """Around what a target tries beside: its refusal does not count as one of the input, but has
    to be a line like any other."""
    try:
        yield
    except AHNError as e:
        text = str(e)
        assert text and text.isprintable() and len(text) <= LONGEST, f"{text!r:.3000}"


@dataclass
class Watch:
    """What one input does to the machine. place: where it may write while it is watched."""

    place: str
    on: bool = False
    thread: int = 0
    found: list[str] = field(default_factory=list)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook."""
        if not self.on:
            return
        if event in _STARTS or event in _REACHES:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "open" and self._writes(args):
            self._judge(event, args[0])
        elif event in _WRITES:
            for n, directory in _WRITES[event]:
                self._judge(event, args[n], -1 if directory is None else args[directory])

    def _writes(self, args: tuple[Any, ...]) -> bool:
        mode, flags = args[1], args[2]
        if isinstance(mode, str):
            return any(sign in mode for sign in "wax+")
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

    def _judge(self, event: str, path: Any, directory: int = -1) -> None:
        if isinstance(path, int):
            return
        beside = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else ""
        real = os.path.realpath(os.path.join(beside, os.fsdecode(path)))
        if not real.startswith(self.place) and real != os.devnull:
            self.found.append(f"{event} {real!r:.200}")


class _Aloud(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


class Oracle:
    """root: an empty directory, for what a target reads and writes."""

    def __init__(self, target: Target, root: Path):
        self.target = target
        self.given, self.out = root / "given", root / "out"
        self.given.mkdir(parents=True)
        self.out.mkdir()
        self.accepted = self.refused = 0
        self.slowest, self.largest = 0.0, 0
        # Bytes in use and the most kilobytes that ever were, as they were when last looked at.
        self.memory = self.peak = self.looked = 0
        # Temporary files are no output; a library may make them.
        temporary = root / "tmp"
        temporary.mkdir()
        os.environ["TMPDIR"] = str(temporary)
        import tempfile

        tempfile.tempdir = str(temporary)
        self.aloud = os.open(root / "aloud", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        # What libraries log goes to a terminal too, and past what is redirected.
        for name in (None, "transformers", "huggingface_hub"):
            logging.getLogger(name).addHandler(_Aloud())
        self.watch = Watch(os.path.realpath(root))
        sys.addaudithook(self.watch)

    def __call__(self, data: bytes) -> None:
        """Raises Broken."""
        try:
            given = self.target.prepare(data, self.given)
        except Exception:  # what nobody can write is no input
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        if self.accepted + self.refused - self.looked > EVERY or used.ru_maxrss > self.peak:
            self.memory, self.peak = _memory(), used.ru_maxrss
            self.looked = self.accepted + self.refused
        said, refused = io.StringIO(), None
        self.watch.found.clear()
        try:
            with self._heard(), redirect_stderr(said), redirect_stdout(said):
                self.watch.on = True
                try:
                    self.target.parse(given, self.given, self.out)
                finally:
                    self.watch.on = False
        except self.target.refusals as e:
            refused = e
        except BaseException as e:  # also a panic of Rust code
            if isinstance(e, KeyboardInterrupt | SystemExit):
                raise
            self._empty()
            raise Broken(_where(e), "".join(traceback.format_exception(e))) from None
        self._judge(data, refused, said.getvalue(), used)

    def _judge(
        self,
        data: bytes,
        refused: BaseException | None,
        said: str,
        before: resource.struct_rusage,
    ) -> None:
        now = resource.getrusage(resource.RUSAGE_SELF)
        seconds = now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime
        self.accepted += refused is None
        self.refused += refused is not None
        self.slowest = max(self.slowest, seconds)
        if seconds > SECONDS:
            raise Broken("slow", f"it took {seconds:.1f} s")
        if now.ru_maxrss > self.peak:
            grown = now.ru_maxrss * 1024 - self.memory
            self.largest = max(self.largest, grown)
            if grown > TIMES * len(data) + SPARE:
                raise Broken("memory", f"it took {grown >> 20} MB for {len(data)} bytes")
        if self.watch.found:
            what = self.watch.found[0]
            raise Broken(f"write-{what.split()[0]}", "\n".join(self.watch.found))
        if left := self._empty():
            halves = [name for name in left if name.endswith((".part", ".old"))]
            if refused is not None or halves:
                raise Broken("half-made", f"{refused}: left {left[:5]}")
        if refused is not None:
            text = str(refused)
            if not text or not text.isprintable() or len(text) > LONGEST:
                raise Broken(
                    f"message-{_where(refused)}", f"{len(text)} characters: {text!r:.3000}"
                )
        if heard := os.pread(self.aloud, LONGEST, 0):
            raise Broken("heard", f"{heard!r}")
        for line in said.splitlines():
            if not line.replace("\t", " ").isprintable() or len(line) > LONGEST:
                raise Broken(f"note-{line[:20]!r}", f"{line!r:.3000}")

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What is written past Python's streams, by libraries in C and Rust."""
        os.ftruncate(self.aloud, 0)
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(self.aloud, number)
            yield
        finally:
            for number, was in enumerate(kept, 1):
                os.dup2(was, number)
                os.close(was)

    def _empty(self) -> list[str]:
        """What is left in the directory for output, which is gone then."""
        if left := sorted(os.listdir(self.out)):
            shutil.rmtree(self.out)
            self.out.mkdir()
        return left


def _where(error: BaseException) -> str:
    """Type, and the last line of ours that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ahn_mlx" in f.filename]
    at = f"{Path(frames[-1].filename).name}-{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__}-{at}"


def _memory() -> int:
    """Bytes of memory in use."""
    with open("/proc/self/statm", "rb") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
