"""Time of one token against what was read before: AHN, full attention, rotating cache."""

from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn

from .measure import default_models, filled, plot, plots_option, table, take_turns


def stepper(model: nn.Module, cache: list, tokens: int) -> Callable[[], None]:
    """Decode as mlx-lm does: the next step is queued before this one's token is read."""
    y = mx.array([[5]])

    def step() -> None:
        nonlocal y
        for _ in range(tokens):
            following = mx.argmax(model(y, cache=cache)[:, -1:], axis=-1)
            mx.async_eval(following)
            y.item()
            y = following

    step()  # warm up
    return step


@click.command()
@click.option("--contexts", default="1024,4096,16384,65536", show_default=True)
@click.option("--tokens", default=4, show_default=True, help="Decoded per turn.")
@click.option("--rounds", default=15, show_default=True, help="Turns; the median counts.")
@plots_option
def decode(contexts: str, tokens: int, rounds: int, plots: Path) -> None:
    """Milliseconds per token of the default model after contexts of several lengths."""
    ours, plain = default_models()
    kinds = {"AHN": (ours, "ahn"), "rotating": (plain, "rotating"), "full": (plain, "full")}
    lengths = [int(n) for n in contexts.split(",")]
    times: list[dict[str, float]] = []
    # Ours at all lengths at once: the ratio between them is one of the claims.
    steps = {str(n): stepper(ours, filled(ours, plain, "ahn", n), tokens) for n in lengths}
    flat = take_turns(steps, rounds, "AHN at all lengths")
    for n in lengths:
        steps = {
            name: stepper(model, filled(ours, plain, kind, n), tokens)
            for name, (model, kind) in kinds.items()
        }
        # Full attention apart: what takes turns with its reads finds the caches swept.
        full = {"full": steps.pop("full")}
        median = take_turns(steps, rounds, f"context {n}") | take_turns(full, rounds, "full")
        times.append({name: 1e3 * t / tokens for name, t in median.items()})
        mx.clear_cache()
    rows = [
        [
            f"{n:,}",
            *(f"{t[name]:.1f}" for name in kinds),
            f"{t['AHN'] / t['rotating']:.2f}",
            f"{t['full'] / t['AHN']:.2f}",
            f"{flat[str(n)] / flat[str(lengths[0])]:.3f}",
        ]
        for n, t in zip(lengths, times, strict=True)
    ]
    head = ["context", *(f"{name}, ms" for name in kinds), "AHN / rotating", "full / AHN"]
    table([*head, f"AHN / AHN at {lengths[0]:,}"], rows)
    lines = {name: (lengths, [t[name] for t in times]) for name in kinds}
    plot(plots / "decode.png", lines, "tokens read before", "ms per token")
