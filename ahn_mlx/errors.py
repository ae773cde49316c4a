"""The one exception for mistakes a user can mend, and how its message quotes a file."""

from typing import Any


class AHNError(ValueError):
    """Bad input. The message is one line: the file, the value, and the fix.

    The command line prints it and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def show(text: Any) -> str:
    """A name from a file, fit for a one-line message: quoted, escaped, not endless."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 120 else quoted[:117] + "..."
