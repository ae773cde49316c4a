"""Our Metal kernels: where their sources are, how they become callables, when they serve.

`metal/NAME.metal` is the body of one kernel; `metal/common.h` stands before each. MLX
writes the signature from the inputs it is given. Before a kernel's first use on a machine
it is compared with the form it replaces, and stays unused where the two differ.
"""

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

# In a wheel, or in a checkout.
_PLACES = (Path(__file__).parent / "kernels", Path(__file__).parent.parent / "metal")

HEAD_DIMS = (64, 128)

# Relative error against the ops form, float32 in: sums run in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """Small inputs on which a kernel and the form it replaces must agree.

    files: the kernel's sources. ours, theirs: called without arguments, give arrays.
    """

    files: tuple[str, ...]
    ours: Callable[[], tuple[mx.array, ...]]
    theirs: Callable[[], tuple[mx.array, ...]]

    @property
    def name(self) -> str:
        return self.files[0].removesuffix(".metal")

    def error(self) -> float:
        """The largest difference, relative to the largest number expected; may raise."""
        pairs = zip(self.ours(), self.theirs(), strict=True)
        errors = [mx.abs(a - b).max() / mx.abs(b).max() for a, b in pairs]
        return float(mx.stack(errors).max().item())  # type: ignore[arg-type]

    def key(self) -> str:
        """What the verdict depends on: sources, MLX and the GPU."""
        info = mx.device_info()
        parts = [version("mlx"), str(info.get("device_name", "")), source("common.h")]
        return hashlib.sha256("\0".join([*parts, *map(source, self.files)]).encode()).hexdigest()


def available() -> bool:
    """Whether our kernels may run: a Metal device is the default and AHN_METAL is not 0."""
    on_gpu = mx.metal.is_available() and mx.default_device().type == mx.gpu
    return on_gpu and os.environ.get("AHN_METAL") != "0"


def usable(check: Check) -> bool:
    """Whether our kernel may serve: it agrees with its ops form on this machine."""
    return available() and _agrees(check)


@cache
def _agrees(check: Check) -> bool:
    """The verdict, found once per machine, and a warning where it is no."""
    file, key = _verdicts_file(), check.key()
    verdicts = _read(file)
    if key not in verdicts:
        try:
            error = check.error()
            verdicts[key] = "" if error <= TOLERANCE else f"is off by {error:.1e}"
        except Exception as e:  # a compiler's or driver's error has no type of its own
            verdicts[key] = f"failed ({' '.join(str(e).split())[:200]})"
        _write(file, verdicts)
    if verdicts[key]:
        message = f"Metal kernel {check.name} {verdicts[key]}; MLX's own operations serve instead"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return not verdicts[key]


def _verdicts_file() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "ahn-mlx" / "kernels.json"


def _read(file: Path) -> dict[str, str]:
    try:
        verdicts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write(file: Path, verdicts: dict[str, str]) -> None:
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(verdicts), encoding="utf-8")
        part.replace(file)
    except OSError:  # the check runs again next time, that is all
        part.unlink(missing_ok=True)


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
