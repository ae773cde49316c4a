"""What a memory is worth on a text: full attention, window alone, window with memory.

Per position: the negative log-likelihood (NLL) of the next token, and the divergence of the
distribution from that of full attention, both in nats. Positions within the window are not
counted: there all three are equal.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import AHNError
from ..model.augment import head
from ..train.losses import ROWS, divergence
from ..train.streams import install, study, teach, trainable

KINDS = ("full", "window", "memory")

# Tokens of a stream read at a time.
STEP = 2048


class Bucket(NamedTuple):
    """Positions first <= t < end of all segments: NLL by kind, KL(full || kind), and how many."""

    first: int
    end: int
    tokens: int
    nll: dict[str, float]
    kl: dict[str, float]


class Comparison(NamedTuple):
    """buckets: by position. total: all of them. ratios: KL with memory over KL of the window
    alone, by segment. gap_closed: the part of the window's NLL loss that the memory wins back."""

    buckets: list[Bucket]
    total: Bucket
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return self.total.kl["memory"] / self.total.kl["window"]

    @property
    def gap_closed(self) -> float:
        nll = self.total.nll
        return (nll["window"] - nll["memory"]) / (nll["window"] - nll["full"])


def segments(ids: list[int], begin: list[int], length: int, count: int) -> list[mx.array]:
    """[1, length] each, evenly over a text. begin: what the tokenizer puts before a text that
    begins, as each of them does."""
    body = length - len(begin)
    starts = [n * (len(ids) - body) // max(1, count - 1) for n in range(count)]
    return [mx.array([[*begin, *ids[a : a + body]]]) for a in starts]


def compare(
    model: nn.Module,
    segments: list[mx.array],
    window: int,
    sinks: int,
    progress: Callable[[], None] = lambda: None,
) -> Comparison:
    """segments: [1, L] tokens each, all of one length L > window + sinks + 1."""
    L, W = segments[0].shape[1], window + sinks
    if L <= W + 1:
        raise AHNError(f"segments of {L} tokens do not leave a window of {W}; use longer ones")
    rows = []
    for tokens in segments:
        rows.append(_measure(model, tokens, window, sinks))
        progress()
    table = mx.stack(rows)  # [segments, 5, L - 1 - W]
    edges = [W, *itertools.takewhile(lambda t: t < L - 1, _edges(W)), L - 1]
    pairs = itertools.pairwise(edges)
    parts = [_bucket(table[..., a - W : b - W], a, b) for a, b in pairs]
    sums = table.sum(axis=-1)
    ratios: Any = (sums[:, 4] / sums[:, 3]).tolist()
    return Comparison(parts, _bucket(table, W, L - 1), ratios)


def _edges(W: int) -> Iterator[int]:
    """The powers of two above W."""
    return (1 << n for n in itertools.count(W.bit_length()))


def _bucket(table: mx.array, first: int, end: int) -> Bucket:
    means: Any = table.mean(axis=(0, 2)).tolist()
    count = table.shape[0] * table.shape[2]
    nll, kl = dict(zip(KINDS, means[:3], strict=True)), dict(zip(KINDS[1:], means[3:], strict=True))
    return Bucket(first, end, count, nll, kl)


def _measure(model: nn.Module, tokens: mx.array, window: int, sinks: int) -> mx.array:
    """[5, L - 1 - W]: three NLLs in the order of KINDS, two KLs."""
    W = window + sinks
    full = teach(model, tokens).hidden
    mx.eval(full)
    with silenced(model):
        alone = study(model, tokens, window, sinks, inference=True).hidden
        mx.eval(alone)
    memory = study(model, tokens, window, sinks, inference=True).hidden
    mx.eval(memory)
    blocks = []
    for a in range(W, tokens.shape[1] - 1, ROWS):
        rows = slice(a, min(a + ROWS, tokens.shape[1] - 1))
        targets = tokens[0, rows.start + 1 : rows.stop + 1]
        logits = [head(model, h[0, rows]).astype(mx.float32) for h in (full, alone, memory)]
        nlls = [nn.losses.cross_entropy(x, targets) for x in logits]
        kls = [divergence(logits[0], x) for x in logits[1:]]
        blocks.append(mx.stack([*nlls, *kls]))
        mx.eval(blocks)
    return mx.concatenate(blocks, axis=1)


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """The memory adds nothing in here: a window alone."""
    parameters = trainable(model)
    zeros = {n: mx.zeros_like(x) for n, x in parameters.items() if n.endswith("o_proj.weight")}
    install(model, zeros)
    try:
        yield
    finally:
        install(model, parameters)


class Stretch(NamedTuple):
    """Tokens first <= t < end of one long text: NLL of window alone and with memory."""

    first: int
    end: int
    nll: dict[str, float]


def stream(
    model: nn.Module,
    tokens: mx.array,
    first: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Stretch]:
    """One text [1, L] from its start, in constant memory; NLL from position `first` on, in
    stretches of 8,192 tokens. There is no full attention to compare with."""
    model.eval()
    with silenced(model):
        alone = _stream(model, tokens, first, progress)
    memory = _stream(model, tokens, first, progress)
    stretches = []
    for a in range(0, alone.size, 8192):
        means = [float(x[a : a + 8192].mean().item()) for x in (alone, memory)]  # type: ignore[arg-type]
        end = first + min(a + 8192, alone.size)
        stretches.append(Stretch(first + a, end, dict(zip(KINDS[1:], means, strict=True))))
    return stretches


def _stream(
    model: nn.Module, tokens: mx.array, first: int, progress: Callable[[int], None]
) -> mx.array:
    """NLL of the tokens first + 1 ... L - 1."""
    cache, nlls = model.make_cache(), []
    L = tokens.shape[1]
    for a in range(0, L - 1, STEP):
        b = min(a + STEP, L - 1)
        hidden = model.model(tokens[:, a:b], cache=cache)
        mx.eval(hidden, [c.state for c in cache])
        for n in range(max(a, first), b, ROWS):
            rows = slice(n, min(n + ROWS, b))
            logits = head(model, hidden[0, n - a : rows.stop - a]).astype(mx.float32)
            nlls.append(nn.losses.cross_entropy(logits, tokens[0, n + 1 : rows.stop + 1]))
            mx.eval(nlls)
        progress(b - a)
    return mx.concatenate(nlls)
