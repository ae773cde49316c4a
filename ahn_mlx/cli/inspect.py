"""ahn-mlx inspect: a page on what a memory holds."""

import os
from pathlib import Path

import click

from ..errors import AHNError
from ..reading.text import read_document
from .ask import load_session
from .generate import say


@click.command()
@click.option(
    "--memory", "file", required=True, type=click.Path(path_type=Path), help="From ahn-mlx digest."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Page to write.")
@click.option("--text", metavar="FILE", help="What was digested first, to quote from it.")
@click.option("--model", "name", help="Where the model is now. Default: as when digested.")
def inspect(file: Path, out: Path, text: str | None, name: str | None) -> None:
    """Draw what a memory holds: one HTML page that needs no network.

    By layer and head: the state's norm, how many tokens it lasts, how strongly tokens were
    written, and how much of the output it makes. Over the text: where it wrote most.

    \b
    ahn-mlx inspect --memory book.ahn -o report.html
    ahn-mlx inspect --memory book.ahn --text book.txt -o report.html
    """
    if not out.parent.is_dir():
        raise AHNError(f"{out.parent}: no such directory; make it first")
    quoted = None if text is None else read_document(text, has_prompt=False)
    from ..reading.inspect import page

    session = load_session(file, name, None)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_text(page(session, file.name, quoted), encoding="utf-8")
        part.replace(out)
    except OSError as e:
        raise AHNError(f"{out}: cannot be written ({e.strerror}); choose another place") from None
    finally:
        part.unlink(missing_ok=True)
    say(f"wrote {out}")
