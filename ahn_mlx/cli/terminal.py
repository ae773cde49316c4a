"""What someone who waits at a terminal sees, and how they stop it."""

import fcntl
import os
import select
import signal
import stat
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread, Timer
from typing import Any

from tqdm import tqdm

from ..platform import BLAS, BLAS_COMMANDS, default_dtype

# What moves a cursor, rings or changes colours: C0 but line feed and tab, DEL, C1.
_CONTROLS = {n: None for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}

# Seconds until a wait is mentioned, and until a step that goes on is left.
MENTION, LEAVE = 0.3, 1.0


class Left(KeyboardInterrupt):
    """Ctrl-C was pressed again, or the terminal is gone: the program ends."""


def printable(text: str) -> str:
    """The text without control characters: what a model or a file says is shown, and does
    nothing to the terminal."""
    return text.translate(_CONTROLS)


def say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def warn_slow() -> None:
    if not BLAS.fast and default_dtype() is not None:
        say(f"note: reading will be slow ({BLAS.name}); {' or '.join(BLAS_COMMANDS)}")


def in_bytes(n: int) -> str:
    """A size in the unit that fits it, by thousands."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"


def day(seconds: int) -> str:
    """The date of a moment since 1970, here; a file may say any number."""
    try:
        return time.strftime("%Y-%m-%d", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "in no year that there is"


def is_piped_in() -> bool:
    """Whether bytes wait on standard input, of a file, a pipe or a socket. None are taken, and
    nothing is waited for: a pipe may stay open and silent for ever."""
    try:
        end = sys.stdin.fileno()
        about = os.fstat(end)
        if stat.S_ISREG(about.st_mode):
            return about.st_size > os.lseek(end, 0, os.SEEK_CUR)
        if not (stat.S_ISFIFO(about.st_mode) or stat.S_ISSOCK(about.st_mode)):
            return False
        return any(fcntl.ioctl(end, termios.FIONREAD, bytes(4)))
    except (OSError, ValueError, AttributeError):  # there is none, or it is no file
        return False


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A line on a terminal that says what is waited for, if it takes more than a second."""
    timer = Timer(1, say, [what])
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress_bar(total: int, what: str, unit: str, done: int = 0) -> Any:
    """A progress bar on stderr, where that is a terminal; it goes when it is full."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}",
        unit_scale=unit == "tokens",
        disable=not sys.stderr.isatty(),
        leave=False,
        dynamic_ncols=True,
    )


@contextmanager
def stop_between_steps() -> Iterator[Any]:
    """Gives a function that raises KeyboardInterrupt if Ctrl-C was pressed, or Left if the
    terminal closed, at a moment when it breaks nothing. A second Ctrl-C does not wait: it
    raises Left, and if the step does not return to Python, the program ends with code 130."""
    pressed: list[int] = []

    def note(number: int, *_: Any) -> None:
        pressed.append(number)
        # A shell and the system may both say that the terminal has closed.
        if number == signal.SIGINT and pressed.count(number) > 1:
            raise Left

    def check() -> None:
        if pressed:
            raise Left if signal.SIGHUP in pressed else KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    heard = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    for number in heard:
        signal.signal(number, note)
    try:
        with _answering_at_once() if signal.SIGINT in heard else _nothing():
            yield check
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _answering_at_once() -> Iterator[None]:
    """A thread that hears Ctrl-C while the main thread is in a step: Python's own handlers
    wait until it returns."""
    end, begin = os.pipe()
    os.set_blocking(begin, False)
    before = signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
    watcher = Thread(target=_watch, args=(end,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(begin)
        watcher.join()
        os.close(end)


def _watch(end: int) -> None:
    interrupts, patience = 0, None
    while True:
        if select.select([end], [], [], patience)[0]:
            signals = os.read(end, 64)
            if not signals:
                return
            interrupts += signals.count(signal.SIGINT)
            patience = {0: None, 1: MENTION}.get(interrupts, LEAVE)
        elif interrupts == 1:
            patience = None
            if sys.stderr.isatty():
                line = "\nstopping after this step; Ctrl-C again leaves at once"
                tqdm.write(line, file=sys.stderr)
        else:
            os._exit(130)
