"""What a model remembers of a text, as one safetensors file; docs/memory-format.md describes it.

Caches are arrays, the state after the last full step and beside it what the tail changed. All
else is JSON in the header's metadata, and a checksum covers both. layout.py says what both must
be like.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.directory import check_depth, load_safetensors
from ..checkpoints.identity import hash_of, model_identity
from ..checkpoints.safetensors import (
    WRITTEN,
    Layout,
    TensorWriter,
    bits,
    mended,
    read_header_and_metadata,
)
from ..errors import AHNError, near_file, show
from ..model.augment import FullCache, dtype_of
from ..model.cache import AHNCache
from ..model.ranks import share
from ..model.trace import Trace
from ..outputs.files import OutFile
from . import layout, own
from .caches import Cache, Own, each, held, joined, make_caches
from .penalty import Seen, pack, unpack
from .tail import Before, Tail, before, changed, redo, undo
from .tokens import encode

T = TypeVar("T")

VERSIONS = (1, 2, 3)
AGAIN = "digest the text again"
HEADER = 1 << 20  # bytes of it that tell what a file is
MAX_FACTS = 1 << 24  # characters, which a long system message may have when it is escaped


class OtherModel(AHNError):
    """A memory that may be sound, but is not of the model that was to go on with it."""


def base_facts(model: nn.Module) -> dict[str, Any]:
    """Dtype of the norms, and bits of quantized weights, if there are."""
    dtype = str(dtype_of(model)).removeprefix("mlx.core.")
    bits = next((m.bits for _, m in model.named_modules() if hasattr(m, "bits")), None)
    return {"dtype": dtype, "bits": bits}


def tokenizer_identity(tokenizer: TokenizerWrapper) -> str:
    """Hash of the vocabulary and of what a probe becomes."""
    probe = encode(tokenizer, "Call me Ishmael. \n\n  42 \u2013 \u00e9t\u00e9")
    return hash_of([sorted(tokenizer.get_vocab().items()), probe])


def save(
    file: Path,
    model: nn.Module,
    caches: list[Any],
    tail: Tail,
    seen: Seen | None,
    facts: Mapping[str, Any],
) -> None:
    """Write to a temporary name, then rename. caches: after the tail. seen: which tokens there
    were, if that is known. Raises AHNError if what
    is written could not be loaded, if it would replace what is no memory, and when the disk is
    full."""
    arrays, layers = _contents(each(caches), tail)
    arrays |= {} if seen is None else {layout.SEEN: pack(seen)}
    known = {**facts, "version": layout.version_of(layers), "layers": layers}
    if model.ranks is not None:
        arrays = model.ranks.gathered(arrays, model)
        model.ranks.check()  # before they take the place of what is saved
    share(model.ranks, lambda: _write(file, model, arrays, known))


def _write(
    file: Path, model: nn.Module, arrays: dict[str, mx.array], known: dict[str, Any]
) -> None:
    found = {name: (WRITTEN[x.dtype], x.shape) for name, x in arrays.items()}
    with _named(file, "not written", "the session is damaged, load or make another"):
        layout.check_facts(known)
        layout.check_arrays(found, known, layout.of_model(model, known))
        layout.check_values(arrays, known, model.args.vocab_size)
    text = json.dumps(known, sort_keys=True)
    metadata = {"format": "mlx", "ahn": text, "sha256": _checksum(text, arrays)}
    promised = {name: Layout(x.dtype, x.shape) for name, x in arrays.items()}
    with (
        OutFile(file, "a memory", is_memory).writing() as part,
        TensorWriter(part, promised, metadata) as writer,
    ):
        for name, x in arrays.items():
            writer.put(name, x)


def _contents(caches: list[Cache], tail: Tail) -> tuple[dict[str, mx.array], list[list[Any]]]:
    """Arrays by name, and the numbers of each layer."""
    arrays: dict[str, mx.array] = {}
    layers: list[list[Any]] = []
    read = next(c.offset for c in caches if isinstance(c, AHNCache | KVCache)) - len(tail.ids)
    if tail.ids:
        arrays["tail"] = mx.array(tail.ids, dtype=mx.uint32)
    for i, cache in enumerate(caches):
        name = f"layers.{i}."
        if isinstance(cache, Own):
            found, layer = _own(name, cache, tail.before[i] if tail.ids else None, read)
            arrays |= found
            layers.append(layer)
            continue
        if tail.ids:
            past = tail.before[i]
            assert isinstance(past, Before)
            tokens = changed(cache, past.offset)
            arrays |= {f"{name}tail.{j}": x for j, x in enumerate(tokens)}
            if isinstance(cache, AHNCache) and cache.offset > cache.capacity:
                arrays |= _memory(f"{name}tail.", cache)
            cache = undo(cache, past)
        arrays |= {f"{name}{j}": x for j, x in enumerate(held(cache))}
        if isinstance(cache, AHNCache):
            layers.append([read, cache.window, cache.sinks, cache.bits, cache.group_size])
            arrays |= _memory(name, cache)
        else:
            layers.append([read])
    return arrays, layers


def _own(name: str, cache: Own, before: Any, read: int) -> tuple[dict[str, mx.array], list[Any]]:
    """Of a cache of mlx-lm's own, and of what it was before the tail, if there is one."""
    after = None if before is None else cache
    past: Own = cache if before is None else before
    arrays = {f"{name}{j}": x for j, x in enumerate(held(past))}
    arrays |= {f"{name}tail.{j}": x for j, x in enumerate(() if after is None else held(after))}
    return arrays, own.entry(past, read, after)


