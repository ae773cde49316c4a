"""What a student is judged by (paper, section 3.2). Only tokens behind window and sinks count.

Losses of logits are sums over rows, taken some rows at a time with their gradient: the
logits of a long text and a large vocabulary would fill the memory of a laptop.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.augment import head
from ..ops.exp import exp
from ..platform import gpu_bytes
from .streams import Stream

# Rows of logits at a time: 128 of 151,936 float32 numbers are 78 MB, and KL needs 25 of these.
# More of them are fewer launches, for which a GPU has some of its memory.
ROWS, ARRAYS, OF_MEMORY = 128, 25, 1 / 8

NAMES = ("kl", "ce", "distill")


def rows_at_once(words: int) -> int:
    """Of logits of so many words, a power of two times ROWS."""
    fit = OF_MEMORY * gpu_bytes() / (ARRAYS * 4 * words * ROWS)
    return ROWS << max(0, int(fit).bit_length() - 1)


def counted(labels: mx.array, capacity: int) -> mx.array:
    """Numbers in B L of the positions >= capacity whose label [B, L] is not -100."""
    counts = np.array(labels) != -100
    counts[:, :capacity] = False
    return mx.array(np.flatnonzero(counts).astype(np.int32))


def kl(model: nn.Module, teacher: Stream, student: Stream, labels: mx.array, W: int) -> mx.array:
    """Mean KL(teacher || student) of the counted positions' distributions.

    labels: [B, L], -100 where a position does not count. W: window and sinks.
    """
    rows = counted(labels, W)

    def loss(hidden: mx.array, taught: mx.array) -> mx.array:
        return divergence(head(model, taught), head(model, hidden)).sum()

    taught = mx.stop_gradient(teacher.hidden.flatten(0, 1)[rows])
    return _over_rows(model, loss, student.hidden.flatten(0, 1)[rows], taught) / max(1, rows.size)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) of logits [..., V], in nats, float32."""
    p, q = p.astype(mx.float32), q.astype(mx.float32)
    p, q = (x - mx.stop_gradient(x.max(axis=-1, keepdims=True)) for x in (p, q))
    mass = exp(p)
    total = mass.sum(axis=-1)
    mean = (mass * (p - q)).sum(axis=-1) / total
    return mean - mx.log(total) + mx.log(exp(q).sum(axis=-1))


def ce(model: nn.Module, teacher: Stream, student: Stream, labels: mx.array, W: int) -> mx.array:
    """Mean cross-entropy of each counted position's label in the one counted before it.

    As in the PyTorch release: the list runs over the whole batch, so a pair may straddle
    a gap or two samples.
    """
    rows = counted(labels, W)

    def loss(hidden: mx.array, targets: mx.array) -> mx.array:
        logits = head(model, hidden).astype(mx.float32)
        return nn.losses.cross_entropy(logits, targets, reduction="sum")

    hidden, targets = student.hidden.flatten(0, 1)[rows], labels.flatten()[rows]
    return _over_rows(model, loss, hidden[:-1], targets[1:]) / max(1, rows.size - 1)


def distill(
    model: nn.Module, teacher: Stream, student: Stream, labels: mx.array, W: int
) -> mx.array:
    """Mean squared difference of the layers' heads, scaled to length 1 over H D, at
    positions >= W."""

    def unit(heads: mx.array) -> mx.array:
        x = heads[:, :, W:].swapaxes(1, 2).flatten(2).astype(mx.float32)
        return x / mx.linalg.norm(x, axis=-1, keepdims=True)

    pairs = zip(teacher.heads, student.heads, strict=True)
    layers = [((mx.stop_gradient(unit(t)) - unit(s)) ** 2).mean() for t, s in pairs]
    return mx.stack(layers).mean()


def ce_apart(
    model: nn.Module, teacher: Stream, student: Stream, labels: mx.array, W: int
) -> mx.array:
    """Mean of ce of each sequence on its own: no pair straddles two of a batch."""
    B = labels.shape[0]
    total = mx.zeros(())
    for hidden, own in zip(mx.split(student.hidden, B), mx.split(labels, B), strict=True):
        # One after the other, as the blocks of rows are.
        (hidden,) = mx.depends([hidden], [total]) if B > 1 else (hidden,)
        total = total + ce(model, teacher, Stream(hidden, []), own, W)
    return total / B


# By name, of sequences of equal length: a batch has the mean of its sequences.
LOSSES = dict(zip(NAMES, (kl, ce_apart, distill), strict=True))


def _over_rows(
    model: nn.Module, loss: Callable[..., mx.array], hidden: mx.array, other: mx.array
) -> mx.array:
    """Sum of loss(hidden, other) over blocks of rows, its gradient taken going forward:
    then no block's logits have to be kept or made again."""
    if hidden.shape[0] == 0:
        return mx.zeros(())
    size = rows_at_once(head(model, hidden[:1]).shape[-1])

    @mx.custom_function
    def total(hidden: mx.array, other: mx.array) -> tuple[mx.array, mx.array]:
        value = mx.zeros(())
        gradients: list[mx.array] = []
        for n in range(0, hidden.shape[0], size):
            # Without an order MLX computes blocks side by side, and holds them all at once.
            after = [value, *gradients[-1:]]
            rows = mx.depends([hidden[n : n + size], other[n : n + size]], after)
            block, gradient = mx.value_and_grad(loss)(*rows)
            value = value + block
            gradients.append(gradient)
        return value, mx.concatenate(gradients)

    @total.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        return cotangents[0] * outputs[1], mx.zeros_like(primals[1])

    sums: Any = total(hidden, other)
    return sums[0]
