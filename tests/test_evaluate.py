"""Suites from end to end, on invented records in the published layouts: what is asked, what is
written, what a run that was killed has lost (nothing), and what is refused."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import suites
from checkpoints import REPO
from click.testing import CliRunner, Result
from forkserver import command
from standin import StandIn
from suites import SUITES, lines

from ahn_mlx.cli import cli

USUAL = {"longbench": suites.LONGBENCH, "infinitebench": suites.INFINITEBENCH}
USUAL |= {"lveval": suites.LVEVAL}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return suites.place(tmp_path_factory.mktemp("eval"))


def arguments(place: Path, suite: str, out: Path, *more: str) -> list[str]:
    words = ["eval", suite, "--model", place / "model", "--prompts", place / "prompts"]
    words += ["--data", place / suite] if "--data" not in more else []
    words += ["--length", "16k"] if suite == "lveval" else []
    return [*map(str, words), "--out", str(out), *more]


def run(place: Path, suite: str, out: Path, *more: str) -> Result:
    return CliRunner().invoke(cli, arguments(place, suite, out, *more))


def refused(result: Result, message: str) -> None:
    assert isinstance(result.exception, ValueError), result.output
    text = str(result.exception)
    assert message in text and "\n" not in text, text


@pytest.fixture(scope="module")
def whole(place) -> dict[str, Path]:
    """Runs that nothing has interrupted."""
    for suite in SUITES:
        result = run(place, suite, place / f"whole-{suite}")
        assert result.exit_code == 0, result.exception
    return {suite: place / f"whole-{suite}" for suite in SUITES}


@pytest.mark.parametrize("suite", SUITES)
def test_predictions_have_the_published_names_and_fields(whole, suite) -> None:
    found = lines(whole[suite])
    names = {
        "longbench": {f"{t}.jsonl" for t in suites.LONGBENCH},
        "infinitebench": {f"infinitebench_{t}.jsonl" for t in suites.INFINITEBENCH},
        "lveval": {f"{t}_16k.jsonl" for t in suites.LVEVAL},
    }
    fields = {
        "longbench": {"pred", "answers", "all_classes", "length"},
        "infinitebench": {"pred", "answers"},
        "lveval": {"pred", "answers", "gold_ans", "input", "all_classes", "length"},
    }
    assert found.keys() == names[suite]
    for task in found.values():
        assert [line["item"] for line in task] == [0, 1]
        assert all(line.keys() - {"item", "run"} == fields[suite] for line in task)
    result = json.loads((whole[suite] / "result.json").read_text())
    assert result["tasks"].keys() == set(USUAL[suite])
    scores = [t["score"] for t in result["tasks"].values()]
    assert result["average"] == round(sum(scores) / len(scores), 2)


def test_keywords_and_first_answers_reach_the_scorer(whole) -> None:
    found = lines(whole["lveval"])
    assert found["hotpotwikiqa_mixup_16k.jsonl"][1]["gold_ans"] == "bakery"
    assert found["cmrc_mixup_16k.jsonl"][1]["gold_ans"] is None


def killed(place: Path, suite: str, out: Path, after: int) -> None:
    """A run that is killed when so many items are written, and a line it was at."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OPENBLAS_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "ahn_mlx", *arguments(place, suite, out)]
    process = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if sum(f.read_bytes().count(b"\n") for f in out.glob("*.jsonl")) >= after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    last = max(out.glob("*.jsonl"), key=lambda f: f.stat().st_mtime_ns)
    with last.open("ab") as f:
        f.write('{"pred": "是'.encode()[:-1])


