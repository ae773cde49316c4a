"""What someone who waits at a terminal sees, and how they stop it."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ..platform import BLAS, BLAS_COMMANDS, default_dtype


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


@contextmanager
def waiting(line: str) -> Iterator[None]:
    """Say what is done, on a terminal, if that takes more than a second."""
    timer = threading.Timer(1.0, say, [line])
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
    """Gives a function that raises KeyboardInterrupt if Ctrl-C was pressed or the terminal
    closed, at a moment when it breaks nothing. A second Ctrl-C does not wait."""
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    heard = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    for number in heard:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
