"""Our Metal kernels: where their sources are, how they become callables, when they serve.

`metal/NAME.metal` is the body of one kernel; `metal/common.h` stands before each. MLX
writes the signature from the inputs it is given. Before a kernel's first use on a machine
it is compared with the form it replaces and timed against it: it serves where it agrees and
is the faster.
"""

import hashlib
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

# In a wheel, or in a checkout.
_PACKAGE = Path(__file__).parent.parent
_PLACES = (_PACKAGE / "kernels", _PACKAGE.parent / "metal")

HEAD_DIMS = (16, 32, 64, 128)

DTYPES = (mx.float32, mx.bfloat16, mx.float16)

SECONDS = 2.0  # that a process spends on timing kernels, all of them together
ROUNDS = 5  # in which both forms are timed
TOGETHER = 0.005  # seconds of work that are timed at once, so that waiting for it is little
MANY = 32  # calls at once, at most
LONGEST = 512  # tokens that are timed; behind it both forms take time in proportion

Found = TypeVar("Found")


class Sizes(NamedTuple):
    """What the time of a kernel depends on; the defaults are those it is compared at.

    D: head size. dtype: of queries, keys and values. heads, kv_heads: H and Hkv. chunk: tokens
    at once. clamped: whether sinks have queries of their own.
    """

    D: int
    dtype: mx.Dtype
    heads: int = 4
    kv_heads: int = 2
    window: int = 21
    sinks: int = 3
    chunk: int = 24
    clamped: bool = False

    @classmethod
    def of(
        cls, q: mx.array, k: mx.array, window: int = 1, sinks: int = 0, clamped: bool = False
    ) -> "Sizes":
        """Those of queries [B, H, L, D] and keys [B, Hkv, n, D]."""
        _, heads, chunk, D = q.shape
        return cls(D, q.dtype, heads, k.shape[1], window, sinks, chunk, clamped)

    @property
    def capacity(self) -> int:
        """Slots of a full window."""
        return self.window + self.sinks

    def alike(self) -> "Sizes":
        """The same for all that are timed as one: slots and tokens are powers of two."""
        slots, chunk = (1 << (n - 1).bit_length() for n in (self.capacity, self.longest().chunk))
        return self._replace(window=slots, sinks=0, chunk=chunk)

    def longest(self) -> "Sizes":
        """These, or with as many tokens as are timed."""
        return self._replace(chunk=min(self.chunk, LONGEST))


@dataclass(frozen=True)
class Check:
    """A kernel and the form it replaces, and inputs on which to compare and to time them.

    name: of the kernel and its variant. files: its sources. dispatches: per call.
    example: (sizes, tokens read before) -> random arguments. ours, theirs: the two forms.
    """

    name: str
    files: tuple[str, ...]
    dispatches: int
    example: Callable[[Sizes, int], tuple[Any, ...]]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def error(self, D: int, dtype: mx.Dtype) -> float:
        """The largest difference, relative to the largest number expected, while the window
        fills and when it has turned; may raise."""
        cases = ((Sizes(D, dtype), 18), (Sizes(D, dtype, clamped=True), 40))
        errors = _apart(lambda: [self._error(*case) for case in cases])
        return float(np.max(errors))  # NaN, if there is one

    def _error(self, sizes: Sizes, before: int) -> float:
        arguments = self.example(sizes, before)
        found, expected = (_arrays(form(*arguments)) for form in (self.ours, self.theirs))
        errors = [(abs(a - b)).max() / abs(b).max() for a, b in zip(found, expected, strict=True)]
        return float(np.max(errors))

    def times(self, sizes: Sizes, seconds: float = SECONDS / 4) -> tuple[float, float]:
        """Seconds of one call of our form and of the other, with a full window: the least of
        some rounds, which end after `seconds`; may raise."""
        return _apart(lambda: self._times(sizes.longest(), seconds))

    def _times(self, sizes: Sizes, seconds: float) -> tuple[float, float]:
        end = time.perf_counter() + seconds
        arguments = self.example(sizes, sizes.capacity)

        def timed(form: Callable[..., Any], calls: int) -> float:
            start = time.perf_counter()
            mx.eval([form(*arguments) for _ in range(calls)])
            return (time.perf_counter() - start) / calls

        forms = (self.ours, self.theirs)
        for form in forms:
            timed(form, 1)  # compiles it, and computes the arguments
        least = [timed(form, 1) for form in forms]
        calls = max(1, min(MANY, int(TOGETHER / max(*least, 1e-9))))
        for _ in range(ROUNDS):
            if time.perf_counter() >= end:
                break
            least = [min(t, timed(form, calls)) for t, form in zip(least, forms, strict=True)]
        mx.clear_cache()
        return least[0], least[1]

    def key(self, *what: object) -> str:
        """What a finding depends on: sources, MLX, the GPU and what MLX makes of the source."""
        parts = [self.name, *map(str, what), version("mlx"), device_name()]
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


