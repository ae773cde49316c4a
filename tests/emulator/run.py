"""Run a kernel on the emulated GPU."""

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .capture import Generated, KernelSpec, Template, capture
from .errors import KernelError
from .runtime import LOCK, SPACES, Counters, library, read_counters
from .source import executable
from .toolchain import MODES, build_kernel, lines_of

# numpy has no bfloat16: its bits travel as uint16.
NUMPY = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.bool_: np.bool_,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
}


@dataclass(frozen=True)
class Result:
    """outputs as MLX arrays, what was counted, and what the compiler warned of."""

    outputs: list[mx.array]
    counters: Counters = field(default_factory=Counters)
    warnings: list[str] = field(default_factory=list)


def run_kernel(
    spec: KernelSpec,
    inputs: Sequence[Any],
    template: Template | None = None,
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    init_value: float | None = None,
    mode: str = "check",
    order: str | None = None,
    allow_unwritten: bool = False,
    allow_partial_collectives: bool = False,
) -> Result:
    """Execute a kernel as mx.fast.metal_kernel would be called.

    mode: "check" finds errors, "count" measures traffic, "fast" has guard pages only.
    order: in which lanes and threadgroups run, "ascending", "descending" or "both"
        (outputs must then agree bit for bit); by default "both" for check, else "ascending".
    allow_unwritten: output elements that no thread writes are no error (check mode).
    allow_partial_collectives: simd functions may run with part of a simdgroup's lanes.

    Raises KernelError on anything that Metal would not allow or define.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {sorted(MODES)}")
    order = order or ("both" if mode == "check" else "ascending")
    if order not in ("ascending", "descending", "both"):
        raise ValueError(f"order {order!r} is none of ascending, descending, both")
    arrays = [_concrete(spec, x) for x in inputs]
    generated = capture(spec, arrays, template, output_dtypes)
    code = executable(spec.name, generated)
    path, log = build_kernel(spec.name, code, mode)
    launch = _Launch(spec, generated, path, arrays, grid, threadgroup, output_shapes, output_dtypes)
    need_all = mode == "check" and not allow_unwritten

    def run(descending: bool) -> tuple[list[np.ndarray], Counters]:
        with LOCK:
            return launch.run(init_value, descending, allow_partial_collectives, need_all)

    outputs, counters = run(order == "descending")
    if order == "both":
        _require_same(spec, outputs, run(True)[0])
    notes = [line for line in log.splitlines() if "warning:" in line]
    if counters.same_value_writes:
        notes.append(
            f"{counters.same_value_writes} unordered stores of one value by several threads"
        )
    made = [_to_mlx(a, d) for a, d in zip(outputs, output_dtypes, strict=True)]
    return Result(made, counters, notes)


def _concrete(spec: KernelSpec, x: Any) -> Any:
    """MLX arrays and Python numbers stay, anything else becomes an array."""
    if isinstance(x, bool | int | float):
        return x
    x = x if isinstance(x, mx.array) else mx.array(x)
    try:
        mx.eval(x)
    except Exception as e:
        raise KernelError(
            f"{spec.name}: an input is not known yet; the emulator cannot run inside mx.compile "
            "or a gradient (mx.disable_compile() helps)"
        ) from e
    return x


def _storage(x: Any) -> np.ndarray:
    if isinstance(x, bool):
        return np.array(x)
    if isinstance(x, int):
        return np.array(x, np.int32)
    if isinstance(x, float):
        return np.array(x, np.float32)
    if x.dtype not in NUMPY:
        raise KernelError(f"the emulator has no buffers of {x.dtype}")
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


def _to_mlx(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(a).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(a)


def _require_same(spec: KernelSpec, a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for name, x, y in zip(spec.output_names, a, b, strict=True):
        differ = np.flatnonzero(_bits(x) != _bits(y))
        if differ.size:
            i = int(differ[0])
            raise KernelError(
                f"{spec.name}: output {name} depends on the order in which lanes run: element {i} "
                f"is {x.flat[i]} in ascending and {y.flat[i]} in descending order"
            )


def _bits(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1).view(f"u{a.itemsize}")


@lru_cache(maxsize=256)
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


class _Launch:
    """One call of a kernel: its buffers, and how to tell where it failed."""

    def __init__(
        self,
        spec: KernelSpec,
        generated: Generated,
        path: Path,
        inputs: Sequence[Any],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ):
        self.spec, self.generated, self.path = spec, generated, path
        self.grid, self.threadgroup = grid, threadgroup
        self.inputs: dict[str, np.ndarray] = {}
        for name, x in zip(spec.input_names, inputs, strict=True):
            a = _storage(x)
            if spec.ensure_row_contiguous:
                a = np.ascontiguousarray(a).reshape(a.shape)
            self.inputs[name] = a
        self.outputs = {
            name: (tuple(shape), dtype)
            for name, shape, dtype in zip(
                spec.output_names, output_shapes, output_dtypes, strict=True
            )
        }

    def run(
        self, init_value: float | None, descending: bool, partial: bool, need_all: bool
    ) -> tuple[list[np.ndarray], Counters]:
        lib = library()
        entry = ctypes.cast(_load(self.path).emu_entry, ctypes.c_void_p)
        if lib.emu_reset():
            raise OSError("the emulator cannot reserve its address space")
        buffers = [a for a in self.generated.arguments if a.is_buffer]
        spaces = [SPACES.index(a.space) for a in buffers]
        pointers: list[int] = []
        for a, space in zip(buffers, spaces, strict=True):
            pointers.append(self._place(a.name, space, init_value))
        args = (ctypes.c_void_p * len(pointers))(*pointers)
        u32x3 = ctypes.c_uint32 * 3
        if lib.emu_launch(
            entry, args, u32x3(*self.grid), u32x3(*self.threadgroup), descending, partial
        ):
            raise KernelError(self._report())
        outputs = []
        for i, (a, pointer) in enumerate(zip(buffers, pointers, strict=True)):
            if a.name not in self.outputs:
                continue
            shape, dtype = self.outputs[a.name]
            out: np.ndarray = np.empty(shape, NUMPY[dtype])
            ctypes.memmove(out.ctypes.data, pointer, out.nbytes)
            outputs.append(out)
            if need_all and init_value is None:
                self._require_written(i, a.name, out)
        return outputs, read_counters([a.name for a in buffers], spaces)

    def _place(self, name: str, space: int, init_value: float | None) -> int:
        """Give a buffer to the runtime; the address that the kernel gets."""
        if name in self.outputs:
            shape, dtype = self.outputs[name]
            out: np.ndarray = np.empty(shape, NUMPY[dtype])
            if init_value is not None:
                out[...] = _storage(mx.array(init_value).astype(dtype))
            return self._buffer(name, out, space, init_value is not None)
        if name in self.inputs:
            a = self.inputs[name]
            if a.flags.c_contiguous:
                return self._buffer(name, a, space)
            # All the storage that the strides reach, as it lies in memory.
            low, high = np.lib.array_utils.byte_bounds(a)
            reach = np.frombuffer(
                memoryview((ctypes.c_char * (high - low)).from_address(low)),
                np.dtype(f"V{a.itemsize}"),
            )
            return self._buffer(name, reach, space) + a.ctypes.data - low
        owner, _, what = name.rpartition("_")
        a = self.inputs[owner]
        described: dict[str, np.ndarray] = {
            "shape": np.array(a.shape, np.int32),
            "strides": np.array([s // a.itemsize for s in a.strides], np.int64),
            "ndim": np.array([a.ndim], np.int32),
        }
        return self._buffer(name, described[what], space)

    def _buffer(self, name: str, a: np.ndarray, space: int, filled: bool = True) -> int:
        data = a.ctypes.data if filled else None
        grain = min(a.itemsize, 4)
        writable = name in self.outputs
        pointer = library().emu_buffer(name.encode(), data, a.nbytes, grain, space, writable)
        if not pointer:
            raise KernelError(f"{self.spec.name}: buffer {name} is too large, or one too many")
        return int(pointer)

    def _require_written(self, slot: int, name: str, out: np.ndarray) -> None:
        where = ctypes.c_uint64()
        n = library().emu_unwritten(slot, ctypes.byref(where))
        if n:
            first = where.value * min(out.itemsize, 4) // out.itemsize
            raise KernelError(
                f"{self.spec.name}: output {name} is unwritten at {n} of {out.size} elements, "
                f"the first is {first}"
            )

    def _report(self) -> str:
        lib = library()
        text = f"{self.spec.name}: {lib.emu_error().decode()}"
        text = re.sub(
            r"(source|header) line (\d+)", lambda m: m[0] + self._quote(m[1], int(m[2])), text
        )
        place = lib.emu_error_place().decode()
        if place:
            file, line = place.rsplit(":", 1)
            return f"{text}\n  at {self._line(file, int(line))}"
        here = self._find(lib.emu_error_offset(0))
        other = self._find(lib.emu_error_offset(1))
        return (
            text + (f"\n  at {here}" if here else "") + (f"\n  first at {other}" if other else "")
        )

    def _find(self, offset: int) -> str:
        for file, line in lines_of(self.path, offset):
            if file in (self.spec.name, f"{self.spec.name}.header"):
                return self._line(file, line)
        return ""

    def _line(self, file: str, line: int) -> str:
        part = "header" if file.endswith(".header") else "source"
        return f"{part} line {line}{self._quote(part, line)}"

    def _quote(self, part: str, line: int) -> str:
        lines = getattr(self.spec, part).split("\n")
        return f": {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