def _memory(name: str, cache: AHNCache) -> dict[str, mx.array]:
    arrays = {f"{name}trace.{j}": x for j, x in enumerate(cache.trace or ())}
    return arrays if cache.memory is None else {f"{name}memory": cache.memory, **arrays}


def is_memory(file: Path) -> bool:
    """Whether a file is a memory by its header, be it damaged or of another version."""
    with file.open("rb") as f:
        header = f.read(min(int.from_bytes(f.read(8), "little"), HEADER))
    return b'"__metadata__"' in header and b'"ahn"' in header


def read_facts(file: Path) -> dict[str, Any]:
    """What a memory file says about itself, of the right types but not verified.

    Raises AHNError if it is none, or from a later version.
    """
    return _read(file)[0]


def verify(file: Path) -> None:
    """Check all that can be checked without the model. Raises AHNError if it is damaged."""

    def read() -> None:
        facts, found, metadata = _read(file)
        with _named(file):
            layout.check_arrays(found, facts, layout.of_any_model(facts))
        _arrays(file, facts, metadata, None)

    _of_one(file, read)


def load(
    file: Path, model: nn.Module, tokenizer: TokenizerWrapper
) -> tuple[list[Any], Tail, Seen | None, dict[str, Any]]:
    """Caches, their tail, which tokens there were and facts; the file is never modified. Of a
    file of version 1 the tail has no layers: its ids are not read yet.

    Raises AHNError if it is damaged, of another model, or from a later version. Of several
    processes rank 0 reads it, and each gets its part.
    """
    arrays: dict[str, mx.array] = {}

    def read() -> dict[str, Any]:
        facts, found, metadata = _read(file)
        _check_fits(file, facts, model, tokenizer)
        with _named(file):
            layout.check_arrays(found, facts, layout.of_model(model, facts))
        arrays.update(_arrays(file, facts, metadata, model.args.vocab_size))
        return facts

    facts = share(model.ranks, lambda: _of_one(file, read))
    if model.ranks is not None:
        arrays = model.ranks.divided(arrays, model)
    caches = [_cache(i, layer, arrays) for i, layer in enumerate(facts["layers"])]
    ids: Any = arrays[layout.tail_of(facts)].tolist() if layout.tail_of(facts) in arrays else []
    tail = Tail(tuple(ids))
    if ids and facts["version"] > 1:
        tail = tail._replace(before=tuple(before(cache, len(ids)) for cache in caches))
        caches = [_after(i, cache, len(ids), arrays, facts) for i, cache in enumerate(caches)]
    packed = arrays.get(layout.SEEN)
    seen = None if packed is None else unpack(packed, model.args.vocab_size)
    return joined(make_caches(model), caches), tail, seen, facts


def _of_one(file: Path, read: Callable[[], T]) -> T:
    """What `read` makes of a file that it opens several times: again, if another took its name."""
    while True:
        before = _which(file)
        try:
            return read()
        except AHNError:
            if _which(file) == before:
                raise


