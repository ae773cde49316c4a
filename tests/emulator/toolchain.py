"""The two compilers: g++ executes kernels, a pinned clang checks them strictly."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

from .errors import KernelError

NATIVE = Path(__file__).parent / "native"
GXX_AT_LEAST = 12
CLANG = 19  # 14 and 16 reject valid kernels; newer ones are untried
OBJECTS_KEPT_DAYS = 30

# -O2 for speed; the sanitizers hand every access, thread-array index, shift and division over.
_TSAN = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
MODES = {
    "check": [
        "-O2",
        *_TSAN,
        "-fsanitize=bounds,shift,integer-divide-by-zero,alignment",
        "-ftrivial-auto-var-init=pattern",
    ],
    # Not optimised: traffic is counted as the source says it.
    "count": ["-O0", *_TSAN],
    "fast": ["-O2"],
}


@lru_cache
def find_gxx() -> str | None:
    """A g++ that is new enough, or None."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return None
    names = ["g++", *(f"g++-{n}" for n in range(16, GXX_AT_LEAST - 1, -1))]
    for name in filter(None, [os.environ.get("AHN_MLX_TEST_GXX"), *names]):
        path = shutil.which(name)
        if not path:
            continue
        macros = _output([path, "-dM", "-E", "-x", "c++", os.devnull])
        major = re.search(r"__GNUC__ (\d+)", macros)
        if major and int(major[1]) >= GXX_AT_LEAST and "__clang__" not in macros:
            return path
    return None


@lru_cache
def find_clang() -> tuple[str, ...] | None:
    """The command of the pinned clang, or None: from the environment, PATH or ziglang."""
    candidates: list[tuple[str, ...]] = []
    if os.environ.get("AHN_MLX_TEST_CLANG"):
        candidates.append((os.environ["AHN_MLX_TEST_CLANG"],))
    candidates += [(f"clang++-{CLANG}",), (f"clang-{CLANG}",), ("clang++",)]
    candidates.append((sys.executable, "-m", "ziglang", "clang"))
    for command in candidates:
        if shutil.which(command[0]) and f"clang version {CLANG}." in _output(
            [*command, "--version"]
        ):
            return command
    return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def why_no_gxx() -> str | None:
    return None if find_gxx() else f"the Metal emulator needs g++ >= {GXX_AT_LEAST} on Linux"


def why_no_clang() -> str | None:
    return None if find_clang() else f"strict mode needs clang {CLANG} (pip: ziglang==0.14.1)"


def cache_dir() -> Path:
    """Where compiled kernels are kept, one file per hash of everything that matters."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for folder in (
        os.environ.get("AHN_MLX_TEST_CACHE"),
        os.path.join(base, "ahn-mlx", "emulator"),
        os.path.join(tempfile.gettempdir(), f"ahn-mlx-emulator-{os.getuid()}"),
    ):
        if folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError:
                continue
            if os.access(folder, os.W_OK):
                return Path(folder)
    raise OSError("no writable folder for compiled kernels")


@lru_cache
def forget_old_objects() -> None:
    """Once per process: the cache must not grow for ever."""
    limit = time.time() - OBJECTS_KEPT_DAYS * 86400
    for path in cache_dir().glob("*.so*"):
        try:
            if path.stat().st_mtime < limit:
                path.unlink()
        except OSError:
            pass  # another process was faster


@lru_cache
def _shim_text(*names: str) -> str:
    return "\0".join((NATIVE / n).read_text() for n in names)


@lru_cache
def _gxx_identity() -> str:
    gxx = find_gxx()
    if gxx is None:
        raise KernelError(why_no_gxx())
    # This file too: how objects are made is part of what they are.
    here = Path(__file__).read_text()
    return gxx + _output([gxx, "--version"]) + platform.machine() + here


def _compile(name: str, code: str, flags: list[str], key: str, last: list[str]) -> tuple[Path, str]:
    """Compile once per key; (object, what the compiler said)."""
    gxx = find_gxx()
    if gxx is None:
        raise KernelError(why_no_gxx())
    digest = hashlib.sha256("\0".join([_gxx_identity(), key, code, *flags]).encode()).hexdigest()
    path = cache_dir() / f"{name}-{digest[:24]}.so"
    notes = path.with_suffix(".so.log")
    if path.exists() and notes.exists():
        os.utime(path)
        return path, notes.read_text()
    forget_old_objects()
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        source, target = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source.write_text(code)
        compiled = Path(folder, "kernel.o")
        # Linked without the flags: -fsanitize=thread would bring its own runtime.
        said = ""
        for command in (
            [gxx, *flags, "-fPIC", "-c", str(source), "-o", str(compiled)],
            [gxx, "-shared", str(compiled), "-o", str(target), *last],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                raise KernelError(f"{name} does not compile:\n{done.stderr[-6000:]}")
            said += done.stderr
        Path(folder, "log").write_text(said)
        # Renames are atomic: processes that compile the same kernel do not disturb each other.
        Path(folder, "log").rename(notes)
        target.rename(path)
    return path, said


_COMMON = ["-std=c++20", "-g1", "-U_FORTIFY_SOURCE", "-fno-stack-protector"]


@lru_cache
def build_runtime() -> Path:
    code = (NATIVE / "runtime.cpp").read_text()
    flags = [*_COMMON, "-O2", f"-I{NATIVE}"]
    return _compile("runtime", code, flags, _shim_text("runtime.h"), ["-ldl"])[0]


def build_kernel(name: str, code: str, mode: str) -> tuple[Path, str]:
    """The shared object of a kernel, and the compiler's warnings."""
    flags = [
        *_COMMON,
        *MODES[mode],
        "-fstack-clash-protection",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-fexcess-precision=16",  # round half after each operation
        "-fsigned-char",
        "-fsingle-precision-constant",  # 1.0 is a float in Metal
        *(["-mf16c", "-mfma"] if platform.machine() == "x86_64" else []),
        f"-isystem{NATIVE / 'exec'}",
        f"-isystem{NATIVE / 'stubs'}",
        f"-I{NATIVE}",
        "-Wall",
        "-Werror=return-type",
        "-Werror=uninitialized",
        *(f"-Wno-{w}" for w in ("attributes", "unused", "unknown-pragmas", "sign-compare")),
        "-Wno-parentheses",
    ]
    key = _shim_text("runtime.h", "exec/metal_stdlib", "mlx_preamble.h")
    # Not linked with the runtime: a path kept in the cache would load a second one beside the
    # process's own, see runtime.library.
    return _compile(name, code, flags, key, [])


def lines_of(path: Path, offset: int) -> list[tuple[str, int]]:
    """(file, line) of an address and of the calls it was inlined into, innermost first."""
    tool = shutil.which("addr2line")
    if not tool or not offset:
        return []
    text = _output([tool, "-i", "-e", str(path), hex(offset)])
    found = (re.match(r"(.*):(\d+)", line) for line in text.splitlines())
    return [(os.path.basename(m[1]), int(m[2])) for m in found if m]
