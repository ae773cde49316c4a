"""Every kind of mistake that the emulator must find, one small kernel each."""

from typing import Any

import mlx.core as mx
import pytest
from emulator import KernelError, KernelSpec, Result, run_kernel

pytest_plugins = ["emulator.plugin"]
pytestmark = pytest.mark.usefixtures("needs_emulator")

# A test's own text begins on line 3.
SETUP = """uint i = thread_position_in_grid.x;
[[maybe_unused]] uint lane = thread_index_in_simdgroup;
"""
BUFFER = "threadgroup float buf[64];\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def run(source: str, header: str = "", atomic: bool = False, **options: Any) -> Result:
    """64 threads, one input a = 0..63, one output o of 64 floats."""
    spec = KernelSpec("wrong", ("a",), ("o",), SETUP + source, header, atomic_outputs=atomic)
    call: dict[str, Any] = {
        "grid": (64, 1, 1),
        "threadgroup": (64, 1, 1),
        "output_shapes": [(64,)],
        "output_dtypes": [mx.float32],
    }
    inputs = [options.pop("a", mx.arange(64).astype(mx.float32))]
    return run_kernel(spec, inputs, **(call | options))


# name: source, what the message must say (the kernel's name is always there)
ERRORS: dict[str, tuple[str, str]] = {
    "read past the end": (
        "o[i] = a[i + 1];",
        r"out of bounds read of 4 bytes on device buffer a: byte offset 256.*256 bytes"
        r".*thread 63 .*\n  at source line 3: o\[i\] = a\[i \+ 1\];",
    ),
    "read before the start": ("o[i] = a[int(i) - 1];", r"out of bounds read .* byte offset -4"),
    "write past the end": ("o[i * 2] = a[i];", r"out of bounds write .* device buffer o"),
    "threadgroup index too large": (
        "threadgroup float x[32], y[32];\nthreadgroup float* p = y;\nif (i < 40) p[i] = 1;\n"
        "x[lane] = 0; o[i] = a[i];",
        r"out of bounds write .* threadgroup buffer y.*thread 32 .*\n  at source line 5",
    ),
    "misaligned vector": (
        "float4 v = *(const device float4*)(a + i % 60); o[i] = v.x;",
        r"misaligned access to a: the address is no multiple of 16.*\n  at source line 3",
    ),
    "thread array index": (
        "float s[4];\nfor (int k = 0; k < 4; k++) s[k] = k;\no[i] = s[int(a[i]) % 5];",
        r"index 4 outside a thread array.*\n  at source line 5",
    ),
    "division by zero": ("o[i] = 7 / int(a[i]);", r"integer division by zero"),
    "shift": ("o[i] = 1 << (int(a[i]) + 1);", r"shift by"),
    "race in threadgroup memory": (
        BUFFER + "buf[i] = a[i];\no[i] = buf[63 - i];",
        r"(read of uninitialised memory: threadgroup buffer buf"
        r"|data race \(read after write\) on buf.*\n  at source line 5.*\n  first at .* line 4)",
    ),
    "race: written after it was read": (
        BUFFER + "buf[i] = a[i];\n" + BARRIER + "o[i] = buf[(i + 1) % 64];\nbuf[i] = 0;",
        r"data race \(write after read\) on buf, byte \d+: thread \d+ of threadgroup 0 came first"
        r".*\n  at source line 7.*\n  first at source line 6",
    ),
    "no barrier at the end of a loop": (
        BUFFER
        + "for (int k = 0; k < 3; k++) {\nbuf[i] = a[i] + k;\n"
        + BARRIER
        + "o[i] = buf[63 - i];\n}",
        r"data race .* on buf",
    ),
    "race within a simdgroup": (
        BUFFER + "buf[i] = a[i]; buf[i ^ 1] = a[i];\no[i] = a[i];",
        r"data race \(write after write\) on buf",
    ),
    "simdgroup barrier does not order simdgroups": (
        BUFFER + "buf[i] = a[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "o[i] = buf[63 - i];",
        r"read of uninitialised|data race",
    ),
    "barrier without memory flags": (
        BUFFER + "buf[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_none);\no[i] = buf[63 - i];",
        r"data race \(read after write\) on buf",
    ),
    "device race in a threadgroup": (
        "o[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_threadgroup);\no[63 - i] += 1;",
        r"data race \(read after write\) on o",
    ),
    "barrier reached by some": (
        "if (i < 40)\n" + BARRIER + "o[i] = a[i];",
        r"threadgroup_barrier not reached by every thread.*"
        r"simdgroup 1: 8 lanes .*threadgroup_barrier at source line 4: threadgroup_barrier",
    ),
    "return before a barrier": (
        "if (i >= 60) return;\n" + BARRIER + "o[i] = a[i];",
        r"threadgroup_barrier not reached by every thread",
    ),
    "two barriers": (
        "if (i < 32) {\n" + BARRIER + "} else {\n" + BARRIER + "}\no[i] = a[i];",
        r"divergence.*source line 4.*source line 6",
    ),
    "collectives at different places": (
        "float x = a[i];\nif (lane < 5) x = simd_sum(x);\nelse x = simd_max(x);\no[i] = x;",
        r"divergence.*simd_sum at source line 4.*simd_max at source line 5",
    ),
    "collective in a branch": (
        "float x = a[i];\nif (lane < 5) x = simd_sum(x);\no[i] = x;",
        r"simd_sum at source line 4: .* in divergent control flow: only 5 of 32 lanes",
    ),
    "collective in a loop of different length": (
        "float x = a[i];\nfor (uint k = 0; k < i % 3; k++) x = simd_shuffle_xor(x, 1);\no[i] = x;",
        r"simd_shuffle at source line 4: .* in divergent control flow",
    ),
    "uninitialised threadgroup memory": (
        BUFFER + "if (i < 32) buf[i] = a[i];\n" + BARRIER + "o[i] = buf[63 - i];",
        r"read of uninitialised memory: threadgroup buffer buf",
    ),
    "output read before it is written": (
        "o[i] += a[i];",
        r"read of uninitialised memory: output buffer o, element 0",
    ),
    "unwritten output": ("if (i % 2) o[i] = a[i];", r"output o is unwritten at 32 of 64 .* is 0"),
    "order matters": (
        # Racy through atomics: no single access is wrong, the result is.
        "threadgroup atomic_int turn;\nif (i == 0) "
        "atomic_store_explicit(&turn, 0, memory_order_relaxed);\n"
        + BARRIER
        + "o[i] = atomic_fetch_add_explicit(&turn, 1, memory_order_relaxed);",
        r"output o depends on the order in which lanes run: element 0",
    ),
    "write to an input": ("((device float*)a)[i] = 1; o[i] = 0;", r"write to input buffer a"),
    "too much threadgroup memory": (
        "threadgroup float big[9000];\nbig[i] = 1; o[i] = a[i];",
        r"36000 bytes of threadgroup memory, the limit is 32768",
    ),
    "threadgroup initialiser": (
        "threadgroup float b[2] = {1, 2};\no[i] = b[0];",
        r"threadgroup variable with an initialiser",
    ),
    "stack overflow": (
        "volatile float big[100000]; big[0] = 1; big[99999] = 2; o[i] = big[0];",
        r"stack overflow of a GPU thread",
    ),
    "matrix with missing lanes": (
        "if (i >= 40) return;\nsimdgroup_float8x8 m(0.0f);\nsimdgroup_store(m, o, 8);",
        r"simdgroup_store at source line 5.* in divergent control flow",
    ),
    "double": ("double d = a[i]; o[i] = d;", r"does not compile.*poisoned .?double"),
    "new": ("o[i] = *new float(1);", r"does not compile.*poisoned .?new"),
    "unknown function": ("o[i] = simd_summ(a[i]);", r"does not compile.*wrong:3:.*simd_summ"),
    "std": ("o[i] = __builtin_printf(a[i]);", r"does not compile"),
    "uninitialised variable": ("float x;\no[i] = x + a[i];", r"does not compile.*uninitialized"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_is_caught(name: str) -> None:
    source, message = ERRORS[name]
    with pytest.raises(KernelError, match=r"(?s)wrong.*(" + message + ")"):
        run(source)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "o[i % 32] = a[i];",
            {"threadgroup": (32, 1, 1)},
            r"data race \(write after write\) on o",
        ),
        (
            BUFFER
            + "if (threadgroup_position_in_grid.x == 0) buf[lane] = a[i];\n"
            + BARRIER
            + "o[i] = buf[lane];",
            {"threadgroup": (32, 1, 1), "order": "ascending"},
            r"read of uninitialised memory.*threadgroup 1",
        ),
        (
            "((device float*)a)[i % 4] = 1; o[i] = 0;",
            {"a": mx.zeros(4)},
            r"write to constant buffer a",
        ),
        ("o[i] = a[i] * 2.0f;", {"output_dtypes": [mx.bfloat16]}, r"does not compile.*bfloat"),
        ("o[i] = a[i + 1];", {"mode": "fast"}, r"out of bounds access near buffer a"),
        ("o[i] = a[i];", {"threadgroup": (1025, 1, 1), "grid": (1025, 1, 1)}, r"the limit is 1024"),
        (
            "atomic_fetch_add_explicit(&o[0], a[i], memory_order_relaxed);\n"
            "((device float*)o)[0] = i;",
            {"atomic": True, "init_value": 0},
            r"data race",
        ),
    ],
)
def test_is_caught_with(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=r"(?s)" + message):
        run(source, **options)