@pytest.mark.parametrize(
    ("suite", "after"), [("longbench", 4), pytest.param("lveval", 7, marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_goes_on(place, whole, tmp_path, suite, after) -> None:
    out = tmp_path / "out"
    killed(place, suite, out, after)
    before = sum(len(f.read_bytes().splitlines()) for f in out.glob("*.jsonl"))
    assert 0 < before < sum(len(x) for x in lines(whole[suite]).values()) + 1
    result = run(place, suite, out)
    assert result.exit_code == 0, result.exception
    assert lines(out) == lines(whole[suite])
    results = [json.loads((p / "result.json").read_text()) for p in (out, whole[suite])]
    assert results[0] == results[1]


def test_data_come_from_the_hub_at_one_revision(place, whole, tmp_path) -> None:
    hub = StandIn()
    try:
        repo = suites.REPOS["infinitebench"]
        hub.repos[repo] = suites.files_of("infinitebench")
        commit = hub.commit(repo)
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        words = [
            x
            for x in arguments(place, "infinitebench", tmp_path / "out")
            if x not in ("--data", str(place / "infinitebench"))
        ]
        done = command(*words, env=env)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "out/run.json").read_text())["data"]["revision"] == commit
        asked = [path for _, path, _ in hub.downloads()]
        assert asked and all(f"/resolve/{commit}/" in path for path in asked)
        strip = [[x["pred"] for x in v] for v in lines(tmp_path / "out").values()]
        assert strip == [[x["pred"] for x in v] for v in lines(whole["infinitebench"]).values()]
    finally:
        hub.close()
    env["HF_HOME"] = str(tmp_path / "none")
    gone = command(*words[:-1], tmp_path / "other", env=env)
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1 and "--data" in gone.stderr


def test_items_are_spaced_evenly(place, tmp_path) -> None:
    result = run(place, "longbench", tmp_path / "out", "--tasks", "hotpotqa", "--limit", "1")
    assert result.exit_code == 0, result.exception
    assert [x["item"] for x in lines(tmp_path / "out")["hotpotqa.jsonl"]] == [0]
    assert "hotpotqa: 1 of 2 items" in result.output
    assert "not known to be the paper's" in result.output
    refused(run(place, "longbench", tmp_path / "out", "--tasks", "hotpotqa"), "limit 1, not None")


def test_what_cannot_be_asked_is_refused_before_anything_is(place, tmp_path, whole) -> None:
    out = tmp_path / "out"
    refused(run(place, "longbench", out, "--tasks", "hotpotq"), "did you mean hotpotqa?")
    refused(run(place, "longbench", out, "--tasks", "qasper"), "there is no prompt for it")
    refused(run(place, "longbench", out, "--limit", "0"), "--limit must be at least 1")
    nothing = str(tmp_path / "nothing")
    said = f"--data {nothing}: no such directory; it holds data.zip or hotpotqa.jsonl"
    words = ("--tasks", "hotpotqa", "--model", "no-such-model")
    refused(run(place, "longbench", out, *words, "--data", nothing), said)
    archive = str(place / "longbench/data.zip")
    refused(run(place, "longbench", out, "--data", archive), "data.zip: is a file; give the dir")
    refused(run(place, "lveval", out, "--data", str(place)), "has no hotpotwikiqa_mixup.zip or")
    said = f"--prompts {nothing}: no such directory; it holds dataset2prompt.json"
    refused(run(place, "infinitebench", out, *words[2:], "--prompts", nothing), said)
    refused(run(place, "lveval", out, *words[2:], "--prompts", str(place)), "has no config.py")
    refused(run(place, "longbench", whole["lveval"]), "holds predictions with suite 'lveval'")
    refused(run(place, "longbench", whole["longbench"], "--mixer", "window"), "mixer 'memory'")
    assert not out.exists()


DAMAGED = {
    "an archive that ends early": (lambda data: data[:-40], "is damaged"),
    "no archive": (lambda data: b"<html>", "is damaged"),
    "a record without a field": (
        lambda data: suites.zipped(**{"data/hotpotqa.jsonl": suites.jsonl([{"input": "x"}])}),
        "record 0 of hotpotqa has no text 'context'",
    ),
    "a record without answers": (
        lambda data: suites.zipped(
            **{"data/hotpotqa.jsonl": suites.jsonl([{"input": "x", "context": "y"}])}
        ),
        "record 0 of hotpotqa has no 'answers'",
    ),
    "answers that are a text": (
        lambda data: suites.zipped(
            **{
                "hotpotqa.jsonl": suites.jsonl(
                    [{**suites.longbench_record("hotpotqa", 0), "answers": "mill"}]
                )
            }
        ),
        "record 0 of hotpotqa answers must be a list",
    ),
    "no JSON": (lambda data: suites.zipped(**{"hotpotqa.jsonl": b"{\n"}), "is no JSON"),
    "a list": (lambda data: suites.zipped(**{"hotpotqa.jsonl": b"[1]\n"}), "is no JSON object"),
    "no records": (lambda data: suites.zipped(**{"hotpotqa.jsonl": b"\n"}), "has no records"),
    "other members": (lambda data: suites.zipped(**{"a.jsonl": b""}), "of another revision?"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_data_are_named(place, tmp_path, damage, message) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.zip").write_bytes(damage((place / "longbench/data.zip").read_bytes()))
    out = tmp_path / "out"
    result = run(place, "longbench", out, "--tasks", "hotpotqa", "--data", str(data))
    refused(result, message)
    assert not out.exists()


def test_data_of_another_revision_do_not_go_into_a_run(place, tmp_path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    (data / "data.zip").write_bytes((place / "longbench/data.zip").read_bytes())
    words = ("--tasks", "hotpotqa", "--data", str(data))
    assert run(place, "longbench", out, *words).exit_code == 0
    (data / "data.zip").write_bytes(suites.files_of("longbench", 3)["data.zip"])
    refused(run(place, "longbench", out, *words), "began with another revision of data.zip")


def test_a_full_disk_keeps_what_is_done(place, tmp_path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    long = {**suites.longbench_record("musique", 0), "answers": ["x" * 20_000]}
    members = {"hotpotqa.jsonl": suites.jsonl([suites.longbench_record("hotpotqa", 0)])}
    members["musique.jsonl"] = suites.jsonl([long])
    (data / "data.zip").write_bytes(suites.zipped(**members))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ("--tasks", "hotpotqa,musique", "--data", str(data))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        result = run(place, "longbench", out, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(result, "musique.jsonl: cannot be written (File too large)")
    before = [json.loads((out / "hotpotqa.jsonl").read_text())]
    assert run(place, "longbench", out, *words).exit_code == 0
    assert lines(out)["hotpotqa.jsonl"] == before and len(lines(out)["musique.jsonl"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_the_default_model_is_asked(place, tmp_path, suite) -> None:
    words = arguments(place, suite, tmp_path / "out", "--limit", "1")
    words[words.index("--model") + 1] = "ahn-gdn-smollm2-135m"
    few = {"longbench": "triviaqa", "infinitebench": "longbook_qa_eng", "lveval": "factrecall_en"}
    result = CliRunner().invoke(cli, [*words, "--tasks", few[suite]])
    assert result.exit_code == 0, result.exception
    (task,) = lines(tmp_path / "out").values()
    assert len(task) == 1 and task[0]["pred"].strip()
    assert "is not one of the paper's models" in result.output
