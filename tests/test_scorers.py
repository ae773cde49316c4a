"""Scores: what the published scorers returned, case by case."""

import json
import re
from pathlib import Path

import pytest

from ahn_mlx import AHNError
from ahn_mlx.evaluate.fields import (
    ALL_KEYWORDS,
    COUNTS,
    KEYWORDS,
    LISTS,
    NUMBERS,
    OPTION,
    SCALAR,
    SUMMARY,
    TEXT,
    TEXTS,
    Kind,
    check,
)
from ahn_mlx.evaluate.scorers import SCORERS

GOLDEN = Path(__file__).parent / "published"
NAMES = sorted(p.stem for p in GOLDEN.glob("*.json") if not p.stem.startswith("synthetic"))


def close(found: object, expected: object) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return abs(found - expected) <= 1e-9
    return found == expected


def test_each_golden_file_has_its_scorer() -> None:
    assert sorted(SCORERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_published_ones(name: str) -> None:
    cases = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    wrong = []
    for case in cases:
        fields = {k: v for k, v in case.items() if k not in ("expected", "raises")}
        # Where the published function raises there is nothing that could be right.
        expected = 0.0 if "raises" in case else case["expected"]
        if not close(SCORERS[name](**fields), expected):
            wrong.append((fields, expected, SCORERS[name](**fields)))
    assert cases and wrong == []


NOTHING = {
    "infinitebench_dialogue": ("A", []),
    "infinitebench_choice_eng": ("B", []),
    "infinitebench_code_debug": ("the answer is: f", ["f"]),
    "infinitebench_math_find": ("3", []),
    "infinitebench_math_calc": ("1", []),
    "infinitebench_passkey": ("", []),
    "infinitebench_kv": ("a", []),
    "infinitebench_code_run": ("3", []),
    "infinitebench_sum_eng": ("a", []),
    "infinitebench_qa_eng": ("a", []),
    "longbench_classification": ("a", "a", []),
    "ruler_match_all": ([], []),
    "ruler_match_part": ([], []),
    "lveval_dataset_score": ("cmrc_mixup", ["a"], [[]], [None]),
    "lveval_factrecall_recall_en": ("a", ""),
    "lveval_factrecall_recall_zh": ("a", ""),
    "longbench_dataset_score": ("hotpotqa", [], []),
    "ahn_dataset_score": ("hotpotqa", [], []),
    "ahn_item_score": ("hotpotqa", "a", []),
    "infinitebench_qa_chn": ("a", []),
    "longbench_count": ("", "1"),
    "longbench_retrieval": ("1", "one"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_truth_with_nothing_in_it_is_never_said(name: str) -> None:
    assert SCORERS[name](*NOTHING[name]) == 0


MALFORMED = {
    "classes": ("longbench_classification", ("a", "a", None), "all_classes must be a list of text"),
    "numbers": (
        "infinitebench_math_calc",
        ("1", None),
        "label must be a list of numbers, not null",
    ),
    "an option": ("infinitebench_choice_eng", ("B", None), "label must be a list of texts"),
    "a key": ("infinitebench_kv", ("B", {"a": 1}), "label must be a text, a number or a list"),
    "an answer": ("longbench_qa_f1", (None, "a"), "prediction must be a text, not null"),
    "a reply": ("longbench2_extract", (3,), "response must be a text, not 3"),
    "answers": ("lveval_dataset_score", ("cmrc_mixup", ["a"], ["a"], [None]), "answers must be"),
    "one more": (
        "ahn_dataset_score",
        ("hotpotqa", ["a", "b"], [["a"]]),
        "2 predictions, 1 answers",
    ),
    "one less": ("ruler_match_part", ([], [["a"]]), "0 predictions, 1 references"),
    "a dataset": ("ahn_item_score", ("hotpotq", "a", ["a"]), "did you mean hotpotqa?"),
    "a longer one": ("lveval_dataset_score", ("cmrc_9k", ["a"], [["a"]], [None]), "no 'cmrc_9k'"),
    "a task": ("babilong", ("qa99", "a", "a", "a"), "there is no 'qa99'"),
    "no classes": ("longbench_dataset_score", ("trec", ["a"], [["a"]]), "all_classes must be"),
}


@pytest.mark.parametrize(("name", "given", "message"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_truth_at_all_is_named(name: str, given: tuple, message: str) -> None:
    with pytest.raises(AHNError, match=re.escape(message)):
        SCORERS[name](*given)


@pytest.mark.parametrize(("length", "shown"), [(78, 78 * "a"), (79, 76 * "a")])
def test_what_is_no_truth_is_shown_in_80_characters(length: int, shown: str) -> None:
    with pytest.raises(AHNError) as error:
        check("label", length * "a", NUMBERS)
    ending = '"' if length == 78 else "..."
    assert str(error.value) == f'label must be a list of numbers, not "{shown}{ending}'


KINDS = {
    SCALAR: (["a", 1, 0.5, [], ["a", 2]], [None, True, {}, [None], [True]]),
    NUMBERS: ([[], [1, 0.5], [[1, 2]], (1,)], ["1", 1, ["1"], [[1], [2]], [True], None]),
    SUMMARY: (["a", ["a"], []], [1, [1], None]),
    OPTION: (
        [["a", "B"], ("", "A")],
        [["a"], ["a", "BC"], ["a", ""], ["a", "B", "C"], "aB", [1, "B"]],
    ),
    COUNTS: ([["a", 1], []], ["a", 1, [None], [True]]),
    LISTS: ([[["a"]], [[]], []], ["a", ["a"], [[1]]]),
    KEYWORDS: (["a", "", None], [1, ["a"]]),
    ALL_KEYWORDS: ([[None, "a"], []], [[1], None, "a"]),
    TEXTS: ([["a"], ("a",), []], ["a", [1], [["a"]]]),
    TEXT: (["", "a"], [None, 1, ["a"]]),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.about)
def test_what_lines_hold_is_of_its_kind(kind: Kind) -> None:
    taken, refused = KINDS[kind]
    assert all(map(kind.fits, taken)) and not any(map(kind.fits, refused))


@pytest.mark.parametrize("mark", list(":.,?!{}\"'\n"))
def test_marks_around_a_word_are_not_of_it(mark):
    for task, label in (("infinitebench_kv", "a-b"), ("infinitebench_dialogue", ["A-B"])):
        for said, right in ((f"is{mark}a-b{mark}so", 1.0), (f"is{mark}a-c", 0.0), ("isa-b", 0.0)):
            assert SCORERS[task](said, label) == right
