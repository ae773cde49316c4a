"""From a base to a model that can be trained, and from that to a checkpoint."""

import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.directory import read_json
from ..checkpoints.export import release_config
from ..checkpoints.load import built, finish
from ..checkpoints.shards import write_json
from ..errors import AHNError
from ..hub import bases
from ..hub.bases import Base
from ..model.augment import augment, memory_layers, shape_of_attention
from ..model.config import PUBLISHED_NAMES, AHNConfig
from ..model.names import published_name
from ..outputs.directories import check_kind, nearest
from ..outputs.files import (
    check_named,
    check_writable,
    is_read,
    real_path,
    replacing,
    same_file,
)
from ..outputs.parts import clear_part, parts_in
from ..platform import on_cpu
from .curves import CURVES
from .loop import STATE
from .metrics import METRICS
from .streams import Parameters, install, trainable
from .validation import VALIDATION

FILES = (
    *(STATE, METRICS, VALIDATION, CURVES),
    *("model.safetensors", "config.json", "README.md"),
)

CARD = """\
---
library_name: pytorch
tags: [ahn]
base_model: {base}
license: {licence}
---

# A memory for {base}

An [Artificial Hippocampus Network](https://arxiv.org/abs/2510.07318), in the layout of the
PyTorch release: {kind}, {count:,} parameters, trained with a window of {window:,} tokens and
{sinks:,} sinks on {data}.

    ahn-mlx generate book.txt --model BASE --ahn {name}
    ahn-mlx convert {name} --base BASE -o {name}-mlx

Settings of the training: {settings}
"""


HIDDEN = ("out", "data", "resume", "save_every", "query_projection")  # of a card's settings
QUANTIZED = ("quantization", "quantization_config")  # which a memory is not


def load_base(options: dict[str, Any]) -> Base:
    """The base with a memory that says nothing yet.

    options: base, memory, window, sinks, sink_positions, dtype of `ahn-mlx train`; router,
    window_gain and query_projection, which is otherwise chosen where base and memory can have one.
    """
    mx.random.seed(options["seed"])
    base = bases.load_base(options["base"])
    projects = options.get("query_projection")
    config = AHNConfig(
        memory=options["memory"],
        window=options["window"],
        sinks=options["sinks"],
        sink_positions=options["sink_positions"],
        router=options["router"],
        window_gain=options["window_gain"],
        query_projection=_queries_fit(base.model) if projects is None else projects,
    )
    built(base.path, partial(augment, base.model), config)
    finish(base.model, options["dtype"] or _fast_dtype(base.model), base.path)
    # The memory is float32, whatever the base is.
    install(base.model, {n: x.astype(mx.float32) for n, x in trainable(base.model).items()})
    return base


def _fast_dtype(model: nn.Module) -> str | None:
    """Of a base that is trained on here: bfloat16 on a GPU, where its weights are not packed."""
    packed = any(hasattr(module, "bits") for module in model.modules())
    return None if on_cpu() or packed else "bfloat16"


def _queries_fit(model: nn.Module) -> bool:
    """Whether all heads' raw queries are as wide as the hidden state, as that layout has it."""
    try:
        fit = shape_of_attention(model)
    except AHNError:
        return False  # which augment refuses by name
    return bool(fit.n_heads * fit.head_dim == model.args.hidden_size)


def check_out(out: Path, options: dict[str, Any]) -> None:
    """Raise AHNError unless a training can be written to `out`, and nothing is lost by it:
    an empty directory or none; to resume, that of a training.

    options: base, ahn, data, resume of `ahn-mlx train`.
    """
    check_named(out)
    real = real_path(out)
    for read in filter(None, (options["base"], options["ahn"])):
        if same_file(real, Path(read)):
            raise AHNError(f"{out}: is what the training begins from; choose another --out")
    check_kind(out)
    trained = (real / STATE).is_file()
    if options["resume"] and not trained:
        raise AHNError(f"{out / STATE}: no such file; train without --resume")
    if trained and not options["resume"]:
        raise AHNError(f"{out}: has a training already; --resume, or choose another --out")
    if not trained and real.is_dir() and set(real.iterdir()) - set(_leftovers(real)):
        raise AHNError(f"{out}: the directory is not empty; choose another --out")
    texts = [Path(file) for pattern in options["data"] for file in glob.glob(pattern)]
    for name in FILES:
        if is_read(real / name, texts):
            raise AHNError(f"{out / name}: is what --data reads; choose another --out")
    check_writable(nearest(real))


def clear(out: Path) -> None:
    """Delete what a training that was killed did not complete."""
    for part in parts_in(out):
        clear_part(part)


def _leftovers(out: Path) -> list[Path]:
    """What is in the directory of a training that was killed before it had saved its state."""
    try:
        ours = bases.BASE in read_json(out / "config.json")
    except (AHNError, OSError):
        ours = False
    return [
        out / ".lock",
        *parts_in(out),
        *([out / "config.json", out / "README.md"] if ours else []),
    ]


def write_checkpoint(
    out: Path, base: Base, options: dict[str, Any], save: Callable[[Path], None] = lambda out: None
) -> None:
    """The memory alone, in the layout of the PyTorch release, with config.json and a card.

    Bases of a family that release does not know are written in the same layout. options: of
    `ahn-mlx train`; the base is found again by its name. save: writes the state of the training,
    which needs config.json to be gone on with, and makes of the rest what can be replaced.
    """
    model, facts, source = base.model, base.config, base.origin
    config = next(memory_layers(model))[1].config
    weights: Parameters = {
        published_name(name): x.astype(mx.float32) for name, x in trainable(model).items()
    }
    plain = {k: v for k, v in facts.items() if k not in QUANTIZED}
    settings = release_config(plain, config, "ahn-only")
    # Of no meaning to that release: where sinks are seen, and what finds the base.
    ours = {"ahn": config.to_dict(), bases.BASE: bases.whole_name(options["base"])}
    with replacing(out / "config.json") as part:
        write_json(part, {**settings, **ours})
    shown = {k: v for k, v in options.items() if k not in HIDDEN}
    card = CARD.format(
        base=source.repo,
        licence=source.licence or "other",
        kind={v: k for k, v in PUBLISHED_NAMES.items()}[config.memory],
        count=sum(x.size for x in weights.values()),
        window=config.window,
        sinks=config.sinks,
        data=", ".join(Path(d).name for d in options["data"]),
        name=out.name,
        settings=", ".join(f"{k} {v}" for k, v in shown.items()),
    )
    with replacing(out / "README.md") as part:
        part.write_text(card, encoding="utf-8", errors="replace")
    save(out)
    with replacing(out / "model.safetensors") as part, part.open("wb") as file:
        mx.save_safetensors(file, weights, {"format": "pt"})
