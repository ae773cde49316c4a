"""The three ways in which a model attends: its memory, the window alone, all of the text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.nn as nn

from ..measure.compare import silenced

MIXERS = ("memory", "window", "full")
# Of tokens: nothing leaves it.
WITHOUT_END = 1 << 30


@contextmanager
def mixing(model: nn.Module, mixer: str) -> Iterator[None]:
    """Caches that are made in here are of this mixer. "window" is the memory that adds nothing,
    "full" a window without end, where the model is the plain transformer."""
    config = model.ahn
    if mixer == "window":
        with silenced(model):
            yield
        return
    if mixer == "full":
        model.ahn = replace(config, window=WITHOUT_END)
    try:
        yield
    finally:
        model.ahn = config
