"""The library in embed/, built once for all tests, and what talks to its programs."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import REPO, talking_model

from ahn_mlx import load
from ahn_mlx.apps.export import export_app

EMBED = REPO / "embed"
MLX_ROOT = Path(mx.__file__).parent
# pip's, or the system's.
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_tools = pytest.mark.skipif(
    not (CMAKE and shutil.which("g++")), reason="needs cmake and g++: apt-get install cmake g++"
)


@cache
def built(*options: str, compiler: str = "g++") -> Path:
    """The build directory with these options of CMake, kept for as long as the sources are."""
    sources = sorted(p for p in EMBED.rglob("*") if p.suffix in (".cpp", ".c", ".h", ".txt"))
    state = hashlib.sha256(repr((options, compiler, mx.__version__, sys.prefix)).encode())
    for file in sources:
        state.update(str(file).encode() + file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"ahn-embed-{os.getuid()}-{state.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several workers one builds
        if not (folder / "done").exists():
            configure = [CMAKE, "-S", EMBED, "-B", folder, f"-DMLX_ROOT={MLX_ROOT}"]
            cc = {"g++": "gcc", "clang++": "clang"}[compiler]
            configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_C_COMPILER={cc}"]
            for command in (
                [*configure, "-DAHN_TESTS=ON", *options],
                [CMAKE, "--build", folder, "-j", str(os.cpu_count())],
            ):
                done = subprocess.run([*map(str, command)], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            (folder / "done").touch()
    return folder


@cache
def blas() -> str:
    """What makes a program compute with the BLAS of this process, for LD_PRELOAD."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return ""
    found = dict.fromkeys(re.findall(r"/\S*lib(?:quadmath|gfortran|gomp|openblas)\S*", mapped))
    order = ("quadmath", "gfortran", "gomp", "openblas")
    return ":".join(sorted(found, key=lambda p: next(i for i, n in enumerate(order) if n in p)))


def run(program: str, *args: object, folder: Path | None = None, fast: bool = True, **options):
    """One of the programs; its result has bytes."""
    env = {**os.environ, **({"LD_PRELOAD": blas()} if fast else {}), **options.pop("env", {})}
    command = [str((folder or built()) / program), *map(str, args)]
    return subprocess.run(command, capture_output=True, env=env, timeout=600, **options)


def sample(*args: object, **options) -> str:
    """What ahn-sample says."""
    done = run("ahn-sample", *args, **options)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def refused(*args: object, **options) -> str:
    """Its error, if that is one line and no crash."""
    done = run("ahn-sample", *args, **options)
    said = done.stderr.decode()
    assert done.returncode == 2, (done.returncode, said[-2000:])
    return said.rsplit("error: ", 1)[1]


def logits(directory: Path, runs: list[list[int]], **options) -> np.ndarray:
    """[len(runs), V]: after each of these is read at once, by the library."""
    data = b"".join(struct.pack(f"<I{len(ids)}i", len(ids), *ids) for ids in runs)
    done = run("ahn-probe", "logits", directory, input=data, **options)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return np.frombuffer(done.stdout, dtype=np.float32).reshape(len(runs), -1)


def tokenize(tables: Path, texts: list[str]) -> list[tuple[list[int], str]]:
    """Ids of each text by the library, and what streaming says of them."""
    encoded = [text.encode() for text in texts]
    data = b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    done = run("ahn-probe", "tokenize", tables, input=data)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    out, at, found = done.stdout, 0, []
    for _ in texts:
        n, size = struct.unpack_from("<II", out, at)
        at += 8
        ids = list(struct.unpack_from(f"<{n}i", out, at))
        at += 4 * n
        found.append((ids, out[at : at + size].decode()))
        at += size
    assert at == len(out)
    return found


def rewrite(app: Path, **change: Any) -> None:
    """The manifest with other values, and the checksum that fits."""
    file = app / "manifest.json"
    manifest = {**json.loads(file.read_text()), **change}
    del manifest["sha256"]
    content = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()
    file.write_text(json.dumps({**manifest, "sha256": hashlib.sha256(content).hexdigest()}))


def text(n: int) -> str:
    return "".join(" " if i % 6 == 5 else chr(97 + (7 * i + i * i // 3) % 26) for i in range(n))


def text_file(folder: Path) -> Path:
    (folder / "text.txt").write_text(text(100))
    return folder / "text.txt"


def talks(folder: Path) -> tuple[nn.Module, Any, Path]:
    """A small model that talks, in Python and exported, and its tokenizer."""
    model, tokenizer = load(talking_model("qwen2-gdn", folder), dtype="float32")
    export_app(model, tokenizer, folder / "app", chunk=12)
    return model, tokenizer, folder / "app"


def said(session, question, n=20) -> str:
    return "".join(session.ask(question, max_tokens=n))


def contents(file: Path):
    """Arrays and metadata."""
    return mx.load(str(file), format="safetensors", return_metadata=True)


def save_memory(file: Path, arrays, metadata):
    """With the checksum that fits."""
    sums = hashlib.sha256(metadata["ahn"].encode())
    for name in sorted(arrays):
        x = arrays[name]
        sums.update(f"{name} {x.dtype} {x.shape}".encode() + np.array(x).tobytes())
    out = file.with_suffix(".safetensors")
    mx.save_safetensors(str(out), arrays, {**metadata, "sha256": sums.hexdigest()})
    out.rename(file)


def sections(file: bytes) -> list[bytes]:
    """Of tokenizer.bin, as its writer describes them."""
    (count,), at, found = struct.unpack_from("<I", file, 16), 24, []
    for _ in range(count):
        (n,) = struct.unpack_from("<Q", file, at)
        found.append(file[at + 8 : at + 8 + n])
        at += 8 + n + -n % 8
    assert at == len(file)
    return found
