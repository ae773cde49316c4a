"""Texts and documents of every kind."""

import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any
from zlib import crc32

import papers

from ahn_mlx.reading.kinds import kind_of
from ahn_mlx.reading.text import (
    find,
    read_documents,
    read_each,
    read_file,
    read_texts,
    readable,
    typed_line,
    typed_path,
    typed_paths,
)

from ..mutate import of_json, of_lines, of_zip
from ..oracle import Target, also

ENCODINGS = (
    *("utf-8", "utf-16", "utf-7", "idna", "punycode", "undefined", "unicode_escape", "zlib", "hex"),
    *("windows-1252", "shift_jis", "gb18030", "raw_unicode_escape", "rot13", "mbcs", "big5", "hz"),
)
MARKUP = (
    *(
        "<html>",
        "<meta charset=",
        '<?xml version="1.0" encoding="',
        '"?>',
        "<!--",
        "-->",
        "<![CDATA[",
    ),
    *("]]>", "<!DOCTYPE html", "<!ENTITY x SYSTEM 'file:///etc/passwd'>", "&x;", "<table>", "<tr>"),
    *("<td colspan=99999>", "<script>", "<style>", "<pre>", "</pre>", "<title/>", "<svg>", "<ol>"),
    *("<li>", "<blockquote>", "<math>", "<template>", "&#0;", "&#xd800;", "&nbsp;", "<a href="),
    *ENCODINGS,
)
PARTS = (
    *("META-INF/container.xml", "OEBPS/book.opf", "META-INF/encryption.xml", "META-INF/rights.xml"),
    *("word/document.xml", "_rels/.rels", "[Content_Types].xml", "word/styles.xml", "../x", "/x"),
    *(
        "word/numbering.xml",
        "word/footnotes.xml",
        "word/comments.xml",
        "full-path",
        "idref",
        "href",
    ),
    *(
        "media-type",
        "image/png",
        "application/xhtml+xml",
        "CipherReference",
        "URI",
        "spine",
        "item",
    ),
    *("word/_rels/document.xml.rels", "w:tbl", "w:hyperlink", "r:id", "w:footnoteReference"),
)


def _file(name: str) -> Any:
    def prepare(data: bytes, place: Path) -> Path:
        (place / name).write_bytes(data)
        return place / name

    return prepare


def _read(file: Path, place: Path, out: Path) -> None:
    read_file(file, lambda n, total: None)


def _lines(file: Path, place: Path, out: Path) -> None:
    for text in read_texts(file):
        text.encode("utf-8", "surrogatepass")


def _texts(file: Path, place: Path, out: Path) -> None:
    """As a document, among others, and what its lines are as typed ones."""
    typed = file.read_bytes().decode("utf-8", "surrogateescape")[:300]
    typed_path(typed_line(typed))
    typed_paths(typed)
    with file.open("rb") as stream:
        kind_of(stream, ".txt")
    folder = place / "folder"
    inside = str(folder / typed.replace("/", "_").replace("..", "_"))
    several = [str(file), *map(str, sorted(folder.iterdir()))]
    again = [str(file), os.path.relpath(file), str(place / "link")]
    near = typed[:9].replace("/", "_")  # a pattern from the root would go through the whole disk
    beside = [near, str(place / "?.txt"), f"{place}/**/*{typed[:2]}", str(place / "none.tx")]
    # Of one input this and of another that: what else may be given, or come through a pipe.
    more = (several, again, [f"{folder}/*"], ["-"], [], beside, ["-", "-"], ["/dev/null"])
    these = ([str(folder)], [inside], *more)
    drawn = crc32(typed.encode("utf-8", "surrogateescape"))
    with also():
        _read_all(these[drawn % len(these)], file)
    readable(typed)
    readable(typed + "\ud83d" if typed.isascii() else typed)
    for text in read_texts(file):
        assert text == read_file(file)
    if drawn >> 8 & 3 == 0:
        _read_all([str(file)], file)


def _read_all(names: list[str], piped: Path) -> None:
    """piped: what comes through a pipe, if anything does."""
    find(names)
    dict(read_each([name for name in names if name != "-"], read_file))
    real = sys.stdin
    try:
        for sys.stdin in (None, piped.open()):  # type: ignore[assignment]
            with also():
                read_documents(names, has_prompt=sys.stdin is None).encode()
    finally:
        if sys.stdin is not None:
            sys.stdin.close()
        sys.stdin = real


