"""Documents of any kind: their text in reading order, and one line for those without."""

import builtins
import bz2
import gzip
import io
import lzma
import os
import plistlib
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import matplotlib
import papers
import pytest
from checkpoints import REPO

from ahn_mlx import AHNError
from ahn_mlx.platform import pip_install
from ahn_mlx.reading import documents
from ahn_mlx.reading.kinds import HEAD, kind_of
from ahn_mlx.reading.text import find, read_documents, read_file, read_texts
from ahn_mlx.train.data import texts

NOVEL = (REPO / "ahn_mlx/demo/pride-and-prejudice.txt").read_text(encoding="utf-8")
WEB = "http://127.0.0.1:9/"  # nobody answers


def file(path: Path, data: bytes | str, name: str) -> Path:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return path / name


def words(text: str) -> list[str]:
    return text.split()


# -- PDF ------------------------------------------------------------------------------------


def test_a_pdf_is_read_page_by_page(tmp_path):
    book = file(tmp_path, papers.pdf("Call me Ishmael.", "Some years ago.", "Never mind."), "a.pdf")
    seen = []
    text = read_file(book, lambda done, total: seen.append((done, total)))
    assert text == "Call me Ishmael.\nSome years ago.\nNever mind.\n"
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_reading_stops_between_pages(tmp_path):
    book = file(tmp_path, papers.pdf("one", "two", "three"), "a.pdf")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_file(book, stop)


def test_a_whole_book_of_500_pages(tmp_path):
    plain = NOVEL.encode("latin-1", "replace").decode("latin-1")
    lines = [line for line in plain.splitlines() if line.strip()]
    pages = ["\n".join(lines[n % 700 : n % 700 + 40]) for n in range(500)]
    book = file(tmp_path, papers.pdf(*pages), "book.pdf")
    assert words(read_file(book)) == words("\n".join(pages))


@pytest.mark.parametrize("name", ["notes.txt", "notes", "notes.md"])
def test_the_bytes_say_what_it_is_not_the_name(tmp_path, name):
    assert read_file(file(tmp_path, papers.pdf("A PDF."), name)) == "A PDF.\n"
    assert read_file(file(tmp_path, b"\r\n" + papers.pdf("A PDF."), name)) == "A PDF.\n"
    assert read_file(file(tmp_path, "No PDF.\n", "a.pdf")) == "No PDF.\n"


def test_a_pdf_begins_within_1024_bytes():
    before = [kind_of(io.BytesIO(b"x" * n + b"%PDF-1.4"), ".pdf") for n in (1, 1019, 1020)]
    assert [kind is before[0] for kind in before] == [True, True, False]
    assert kind_of(io.BytesIO(b"x%PDF-1.4"), ".txt") is before[2]


@pytest.mark.parametrize("kind", ["pdf", "epub", "docx", "xlsx", "ole", "text", "html", "nothing"])
def test_looking_at_a_file_leaves_it_at_its_begin(kind):
    data = {
        "pdf": papers.pdf("x"),
        "epub": papers.epub({"a.xhtml": papers.chapter("<p>x</p>")}),
        "docx": papers.docx(papers.paragraph("x")),
        "xlsx": papers.zipped({"xl/workbook.xml": "x"}),
        "ole": b"\xd0\xcf\x11\xe0" + bytes(5000),
        "text": b"It was the best of times. " * 400,
        "html": b"<html><p>x</p>",
        "nothing": b"",
    }[kind]
    stream = io.BytesIO(data)
    kind_of(stream, "")
    assert stream.tell() == 0


def test_letters_of_typesetting_and_other_scripts(tmp_path):
    font = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSerif.ttf")
    said = "the \ufb01nal \ufb02oor, e\ufb03cient; \u0416\u0443\u043a"
    book = file(tmp_path, papers.pdf(said, font=font), "a.pdf")
    assert read_file(book) == "the final floor, efficient; \u0416\u0443\u043a\n"


def test_a_word_that_a_line_end_divides(tmp_path):
    book = file(tmp_path, papers.pdf("a long exam-\nple of it, well-known"), "a.pdf")
    text = read_file(book)
    assert "\ufffe" not in text and "\x02" not in text and "well-known" in text
    assert "example" in text or "exam-\nple" in text


