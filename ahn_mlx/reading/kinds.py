"""What a file is, from its first bytes and never from its name alone; and for a file that
nothing here reads, what to do with it. Nothing is decoded or unpacked to find out."""

import re
import zipfile
from typing import BinaryIO, Literal, NamedTuple

from .encoding import MARKS, unmarked

Reader = Literal["text", "html", "pdf", "epub", "docx"]


class Kind(NamedTuple):
    """what: in words, with an article. reader: of documents.py; None if nothing reads it, and
    then mend is what to do, in words."""

    what: str
    reader: Reader | None
    mend: str = ""


TEXT = Kind("a text", "text")
HTML = Kind("a page of HTML", "html")
PDF = Kind("a PDF", "pdf")
EPUB = Kind("an EPUB", "epub")
DOCX = Kind("a Word document", "docx")

_CALIBRE = "convert it to EPUB with Calibre (ebook-convert FILE FILE.epub)"
_OCR = "OCR makes a PDF with text of it (ocrmypdf)"
_WORD = "save it as .docx"
_UNPACK = "unpack it, and give what is in it"
_NO_WORDS = "give a text or a document"
HEAD = 4096

# Bytes at an offset, what they begin, and what to do.
_BEGINNINGS = (
    (0, b"{\\rtf", "an RTF document", f"{_WORD} or as plain text"),
    (0, b"%!PS", "PostScript", "make a PDF of it with ps2pdf"),
    (0, b"\x1f\x8b", "compressed", "gunzip it first"),
    (4, b"1AY&SY", "compressed", "bunzip2 it first"),
    (0, b"\xfd7zXZ\0", "compressed", "unxz it first"),
    (0, b"\x28\xb5\x2f\xfd", "compressed", "unzstd it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (60, b"BOOKMOBI", "a Kindle book (MOBI or AZW)", _CALIBRE),
    (60, b"TEXtREAd", "a Palm book", _CALIBRE),
    (0, b"TPZ", "a Kindle book (Topaz)", _CALIBRE),
    (0, b"CONT\x02\0", "a Kindle book (KFX)", _CALIBRE),
    (0, b"\xeaDRMION\xee", "a Kindle book with DRM", "only its reader opens it"),
    (0, b"ITOLITLS", "a LIT book", _CALIBRE),
    (0, b"ITSF", "a CHM book", _CALIBRE),
    (0, b"AT&TFORM", "a DjVu book", "make a PDF of it with ddjvu -format=pdf, then ocrmypdf"),
    (0, b"bplist00", "a binary property list, as .webarchive is", "save the page as HTML"),
    (0, b"\x89PNG", "a picture (PNG)", _OCR),
    (0, b"\xff\xd8\xff", "a picture (JPEG)", _OCR),
    (0, b"GIF8", "a picture (GIF)", _OCR),
    (0, b"II*\0", "a picture (TIFF)", _OCR),
    (0, b"MM\0*", "a picture (TIFF)", _OCR),
    (8, b"WEBP", "a picture (WebP)", _OCR),
    (4, b"ftyphei", "a picture (HEIC)", _OCR),
    (4, b"ftypmif1", "a picture (HEIC)", _OCR),
    (4, b"ftypavif", "a picture (AVIF)", _OCR),
    (4, b"ftyp", "a video or sound", _NO_WORDS),
    (8, b"WAVE", "a sound (WAV)", _NO_WORDS),
    (0, b"ID3", "a sound (MP3)", _NO_WORDS),
    (0, b"OggS", "a sound or video (Ogg)", _NO_WORDS),
    (0, b"fLaC", "a sound (FLAC)", _NO_WORDS),
    (0, b"SQLite format 3\0", "a database (SQLite)", "export what is in it as text"),
)
# A name in a zip archive, or the beginning of one, and what the archive then is.
_ZIPPED = (
    ("META-INF/container.xml", EPUB),
    ("word/", DOCX),
    ("xl/", Kind("an Excel table", None, "save it as CSV")),
    ("ppt/", Kind("a PowerPoint presentation", None, "save it as PDF")),
    ("Index/Document.iwa", Kind("a document of Pages", None, "export it as EPUB, Word or PDF")),
    ("Index/", Kind("a document of Numbers or Keynote", None, "export it as CSV or PDF")),
    ("content.xml", Kind("an OpenDocument file", None, f"{_WORD} or as PDF")),
)
_ZIP = Kind("a zip archive", None, _UNPACK)
_DAMAGED_ZIP = Kind(
    "a damaged or cut off zip archive, as EPUB and .docx are", None, "get it once more"
)
_OLE = b"\xd0\xcf\x11\xe0"
# A declaration and comments may stand before the page.
_PAGE = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--((?!-->).)*-->\s*)*<(!doctype\s+html|html)\b",
    re.IGNORECASE | re.DOTALL,
)
_FICTION_BOOK = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<FictionBook\b")
_WEB_ARCHIVE = re.compile(rb"(?is)(From|MIME-Version|Subject|Date):.*?multipart/related")


def kind_of(stream: BinaryIO, suffix: str) -> Kind:
    """What a file is. stream: at its beginning, seekable; it is left there. suffix: of its name,
    which decides only between text and HTML."""
    head = stream.read(HEAD)
    stream.seek(0)
    bare = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    # Some bytes may stand before the header of a PDF, as a mail program leaves them.
    if bare.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in head[:1024]):
        return PDF
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _in_zip(stream)
    if head.startswith(_OLE):
        return _office(stream)
    for offset, begins, what, mend in _BEGINNINGS:
        # A text may begin so by chance, but has no NUL.
        by_chance = begins.isalnum() and b"\0" not in head
        if head.startswith(begins, offset) and not by_chance:
            return Kind(what, None, mend)
    if _FICTION_BOOK.match(bare):
        return Kind("a FictionBook", None, _CALIBRE)
    if _WEB_ARCHIVE.match(bare[:1024]):
        return Kind("a web archive (MHTML)", None, "save the page as HTML")
    # UTF-16 is of zeros, too: a NUL of it is judged where it is decoded.
    if b"\0" in head and not head.startswith(tuple(MARKS)) and not unmarked(head):
        return Kind(f"a binary file, not text (byte {head.index(0):,} is NUL)", None, _NO_WORDS)
    narrow = bare.replace(b"\0", b"").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff")
    if suffix in (".html", ".htm", ".xhtml", ".xht") or _PAGE.match(narrow):
        return HTML
    return TEXT


def _in_zip(stream: BinaryIO) -> Kind:
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except Exception:  # of many kinds
        return _DAMAGED_ZIP
    finally:
        stream.seek(0)
    for begin, kind in _ZIPPED:
        if any(name.startswith(begin) for name in names):
            return kind
    return _ZIP


def _office(stream: BinaryIO) -> Kind:
    """Old Office documents, and what Office makes of a new one with a password."""
    directory = stream.read(1 << 20)
    stream.seek(0)
    if "EncryptedPackage".encode("utf-16-le") in directory:
        return Kind("an Office document with a password", None, "save it without one")
    return Kind("an old Office document", None, f"{_WORD} or as plain text")