def _folder(data: bytes, place: Path) -> Path:
    folder = place / "folder"
    folder.mkdir(exist_ok=True)
    for name, part in (("chapter 1.txt", data[: len(data) // 2]), ("a.html", data)):
        (folder / name).write_bytes(part)
    for name in ("b.dat", "c.txt"):
        (folder / name).write_bytes(b"\x89PNG\r\n" if name[0] == "b" else b"")
    if not (place / "link").is_symlink():
        (place / "link").symlink_to(place / "a.txt")
    (place / "a.txt").write_bytes(data)
    return place / "a.txt"


def _zipped(name: str) -> Any:
    """JSON has the parts of an archive by their names; anything else is the archive itself."""

    def prepare(data: bytes, place: Path) -> Path:
        file = place / name
        try:
            parts = json.loads(data)
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as z:
                for part, text in parts.items():
                    z.writestr(part, str(text).encode("utf-8", "surrogatepass"))
            file.write_bytes(buffer.getvalue())
        except (ValueError, AttributeError, RecursionError, OSError, zipfile.LargeZipFile):
            file.write_bytes(data)
        return file

    return prepare


def unzipped(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        return json.dumps({n: z.read(n).decode("utf-8", "replace") for n in z.namelist()}).encode()


def pages() -> list[bytes]:
    return [
        b"<!doctype html><meta charset=shift_jis><title>x</title><p>One<br>two <b>three</b>",
        papers.chapter("<h1>One</h1><p>It was</p><pre>a\n  b</pre><title/>").encode(),
        '<?xml version="1.0" encoding="utf-16"?><html><body>é</body></html>'.encode("utf-16"),
        b"<table><tr><td>a<td>b<tr><th>c</table><ul><li>x<li>y</ul><script>1</script>",
        b"<div>" * 700 + b"x",
    ]


def pdfs() -> list[bytes]:
    """With text, without, of an owner, and with a page that is none."""
    whole = papers.pdf("One two", "", "Three")
    torn = whole.replace(b"/Type /Page\n", b"/Type /Pagx\n", 1)
    found = [whole, torn, papers.pdf(""), papers.pdf("", ""), papers.pdf("x", password="y")]
    return [*found, papers.pdf("x", password=""), whole[:-200], b"%PDF-1.4\n%%EOF"]


def epubs() -> list[bytes]:
    chapters = {"a.xhtml": papers.chapter("<p>One</p>"), "b.xhtml": papers.chapter("<p>Two</p>")}
    drm = "<encryption xmlns:e='x'><e:CipherReference URI='OEBPS/a.xhtml'/></encryption>"
    whole = papers.epub(chapters)
    locked = papers.epub(chapters, **{"META-INF__encryption.xml": drm})
    return [unzipped(whole), unzipped(locked), papers.epub({"a.xhtml": "<p>x</p>"})]


def documents() -> list[bytes]:
    table = "<w:tbl><w:tr><w:tc>" + papers.paragraph("cell") + "</w:tc></w:tr></w:tbl>"
    note = '<w:p><w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
    whole = papers.docx(papers.paragraph("One") + table + note, footnote="Two")
    entity = json.loads(unzipped(whole))
    kind = "<!DOCTYPE x [<!ENTITY y 'z'>]>"
    entity["word/document.xml"] = kind + entity["word/document.xml"].rpartition("?>")[2]
    return [unzipped(whole), papers.docx(papers.paragraph("x")), json.dumps(entity).encode()]


def archives() -> list[bytes]:
    compressed = papers.zipped({"content.xml": "x" * 300})
    return [compressed, *(papers.zipped({n: "x"}) for n in ("xl/a", "ppt/b", "Index/c", "d.txt"))]


TARGETS = [
    Target(
        "jsonl",
        _file("a.jsonl"),
        _lines,
        lambda: [
            b'{"text": "One", "id": 1}\n{"text": "Two\\r\\n\\ud83d"}\n\n\xef\xbb\xbf{"text": ""}\n',
            b'{"text": null}\n[1]\n"x"\n1\n',
            b'\xff\xfe{\0"\0t\0e\0x\0t\0"\0:\0"\0x\0"\0}\0',
        ],
        ("reading/text.py", "reading/encoding.py"),
        ('{"text": "', '"}\n', "\ufeff", "\\ud800", "\\u0000", "NaN", "1e999", "\u2028", "[[[["),
        of_lines(("text", "id", "")),
    ),
    Target(
        "text",
        _folder,
        _texts,
        lambda: [
            "Call me Ishmael.\r\nSome years ago é 世\n".encode(),
            "Call me Ishmael, é.".encode("utf-16"),
            "Call me Ishmael, é.".encode("utf-16-le"),
            "Call me Ishmael, é.".encode("utf-32"),
            "Call é".encode("latin-1"),
            b"~/a\\ b 'c d' file:///tmp/x%20y *.txt [ab] **",
            b"\x89PNG\r\n",
            bytes(60) + b"BOOKMOBI",
            b"\xd0\xcf\x11\xe0" + "EncryptedPackage".encode("utf-16-le"),
            b"From: x\nContent-Type: multipart/related; x",
        ],
        ("reading/text.py", "reading/encoding.py", "reading/kinds.py"),
        ("\ufeff", "%PDF-", "PK\x03\x04", "<html", "file://localhost/", "~root/", "\0", "**", "[!"),
    ),
    Target(
        "html",
        _file("a.html"),
        _read,
        pages,
        ("reading/documents.py", "reading/encoding.py"),
        MARKUP,
    ),
    Target(
        "pdf",
        _file("a.pdf"),
        _read,
        pdfs,
        ("reading/documents.py",),
        ("%PDF-1.4", "/Page", "/Kids", "/Count", "/Encrypt", "xref", "trailer", "stream", "endobj"),
    ),
    Target(
        "epub", _zipped("a.epub"), _read, epubs, ("reading/documents.py",), PARTS,
        of_json((*PARTS, *MARKUP)),
    ),
    Target(
        "docx", _zipped("a.docx"), _read, documents, ("reading/documents.py",), PARTS,
        of_json((*PARTS, *MARKUP)),
    ),
    Target(
        "archive",
        _file("a.zip"),
        _read,
        lambda: [*archives(), papers.epub({"a.xhtml": "<p>x</p>"}), papers.docx("")],
        ("reading/kinds.py", "reading/documents.py"),
        ("PK\x01\x02", "PK\x03\x04", "PK\x05\x06", "PK\x06\x06", "word/", "\xff\xff"),
        of_zip(PARTS),
    ),
]  # fmt: skip
