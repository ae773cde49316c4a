"""Data of suites, and predictions of anybody's runs."""

import inspect
import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import papers

from ahn_mlx.errors import AHNError
from ahn_mlx.evaluate.predictions import Predictions, is_whole, read_lines, read_run
from ahn_mlx.evaluate.records import count_records, digest, read_records, spaced
from ahn_mlx.evaluate.results import find_predictions, rows_of, score_directory
from ahn_mlx.evaluate.scorers import SCORERS
from ahn_mlx.evaluate.suites import UNFIT, line_of

from ..mutate import of_json, of_lines, of_zip
from ..oracle import Target, also

PROTOCOLS = (None, "ahn", "published")
FILES = {
    "longbench": (
        "hotpotqa.jsonl",
        "passage_count.jsonl",
        "trec.jsonl",
        "vcsum.jsonl",
        "lcc.jsonl",
    ),
    "lveval": ("factrecall_zh_16k.jsonl", "hotpotwikiqa_mixup_16k.jsonl", "cmrc_mixup_16k.jsonl"),
    "infinitebench": ("preds_math_calc.jsonl", "preds_passkey.jsonl", "preds_code_run.jsonl"),
}
WORDS = (
    *("pred", "answers", "gold_ans", "all_classes", "length", "prediction", "ground_truth", "item"),
    *("run", "id", "data", "deviations", "facts", "mixer", "protocol", "memory", "window", "full"),
    *("ahn", "published", "size", "7b", "model", "suite", "answer", "options", "input", "context"),
    *(name for names in FILES.values() for name in names),
    *(
        "longbook_qa_eng.jsonl",
        "longbook_choice_eng.jsonl",
        "kv_retrieval.jsonl",
        "code_debug.jsonl",
    ),
)


def _records(data: bytes, place: Path) -> tuple[Path, str | None]:
    """A zip archive, or lines."""
    zipped = data.startswith(b"PK")
    file = place / ("data.zip" if zipped else "data.jsonl")
    file.write_bytes(data)
    return file, "a.jsonl" if zipped else None


def _read(given: tuple[Path, str | None], place: Path, out: Path) -> None:
    file, member = given
    digest(file)
    for beside in (place, place / "none"):
        with also():
            digest(beside)
    for number in spaced(count_records(file, member), 4):
        for _, record in read_records(file, member, {number}):
            for suite in FILES:
                for protocol in ("ahn", "published"):
                    with suppress(KeyError, *UNFIT):  # who asks for a line says so
                        line_of(suite, protocol, "math_calc", record, "x")


def records() -> list[bytes]:
    record = {"input": "Who?", "context": "x", "answers": ["a"], "length": 3, "all_classes": None}
    other = {"id": 1, "context": "x", "answer": ["1", "2"], "options": ["a", "b"], "input": ""}
    lines = "\n".join(json.dumps(x) for x in (record, other)).encode()
    return [
        lines,
        b"\xef\xbb\xbf" + lines,
        lines.decode().encode("utf-16"),
        b'{"a": "\xe9"}\n',
        b'{"a": "\x93"}\n',
        papers.zipped({"data/a.jsonl": lines}),
        papers.zipped({"b.jsonl": lines}),
    ]


