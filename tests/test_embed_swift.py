"""The Swift package in embed/, with the compiler of this machine, or with Debian trixie's in a
root directory that AHN_SWIFT_ROOT names (embed/scripts/swift-chroot.sh makes one; as root)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import talking_model

from ahn_mlx import load
from ahn_mlx.apps.export import export_app
from ahn_mlx.reading.session import Session
from embed import EMBED, MLX_ROOT, built, needs_tools

ROOT = os.environ.get("AHN_SWIFT_ROOT")
pytestmark = [
    needs_tools,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT or shutil.which("swift")), reason="no swift here, and AHN_SWIFT_ROOT is not set"
    ),
]


def bound(root: Path, paths: list[Path]) -> list[Path]:
    """These directories, seen from inside of another root; those that were mounted."""
    mounted = []
    for path in paths:
        inside = root / str(path)[1:]
        inside.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(inside):
            subprocess.run(["mount", "--bind", path, inside], check=True)
            mounted.append(inside)
    return mounted


def swift(command: list, seen: list[Path], env: dict[str, str]) -> str:
    """What a command of the toolchain says that succeeds. seen: paths that it needs."""
    words = [str(word) for word in command]
    env = {**os.environ, **env}
    mounted: list[Path] = []
    if ROOT:
        mounted = bound(Path(ROOT), [Path("/proc"), Path("/dev"), *seen])
        env |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TMPDIR": "/tmp"}
        words = ["chroot", ROOT, *words]
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=1800)
    finally:
        for inside in reversed(mounted):
            subprocess.run(["umount", inside], check=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said


def test_the_package_builds_and_its_tests_pass(tmp_path):
    model, tokenizer = load(talking_model("qwen2-gdn", tmp_path), dtype="float32")
    export_app(model, tokenizer, tmp_path / "app", chunk=12)
    session = Session(model, tokenizer, step=12)
    session.read("call me ishmael. " * 30)
    answer = "".join(session.ask("Why?", max_tokens=20))
    (tmp_path / "expected.txt").write_text(answer)
    library = built()
    command = ["swift", "test", "--package-path", EMBED, "--scratch-path", tmp_path / "swift"]
    command += ["--disable-sandbox"]
    for flag in (f"-L{library}", "-rpath", library):
        command += ["-Xlinker", flag]
    env = {"AHN_TEST_MODEL": str(tmp_path / "app")}
    said = swift(command, [EMBED, tmp_path, library, MLX_ROOT.parent], env)
    assert "0 failures" in said and "skipped" not in said


def test_the_sample_app_is_swift():
    """As far as its grammar goes: what SwiftUI is, only a Mac knows."""
    sources = sorted((EMBED / "Sample/AHNSample").glob("*.swift"))
    assert len(sources) == 3
    swift(["swiftc", "-parse", "-warnings-as-errors", *sources], [EMBED], {})
