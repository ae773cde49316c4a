"""MLX's own text of a custom kernel, on machines without Metal too.

Tracing a kernel call for export with verbose=True makes MLX print the exact source it
would compile. Signature, template and launch arguments therefore cannot drift from MLX's.
"""

import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

# Kept here because tests put the emulator in its place.
_metal_kernel = mx.fast.metal_kernel
_lock = threading.Lock()

Template = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class KernelSpec:
    """The arguments of mx.fast.metal_kernel."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def __post_init__(self) -> None:
        # Lists are as good, but a spec is the key of a cache.
        object.__setattr__(self, "input_names", tuple(self.input_names))
        object.__setattr__(self, "output_names", tuple(self.output_names))


@dataclass(frozen=True)
class Argument:
    """One argument of the generated function: a buffer, or a thread attribute."""

    name: str
    type: str
    is_buffer: bool
    space: str = ""  # "device" or "constant"
    is_reference: bool = False


@dataclass(frozen=True)
class Generated:
    """MLX's text, cut at its seams."""

    header: str
    signature: str
    body: str
    function: str  # name, with template arguments if any
    arguments: tuple[Argument, ...]


def _print_to_file(call: Any, arrays: Sequence[mx.array]) -> str:
    """What MLX writes to file descriptor 1 while `call` is traced."""
    with _lock, tempfile.TemporaryFile() as out, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(out.fileno(), 1)
        try:
            mx.export_function(os.path.join(folder, "kernel.mlxfn"), call, *arrays)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        out.seek(0)
        return out.read().decode()


@lru_cache(maxsize=1024)
def _capture(
    spec: KernelSpec,
    described: tuple[Any, ...],
    exact_template: tuple[tuple[str, "_Exact"], ...],
    output_dtypes: tuple[mx.Dtype, ...],
) -> Generated:
    # (shape, dtype) of an array, or a Python number
    inputs = [x.value if isinstance(x, _Exact) else x for x in described]
    template = [(n, v.value) for n, v in exact_template]
    arrays = [mx.zeros(*x) for x in inputs if isinstance(x, tuple)]

    def call(*given: mx.array) -> Any:
        rest = iter(given)
        kernel: Any = _metal_kernel(**vars(spec))
        return kernel(
            inputs=[next(rest) if isinstance(x, tuple) else x for x in inputs],
            template=template,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)] * len(output_dtypes),
            output_dtypes=list(output_dtypes),
            verbose=True,
            stream=mx.gpu,
        )

    text = _print_to_file(call, arrays)
    text = text.split("```\n", 1)[1].rsplit("\n```", 1)[0]
    return _cut(spec, text)


def capture(
    spec: KernelSpec,
    inputs: Sequence[Any],
    template: Template | None,
    output_dtypes: Sequence[mx.Dtype],
) -> Generated:
    """The text that MLX generates for a call of the kernel."""
    described = tuple(
        (_standing_shape(x.shape), x.dtype) if isinstance(x, mx.array) else _Exact(x)
        for x in inputs
    )
    key = tuple((n, _Exact(v)) for n, v in template or ())
    return _capture(spec, described, key, tuple(output_dtypes))


class _Exact:
    """A value that equals only its like: 1 == True == 1.0 for a cache, not for a kernel."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Exact)
            and type(self.value) is type(other.value)
            and bool(self.value == other.value)
        )

    def __hash__(self) -> int:
        return hash((type(self.value), str(self.value)))


def _standing_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A small shape for which MLX generates the same text: it asks for ndim and size < 8."""
    size = 1
    for n in shape:
        size *= n
    if not shape:
        return ()
    return (*([1] * (len(shape) - 1)), 1 if size < 8 else 8)


_PARAMETER = re.compile(
    r"\s*(?:(?P<buffer>(?:const )?(?P<space>device|constant) )?(?P<type>.*?)(?P<ref>[&*]?)) "
    r"(?P<name>\w+) \[\[(?P<attribute>\w+)(?:\(\d+\))?\]\]\s*"
)


def _cut(spec: KernelSpec, text: str) -> Generated:
    start = len(spec.header)
    if not text.startswith(spec.header):
        raise RuntimeError(f"{spec.name}: MLX no longer puts the header first")
    begin = text.index("[[kernel]] void ", start)
    end = text.index(") {\n", begin) + len(") {\n")
    signature = text[start:end]
    if text[end : end + len(spec.source)] != spec.source:
        raise RuntimeError(f"{spec.name}: MLX no longer puts the source after the signature")
    name, parameters = text[begin + len("[[kernel]] void ") : end - len(") {\n")].split("(", 1)
    arguments = []
    for line in parameters.split(",\n"):
        m = _PARAMETER.fullmatch(line)
        if not m:
            raise RuntimeError(f"{spec.name}: unknown parameter in MLX's text: {line}")
        is_buffer = m["attribute"] == "buffer"
        space = m["space"] or ""
        arguments.append(Argument(m["name"], m["type"].strip(), is_buffer, space, m["ref"] == "&"))
    instance = re.search(r"decltype\((.*?>)\)", text[end + len(spec.source) :])
    function = instance[1] if instance else name
    return Generated(spec.header, signature, spec.source, function, tuple(arguments))
