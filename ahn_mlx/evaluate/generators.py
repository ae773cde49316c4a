"""Items made here: facts hidden in sentences of a text, and questions about them.

Everything is a function of task, seed, length, depth and index, by random numbers from SHA-256:
the same items on every machine and in every version. docs/evaluation.md has the rules.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as counting
from typing import TypeVar

from ..errors import AHNError

T = TypeVar("T")


def words(text: str) -> list[str]:
    return text.split()


NOISE = [
    *("The road is long.", "The day is warm.", "A bird sings in the hedge."),
    *("Nobody is in a hurry.", "We walk on."),
]
ADJECTIVES = words("""
    amber bitter broad calm copper crooked distant early faded gentle hollow iron
    jagged late lonely marble narrow olive patient quiet rusty silver tidy woven
""")
NOUNS = words("""
    anchor basket candle drum engine feather garden hammer island jacket kettle ladder
    mirror needle orchard pillow quarry ribbon saddle tunnel umbrella violin window yard
""")
PERSONS = words("Anna Boris Carla David Edith Frank Greta Henry")
PLACES = words("attic bakery cellar garden harbour kitchen library market stable tower")
THINGS = words("coin lantern map rope spoon")

# The numbers that each task takes, with what they are if none is said.
TASKS: dict[str, dict[str, int]] = {
    "passkey": {},
    "niah_single": {},
    "niah_multikey": {"keys": 4},
    "niah_multivalue": {"values": 4},
    "niah_multiquery": {"queries": 4},
    "vt": {"chains": 1, "hops": 4},
    "babi1": {"facts": 6},
    "babi2": {"facts": 8},
    "babi3": {"facts": 9},
}


class Draws:
    """Random numbers of a key."""

    def __init__(self, key: str):
        self._key, self._n = key, counting(1)
        self._seen: set[str] = set()

    def pick(self, m: int) -> int:
        """0 to m - 1."""
        digest = hashlib.sha256(f"{self._key}/{next(self._n)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % m

    def of(self, values: Sequence[T]) -> T:
        return values[self.pick(len(values))]

    def take(self, values: Sequence[T], k: int) -> list[T]:
        """k of them, each once, in the order drawn."""
        left = list(values)
        return [left.pop(self.pick(len(left))) for _ in range(k)]

    def unit(self) -> float:
        return self.pick(1000) / 1000

    def digits(self, n: int) -> str:
        return "".join([str(1 + self.pick(9)), *(str(self.pick(10)) for _ in range(n - 1))])

    def letters(self, n: int) -> str:
        return "".join(chr(ord("A") + self.pick(26)) for _ in range(n))

    def fresh(self, draw: Callable[[], str]) -> str:
        """What has not been drawn before."""
        while (value := draw()) in self._seen:
            pass
        self._seen.add(value)
        return value


@dataclass(frozen=True)
class Story:
    """What is hidden and asked. facts: with a place in the text, 0 to 1. asked: which of them
    the answer is in. labels: what could be answered, of tasks that are scored by labels."""

    facts: list[tuple[str, float]]
    asked: list[int]
    question: str
    prefix: str
    answers: list[str]
    gen: int
    labels: list[str] | None = None


@dataclass(frozen=True)
class Item:
    """document, question and prefix, the begin of the answer, are the prompt. needle_ends: in
    characters of the document, of each asked fact. distances: tokens from there to the end of
    the prompt. tokens: of the prompt. gen: tokens that an answer may have."""

    document: str
    question: str
    prefix: str
    answers: list[str]
    labels: list[str] | None
    sentences: int
    tokens: int
    gen: int
    needle_ends: list[int]
    distances: list[int]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text that are neither very short nor very long."""
    ends = r"(?<=[.!?])[\"\u201d\u2019)]*\s+(?=[A-Z\"\u201c\u2018])"
    found = re.split(ends, " ".join(text.split()))
    return [sentence for sentence in found if 20 < len(sentence) < 400]


