"""ahn-mlx estimate: what a model costs, before it is downloaded."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..measure.chips import CHIPS, USABLE, this_chip
from ..model.config import PUBLISHED_NAMES
from ..outputs.pictures import OutFile, new_figure, picture, save_picture
from .command import Command, Word
from .options import check_numbers, force_option, json_option, model_option, no_effect
from .terminal import say

CHIP = click.Choice(list(CHIPS), case_sensitive=False)
CHIP_HELP = f"Give bounds for it: {', '.join(CHIPS)}."
KINDS = ("full", "window", "ahn")
MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 256, 512)  # GB
SERVERS = (16, 32, 64, 128, 512)  # GB, of Macs that serve
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # on the hub, of which config.json is enough
CURVE = (4_096, 16_384, 32_768, 65_536, 131_072, 262_144, 1_048_576)
# As contexts are named: 128k is 131,072. A page of a novel has some 300 words.
UNITS = {"": 1, "k": 1024, "m": 1024**2, "p": 400}
LONGEST = 10**12


class Tokens(click.ParamType):  # type: ignore[type-arg]  # of older ones there is no other
    """A number of tokens: 200000, 128k, 1.5M, or 500p for pages."""

    name = "tokens"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower().replace(",", "").replace("_", "")
        found = re.fullmatch(r"(-?\d+(?:\.\d+)?) *([kmp]?)", text, re.ASCII)
        if found is None:
            self.fail(f"{value!r} is not a number of tokens, such as 200000, 128k, 1M or 500p")
        tokens = float(found[1]) * UNITS[found[2]]
        if not 1 <= tokens <= LONGEST:
            self.fail(f"must be from 1 to {LONGEST:,} tokens, not {value!r}")
        return round(tokens)


@click.command(cls=Command)
@click.argument("name", cls=Word, metavar="MODEL")
@no_effect(
    *("name", "context", "window", "sinks", "memory", "kv_bits", "weight_bits", "compare"),
    *("chip", "as_json", "plot", "force", "ranks", "pipeline"),
    when=lambda options: options["paper"],
    why="with --paper, whose table is fixed",
)
@no_effect("chip", when=lambda options: options["as_json"], why="with --json, which has no bounds")
@no_effect(
    *("window", "sinks", "kv_bits"),
    when=lambda options: set(options["compare"].split(",")) == {"full"},
    why="on full attention alone; see --compare",
)
@no_effect(
    "memory",
    when=lambda options: "ahn" not in options["compare"].split(","),
    why="without ahn in --compare",
)
@no_effect("force", when=lambda options: not options["plot"], why="without --out")
@no_effect("pipeline", when=lambda options: options["ranks"] == 1, why="without --ranks")
@model_option
@click.option(
    "--context",
    type=Tokens(),
    default="128k",
    show_default=True,
    help="Tokens read. k is 1,024, M is k times k, 500p are pages of 400.",
)
@click.option("--window", type=int, help="Default: the model's.")
@click.option("--sinks", type=int, help="Default: the model's.")
@click.option(
    "--kind",
    "memory",
    type=click.Choice(sorted(PUBLISHED_NAMES.values())),
    help="Of memory. Default: the model's.",
)
@click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Of a quantized window.")
@click.option(
    "--q-bits",
    "weight_bits",
    type=click.Choice(["0", "4", "8"]),
    default="4",
    show_default=True,
    help="Of all weights; 0: 16 bits.",
)
@click.option("--compare", default="full,window,ahn", show_default=True, help="Of these three.")
@click.option(
    "--ranks", type=click.IntRange(1), default=1, help="Count one of so many that run it together."
)
@click.option("--pipeline", is_flag=True, help="Ranks have layers, not heads.")
@click.option("--chip", type=CHIP, metavar="NAME", help=f"{CHIP_HELP} Default: this Mac's.")
@click.option("--paper", is_flag=True, help="The paper's table, with its conventions.")
@json_option
@click.option(
    "-o", "--out", "plot", type=click.Path(path_type=Path), help="Picture of costs by context."
)
@force_option
def estimate(**options: Any) -> None:
    """Count FLOPs and bytes of a model by its config alone, against full attention.

    \b
    ahn-mlx estimate ahn-gdn-3b
    ahn-mlx estimate ahn-gdn-3b --context 500p
    ahn-mlx estimate ahn-gdn-7b --context 1M --window 16384 --chip m4-pro
    ahn-mlx estimate ahn-gdn-14b --ranks 2
    ahn-mlx estimate --paper
    """
    check_numbers(options)
    kinds = options["compare"].split(",")
    if not set(kinds) <= set(KINDS):
        raise AHNError(f"--compare takes {', '.join(KINDS)}, not {options['compare']!r}")
    if options["paper"]:
        _paper()
        return
    plot, name = options["plot"], Path(options["name"])
    out = picture(plot, (name,), options["force"]) if plot else None
    shape = _shape(options)
    found = {kind: _count(shape, kind, options["context"], options) for kind in kinds}
    curve = {n: {kind: _count(shape, kind, n, options) for kind in kinds} for n in CURVE}
    if options["as_json"]:
        click.echo(json.dumps({"context": options["context"], **found, "curve": curve}, indent=1))
    else:
        _print(shape, found, curve, options)
    if out:
        _plot(out, options["name"], curve, kinds)
        say(f"wrote {out.path}")


def _shape(options: dict[str, Any]) -> Any:
    """Sizes of what was named. A name of ours needs neither MLX nor a network."""
    from ..hub.published import MODELS, on_base
    from ..measure.cost import shape_by_name, shape_of
    from ..model.config import AHNConfig

    name = options["name"]
    if name in MODELS and not Path(name).is_dir():
        return shape_by_name(name, replace(MODELS[name].settings, **_chosen(options)))
    if (known := on_base(name)) and not Path(name).is_dir():
        return shape_by_name(known.name, replace(AHNConfig(), **_chosen(options)))
    from ..checkpoints.load import built

    return built(name, shape_of, config_of(options))


def _chosen(options: dict[str, Any]) -> dict[str, Any]:
    return {k: options[k] for k in ("window", "sinks", "memory") if options[k] is not None}


def config_of(options: dict[str, Any]) -> dict[str, Any]:
    """config.json of what was named, with the AHN settings asked for."""
    from ..checkpoints.formats import describe_config, is_gguf
    from ..hub.disk import variants
    from ..hub.published import MODELS, no_such_model, on_base
    from ..model.config import AHNConfig

    name = options["name"]
    if (path := Path(name)).is_dir() or is_gguf(path):
        config = describe_config(path)
    elif name in MODELS:
        config = {**MODELS[name].base.config, "ahn": MODELS[name].settings.to_dict()}
    elif known := on_base(name):
        config = known.base.config
    elif REPOSITORY.fullmatch(name):
        here = variants(name)
        if here:
            config = describe_config(here[0])
        else:
            from ..hub.download import config_dir

            config = describe_config(config_dir(name))
    else:
        raise AHNError(no_such_model(name))
    has_memory = "ahn" in config or "_ahn_implementation" in config
    ahn = (AHNConfig.from_dict(config) if has_memory else AHNConfig()).to_dict()
    return {**config, "ahn": {**ahn, **_chosen(options)}}


def _count(shape: Any, kind: str, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """All numbers of one kind of attention at one context."""
    from ..measure import cost

    bits = int(options["kv_bits"]) if options["kv_bits"] and kind != "full" else None
    cache = cost.cache_bytes(shape, kind, tokens, kv_bits=bits)
    weights = cost.weight_bytes(shape, _bits(options))
    if kind != "ahn":
        weights -= 2 * shape.memory_parameters
    return {
        "prefill_flops": cost.flops(shape, kind, tokens),
        "decode_flops": cost.flops(shape, kind, 1, before=tokens),
        "weight_bytes": weights,
        "cache_bytes": cache,
        # Weights and cache are read once, and the state is written as well.
        "decode_bytes": weights
        - cost.idle_bytes(shape, _bits(options))
        + sum(cache.values())
        + cache["state"],
        "rows": {
            gb: cost.rows_that_fit(sum(cache.values()), weights, int(USABLE * gb * 1e9))
            for gb in SERVERS
        },
        **({"rank": _count_rank(shape, kind, tokens, options)} if options["ranks"] > 1 else {}),
    }


def _count_rank(shape: Any, kind: str, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """Of the rank that has most."""
    from ..measure.ranks import part, sent

    ranks, pipeline = options["ranks"], options["pipeline"]
    one = {**options, "ranks": 1}
    parts = [part(shape, ranks, rank, pipeline) for rank in range(ranks)]
    counts = [_count(each, kind, tokens, one) for each in parts]
    most = max(counts, key=lambda c: c["weight_bytes"] + sum(c["cache_bytes"].values()))
    held = {key: most[key] for key in ("weight_bytes", "cache_bytes")}
    return {**held, "sent_bytes": sent(shape, kind, ranks, pipeline)._asdict()}


def _bits(options: dict[str, Any]) -> float:
    """Per weight, with a 16-bit scale and bias for each group of 64."""
    bits = int(options["weight_bits"]) or 16
    return bits if bits == 16 else bits + 32 / 64


def _print(
    shape: Any, found: dict[str, Any], curve: dict[int, dict[str, Any]], options: dict[str, Any]
) -> None:
    ahn = shape.ahn
    click.echo(
        f"{options['name']}: {shape.parameters / 1e6:,.0f}M parameters, {ahn.memory},\n"
        f"window {ahn.window:,} + {ahn.sinks:,} sinks; after {options['context']:,} tokens\n"
    )

    def rows(title: str, unit: float, values: dict[str, Any]) -> list[str]:
        return [title, *(f"{values[kind] / unit:,.3f}" for kind in found)]

    def total(key: str) -> dict[str, float]:
        return {kind: sum(c[key].values()) for kind, c in found.items()}

    def part(key: str, name: str) -> dict[str, float]:
        return {kind: c[key].get(name, 0) for kind, c in found.items()}

    table = [rows("prefill, PFLOP", 1e15, total("prefill_flops"))]
    names = ["projections", "attention", "mlp", "head", "memory"]
    names += ["recurrence"] if shape.beside.states else []
    table += [rows(f"  {name}", 1e15, part("prefill_flops", name)) for name in names]
    table += [rows("decode, GFLOP/token", 1e9, total("decode_flops"))]
    table += [rows("weights, GB", 1e9, {k: c["weight_bytes"] for k, c in found.items()})]
    table += [rows("cache, GB", 1e9, total("cache_bytes"))]
    parts = ["keys, values", "gates", "state"]
    parts += ["beside"] if "beside" in next(iter(found.values()))["cache_bytes"] else []
    table += [rows(f"  {name}", 1e9, part("cache_bytes", name)) for name in parts]
    table += [rows("decode, GB/token", 1e9, {k: c["decode_bytes"] for k, c in found.items()})]
    table += [["fits Macs from, GB", *(_fits(c) for c in found.values())]]
    if options["ranks"] > 1:
        each = {kind: c["rank"] for kind, c in found.items()}
        table += [[f"each of {options['ranks']} ranks", *("" for _ in found)]]
        table += [rows("  weights, GB", 1e9, {k: c["weight_bytes"] for k, c in each.items()})]
        held = {k: sum(c["cache_bytes"].values()) for k, c in each.items()}
        table += [rows("  cache, GB", 1e9, held)]
        state = {k: c["cache_bytes"].get("state", 0) for k, c in each.items()}
        table += [rows("    state", 1e9, state)]
        table += [["  fits Macs from, GB", *(_fits(c) for c in each.values())]]
        for title, which in (("  gives, kB/token", "payload"), ("  sends in a ring", "ring")):
            table += [rows(title, 1e3, {k: c["sent_bytes"][which] for k, c in each.items()})]
    speeds, notes = _speeds(options["name"], found, options["chip"] or this_chip())
    print_table(["", *found], table + speeds)
    for note in notes:
        click.echo(note)
    click.echo("\nBy GB of a Mac: answers at a time, as ahn-mlx serve counts its --rows.")
    fit = [[str(gb), *(f"{c['rows'][gb]:,}" for c in found.values())] for gb in SERVERS]
    print_table(["GB", *found], fit)
    click.echo("\nBy context: GB of cache, and GFLOP (GF) for one more token.")
    contexts = [
        [f"{n:,}"]
        + [f"{sum(c['cache_bytes'].values()) / 1e9:.3f}" for c in at.values()]
        + [f"{sum(c['decode_flops'].values()) / 1e9:.2f}" for c in at.values()]
        for n, at in curve.items()
    ]
    heads = [f"{kind} GB" for kind in found] + [f"{kind} GF" for kind in found]
    print_table(["context", *heads], contexts)


def _speeds(
    name: str, found: dict[str, Any], chip: str | None
) -> tuple[list[list[str]], list[str]]:
    """Rows of times, and what stands below the table about them. A chip gives bounds: no program
    can be faster than its memory and arithmetic allow."""
    from ..measure.speed import recall

    work = {kind: sum(c["prefill_flops"].values()) for kind, c in found.items()}
    rows, notes = [], []
    measured = recall(name)
    if measured:
        rows.append(["reads it in about", *(_duration(w / measured) for w in work.values())])
        notes.append(f"about: at the {measured / 1e9:,.1f} GFLOP/s that bench measured here")
    else:
        notes.append("`ahn-mlx bench` measures this machine; then this says how long reading takes")
    if chip:
        peak, bandwidth = CHIPS[chip].tflops, CHIPS[chip].bandwidth
        if peak:
            least = (_duration(w / (1e12 * peak)) for w in work.values())
            rows.append(["reads it in at least", *least])
        most = (f"{1e9 * bandwidth / c['decode_bytes']:,.1f}" for c in found.values())
        rows.append(["tokens/s, at most", *most])
        limits = f"{bandwidth:g} GB/s" + (f", {peak:g} TFLOP/s" if peak else "")
        notes.append(f"at least, at most: bounds of an {chip} ({limits}), not measured")
    return rows, notes


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:,.1f} h"


def _fits(count: dict[str, Any]) -> str:
    needed = count["weight_bytes"] + sum(count["cache_bytes"].values())
    return next((str(size) for size in MACS if needed <= USABLE * size * 1e9), "none")


def _paper() -> None:
    from ..hub.published import MODELS
    from ..measure import cost

    tokens = 128_000
    rows = []
    for name, entry in MODELS.items():
        if not entry.repo:
            continue
        shape = cost.shape_by_name(name, entry.ahn)
        full = (
            *cost.paper_flops(shape, "full", tokens),
            cost.paper_cache_bytes(shape, "full", tokens),
        )
        row = [name]
        for kind in ("window", "ahn"):
            flops = cost.paper_flops(shape, kind, tokens)
            ours = (*flops, cost.paper_cache_bytes(shape, kind, tokens))
            row += [f"{100 * a / b:.1f}" for a, b in zip(ours, full, strict=True)]
        row += [f"{full[1] / 1e15:.2f} / {flops[1] / 1e15:.2f}"]
        row += [f"{full[2] / 1e9:.2f} / {ours[2] / 1e9:.2f}"]
        honest = [sum(cost.cache_bytes(shape, kind, tokens).values()) for kind in ("full", "ahn")]
        work = [sum(cost.flops(shape, kind, tokens).values()) for kind in ("full", "ahn")]
        row += [f"{100 * work[1] / work[0]:.1f}", f"{100 * honest[1] / honest[0]:.1f}"]
        rows.append(row)
    kinds = [
        f"{kind}: {what} %" for kind in ("window", "AHN") for what in ("mixing", "model", "cache")
    ]
    absolute = ["PFLOP, full / AHN", "cache GB, full / AHN"]
    print_table(["of full attention", *kinds, *absolute, "our count: model %", "cache %"], rows)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table that is a table to the eye as well."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("| " + " | ".join(cells) + " |")


# Colours that people who confuse some can tell apart; lines and marks differ in print too.
STYLES = {
    "full": ("full attention", "#D55E00", "-", "o"),
    "window": ("window alone", "#0072B2", "--", "s"),
    "ahn": ("window and memory", "#009E73", "-.", "^"),
}


def _plot(out: OutFile, name: str, curve: dict[int, dict[str, Any]], kinds: list[str]) -> None:
    figure = new_figure(11, 4.5)
    figure.suptitle(f"{name}, by how many tokens it has read")
    pair = figure.subplots(1, 2)
    for axes, key, title, unit in (
        (pair[0], "cache_bytes", "memory for its cache", "GB"),
        (pair[1], "decode_flops", "work for one more token", "GFLOP"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ends = {}
        for kind in kinds:
            ys = [sum(at[kind][key].values()) / 1e9 for at in curve.values()]
            _, colour, line, mark = STYLES[kind]
            axes.plot(list(curve), ys, color=colour, linestyle=line, marker=mark)
            ends[kind] = ys[-1]
        _label_ends(axes, ends)
        axes.set_xticks(list(curve), [_short(n) for n in curve])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.set(title=title, xlabel="tokens read", ylabel=unit)
    save_picture(figure, out)


def _label_ends(axes: Any, ends: dict[str, float]) -> None:
    """Write each line's name at its end: the lowest below it, the others above theirs."""
    lowest = min(ends, key=lambda kind: ends[kind])
    for kind, y in ends.items():
        label, colour, *_ = STYLES[kind]
        offset = (4, -16) if kind == lowest and len(ends) > 1 else (4, 9)
        axes.annotate(
            label, (CURVE[-1], y), offset, textcoords="offset points", ha="right", color=colour
        )
    axes.margins(y=0.15)


def _short(tokens: int) -> str:
    return f"{tokens // 1024**2}M" if tokens >= 1024**2 else f"{tokens // 1024}k"
