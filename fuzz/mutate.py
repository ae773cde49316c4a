"""New inputs from old ones where bytes alone seldom make sense: values of JSON, lines of it, and
parts of archives."""

import copy
import io
import json
import math
import random
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

Mutator = Callable[[bytes, int, int], bytes]

# What numbers, names and lists are seldom prepared for.
SPECIAL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 31, 64, 255, 256, 65535, 1 << 16, 1 << 24, 1 << 31),
    *((1 << 31) - 1, 1 << 32, 1 << 53, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 64),
    *(10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, -1e308, float("nan")),
    *(float("inf"), -float("inf"), "", "x", "0", "-1", "1e999", "nan", "\0", "\n", "\x1b[31m"),
    *("\u202e", "\ud800", "..", "../x", "/etc/passwd", "a" * 300, "\U0001f600", "%s{0}", [], {}),
    *([[]], [None], [0], [[0]], {"a": {}}, [1, 2, 3], [-1], [10**30], ["x", 1], {"": None}),
)


def product(shape: Any) -> int:
    """Of a list of whole numbers; a text times a number may be larger than any memory. Raises
    TypeError."""
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise TypeError(f"{shape!r:.20} is no shape")
    return math.prod(shape)


def of_json(words: tuple[str, ...], mend: Callable[[Any], Any] | None = None) -> Mutator:
    """Changes a value of JSON or two, mostly to what might stand there as well, or else a few
    bytes. words: names that may matter. mend: makes what follows from others right again."""

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        pick = random.Random(seed)
        if pick.random() > 0.1:
            try:
                value = json.loads(data)
            except (ValueError, RecursionError):
                value = None
            if value is not None:
                change = _nearby if pick.random() < 0.7 else _changed
                for _ in range(pick.choice((1, 1, 1, 1, 2, 3))):
                    value = change(value, pick, words)
                try:
                    if mend is not None and pick.random() < 0.8:
                        value = mend(value)
                    text = json.dumps(value, ensure_ascii=pick.random() < 0.7)
                    made = text.encode("utf-8", "surrogatepass")
                except (ValueError, RecursionError):  # more digits than Python writes
                    made = b""
                if made and len(made) <= longest:
                    return made
        return _bytes(data, longest)

    return mutate


def of_lines(words: tuple[str, ...]) -> Mutator:
    """Changes a line that is JSON, or drops or repeats one, or else a few bytes."""
    change = of_json(words)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        pick = random.Random(seed)
        lines = data.split(b"\n")
        if pick.random() > 0.8 or len(lines) > 1000:
            return _bytes(data, longest)
        n, what = pick.randrange(len(lines)), pick.random()
        if what < 0.8:
            lines[n] = change(lines[n], max(1, longest - len(data)), seed)
        elif what < 0.9:
            lines.insert(n, lines[n])
        else:
            del lines[n]
        made = b"\n".join(lines)
        return made if made and len(made) <= longest else _bytes(data, longest)

    return mutate


def of_zip(words: tuple[str, ...]) -> Mutator:
    """Changes a part of an archive, its name or how it is packed, and packs it again; or else a
    few bytes, whose check sums are then wrong."""

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        pick = random.Random(seed)
        try:
            if pick.random() < 0.3:
                raise ValueError
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                parts = [(i.filename, archive.read(i), i.compress_type) for i in archive.infolist()]
            n, what = pick.randrange(len(parts)), pick.random()
            name, part, method = parts[n]
            if what < 0.6:
                part = _bytes(part, len(part) + 200)
            elif what < 0.75:
                name = _text(name, pick, words) or "x"
            elif what < 0.9:
                method = pick.choice((0, 8, 12, 14))
            parts[n : n + 1] = [(name, part, method)] * pick.choice((1, 1, 1, 1, 2, 0))
            packed = io.BytesIO()
            with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(packed, "w") as archive:
                for name, part, method in parts:
                    archive.writestr(name, part, method)
            made = packed.getvalue()
        except Exception:  # no archive any more, or no name
            made = b""
        return made if made and len(made) <= longest else _bytes(data, longest)

    return mutate


def _bytes(data: bytes, longest: int) -> bytes:
    import atheris

    return bytes(atheris.Mutate(data, longest))


