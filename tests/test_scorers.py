"""Scores: what the published scorers returned, case by case."""

import json
from pathlib import Path

import pytest

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
