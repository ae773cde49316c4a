"""A model for apps without Python: one directory that the library in embed/ opens.

model.mlxfn holds the pure step of model/pure.py, traced for a few lengths; where our kernels run
plain.mlxfn is the same without them, for machines on which they do not agree. The weights are
arguments of the step, so that one file of them serves all traces. manifest.json says all else.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ..checkpoints.card import LICENCES, Origin, read_origins
from ..checkpoints.identity import model_identity
from ..checkpoints.safetensors import Layout, TensorWriter
from ..checkpoints.shards import write_json
from ..errors import AHNError
from ..hub.bases import find_base
from ..hub.download import find
from ..hub.published import MODELS
from ..hub.zoo import ZOO
from ..model.augment import memory_layers
from ..model.pure import initial_state, pure_step
from ..ops import kernels
from ..outputs.directories import check_out, replacing, reporting
from ..platform import on_cpu
from ..reading.memoryfile import base_facts, tokenizer_identity
from ..reading.session import ORIGIN
from ..reading.template import SYSTEM, Template
from ..reading.tokens import Encoder
from .tokenizer import pack_tokenizer

VERSION = 2
CHUNK = 512  # tokens read at once
SHORT = 64  # at the end of a text, and of a question


def export_app(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    out: Path,
    *,
    chunk: int = CHUNK,
    force: bool = False,
) -> None:
    """Write the directory `out`.

    chunk: most tokens read at once; the window's, if that is less. force: replace a model that
    is at `out`, but never the one that is exported.
    Raises AHNError, and then leaves everything as it was, for layers with full attention, for a
    tokenizer that is no byte-level BPE, and for a chat template that cannot be taken apart.
    """
    if chunk < 1:
        raise AHNError(f"--chunk must be at least 1, not {chunk}")
    inputs = _places(model)
    with reporting(out, inputs):
        out = check_out(out, inputs, force)
        state = initial_state(model)
        facts = {
            "template": _template(tokenizer),
            "begin": Encoder(tokenizer).begin,
            "ends": sorted(t for t in tokenizer.eos_token_ids if t < model.args.vocab_size),
        }
        tables = pack_tokenizer(tokenizer)
        longest = min(chunk, model.ahn.window)
        lengths = sorted({1, min(SHORT, longest), longest})
        with replacing(out, force) as directory:
            (directory / "tokenizer.bin").write_bytes(tables)
            _write_weights(directory / "weights.safetensors", model)
            _trace(directory / "model.mlxfn", model, state, lengths)
            if kernels.available():
                with kernels.without():
                    _trace(directory / "plain.mlxfn", model, state, lengths)
            files = {file.name: _hash_of(file) for file in sorted(directory.iterdir())}
            manifest = {
                **_of_model(model, tokenizer, state, inputs),
                **facts,
                "lengths": lengths,
                "files": files,
                "weights": _sum_of(directory / "weights.safetensors"),
                "version": VERSION,
            }
            write_json(directory / "manifest.json", _with_hash(manifest))


@contextmanager
def _written(file: Path) -> Iterator[None]:
    """What a disk has against a file that MLX writes, as an OSError."""
    try:
        yield
    except RuntimeError as e:
        if not str(e).startswith("[write]"):
            raise
        with file.open("ab") as again:  # MLX does not say it
            again.write(bytes(1 << 16))
        raise OSError("MLX could not write it") from None


def _trace(file: Path, model: nn.Module, state: list[mx.array], lengths: list[int]) -> None:
    step = pure_step(model, last=True)
    with (
        _written(file),
        _own_weights(model) as weights,
        mx.exporter(str(file), step) as trace,
    ):
        for L in lengths:
            example = (mx.zeros((1, L), mx.int32), mx.array([0]), mx.array([L]), *state)
            # Kernels are compared and timed when they are first wanted, not while tracing, which
            # leaves the model without its weights.
            mx.eval(step(*example, **weights) if kernels.available() else ())
            trace(*example, **weights)


@contextmanager
def _own_weights(model: nn.Module) -> Iterator[dict[str, mx.array]]:
    """The model's parameters by name; it has them again afterwards."""
    flat: Any = tree_flatten(model.parameters())
    try:
        yield dict(flat)
    finally:
        model.update(tree_unflatten(flat))


