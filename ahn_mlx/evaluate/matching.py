"""Scorers that look for something in an answer: InfiniteBench's own, RULER's, BABILong's and
LongBench v2's. Each returns 0 to 1 but where it says otherwise.

Where a published scorer raises, because of a label with nothing in it or a fraction where a
whole number was asked for, these return 0: nothing said can be right.
"""

import re
from collections.abc import Sequence
from typing import Any

from ..errors import AHNError, show
from .normalize import CONSTANTS, needs, normalize_zh, token_f1, words_en

MARKS = "\n\"'.,?!{}"
NUMBER = re.compile(r"\d+\.\d+|\d+")
Label = Any  # of a record: a text, a number or a list of them


def blank(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def first(label: Label) -> Label:
    """None of an empty list, which nothing said is equal to."""
    return next(iter(label), None) if isinstance(label, list | tuple) else label


def qa_eng(prediction: str, label: Sequence[str]) -> float:
    said = words_en(prediction)
    return max((token_f1(said, words_en(answer)) for answer in label), default=0.0)


def qa_chn(prediction: str, label: Sequence[str]) -> float:
    """One character is one token."""
    said = normalize_zh(prediction)
    return max((token_f1(said, normalize_zh(answer)) for answer in label), default=0.0)


def sum_eng(prediction: str, label: Label) -> float:
    """rouge-score's rougeLsum, whose sentences end at line feeds. Raises AHNError without it."""
    needs("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    labels = label if isinstance(label, list | tuple) else [label]
    if not labels:
        return 0.0
    return float(RougeScorer(["rougeLsum"]).score_multi(labels, prediction)["rougeLsum"].fmeasure)


def passkey(prediction: str, label: Label) -> float:
    """The first run of digits, ASCII ones."""
    found = re.search("[0-9]+", prediction)
    return float((found[0] if found else "") == first(label))


def kv(prediction: str, label: Label) -> float:
    """A label that is a list is no word, and never right."""
    return float(label in blank(prediction, MARKS + ":").split())


def dialogue(prediction: str, label: Sequence[str]) -> float:
    said = [word.upper() for word in blank(prediction, MARKS + ":").split()]
    return float(first(label) in said)


def code_run(prediction: str, label: Label) -> float:
    """The last word, if it is a whole number."""
    words = blank(prediction.strip(), "\n.`'\":").split()
    number = _whole(words[-1]) if words else None
    return float(number is not None and number == first(label))


def _whole(word: str) -> int | None:
    try:
        return int(word)
    except ValueError:  # too many digits, too
        return None


def math_find(prediction: str, label: Label) -> float:
    """The first number, without its sign."""
    label, found = first(label), NUMBER.search(prediction)
    if isinstance(label, bool) or not isinstance(label, int | float) or found is None:
        return 0.0
    return float((_whole if isinstance(label, int) else float)(found[0]) == label)


def math_calc(prediction: str, label: Sequence[Any]) -> float:
    """How much of the list is right before the first number that is wrong."""
    said = [_whole(number) for number in re.findall("[0-9]+", prediction)]
    label, right = label[0] if label and isinstance(label[0], list) else label, 0
    while right < min(len(said), len(label)) and said[right] == label[right]:
        right += 1
    return right / len(label) if label else 0.0


def choice(prediction: str, label: Sequence[str]) -> float:
    """label: the option's text and its letter."""
    said = prediction.strip()
    if not said:
        return 0.0
    if said[0] in "ABCD":
        return float(said[0] in label)
    if said in label:
        return 1.0
    said = re.sub(" +", " ", blank(said, MARKS))
    right = _follows(said, ("answer is:", "answer:", "answer is", "option is"), label)
    if right is not None:
        return float(right)
    return float(next((word in label for word in said.split() if word in "ABCD"), False))


def code_debug(prediction: str, label: Sequence[str]) -> float:
    """label: the function's name and its letter."""
    if len(label) < 2:
        return 0.0
    name, letter = label[0], label[1]
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    said = blank(prediction.strip(), (*"\n`'\"-*", "Option", "option"))
    said = re.sub(" +", " ", said)
    prefixes = ("answer is:", "is:", "answer:", "correct option is:")
    return float(bool(_follows(said, prefixes, (letter, name))))


def _follows(text: str, prefixes: Sequence[str], label: Sequence[str]) -> bool | None:
    """Whether something of the label comes one character after the first of these that is
    there. None: none is."""
    for prefix in prefixes:
        if (at := text.find(prefix)) >= 0:
            end = at + len(prefix)
            return end < len(text) and text[end + 1 :].startswith(tuple(label))
    return None


def postprocess(text: str) -> str:
    """RULER's: control characters become line feeds."""
    return re.sub("[\0-\x1f]", "\n", text.strip()).strip()


def contained(prediction: str, reference: Sequence[str]) -> float:
    """The share of the references that an answer contains, whatever their case."""
    said = prediction.lower()
    return sum(r.lower() in said for r in reference) / len(reference) if reference else 0.0


def match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0 to 100, of needles, variables and words."""
    pairs = zip(predictions, references, strict=True)
    return _hundred([contained(postprocess(p), r) for p, r in pairs])


def match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0 to 100, of questions: one of the references is enough."""
    pairs = zip(predictions, references, strict=True)
    return _hundred([float(contained(postprocess(p), r) > 0) for p, r in pairs])


def _hundred(scores: Sequence[float]) -> float:
    return round(sum(scores) / len(scores) * 100, 2) if scores else 0.0


def babilong(task: str, target: str, output: str, question: str) -> float:
    """Whether an answer names the target and none else of the task's labels, but for those of
    the question. Raises AHNError for a task that is none."""
    labels = CONSTANTS["babilong_labels"]
    if task not in labels:
        raise AHNError(f"task: there is no {show(task)}; there are {', '.join(labels)}")
    return labelled(target, output, question, labels[task])


def labelled(target: str, output: str, question: str, labels: Sequence[str]) -> float:
    said = output.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    names = {label.lower() for label in labels}
    asked = {name for name in names if name in question.lower()}
    found = {name for name in names if name in said} - asked
    wanted = target.lower()
    parts = wanted.split(",") if "," in wanted and len(wanted) > 3 else [wanted]
    return float(len(found) == len(parts) and found.issuperset(parts))


def longbench2_extract(response: str) -> str | None:
    """The letter that an answer gives, if any."""
    plain = response.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(
        r"The correct answer is ([A-D])", plain
    )
    return found[1] if found else None
