"""The one exception for mistakes a user can mend, and how its message quotes a file or names
what was probably meant."""

import difflib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class AHNError(ValueError):
    """Bad input. The message is one line: the file, the value, and the fix.

    The command line prints it and exits with code 2.

    >>> try:
    ...     ahn_mlx.AHNConfig(window=0)
    ... except ahn_mlx.AHNError as e:
    ...     print(e)
    window must be a whole number of at least 1, not 0
    """

    def __init__(self, message: str):
        super().__init__(plain(message))


def plain(text: str) -> str:
    """The text on one line, without what a terminal would obey: names of files are anyone's."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(map(_sign, line))


def _sign(c: str) -> str:
    return c if c.isprintable() else ascii(c)[1:-1]


def is_utf8(path: object) -> bool:
    """Whether a path is text. Linux lets a name be any bytes; MLX opens none that is not."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


def note(line: str) -> None:
    """Say what a user may want to know, on stderr."""
    print(f"note: {plain(line)}", file=sys.stderr)


def show(text: Any) -> str:
    """A name from a file, fit for a one-line message: quoted, escaped, not endless."""
    quoted = ascii(_begin_of(text))
    return quoted if len(quoted) <= 120 else quoted[:117] + "..."


def _begin_of(value: Any, depth: int = 3) -> Any:
    """As much of a value from JSON as a message can show; all of it may have a gigabyte."""
    if isinstance(value, str):
        return value[:200]
    if type(value) is list:
        return [_begin_of(x, depth - 1) for x in value[:60]] if depth else ["..."]
    if type(value) is dict:
        pairs = list(itertools.islice(value.items(), 60)) if depth else [("...", "...")]
        return {_begin_of(k): _begin_of(x, depth - 1) for k, x in pairs}
    return value


def nearest(typed: str, names: Iterable[str]) -> str:
    """The name that was probably meant, or "". Case and _ for - make no difference."""
    plain = {name.lower().replace("_", "-"): name for name in names}
    close = difflib.get_close_matches(typed.lower().replace("_", "-"), plain, 1, 0.7)
    return plain[close[0]] if close else ""


def near_file(typed: Any, ending: str = "") -> str:
    """ "; did you mean ...?" of the file beside one that is not there which was probably meant,
    or "". ending: what its name must end in."""
    folder, name = os.path.split(os.fspath(typed))
    try:
        names = [n for n in sorted(os.listdir(folder or ".")) if n.endswith(ending) and n[0] != "."]
    except (OSError, ValueError):
        return ""
    # Without its ending, with another, or with a slip of the fingers.
    stem, meant = os.path.splitext(name)[0].lower(), ""
    for part in filter(None, (name.lower(), stem)):
        meant = meant or next((n for n in names if n.lower().startswith(part + ".")), "")
        meant = meant or next((n for n in names if n.lower() == part), "")
    if not meant:
        stems = {os.path.splitext(n)[0]: n for n in reversed(names)}
        meant = nearest(name, names) or stems.get(nearest(stem, stems), "") if stem else ""
    return f"; did you mean {os.path.join(folder, meant)}?" if meant else ""


@contextmanager
def foreign(say: Callable[[str], str]) -> Iterator[None]:
    """Around a call of a library that raises whatever it likes: what it raises becomes an
    AHNError that says say(reason). An AHNError stays, and so do Ctrl-C and too little memory."""
    try:
        yield
    except (AHNError, MemoryError):
        raise
    except BaseException as e:
        # A panic of Rust code is not even an Exception.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise AHNError(say(show(str(e) or type(e).__name__))) from None
