"""One model over the processes that mlx.launch started: who they are, what they tell each other,
and which part of the model is this one's.

Tensor parallel: mlx-lm's `shard` divides the base. Heads stay with their keys and values, window,
gates, memory and output projection, so that nothing new crosses but the sum of squares that the
norm of Mamba2 needs. The vocabulary is divided too, which mlx-lm leaves whole.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generation_stream

from ..errors import AHNError
from ..platform import launched_rank
from .attention import AHNAttention
from .division import Part, heads_of_each, part_of, rows_of_each

T = TypeVar("T")

LOST = "another rank has ended; mlx.launch says which"


class Lost(AHNError):
    """A rank is not there any more, and nothing can be done without it."""

    def __init__(self) -> None:
        super().__init__(LOST)


UNSIGNED = {2: mx.uint16, 4: mx.uint32}


@lru_cache(maxsize=1)
def join(kind: "type[Ranks] | None" = None) -> "Ranks | None":
    """The processes that mlx.launch started together; None if it did not, or this one alone.
    Waits for the others. kind: Ranks, or Pipeline. Raises AHNError if they cannot be reached."""
    if launched_rank() is None:
        return None
    try:
        group = mx.distributed.init()
    except RuntimeError as e:
        raise AHNError(f"the other processes of mlx.launch cannot be reached: {e}") from None
    return (kind or Ranks)(group) if group.size() > 1 else None


def share(ranks: "Ranks | None", make: Callable[[], T]) -> T:
    """Ranks.share, or what `make` makes where there is one process."""
    return make() if ranks is None else ranks.share(make)


@dataclass(frozen=True)
class Ranks:
    """This process among those that run one model. All of them call the same in the same order.

    group: of mx.distributed. stream: that takes what they tell each other; MLX's own if None.
    """

    group: mx.distributed.Group
    stream: Any = field(default=None, init=False)

    @cached_property
    def rank(self) -> int:
        return self.group.rank()

    @cached_property
    def size(self) -> int:
        return self.group.size()

    def sum(self, x: mx.array) -> mx.array:
        """Of all ranks' arrays, which have the same shape."""
        return mx.distributed.all_sum(x, group=self.group, stream=self.stream)

    def first(self, x: mx.array, root: int = 0) -> mx.array:
        """Rank 0's array, or that of `root`, whatever the others have in the same shape and
        dtype."""
        # Bit for bit: -0 and 0 make 0.
        unsigned = UNSIGNED.get(x.itemsize, x.dtype)
        bits = x.view(unsigned) if mx.issubdtype(x.dtype, mx.floating) else x
        if self.rank != root:
            # After what x is made of, as there: messages must come in the same order.
            bits = mx.depends(mx.zeros_like(bits), bits)
        return self.sum(bits).view(x.dtype)

    def any(self, fact: bool) -> bool:
        """Whether it is so on one of them."""
        return bool(self.sum(mx.array(int(fact))).item())

    def check(self) -> None:
        """Raise AHNError unless all are there. What came before from one that is not may be
        anything."""
        if self.sum(mx.array(1)).item() != self.size:
            raise Lost

    def settle(self) -> None:
        """Wait for what mlx-lm computes ahead of an answer that has ended, and for what is on its
        way. Two streams that both send would do so in another order on each rank."""
        mx.synchronize(generation_stream)

    def part(self, x: mx.array, axis: int) -> mx.array:
        """This rank's part of an array that they divide evenly."""
        return mx.contiguous(mx.split(x, self.size, axis=axis)[self.rank])

    def whole(self, x: mx.array, axis: int) -> mx.array:
        """Of the parts of all ranks, in their order, the array."""
        x = x.swapaxes(0, axis)
        return mx.distributed.all_gather(x, group=self.group, stream=self.stream).swapaxes(0, axis)

    def share(self, make: Callable[[], T], root: int = 0) -> T:
        """What rank 0 makes, or `root`, which is JSON; the others do not call `make`. Raises the
        AHNError or OSError that it raises there, and an AHNError of that on the others."""
        if self.rank != root:
            try:
                told = json.loads(self._send(b"", root))
            except ValueError:
                raise Lost from None
            if "error" in told:
                raise AHNError(told["error"])
            return told["made"]
        try:
            made = make()
        except (AHNError, OSError) as e:
            self._send(json.dumps({"error": str(e)}).encode(), root)
            raise
        # As the others get it: JSON makes lists of tuples.
        text = json.dumps({"made": made})
        self._send(text.encode(), root)
        return json.loads(text)["made"]

    def _send(self, message: bytes, root: int) -> bytes:
        size: Any = self.first(mx.array(len(message)), root).item()
        held = mx.array(np.frombuffer(message or bytes(size), dtype=np.uint8))
        return np.asarray(self.first(held, root)).tobytes()

    def spread(self, arrays: dict[str, mx.array], root: int = 0) -> Iterator[tuple[str, mx.array]]:
        """The arrays of rank 0, or of `root`, by name, one after another, on all ranks."""
        layouts: Any = self.share(
            lambda: [[k, str(x.dtype), list(x.shape)] for k, x in arrays.items()], root
        )
        for name, dtype, shape in layouts:
            kind = getattr(mx, dtype.removeprefix("mlx.core."))
            held = arrays[name] if self.rank == root else mx.zeros(shape, dtype=kind)
            yield name, self.first(held, root)

    def gathered(self, arrays: dict[str, mx.array], model: nn.Module) -> dict[str, mx.array]:
        """Of what each rank would write to a memory's file, by name, what rank 0 writes; nothing
        on the others."""
        whole: dict[str, mx.array] = {}
        for name, x in arrays.items():
            if _is_of_heads(name):
                x = self.whole(x, 1)
            elif name.endswith("trace.0"):  # a mean over heads
                x = self.sum(x) / self.size
            mx.eval(x)
            whole |= {} if self.rank else {name: x}
        return whole

    def divided(self, arrays: dict[str, mx.array], model: nn.Module) -> dict[str, mx.array]:
        """Of what rank 0 has read in a memory's file, by name, what each rank needs."""
        own = {}
        for name, x in self.spread(arrays):
            own[name] = self.part(x, 1) if _is_of_heads(name) else x
            mx.eval(own[name])
        return own

    def cut(self, model: nn.Module) -> None:
        """Leave of an augmented model, in place, what is this rank's. Its arrays are not read.
        Raises AHNError if it cannot be divided among so many."""
        _check(model, self.size)
        try:
            model.shard(self.group)
        except ValueError as e:
            raise AHNError(
                f"this model's weights cannot be divided among {self.size} ranks ({e})"
            ) from None
        for layer in model.layers:
            if isinstance(getattr(layer, "self_attn", None), AHNAttention):
                self._cut_attention(layer.self_attn)
        inner: Any = model.model
        inner.embed_tokens = self._cut_vocabulary(inner.embed_tokens, _Embedding)
        if "lm_head" in model:
            model.lm_head = self._cut_vocabulary(model.lm_head, _Head)
        model.ranks = self

    def parts(self, model: nn.Module) -> dict[str, Part]:
        """What `cut` will leave of the arrays of a model, by name, where that is a run of indices
        of one axis; nothing is said of others. It is tried on numbers in their place. Raises
        AHNError as cut."""
        shapes = copy.deepcopy(model)
        whole = _arrays(shapes)
        self.cut(shapes)
        found = {
            name: part_of(whole[name].shape, x.shape, self.rank)
            for name, x in _arrays(shapes).items()
            if name in whole
        }
        likely = {name: part for name, part in found.items() if part is not None}
        scout = copy.deepcopy(model)
        numbers = {name: _numbers(whole[name].shape, part.axis) for name, part in likely.items()}
        scout.load_weights(list(numbers.items()), strict=False)
        self.cut(scout)
        cut = _arrays(scout)
        return {n: p for n, p in likely.items() if _is_part(cut[n], p, numbers[n])}

    def _cut_attention(self, attention: AHNAttention) -> None:
        """What mlx-lm does not know of: heads' memories."""
        fit, N = attention.fit, self.size
        attention.fit = replace(fit, n_heads=fit.n_heads // N, n_kv_heads=fit.n_kv_heads // N)
        attention.n_heads, attention.n_kv_heads = attention.fit.n_heads, attention.fit.n_kv_heads

        def cut(name: str, x: mx.array) -> mx.array:
            return x if name == "o_norm.weight" else self.part(x, 0)  # one for all heads

        for module in (attention.ahn, attention.get("router")):
            if module is not None:
                module.update(tree_map_with_path(cut, module.parameters()))
        if attention.ahn.kind == "mamba2":
            attention.ahn.group = self.group

    def _cut_vocabulary(self, module: nn.Module, kind: type) -> nn.Module:
        """Rows of a matrix with one for each token; the last rank's may be fewer."""
        vocabulary = len(module.weight)
        rows = rows_of_each(vocabulary, self.size)

        def cut(x: mx.array) -> mx.array:
            x = x[self.rank * rows : (self.rank + 1) * rows]
            missing = mx.zeros((rows - len(x), *x.shape[1:]), dtype=x.dtype)
            return mx.contiguous(mx.concatenate([x, missing]))

        own = {name: cut(x) for name, x in module.items() if isinstance(x, mx.array)}
        module.update(own)
        # A subclass made on the spot keeps parameter names, and the product of packed weights.
        module.__class__ = type(kind.__name__, (kind, type(module)), {})
        module.__dict__["_rows"] = _Rows(self, vocabulary, rows)
        return module


def _arrays(model: nn.Module) -> dict[str, mx.array]:
    parameters: Any = tree_flatten(model.parameters())
    return dict(parameters)


def _numbers(shape: tuple[int, ...], axis: int) -> mx.array:
    """One for each index of an axis: all differ, or are drawn, so that no two runs are alike."""
    n = shape[axis]
    drawn = mx.random.randint(0, 256, (n,), mx.uint8, key=mx.random.key(0))
    each = drawn if n > 256 else mx.arange(n).astype(mx.uint8)
    return mx.broadcast_to(each.reshape(-1, *(1 for _ in shape[axis + 1 :])), shape)


def _is_part(cut: mx.array, part: Part, whole: mx.array) -> bool:
    whole, cut = whole.swapaxes(0, part.axis), cut.swapaxes(0, part.axis)
    held = part.stop - part.start
    same = mx.array_equal(cut[:held], whole[part.start : part.stop])
    return bool(same.item()) and not cut[held:].any().item()


def _is_of_heads(name: str) -> bool:
    """Whether the second dimension of an array in a file is that of heads."""
    return name.startswith("layers.") and not name.endswith("trace.0")


def _check(model: nn.Module, size: int) -> None:
    """Raise AHNError unless each rank gets as many heads, each with its keys and values."""
    if not hasattr(model, "shard"):
        family = getattr(model.args, "model_type", "this")
        raise AHNError(f"mlx-lm cannot divide heads of a {family} model; take --pipeline")
    for layer in model.layers:
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, AHNAttention):
            heads_of_each(attention.n_kv_heads, size)


