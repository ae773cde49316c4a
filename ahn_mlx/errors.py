"""The one exception for mistakes a user can mend."""


class AHNError(ValueError):
    """Bad input. The message is one line: the file, the value, and the fix.

    The command line prints it and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
