"""ahn-mlx models, pull, rm: which models there are, and which are on this machine."""

import json
from pathlib import Path
from typing import Any

import click

from .command import Command
from .options import complete_model, json_option, quiet_option


@click.command(cls=Command)
@json_option
def models(as_json: bool) -> None:
    """List the models that have a name, and what is on this machine.

    \b
    ahn-mlx models
    ahn-mlx models --json
    """
    from ..hub import download as hub
    from ..hub.published import MODELS, models_dir, parameters

    others, facts = hub.on_disk(), []
    rows = [("name", "base", "memory", "base + memory", "download", "on this machine")]
    for name, entry in MODELS.items():
        base, memory = parameters(name)
        found = hub.variants(name) if entry.repo else _embedded()
        others = [path for path in others if path not in found]
        # Two bytes each, as published.
        download = f"{2 * (base + memory) / 1e9:.1f} GB" if entry.repo else "-"
        count = f"{base / 1e6:,.0f}M + {memory / 1e6:.1f}M"
        facts.append(_facts(name, entry.base.repo, entry.memory, base, memory, found))
        rows.append((name, entry.base.repo, entry.memory, count, download, _sizes(found)))
    for path in others:
        facts.append(_facts(path.name.replace("--", "/", 1), None, None, None, None, [path]))
        rows.append((path.name.replace("--", "/", 1), "-", "-", "-", "-", _sizes([path])))
    if as_json:
        click.echo(json.dumps({"models": facts, "directory": str(models_dir())}))
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    click.echo(f"converted models: {models_dir()}")


def _embedded() -> list[Path]:
    """The default model's file, if its package is installed."""
    from ..errors import AHNError
    from ..hub import zoo

    try:
        return [zoo.smollm2_gguf()]
    except AHNError:
        return []


def _facts(
    name: str,
    base: str | None,
    memory: str | None,
    base_parameters: int | None,
    memory_parameters: int | None,
    paths: list[Path],
) -> dict[str, Any]:
    """A row for a program."""
    return {
        "name": name,
        "base": base,
        "kind": memory,
        "base_parameters": base_parameters,
        "memory_parameters": memory_parameters,
        "on_this_machine": [{"path": str(p), "bytes": _bytes(p)} for p in paths],
    }


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in (path.iterdir() if path.is_dir() else [path]))


def _sizes(paths: list[Path]) -> str:
    sizes = []
    for path in paths:
        size = f"{_bytes(path) / 1e9:.1f} GB"
        bits = path.name.rsplit("-", 1)[-1] if path.name.endswith("bit") else ""
        sizes.append(f"{bits} {size}".strip())
    return ", ".join(sizes) or "-"


@click.command(cls=Command)
@click.argument("name", shell_complete=complete_model)
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
    from ..hub import download as hub

    bits = None if q_bits is None else int(q_bits)
    click.echo(hub.pull(name, bits, revision, base_revision))


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
