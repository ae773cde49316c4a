"""Break the code one fragment at a time and see whether its tests notice.

    python tests/mutate.py [name ...]

tests/mutations/NAME.txt has a mutation per line, `original fragment => broken fragment`, with
\\n for a new line. The original occurs once in one of the files that the first line names,
`# FILE ... : TEST ...`; without such a line NAME is a Metal kernel, and the files are
metal/NAME.metal and metal/common.h. The tests run in a temporary copy of the checkout. Exits 1
when fewer than 95% are caught for some name.
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


def read(name: str) -> tuple[list[str], list[str], list[str]]:
    """Files, tests and mutations."""
    lines = (MUTATIONS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    if lines[0].startswith("# "):
        files, tests = (part.split() for part in lines[0].removeprefix("# ").split(":"))
        return files, tests, lines[1:]
    tests = [f"tests/{t.name}" for t in (ROOT / "tests").glob("test_metal_*.py")]
    tests = [t for t in tests if f"tests/test_metal_{name}".startswith(t.removesuffix(".py"))]
    return [f"metal/{name}.metal", "metal/common.h"], tests, lines


def passes(checkout: Path, tests: list[str], limit: float | None = None) -> bool:
    """Whether these tests pass, slow ones too; they fail as well when a broken loop never ends,
    that is after `limit` seconds."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "AHN_MLX_TEST_CACHE": str(checkout / "objects"),  # broken kernels fill no one's cache
        "CI": "1",  # a skipped test would catch nothing
    }
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", ""]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    # Its own trouble; a broken import is a failure to collect, a crash a negative number.
    if done.returncode in (3, 4, 5):
        sys.exit(f"{tests} do not run:\n{done.stdout.decode()}{done.stderr.decode()}")
    return done.returncode == 0


def survivors(checkout: Path, name: str, limit: float) -> list[str]:
    """The mutations that the tests do not notice."""
    names, tests, lines = read(name)
    files = [checkout / file for file in names]
    alive = []
    for line in lines:
        original, broken = line.replace("\\n", "\n").split(" => ")
        found = [f for f in files if f.read_text(encoding="utf-8").count(original) == 1]
        if not found:
            sys.exit(f"{name}: `{original}` is not there exactly once")
        text = found[0].read_text(encoding="utf-8")
        found[0].write_text(text.replace(original, broken), encoding="utf-8")
        if passes(checkout, tests, limit):
            alive.append(line)
        found[0].write_text(text, encoding="utf-8")
    return alive


def main(names: list[str]) -> int:
    others = ("equivalent", "by_hand")  # of tests/mutants.py
    every = (file.stem for file in MUTATIONS.glob("*.txt"))
    names = names or sorted(name for name in every if name not in others)
    enough = True
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        unneeded = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, checkout, ignore=unneeded)
        with (checkout / "tests" / "conftest.py").open("a") as conftest:
            conftest.write(HURRY)
        print(f"{'broken':24}{'caught':>8}{'total':>8}")
        for name in names:
            _, tests, lines = read(name)
            start = time.monotonic()
            if not passes(checkout, tests):
                sys.exit(f"{name}: its tests fail before anything is broken")
            # A busy machine may be busier later.
            alive = survivors(checkout, name, 600 + 5 * (time.monotonic() - start))
            caught = len(lines) - len(alive)
            enough &= caught >= ENOUGH * len(lines)
            print(f"{name:24}{caught:8}{len(lines):8}", flush=True)
            for line in alive:
                print(f"  survived: {line}", flush=True)
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
