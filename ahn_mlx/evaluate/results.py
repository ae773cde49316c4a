"""From predictions to numbers: a score for each task with its standard error, the paper's beside
it, and in what the run differs from the paper's."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np

from ..errors import AHNError, nearest, show
from .predictions import Line, is_whole, read_lines, read_run
from .scorers import LVEVAL, METRICS, of_dataset
from .suites import Suite, check_line, infinitebench, longbench, lveval, score_line

DRAWS = 1000  # of the bootstrap
PAPER_TASKS = {"longbook_qa_eng": "en_qa", "longbook_qa_chn": "zh_qa"}
PAPER_SUITES = {"lveval": "lveval_128k", "infinitebench": "infinitebench", "longbench": "longbench"}
PAPER_MEMORIES = {"gated_deltanet": "ahn_gdn", "deltanet": "ahn_dn", "mamba2": "ahn_mamba2"}
SIZES = {2048: "3b", 3584: "7b", 5120: "14b"}  # of the paper's bases, by their hidden size


class Score(NamedTuple):
    """Of a task: 0 to 100, items, and the bootstrap's standard error, which one item has not."""

    score: float
    n: int
    standard_error: float | None


@cache
def paper_tables() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "paper_tables.json").read_bytes())
    return found


def paper_row(
    suite: str, mixer: str, model: Mapping[str, Any] | None, length: str
) -> dict[str, Any]:
    """The paper's scores by task and "average", or {} if it has no such model. model: facts of
    it, `size` and `memory`."""
    if not model or not model.get("size") or (suite == "lveval" and length != "128k"):
        return {}
    others = {"window": "sinks_swa", "full": "full"}
    column = others.get(mixer) or PAPER_MEMORIES.get(model["memory"], "")
    names = {v: k for k, v in PAPER_TASKS.items()}
    table = paper_tables()[PAPER_SUITES[suite]][model["size"]]
    return {names.get(t, t): row[column] for t, row in table.items() if column in row}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """size: of the paper's bases this is built like, or None."""
    args = model.args
    known = args.model_type == "qwen2" and SIZES.get(args.hidden_size)
    return {"size": known or None, "memory": model.ahn.memory}


def score_of(scores: Sequence[float]) -> Score:
    """scores: 0 to 1, of each item."""
    if len(scores) == 1:
        return Score(of_dataset(scores), 1, None)
    values = np.array(scores)
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    error = 100 * values[draws].mean(axis=1).std(ddof=1)
    return Score(of_dataset(scores), len(scores), round(float(error), 2))


def score_lines(
    file: Path, suite: str, protocol: str, task: str, lines: Sequence[tuple[int, Line]]
) -> list[float]:
    """Raises AHNError for a line without a field, or with one of another kind."""
    found = []
    for number, line in lines:
        try:
            check_line(suite, protocol, task, line)
        except AHNError as e:
            raise AHNError(f"{file}: line {number} of {task} {e}") from None
        found.append(score_line(suite, protocol, task, line))
    return found


class Found(NamedTuple):
    """A file of predictions: of which suite, task and length it is, by its name."""

    suite: str
    task: str
    length: str
    file: Path


def find_predictions(directory: Path) -> tuple[list[Found], list[str]]:
    """Those of a suite, and what to say of other files. Raises AHNError if there are none, or of
    several suites."""
    if not directory.is_dir():
        raise AHNError(f"{directory}: no such directory; give one with predictions (*.jsonl)")
    files = sorted(directory.glob("*.jsonl"))
    found = [f for file in files if (f := _recognise(file))]
    if not found:
        raise AHNError(f"{directory}: has no predictions of a suite, such as hotpotqa.jsonl")
    kinds = {(f.suite, f.length) for f in found}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{suite} {length}".strip() for suite, length in kinds))
        raise AHNError(f"{directory}: holds predictions of {names}; keep them apart")
    known, notes = [f.file for f in found], []
    likely = {f"{name}.jsonl" for name in METRICS} | {f.name for f in known}
    for file in files:
        if file not in known:
            meant = nearest(file.name, likely)
            hint = f"; did you mean {meant}?" if meant else ""
            notes.append(f"{file}: is not scored, there is no such task{hint}")
    return found, notes


