"""Scores of predictions, also of other programs: what is counted, what is noted, what refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import suites
from click.testing import CliRunner, Result

from ahn_mlx import AHNError
from ahn_mlx.cli import cli
from ahn_mlx.evaluate.predictions import Predictions, read_lines, read_run
from ahn_mlx.evaluate.records import read_records
from ahn_mlx.evaluate.results import find_predictions


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


def test_a_line_is_on_the_disk_before_the_next_begins(tmp_path, monkeypatch) -> None:
    safe: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: safe.append(os.fstat(number).st_size))
    made = Predictions(tmp_path / "out", {"suite": "longbench"})
    with made.working(), made.appending("a.jsonl") as append:
        for n in range(2):
            append({"item": n, "pred": "mühe"})
            assert [line["item"] for line in made.done("a.jsonl").values()] == [*range(n + 1)]
            assert safe[-1] == (tmp_path / "out/a.jsonl").stat().st_size
    whole = (tmp_path / "out/a.jsonl").read_bytes()
    assert whole.decode() == '{"item": 0, "pred": "mühe"}\n{"item": 1, "pred": "mühe"}\n'
    (tmp_path / "out/a.jsonl").write_bytes(whole + b'{"item": 2, "pr')
    with made.appending("a.jsonl") as append:
        append({"item": 3})
    assert (tmp_path / "out/a.jsonl").read_bytes() == whole + b'{"item": 3}\n'
    # Half of a letter, which is no text; and a last line without its end.
    for kept in (b"", b'{"item": 3}', b'{"item": 3}\n'):
        (tmp_path / "out/a.jsonl").write_bytes(kept)
        with made.appending("a.jsonl") as append:
            append({"item": 4, "pred": "\ud800"})
        before = b'{"item": 3}\n' if kept else b""
        assert (tmp_path / "out/a.jsonl").read_bytes() == before + b'{"item": 4, "pred": "?"}\n'


RUN: dict[str, Any] = {
    "suite": "longbench",
    "model": "größer",
    "mixer": "memory",
    "protocol": "ahn",
    "facts": {"size": "14b", "memory": "mamba2"},
}


def test_a_run_is_known_again(tmp_path) -> None:
    out = tmp_path / "some/where"
    made = Predictions(out, RUN)
    assert not out.exists() and made.data == {} and made.deviations == []
    made.use_data("a.zip", "12")
    made.deviations.append("no chat template")
    with made.working():
        assert not made.done("a.jsonl")
    text = (out / "run.json").read_text(encoding="utf-8")
    assert (
        text.startswith('{\n "suite": "longbench",\n "model": "größer",\n') and text[-2:] == "}\n"
    )
    again = Predictions(out, RUN)
    assert again.data == {"a.zip": "12"} and again.deviations == ["no chat template"]
    again.use_data("a.zip", "12")
    with again.working():
        pass
    assert read_run(out) == {**RUN, "data": again.data, "deviations": again.deviations}
    with pytest.raises(AHNError, match=r"began with another revision of a\.zip; give that one"):
        again.use_data("a.zip", "13")
    with pytest.raises(AHNError, match="holds predictions with mixer 'memory', not 'full'"):
        Predictions(out, {**RUN, "mixer": "full"})


def test_a_directory_of_something_else_is_left_alone(tmp_path) -> None:
    # What a run leaves that was killed before it began.
    for name in (".lock", ".run.json.0f1e.part"):
        (tmp_path / name).touch()
    Predictions(tmp_path, RUN)
    (tmp_path / "a.txt").touch()
    with pytest.raises(AHNError, match="holds something else than a run; choose another --out"):
        Predictions(tmp_path, RUN)
    for other, message in (
        (tmp_path / "a.txt", r"a\.txt: is a file; choose a directory"),
        (tmp_path / "a.txt/b", r"a\.txt: is not a directory; choose another place"),
        (Path("-"), "standard output is not written to"),
    ):
        with pytest.raises(AHNError, match=message):
            Predictions(other, RUN)


def test_lines_that_are_no_predictions_of_items_are_named(tmp_path) -> None:
    made = Predictions(tmp_path, RUN)
    file = tmp_path / "a.jsonl"
    for item in ("null", '"0"', "true", "1.0"):
        file.write_text(f'{{"item": 0}}\n{{"item": {item}}}\n')
        with pytest.raises(AHNError, match=r"a\.jsonl: line 2 says no item; choose another --out"):
            made.done("a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    message = r"b\.jsonl: cannot be written \(Is a directory\); what was done is kept"
    with pytest.raises(AHNError, match=message), made.appending("b.jsonl"):
        pass
    with pytest.raises(AHNError, match=r"b\.jsonl: Is a directory"):
        list(read_lines(tmp_path / "b.jsonl"))


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
    "a number among answers": (
        {"hotpotqa": [{**QA, "pred": "x", "answers": ["a", 1]}]},
        'answers must be a list of texts, not ["a", 1]',
    ),
    "nothing predicted": (
        {"preds_code_run": [{"pred": "1", "ground_truth": 1}]},
        "line 1 of code_run has no 'prediction'",
    ),
    "two layouts": (
        {
            "infinitebench_longbook_qa_eng": [{"pred": "x", "answers": ["x"]}],
            "preds_longbook_qa_chn": [{"prediction": "x", "ground_truth": ["x"]}],
        },
        "line 1 of longbook_qa_eng has no 'prediction'",
    ),
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
                {**MINE, "pred": "mill", "item": 1},
                {**MINE, "pred": "", "item": 0},
                {**MINE, "pred": "mill", "item": 0},
                {**QA, "pred": "mill", "run": "a"},
                {**QA, "pred": "mill", "run": "a"},
            ]
        },
        "hotpotqa.jsonl: lines that repeat an item: 1; the last of each counts",
    ),
    "another unknown one": (
        {"hotpotqa": [{**QA, "pred": "mill"}], "qmsun": []},
        "qmsun.jsonl: is not scored, there is no such task; did you mean qmsum.jsonl?",
    ),
    "an unknown one like none": (
        {"hotpotqa": [{**QA, "pred": "mill"}], "z" * 20: []},
        "zz.jsonl: is not scored, there is no such task",
    ),
}
COUNTED = {"an item that is there again": 4}


@pytest.mark.parametrize("what", NOTED)
def test_what_is_not_counted_is_said(tmp_path, what) -> None:
    files, message = NOTED[what]
    directory = predictions(tmp_path / "a", **files)
    result = score(directory, "--json")
    found = json.loads(result.stdout)
    (note,) = found["notes"]
    assert message in note and f"note: {note}" in result.stderr
    assert "?" in message or not note.endswith("?")
    assert found["tasks"].keys() == {"hotpotqa"} and found["tasks"]["hotpotqa"]["score"] == 100
    assert found["tasks"]["hotpotqa"]["n"] == COUNTED.get(what, 1)


@pytest.mark.parametrize("cut", [b'{"pred": "mi', '{"pred": "是'.encode()[:-1], b"\0" * 99])
def test_a_line_that_was_cut_is_said(tmp_path, cut) -> None:
    directory = predictions(tmp_path / "a", hotpotqa=[{**QA, "pred": "mill"}])
    with (directory / "hotpotqa.jsonl").open("ab") as f:
        f.write(cut)
    assert "its last line was cut" in score(directory).stderr


def test_a_last_line_without_its_end_counts(tmp_path) -> None:
    directory = predictions(tmp_path / "a", hotpotqa=2 * [{**QA, "pred": "mill"}])
    file = directory / "hotpotqa.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    found = json.loads(score(directory, "--json").stdout)
    assert found["tasks"]["hotpotqa"]["n"] == 2 and found["notes"] == []


@pytest.mark.parametrize("protocol", ["ahn", "published"])
def test_a_run_says_how_it_is_scored_and_what_the_paper_has(tmp_path, protocol) -> None:
    """qmsum of Qwen2.5-14B with Mamba2 is 22.19 in the paper's table, in its own way."""
    directory = predictions(tmp_path / "a", qmsum=2 * [{**QA, "pred": "the mill\n\nQuestion: b"}])
    facts = {**RUN, "protocol": protocol, "data": {}, "deviations": ["a", "b"]}
    (directory / "run.json").write_text(json.dumps(facts))
    found = json.loads(score(directory, "--json").stdout)
    task = found["tasks"]["qmsum"]
    assert task["paper"] == (22.19 if protocol == "ahn" else None)
    assert (task["score"] == 100) == (protocol == "ahn") and found["protocol"] == protocol
    assert (found["model"], found["mixer"]) == ("größer", "memory")
    assert found["deviations"] == ["a", "b"]
    other = {"ahn": "published", "published": "ahn"}[protocol]
    assert json.loads(score(directory, "--json", "--protocol", other).stdout)["protocol"] == other
    del facts["model"], facts["deviations"]
    (directory / "run.json").write_text(json.dumps({**facts, "deviations": []}))
    found = json.loads(score(directory, "--json").stdout)
    assert "model" not in found and len(found["deviations"]) == 1
    assert found["deviations"][0].startswith("unknown: there is no run.json")


