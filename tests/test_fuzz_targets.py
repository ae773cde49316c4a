"""Every fuzz target still reads what it is fuzzed from: one that refuses all finds nothing."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkpoints import REPO

sys.path.insert(0, str(REPO))
from fuzz.names import NAMES


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
