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

from ..checkpoints.safetensors import DTYPES, FLOATS, WRITTEN, not_finite
from ..errors import show
from ..model.cache import AHNCache, grown_to, unpack
from ..model.config import PUBLISHED_NAMES
from ..model.pipeline import entire
from ..model.trace import BLOCK
from ..ops.ring import stay
from . import own
from .caches import each, held, make_caches
from .shapes import ANY, Found, Wanted, compare, exactly

PREVIEW = 200  # characters
NAME = 200  # characters of a text's name
MAX_TEXTS = 100  # that are listed
MAX_SPACE = 1 << 16  # characters
TURNS = ("start", "read", "answered", "cut")
MAX_STEP = 1 << 16  # tokens read at a time
MAX_TOKENS = 1 << 30  # MLX counts positions in int32
MAX_ANSWER = 1 << 24  # tokens, which are not traced
KV_BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)

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
    """[offset, window, sinks, kv_bits, group_size], or [offset] where attention is full; or what
    own.py has of caches that are mlx-lm's own."""
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], str):
        return own.is_entry(value)
    if len(value) not in (1, 5):
        return False
    if not all(type(n) is int or (i, n) == (3, None) for i, n in enumerate(value)):
        return False
    return len(value) == 1 or (value[3] in (None, *KV_BITS) and value[4] in GROUP_SIZES)


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 1000 and all(map(_is_layer, value))


def _is_base(value: Any) -> bool:
    """Dtype of a model's norms and bits of its quantized weights."""
    return (
        isinstance(value, dict)
        and value.keys() >= {"dtype", "bits"}
        and value["dtype"] in list(DTYPES)
        and (value["bits"] is None or (type(value["bits"]) is int and value["bits"] in KV_BITS))
    )


def _is_read(value: Any) -> bool:
    """A text: its name, when it was read, how many tokens it was."""
    parts = {"name": _text(NAME), "read": _whole(0, 1 << 53), "tokens": _whole(0, MAX_TOKENS)}
    return isinstance(value, dict) and all(fits(value.get(k)) for k, fits in parts.items())


def _are_read(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_TEXTS and all(map(_is_read, value))


def _are_pieces(value: Any) -> bool:
    """What a template puts before a text."""
    return isinstance(value, list | tuple) and all(map(_text(1 << 20), value))


# What a session says of itself.
FACTS: dict[str, Callable[[Any], bool]] = {
    "model": _is_model,
    "tokenizer": _text(64),
    "tokens": _whole(0, MAX_TOKENS),
    "window": _whole(1, MAX_TOKENS),
    "sinks": _whole(0, MAX_TOKENS),
    "step": _whole(1, MAX_STEP),
    "turn": TURNS.__contains__,
    "chat": lambda value: isinstance(value, bool),
    "system": _text(1 << 20),
    "preview": _text(PREVIEW),
    "saved": _whole(0, 1 << 53),
    "layers": _are_layers,
}
# What files of version 1 do not say.
SINCE_2: dict[str, Callable[[Any], bool]] = {
    "memory": list(PUBLISHED_NAMES.values()).__contains__,
    "base": _is_base,
    "texts": _are_read,
}
# The last three are what `digest` adds of a text that is not all read.
OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "earlier": _whole(0, 1 << 53),
    "space": _text(MAX_SPACE),
    "job": _text(64),
    "done": _whole(0, MAX_TOKENS),
    "opening": _are_pieces,
}


def kind_of(layer: list[Any]) -> str:
    """What an entry of `layers` is of: "full", "window", or a cache of mlx-lm's own."""
    return layer[0] if isinstance(layer[0], str) else "full" if len(layer) == 1 else "window"


def version_of(layers: list[list[Any]]) -> int:
    """The first version of the format that has such layers."""
    return 3 if any(isinstance(layer[0], str) for layer in layers) else 2


def tokens_of(layer: list[Any]) -> int:
    """B, tokens at the last full step."""
    return int(layer[1] if isinstance(layer[0], str) else layer[0])


def check_facts(facts: Mapping[str, Any]) -> None:
    """Each is there, of its type and in its range."""
    required = FACTS if facts["version"] == 1 else {**FACTS, **SINCE_2}
    for name, fits in {**FACTS, **SINCE_2, **OPTIONAL}.items():
        if name in facts and not fits(facts[name]):
            raise ValueError(f"its {name} is {show(facts[name])}")
        if name not in facts and name in required:
            raise ValueError(f"it does not say its {name}")
    if ("job" in facts) != ("done" in facts):
        raise ValueError("it says either job or done, not both")
    if facts["version"] != 1 and facts["version"] != version_of(facts["layers"]):
        raise ValueError(f"its layers are not of version {facts['version']}")
    if facts["system"] and not facts["chat"]:
        raise ValueError("it says a system message and that there is no chat")


# Arrays


SEEN = "seen"  # one bit for each token of the vocabulary; files of before have none


class Kept(NamedTuple):
    """What a layer keeps, whatever the number of tokens. heads: H, of its memory. width: D.
    buffers: of one token each."""

    heads: range
    width: range
    buffers: tuple[Wanted, ...]


