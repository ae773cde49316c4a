"""Our Metal kernels: where their sources are, how they become callables, when they serve.

`metal/NAME.metal` is the body of one kernel; `metal/common.h` stands before each. MLX
writes the signature from the inputs it is given.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

# In a wheel, or in a checkout.
_PLACES = (Path(__file__).parent / "kernels", Path(__file__).parent.parent / "metal")

HEAD_DIMS = (64, 128)


def available() -> bool:
    """Whether our kernels may run: a Metal device is the default and AHN_METAL is not 0."""
    on_gpu = mx.metal.is_available() and mx.default_device().type == mx.gpu
    return on_gpu and os.environ.get("AHN_METAL") != "0"


def source(file: str) -> str:
    """The text of one file of `metal/`."""
    for place in _PLACES:
        if (place / file).is_file():
            return (place / file).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{file} is in neither {' nor '.join(map(str, _PLACES))}; reinstall")


@cache
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Callable[..., Any]:
    """The kernel of `metal/NAME.metal`, built on first use, called as mx.fast.metal_kernel's.

    Inputs are made row-contiguous by MLX where they are not.
    """
    built: Any = mx.fast.metal_kernel(
        name=f"ahn_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source(f"{name}.metal"),
        header=source("common.h"),
    )
    return built
