"""The one `load` for names, repositories and directories, and the small models, which need no
download: their memories come with us, and their base with a package (bases.py)."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints import load as directories
from ..checkpoints.baseconfig import read_config
from ..checkpoints.directory import unreplaced
from ..errors import AHNError
from ..model.augment import augment
from ..model.config import AHNConfig
from ..model.ranks import Ranks
from ..platform import default_dtype
from . import download as hub
from .bases import load_base, put_memory, smollm2_base, whole_name
from .disk import smollm2_gguf
from .published import CONVERTED, MODELS, has_bits_to_choose
from .published import DEFAULT as DEFAULT

# Trained AHN parameters that come with us, one file per name.
WEIGHTS = Path(__file__).parent.parent / "weights"

Loaded = tuple[nn.Module, TokenizerWrapper]


@dataclass(frozen=True)
class Origin:
    """How a model was got, for whoever finds it in a memory's file. name: of a directory, its
    whole path."""

    name: str
    dtype: str | None
    q_bits: int | None
    ahn: str | None = None  # the directory of a trained memory


def load(
    name_or_path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
    q_bits: int | None = None,
    ahn: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Loaded:
    """Load a model by name, by repository, or from a converted directory, with its tokenizer.

    ahn: a directory of `ahn-mlx train`, or of the PyTorch release's parameters: the name is then
    that of its base, and what memory that has by itself is not used.
    window, sinks: override the model's. dtype: "float32", "bfloat16" or "float16"; by
    default float32 on the CPU and the checkpoint's own (bfloat16 for names) on a GPU.
    q_bits: of the base of a published name, 0, 4 (the default) or 8. ranks: the processes that
    run one model, from model.ranks.join(); each keeps its part. What is not on this
    machine yet is downloaded and converted. The model remembers all of this as `origin`.
    Raises AHNError when there is no such model or it is damaged.

    >>> model, tokenizer = ahn_mlx.load("ahn-gdn-3b", window=4096)
    """
    name = str(name_or_path)
    build, path = ZOO.get(name), Path(name_or_path)
    settings: Any = {"window": window, "sinks": sinks, "dtype": dtype, "ranks": ranks}
    if q_bits is not None and not has_bits_to_choose(name):
        raise AHNError(f"--q-bits has no effect on {name_or_path}: {CONVERTED}")
    where = None if ahn is None else os.path.abspath(ahn)
    if where is not None:
        with unreplaced(Path(where)):
            model, tokenizer = _with_memory(name, Path(where), window, sinks, dtype, ranks)
        name = whole_name(name)
    elif build is not None:
        model, tokenizer = build(window, sinks, dtype, ranks)
    elif os.path.isdir(path):
        name = os.path.abspath(path)
        model, tokenizer = directories.load(path, **settings)
    else:
        path = hub.resolve(name, q_bits)
        model, tokenizer = directories.load(path, **settings)
    model.origin = Origin(name, dtype, q_bits, where)
    return model, tokenizer


def _with_memory(
    name: str,
    directory: Path,
    window: int | None,
    sinks: int | None,
    dtype: str | None,
    ranks: Ranks | None,
) -> Loaded:
    config = directories.built(directory, AHNConfig.from_dict, read_config(directory))
    config = replace(
        config,
        window=config.window if window is None else window,
        sinks=config.sinks if sinks is None else sinks,
    )
    base = load_base(name)
    directories.built(base.path, partial(augment, base.model), config)
    put_memory(base, directory)
    base.model.eval()
    directories.finish(base.model, _stored(dtype) if name in ZOO else dtype, base.path, ranks)
    return base.model, base.tokenizer


def _stored(dtype: str | None) -> str:
    """What the small base, which is kept in few bits, is expanded to."""
    return dtype or ("bfloat16" if default_dtype() is None else "float32")


def _smollm2(
    name: str, window: int | None, sinks: int | None, dtype: str | None, ranks: Ranks | None
) -> Loaded:
    config = MODELS[name].settings
    config = replace(
        config,
        window=config.window if window is None else window,
        sinks=config.sinks if sinks is None else sinks,
    )
    base, tokenizer = smollm2_base()
    stored = set(_shapes(base))
    decoder = augment(base, config)
    weights = WEIGHTS / f"{name}.safetensors"
    _load_memory(decoder, stored, weights)
    decoder.eval()
    source = weights if weights.is_file() else smollm2_gguf()
    directories.finish(decoder, _stored(dtype), source, ranks)
    return decoder, tokenizer


def _load_memory(decoder: nn.Module, base: set[str], file: Path) -> None:
    """Fill in all AHN parameters, or say that they are missing."""
    if not file.is_file():
        print(
            f"note: {file.stem} has no trained memory yet; what leaves the window is forgotten",
            file=sys.stderr,
        )
        # The same every time: a digested text is of one model.
        for name, shape in _shapes(decoder).items():
            if name not in base and name.endswith(
                ("a_proj.weight", "b_proj.weight", "g_proj.weight")
            ):
                decoder.load_weights([(name, mx.zeros(shape))], strict=False)
        return
    try:
        weights: dict[str, Any] = mx.load(str(file))  # type: ignore[assignment]
    except RuntimeError as e:
        raise AHNError(f"{file}: {e}; reinstall") from None
    expected = {k: shape for k, shape in _shapes(decoder).items() if k not in base}
    wrong = {k for k in expected | weights if k not in weights or k not in expected}
    wrong |= {k for k in expected.keys() & weights if weights[k].shape != expected[k]}
    if wrong:
        raise AHNError(f"{file}: tensor {min(wrong)} is missing, extra or misshapen; reinstall")
    decoder.load_weights(list(weights.items()), strict=False)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    parameters: Any = tree_flatten(module.parameters())
    return {name: value.shape for name, value in parameters}


# Name -> (window, sinks, dtype, ranks) -> model and tokenizer.
ZOO: dict[str, Callable[[int | None, int | None, str | None, Ranks | None], Loaded]] = {
    name: partial(_smollm2, name) for name, entry in MODELS.items() if not entry.repo
}
