"""What scorers take, and what lines of predictions hold: a text, a list of texts, a label. It is
checked before anything is scored, so that what is malformed is named, and is no score of 0."""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple

from ..errors import AHNError, show


class Kind(NamedTuple):
    about: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _is_scalar(value: Any) -> bool:
    return _is_text(value) or _is_number(value)


TEXT = Kind("a text", _is_text)
TEXTS = Kind("a list of texts", _all(_is_text))
LISTS = Kind("a list of lists of texts", _all(_all(_is_text)))
KEYWORDS = Kind("a text or null", lambda value: value is None or _is_text(value))
ALL_KEYWORDS = Kind("a list of texts or nulls", _all(KEYWORDS.fits))
COUNTS = Kind("a list of texts or numbers", _all(_is_scalar))
SCALAR = Kind(
    "a text, a number or a list of them", lambda value: _is_scalar(value) or _all(_is_scalar)(value)
)
NUMBERS = Kind(
    "a list of numbers",
    lambda value: _all(_is_number)(value) or (_all(_all(_is_number))(value) and len(value) == 1),
)
SUMMARY = Kind("a text or texts", lambda value: _is_text(value) or _all(_is_text)(value))
OPTION = Kind(
    "a list of two texts, the second a letter",
    lambda value: _all(_is_text)(value) and len(value) == 2 and len(value[1]) == 1,
)

ARGUMENTS = {
    **dict.fromkeys(("text", "prediction", "response", "output", "target", "question"), TEXT),
    **dict.fromkeys(("dataset", "task", "ground_truth"), TEXT),
    **dict.fromkeys(("predictions", "all_classes", "label"), TEXTS),
    **{"references": LISTS, "gold_ans": KEYWORDS, "gold_anss": ALL_KEYWORDS},
}


def check(name: str, value: Any, kind: Kind) -> None:
    """Raises AHNError if it is of another kind."""
    if not kind.fits(value):
        said = json.dumps(value, default=repr)
        said = said if len(said) <= 80 else said[:77] + "..."
        raise AHNError(f"{name} must be {kind.about}, not {said}")


def check_field(line: Mapping[str, Any], name: str, kind: Kind) -> None:
    """Raises AHNError if a line lacks it, or has something else."""
    if name not in line:
        raise AHNError(f"has no {show(name)}")
    check(name, line[name], kind)


def checked(scorer: Callable[..., Any], **kinds: Kind) -> Callable[..., Any]:
    """The scorer, which raises AHNError for arguments of another kind: those of ARGUMENTS, by
    their names, unless kinds says otherwise; lists beside `predictions` are as long as that."""
    signature = inspect.signature(scorer)
    expected = {k: v for k, v in {**ARGUMENTS, **kinds}.items() if k in signature.parameters}

    @wraps(scorer)
    def score(*given: Any, **named: Any) -> Any:
        values = signature.bind(*given, **named).arguments
        for name, kind in expected.items():
            if name in values:
                check(name, values[name], kind)
        lists = {k: len(v) for k, v in values.items() if "predictions" in values and k != "dataset"}
        if len(set(lists.values())) > 1:
            each = ", ".join(f"{n} {name}" for name, n in lists.items())
            raise AHNError(f"there must be as many of each: there are {each}")
        return scorer(*given, **named)

    return score
