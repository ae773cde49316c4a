"""A checkpoint of the PyTorch release to a directory that MLX loads: a base model and
AHN parameters, or both already merged, become one. Tensors stream through memory one at
a time, and the directory appears under its name only when it is complete."""

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from .checkpoint import (
    INDEX,
    Source,
    check_finite,
    check_member,
    is_memory,
    load_sources,
    published_name,
    read_config,
    read_headers,
    rename_published,
)
from .config import AHNConfig
from .errors import AHNError
from .outdir import check_out, replacing
from .tensorfile import FLOATS, is_finite, show, write_tensors

SHARD_BYTES = 5 << 30  # as mlx_lm

# Fields of the PyTorch release's config.json. The window of the memory takes the place
# of Qwen's own, which has its name.
RELEASE_FIELDS = {
    *("_ahn_implementation", "_layer_implementation", "ahn_position", "dy_num_attn_sinks"),
    *("dy_sliding_window", "fa_layer_ids", "is_causal", "loss_type", "num_attn_sinks"),
    *("save_ahn_only", "sliding_window_type", "use_ahn_router", "use_layerwise_decay"),
    *("use_normalized_l2", "use_q_proj"),
    *("sliding_window", "use_sliding_window", "max_window_layers"),
}

# A memory trained for one base is noise in another, even if its tensors fit.
SHARED_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "rope_theta"),
)

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}


@dataclass
class Checkpoint:
    """A whole model, as the headers of its files describe it."""

    path: Path  # where the base's part is
    ahn_path: Path  # where the memory is; the same if merged
    config: dict[str, Any]  # config.json to write
    sources: dict[str, Source]


def convert(
    base: Path | None, ahn: Path, out: Path, dtype: str | None = None, force: bool = False
) -> None:
    """Write the MLX directory `out` from a base and an AHN-only checkpoint, or from a
    merged one given as `ahn` alone.

    dtype: "float32", "bfloat16" or "float16"; by default each tensor keeps its own.
    Decay parameters are float32 always. force: replace a model that is at `out`.
    Raises AHNError, and then leaves everything as it was.
    """
    inputs = [ahn] if base is None else [base, ahn]
    try:
        out = check_out(out, inputs, force)
        checkpoint = _open(base, ahn)
        _name_dtype(checkpoint.config, dtype)
        arrays = _fit(checkpoint, dtype)
        with replacing(out, force) as directory:
            _write_weights(directory, arrays, checkpoint.sources)
            _write_json(directory / "config.json", checkpoint.config)
            _copy_tokenizer(inputs, directory)
    except OSError as e:
        # Writing reports no file name, or one in the directory that is gone by now.
        file = Path(e.filename or out)
        where = file if any(file.is_relative_to(p) for p in inputs) else out
        raise AHNError(f"{where}: {e.strerror or e}; nothing was written") from None


def _open(base: Path | None, ahn: Path) -> Checkpoint:
    """Read configs and headers; see that the two parts belong together."""
    ahn_config, sources = read_config(ahn), read_headers(ahn)
    try:
        settings = AHNConfig.from_dict(ahn_config)
    except AHNError as e:
        raise AHNError(f"{ahn}: {e}") from None
    plain = next((name for name in sources if not is_memory(name)), None)
    if base is None:
        if plain is None:
            raise AHNError(f"{ahn}: holds only AHN tensors; give their base model with --base")
        config = ahn_config
    else:
        if plain is not None:
            raise AHNError(f"{ahn}: holds a whole model, {show(plain)} too; leave out --base")
        config = read_config(base)
        _check_same_base(base, config, ahn, ahn_config)
        base_sources = read_headers(base)
        memory = next((name for name in base_sources if is_memory(name)), None)
        if memory is not None:
            raise AHNError(f"{base}: holds AHN tensors itself ({show(memory)}); give a plain base")
        sources = {**base_sources, **sources}
    for name in ("quantization", "quantization_config"):
        if config.get(name) is not None:
            raise AHNError(f"{base or ahn}: a quantized model; give the unquantized checkpoint")
    # Absent means false to transformers and true to mlx_lm; the tensors know.
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in sources)
    config = {k: v for k, v in config.items() if k not in RELEASE_FIELDS}
    config["ahn"] = settings.to_dict()
    return Checkpoint(base or ahn, ahn, config, sources)


def _check_same_base(
    base: Path, config: dict[str, Any], ahn: Path, ahn_config: dict[str, Any]
) -> None:
    for name in SHARED_FIELDS:
        ours, theirs = config.get(name), ahn_config.get(name)
        if None not in (ours, theirs) and ours != theirs:
            raise AHNError(
                f"{ahn}: was trained for another base, {name} is {show(theirs)} there "
                f"and {show(ours)} in {base}"
            )


def _name_dtype(config: dict[str, Any], dtype: str | None) -> None:
    """Keep the config's own statement of the dtype true."""
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in config:
            config[key] = dtype


