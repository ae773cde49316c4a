"""Fixtures. A test module gets them with `pytest_plugins = ["emulator.plugin"]`."""

import os
import sys
from collections.abc import Iterator

import mlx.core as mx
import pytest

from .metal import EmulatedMetal
from .toolchain import why_no_clang, why_no_gxx


def require(reason: str | None) -> None:
    """Skip visibly on a user's machine; on CI a missing compiler is a failure."""
    if sys.platform == "darwin":
        pytest.skip("on a Mac there is no emulator")
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def needs_emulator() -> None:
    require(why_no_gxx())


@pytest.fixture
def needs_strict() -> None:
    require(why_no_clang())


@pytest.fixture
def emulated_metal(needs_emulator: None) -> Iterator[EmulatedMetal]:
    """mx.fast.metal_kernel runs on the emulator, and Metal says that it is there."""
    metal = EmulatedMetal()
    with metal.in_place():
        yield metal


@pytest.fixture
def any_metal(request: pytest.FixtureRequest) -> None:
    """The GPU of a Mac, elsewhere the emulator: for tests that look at results alone."""
    if not mx.metal.is_available():
        request.getfixturevalue("emulated_metal")
