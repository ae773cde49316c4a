"""What is kept, how much of it, and what of a kept file is believed: at the very bound."""

import math
import os

import mlx.core as mx
import pytest
from checkpoints import talking_model

from ahn_mlx import AHNError, Session, load
from ahn_mlx.measure import speed
from ahn_mlx.measure.cost import SPARE
from ahn_mlx.serve.budget import check_rows, machine_bytes
from ahn_mlx.serve.parameters import APIError, Field, parse
from ahn_mlx.serve.shelf import Kept, Shelf


def test_what_was_asked_for_last_stays_longest(tmp_path):
    session = Session(*load(talking_model("qwen2-gdn", tmp_path)))
    session.read("It was the best of times.")
    shelf = Shelf(2 * session.nbytes)
    for key in ("a", "b"):
        shelf.put(Kept(session.fork()), key)
    assert shelf.get("a") is not None
    shelf.put(Kept(session.fork()), "c")
    assert shelf.get("b") is None and len(shelf) == 2
    assert shelf.get("a") is not None and shelf.get("c") is not None
    # One that is found by two names is there once.
    shelf.put(Kept(session.fork(), (1, 2, 3)), "d", "e")
    assert shelf.get("a") is None and shelf.get("c") is not None
    assert shelf.get("d") is shelf.get("e") is not None
    assert (len(shelf), shelf.nbytes) == (2, 2 * session.nbytes)
    assert shelf.get("d").tokens == session.tokens + 3
    # And whichever name it was asked for by, it stays under both.
    named, first = Shelf(2 * session.nbytes), Kept(session.fork())
    named.put(first, "id:1", "text 1")
    named.put(Kept(session.fork()), "id:2")
    named.get("text 1")
    named.put(Kept(session.fork()), "id:3")
    assert named.get("id:1") is first and named.get("id:2") is None
    # What is put again is new again.
    again = Shelf(2 * session.nbytes)
    for key in ("a", "b", "a", "c"):
        again.put(Kept(session.fork()), key)
    assert again.get("b") is None and again.get("a") is not None
    small, right = Shelf(session.nbytes - 1), Shelf(session.nbytes)
    for one in (small, right):
        one.put(Kept(session), "a")
    assert small.get("a") is None and right.get("a") is not None
    right.clear()
    assert (len(right), right.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("field", "taken", "refused"),
    [
        (Field("integer", low=1, high=3), [1, 3, 2.0], [0, 4, 2.5, True, "2", 1e400]),
        (Field("number", low=0, high=2), [0, 2, 0.5], [-0.1, 2.1, math.nan, math.inf, False, "1"]),
        (Field("number"), [-1e300, 10**30], [-math.inf, math.nan]),
        (Field("string", low=2, high=3), ["ab", "abc"], ["a", "abcd", 5, ["ab"]]),
        (Field("array", low=1, high=2), [[0], [0, 0]], [[], [0, 0, 0], "a", {"a": 1}]),
        (Field("text or array", low=1, high=2), ["a", [1, 2]], ["", [], "abc", [1, 2, 3], 5]),
        (Field("object", high=1), [{}, {"a": 1}], [{"a": 1, "b": 2}, [], "a"]),
        (Field("boolean"), [True, False], [0, 1, "true"]),
        (Field("string", choices=("a", "b")), ["a", "b"], ["c", "", "ab"]),
    ],
)
def test_a_parameter_is_taken_up_to_its_bounds(field, taken, refused):
    for value in taken:
        found = parse({"x": value}, {"x": field})["x"]
        assert found == value and (field.kind != "integer" or type(found) is int)
    for value in refused:
        with pytest.raises(APIError) as error:
            parse({"x": value}, {"x": field}, "body: ")
        assert (error.value.param, error.value.status) == ("x", 400)
        assert "body: x must be" in error.value.message


def test_it_is_said_whether_a_number_or_a_length_is_beyond_its_bounds():
    for field, value, said in (
        (Field("integer", low=1), 0, "x must be at least 1"),
        (Field("number", high=1000), 2e3, "x must be at most 1,000"),
        (Field("string", low=2), "a", "the length of x must be at least 2"),
        (Field("array", high=1), [1, 2], "the length of x must be at most 1"),
        (Field("text or array", high=1), "ab", "the length of x must be at most 1"),
        (Field("object", high=0), {"a": 1}, "the length of x must be at most 0"),
    ):
        with pytest.raises(APIError) as error:
            parse({"x": value}, {"x": field})
        assert error.value.message == said


def test_parameters_have_their_defaults_and_no_others_are_there():
    table = {"a": Field("integer", 7, low=9), "b": Field("string", required=True)}
    assert parse({"b": "x", "c": None}, table) == {"a": 7, "b": "x"}
    assert parse({"b": "x", "a": None}, table) == {"a": 7, "b": "x"}
    for body, param, code in (
        ({"b": "x", "c": 0}, "c", "unsupported"),
        ({"a": 9}, "b", "missing"),
        ({"b": None}, "b", "missing"),
        ({"b": 5}, "b", "invalid_type"),
    ):
        with pytest.raises(APIError) as error:
            parse(body, table)
        assert (error.value.param, error.value.code) == (param, code)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("integer", "of type integer"),
        ("text or array", "a string or an array"),
        ("array", "of type array"),
    ],
)
def test_what_a_parameter_must_be_is_said(kind, said):
    with pytest.raises(APIError, match=f"^x must be {said}$"):
        parse({"x": {}}, {"x": Field(kind)})


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_are_as_many_as_fit_and_not_one_more(rows):
    # Each that answers and each that waits, and one that reads.
    machine = SPARE + 500 + (2 * rows + 1) * 100
    assert check_rows(rows, 100, 500, machine) == rows
    assert check_rows(rows, 100, 500, machine + 199) == rows
    with pytest.raises(AHNError, match=f"{rows} do"):
        check_rows(rows + 1, 100, 500, machine)
    with pytest.raises(AHNError, match=f"{rows - 1} do"):
        check_rows(rows, 100, 500, machine - 1)


def test_a_machine_is_not_filled_to_the_brim(monkeypatch):
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(mx, "device_info", dict)
    assert 0.7 * whole < machine_bytes() < 0.8 * whole
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 7})
    assert machine_bytes() == 7


@pytest.mark.parametrize(
    "kept",
    [
        "9" * 400,
        "-" + "9" * 400,
        "1e400",
        "[" * 99999,
        "0",
        "-1.5",
        "true",
        '"1e9"',
        "NaN",
        "Infinity",
        "null",
        "[1]",
    ],
)
def test_a_speed_that_is_none_is_not_believed(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not/yet"))
    speed.record("a", 2e9)
    assert speed.recall("a") == 2e9 and speed.recall("b") is None
    speed.record("b", 0.5)
    assert (speed.recall("a"), speed.recall("b")) == (2e9, 0.5)
    for text in (f'{{"a": {kept}}}', "[1]", "{"):
        (tmp_path / "not/yet/ahn-mlx/bench.json").write_text(text)
        assert speed.recall("a") is None
