"""The model as a guest of mlx-lm's own programs, which load it through the `ahn_model.py` of
its directory: what they cannot do with it ends in one line."""

import sys
from types import TracebackType
from typing import Any

import mlx.nn as nn

from ..errors import AHNError
from .augment import ModelArgs as ModelArgs
from .augment import build as build_model


def build(config: dict[str, Any]) -> nn.Module:
    """As augment.build. Raises AHNError where the program would lose the memory."""
    sys.excepthook = _one_line
    if "mlx_lm.cache_prompt" in sys.modules:
        raise AHNError(
            "mlx_lm.cache_prompt: mlx_lm.generate reads its file before the model, and so could"
            " not use it; use ahn-mlx digest, then ahn-mlx ask"
        )
    return build_model(config)


def _one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """What ends the program."""
    if isinstance(error, AHNError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, ValueError) and "Speculative decoding" in str(error):
        print(
            "error: an AHN model cannot be sped up by a draft model: what its memory has taken"
            " in cannot be taken back; leave out --draft-model",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)
