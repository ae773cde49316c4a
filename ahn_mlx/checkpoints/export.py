"""A converted directory back to the PyTorch release's layouts: the memory alone, or merged
with its base. What conversion has cast or set aside is undone, bit for bit; what that release has
no word for, a gain by window, becomes part of what it has."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AHNError, show
from ..memory import gain
from ..model.config import PUBLISHED_NAMES, AHNConfig
from ..model.names import is_memory, published_name
from ..outputs.directories import check_out, replacing, reporting
from .baseconfig import has_own_window, read_config
from .convert import BASE_WINDOW, RELEASE
from .directory import INDEX, Source, copy_files, read_headers, read_unused, unreplaced
from .formats import Reader
from .safetensors import FLOATS, STORED
from .shards import Tensor, write_json, write_weights
from .tokenizer import TOKENIZER_FILES

LAYOUTS = ("ahn-only", "merged")

# What the release writes beside the settings of AHNConfig, for a memory not made by it.
TRAINING = {
    "ahn_position": "prefix",
    "is_causal": True,
    "loss_type": ["kl"],
    "sliding_window_type": "fixed",
    "use_layerwise_decay": True,
    "use_normalized_l2": True,
    "use_sliding_window": False,
}

# Entries of our config.json that mean nothing there.
OURS = ("ahn", RELEASE, "model_file")


def export_pytorch(path: Path, out: Path, layout: str = "merged", force: bool = False) -> None:
    """Write the checkpoint directory `out` from a converted one.

    layout: "ahn-only" or "merged". force: replace a model that is at `out`.
    Raises AHNError, and then leaves everything as it was.
    """
    if layout not in LAYOUTS:
        raise AHNError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    with reporting(out, [path]), unreplaced(path) as check_input:
        out = check_out(out, [path], force)
        config = read_config(path)
        try:
            ahn = AHNConfig.from_dict(config)
        except AHNError as e:
            raise AHNError(f"{path}: {e}") from None
        plan = _without_gain(_plan(path, config, layout), ahn.window)
        parameters = sum(math.prod(tensor.source.info.shape) for tensor in plan.values())
        names = ("generation_config.json", *(TOKENIZER_FILES if layout == "merged" else ()))
        with replacing(out, force) as directory:
            write_weights(directory, plan, parameters, {"format": "pt"})
            if (directory / "model.safetensors").exists():
                (directory / INDEX).unlink()  # transformers writes one for shards only
            write_json(directory / "config.json", release_config(config, ahn, layout))
            copy_files(names, [path], directory)
            check_input()  # before it takes its name


def release_config(config: dict[str, Any], ahn: AHNConfig, layout: str) -> dict[str, Any]:
    """config.json as the release reads it."""
    kind = f"{config['model_type'].capitalize()}MemDecoderLayer"
    ends = config.get("eos_token_id")
    if isinstance(ends, list) and len(ends) == 1:
        config = {**config, "eos_token_id": ends[0]}  # as it writes one
    # The memory's window takes its name.
    whole = layout == "merged" and has_own_window(config)
    own = {BASE_WINDOW: config["sliding_window"]} if whole else {}
    return {
        **({"_layer_implementation": kind, **TRAINING} if not config.get(RELEASE) else {}),
        **{k: v for k, v in config.items() if k not in OURS},
        **(config.get(RELEASE) or {}),
        "_ahn_implementation": {v: k for k, v in PUBLISHED_NAMES.items()}[ahn.memory],
        "fa_layer_ids": ",".join(map(str, ahn.fa_layer_ids)),
        "num_attn_sinks": ahn.sinks,
        "save_ahn_only": layout == "ahn-only",
        "sliding_window": ahn.window,
        **own,
        "use_ahn_router": ahn.router,
        "use_q_proj": ahn.query_projection,
    }


def _plan(path: Path, config: dict[str, Any], layout: str) -> dict[str, Tensor]:
    """The release's names, and where their tensors are."""
    sources = {published_name(name): source for name, source in read_headers(path).items()}
    sources |= read_unused(path)
    if layout == "ahn-only":
        sources = {name: source for name, source in sources.items() if is_memory(name)}
    elif config.get("quantization"):
        raise AHNError(f"{path}: its base is quantized; export ahn-only, or convert with 0 bits")
    for source in sources.values():
        if source.info.dtype not in FLOATS:
            raise AHNError(f"{source.file}: tensor {show(source.name)} is {source.info.dtype}")
    read = Reader()
    return {name: Tensor(s, _dtype(name, sources, read)) for name, s in sources.items()}


def _without_gain(plan: dict[str, Tensor], window: int) -> dict[str, Tensor]:
    """The release has one window: what a router's gain is there goes into its beta."""
    read, found = Reader(), {}
    for name, tensor in plan.items():
        stem, _, last = name.rpartition(".")
        gamma = plan.get(f"{stem}.gamma") if stem.endswith(".ahn_router") else None
        if gamma is None:
            found[name] = tensor
        elif last != "gamma":
            more = gain(read(gamma.source), window) if last == "beta" else None
            found[name] = tensor._replace(more=more)
    return found


def _dtype(name: str, sources: dict[str, Source], read: Reader) -> mx.Dtype:
    """As stored; but a decay, which conversion widens, gets its memory's own dtype back
    if that loses nothing."""
    stored = STORED[sources[name].info.dtype]
    stem, _, last = name.rpartition(".")
    memory = sources.get(f"{stem}.o_proj.weight")
    if last not in ("A_log", "dt_bias") or memory is None:
        return stored
    narrow, x = STORED[memory.info.dtype], read(sources[name])
    return narrow if mx.array_equal(x.astype(narrow).astype(stored), x).item() else stored