@contextmanager
def without() -> Iterator[None]:
    """No kernel of ours serves in here."""
    was = os.environ.get("AHN_METAL")
    os.environ["AHN_METAL"] = "0"
    try:
        yield
    finally:
        os.environ.pop("AHN_METAL")
        if was is not None:
            os.environ["AHN_METAL"] = was


def device_name() -> str:
    """What MLX calls the default device."""
    return str(mx.device_info().get("device_name", ""))


def forced() -> bool:
    """Whether AHN_METAL=1 asks for every kernel that agrees, however long it takes."""
    return os.environ.get("AHN_METAL") == "1"


def chosen(check: Check, sizes: Sizes) -> bool:
    """Whether our kernel serves: it fits, agrees with the other form on this machine and, if
    it is not forced, is the faster there."""
    if not available() or sizes.D not in HEAD_DIMS or sizes.dtype not in DTYPES:
        return False
    with _LOCK:
        return _agrees(check, sizes.D, sizes.dtype) and (forced() or _faster(check, sizes))


# One thread compares and times, the others wait for what it finds.
_LOCK = Lock()


@cache
def _agrees(check: Check, D: int, dtype: mx.Dtype) -> bool:
    """The verdict, found once per machine, and a warning where it is no."""
    key = check.key(D, dtype)
    verdict = _read(_verdicts_file()).get(key)
    if not isinstance(verdict, str):
        try:
            error = check.error(D, dtype)
            verdict = "" if error <= tolerance(dtype) else f"is off by {error:.1e}"
        except Exception as e:  # a compiler's or driver's error has no type of its own
            verdict = f"failed ({_in_short(e)})"
        _remember(key, verdict)
    if verdict:
        _warn(check, D, dtype, verdict)
    return not verdict


class _Clock:
    """Which kernels are the faster, and how many seconds are left to find out."""

    def __init__(self) -> None:
        self.left = SECONDS
        self.faster: dict[tuple[Check, Sizes], bool] = {}


_CLOCK = _Clock()


def _faster(check: Check, sizes: Sizes) -> bool:
    """Whether our form took less time, found once per machine for sizes that are alike."""
    asked = (check, sizes.alike())
    if asked not in _CLOCK.faster:
        key = check.key(*sizes.alike())
        times = _as_times(_read(_verdicts_file()).get(key)) or _measure(check, sizes, key)
        # What there was no time for is MLX's own until another process has.
        _CLOCK.faster[asked] = times is not None and times[0] < times[1]
    return _CLOCK.faster[asked]


def _measure(check: Check, sizes: Sizes, key: str) -> tuple[float, float] | None:
    """Times both forms, in at most a quarter of what is left unless that is too short for one
    round; None if nothing is left, or if a form fails, with a warning."""
    if _CLOCK.left <= 0:
        return None
    start = time.perf_counter()
    try:
        times = check.times(sizes, _CLOCK.left / 4)
        _remember(key, times)
    except Exception as e:
        _warn(check, sizes.D, sizes.dtype, f"could not be timed ({_in_short(e)})")
        return None
    finally:
        _CLOCK.left -= time.perf_counter() - start
    return times


def _as_times(found: Any) -> tuple[float, float] | None:
    """Two positive numbers of seconds, if that is what was found."""
    if isinstance(found, list) and len(found) == 2 and all(type(t) is float for t in found):
        ours, theirs = found
        return (ours, theirs) if 0 < ours < math.inf and 0 < theirs < math.inf else None
    return None


def _warn(check: Check, D: int, dtype: mx.Dtype, what: str) -> None:
    kernel = f"Metal kernel {check.name} (head size {D}, {str(dtype).split('.')[-1]})"
    message = f"{kernel} {what}; MLX's own operations serve instead"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _apart(find: Callable[[], Found]) -> Found:
    """What `find` returns, from a thread of its own. Tracing belongs to a thread, and so do
    random numbers: none of the caller's are in the way or change."""

    def run() -> Found:
        mx.random.seed(0)
        try:
            return find()
        finally:
            mx.clear_streams()  # else the process may abort when it exits

    mx.synchronize()  # nothing else is being computed
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _arrays(results: mx.array | tuple[mx.array, ...]) -> list[np.ndarray]:
    several = results if isinstance(results, tuple) else (results,)
    return [np.array(x.astype(mx.float32)) for x in several]


def _verdicts_file() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "ahn-mlx" / "kernels.json"


def _remember(key: str, found: str | tuple[float, float]) -> None:
    """Beside what other processes have found by now."""
    file = _verdicts_file()
    _write(file, _read(file) | {key: found})


def _read(file: Path) -> dict[str, Any]:
    """What was found, by key; whoever asks looks whether it can be."""
    try:
        verdicts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _write(file: Path, verdicts: dict[str, Any]) -> None:
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(verdicts), encoding="utf-8")
        part.replace(file)
    except OSError:  # all is found out again next time
        with suppress(OSError):
            part.unlink()


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
