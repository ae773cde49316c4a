"""That the library in embed/ links for a Mac with the libmlx of its wheel: Mach-O, arm64. What
runs there, only a Mac can say."""

import importlib.util
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest

from embed import EMBED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang"),
]


def test_links_for_arm64_macos(tmp_path):
    wheel = ["download", f"mlx-metal=={version('mlx')}", "--no-deps", "--only-binary", ":all:"]
    wheel += ["--platform", "macosx_14_0_arm64", "--dest", str(tmp_path)]
    fetched = subprocess.run([sys.executable, "-m", "pip", *wheel], capture_output=True)
    if fetched.returncode:
        pytest.skip("the wheel for Macs cannot be fetched")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z:
        for name in z.namelist():
            if name.startswith("mlx/include/") or name.endswith("libmlx.dylib"):
                z.extract(name, tmp_path)
    out = tmp_path / "libahn.dylib"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0"]
    command += ["-std=c++20", "-O1", "-shared", "-Wl,-install_name,@rpath/libahn.dylib"]
    command += ["-I", EMBED / "include", "-isystem", tmp_path / "mlx/include"]
    command += [*sorted((EMBED / "src").glob("*.cpp")), tmp_path / "mlx/lib/libmlx.dylib"]
    done = subprocess.run([*map(str, command), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    head = out.read_bytes()[:8]
    assert head == bytes.fromhex("cffaedfe") + (0x0100000C).to_bytes(4, "little")
