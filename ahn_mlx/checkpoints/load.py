"""From a directory to a model that can be used, and its tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..model.augment import FLOAT32, ModelArgs, build
from ..model.config import AHNConfig
from ..platform import default_dtype
from .directory import check_model_dir, read_tensors
from .safetensors import DTYPES, not_finite
from .tokenizer import load_tokenizer


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
    mx.eval(model.parameters())
    if name := not_finite(parameters):
        raise AHNError(f"{source}: tensor {name} holds NaN or infinity; fetch or convert it again")


def load(
    path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """As load_model, with the tokenizer, as mlx_lm.load returns them."""
    path = Path(path)
    model, config = load_model(path, window=window, sinks=sinks, dtype=dtype)
    return model, load_tokenizer(path, config)
