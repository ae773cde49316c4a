"""A checkpoint of the PyTorch release to a directory that MLX loads: a base model and
AHN parameters, or both already merged, become one. Tensors stream through memory one at
a time, and the directory appears under its name only when it is complete."""

import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import AHNError, show
from ..model.augment import FLOAT32
from ..model.config import AHNConfig
from ..model.names import is_memory
from ..outputs.directories import check_out, replacing, reporting
from .baseconfig import OWN, check_same_base, family
from .card import origin, write_card
from .directory import Source, copy_files, read_json, unreplaced
from .formats import describe, is_gguf
from .load import build_as, check_plain, fit
from .safetensors import DTYPES, FLOATS, STORED
from .shards import GROUP, Q_BITS, Tensor, write_json, write_unused, write_weights
from .tokenizer import TOKENIZER_FILES, gguf_tokenizer, has_vocabulary

MAX_YARN = 1000.0

MODEL_FILE = "ahn_model.py"  # for stock mlx_lm
# Entry of a merged config.json, where the memory's window has the name of the base's own.
BASE_WINDOW = "ahn_base_sliding_window"
RELEASE = "ahn_release"  # entry of our config.json for what only the release reads

# Fields of the PyTorch release's config.json. The window of the memory takes the place
# of Qwen's own, which has its name.
RELEASE_FIELDS = {
    *("_ahn_implementation", "_layer_implementation", "ahn_position", "dy_num_attn_sinks"),
    *("dy_sliding_window", "fa_layer_ids", "is_causal", "loss_type", "num_attn_sinks"),
    *("save_ahn_only", "sliding_window_type", "use_ahn_router", "use_layerwise_decay"),
    *("use_normalized_l2", "use_q_proj"),
    *("sliding_window", "use_sliding_window", "max_window_layers", BASE_WINDOW),
}


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
    with reporting(out, inputs), unreplaced(*inputs) as check_inputs:
        out = check_out(out, inputs, force)
        checkpoint = _open(base, ahn, yarn)
        _name_dtype(checkpoint.config, dtype)
        plan = _plan(checkpoint, dtype, q_bits)
        with replacing(out, force) as directory:
            write_weights(directory, plan, checkpoint.parameters)
            write_unused(directory, checkpoint.unused)
            write_json(directory / "config.json", checkpoint.config)
            shutil.copyfile(Path(__file__).with_name("shim.py"), directory / MODEL_FILE)
            _copy_tokenizer(inputs, directory)
            _write_generation(inputs, directory, checkpoint.config.get("eos_token_id"))
            parts = ("model",) if base is None else ("base", "memory")
            origins = [origin(part, path) for part, path in zip(parts, inputs, strict=True)]
            write_card(directory, title or out.name, origins)
            check_inputs()  # before it takes its name


def _open(base: Path | None, ahn: Path, yarn: float | None) -> Checkpoint:
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
        config = _stretch(ahn, ahn_config, yarn)
    else:
        if plain is not None:
            raise AHNError(f"{ahn}: holds a whole model, {show(plain)} too; leave out --base")
        config, base_sources = describe(base)
        config = _stretch(base, config, yarn)
        check_same_base(base, config, ahn, ahn_config)
        check_plain(base, base_sources)
        sources = {**base_sources, **sources}
        if "eos_token_id" in ahn_config:
            config.setdefault("eos_token_id", ahn_config["eos_token_id"])
    # A base of a family that the release does not know may have a window of its own.
    own = {"sliding_window"} if base is not None and family(config) not in OWN else set()
    window = config.get(BASE_WINDOW) if base is None else None
    config = {k: v for k, v in config.items() if k not in RELEASE_FIELDS - own}
    if window is not None:
        config["sliding_window"] = window
    config["ahn"] = settings.to_dict()
    release = RELEASE_FIELDS - {"save_ahn_only", BASE_WINDOW}  # which the export says
    if kept := {k: v for k, v in ahn_config.items() if k in release}:
        config[RELEASE] = kept
    config["model_file"] = MODEL_FILE
    return Checkpoint(base or ahn, ahn, config, sources)


def _name_dtype(config: dict[str, Any], dtype: str | None) -> None:
    """Keep the config's own statement of the dtype true."""
    if dtype is not None and "torch_dtype" in config:
        config["torch_dtype"] = dtype


def _stretch(path: Path, config: dict[str, Any], factor: float | None) -> dict[str, Any]:
    """The config that asks for YaRN."""
    if factor is None:
        return config
    if not 1 < factor <= MAX_YARN:
        raise AHNError(f"--yarn must be above 1 and at most {MAX_YARN:g}, not {factor}")
    if config["rope_scaling"]:
        raise AHNError(f"{path}: has rope scaling already, {show(config['rope_scaling'])}")
    trained = config.get("max_position_embeddings")
    if trained is None:
        raise AHNError(f"{path}: config.json has no max_position_embeddings, which --yarn needs")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": trained,
    }
    longest = math.floor(trained * factor)
    return {**config, "rope_scaling": scaling, "max_position_embeddings": longest}


def _plan(checkpoint: Checkpoint, dtype: str | None, q_bits: int) -> dict[str, Tensor]:
    """The model's parameters: exactly those that it has, as they are to be written."""
    config = checkpoint.config
    if dtype is not None and dtype not in DTYPES:
        raise AHNError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if q_bits not in Q_BITS:
        raise AHNError(f"q_bits must be one of {', '.join(map(str, Q_BITS))}, not {q_bits}")
    if q_bits and config.get("quantization"):
        raise AHNError(f"{checkpoint.path}: is quantized already; leave out --q-bits")
    model = build_as(checkpoint.path, config, checkpoint.sources)
    parameters: Any = tree_flatten(model.parameters())
    checkpoint.parameters = sum(x.size for _, x in parameters)
    given = checkpoint.sources
    checkpoint.sources = fit(model, config, given, checkpoint.path, checkpoint.ahn_path)
    used = {source.name for source in checkpoint.sources.values()}
    checkpoint.unused = [
        s for n, s in given.items() if is_memory(n) and n not in used and s.info.dtype in FLOATS
    ]
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


def _quantizable(model: nn.Module) -> set[str]:
    """The weights that mlx_lm quantizes. The memory's are not among them."""
    return {
        f"{path}.weight"
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0
    }


def _copy_tokenizer(inputs: list[Path], directory: Path) -> None:
    """Copy what makes text of tokens, from the base or else from the AHN checkpoint."""
    copy_files(TOKENIZER_FILES, inputs, directory)
    if has_vocabulary(directory):
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


def _write_generation(inputs: list[Path], directory: Path, ends: list[Any] | None) -> None:
    """generation_config.json, whose end tokens count for mlx_lm: all that are known."""
    name = "generation_config.json"
    for path in inputs:
        if os.path.lexists(path / name):
            settings = read_json(path / name)
            write_json(directory / name, {**settings, **({"eos_token_id": ends} if ends else {})})
            break