def of_model(model: nn.Module, facts: Mapping[str, Any]) -> list[Kept]:
    """Of each layer, as this model makes it. Raises ValueError if bits or layers do not fit."""
    model = entire(model)
    kv_bits, group_size = _quantized(facts)
    caches = make_caches(model, kv_bits, group_size)
    kinds = [_kind_of_cache(cache) for cache in each(caches)]
    if kinds != [kind_of(layer) for layer in facts["layers"]]:
        raise ValueError("its layers are not this model's")
    try:
        model(mx.zeros((1, 1), dtype=mx.uint32), cache=caches)  # never evaluated
    except ValueError as e:
        raise ValueError(f"keys and values of {kv_bits} bits do not fit this model ({e})") from None
    kept, ranks = [], 1 if model.ranks is None else model.ranks.size
    for cache, layer in zip(each(caches), facts["layers"], strict=True):
        buffers, kind = held(cache), kind_of(layer)
        if own.kind_of(cache) is not None:
            size = own.entry(cache, tokens_of(layer))[2:4]
            if layer[2:4] != size:
                raise ValueError(f"a layer says {show(layer)}, which is not this model's")
            kept.append(Kept(ANY, ANY, own.of_one_token(cache)))
            continue
        wanted = tuple(
            Wanted((WRITTEN[x.dtype],), tuple(map(exactly, (B, ranks * heads, *rest))))
            for x in buffers
            for B, heads, *rest in (x.shape,)
        )
        # Gates are of the heads that the memory has.
        H = exactly(ranks * buffers[-1].shape[1]) if kind == "window" else ANY
        plain = unpack(buffers, kv_bits, group_size) if kind == "window" else buffers
        kept.append(Kept(H, exactly(plain[0].shape[-1]), wanted))
    return kept


def _kind_of_cache(cache: Any) -> str:
    return own.kind_of(cache) or ("window" if isinstance(cache, AHNCache) else "full")


def of_any_model(facts: Mapping[str, Any]) -> list[Kept]:
    """Of each layer, as far as that can be told without the model."""
    one = (exactly(1), ANY, ANY, ANY)
    plain, code = Wanted(FLOATS, one), Wanted(("U32",), one)
    stored = (plain,) if _quantized(facts)[0] is None else (code, plain, plain)
    buffers = {"full": (plain, plain), "window": (*stored, *stored, plain)}
    return [
        Kept(ANY, ANY, buffers[kind] if (kind := kind_of(layer)) in buffers else own.of_any(layer))
        for layer in facts["layers"]
    ]


def _quantized(facts: Mapping[str, Any]) -> tuple[int | None, int]:
    """Bits and group size of the first layer with a window; no others are allowed."""
    windows = (layer for layer in facts["layers"] if kind_of(layer) == "window")
    return next((tuple(layer[3:]) for layer in windows), (None, 64))


def tail_of(facts: Mapping[str, Any]) -> str:
    """The name of the tail's ids; version 1 had not read them."""
    return "pending" if facts["version"] == 1 else "tail"


def expected(facts: Mapping[str, Any], tail: int, kept: list[Kept]) -> dict[str, Wanted]:
    """All arrays of a memory with these facts, by name. tail: tokens since the last full step.

    Raises ValueError if the numbers of a layer do not fit the others.
    """
    window, sinks, step, tokens = (facts[k] for k in ("window", "sinks", "step", "tokens"))
    offset, capacity, old = tokens - tail, window + sinks, facts["version"] == 1
    arrays = {tail_of(facts): Wanted(("U32",), (exactly(tail),))} if tail or old else {}
    for i, (layer, one) in enumerate(zip(facts["layers"], kept, strict=True)):
        name, kind = f"layers.{i}.", kind_of(layer)
        windowed = kind == "window"
        right = [offset, window, sinks, *_quantized(facts)] if windowed else [offset]
        if kind not in ("full", "window"):
            right = own.right(layer, offset, tail)
        if layer != right or offset < 0:
            raise ValueError(f"layer {i} says {show(layer)}, where {show(right)} is right")
        if kind not in ("full", "window"):
            arrays |= own.arrays(name, layer, one.buffers, offset, step)
            if tail:
                arrays |= own.arrays(f"{name}tail.", layer, one.buffers, tokens, step)
            continue
        # MLX-LM's cache has room for what came last, and grows in steps of its own.
        slots = range(offset, offset + step + KVCache.step)
        if windowed:
            slots = exactly(grown_to(min(offset, capacity), capacity))
            arrays |= _memory(name, offset, window, sinks, one)
        if offset:
            arrays |= _buffers(name, slots, one)
        if tail and not old:
            changed = len(stay(offset, tokens, window, sinks)) if windowed else tail
            arrays |= _buffers(f"{name}tail.", exactly(changed), one)
            if windowed and tokens > capacity:
                arrays |= _memory(f"{name}tail.", tokens, window, sinks, one)
    return arrays


def _buffers(name: str, slots: range, kept: Kept) -> dict[str, Wanted]:
    shapes = ((dtypes, shape) for dtypes, shape in kept.buffers if shape is not None)
    return {
        f"{name}{j}": Wanted(dtypes, (rows, heads, slots, width))
        for j, (dtypes, (rows, heads, _, width)) in enumerate(shapes)
    }


