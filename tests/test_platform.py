"""The platform is ready before MLX is: BLAS preload, dtype, imports and the doctor."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
