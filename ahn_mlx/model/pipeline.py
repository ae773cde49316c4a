"""Layers in runs: each rank has some that follow each other, and passes on what comes out of them.

For slow links, and for models that no single machine holds. It works for any decoder whose layers
are called one after the other: layers of other ranks are replaced by ones that let their input
through, and the two beside a rank's own receive and send. mlx-lm's own pipelines, which some
families have, write to a cache that has keys, and gather all hidden states of a prompt.

As there, the last layers are on rank 0, which has the logits. What a rank sends is on its way while
the rank goes on with the next tokens: a prompt's steps are in flight, and all ranks work at once.
"""

import copy
from collections import deque
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AHNError
from .cache import AHNCache
from .division import layers_of_each

# Messages on their way at a time; each is the hidden states of one step.
IN_FLIGHT = 2

# One stream for all messages: between two ranks they come in the order in which they were sent.
_stream = mx.new_thread_local_stream(mx.cpu)


class AwayCache(AHNCache):
    """Of a layer that another rank runs: it counts tokens, and keeps nothing."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "AwayCache":
        """As AHNCache has it."""
        settings = super().to_quantized(group_size, bits)
        other = copy.copy(self)
        other.bits, other.group_size = settings.bits, settings.group_size
        return other


class Link:
    """The neighbours of a rank. What comes over it has the width and dtype that its layers make."""

    def __init__(self, group: mx.distributed.Group, boundaries: dict[int, tuple[int, mx.Dtype]]):
        self.group, self.boundaries = group, boundaries
        self._sent: deque[mx.array] = deque()

    def send(self, x: mx.array) -> None:
        """Pass on hidden states [B, L, C]. It returns at once, unless too many are on their way."""
        while len(self._sent) >= IN_FLIGHT:
            mx.eval(self._sent.popleft())
        sent = mx.distributed.send(x, self.group.rank() - 1, group=self.group, stream=_stream)
        mx.async_eval(sent)
        self._sent.append(sent)

    def receive(self, layer: int, like: mx.array) -> mx.array:
        """What came out of a layer of the rank before, for the same tokens."""
        width, dtype = self.boundaries[layer]
        shape, source = (*like.shape[:2], width), self.group.rank() + 1
        x = mx.distributed.recv(shape, dtype, source, group=self.group, stream=_stream)
        mx.async_eval(x)  # each call takes one message, whatever becomes of it
        return x


class _Around(nn.Module):
    """A layer that stands for another, whose parameters are not its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        # A model file asks its layers whether they are local, and the like.
        return getattr(self.__dict__["layer"], name)


class _Away(_Around):
    """A layer of another rank: it lets its input through. does: "", "send" or "receive"."""

    def __init__(self, layer: nn.Module, number: int, link: Link, does: str):
        super().__init__(layer)
        self.__dict__.update(number=number, link=link, does=does)

    def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
        for cache in (*arguments, *named.values()):
            if isinstance(cache, AwayCache):
                cache.offset += x.shape[1]
            elif hasattr(cache, "update_and_fetch"):  # it makes masks for others
                nothing = mx.zeros((x.shape[0], 1, x.shape[1], 1), dtype=x.dtype)
                cache.update_and_fetch(nothing, nothing)
        if self.does == "receive":
            return self.link.receive(self.number, x)
        if self.does == "send":
            self.link.send(x)
        return x


class _NoEmbedding(_Around):
    """Of a rank that receives what others made of the tokens."""

    def __init__(self, layer: nn.Module, width: int, dtype: mx.Dtype):
        super().__init__(layer)
        self.__dict__.update(width=width, dtype=dtype)

    def __call__(self, ids: mx.array) -> mx.array:
        return mx.zeros((*ids.shape, self.width), dtype=self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return x


class _NoHead(_Around):
    """Of a rank that makes no logits."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class PipelinedModel:
    """What a model has beyond an AHN model once its layers are on several ranks.

    whole: the model as it was, all layers; nothing of other ranks' is ever computed. run: the
    layers of this rank.
    """

    whole: nn.Module
    run: range

    def __call__(self, ids: mx.array, *arguments: Any, **named: Any) -> mx.array:
        logits: mx.array = super().__call__(ids, *arguments, **named)  # type: ignore[misc]
        if self.run.stop == len(self.layers):  # type: ignore[attr-defined]
            return logits
        width, dtype = self._logits  # type: ignore[attr-defined]
        return mx.zeros((*ids.shape, width), dtype=dtype)

    def make_cache(self) -> list[Any]:
        """As AHNModel has it, with AwayCaches for layers of other ranks."""
        caches: list[Any] = super().make_cache()  # type: ignore[misc]
        return [
            AwayCache(cache.window, cache.sinks)
            if isinstance(cache, AHNCache) and i not in self.run
            else cache
            for i, cache in enumerate(caches)
        ]


def pipeline(model: nn.Module, group: mx.distributed.Group) -> None:
    """Leave a model the layers of this rank, in place. Its tensors must not be read yet: those of
    other ranks never are. Raises AHNError if its layers are not one after the other."""
    run = layers_of_each(len(model.layers), group.size())[group.rank()]
    boundaries, logits = _boundaries(model)
    whole = copy.copy(model)
    whole.model = copy.copy(model.model)
    whole.model.layers = layers = list(model.model.layers)
    link = Link(group, boundaries)
    does = {run.start - 1: "receive", run.stop: "send"}
    model.model.layers = [
        layer if i in run else _Away(layer, i, link, does.get(i, ""))
        for i, layer in enumerate(layers)
    ]
    first, last = run.start == 0, run.stop == len(layers)
    own_head = "lm_head" in model
    if not first and (own_head or not last):
        width, dtype = boundaries[-1]
        model.model.embed_tokens = _NoEmbedding(model.model.embed_tokens, width, dtype)
    if own_head and not last:
        model.lm_head = _NoHead(model.lm_head)
    base = type(model)
    model.__class__ = type(base.__name__, (PipelinedModel, base), {})
    model.__dict__.update(whole=whole, run=run, link=link, _logits=(logits.shape[-1], logits.dtype))


class _Watched(_Around):
    """A layer that notes what it is given and what it makes."""

    def __init__(self, layer: nn.Module, seen: list[Any]):
        super().__init__(layer)
        self.__dict__["seen"] = seen

    def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> Any:
        others = [a for a in (*arguments, *named.values()) if isinstance(a, mx.array)]
        made = self.layer(x, *arguments, **named)
        self.seen.append((x, [a for a in others if mx.issubdtype(a.dtype, mx.floating)], made))
        return made


def _boundaries(model: nn.Module) -> tuple[dict[int, tuple[int, mx.Dtype]], mx.array]:
    """Width and dtype of what comes out of each layer, and as -1 out of the embedding; and logits
    of one token. Nothing is computed."""
    family = type(model).__mro__[1].__module__
    inner, whole = copy.copy(model.model), copy.copy(model)
    seen: list[Any] = []
    inner.layers = [_Watched(layer, seen) for layer in model.model.layers]
    whole.model = inner
    logits = whole(mx.zeros((1, 1), dtype=mx.int32), cache=model.make_cache())
    found: dict[int, tuple[int, mx.Dtype]] = {}
    x = None
    for i, (given, others, made) in enumerate(seen):
        if (x is not None and given is not x) or others or not isinstance(made, mx.array):
            raise AHNError(
                f"layers of model family {family.rsplit('.', 1)[-1]!r} take more than what the"
                " layer before them made; drop --pipeline"
            )
        if x is None:
            found[-1] = given.shape[-1], given.dtype
        found[i], x = (made.shape[-1], made.dtype), made
    return found, logits
