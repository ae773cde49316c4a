"""Small faults, put into a module one at a time by rule; its quick tests should notice.

    python tests/mutants.py ahn_mlx/ops/delta.py ... [--count 30] [--seed 0]
    python tests/mutants.py --since origin/main [--count 200]
    python tests/mutants.py --list tests/mutations/by_hand.txt [MODULE ...]

Everything happens in a temporary copy of the checkout. One process imports pytest and the
libraries, but nothing of ahn_mlx, and forks a child for each mutant; the child runs only those
tests that reach the mutated lines, quick ones first. tests/mutations/tests.toml says which test
files concern a module. tests/mutations/equivalent.txt has the mutants that nobody can tell from
the original, each with the reason. Exits 1 when fewer than 90% of the others are caught.
"""

import argparse
import compileall
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mutators import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/mutations/tests.toml"
EQUIVALENT = "tests/mutations/equivalent.txt"
ENOUGH = 0.9
# Seconds of CPU that the tests of one mutant take at most, before anything is broken.
LONGEST = 12.0
# What each test reaches, from run to run.
KEPT = ROOT / ".mutants"
LIBRARIES = (
    "coverage hypothesis mlx.nn mlx.optimizers mlx_lm.utils mlx_lm.generate mlx_lm.sample_utils"
    " mlx_lm.models.llama mlx_lm.models.qwen2 mlx_lm.models.qwen3 tokenizers click tqdm"
)
# A failure need not become the smallest one.
PROFILE = """
from hypothesis import Phase, settings
_phases = [Phase.explicit, Phase.generate]
settings.register_profile("m", phases=_phases, derandomize=True, database=None, deadline=None)
settings.load_profile("m")
"""
ALL_PASS = 0


class Test(NamedTuple):
    """cost: seconds of CPU. lines: those that it runs, by module."""

    name: str
    cost: float
    lines: dict[str, list[int]]


