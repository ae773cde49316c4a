"""From a base to a model that can be trained, and from that to a checkpoint."""

import glob
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoints.baseconfig import check_same_base, read_config
from ..checkpoints.card import Origin, origin
from ..checkpoints.directory import read_tensors
from ..checkpoints.export import release_config
from ..checkpoints.formats import is_gguf
from ..checkpoints.load import built, finish, load_plain
from ..checkpoints.shards import write_json
from ..checkpoints.tokenizer import load_tokenizer
from ..errors import AHNError
from ..hub import download as hub
from ..hub import zoo
from ..model.augment import augment, memory_layers
from ..model.config import PUBLISHED_NAMES, AHNConfig
from ..model.names import published_name, rename_published
from ..outputs.directories import check_kind, nearest
from ..outputs.files import (
    OutFile,
    check_writable,
    is_read,
    parts_of,
    real_path,
    replacing,
    same_file,
)
from ..outputs.pictures import new_figure, save_picture
from .loop import METRICS, STATE, read_metrics
from .streams import Parameters, install, trainable

CURVES = "curves.png"
FILES = (STATE, METRICS, "model.safetensors", "config.json", "README.md", CURVES)

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

    ahn-mlx convert {name} --base BASE -o {name}-mlx
    ahn-mlx generate book.txt --model {name}-mlx

Settings of the training: {settings}
"""


QUANTIZED = ("quantization", "quantization_config")  # which a memory is not


def load_base(options: dict[str, Any]) -> tuple[nn.Module, Any, tuple[dict[str, Any], Origin]]:
    """The base with a memory, its tokenizer, and its config.json and origin.

    options: base, memory, window, sinks, sink_positions, dtype of `ahn-mlx train`; and
    query_projection, which is otherwise chosen where base and memory can have one.
    """
    mx.random.seed(options["seed"])
    name = options["base"]
    if name in zoo.ZOO:
        path = zoo.smollm2_gguf()
        model, tokenizer = zoo.smollm2_base()
        facts = {k: v for k, v in asdict(model.args).items() if v is not None}
        source = Origin("base", "HuggingFaceTB/SmolLM2-135M-Instruct", "", "apache-2.0")
    else:
        path = Path(name)
        if not path.is_dir() and not is_gguf(path):
            path = hub.download(name)
        model, facts = load_plain(path)
        tokenizer, source = load_tokenizer(path, facts), origin("base", path)
    projects = options.get("query_projection")
    config = AHNConfig(
        memory=options["memory"],
        window=options["window"],
        sinks=options["sinks"],
        sink_positions=options["sink_positions"],
        query_projection=_queries_fit(model) if projects is None else projects,
    )
    built(path, partial(augment, model), config)
    finish(model, options["dtype"], path)
    return model, tokenizer, (facts, source)


def _queries_fit(model: nn.Module) -> bool:
    """Whether all heads' raw queries are as wide as the hidden state, as that layout has it."""
    attention: Any = getattr(model.layers[0], "self_attn", {})
    # Of another family, which augment refuses by name.
    if "q_proj" not in attention:
        return False
    return bool(attention.q_proj.weight.shape[0] == model.args.hidden_size)


def check_out(out: Path, options: dict[str, Any]) -> None:
    """Raise AHNError unless a training can be written to `out`, and nothing is lost by it:
    an empty directory or none; to resume, that of a training.

    options: base, ahn, data, resume of `ahn-mlx train`.
    """
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
    if not trained and real.is_dir() and set(real.iterdir()) - set(leftovers(real)):
        raise AHNError(f"{out}: the directory is not empty; choose another --out")
    texts = [Path(file) for pattern in options["data"] for file in glob.glob(pattern)]
    for name in FILES:
        if is_read(real / name, texts):
            raise AHNError(f"{out / name}: is what --data reads; choose another --out")
    check_writable(nearest(real))


def leftovers(out: Path) -> list[Path]:
    """What a training that was killed did not complete."""
    return [part for name in FILES for part in parts_of(out / name)]


def write_checkpoint(
    out: Path, model: nn.Module, base: tuple[dict[str, Any], Origin], options: dict[str, Any]
) -> None:
    """The memory alone, in the layout of the PyTorch release, with config.json and a card.

    Bases of a family that release does not know are written in the same layout.
    """
    facts, source = base
    config = next(memory_layers(model))[1].config
    weights: Parameters = {
        published_name(name): x.astype(mx.float32) for name, x in trainable(model).items()
    }
    with replacing(out / "model.safetensors") as part, part.open("wb") as file:
        mx.save_safetensors(file, weights, {"format": "pt"})
    plain = {k: v for k, v in facts.items() if k not in QUANTIZED}
    settings = release_config(plain, config, "ahn-only")
    # Of no meaning to that release; it keeps where sinks are seen.
    with replacing(out / "config.json") as part:
        write_json(part, {**settings, "ahn": config.to_dict()})
    shown = {k: v for k, v in options.items() if k not in ("out", "data", "resume", "save_every")}
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


def write_curves(out: Path) -> None:
    """CURVES of metrics.jsonl: the loss and its running mean. Training goes on without."""
    lines = read_metrics(out / METRICS)
    if not lines or find_spec("matplotlib") is None:
        return
    try:
        _draw(lines, OutFile(out / CURVES, "of a training", lambda file: True))
    except AHNError as e:
        print(f"note: {e}", file=sys.stderr)


def _draw(lines: list[dict[str, Any]], out: OutFile) -> None:
    losses: list[float] = [line["loss"] for line in lines]
    means: list[float] = []
    for loss in losses:
        means.append(loss if not means else 0.9 * means[-1] + 0.1 * loss)
    figure = new_figure(6, 4)
    axes = figure.subplots()
    steps = [line["step"] for line in lines]
    axes.plot(steps, losses, alpha=0.3, label="loss")
    axes.plot(steps, means, label="running mean")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    save_picture(figure, out, 120)


def load_trained(directory: Path, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A base with the memory of an AHN-only checkpoint, and the tokenizer.

    options: name of the base, and window, sinks and dtype if not the checkpoint's.
    Raises AHNError if the memory does not fit the base.
    """
    config = AHNConfig.from_dict(read_config(directory))
    own = {k: options.get(k) for k in ("window", "sinks")}
    model, tokenizer, base = load_base(
        {
            **asdict(config),
            **{k: v for k, v in own.items() if v is not None},
            "base": options["name"],
            "dtype": options["dtype"],
            "seed": 0,
        }
    )
    install_trained(model, directory, base)
    model.eval()
    mx.eval(model.parameters())
    return model, tokenizer


def install_trained(model: nn.Module, directory: Path, base: tuple[dict[str, Any], Origin]) -> None:
    """Put the memory of an AHN-only checkpoint into the model. Raises AHNError if it does
    not fit, or was trained for another base."""
    facts, source = base
    check_same_base(Path(source.repo), facts, directory, read_config(directory))
    expected = trainable(model)
    found = rename_published(read_tensors(directory))
    for name in sorted(expected | found):
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            raise AHNError(f"{directory}: tensor {published_name(name)} does not fit this model")
    install(model, {n: x.astype(expected[n].dtype) for n, x in found.items()})
