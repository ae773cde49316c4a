"""What one of several ranks holds and sends, counted from the shape of the whole model."""

from dataclasses import replace
from typing import NamedTuple

from ..model.division import heads_of_each, layers_of_each, rows_of_each
from .cost import Shape

TOKEN = 4  # bytes of a sampled one
PRESSED = 4  # bytes of what ranks ask each other after it: whether anyone wants to stop
SQUARES = 4  # bytes of the sum of squares that Mamba2's norm takes over all heads


class Sent(NamedTuple):
    """Bytes that one rank sends for one generated token behind a full window: that it gives to
    mx.distributed, and that go to its neighbours where these are joined in a ring.

    Ranks of a pipeline ask each other only now and then whether to stop, which is not counted.
    """

    payload: int
    ring: int


def part(shape: Shape, ranks: int, rank: int, pipeline: bool) -> Shape:
    """What a rank holds. Raises AHNError if the model cannot be divided so.

    Norms and biases, which are small, are counted whole where heads are divided.
    """
    if pipeline:
        return _run(shape, ranks, rank)
    heads_of_each(shape.kv_heads, ranks)
    return replace(
        shape,
        heads=shape.heads // ranks,
        kv_heads=shape.kv_heads // ranks,
        projections=shape.projections // ranks,
        mlp=shape.mlp // ranks,
        gates=shape.gates // ranks,
        readout=shape.readout // ranks,
        embedding=rows_of_each(shape.embedding // shape.hidden, ranks) * shape.hidden,
    )


def _run(shape: Shape, ranks: int, rank: int) -> Shape:
    run, layers = layers_of_each(shape.layers, ranks)[rank], shape.layers
    full = [i for i in shape.ahn.fa_layer_ids if i in run]
    remembering, remember = len(run) - len(full), max(1, shape.memory_layers)
    first, last = run.start == 0, run.stop == layers
    return replace(
        shape,
        ahn=replace(shape.ahn, fa_layer_ids=tuple(range(len(full)))),
        layers=len(run),
        projections=shape.projections * len(run) // layers,
        mlp=shape.mlp * len(run) // layers,
        vectors=shape.vectors * len(run) // layers,
        gates=shape.gates * remembering // remember,
        readout=shape.readout * remembering // remember,
        memory_vectors=shape.memory_vectors * remembering // remember,
        # The first run embeds, the last makes logits, by the same matrix or its own.
        embedding=shape.embedding if first or last else 0,
        tied=True,
    )


def sent(shape: Shape, kind: str, ranks: int, pipeline: bool, number: int = 2) -> Sent:
    """Of a rank that sends most. kind: as flops has it. number: bytes of an activation."""
    if pipeline:
        layers_of_each(shape.layers, ranks)
        hidden = shape.hidden * number
        return Sent(hidden + TOKEN, hidden + _round(1, TOKEN, ranks))
    heads_of_each(shape.kv_heads, ranks)
    rows = rows_of_each(shape.embedding // shape.hidden, ranks)
    # After the embedding, and after attention and MLP of each layer.
    sums = (2 * shape.layers + 1) * [(shape.hidden, number)] + [(1, TOKEN), (1, PRESSED)]
    if kind == "ahn" and shape.ahn.memory == "mamba2":
        sums += shape.memory_layers * [(1, SQUARES)]
    logits = rows * number
    return Sent(
        sum(n * size for n, size in sums) + logits,
        sum(_round(n, size, ranks) for n, size in sums) + (ranks - 1) * logits,
    )


def _round(elements: int, size: int, ranks: int) -> int:
    """Bytes that each rank sends while a sum goes round a ring twice, a part at a time; less than
    one element each are filled up."""
    return 2 * (ranks - 1) * -(-elements // ranks) * size
