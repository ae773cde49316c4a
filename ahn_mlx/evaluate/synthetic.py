"""Tasks made here, asked of all three mixers on the same items, and scored by where the facts
are: kept as sinks, within the window, or beyond it, where only a memory can have them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..model.config import AHNConfig
from ..reading.generate import Run
from ..reading.sampling import Sampling
from ..reading.template import Template
from ..reading.tokens import Encoder
from .generators import Item, make_item
from .matching import contained, labelled, passkey, postprocess
from .mixers import MIXERS, mixing

PLACES = ("sinks", "window", "beyond")
DEPTHS = (0, 0.25, 0.5, 0.75, 1)


class Answered(NamedTuple):
    """place: of PLACES, of the fact that is hardest to reach. distance: tokens from the farthest
    fact. scores: 0 to 1, in the order of MIXERS."""

    task: str
    depth: float
    place: str
    distance: int
    scores: tuple[float, ...]
    answers: tuple[str, ...]


class Asked(NamedTuple):
    item: Item
    prompt: list[int]


class Items:
    """Items of a model's tokens, as prompts that end with the begin of the answer."""

    def __init__(self, tokenizer: TokenizerWrapper, haystack: Sequence[str]):
        self.encoder, self.haystack = Encoder(tokenizer), haystack
        self.template = Template(tokenizer) if tokenizer.has_chat_template else None

    def make(self, task: str, **where: Any) -> Asked:
        """where: as make_item takes it. Raises AHNError if the facts are too long."""
        item = make_item(task, self.haystack, lambda text: len(self.encoder("", text)), **where)
        text = f"{item.document}\n\n{item.question}"
        if self.template:
            pieces = self.template.question("start", text)
            return Asked(item, self.encoder(*pieces, item.prefix))
        return Asked(item, [*self.encoder.begin, *self.encoder("", f"{text}\n{item.prefix}")])


def score(task: str, item: Item, said: str) -> float:
    """0 to 1."""
    if task == "passkey":
        return passkey(said, item.answers)
    if item.labels is not None:
        return labelled(item.answers[0], said, item.question, item.labels)
    return contained(postprocess(said), item.answers)


def place_of(asked: Asked, config: AHNConfig) -> str:
    """Of the fact that is hardest to reach."""
    total, worst = len(asked.prompt), 0
    for distance in asked.item.distances:
        kept = 0 if total - distance <= config.sinks else 1 if distance <= config.window else 2
        worst = max(worst, kept)
    return PLACES[worst]


def ask(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    tasks: Sequence[str],
    haystack: Sequence[str],
    *,
    length: int,
    count: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda items: None,
) -> Iterator[Answered]:
    """Items of each task, `count` at each of the depths 0 to 1, each asked of all mixers.
    progress: called with 1 for each question, and while one is read with 0."""
    items = Items(tokenizer, haystack)
    for task in tasks:
        for depth in DEPTHS:
            for index in range(count):
                where = {"length": length, "depth": depth, "index": index, "seed": seed}
                asked = items.make(task, **where)
                said = []
                for mixer in MIXERS:
                    with mixing(model, mixer):
                        said.append(_answer(model, tokenizer, asked, progress))
                    progress(1)
                yield Answered(
                    task,
                    depth,
                    place_of(asked, model.ahn),
                    max(asked.item.distances),
                    tuple(score(task, asked.item, s) for s in said),
                    tuple(said),
                )


def _answer(
    model: nn.Module, tokenizer: TokenizerWrapper, asked: Asked, progress: Callable[[int], None]
) -> str:
    run = Run(model, tokenizer, asked.prompt, Sampling(max_tokens=asked.item.gen))
    run.progress = lambda read, size: progress(0)
    return "".join(run)


class Summary(NamedTuple):
    """Of one task at one place: items, mean scores in the order of MIXERS, their standard
    errors, and memory less window, paired, with its own."""

    task: str
    place: str
    n: int
    means: list[float]
    errors: list[float]
    gain: float
    gain_error: float


def summarize(answered: Sequence[Answered]) -> list[Summary]:
    found = []
    for task in dict.fromkeys(a.task for a in answered):
        for place in PLACES:
            rows = np.array([a.scores for a in answered if (a.task, a.place) == (task, place)])
            if not len(rows):
                continue
            gain = rows[:, 0] - rows[:, 1]
            errors = [_error(column) for column in rows.T]
            means = [float(x) for x in rows.mean(axis=0)]
            row = (task, place, len(rows), means, errors, float(gain.mean()), _error(gain))
            found.append(Summary(*row))
    return found


def _error(values: Any) -> float:
    """Standard error of a mean; of one item it is not known."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