def _write_weights(file: Path, model: nn.Module) -> None:
    flat: Any = tree_flatten(model.parameters())
    layout = {name: Layout(x.dtype, x.shape) for name, x in flat}
    total = sum(x.nbytes for x in layout.values())
    bar = tqdm(total=total, desc="weights", unit="B", unit_scale=True, delay=1, disable=None)
    with bar, TensorWriter(file, layout) as writer:
        for name, x in flat:
            writer.put(name, x)
            bar.update(x.nbytes)


def _hash_of(file: Path) -> str:
    """SHA-256 of a file; of the weights' header alone, so that a model opens at once."""
    with file.open("rb") as f:
        if file.suffix == ".safetensors":
            return hashlib.sha256(f.read(int.from_bytes(f.read(8), "little"))).hexdigest()
        return hashlib.file_digest(f, "sha256").hexdigest()


def _with_hash(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest, with the SHA-256 of all that it says, however its file is laid out."""
    # A path may have bytes that are no text, and JSON cannot say them.
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode(errors="replace")
    return {**json.loads(text), "sha256": hashlib.sha256(text).hexdigest()}


def _sum_of(file: Path) -> int:
    """Adler-32 of the weights after their header, which finds damage as fast as they are read."""
    total = zlib.adler32(b"")
    with file.open("rb") as f:
        f.seek(int.from_bytes(f.read(8), "little"), 1)
        while piece := f.read(1 << 24):
            total = zlib.adler32(piece, total)
    return total


def _places(model: nn.Module) -> list[Path]:
    """Where the parts of a model are; nothing for one that comes with us."""
    origin = getattr(model, "origin", None)
    if origin is None:
        return []
    if origin.ahn:
        return [find_base(origin.name), Path(origin.ahn)]
    return [] if origin.name in ZOO else [find(origin.name)]


def _of_model(
    model: nn.Module, tokenizer: TokenizerWrapper, state: list[mx.array], places: list[Path]
) -> dict[str, Any]:
    origin = getattr(model, "origin", None)
    loaded = {k: getattr(origin, k, None) for k in ORIGIN}
    name = loaded["name"] = loaded["name"] or ""
    origins = [o for place in places for o in read_origins(place)] or _origins(name)
    _, first = next(memory_layers(model))  # they are all of one shape
    return {
        "mlx": version("mlx"),
        "device": "cpu" if on_cpu() else "gpu",
        "name": Path(name).name,
        "window": model.ahn.window,
        "sinks": model.ahn.sinks,
        "vocabulary": model.args.vocab_size,
        "layers": len(model.layers),
        "heads": first.n_heads,
        "kv_heads": first.n_kv_heads,
        "head_dim": first.head_dim,
        "gates": first.ahn.gate_count,
        "dtype": str(state[0].dtype).removeprefix("mlx.core."),
        # As a memory file has them, to be compared and to be written.
        "identity": {
            "model": {**loaded, **model_identity(model)},
            "tokenizer": tokenizer_identity(tokenizer),
            "memory": model.ahn.memory,
            "base": base_facts(model),
        },
        "sources": [o._asdict() for o in origins],
        "licence": ", ".join(sorted({o.licence for o in origins if o.licence})),
    }


def _origins(name: str) -> list[Origin]:
    """Of a model that comes with us."""
    if name not in MODELS:
        return []
    repo = MODELS[name].base.repo
    return [Origin("base", repo, "", LICENCES[repo]), Origin("memory", name, "", "apache-2.0")]


def _template(tokenizer: TokenizerWrapper) -> dict[str, Any] | None:
    """The chat template's parts, with a system message and without; None if there is none."""
    if not tokenizer.has_chat_template:
        return None
    with_system: dict[str, Any] | None = None
    try:
        padded = Template(tokenizer, f" {SYSTEM} ")
        with_system = {**padded.facts(), "strip": padded.start[1:2] == (SYSTEM,)}
    except AHNError:  # there is no place for one
        pass
    return {"plain": Template(tokenizer).facts(), "system": with_system}
