"""What is installed: a wheel that pip builds, alone in an environment of its own."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from checkpoints import REPO

pytestmark = pytest.mark.slow


def run(*command: object, **options: object) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, REPO)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
    ours = {p for p in (REPO / "ahn_mlx").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    expected = {str(p.relative_to(REPO)) for p in ours}
    kernels = {f"ahn_mlx/kernels/{p.name}" for p in (REPO / "metal").iterdir()}
    assert held == expected | kernels
    for needed in (
        "demo/pride-and-prejudice.txt",
        "weights/ahn-gdn-smollm2-135m.safetensors",
        "serve/page/index.html",
    ):
        assert f"ahn_mlx/{needed}" in held
    assert len([n for n in held if n.endswith(".metal")]) >= 6


def test_it_runs_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies come from this environment, its own files from the wheel alone."""
    place = tmp_path / "bare"
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "more.pth").write_text(packages)
    python = place / "bin/python"
    code = "import ahn_mlx; print(ahn_mlx.__file__)"
    assert run(python, "-c", code, cwd=tmp_path).startswith(str(site))
    command = (python, "-m", "ahn_mlx")
    assert run(*command, "--version", cwd=tmp_path).startswith("ahn-mlx, version ")
    assert "ahn-gdn-3b" in run(*command, "models", cwd=tmp_path)
    assert "default model" in run(*command, "doctor", cwd=tmp_path)
    code = "from ahn_mlx.ops.kernels import source; print(len(source('window_decode.metal')))"
    assert int(run(python, "-c", code, cwd=tmp_path)) > 1000
