"""Time to read a long prompt: does a chunk cost the same wherever it stands?"""

from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache
from tqdm import tqdm

from ahn_mlx.generate import prefill_step

from .measure import default_models, plot, plots_option, table, take_turns

CHUNK = 2048


def reader(model: nn.Module, cache: list, step: int) -> Callable[[], None]:
    """Each call reads the next CHUNK tokens, `step` at a time, as mlx-lm's prefill does."""

    def read() -> None:
        for _ in range(0, CHUNK, step):
            model(mx.random.randint(0, 40_000, (1, step)), cache=cache)
            mx.eval([c.state for c in cache])
            mx.clear_cache()

    return read


@click.command()
@click.option("--tokens", default=65_536, show_default=True, help="Length of our prompt.")
@click.option("--rotating", default=16_384, show_default=True, help="Length of mlx-lm's.")
@click.option("--step", type=int, help="Tokens per step. [as ahn-mlx generate on this machine]")
@plots_option
def prefill(tokens: int, rotating: int, step: int | None, plots: Path) -> None:
    """Seconds per chunk of 2,048 tokens: the default model and mlx-lm's RotatingKVCache."""
    ours, plain = default_models()
    step = step or prefill_step()
    ring = [RotatingKVCache(ours.ahn.capacity, keep=ours.ahn.sinks) for _ in plain.layers]
    readers = {
        "AHN": reader(ours, ours.make_cache(), step),
        "rotating": reader(plain, ring, step),
    }
    times: dict[str, list[float]] = {name: [] for name in readers}
    for n in tqdm(range(tokens // CHUNK), unit="chunk"):
        if n == rotating // CHUNK:
            del readers["rotating"]
        for name, seconds in take_turns(readers, 1).items():
            times[name].append(seconds)
    both = len(times["rotating"])
    total = {name: sum(t[:both]) for name, t in times.items()}
    third, last = times["AHN"][2], times["AHN"][-1]
    rows = [[f"{CHUNK * both:,} tokens, s", *(f"{t:.1f}" for t in total.values())]]
    rows += [["tokens/s", *(f"{CHUNK * both / t:.0f}" for t in total.values())]]
    rows += [["ratio to rotating", f"{total['AHN'] / total['rotating']:.2f}", ""]]
    rows += [[f"third chunk of {CHUNK:,}, s", f"{third:.1f}", f"{times['rotating'][2]:.1f}"]]
    rows += [[f"last chunk of {CHUNK * len(times['AHN']):,}, s", f"{last:.1f}", ""]]
    rows += [["last / third", f"{last / third:.3f}", ""]]
    table([f"steps of {step:,} tokens", *times], rows)
    ends = [CHUNK * (n + 1) for n in range(len(times["AHN"]))]
    lines = {name: (ends[: len(t)], [CHUNK / s for s in t]) for name, t in times.items()}
    plot(plots / "prefill.png", lines, "tokens read", "tokens/s")
