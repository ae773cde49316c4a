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
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import AHNError
from .cache import AHNCache
from .division import Part, layers_of_each
from .ranks import Ranks

# Messages on their way at a time; each is the hidden states of one step.
IN_FLIGHT = 2

# Calls of `any` of which one is asked of all.
TOGETHER = 8

# One stream for all messages: between two ranks they come in the order in which they were sent.
_stream = mx.new_thread_local_stream(mx.cpu)


class Pipeline(Ranks):
    """Ranks that have layers, and not heads."""

    _sent: deque[mx.array]
    _facts: list[bool]

    def __init__(self, group: mx.distributed.Group):
        super().__init__(group)
        vars(self).update(stream=_stream, _sent=deque(), _facts=[])

    def send(self, x: mx.array) -> None:
        """Pass on hidden states [B, L, C]. It returns at once, unless too many are on their way."""
        while len(self._sent) >= IN_FLIGHT:
            mx.eval(self._sent.popleft())
        sent = mx.distributed.send(x, self.rank - 1, group=self.group, stream=_stream)
        mx.async_eval(sent)
        self._sent.append(sent)

    def receive(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """What the rank before passes on."""
        x = mx.distributed.recv(shape, dtype, self.rank + 1, group=self.group, stream=_stream)
        mx.async_eval(x)  # each call takes one message, whatever becomes of it
        return x

    def any(self, fact: bool) -> bool:
        """Whether it is so, or was, on one of them. Only now and then, since they wait for each
        other there."""
        self._facts.append(fact)
        if len(self._facts) < TOGETHER:
            return False
        found = super().any(any(self._facts))
        self._facts.clear()
        return found

    def settle(self) -> None:
        """As Ranks has it."""
        super().settle()
        mx.synchronize(_stream)

    def gathered(self, arrays: dict[str, mx.array], model: nn.Module) -> dict[str, mx.array]:
        """As Ranks has it."""
        own = {name: x for name, x in arrays.items() if _layer(name) in model.run}
        whole = {name: x for name, x in arrays.items() if _layer(name) is None}
        for root in reversed(range(self.size)):
            for name, x in self.spread(own if self.rank == root else {}, root):
                mx.eval(x)
                whole |= {} if self.rank else {name: x}
        return {} if self.rank else whole

    def divided(self, arrays: dict[str, mx.array], model: nn.Module) -> dict[str, mx.array]:
        """As Ranks has it."""
        own = {}
        for name, x in self.spread(arrays):
            mx.eval(x)
            layer = _layer(name)
            if layer is None or layer in model.run:
                own[name] = x
            elif layer in model.ahn.fa_layer_ids:  # its cache counts tokens by what it holds
                own[name] = mx.contiguous(x[:, :1, :, :1])
        return own

    def parts(self, model: nn.Module) -> dict[str, Part]:
        """None: what a layer has is whole."""
        return {}

    def cut(self, model: nn.Module) -> None:
        """As Ranks has it. Raises AHNError also if layers are not one after the other."""
        run = layers_of_each(len(model.layers), self.size)[self.rank]
        made, logits = _watched(model)
        whole = copy.copy(model)
        whole.model = copy.copy(model.model)
        layers = whole.model.layers = list(model.model.layers)
        model.model.layers = [
            layer if i in run else _Away(layer, self, made[i], _duty(i, run))
            for i, layer in enumerate(layers)
        ]
        first, last = run.start == 0, run.stop == len(layers)
        if not first and ("lm_head" in model or not last):
            model.model.embed_tokens = _NoEmbedding(model.model.embed_tokens, made[-1])
        if "lm_head" in model and not last:
            model.lm_head = _NoHead(model.lm_head)
        base = type(model)
        model.__class__ = type(base.__name__, (PipelinedModel, base), {})
        vars(model).update(entire=whole, run=run, _logits=logits)
        model.ranks = self


def entire(model: nn.Module) -> nn.Module:
    """The model with all layers, of which nothing may be computed if it is a rank's part."""
    return vars(model).get("entire", model)


def own_layers(model: nn.Module) -> range:
    """The numbers of a model's layers, or of a rank's if it has a run of them."""
    return vars(model).get("run", range(len(model.layers)))


def is_away(layer: nn.Module) -> bool:
    """Whether it stands for a layer of another rank."""
    return isinstance(layer, _Away)


def _layer(name: str) -> int | None:
    """Which layer an array in a memory's file is of."""
    head, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if head == "layers" else None


def _duty(layer: int, run: range) -> str:
    """What a layer of another rank does beside a run."""
    return {run.start - 1: "receive", run.stop: "send"}.get(layer, "")


class Made(NamedTuple):
    """What comes out of a layer: its width and dtype."""

    width: int
    dtype: mx.Dtype


class _Around(nn.Module):
    """A layer that stands for another, whose parameters are not its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        vars(self)["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        # A model file asks its layers whether they are local, and the like.
        if "layer" not in vars(self):  # a copy that is being made
            raise AttributeError(name)
        return getattr(vars(self)["layer"], name)


class _Away(_Around):
    """A layer of another rank: it lets its input through, and counts tokens in its cache. duty:
    "", "send" or "receive"."""

    def __init__(self, layer: nn.Module, ranks: Pipeline, made: Made, duty: str):
        super().__init__(layer)
        vars(self).update(ranks=ranks, made=made, duty=duty)

    def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
        B, L, _ = x.shape
        for cache in (*arguments, *named.values()):
            if isinstance(cache, AHNCache):
                cache.offset += L
            elif hasattr(cache, "update_and_fetch"):  # masks of others may be made by it
                nothing = mx.zeros((B, 1, L, 1), dtype=x.dtype)
                cache.update_and_fetch(nothing, nothing)
        if self.duty == "receive":
            return self.ranks.receive((B, L, self.made.width), self.made.dtype)
        if self.duty == "send":
            self.ranks.send(x)
        return x


class _NoEmbedding(_Around):
    """Of a rank that receives what others made of the tokens."""

    def __init__(self, layer: nn.Module, made: Made):
        super().__init__(layer)
        vars(self).update(made=made)

    def __call__(self, ids: mx.array) -> mx.array:
        return mx.zeros((*ids.shape, self.made.width), dtype=self.made.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits, which rank 0 alone makes."""
        return x


class _NoHead(_Around):
    """Of a rank that makes no logits."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


class PipelinedModel:
    """What a model has beyond an AHN model once its layers are on several ranks.

    run: the layers of this rank. entire: the model with all, of which nothing may be computed.
    """

    run: range
    entire: nn.Module
    _logits: Made

    def __call__(self, ids: mx.array, *arguments: Any, **named: Any) -> mx.array:
        """As of the whole model on rank 0; zeros, which cost nothing, on the others."""
        logits: mx.array = super().__call__(ids, *arguments, **named)  # type: ignore[misc]
        if self.run.stop == len(self.layers):  # type: ignore[attr-defined]
            return logits
        return mx.zeros((*ids.shape, self._logits.width), dtype=self._logits.dtype)


class _Watched(_Around):
    """A layer that notes what it is given and what it makes."""

    def __init__(self, layer: nn.Module, seen: list[Any]):
        super().__init__(layer)
        vars(self).update(seen=seen)

    def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> Any:
        others = [a for a in (*arguments, *named.values()) if isinstance(a, mx.array)]
        made = self.layer(x, *arguments, **named)
        self.seen.append((x, [a for a in others if mx.issubdtype(a.dtype, mx.floating)], made))
        return made


def _watched(model: nn.Module) -> tuple[dict[int, Made], Made]:
    """What comes out of each layer, and as -1 out of the embedding; and logits. Nothing is
    computed. Raises AHNError if a layer takes more than what came out of the one before it."""
    inner, whole = copy.copy(model.model), copy.copy(model)
    seen: list[Any] = []
    inner.layers = [_Watched(layer, seen) for layer in model.model.layers]
    whole.model = inner
    logits = whole(mx.zeros((1, 1), dtype=mx.int32), cache=model.make_cache())
    found: dict[int, Made] = {}
    x = None
    for i, (given, others, made) in enumerate(seen):
        if (x is not None and given is not x) or others or not isinstance(made, mx.array):
            kind = getattr(model.args, "model_type", "this")
            raise AHNError(f"layers of a {kind} model are not one after the other; drop --pipeline")
        if x is None:
            found[-1] = Made(given.shape[-1], given.dtype)
        found[i], x = Made(made.shape[-1], made.dtype), made
    return found, Made(logits.shape[-1], logits.dtype)
