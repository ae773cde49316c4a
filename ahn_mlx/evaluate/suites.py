"""The published suites: where their data are, what their records hold, how long answers may
be, and how they are scored by the paper's authors ("ahn") and by their own ("published")."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AHNError, nearest, show
from . import matching, scorers
from .fields import COUNTS, KEYWORDS, NUMBERS, OPTION, SCALAR, SUMMARY, TEXT, TEXTS, check_field
from .scorers import ahn_item, longbench_item, lveval_item

Record = dict[str, Any]
PROTOCOLS = ("ahn", "published")
LENGTHS = ("16k", "32k", "64k", "128k", "256k")


@dataclass(frozen=True)
class Task:
    """file: on the hub. member: the base name of a file in it, if it is an archive. out: of its
    predictions. template: its name. max_new: tokens of an answer, by protocol. chat: whether
    the prompt is a message. chinese: whether words have to be found by jieba."""

    name: str
    file: str
    member: str | None
    out: str
    template: str
    max_new: dict[str, int]
    chat: bool
    chinese: bool

    def given(self, data: Path) -> Path:
        """Its file in a user's directory: as on the hub, or what is in the archive. Raises
        AHNError if neither is there."""
        names = dict.fromkeys((self.file, self.member or self.file))
        return given_file("--data", data, *names)


def given_file(option: str, directory: Path, *names: str) -> Path:
    """The first of the names that a directory has. Raises AHNError if there is none."""
    wanted = " or ".join(names)
    if directory.is_file():
        raise AHNError(f"{option} {directory}: is a file; give the directory that it is in")
    if not directory.is_dir():
        raise AHNError(f"{option} {directory}: no such directory; it holds {wanted}")
    found = next((file for n in names if (file := directory / n).is_file()), None)
    if found is None:
        raise AHNError(f"{option} {directory}: has no {wanted}")
    return found


@dataclass(frozen=True)
class Suite:
    """limit: the most tokens of a prompt. cut: which part of a longer one is kept, by protocol:
    "end", or "both" ends. window, sinks: the paper's. usual: the paper's tasks."""

    name: str
    repo: str
    limit: int
    cut: dict[str, str]
    window: int
    sinks: int
    tasks: dict[str, Task]
    usual: tuple[str, ...]

    def chosen(self, names: tuple[str, ...]) -> list[Task]:
        """The tasks of these names, or the paper's. Raises AHNError for one that is none."""
        for name in names:
            if name not in self.tasks:
                meant = nearest(name, self.tasks)
                hint = f"did you mean {meant}?" if meant else f"there are {', '.join(self.tasks)}"
                raise AHNError(f"--tasks: {self.name} has no task {show(name)}; {hint}")
        return [self.tasks[name] for name in dict.fromkeys(names or self.usual)]


def _both(n: int) -> dict[str, int]:
    return dict.fromkeys(PROTOCOLS, n)


# LongBench

