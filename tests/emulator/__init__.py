"""Runs and checks Metal kernels on a CPU. See docs/metal-emulator.md."""

from .capture import KernelSpec
from .errors import KernelError
from .metal import EmulatedKernel, EmulatedMetal, import_with_metal
from .run import Result, run_kernel
from .runtime import Counters, Traffic
from .strict import strict_check
from .toolchain import why_no_clang, why_no_gxx

__all__ = [
    "Counters",
    "EmulatedKernel",
    "EmulatedMetal",
    "KernelError",
    "KernelSpec",
    "Result",
    "Traffic",
    "import_with_metal",
    "run_kernel",
    "strict_check",
    "why_no_clang",
    "why_no_gxx",
]
