"""Documents, folders and characters at their bounds: sizes, orders, pipes, cuts."""

import io
import os
import zipfile

import papers
import pytest
from test_documents import file

from ahn_mlx import AHNError
from ahn_mlx.reading import documents, encoding
from ahn_mlx.reading.text import find, read_file


def archive_of(compression: int, **parts: bytes) -> documents._Archive:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return documents._Archive(stream, "a.epub")


def test_parts_are_as_large_as_chapters_can_be():
    """30 MB, 200 MB together; a million bytes that shrink to nothing are still no bomb."""
    stored = archive_of(zipfile.ZIP_STORED, a=bytes(30 * 10**6), b=bytes(30 * 10**6 + 1))
    assert len(stored.read("a")) == 30 * 10**6
    with pytest.raises(AHNError, match="more than 30 MB of text; split it"):
        stored.read("b")
    stored = archive_of(zipfile.ZIP_STORED, a=bytes(30 * 10**6), b=bytes(20 * 10**6), c=b"x")
    for name in "aaaaaab":
        stored.read(name)
    with pytest.raises(AHNError, match="more than 200 MB of text"):
        stored.read("c")
    packed = archive_of(zipfile.ZIP_DEFLATED, a=bytes(10**6), b=bytes(10**6 + 1))
    assert len(packed.read("a")) == 10**6
    with pytest.raises(AHNError, match="a zip bomb, 'b' unpacks without end"):
        packed.read("b")


def test_a_part_is_no_larger_than_its_archive_whatever_its_directory_says():
    """Here it says 10 MB of 15 million bytes, in an archive of 150,000 and of one byte less."""
    for size in (150_000, 149_999):
        archive = archive_of(zipfile.ZIP_STORED, a=bytes(size - 100))
        assert archive.size == size
        info = archive.archive.getinfo("a")
        info.compress_size, info.file_size = 10**7, 15 * 10**6
        why = "is a zip bomb" if size < 150_000 else "is damaged"
        with pytest.raises(AHNError, match=f"a.epub: {why}"):
            archive.read("a")


def test_each_part_that_was_read_is_told(tmp_path):
    told = []
    pages = {f"{n}.xhtml": papers.chapter(f"<p>{n}") for n in range(3)}
    read_file(file(tmp_path, papers.epub(pages), "a.epub"), lambda *of: told.append(of))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("data", [b"Plain.\n", papers.docx(papers.paragraph("Plain."))])
def test_a_pipe_is_read_to_its_end_and_from_any_place(data):
    read, write = os.pipe()
    try:
        os.write(write, data)
        os.close(write)
        assert read_file(f"/dev/fd/{read}") == "Plain.\n"
    finally:
        os.close(read)


def test_of_many_files_that_nothing_reads_five_are_named(tmp_path, capsys):
    for n in range(1, 8):
        file(tmp_path, b"GIF89a\0", f"{n}.gif")
    with pytest.raises(AHNError, match=r"without a text or document \(1.gif.*5.gif, a picture"):
        find([str(tmp_path)])
    file(tmp_path, "A.", "a.txt")
    assert [f.name for f in find([str(tmp_path)])] == ["a.txt"]
    assert capsys.readouterr().err.endswith("; 5.gif, a picture (GIF); and 2 more\n")
    (tmp_path / "7.gif").unlink()
    (tmp_path / "6.gif").unlink()
    find([str(tmp_path)])
    assert capsys.readouterr().err.endswith("; 5.gif, a picture (GIF)\n")


def test_names_are_sorted_as_people_number_them(tmp_path):
    names = ["1a.txt", "2.txt", "2/a.txt", "2a.txt", "10.txt", "a/1.txt", "a.txt", "a 1.txt"]
    for name in names:
        file(tmp_path, name, name)
    found = [os.path.relpath(f, tmp_path) for f in find([str(tmp_path)])]
    assert found == [
        *("1a.txt", "2/a.txt", "2.txt", "2a.txt", "10.txt", "a/1.txt", "a 1.txt", "a.txt"),
    ]


@pytest.mark.parametrize(
    ("data", "wide"),
    [
        *((b"a\0b\0c\0d\0", "UTF-16LE"), (b"\0a\0b\0c\0d", "UTF-16BE"), (b"a\0b\0c\0d", "")),
        (10 * b"a\0" + b"ab" * 4, "UTF-16LE"),
        *((7 * b"a\0" + b"ab" * 3, ""), (b"\0\0" + 9 * b"a\0", ""), (b"abcdefgh", "")),
        (b"\0\0" + 10 * b"a\0", "UTF-16LE"),
    ],
)
def test_utf_16_without_a_mark_is_told_by_its_zeros(data, wide):
    assert encoding.unmarked(data) == wide


def test_a_text_is_wide_by_its_begin():
    for rest in (b"", b"abcd" * 9000):
        with pytest.raises(AHNError, match="is UTF-16LE without a byte order mark"):
            encoding.decode(b"a\0" * 2048 + rest, "x")
    with pytest.raises(AHNError, match="binary file"):
        encoding.decode(b"abcd" * 1024 + b"a\0" * 99_000, "x")


def test_what_a_page_says_is_looked_for_at_its_beginning():
    meta, said = b'<meta charset="koi8-r', '">\u0434'
    found = encoding.decode_page(b" " * (4096 - len(meta)) + meta + said.encode("koi8-r"), "x")
    assert found.endswith(said)
    with pytest.raises(AHNError, match="it is in 'koi8-', which is no known encoding"):
        encoding.decode_page(b" " * (4097 - len(meta)) + meta + said.encode("koi8-r"), "x")


def test_a_text_may_begin_within_any_character():
    for sign in ("\xc0", "\xc1", "\u20ac", "\u2041", "\U0001f601", "\U0001f642"):
        whole = (sign + "\xe9.").encode()
        for n in range(1, len(sign.encode())):
            cut = f"begins within a character of UTF-8; cut off {len(sign.encode()) - n} bytes"
            with pytest.raises(AHNError, match=cut):
                encoding.decode(whole[n:], "x")


def test_a_text_cut_within_a_character_is_told_from_another_encoding():
    whole = "a\u20ac\u00e4b".encode()
    for n, said in ((2, "begins within a character of UTF-8; cut off 2 bytes"), (3, "1 bytes")):
        with pytest.raises(AHNError, match=said):
            encoding.decode(whole[n:], "x")
    for end, cut in ((3, True), (2, True), (5, True)):
        with pytest.raises(AHNError, match="cut off within a character" if cut else "byte"):
            encoding.decode(b"\xc3\xa4" + whole[:end], "x")
    with pytest.raises(
        AHNError, match=r"not UTF-8 text \(byte 1\); convert it .* iconv -f WINDOWS"
    ):
        encoding.decode(b"a\xe4", "x")
    with pytest.raises(AHNError, match=r"not UTF-8 text \(byte 0\)"):
        encoding.decode(b"\xa4abc", "x")


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "/dev/tty"])
def test_a_device_is_not_read(name):
    with pytest.raises(AHNError, match=rf"^{name}: is a device|^/dev/tty: "):
        read_file(name)
