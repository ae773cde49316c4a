"""ahn-mlx inspect: a page on what a memory holds."""

from pathlib import Path

import click

from ..outputs.files import OutFile
from .ask import load_session
from .command import Command, Word
from .options import (
    force_option,
    memory_option,
    moved_ahn_option,
    moved_model_option,
    needs_memory,
    quiet_option,
    text_option,
)
from .terminal import say
from .words import read_typed


@click.command(cls=Command)
@click.argument("file", cls=Word, needed=True, metavar="FILE")
@memory_option
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Page to write, .html."
)
@text_option(help="What was digested first, to quote from it.")
@moved_model_option
@moved_ahn_option
@force_option
@quiet_option
@needs_memory
def inspect(
    file: Path, out: Path, text: str | None, name: str | None, ahn: Path | None, force: bool
) -> None:
    """Draw what a memory holds: one HTML page that needs no network.

    By layer and head: the state's norm, how many tokens it lasts, how strongly tokens were
    written, and how much of the output it makes. Over the text: where it wrote most.

    \b
    ahn-mlx inspect book.ahn -o report.html
    ahn-mlx inspect book.ahn --text book.txt -o report.html
    """
    from ..reading.inspect import is_page, page
    from ..reading.memoryfile import read_facts

    model = Path(name or read_facts(file)["model"]["name"])
    reads = (file, model, *([Path(text)] if text else []))
    target = OutFile(out, "a page of inspect", is_page, reads, force, (".html", ".htm"))
    target.check()
    quoted = None if text is None else read_typed([text], has_prompt=False)
    session = load_session(file, name, ahn)
    drawn = page(session, file.name, quoted)
    with target.writing() as part:
        part.write_text(drawn, encoding="utf-8", errors="replace")
    say(f"wrote {out}")
