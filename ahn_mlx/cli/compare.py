"""ahn-mlx compare: what a memory is worth on a text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AHNError
from ..hub.published import MODELS
from ..model.config import AHNConfig
from ..outputs.pictures import OutFile, new_figure, picture, save_picture
from .command import Word
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
from .ranks import OnRanks, is_first, pipeline_option, share
from .terminal import progress_bar, say
from .words import read_typed

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from ..measure.compare import Comparison, Stretch

SENTENCES = {
    "helps": "The memory helps.",
    "harms": "The memory harms.",
    "noise": "No difference that could not be chance: take more of the text.",
}
ERRORS = "±: standard error over tokens; noise: less than two of them away from 0"


@click.command(cls=OnRanks)
@click.argument("text", cls=Word, needed=True, metavar="TEXT")
@no_effect(
    *("segments", "seq_len"),
    when=lambda options: options["tokens"] is not None,
    why="with --stream, which reads one text",
)
@no_effect("stream_from", when=lambda options: options["tokens"] is None, why="without --stream")
@no_effect("force", when=lambda options: not options["plot"], why="without --out")
@loading_options
@text_option(help="A text it was not trained on.")
@click.option("--segments", default=8, show_default=True, help="Parts of the text to measure.")
@click.option("--seq-len", default=2048, show_default=True, help="Tokens of each.")
@click.option("--stream", "tokens", type=int, help="Instead: this many tokens as one text.")
@click.option("--stream-from", default=0, show_default=True, help="Measured from there on.")
@json_option
@click.option("-o", "--out", "plot", type=click.Path(path_type=Path), help="Write a picture too.")
@force_option
@quiet_option
@pipeline_option
@needs_memory
def compare(**options: Any) -> None:
    """Measure full attention, window alone and window with memory on a text.

    NLL of the next token and the divergence (KL) from full attention, in nats per token, at the
    positions beyond window and sinks, and whether the memory helps there.

    \b
    ahn-mlx compare book.txt --window 256 --sinks 32
    ahn-mlx compare book.txt --ahn my-memory -o compare.png
    ahn-mlx compare book.txt --stream 131072 --stream-from 65536
    """
    check_numbers(options)
    for name, option in (("segments", "segments"), ("seq_len", "seq-len"), ("tokens", "stream")):
        if options[name] is not None and options[name] < 1:
            raise AHNError(f"--{option} must be at least 1, not {options[name]}")
    out = None
    if options["plot"] and is_first():
        reads = (Path(options["text"]), Path(options["name"]), options["ahn"])
        out = picture(options["plot"], tuple(filter(None, reads)), options["force"])
    text = share(lambda: read_typed([options["text"]], has_prompt=False))
    L, count = options["seq_len"], options["segments"]
    size = len(text.encode("utf-8", "surrogatepass"))
    if options["tokens"] is None and size < L * count:  # no token is shorter than a byte
        raise AHNError(_too_short(options, size // 6, f"{size:,} bytes"))
    import mlx.core as mx

    from ..measure import compare as measure
    from ..reading.tokens import Encoder

    model, tokenizer = load_model(options)
    encoder = Encoder(tokenizer)
    ids, begin = encoder("", text), encoder.begin
    if options["tokens"]:
        _stream(model, mx.array([*begin, *ids]), options, out)
        return
    if len(ids) < L * count:
        raise AHNError(_too_short(options, len(ids), f"{len(ids):,} tokens"))
    with progress_bar(count, "comparing", "segments") as bar:
        result = measure.compare(
            model,
            measure.segments(ids, begin, L, count),
            model.ahn.window,
            model.ahn.sinks,
            bar.update,
        )
    if is_first():  # others may have no logits
        _show(result, options, out)


def _too_short(options: dict[str, Any], tokens: int, said: str) -> str:
    """What is said of a text of about so many tokens: what would do for it."""
    L, count = options["seq_len"], options["segments"]
    fewer = f"--segments {tokens // L}"
    if tokens < L:
        length = 1 << max(4, tokens.bit_length() - 1)
        fewer = f"--segments 1 --seq-len {length}"
        settings = MODELS[options["name"]].settings if options["name"] in MODELS else AHNConfig()
        chosen = {k: options[k] for k in ("window", "sinks") if options[k] is not None}
        if replace(settings, **chosen).capacity + 1 >= length:
            fewer += f" --window {length // 2} --sinks 4"
    segments = f"{count} segments of {L:,} tokens" if count > 1 else f"a segment of {L:,} tokens"
    return f"{options['text']}: {said} are fewer than {segments}; give {fewer}, or a longer text"


def _stream(model: Any, ids: Any, options: dict[str, Any], out: OutFile | None) -> None:
    from ..measure.compare import judge, stream

    n, first = options["tokens"], options["stream_from"]
    if ids.size < n or not 0 <= first < n - 1:
        raise AHNError(f"--stream {n} from {first}: the text has {ids.size:,} tokens")
    with progress_bar(2 * (n - 1), "comparing", "tokens") as bar:
        result = stream(model, ids[None, :n], first, bar.update)
    if not is_first():  # it may have no logits
        return
    if options["as_json"]:
        click.echo(json.dumps([s._asdict() for s in result], indent=2))
    else:
        whole = _whole(result)
        rows = [[f"{s.first:,} to {s.end:,}", *_cells(s)] for s in result]
        print_table(
            ["positions", "NLL, window", "NLL, memory", "difference", "memory"],
            [*rows, ["all", *_cells(whole)]],
        )
        click.echo(SENTENCES[judge(whole.difference, whole.error)])
        click.echo(ERRORS)
    if out:
        _draw(out, draw_stream, result, options)


def _whole(result: "list[Stretch]") -> "Stretch":
    """All stretches as one."""
    weights = [s.end - s.first for s in result]
    parts = [w / sum(weights) for w in weights]
    pairs = list(zip(parts, result, strict=True))
    nll = {kind: sum(p * s.nll[kind] for p, s in pairs) for kind in result[0].nll}
    error = sum((p * s.error) ** 2 for p, s in pairs) ** 0.5
    return type(result[0])(result[0].first, result[-1].end, nll, error)


def _cells(s: "Stretch") -> list[str]:
    from ..measure.compare import judge

    means = [f"{s.nll[kind]:.4f}" for kind in ("window", "memory")]
    return [*means, f"{s.difference:+.4f} ± {s.error:.4f}", judge(s.difference, s.error)]


def _show(result: "Comparison", options: dict[str, Any], out: OutFile | None) -> None:
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
        _print(result)
    if out:
        _draw(out, draw_buckets, result, options)


def _print(result: "Comparison") -> None:
    rows = []
    for b in (*result.buckets, result.total):
        name = "all" if b is result.total else f"{b.first:,} to {b.end:,}"
        losses = [f"{x:.4f}" for x in (*b.nll.values(), *b.kl.values())]
        difference = f"{b.kl['memory'] - b.kl['window']:+.4f} ± {b.error['kl']:.4f}"
        ratio = f"{b.kl['memory'] / b.kl['window']:.3f}"
        rows.append([name, f"{b.tokens:,}", *losses, difference, ratio, b.verdict])
    names = [f"NLL, {kind}" for kind in result.total.nll]
    names += [f"KL, {kind}" for kind in result.total.kl]
    print_table(["positions", "tokens", *names, "difference", "KL ratio", "memory"], rows)
    total = result.total
    gap = (
        f"{result.gap_closed:.1%} of the NLL gap is closed"
        if total.has_gap
        else "the window alone is as good in NLL, as far as so few tokens tell"
    )
    spread = f" (segments {min(result.ratios):.3f} to {max(result.ratios):.3f})"
    click.echo(
        f"{SENTENCES[total.verdict]} KL with memory is {result.ratio:.3f} of the window's"
        f"{spread if len(result.ratios) > 1 else ''}; {gap}"
    )
    click.echo(ERRORS)


def _draw(
    out: OutFile, draw: "Callable[[Figure, Any, str], None]", result: Any, options: dict[str, Any]
) -> None:
    figure = new_figure(8, 4.5)
    draw(figure, result, f"{options['ahn'] or options['name']} on {Path(options['text']).name}")
    save_picture(figure, out, 120)
    say(f"wrote {out.path}")


def draw_buckets(figure: "Figure", result: "Comparison", name: str) -> None:
    """KL of window alone and with memory as bars, by position; over them their ratio."""
    from ..measure.compare import SURE

    buckets = [*result.buckets, result.total]
    axes = figure.subplots()
    places = range(len(buckets))
    window, memory = ([b.kl[kind] for b in buckets] for kind in ("window", "memory"))
    axes.bar([x - 0.2 for x in places], window, 0.4, color="C7", label="window alone")
    errors = [SURE * b.error["kl"] for b in buckets]
    label = f"with memory, ± {SURE:g} standard errors of the difference"
    bars = axes.bar(
        [x + 0.2 for x in places], memory, 0.4, yerr=errors, capsize=4, color="C1", label=label
    )
    marks = [
        f"{b.kl['memory'] / b.kl['window']:.2f}" + ("\nnoise" if b.verdict == "noise" else "")
        for b in buckets
    ]
    axes.bar_label(bars, marks, padding=3)
    ticks = [f"{b.first:,}\nto {b.end:,}" for b in result.buckets]
    axes.set_xticks(list(places), [*ticks, "all"])
    axes.axvline(len(buckets) - 1.5, color="C7", lw=0.8)
    axes.margins(y=0.25)
    axes.set(
        xlabel="position in the text, tokens", ylabel="KL from full attention (nats per token)"
    )
    axes.set_title(f"{name}\nthe lower, the nearer to full attention; numbers: memory / window")
    axes.legend(loc="upper left")


def draw_stream(figure: "Figure", result: "list[Stretch]", name: str) -> None:
    """By how much the memory lowers the NLL, by position."""
    from ..measure.compare import SURE

    axes = figure.subplots()
    gains, errors = [-s.difference for s in result], [SURE * s.error for s in result]
    axes.bar(range(len(result)), gains, 0.7, yerr=errors, capsize=4, color="C1")
    axes.axhline(0, color="C7", lw=0.8)
    ticks = [f"{s.first:,}\nto {s.end:,}" for s in result]
    every = -(-len(ticks) // 8)
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])
    axes.set(
        xlabel="position in the text, tokens",
        ylabel="NLL of window alone minus with memory\n(nats per token)",
    )
    axes.set_title(f"{name}\nabove 0 the memory helps; bars show ± {SURE:g} standard errors")
