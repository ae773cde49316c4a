"""A checkpoint in whatever format it is: a directory with safetensors or with pickles of
torch, or a GGUF file. All are described alike, and read one tensor at a time."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AHNError, note
from ..model.names import is_memory
from . import pickles
from .baseconfig import check_quantization, complete, normalise, read_config
from .directory import Source, find_files, load_safetensors, read_headers, read_unused
from .ggufile import GGUFile

HEAD, EMBEDDING = "lm_head.", "model.embed_tokens."


def describe(path: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """The normal form of its config, and every tensor. Raises AHNError on what is no
    checkpoint."""
    if is_gguf(path):
        file = GGUFile(path)
        config, sources = normalise(path, file.config()), file.sources()
    else:
        config = read_config(path)
        if not find_files(path).paths and (files := pickles.find_files(path)).paths:
            sources = pickles.read_headers(path, files)
        else:
            sources = read_headers(path) | read_unused(path)
    if not sources:
        raise AHNError(f"{path}: holds no tensors; fetch it again")
    if all(map(is_memory, sources)):
        return config, sources  # of the base it says only what someone has written
    check_quantization(path, config)
    tied = _tied(path, config.get("tie_word_embeddings"), sources)
    return complete({**config, "tie_word_embeddings": tied}), sources


def describe_config(path: Path) -> dict[str, Any]:
    """As describe, of a directory that may have no weights yet."""
    if is_gguf(path) or find_files(path).paths or pickles.find_files(path).paths:
        return complete(describe(path)[0])
    return complete(read_config(path))


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and os.path.isfile(path)


def _tied(path: Path, stated: bool | None, sources: dict[str, Source]) -> bool:
    """Whether the head is the embedding. A head that is there and another matrix is kept, as
    transformers does; mlx_lm would drop it."""
    head = {name: s for name, s in sources.items() if name.startswith(HEAD)}
    if not head:
        return True if stated is None else stated
    if not stated:
        return False
    read = Reader()
    for name, source in head.items():
        other = sources.get(EMBEDDING + name.removeprefix(HEAD))
        if other is None or not mx.array_equal(read(source), read(other)).item():
            note(f"{path}: config.json ties head and embedding, but they differ; the head is kept")
            return False
    return True


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
