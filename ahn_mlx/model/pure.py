"""The whole model as one pure function of arrays, for hosts that are not Python: tokens,
positions and state in, logits and state out. mx.export_function writes it."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import AHNError
from ..ops.ring import Place, place
from .augment import dtype_of, head, hidden_states, memory_layers
from .cache import PureCache
from .slots import Rows, pack

# Arrays of one layer: keys, values, gates, the three of what leaves next, memory.
PER_LAYER = 7

Step = Callable[..., tuple[mx.array, ...]]


def initial_state(model: nn.Module, rows: int = 1) -> list[mx.array]:
    """Of a model that has read nothing: for each layer, keys and values [B, Hkv, W + S, D],
    gates [B, H, W + S, G], the slot of each that leaves next, memory [B, H, D, D] float32.

    Raises AHNError for a model with layers that keep full attention: they have no fixed size.
    """
    if odd := sorted({*model.kept_layers, *model.own_layers}):
        layers = ", ".join(map(str, odd))
        why = (
            "have a cache of mlx-lm's own"
            if model.own_layers
            else "keep full attention (fa_layer_ids), whose cache grows"
        )
        raise AHNError(f"layers {layers} {why}; a pure step has a state of fixed size")
    state: list[mx.array] = []
    dtype = dtype_of(model)
    for _, attention in memory_layers(model):
        H, D = attention.n_heads, attention.head_dim
        for slots in (model.ahn.capacity, 1):
            kv = mx.zeros((rows, attention.n_kv_heads, slots, D), dtype=dtype)
            gates = mx.zeros((rows, H, slots, attention.ahn.gate_count), dtype=dtype)
            state += pack(kv, kv, gates, None, 0)
        state.append(mx.zeros((rows, H, D, D)))
    return state


def pure_step(model: nn.Module, last: bool = False) -> Step:
    """step(ids, at, count, *state, **weights) -> (logits, *state).

    ids: [B, L] int32, L <= W, of which the first count[b] are read, the others are padding.
    at: [B] int32, tokens that each row has read before. count: [B] int32; for L = 1 it is 1.
    weights: the model's parameters by name, for a function whose file holds none; the model is
    then left with those. logits: [B, L, V], or with `last` [B, V], of the last token read.
    Raises AHNError as initial_state does.
    """
    window, sinks = model.ahn.window, model.ahn.sinks
    layers = len(initial_state(model)) // PER_LAYER

    def step(
        ids: mx.array, at: mx.array, count: mx.array, *state: mx.array, **weights: mx.array
    ) -> tuple[mx.array, ...]:
        model.update(tree_unflatten(list(weights.items())))
        L = ids.shape[1]
        here = place(at, None if L == 1 else count, L, window + sinks, window, sinks)
        caches = [
            _cache(model, here, state[n * PER_LAYER : (n + 1) * PER_LAYER]) for n in range(layers)
        ]
        if last:
            hidden = hidden_states(model, ids, caches)
            if L > 1:
                hidden = mx.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)
            logits = head(model, hidden)[:, 0]
        else:
            logits = model(ids, cache=caches)
        return logits, *(x for cache in caches for x in _flat(cache.rows))

    return step


def _cache(model: nn.Module, here: Place, state: tuple[mx.array, ...]) -> PureCache:
    *held, memory = state
    rows = Rows(tuple(held[:3]), tuple(held[3:]), memory)
    return PureCache(model.ahn.window, model.ahn.sinks, here, rows)


def _flat(rows: Rows) -> tuple[Any, ...]:
    return *rows.buffers, *rows.leaving, rows.memory