class Recorder:
    """What a fixture of a wider scope reaches belongs to each test that uses it."""

    def __init__(self, coverage: Any):
        self.coverage, self.now = coverage, ""
        self.cost: dict[str, float] = {}
        self.failed: set[str] = set()
        self.uses: dict[str, list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        start = _cpu()
        self.now = item.nodeid
        self.coverage.switch_context(item.nodeid)
        self.uses[item.nodeid] = [item.nodeid, *map("fixture {}".format, item.fixturenames)]
        done = yield
        self.cost[item.nodeid] = _cpu() - start
        return done

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        if fixturedef.scope != "function":
            self.coverage.switch_context(f"fixture {fixturedef.argname}")
        done = yield
        self.coverage.switch_context(self.now)
        return done


class Chosen:
    """Only some tests, those that take least first."""

    def __init__(self, tests: list[Test]):
        self.cost = {test.name: test.cost for test in tests}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        wanted = [item for item in items if item.nodeid in self.cost] or items
        items[:] = sorted(wanted, key=lambda item: self.cost.get(item.nodeid, 0.0))


def _cpu() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _forked(work: Callable[[], int], limit: float, said: Path) -> int:
    """The exit code of work in a child; negative for a signal, as after that much CPU."""
    pid = os.fork()
    if not pid:
        os.setsid()
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
        code = 3
        try:
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    # What waits for ever takes no CPU.
    until = time.monotonic() + 60 + 4 * limit
    status = None
    try:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until:
            time.sleep(0.02)
        status = ended[1] if ended[0] else None
    finally:
        # With what it has started; also when this process is told to end.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if status is None:
            status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


class Copy:
    """A copy of the checkout, where the tests run."""

    def __init__(self, place: Path):
        self.place, self.said = place / "checkout", place / "said"
        unneeded = shutil.ignore_patterns(".*", "__pycache__", "build", "build[-_]*")
        shutil.copytree(ROOT, self.place, ignore=unneeded)
        compileall.compile_dir(self.place / "ahn_mlx", quiet=1)
        with (self.place / "tests" / "conftest.py").open("a") as conftest:
            conftest.write(PROFILE)
        sources = b"".join(f.read_bytes() for f in sorted(ROOT.glob("ahn_mlx/**/*.py")))
        self.sources = sha256(sources).hexdigest()

    def pytest(self, arguments: list[str], *plugins: object) -> int:
        os.chdir(self.place)
        options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow and not long"]
        return int(pytest.main([*options, *arguments], plugins=list(plugins)))

    def tests(self, name: str) -> list[Test]:
        """Of an entry of tests.toml, those that pass while nothing is broken."""
        name, _, words = name.partition(" -k ")
        file = f"tests/test_{name}.py"
        known = self.sources.encode() + (self.place / file).read_bytes() + words.encode()
        kept = KEPT / f"{name}-{sha256(known).hexdigest()[:16]}.json"
        if not kept.exists():
            KEPT.mkdir(exist_ok=True)
            if _forked(lambda: self._record(file, words, kept), 3600, self.said):
                sys.exit(f"{file} does not run:\n{self.said.read_text()}")
        return [Test(*test) for test in json.loads(kept.read_text())]

    def _record(self, file: str, words: str, kept: Path) -> int:
        from coverage import Coverage

        measured = Coverage(data_file=None, source=[str(self.place / "ahn_mlx")])
        measured.start()
        recorder = Recorder(measured)
        code = self.pytest([file, *(["-k", words] if words else [])], recorder)
        measured.stop()
        data = measured.get_data()
        lines: dict[str, dict[str, list[int]]] = {}
        for found in data.measured_files():
            module = str(Path(found).relative_to(self.place))
            for line, contexts in data.contexts_by_lineno(found).items():
                for context in contexts:
                    lines.setdefault(context, {}).setdefault(module, []).append(line)
        tests = []
        for name in recorder.cost.keys() - recorder.failed:
            cost = recorder.cost[name]
            reached: dict[str, list[int]] = {}
            for context in recorder.uses[name]:
                for module, numbers in lines.get(context, {}).items():
                    reached.setdefault(module, []).extend(numbers)
            tests.append(Test(name, cost, reached))
        # What runs while a module is imported belongs to everybody: nobody has it.
        # One failed, or none was chosen: nothing is wrong with the others.
        if code in (0, 1, 5):
            kept.write_text(json.dumps(sorted(tests)))
        return code if code not in (1, 5) else 0

    def notices(self, module: str, mutant: Mutant, tests: list[Test]) -> bool:
        file = self.place / module
        source = file.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        first, last = mutant.lines
        broken = "".join([*lines[: first - 1], mutant.broken, *lines[last:]])
        chosen = _reaching(tests, module, range(first, last + 1))
        if not chosen:
            return False
        files = sorted({test.name.split("::")[0] for test in chosen})
        for old in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
            old.unlink()
        file.write_text(broken, encoding="utf-8")
        try:
            limit = 10 + 4 * sum(test.cost for test in chosen)
            return _forked(lambda: self._try(files, chosen), limit, self.said) != ALL_PASS
        finally:
            file.write_text(source, encoding="utf-8")

    def _try(self, files: list[str], tests: list[Test]) -> int:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        return self.pytest(["-x", *files], Chosen(tests))


def _reaching(tests: list[Test], module: str, lines: range) -> list[Test]:
    """Those that run one of the lines; all if no test does, as with what runs while the module is
    imported, such as a table that a test reads. As many as there is time for."""
    ordered = sorted(tests, key=lambda test: test.cost)
    direct = [t for t in ordered if not set(lines).isdisjoint(t.lines.get(module, []))]
    chosen, spent = [], 0.0
    for test in direct or ordered:
        spent += test.cost
        if chosen and spent > LONGEST:
            break
        chosen.append(test)
    return chosen


def tests_of(module: str, checkout: Path) -> list[str]:
    """Names of test files: those of tests.toml, or else those that import the module."""
    room, name = Path(module).with_suffix("").parts[-2:]
    table = tomllib.loads((checkout / TESTS).read_text(encoding="utf-8"))
    if named := table.get(room, {}).get(name):
        return list(named)
    pattern = re.compile(rf"ahn_mlx\.{room}(\.{name}\b| import .*\b{name}\b)")
    files = sorted((checkout / "tests").glob("test_*.py"))
    return [f.stem[5:] for f in files if pattern.search(f.read_text(encoding="utf-8"))]


def equivalent(module: str) -> set[str]:
    """The mutants that nobody can tell from the original."""
    found, here = set(), False
    for line in (ROOT / EQUIVALENT).read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            here = line == f"# {module}"
        elif here and line:
            found.add(line.rpartition("  # ")[0])
    return found


def listed(file: Path) -> list[tuple[str, Mutant]]:
    """Faults by hand: below `@ MODULE` a line for each, `original => broken`, with \\n for a new
    line. The original stands once in the module."""
    found: list[tuple[str, Mutant]] = []
    module = source = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("@ "):
            module = line[2:]
            source = (ROOT / module).read_text(encoding="utf-8")
        elif line and not line.startswith("#"):
            original, _, broken = line.replace("\\n", "\n").partition(" =>")
            if source.count(original) != 1:
                sys.exit(f"{file}: not once in {module}: {line}")
            first = source.count("\n", 0, source.index(original)) + 1
            last = first + original.count("\n")
            whole = "".join(source.splitlines(keepends=True)[first - 1 : last])
            becomes = whole.replace(original, broken.removeprefix(" "), 1)
            found.append((module, Mutant((first, last), whole, becomes)))
    return found


def changed(since: str) -> list[str]:
    command = ["git", "diff", "--name-only", "--diff-filter=d", since, "--", "ahn_mlx/*.py"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in found.stdout.split() if len(Path(name).parts) == 3]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--since", help="the modules that have changed since that commit")
    parser.add_argument("--list", type=Path, help="faults by hand, of these modules or of all")
    parser.add_argument("--count", type=int, default=0, help="of all modules together; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.list:
        every = listed(asked.list)
        modules = asked.modules or list(dict.fromkeys(module for module, _ in every))
    else:
        modules = asked.modules or changed(asked.since or "HEAD")
        texts = {module: (ROOT / module).read_text(encoding="utf-8") for module in modules}
        every = [(module, mutant) for module in modules for mutant in mutants(texts[module])]
    unseen = {module: equivalent(module) for module in modules}
    every = [(where, x) for where, x in every if str(x) not in unseen.get(where, {str(x)})]
    if asked.count and len(every) > asked.count:
        chance = random.Random(asked.seed)
        every = [every[i] for i in sorted(chance.sample(range(len(every)), asked.count))]
    # As tests/conftest.py says; the libraries must not be loaded without a fast BLAS.
    os.environ |= {"MLX_ENABLE_TF32": "0", "CI": "1", "OPENBLAS_NUM_THREADS": "1"}
    sys.path.insert(0, str(ROOT))
    import_module("ahn_mlx.platform")
    for name in LIBRARIES.split():
        import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "ahn_mlx"]:
        del sys.modules[name]
    sys.path.remove(str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        sys.path[:0] = [str(copy.place), str(copy.place / "tests")]
        os.environ |= {"PYTHONPATH": str(copy.place), "AHN_MLX_TEST_CACHE": f"{folder}/objects"}
        for module in modules:
            own = [mutant for where, mutant in every if where == module]
            if not own:
                continue
            tests = [test for name in tests_of(module, copy.place) for test in copy.tests(name)]
            alive = [mutant for mutant in own if not copy.notices(module, mutant, tests)]
            caught += len(own) - len(alive)
            print(f"{module:36}{len(own) - len(alive):6} of {len(own)}", flush=True)
            for mutant in alive:
                print(f"  {mutant.lines[0]}: {mutant}", flush=True)
    return 0 if caught >= ENOUGH * len(every) else 1


if __name__ == "__main__":
    sys.exit(main())
