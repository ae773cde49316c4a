"""What scorers make of a text before they compare: normal forms, tokens, and the two measures
that most of them end in, F1 of tokens and ROUGE-L of words.

Each follows the published scorers of LongBench and LV-Eval, oddities included: their numbers
are compared with the paper's.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import AHNError

CONSTANTS: dict[str, Any] = json.loads((Path(__file__).parent / "constants.json").read_bytes())
_NOTHING = dict.fromkeys(map(ord, string.punctuation))
_NOTHING_ZH = dict.fromkeys(map(ord, string.punctuation + CONSTANTS["cjk_punctuation"]))


def normalize_en(text: str) -> str:
    """Lower case without ASCII punctuation, then without articles, words with single spaces."""
    plain = text.lower().translate(_NOTHING)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def normalize_zh(text: str) -> str:
    """Lower case without punctuation and white space."""
    return "".join(text.lower().translate(_NOTHING_ZH).split())


def needs(package: str) -> None:
    """Raise AHNError unless a package of the extra [eval] is installed."""
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise AHNError(f"this task is scored with {name}: pip install 'ahn-mlx[eval]'")


@cache
def _segmenter() -> Any:
    needs("jieba")
    import logging

    import jieba

    jieba.setLogLevel(logging.ERROR)
    return jieba.Tokenizer()  # the default dictionary, whatever else the process loads


def jieba_cut(text: str) -> list[str]:
    """Chinese words: precise mode, with the hidden Markov model. Raises AHNError without jieba."""
    return list(_segmenter().cut(text))


def words_en(text: str) -> list[str]:
    return normalize_en(text).split()


def words_zh(text: str) -> list[str]:
    return [word for word in map(normalize_zh, jieba_cut(text)) if word]


def token_f1(prediction: Sequence[str], ground_truth: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 if they share none."""
    shared = (Counter(prediction) & Counter(ground_truth)).total()
    if not shared:
        return 0.0
    p, r = shared / len(prediction), shared / len(ground_truth)
    return 2 * p * r / (p + r)


def rouge_l(prediction: str, ground_truth: str) -> float:
    """ROUGE-L as the package `rouge` 1.0.1 has it: of sets of words, over sentences that end at
    each full stop. Case and other punctuation count."""
    hypothesis, reference = _sentences(prediction), _sentences(ground_truth)
    if not hypothesis or not reference:
        return 0.0
    union: set[str] = set()
    for x in reference:
        for y in hypothesis:
            union |= _common(x, y)
    p = len(union) / len(set().union(*hypothesis))
    r = len(union) / len(set().union(*reference))
    return 2 * (p * r / (p + r + 1e-8))


def rouge_l_zh(prediction: str, ground_truth: str) -> float:
    return rouge_l(" ".join(jieba_cut(prediction)), " ".join(jieba_cut(ground_truth)))


def _sentences(text: str) -> list[list[str]]:
    """Words of each; one of blanks has one word, which is empty."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common(x: list[str], y: list[str]) -> set[str]:
    """The words of a longest common subsequence: of several that which a walk back from the
    ends meets, which goes along y where the lengths are equal."""
    table = [[0] * (len(y) + 1)]
    for a in x:
        above, row = table[-1], [0]
        for j, b in enumerate(y):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        table.append(row)
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
