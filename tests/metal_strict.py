"""A kernel's launch checked with Metal's rules in place of being run."""

import mlx.core as mx
import pytest
from emulator import KernelSpec, strict_check


def check_strictly(monkeypatch: pytest.MonkeyPatch, small: tuple[str, ...]) -> None:
    """From now on each launch is type-checked, also with the inputs `small` so small that MLX
    passes them as `constant`; its outputs are zeros."""

    def build(*, name, input_names, output_names, source, header):  # type: ignore[no-untyped-def]
        spec = KernelSpec(name, tuple(input_names), tuple(output_names), source, header)

        def call(*, inputs, template, output_shapes, output_dtypes, **_):  # type: ignore[no-untyped-def]
            names = [n for n in small if n in input_names]
            strict_check(spec, inputs, template, output_dtypes=output_dtypes, small=names)
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(mx.fast, "metal_kernel", build)
