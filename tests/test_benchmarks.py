"""Benchmarks still run, on little; but for those that build, install or train for minutes."""

import sys
from pathlib import Path

import pytest
from checkpoints import REPO
from click.testing import CliRunner

import ahn_mlx

sys.path.insert(0, str(REPO))
from benchmarks.__main__ import main as benchmarks
from benchmarks.training import gigabytes

pytestmark = pytest.mark.slow
BOOK = str(Path(ahn_mlx.__file__).parent / "demo" / "pride-and-prejudice.txt")


@pytest.mark.parametrize(
    ("line", "tables"),
    [
        ("decode --contexts 80,160 --tokens 1 --rounds 1", ["context", "80", "160"]),
        ("far BOOK --tokens 1400 --measured 64", []),
        ("memory --contexts 128 --tokens 20500", ["tokens read", "rotating", "ahn 4-bit"]),
        ("metal", []),
        ("prefill --tokens 2048 --far 8192 --rounds 1", ["tokens/s", "last / third"]),
        ("quantized BOOK --tokens 1300", ["8-bit window", "4-bit window"]),
        ("recurrence --lengths 64 --rounds 1", ["gated delta rule", "Mamba2"]),
        ("serve --rows 2 --tokens 2 --book 64 --rounds 1", []),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_it_runs(line: str, tables: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(benchmarks, line.replace("BOOK", BOOK).split())
    assert result.exit_code == 0, result.exception
    rows = [row for row in result.stdout.splitlines() if row.startswith("| ")]
    assert len(rows) > 1 and "nan" not in result.stdout
    for name in tables:
        assert any(f"| {name} " in row for row in rows), result.stdout


def test_what_a_step_of_training_takes() -> None:
    """Of a layer no less than its input and output, of the head no less than a block's logits."""
    parts = gigabytes("ahn-gdn-smollm2-135m", 256)
    assert parts["weights"] == pytest.approx(2 * 137e6 / 1e9, rel=0.05)
    assert parts["one layer"] > 2 * 4 * 256 * 576 / 1e9
    assert parts["head"] > 4 * 128 * 49_152 / 1e9