def test_other_names_of_files_are_known(tmp_path) -> None:
    line = {"pred": "a = 1", "answers": ["a = 1"], "all_classes": None}
    found = json.loads(score(predictions(tmp_path / "a", repobench=[line]), "--json").stdout)
    assert found["tasks"].keys() == {"repobench-p"}
    count = {"pred": "3", "answers": [3], "all_classes": None}
    found = json.loads(score(predictions(tmp_path / "b", passage_count=[count]), "--json").stdout)
    assert found["tasks"]["passage_count"]["score"] == 100
    own = predictions(tmp_path / "c", preds_code_run=[{"prediction": "1", "ground_truth": 1}])
    refused(score(own, "--protocol", "ahn"), "is not of --protocol ahn, whose files are other ones")


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
    [
        *("{", "[]", '{"facts": "3b"}', '{"data": {}, "deviations": [], "mixer": 5}'),
        '{"a": ' + 99 * "[" + 99 * "]" + "}",
        *(
            json.dumps({**RUN, "data": {}, "deviations": [], **wrong})
            for wrong in (
                *({"data": []}, {"deviations": {}}, {"mixer": "x"}, {"protocol": "x"}),
                *({"facts": {}}, {"facts": "3b"}, {"facts": {"memory": "x", "size": "99b"}}),
            )
        ),
    ],
)
def test_a_run_that_is_none_is_named(tmp_path, run) -> None:
    directory = predictions(tmp_path / "a", hotpotqa=[{**QA, "pred": "x"}])
    (directory / "run.json").write_text(run)
    refused(score(directory), "run.json: ")
    (directory / "run.json").write_text(json.dumps({**RUN, "data": {}, "deviations": []}))
    assert score(directory).exit_code == 0


def test_no_predictions_at_all_are_named(tmp_path) -> None:
    refused(score(tmp_path / "none"), "no such directory")
    with pytest.raises(AHNError, match="none: no such directory; give one with predictions"):
        find_predictions(tmp_path / "none")
    directory = predictions(tmp_path / "a", hotpotqa=[])
    (directory / "hotpotqa.jsonl").write_text("[]\n")
    refused(score(directory), "line 1 is no JSON object")
