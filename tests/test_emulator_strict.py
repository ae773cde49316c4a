"""What Metal's compiler would reject, and what it would not."""

from typing import Any

import mlx.core as mx
import pytest
from emulator import EmulatedMetal, KernelError, KernelSpec, import_with_metal, strict_check

pytest_plugins = ["emulator.plugin"]
pytestmark = pytest.mark.usefixtures("needs_strict")

LARGE, SMALL = mx.zeros(64), mx.zeros(4)  # `device` and `constant` to MLX
SETUP = "uint i = thread_position_in_grid.x; threadgroup float buf[32]; buf[i] = a[i];\n"
HEADER = """
inline float from_constant(constant float* p) { return p[0]; }
inline float from_device(const device float* p) { return p[0]; }
"""


def check(source: str, a: mx.array = LARGE, header: str = HEADER, **options: Any) -> None:
    spec = KernelSpec("strict", ("a",), ("o",), source, header)
    strict_check(spec, [a], **({"output_dtypes": [mx.float32]} | options))


ERRORS: dict[str, tuple[str, str]] = {
    "device pointer as threadgroup": (SETUP + "threadgroup float* p = o; o[i] = p[0];", "strict:2"),
    "threadgroup pointer as device": (SETUP + "device float* p = buf; o[i] = p[0];", "strict:2"),
    "device pointer as thread": (SETUP + "thread float* p = o; o[i] = p[0];", "strict:2"),
    "device pointer without a space": (SETUP + "const float* p = a; o[i] = p[0];", "strict:2"),
    "thread pointer without a space": (
        "float s[4];\nfloat* p = s; p[0] = a[0]; o[0] = p[0];",
        r"strict:2: pointer or reference without an address space: float \* p",
    ),
    "reference without a space": ("float s = 1;\nfloat& r = s; o[0] = r;", "strict:2: .*float & r"),
    "write to an input": ("a[0] = 1; o[0] = 0;", "not assignable|read-only|const"),
    "device input to a constant parameter": ("o[0] = from_constant(a);", "no matching function"),
    "cast between spaces": (
        SETUP + "threadgroup float* p = (threadgroup float*)o; o[i] = p[0];",
        "cast between address spaces|C-style cast",
    ),
    "either space": (SETUP + "auto p = i > 3 ? o : buf; o[i] = p[0];", "strict:2"),
    "double": ("double d = a[0]; o[0] = d;", "poisoned"),
    "new": ("o[0] = *new float(1);", "poisoned"),
    "goto": ("goto end; end: o[0] = 1;", "poisoned"),
    "exception": ("throw 1;", "poisoned"),
    "std": ("o[0] = std::max(a[0], 1.0f);", "std"),
    "unknown function": ("o[0] = simd_summ(a[0]);", "simd_summ"),
    "uninitialised variable": ("float x;\no[0] = x;", "uninitialized"),
    "variable length array": ("int n = a[0]; float s[n]; s[0] = 1; o[0] = s[0];", "strict:1"),
    "wrong matrix types": (
        "simdgroup_float8x8 m; threadgroup half h[64]; simdgroup_load(m, h, 8); o[0] = 0;",
        "no matching function",
    ),
    "missing return": ("o[0] = f(1);", "header"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_is_rejected(name: str) -> None:
    source, message = ERRORS[name]
    header = HEADER
    if name == "missing return":
        header += "inline float f(float x) { if (x > 2) return 1; }\n"
    with pytest.raises(KernelError, match=r"(?s)strict is not valid Metal.*(" + message + ")"):
        check(source, header=header)


def test_unqualified_parameter_in_the_header_is_rejected() -> None:
    header = "\ninline void add(thread float& x, float* p) { x += p[0]; }\n"
    with pytest.raises(KernelError, match=r"strict.header:2: .*float \* p"):
        check("float x = 0, s[2] = {a[0], 1}; add(x, s); o[0] = x;", header=header)


def test_implicit_bfloat_is_rejected() -> None:
    with pytest.raises(KernelError, match=r"bf16|bfloat"):
        check("o[0] = a[0] * 2.0f;", output_dtypes=[mx.bfloat16])
    check("o[0] = bfloat16_t(a[0] * 2.0f);", output_dtypes=[mx.bfloat16])


def test_small_inputs_are_another_kernel() -> None:
    source = "o[0] = from_device(a);"
    check(source)
    with pytest.raises(KernelError, match="no matching function"):
        check(source, SMALL)
    with pytest.raises(KernelError, match="no matching function"):
        check(source, small=["a"])


@pytest.mark.parametrize(
    "source",
    [
        SETUP + "threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = buf[31 - i];",
        "o[0] = from_device(a);",
        "float s[4] = {1, 2, 3, 4}; thread float* p = s; thread float& r = s[1]; o[0] = p[2] + r;",
        "auto p = a + 3; const device float* q = p; o[0] = q[1];",
        "float4 v = float4(1, 2, 3, 4); half4 h = half4(v); o[0] = v.x + dot(v, v) + h.y;",
        "o[0] = fast::exp(a[0]) + precise::sqrt(2.0) + clamp(a[1], 0.0f, 1.0f);",
        "simdgroup_float8x8 x(0.0f), y; simdgroup_load(y, a, 8);\n"
        "simdgroup_multiply_accumulate(x, y, y, x); simdgroup_store(x, o, 8);",
        "o[0] = simd_shuffle_xor(simd_sum(a[0]), 1) + simd_max(a[1]) + simd_broadcast(a[2], 0);",
        "const device float4* p = (const device float4*)a; o[0] = p[1].w;",
    ],
)
def test_is_accepted(source: str) -> None:
    check(source)


def gated_delta_inputs(dtype: mx.Dtype, mask: bool, vector_gate: bool) -> list[Any]:
    q, v = mx.zeros((1, 2, 1, 128), dtype), mx.zeros((1, 2, 2, 128), dtype)
    g = mx.zeros((1, 2, 2, 128) if vector_gate else (1, 2, 2))
    inputs = [q, q, v, g, mx.zeros((1, 2, 2)), mx.zeros((1, 2, 128, 128)), 2]
    return inputs + ([mx.zeros((1, 2), mx.bool_)] if mask else [])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["", "_masked", "_vec", "_vec_masked", "_xtree", "_packed"])
def test_gated_delta_kernels_of_mlx_lm_are_accepted(name: str, dtype: mx.Dtype) -> None:
    module = import_with_metal("mlx_lm.models.gated_delta", EmulatedMetal())
    kernel = getattr(module, f"_gated_delta_kernel{name}")
    template = [("InT", dtype), ("StT", mx.float32), ("Dk", 128), ("Dv", 128), ("Hk", 1), ("Hv", 2)]
    strict_check(
        kernel.spec,
        gated_delta_inputs(dtype, "masked" in name, "vec" in name),
        template,
        output_dtypes=[dtype, mx.float32],
        small=["g", "beta"],
    )
