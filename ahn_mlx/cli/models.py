"""ahn-mlx models, pull, rm: which models there are, and which are on this machine."""

from pathlib import Path

import click


@click.command()
def models() -> None:
    """List the models that have a name, and what is on this machine.

    \b
    ahn-mlx models
    """
    from ..hub import download as hub
    from ..hub.published import MODELS, parameters

    others = hub.on_disk()
    rows = [("name", "base", "memory", "base + memory", "download", "on this machine")]
    for name, entry in MODELS.items():
        base, memory = parameters(name)
        found = hub.variants(name) if entry.repo else _embedded()
        others = [path for path in others if path not in found]
        # Two bytes each, as published.
        download = f"{2 * (base + memory) / 1e9:.1f} GB" if entry.repo else "-"
        count = f"{base / 1e6:,.0f}M + {memory / 1e6:.1f}M"
        rows.append((name, entry.base.repo, entry.memory, count, download, _sizes(found)))
    for path in others:
        rows.append((path.name.replace("--", "/", 1), "-", "-", "-", "-", _sizes([path])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    click.echo(f"converted models: {hub.models_dir()}")


def _embedded() -> list[Path]:
    """The default model's file, if its package is installed."""
    from ..errors import AHNError
    from ..hub import bases

    try:
        return [bases.smollm2_gguf()]
    except AHNError:
        return []


def _sizes(paths: list[Path]) -> str:
    sizes = []
    for path in paths:
        files = path.iterdir() if path.is_dir() else [path]
        size = f"{sum(f.stat().st_size for f in files) / 1e9:.1f} GB"
        bits = path.name.rsplit("-", 1)[-1] if path.name.endswith("bit") else ""
        sizes.append(f"{bits} {size}".strip())
    return ", ".join(sizes) or "-"


@click.command()
@click.argument("name")
@click.option(
    "--q-bits", type=click.Choice(["0", "4", "8"]), help="Base of a published name. [default: 4]"
)
@click.option("--revision", help="Branch, tag or commit of the AHN parameters or of ORG/NAME.")
@click.option("--base-revision", help="The same of the base.")
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


@click.command()
@click.argument("name")
def rm(name: str) -> None:
    """Delete a converted model from this machine. What huggingface-hub has downloaded
    stays in its own cache: see `hf cache --help`.

    \b
    ahn-mlx rm ahn-gdn-3b
    """
    from ..hub import download as hub

    for path in hub.remove(name):
        click.echo(f"removed {path}")
