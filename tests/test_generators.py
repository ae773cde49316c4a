"""Items that are made here: as they were fixed, on every machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ahn_mlx.evaluate import generators
from ahn_mlx.evaluate.generators import TASKS, Draws, make_item, sentences_of

GOLDEN = Path(__file__).parent / "published"
FIXED = json.loads((GOLDEN / "synthetic_generators.json").read_text(encoding="utf-8"))
CASES = FIXED["cases"]


def words(text: str) -> int:
    return len(text.split())


def made(case: dict[str, Any]) -> dict[str, Any]:
    where = {k: case[k] for k in ("length", "depth", "index", "seed")}
    haystack = FIXED["story_sentences"] if case["haystack"] == "story" else FIXED["noise"]
    return asdict(make_item(case["task"], haystack, words, **where, **case["options"]))


def test_random_numbers_are_those_of_the_rules() -> None:
    for case in json.loads((GOLDEN / "synthetic_pick.json").read_text())["cases"]:
        draws = Draws(case["key"])
        assert [draws.pick(m) for m in case["moduli"]] == case["expected"]


def test_lists_of_words_are_those_of_the_rules() -> None:
    assert sentences_of(FIXED["story"]) == FIXED["story_sentences"]
    for name in ("noise", "adjectives", "nouns", "persons", "places"):
        assert getattr(generators, name.upper()) == FIXED[name]
    assert FIXED["items"] == generators.THINGS


@pytest.mark.parametrize("task", sorted({case["task"] for case in CASES}))
def test_items_are_those_of_the_rules(task: str) -> None:
    assert task in TASKS
    for case in CASES:
        if case["task"] == task:
            assert made(case) == case["expected"]


# Of each task what is taken where nothing is said; of two the fixed items have other numbers.
USUAL = {
    **{"passkey": {}, "niah_single": {}, "niah_multikey": {"keys": 4}},
    **{"vt": {"chains": 1, "hops": 4}, "babi1": {"facts": 6}, "babi2": {"facts": 8}},
    "babi3": {"facts": 9},
}


def test_numbers_of_a_task_need_not_be_said() -> None:
    said = [case for case in CASES if USUAL.get(case["task"]) == case["options"]]
    assert {case["task"] for case in said} == USUAL.keys()
    for case in said:
        assert made({**case, "options": {}}) == case["expected"]
    for task in ("niah_multivalue", "niah_multiquery"):
        where = {"length": 200, "depth": 0.5, "index": 0}
        assert len(make_item(task, FIXED["noise"], words, **where).answers) == 4
