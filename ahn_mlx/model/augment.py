"""From a plain mlx-lm decoder to an AHN model.

`augment` replaces the attention of each layer that sees all tokens and gives the model
`make_cache`; all else, its forward pass included, stays mlx-lm's: so do layers with a window of
their own and recurrent ones, with the caches that mlx-lm gives them.
"""

import copy
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache
import mlx_lm.utils
from mlx.utils import tree_flatten
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import CacheList, KVCache

from ..errors import AHNError, show
from .attention import AHNAttention
from .cache import AHNCache
from .config import AHNConfig
from .fit import Fit, fit_of
from .names import rename_published

# What a model file of mlx-lm raises for settings that make no sense.
WRONG = (
    *(TypeError, ArithmeticError, LookupError, ValueError, RuntimeError, AssertionError),
    *(AttributeError, NotImplementedError),
)

# Of a layer's parameters, those that are not the base's.
MEMORY = ("self_attn.ahn.", "self_attn.router.")

# Parameters that stay float32 whatever the model's dtype: decays need the precision.
FLOAT32 = ("A_log", "dt_bias")


class FullCache(KVCache):
    """Of a layer that keeps full attention. Rows of different lengths would need a mask that
    no AHN layer makes, so mlx-lm is told that it cannot batch these."""

    merge = property()  # hasattr says no


# Where mlx-lm looks for the class of a cache that it has saved.
for _cache in (AHNCache, FullCache):
    setattr(mlx_lm.models.cache, _cache.__name__, _cache)


class AHNModel:
    """What an augmented model has beyond the mlx-lm model it was made from."""

    ahn: AHNConfig
    ranks: Any = None  # of ranks.Ranks, where several processes run it

    def make_cache(self) -> list[Any]:
        """One cache per layer: AHNCache; FullCache where full attention is kept; mlx-lm's own where
        a layer has another kind; and a CacheList of these where it has several."""
        full, kept = self.ahn.fa_layer_ids, set(self.kept_layers)
        caches: list[Any] = _plain_caches(super(), len(self.layers))  # type: ignore[attr-defined]
        for i, cache in enumerate(caches):
            if i not in kept:
                caches[i] = _instead(cache, AHNCache(self.ahn.window, self.ahn.sinks))
            elif i in full:
                caches[i] = _instead(cache, FullCache())
        return caches

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Layers without a memory: those of fa_layer_ids, and those that never saw all tokens."""
        layers = enumerate(self.layers)  # type: ignore[attr-defined]
        return tuple(i for i, layer in layers if not _has_memory(layer))

    @property
    def own_layers(self) -> tuple[int, ...]:
        """Layers that mlx-lm gives a cache of another kind, be it beside a memory."""
        caches = enumerate(self.make_cache())
        return tuple(i for i, cache in caches if not isinstance(cache, AHNCache | KVCache))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Published parameter names to ours, after the base model's own clean-up."""
        base = getattr(super(), "sanitize", dict)
        return rename_published(base(weights), self.ahn.fa_layer_ids)


def augment(model: nn.Module, config: AHNConfig) -> nn.Module:
    """Give an mlx-lm decoder a window and a memory, in place.

    New memory parameters start as in the paper's release: the output projection is
    zero, so the memory adds nothing until weights are loaded or trained.

    Raises AHNError for a model whose attention does something that is not known here.

    >>> from mlx_lm.models import llama
    >>> args = llama.ModelArgs("llama", 32, 1, 64, 2, rms_norm_eps=1e-5, vocab_size=100)
    >>> ahn_mlx.augment(llama.Model(args), ahn_mlx.AHNConfig(window=40, sinks=4)).ahn.window
    40
    """
    if isinstance(model, AHNModel):
        raise AHNError("the model is an AHN model already")
    family = type(model).__module__.rsplit(".", 1)[-1]
    layers, hidden = _layers(model, family)
    absent = [i for i in config.fa_layer_ids if i >= len(layers)]
    if absent:
        raise AHNError(f"fa_layer_ids names layer {absent[0]}, but there are {len(layers)}")
    caches = _plain_caches(model, len(layers))
    if len(caches) != len(layers):
        raise AHNError(
            f"model family {family!r} has {len(layers)} layers and {len(caches)} caches; a memory"
            " needs one for each"
        )
    full = [i for i, cache in enumerate(caches) if _sees_all(cache)]
    if not full:
        kinds = ", ".join(sorted({type(cache).__name__ for cache in caches}))
        raise AHNError(
            f"model family {family!r} has no layer with a key/value cache alone, only {kinds}"
        )
    made = {}
    for i in full:
        if i in config.fa_layer_ids:
            continue
        try:
            made[i] = AHNAttention(_attention(layers[i]), config, hidden)
        except AHNError as e:
            raise AHNError(f"layer {i} of model family {family!r} does not fit: {e}") from None
    _check_rope(model, list(made.values()))
    for i, attention in made.items():
        layers[i].self_attn = attention
    base = type(model)
    # A subclass made on the spot keeps parameter names, forward pass and sharding.
    model.__class__ = type(f"AHN{family.capitalize()}", (AHNModel, base), {})
    model.ahn = config
    return model


