"""Break the Metal kernels one fragment at a time and see whether their tests notice.

    python tests/mutate.py [kernel ...]

tests/mutations/KERNEL.txt has a mutation per line, `original fragment => broken fragment`,
with \\n for a new line; the original occurs once in metal/KERNEL.metal, or else once in
metal/common.h. The tests run in a temporary copy of the checkout. Exits 1 when fewer than
95% are caught for some kernel.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = ROOT / "tests" / "mutations"
ENOUGH = 0.95

# For the tests of the copy: a failure need not become the smallest one, and what takes one
# example comes before what takes many.
HURRY = """

from hypothesis import Phase, settings

settings.register_profile("hurry", phases=[Phase.explicit, Phase.generate])
settings.load_profile("hurry")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: hasattr(item.obj, "hypothesis"))
"""


def passes(checkout: Path, kernel: str, limit: float | None = None) -> bool:
    """Whether the tests of a kernel pass; they fail too when a broken loop never ends, that is
    after `limit` seconds."""
    tests = (checkout / "tests").glob("test_metal_*.py")
    (test,) = (t for t in tests if f"test_metal_{kernel}".startswith(t.stem))
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "AHN_MLX_TEST_CACHE": str(checkout / "objects"),  # broken kernels fill no one's cache
        "CI": "1",  # a skipped test would catch nothing
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(test)]
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode in (2, 3, 4, 5):  # pytest's own trouble; a crash is a negative number
        sys.exit(f"{test} does not run:\n{done.stdout.decode()}{done.stderr.decode()}")
    return done.returncode == 0


def survivors(checkout: Path, kernel: str, lines: list[str], limit: float) -> list[str]:
    """The mutations of a kernel that its tests do not notice."""
    alive = []
    for line in lines:
        original, broken = line.replace("\\n", "\n").split(" => ")
        files = [checkout / "metal" / name for name in (f"{kernel}.metal", "common.h")]
        texts = [file.read_text(encoding="utf-8") for file in files]
        where = 0 if original in texts[0] else 1
        if texts[where].count(original) != 1:
            sys.exit(f"{kernel}: `{original}` is not there exactly once")
        files[where].write_text(texts[where].replace(original, broken), encoding="utf-8")
        if passes(checkout, kernel, limit):
            alive.append(line)
        files[where].write_text(texts[where], encoding="utf-8")
    return alive


def main(kernels: list[str]) -> int:
    kernels = kernels or sorted(file.stem for file in MUTATIONS.glob("*.txt"))
    enough = True
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        unneeded = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, checkout, ignore=unneeded)
        with (checkout / "tests" / "conftest.py").open("a") as conftest:
            conftest.write(HURRY)
        print(f"{'kernel':24}{'caught':>8}{'total':>8}")
        for kernel in kernels:
            lines = (MUTATIONS / f"{kernel}.txt").read_text(encoding="utf-8").splitlines()
            start = time.monotonic()
            if not passes(checkout, kernel):
                sys.exit(f"{kernel}: its tests fail before anything is broken")
            # A busy machine may be busier later.
            limit = 600 + 5 * (time.monotonic() - start)
            alive = survivors(checkout, kernel, lines, limit)
            caught = len(lines) - len(alive)
            enough &= caught >= ENOUGH * len(lines)
            print(f"{kernel:24}{caught:8}{len(lines):8}", flush=True)
            for line in alive:
                print(f"  survived: {line}", flush=True)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
