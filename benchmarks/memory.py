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

from .measure import default_models, figure_class, filled, plots_option, table, write

KINDS = ("full", "rotating", "ahn", "ahn 8-bit", "ahn 4-bit")

# What the picture shows: kind -> (label, color).
DRAWN = {"full": ("full attention", "#b5432a"), "ahn": ("AHN", "#1f5fa8")}


def process_peak() -> int:
    """The most bytes that this process has held so far, its program included."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a Mac's is in bytes
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def decoding(kind: str, tokens: int) -> tuple[int, int, int]:
    """Bytes of the cache, of MLX's peak for one token after `tokens`, and of the process at
    its peak, loading included."""
    ours, plain = default_models()
    mx.eval(plain.parameters())  # of which ours shares all but the memory
    cache = filled(ours, plain, kind, tokens)
    mx.reset_peak_memory()
    mx.eval((ours if kind.startswith("ahn") else plain)(mx.array([[5]]), cache=cache))
    return sum(c.nbytes for c in cache), mx.get_peak_memory(), process_peak()


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
            held = sum(c.nbytes for c in cache)
            rows.append((end, mx.get_peak_memory(), process_peak(), held))
    table(
        ["tokens read", "MLX peak, MB", "process peak, MB", "cache, MB"],
        [[f"{n:,}", *(f"{b / 1e6:.2f}" for b in r)] for n, *r in rows],
    )
    (_, *first), (_, *last) = rows
    ratios = " | ".join(f"{b / a:.4f}" for a, b in zip(first, last, strict=True))
    click.echo(f"| end / early | {ratios} |")


@click.command()
@click.option("--contexts", default="1024,4096,16384,65536,131072", show_default=True)
@click.option("--tokens", default=1_000_000, show_default=True, help="For the tiny model.")
@plots_option
def memory(contexts: str, tokens: int, plots: Path) -> None:
    """MB of cache, MLX's peak and the process's: a tiny model, then the default model."""
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
    table(["cache / MLX peak / process peak, MB", *(f"{n:,} tokens" for n in lengths)], rows)
    picture(plots / "memory.png", lengths, found)


def picture(
    file: Path, lengths: list[int], found: dict[tuple[str, int], tuple[int, int, int]]
) -> None:
    """Write a PNG: cache and process against the tokens read, both axes linear."""
    Figure = figure_class()
    if Figure is None:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("cache", "process at its peak, weights included")
    for panel, part, title in zip(panels, (0, 2), titles, strict=True):
        for kind, (label, color) in DRAWN.items():
            gigabytes = [found[kind, n][part] / 1e9 for n in lengths]
            panel.plot(lengths, gigabytes, marker="o", markersize=4, linewidth=2.5, color=color)
            end = gigabytes[-1]
            text = f"{label}: {end:.1f} GB" if end >= 1 else f"{label}: {1000 * end:.0f} MB"
            # A rising line leaves room on the left of its end, a flat one above it.
            rising = end > 2 * gigabytes[0]
            panel.annotate(
                text,
                (lengths[-1], end),
                xytext=(-14, 0) if rising else (0, 7),
                textcoords="offset points",
                ha="right",
                va="center" if rising else "bottom",
                color=color,
                fontweight="bold",
            )
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("tokens read")
        panel.set_xlim(0, 1.03 * lengths[-1])
        panel.set_xticks([n for n in lengths if n >= lengths[-1] / 10])
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("GB")
    write(figure, file)