def _recognise(file: Path) -> Found | None:
    name = file.name.removesuffix(".jsonl")
    if (sized := re.fullmatch(r"(.+)_(\d+k)", name)) and sized[1] in LVEVAL:
        return Found("lveval", sized[1], sized[2], file)
    for protocol in ("ahn", "published"):
        for task in infinitebench(protocol).tasks.values():
            if file.name == task.out:
                return Found("infinitebench", task.name, "", file)
    name = "repobench-p" if name == "repobench" else name
    return Found("longbench", name, "", file) if name in METRICS else None


def score_directory(directory: Path, protocol: str | None) -> dict[str, Any]:
    """Scores of a directory's predictions, anybody's. protocol: how LongBench and InfiniteBench
    are scored; None: as run.json says, else as the paper does. Raises AHNError if predictions
    of several runs are mixed, a line is none, or there is none."""
    files, notes = find_predictions(directory)
    run = read_run(directory) or {}
    suite = files[0].suite
    own = any(f.file.name.startswith("preds_") for f in files)
    protocol = protocol or run.get("protocol") or ("published" if own else "ahn")
    if suite == "infinitebench" and own != (protocol == "published"):
        raise AHNError(f"{directory}: is not of --protocol {protocol}, whose files are other ones")
    runs, tasks = set(), {}
    for f in files:
        lines, said = _once(f.file)
        notes += said
        runs |= {show(line.get("run")) for line in lines.values()}
        if lines:
            tasks[f.task] = score_of(score_lines(f.file, suite, protocol, f.task, [*lines.items()]))
    if not tasks:
        raise AHNError(f"{directory}: has no predictions; {'; '.join(notes)}")
    if len(runs) > 1:
        raise AHNError(f"{directory}: predictions of {len(runs)} runs are mixed; keep them apart")
    length = files[0].length
    layout = {"lveval": lambda: lveval(length), "longbench": longbench}.get(
        suite, lambda: infinitebench(protocol)
    )()
    model = run.get("facts")
    row = paper_row(suite, str(run.get("mixer")), model, length) if protocol == "ahn" else {}
    differs = run.get("deviations") or ["unknown: there is no run.json beside the predictions"]
    return (
        table_of(layout, tasks, row, [str(x) for x in differs])
        | {k: run[k] for k in ("model", "mixer") if k in run}
        | {"protocol": protocol, "length": length, "notes": notes}
    )


def _once(file: Path) -> tuple[dict[int, Line], list[str]]:
    """The lines of a file by their numbers, the last one of each item, and what to say of it."""
    lines, notes = dict(read_lines(file)), []
    if not lines:
        notes.append(f"{file}: holds no predictions")
    if not is_whole(file):
        notes.append(f"{file}: its last line was cut, and does not count")
    last: dict[tuple[str, int], int] = {}
    again = 0
    for number, line in list(lines.items()):
        if isinstance(line.get("run"), str) and isinstance(line.get("item"), int):
            key = line["run"], line["item"]
            again += key in last
            lines.pop(last.get(key, 0), None)
            last[key] = number
    if again:
        notes.append(f"{file}: lines that repeat an item: {again}; the last of each counts")
    return lines, notes


def table_of(
    suite: Suite, tasks: Mapping[str, Score], row: Mapping[str, float], deviations: list[str]
) -> dict[str, Any]:
    """result.json. average: of all the paper's tasks, unweighted, if all are there."""
    whole = all(name in tasks for name in suite.usual)
    return {
        "suite": suite.name,
        "tasks": {
            name: {**score._asdict(), "paper": row.get(name)} for name, score in tasks.items()
        },
        "average": round(sum(tasks[t].score for t in suite.usual) / len(suite.usual), 2)
        if whole
        else None,
        "average_error": _average_error([tasks[t] for t in suite.usual]) if whole else None,
        "paper_average": row.get("average"),
        "deviations": deviations,
    }


def _average_error(scores: Sequence[Score]) -> float | None:
    errors = [s.standard_error for s in scores if s.standard_error is not None]
    whole = len(errors) == len(scores)
    return round(sum(e**2 for e in errors) ** 0.5 / len(errors), 2) if whole else None


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """For people: task, items, score, standard error, the paper's."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    length = f"_{result['length']}" if result.get("length") else ""
    rows = [
        [
            f"{name}{length}",
            f"{t['n']}",
            number(t["score"]),
            number(t["standard_error"]),
            number(t["paper"]),
        ]
        for name, t in result["tasks"].items()
    ]
    average = [number(result[k]) for k in ("average", "average_error", "paper_average")]
    return [*rows, ["average", "", *average]] if result["average"] is not None else rows
