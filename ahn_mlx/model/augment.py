"""From a plain mlx-lm decoder to an AHN model.

`augment` replaces each layer's attention and gives the model `make_cache`; all else,
its forward pass included, stays mlx-lm's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.cache
import mlx_lm.utils
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import KVCache

from ..errors import AHNError
from .attention import PROJECTIONS, AHNAttention
from .cache import AHNCache
from .config import AHNConfig
from .names import rename_published

# Model files of mlx-lm whose attention is known to fit.
SUPPORTED = ("llama", "qwen2", "qwen3")

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

    def make_cache(self) -> list[AHNCache | FullCache]:
        """One cache per layer: AHNCache, or FullCache where full attention is kept."""
        full = self.ahn.fa_layer_ids
        return [
            FullCache() if i in full else AHNCache(self.ahn.window, self.ahn.sinks)
            for i in range(len(self.layers))  # type: ignore[attr-defined]
        ]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Published parameter names to ours, after the base model's own clean-up."""
        base = getattr(super(), "sanitize", dict)
        return rename_published(base(weights), self.ahn.fa_layer_ids)


def augment(model: nn.Module, config: AHNConfig) -> nn.Module:
    """Give an mlx-lm decoder a window and a memory, in place.

    New memory parameters start as in the paper's release: the output projection is
    zero, so the memory adds nothing until weights are loaded or trained.

    Raises AHNError for a model of another family or a layer that does not fit.

    >>> from mlx_lm.models import llama
    >>> args = llama.ModelArgs("llama", 32, 1, 64, 2, rms_norm_eps=1e-5, vocab_size=100)
    >>> ahn_mlx.augment(llama.Model(args), ahn_mlx.AHNConfig(window=40, sinks=4)).ahn.window
    40
    """
    family = type(model).__module__.rsplit(".", 1)[-1]
    if isinstance(model, AHNModel):
        raise AHNError("the model is an AHN model already")
    if family not in SUPPORTED:
        raise AHNError(f"model family {family!r} is not supported; use {', '.join(SUPPORTED)}")
    layers = model.layers
    absent = [i for i in config.fa_layer_ids if i >= len(layers)]
    if absent:
        raise AHNError(f"fa_layer_ids names layer {absent[0]}, but there are {len(layers)}")
    for i, layer in enumerate(layers):
        if getattr(layer, "use_sliding", False):
            raise AHNError(f"layer {i} has sliding-window attention already; use a base without")
        missing = [name for name in PROJECTIONS if name not in layer.self_attn]
        if missing:
            raise AHNError(f"the attention of layer {i} has no {missing[0]}")
    _check_rope(model)
    for i, layer in enumerate(layers):
        if i not in config.fa_layer_ids:
            layer.self_attn = AHNAttention(layer.self_attn, config, model.args.hidden_size)
    base = type(model)
    # A subclass made on the spot keeps parameter names, forward pass and sharding.
    model.__class__ = type(f"AHN{family.capitalize()}", (AHNModel, base), {})
    model.ahn = config
    return model


def _check_rope(model: nn.Module) -> None:
    """The compiled step knows positions as arrays alone; some kinds of RoPE want numbers."""
    attention = model.layers[0].self_attn  # all layers have the same
    scaling = getattr(model.args, "rope_scaling", None) or {}
    kind = scaling.get("type") or scaling.get("rope_type") or type(attention.rope).__name__
    x = mx.ones((1, 1, 1, attention.k_proj.weight.shape[0] // attention.n_kv_heads))
    places = [7, 1 << 20]
    try:
        # Traced, but not run: a machine whose compiler fails is another matter.
        mx.compile(lambda x, offset: attention.rope(x, offset=offset))(x, mx.array([7]))
        turned = attention.rope(mx.repeat(x, 2, axis=0), offset=mx.array(places))
        expected = mx.concatenate([attention.rope(x, offset=n) for n in places])
        same = mx.allclose(turned, expected, atol=1e-4).item()
    except (TypeError, ValueError, RuntimeError):
        same = False
    if not same:
        raise AHNError(
            f"rope_type {kind!r} cannot run here, it needs positions as numbers; use a base with"
            " another"
        )


def build_base(config: dict[str, Any]) -> nn.Module:
    """The plain mlx-lm model that a config.json describes, not evaluated."""
    family = config.get("model_type")
    if family not in SUPPORTED:
        raise AHNError(f"model_type {family!r} is not supported; use {', '.join(SUPPORTED)}")
    model_class, args_class = mlx_lm.utils._get_classes(config)
    try:
        return model_class(args_class.from_dict(config))
    except (TypeError, ArithmeticError, LookupError, ValueError, RuntimeError, AssertionError) as e:
        reason = f"it lacks {e}" if isinstance(e, KeyError) else e
        raise AHNError(f"config.json does not describe a {family} model: {reason}") from None


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
        if isinstance(layer.self_attn, AHNAttention):
            yield i, layer.self_attn


def head(model: nn.Module, hidden: mx.array) -> mx.array:
    """Hidden states after the final norm -> logits."""
    tied = "lm_head" not in model
    logits: mx.array = model.model.embed_tokens.as_linear(hidden) if tied else model.lm_head(hidden)
    return logits
