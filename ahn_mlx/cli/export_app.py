"""ahn-mlx export-app: a model for apps without Python."""

from pathlib import Path
from typing import Any

import click

from .command import Command
from .options import check_numbers, load_model, loading_options, needs_memory, quiet_option


@click.command("export-app", cls=Command)
@loading_options
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory to write."
)
@click.option("--chunk", default=512, show_default=True, help="Most tokens that are read at once.")
@click.option("--force", is_flag=True, help="Replace a model that is at --out.")
@quiet_option
@needs_memory
def export_app(out: Path, chunk: int, force: bool, **options: Any) -> None:
    """Write a model for apps without Python: docs/embedding.md.

    The files are for this version of MLX and for this kind of device: a model for Macs is exported
    on a Mac.

    \b
    ahn-mlx export-app -o smollm2.ahnmodel
    ahn-mlx export-app --model ahn-gdn-3b --window 8192 -o book.ahnmodel
    """
    check_numbers({**options, "chunk": chunk})
    from ..apps.export import export_app

    model, tokenizer = load_model(options)
    export_app(model, tokenizer, out, chunk=chunk, force=force)
    click.echo(f"wrote {out}")