def test_pages_without_text_are_counted(tmp_path, capsys):
    book = file(tmp_path, papers.pdf("", "Words.", ""), "a.pdf")
    assert read_file(book).strip() == "Words."
    assert capsys.readouterr().err == f"note: {book}: 2 of 3 pages have no text\n"
    with pytest.raises(AHNError, match=r"none of its 2 pages has text.*ocrmypdf"):
        read_file(file(tmp_path, papers.pdf("", ""), "scan.pdf"))
    with pytest.raises(AHNError, match=r"its only page has no text.*ocrmypdf"):
        read_file(file(tmp_path, papers.pdf(""), "scan.pdf"))


def test_a_pdf_with_a_password(tmp_path):
    with pytest.raises(AHNError, match=r"a\.pdf: has a password"):
        read_file(file(tmp_path, papers.pdf("Secret.", password="sesame"), "a.pdf"))
    book = file(tmp_path, papers.pdf("Locked by its owner.", password=""), "b.pdf")
    assert read_file(book) == "Locked by its owner.\n"


def test_a_pdf_cut_off_anywhere_is_one_line(tmp_path):
    whole = papers.pdf("one", "two", "three")
    for end in (5, 20, len(whole) // 3, len(whole) // 2, len(whole) - 200, len(whole) - 10):
        book = file(tmp_path, whole[:end], "a.pdf")
        try:
            assert "o" in read_file(book)  # PDFium finds the pages without their table
        except AHNError as e:
            assert str(e).startswith(f"{book}: ") and "PDF" in str(e)
    none = whole.replace(b"/Count 3", b"/Count 0").replace(b"/Kids [", b"/Kidz [")
    with pytest.raises(AHNError, match=r"a PDF without pages|a damaged"):
        read_file(file(tmp_path, none, "none.pdf"))


def test_a_pdf_claims_as_many_pages_as_it_has_bytes_at_most(tmp_path: Path) -> None:
    whole = papers.pdf("one", "two")
    assert whole.count(b"/Count 2") == 1
    for more in (0, 1):
        size = len(whole) + 3  # it has four digits then
        claimed = whole.replace(b"/Count 2", b"/Count %d" % (size + more))
        assert len(claimed) == size
        book = file(tmp_path, claimed, "a.pdf")
        if more:
            with pytest.raises(AHNError, match=rf"claims {size + 1:,} pages in {size:,} bytes"):
                read_file(book)
        else:
            assert read_file(book).startswith("one\ntwo\n")


# -- HTML -----------------------------------------------------------------------------------


def test_a_page_says_what_a_browser_shows(tmp_path):
    page = f"""<!DOCTYPE html><html><head><title>Title</title><style>p {{}}</style>
    <script src="{WEB}a.js"></script></head><body><h1>One <em>day</em></h1>
    <script>document.write("<p>no</p>")</script><p>It
    was &ldquo;late&rdquo;<br>caf&eacute; &lt;b&gt;</p><img src="{WEB}a.png" alt="no">
    <ul><li>milk<li>bread</ul><a href="{WEB}">link</a>
    <table><tr><td>a<td>b<tr><td>c<td>d</table><iframe src="{WEB}"></iframe></body></html>"""
    for name in ("a.html", "a.txt", "a"):
        text = read_file(file(tmp_path, page, name))
        assert words(text) == words(
            "One day It was \u201clate\u201d caf\u00e9 <b> - milk - bread link a b c d"
        )
        assert "One day\n\nIt was" in text and "a\tb\nc\td" in text
    assert read_file(file(tmp_path, "<p>a<p>b", "b.HTM")) == "a\n\nb\n"
    for name in ("a.md", "a.py", "a.txt"):  # about HTML
        assert read_file(file(tmp_path, "# <html> is\n<p>", name)) == "# <html> is\n<p>"


@pytest.mark.parametrize(
    ("begin", "encoding"),
    [
        ('<meta charset="windows-1252">', "windows-1252"),
        ("<META http-equiv=Content-Type content='text/html; charset=iso-8859-1'>", "windows-1252"),
        ('<meta charset="koi8-r">', "koi8-r"),
        ("<meta charset=gb18030>", "gb18030"),
        ('<meta charset="utf-8">', "utf-8-sig"),
        ('<meta charset="utf-16">', "utf-16"),
        ('<meta charset="utf-16">', "utf-8"),
        ("", "utf-8"),
    ],
)
def test_a_page_in_the_encoding_that_it_says(tmp_path, begin, encoding):
    said = {"koi8-r": "\u0436\u0443\u043a", "gb18030": "\u4e16\u754c"}.get(
        encoding, "\u201ccaf\u00e9\u201d"
    )
    page = f"<html><head>{begin}</head><p>{said}</p></html>".encode(encoding)
    assert read_file(file(tmp_path, page, "a.html")) == said + "\n"


def test_a_page_in_no_known_encoding(tmp_path):
    for label in ("klingon-8", "rot13", "hex"):
        page = f'<html><meta charset="{label}"><p>x'
        with pytest.raises(AHNError, match=rf"in '{label}', which is no known encoding"):
            read_file(file(tmp_path, page, "a.html"))
    with pytest.raises(AHNError, match=r"a page of HTML without text"):
        read_file(file(tmp_path, "<html><img src=a.png></html>", "a.html"))
    with pytest.raises(AHNError, match=r"not UTF-8 text \(byte 11\)"):
        read_file(file(tmp_path, b"<html><p>ca\xe9 a", "a.html"))


def test_a_page_that_is_nested_too_deeply_says_so(tmp_path, capsys):
    page = file(tmp_path, "<html><p>begin</p>" + "<div>x" * 5000, "a.html")
    assert read_file(page).startswith("begin\n")
    assert "depth" in capsys.readouterr().err


# -- EPUB -----------------------------------------------------------------------------------


def test_an_epub_is_read_in_the_order_of_its_spine(tmp_path):
    body = '<div id="p"/><h2>{0}</h2>\n<p>&#8220;<i>Text</i>,\n {0}</p><pre>x\n  y</pre>'
    names = ("three", "one%20a", "two", "cover")
    pages = {f"{name}.xhtml": papers.chapter(body.format(name)) for name in names}
    pages["cover.xhtml"] = papers.chapter('<img src="cover.jpg"/>')
    spine = [f"{name}.xhtml" for name in ("cover", "one%20a", "two", "three")]
    seen = []
    book = file(tmp_path, papers.epub(pages, spine), "a.epub")
    text = read_file(book, lambda *at: seen.append(at))
    said = "{0}\n\n\u201cText, {0}\n\nx\n  y\n"
    assert text == "\n".join(said.format(name) for name in ("one%20a", "two", "three"))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_picture_among_the_chapters_is_none(tmp_path, capsys):
    pages = {"cover.jpg": b"\xff\xd8\xff <p>no text</p>", "a.xhtml": papers.chapter("<p>A.</p>")}
    seen = []
    book = file(tmp_path, papers.epub(pages), "a.epub")
    assert read_file(book, lambda *at: seen.append(at)) == "A.\n"
    assert seen == [(1, 1)] and capsys.readouterr().err == ""


def test_an_epub_with_a_chapter_missing_says_so(tmp_path, capsys):
    book = papers.epub({"a.xhtml": papers.chapter("<p>A.</p>"), "b.xhtml": "gone"})
    with zipfile.ZipFile(io.BytesIO(book)) as old:
        parts = {n: old.read(n) for n in old.namelist() if not n.endswith("b.xhtml")}
    path = file(tmp_path, papers.zipped(parts), "a.epub")
    assert read_file(path) == "A.\n"
    assert capsys.readouterr().err == f"note: {path}: 1 of 2 chapters are missing\n"
    del parts["OEBPS/a.xhtml"]
    with pytest.raises(AHNError, match="damaged EPUB, none of its chapters"):
        read_file(file(tmp_path, papers.zipped(parts), "b.epub"))


def encryption(uri: str) -> str:
    return (
        '<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData>'
        f'<enc:CipherData><enc:CipherReference URI="{uri}"/></enc:CipherData>'
        "</enc:EncryptedData></encryption>"
    )


def test_drm_is_named_and_locked_fonts_are_none(tmp_path):
    pages = {"a%20b.xhtml": papers.chapter("<p>A.</p>")}
    fonts = {"META-INF__encryption.xml": encryption("OEBPS/font.otf")}
    assert read_file(file(tmp_path, papers.epub(pages, **fonts), "free.epub")) == "A.\n"
    for locked in (
        {"META-INF__encryption.xml": encryption("OEBPS/a%20b.xhtml")},
        {"META-INF__rights.xml": "<rights/>"},
    ):
        with pytest.raises(AHNError, match="is an EPUB with DRM"):
            read_file(file(tmp_path, papers.epub(pages, **locked), "locked.epub"))


# -- Word -----------------------------------------------------------------------------------


def test_a_word_document_with_table_and_footnote(tmp_path):
    cells = "".join(f"<w:tc>{papers.paragraph(text)}</w:tc>" for text in ("left", "right"))
    body = (
        papers.paragraph("First, \u4e16\u754c.")
        + f"<w:tbl><w:tr>{cells}</w:tr></w:tbl>"
        + '<w:p><w:r><w:t>Noted</w:t></w:r><w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
    )
    told: list[tuple[int, int]] = []
    name = file(tmp_path, papers.docx(body, "At the foot."), "a.docx")
    text = read_file(name, lambda *of: told.append(of))
    assert told == [(1, 1)]
    assert text.startswith("First, \u4e16\u754c.\n\nleft\tright\n\nNoted")
    assert "At the foot." in text and "](" not in text


# -- Hostile and damaged --------------------------------------------------------------------

BOMB = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>'
SPY = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize("begin", [BOMB, SPY])
def test_no_entity_is_expanded_and_no_file_read_through_one(tmp_path, begin):
    book = papers.docx(papers.paragraph("&a;"), begin=begin)
    with pytest.raises(AHNError, match="declares the entity 'a'"):
        read_file(file(tmp_path, book, "a.docx"))
    container = begin.partition("?>")[2] + papers.CONTAINER.partition("?>")[2]
    book = papers.epub({"a.xhtml": "x"}, **{"META-INF__container.xml": container})
    with pytest.raises(AHNError, match="declares the entity 'a'"):
        read_file(file(tmp_path, book, "a.epub"))
    # A chapter is read as HTML, which has no such thing.
    page = begin + "<html><p>&a; end</p></html>"
    assert read_file(file(tmp_path, papers.epub({"a.xhtml": page}), "b.epub")) == "&a; end\n"


def test_what_a_document_unpacks_to_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "UNPACKED", 10**6)
    page = "<p>" + " " * 600_000
    book = papers.epub({"a.xhtml": page}, ["a.xhtml", "a.xhtml"])
    assert len(book) < 10_000
    with pytest.raises(AHNError, match=r"unpacks to more than 1 MB"):
        read_file(file(tmp_path, book, "a.epub"))
    monkeypatch.setattr(documents, "UNPACKED", 10**9)
    monkeypatch.setattr(documents, "LARGEST", 10**6)
    with pytest.raises(AHNError, match=r"unpacks to more than 1 MB"):
        read_file(file(tmp_path, papers.docx(papers.paragraph(" " * 10**6)), "a.docx"))