def _which(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except (OSError, ValueError):  # or a name with a NUL
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(file: Path) -> tuple[dict[str, Any], dict[str, layout.Found], dict[str, str]]:
    """Facts, dtype and shape of each array, and the header's metadata; nothing but the header
    is read."""
    if not os.path.isfile(file):
        if os.path.isdir(file):
            raise AHNError(f"{file}: is a directory, not a memory; ahn-mlx digest writes one")
        if os.path.lexists(file):
            raise AHNError(f"{file}: is not a regular file; ahn-mlx digest writes one")
        meant = near_file(file, ".ahn") or "; ahn-mlx digest writes one"
        raise AHNError(f"{file}: no such file{meant}")
    with file.open("rb") as f:
        if f.read(9)[8:] not in (b"{", b""):  # where each header begins
            raise AHNError(f"{file}: is not a memory; ahn-mlx digest writes one")
    with mended(AGAIN):
        header, metadata = read_header_and_metadata(file)
    if "ahn" not in metadata:
        raise AHNError(f"{file}: is not a memory; ahn-mlx digest writes one")
    with _named(file):
        if len(metadata["ahn"]) > MAX_FACTS:
            raise ValueError(f"it says {len(metadata['ahn']):,} characters of itself")
        facts = json.loads(metadata["ahn"])
        check_depth(facts)
        if not isinstance(facts, dict) or "version" not in facts:
            raise ValueError("it does not say its version")
        version = facts["version"]
        if type(version) is int and version in VERSIONS:
            layout.check_facts(facts)
            return facts, {name: (x.dtype, x.shape) for name, x in header.items()}, metadata
    raise AHNError(f"{file}: version {show(version)}, this program reads {VERSIONS[-1]}; upgrade")


def _arrays(
    file: Path, facts: dict[str, Any], metadata: dict[str, str], vocabulary: int | None
) -> dict[str, mx.array]:
    """All arrays of a file whose header is right, if its checksum and values are too."""
    arrays = load_safetensors(file)
    with _named(file):
        if _checksum(metadata["ahn"], arrays) != metadata.get("sha256"):
            raise ValueError("its checksum does not fit")
        layout.check_values(arrays, facts, vocabulary)
    return arrays


def _cache(i: int, layer: list[Any], arrays: Mapping[str, mx.array]) -> Cache:
    """Of one layer, from arrays that have been checked."""
    name = f"layers.{i}."
    buffers = _numbered(name, arrays)
    if isinstance(layer[0], str):
        return own.restored(layer, layer[1], buffers)
    if len(layer) == 1:
        full = FullCache()
        if buffers:
            full.state = (*buffers, layer[0])
        return full
    offset, *settings = layer
    cache = AHNCache(*settings)
    cache.offset, cache.buffers = offset, buffers or None
    cache.memory, cache.trace = _memory_of(name, arrays)
    return cache


def _after(
    i: int, cache: Cache, n: int, arrays: Mapping[str, mx.array], facts: Mapping[str, Any]
) -> Cache:
    """The cache of one layer after its tail of n tokens."""
    name, layer = f"layers.{i}.tail.", facts["layers"][i]
    if isinstance(cache, Own):
        return own.restored(layer, layer[1] + n, _numbered(name, arrays), layer[-1])
    return redo(cache, n, _numbered(name, arrays), *_memory_of(name, arrays))


def _numbered(name: str, arrays: Mapping[str, mx.array]) -> tuple[mx.array, ...]:
    return tuple(arrays[f"{name}{j}"] for j in range(8) if f"{name}{j}" in arrays)


def _memory_of(name: str, arrays: Mapping[str, mx.array]) -> tuple[mx.array | None, Trace | None]:
    trace = [arrays[f"{name}trace.{j}"] for j in (0, 1) if f"{name}trace.{j}" in arrays]
    return arrays.get(f"{name}memory"), Trace(*trace) if trace else None


@contextmanager
def _named(file: Path, what: str = "damaged", mend: str = AGAIN) -> Iterator[None]:
    """Name the file in which something is wrong."""
    try:
        yield
    except (ValueError, RecursionError) as e:
        raise AHNError(f"{file}: {what}, {e}; {mend}") from None


def _check_fits(
    file: Path, facts: Mapping[str, Any], model: nn.Module, tokenizer: TokenizerWrapper
) -> None:
    """Raise OtherModel, saying what differs, unless the memory is of this very model."""
    ours = model_identity(model)
    theirs = facts["model"]
    name = show(theirs["name"])
    for part, value in ours.items():
        if theirs.get(part) != value:
            raise OtherModel(f"{file}: of another model, {name} ({part} differ); use that model")
    if facts["tokenizer"] != tokenizer_identity(tokenizer):
        raise OtherModel(f"{file}: of another tokenizer; use {name} as it was")
    for part in ("window", "sinks"):
        if facts[part] != getattr(model.ahn, part):
            here = getattr(model.ahn, part)
            raise OtherModel(f"{file}: has {part} {facts[part]}, not {here}; drop --{part}")


def _checksum(text: str, arrays: Mapping[str, mx.array]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        x = arrays[name]
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(bits(x).data)
    return found.hexdigest()
