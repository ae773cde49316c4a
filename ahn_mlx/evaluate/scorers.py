"""Scorers of LongBench and LV-Eval, what the paper's authors do before LongBench's, and the
table of all scorers by name.

Those that are published but raise for keywords or a truth with nothing in it return 0 here.
Those of SCORERS raise AHNError for what is no text, list or label at all.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import AHNError, nearest, show
from . import matching
from .fields import LISTS, NUMBERS, SCALAR, SUMMARY, TEXTS, check, checked
from .normalize import (
    CONSTANTS,
    jieba_cut,
    normalize_en,
    normalize_zh,
    rouge_l,
    rouge_l_zh,
    token_f1,
    words_en,
    words_zh,
)

BLACK_EN = frozenset(CONSTANTS["lveval_blacklist_en"])
BLACK_ZH = frozenset(CONSTANTS["lveval_blacklist_zh"])
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")

# LongBench


def qa_f1(prediction: str, ground_truth: str) -> float:
    return token_f1(words_en(prediction), words_en(ground_truth))


def qa_f1_zh(prediction: str, ground_truth: str) -> float:
    return token_f1(words_zh(prediction), words_zh(ground_truth))


def code_sim(prediction: str, ground_truth: str) -> float:
    """difflib's ratio of the first line that looks like code, to two decimals: fuzzywuzzy's
    number where python-Levenshtein is not installed."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(m in x for m in ("`", "#", "//"))), "")
    if line == ground_truth:
        return 1.0
    if not line or not ground_truth:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, ground_truth).ratio()) / 100


def classification(prediction: str, ground_truth: str, all_classes: Sequence[str]) -> float:
    found = [name for name in all_classes if name in prediction]
    at = 0
    while at < len(found):  # as published: after one that is removed the next is not looked at
        if found[at] in ground_truth and found[at] != ground_truth:
            found.remove(found[at])
        at += 1
    return 1 / len(found) if ground_truth in found else 0.0


def count(prediction: str, ground_truth: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(ground_truth)) / len(numbers) if numbers else 0.0


def _retrieval(word: str) -> Callable[[str, str], float]:
    def score(prediction: str, ground_truth: str) -> float:
        truth = re.search(rf"{word}(\d+)", ground_truth)
        return count(prediction, truth[1]) if truth else 0.0

    return score


retrieval, retrieval_zh = _retrieval("Paragraph "), _retrieval("段落")

METRICS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(
        (
            *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
            "triviaqa",
        ),
        qa_f1,
    ),
    "multifieldqa_zh": qa_f1_zh,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), classification),
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    "passage_retrieval_zh": retrieval_zh,
    **dict.fromkeys(("lcc", "repobench-p"), code_sim),
    "infinitebench_longbook_qa_eng": rouge_l,
    "infinitebench_longbook_qa_chn": rouge_l_zh,
}


def best(
    dataset: str, prediction: str, answers: Iterable[str], all_classes: Sequence[str] | None
) -> float:
    """The best score, 0 to 1, over all answers. Raises AHNError for a dataset that is none, and
    for one with classes if there are none."""
    metric: Callable[..., float] = _of(METRICS, dataset)
    more = {}
    if metric is classification:
        check("all_classes", all_classes, TEXTS)
        more = {"all_classes": all_classes}
    return max((metric(prediction, answer, **more) for answer in answers), default=0.0)


def _of(table: Mapping[str, Any], dataset: str, named: str = "") -> Any:
    if (name := named or dataset) not in table:
        meant = nearest(name, table)
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(table)}"
        raise AHNError(f"dataset: there is no {show(dataset)}; {hint}")
    return table[name]


def longbench_item(
    dataset: str, prediction: str, answers: Iterable[str], all_classes: Sequence[str] | None = None
) -> float:
    """LongBench's own score of one answer, 0 to 1."""
    if dataset in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return best(dataset, prediction, answers, all_classes)


# The paper's authors

ENDS = (".assistant", "\n\nQuestion", "</s>", "(Document", "\n\nQuestion", "\n\nAnswer", "(Passage")
ENDS_OF = {
    **dict.fromkeys(("multifieldqa_zh", "dureader"), ("问题\uff1a",)),
    "lsht": ("新闻内容\uff1a",),
    "passage_retrieval_zh": ("请问", "提示"),
}


def clean(dataset: str, prediction: str) -> str:
    """An answer up to where a model begins to say something else."""
    for end in ENDS:
        prediction = prediction.split(end)[0]
    prediction = prediction.strip()
    if dataset in FIRST_LINE:
        prediction = prediction.split("\n")[0]
    for end in ENDS_OF.get(dataset, ()):
        prediction = prediction.split(end)[0]
    return prediction.strip() if dataset in ENDS_OF else prediction


def ahn_item(
    dataset: str, prediction: str, answers: Iterable[str], all_classes: Sequence[str] | None = None
) -> float:
    """The paper's score of one answer to LongBench or InfiniteBench, 0 to 1."""
    return best(dataset, clean(dataset, prediction), answers, all_classes)


# LV-Eval


def f1_gold(prediction: str, ground_truth: str, gold_ans: str | None) -> float:
    """F1, or 0 if an answer has less than a fifth of the keywords, if there are any."""
    said = words_en(prediction)
    if isinstance(gold_ans, str) and gold_ans and _hits(said, words_en(gold_ans), BLACK_EN) < 0.2:
        return 0.0
    return token_f1(said, words_en(ground_truth))


def f1_zh_gold(prediction: str, ground_truth: str, gold_ans: str | None) -> float:
    """As f1_gold, with two fifths; without keywords they are the answer itself."""
    said = words_zh(prediction)
    if _hits(said, words_zh(gold_ans or ground_truth), BLACK_ZH) < 0.4:
        return 0.0
    return token_f1(said, words_zh(ground_truth))


def _hits(said: list[str], keywords: list[str], black: frozenset[str]) -> float:
    shared = Counter(said) & Counter(keywords)
    hits = sum(n for word, n in shared.items() if word not in black)
    return hits / len(keywords) if keywords else 0.0


def rouge_zh_blacklist(prediction: str, ground_truth: str) -> float:
    """ROUGE-L of words that mean something. The text is cut into words twice, as published."""
    texts = []
    for text in (prediction, ground_truth):
        words = [normalize_zh(word) for word in jieba_cut(" ".join(jieba_cut(text)))]
        texts.append(" ".join(word for word in words if word not in BLACK_ZH))
    return rouge_l(*texts)


def factrecall_recall(prediction: str, ground_truth: str) -> float:
    """Published with LV-Eval and not used by it: the share of the answer's tokens."""
    return _recall(words_en(prediction), words_en(ground_truth))


def factrecall_recall_zh(prediction: str, ground_truth: str) -> float:
    return _recall(words_zh(prediction), words_zh(ground_truth))


def _recall(said: list[str], truth: list[str]) -> float:
    return (Counter(said) & Counter(truth)).total() / len(truth) if truth else 0.0


LVEVAL: dict[str, Callable[[str, str, str | None], float]] = {
    **dict.fromkeys(
        (
            *("hotpotwikiqa_mixup", "loogle_SD_mixup", "loogle_CR_mixup", "loogle_MIR_mixup"),
            "multifieldqa_en_mixup",
        ),
        f1_gold,
    ),
    **dict.fromkeys(("multifieldqa_zh_mixup", "cmrc_mixup", "lic_mixup"), f1_zh_gold),
    "factrecall_en": lambda said, truth, _: qa_f1(said, truth),
    "factrecall_zh": lambda said, truth, _: qa_f1_zh(said, truth),
    "dureader_mixup": lambda said, truth, _: rouge_zh_blacklist(said, truth),
}


def lveval_item(
    dataset: str, prediction: str, answers: Sequence[str], gold_ans: str | None
) -> float:
    """Of one answer, 0 to 1. Only the first of the true ones counts. dataset: with or without
    its length; another raises AHNError."""
    score = _of(LVEVAL, dataset, re.split(r"_\d+k", dataset)[0])
    return score(prediction, answers[0], gold_ans) if answers else 0.0


# All of them


def of_dataset(scores: Sequence[float]) -> float:
    """The score of a task from those of its items: 0 to 100 with two decimals."""
    return round(100 * sum(scores) / len(scores), 2) if scores else 0.0


def _ahn_dataset(
    dataset: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> float:
    pairs = zip(predictions, answers, strict=True)
    return of_dataset([ahn_item(dataset, *pair) for pair in pairs])


def _ahn_item(dataset: str, prediction: str, answers: Sequence[str]) -> float:
    return of_dataset([ahn_item(dataset, prediction, answers)])


def _longbench_dataset(
    dataset: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> float:
    pairs = zip(predictions, answers, strict=True)
    return of_dataset([longbench_item(dataset, *pair) for pair in pairs])


def _lveval_dataset(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    gold_anss: Sequence[str | None],
) -> float:
    rows = zip(predictions, answers, gold_anss, strict=True)
    return of_dataset([lveval_item(dataset, *row) for row in rows])


SCORERS: dict[str, Callable[..., Any]] = {
    "normalize_en": checked(normalize_en),
    "normalize_zh": checked(normalize_zh),
    "jieba_cut": checked(jieba_cut),
    "token_f1": checked(token_f1, prediction=TEXTS, ground_truth=TEXTS),
    "longbench_qa_f1": checked(qa_f1),
    "longbench_qa_f1_zh": checked(qa_f1_zh),
    "longbench_rouge": checked(rouge_l),
    "longbench_rouge_zh": checked(rouge_l_zh),
    "longbench_code_sim": checked(code_sim),
    "longbench_classification": checked(classification),
    "longbench_retrieval": checked(retrieval),
    "longbench_retrieval_zh": checked(retrieval_zh),
    "longbench_count": checked(count),
    "longbench_dataset_score": checked(_longbench_dataset, answers=LISTS),
    "longbench2_extract": checked(matching.longbench2_extract),
    "ahn_item_score": checked(_ahn_item, answers=TEXTS),
    "ahn_dataset_score": checked(_ahn_dataset, answers=LISTS),
    "lveval_f1_gold": checked(f1_gold),
    "lveval_f1_zh_gold": checked(f1_zh_gold),
    "lveval_rouge_zh_blacklist": checked(rouge_zh_blacklist),
    "lveval_factrecall_recall_en": checked(factrecall_recall),
    "lveval_factrecall_recall_zh": checked(factrecall_recall_zh),
    "lveval_dataset_score": checked(_lveval_dataset, answers=LISTS),
    "infinitebench_qa_eng": checked(matching.qa_eng),
    "infinitebench_qa_chn": checked(matching.qa_chn),
    "infinitebench_sum_eng": checked(matching.sum_eng, label=SUMMARY),
    "infinitebench_choice_eng": checked(matching.choice),
    "infinitebench_dialogue": checked(matching.dialogue),
    "infinitebench_passkey": checked(matching.passkey, label=SCALAR),
    "infinitebench_kv": checked(matching.kv, label=SCALAR),
    "infinitebench_code_run": checked(matching.code_run, label=SCALAR),
    "infinitebench_code_debug": checked(matching.code_debug),
    "infinitebench_math_find": checked(matching.math_find, label=SCALAR),
    "infinitebench_math_calc": checked(matching.math_calc, label=NUMBERS),
    "ruler_match_all": checked(matching.match_all),
    "ruler_match_part": checked(matching.match_part),
    "ruler_postprocess": checked(matching.postprocess),
    "babilong": checked(matching.babilong),
}
