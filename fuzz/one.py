"""In a process of its own: `python -m fuzz.one fuzz DIRECTORY SECONDS NAME ...`, `lines DIRECTORY
NAME ...` or `seeds DIRECTORY NAME ...`.

fuzz runs each target on new inputs for some seconds, in a copy of the process, as libFuzzer never
returns; that one fails is a find. lines runs all inputs of targets that were worth keeping, and
writes which lines of the parsers they reach. seeds runs each target on its seeds alone.
"""

import hashlib
import itertools
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .oracle import Oracle, Target

ROOM = 8 << 30  # bytes of address space beyond what is used at the start
MEASURED = 120.0  # seconds of the processor, for the lines that a target's inputs reach
ENDLESS = 600  # seconds of one input, after which libFuzzer ends the process


class Finds:
    """Kinds of faults, each with the first input that showed it."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, key: str, data: bytes, text: str) -> None:
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in key)[:100]
        file = self.directory / f"{name}.input"
        if not file.exists() or len(data) < file.stat().st_size:
            file.write_bytes(data)
            (self.directory / f"{name}.txt").write_text(text, errors="replace")


def fuzz_all(names: list[str], work: Path, seconds: int) -> None:
    import atheris

    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["ahn_mlx"]):
        from .targets import TARGETS  # which takes longer than a short run
    for name in names:
        log = work / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {seconds} s ...", flush=True)
        child = os.fork()
        if not child:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            try:
                _fuzz(TARGETS[name], work, seconds)
                os._exit(0)  # of a target that cannot begin, which is said
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            end = log.read_text(errors="replace").strip().splitlines()[-3:]
            (work / "finds" / name).mkdir(parents=True, exist_ok=True)
            (work / "finds" / name / "ended.txt").write_text("\n".join(end))
            print(f"{name}: ended with {status}; see {log}", flush=True)


def _fuzz(target: "Target", work: Path, seconds: int) -> None:
    import atheris

    from .oracle import Broken, Oracle

    name = target.name
    seeds = work / "seeds" / name
    corpus, stats = work / "corpus" / name, work / "stats" / f"{name}.json"
    for directory in (seeds, corpus, stats.parent):
        directory.mkdir(parents=True, exist_ok=True)
    given = target.seeds()
    if not given:
        print("its seeds are made with a package that is not installed")
        return
    for seed in given:
        (seeds / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    words = work / "seeds" / f"{name}.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words if word))
    known = json.loads(stats.read_text()) if stats.exists() else {}
    totals = {k: known.get(k, 0) for k in ("executions", "seconds", "accepted")}
    finds = Finds(work / "finds" / name)
    # As on a memory disk, where there is one.
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    oracle = Oracle(target, root)
    told, spent_before = time.monotonic(), time.process_time()
    done = 0

    def tell() -> None:
        spent = time.process_time() - spent_before
        found = {
            "executions": totals["executions"] + done,
            "seconds": totals["seconds"] + spent,
            "accepted": totals["accepted"] + oracle.accepted,
            "slowest": max(oracle.slowest, known.get("slowest", 0)),
            "largest": max(oracle.largest, known.get("largest", 0)),
            "instruments": "atheris",
        }
        part = stats.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(stats)

    def one(data: bytes) -> None:
        nonlocal done, told
        done += 1
        try:
            oracle(data)
        except Broken as e:
            finds.add(e.key, data, str(e))
        if time.monotonic() - told > 2:
            tell()
            told = time.monotonic()

    _begin(oracle, given, one)  # what is made once has been made when time is taken
    _limit_memory()
    options = [f"-max_total_time={seconds}", f"-max_len={target.longest}", f"-dict={words}"]
    options += [f"-timeout={ENDLESS}", "-rss_limit_mb=0", "-malloc_limit_mb=0"]
    options += ["-verbosity=0", f"-artifact_prefix={finds.directory}/ended-", "-len_control=20"]
    options += ["-detect_leaks=0", "-reload=0", f"-report_slow_units={ENDLESS}"]
    mutate = {"custom_mutator": target.mutate} if target.mutate else {}
    atheris.Setup([name, *options, str(corpus), str(seeds)], one, **mutate)
    atheris.Fuzz()


def _begin(oracle: "Oracle", seeds: list[bytes], one: Callable[[bytes], None]) -> None:
    """Read the seeds. Raises RuntimeError if all are refused: nothing would be fuzzed then."""
    for seed in seeds:
        one(seed)
    if not oracle.accepted:
        raise RuntimeError(f"{oracle.target.name}: none of its {len(seeds)} seeds is accepted")


def seeds(names: list[str], work: Path) -> int:
    """Print what became of each target's seeds, in a copy of the process. Returns how many targets
    fail on their own."""
    from .oracle import Oracle
    from .targets import TARGETS

    failed = 0
    for name in names:
        if not (child := os.fork()):
            given, root = TARGETS[name].seeds(), work / name
            root.mkdir(parents=True)
            oracle = Oracle(TARGETS[name], root)
            try:
                if given:
                    _begin(oracle, given, oracle)
                print(f"{name}: {oracle.accepted} of {len(given)} accepted", flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        failed += os.waitpid(child, 0)[1] != 0
    return failed


def _limit_memory() -> None:
    with open("/proc/self/statm", "rb") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogatepass")[:64])


def lines(names: list[str], work: Path) -> None:
    """Of each target, apart from what importing runs, which all have."""
    import coverage

    options: dict[str, Any] = {"data_file": None, "source_pkgs": ["ahn_mlx"], "config_file": False}
    imported = coverage.Coverage(**options)
    imported.start()
    from .targets import TARGETS

    imported.stop()
    for name in names:  # each in a copy of the process, as it is fuzzed
        if not (child := os.fork()):
            try:
                _lines(TARGETS[name], work, options, imported)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.waitpid(child, 0)


def _lines(target: "Target", work: Path, options: dict[str, Any], imported: Any) -> None:
    import coverage

    from .oracle import Broken, Oracle

    package = Path(sys.modules["ahn_mlx"].__file__ or "").parent
    oracle = Oracle(target, Path(tempfile.mkdtemp()))
    measured = coverage.Coverage(**options)
    measured.start()
    parts = [sorted((work / part / target.name).glob("*")) for part in ("seeds", "corpus")]
    begun_at, done = time.process_time(), 0
    for file in itertools.chain(*parts):  # whose names are hashes: some stand for all
        if done > len(parts[0]) and time.process_time() - begun_at > MEASURED:
            break
        done += 1
        with suppress(Broken):
            oracle(file.read_bytes())
    measured.stop()
    print(f"{target.name}: lines of {done} of {sum(map(len, parts))} inputs", flush=True)
    found: dict[str, Any] = {}
    for name in target.files:
        path = str(package / name)
        _, statements, _, missing, _ = measured.analysis2(path)
        begun = set(imported.get_data().lines(path) or ())
        found[name] = {"lines": statements, "missing": sorted(set(missing) - begun)}
    (work / "stats" / f"{target.name}.lines.json").write_text(json.dumps(found))


if __name__ == "__main__":
    how, work, *rest = sys.argv[1:]
    if how == "fuzz":
        fuzz_all(rest[1:], Path(work), int(rest[0]))
    elif how == "lines":
        lines(rest, Path(work))
    else:
        sys.exit(seeds(rest, Path(work)))
