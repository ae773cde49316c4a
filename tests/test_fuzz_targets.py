"""Every fuzz target still reads what it is fuzzed from: one that refuses all finds nothing."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import REPO

sys.path.insert(0, str(REPO))
from fuzz.names import NAMES
from fuzz.one import _begin
from fuzz.oracle import Watch


def test_a_target_that_refuses_all_its_seeds_does_not_begin() -> None:
    read: list[bytes] = []
    target: Any = SimpleNamespace(accepted=0, target=SimpleNamespace(name="x"))
    with pytest.raises(RuntimeError, match="x: none of its 2 seeds is accepted"):
        _begin(target, [b"a", b"b"], read.append)
    target.accepted = 1
    _begin(target, [b"c"], read.append)
    assert read == [b"a", b"b", b"c"]


@pytest.mark.skipif(sys.platform != "linux", reason="fuzzing is for Linux")
def test_names_within_an_open_directory_are_of_that_directory(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for place in (inside, outside):
        place.mkdir()
    handles = [os.open(place, os.O_RDONLY) for place in (inside, outside)]
    watch = Watch(str(inside), on=True)
    for own in handles:
        for event, args in (
            ("os.remove", ("a", own)),
            ("os.rmdir", ("a", own)),
            ("os.mkdir", ("a", 0o777, own)),
            ("os.symlink", (str(inside / "b"), "a", own)),
            ("os.rename", ("a", "b", handles[0], own)),
            ("os.link", ("a", "b", own, handles[0])),
        ):
            watch(event, args)
        assert len(watch.found) == (0 if own == handles[0] else 6), watch.found
    watch("os.truncate", (str(outside / "a"), 0))
    assert len(watch.found) == 7
    for handle in handles:
        os.close(handle)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="fuzzing is for Linux")
def test_seeds_are_accepted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz.one", "seeds", tmp_path, *NAMES]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    accepted = dict(re.findall(r"^([\w-]+): (\d+) of \d+ accepted$", done.stdout, re.MULTILINE))
    assert accepted.keys() == set(NAMES)
    without = {"pickles"} if find_spec("torch") is None else set()
    assert {name for name, n in accepted.items() if n == "0"} == without
