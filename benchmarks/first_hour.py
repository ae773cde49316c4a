"""What a new user waits for, step by step: a PDF of 500 pages, an EPUB, a question, a chat.

The shipped text is set on 500 small pages, and its first chapters make the EPUB. The steps are
the command line's own, each a process, as a person types them.
"""

import re
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from .measure import table

TEXT = Path(__file__).parent.parent / "ahn_mlx" / "demo" / "pride-and-prejudice.txt"
QUESTION = "Question: Which book did Mr. Collins choose to read? Answer in a few words."
PAGES, CHAPTERS = 500, 4
CONTAINER = (
    '<?xml version="1.0"?><container version="1.0" '
    'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/>'
    "</rootfiles></container>"
)


def write_pdf(file: Path, text: str) -> None:
    """The text on PAGES pages, as many words on each."""
    from fpdf import FPDF

    words = text.encode("latin-1", "replace").decode("latin-1").split()
    paper = FPDF(format=(148, 210))
    paper.set_font("Times", size=12)
    for page in range(PAGES):
        paper.add_page()
        part = words[len(words) * page // PAGES : len(words) * (page + 1) // PAGES]
        paper.multi_cell(0, 6, " ".join(part))
    paper.output(str(file))


def write_epub(file: Path, text: str) -> None:
    """The first chapters of the text, a file for each."""
    chapters = re.split(r"(?m)^(?=Chapter \d)", text)[1 : CHAPTERS + 1]
    names = [f"{i}.xhtml" for i in range(len(chapters))]
    items = "".join(
        f'<item id="c{i}" href="{name}" media-type="application/xhtml+xml"/>'
        for i, name in enumerate(names)
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(names)))
    with zipfile.ZipFile(file, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr(
            "book.opf",
            '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
        )
        for name, chapter in zip(names, chapters, strict=True):
            body = chapter.replace("&", "&amp;").replace("<", "&lt;")
            book.writestr(
                name,
                '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head>'
                f"<body><pre>{body}</pre></body></html>",
            )


@click.command()
def first_hour() -> None:
    """Digest a PDF of 500 pages, ask about it, read an EPUB, chat at a terminal.

    Needs fpdf2 and pexpect, which `make test` installs.
    """
    import pexpect

    text = TEXT.read_text(encoding="utf-8")
    rows: list[tuple[str, ...]] = []

    def typed(place: Path, line: str, *args: str, then: tuple[tuple[str, str], ...] = ()) -> None:
        """Run a command at a terminal; `then`: what to wait for and what to type next."""
        start = time.perf_counter()
        child = pexpect.spawn(
            sys.executable,
            ["-m", "ahn_mlx", *args],
            cwd=place,
            dimensions=(40, 100),
            encoding="utf-8",
            timeout=1800,
        )
        said = ""
        for expected, answer in then:
            child.expect(expected)
            said += child.before + child.after
            child.sendline(answer)
        child.expect(pexpect.EOF)
        child.close()
        said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said + child.before)
        # Of a bar, which is written over itself, the end is left.
        lines = [x.rpartition("\r")[2].strip() for x in said.replace("\r\n", "\n").split("\n")]
        rows.append(
            (line, f"{time.perf_counter() - start:.1f}", " / ".join(list(filter(None, lines))[-2:]))
        )
        if child.exitstatus:
            raise SystemExit(f"{line}: exit code {child.exitstatus}\n{said}")

    with TemporaryDirectory() as name:
        place = Path(name)
        write_pdf(place / "book.pdf", text)
        write_epub(place / "book.epub", text)
        typed(place, "digest book.pdf", "digest", "book.pdf")
        typed(place, "ask book.ahn", "ask", "book.ahn", QUESTION, "-m", "30")
        typed(place, "generate book.epub", "generate", "book.epub", QUESTION, "-m", "30")
        typed(
            place,
            "chat --memory book.ahn",
            *("chat", "--memory", "book.ahn", "-m", "30"),
            then=(("/help lists", QUESTION), (r"first token after .*\n", "/exit")),
        )
    table(("step", "seconds", "its last lines"), rows)
