"""What a memory is worth on a text: full attention, window alone, window with memory.

Per position: the negative log-likelihood (NLL) of the next token, and the divergence of the
distribution from that of full attention, both in nats. Positions within the window are not
counted: there all three are equal.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import AHNError
from ..model.augment import head, hidden_states
from ..train.losses import ROWS, divergence
from ..train.streams import silenced, study, teach

KINDS = ("full", "window", "memory")

# Tokens of a stream read at a time.
STEP = 2048


# Differences of fewer standard errors than that may be chance.
SURE = 2.0


def judge(difference: float, error: float) -> str:
    """A loss with memory minus that of the window alone, and its standard error, in a word."""
    if not abs(difference) > SURE * error:
        return "noise"
    return "helps" if difference < 0 else "harms"


class Bucket(NamedTuple):
    """Positions first <= t < end of all segments: NLL by kind, KL(full || kind), and how many.

    error: standard errors over tokens, as if each were drawn alone: "nll" and "kl" of memory minus
    window, "gap" of the NLL of the window minus that of full attention. NaN for one token.
    """

    first: int
    end: int
    tokens: int
    nll: dict[str, float]
    kl: dict[str, float]
    error: dict[str, float]

    @property
    def verdict(self) -> str:
        """Whether the memory brings the model nearer to full attention."""
        return judge(self.kl["memory"] - self.kl["window"], self.error["kl"])

    @property
    def has_gap(self) -> bool:
        """Whether the window alone is surely worse than full attention in NLL."""
        return self.nll["window"] - self.nll["full"] > SURE * self.error["gap"]


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
    full, alone, memory, kl_alone, kl_memory = (table[:, n] for n in range(5))
    pairs = {"nll": memory - alone, "kl": kl_memory - kl_alone, "gap": alone - full}
    return Bucket(first, end, count, nll, kl, {k: _error(x) for k, x in pairs.items()})


def _error(x: mx.array) -> float:
    """Standard error of the mean."""
    if x.size < 2:
        return math.nan
    return math.sqrt(float(mx.var(x, ddof=1).item()) / x.size)  # type: ignore[arg-type]


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


class Stretch(NamedTuple):
    """Tokens first <= t < end of one long text: NLL of window alone and with memory, and the
    standard error of their difference."""

    first: int
    end: int
    nll: dict[str, float]
    error: float

    @property
    def difference(self) -> float:
        return self.nll["memory"] - self.nll["window"]


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
        parts = [x[a : a + 8192] for x in (alone, memory)]
        means = [float(x.mean().item()) for x in parts]  # type: ignore[arg-type]
        end = first + min(a + 8192, alone.size)
        nll = dict(zip(KINDS[1:], means, strict=True))
        stretches.append(Stretch(first + a, end, nll, _error(parts[1] - parts[0])))
    return stretches


def _stream(
    model: nn.Module, tokens: mx.array, first: int, progress: Callable[[int], None]
) -> mx.array:
    """NLL of the tokens first + 1 ... L - 1."""
    cache, nlls = model.make_cache(), []
    L = tokens.shape[1]
    for a in range(0, L - 1, STEP):
        b = min(a + STEP, L - 1)
        hidden = hidden_states(model, tokens[:, a:b], cache)
        mx.eval(hidden, [c.state for c in cache])
        for n in range(max(a, first), b, ROWS):
            rows = slice(n, min(n + ROWS, b))
            logits = head(model, hidden[0, n - a : rows.stop - a]).astype(mx.float32)
            nlls.append(nn.losses.cross_entropy(logits, tokens[0, n + 1 : rows.stop + 1]))
            mx.eval(nlls)
        progress(b - a)
    return mx.concatenate(nlls)
