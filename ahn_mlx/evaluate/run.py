"""A suite asked of a model: from records to predictions to scores, with files between, so that
a run that ends anywhere goes on from there."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.identity import model_identity
from ..errors import AHNError, show
from ..hub.datasets import dataset_file, dataset_revision
from ..model.ranks import share
from ..reading.generate import prefill_step
from ..reading.memoryfile import base_facts
from .mixers import mixing
from .normalize import needs
from .predictions import RESULT, Predictions
from .prompts import fill, prompts_name, read_prompts
from .protocol import Asker, checkpoint_penalty
from .records import count_records, digest, read_records, spaced
from .results import model_facts, score_directory
from .suites import UNFIT, Suite, Task, check_line, given_file, line_of

SAMPLE = 20_000  # characters that tell how long tokens are


class Left(NamedTuple):
    """Of a task what is still to be asked: numbers of its records, of how many."""

    task: Task
    file: Path
    items: list[int]
    wanted: int
    records: int


class Cost(NamedTuple):
    """items, tokens of their prompts and answers at most, seconds at the measured speed."""

    items: int
    tokens: int
    seconds: float


def reading_speed(model: nn.Module) -> float:
    """Tokens read in a second, once kernels are compiled."""
    step, caches = prefill_step(), model.make_cache()
    for _ in range(2):
        start = time.perf_counter()
        model(mx.zeros((1, step), dtype=mx.uint32), cache=caches)
        mx.eval([c.state for c in caches])
    return step / (time.perf_counter() - start)


def check_given(suite: Suite, tasks: list[Task], data: Path | None, prompts: Path | None) -> None:
    """Raises AHNError if a user's directory lacks a file: before a model is read, or anything
    is fetched."""
    if data is not None:
        for task in tasks:
            task.given(data)
    if prompts is not None:
        given_file("--prompts", prompts, prompts_name(suite.name))


def follow(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    mixer: str,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """On the other processes that run a model: compute what rank 0's SuiteRun asks of it.
    progress: called as often as there."""

    def told() -> Any:
        return model.ranks.share(lambda: None)

    items, penalty = told()
    if not items:
        return
    reading_speed(model)
    asker = Asker(model, tokenizer, 0, "end", penalty)
    with mixing(model, mixer):
        while (asked := told()) is not None:
            prompt, new = asked
            asker.answer(prompt, new, lambda read: progress())
            progress()


@dataclass
class SuiteRun:
    """One suite, one model, one mixer.

    data: a directory with the suite's files, else they are downloaded. prompts: a directory
    with the prompts, else they are fetched. limit: items of each task, evenly spaced. Raises
    AHNError before anything is asked if something is missing or does not fit.
    """

    suite: Suite
    model: nn.Module
    tokenizer: TokenizerWrapper
    tasks: list[Task]
    out: Path
    protocol: str = "ahn"
    mixer: str = "memory"
    length: str = ""
    limit: int | None = None
    data: Path | None = None
    prompts: Path | None = None
    left: list[Left] = field(init=False)

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task.chinese:
                needs("jieba")
            if task.name == "longbook_sum_eng":
                needs("rouge_score")
        self.template = read_prompts(self.suite.name, self.prompts)
        self.penalty = checkpoint_penalty(self.model)
        self.asker = Asker(
            self.model,
            self.tokenizer,
            self.suite.limit,
            self.suite.cut[self.protocol],
            self.penalty or 1.0,
        )
        for task in self.tasks:
            if task.template not in self.template.texts:
                raise AHNError(f"{task.name}: there is no prompt for it; give --prompts DIR")
        self.identity = self._identity()
        text = json.dumps(self.identity, sort_keys=True)
        self.mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.predictions = Predictions(self.out, self.identity)
        self.left = [self._left(task) for task in self.tasks]
        differs = [*self.predictions.deviations, *self.deviations()]
        self.predictions.deviations = list(dict.fromkeys(differs))

    def _identity(self) -> dict[str, Any]:
        facts = model_facts(self.model)
        texts = sorted((t.template, self.template.texts[t.template]) for t in self._all())
        return {
            "suite": self.suite.name,
            "length": self.length,
            "protocol": self.protocol,
            "mixer": self.mixer,
            "model": self.model.origin.name,
            "weights": model_identity(self.model),
            "base": base_facts(self.model),
            "window": self.model.ahn.window,
            "sinks": self.model.ahn.sinks,
            "penalty": self.asker.penalty,
            "limit": self.limit,
            "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16],
            "facts": facts,
        }

    def _all(self) -> list[Task]:
        """The tasks that prompts are known of: a run may go on with more of them."""
        return [t for t in self.suite.tasks.values() if t.template in self.template.texts]

    def _left(self, task: Task) -> Left:
        file = self._file(task)
        self.predictions.use_data(task.file, digest(file))
        records = count_records(file, task.member)
        wanted = spaced(records, self.limit)
        if not wanted:
            raise AHNError(f"{file}: has no records of {task.name}")
        done = self.predictions.done(task.out)
        for item, line in done.items():
            if line.get("run") != self.mark or item not in set(wanted):
                raise AHNError(
                    f"{self.out / task.out}: holds predictions of another run (item {item});"
                    " choose another --out"
                )
        return Left(task, file, [i for i in wanted if i not in done], len(wanted), records)

    def _file(self, task: Task) -> Path:
        if self.data is not None:
            return task.given(self.data)
        if "revision" not in self.predictions.data:
            self.predictions.data["revision"] = dataset_revision(self.suite.repo)
        return dataset_file(self.suite.repo, task.file, self.predictions.data["revision"])

    def deviations(self) -> list[str]:
        """In what a run differs from the paper's, each in a few words."""
        found = []
        base, ahn = base_facts(self.model), self.model.ahn
        if not model_facts(self.model)["size"]:
            found.append(f"{self.model.origin.name} is not one of the paper's models")
        if base["bits"]:
            found.append(f"the base has {base['bits']} bits, the paper's 16")
        elif base["dtype"] != "bfloat16":
            found.append(f"the base computes in {base['dtype']}, the paper's in bfloat16")
        if self.penalty is None:
            found.append("no repetition penalty: there is no generation_config.json to say one")
        if self.mixer != "full":
            for name in ("window", "sinks"):
                if getattr(ahn, name) != getattr(self.suite, name):
                    theirs = getattr(self.suite, name)
                    found.append(f"{name} {getattr(ahn, name):,}, the paper's {theirs:,}")
        if getattr(self.model.args, "rope_scaling", None):
            found.append("positions are scaled (YaRN or alike), the paper's are not")
        if not self.asker.template:
            found.append("no chat template: prompts are bare")
        if self.suite.name == "lveval" and self.length != "128k":
            found.append(f"length {self.length}, the paper's 128k")
        if self.protocol != "ahn":
            found.append("prompts, lengths and scores by the suite's own protocol")
        for task in self.tasks:
            if not self.template.is_published(task.template):
                found.append(f"the prompt of {task.name} is not known to be the paper's")
        for left in getattr(self, "left", []):
            if left.wanted < left.records:
                found.append(f"{left.task.name}: {left.wanted} of {left.records} items")
        return found

    def cost(self) -> Cost:
        """Of what is left: by the characters of its prompts, and by the speed of two steps."""
        items = tokens = 0
        density = 0.0
        for left in self.left:
            new = left.task.max_new[self.protocol]
            for _, text in self._texts(left):
                if text and not density:
                    sample = text[:SAMPLE]
                    density = len(self.asker.encoder("", sample)) / len(sample)
                tokens += min(round(len(text) * density), self.suite.limit) + new
                items += 1
        share(self.model.ranks, lambda: [items, self.asker.penalty])  # for follow
        return Cost(items, tokens, tokens / reading_speed(self.model) if items else 0.0)

    def _texts(self, left: Left) -> Iterator[tuple[int, str]]:
        template = self.template.texts[left.task.template]
        for number, record in read_records(left.file, left.task.member, set(left.items)):
            try:
                text = fill(template, record)
                of = self.suite.name, self.protocol, left.task.name
                check_line(*of, line_of(*of, record, ""))  # not only after days
            except KeyError as e:
                raise self._bad(left, number, f"has no {show(e.args[0])}") from None
            except AHNError as e:
                raise self._bad(left, number, str(e)) from None
            except UNFIT:
                raise self._bad(left, number, "has an answer of another kind") from None
            yield number, text

    def _bad(self, left: Left, number: int, what: str) -> AHNError:
        return AHNError(f"{left.file}: record {number} of {left.task.name} {what}")

    def ask(self, progress: Callable[[str, int], None] = lambda task, n: None) -> None:
        """Ask what is left. progress: called with a task and items that were asked, and
        while one is read with 0; what it raises ends the run, and loses the item it is at."""
        with self.predictions.working(), mixing(self.model, self.mixer):
            for left in self.left:
                self._ask_task(left, progress)
            share(self.model.ranks, lambda: None)  # ends follow

    def _ask_task(self, left: Left, progress: Callable[[str, int], None]) -> None:
        task, new = left.task, left.task.max_new[self.protocol]
        template = self.template.texts[task.template]
        with self.predictions.appending(task.out) as append:
            for number, record in read_records(left.file, task.member, set(left.items)):
                prompt = self.asker.prompt(fill(template, record), new, task.chat)
                share(self.model.ranks, partial(list, (prompt, new)))  # with follow
                pred = self.asker.answer(prompt, new, lambda read: progress(task.name, 0))
                line = line_of(self.suite.name, self.protocol, task.name, record, pred)
                append({**line, "item": number, "run": self.mark})
                progress(task.name, 1)

    def result(self) -> dict[str, Any]:
        """Scores of all that is there, also written to result.json."""
        found = score_directory(self.out, self.protocol)
        self.predictions.write_json(RESULT, found)
        return found