def _memory(name: str, tokens: int, window: int, sinks: int, kept: Kept) -> dict[str, Wanted]:
    """State and trace of a layer after so many tokens."""
    traced = max(0, tokens - window - MAX_ANSWER), max(0, tokens - window)
    blocks = range(-(-traced[0] // BLOCK), -(-traced[1] // BLOCK) + 1)
    arrays = {
        f"{name}trace.0": Wanted(("F32",), (exactly(2), blocks)),
        f"{name}trace.1": Wanted(("F32",), (exactly(3), kept.heads)),
    }
    if tokens > window + sinks:
        shape = (exactly(1), kept.heads, kept.width, kept.width)
        arrays[f"{name}memory"] = Wanted(("F32",), shape)
    return arrays


def check_arrays(found: dict[str, Found], facts: Mapping[str, Any], kept: list[Kept]) -> None:
    """Names, dtypes and shapes, whole numbers among the facts too."""
    name, step, old = tail_of(facts), facts["step"], facts["version"] == 1
    tail = 0
    if old or (name in found and step > 1):
        compare(name, found, Wanted(("U32",), (range(0 if old else 1, step),)))
        tail = found[name][1][0]
    wanted = expected(facts, tail, kept)
    if SEEN in found:
        wanted[SEEN] = Wanted(("U8",), (ANY,))
    for name in sorted(found.keys() - wanted.keys()):
        raise ValueError(f"array {show(name)} belongs to no memory like this")
    for name in wanted:
        compare(name, found, wanted[name])
    for i, layer in enumerate(facts["layers"]):
        if kind_of(layer) == own.ROTATING:
            states = [("", facts["tokens"] - tail), ("tail.", facts["tokens"])]
            for place, (part, tokens) in zip(layer[4:], states, strict=False):
                own.check_place(f"layers.{i}.{part}", layer, place, tokens, found)


def check_values(
    arrays: Mapping[str, mx.array], facts: Mapping[str, Any], vocabulary: int | None
) -> None:
    """No NaN or infinity; ids that the model has, if its vocabulary is given; traces of such a
    text. Shapes and dtypes have been checked."""
    if name := not_finite(arrays.items()):
        raise ValueError(f"array {name} holds NaN or infinity")
    tail = np.asarray(arrays[tail_of(facts)]) if tail_of(facts) in arrays else np.zeros(0)
    if vocabulary is not None and (tail >= vocabulary).any():
        raise ValueError(f"its tail has token {tail.max()}, of {vocabulary} that there are")
    if vocabulary is not None and SEEN in arrays:
        if not 0 <= 8 * arrays[SEEN].size - vocabulary < 8:
            raise ValueError(f"it has seen other tokens than the {vocabulary} that there are")
        _check_seen(np.unpackbits(np.asarray(arrays[SEEN]), bitorder="little"), tail, vocabulary)
    written = facts["tokens"] - len(tail) - facts["window"] - facts["sinks"]
    before = _check_traces(arrays, facts, "", written)
    after = _check_traces(arrays, facts, "tail.", written + len(tail))
    for i, counts in after.items():
        more = counts.sum(dtype=float) - before[i].sum(dtype=float)
        n = before[i].size
        if counts.size < n or (counts[:n] < before[i]).any() or more > len(tail):
            raise ValueError(f"the trace of layer {i} after the tail does not go on from the other")


def _check_seen(
    bits: "np.ndarray[Any, Any]", tail: "np.ndarray[Any, Any]", vocabulary: int
) -> None:
    """After a bit for each token there are zeros; the tail was seen."""
    if bits[vocabulary:].any():
        raise ValueError(f"it has seen other tokens than the {vocabulary} that there are")
    if not bits[tail.astype(int)].all():
        raise ValueError("it has not seen the tokens of its tail")


def _check_traces(
    arrays: Mapping[str, mx.array], facts: Mapping[str, Any], part: str, written: int
) -> dict[int, "np.ndarray[Any, Any]"]:
    """Counts by layer, of those that have such a trace. part: "" or "tail.". written: tokens
    that have left the window."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    for i, layer in enumerate(facts["layers"]):
        name = f"layers.{i}.{part}trace."
        if kind_of(layer) != "window" or f"{name}0" not in arrays:
            continue
        strengths, heads = (np.asarray(arrays[f"{name}{j}"]) for j in (0, 1))
        whose = f"the trace of layer {i}" + (" after the tail" if part else "")
        if (strengths < 0).any() or (heads < 0).any():
            raise ValueError(f"{whose} has negative sums")
        counts = strengths[1]
        counted = (counts == np.round(counts)).all() and (counts <= BLOCK).all()
        total = int(counts.sum(dtype=float))
        if not counted or not (counts.size > 0) <= total <= max(0, written):
            raise ValueError(f"{whose} counts other tokens than were written")
        found[i] = counts
        if not np.array_equal(counts, next(iter(found.values()))):
            raise ValueError(f"{whose} is of another text than the first")
    return found
