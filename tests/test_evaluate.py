"""Suites from end to end, on invented records in the published layouts: what is asked, what is
written, what a run that was killed has lost (nothing), and what is refused."""

import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import suites
from checkpoints import REPO, edit_config, talking_model
from click.testing import CliRunner, Result
from huggingface_hub import constants
from standin import StandIn

from ahn_mlx import AHNError, load
from ahn_mlx.cli import cli
from ahn_mlx.evaluate.run import Cost, SuiteRun, follow
from ahn_mlx.evaluate.suites import suite_of
from ahn_mlx.model.ranks import Ranks
from ahn_mlx.reading.generate import prefill_step

SUITES = ("longbench", "infinitebench", "lveval")
USUAL = {"longbench": suites.LONGBENCH, "infinitebench": suites.INFINITEBENCH}
USUAL |= {"lveval": suites.LVEVAL}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, prompts, and the data of each suite in a directory."""
    path = tmp_path_factory.mktemp("eval")
    model = talking_model("qwen2-gdn", path)
    settings = {"repetition_penalty": 1.3, "eos_token_id": list(range(1, 256, 6))}
    (model / "generation_config.json").write_text(json.dumps(settings))
    edit_config(model, eos_token_id=settings["eos_token_id"])
    suites.write_prompts(path / "prompts")
    for suite in SUITES:
        (path / suite).mkdir()
        for name, data in suites.files_of(suite).items():
            (path / suite / name).write_bytes(data)
    return path


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


def lines(out: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        f.name: [json.loads(x) for x in f.read_text().splitlines()]
        for f in sorted(out.glob("*.jsonl"))
    }


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
    command = [sys.executable, "-m", "ahn_mlx", *arguments(place, suite, out)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if sum(f.read_bytes().count(b"\n") for f in out.glob("*.jsonl")) >= after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    last = max(out.glob("*.jsonl"), key=lambda f: f.stat().st_mtime_ns)
    with last.open("ab") as f:
        f.write('{"pred": "是'.encode()[:-1])


@pytest.mark.parametrize(("suite", "after"), [("longbench", 4), ("lveval", 7)])
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
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(REPO)}
        words = [
            x
            for x in arguments(place, "infinitebench", tmp_path / "out")
            if x not in ("--data", str(place / "infinitebench"))
        ]
        command = [sys.executable, "-m", "ahn_mlx", *words]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        done = subprocess.run(command, env={**kept, **env}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "out/run.json").read_text())["data"]["revision"] == commit
        asked = [path for _, path, _ in hub.downloads()]
        assert asked and all(f"/resolve/{commit}/" in path for path in asked)
        strip = [[x["pred"] for x in v] for v in lines(tmp_path / "out").values()]
        assert strip == [[x["pred"] for x in v] for v in lines(whole["infinitebench"]).values()]
    finally:
        hub.close()
    gone = subprocess.run(
        [*command[:-1], str(tmp_path / "other")],
        env={**kept, **env, "HF_HOME": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
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


def test_ctrl_c_ends_a_run_within_an_item_and_keeps_the_others(place, tmp_path) -> None:
    model, tokenizer = load(place / "model")
    suite = suite_of("longbench", "ahn", "")
    shape = {"out": tmp_path / "out", "data": place / "longbench", "prompts": place / "prompts"}
    run = SuiteRun(suite, model, tokenizer, suite.chosen(("hotpotqa",)), **shape)
    calls: list[int] = []

    def pressed(task: str, n: int) -> None:
        calls.append(n)
        if calls.count(1) and n == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.ask(pressed)
    assert len(lines(tmp_path / "out")["hotpotqa.jsonl"]) == 1


@pytest.fixture(scope="module")
def loaded(place) -> tuple[Any, Any]:
    return load(place / "model", dtype="float32")


@pytest.mark.parametrize("suite", SUITES)
def test_what_a_run_costs_and_in_what_it_differs(place, loaded, tmp_path, suite) -> None:
    """Of one of two items: its prompt, a token for each byte up to the limit, and an answer."""
    shape = {"out": tmp_path / "out", "data": place / suite, "prompts": place / "prompts"}
    length = "16k" if suite == "lveval" else ""
    asked = suite_of(suite, "ahn", length)
    tasks = asked.chosen(())[:2]
    run = SuiteRun(asked, *loaded, tasks, **shape, length=length, limit=1)
    cost = run.cost()
    texts = [text for left in run.left for _, text in run._texts(left)]
    new = sum(task.max_new["ahn"] for task in tasks)
    tokens = sum(len(run.asker.encoder("", text)) for text in texts)
    assert cost.items == len(texts) == 2 and new > 0
    assert abs(cost.tokens - new - tokens) <= 0.2 * tokens and cost.seconds > 0
    assert [(left.wanted, left.records, len(left.items)) for left in run.left] == 2 * [(1, 2, 1)]
    ahn = loaded[0].ahn
    expected = [
        f"{loaded[0].origin.name} is not one of the paper's models",
        "the base computes in float32, the paper's in bfloat16",
        f"window {ahn.window}, the paper's {asked.window:,}",
        f"sinks {ahn.sinks}, the paper's {asked.sinks:,}",
        *(["length 16k, the paper's 128k"] if length else []),
        *(f"the prompt of {task.name} is not known to be the paper's" for task in tasks),
        *(f"{task.name}: 1 of 2 items" for task in tasks),
    ]
    assert run.deviations() == run.predictions.deviations == expected
    full = SuiteRun(
        asked,
        *loaded,
        tasks,
        **shape | {"out": tmp_path / "b"},
        mixer="full",
        length="128k" if length else "",
        protocol="ahn",
    )
    assert full.deviations() == [*expected[:2], *expected[-4:-2]]
    small = dataclasses.replace(asked, limit=10)
    few = SuiteRun(small, *loaded, tasks, **shape | {"out": tmp_path / "c"}, length=length, limit=1)
    assert few.cost().tokens == 2 * 10 + new


@pytest.fixture
def shape(place, tmp_path) -> dict[str, Path]:
    """Of LongBench: where records and prompts are, and where predictions go."""
    return {
        "out": tmp_path / "out",
        "data": place / "longbench",
        "prompts": place / "prompts",
    }


def made(loaded, shape, *tasks: str, suite: str = "longbench", **more: Any) -> SuiteRun:
    asked = suite_of(suite, more.get("protocol", "ahn"), "")
    return SuiteRun(asked, *loaded, asked.chosen(tasks), **shape, **more)


def test_the_cost_of_what_is_left_is_by_its_characters_and_the_speed_here(
    place, loaded, shape, tmp_path, monkeypatch
) -> None:
    """Three bytes, which are tokens, a character; an empty prompt; one longer than is looked at."""
    shape["data"], shape["prompts"] = tmp_path, tmp_path
    (tmp_path / "dataset2prompt.json").write_text('{"hotpotqa": "{context}"}')
    texts = ("", "是" * 20, "是" * 20_000 + "a" * 10_000)
    record = suites.longbench_record("hotpotqa", 0)
    its = [{**record, "context": text} for text in texts]
    (tmp_path / "hotpotqa.jsonl").write_bytes(suites.jsonl(its))
    run = made(loaded, shape, "hotpotqa")
    run.suite = dataclasses.replace(run.suite, limit=100_000)
    # A clock that goes on by a second whenever it is looked at: a step takes one.
    monkeypatch.setattr(time, "perf_counter", count().__next__)
    cost = run.cost()
    assert cost.items == 3 and cost.tokens == 60 + 90_000 + 3 * 32
    assert cost.seconds == cost.tokens / prefill_step()
    monkeypatch.undo()
    # Of the first 20,000 characters one is one byte.
    its = [{**record, "context": "是" * 19_999 + "a" * 10_001}]
    (tmp_path / "hotpotqa.jsonl").write_bytes(suites.jsonl(its))
    long = made(loaded, {**shape, "out": tmp_path / "b"}, "hotpotqa")
    long.suite = run.suite
    assert long.cost().tokens == 30_000 * 59_998 // 20_000 + 32


def test_what_is_all_there_costs_nothing(loaded, shape) -> None:
    made(loaded, shape, "hotpotqa").ask()
    run = made(loaded, shape, "hotpotqa")
    run.model = SimpleNamespace(ranks=None)  # which is not even asked how fast it is
    assert run.cost() == Cost(0, 0, 0.0)


def test_a_run_is_known_by_all_that_makes_it(place, loaded, shape) -> None:
    run = made(loaded, shape, "hotpotqa", limit=1, mixer="window")
    table = json.loads((place / "prompts/dataset2prompt.json").read_text())
    texts = sorted([name, text] for name, text in table.items() if name != "infinitebench")
    assert run.identity["prompts"] == hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    assert run.identity["penalty"] == 1.3
    # Later versions go on with what this one has begun, in whatever order they write.
    sorted_ = dict(sorted(run.identity.items()))
    assert run.mark == hashlib.sha256(json.dumps(sorted_, sort_keys=True).encode()).hexdigest()[:8]
    marks = {run.mark}
    for more in ({"mixer": "full"}, {"limit": 2}, {"protocol": "published"}, {"length": "1k"}):
        marks.add(made(loaded, shape, "hotpotqa", **{"limit": 1, "mixer": "window", **more}).mark)
    assert len(marks) == 5


def test_predictions_of_another_run_are_no_part_of_this(loaded, shape) -> None:
    run = made(loaded, shape, "hotpotqa")
    run.ask()
    file = shape["out"] / "hotpotqa.jsonl"
    whole = file.read_text()
    assert [left.items for left in made(loaded, shape, "hotpotqa").left] == [[]]
    file.write_text(whole.splitlines(keepends=True)[0])
    assert [left.items for left in made(loaded, shape, "hotpotqa").left] == [[1]]
    for wrong in (whole.replace(run.mark, "0" * 8), whole.replace('"item": 1', '"item": 2')):
        file.write_text(wrong)
        with pytest.raises(AHNError, match=r"predictions of another run \(item [02]\); choose"):
            made(loaded, shape, "hotpotqa")


def test_in_what_else_a_run_may_differ(place, loaded, shape, monkeypatch) -> None:
    file, kept = place / "model/generation_config.json", place / "kept.json"
    file.rename(kept)
    try:
        run = made(loaded, shape, "hotpotqa", protocol="published")
    finally:
        kept.rename(file)
    assert run.asker.penalty == 1.0
    before = run.deviations()
    assert "no repetition penalty: there is no generation_config.json to say one" in before
    assert "prompts, lengths and scores by the suite's own protocol" in before
    norms = [m for _, m in loaded[0].named_modules() if hasattr(m, "weight")]
    monkeypatch.setattr(loaded[0].args, "rope_scaling", {"type": "yarn"})
    monkeypatch.setattr(run.asker, "template", None)
    norms[0].bits = 4
    try:
        found = set(run.deviations())
    finally:
        del norms[0].bits
    assert found - set(before) == {
        "positions are scaled (YaRN or alike), the paper's are not",
        "no chat template: prompts are bare",
        "the base has 4 bits, the paper's 16",
    }
    assert set(before) - found == {"the base computes in float32, the paper's in bfloat16"}


@pytest.mark.parametrize(("package", "task"), [("jieba", "dureader"), ("rouge_score", "")])
def test_what_scores_a_task_is_there_before_it_is_asked(
    loaded, shape, tmp_path, monkeypatch, package, task
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert made(loaded, shape, "hotpotqa").left
    suite = "longbench"
    if not task:
        suite, task = "infinitebench", "longbook_sum_eng"
        shape = {"out": tmp_path / "b", "data": tmp_path, "prompts": tmp_path}
        (tmp_path / "dataset2prompt.json").write_text(json.dumps({task: "{context}"}))
        its = [suites.infinitebench_record(task, 0)]
        (tmp_path / f"{task}.jsonl").write_bytes(suites.jsonl(its))
    protocol = "published" if suite == "infinitebench" else "ahn"
    name = package.replace("_", "-")
    with pytest.raises(AHNError, match=f"this task is scored with {name}: pip install"):
        made(loaded, shape, task, suite=suite, protocol=protocol)
    monkeypatch.undo()
    assert made(loaded, shape, task, suite=suite, protocol=protocol).left


@pytest.mark.parametrize("answer", [["x"], [], 5, [None]])
def test_an_answer_of_another_kind_is_named_before_anything_is_asked(
    loaded, tmp_path, answer
) -> None:
    (tmp_path / "dataset2prompt.json").write_text('{"math_calc": "{context}"}')
    record = {**suites.infinitebench_record("math_calc", 0), "answer": answer}
    (tmp_path / "math_calc.jsonl").write_bytes(suites.jsonl([record]))
    shape = {"out": tmp_path / "out", "data": tmp_path, "prompts": tmp_path}
    run = made(loaded, shape, "math_calc", suite="infinitebench", protocol="published")
    with pytest.raises(AHNError, match="record 0 of math_calc has an answer of another kind"):
        run.cost()


def test_data_of_the_hub_are_those_of_the_commit_that_a_run_began_with(
    place, loaded, shape, tmp_path, monkeypatch
) -> None:
    hub = StandIn()
    try:
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in (
            *(("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE", files)),
            *(("HF_HUB_CACHE", str(tmp_path / "hf")), ("HF_HUB_DISABLE_XET", True)),
        ):
            monkeypatch.setattr(constants, name, value)
        repo = suites.REPOS["longbench"]
        commit = hub.add(repo, data__zip=suites.files_of("longbench")["data.zip"])
        run = made(loaded, {**shape, "data": None}, "hotpotqa")
        with run.predictions.working():
            assert run.predictions.data["revision"] == commit
        later = hub.add(repo, data__zip=suites.files_of("longbench", 3)["data.zip"])
        again = made(loaded, {**shape, "data": None}, "hotpotqa")
        assert again.predictions.data["revision"] == commit != later
        assert [left.records for left in again.left] == [2]
        asked = [path for _, path, _ in hub.downloads()]
        assert asked and all(f"/resolve/{commit}/" in path for path in asked)
    finally:
        hub.close()


class Told(Ranks):
    """What rank 0 says is kept in its group, and the other rank hears it afterwards."""

    def first(self, x: mx.array, root: int = 0) -> mx.array:
        said: list[mx.array] = self.group.said
        if self.rank != root:
            return said.pop(0)
        said.append(x)
        return x


def test_other_ranks_compute_what_the_first_does(loaded, shape, monkeypatch) -> None:
    model, tokenizer = loaded
    kind, computed = type(model), []
    whole = kind.__call__

    def noted(self: Any, ids: mx.array, *more: Any, **named: Any) -> mx.array:
        computed.append(ids.shape)
        return whole(self, ids, *more, **named)

    monkeypatch.setattr(kind, "__call__", noted)
    said: list[mx.array] = []
    told: list[list[int]] = [[], []]

    def ranks(rank: int) -> Ranks:
        return Told(SimpleNamespace(rank=lambda: rank, size=lambda: 2, said=said))

    monkeypatch.setattr(model, "ranks", ranks(0))
    for items in (2, 0):  # the second time nothing is left
        run = made(loaded, shape, "hotpotqa")
        assert run.cost().items == items
        if items:
            run.ask(lambda task, n: told[0].append(n))
        first, computed[:] = list(computed), []
        monkeypatch.setattr(model, "ranks", ranks(1))
        follow(model, tokenizer, "memory", lambda: told[1].append(0))
        assert computed == first and said == []
        computed.clear()
        monkeypatch.setattr(model, "ranks", ranks(0))
    assert len(told[1]) == len(told[0]) > 2 == sum(told[0])


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
