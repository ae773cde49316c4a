"""What a model remembers of a text, as one safetensors file.

Caches are arrays: `layers.I.memory` and `layers.I.J` for window, sinks and gates, or keys
and values of a layer with full attention; `layers.I.trace.J` are those of its trace,
`pending` tokens not yet read. All else is
JSON in the header's metadata, and a checksum covers both.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.directory import load_safetensors
from ..checkpoints.safetensors import Layout, TensorWriter, bits, read_header
from ..errors import AHNError, show
from ..model.cache import AHNCache
from ..model.trace import Trace
from ..outputs.files import OutFile

VERSION = 1
HEADER = 1 << 20  # bytes of it that tell what a file is

# What a session says of itself; `digest` adds where it stopped.
FACTS = {"model", "tokenizer", "tokens", "window", "sinks", "step", "turn", "chat", "system"}
FACTS |= {"preview", "saved", "layers"}

Cache = AHNCache | KVCache


def model_identity(model: nn.Module) -> dict[str, str]:
    """Hashes of the settings, of names, shapes and dtypes of all weights, and of the values
    of the small ones, which differ between trainings."""
    parameters: Any = sorted(tree_flatten(model.parameters()))
    layout = [(name, x.shape, str(x.dtype)) for name, x in parameters]
    values = hashlib.sha256()
    for _, x in parameters:
        if x.size <= 1 << 14:
            values.update(bits(x).data)
    ahn = {**vars(model.ahn), "window": 0, "sinks": 0}
    return {
        "settings": _hash([vars(model.args), ahn]),
        "weights' shapes": _hash(layout),
        "weights": values.hexdigest(),
    }


def tokenizer_identity(tokenizer: TokenizerWrapper) -> str:
    """Hash of the vocabulary and of what a probe becomes."""
    probe = tokenizer.encode(
        "Call me Ishmael. \n\n  42 \u2013 \u00e9t\u00e9", add_special_tokens=False
    )
    return _hash([sorted(tokenizer.get_vocab().items()), probe])


def save(file: Path, caches: list[Cache], pending: list[int], facts: Mapping[str, Any]) -> None:
    """Write to a temporary name, then rename. Raises AHNError if it cannot be written, or
    would replace what is no memory."""
    arrays: dict[str, mx.array] = {}
    layers = []
    for i, cache in enumerate(caches):
        if isinstance(cache, AHNCache):
            memory, offset, window, sinks, kv_bits, group_size, *buffers = cache.state
            layers.append([offset, window, sinks, kv_bits, group_size])
            if memory is not None:
                arrays[f"layers.{i}.memory"] = memory
            for j, x in enumerate(cache.trace or ()):
                arrays[f"layers.{i}.trace.{j}"] = x
        else:
            layers.append([cache.offset])
            buffers = [] if cache.empty() else [cache.keys, cache.values]
        arrays |= {f"layers.{i}.{j}": x for j, x in enumerate(buffers)}
    arrays["pending"] = mx.array(pending, dtype=mx.uint32)
    text = json.dumps({**facts, "version": VERSION, "layers": layers}, sort_keys=True)
    metadata = {"format": "mlx", "ahn": text, "sha256": _checksum(text, arrays)}
    layout = {name: Layout(x.dtype, x.shape) for name, x in arrays.items()}
    with (
        OutFile(file, "a memory", is_memory).writing() as part,
        TensorWriter(part, layout, metadata) as writer,
    ):
        for name, x in arrays.items():
            writer.put(name, x)


def is_memory(file: Path) -> bool:
    """Whether a file is a memory by its header, be it damaged or of another version."""
    with file.open("rb") as f:
        header = f.read(8 + min(int.from_bytes(f.read(8), "little"), HEADER))
    return b'"__metadata__"' in header and b'"ahn"' in header


def read_facts(file: Path) -> dict[str, Any]:
    """What a memory file says about itself, not verified. Raises AHNError if it is none."""
    return _read(file)[0]


def load(file: Path) -> tuple[list[Cache], list[int], dict[str, Any]]:
    """Caches, pending tokens and facts. The file is verified, mapped and never modified.

    Raises AHNError if it is damaged, none, or from a later version.
    """
    facts, metadata = _read(file)
    arrays = load_safetensors(file)
    if _checksum(metadata["ahn"], arrays) != metadata.get("sha256"):
        raise AHNError(f"{file}: damaged, its checksum does not fit; digest the text again")
    with _well_formed(file):
        pending = arrays.pop("pending").tolist()
        caches = [_cache(i, layer, arrays) for i, layer in enumerate(facts["layers"])]
    return caches, pending, facts  # type: ignore[return-value]


def _cache(i: int, layer: list[Any], arrays: Mapping[str, mx.array]) -> Cache:
    memory = arrays.get(f"layers.{i}.memory")
    trace = [x for j in range(2) if (x := arrays.get(f"layers.{i}.trace.{j}")) is not None]
    count = sum(name.startswith(f"layers.{i}.") for name in arrays)
    count -= len(trace) + (memory is not None)
    buffers = [arrays[f"layers.{i}.{j}"] for j in range(count)]
    if len(layer) == 1:
        full = KVCache()
        if buffers:
            full.state = (*buffers, layer[0])
        return full
    offset, window, sinks, kv_bits, group_size = layer
    cache = AHNCache(window, sinks, kv_bits, group_size)
    cache.state = (memory, offset, window, sinks, kv_bits, group_size, *buffers)
    cache.trace = Trace(*trace)
    return cache


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not file.is_file():
        raise AHNError(f"{file}: no such file; ahn-mlx digest writes one")
    read_header(file)
    loaded: Any = mx.load(str(file), format="safetensors", return_metadata=True)
    metadata: dict[str, str] = loaded[1]
    if "ahn" not in metadata:
        raise AHNError(f"{file}: is not a memory; ahn-mlx digest writes one")
    with _well_formed(file):
        facts = json.loads(metadata["ahn"])
        version = facts["version"]
        if version == VERSION and not (set(facts) >= FACTS and "name" in facts["model"]):
            raise ValueError("it does not say all that a memory says")
    if version != VERSION:
        raise AHNError(f"{file}: version {show(version)}, this program reads {VERSION}; upgrade")
    return facts, metadata


@contextmanager
def _well_formed(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise AHNError(f"{file}: damaged ({show(str(e))}); digest the text again") from None


def check_fits(
    file: Path, facts: Mapping[str, Any], model: nn.Module, tokenizer: TokenizerWrapper
) -> None:
    """Raise AHNError, saying what differs, unless the memory is of this very model."""
    ours = model_identity(model)
    theirs = facts["model"]
    name = show(theirs["name"])
    for part, value in ours.items():
        if theirs.get(part) != value:
            raise AHNError(f"{file}: of another model, {name} ({part} differ); use that model")
    if len(facts["layers"]) != len(model.layers):
        raise AHNError(f"{file}: damaged, it has {len(facts['layers'])} layers; digest again")
    if facts["tokenizer"] != tokenizer_identity(tokenizer):
        raise AHNError(f"{file}: of another tokenizer; use {name} as it was")
    for part in ("window", "sinks"):
        if facts[part] != getattr(model.ahn, part):
            here = getattr(model.ahn, part)
            raise AHNError(f"{file}: has {part} {facts[part]}, not {here}; drop --{part}")


def _checksum(text: str, arrays: Mapping[str, mx.array]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        x = arrays[name]
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(bits(x).data)
    return found.hexdigest()


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
