"""Where a person's lines come from: a prompt with history and completion, or a pipe."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from ..reading.text import readable
from .terminal import Left, say

LONGEST = 10_000  # characters of a line that is worth keeping


class Prompt:
    """Lines of whoever types, or of what is piped in.

    words: what completes a first word, and what may follow it; PATHS for paths. pasted: gives
    what a text is that was pasted, or dropped, on an empty line. typed: whether someone types;
    seen: and sees what this program says; editor: and can edit.
    """

    PATHS = ("paths",)

    def __init__(self, words: dict[str, tuple[str, ...]], pasted: Callable[[str], str]):
        shown = next((s for s in (sys.stdout, sys.stderr) if s.isatty()), None)
        self.typed = sys.stdin.isatty()
        self.seen = self.typed and shown is not None
        self.editor: PromptSession[str] | None = None
        if self.seen and not is_dumb_terminal():
            self.editor = PromptSession(
                "> ",
                output=create_output(stdout=shown),
                history=_history(),
                completer=_Words(words),
                complete_while_typing=False,
                complete_style=CompleteStyle.READLINE_LIKE,
                enable_suspend=True,  # Ctrl-Z
                key_bindings=_keys(pasted),
            )

    def line(self, default: str = "", pressed: bool = False) -> str:
        """The next line, or several that were pasted. default: what stands there to be edited.
        pressed: whether Ctrl-C has just been pressed.

        Ctrl-C clears the line. Raises Left when it is pressed twice in a row, and EOFError.
        """
        while True:
            try:
                return self._read(default)
            except KeyboardInterrupt:
                cleared = self.editor is not None and self.editor.default_buffer.text
                if not self.typed or (pressed and not cleared):
                    raise Left from None
            pressed, default = True, ""
            say("(Ctrl-C again, or Ctrl-D, leaves)")

    def _read(self, default: str) -> str:
        if self.editor is not None:
            return self.editor.prompt(default=default)
        if self.typed:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line


def _keys(pasted: Callable[[str], str]) -> KeyBindings:
    keys = KeyBindings()

    @keys.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        buffer = event.current_buffer
        buffer.insert_text(text if buffer.text else pasted(text))

    return keys


class _Kept(FileHistory):
    """Lines of earlier runs, for nobody else to read. A file that cannot be read or written
    is done without."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        if len(string) > LONGEST:
            return
        with suppress(OSError):
            os.makedirs(os.path.dirname(self.filename), mode=0o700, exist_ok=True)
            os.close(os.open(self.filename, os.O_WRONLY | os.O_CREAT, 0o600))
            super().store_string(readable(string))


def _history() -> History:
    """In the user's state directory, if there is one."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.expanduser("~/.local/state")
    if not os.path.isabs(state):  # no home
        return InMemoryHistory()
    return _Kept(Path(state, "ahn-mlx", "history"))


class _Words(Completer):
    """Commands, and what may follow them."""

    def __init__(self, words: dict[str, tuple[str, ...]]):
        self.words = words
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        first, space, rest = text.partition(" ")
        if not space:
            found = [w for w in self.words if text.startswith("/") and w.startswith(text.lower())]
            yield from (Completion(w, -len(text)) for w in found)
            return
        follow = self.words.get(first.lower(), ())
        if follow is Prompt.PATHS:
            # The whole rest may be one path with spaces, or its last word one of several.
            last = re.split(r"(?<!\\)\s+", rest)[-1]
            yield from self._paths(rest, event) or self._paths(last, event)
        else:
            yield from (Completion(w, -len(rest)) for w in follow if w.startswith(rest))

    def _paths(self, typed: str, event: CompleteEvent) -> list[Completion]:
        quoted = typed[:1] in ("'", '"')
        path = typed[1:] if quoted else re.sub(r"\\(.)", r"\1", typed)
        return [
            Completion(
                (c.text if quoted else re.sub(r"([\s\\'\"])", r"\\\1", c.text))
                + ("/" if c.display_text.endswith("/") else ""),
                display=c.display,
            )
            for c in self.paths.get_completions(Document(path), event)
        ]
