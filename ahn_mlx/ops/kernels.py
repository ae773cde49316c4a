"""Our Metal kernels: where their sources are, how they become callables, when they serve.

`metal/NAME.metal` is the body of one kernel; `metal/common.h` stands before each. MLX
writes the signature from the inputs it is given. Before a kernel's first use on a machine
it is compared with the form it replaces, and stays unused where the two differ.
"""

import hashlib
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

# In a wheel, or in a checkout.
_PACKAGE = Path(__file__).parent.parent
_PLACES = (_PACKAGE / "kernels", _PACKAGE.parent / "metal")

HEAD_DIMS = (16, 32, 64, 128)

DTYPES = (mx.float32, mx.bfloat16, mx.float16)

CHECKED = 24  # tokens in an example on which a kernel is checked


@dataclass(frozen=True)
class Check:
    """Inputs on which a kernel and the form it replaces must agree.

    name: of the kernel and its variant. files: its sources. dispatches: per call.
    example: (head size, dtype, tokens) -> random arguments. ours, theirs: the two forms.
    """

    name: str
    files: tuple[str, ...]
    dispatches: int
    example: Callable[[int, mx.Dtype, int], tuple[Any, ...]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def error(self, D: int, dtype: mx.Dtype) -> float:
        """The largest difference, relative to the largest number expected; may raise."""
        with _own_random_numbers():
            arguments = self.example(D, dtype, CHECKED)
        found, expected = (_arrays(form(*arguments)) for form in (self.ours, self.theirs))
        errors = [(abs(a - b)).max() / abs(b).max() for a, b in zip(found, expected, strict=True)]
        return float(np.max(errors))  # NaN, if there is one

    def ratio(self, D: int, dtype: mx.Dtype, tokens: int, rounds: int = 5) -> float:
        """Time of our form by that of the other."""
        with _own_random_numbers():
            arguments = self.example(D, dtype, tokens)
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for times, form in zip(seconds, (self.ours, self.theirs), strict=True):
                start = time.perf_counter()
                mx.eval(form(*arguments))
                times.append(time.perf_counter() - start)
        return min(seconds[0]) / min(seconds[1])

    def key(self, D: int, dtype: mx.Dtype) -> str:
        """What the verdict depends on: sources, MLX, the GPU and what MLX makes of the source."""
        parts = [self.name, str(D), str(dtype), version("mlx"), device_name()]
        parts += [source(file) for file in ("common.h", *self.files)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tolerance(dtype: mx.Dtype) -> float:
    """Relative error that a sound kernel stays below: sums run in another order, and what
    is rounded to 16 bits on the way differs."""
    return 1e-4 if dtype == mx.float32 else 3e-2


def available() -> bool:
    """Whether our kernels may run: a Metal device is the default and AHN_METAL is not 0."""
    on_gpu = mx.metal.is_available() and mx.default_device().type == mx.gpu
    return on_gpu and os.environ.get("AHN_METAL") != "0"


def device_name() -> str:
    """What MLX calls the default device."""
    return str(mx.device_info().get("device_name", ""))


def usable(check: Check, D: int, dtype: mx.Dtype) -> bool:
    """Whether our kernel may serve: it fits, and agrees with the other form on this machine."""
    return available() and D in HEAD_DIMS and dtype in DTYPES and _agrees(check, D, dtype)


@cache
def _agrees(check: Check, D: int, dtype: mx.Dtype) -> bool:
    """The verdict, found once per machine, and a warning where it is no."""
    file, key = _verdicts_file(), check.key(D, dtype)
    verdicts = _read(file)
    if key not in verdicts:
        try:
            error = check.error(D, dtype)
            verdicts[key] = "" if error <= tolerance(dtype) else f"is off by {error:.1e}"
        except Exception as e:  # a compiler's or driver's error has no type of its own
            verdicts[key] = f"failed ({' '.join(str(e).split())[:200]})"
        _write(file, verdicts)
    if verdicts[key]:
        kernel = f"Metal kernel {check.name} (head size {D}, {str(dtype).split('.')[-1]})"
        message = f"{kernel} {verdicts[key]}; MLX's own operations serve instead"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return not verdicts[key]


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Random numbers as after seed 0, and then MLX's go on as if none had been drawn."""
    (key,) = cast(list[mx.array], mx.random.state)
    high, low = cast(list[int], key.tolist())
    mx.random.seed(0)
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def _arrays(results: mx.array | tuple[mx.array, ...]) -> list[np.ndarray]:
    several = results if isinstance(results, tuple) else (results,)
    return [np.array(x.astype(mx.float32)) for x in several]


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


@cache
def ones(shape: tuple[int, ...]) -> mx.array:
    """float32 ones that no step has to make again."""
    return mx.array(np.ones(shape, dtype=np.float32))


@cache
def zeros(count: int) -> mx.array:
    """int32 zeros, likewise."""
    return mx.array(np.zeros(count, dtype=np.int32))