def test_names_that_lead_out_of_the_archive_lead_nowhere(tmp_path):
    file(tmp_path, "secret", "secret.xhtml")
    for href in ("../../secret.xhtml", str(tmp_path / "secret.xhtml"), f"{WEB}a.xhtml"):
        book = papers.epub({"a.xhtml": papers.chapter("<p>A.</p>"), href: "inside"})
        text = read_file(file(tmp_path, book, "a.epub"))
        assert "secret" not in text and text.startswith("A.")
    assert sorted(os.listdir(tmp_path)) == ["a.epub", "secret.xhtml"]


@pytest.mark.parametrize("name", ["a.epub", "a.docx"])
def test_an_archive_damaged_anywhere_is_one_line(tmp_path, name):
    long = "".join(f"word{n * n} " for n in range(3000))
    whole = (
        papers.epub({"a.xhtml": papers.chapter(f"<p>{long}")})
        if name == "a.epub"
        else papers.docx(papers.paragraph(long))
    )
    for n in range(0, len(whole), len(whole) // 60):
        for data in (whole[:n], whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :]):
            try:
                text = read_file(file(tmp_path, data, name))
                assert text == read_file(file(tmp_path, whole, name))
            except AHNError as e:
                assert str(e).startswith(f"{tmp_path / name}: ")


