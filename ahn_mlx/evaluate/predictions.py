"""A directory of predictions: one line an item, written when it is there, so that whatever ends
a run loses nothing but the item it was at. run.json says what the run is."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.directory import check_depth
from ..errors import AHNError, show
from ..outputs.directories import check_kind, nearest
from ..outputs.files import check_named, check_writable, replacing
from ..outputs.parts import parts_of, working_on
from .records import UTF_16, parse_line

RUN, RESULT = "run.json", "result.json"
Line = dict[str, Any]


class Predictions:
    """The directory of one run: one model, one mixer, one protocol.

    identity: what makes runs comparable; another in the same directory is refused. Raises
    AHNError if the directory holds another run, or something else, or cannot be written.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]):
        check_named(directory)
        check_kind(directory)
        self.directory, self.identity = directory, dict(identity)
        known = read_run(directory)
        # What a run leaves that was killed before it began.
        begun = {directory / ".lock", *parts_of(directory / RUN)}
        if known is None and directory.is_dir() and set(directory.iterdir()) - begun:
            raise AHNError(f"{directory}: holds something else than a run; choose another --out")
        if known is not None:
            for name, value in self.identity.items():
                if known.get(name) != value:
                    raise AHNError(
                        f"{directory}: holds predictions with {name} {show(known.get(name))}, not"
                        f" {show(value)}; choose another --out"
                    )
        self.data: dict[str, str] = dict((known or {}).get("data", {}))
        self.deviations: list[str] = list((known or {}).get("deviations", []))
        check_writable(nearest(directory))

    def use_data(self, name: str, sha256: str) -> None:
        """Note which data file is read. Raises AHNError if the run began with another."""
        if self.data.setdefault(name, sha256) != sha256:
            raise AHNError(
                f"{self.directory}: began with another revision of {name}; give that one, or"
                " choose another --out"
            )

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be the only process that writes here. Raises AHNError if one does already."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with working_on(self.directory):
            self.write_json(
                RUN, {**self.identity, "data": self.data, "deviations": self.deviations}
            )
            yield

    def done(self, name: str) -> dict[int, Line]:
        """Lines of a task that are there, by the number of the item; one that was cut is not."""
        file = self.directory / name
        if not file.is_file():
            return {}
        lines = {}
        for number, line in read_lines(file):
            item = line.get("item")
            if type(item) is not int:
                raise AHNError(f"{file}: line {number} says no item; choose another --out")
            lines[item] = line
        return lines

    @contextmanager
    def appending(self, name: str) -> Iterator["Appender"]:
        file = self.directory / name
        try:
            with file.open("ab") as f:
                # What a killed run was at.
                f.truncate(_whole(file))
                kept = file.read_bytes()
                f.write(b"\n" if kept and not kept.endswith(b"\n") else b"")
                yield Appender(f)
        except OSError as e:
            raise AHNError(
                f"{file}: cannot be written ({e.strerror or e}); what was done is kept, mend it"
                " and run it again"
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        with replacing(self.directory / name) as part:
            part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


class Appender:
    def __init__(self, file: Any):
        self._file = file

    def __call__(self, line: Line) -> None:
        """Write it to the disk before the next begins."""
        self._file.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_run(directory: Path) -> dict[str, Any] | None:
    """What run.json says, if it is there. Raises AHNError if it is damaged."""
    file = directory / RUN
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
        check_depth(found)
        json.dumps(found, ensure_ascii=False).encode()  # as it is written again, and shown
    except (OSError, ValueError, RecursionError) as e:
        raise AHNError(f"{file}: cannot be read ({show(str(e))}); choose another --out") from None
    if not isinstance(found, dict) or not all(fits(found.get(k)) for k, fits in _FACTS.items()):
        raise AHNError(f"{file}: is no run of ahn-mlx eval; choose another --out")
    return found


def _are_facts(value: Any) -> bool:
    """Of the model: which of the paper's it is like."""
    known = isinstance(value, dict) and isinstance(value.get("memory"), str)
    return known and value.get("size") in (None, "3b", "7b", "14b")


_FACTS: dict[str, Callable[[Any], bool]] = {
    "data": lambda value: isinstance(value, dict),
    "deviations": lambda value: isinstance(value, list),
    "facts": _are_facts,
    "mixer": ("memory", "window", "full").__contains__,
    "protocol": ("ahn", "published").__contains__,
}


def read_lines(file: Path) -> Iterator[tuple[int, Line]]:
    """Lines of predictions with their numbers, from 1; the last is left out if it was cut.
    Raises AHNError for one that is no object, or no UTF-8."""
    try:
        data = file.read_bytes()[: _whole(file)]
    except OSError as e:
        raise AHNError(f"{file}: {e.strerror or e}") from None
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            yield number, parse_line(raw, f"{file}: line {number}")


def is_whole(file: Path) -> bool:
    """Whether its last line was not cut."""
    return _whole(file) == len(file.read_bytes())


def _whole(file: Path) -> int:
    """Bytes up to the end of the last whole line. A last line without its end counts if it is
    whole, which other programs' are, or if it is of another encoding, which is no cut."""
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    if data.startswith(UTF_16) or b"\0" in data[:4]:
        return len(data)
    try:
        json.loads(data[end:].decode() or "null")
        return len(data)
    except UnicodeDecodeError as e:
        return end if e.reason == "unexpected end of data" else len(data)
    except (ValueError, RecursionError):
        return end
