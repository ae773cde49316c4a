"""The compiled runtime seen from Python, and what it counts."""

import ctypes
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from .toolchain import build_runtime

# Keep in step with emu::Kind in native/runtime.h.
COLLECTIVES = (
    "simd_sum",
    "simd_product",
    "simd_max",
    "simd_min",
    "simd_and",
    "simd_or",
    "simd_xor",
    "simd_prefix",
    "simd_shuffle",
    "simd_broadcast",
    "simd_vote",
    "simdgroup_multiply",
    "simdgroup_load",
    "simdgroup_store",
    "simdgroup_barrier",
    "threadgroup_barrier",
)
# A reduction or scan over 32 lanes is a tree of five shuffles.
SHUFFLES = dict.fromkeys(COLLECTIVES[:8], 5) | {"simd_shuffle": 1, "simd_broadcast": 1}
SPACES = ("device", "threadgroup", "constant")

LOCK = threading.Lock()  # one GPU


@dataclass(frozen=True)
class Traffic:
    """Bytes that one buffer saw. Keep the order of the runtime's counters.

    The plain counters add up what lanes ask for; they mislead, because hardware serves a
    simdgroup's lanes together. `*_per_simdgroup` counts each byte once per simdgroup that
    touched it, `*_per_threadgroup` once per threadgroup, `unique_*` once.
    """

    space: str
    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    read_per_simdgroup: int = 0
    read_per_threadgroup: int = 0
    unique_read: int = 0
    written_per_simdgroup: int = 0
    written_per_threadgroup: int = 0
    unique_written: int = 0


@dataclass(frozen=True)
class Counters:
    """What a launch did. Regression guards, never timings."""

    buffers: dict[str, Traffic] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)  # once per simdgroup, not per lane
    threadgroup_memory: int = 0  # bytes
    same_value_writes: int = 0  # unordered stores of the same value by several threads

    @property
    def shuffles(self) -> int:
        """Data exchanges between lanes, in units of one shuffle."""
        return sum(SHUFFLES.get(name, 0) * n for name, n in self.collectives.items())

    def total(self, counter: str, *, space: str = "device", without: Iterable[str] = ()) -> int:
        """Sum of a Traffic counter over the buffers of a space."""
        left_out = set(without)
        unknown = left_out - set(self.buffers)
        if unknown:
            raise KeyError(f"no such buffers: {sorted(unknown)}")
        return sum(
            getattr(t, counter)
            for name, t in self.buffers.items()
            if t.space == space and name not in left_out
        )


@lru_cache
def library() -> ctypes.CDLL:
    """The process's only runtime: kernels that are loaded later find their symbols here."""
    lib = ctypes.CDLL(str(build_runtime()), mode=ctypes.RTLD_GLOBAL)
    u32x3 = ctypes.POINTER(ctypes.c_uint32)
    u64s = ctypes.POINTER(ctypes.c_uint64)
    p, i, u32, u64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64
    lib.emu_buffer.restype = p
    lib.emu_buffer.argtypes = [ctypes.c_char_p, p, u64, u32, i, i]
    lib.emu_launch.argtypes = [p, ctypes.POINTER(p), u32x3, u32x3, i, i]
    lib.emu_error.restype = ctypes.c_char_p
    lib.emu_error_place.restype = ctypes.c_char_p
    lib.emu_error_offset.restype = u64
    lib.emu_unwritten.restype = u64
    lib.emu_unwritten.argtypes = [i, u64s]
    lib.emu_traffic.argtypes = [i, u64s]
    lib.emu_region_name.restype = ctypes.c_char_p
    lib.emu_threadgroup_variables.argtypes = [ctypes.POINTER(i)]
    lib.emu_totals.argtypes = [u64s]
    return lib


def read_counters(names: list[str], spaces: list[int]) -> Counters:
    """Counters of the launch that has just ended."""
    lib = library()
    buffers = {}

    def traffic(slot: int, space: int) -> Traffic:
        out = (ctypes.c_uint64 * 10)()
        lib.emu_traffic(slot, out)
        return Traffic(SPACES[space], *out)

    for slot, (name, space) in enumerate(zip(names, spaces, strict=True)):
        buffers[name] = traffic(slot, space)
    first = ctypes.c_int()
    n = lib.emu_threadgroup_variables(ctypes.byref(first))
    for slot in range(first.value, first.value + n):
        buffers[lib.emu_region_name(slot).decode()] = traffic(slot, SPACES.index("threadgroup"))
    out = (ctypes.c_uint64 * (len(COLLECTIVES) + 2))()
    lib.emu_totals(out)
    counts = {k: n for k, n in zip(COLLECTIVES, out, strict=False) if n}
    return Counters(buffers, counts, out[len(COLLECTIVES)], out[len(COLLECTIVES) + 1])
