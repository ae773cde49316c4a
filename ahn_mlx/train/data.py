"""Texts as sequences of equal length, in an order that a seed fixes."""

import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..errors import AHNError
from ..reading.text import read_each, read_texts
from ..reading.tokens import Encoder

# Sequences that are not trained on: at most so many, and one in so many.
HELD, ONE_IN = 2, 20


class Sequences:
    """All texts one after the other, each ended, cut into sequences of `length` tokens.

    patterns: files, folders or globs; a .jsonl file has an object with "text" in each line.
    held_out: [n, length], a few of them, evenly from the texts, that are not trained on.
    Raises AHNError if a file cannot be read or all are shorter than one sequence.
    """

    def __init__(self, patterns: tuple[str, ...], tokenizer: Any, length: int, seed: int):
        tokens: list[int] = []
        encoder = Encoder(tokenizer)
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        bar = tqdm(
            texts(patterns), desc="tokenizing", unit=" texts", disable=not sys.stderr.isatty()
        )
        for text in bar:
            tokens += encoder("", text) + ends
        self.length, self.seed = length, seed
        body = length - len(encoder.begin)  # each begins as a text does when it is read
        self.count = len(tokens) // body
        if self.count == 0:
            raise AHNError(
                f"--data has {len(tokens):,} tokens, fewer than one sequence of {length:,};"
                " give more text or a smaller --seq-len"
            )
        rows = np.array(tokens[: self.count * body], dtype=np.int32).reshape(-1, body)
        begins = np.tile(np.array(encoder.begin, dtype=np.int32), (self.count, 1))
        whole = np.concatenate([begins, rows], axis=1)
        held = min(HELD, self.count // ONE_IN)
        # Not the last ones: the end of a book is often a licence.
        places = [(n + 1) * self.count // (held + 1) for n in range(held)]
        self.held_out, self.tokens = whole[places], np.delete(whole, places, axis=0)
        self.count -= held

    def __getitem__(self, n: int) -> mx.array:
        """The n-th sequence to train on, [1, length]; each epoch has its own order."""
        epoch, place = divmod(n, self.count)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return mx.array(self.tokens[order[place]])[None]


def texts(patterns: tuple[str, ...]) -> Iterator[str]:
    """The texts of these files. Raises AHNError naming the file, and the line."""
    for _, found in read_each(patterns, lambda file: list(read_texts(file))):
        yield from found