@dataclass(frozen=True)
class _Rows:
    """Which rows of the vocabulary are a rank's: `rows` of them."""

    ranks: Ranks
    vocabulary: int
    rows: int

    def logits(self, part: mx.array) -> mx.array:
        """[..., rows] of each rank -> [..., V]."""
        whole = self.ranks.whole(part.reshape(-1, self.rows), 1)
        return whole[:, : self.vocabulary].reshape(*part.shape[:-1], -1)


class _Head:
    """Hidden states -> logits, of which each rank computes its part."""

    _rows: _Rows

    def __call__(self, x: mx.array) -> mx.array:
        return self._rows.logits(super().__call__(x))  # type: ignore[misc]


class _Embedding:
    """Ids -> vectors, each of the rank that has it."""

    _rows: _Rows

    def __call__(self, ids: mx.array) -> mx.array:
        ranks, rows = self._rows.ranks, self._rows.rows
        own = ids.astype(mx.int32) - ranks.rank * rows
        mine = (own >= 0) & (own < rows)
        x = super().__call__(mx.where(mine, own, 0))  # type: ignore[misc]
        return ranks.sum(mx.where(mine[..., None], x, mx.zeros_like(x)))

    def as_linear(self, x: mx.array) -> mx.array:
        return self._rows.logits(super().as_linear(x))  # type: ignore[misc]