def test_error_in_the_header_names_its_line() -> None:
    header = "\n\ninline float next(const device float* p, uint i) {\n  return p[i + 1];\n}\n"
    with pytest.raises(KernelError, match=r"at header line 4: return p\[i \+ 1\];"):
        run("o[i] = next(a, i);", header)


RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "a barrier orders": (
        BUFFER + "buf[i] = a[i];\n" + BARRIER + "o[i] = buf[63 - i];",
        {},
    ),
    "a simdgroup barrier orders its lanes": (
        BUFFER + "buf[i] = a[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "o[i] = buf[i ^ 1];",
        {},
    ),
    "a device barrier orders device memory": (
        "o[i] = a[i];\nthreadgroup_barrier(mem_flags::mem_device);\n"
        "float x = o[63 - i];\nthreadgroup_barrier(mem_flags::mem_device);\no[i] += x;",
        {},
    ),
    "init_value initialises": ("o[i] += a[i];", {"init_value": 0.0}),
    "unwritten on purpose": ("if (i % 2) o[i] = a[i];", {"allow_unwritten": True}),
    "inactive lanes on purpose": (
        "o[i] = 0;\nif (lane >= 5) return;\no[i] = simd_sum(a[i]);",
        {"allow_partial_collectives": True},
    ),
    "atomics": (
        "atomic_fetch_add_explicit(&o[i % 4], a[i], memory_order_relaxed);",
        {"atomic": True, "init_value": 0, "threadgroup": (32, 1, 1)},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_is_not_an_error(name: str) -> None:
    source, options = RIGHT[name]
    run(source, **options)


def test_same_value_written_twice_is_a_warning() -> None:
    result = run("o[i % 32] = 1; o[32 + i % 32] = 2;")
    assert result.counters.same_value_writes == 64
    assert any("unordered stores" in w for w in result.warnings)
