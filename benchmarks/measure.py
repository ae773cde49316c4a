"""What all benchmarks share: turns taken in one process, a markdown table, a plot."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, RotatingKVCache
from tqdm import tqdm

from ahn_mlx.hub import zoo

plots_option = click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("docs/plots"),
    show_default=True,
    help="Directory of the PNG.",
)


def take_turns(
    steps: Mapping[str, Callable[[], Any]], rounds: int, label: str = ""
) -> dict[str, float]:
    """Median seconds of each step; the steps take turns, so that a busy moment hits all.

    Every round starts with another step: none always follows the one that empties the
    processor's caches.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    for _ in tqdm(range(rounds), desc=label, leave=False):
        order.append(order.pop(0))
        for name, step in order:
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table."""
    click.echo("| " + " | ".join(head) + " |")
    click.echo("|" + "---|" * len(head))
    for row in rows:
        click.echo("| " + " | ".join(row) + " |")


def plot(
    file: Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> None:
    """Write a PNG with both axes logarithmic."""
    Figure = figure_class()
    if Figure is None:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", label=name)
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    write(figure, file)


def figure_class() -> Any:
    """matplotlib's Figure, or None and a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("note: no plot without matplotlib: pip install 'ahn-mlx[plot]'", err=True)
        return None
    return Figure


def write(figure: Any, file: Path) -> None:
    """Write a figure as PNG and say where."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    click.echo(f"plot: {file}", err=True)


def default_models() -> tuple[nn.Module, nn.Module]:
    """The default AHN model and its base as plain mlx-lm, with the very same weights."""
    ours, _ = zoo.load(zoo.DEFAULT, dtype="float32")
    plain, _ = zoo.smollm2_base()
    names = dict(tree_flatten(plain.parameters()))
    plain.load_weights([(n, x) for n, x in tree_flatten(ours.parameters()) if n in names])
    return ours, plain


def filled(ours: nn.Module, plain: nn.Module, kind: str, tokens: int) -> list[Any]:
    """Caches as after `tokens` tokens, of random numbers: no step's time depends on them.

    kind: "full", "rotating" (as large as ours), "ahn", "ahn 8-bit" or "ahn 4-bit".
    """
    caches: list[Any] = ours.make_cache()
    if kind == "full":
        caches = [KVCache() for _ in plain.layers]
    elif kind == "rotating":
        keep = ours.ahn.sinks
        caches = [RotatingKVCache(ours.ahn.capacity, keep=keep) for _ in plain.layers]
    elif kind != "ahn":
        caches = [c.to_quantized(64, int(kind.split()[1][0])) for c in caches]
    heads, kv_heads = ours.args.num_attention_heads, ours.args.num_key_value_heads
    D = ours.args.hidden_size // heads
    for start in range(0, tokens, 1024):
        n = min(1024, tokens - start)
        for cache in caches:
            kv = [mx.random.uniform(-1, 1, (1, kv_heads, n, D)) for _ in range(2)]
            if kind.startswith("ahn"):
                beta, decay = mx.random.uniform(0, 1, (2, 1, heads, n, 1))
                cache.update(*kv, mx.concatenate([beta, -0.1 * decay], axis=-1))
                cache.memory = mx.random.uniform(-1, 1, (1, heads, D, D))
            else:
                cache.update_and_fetch(*kv)
            mx.eval(cache.state)
    mx.clear_cache()
    return caches