def _place(value: Any, pick: random.Random) -> tuple[Any, Any] | None:
    """An object or list and a key of it; one of a thousand items is no likelier than one of two."""
    holders = {id(holder): holder for holder, _ in _places(value)}
    if not holders:
        return None
    holder = pick.choice(list(holders.values()))
    return holder, pick.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))


def _nearby(value: Any, pick: random.Random, words: tuple[str, ...]) -> Any:
    """The value, with something in it that is as likely."""
    if (place := _place(value, pick)) is None:
        return _near(value, pick, words)
    holder, key = place
    what = pick.random()
    if what < 0.12:
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict) and words:
        other = pick.choice(_places(value))
        holder[pick.choice(words)] = copy.deepcopy(other[0][other[1]])
    else:
        holder[key] = _near(holder[key], pick, words)
    return value


def _near(old: Any, pick: random.Random, words: tuple[str, ...]) -> Any:
    """Another value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return pick.choice(
            (old + 1, max(old - 1, 0), 2 * old, old // 2, 0, 1, 2, pick.getrandbits(8))
        )
    if isinstance(old, float):
        return pick.choice((2 * old, old / 2, 1.0, 0.0, 1 - old, pick.random()))
    if isinstance(old, str):
        return pick.choice(words) if words and pick.random() < 0.4 else _text(old, pick, words)
    if isinstance(old, list):
        return pick.choice((old[1:], old[:-1], old[::-1], old + old[-1:], old[:1]))
    if isinstance(old, dict):
        return dict(list(old.items())[pick.randrange(len(old) + 1) :])
    return pick.choice((0, 1, "", True, False, [], {}, 0.5))


def _changed(value: Any, pick: random.Random, words: tuple[str, ...]) -> Any:
    """The value, with one place in it changed."""
    if (place := _place(value, pick)) is None or pick.random() < 0.01:
        return _new(value, value, pick, words)
    holder, key = place
    what = pick.random()
    if what < 0.1:
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict):
        name = pick.choice(words) if words and pick.random() < 0.8 else _text("", pick, words)
        holder[name] = _new(holder[key], value, pick, words)
    elif what < 0.3 and isinstance(holder, dict):
        holder[_text(key, pick, words)] = holder.pop(key)
    elif what < 0.35 and isinstance(holder, list):
        holder.insert(key, _new(holder[key], value, pick, words))
    else:
        holder[key] = _new(holder[key], value, pick, words)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found, left = [], [value]
    while left and len(found) < 5000:
        holder = left.pop()
        if not isinstance(holder, dict | list):
            continue
        for key, inner in holder.items() if isinstance(holder, dict) else enumerate(holder):
            found.append((holder, key))
            if isinstance(inner, dict | list):
                left.append(inner)
    return found


def _new(old: Any, whole: Any, pick: random.Random, words: tuple[str, ...]) -> Any:
    """Another value for an old one."""
    what = pick.random()
    if what < 0.35:
        return copy.deepcopy(pick.choice(SPECIAL))
    if isinstance(old, str) and what < 0.8:
        return _text(old, pick, words)
    if type(old) in (int, float) and what < 0.8:
        change = pick.choice((lambda x: x + 1, lambda x: x - 1, lambda x: -x, lambda x: x * 2))
        return pick.choice((change(old), pick.randrange(1 << pick.choice((1, 4, 8, 20, 40)))))
    if isinstance(old, list) and old and what < 0.7:
        return pick.choice((old * 2, old[1:], old[:-1], old[::-1], old[0], [*old, old[-1]]))
    if what < 0.85 and (places := _places(whole)):
        holder, key = pick.choice(places)
        return copy.deepcopy(holder[key])
    if what < 0.92 and words:
        return pick.choice(words)
    return pick.choice(([old], {"a": old}, json.dumps(old)[:1000]))


def _text(old: str, pick: random.Random, words: tuple[str, ...]) -> str:
    """Another text for an old one, by the dictionary or a few bytes."""
    what = pick.random()
    if words and what < 0.3:
        at, word = pick.randrange(len(old) + 1), pick.choice(words)
        return old[:at] + word + old[at + pick.choice((0, 0, len(word))) :]
    if what < 0.4:
        return pick.choice([x for x in SPECIAL if isinstance(x, str)])
    changed = _bytes(old.encode("utf-8", "surrogatepass"), len(old) + 60)
    return changed.decode("utf-8", "replace")