def _layers(model: nn.Module, family: str) -> tuple[list[nn.Module], int]:
    """The decoder's layers and the width of their input."""
    hidden = getattr(getattr(model, "args", None), "hidden_size", None)
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    missing = [
        name
        for name, there in (
            ("args.hidden_size", type(hidden) is int),
            ("model.layers", isinstance(layers, list) and layers),
            ("model.embed_tokens", hasattr(inner, "embed_tokens")),
        )
        if not there
    ]
    if missing:
        raise AHNError(
            f"model family {family!r} is not supported: it has no {missing[0]}, as a plain decoder"
            " has"
        )
    return layers, hidden  # type: ignore[return-value]


def _plain_caches(model: Any, layers: int) -> list[Any]:
    """What mlx-lm gives the layers of a plain model."""
    make = getattr(model, "make_cache", None)
    return list(make()) if make else [KVCache() for _ in range(layers)]


def _sees_all(cache: Any) -> bool:
    """Whether a cache is of attention to all tokens, or has one that is beside others."""
    parts = cache.caches if isinstance(cache, CacheList) else [cache]
    return [type(part) for part in parts].count(KVCache) == 1


def _instead(cache: Any, new: Any) -> Any:
    """With another cache for attention to all tokens; those beside it stay."""
    if isinstance(cache, CacheList):
        return CacheList(*(new if type(c) is KVCache else c for c in cache.caches))
    return new if type(cache) is KVCache else cache


def memory_cache(cache: Any) -> AHNCache:
    """Of a layer that has a memory, and perhaps other caches beside it."""
    parts = cache.caches if isinstance(cache, CacheList) else [cache]
    return next(part for part in parts if isinstance(part, AHNCache))


def _attention(layer: nn.Module) -> nn.Module:
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, nn.Module):
        raise AHNError("it has no self_attn")
    return attention


def _has_memory(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "self_attn", None), AHNAttention)


def _check_rope(model: nn.Module, attentions: list[AHNAttention]) -> None:
    """The compiled step knows positions as arrays alone; some kinds of RoPE want numbers."""
    scaling = getattr(model.args, "rope_scaling", None) or {}
    kinds: dict[Any, AHNAttention] = {}
    for attention in attentions:
        if attention.fit.rope is not None:
            kinds.setdefault(repr(attention[attention.fit.rope]), attention)
    for attention in kinds.values():
        rope = type(attention[attention.fit.rope]).__name__
        kind = scaling.get("type") or scaling.get("rope_type") or rope
        x = mx.ones((1, 1, 1, attention.head_dim))
        places = [7, 1 << 20]
        turn = attention.turn
        try:
            # Traced, but not run: a machine whose compiler fails is another matter.
            mx.compile(turn)(x, mx.array([7]))
            turned = turn(mx.repeat(x, 2, axis=0), mx.array(places))
            expected = mx.concatenate([turn(x, n) for n in places])
            same = mx.allclose(turned, expected, atol=1e-4).item()
        except (TypeError, ValueError, RuntimeError):
            same = False
        if not same:
            raise AHNError(
                f"rope_type {kind!r} cannot run here, it needs positions as numbers; use a base"
                " with another"
            )


def family_of(model_type: Any) -> str:
    """The model file of mlx-lm that runs a model_type; a name that it has none for stays."""
    return str(mlx_lm.utils.MODEL_REMAPPING.get(model_type, model_type))