def _directory(data: bytes, place: Path) -> tuple[Path, str | None]:
    """JSON has files by name: texts, objects, or lists of lines. Which protocol scores them
    depends on every byte."""
    for file in place.iterdir():
        if file.is_file():
            file.unlink()
    try:
        for name, value in json.loads(data).items():
            if (
                not name
                or "/" in name
                or "\0" in name
                or len(name.encode()) > 100
                or name[0] == "."
            ):
                continue
            text = value if isinstance(value, str) else json.dumps(value)
            if isinstance(value, list):
                text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in value)
            (place / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    except (ValueError, AttributeError, RecursionError, OSError):
        (place / "hotpotqa.jsonl").write_bytes(data)
    return place, PROTOCOLS[crc32(data) % len(PROTOCOLS)]


def _score(given: tuple[Path, str | None], place: Path, out: Path) -> None:
    path, protocol = given
    for beside in (path / "none", out / "none"):
        with also():
            find_predictions(beside)
    for file in sorted(path.glob("*.jsonl")):
        with suppress(AHNError):
            is_whole(file)
            for _ in read_lines(file):
                pass
        size = file.stat().st_size
        if size < 4096 and size % 8 == 3:
            with also():
                _go_on(path, file)
        if size < 4096 and size % 16 == 1:
            _by_name(file)
    json.dumps(rows_of(result := score_directory(path, protocol)))
    json.dumps(result)


def _go_on(path: Path, file: Path) -> None:
    """As a run that was killed goes on: nothing of what is whole is lost, and it is read again."""
    run = read_run(path) or {}
    mine = Predictions(path, {name: run[name] for name in run.keys() - {"data", "deviations"}})
    mine.use_data(file.name, "0" * 64)
    assert mine.done("none") == {}
    with also():
        Predictions(path, {**mine.identity, "model": "another"})
    (path / "folder").mkdir(exist_ok=True)
    with also(), mine.appending("folder"):
        raise AssertionError("a directory was written to")
    before, kept = mine.done(file.name), file.read_bytes()
    with mine.working():
        with mine.appending(file.name) as append:
            append({"item": 1 << 40, "pred": "\ud83d x"})
        after = mine.done(file.name)
    assert {**before, 1 << 40: after[1 << 40]} == after and len(after) == len(before) + 1
    again = read_run(path)
    assert again == {**run, "data": mine.data, "deviations": mine.deviations}, again
    file.write_bytes(kept)


def _by_name(file: Path) -> None:
    """Each scorer, of what a line has for it."""
    with suppress(AHNError):
        for _, line in read_lines(file):
            said, wanted = line.get("pred", line.get("prediction")), line.get("answers", "a")
            text = wanted[0] if isinstance(wanted, list) and wanted else wanted
            given = {"predictions": [said], "prediction": said, "ground_truth": text, **line}
            for scorer in SCORERS.values():
                names = inspect.signature(scorer).parameters
                with also():
                    scorer(**{name: given.get(name, "a") for name in names})


def predictions() -> list[bytes]:
    known = {"answers": ["a", "b"], "all_classes": ["a", "b"], "length": 5, "run": "r"}
    run = {"data": {}, "deviations": ["x"], "facts": {"memory": "deltanet", "size": "7b"}}
    run |= {"mixer": "memory", "protocol": "ahn", "model": "m"}
    found = []
    for names in FILES.values():
        files: dict[str, Any] = {"run.json": run} if names[0][0] != "p" else {}
        for name in names:
            line = {**known, "pred": "a b", "item": 0, "gold_ans": "a", "input": "Who?"}
            if "count" in name:
                line["answers"] = [1]
            if name.startswith("preds_"):
                truth: Any = [1, 2] if "calc" in name else "a"
                line = {"id": 1, "prediction": "[1, 2]", "ground_truth": truth}
            files[name] = [line, {**line, "item": 1}]
        found.append(json.dumps(files).encode())
    options = {"id": 1, "prediction": "The answer is B", "ground_truth": ["b", "B"]}
    texts = {"id": 1, "prediction": "x", "ground_truth": ["b", "B"]}
    more = {f"preds_{n}.jsonl": [options] for n in ("longbook_choice_eng", "code_debug")}
    more |= {f"preds_{n}.jsonl": [texts] for n in ("longbook_qa_eng", "longdialogue_qa_eng")}
    more |= {f"preds_{n}.jsonl": [texts] for n in ("longbook_qa_chn",)}
    more |= {f"preds_{n}.jsonl": [{**texts, "ground_truth": "b"}] for n in ("kv_retrieval",)}
    # Lines of all lengths, as some are gone on with.
    files = {
        f"{name}.jsonl": [{"item": n, "pred": "a" * n, "answers": ["a"]}]
        for n, name in enumerate(("hotpotqa", "trec", "lcc", "vcsum", "qasper", "dureader"))
    }
    found.append(json.dumps({"run.json": run, **files}).encode())
    return [*found, json.dumps(more).encode()]


def _any(data: bytes, longest: int, seed: int) -> bytes:
    change = _ZIP if data.startswith(b"PK") else _LINES
    return change(data, longest, seed)


_ZIP, _LINES = of_zip(("a.jsonl", "x/a.jsonl")), of_lines(WORDS)
TARGETS = [
    Target(
        "records",
        _records,
        _read,
        records,
        ("evaluate/records.py",),
        (*WORDS, "PK\x01\x02", "PK\x05\x06", "\x0e\0", "\x0c\0", "\x08\0"),
        _any,
    ),
    Target(
        "predictions",
        _directory,
        _score,
        predictions,
        ("evaluate/predictions.py", "evaluate/fields.py", "evaluate/results.py"),
        WORDS,
        of_json(WORDS),
    ),
]
