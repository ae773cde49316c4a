"""ahn-mlx compare: what a memory is worth on a text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AHNError
from ..outputs.pictures import OutFile, new_figure, picture, save_picture
from .command import Command, Word
from .estimate import print_table
from .options import (
    check_numbers,
    force_option,
    json_option,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    quiet_option,
    text_option,
)
from .terminal import progress_bar
from .words import read_typed

if TYPE_CHECKING:
    from ..measure.compare import Comparison, Stretch


@click.command(cls=Command)
@click.argument("text", cls=Word, needed=True, metavar="TEXT")
@no_effect(
    "q_bits",
    when=lambda options: options["ahn"],
    why="with --ahn, whose base is as it is",
)
@no_effect(
    *("segments", "seq_len"),
    when=lambda options: options["tokens"] is not None,
    why="with --stream, which reads one text",
)
@no_effect("stream_from", when=lambda options: options["tokens"] is None, why="without --stream")
@no_effect("force", when=lambda options: not options["plot"], why="without --out")
@loading_options
@click.option("--ahn", type=click.Path(path_type=Path), help="Memory from a directory of train.")
@text_option(help="A text it was not trained on.")
@click.option("--segments", default=8, show_default=True, help="Parts of the text to measure.")
@click.option("--seq-len", default=2048, show_default=True, help="Tokens of each.")
@click.option("--stream", "tokens", type=int, help="Instead: this many tokens as one text.")
@click.option("--stream-from", default=0, show_default=True, help="Measured from there on.")
@json_option
@click.option("-o", "--out", "plot", type=click.Path(path_type=Path), help="Write a picture too.")
@force_option
@quiet_option
@needs_memory
def compare(**options: Any) -> None:
    """Measure full attention, window alone and window with memory on a text.

    NLL (nats per token) and perplexity of the next token, and the divergence (KL) from full
    attention, at the positions beyond window and sinks.

    \b
    ahn-mlx compare book.txt --window 256 --sinks 32
    ahn-mlx compare book.txt --ahn my-memory -o compare.png
    ahn-mlx compare book.txt --stream 131072 --stream-from 65536
    """
    check_numbers(options)
    for name in ("segments", "seq_len", "tokens"):
        if options[name] is not None and options[name] < 1:
            raise AHNError(f"--{name.replace('_', '-')} must be at least 1, not {options[name]}")
    out = None
    if options["plot"]:
        reads = (Path(options["text"]), Path(options["name"]), options["ahn"])
        out = picture(options["plot"], tuple(filter(None, reads)), options["force"])
    text = read_typed([options["text"]], has_prompt=False)
    import mlx.core as mx

    from ..measure import compare as measure
    from ..reading.tokens import Encoder

    if options["ahn"]:
        from ..train.output import load_trained

        model, tokenizer = load_trained(options["ahn"], options)
    else:
        model, tokenizer = load_model(options)
    encoder = Encoder(tokenizer)
    ids, begin = encoder("", text), encoder.begin
    if options["tokens"]:
        _stream(model, mx.array([*begin, *ids]), options, out)
        return
    L, count = options["seq_len"], options["segments"]
    if len(ids) < L * count:
        raise AHNError(
            f"{options['text']}: {len(ids):,} tokens are less than {count} segments of {L:,};"
            " use fewer or shorter ones"
        )
    with progress_bar(count, "comparing", "segments") as bar:
        result = measure.compare(
            model,
            measure.segments(ids, begin, L, count),
            model.ahn.window,
            model.ahn.sinks,
            bar.update,
        )
    _show(result, options, out)


def _stream(model: Any, ids: Any, options: dict[str, Any], out: OutFile | None) -> None:
    from ..measure.compare import stream

    n, first = options["tokens"], options["stream_from"]
    if ids.size < n or not 0 <= first < n - 1:
        raise AHNError(f"--stream {n} from {first}: the text has {ids.size:,} tokens")
    with progress_bar(2 * (n - 1), "comparing", "tokens") as bar:
        result = stream(model, ids[None, :n], first, bar.update)
    if options["as_json"]:
        click.echo(json.dumps([s._asdict() for s in result], indent=2))
    else:
        rows = [_row(s) for s in result]
        weights = [s.end - s.first for s in result]
        means = [
            sum(w * s.nll[kind] for w, s in zip(weights, result, strict=True)) / sum(weights)
            for kind in ("window", "memory")
        ]
        rows.append(["all", *(f"{x:.4f}" for x in means), f"{means[1] - means[0]:+.4f}"])
        print_table(["positions", "NLL, window", "NLL, memory", "difference"], rows)
    if out:
        _plot(
            out,
            [s.first for s in result],
            {k: [s.nll[k] for s in result] for k in result[0].nll},
            "NLL",
        )


def _row(s: "Stretch") -> list[str]:
    difference = s.nll["memory"] - s.nll["window"]
    values = (f"{s.nll['window']:.4f}", f"{s.nll['memory']:.4f}", f"{difference:+.4f}")
    return [f"{s.first:,} to {s.end:,}", *values]


def _show(result: "Comparison", options: dict[str, Any], out: OutFile | None) -> None:
    buckets = [*result.buckets, result.total]
    if options["as_json"]:
        facts = {
            "buckets": [b._asdict() for b in result.buckets],
            "total": result.total._asdict(),
            "kl_ratio": result.ratio,
            "kl_ratio_by_segment": result.ratios,
            "nll_gap_closed": result.gap_closed,
        }
        click.echo(json.dumps(facts, indent=2))
    else:
        from math import exp

        rows = []
        for b in buckets:
            name = "all" if b is result.total else f"{b.first:,} to {b.end:,}"
            nll = [f"{x:.4f}" for x in b.nll.values()]
            kl = [f"{x:.4f}" for x in b.kl.values()]
            ppl = [f"{exp(x):.2f}" for x in b.nll.values()]
            rows.append([name, *nll, *ppl, *kl, f"{b.kl['memory'] / b.kl['window']:.3f}"])
        kinds = list(result.total.nll)
        names = [f"{what}, {kind}" for what in ("NLL", "perplexity") for kind in kinds]
        names += [f"KL, {kind}" for kind in kinds[1:]]
        print_table(["positions", *names, "KL ratio"], rows)
        click.echo(
            f"KL with memory is {result.ratio:.3f} of the window's (segments"
            f" {min(result.ratios):.3f} to {max(result.ratios):.3f});"
            f" {result.gap_closed:.1%} of the NLL gap is closed"
        )
    if out:
        curves = {k: [b.kl[k] for b in result.buckets] for k in result.total.kl}
        _plot(out, [b.first for b in result.buckets], curves, "KL from full attention")


def _plot(out: OutFile, positions: list[int], curves: dict[str, list[float]], label: str) -> None:
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(positions, values, marker="o", label=name)
    axes.set(xlabel="position", ylabel=f"{label} (nats per token)")
    axes.legend()
    save_picture(figure, out, 120)
