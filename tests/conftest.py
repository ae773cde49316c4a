"""Imports ahn_mlx before any test imports MLX: only then does the fast BLAS take effect."""

import os
import signal

# Some GPUs multiply float32 in TF32, which is off by 0.1 in logits where 1e-3 is expected here.
os.environ["MLX_ENABLE_TF32"] = "0"

import ahn_mlx  # noqa: F401

# isort: split
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

# A shell's background job ignores Ctrl-C, and nohup a closed terminal; the programs that tests
# start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whichever tests ran before on this core."""
    mx.random.seed(0)


@pytest.fixture(scope="session")
def place() -> Iterator[Any]:
    """A machine for commands that are disturbed (faultcases.py); it takes seconds to make."""
    from faultcases import Place

    made = Place()
    yield made
    made.close()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, and how."""
    from matplotlib.figure import Figure

    found, save = list[Any](), Figure.savefig

    def noting(figure: Any, file: Any, **how: Any) -> Any:
        found.append((figure, how))
        return save(figure, file, **how)

    monkeypatch.setattr(Figure, "savefig", noting)
    return found
