"""The text of a PDF, an EPUB, a Word document or a page of HTML, part by part, so that a
reader can see how far it is and stop. Nothing in a document is executed, fetched or written;
what it unpacks to is bounded. The libraries are the extra `documents`, imported when needed."""

import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import SEEK_END, BytesIO
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.parsers import expat

from ..errors import AHNError, foreign, note, show
from ..platform import pip_install
from .encoding import decode_page
from .kinds import Kind

PACKAGES = ("pypdfium2", "mammoth", "html-to-markdown")  # of the extra
# Bytes of the parts with text, together and of one. The longest novels are 10 MB of markup
# in a hundred chapters; Word keeps a document in one part, some 10 kB a page.
UNPACKED = 200 * 10**6
LARGEST = 30 * 10**6
# Markup shrinks to a tenth; what is larger than SMALL and shrinks to a DENSEst part is a bomb.
SMALL, DENSEST = 10**6, 100

# PDFium takes ligatures apart, and puts U+0002 for a hyphen that divides a word at a line's
# end; other controls come from fonts that do not say what their glyphs are.
_PDF_SIGNS = {n: None for n in range(32) if chr(n) not in "\t\n\r"}
# In XHTML an element may be closed where it begins, which HTML has for these alone.
_CLOSED = re.compile(
    r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr)\b)"
    r"([a-z][\w:.-]*)((?:\s[^<>]*)?)/>",
    re.IGNORECASE,
)
_PRE = re.compile(r"(</?pre\b[^<>]*>)", re.IGNORECASE)
_XHTML = re.compile(r"<\?xml\b|<html\b[^>]*\bxmlns=", re.IGNORECASE)
_PASSWORD = 4  # FPDF_ERR_PASSWORD
_NO_ERROR = 0


class Part(NamedTuple):
    """Text of a page or chapter, and how many of them there are."""

    text: str
    total: int


def parts(kind: Kind, stream: BinaryIO, name: str) -> Iterator[Part]:
    """The parts of a document in reading order. stream: seekable. name: for messages.

    Raises AHNError if the library is not installed, and if the document is damaged, locked,
    without text or too large. What is left out is said on stderr.
    """
    readers: dict[str, Callable[[BinaryIO, str], Iterator[Part]]] = {
        "pdf": _pdf,
        "epub": _epub,
        "docx": _docx,
        "html": _html,
    }
    try:
        yield from readers[kind.reader or ""](stream, name)
    except ImportError:
        raise AHNError(
            f"{name}: is {kind.what}; {pip_install(*PACKAGES)} makes it readable"
        ) from None


def _pdf(stream: BinaryIO, name: str) -> Iterator[Part]:
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(stream)
    except pypdfium2.PdfiumError as e:
        if e.err_code == _PASSWORD:
            why = "has a password; save it without, as qpdf --decrypt --password=... does"
        elif e.err_code == _NO_ERROR:
            why = "is a PDF without pages"
        else:
            why = "is a damaged or cut off PDF; get it once more"
        raise AHNError(f"{name}: {why}") from None
    with pdf:
        total, without, unread = len(pdf), 0, 0
        if total > (size := stream.seek(0, SEEK_END)):  # what it claims takes time, page by page
            raise AHNError(
                f"{name}: is a damaged PDF, it claims {total:,} pages in {size:,} bytes; "
                "get it once more"
            )
        for n in range(total):
            try:
                page = pdf[n]
                text = page.get_textpage()
                found = text.get_text_bounded().translate(_PDF_SIGNS)
                text.close()
                page.close()
            except pypdfium2.PdfiumError:
                found = ""
                unread += 1
            without += not found.strip()
            yield Part(found.rstrip() + "\n", total)
    if unread == total:
        raise AHNError(f"{name}: is a damaged PDF, none of its pages can be read")
    if without == total:
        pages = "its only page has no" if total == 1 else f"none of its {total:,} pages has"
        raise AHNError(f"{name}: {pages} text, only pictures; ocrmypdf adds what they say")
    if unread:
        note(f"{name}: {unread:,} of {total:,} pages are damaged and were left out")
    if without > unread:
        note(f"{name}: {without - unread:,} of {total:,} pages have no text")


def _html(stream: BinaryIO, name: str) -> Iterator[Part]:
    page = decode_page(stream.read(), name)
    yield Part(_text_of_page(_as_html(page) if _XHTML.search(page, 0, 2000) else page, name), 1)


def _as_html(page: str) -> str:
    """XHTML as HTML: <title/> would hide the rest of the page."""
    return _CLOSED.sub(r"<\1\2></\1>", page)


def _text_of_page(page: str, name: str) -> str:
    """What a browser would show of HTML, without scripts, styles and pictures."""
    import html_to_markdown

    page = _on_one_line(page)
    with foreign(lambda reason: f"{name}: its HTML cannot be read ({reason})"):
        options = html_to_markdown.ConversionOptions(
            output_format="plain", extract_metadata=False, skip_images=True
        )
        found = html_to_markdown.convert(page, options)
    for warning in found.warnings:  # parts that are nested too deeply
        note(f"{name}: something was left out ({show(warning.message)})")
    text = (found.content or "").strip()
    return f"{text}\n\n" if text else ""


def _on_one_line(page: str) -> str:
    """A line end is a space in HTML, but for what is preformatted; the library keeps it."""
    pieces, preformatted = [], False
    for piece in _PRE.split(page):
        if _PRE.fullmatch(piece):
            preformatted = piece[1] != "/"
        pieces.append(piece if preformatted else re.sub("[ \t\n\r\f]+", " ", piece))
    return "".join(pieces)


