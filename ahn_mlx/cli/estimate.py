"""ahn-mlx estimate: what a model costs, before it is downloaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..measure.chips import CHIPS
from ..model.config import PUBLISHED_NAMES
from ..outputs.pictures import OutFile, new_figure, picture, save_picture
from .command import Command, Word
from .options import check_numbers, force_option, json_option, model_option, no_effect

CHIP = click.Choice(list(CHIPS), case_sensitive=False)
CHIP_HELP = f"Give bounds for it: {', '.join(CHIPS)}."
KINDS = ("full", "window", "ahn")
MACS = (8, 16, 24, 32, 64)  # GB
USABLE = 0.75  # of a Mac's memory that Metal gives to one process by default
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # on the hub, of which config.json is enough
CURVE = (4_096, 16_384, 32_768, 65_536, 131_072, 262_144, 1_048_576)


@click.command(cls=Command)
@click.argument("name", cls=Word, metavar="MODEL")
@no_effect(
    *("name", "context", "window", "sinks", "memory", "kv_bits", "weight_bits", "compare"),
    *("chip", "as_json", "plot", "force"),
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
@model_option
@click.option("--context", default=128_000, show_default=True, help="Tokens read.")
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
@click.option("--chip", type=CHIP, metavar="NAME", help=CHIP_HELP)
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
    ahn-mlx estimate ahn-gdn-7b --context 500000 --window 16384 --chip m4-pro
    ahn-mlx estimate --paper
    """
    check_numbers(options)
    kinds = options["compare"].split(",")
    if not set(kinds) <= set(KINDS):
        raise AHNError(f"--compare takes {', '.join(KINDS)}, not {options['compare']!r}")
    if options["context"] < 1:
        raise AHNError(f"--context must be at least 1, not {options['context']}")
    if options["paper"]:
        _paper()
        return
    plot, name = options["plot"], Path(options["name"])
    out = picture(plot, (name,), options["force"]) if plot else None
    from ..checkpoints.load import built
    from ..measure.cost import shape_of

    shape = built(options["name"], shape_of, config_of(options))
    found = {kind: _count(shape, kind, options["context"], options) for kind in kinds}
    curve = {n: {kind: _count(shape, kind, n, options) for kind in kinds} for n in CURVE}
    if options["as_json"]:
        click.echo(json.dumps({"context": options["context"], **found, "curve": curve}, indent=1))
    else:
        _print(shape, found, curve, options)
    if out:
        _plot(out, curve, kinds)


def config_of(options: dict[str, Any]) -> dict[str, Any]:
    """config.json of what was named, with the AHN settings asked for."""
    from ..checkpoints.formats import describe_config, is_gguf
    from ..hub.download import config_dir
    from ..hub.published import MODELS, no_such_model
    from ..model.config import AHNConfig

    name = options["name"]
    if name in MODELS:
        entry = MODELS[name]
        config, ahn = entry.base.config, entry.ahn.to_dict()
        if not entry.repo:
            ahn |= {"window": 1024, "sinks": 64}
    elif (path := Path(name)).is_dir() or is_gguf(path) or REPOSITORY.fullmatch(name):
        config = describe_config(path if path.exists() else config_dir(name))
        has_memory = "ahn" in config or "_ahn_implementation" in config
        ahn = (AHNConfig.from_dict(config) if has_memory else AHNConfig()).to_dict()
    else:
        raise AHNError(no_such_model(name))
    chosen = {k: options[k] for k in ("window", "sinks", "memory") if options[k] is not None}
    return {**config, "ahn": {**ahn, **chosen}}


