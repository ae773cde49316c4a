"""What a memory file may say of itself: each fact at its bounds, and what layers are called."""

import pytest

from ahn_mlx.reading import own
from ahn_mlx.reading.layout import check_facts, kind_of, tail_of, tokens_of, version_of

WINDOWED = [24, 8, 2, None, 64]
GOOD = {
    "version": 2,
    "model": {"name": "m"},
    "tokenizer": "t",
    "tokens": 24,
    "window": 8,
    "sinks": 2,
    "step": 8,
    "turn": "start",
    "chat": True,
    "system": "",
    "preview": "",
    "saved": 0,
    "layers": [WINDOWED, [24]],
    "memory": "gated_deltanet",
    "base": {"dtype": "float32", "bits": None},
    "texts": [],
}


def text(name="", read=0, tokens=0):
    return {"name": name, "read": read, "tokens": tokens}


def model(**values):
    return {"name": "m", **values}


# What is taken, and what is not, each as near to the other as it can be.
BOUNDS = {
    "model": (
        [
            *(model(ahn="x" * 4096), model(ahn=None), model(name="x" * 4096)),
            *(model(dtype="bfloat16"), *(model(q_bits=bits) for bits in ("8", 0, 4, 8))),
        ],
        [
            *("m", {}, model(name=None), model(name="x" * 4097), model(ahn="x" * 4097)),
            *(model(ahn=7), model(name="a\0b"), model(dtype="int8")),
            *(model(q_bits=5), model(q_bits="16")),
        ],
    ),
    "tokenizer": (["", "x" * 64], ["x" * 65, "\0", None, "\ud83d"]),
    "tokens": ([0, 1 << 30], [-1, (1 << 30) + 1, 1.0, True, "1", None]),
    "window": ([1, 1 << 30], [0, (1 << 30) + 1, 8.0]),
    "sinks": ([0, 1 << 30], [-1, (1 << 30) + 1, False]),
    "step": ([1, 1 << 16], [0, (1 << 16) + 1]),
    "turn": (["start", "read", "answered", "cut"], ["", "Start", "begun"]),
    "chat": ([True], [1, 0, None, "true"]),
    "system": (["x" * (1 << 20)], ["x" * ((1 << 20) + 1), None]),
    "preview": (["x" * 200], ["x" * 201]),
    "saved": ([0, 1 << 53], [-1, (1 << 53) + 1, 0.5]),
    "layers": (
        [[[24]], 1000 * [[24]], [[24, 8, 2, 2, 32]], [[24, 8, 2, 8, 128]], [[24, 8, 2, 5, 64]]],
        [
            *([], 1001 * [[24]], [24], [[]], [[24, 8]], [[24.0]], [[None]], None),
            *([[24, 8, 2, bits, 64]] for bits in (1, 7, 9)),
            *([[24, 8, 2, None, 16]], [[24, 8, 2, None, None]], [[24, 8, None, None, 64]]),
            *([[24, True, 2, None, 64]], [[*WINDOWED, 0]]),
        ],
    ),
    "memory": (["deltanet", "mamba2"], ["GatedDeltaNet", "", None]),
    "base": (
        [{"dtype": "bfloat16", "bits": 2}, {"dtype": "float16", "bits": 8, "more": 1}],
        [
            *({"dtype": "float32"}, {"bits": None}, {"dtype": "int8", "bits": None}, None),
            *({"dtype": "float32", "bits": bits} for bits in (0, 1, 7, 9, "4", 4.0, True)),
        ],
    ),
    "texts": (
        [[text("x" * 200, 1 << 53, 1 << 30)], 100 * [text()]],
        [
            *(101 * [text()], [text("x" * 201)], [text(read=-1)], [text(read=(1 << 53) + 1)]),
            *([text(tokens=-1)], [text(tokens=(1 << 30) + 1)], [text(name=None)]),
            *({}, [{}], ["x"]),
        ],
    ),
    "earlier": ([0, 1 << 53], [-1, (1 << 53) + 1]),
    "space": ([" " * (1 << 16)], [" " * ((1 << 16) + 1), 5]),
    "opening": ([[], ["x" * (1 << 20), ""], ()], [["x" * ((1 << 20) + 1)], [None], "x"]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_facts_at_their_bounds(name):
    taken, refused = BOUNDS[name]
    for value in taken:
        check_facts({**GOOD, name: value})
    for value in refused:
        with pytest.raises(ValueError, match=f"^its {name} is "):
            check_facts({**GOOD, name: value})


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"version"}))
def test_each_fact_is_there_but_for_what_is_newer(name):
    facts = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=f"it does not say its {name}"):
        check_facts(facts)
    facts["version"] = 1
    if name in ("memory", "base", "texts"):
        check_facts(facts)
    else:
        with pytest.raises(ValueError, match=f"it does not say its {name}"):
            check_facts(facts)


def test_facts_that_belong_together():
    for done in (0, 1 << 30):
        check_facts({**GOOD, "job": "x" * 64, "done": done})
    for job, done in (("x" * 65, 0), ("x", -1), ("x", (1 << 30) + 1)):
        with pytest.raises(ValueError, match=r"its (job|done) is"):
            check_facts({**GOOD, "job": job, "done": done})
    for part in ({"job": "x"}, {"done": 0}):
        with pytest.raises(ValueError, match="either job or done, not both"):
            check_facts({**GOOD, **part})
    check_facts({**GOOD, "system": "Be brief."})
    check_facts({**GOOD, "chat": False})
    with pytest.raises(ValueError, match="a system message and that there is no chat"):
        check_facts({**GOOD, "system": "Be brief.", "chat": False})
    with pytest.raises(ValueError, match="its layers are not of version 3"):
        check_facts({**GOOD, "version": 3})
    check_facts({**GOOD, "version": 1})


def test_what_layers_are_called():
    assert [kind_of(x) for x in ([24], WINDOWED, ["rotating", 24])] == [
        "full",
        "window",
        "rotating",
    ]
    assert [tokens_of(x) for x in ([24], [25, 8, 2, None, 64], ["rotating", 26])] == [24, 25, 26]
    assert version_of([[24], WINDOWED]) == 2 and version_of([[24], ["rotating", 24]]) == 3
    assert [tail_of({"version": n}) for n in (1, 2, 3)] == ["pending", "tail", "tail"]


def test_entries_of_other_caches_at_their_bounds():
    most = 1 << 30
    taken = [["states", 0, 1], ["states", most, own.MOST], ["rotating", 0, 0, 0, 0]]
    taken += [["rotating", *4 * [most]], ["rotating", *5 * [most]]]
    refused = [
        ["states", 0, 0],
        ["states", 0, own.MOST + 1],
        ["states", most + 1, 1],
        ["states", 0],
    ]
    refused += [["states", 0, 1, 1], ["states", -1, 1], ["states", True, 1], ["state", 0, 1]]
    refused += [["rotating", 0, 0, 0], ["rotating", *6 * [0]], ["rotating", 0, 0, 0, 0.0]]
    refused += [["rotating", *4 * [most + 1]], [24, 0, 1]]
    assert all(map(own.is_entry, taken)) and not any(map(own.is_entry, refused))
