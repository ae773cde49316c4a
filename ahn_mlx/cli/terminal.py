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
from contextlib import contextmanager, nullcontext
from textwrap import TextWrapper
from threading import Thread, Timer
from typing import Any

from tqdm import tqdm

from ..platform import BLAS, BLAS_COMMANDS, default_dtype
from .ranks import here

# What moves a cursor, rings or changes colours: C0 but line feed and tab, DEL, C1.
_CONTROLS = {n: None for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}

# Seconds until Ctrl-C is mentioned, and until a step that goes on is left.
MENTION, LEAVE = 0.3, 1.0
# Seconds until a wait is mentioned, and between lines about it where nobody sees a bar.
WAIT, BETWEEN = 1.0, 30.0


class Left(KeyboardInterrupt):
    """Ctrl-C was pressed again, or the terminal is gone: the program ends."""


def printable(text: str) -> str:
    """The text without control characters: what a model or a file says is shown, and does
    nothing to the terminal."""
    return text.translate(_CONTROLS)


def columns(stream: Any) -> int:
    """Of the terminal that a stream leads to, and 80 of one that does not know; 0 of others."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or 80) if stream.isatty() else 0
    except (OSError, ValueError):  # it is closed
        return 0


def say(line: str, indent: int = 0) -> None:
    """A line on stderr, whatever stands there: a bar stays below it, an answer that comes goes on
    after it. A terminal gets it broken between words; indent: of what goes on below."""
    line, width = printable(line), columns(sys.stderr)
    if width:
        below = " " * indent if indent < width // 2 else ""
        rows = TextWrapper(
            width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
        )
        parts = ["\n".join(rows.wrap(part)) for part in line.split("\n")]
        line = "\r" + "\n".join(parts)  # over the terminal's own ^C
    with tqdm.external_write_mode(file=sys.stderr) if width else nullcontext():
        if width and Answer.coming is not None:
            Answer.coming.stand_aside()
        print(line, file=sys.stderr, flush=True)


def _cells(text: str) -> int:
    """How many columns it takes."""
    from wcwidth import wcswidth

    return max(wcswidth(text), 0)


class Answer:
    """A text on stdout as it comes. At a terminal its lines end between words, for which the
    last word waits until it is whole; wide characters are words."""

    coming: "Answer | None" = None

    def __init__(self) -> None:
        self.width, self.column = columns(sys.stdout), 0
        self.gap, self.word = "", ""
        Answer.coming = self if self.width else None

    def write(self, text: str) -> None:
        text = printable(text)
        if not self.width:
            self._print(text)
            self.column = int(not text.endswith("\n")) if text else self.column
            return
        for c in text:
            wide = _cells(c) == 2
            if wide or c.isspace():
                self._end_word()
            if c == "\n":
                self._print(c)
                self.gap, self.column = "", 0
            elif c.isspace():
                self.gap += c.expandtabs(4)
            else:
                self.word += c
                if wide or len(self.word) >= self.width:
                    self._end_word()

    def end(self) -> None:
        """Show what is left, and end the line."""
        self._end_word()
        self.stand_aside()
        Answer.coming = None

    def stand_aside(self) -> None:
        """End the line for what someone else has to say."""
        if self.column:
            self._print("\n")
            self.gap, self.column = "", 0

    def _end_word(self) -> None:
        if not self.word:
            return
        if self.column + _cells(self.gap + self.word) > self.width:
            self.stand_aside()
        self._print(self.gap + self.word)
        self.column += _cells(self.gap + self.word)
        self.gap, self.word = "", ""

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


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
    timer = Timer(WAIT, say, [what])
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Bar(tqdm):
    """On a terminal a bar, over all of its line; elsewhere lines, of which the first comes when
    there is something to wait for."""

    timer: Timer | None = None

    def __init__(self, seen: bool, total: int, what: str, unit: str, done: int):
        lines = {
            "bar_format": f"{what}: {{n:,}} of {{total:,}} {unit}, {{rate_fmt}}{{postfix}}",
            "mininterval": BETWEEN,
            "maxinterval": float("inf"),
            "miniters": max(total // 10, 1),
            "delay": BETWEEN,
        }
        self.seen = seen
        super().__init__(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            unit_scale=unit == "tokens",
            leave=False,
            dynamic_ncols=seen,
            **({} if seen else lines),
        )
        if not seen:
            self.timer = Timer(WAIT, self._begin, [f"{what} {{0:,}} {unit}"])
            self.timer.daemon = True
            self.timer.start()

    def _begin(self, line: str) -> None:
        if self.total:
            print(line.format(self.total - self.initial), file=self.fp, flush=True)

    def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().close()

    def display(self, *args: Any, **about: Any) -> Any:
        return super().display(*args, **about) and self.seen  # a line is not returned to

    @staticmethod
    def format_meter(n: float, total: float | None, *args: Any, **about: Any) -> str:
        about["ncols"] = about["ncols"] and max(about["ncols"] - 3, 1)  # the ^C of a terminal
        # A last step may take longer than the minutes that were left.
        return str(tqdm.format_meter(min(n, total) if total else n, total, *args, **about))

    @staticmethod
    def status_printer(file: Any) -> Any:
        def show(line: str) -> None:
            if width := columns(file):
                file.write(f"\r{' ' * (width - 1)}\r{line}")  # also over what a key has echoed
            elif line:
                file.write(f"{line}\n")
            file.flush()

        return show


def progress_bar(total: int, what: str, unit: str, done: int = 0) -> Any:
    """A progress bar on stderr, which goes when it is full. Where that is no terminal: a line after
    a second, and then one at most every half minute and every tenth of the work."""
    return _Bar(columns(sys.stderr) > 0, total, what, unit, done)


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
        ranks = here()
        # Of several processes none stops inside of what the others go on with.
        if pressed if ranks is None else ranks.any(bool(pressed)):
            raise Left if signal.SIGHUP in pressed else KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    heard = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}  # nohup
    for number in heard:
        signal.signal(number, note)
    try:
        with _answering_at_once() if signal.SIGINT in heard else nullcontext():
            yield check
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)


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
                say("stopping after this step; Ctrl-C again leaves at once")
        else:
            os._exit(130)
