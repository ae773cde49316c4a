"""Texts as people have them: files, folders, standard input, lines of JSON, and what is typed.

Whatever is read as text comes in here, so that documents of any kind, byte order marks, line
ends and files that are no text mean the same to every command. Line ends become line feeds.
"""

import glob
import io
import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from ..errors import AHNError, near_file, note, show
from .documents import parts
from .encoding import decode, newlines
from .kinds import HEAD, kind_of

# Called with the pages or chapters read so far of a document, and how many it has; what it
# raises stops the reading.
Progress = Callable[[int, int], object]
# The last is also used of other JSON, which is named rather than trained on as a text.
JSON_LINES = (".jsonl", ".ndjson", ".json")
STDIN = Path("-")
T = TypeVar("T")


class Unreadable(AHNError):
    """Of one file, among others of a folder, that is no text or document, or a damaged one."""


def read_documents(files: Sequence[str], has_prompt: bool, progress: Progress | None = None) -> str:
    """The text of documents in the order given; of several, each below a line with its name.

    files: each a file, a folder (with the folders in it), a pattern, or "-" for standard input;
    what cannot be read in a folder or pattern is left out, and named on stderr. None of them is
    what is piped in, if anything; without that, has_prompt says whether no text will do. Raises
    AHNError, naming the file, if one cannot be read, is empty, is nothing that can be read, or
    is given twice.
    """
    if not files:
        if sys.stdin is None or sys.stdin.isatty():
            if not has_prompt:
                raise AHNError("nothing to read; give a document, a question, or pipe in a text")
            return ""
        files = ("-",)
    found = dict(read_each(files, lambda file: _read_any(file, progress)))
    if len(found) == 1:
        return found.popitem()[1]
    base = os.path.commonpath([os.path.abspath(file.parent) for file in found if file != STDIN])
    texts = []
    for file, text in found.items():
        name = "standard input" if file == STDIN else os.path.relpath(file, base)
        texts.append(f"=== {one_line(name)} ===\n\n{text.strip()}\n")
    return "\n".join(texts)


