"""Documents that tests read, written by other programs or part by part as their formats say."""

import io
import zipfile
from pathlib import Path

from fpdf import FPDF
from fpdf.enums import AccessPermission

CONTAINER = (
    '<?xml version="1.0"?><container version="1.0" '
    'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/>'
    "</rootfiles></container>"
)
CONTENT_TYPES = (
    '<?xml version="1.0"?><Types '
    'xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/></Types>'
)
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
RELATIONSHIPS = "http://schemas.openxmlformats.org/package/2006/relationships"


def pdf(*pages: str, password: str | None = None, font: Path | None = None) -> bytes:
    """A page for each text; an empty text is a page with a line drawn on it.

    password: of whoever opens it; "" lets everyone read what an owner has locked.
    """
    paper = FPDF()
    if font is None:
        paper.set_font("Times", size=11)
    else:
        paper.add_font("other", fname=font)
        paper.set_font("other", size=11)
    if password is not None:
        paper.set_encryption("owner", password, permissions=AccessPermission.none())
    for page in pages:
        paper.add_page()
        if page:
            for line in page.split("\n"):
                paper.cell(0, 6, line, new_x="LMARGIN", new_y="NEXT")
        else:
            paper.line(10, 10, 90, 90)
    return bytes(paper.output())


def zipped(parts: dict[str, str | bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return data.getvalue()


def chapter(body: str) -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml">'
        f"<head><title/><style>p {{ color: red }}</style></head><body>{body}</body></html>"
    )


# Media types in a book.
PARTS = {"xhtml": "application/xhtml+xml", "jpg": "image/jpeg"}


def epub(
    chapters: dict[str, str | bytes], spine: list[str] | None = None, **others: str | bytes
) -> bytes:
    """chapters: by href, in the archive's order. spine: hrefs in reading order. others: further
    parts, by name with __ for /."""
    ids = {href: f"c{n}" for n, href in enumerate(chapters)}
    manifest = "".join(
        f'<item id="{name}" href="{href}" media-type="{PARTS[href.rpartition(".")[2]]}"/>'
        for href, name in ids.items()
    )
    refs = "".join(f'<itemref idref="{ids[href]}"/>' for href in spine or ids)
    package = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="2.0">'
        f'<metadata/><manifest>{manifest}</manifest><spine toc="ncx">{refs}</spine></package>'
    )
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": CONTAINER,
            "OEBPS/book.opf": package,
            "OEBPS/toc.ncx": "<ncx/>",
            **{f"OEBPS/{href.replace('%20', ' ')}": page for href, page in chapters.items()},
            **{name.replace("__", "/"): part for name, part in others.items()},
        }
    )


def docx(body: str, footnote: str = "", begin: str = "") -> bytes:
    """body: the XML within w:body. begin: what stands before the document's element."""
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    relations = (
        f'<Relationships xmlns="{RELATIONSHIPS}"><Relationship Id="r1" '
        f'Type="{OFFICE}/%s" Target="%s"/></Relationships>'
    )
    return zipped(
        {
            "[Content_Types].xml": CONTENT_TYPES,
            "_rels/.rels": relations % ("officeDocument", "word/document.xml"),
            "word/_rels/document.xml.rels": relations % ("footnotes", "footnotes.xml"),
            "word/document.xml": f"{begin}<w:document {word}><w:body>{body}</w:body></w:document>",
            "word/footnotes.xml": f'<w:footnotes {word}><w:footnote w:id="2"><w:p><w:r><w:t>'
            f"{footnote}</w:t></w:r></w:p></w:footnote></w:footnotes>",
        }
    )


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"
