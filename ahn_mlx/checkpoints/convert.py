"""A checkpoint of the PyTorch release to a directory that MLX loads: a base model and
AHN parameters, or both already merged, become one. Tensors stream through memory one at
a time, and the directory appears under its name only when it is complete."""

import math
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import AHNError, show
from ..model.augment import FLOAT32, build
from ..model.config import AHNConfig
from ..model.names import is_memory, published_name, rename_published
from ..outputs.directories import check_out, replacing, reporting
from .card import origin, write_card
from .directory import Source, check_config, check_member, check_quantization
from .formats import describe, is_gguf
from .safetensors import DTYPES, FLOATS, STORED, WRITTEN, Layout
from .shards import GROUP, Q_BITS, Tensor, write_json, write_unused, write_weights
from .tokenizer import TOKENIZER_FILES, VOCABULARIES, gguf_tokenizer

MAX_YARN = 1000.0

MODEL_FILE = "ahn_model.py"  # for stock mlx_lm
RELEASE = "ahn_release"  # entry of our config.json for what only the release reads

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


@dataclass
class Checkpoint:
    """A whole model, as the headers of its files describe it."""

    path: Path  # where the base's part is
    ahn_path: Path  # where the memory is; the same if merged
    config: dict[str, Any]  # config.json to write
    sources: dict[str, Source]
    unused: list[Source] = field(default_factory=list)  # of the memory, and in no model
    parameters: int = 0


def convert(
    base: Path | None,
    ahn: Path,
    out: Path,
    dtype: str | None = None,
    force: bool = False,
    *,
    q_bits: int = 0,
    yarn: float | None = None,
    title: str = "",
) -> None:
    """Write the MLX directory `out` from a base and an AHN-only checkpoint, or from a
    merged one given as `ahn` alone.

    dtype: "float32", "bfloat16" or "float16"; by default each tensor keeps its own.
    Decay parameters are float32 always. q_bits: 4 or 8 quantizes the base, 0 leaves it as
    it is. yarn: stretch the base's rotary positions by this factor. title: of the model
    card, `out`'s name by default. force: replace a model that is at `out`.
    Raises AHNError, and then leaves everything as it was.
    """
    inputs = [ahn] if base is None else [base, ahn]
    with reporting(out, inputs):
        out = check_out(out, inputs, force)
        checkpoint = _open(base, ahn)
        _name_dtype(checkpoint.config, dtype)
        _stretch(checkpoint, yarn)
        plan = _plan(checkpoint, dtype, q_bits)
        with replacing(out, force) as directory:
            write_weights(directory, plan, checkpoint.parameters)
            write_unused(directory, checkpoint.unused)
            write_json(directory / "config.json", checkpoint.config)
            shutil.copyfile(Path(__file__).with_name("shim.py"), directory / MODEL_FILE)
            _copy_tokenizer(inputs, directory)
            parts = ("model",) if base is None else ("base", "memory")
            origins = [origin(part, path) for part, path in zip(parts, inputs, strict=True)]
            write_card(directory, title or out.name, origins)


def _open(base: Path | None, ahn: Path) -> Checkpoint:
    """Read configs and headers; see that the two parts belong together."""
    ahn_config, sources = describe(ahn)
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
        config, base_sources = describe(base)
        _check_same_base(base, config, ahn, ahn_config)
        memory = next((name for name in base_sources if is_memory(name)), None)
        if memory is not None:
            raise AHNError(f"{base}: holds AHN tensors itself ({show(memory)}); give a plain base")
        sources = {**base_sources, **sources}
    check_quantization(base or ahn, config)
    # Absent means false to transformers and true to mlx_lm; the tensors know.
    config.setdefault("tie_word_embeddings", "lm_head.weight" not in sources)
    config = {k: v for k, v in _rope(config).items() if k not in RELEASE_FIELDS}
    check_config((base or ahn) / "config.json", config)
    config["ahn"] = settings.to_dict()
    release = RELEASE_FIELDS - {"save_ahn_only"}  # which is for the export to say
    if kept := {k: v for k, v in ahn_config.items() if k in release}:
        config[RELEASE] = kept
    config["model_file"] = MODEL_FILE
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


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings where mlx_lm looks for them; transformers 5 nests them."""
    nested = config.get("rope_parameters")
    if not nested:
        return config
    scaled = nested.get("rope_type", "default") != "default"
    own = {"rope_theta": nested.get("rope_theta"), "rope_scaling": nested if scaled else None}
    return {**config, **{k: v for k, v in own.items() if config.get(k) is None and v is not None}}


def _stretch(checkpoint: Checkpoint, factor: float | None) -> None:
    """Ask for YaRN in the config."""
    if factor is None:
        return
    config, path = checkpoint.config, checkpoint.path
    if not 1 < factor <= MAX_YARN:
        raise AHNError(f"--yarn must be above 1 and at most {MAX_YARN:g}, not {factor}")
    if config.get("rope_scaling"):
        raise AHNError(f"{path}: has rope scaling already, {show(config['rope_scaling'])}")
    trained = config.get("max_position_embeddings")
    if trained is None:
        raise AHNError(f"{path}: config.json has no max_position_embeddings, which --yarn needs")
    config["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
    }
    config["max_position_embeddings"] = math.floor(trained * factor)


def _plan(checkpoint: Checkpoint, dtype: str | None, q_bits: int) -> dict[str, Tensor]:
    """The model's parameters: exactly those that it has, as they are to be written."""
    config = checkpoint.config
    if dtype is not None and dtype not in DTYPES:
        raise AHNError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if q_bits not in Q_BITS:
        raise AHNError(f"q_bits must be one of {', '.join(map(str, Q_BITS))}, not {q_bits}")
    if q_bits and config.get("quantization"):
        raise AHNError(f"{checkpoint.path}: is quantized already; leave out --q-bits")
    try:
        model = build(config)
    except AHNError as e:
        raise AHNError(f"{checkpoint.path}: {' '.join(str(e).split())[:400]}") from None
    layers = tuple(config["ahn"]["fa_layer_ids"])
    given = checkpoint.sources
    checkpoint.sources = model.sanitize(rename_published(given, layers))
    used = {source.name for source in checkpoint.sources.values()}
    checkpoint.unused = [
        s for n, s in given.items() if is_memory(n) and n not in used and s.info.dtype in FLOATS
    ]
    checkpoint.parameters = sum(math.prod(x.shape) for x in _layouts(model).values())
    _quantize_as_given(model, checkpoint)
    _check_shapes(checkpoint, _layouts(model))
    packed = _quantizable(model) if q_bits else set()
    # GGUF keeps vectors in float32 whatever the rest is.
    common = dtype or (config["torch_dtype"] if is_gguf(checkpoint.path) else None)
    plan = {}
    for name, source in checkpoint.sources.items():
        target = STORED[source.info.dtype]
        wanted = dtype if is_memory(name) else common
        if wanted and mx.issubdtype(target, mx.floating):
            target = DTYPES[wanted]
        if name.rsplit(".", 1)[-1] in FLOAT32:
            target = mx.float32
        plan[name] = Tensor(source, target, q_bits if name in packed else 0)
    if packed:
        config["quantization"] = {"group_size": GROUP, "bits": q_bits, "mode": "affine"}
        config["quantization_config"] = config["quantization"]  # the hub's pages look here
    return plan