def read_each(files: Sequence[str], read: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """What `read` makes of each file that these names stand for. Those of a folder or pattern
    that are Unreadable are left out and named on stderr, with the reason.

    Raises AHNError as find and `read` do, and if nothing is left.
    """
    count = 0
    left_out: list[Unreadable] = []
    for file, place in _found(files).items():
        try:
            made = read(file)
        except Unreadable as e:
            if not place:
                raise
            left_out.append(e)
            continue
        count += 1
        yield file, made
    if left_out and not count:
        raise left_out[0]
    for error in left_out:
        note(f"left out {error}")


def find(files: Sequence[str]) -> list[Path]:
    """The files that these names, folders and patterns stand for, in their order; those of a
    folder or pattern sorted as people number them. "-" stays as it is.

    What nothing here reads in a folder or pattern is left out, and named on stderr. Raises
    AHNError, naming it, if one stands for nothing or a file is there twice.
    """
    return list(_found(files))


def _found(files: Sequence[str]) -> dict[Path, str]:
    """As find has them, each with the folder or pattern that it is of, or ""."""
    found: dict[tuple[int, int] | str, tuple[Path, str]] = {}
    for name in files:
        place, several = _stands_for(name)
        these: dict[tuple[int, int] | str, tuple[Path, str]] = {}
        for file in several:
            these.setdefault(_identity(file), (file, place))
        for key, (file, _) in these.items():
            if key in found:
                twice, before = "standard input" if file == STDIN else str(file), found[key][0]
                also = "" if str(before) == str(file) else f", also as {before}"
                raise AHNError(f"{twice}: is given twice{also}; leave one out")
        found |= these
    return dict(found.values())


def _identity(file: Path) -> tuple[int, int] | str:
    try:
        about = file.stat()
    except (OSError, ValueError):  # said when it is read
        return str(file)
    return about.st_dev, about.st_ino


def _stands_for(name: str) -> tuple[str, list[Path]]:
    """The folder or pattern that it is, if any, and its files."""
    if name == "-":
        return "", [STDIN]
    path = Path(typed_path(name))
    if "\0" in name:  # said when it is read
        return "", [path]
    # os.path says no where the system says nothing, as of a link into what is closed.
    if os.path.isdir(path):
        what = "is a folder without a text or document"
        return str(path), _readable_of(str(path), path, _in_folder(path), what)
    if os.path.lexists(path) or not glob.has_magic(name):
        return "", [path]
    matches = [Path(match) for match in glob.glob(os.path.expanduser(name), recursive=True)]
    if files := [match for match in matches if os.path.isfile(match)]:
        what = "only files that nothing here reads have such a name"
        return name, _readable_of(name, Path(), files, what)
    raise AHNError(f"{name}: no file has such a name")


def _in_folder(folder: Path) -> Iterator[Path]:
    """Its files, and those of the folders in it, but for hidden ones."""
    for place, folders, names in os.walk(folder):  # does not follow links, which may be circles
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(place, name)
            if not name.startswith(".") and os.path.isfile(file):
                yield file


def _readable_of(name: str, base: Path, files: Iterable[Path], nothing: str) -> list[Path]:
    """Those that can be read by the looks of them, in their order. The others are named on
    stderr, from `base` on. Raises AHNError, which says `nothing`, if there are none."""
    judged = [(file, _why_not(file)) for file in sorted(files, key=_natural)]
    left_out = [f"{os.path.relpath(file, base)}, {why}" for file, why in judged if why]
    more = f"; and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
    said = "; ".join(left_out[:5]) + more
    if len(left_out) == len(judged):
        raise AHNError(f"{name}: {nothing}" + (f" ({said})" if said else ""))
    if left_out:
        note(f"{name}: left out {said}")
    return [file for file, why in judged if not why]


def _why_not(file: Path) -> str:
    """What a file is that cannot be read, or ""."""
    try:
        with file.open("rb") as stream:
            if not stream.read(1):
                return "empty"
            stream.seek(0)
            kind = kind_of(stream, file.suffix.lower())
    except OSError as e:
        return e.strerror or str(e)
    return "" if kind.reader else kind.what


def _natural(path: Path | str) -> list[tuple[int, int, str]]:
    """Chapter 2 before chapter 10, and a folder's files before and after it by its name."""
    pieces = re.split(r"(\d+|/)", str(path).casefold())
    order = [(1, int(p), p) if p.isdecimal() else (2 if p != "/" else 0, 0, p) for p in pieces]
    return [*order, (2, 0, str(path))]


def _read_any(file: Path, progress: Progress | None) -> str:
    if file != STDIN:
        return read_file(file, progress)
    if sys.stdin is None:  # a program that was started without
        raise AHNError("standard input: is closed; pipe in a text, or give a document")
    try:
        stream = _all_of(sys.stdin.buffer, "standard input")
    except OSError as e:
        raise AHNError(f"standard input: {e.strerror}") from None
    return _text(stream, "standard input", "", progress)


def read_file(file: str | Path, progress: Progress | None = None) -> str:
    """The text of a file, whatever kind of document it is. Raises AHNError as read_documents
    does, Unreadable if that is for what is in it."""
    with _opened(file) as stream:
        try:
            text = _text(stream, str(file), Path(file).suffix.lower(), progress)
        except AHNError as e:
            raise Unreadable(str(e)) from None
    if not text.strip():
        raise Unreadable(f"{file}: is empty; give a text to read")
    return text


def _text(stream: BinaryIO, name: str, suffix: str, progress: Progress | None) -> str:
    """name: for messages. suffix: of its name, as .html."""
    kind = kind_of(stream, suffix)
    if kind.reader is None:
        raise AHNError(f"{name}: is {kind.what}; {kind.mend}")
    if kind.reader == "text":
        return newlines(decode(stream.read(), name))
    texts = []
    for part in parts(kind, stream, name):
        texts.append(newlines(part.text))
        if progress is not None:
            progress(len(texts), part.total)
    text = "".join(texts).rstrip()
    if not text:
        raise AHNError(f"{name}: is {kind.what} without text")
    return readable(text) + "\n"


def _all_of(pipe: BinaryIO, name: str) -> BinaryIO:
    """What comes through a pipe, to read from any place. What nobody can read is refused by its
    beginning: it may have no end."""
    head = pipe.read(HEAD)
    if not head.startswith((b"PK", b"\xd0\xcf")):  # of which what follows tells what they are
        kind = kind_of(io.BytesIO(head), "")
        if kind.reader is None:
            raise AHNError(f"{name}: is {kind.what}; {kind.mend}")
    return io.BytesIO(head + pipe.read())


@contextmanager
def _opened(file: str | Path) -> Iterator[BinaryIO]:
    """A file, or what came through a pipe, to read from any place. Raises AHNError."""
    try:
        with Path(file).open("rb") as stream:
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                raise AHNError(f"{file}: is a device; give a text or a document")
            yield stream if stream.seekable() else _all_of(stream, str(file))
    except FileNotFoundError as e:
        raise AHNError(f"{file}: {e.strerror}{near_file(file)}") from None
    except OSError as e:
        raise AHNError(f"{file}: {e.strerror}") from None
    except ValueError as e:  # a name with a NUL in it
        if isinstance(e, AHNError):
            raise
        raise AHNError(f"{show(str(file))}: {e}") from None


def read_texts(file: Path) -> Iterator[str]:
    """The text of a document, or those of a file of JSON: an object with "text" in each line.

    Raises AHNError, naming the file and the line.
    """
    if file.suffix.lower() not in JSON_LINES:
        yield read_file(file)
        return
    # At line feeds only: other line ends may stand within a string.
    with _opened(file) as stream:
        lines = decode(stream.read(), str(file)).split("\n")
    if not any(line.strip() for line in lines):
        raise AHNError(f"{file}: is empty; give a text to read")
    for n, line in enumerate(lines, 1):
        line = line.removeprefix("\ufeff").strip()
        if line:
            yield newlines(_text_of(line, f"{file}: line {n}"))


def _text_of(line: str, name: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
        raise AHNError(f"{name} is not JSON ({show(reason)})") from None
    if not isinstance(value, dict):
        raise AHNError(f'{name} is {_kind(value)}, not an object with "text"')
    if "text" not in value:
        raise AHNError(f'{name} has no "text"')
    text = value["text"]
    if not isinstance(text, str):
        raise AHNError(f'{name}: "text" is {_kind(text)}, not a string')
    return text


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def readable(text: str) -> str:
    """The text without lone surrogates, which no tokenizer takes. They stand for bytes that
    were typed where Python expected another encoding, or are left of a character that JSON
    cut in two; what cannot be read becomes U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # not from bytes
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_SURROGATE = re.compile("[\ud800-\udfff]")


def typed_line(line: str) -> str:
    """A line that was typed or piped in, without a byte order mark and what surrounds it."""
    return line.strip().removeprefix("\ufeff").strip()


def typed_path(typed: str) -> str:
    """A path as a shell would take it: quoted, with escaped spaces, or from the home
    directory; or the URL of a file. One that is there as it was typed is taken so."""
    words = _words(typed)
    plain = re.sub(r"\\(.)", r"\1", typed)
    ways = [_path(way) for way in (typed, *(words if len(words) == 1 else ()), plain)]
    return next((way for way in ways if os.path.exists(way)), ways[1])


def typed_paths(typed: str) -> list[str]:
    """As typed_path, of several with spaces between them, of which one at least is there."""
    words = [_path(word) for word in _words(typed)]
    whole = typed_path(typed)
    several = len(words) > 1 and not os.path.exists(whole) and any(map(os.path.exists, words))
    return words if several else [whole]


def _words(typed: str) -> list[str]:
    """As a shell would split them; none if it could not."""
    try:
        return shlex.split(typed)
    except ValueError:  # an apostrophe
        return []


def _path(word: str) -> str:
    host, _, path = word[7:].partition("/")
    if word.lower().startswith("file://") and host in ("", "localhost"):
        word = "/" + unquote(path)
    return word if "\0" in word or os.path.exists(word) else os.path.expanduser(word)


def one_line(text: str) -> str:
    return " ".join(text.split())