# -- What nothing reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a picture .PNG.*ocrmypdf"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture .JPEG"),
        (b"\0\0\0\x18ftypheic\0\0", "a picture .HEIC"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a picture .WebP"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600,
            "old Office document; save it as .docx",
        ),
        (
            b"\xd0\xcf\x11\xe0" + b"\0" * 600 + "EncryptedPackage".encode("utf-16-le"),
            "Office document with a password",
        ),
        (b"Book".ljust(60, b"\0") + b"BOOKMOBI\0", "Kindle book.*Calibre"),
        (b"AT&TFORM\0\0\0\x10DJVU", "DjVu"),
        (b"%!PS-Adobe-3.0\n", "PostScript.*ps2pdf"),
        (b"name".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
        (b"SQLite format 3\0", "SQLite"),
        (
            b"From: <Saved by Blink>\r\nMIME-Version: 1.0\r\nContent-Type: multipart/related;",
            "MHTML",
        ),
        (b'<?xml version="1.0"?>\n<FictionBook xmlns="x">', "FictionBook.*Calibre"),
        (b"\x7fELF\x02\x01\0", r"binary file, not text \(byte 6 is NUL\)"),
        (papers.zipped({"a.jpg": "x", "b.jpg": "y"}), "zip archive; unpack it"),
        (papers.zipped({}), "zip archive"),
        (papers.zipped({"[Content_Types].xml": "", "xl/workbook.xml": ""}), "Excel.*CSV"),
        (papers.zipped({"ppt/a.xml": ""}), "PowerPoint"),
        (papers.zipped({"content.xml": "", "mimetype": "x"}), "OpenDocument.*docx"),
        (papers.zipped({"Index/Document.iwa": ""}), "Pages; export"),
        (b"PK\x03\x04\x14\0\0\0", "damaged or cut off zip archive"),
        (papers.zipped({"Index/Tables.iwa": ""}), "Numbers or Keynote; export"),
        (b"{\\rtf1\\ansi Words}", "RTF document; save it as .docx"),
        (gzip.compress(b"x", mtime=0), "compressed; gunzip"),
        (bz2.compress(b"x"), "compressed; bunzip2"),
        (lzma.compress(b"x"), "compressed; unxz"),
        (b"\x28\xb5\x2f\xfd\0", "compressed; unzstd"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "7z archive; unpack"),
        (b"Rar!\x1a\x07\x01\0", "RAR archive; unpack"),
        (b"Book".ljust(60, b"\0") + b"TEXtREAd", "Palm book.*Calibre"),
        (b"TPZ3\0", "Topaz.*Calibre"),
        (b"CONT\x02\0\x53", "KFX.*Calibre"),
        (b"\xeaDRMION\xee\0", "DRM; only its reader"),
        (b"ITOLITLS\x01\0", "LIT book.*Calibre"),
        (b"ITSF\x03\0", "CHM book.*Calibre"),
        (plistlib.dumps({}, fmt=plistlib.FMT_BINARY), "webarchive.*as HTML"),
        (b"GIF89a\1\0", "GIF.*ocrmypdf"),
        (b"II*\0\x08\0", "TIFF"),
        (b"MM\0*\0\0", "TIFF"),
        (b"\0\0\0\x18ftypmif1\0\0", "HEIC"),
        (b"\0\0\0\x18ftypavif\0\0", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0", "video or sound"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "WAV"),
        (b"ID3\x03\0\0", "MP3"),
        (b"OggS\0\x02", "Ogg"),
        (b"fLaC\0\0", "FLAC"),
    ],
)
def test_what_nothing_reads_says_what_it_is_and_what_helps(tmp_path, data, what):
    for name in ("a", "a.pdf", "a.txt"):
        with pytest.raises(AHNError, match=rf"/{name}: is .*{what}|{what}"):
            read_file(file(tmp_path, data, name))