def is_family(name: str) -> bool:
    """Whether mlx-lm has a model file of this name; a name may come from anyone."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        return False
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    if spec is None or spec.origin is None:
        return False
    return b"class ModelArgs" in Path(spec.origin).read_bytes()


def build_base(config: dict[str, Any]) -> nn.Module:
    """The plain mlx-lm model that a config.json describes, not evaluated."""
    kind = config.get("model_type")
    family = family_of(kind)
    if not is_family(family):
        raise AHNError(
            f"model_type {show(kind)} is not supported: this mlx-lm has no model of that name;"
            " ahn-mlx families lists what fits"
        )
    try:
        model_class, args_class = mlx_lm.utils._get_classes(config)
    except (ImportError, ValueError, SystemExit) as e:  # one of them leaves when it lacks a package
        raise AHNError(f"model_type {show(kind)} is not supported: {e}") from None
    try:
        return model_class(args_class.from_dict(config))
    except WRONG as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise AHNError(f"config.json does not describe a {kind} model: {reason}") from None


def build(config: dict[str, Any]) -> nn.Module:
    """The AHN model that a config.json describes, with random parameters, not evaluated."""
    ahn = AHNConfig.from_dict(config)
    return augment(build_base(config), ahn)


@dataclass
class ModelArgs(BaseModelArgs):
    """A whole config.json; `build` reads what it needs."""

    config: dict[str, Any]

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        return cls(params)


def memory_layers(model: nn.Module) -> Iterator[tuple[int, AHNAttention]]:
    """Number and attention of each layer that has a memory."""
    for i, layer in enumerate(model.layers):
        if _has_memory(layer):
            yield i, layer.self_attn


def shape_of_attention(model: nn.Module) -> Fit:
    """Of the layers with memories, or of the first layer if there are none."""
    _, first = next(memory_layers(model), (0, None))
    if first is not None:
        return first.fit
    return fit_of(_attention(model.layers[0]), model.args.hidden_size)


def dtype_of(model: nn.Module) -> mx.Dtype:
    """Of what flows through the base, whose matrices may be quantized."""
    layers = (tree_flatten(layer.parameters()) for layer in model.layers)
    parameters: Any = next(found for found in layers if found)  # of one that is here
    base = [x for name, x in parameters if not name.startswith(MEMORY)]
    # Of a norm, if there is one: scales of packed weights may have another.
    base.sort(key=lambda x: x.ndim != 1)
    return next(x.dtype for x in base if mx.issubdtype(x.dtype, mx.floating))


def hidden_states(
    model: nn.Module, ids: mx.array, cache: Any = None, layers: list[Any] | None = None
) -> mx.array:
    """ids [B, L] -> [B, L, C] after the final norm. layers: instead of the decoder's own."""
    whole, inner = copy.copy(model), copy.copy(model.model)
    inner.__class__ = _noting(inner.__class__)
    if layers is not None:
        inner.layers = layers
    whole.model = inner
    whole(ids, cache=cache)  # its logits are never computed
    hidden: mx.array = inner.__dict__["noted"]
    return hidden


def head(model: nn.Module, hidden: mx.array) -> mx.array:
    """Hidden states after the final norm -> logits, as the model itself makes them; zeros on a rank
    that makes none."""
    whole, inner = copy.copy(model), copy.copy(model.model)
    inner.__class__ = _giving(inner.__class__)
    inner.__dict__["given"], whole.model = hidden, inner
    logits: mx.array = whole(mx.zeros((1, 1), dtype=mx.int32))
    shape = (*hidden.shape[:-1], logits.shape[-1])
    return logits if logits.shape == shape else mx.zeros(shape, dtype=logits.dtype)


@lru_cache(maxsize=8)
def _noting(kind: type) -> Any:
    """A decoder that notes what it returns."""

    class Noting(kind):
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            self.__dict__["noted"] = super().__call__(*arguments, **named)
            return self.__dict__["noted"]

    return Noting


@lru_cache(maxsize=8)
def _giving(kind: type) -> Any:
    """A decoder that returns what was given to it."""

    class Giving(kind):
        def __call__(self, *_: Any, **__: Any) -> Any:
            return self.__dict__["given"]

    return Giving
