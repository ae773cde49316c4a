"""What a memory file must be like: which facts, which arrays, of what shapes and dtypes.

A file may come from anyone, and a right checksum says only that its writer could count. What
is expected is asked of the model's own caches, which run one token and compute nothing, and is
compared with the file's header before MLX reads an array. What differs is a ValueError that
says so; the caller adds the name of the file.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ..checkpoints.safetensors import DTYPES, FLOATS, MAX_DIM, WRITTEN, not_finite
from ..errors import show
from ..model.cache import AHNCache, grown_to, unpack
from ..model.trace import BLOCK

PREVIEW = 200  # characters
TURNS = ("start", "read", "answered", "cut")
MAX_STEP = 1 << 16  # tokens read at a time
MAX_TOKENS = 1 << 30  # MLX counts positions in int32
MAX_ANSWER = 1 << 24  # tokens, which are not traced
KV_BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)

Cache = AHNCache | KVCache


def make_caches(model: nn.Module, kv_bits: int | None = None, group_size: int = 64) -> list[Cache]:
    """Empty ones of each layer. Only windows are quantized, not full attention."""
    caches: list[Cache] = model.make_cache()
    if kv_bits is None:
        return caches
    return [c.to_quantized(group_size, kv_bits) if isinstance(c, AHNCache) else c for c in caches]


def held(cache: Cache) -> tuple[mx.array, ...]:
    """Keys, values and, of a window, gates; each of the first two three arrays if quantized."""
    if isinstance(cache, AHNCache):
        return cache.buffers or ()
    keys, values = cache.keys, cache.values
    return () if keys is None or values is None else (keys, values)


# Facts


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    # type() and not isinstance(): true is an int in Python
    return lambda value: type(value) is int and low <= value <= high


def _text(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= limit and _encodes(value)


def _encodes(value: str, encode: Callable[[str], bytes] = str.encode) -> bool:
    try:
        return b"\0" not in encode(value)
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _is_model(value: Any) -> bool:
    """Its name, perhaps a path, and how it was loaded."""
    if not isinstance(value, dict):
        return False
    name = value.get("name")
    paths = (name, value.get("ahn") or "")
    named = all(isinstance(x, str) and len(x) <= 4096 and _encodes(x, os.fsencode) for x in paths)
    loaded = value.get("dtype") in (None, *DTYPES)
    return named and loaded and value.get("q_bits") in (None, "0", "4", "8", 0, 4, 8)


def _is_layer(value: Any) -> bool:
    """[offset, window, sinks, kv_bits, group_size], or [offset] where attention is full."""
    if not isinstance(value, list) or len(value) not in (1, 5):
        return False
    if not all(type(n) is int or (i, n) == (3, None) for i, n in enumerate(value)):
        return False
    return len(value) == 1 or (value[3] in (None, *KV_BITS) and value[4] in GROUP_SIZES)


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 1000 and all(map(_is_layer, value))


def _are_pieces(value: Any) -> bool:
    """What a template puts before a text."""
    return isinstance(value, list | tuple) and all(map(_text(1 << 20), value))


# What a session says of itself.
FACTS: dict[str, Callable[[Any], bool]] = {
    "model": _is_model,
    "tokenizer": _text(64),
    "tokens": _whole(0, MAX_TOKENS),
    "window": _whole(1, 1 << 62),
    "sinks": _whole(0, 1 << 62),
    "step": _whole(1, MAX_STEP),
    "turn": TURNS.__contains__,
    "chat": lambda value: isinstance(value, bool),
    "system": _text(1 << 20),
    "preview": _text(PREVIEW),
    "saved": _whole(0, 1 << 53),
    "layers": _are_layers,
}
# What `digest` adds of a text that is not all read.
OPTIONAL = {"job": _text(64), "done": _whole(0, MAX_TOKENS), "opening": _are_pieces}


def check_facts(facts: Mapping[str, Any]) -> None:
    """Each is there, of its type and in its range."""
    for name, fits in {**FACTS, **OPTIONAL}.items():
        if name in facts and not fits(facts[name]):
            raise ValueError(f"its {name} is {show(facts[name])}")
        if name not in facts and name in FACTS:
            raise ValueError(f"it does not say its {name}")
    if ("job" in facts) != ("done" in facts):
        raise ValueError("it says either job or done, not both")
    if facts["system"] and not facts["chat"]:
        raise ValueError("it says a system message and that there is no chat")


# Arrays


class Wanted(NamedTuple):
    """Allowed dtypes, as a file names them, and sizes of each dimension."""

    dtypes: tuple[str, ...]
    shape: tuple[range, ...]

    def __str__(self) -> str:
        sizes = (f"{r[0]}" if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in self.shape)
        return f"{' or '.join(self.dtypes)} [{', '.join(sizes)}]"


def exactly(n: int) -> range:
    return range(n, n + 1)


ANY = range(1, MAX_DIM + 1)


# Dtype, as a file names it, and shape.
Found = tuple[str, tuple[int, ...]]


class Kept(NamedTuple):
    """What a layer keeps, whatever the number of tokens. heads: H, of its memory. width: D.
    buffers: of one token each."""

    heads: range
    width: range
    buffers: tuple[Wanted, ...]


def of_model(model: nn.Module, facts: Mapping[str, Any]) -> list[Kept]:
    """Of each layer, as this model makes it. Raises ValueError if bits or layers do not fit."""
    full = {i for i, layer in enumerate(facts["layers"]) if len(layer) == 1}
    if full != set(model.ahn.fa_layer_ids) or len(facts["layers"]) != len(model.layers):
        raise ValueError("its layers are not this model's")
    kv_bits, group_size = _quantized(facts)
    caches = make_caches(model, kv_bits, group_size)
    try:
        model(mx.zeros((1, 1), dtype=mx.uint32), cache=caches)  # never evaluated
    except ValueError as e:
        raise ValueError(f"keys and values of {kv_bits} bits do not fit this model ({e})") from None
    kept = []
    for layer, cache in zip(model.layers, caches, strict=True):
        buffers = held(cache)
        plain = unpack(buffers, *_quantized(facts)) if isinstance(cache, AHNCache) else buffers
        wanted = tuple(Wanted((WRITTEN[x.dtype],), tuple(map(exactly, x.shape))) for x in buffers)
        kept.append(Kept(exactly(layer.self_attn.n_heads), exactly(plain[0].shape[-1]), wanted))
    return kept


def of_any_model(facts: Mapping[str, Any]) -> list[Kept]:
    """Of each layer, as far as that can be told without the model."""
    one = (exactly(1), ANY, ANY, ANY)
    plain, code = Wanted(FLOATS, one), Wanted(("U32",), one)
    stored = (plain,) if _quantized(facts)[0] is None else (code, plain, plain)
    return [
        Kept(ANY, ANY, (plain, plain) if len(layer) == 1 else (*stored, *stored, plain))
        for layer in facts["layers"]
    ]


def _quantized(facts: Mapping[str, Any]) -> tuple[int | None, int]:
    """Bits and group size of the first layer with a window; no others are allowed."""
    return next((tuple(layer[3:]) for layer in facts["layers"] if len(layer) > 1), (None, 64))


def expected(facts: Mapping[str, Any], pending: int, kept: list[Kept]) -> dict[str, Wanted]:
    """All arrays of a memory with these facts, by name. pending: tokens not yet read.

    Raises ValueError if the numbers of a layer do not fit the others.
    """
    window, sinks, step = facts["window"], facts["sinks"], facts["step"]
    offset, capacity = facts["tokens"] - pending, window + sinks
    arrays = {"pending": Wanted(("U32",), (exactly(pending),))}
    for i, (layer, (heads, width, buffers)) in enumerate(zip(facts["layers"], kept, strict=True)):
        right = [offset, window, sinks, *_quantized(facts)] if len(layer) > 1 else [offset]
        if layer != right or offset < 0:
            raise ValueError(f"layer {i} says {show(layer)}, where {show(right)} is right")
        name = f"layers.{i}."
        # MLX-LM's cache has room for what came last, and grows in steps of its own.
        slots = range(offset, offset + step + KVCache.step)
        if len(layer) > 1:
            slots = exactly(grown_to(min(offset, capacity), capacity))
            traced = max(0, offset - window - MAX_ANSWER), max(0, offset - window)
            blocks = range(-(-traced[0] // BLOCK), -(-traced[1] // BLOCK) + 1)
            arrays[name + "trace.0"] = Wanted(("F32",), (exactly(2), blocks))
            arrays[name + "trace.1"] = Wanted(("F32",), (exactly(3), heads))
            if offset > capacity:
                arrays[name + "memory"] = Wanted(("F32",), (exactly(1), heads, width, width))
        for j, (dtypes, (rows, held, _, across)) in enumerate(buffers if offset else ()):
            arrays[f"{name}{j}"] = Wanted(dtypes, (rows, held, slots, across))
    return arrays


def check_arrays(found: Mapping[str, Found], facts: Mapping[str, Any], kept: list[Kept]) -> None:
    """Names, dtypes and shapes, whole numbers among the facts too."""
    _compare("pending", found, Wanted(("U32",), (range(facts["step"]),)))
    wanted = expected(facts, found["pending"][1][0], kept)
    for name in sorted(found.keys() - wanted.keys()):
        raise ValueError(f"array {show(name)} belongs to no memory like this")
    for name in wanted:
        _compare(name, found, wanted[name])


def _compare(name: str, found: Mapping[str, Found], wanted: Wanted) -> None:
    if name not in found:
        raise ValueError(f"array {name} is missing")
    (dtype, shape), sizes = found[name], wanted.shape
    fits = len(shape) == len(sizes) and all(n in r for n, r in zip(shape, sizes, strict=True))
    if dtype not in wanted.dtypes or not fits:
        raise ValueError(f"array {name} is {dtype} {list(shape)}, not {wanted}")


def check_values(
    arrays: Mapping[str, mx.array], facts: Mapping[str, Any], vocabulary: int | None
) -> None:
    """No NaN or infinity; ids that the model has, if its vocabulary is given; traces of such a
    text. Shapes and dtypes have been checked."""
    if name := not_finite(arrays.items()):
        raise ValueError(f"array {name} holds NaN or infinity")
    pending = np.asarray(arrays["pending"])
    if vocabulary is not None and (pending >= vocabulary).any():
        raise ValueError(f"token {pending.max()} waits to be read, of {vocabulary} that there are")
    evicted = facts["tokens"] - len(pending) - facts["window"] - facts["sinks"]
    traces = {
        i: [np.asarray(arrays[f"layers.{i}.trace.{j}"]) for j in (0, 1)]
        for i, layer in enumerate(facts["layers"])
        if len(layer) > 1
    }
    for i, (strengths, heads) in traces.items():
        if (strengths < 0).any() or (heads < 0).any():
            raise ValueError(f"the trace of layer {i} has negative sums")
        counts, first = strengths[1], next(iter(traces.values()))[0][1]
        counted = (counts == np.round(counts)).all() and (counts <= BLOCK).all()
        total = int(counts.sum(dtype=float))
        if not counted or not (counts.size > 0) <= total <= max(0, evicted):
            raise ValueError(f"the trace of layer {i} counts other tokens than were written")
        if not np.array_equal(counts, first):
            raise ValueError(f"the trace of layer {i} is of another text than the first")
