"""The emulator in the place of mx.fast.metal_kernel: for tests of unchanged product code."""

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import mlx.core as mx

from .capture import KernelSpec, Template
from .run import Result, run_kernel


class EmulatedMetal:
    """What the `emulated_metal` fixture gives: settings for, and a record of, all launches."""

    def __init__(self) -> None:
        self.mode = "check"
        self.order: str | None = None
        self.allow_unwritten = False
        self.allow_partial_collectives = False
        self.calls: list[tuple[str, Result]] = []  # kernel name, result

    def in_place(self) -> AbstractContextManager[Any]:
        """While this lasts, MLX has the emulator for its Metal, and that as its default."""
        stack = ExitStack()
        stack.enter_context(mock.patch.object(mx.fast, "metal_kernel", self.metal_kernel))
        stack.enter_context(mock.patch.object(mx.metal, "is_available", lambda: True))
        gpu = mx.Device(mx.gpu)
        stack.enter_context(mock.patch.object(mx, "default_device", lambda: gpu))
        return stack

    @property
    def last(self) -> Result:
        return self.calls[-1][1]

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
    ) -> "EmulatedKernel":
        """Same arguments as mx.fast.metal_kernel."""
        spec = KernelSpec(
            name,
            tuple(input_names),
            tuple(output_names),
            source,
            header,
            ensure_row_contiguous,
            atomic_outputs,
        )
        return EmulatedKernel(spec, self)


class EmulatedKernel:
    """Called like what mx.fast.metal_kernel returns."""

    def __init__(self, spec: KernelSpec, metal: EmulatedMetal):
        self.spec = spec
        self.metal = metal

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        m = self.metal
        result = run_kernel(
            self.spec,
            inputs,
            template,
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            init_value=init_value,
            mode=m.mode,
            order=m.order,
            allow_unwritten=m.allow_unwritten,
            allow_partial_collectives=m.allow_partial_collectives,
        )
        m.calls.append((self.spec.name, result))
        return result.outputs


def import_with_metal(module: str, metal: EmulatedMetal) -> ModuleType:
    """A private copy of a module that makes its kernels while it is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(module)
    copy = importlib.util.module_from_spec(spec)
    with metal.in_place():
        spec.loader.exec_module(copy)
    return copy