def make_item(
    task: str,
    haystack: Sequence[str],
    count: Callable[[str], int],
    *,
    length: int,
    depth: float,
    index: int,
    seed: str | int = 0,
    **numbers: int,
) -> Item:
    """One item of at most `length` tokens, its answer included.

    haystack: sentences. count: tokens of a text. depth: where the asked fact is, 0 to 1.
    numbers: of the task, as TASKS lists them. Raises AHNError if the facts alone are longer.
    """
    draws = Draws(f"{task}/{seed}/{length}/{depth}/{index}")
    start = draws.pick(len(haystack))
    story = _STORIES[task](draws, depth, **{**TASKS[task], **numbers})

    def document(n: int) -> tuple[str, list[int]]:
        return weave([haystack[(start + s) % len(haystack)] for s in range(n)], story)

    after = f"\n\n{story.question}\n{story.prefix}"

    def fits(n: int) -> bool:
        return count(document(n)[0] + after) + story.gen <= length

    n = largest(fits)
    if n == 0 and not fits(0):
        need = count(document(0)[0] + after) + story.gen
        raise AHNError(f"{task}: its facts need {need:,} tokens, --length is {length:,}")
    text, ends = document(n)
    return Item(
        document=text,
        question=story.question,
        prefix=story.prefix,
        answers=story.answers,
        labels=story.labels,
        sentences=n,
        tokens=count(text + after),
        gen=story.gen,
        needle_ends=ends,
        distances=[count(text[end:] + after) for end in ends],
    )


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by doubling and halving; 0 if none does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def weave(sentences: list[str], story: Story) -> tuple[str, list[int]]:
    """Facts among sentences, and where each asked fact ends."""
    n = len(sentences)
    slots = [min(n, int(place * n)) for _, place in story.facts]
    parts: list[str] = []
    ends, at = {}, -1
    for slot in range(n + 1):
        here = [i for i, s in enumerate(slots) if s == slot]
        for i in here:
            parts.append(story.facts[i][0])
            at += 1 + len(parts[-1])
            ends[i] = at
        if slot < n:
            parts.append(sentences[slot])
            at += 1 + len(parts[-1])
    return " ".join(parts), [ends[i] for i in story.asked]


# Stories


def _passkey(draws: Draws, depth: float) -> Story:
    value = draws.digits(5)
    fact = f"The pass key is {value}. Remember it: {value} is the pass key."
    return Story([(fact, depth)], [0], "What is the pass key?", "The pass key is", [value], 8)


def _niah(draws: Draws, depth: float, keys: int = 1, values: int = 1, queries: int = 0) -> Story:
    names = [
        draws.fresh(lambda: f"{draws.of(ADJECTIVES)}-{draws.of(NOUNS)}")
        for _ in range(max(keys, queries))
    ]
    numbers = [[draws.fresh(lambda: draws.digits(7)) for _ in range(values)] for _ in names]
    told = [(name, v) for name, its in zip(names, numbers, strict=True) for v in its]
    places = [depth] if len(told) == 1 else _spread(draws, len(told))
    facts = [f"The secret number for {name} is {value}." for name, value in told]
    asked = names if queries else [names[min(keys - 1, int(depth * keys))]]
    which = ", ".join(asked)
    many = queries or values > 1
    return Story(
        list(zip(facts, places, strict=True)),
        [i for i, (name, _) in enumerate(told) if name in asked],
        f"What are all the secret numbers for {which}?"
        if many
        else f"What is the secret number for {which}?",
        f"The secret numbers for {which} are" if many else f"The secret number for {which} is",
        [value for name, value in told if name in asked],
        32,
    )


def _spread(draws: Draws, n: int) -> list[float]:
    return [(i + draws.unit()) / n for i in range(n)]


