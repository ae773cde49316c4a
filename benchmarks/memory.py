"""Bytes: of every kind of cache by length, and of a process that reads a million tokens."""

import resource
from multiprocessing import get_context
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from tqdm import tqdm

from ahn_mlx import AHNConfig, augment

from .measure import default_models, filled, plot, plots_option, table

KINDS = ("full", "rotating", "ahn", "ahn 8-bit", "ahn 4-bit")


def rss() -> int:
    """Bytes this process holds now (on a Mac: at most so far)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


def decoding(kind: str, tokens: int) -> tuple[int, int, int]:
    """Bytes of the cache, MLX's peak and the process, for one token after `tokens`."""
    ours, plain = default_models()
    mx.eval(plain.parameters())  # of which ours shares all but the memory
    cache = filled(ours, plain, kind, tokens)
    mx.reset_peak_memory()
    mx.eval((ours if kind.startswith("ahn") else plain)(mx.array([[5]]), cache=cache))
    return sum(c.nbytes for c in cache), mx.get_peak_memory(), rss()


def tiny() -> nn.Module:
    """Two layers, four heads of 32: fast enough for a million tokens."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=256,
    )
    config = AHNConfig(window=256, sinks=16, sink_positions="clamped")
    return augment(llama.Model(args), config)


def million(tokens: int, early: int, step: int) -> None:
    """Read `tokens` tokens with a tiny model; memory early and at the end."""
    model = tiny()
    mx.eval(model.parameters())
    cache = model.make_cache()
    mx.reset_peak_memory()
    rows = []
    for end in tqdm(range(step, tokens + step, step), unit="step", mininterval=1):
        model.model(mx.random.randint(0, 256, (1, step)), cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        if end in (early, tokens):
            rows.append((end, mx.get_peak_memory(), rss(), sum(c.nbytes for c in cache)))
    table(
        ["tokens read", "MLX peak, MB", "process, MB", "cache, MB"],
        [[f"{n:,}", *(f"{b / 1e6:.2f}" for b in r)] for n, *r in rows],
    )
    (_, *first), (_, *last) = rows
    ratios = " | ".join(f"{b / a:.4f}" for a, b in zip(first, last, strict=True))
    click.echo(f"| end / early | {ratios} |")


@click.command()
@click.option("--contexts", default="1024,4096,16384,65536", show_default=True)
@click.option("--tokens", default=1_000_000, show_default=True, help="For the tiny model.")
@plots_option
def memory(contexts: str, tokens: int, plots: Path) -> None:
    """MB of cache, MLX's peak and the process: a tiny model, then the default model."""
    million(tokens, early=20_000, step=500)
    click.echo()
    lengths = [int(n) for n in contexts.split(",")]
    jobs = [(kind, n) for kind in KINDS for n in lengths]
    # A process each: memory that one has freed would hide what the next one takes.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = {job: pool.apply(decoding, job) for job in tqdm(jobs, leave=False)}
    rows = [
        [kind, *(" / ".join(f"{b / 1e6:.0f}" for b in found[kind, n]) for n in lengths)]
        for kind in KINDS
    ]
    table(["cache / MLX peak / process, MB", *(f"{n:,} tokens" for n in lengths)], rows)
    lines = {kind: (lengths, [found[kind, n][0] / 1e6 for n in lengths]) for kind in KINDS}
    plot(plots / "memory.png", lines, "tokens read", "cache, MB")
