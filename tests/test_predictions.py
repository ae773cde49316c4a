"""Scores of predictions, also of other programs: what is counted, what is noted, what refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import suites
from click.testing import CliRunner, Result

from ahn_mlx import AHNError
from ahn_mlx.cli import cli
from ahn_mlx.evaluate.predictions import Predictions
from ahn_mlx.evaluate.records import read_records


def refused(result: Result, message: str) -> None:
    assert isinstance(result.exception, AHNError), result.output
    text = str(result.exception)
    assert message in text and "\n" not in text, text


def score(directory: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, ["eval", "score", str(directory), *more])


def predictions(directory: Path, **files: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    for name, its in files.items():
        (directory / f"{name}.jsonl").write_bytes(suites.jsonl(its))
    return directory


QA = {"answers": ["the mill"], "all_classes": None, "length": 9}


def test_predictions_of_other_programs_are_scored(tmp_path) -> None:
    its = [{**QA, "pred": "mill"}, {**QA, "pred": "A kettle"}, {**QA, "pred": ""}]
    directory = predictions(tmp_path / "a", hotpotqa=its)
    result = score(directory, "--json")
    found = json.loads(result.stdout)
    assert found["tasks"]["hotpotqa"]["score"] == 33.33 and found["tasks"]["hotpotqa"]["n"] == 3
    # Of 1, 0 and 0 the mean of three draws has the standard deviation sqrt(2) / 3 / sqrt(3).
    assert abs(found["tasks"]["hotpotqa"]["standard_error"] - 27.2) < 1.5
    answered = [{**QA, "pred": "mill\n\nAnswer: a kettle of salt"}]
    directory = predictions(tmp_path / "b", hotpotqa=answered)
    ours = json.loads(score(directory, "--json").stdout)["tasks"]["hotpotqa"]["score"]
    theirs = score(directory, "--json", "--protocol", "published").output
    assert ours == 100 and json.loads(theirs)["tasks"]["hotpotqa"]["score"] < 50


def test_predictions_of_infinitebenchs_own_layout_are_scored(tmp_path) -> None:
    its = [{"id": 0, "prediction": "It is 12.", "ground_truth": 12}]
    found = json.loads(score(predictions(tmp_path / "a", preds_code_run=its), "--json").stdout)
    assert found["suite"] == "infinitebench" and found["tasks"]["code_run"]["score"] == 100


def test_a_line_is_on_the_disk_before_the_next_begins(tmp_path) -> None:
    made = Predictions(tmp_path / "out", {"suite": "longbench"})
    with made.working(), made.appending("a.jsonl") as append:
        for n in range(2):
            append({"item": n, "pred": "mühe"})
            assert [line["item"] for line in made.done("a.jsonl").values()] == [*range(n + 1)]
    whole = (tmp_path / "out/a.jsonl").read_bytes()
    assert whole.decode() == '{"item": 0, "pred": "mühe"}\n{"item": 1, "pred": "mühe"}\n'
    (tmp_path / "out/a.jsonl").write_bytes(whole + b'{"item": 2, "pr')
    with made.appending("a.jsonl") as append:
        append({"item": 3})
    assert (tmp_path / "out/a.jsonl").read_bytes() == whole + b'{"item": 3}\n'


WRONG = {
    "a line without a field": (
        {"hotpotqa": [{"pred": "x"}]},
        "line 1 of hotpotqa has no 'answers'",
    ),
    "an answer that is none": (
        {"hotpotqa": [{**QA, "pred": None}]},
        "hotpotqa.jsonl: line 1 of hotpotqa pred must be a text, not null",
    ),
    "answers that are a text": (
        {"qmsum": [{**QA, "pred": "x"}, {"pred": "x", "answers": "x"}]},
        'line 2 of qmsum answers must be a list of texts, not "x"',
    ),
    "classes that are not there": (
        {"trec": [{"pred": "x", "answers": ["x"]}]},
        "line 1 of trec has no 'all_classes'",
    ),
    "classes that are none": (
        {"lsht": [{**QA, "pred": "x"}]},
        "line 1 of lsht all_classes must be a list of texts, not null",
    ),
    "keywords that are a list": (
        {"cmrc_mixup_128k": [{**QA, "pred": "x", "gold_ans": ["x"]}]},
        "line 1 of cmrc_mixup gold_ans must be a text or null",
    ),
    "a truth without a letter": (
        {"preds_code_debug": [{"prediction": "A", "ground_truth": ["f"]}]},
        'ground_truth must be a list of two texts, the second a letter, not ["f"]',
    ),
    "a truth that is none": (
        {"preds_math_calc": [{"prediction": "1", "ground_truth": None}]},
        "line 1 of math_calc ground_truth must be a list of numbers, not null",
    ),
    "an answer that is a number": (
        {"hotpotqa": [{**QA, "pred": 5}]},
        "line 1 of hotpotqa pred must be a text, not 5",
    ),
    "two models": (
        {"hotpotqa": [{**QA, "pred": "x", "run": "a"}, {**QA, "pred": "x", "run": "b"}]},
        "predictions of 2 runs are mixed",
    ),
    "two suites": (
        {"hotpotqa": [{**QA, "pred": "x"}], "cmrc_mixup_128k": []},
        "holds predictions of longbench, lveval 128k",
    ),
    "nothing": ({"notes": []}, "has no predictions of a suite"),
}


@pytest.mark.parametrize(("files", "message"), WRONG.values(), ids=WRONG)
def test_predictions_that_are_none_are_named(tmp_path, files, message) -> None:
    refused(score(predictions(tmp_path / "a", **files)), message)


MINE = {**QA, "run": "a"}
NOTED = {
    "an empty file": ({"hotpotqa": [{**QA, "pred": "mill"}], "qmsum": []}, "qmsum.jsonl: holds no"),
    "an unknown task": (
        {"hotpotqa": [{**QA, "pred": "mill"}], "hotpotqb": [{**QA, "pred": ""}]},
        "hotpotqb.jsonl: is not scored, there is no such task; did you mean hotpotqa.jsonl?",
    ),
    "an item that is there again": (
        {
            "hotpotqa": [
                {**MINE, "pred": "", "item": 0},
                {**MINE, "pred": "mill", "item": 1},
                {**MINE, "pred": "mill", "item": 0},
            ]
        },
        "hotpotqa.jsonl: lines that repeat an item: 1; the last of each counts",
    ),
}


@pytest.mark.parametrize(("files", "message"), NOTED.values(), ids=NOTED)
def test_what_is_not_counted_is_said(tmp_path, files, message) -> None:
    directory = predictions(tmp_path / "a", **files)
    result = score(directory, "--json")
    found = json.loads(result.stdout)
    (note,) = found["notes"]
    assert message in note and f"note: {note}" in result.stderr
    assert found["tasks"].keys() == {"hotpotqa"} and found["tasks"]["hotpotqa"]["score"] == 100


def test_a_line_that_was_cut_is_said(tmp_path) -> None:
    directory = predictions(tmp_path / "a", hotpotqa=[{**QA, "pred": "mill"}])
    with (directory / "hotpotqa.jsonl").open("a") as f:
        f.write('{"pred": "mi')
    assert "its last line was cut" in score(directory).stderr


def test_files_with_nothing_at_all_are_refused(tmp_path) -> None:
    refused(score(predictions(tmp_path / "a", hotpotqa=[])), "hotpotqa.jsonl: holds no predictions")


def test_a_length_is_named_and_one_item_has_no_standard_error(tmp_path) -> None:
    line = {"pred": "mill", "answers": ["mill"], "gold_ans": None}
    directory = predictions(tmp_path / "a", cmrc_mixup_16k=[line])
    printed = score(directory).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed]
    assert ["cmrc_mixup_16k", "1", "100.00", "-", "-"] in cells
    task = json.loads(score(directory, "--json").stdout)["tasks"]["cmrc_mixup"]
    assert task["n"] == 1 and task["standard_error"] is None


ENCODINGS = {
    "utf-16": "UTF-16, not UTF-8",
    "utf-16-le": "UTF-16, not UTF-8",
    "latin-1": "no UTF-8 (byte 0xe9 in column",
    "cp1252": "no UTF-8 (byte 0x93 in column",
}


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_encoding_is_named(tmp_path, encoding, end) -> None:
    said = {"cp1252": "\u201ccaf\u00e9\u201d", "utf-16": "\u662f" * 400}.get(encoding, "caf\u00e9")
    line = {**suites.longbench_record("hotpotqa", 0), "pred": said, "input": said}
    data = (json.dumps(line, ensure_ascii=False) + end).encode(encoding)
    directory = predictions(tmp_path / "a")
    (directory / "hotpotqa.jsonl").write_bytes(data)
    refused(score(directory), f"hotpotqa.jsonl: line 1 is {ENCODINGS[encoding]}")
    (data,) = directory.iterdir()
    with pytest.raises(AHNError, match="record 0 is " + re.escape(ENCODINGS[encoding])):
        list(read_records(data, None, {0}))


@pytest.mark.parametrize(
    "run",
    ["{", "[]", '{"facts": "3b"}', '{"data": {}, "deviations": [], "mixer": 5}'],
)
def test_a_run_that_is_none_is_named(tmp_path, run) -> None:
    directory = predictions(tmp_path / "a", hotpotqa=[{**QA, "pred": "x"}])
    (directory / "run.json").write_text(run)
    refused(score(directory), "run.json: ")


def test_no_predictions_at_all_are_named(tmp_path) -> None:
    refused(score(tmp_path / "none"), "no such directory")
    directory = predictions(tmp_path / "a", hotpotqa=[])
    (directory / "hotpotqa.jsonl").write_text("[]\n")
    refused(score(directory), "line 1 is no JSON object")
