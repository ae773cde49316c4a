"""A command that mlx.launch runs as several processes: each does the same with its part of the
model, and rank 0 alone reads files, writes them, and talks to the user."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import AHNError
from ..platform import launched_rank
from .command import Several

if TYPE_CHECKING:
    from ..model.ranks import Ranks

T = TypeVar("T")

# Seconds in which mlx.launch ends the others when one has failed.
PATIENCE = 5.0

PIPELINE = "ahn_mlx.pipeline"  # in a context's meta

_here: "Ranks | None" = None


def here() -> "Ranks | None":
    """The processes of a command that runs as several; None where it is one."""
    return _here


def is_first() -> bool:
    """Whether this process writes files: of several, one does."""
    return _here is None or _here.rank == 0


def share(make: Callable[[], T]) -> T:
    """What `make` returns, which is JSON, of rank 0: what is on its disk, or was typed there.
    Raises the AHNError or OSError that it raises."""
    if _here is None:
        return make()
    return _here.share(make)


pipeline_option = click.option(
    "--pipeline",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, value: ctx.meta.update({PIPELINE: value}),
    help="With mlx.launch: divide layers, not heads.",
)


class OnRanks(Several):
    """A command that several processes run as one."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        if launched_rank():
            silent = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115, stays open
            sys.stdout = sys.stderr = silent
        return super().make_context(*arguments, **named)

    def invoke(self, ctx: click.Context) -> Any:
        global _here
        if launched_rank() is not None:
            from ..model.pipeline import Pipeline
            from ..model.ranks import Ranks, join

            _here = join(Pipeline if ctx.meta.get(PIPELINE) else Ranks)
        if _here is None and ctx.meta.get(PIPELINE):
            raise AHNError("--pipeline has no effect on one process; mlx.launch starts several")
        if _here is not None:
            sys.stdin = _Lines(sys.stdin)
        try:
            found = super().invoke(ctx)
            if _here is not None:
                _here.settle()  # what another still waits for has left when this process ends
            return found
        except Exception:
            sys.stderr = sys.__stderr__  # a fault of ours is heard
            raise


class _Lines:
    """Standard input line by line, as rank 0 gets it. mlx.launch gives every process a pipe that
    does not end, whoever types there."""

    def __init__(self, stream: Any):
        self.stream = stream

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return share(self.stream.readline)

    def read(self) -> str:
        raise AHNError("what is piped into mlx.launch has no end; give a file, or the words")

    @property
    def buffer(self) -> "_Lines":
        return self


def is_lost(error: RuntimeError) -> bool:
    """Whether MLX says that it cannot reach another process."""
    return _here is not None and str(error).startswith(("[ring]", "[jaccl]", "[mpi]", "[nccl]"))


def fail(line: str) -> None:
    """Say why this process ends. Not rank 0's: if all fail alike, that one says it, and
    mlx.launch ends the others first."""
    time.sleep(PATIENCE)
    print(f"rank {launched_rank()}: {line}", file=sys.__stderr__, flush=True)
