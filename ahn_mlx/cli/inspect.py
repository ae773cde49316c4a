"""ahn-mlx inspect: a page on what a memory holds."""

from pathlib import Path

import click

from ..outputs.files import OutFile
from ..reading.text import read_document
from .ask import load_session
from .options import force_option, needs_memory
from .terminal import say


@click.command()
@click.option(
    "--memory", "file", required=True, type=click.Path(path_type=Path), help="From ahn-mlx digest."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Page to write.")
@click.option("--text", metavar="FILE", help="What was digested first, to quote from it.")
@click.option("--model", "name", help="Where the model is now. Default: as when digested.")
@click.option("--ahn", type=click.Path(path_type=Path), help="Where its trained memory is now.")
@force_option
@needs_memory
def inspect(
    file: Path, out: Path, text: str | None, name: str | None, ahn: Path | None, force: bool
) -> None:
    """Draw what a memory holds: one HTML page that needs no network.

    By layer and head: the state's norm, how many tokens it lasts, how strongly tokens were
    written, and how much of the output it makes. Over the text: where it wrote most.

    \b
    ahn-mlx inspect --memory book.ahn -o report.html
    ahn-mlx inspect --memory book.ahn --text book.txt -o report.html
    """
    from ..reading.inspect import is_page, page
    from ..reading.memoryfile import read_facts

    model = Path(name or read_facts(file)["model"]["name"])
    reads = (file, model, *([Path(text)] if text else []))
    target = OutFile(out, "a page of inspect", is_page, reads, force)
    target.check()
    quoted = None if text is None else read_document(text, has_prompt=False)
    session = load_session(file, name, None, ahn)
    drawn = page(session, file.name, quoted)
    with target.writing() as part:
        part.write_text(drawn, encoding="utf-8", errors="replace")
    say(f"wrote {out}")
