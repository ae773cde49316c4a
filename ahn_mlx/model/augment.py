"""From a plain mlx-lm decoder to an AHN model, and from a directory to either.

`augment` replaces each layer's attention and gives the model `make_cache`; all else,
its forward pass included, stays mlx-lm's.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ..checkpoints.convert import VOCABULARIES
from ..checkpoints.directory import check_model_dir, read_tensors, rename_published
from ..checkpoints.safetensors import is_finite
from ..errors import AHNError
from ..platform import default_dtype
from .attention import PROJECTIONS, AHNAttention
from .cache import AHNCache
from .config import AHNConfig

# Model files of mlx-lm whose attention is known to fit.
SUPPORTED = ("llama", "qwen2", "qwen3")

# Parameters that stay float32 whatever the model's dtype: decays need the precision.
FLOAT32 = ("A_log", "dt_bias")

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class AHNModel:
    """What an augmented model has beyond the mlx-lm model it was made from."""

    ahn: AHNConfig

    def make_cache(self) -> list[AHNCache | KVCache]:
        """One cache per layer: AHNCache, or KVCache where full attention is kept."""
        full = self.ahn.fa_layer_ids
        return [
            KVCache() if i in full else AHNCache(self.ahn.window, self.ahn.sinks)
            for i in range(len(self.layers))  # type: ignore[attr-defined]
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Published parameter names to ours, after the base model's own clean-up."""
        base = getattr(super(), "sanitize", dict)
        return rename_published(base(weights), self.ahn.fa_layer_ids)


def augment(model: nn.Module, config: AHNConfig) -> nn.Module:
    """Give an mlx-lm decoder a window and a memory, in place.

    New memory parameters start as in the paper's release: the output projection is
    zero, so the memory adds nothing until weights are loaded or trained.

    Raises AHNError for a model of another family or a layer that does not fit.
    """
    family = type(model).__module__.rsplit(".", 1)[-1]
    if isinstance(model, AHNModel):
        raise AHNError("the model is an AHN model already")
    if family not in SUPPORTED:
        raise AHNError(f"model family {family!r} is not supported; use {', '.join(SUPPORTED)}")
    layers = model.layers
    absent = [i for i in config.fa_layer_ids if i >= len(layers)]
    if absent:
        raise AHNError(f"fa_layer_ids names layer {absent[0]}, but there are {len(layers)}")
    for i, layer in enumerate(layers):
        if getattr(layer, "use_sliding", False):
            raise AHNError(f"layer {i} has sliding-window attention already; use a base without")
        missing = [name for name in PROJECTIONS if name not in layer.self_attn]
        if missing:
            raise AHNError(f"the attention of layer {i} has no {missing[0]}")
        if i not in config.fa_layer_ids:
            layer.self_attn = AHNAttention(layer.self_attn, config, model.args.hidden_size)
    base = type(model)
    # A subclass made on the spot keeps parameter names, forward pass and sharding.
    model.__class__ = type(f"AHN{family.capitalize()}", (AHNModel, base), {})
    model.ahn = config
    return model


def build(config: dict[str, Any]) -> nn.Module:
    """The model that a config.json describes, with random parameters, not evaluated."""
    ahn = AHNConfig.from_dict(config)
    family = config.get("model_type")
    if family not in SUPPORTED:
        raise AHNError(f"model_type {family!r} is not supported; use {', '.join(SUPPORTED)}")
    model_class, args_class = mlx_lm.utils._get_classes(config)
    try:
        model = model_class(args_class.from_dict(config))
    except (TypeError, ArithmeticError, LookupError, ValueError, RuntimeError, AssertionError) as e:
        raise AHNError(f"config.json does not describe a {family} model: {e}") from None
    return augment(model, ahn)


@dataclass
class ModelArgs(BaseModelArgs):
    """A whole config.json; `build` reads what it needs."""

    config: dict[str, Any]

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        return cls(params)


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating-point parameters, except those that stay float32."""

    def convert(path: str, x: mx.array) -> mx.array:
        keep = path.rsplit(".", 1)[-1] in FLOAT32 or not mx.issubdtype(x.dtype, mx.floating)
        return x if keep else x.astype(dtype)

    model.update(tree_map_with_path(convert, model.parameters()))


def load_model(
    path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a converted directory, or a merged checkpoint of the PyTorch release.

    window, sinks: override the config's. dtype: "float32", "bfloat16" or "float16";
    by default the checkpoint's own on Metal and float32 on the CPU, where it is fast.
    Returns the model and its config.json. Raises AHNError on a bad directory.
    """
    path = Path(path)
    config = check_model_dir(path)
    ahn = AHNConfig.from_dict(config)
    ahn = replace(
        ahn,
        window=ahn.window if window is None else window,
        sinks=ahn.sinks if sinks is None else sinks,
    )
    overrides: dict[str, Any] = {"ahn": ahn.to_dict(), "model_file": None}
    if "tie_word_embeddings" not in config:
        # mlx-lm would assume tied embeddings and drop the head.
        overrides["tie_word_embeddings"] = "lm_head.weight" not in read_tensors(path)
    try:
        model, config = mlx_lm.utils.load_model(
            path,
            lazy=True,
            model_config=overrides,
            get_model_classes=lambda config: (
                lambda args: build(args.config),  # type: ignore[arg-type, return-value]
                ModelArgs,
            ),
        )
    except (ValueError, RuntimeError) as e:
        if isinstance(e, AHNError):
            raise
        raise AHNError(f"{path}: {e}") from None
    model.eval()
    finish(model, dtype, path)
    return model, config


def finish(model: nn.Module, dtype: str | None, source: Path) -> None:
    """Cast to the dtype asked for, or the fast one on the CPU, and read the weights.

    Raises AHNError naming `source` and the first tensor that holds NaN or infinity.
    """
    if dtype is not None and dtype not in DTYPES:
        raise AHNError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    chosen = DTYPES[dtype] if dtype else default_dtype()
    if chosen is not None:
        cast(model, chosen)
    parameters: Any = tree_flatten(model.parameters())
    floats = [(n, x) for n, x in parameters if mx.issubdtype(x.dtype, mx.floating)]
    # A sum is quick on any device; only where it is not finite each number is looked at.
    sums = [x.sum().astype(mx.float32) for _, x in floats]
    mx.eval(model.parameters(), sums)
    for (name, x), total in zip(floats, sums, strict=True):
        if not math.isfinite(total.item()) and not is_finite(x):
            raise AHNError(
                f"{source}: tensor {name} holds NaN or infinity; fetch or convert it again"
            )


def load(
    path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """As load_model, with the tokenizer, as mlx_lm.load returns them."""
    path = Path(path)
    if (path / "config.json").is_file() and not any((path / n).is_file() for n in VOCABULARIES):
        # Without any vocabulary, transformers makes up an empty tokenizer.
        raise AHNError(f"{path}: no usable tokenizer; copy tokenizer.json from the base model")
    model, config = load_model(path, window=window, sinks=sinks, dtype=dtype)
    try:
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as e:  # transformers raises many kinds for a missing tokenizer
        reason = " ".join(str(e).split())[:200]
        raise AHNError(f"{path}: no usable tokenizer ({reason}); copy the base's files") from None
    return model, tokenizer
