"""The library in embed/ under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer, and
its fuzz targets, shortly."""

import os
import random
import shutil
import subprocess
import sys

import pytest
from checkpoints import talking_model
from resident import FROM_A_SMALL_ONE

from ahn_mlx import load
from ahn_mlx.apps.export import export_app
from ahn_mlx.reading.session import Session
from embed import EMBED, built, needs_tools, run

pytestmark = [needs_tools, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, exported, and memories of texts of several lengths."""
    folder = tmp_path_factory.mktemp("sanitized")
    model, tokenizer = load(talking_model("qwen2-gdn", folder), dtype="float32")
    export_app(model, tokenizer, folder / "app", chunk=12)
    for n in (0, 5, 20, 60, 100):
        session = Session(model, tokenizer, step=12)
        if n:
            session.read("call me ishmael"[: n % 15 + 1] * (n // 5))
        if n == 100:
            list(session.ask("Why?", max_tokens=3))
        session.save(folder / f"{n}.ahn")
    (folder / "text.txt").write_text("call me ishmael. " * 20)
    return folder


def clean(*args: object, code: int = 0) -> str:
    """A program's output, if no sanitizer speaks."""
    env = {"ASAN_OPTIONS": "detect_leaks=1:exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = run("ahn-sample", *args, folder=built("-DAHN_SANITIZE=ON"), fast=False, env=env)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == code and "Sanitizer" not in said, said[-4000:]
    assert "runtime error" not in said
    return done.stdout.decode()


def test_reads_answers_saves_and_loads(folder, tmp_path):
    app = folder / "app"
    file = tmp_path / "a.ahn"
    options = ("--max-tokens", 20, "--ask", "Why?")
    first = clean(app, "--read", folder / "text.txt", "--save", file, *options, "--ask", "And?")
    assert clean(app, "--load", file, *options, "--ask", "And?", "--save", file) == first
    sampled = ("--temperature", 1, "--top-p", 0.5, "--stop", "a", *options)
    clean(app, "--load", file, *sampled, "--read", folder / "text.txt", "--ask", "")
    clean(app, "--plain", "--read", folder / "text.txt", *options)
    for n in (0, 5, 20, 60, 100):
        clean(app, "--load", folder / f"{n}.ahn", *options, "--save", file)


def test_what_is_damaged_anywhere_is_refused_cleanly(folder, tmp_path):
    """Bits flipped and parts missing, of each file; some changes may mean nothing."""
    rng = random.Random(5)
    app = shutil.copytree(folder / "app", tmp_path / "app")
    memory = folder / "60.ahn"
    for name in ("manifest.json", "tokenizer.bin", "weights.safetensors", "model.mlxfn", "ahn"):
        file = tmp_path / "x.ahn" if name == "ahn" else app / name
        whole = (memory if name == "ahn" else folder / "app" / name).read_bytes()
        for n in range(8):
            data = bytearray(whole)
            at = rng.randrange(min(len(data), 4000) if n % 2 else len(data))
            data[at] ^= 1 << rng.randrange(8)
            file.write_bytes(data[: at + 1] if n % 4 == 3 else data)
            loaded = ("--load", tmp_path / "x.ahn") if name == "ahn" else ()
            env = {"ASAN_OPTIONS": "exitcode=99"}
            done = run(
                *("ahn-sample", app, *loaded, "--max-tokens", 2, "--ask", "a"),
                folder=built("-DAHN_SANITIZE=ON"),
                fast=False,
                env=env,
            )
            said = done.stderr.decode(errors="replace")
            assert done.returncode in (0, 2) and "Sanitizer" not in said, said[-4000:]
        if name != "ahn":
            file.write_bytes(whole)


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang: apt-get install clang")
@pytest.mark.parametrize("target", ["manifest", "tokenizer", "tensors", "memory"])
def test_fuzz_targets_find_nothing_in_ten_seconds(folder, target, tmp_path):
    memories = sorted(folder.glob("*.ahn"))
    script = [sys.executable, EMBED / "fuzz/corpus.py", folder / "app", *memories, tmp_path / "in"]
    subprocess.run([*map(str, script)], check=True)
    app = folder / "app"
    env = {"AHN_FUZZ_MODEL": str(app), "AHN_FUZZ_TOKENIZER": str(app / "tokenizer.bin")}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [
            *FROM_A_SMALL_ONE,  # its limit is of ru_maxrss
            *(str(built("-DAHN_FUZZ=ON", compiler="clang++") / f"fuzz-{target}"), "-timeout=30"),
            *("-max_total_time=10", "-print_final_stats=1", "out", f"in/{target}"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