@pytest.mark.parametrize(
    "text", ["ID3 tags are", "    ftyp is", "BZh, he said", "RIFF said WAVE", "TPZ", "PK, she"]
)
def test_a_text_that_begins_as_something_else_does(tmp_path, text):
    assert read_file(file(tmp_path, text, "a.txt")) == text


def test_without_the_extra_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    there = builtins.__import__

    def absent(name: str, *args: object) -> object:
        if name in ("pypdfium2", "mammoth", "html_to_markdown"):
            raise ImportError(name)
        return there(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    for name, data, what in (
        ("a.pdf", papers.pdf("x"), "a PDF"),
        ("a.epub", papers.epub({"a.xhtml": "x"}), "an EPUB"),
        ("a.docx", papers.docx(papers.paragraph("x")), "a Word document"),
        ("a.html", b"<p>x", "a page of HTML"),
    ):
        # The command that doctor names.
        command = re.escape(pip_install("pypdfium2", "mammoth", "html-to-markdown"))
        with pytest.raises(AHNError, match=rf"{name}: is {what}; {command} makes it readable"):
            read_file(file(tmp_path, data, name))
    assert read_file(file(tmp_path, "\ufeff# Title\n", "a.md")) == "# Title\n"


def test_the_libraries_wait_until_a_document_comes():
    code = (
        "import sys, ahn_mlx.cli, ahn_mlx.cli.digest, ahn_mlx.cli.chat; "
        "print({'pypdfium2', 'mammoth', 'html_to_markdown'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert out.stdout == b"set()\n"


# -- Several --------------------------------------------------------------------------------


def test_several_documents_stand_below_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "One.\r\n", "a/one.txt")
    file(tmp_path, papers.pdf("Two."), "b/two.pdf")
    said = "=== a/one.txt ===\n\nOne.\n\n=== b/two.pdf ===\n\nTwo.\n"
    assert read_documents(["a/one.txt", "b/two.pdf"], has_prompt=False) == said
    assert read_documents([str(tmp_path / "a/one.txt"), "b/*"], has_prompt=False) == said
    assert read_documents(["a/one.txt"], has_prompt=False) == "One.\n"
    stdin = io.TextIOWrapper(io.BytesIO(papers.pdf("Piped.")))
    monkeypatch.setattr(sys, "stdin", stdin)
    text = read_documents(["-", "a/one.txt"], has_prompt=False)
    assert text == "=== standard input ===\n\nPiped.\n\n=== one.txt ===\n\nOne.\n"


def test_a_folder_is_read_as_people_number_files(tmp_path, capsys):
    names = ["ch1.txt", "ch2/a.md", "ch2/b.md", "ch10.txt", "Ch3.txt"]
    for name in [*names, ".hidden.txt", ".git/config", "ch2/.x/y.txt"]:
        file(tmp_path, name, name)
    file(tmp_path, b"\x89PNG\r\n\x1a\n\0", "ch2/a\nb.png")
    file(tmp_path, "", "empty.txt")
    (tmp_path / "ch2/loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    found = [os.path.relpath(file, tmp_path) for file in find([str(tmp_path)])]
    assert found == ["ch1.txt", "ch2/a.md", "ch2/b.md", "Ch3.txt", "ch10.txt"]
    said = capsys.readouterr().err
    what = "ch2/a b.png, a picture (PNG); empty.txt, empty"
    assert said == f"note: {tmp_path}: left out {what}\n"


@pytest.mark.parametrize("place", ["notes", "notes/*"])
def test_what_is_no_text_or_damaged_is_left_out_unless_it_is_named(
    tmp_path, monkeypatch, capsys, place
):
    monkeypatch.chdir(tmp_path)
    bad = {
        "latin one.txt": b"caf\xe9",
        "wide.txt": "wide open".encode("utf-16-le"),
        "damaged.pdf": b"%PDF-1.4 and no more",
        "blank.txt": b" \n",
    }
    for name, data in bad.items():
        file(tmp_path, data, f"notes/{name}")
        with pytest.raises(AHNError):
            read_documents([f"notes/{name}"], has_prompt=False)
    with pytest.raises(AHNError, match="is empty"):  # nothing is left, and the first is named
        read_documents([place], has_prompt=False)
    file(tmp_path, "good\n", "notes/z.txt")
    file(tmp_path, b"\x89PNG\r\n\x1a\n\0", "notes/pic.png")
    capsys.readouterr()
    assert read_documents([place], has_prompt=False) == "good\n"
    said = capsys.readouterr().err
    assert said.count("note: ") == said.count("\n") == len(bad) + 1
    assert "pic.png, a picture (PNG)" in said
    command = "iconv -f WINDOWS-1252 -t utf-8 'notes/latin one.txt' > 'notes/latin one.utf8.txt'"
    assert "latin one.txt: not UTF-8 text (byte 3);" in said and command in said
    subprocess.run(command, shell=True, check=True)
    assert Path("notes/latin one.utf8.txt").read_text(encoding="utf-8") == "caf\u00e9"
    assert list(texts((place,))) == ["caf\u00e9", "good\n"]  # training reads alike


def test_a_bad_line_of_json_is_not_left_out(tmp_path):
    file(tmp_path, '{"text": "a"}\n{"text": 5}\n', "corpus/a.jsonl")
    with pytest.raises(AHNError, match="line 2"):
        list(texts((str(tmp_path / "corpus"),)))


def test_nothing_found_and_a_file_twice_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "x", "d/a.txt")
    Path("link.txt").symlink_to("d/a.txt")
    Path("bare").mkdir()
    for files, what in (
        (["d/a.txt", "d/a.txt"], r"^d/a\.txt: is given twice; leave one out"),
        (["d/a.txt", "link.txt"], r"^link\.txt: is given twice, also as d/a\.txt"),
        (["d", "d/*.txt"], r"^d/a\.txt: is given twice"),
        (["-", "-"], "^standard input: is given twice"),
        (["bare"], "^bare: is a folder without a text or document"),
        (["*.pdf"], r"^\*\.pdf: no file has such a name"),
        (["absent.txt"], r"^absent\.txt: No such file"),
        (["a\0b"], "null byte"),
    ):
        with pytest.raises(AHNError, match=what):
            read_documents(files, has_prompt=False)
    file(tmp_path, "y", "[odd] *.txt")
    assert read_documents(["[odd] *.txt"], has_prompt=False) == "y"
    assert read_documents([f"file://{tmp_path}/d/a.txt"], has_prompt=False) == "x"


@pytest.mark.parametrize("kind", ["pdf", "epub", "docx"])
def test_a_document_comes_through_a_named_pipe(tmp_path, kind):
    pictures = {"x": os.urandom(20_000)}  # more than one look at its beginning
    document = {
        "pdf": papers.pdf("Through a pipe."),
        "epub": papers.epub({"a.xhtml": papers.chapter("<p>Through a pipe.</p>")}, **pictures),
        "docx": papers.docx(papers.paragraph("Through a pipe.")),
    }[kind]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[document])
    writer.start()
    assert read_file(pipe) == "Through a pipe.\n"
    writer.join()


def test_what_comes_through_a_pipe_is_refused_by_its_beginning(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    endless = pipe.open("r+b", buffering=0)  # nobody closes it while it is read
    endless.write(b"\x89PNG\r\n\x1a\n".ljust(HEAD, b"x"))
    with endless, pytest.raises(AHNError, match=f"^{pipe}: is a picture"):
        read_file(pipe)


def test_training_reads_documents_too(tmp_path):
    assert list(read_texts(file(tmp_path, papers.pdf("To learn from."), "a.pdf"))) == [
        "To learn from.\n"
    ]
