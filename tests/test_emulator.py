"""The emulator computes what Metal would, and counts what it should."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import EmulatedMetal, KernelSpec, Result, import_with_metal, run_kernel

pytest_plugins = ["emulator.plugin"]
pytestmark = pytest.mark.usefixtures("needs_emulator")

SETUP = "uint i = thread_position_in_grid.x; [[maybe_unused]] uint lane = i % 32;\n"
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def run(source: str, inputs: list[Any], shape: tuple[int, ...] = (64,), **options: Any) -> Result:
    names = ("a", "b", "c")[: len(inputs)]
    contiguous = options.pop("contiguous", True)
    spec = KernelSpec("right", names, ("o",), source, options.pop("header", ""), contiguous)
    call: dict[str, Any] = {
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
        "output_shapes": [shape],
        "output_dtypes": [mx.float32],
    }
    return run_kernel(spec, inputs, **(call | options))


def values(source: str, *inputs: Any, **options: Any) -> np.ndarray:
    return np.array(run(SETUP + source, list(inputs), **options).outputs[0])


def numbers(seed: int = 0, shape: tuple[int, ...] = (64,)) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


# A lane's result, given the 32 values of its simdgroup.
SIMD: dict[str, Any] = {
    "simd_sum(x)": lambda x, lane: x.sum(),
    "simd_product(x)": lambda x, lane: x.prod(),
    "simd_max(x)": lambda x, lane: x.max(),
    "simd_min(x)": lambda x, lane: x.min(),
    "simd_shuffle(x, (lane + 5) % 32)": lambda x, lane: x[(lane + 5) % 32],
    "simd_shuffle_xor(x, 9)": lambda x, lane: x[lane ^ 9],
    "simd_shuffle_down(x, 3)": lambda x, lane: x[lane + 3] if lane < 29 else None,
    "simd_shuffle_up(x, 3)": lambda x, lane: x[lane - 3] if lane > 2 else None,
    "simd_shuffle_rotate_down(x, 3)": lambda x, lane: x[(lane + 3) % 32],
    "simd_shuffle_rotate_up(x, 3)": lambda x, lane: x[(lane - 3) % 32],
    "simd_broadcast(x, 7)": lambda x, lane: x[7],
    "simd_broadcast_first(x)": lambda x, lane: x[0],
    "simd_prefix_inclusive_sum(x)": lambda x, lane: x[: lane + 1].sum(),
    "simd_prefix_exclusive_sum(x)": lambda x, lane: x[:lane].sum(),
    "simd_any(x > 1)": lambda x, lane: (x > 1).any(),
    "simd_all(x > -9)": lambda x, lane: True,
    "popcount(ulong(simd_ballot(x > 0)))": lambda x, lane: (x > 0).sum(),
    "simd_and(uint(lane | 4))": lambda x, lane: 4,
    "simd_or(uint(lane))": lambda x, lane: 31,
}


@pytest.mark.parametrize("call", SIMD)
def test_simd_functions(call: str) -> None:
    x = numbers()
    got = values(f"float x = a[i]; o[i] = {call};", x)
    for i in range(64):
        want = SIMD[call](np.array(x)[i // 32 * 32 :][:32], i % 32)
        assert want is None or got[i] == pytest.approx(float(want), rel=1e-5, abs=1e-6)


SCALAR: dict[str, Any] = {
    "exp(x)": np.exp,
    "fast::exp(x)": np.exp,
    "precise::exp(x)": np.exp,
    "exp2(x)": np.exp2,
    "log(abs(x) + 1)": lambda x: np.log(np.abs(x) + 1),
    "precise::sqrt(fabs(x))": lambda x: np.sqrt(np.abs(x)),
    "rsqrt(1 + x * x)": lambda x: 1 / np.sqrt(1 + x * x),
    "precise::rsqrt(1 + x * x)": lambda x: 1 / np.sqrt(1 + x * x),
    "metal::tanh(x)": np.tanh,
    "pow(fabs(x), 1.5)": lambda x: np.abs(x) ** 1.5,
    "clamp(x, -0.5f, 0.5f)": lambda x: np.clip(x, -0.5, 0.5),
    "select(x, 2.0f, x < 0)": lambda x: np.where(x < 0, 2, x),
    "fma(x, x, 1.0f)": lambda x: x * x + 1,
    "mix(x, 1.0f, 0.25f)": lambda x: x + (1 - x) * 0.25,
    "max(x, 0.0f) + min(x, 1.0f)": lambda x: np.maximum(x, 0) + np.minimum(x, 1),
    "as_type<float>(as_type<uint>(x) & 0x7fffffffu)": np.abs,
    "float(isnan(x)) + sign(x)": np.sign,
    "1.0 / 3.0 * x": lambda x: np.float32(1 / 3) * x,
    "float(half(x))": lambda x: x.astype(np.float16),
    "log1p(exp(x))": lambda x: np.log1p(np.exp(x)),
}


@pytest.mark.parametrize("expression", SCALAR)
def test_maths(expression: str) -> None:
    x = numbers(1)
    got = values(f"float x = a[i]; o[i] = {expression};", x)
    np.testing.assert_allclose(got, SCALAR[expression](np.array(x)), rtol=2e-6, atol=1e-6)


def test_vectors() -> None:
    """Vector types, their constructors, swizzles and comparisons."""
    source = """
    auto v = ((const device float4*)a)[i];
    float4 w = v * 2 + float4(1, 0, 0, 0);
    half4 h = half4(w);
    bfloat2 b = bfloat2(float2(1.5f, 2.0f));
    uint4 u = uint4(v > 0);
    float3 s = float3(w.xy, 1);
    s.xy = s.yx;
    float x = dot(w, float4(1)) + float(h.x) - w.x + float(b.x) + s.x - s.y + u.y + length(s) * 0;
    ((device float4*)o)[i] = select(v, w, v > 8) + float4(float2(w.zw), w.xy) + x * 0;
    """
    x = numbers(2)
    result = run(SETUP + source, [x], grid=(16, 1, 1))
    v = np.array(x).reshape(16, 4)
    w = v * 2 + np.array([1, 0, 0, 0], np.float32)
    want = np.where(v > 8, w, v) + w[:, [2, 3, 0, 1]]
    np.testing.assert_allclose(np.array(result.outputs[0]).reshape(16, 4), want, rtol=1e-6)
    # A vector is one access of 16 bytes.
    a, o = result.counters.buffers["a"], result.counters.buffers["o"]
    assert (a.reads, a.read_bytes, o.writes, o.written_bytes) == (16, 256, 16, 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_round_like_mlx(dtype: mx.Dtype) -> None:
    a, b = numbers(3).astype(dtype), numbers(4).astype(dtype)
    source = SETUP + "T x = a[i] * b[i]; o[i] = x + a[i];"
    result = run(source, [a, b], template=[("T", dtype)], output_dtypes=[dtype])
    assert result.outputs[0].dtype == dtype
    assert mx.array_equal(result.outputs[0], a * b + a)


def test_template_values_scalars_and_attributes() -> None:
    source = """
    uint3 p = thread_position_in_grid, n = threads_per_grid;
    uint i = (p.z * n.y + p.y) * n.x + p.x;
    o[i] = F ? i + N + b : 0;
    if (i == 0) o[0] = threads_per_threadgroup.x * 100 + threadgroups_per_grid.x * 10
      + simdgroups_per_threadgroup;
    """
    r = run(
        source,
        [mx.zeros(9), 2.5],
        (80,),
        template=[("N", 3), ("F", True)],
        grid=(10, 4, 2),
        threadgroup=(5, 4, 2),
    )
    want = np.arange(80) + 5.5
    want[0] = 522
    np.testing.assert_array_equal(np.array(r.outputs[0]), want)


def test_ragged_grid() -> None:
    """The last threadgroup may be smaller; its lanes are all there are."""
    got = values(
        "o[i] = simd_sum(1.0f);", numbers(), shape=(50,), grid=(50, 1, 1), threadgroup=(40, 1, 1)
    )
    np.testing.assert_array_equal(got, [32] * 32 + [8] * 8 + [10] * 10)


def test_strided_input() -> None:
    x = numbers(5, (3, 4)).T
    got = run(
        "uint i = thread_position_in_grid.x;\n"
        "o[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];",
        [x],
        (4, 3),
        grid=(12, 1, 1),
        contiguous=False,
    )
    assert mx.array_equal(got.outputs[0], x)


MATMUL = """
// C[16, 16] = A[16, K] @ B[K, 16]: a simdgroup per 8x8 tile, operands through threadgroup memory.
constexpr int K = 32;
threadgroup T As[16 * 8], Bs[8][16];
uint sg = simdgroup_index_in_threadgroup, t = thread_index_in_threadgroup;
simdgroup_matrix<float, 8, 8> acc = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
for (int k0 = 0; k0 < K; k0 += 8) {
  As[t] = a[(t / 8) * K + k0 + t % 8];
  Bs[t / 16][t % 16] = b[(k0 + t / 16) * 16 + t % 16];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<T, 8, 8> x, y;
  simdgroup_load(x, As + (sg / 2) * 64, 8);
  simdgroup_load(y, &Bs[0][(sg % 2) * 8], 16);
  simdgroup_multiply_accumulate(acc, x, y, acc);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
simdgroup_store(acc, o + (sg / 2) * 8 * 16 + (sg % 2) * 8, 16);
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_simdgroup_matrices(dtype: mx.Dtype) -> None:
    a, b = numbers(6, (16, 32)).astype(dtype), numbers(7, (32, 16)).astype(dtype)
    r = run(
        MATMUL, [a, b], (16, 16), template=[("T", dtype)], grid=(128, 1, 1), threadgroup=(128, 1, 1)
    )
    want = a.astype(mx.float32) @ b.astype(mx.float32)
    np.testing.assert_allclose(np.array(r.outputs[0]), np.array(want), rtol=1e-5, atol=1e-5)
    c = r.counters
    assert c.collectives["simdgroup_multiply"] == 4 * 4
    assert c.collectives["threadgroup_barrier"] == 2 * 4
    assert c.threadgroup_memory == 2 * 128 * dtype.size
    assert c.total("read_per_threadgroup") == 2 * 16 * 32 * dtype.size


def test_fixture_stands_in_for_metal_kernel(emulated_metal: EmulatedMetal) -> None:
    """Code that knows nothing of the emulator runs on it."""
    assert mx.metal.is_available()
    kernel = mx.fast.metal_kernel(
        name="double_it",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x;\ny[i] = x[i] + x[i];",
    )
    x = numbers().astype(mx.bfloat16)
    (y,) = kernel(
        inputs=[x],
        template=[("T", mx.bfloat16)],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    assert y.dtype == mx.bfloat16 and mx.array_equal(y, x + x)
    assert emulated_metal.calls[0][0] == "double_it"


def test_compiled_kernels_are_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated_metal: EmulatedMetal
) -> None:
    """By content: the same kernel again is free, another template is another object."""
    monkeypatch.setenv("AHN_MLX_TEST_CACHE", str(tmp_path))
    for n in (1, 2, 2):
        values("o[i] = a[i] * N;", numbers(), template=[("N", n)])
    assert len(list(tmp_path.glob("right-*.so"))) == 2


def test_a_cache_filled_by_another_process(tmp_path: Path) -> None:
    """Its kernels run on this process's runtime, wherever that lies."""
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import mlx.core as mx
from emulator import KernelSpec, run_kernel
from emulator.runtime import library
os.environ["AHN_MLX_TEST_CACHE"] = sys.argv[1]
library()
os.environ["AHN_MLX_TEST_CACHE"] = "shared"
source = "threadgroup float s[64]; uint i = thread_position_in_grid.x; s[i] = a[i];"
source += "threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = s[63 - i];"
spec, call = KernelSpec("reverse", ("a",), ("o",), source, "", True), dict(grid=(64, 1, 1))
call |= dict(threadgroup=(64, 1, 1), output_shapes=[(64,)], output_dtypes=[mx.float32])
a = mx.arange(64).astype(mx.float32)
assert mx.array_equal(run_kernel(spec, [a], **call).outputs[0], a[::-1])
"""
    for folder in ("one", "other"):
        command = [sys.executable, "-c", program, folder]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "shared").glob("*.so"))) == 1


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped where a user runs the tests, failed where CI does."""
    from emulator.plugin import require

    monkeypatch.delenv("CI", raising=False)
    require(None)
    with pytest.raises(pytest.skip.Exception, match="no compiler"):
        require("no compiler")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no compiler"):
        require("no compiler")


# ------------------------------------------------------------------ kernels of mlx-lm


def gated_delta(mlx_lm: Any, B: int, T: int, Hk: int, Hv: int, D: int, dtype: mx.Dtype) -> Any:
    key = iter(mx.random.split(mx.random.key(0), 6))
    q, k = (mx.random.normal((B, T, Hk, D), key=next(key)) for _ in range(2))
    q, k = mlx_lm.normalize_qk(q, k, inv_scale=D**-0.5, eps=1e-6)
    v = mx.random.normal((B, T, Hv, D), key=next(key))
    g = mx.sigmoid(mx.random.normal((B, T, Hv), key=next(key)) + 2)
    beta = mx.sigmoid(mx.random.normal((B, T, Hv), key=next(key)))
    state = 0.1 * mx.random.normal((B, Hv, D, D), key=next(key))
    return *(x.astype(dtype) for x in (q, k, v)), g, beta, state


def call_gated_delta(kernel: Any, args: Any, rows_per_simdgroup: int = 1) -> list[mx.array]:
    q, k, v, g, beta, state, *mask = args
    B, T, Hk, D = k.shape
    Hv = v.shape[2]
    packed = rows_per_simdgroup > 1
    return kernel(
        inputs=[q, k, v, g, beta, state, T, *mask],
        template=[
            ("InT", q.dtype),
            ("StT", state.dtype),
            ("Dk", D),
            ("Dv", D),
            ("Hk", Hk),
            ("Hv", Hv),
        ],
        grid=(32, D // rows_per_simdgroup, B * Hv),
        threadgroup=(32, 2 if packed else 4, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[q.dtype, state.dtype],
    )


def assert_close(got: mx.array, want: mx.array, dtype: mx.Dtype) -> None:
    tolerance = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    a, b = (np.array(x.astype(mx.float32)) for x in (got, want))
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["", "_xtree", "_packed"])
def test_gated_delta_kernels_agree_with_ops(
    name: str, dtype: mx.Dtype, emulated_metal: EmulatedMetal
) -> None:
    mlx_lm = import_with_metal("mlx_lm.models.gated_delta", emulated_metal)
    args = gated_delta(mlx_lm, 1, 5, 1, 2, 128, dtype)
    kernel = getattr(mlx_lm, f"_gated_delta_kernel{name}")
    y, state = call_gated_delta(kernel, args, 8 if name == "_packed" else 1)
    want_y, want_state = mlx_lm.gated_delta_ops(*args)
    assert_close(y, want_y, dtype)
    assert_close(state, want_state, dtype)


@pytest.mark.parametrize("vector_gate", [False, True])
def test_masked_gated_delta_kernels(vector_gate: bool, emulated_metal: EmulatedMetal) -> None:
    mlx_lm = import_with_metal("mlx_lm.models.gated_delta", emulated_metal)
    q, k, v, g, beta, state = gated_delta(mlx_lm, 2, 6, 1, 2, 64, mx.float32)
    if vector_gate:
        g = mx.sigmoid(numbers(8, (2, 6, 2, 64)))
    mask = mx.arange(6)[None] < mx.array([[4], [6]])
    name = "_gated_delta_kernel" + ("_vec" if vector_gate else "") + "_masked"
    y, new = call_gated_delta(getattr(mlx_lm, name), (q, k, v, g, beta, state, mask))
    want_y, want_state = mlx_lm.gated_delta_ops(q, k, v, g, beta, state, mask)
    assert_close(new, want_state, mx.float32)
    assert_close(y[0, :4], want_y[0, :4], mx.float32)
    assert_close(y[1], want_y[1], mx.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ssm_kernel_agrees_with_ops(dtype: mx.Dtype, emulated_metal: EmulatedMetal) -> None:
    mlx_lm = import_with_metal("mlx_lm.models.ssm", emulated_metal)
    n, h, d, groups, ds = 2, 4, 16, 2, 64
    x = numbers(1, (n, 1, h, d)).astype(dtype)
    B, C = (numbers(s, (n, 1, groups, ds)).astype(dtype) for s in (2, 3))
    a_log, dt_bias, D = numbers(4, (h,)) * 0.1, numbers(5, (h,)), numbers(6, (h,))
    dt = numbers(7, (n, 1, h)).astype(dtype)
    state = 0.1 * numbers(8, (n, h, d, ds))
    args = (x, a_log, B, C, D.astype(dtype), dt, dt_bias, state, (0.001, 100.0))
    y, new = mlx_lm.ssm_update_kernel(*args)
    want_y, want_state = mlx_lm.ssm_attn(*args)
    assert_close(y, want_y, dtype)
    assert_close(new, want_state, dtype)


# Bytes and shuffles per token and head, state traffic left out (float32, D = 128).
BASELINE = {
    "": (129.5 * 1024, 32.75 * 1024, 1280),
    "_xtree": (129.5 * 1024, 32.75 * 1024, 1280),
    "_packed": (16.625 * 1024, 8.5625 * 1024, 64),
}


@pytest.mark.parametrize("name", BASELINE)
def test_traffic_of_gated_delta_kernels(name: str, emulated_metal: EmulatedMetal) -> None:
    """The baseline that our own kernels are measured against."""
    emulated_metal.mode = "count"
    mlx_lm = import_with_metal("mlx_lm.models.gated_delta", emulated_metal)
    T, Hv = 8, 2
    args = gated_delta(mlx_lm, 1, T, 1, Hv, 128, mx.float32)
    kernel = getattr(mlx_lm, f"_gated_delta_kernel{name}")
    call_gated_delta(kernel, args, 8 if name == "_packed" else 1)
    c = emulated_metal.last.counters
    n = T * Hv
    assert (
        c.total("read_per_simdgroup", without=["state_in"]) / n,
        c.total("read_per_threadgroup", without=["state_in"]) / n,
        c.shuffles / n,
    ) == BASELINE[name]
    # Inputs once: q and k per key head, v, g and beta per value head.
    assert c.total("unique_read", without=["state_in"]) == 4 * T * (2 * 128 + Hv * (128 + 2))
    assert c.buffers["y"].unique_written == 4 * T * Hv * 128
