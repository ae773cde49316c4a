"""New inputs from old ones where bytes alone seldom make sense: values of JSON."""

import copy
import json
import random
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


def of_json(words: tuple[str, ...]) -> Mutator:
    """Changes a few values of JSON, or else a few bytes. words: names that may matter."""

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        import atheris

        pick = random.Random(seed)
        if pick.random() > 0.2:
            try:
                value = json.loads(data)
            except (ValueError, RecursionError):
                value = None
            if value is not None:
                for _ in range(pick.choice((1, 1, 1, 2, 3, 6))):
                    value = _changed(value, pick, words)
                try:
                    text = json.dumps(value, ensure_ascii=pick.random() < 0.7)
                    made = text.encode("utf-8", "surrogatepass")
                except (ValueError, RecursionError):  # more digits than Python writes
                    made = b""
                if made and len(made) <= longest:
                    return made
        return bytes(atheris.Mutate(data, longest))

    return mutate


def _changed(value: Any, pick: random.Random, words: tuple[str, ...]) -> Any:
    """The value, with one place in it changed."""
    places = list(_places(value))
    if not places or pick.random() < 0.01:
        return _new(value, value, pick, words)
    holder, key = pick.choice(places)
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
    import atheris

    what = pick.random()
    if words and what < 0.3:
        at, word = pick.randrange(len(old) + 1), pick.choice(words)
        return old[:at] + word + old[at + pick.choice((0, 0, len(word))) :]
    if what < 0.4:
        return pick.choice([x for x in SPECIAL if isinstance(x, str)])
    changed = bytes(atheris.Mutate(old.encode("utf-8", "surrogatepass"), len(old) + 60))
    return changed.decode("utf-8", "replace")
