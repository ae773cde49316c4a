"""A suite's run by itself: what it asks, what it costs, what makes it known again, and what is
refused before anything is asked."""

import dataclasses
import hashlib
import json
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import suites
from huggingface_hub import constants
from standin import StandIn
from suites import SUITES, lines

from ahn_mlx import AHNError, load
from ahn_mlx.evaluate.run import Cost, SuiteRun, check_given, follow
from ahn_mlx.evaluate.suites import suite_of
from ahn_mlx.model.ranks import Ranks
from ahn_mlx.reading.generate import prefill_step


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return suites.place(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def loaded(place) -> tuple[Any, Any]:
    return load(place / "model", dtype="float32")


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
    result = run.result()
    assert json.loads((shape["out"] / "result.json").read_text()) == result
    assert result["tasks"]["hotpotqa"]["n"] == 2 and result["deviations"] == run.deviations()
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


def test_predictions_of_other_weights_are_no_part_of_this(place, shape) -> None:
    model, tokenizer = load(place / "model", dtype="float32")
    made((model, tokenizer), shape, "hotpotqa").ask()
    assert made((model, tokenizer), shape, "hotpotqa").left[0].items == []
    model.model.norm.weight = model.model.norm.weight * 1.5
    with pytest.raises(AHNError, match="holds predictions with weights"):
        made((model, tokenizer), shape, "hotpotqa")


def test_each_mixer_answers_and_each_task_is_asked_in_its_way(loaded, shape, tmp_path) -> None:
    said, ways = {}, []
    for mixer in ("memory", "window", "full"):
        run = made(loaded, {**shape, "out": tmp_path / mixer}, "hotpotqa", "triviaqa", mixer=mixer)
        whole = run.asker.prompt

        def noted(text: str, new: int, chat: bool, whole: Any = whole) -> list[int]:
            ways.append(chat)
            return whole(text, new, chat)

        run.asker.prompt = noted  # type: ignore[method-assign]
        run.ask()
        said[mixer] = [line["pred"] for line in lines(tmp_path / mixer)["hotpotqa.jsonl"]]
    assert ways == 3 * [True, True, False, False]
    assert said["memory"] != said["window"] != said["full"] != said["memory"]


def test_what_is_given_is_there_before_a_model_is_read(place, tmp_path) -> None:
    suite = suite_of("longbench", "ahn", "")
    tasks, prompts = suite.chosen(("hotpotqa",)), place / "prompts"
    for given in ((None, None), (place / "longbench", None), (None, prompts)):
        check_given(suite, tasks, *given)
    with pytest.raises(AHNError, match=r"--data .*: has no data.zip or hotpotqa.jsonl"):
        check_given(suite, tasks, tmp_path, None)
    with pytest.raises(AHNError, match=r"--prompts .*: has no dataset2prompt.json"):
        check_given(suite, tasks, None, tmp_path)
    with pytest.raises(AHNError, match=r"--data .*: is a file; give the directory that it is in"):
        check_given(suite, tasks, place / "longbench/data.zip", None)
    with pytest.raises(AHNError, match=r"--data .*: no such directory; it holds data.zip or"):
        check_given(suite, tasks, tmp_path / "a", None)


def test_data_that_are_other_ones_are_refused(loaded, shape, tmp_path) -> None:
    shape["data"] = tmp_path
    file, record = tmp_path / "hotpotqa.jsonl", suites.longbench_record("hotpotqa", 0)
    file.write_bytes(b"\n")
    with pytest.raises(AHNError, match=r"hotpotqa.jsonl: has no records of hotpotqa"):
        made(loaded, shape, "hotpotqa")
    file.write_bytes(suites.jsonl([record]))
    run = made(loaded, shape, "hotpotqa")
    with run.predictions.working():
        pass
    file.write_bytes(suites.jsonl(2 * [record]))
    with pytest.raises(AHNError, match=r"began with another revision of data.zip"):
        made(loaded, shape, "hotpotqa")
    shape["out"] = tmp_path / "other"
    for field, said in (("context", "text 'context'"), ("answers", "'answers'")):
        file.write_bytes(suites.jsonl([{k: v for k, v in record.items() if k != field}]))
        with pytest.raises(AHNError, match=f"record 0 of hotpotqa has no {said}"):
            made(loaded, shape, "hotpotqa").cost()
    with pytest.raises(AHNError, match="qasper: there is no prompt for it; give --prompts DIR"):
        made(loaded, shape, "qasper")


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


ENDLESS = float("inf")


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        *(("math_calc", answer) for answer in (["x"], [], 5, [None], [ENDLESS], [-ENDLESS])),
        *(("math_calc", [float("nan")]), ("code_run", [ENDLESS]), ("code_run", ENDLESS)),
        *(("math_find", [ENDLESS]), ("math_find", "x"), ("code_run", [])),
    ],
)
def test_an_answer_of_another_kind_is_named_before_anything_is_asked(
    loaded, tmp_path, task, answer
) -> None:
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({task: "{context}"}))
    record = {**suites.infinitebench_record(task, 0), "answer": answer}
    (tmp_path / f"{task}.jsonl").write_bytes(suites.jsonl([record]))
    shape = {"out": tmp_path / "out", "data": tmp_path, "prompts": tmp_path}
    run = made(loaded, shape, task, suite="infinitebench", protocol="published")
    with pytest.raises(AHNError, match=f"record 0 of {task} has an answer of another kind"):
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
