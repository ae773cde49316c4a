"""Does the model still read, far from the start?

Mean loss (nats/token) over the last tokens of a long text, with everything before them
read, against the same tokens after a fresh prompt of just the sinks and one window.

    python -m benchmarks far book.txt --tokens 100000
"""

from itertools import pairwise
from typing import TextIO

import click
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

import ahn_mlx

STEP = 512


def mean_loss(model: nn.Module, ids: list[int], measured: int) -> float:
    """Mean cross-entropy of the last `measured` ids, reading STEP tokens at a time."""
    cache = model.make_cache()
    total, end = 0.0, len(ids) - 1
    tokens = mx.array(ids)[None]
    start = end - measured
    cuts = [*range(0, start, STEP), *range(start, end, STEP), end]
    for a, b in tqdm(list(pairwise(cuts)), unit="chunk"):
        logits = model(tokens[:, a:b], cache=cache)
        mx.eval([c.state for c in cache])
        if a >= start:
            targets = tokens[:, a + 1 : b + 1]
            total += nn.losses.cross_entropy(logits, targets, reduction="sum").item()
        mx.clear_cache()
    return total / measured


@click.command()
@click.argument("text", type=click.File(encoding="utf-8"))
@click.option("--tokens", default=100_000, show_default=True, help="Length of the document.")
@click.option("--measured", default=4096, show_default=True, help="Tokens at its end to score.")
@click.option("--model", "name", default="ahn-gdn-smollm2-135m", show_default=True)
def far(text: TextIO, tokens: int, measured: int, name: str) -> None:
    """Loss far from the start of TEXT against the loss after a fresh, short prompt."""
    model, tokenizer = ahn_mlx.load(name)
    ids = tokenizer.encode(text.read(), add_special_tokens=False)[:tokens]
    sinks, window = model.ahn.sinks, model.ahn.window
    near = ids[:sinks] + ids[-(measured + window + 1) :]
    fresh = mean_loss(model, near, measured)
    distant = mean_loss(model, ids, measured)
    click.echo("| read before | loss, nats/token |\n|---|---|")
    click.echo(f"| {sinks} sinks + {window} tokens | {fresh:.4f} |")
    click.echo(f"| {len(ids) - measured} tokens | {distant:.4f} |")
    click.echo(f"| ratio | {distant / fresh:.4f} |")
