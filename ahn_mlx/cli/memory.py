"""ahn-mlx memory info, verify: what is in a memory file."""

from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from .command import Group


@click.group(cls=Group)
def memory() -> None:
    """Look into the files that ahn-mlx digest writes.

    \b
    ahn-mlx memory info book.ahn
    ahn-mlx memory verify book.ahn
    """


@memory.command()
@click.argument("file", type=click.Path(path_type=Path))
def info(file: Path) -> None:
    """Print size by part, tokens, model and the beginning of the text."""
    from ..checkpoints.safetensors import read_header
    from ..reading.memoryfile import read_facts

    facts = read_facts(file)
    parts: dict[str, int] = {}
    for name, tensor in read_header(file).items():
        part = {"memory": "state", "pending": "not yet read"}.get(name.rsplit(".", 1)[-1])
        part = "trace" if ".trace." in name else part
        key = part or "window, sinks, gates"
        parts[key] = parts.get(key, 0) + tensor.end - tensor.begin
    model = facts["model"]
    rows: list[tuple[str, Any]] = [
        ("model", model["name"]),
        ("tokens", f"{facts['tokens']:,}"),
        ("window + sinks", f"{facts['window']:,} + {facts['sinks']:,}"),
        *((part, f"{size / 1e6:.2f} MB") for part, size in sorted(parts.items())),
        ("file", f"{file.stat().st_size / 1e6:.2f} MB"),
        ("begins", facts["preview"]),
    ]
    for label, value in rows:
        # A file may come from anyone: no control characters reach the terminal.
        text = "".join(c if c.isprintable() else " " for c in str(value))
        click.echo(f"{label:<22} {text}")


@memory.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def verify(files: tuple[Path, ...]) -> None:
    """Check FILES as far as that goes without their model; exit code 2 if one is damaged."""
    from ..reading.memoryfile import verify as check

    broken = []
    for file in files:
        try:
            check(file)
            click.echo(f"{file}: sound")
        except AHNError as e:
            broken.append(str(e))
    if broken:
        raise AHNError("; ".join(broken))