def _fit(checkpoint: Checkpoint, dtype: str | None) -> dict[str, mx.array]:
    """The model's parameters, lazily: exactly those that it has, in the dtype asked for."""
    from .model import DTYPES, FLOAT32, build  # builds models, which --help need not wait for

    if dtype is not None and dtype not in DTYPES:
        raise AHNError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    try:
        model = build(checkpoint.config)
    except AHNError as e:
        raise AHNError(f"{checkpoint.path}: {' '.join(str(e).split())[:400]}") from None
    layers = tuple(checkpoint.config["ahn"]["fa_layer_ids"])
    checkpoint.sources = model.sanitize(rename_published(checkpoint.sources, layers))
    parameters = dict(tree_flatten(model.parameters()))
    _check_shapes(checkpoint, {name: x.shape for name, x in parameters.items()})
    arrays = load_sources(checkpoint.sources)
    for name, x in arrays.items():
        target = DTYPES[dtype] if dtype else x.dtype
        if name.rsplit(".", 1)[-1] in FLOAT32:
            target = mx.float32
        arrays[name] = x.astype(target, stream=mx.cpu)
    return arrays


def _check_shapes(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """The checkpoint must hold the model's parameters, in their shapes, and no others."""
    family = checkpoint.config["model_type"]
    kind = f"{family} model with {checkpoint.config['ahn']['memory']} memory"
    for name, (given, file, info) in sorted(checkpoint.sources.items()):
        if name not in expected:
            raise AHNError(f"{file}: unexpected tensor {show(given)}, a {kind} has none")
        if info.shape != tuple(expected[name]):
            raise AHNError(
                f"{file}: tensor {show(given)} has shape {list(info.shape)}, "
                f"this {kind} needs {list(expected[name])}"
            )
        if info.dtype not in FLOATS:
            raise AHNError(
                f"{file}: tensor {show(given)} is {info.dtype}, not one of {', '.join(FLOATS)}"
            )
    missing = sorted(set(expected) - set(checkpoint.sources))
    if missing:
        where = checkpoint.ahn_path if is_memory(missing[0]) else checkpoint.path
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise AHNError(
            f"{where}: tensor {show(published_name(missing[0]))} of shape "
            f"{list(expected[missing[0]])} is missing{more}, a {kind} needs it"
        )


def _write_weights(
    directory: Path, arrays: dict[str, mx.array], sources: dict[str, Source]
) -> None:
    """Files of at most SHARD_BYTES and an index, named as mlx_lm names them. Empties `arrays`."""
    sizes = {name: arrays[name].nbytes for name in sorted(arrays, key=_by_layer)}
    parameters = sum(x.size for x in arrays.values())
    shards = _shards(sizes)
    weight_map = {}
    bar = tqdm(
        total=sum(sizes.values()),
        desc="converting",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
    )

    def inspect(name: str, x: mx.array) -> None:
        if not is_finite(x):
            _explain(sources[name], x.dtype)
        bar.update(x.nbytes)

    with bar:
        for i, names in enumerate(shards, 1):
            numbered = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else numbered
            weight_map.update(dict.fromkeys(names, file))
            write_tensors(directory / file, {name: arrays.pop(name) for name in names}, inspect)
    totals = {"total_size": sum(sizes.values()), "total_parameters": parameters}
    index = {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / INDEX, index)


def _explain(source: Source, dtype: mx.Dtype) -> None:
    """Raise what is wrong with a tensor that is not finite in `dtype`."""
    try:
        check_finite(source.name, load_sources({source.name: source})[source.name])
    except AHNError as e:
        raise AHNError(f"{source.file}: {e}") from None
    short = str(dtype).rsplit(".", 1)[-1]
    raise AHNError(
        f"{source.file}: tensor {show(source.name)} has values too large for {short}; "
        "use --dtype bfloat16 or float32"
    )


def _by_layer(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names, grouped in order so that a group's bytes stay within SHARD_BYTES."""
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room = max(room - size, 0)
    return shards


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(dict(sorted(value.items())), indent=4) + "\n")


def _copy_tokenizer(inputs: list[Path], directory: Path) -> None:
    """Copy what makes text of tokens, from the base or else from the AHN checkpoint."""
    for name in ("generation_config.json", *TOKENIZER_FILES):
        for path in inputs:
            if os.path.lexists(path / name):
                check_member(path / name)
                shutil.copyfile(path / name, directory / name)
                break
    if not any((directory / name).exists() for name in VOCABULARIES):
        print(
            f"warning: {inputs[0]} has no tokenizer files; "
            "copy the base's to the converted model before you generate text",
            file=sys.stderr,
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", type=click.Path(path_type=Path), help="Base model, as on the hub.")
@click.option(
    "--ahn",
    type=click.Path(path_type=Path),
    required=True,
    help="AHN parameters of the PyTorch release, or a merged checkpoint (then without --base).",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of all parameters but the decays, which stay float32. Default: as they are.",
)
@click.option("--force", is_flag=True, help="Replace a model that is at --out.")
def main(base: Path | None, ahn: Path, out: Path, dtype: str | None, force: bool) -> None:
    """Convert a checkpoint of the PyTorch release of AHN to MLX.

    \b
    Base and AHN parameters in the published layout:
      convert --base Qwen2.5-3B-Instruct --ahn AHN-GDN-for-Qwen-2.5-Instruct-3B --out ahn-gdn-3b
    A merged checkpoint, in half the space:
      convert --ahn merged --out ahn-gdn-3b --dtype bfloat16
    """
    try:
        convert(base, ahn, out, dtype, force)
    except AHNError as e:
        click.echo(f"error: {' '.join(str(e).split())}", err=True)
        raise SystemExit(2) from None
    click.echo(f"wrote {out}")
