"""A checkpoint directory that may come from anyone: which files make it up, what they
hold. Whatever is wrong with
it is an AHNError of one line, raised before MLX opens a file."""

import glob
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import AHNError, show
from .safetensors import TensorInfo, is_finite, read_header

INDEX = "model.safetensors.index.json"
UNUSED = "unused.safetensors"  # of the memory, no use to the model; kept for the way back
MAX_JSON = 64 << 20  # bytes of an index; config.json is far smaller

# Counts in config.json and the largest that is not absurd.
LIMITS = {
    "hidden_size": 1 << 20,
    "head_dim": 1 << 12,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
}
POSITIVE = ("rms_norm_eps", "rope_theta")
OBJECTS = (
    *("quantization", "quantization_config", "rope_parameters", "rope_scaling", "text_config"),
    "ahn_release",
)


class Source(NamedTuple):
    """Where a tensor is and what its file's header says about it."""

    name: str
    file: Path
    info: TensorInfo


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, with the numbers that matter checked for sense."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise AHNError(f"{path}: {what}; give a model directory")
    file = path / "config.json"
    if not os.path.lexists(file):
        raise AHNError(f"{path}: not a model directory, it has no config.json")
    config = read_json(file)
    check_config(file, config)
    return config


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raise AHNError if a number that matters makes no sense."""
    if not isinstance(config.get("model_type"), str):
        found = show(config.get("model_type"))
        raise AHNError(f"{file}: model_type must be a name such as qwen2, not {found}")
    for name, limit in LIMITS.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise AHNError(
                f"{file}: {name} must be a whole number from 1 to {limit}, not {show(value)}"
            )
    for name in POSITIVE:
        value = config.get(name)
        # type() and not isinstance(): true is an int in Python
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise AHNError(f"{file}: {name} must be a positive number, not {show(value)}")
    for name in OBJECTS:
        # mlx_lm looks into text_config without asking whether it is null
        allowed = dict if name == "text_config" else dict | None
        if not isinstance(config.get(name, {}), allowed):
            raise AHNError(f"{file}: {name} must be an object, not {show(config[name])}")
    if not isinstance(config.get("architectures"), list | str | None):
        found = show(config["architectures"])
        raise AHNError(f"{file}: architectures must be a list of names, not {found}")
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        found = show(config["tie_word_embeddings"])
        raise AHNError(f"{file}: tie_word_embeddings must be true or false, not {found}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    check_member(file)
    if file.stat().st_size > MAX_JSON:
        raise AHNError(f"{file}: larger than {MAX_JSON >> 20} MB; this is no such file")
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as e:
        raise AHNError(f"{file}: not valid JSON ({show(str(e))}); fetch it again") from None
    if not isinstance(value, dict):
        raise AHNError(f"{file}: must hold an object, not {show(value)}")
    return value


def check_member(file: Path) -> None:
    """A regular file, and no link that leads out of its directory. The cache of
    huggingface-hub, where snapshots/<revision>/* link to blobs/*, is one directory."""
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(r) for r in roots):
        raise AHNError(f"{file}: a link out of its directory; put the file itself there")
    if not real.is_file():
        what = "not a regular file" if real.exists() else "missing"
        raise AHNError(f"{file}: {what}; fetch it again")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory: those of the index, or model.safetensors, or
    all shards of a set."""
    if os.path.lexists(path / INDEX):
        return sorted({path / name for name in _weight_map(path / INDEX).values()})
    if os.path.lexists(path / "model.safetensors"):
        return [path / "model.safetensors"]
    return _numbered_shards(path)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AHNError(f"{index}: weight_map must map tensor names to files; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise AHNError(
                f"{index}: tensor {show(name)} is in {show(file)}, "
                "which is not the name of a safetensors file in this directory"
            )
    return weight_map


def _numbered_shards(path: Path) -> list[Path]:
    """model-00001-of-00002.safetensors and its siblings, when there is no index."""
    found = {}
    for file in path.glob("model-*-of-*.safetensors"):
        if m := re.fullmatch(r"model-(\d{1,6})-of-(\d{1,6})\.safetensors", file.name):
            found[int(m[1]), int(m[2])] = file
    if not found:
        others = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pth", ".gguf"))
        has = f"; it has {show(others[0])}, see ahn-mlx convert --help" if others else ""
        raise AHNError(f"{path}: no model.safetensors{has}; save the checkpoint as safetensors")
    total = max(n for _, n in found)
    for i in range(1, total + 1):
        if (i, total) not in found:
            raise AHNError(f"{path}: shard {i} of {total} is missing; fetch it again")
    return sorted(found.values())


def read_headers(path: Path) -> dict[str, Source]:
    """Every tensor of a directory, from the headers alone."""
    return _read_headers(path, weight_files(path))


def _read_headers(path: Path, files: list[Path]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for file in files:
        for source in _file_sources(file):
            if other := sources.get(source.name):
                raise AHNError(
                    f"{file}: tensor {show(source.name)} is in {other.file.name} too; "
                    "remove one file"
                )
            sources[source.name] = source
    if os.path.lexists(path / INDEX):
        for name, file_name in _weight_map(path / INDEX).items():
            if name not in sources or sources[name].file.name != file_name:
                raise AHNError(
                    f"{path / file_name}: tensor {show(name)} is missing, "
                    "though the index lists it; fetch it again"
                )
    return sources


def read_unused(path: Path) -> dict[str, Source]:
    """What an earlier conversion has set aside."""
    if not os.path.lexists(path / UNUSED):
        return {}
    return {source.name: source for source in _file_sources(path / UNUSED)}


def _file_sources(file: Path) -> list[Source]:
    check_member(file)
    return [Source(name, file, info) for name, info in read_header(file).items()]


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a directory, validated, and not read until they are used."""
    sources = read_headers(path)
    files = {file: load_safetensors(file) for file in {s.file for s in sources.values()}}
    return {name: files[source.file][name] for name, source in sources.items()}


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a file whose header has been judged, lazily."""
    try:
        return mx.load(str(file), format="safetensors")  # type: ignore[return-value]
    except (RuntimeError, ValueError) as e:
        raise AHNError(f"{file}: MLX cannot load it ({show(str(e))})") from None


def check_model_dir(path: Path) -> dict[str, Any]:
    """Verify a directory that mlx_lm is about to load; returns its config.json."""
    config = read_config(path)
    if glob.escape(str(path)) != str(path):
        raise AHNError(f"{path}: mlx_lm cannot load from a path with * ? or [; rename it")
    if os.path.lexists(path / "generation_config.json"):
        read_json(path / "generation_config.json")
    check_quantization(path, config)
    weight_files(path)
    # mlx_lm loads every file of this pattern, whatever an index says.
    _read_headers(path, sorted(path.glob("model*.safetensors")))
    return config


def check_quantization(path: Path, config: dict[str, Any]) -> None:
    """None, or MLX's own. mlx_lm would try to unpack what other programs write."""
    quantization = config.get("quantization")
    if quantization is None:
        foreign = config.get("quantization_config") is not None
        if foreign or os.path.lexists(path / "hf_quant_config.json"):
            raise AHNError(f"{path}: quantized, but not by MLX; use the unquantized model")
        return
    for name in ("bits", "group_size"):
        value = quantization.get(name)
        if type(value) is not int or not 1 <= value <= 1024:
            file = path / "config.json"
            raise AHNError(f"{file}: {name} under quantization is {show(value)}, not a number")


def check_finite(name: str, x: mx.array) -> None:
    """Raise AHNError if a float tensor holds NaN or infinity."""
    if not is_finite(x):
        raise AHNError(f"tensor {show(name)} holds NaN or infinity; fetch the checkpoint again")
