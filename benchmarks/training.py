"""What training takes: tokens per second of both stages, and bytes for large models."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tqdm import tqdm

import ahn_mlx
from ahn_mlx.cli.estimate import MACS, USABLE
from ahn_mlx.hub.published import DEFAULT, MODELS
from ahn_mlx.memory import MEMORIES
from ahn_mlx.model.augment import build
from ahn_mlx.train import layerwise, loop
from ahn_mlx.train.data import Sequences
from ahn_mlx.train.losses import ROWS, kl
from ahn_mlx.train.output import load_base
from ahn_mlx.train.settings import Settings
from ahn_mlx.train.streams import Stream, install, study, trainable

from .measure import table

SEQUENCE, WINDOW, SINKS = 2048, 256, 32
DEMO = Path(ahn_mlx.__file__).parent / "demo" / "pride-and-prejudice.txt"


@click.command()
@click.option("--lengths", default="4096,8192", show_default=True, help="Tokens of a sequence.")
@click.option("--sizes", default="3b,7b", show_default=True)
def training(lengths: str, sizes: str) -> None:
    """Tokens per second of SmolLM2-135M, launches of a step on a GPU, and memory that a 3B or 7B
    model takes.

    Launches are counted in a checkout, without a GPU. The memory is counted, except for two
    things that are run at full size in float32: the backward pass of one layer and of the head.
    """
    rows = []
    for kind in tqdm(MEMORIES, leave=False):
        *rates, peak, less = speeds(kind)
        rows.append([kind, *(f"{x:.0f}" for x in rates), f"{peak:.1f}", f"{less:.1f}"])
    head = ["SmolLM2-135M, tokens/s", "layer-wise", "end to end", "peak, GB"]
    table([*head, "with --grad-checkpoint"], rows)
    click.echo()
    launched()
    click.echo()
    rows = []
    cases = [(size, int(length)) for size in sizes.split(",") for length in lengths.split(",")]
    for size, length in tqdm(cases, leave=False):
        parts = gigabytes(f"ahn-gdn-{size}", length)
        total = sum(parts.values())
        fits = next((str(mac) for mac in MACS if mac >= 16 and total <= USABLE * mac), "none")
        cells = [f"{x:.1f}" for x in (*parts.values(), total)]
        rows.append([f"{size}, {length:,} tokens", *cells, fits])
    heads = ["weights", "optimizer", "checkpoints", "one layer", "head", "all, GB", "a Mac of, GB"]
    table(["with --grad-checkpoint", *heads], rows)


def launched() -> None:
    """A table of launches, as many as a GPU would need with MLX's operations."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from launches import training as launches

    rows = []
    for kind in tqdm(MEMORIES, leave=False):
        one, eight = (launches(kind, "clamped", batch).total() for batch in (1, 8))
        rows.append([kind, f"{one:,}", f"{eight:,}", f"{eight / 8:,.0f}"])
    table(["launches of a step, 30 layers", "one sequence", "eight at once", "for each"], rows)


def speeds(kind: str) -> tuple[float, float, float, float]:
    """Tokens per second of the layer-wise stage, on one sequence, and of two steps; gigabytes that
    such a step takes at most, on one sequence, without and with --grad-checkpoint."""
    options = {"base": DEFAULT, "memory": kind, "window": WINDOW, "sinks": SINKS}
    model, tokenizer, *_ = load_base(
        {**options, "sink_positions": "clamped", "router": False, "dtype": "float32", "seed": 0}
    )
    data = Sequences((str(DEMO),), tokenizer, SEQUENCE, 0)
    settings = Settings(WINDOW, SINKS, SEQUENCE, 3, 1e-4, "kl", 0, 1, 0, 0.0, False, False, 0)
    first = _seconds(lambda: layerwise.fit(model, data, 1, WINDOW, SINKS))
    trainer = loop.Trainer(model, data, settings)
    mx.clear_cache()
    mx.reset_peak_memory()
    second = _seconds(lambda: [trainer.train_step() for _ in range(2)])
    peaks = [mx.get_peak_memory() / 1e9]
    trainer.settings = replace(settings, grad_checkpoint=True)
    mx.clear_cache()
    mx.reset_peak_memory()
    trainer.train_step()
    peaks.append(mx.get_peak_memory() / 1e9)
    return SEQUENCE / first, 2 * SEQUENCE / second, peaks[0], peaks[1]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gigabytes(name: str, length: int) -> dict[str, float]:
    """Parts of the peak of a step on one sequence, base in bfloat16."""
    entry = MODELS[name]
    ours = {"window": length // 4, "query_projection": True}
    config = {**entry.base.config, "ahn": {**entry.ahn.to_dict(), **ours}}
    whole = build(config)
    layers, C = len(whole.layers), whole.args.hidden_size
    memories = sum(x.size for x in trainable(whole).values())
    flat: Any = tree_flatten(whole.parameters())
    one = build({**config, "num_hidden_layers": 1, "vocab_size": 256})
    return {
        "weights": 2 * sum(x.size for _, x in flat) / 1e9,
        # Parameters, gradients, two moments, and the copy in the model; float32.
        "optimizer": 5 * 4 * memories / 1e9,
        # The input of each layer, and the teacher's last hidden states.
        "checkpoints": 2 * (layers + 1) * length * C / 1e9,
        "one layer": _layer_peak(one, length) / 1e9,
        "head": _head_peak(build({**config, "num_hidden_layers": 1})) / 1e9,
    }


def _layer_peak(model: nn.Module, length: int) -> int:
    """Bytes beyond weights of one layer's forward and backward pass, window length / 4."""
    ahn = model.ahn
    parameters = trainable(model)
    tokens = mx.zeros((1, length), dtype=mx.int32)

    def loss(parameters: dict[str, mx.array]) -> mx.array:
        install(model, parameters)
        return study(model, tokens, ahn.window, ahn.sinks, checkpoint=True).hidden.square().mean()

    return _peak(lambda: mx.value_and_grad(loss)(parameters), model)


def _head_peak(model: nn.Module) -> int:
    """Bytes beyond weights of the loss of some rows, which are taken a block at a time."""
    labels = mx.zeros((1, 4 * ROWS), dtype=mx.int32)

    def loss(x: mx.array) -> mx.array:
        return kl(model, Stream(0.5 * x, []), Stream(x, []), labels, 0)

    x = mx.random.normal((1, 4 * ROWS, model.args.hidden_size))
    return _peak(lambda: mx.value_and_grad(loss)(x), model)


def _peak(run: Callable[[], Any], model: nn.Module) -> int:
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before
