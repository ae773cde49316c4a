"""What a memory keeps, in nats: facts in a document, each with a value of one token, and how
likely the model takes that value to be when it is asked, among others.

Exact answers measure the window: a memory that keeps a trace gives none. Log-probabilities see
the trace. Each document is read once by each mixer and forked for each question.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..reading.session import Session
from ..reading.tokens import Encoder
from .generators import Draws, Story, largest, weave, words
from .mixers import MIXERS, mixing

NAMES = words("""
    Anna Boris Carla David Edith Frank Greta Henry Irene Jacob Laura Martin Nora Oscar
    Paula Robert
""")
ROOMS = words("""
    kitchen garden attic library market stable tower bakery barn church hotel office school
    bridge castle forest station theater temple hospital museum prison shop bank
""")
# What stands before a value and how it begins: words, or letters where no word is one token.
STEMS = (
    ("{} hid the letter in the", [f" {room}" for room in ROOMS]),
    ("{} hid the letter in room ", [chr(c) for c in range(ord("A"), ord("Z") + 1)]),
)
PLACES = ("sinks", "window", "beyond")
MEASURES = ("nll", "bound", "seen", "first_bound", "first_seen")

Table = np.ndarray[Any, np.dtype[np.float64]]


class Document(NamedTuple):
    """ids: of the text. stems: ids of each question, up to its value. values: ids of the true
    ones. unseen: ids of as many that do not occur. at: places of the values in the ids."""

    ids: list[int]
    stems: list[list[int]]
    values: list[int]
    unseen: list[int]
    at: list[int]


def make_documents(
    tokenizer: TokenizerWrapper,
    haystack: Sequence[str],
    *,
    documents: int,
    needles: int,
    tokens: int,
    seed: int = 0,
) -> list[Document]:
    """Documents of about so many tokens, with their facts at even distances.

    haystack: sentences. Raises AHNError if there are not enough values of one token, or facts
    alone are longer.
    """
    encoder = Encoder(tokenizer)
    if not 2 <= needles <= len(NAMES):
        raise AHNError(f"--needles must be from 2 to {len(NAMES)}, not {needles}")
    stem, values = _values(encoder, 2 * needles)
    made = []
    for number in range(documents):
        draws = Draws(f"recall/{seed}/{tokens}/{needles}/{number}")
        start = draws.pick(len(haystack))
        names, drawn = draws.take(NAMES, needles), draws.take(list(values), 2 * needles)
        facts = [stem.format(n) + v + "." for n, v in zip(names, drawn, strict=False)]
        story = Story(
            [(fact, (i + 0.5) / needles) for i, fact in enumerate(facts)],
            *(list(range(needles)), "", "", [], 0),
        )

        def document(n: int, start: int = start, story: Story = story) -> tuple[str, list[int]]:
            return weave([haystack[(start + s) % len(haystack)] for s in range(n)], story)

        n = largest(lambda n, make=document: len(encoder("", make(n)[0])) <= tokens)  # type: ignore[misc]
        if n == 0:
            raise AHNError(f"--tokens {tokens}: has no room for {needles} facts; give more")
        text, ends = document(n)
        ids = [*encoder.begin, *encoder("", text)]
        made.append(
            Document(
                ids,
                [encoder("", f" {stem.format(name)}") for name in names],
                [values[v] for v in drawn[:needles]],
                [values[v] for v in drawn[needles:]],
                # Before the full stop that ends a fact.
                [len(encoder.begin) + len(encoder("", text[: end - 1])) - 1 for end in ends],
            )
        )
    return made


def _values(encoder: Encoder, wanted: int) -> tuple[str, dict[str, int]]:
    """A stem, and the ids of what may follow it, each one token there."""
    for stem, choice in STEMS:
        before = encoder("", f" {stem.format(NAMES[0])}")
        found = {}
        for word in choice:
            ids = encoder("", f" {stem.format(NAMES[0])}{word}.")
            if ids[: len(before)] == before and ids[len(before) + 1 :] == encoder("", "."):
                found[word] = ids[len(before)]
        if len(set(found.values())) == len(found) >= wanted:
            return stem, found
    raise AHNError(f"the tokenizer has no {wanted} words or letters that are one token")


@dataclass(frozen=True)
class Recall:
    """places: [documents, needles] of PLACES' numbers. distances: tokens from a value to where
    it is asked for. table: [mixers, documents, needles, measures] in the order of MIXERS and
    MEASURES: NLL of the true value, its log-probability less the mean of the document's other
    values ("bound") and of values that do not occur ("seen"), and whether it is the likeliest
    of either."""

    places: Table
    distances: Table
    table: Table

    def mean(self, mixer: str, measure: str, place: str) -> float:
        chosen = self.places == PLACES.index(place)
        values = self.table[MIXERS.index(mixer), ..., MEASURES.index(measure)]
        return float(values[chosen].mean()) if chosen.any() else float("nan")

    def share(self, measure: str) -> tuple[float, float]:
        """What the memory keeps of what full attention has beyond the window alone, of facts
        beyond the window, and its standard error over documents, by the jackknife."""
        chosen = self.places == PLACES.index("beyond")
        sums = self.table[..., MEASURES.index(measure)] * chosen
        memory, window, full = (sums[MIXERS.index(m)].sum(axis=1) for m in MIXERS)
        kept, had = memory - window, full - window
        n = len(kept)
        if had.sum() == 0:
            return float("nan"), float("nan")
        without = (kept.sum() - kept) / (had.sum() - had) if n > 1 else np.array([np.nan])
        error = np.sqrt((n - 1) * np.mean((without - without.mean()) ** 2))
        return float(kept.sum() / had.sum()), float(error)

    def count(self, place: str) -> int:
        return int((self.places == PLACES.index(place)).sum())

    def facts(self) -> dict[str, Any]:
        """For a program."""
        return {
            "documents": len(self.places),
            "needles": self.places.shape[1],
            "shares": {
                name: dict(zip(("share", "standard_error"), self.share(name), strict=True))
                for name in MEASURES[:3]
            },
            "places": {
                place: {
                    "needles": self.count(place),
                    **{m: {x: self.mean(m, x, place) for x in MEASURES} for m in MIXERS},
                }
                for place in PLACES
                if self.count(place)
            },
        }


def measure(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    documents: Sequence[Document],
    progress: Callable[[int], None] = lambda tokens: None,
) -> Recall:
    """All three mixers on the same documents. progress: called with the tokens of each read."""
    config = model.ahn
    table = []
    for mixer in MIXERS:
        with mixing(model, mixer):
            rows = []
            for document in documents:
                rows.append(_ask(model, tokenizer, document))
                progress(len(document.ids))
            table.append(rows)
    places, distances = [], []
    for document in documents:
        pairs = zip(document.at, document.stems, strict=True)
        gone = [len(document.ids) + len(stem) - 1 - at for at, stem in pairs]
        distances.append(gone)
        places.append([_place(a, d, config) for a, d in zip(document.at, gone, strict=True)])
    return Recall(np.array(places), np.array(distances), np.array(table))


def _place(at: int, distance: int, config: Any) -> int:
    return 0 if at < config.sinks else 1 if distance < config.window else 2


def _ask(
    model: nn.Module, tokenizer: TokenizerWrapper, document: Document
) -> list[tuple[float, ...]]:
    """MEASURES of each needle."""
    session = Session(model, tokenizer, chat=False)
    session.read_ids(document.ids)
    found: list[tuple[float, ...]] = []
    for stem, value in zip(document.stems, document.values, strict=True):
        fork = session.fork()
        logits = model(mx.array([stem]), cache=fork.caches)[0, -1].astype(mx.float32)
        log = np.array(logits - mx.logsumexp(logits))
        true = log[value]
        bound = log[[v for v in document.values if v != value]]
        seen = log[document.unseen]
        found.append(
            (
                -float(true),
                float(true - bound.mean()),
                float(true - seen.mean()),
                float(true >= bound.max()),
                float(true >= seen.max()),
            )
        )
    return found
