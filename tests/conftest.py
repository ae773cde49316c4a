"""Imports ahn_mlx before any test imports MLX: only then does the fast BLAS take effect."""

import signal

import ahn_mlx  # noqa: F401

# isort: split
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
