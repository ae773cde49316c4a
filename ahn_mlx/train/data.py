"""Texts as sequences of equal length, in an order that a seed fixes."""

import sys
from array import array
from collections.abc import Iterator
from copy import copy
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
        tokens = array("i")
        encoder = Encoder(tokenizer)
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        bar = tqdm(
            texts(patterns), desc="tokenizing", unit=" texts", disable=not sys.stderr.isatty()
        )
        for text in bar:
            tokens.extend(encoder("", text) + ends)
        self._all, self._begin = np.array(tokens, dtype=np.int32), encoder.begin
        self.length, self.seed = length, seed
        whole = self._cut(length)
        count = len(whole)
        held = min(HELD, count // ONE_IN)
        # Not the last ones: the end of a book is often a licence.
        self._places = [(n + 1) * count // (held + 1) for n in range(held)]
        self.held_out, self.tokens = whole[self._places], np.delete(whole, self._places, axis=0)
        self.count = count - held

    def of(self, length: int) -> "Sequences":
        """The same texts in sequences of another length, without what overlaps held_out.

        Raises AHNError if none is left.
        """
        if length == self.length:
            return self
        other = copy(self)
        other.length, whole = length, other._cut(length)
        own, body = self.length - len(self._begin), length - len(self._begin)
        first = np.arange(len(whole)) * body
        held = [(first < (p + 1) * own) & (first + body > p * own) for p in self._places]
        other.tokens = whole[~np.any(held, axis=0)] if held else whole
        other.count = len(other.tokens)
        if other.count == 0:
            raise _too_short(length, " beside what is held out")
        return other

    def _cut(self, length: int) -> np.ndarray:
        """[n, length]: each begins as a text does when it is read."""
        body = length - len(self._begin)
        count = len(self._all) // body
        if count == 0:
            raise _too_short(length, f", it has {len(self._all):,} tokens")
        rows = self._all[: count * body].reshape(-1, body)
        begins = np.tile(np.array(self._begin, dtype=np.int32), (count, 1))
        return np.concatenate([begins, rows], axis=1)

    def __getitem__(self, n: int) -> mx.array:
        """The n-th sequence to train on, [1, length]; each epoch has its own order."""
        epoch, place = divmod(n, self.count)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return mx.array(self.tokens[order[place]])[None]


def texts(patterns: tuple[str, ...]) -> Iterator[str]:
    """The texts of these files. Raises AHNError naming the file, and the line."""
    for _, found in read_each(patterns, lambda file: list(read_texts(file))):
        yield from found


def _too_short(length: int, where: str) -> AHNError:
    return AHNError(
        f"--data has no sequence of {length:,} tokens{where}; give more text or a smaller --seq-len"
    )
