"""A checkpoint in whatever format it is: a directory with safetensors or with pickles of
torch, or a GGUF file. All are described alike, and read one tensor at a time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import pickles
from .directory import INDEX, Source, load_safetensors, read_config, read_headers, read_unused
from .ggufile import GGUFile


def describe(path: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """config.json, and every tensor. Raises AHNError on what is no checkpoint."""
    if is_gguf(path):
        file = GGUFile(path)
        return file.config(), file.sources()
    config = read_config(path)
    safetensors = os.path.lexists(path / INDEX) or any(path.glob("model*.safetensors"))
    if not safetensors and (files := pickles.pickles(path)):
        return config, pickles.read_headers(files)
    return config, read_headers(path) | read_unused(path)


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


class Reader:
    """Reads tensors of any format when they are asked for, and keeps none."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def __call__(self, source: Source) -> mx.array:
        file, name = source.file, source.name
        if file not in self._files:
            opened = _OPEN.get(file.suffix, load_safetensors)(file)
            # Any part of a split GGUF file opens all of it.
            parts = [p.file for p in opened.parts] if isinstance(opened, GGUFile) else [file]
            self._files |= dict.fromkeys(parts, opened)
        opened = self._files[file]
        if isinstance(opened, GGUFile):
            return opened.read(name)
        if file.suffix == ".bin":
            return pickles.to_mlx(opened[name])
        # Once read, MLX keeps what it was asked for: forget it.
        return opened.pop(name) if name in opened else load_safetensors(file)[name]


_OPEN: dict[str, Callable[[Path], Any]] = {".gguf": GGUFile, ".bin": pickles.load}