def _layouts(model: nn.Module) -> dict[str, Layout]:
    parameters: Any = tree_flatten(model.parameters())
    return {name: Layout(x.dtype, x.shape) for name, x in parameters}


def _quantizable(model: nn.Module) -> set[str]:
    """The weights that mlx_lm quantizes. The memory's are not among them."""
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0
    }


def _quantize_as_given(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Make the layers quantized whose tensors are, as mlx_lm will when it loads them."""
    from mlx_lm.utils import infer_quant_config

    settings = checkpoint.config.get("quantization")
    if not settings:
        return
    if not any(name.endswith(".scales") for name in checkpoint.sources):
        raise AHNError(f"{checkpoint.path}: config.json says it is quantized, its tensors are not")
    # What mlx_lm asks of a tensor.
    tensors = {
        name: SimpleNamespace(shape=source.info.shape, dtype=STORED.get(source.info.dtype))
        for name, source in checkpoint.sources.items()
    }

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in settings:
            return settings[path]
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in tensors:
            return False
        return infer_quant_config(path, module, tensors)

    try:
        nn.quantize(
            model,
            settings["group_size"],
            settings["bits"],
            mode=settings.get("mode", "affine"),
            class_predicate=how,
        )
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise AHNError(f"{checkpoint.path}: not quantized as MLX does it ({reason})") from None


def _check_shapes(checkpoint: Checkpoint, expected: dict[str, Layout]) -> None:
    """The checkpoint must hold the model's parameters, in their shapes, and no others."""
    family = checkpoint.config["model_type"]
    kind = f"{family} model with {checkpoint.config['ahn']['memory']} memory"
    for name, (given, file, info) in sorted(checkpoint.sources.items()):
        if name not in expected:
            raise AHNError(f"{file}: unexpected tensor {show(given)}, a {kind} has none")
        needed = expected[name]
        if info.shape != needed.shape:
            raise AHNError(
                f"{file}: tensor {show(given)} has shape {list(info.shape)}, "
                f"this {kind} needs {list(needed.shape)}"
            )
        allowed = FLOATS if mx.issubdtype(needed.dtype, mx.floating) else (WRITTEN[needed.dtype],)
        if info.dtype not in allowed:
            raise AHNError(
                f"{file}: tensor {show(given)} is {info.dtype}, not one of {', '.join(allowed)}"
            )
    missing = sorted(set(expected) - set(checkpoint.sources))
    if missing:
        where = checkpoint.ahn_path if is_memory(missing[0]) else checkpoint.path
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise AHNError(
            f"{where}: tensor {show(published_name(missing[0]))} of shape "
            f"{list(expected[missing[0]].shape)} is missing{more}, a {kind} needs it"
        )


def copy_files(names: Iterable[str], inputs: list[Path], directory: Path) -> None:
    """Copy each file from the first input that has it."""
    for name in names:
        for path in inputs:
            if os.path.lexists(path / name):
                check_member(path / name)
                shutil.copyfile(path / name, directory / name)
                break


def _copy_tokenizer(inputs: list[Path], directory: Path) -> None:
    """Copy what makes text of tokens, from the base or else from the AHN checkpoint."""
    copy_files(("generation_config.json", *TOKENIZER_FILES), inputs, directory)
    if any((directory / name).exists() for name in VOCABULARIES):
        return
    missing = f"{inputs[0]} has no tokenizer files"
    if is_gguf(inputs[0]):
        try:
            gguf_tokenizer(inputs[0]).save_pretrained(directory)
            return
        except AHNError as e:
            missing = str(e)
    print(
        f"warning: {missing}; copy the base's to the converted model before you generate text",
        file=sys.stderr,
    )
