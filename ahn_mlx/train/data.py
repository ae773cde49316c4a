"""Texts as sequences of equal length, in an order that a seed fixes."""

import glob
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..errors import AHNError


class Sequences:
    """All texts one after the other, each ended, cut into sequences of `length` tokens.

    patterns: files or globs; a .jsonl file has an object with "text" in each line.
    Raises AHNError if a file cannot be read or all are shorter than one sequence.
    """

    def __init__(self, patterns: tuple[str, ...], tokenizer: Any, length: int, seed: int):
        tokens: list[int] = []
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        bar = tqdm(
            texts(patterns), desc="tokenizing", unit=" texts", disable=not sys.stderr.isatty()
        )
        for text in bar:
            tokens += tokenizer.encode(text, add_special_tokens=False) + ends
        self.length, self.seed = length, seed
        self.count = len(tokens) // length
        if self.count == 0:
            raise AHNError(
                f"--data has {len(tokens):,} tokens, fewer than one sequence of {length:,};"
                " give more text or a smaller --seq-len"
            )
        kept = tokens[: self.count * length]
        self.tokens = np.array(kept, dtype=np.int32).reshape(-1, length)

    def __getitem__(self, n: int) -> mx.array:
        """The n-th sequence to train on, [1, length]; each epoch has its own order."""
        epoch, place = divmod(n, self.count)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return mx.array(self.tokens[order[place]])[None]


def texts(patterns: tuple[str, ...]) -> Iterator[str]:
    """The texts of these files. Raises AHNError naming the file, and the line."""
    for pattern in patterns:
        files = [Path(f) for f in sorted(glob.glob(pattern))] or [Path(pattern)]
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
                raise AHNError(f"{file}: {reason}") from None
            yield from _lines(file, text) if file.suffix == ".jsonl" else [text]


def _lines(file: Path, text: str) -> Iterator[str]:
    for n, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise AHNError(f'{file}: line {n} is not an object with "text"') from None