class _Archive:
    """A zip archive, whose parts are read by name, and no more of them than UNPACKED bytes.

    Every method raises AHNError if the archive is damaged or locked.
    """

    def __init__(self, stream: BinaryIO, name: str):
        self.name = name
        self.left = UNPACKED
        with self._sound():
            self.size = stream.seek(0, 2)
            self.archive = zipfile.ZipFile(stream)
            self.names = set(self.archive.namelist())

    def _sound(self) -> AbstractContextManager[None]:
        return foreign(lambda reason: f"{self.name}: is damaged or cut off ({reason})")

    def read(self, part: str) -> bytes:
        """Its bytes. Raises AHNError if they are too many, too."""
        with self._sound():
            info = self.archive.getinfo(part)
            # zipfile gives no more than the directory says.
            self.left -= info.file_size
            if info.file_size > LARGEST or self.left < 0:
                much = LARGEST if info.file_size > LARGEST else UNPACKED
                more = f"unpacks to more than {much / 1e6:,.0f} MB of text"
                raise AHNError(f"{self.name}: {more}; split it, or give it as plain text")
            # A directory may claim more than there is.
            packed = min(info.compress_size, self.size)
            if info.file_size > SMALL and info.file_size > DENSEST * packed:
                raise AHNError(f"{self.name}: is a zip bomb, {show(part)} unpacks without end")
            if info.flag_bits & 1:
                raise AHNError(f"{self.name}: has a password; save it without one")
            return self.archive.read(info)

    def xml(self, part: str) -> bytes:
        """A part that is XML, without entities of its own, which could be files of this
        machine, or grow without end."""
        data = self.read(part)
        parser = expat.ParserCreate()
        parser.EntityDeclHandler = self._refuse_entity
        with self._sound():
            parser.Parse(data, True)
        return data

    def tree(self, part: str) -> ElementTree.Element:
        data = self.xml(part)
        with self._sound():
            return ElementTree.fromstring(data)

    def _refuse_entity(self, entity: str, *_: object) -> None:
        raise AHNError(f"{self.name}: declares the entity {show(entity)}; no document needs one")


def _docx(stream: BinaryIO, name: str) -> Iterator[Part]:
    import mammoth

    # Text alone reaches the library, checked: no pictures, fonts, macros or style maps.
    archive, bare = _Archive(stream, name), BytesIO()
    with zipfile.ZipFile(bare, "w") as copy:
        for part in sorted(archive.names):
            if part.endswith((".xml", ".rels")):
                copy.writestr(part, archive.xml(part))
    with foreign(lambda reason: f"{name}: is a damaged Word document ({reason})"):
        page = mammoth.convert_to_html(
            bare,
            convert_image=mammoth.images.img_element(lambda image: {}),
            include_embedded_style_map=False,
        ).value
    yield Part(_text_of_page(page, name), 1)


def _epub(stream: BinaryIO, name: str) -> Iterator[Part]:
    archive = _Archive(stream, name)
    chapters, missing = _spine(archive)
    for chapter in chapters:
        page = decode_page(archive.read(chapter), f"{name}: {show(chapter)}")
        yield Part(_text_of_page(_as_html(page), name), len(chapters))
    if missing:
        note(f"{name}: {missing:,} of {len(chapters) + missing:,} chapters are missing")


def _spine(archive: _Archive) -> tuple[list[str], int]:
    """Names of an EPUB's chapters in reading order, and how many more are not there."""
    container = archive.tree("META-INF/container.xml")
    root = container.find(".//{*}rootfile")
    package = unquote(root.get("full-path", "")) if root is not None else ""
    if package not in archive.names:
        raise AHNError(f"{archive.name}: is a damaged EPUB, its package file is missing")
    book = archive.tree(package)
    folder = posixpath.dirname(package)
    items = {item.get("id"): item for item in book.iterfind("{*}manifest/{*}item")}
    chapters, missing = [], 0
    for ref in book.iterfind("{*}spine/{*}itemref"):
        item = items.get(ref.get("idref"))
        href = item.get("href", "") if item is not None else ""
        kind = item.get("media-type", "") if item is not None else ""
        if kind.startswith("image/"):
            continue
        # Names only: nothing is opened outside the archive.
        plain = posixpath.normpath(posixpath.join(folder, href.split("#")[0]))
        chapter = next((p for p in (plain, unquote(plain)) if p in archive.names), None)
        if chapter is None:
            missing += 1
        else:
            chapters.append(chapter)
    _refuse_drm(archive, chapters)
    if not chapters:
        raise AHNError(f"{archive.name}: is a damaged EPUB, none of its chapters is there")
    return chapters, missing


def _refuse_drm(archive: _Archive, chapters: list[str]) -> None:
    """Fonts are often encrypted in a book that anyone may read; chapters only by DRM."""
    locked = {"META-INF/rights.xml", "META-INF/sinf.xml", "META-INF/license.lcpl"} & archive.names
    if "META-INF/encryption.xml" in archive.names:
        encryption = archive.tree("META-INF/encryption.xml")
        for reference in encryption.iterfind(".//{*}CipherReference"):
            uri = reference.get("URI", "")
            locked |= {uri, unquote(uri)} & set(chapters)
    if locked:
        raise AHNError(f"{archive.name}: is an EPUB with DRM; only its reader opens it")