_LONGBENCH_NEW = {
    **{"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64},
    **{"hotpotqa": 32, "2wikimqa": 32, "musique": 32, "dureader": 128, "gov_report": 512},
    **{"qmsum": 512, "multi_news": 512, "vcsum": 512, "trec": 64, "triviaqa": 32, "samsum": 128},
    **{"lsht": 64, "passage_count": 32, "passage_retrieval_en": 32, "passage_retrieval_zh": 32},
    **{"lcc": 64, "repobench-p": 64},
}
_BARE = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
_SEGMENTED = ("multifieldqa_zh", "dureader", "vcsum")


def longbench() -> Suite:
    tasks = {
        name: Task(
            name,
            "data.zip",
            f"{name}.jsonl",
            f"{name}.jsonl",
            name,
            {"ahn": min(new, 500), "published": new},
            name not in _BARE,
            name in _SEGMENTED,
        )
        for name, new in _LONGBENCH_NEW.items()
    }
    usual = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
    cut = {"ahn": "end", "published": "both"}
    return Suite("longbench", "zai-org/LongBench", 32_000, cut, 8064, 128, tasks, usual)


# InfiniteBench

_INFINITEBENCH_NEW = {
    **{"longbook_qa_eng": 40, "longbook_qa_chn": 40, "longbook_choice_eng": 40},
    **{"longbook_sum_eng": 1200, "longdialogue_qa_eng": 40, "passkey": 6, "number_string": 12},
    **{"kv_retrieval": 50, "math_find": 3, "math_calc": 30000, "code_run": 5, "code_debug": 5},
}


def infinitebench(protocol: str) -> Suite:
    tasks = {
        name: Task(
            name,
            f"{name}.jsonl",
            None,
            f"infinitebench_{name}.jsonl" if protocol == "ahn" else f"preds_{name}.jsonl",
            "infinitebench" if "_qa_" in name and "book" in name else name,
            {"ahn": 256, "published": new},
            True,
            protocol == "ahn" and name == "longbook_qa_chn",
        )
        for name, new in _INFINITEBENCH_NEW.items()
        if protocol == "published" or name in ("longbook_qa_eng", "longbook_qa_chn")
    }
    return Suite(
        "infinitebench",
        "xinrongzhang2022/InfiniteBench",
        128_000,
        {"ahn": "end", "published": "both"},
        32_640,
        128,
        tasks,
        ("longbook_qa_eng", "longbook_qa_chn"),
    )


# LV-Eval


def lveval(length: str) -> Suite:
    tasks = {
        name: Task(
            name,
            f"{name}.zip",
            f"{name}_{length}.jsonl",
            f"{name}_{length}.jsonl",
            name,
            _both(16 if name.startswith("factrecall") else 64),
            True,
            name in ("factrecall_zh", "dureader_mixup")
            or scorers.LVEVAL[name] is scorers.f1_zh_gold,
        )
        for name in scorers.LVEVAL
    }
    cut = dict.fromkeys(PROTOCOLS, "both")
    return Suite("lveval", "Infinigence/LVEval", 256_000, cut, 32_640, 128, tasks, tuple(tasks))


def suite_of(name: str, protocol: str, length: str) -> Suite:
    if name == "longbench":
        return longbench()
    return infinitebench(protocol) if name == "infinitebench" else lveval(length)


# From a record to a line of predictions, with the names that the published scorers read


def line_of(suite: str, protocol: str, task: str, record: Record, pred: str) -> Record:
    """Raises KeyError or ValueError for a record that lacks something."""
    if suite == "lveval":
        return {
            "pred": pred,
            "answers": record["answers"],
            "gold_ans": record.get("answer_keywords"),
            "input": record["input"],
            "all_classes": record.get("all_classes"),
            "length": record["length"],
        }
    if suite == "longbench":
        return {
            "pred": pred,
            "answers": record["answers"],
            "all_classes": record["all_classes"],
            "length": record["length"],
        }
    if protocol == "ahn":
        return {"pred": pred, "answers": record["answer"]}
    return {"id": record["id"], "prediction": pred, "ground_truth": label_of(task, record)}


# What line_of raises for an answer of another kind; for a field that is missing, KeyError.
UNFIT = (ArithmeticError, AttributeError, IndexError, TypeError, ValueError)


def label_of(task: str, record: Record) -> Any:
    """What InfiniteBench's own scorers compare with; the hub has lists of texts."""
    answer = record["answer"]
    one = answer[0] if isinstance(answer, list) else answer
    if task in ("longbook_choice_eng", "code_debug"):
        if isinstance(answer, list) and len(answer) == 2 and answer[1] in tuple("ABCD"):
            return answer
        return [one, "ABCD"[record["options"].index(one)]]
    if task in ("passkey", "number_string", "kv_retrieval", "longbook_sum_eng"):
        return one
    if task == "code_run":
        return int(one)
    if task == "math_find":
        return float(one) if "." in str(one) else int(one)
    if task == "math_calc":
        return [int(number) for number in answer]
    return answer if isinstance(answer, list) else [answer]


# From a line of predictions to a score, 0 to 1

_INFINITEBENCH: dict[str, Callable[[str, Any], float]] = {
    "longbook_qa_eng": matching.qa_eng,
    "longbook_qa_chn": matching.qa_chn,
    "longbook_sum_eng": matching.sum_eng,
    "longbook_choice_eng": matching.choice,
    "longdialogue_qa_eng": matching.dialogue,
    "passkey": matching.passkey,
    "number_string": matching.passkey,
    "kv_retrieval": lambda said, label: matching.kv(said, matching.first(label)),
    "code_run": matching.code_run,
    "code_debug": matching.code_debug,
    "math_find": matching.math_find,
    "math_calc": matching.math_calc,
}


_TRUTHS = {
    "longbook_sum_eng": SUMMARY,
    **dict.fromkeys(("longbook_choice_eng", "code_debug"), OPTION),
    **dict.fromkeys(("passkey", "number_string", "kv_retrieval", "code_run", "math_find"), SCALAR),
    "math_calc": NUMBERS,
}


def check_line(suite: str, protocol: str, task: str, line: Record) -> None:
    """Raises AHNError for a line that lacks a field, or has one of another kind."""
    if suite == "infinitebench" and protocol == "published":
        check_field(line, "prediction", TEXT)
        check_field(line, "ground_truth", _TRUTHS.get(task, TEXTS))
        return
    check_field(line, "pred", TEXT)
    check_field(line, "answers", COUNTS if task == "passage_count" else TEXTS)
    if suite == "lveval":
        check_field(line, "gold_ans", KEYWORDS)
    elif scorers.METRICS.get(task) is scorers.classification:
        check_field(line, "all_classes", TEXTS)


def score_line(suite: str, protocol: str, task: str, line: Record) -> float:
    """line: one that check_line has seen."""
    if suite == "lveval":
        return lveval_item(task, line["pred"], line["answers"], line["gold_ans"])
    if suite == "infinitebench" and protocol == "published":
        return _INFINITEBENCH[task](line["prediction"], line["ground_truth"])
    name = f"infinitebench_{task}" if suite == "infinitebench" else task
    item = ahn_item if protocol == "ahn" else longbench_item
    return item(name, line["pred"], line["answers"], line.get("all_classes"))
