"""A repetition penalty over all that was read, what has left the window included.

It needs no text, only which tokens there were: one flag for each of the vocabulary, the same
size for ever. mlx-lm's own penalty looks back a fixed number of tokens of one prompt.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

# One flag for each token of the vocabulary. Never changed in place: forks share it.
Seen = np.ndarray[Any, np.dtype[np.bool_]]


def nothing_seen(vocabulary: int) -> Seen:
    return np.zeros(vocabulary, dtype=np.bool_)


def note(seen: Seen, ids: Sequence[int]) -> Seen:
    """These flags with those of some tokens, which must be of the vocabulary."""
    after = seen.copy()
    after[np.asarray(ids, dtype=np.int64)] = True
    return after


def pack(seen: Seen) -> mx.array:
    """uint8 [ceil(V / 8)]: token t is bit t % 8 of byte t // 8."""
    return mx.array(np.packbits(seen, bitorder="little"))


def unpack(packed: mx.array, vocabulary: int) -> Seen:
    bits = np.unpackbits(np.asarray(packed), count=vocabulary, bitorder="little")
    return bits.astype(np.bool_)


class WholeTextPenalty:
    """A logits processor of mlx-lm: of each token that was seen, once, a logit that is positive
    is divided by the penalty and one that is negative multiplied by it, as transformers does.

    seen: of all that comes before the answer.
    """

    def __init__(self, penalty: float, seen: Seen):
        self.penalty, self.seen = penalty, mx.array(seen)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.seen[tokens[-1:]] = True
        penalized = mx.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return mx.where(self.seen, penalized, logits)
