"""What a library raises, whatever it is, becomes one line; what is ours or the user's stays."""

import pytest

from ahn_mlx import AHNError
from ahn_mlx.errors import foreign


class PanicException(BaseException):
    """As PyO3 has it for a panic of Rust code."""


def called(error: BaseException) -> None:
    with foreign(lambda why: f"book.json: unusable ({why}); fetch it again"):
        raise error


@pytest.mark.parametrize("error", [Exception("odd\nnumber"), KeyError("x"), PanicException("odd")])
def test_any_exception_becomes_one_line(error):
    with pytest.raises(AHNError) as caught:
        called(error)
    said = str(caught.value)
    assert said.startswith("book.json: unusable (") and said.endswith("; fetch it again")
    assert "\n" not in said and type(error).__name__ not in said.split("(")[0]


def test_an_error_without_words_is_named():
    with pytest.raises(AHNError, match="ZeroDivisionError"):
        called(ZeroDivisionError())


def test_our_own_line_is_not_put_into_another():
    with pytest.raises(AHNError) as caught:
        called(AHNError("config.json: not valid JSON"))
    assert str(caught.value) == "config.json: not valid JSON"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_ends_the_program_stays(error):
    with pytest.raises(type(error)):
        called(error)