def _vt(draws: Draws, depth: float, chains: int, hops: int) -> Story:
    n = hops + 1
    told = []  # of each chain its value, names and places
    for _ in range(chains):
        value = draws.fresh(lambda: draws.digits(5))
        told.append(
            (value, [draws.fresh(lambda: draws.letters(5)) for _ in range(n)], _spread(draws, n))
        )
    facts = [
        (f"Let {name} = {of}.", place)
        for value, names, places in told
        for name, of, place in zip(names, [value, *names], places, strict=False)
    ]
    value, names, _ = told[0]
    return Story(
        facts,
        list(range(n)),
        f"Which variables have the value {value}, directly or through others?",
        f"These {n} variables have the value {value}:",
        names,
        40,
    )


@dataclass
class _World:
    """Persons that go about with things."""

    draws: Draws
    places: list[str]
    first: str  # the thing that is asked about
    where: dict[str, str]
    held: dict[str, str]  # thing -> person
    lies: dict[str, str]  # thing -> place, once it has been left
    facts: list[str]
    seen: list[str]  # places of the first one, in order

    def go(self, person: str) -> None:
        others = [p for p in self.places if p != self.where.get(person)]
        self.where[person] = self.draws.take(others, 1)[0]
        self.facts.append(f"{person} went to the {self.where[person]}.")
        if self.held.get(self.first) == person:
            self.seen.append(self.where[person])

    def pick_up(self, person: str, thing: str) -> None:
        self.held[thing] = person
        self.lies.pop(thing, None)
        self.facts.append(f"{person} picked up the {thing}.")
        if thing == self.first and self.seen[-1:] != [self.where[person]]:
            self.seen.append(self.where[person])

    def leave(self, person: str, thing: str) -> None:
        del self.held[thing]
        self.lies[thing] = self.where[person]
        self.facts.append(f"{person} left the {thing} there.")


def _babi(kind: int) -> Callable[..., Story]:
    def story(draws: Draws, depth: float, facts: int) -> Story:
        persons, places = draws.take(PERSONS, 4), draws.take(PLACES, 6)
        things = draws.take(THINGS, 3)
        world = _World(draws, places, things[0], {}, {}, {}, [], [])
        if kind > 1:
            world.go(persons[0])
            world.pick_up(persons[0], things[0])
        if kind > 2:
            world.go(persons[0])
        while len(world.facts) < facts:
            _step(draws, world, draws.of(persons), things, kind == 1)
        told = [(f, a) for f, a in zip(world.facts, _spread(draws, facts), strict=True)]
        if kind == 1:
            at = min(facts - 1, int(depth * facts))
            who = world.facts[at].split()[0]
            last = max(i for i, f in enumerate(world.facts) if f.split()[0] == who)
            asked, answer = [last], world.where[who]
            question, prefix = f"Where is {who}?", f"{who} is in the"
        elif kind == 2:
            asked, answer = list(range(facts)), world.seen[-1]
            question, prefix = f"Where is the {things[0]}?", f"The {things[0]} is in the"
        else:
            asked, (answer, last_place) = list(range(facts)), world.seen[-2:]
            question = f"Where was the {things[0]} before the {last_place}?"
            prefix = f"Before the {last_place}, the {things[0]} was in the"
        return Story(told, asked, question, prefix, [answer], 16, places)

    return story


def _step(draws: Draws, world: _World, person: str, things: list[str], only_moves: bool) -> None:
    do = 0 if only_moves else draws.pick(3)
    here = world.where.get(person)
    if do == 1 and here:  # who has not been anywhere yet can only go
        free = [t for t in things if t not in world.held and world.lies.get(t, here) == here]
        if free:
            world.pick_up(person, draws.of(free))
            return
    if do == 2:
        mine = [t for t in things if world.held.get(t) == person]
        if mine:
            world.leave(person, draws.of(mine))
            return
    world.go(person)


_STORIES: dict[str, Callable[..., Story]] = {
    "passkey": _passkey,
    **dict.fromkeys((t for t in TASKS if t.startswith("niah")), _niah),
    "vt": _vt,
    **{f"babi{n}": _babi(n) for n in (1, 2, 3)},
}