def _count(shape: Any, kind: str, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """All numbers of one kind of attention at one context."""
    from ..measure import cost

    bits = int(options["kv_bits"]) if options["kv_bits"] and kind != "full" else None
    cache = cost.cache_bytes(shape, kind, tokens, kv_bits=bits)
    weights = cost.weight_bytes(shape, _bits(options))
    if kind != "ahn":
        weights -= 2 * (shape.gates + shape.readout)
    return {
        "prefill_flops": cost.flops(shape, kind, tokens),
        "decode_flops": cost.flops(shape, kind, 1, before=tokens),
        "weight_bytes": weights,
        "cache_bytes": cache,
        # Weights and cache are read once, and the state is written as well.
        "decode_bytes": weights + sum(cache.values()) + cache["state"],
    }


def _bits(options: dict[str, Any]) -> float:
    """Per weight, with a 16-bit scale and bias for each group of 64."""
    bits = int(options["weight_bits"]) or 16
    return bits if bits == 16 else bits + 32 / 64


def _print(
    shape: Any, found: dict[str, Any], curve: dict[int, dict[str, Any]], options: dict[str, Any]
) -> None:
    ahn = shape.ahn
    click.echo(
        f"{options['name']}: {shape.parameters / 1e6:,.0f}M parameters,"
        f" window {ahn.window:,} + {ahn.sinks:,} sinks, {ahn.memory};"
        f" after {options['context']:,} tokens\n"
    )

    def rows(title: str, unit: float, values: dict[str, Any]) -> list[str]:
        return [title, *(f"{values[kind] / unit:,.3f}" for kind in found)]

    def total(key: str) -> dict[str, float]:
        return {kind: sum(c[key].values()) for kind, c in found.items()}

    def part(key: str, name: str) -> dict[str, float]:
        return {kind: c[key].get(name, 0) for kind, c in found.items()}

    table = [rows("prefill, PFLOP", 1e15, total("prefill_flops"))]
    names = ("projections", "attention", "mlp", "head", "memory")
    table += [rows(f"  {name}", 1e15, part("prefill_flops", name)) for name in names]
    table += [rows("decode, GFLOP/token", 1e9, total("decode_flops"))]
    table += [rows("weights, GB", 1e9, {k: c["weight_bytes"] for k, c in found.items()})]
    table += [rows("cache, GB", 1e9, total("cache_bytes"))]
    parts = ("keys, values", "gates", "state")
    table += [rows(f"  {name}", 1e9, part("cache_bytes", name)) for name in parts]
    table += [rows("decode, GB/token", 1e9, {k: c["decode_bytes"] for k, c in found.items()})]
    if options["chip"]:
        table += _bounds(found, options["chip"])
    table += [["fits in, GB", *(_fits(c) for c in found.values())]]
    print_table(["", *found], table)
    click.echo()
    contexts = [
        [f"{n:,}"]
        + [f"{sum(c['cache_bytes'].values()) / 1e9:.3f}" for c in at.values()]
        + [f"{sum(c['decode_flops'].values()) / 1e9:.2f}" for c in at.values()]
        for n, at in curve.items()
    ]
    heads = [f"{kind}, cache GB" for kind in found] + [f"{kind}, GFLOP/token" for kind in found]
    print_table(["context", *heads], contexts)


def _bounds(found: dict[str, Any], name: str) -> list[list[str]]:
    """Roofline: no program can be faster than memory and arithmetic allow."""
    chip = CHIPS[name]
    speed = [f"{1e9 * chip.bandwidth / c['decode_bytes']:.1f}" for c in found.values()]
    rows = [[f"{name}, bound: tokens/s at most", *speed]]
    if chip.tflops:
        peak = 1e12 * chip.tflops
        wait = [f"{sum(c['prefill_flops'].values()) / peak:.1f}" for c in found.values()]
        rows.append([f"{name}, bound: first token after at least, s", *wait])
    return rows


def _fits(count: dict[str, Any]) -> str:
    needed = count["weight_bytes"] + sum(count["cache_bytes"].values())
    fitting = [str(size) for size in MACS if needed <= USABLE * size * 1e9]
    return ", ".join(fitting) or "none of these"


def _paper() -> None:
    from ..hub.published import MODELS
    from ..measure import cost

    tokens = 128_000
    rows = []
    for name, entry in MODELS.items():
        if not entry.repo:
            continue
        shape = cost.shape_of({**entry.base.config, "ahn": entry.ahn.to_dict()})
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


def _plot(out: OutFile, curve: dict[int, dict[str, Any]], kinds: list[str]) -> None:
    figure = new_figure(10, 4)
    for axes, key, unit in zip(
        figure.subplots(1, 2), ("cache_bytes", "decode_flops"), ("GB", "GFLOP"), strict=True
    ):
        for kind in kinds:
            ys = [sum(at[kind][key].values()) / 1e9 for at in curve.values()]
            axes.plot(list(curve), ys, marker="o", label=kind)
        axes.set(xlabel="tokens read", ylabel=unit, xscale="log", yscale="log")
        axes.set_title("cache" if key == "cache_bytes" else "one decoded token")
        axes.legend()
    save_picture(figure, out)
