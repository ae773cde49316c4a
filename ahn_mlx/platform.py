"""What has to happen before MLX is imported, and what the machine turned out to be.

On Linux MLX's wheel brings a reference BLAS, some 30 times slower than OpenBLAS. A
library loaded earlier with global symbols takes its place, so importing this module
loads OpenBLAS: the system's, or the one that the faiss-cpu wheel bundles.
"""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import AHNError

if TYPE_CHECKING:
    import mlx.core as mx


def pip_install(*what: str) -> str:
    """The command that installs this into the Python that runs here, wherever a bare `pip`
    would lead: a tool of pipx or uv has an environment of its own."""
    python = Path(sys.executable)
    found = shutil.which("pip")
    if found and Path(found).parent == python.parent:
        command = ["pip", "install"]
    elif importlib.util.find_spec("pip"):
        command = [str(python), "-m", "pip", "install"]
    else:
        command = ["uv", "pip", "install", "--python", str(python)]
    return shlex.join([*command, *what])


# Either command makes a fast BLAS available on Linux.
BLAS_COMMANDS = ("apt-get install libopenblas0-pthread", pip_install("faiss-cpu"))

SYSTEM_OPENBLAS = "libopenblas.so.0"

# In the order in which they need each other; arm64 has no libquadmath.
BUNDLED_LIBRARIES = ("libquadmath*", "libgfortran*", "libgomp*", "libopenblas*")


@dataclass(frozen=True)
class Blas:
    """Which matrix product the CPU backend of MLX will call."""

    name: str
    fast: bool
    note: str = ""


# What mlx.launch, mpirun and srun set in the processes that they start: which, and of how many.
LAUNCHED = {
    "MLX_RANK": "MLX_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
}


def launched_rank() -> int | None:
    """Which of the processes that mlx.launch started this one is; None if it is none, or known
    to be the only one."""
    for rank, size in LAUNCHED.items():
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size) != "1":
            return int(os.environ[rank])
    return None


def on_cpu() -> bool:
    """Whether MLX computes on the CPU now."""
    import mlx.core as mx

    return mx.default_device().type == mx.cpu


def on_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU now."""
    import mlx.core as mx

    return mx.cuda.is_available() and not on_cpu()


class Tiles(NamedTuple):
    """How finely work is cut. chunk: tokens of a recurrence at once, a power of two. query:
    queries of prefill at once."""

    chunk: int
    query: int


def tiles() -> Tiles:
    """Those of the device: scores that stay in a processor's cache, or few launches."""
    return Tiles(32, 64) if on_cpu() else Tiles(128, 256)


def gpu_bytes() -> int:
    """Memory of the GPU that MLX computes on, shared with the machine on a Mac; 0 on a CPU."""
    import mlx.core as mx

    info = {} if on_cpu() else mx.device_info()
    return int(info.get("memory_size", info.get("total_memory", 0)))


def default_dtype() -> "mx.Dtype | None":
    """float32 on the CPU, where half precision is slow; None on a GPU: as stored."""
    import mlx.core as mx

    return mx.float32 if on_cpu() else None


# What MLX says of it has no type of its own: "[malloc] Unable to allocate ...", "Insufficient
# Memory" of Metal's queue, "out of memory" of CUDA. A thread needs some too: "can't start new
# thread" of Python, "Resource temporarily unavailable" of C++.
_NO_MEMORY = re.compile(
    r"allocate|insufficient memory|out ?of ?memory|start new thread|temporarily unavailable",
    re.IGNORECASE,
)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Memory that is not there is an AHNError with this advice. Also decorates a function."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not _NO_MEMORY.search(str(e)):
            raise
        reason = " ".join(str(e).split())[:200] or "no more is given"
        raise AHNError(f"not enough memory ({reason}); {advice}") from None


def _prepare() -> Blas:
    if sys.platform != "linux":
        return Blas("Accelerate", fast=True)
    if "mlx.core" in sys.modules:
        note = "mlx.core was imported before ahn_mlx; import ahn_mlx first"
        warnings.warn(f"matrix products may be slow: {note}", RuntimeWarning, stacklevel=3)
        return Blas("as MLX found it", fast=False, note=note)
    # Threads that spin while they wait starve MLX's own on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for load in (_system_openblas, _bundled_openblas):
        found = load()
        if found is not None:
            return found
    return Blas("reference BLAS of the MLX wheel", fast=False)


def _system_openblas() -> Blas | None:
    try:
        library = ctypes.CDLL(SYSTEM_OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return _describe(library, SYSTEM_OPENBLAS)


def _bundled_openblas() -> Blas | None:
    spec = importlib.util.find_spec("faiss")  # finds the package, does not run it
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent.parent / "faiss_cpu.libs"
    library = None
    try:
        for pattern in BUNDLED_LIBRARIES:
            for file in sorted(directory.glob(pattern)):
                library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return _describe(library, "bundled with faiss-cpu") if library else None


def _describe(library: ctypes.CDLL, source: str) -> Blas | None:
    if not hasattr(library, "cblas_sgemm"):
        return None
    version = ""
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        # "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..."
        version = " ".join(library.openblas_get_config().decode().split()[1:2])
    return Blas(f"OpenBLAS {version} ({source})", fast=True)


BLAS = _prepare()
