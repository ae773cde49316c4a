"""Run the targets one after the other, and print what came of it.

    python -m fuzz [NAME ...] [--minutes M] [--work DIR]

--minutes: of all targets together; 0 only prints what is known. --work: keeps inputs that reach
something new, what was counted, and finds (.fuzz); a later run goes on from it. Exits 1 if any
target has a find.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .names import NAMES


def main() -> int:
    about = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.split("\n")[0])
    about.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    about.add_argument("--minutes", type=float, default=10)
    about.add_argument("--work", type=Path, default=Path(".fuzz"))
    given = about.parse_args()
    names = given.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        about.error(f"there is no target {sorted(unknown)[0]}")
    work = given.work.resolve()
    if given.minutes:
        seconds = max(1, round(given.minutes * 60 / len(names)))
        for how in (("fuzz", work, str(seconds)), ("lines", work)):
            subprocess.run([sys.executable, "-m", "fuzz.one", *how, *names], check=True)
    return _table(names, work)


def _table(names: list[str], work: Path) -> int:
    # A second of the processor: what else a machine does says nothing of a parser.
    rows = [("target", "inputs", "a second", "accepted", "slowest", "lines", "finds")]
    reached: dict[str, set[int]] = {}
    there: dict[str, set[int]] = {}
    finds = 0
    for name in names:
        stats, lines = (_read(work / "stats" / f"{name}{end}") for end in (".json", ".lines.json"))
        count = missing = 0
        for file, found in lines.items():
            there[file] = set(found["lines"])
            reached.setdefault(file, set()).update(there[file] - set(found["missing"]))
            count, missing = count + len(found["lines"]), missing + len(found["missing"])
        kept = sorted(p.name for p in (work / "finds" / name).glob("*.txt"))
        finds += len(kept)
        n, seconds = stats.get("executions", 0), stats.get("seconds", 0)
        share = f"{100 * (count - missing) / count:.1f}%" if count else "-"
        accepted = f"{100 * stats.get('accepted', 0) / n:.0f}%" if n else "-"
        slowest = f"{stats.get('slowest', 0):.1f} s"
        speed = f"{n / max(seconds, 1):,.0f}"
        rows.append((name, f"{n:,}", speed, accepted, slowest, share, str(len(kept))))
    _print(rows)
    files = [("file", "lines", "reached", "missing")]
    for file in sorted(there):
        gone = sorted(there[file] - reached[file])
        share = f"{100 * len(reached[file]) / max(1, len(there[file])):.1f}%"
        some = " ".join(map(str, gone[:12])) + (" ..." if len(gone) > 12 else "")
        files.append((file, str(len(there[file])), share, some))
    total, hit = sum(map(len, there.values())), sum(map(len, reached.values()))
    files.append(("all", str(total), f"{100 * hit / max(1, total):.1f}%", ""))
    print()
    _print(files)
    return 1 if finds else 0


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
