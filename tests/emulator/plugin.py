"""The emulator in the place of mx.fast.metal_kernel: for tests of unchanged product code."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest

from .capture import KernelSpec, Template
from .run import Result, run_kernel
from .toolchain import why_no_clang, why_no_gxx


class EmulatedMetal:
    """What the `emulated_metal` fixture gives: settings for, and a record of, all launches."""

    def __init__(self) -> None:
        self.mode = "check"
        self.order: str | None = None
        self.allow_unwritten = False
        self.allow_partial_collectives = False
        self.calls: list[tuple[str, Result]] = []  # kernel name, result

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


def _need(reason: str | None) -> None:
    """Skip visibly on a user's machine; on CI a missing compiler is a failure."""
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def needs_emulator() -> None:
    _need(why_no_gxx())


@pytest.fixture
def needs_strict() -> None:
    _need(why_no_clang())


def _in_place(metal: EmulatedMetal) -> Any:
    return (
        mock.patch.object(mx.fast, "metal_kernel", metal.metal_kernel),
        mock.patch.object(mx.metal, "is_available", lambda: True),
    )


@pytest.fixture
def emulated_metal(needs_emulator: None) -> Iterator[EmulatedMetal]:
    """mx.fast.metal_kernel runs on the emulator, and Metal says that it is there."""
    metal = EmulatedMetal()
    kernel, available = _in_place(metal)
    with kernel, available:
        yield metal


def import_with_metal(module: str, metal: EmulatedMetal) -> ModuleType:
    """A private copy of a module that makes its kernels while it is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(module)
    copy = importlib.util.module_from_spec(spec)
    kernel, available = _in_place(metal)
    with kernel, available:
        spec.loader.exec_module(copy)
    return copy
