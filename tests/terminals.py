"""Stand-ins for who sits at a terminal: a screen, keys, Ctrl-C, and a clock."""

import fcntl
import io
import os
import signal
import struct
import sys
import termios
import tty
from types import SimpleNamespace

from click.testing import CliRunner
from tqdm import tqdm

from ahn_mlx import AHNError, Session
from ahn_mlx.cli import cli, terminal

FAST = SimpleNamespace(fast=True, name="")  # a BLAS


class Screen:
    """A terminal of so many columns: a stream that leads to it, and what came there."""

    def __init__(self, width):
        self.end, slave = os.openpty()
        tty.setraw(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, width, 0, 0))
        os.set_blocking(self.end, False)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")

    def take(self, patch):
        """stdout and stderr lead here; pytest has its own until a test begins."""
        patch.setattr(sys, "stdout", self.stream)
        patch.setattr(sys, "stderr", self.stream)

    def came(self):
        self.stream.flush()
        found = b""
        while True:
            try:
                found += os.read(self.end, 1 << 16)
            except BlockingIOError:
                return found.decode()

    def close(self):
        self.stream.close()
        os.close(self.end)


class Typing(io.StringIO):
    """Someone who types these lines; one that is Ctrl-C is pressed."""

    def isatty(self):
        return True

    def readline(self):
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


class Clock:
    """perf_counter says these seconds in turn."""

    def __init__(self, *seconds):
        self.seconds = [*seconds]

    def perf_counter(self):
        return self.seconds.pop(0)


def bars(monkeypatch):
    """Lines of bars, at once."""
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)


def pressed(monkeypatch, at, times=1):
    """Ctrl-C when a bar has come so far."""
    update = tqdm.update

    def pressing(bar, n=1):
        made = update(bar, n)
        while bar.n >= at and pressing.left:
            pressing.left -= 1
            os.kill(os.getpid(), signal.SIGINT)
        return made

    pressing.left = times
    monkeypatch.setattr(tqdm, "update", pressing)


# A text, a memory of it, and commands on both

TEXT = "It was the best of times, it was the worst of times. "  # 53 tokens, and 4 around them
# As options of a command that draws three tokens have them.
SAMPLING = {"max_tokens": 3, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
SAMPLING |= {"repetition_penalty": 1.0, "repetition_context_size": 20, "seed": None, "stop": ()}


def remembered(loaded, model, file):
    """A memory of the text, in a file."""
    session = Session(*loaded, origin={"name": str(model)})
    session.read(TEXT * 4, name="book.txt")
    session.save(file)
    return file


def laid_out(place, monkeypatch, memory):
    """A directory to work in, with a memory and a text. Returns it."""
    monkeypatch.setattr(terminal, "BLAS", FAST)  # nothing is said of it
    monkeypatch.chdir(place)
    (place / "book.ahn").write_bytes(memory.read_bytes())
    (place / "story.txt").write_text(TEXT * 2)
    return place


def run(*args, said="", code=0):
    done = CliRunner().invoke(cli, list(map(str, args)), input=said)
    assert done.exit_code == code, done.exception or done.output
    return done


def refused(*args, said=""):
    done = CliRunner().invoke(cli, list(map(str, args)), input=said)
    assert isinstance(done.exception, AHNError), done.exception or done.output
    return str(done.exception)
