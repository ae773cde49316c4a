"""What rounding costs: a quantized window, and gates in bfloat16, against float32."""

from collections.abc import Callable
from typing import TextIO

import click
import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

import ahn_mlx
from ahn_mlx.model.attention import AHNAttention
from ahn_mlx.model.cache import AHNCache

STEP = 512


class RoundedGates(AHNCache):
    """Holds gates in bfloat16 whatever the model's dtype."""

    def update(self, keys: mx.array, values: mx.array, gates: mx.array):  # type: ignore[no-untyped-def]
        return super().update(keys, values, gates.astype(mx.bfloat16).astype(gates.dtype))


def read(model: nn.Module, cache: list, ids: mx.array) -> mx.array:
    """Log probabilities [L, V] after every token."""
    parts = []
    for start in tqdm(range(0, ids.shape[1], STEP), unit="chunk", leave=False):
        logits = model(ids[:, start : start + STEP], cache=cache)[0]
        parts.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(parts[-1], [c.state for c in cache])
    return mx.concatenate(parts)


def divergence(p: mx.array, q: mx.array) -> float:
    """Mean KL(p || q) in nats per token, of log probabilities."""
    return sum((mx.exp(a) * (a - b)).sum().item() for a, b in zip(p, q, strict=True)) / len(p)


@click.command()
@click.argument("text", type=click.File(encoding="utf-8"))
@click.option("--tokens", default=4096, show_default=True)
@click.option("--gain", default=0.05, show_default=True, help="Of an untrained memory's output.")
def quantized(text: TextIO, tokens: int, gain: float) -> None:
    """Mean KL against the unquantized model over the first tokens of TEXT.

    The default model with an untrained memory would not notice its gates: its output
    projection is set to `gain` times a random matrix.
    """
    model, tokenizer = ahn_mlx.load("ahn-gdn-smollm2-135m", dtype="float32")
    mx.random.seed(0)
    for layer in model.layers:
        assert isinstance(layer.self_attn, AHNAttention)
        projection = layer.self_attn.ahn.o_proj
        if not projection.weight.any():
            projection.weight = gain * mx.random.normal(projection.weight.shape)
    ids = mx.array(tokenizer.encode(text.read(), add_special_tokens=False)[:tokens])[None]
    window, sinks = model.ahn.window, model.ahn.sinks
    kinds: dict[str, Callable[[], AHNCache]] = {
        "8-bit window": lambda: AHNCache(window, sinks, bits=8),
        "4-bit window": lambda: AHNCache(window, sinks, bits=4),
        "bfloat16 gates": lambda: RoundedGates(window, sinks),
    }
    exact = read(model, model.make_cache(), ids)
    click.echo("| against float32 | KL, nats/token |\n|---|---|")
    for name, make in kinds.items():
        found = read(model, [make() for _ in model.layers], ids)
        click.echo(f"| {name} | {divergence(exact, found):.2e} |")
