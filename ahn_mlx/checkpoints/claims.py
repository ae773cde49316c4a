"""What a config.json claims, held against the tensors that are there. A model is built before its
shapes can be compared, and what is built costs what is claimed."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import AHNError, show
from .directory import Source

# What mlx-lm's models call the number of their layers, of which lists are made.
LAYERS = ("num_hidden_layers", "num_layers", "num_transformer_layers", "n_layers", "n_layer")
PACKED = 16  # the most numbers that MLX packs into one of 32 bits
TWICE = 2  # a head may be the embedding again


def check_layers(path: Path, config: dict[str, Any], sources: Mapping[str, Source]) -> None:
    """Before a model is built: each layer has a tensor. Raises AHNError if more are claimed."""
    for name in LAYERS:
        for settings in (config, config.get("text_config", {})):
            count = settings.get(name)
            if type(count) is int and count > len(sources):
                raise AHNError(
                    f"{_config(path)}: {name} is {show(count)}, but there are {len(sources):,}"
                    " tensors in all; fetch the model again"
                )


def check_size(path: Path, model: nn.Module, sources: Mapping[str, Source]) -> None:
    """Of a model that is built and not evaluated: it has about as many numbers as the tensors.
    Raises AHNError if it is larger, naming the parameter that is so most."""
    held = {name: _numbers(source) for name, source in sources.items()}
    parameters: Any = tree_flatten(model.parameters())
    claimed = sum(x.size for _, x in parameters)
    if claimed <= TWICE * sum(held.values()):
        return
    name, x = max(parameters, key=lambda item: item[1].size - held.get(item[0], 0))
    about = (
        f"{_config(path)}: describes a model of {claimed:,} numbers, whose {show(name)} has shape"
    )
    there = sources.get(name)
    found = f"; it has {list(there.info.shape)} in {there.file.name}" if there else ""
    raise AHNError(f"{about} {list(x.shape)}{found}; its files hold {sum(held.values()):,} numbers")


def _numbers(source: Source) -> int:
    return math.prod(source.info.shape) * (PACKED if source.info.dtype == "U32" else 1)


def _config(path: Path) -> Path:
    """Where a model's settings stand: a GGUF file has its own."""
    return path / "config.json" if path.is_dir() else path
