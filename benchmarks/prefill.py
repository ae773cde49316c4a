"""Time to read a long prompt: does a chunk cost the same wherever it stands?"""

from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ahn_mlx.reading.generate import prefill_step

from .measure import default_models, filled, plot, plots_option, table, take_turns

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
@click.option("--tokens", default=16_384, show_default=True, help="Length of the whole prompt.")
@click.option("--far", default=65_536, show_default=True, help="Where the last chunk ends.")
@click.option("--rounds", default=5, show_default=True, help="Turns of third and last chunk.")
@click.option("--step", type=int, help="Tokens per step. [as ahn-mlx generate on this machine]")
@plots_option
def prefill(tokens: int, far: int, rounds: int, step: int | None, plots: Path) -> None:
    """Seconds per chunk of 2,048 tokens: the default model and mlx-lm's RotatingKVCache."""
    ours, plain = default_models()
    step = step or prefill_step()
    readers = {
        "AHN": reader(ours, ours.make_cache(), step),
        "rotating": reader(plain, filled(ours, plain, "rotating", 0), step),
    }
    chunks = [take_turns(readers, 1) for _ in tqdm(range(tokens // CHUNK), unit="chunk")]
    total = {name: sum(seconds[name] for seconds in chunks) for name in readers}
    places = {
        "third": reader(ours, filled(ours, plain, "ahn", 2 * CHUNK), step),
        "last": reader(ours, filled(ours, plain, "ahn", far - CHUNK), step),
    }
    place = take_turns(places, rounds, "third and last chunk")
    rows = [
        [f"{tokens:,} tokens, s", *(f"{t:.1f}" for t in total.values())],
        ["tokens/s", *(f"{tokens / t:.0f}" for t in total.values())],
        ["ratio to rotating", f"{total['AHN'] / total['rotating']:.2f}", ""],
        [f"third chunk of {CHUNK:,}, s", f"{place['third']:.1f}", ""],
        [f"last chunk of {far:,}, s", f"{place['last']:.1f}", ""],
        ["last / third", f"{place['last'] / place['third']:.3f}", ""],
    ]
    table([f"steps of {step:,} tokens", *readers], rows)
    ends = [CHUNK * (n + 1) for n in range(len(chunks))]
    lines = {name: (ends, [CHUNK / s[name] for s in chunks]) for name in readers}
    plot(plots / "prefill.png", lines, "tokens read", "tokens/s")
