"""What is kept, how much of it, and what of a kept file is believed: at the very bound."""

import pytest
from checkpoints import talking_model

from ahn_mlx import AHNError, Session, load
from ahn_mlx.measure import speed
from ahn_mlx.measure.cost import SPARE
from ahn_mlx.serve.budget import check_rows
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


@pytest.mark.parametrize("kept", ["0", "-1.5", "true", '"1e9"', "NaN", "Infinity", "null", "[1]"])
def test_a_speed_that_is_none_is_not_believed(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    speed.record("a", 2e9)
    assert speed.recall("a") == 2e9 and speed.recall("b") is None
    (tmp_path / "ahn-mlx/bench.json").write_text(f'{{"a": {kept}}}')
    assert speed.recall("a") is None
