"""A tokenizer's chat template, taken apart, so that a conversation can be read in pieces.

Pieces are scaffolding, which is the template's, and content by turns, as `tokens.Encoder`
takes them. Together they are what the template renders, or it is refused.
"""

from collections.abc import Callable
from threading import Thread
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from .sandbox import bounded, render
from .text import readable

# Stand for the system message, and for messages of the user and answers by turns.
SYSTEM = "SYSTEM-MESSAGE-7f3a"
MARKS = ("FIRST-MESSAGE-7f3a", "ANSWER-7f3a", "SECOND-MESSAGE-7f3a", "REPLY-7f3a", "THIRD-7f3a")
# What a template might trim, escape, or take for its own.
PROBE = ' \n\tOne\'s "<&>" {{ two }} {% three %} \\n\n\n \u00e9\u4e16 \n\n'

SECONDS = 10.0  # before a template is said not to end
LONGEST = 1 << 20  # characters around short messages

Pieces = tuple[str, ...]


class TemplateError(AHNError):
    """A chat template that is absent, fails, or cannot be taken apart for what is asked.

    What to do instead is for the command to say.
    """


class _Failed(TemplateError):
    """What the template's own code raises, whenever it is rendered."""


class Template:
    """What stands between messages.

    system: system message, or "" for the template's own. Raises TemplateError if not even
    one message can be put into the template, AHNError if there is no place for `system`.
    """

    # Before the first message, and from the end of a message to where the answer begins.
    start: Pieces
    answer: Pieces

    def __init__(self, tokenizer: TokenizerWrapper, system: str = ""):
        if not tokenizer.has_chat_template:
            raise TemplateError("the tokenizer has no chat template")
        self.tokenizer = tokenizer
        self.system = self._given = readable(system)
        self._between: Pieces | None = None  # from the end of an answer to the next message
        self._why = ""  # there is none
        self._trim: Callable[[str], str] = str
        self._listed = False  # content is wanted as a list of parts
        _in_time(self._take_apart)
        # The model ends an answer by itself with the first token of what follows it.
        follows = self._between[0] if self._between else ""
        ends = [tokenizer.decode([token]) for token in tokenizer.eos_token_ids]
        self._end = next((e for e in ends if e and follows.startswith(e)), "")

    def opening(self, turn: str) -> Pieces:
        """What stands before more text of the user. Raises TemplateError if the template
        cannot be taken apart after the first answer."""
        if turn == "start":
            return self.start
        if turn == "read":
            return ("",)
        if self._between is None:
            raise TemplateError(
                f"the chat template {self._why}, so it allows one question and no second"
            )
        first, *rest = self._between
        return (first.removeprefix(self._end) if turn == "answered" else first, *rest)

    def begin(self, text: str) -> str:
        """More text of the user, at the begin of a message: some templates trim it."""
        return text.lstrip() if self._trim(" x") == "x" else text

    def end(self, text: str) -> tuple[str, str]:
        """A text at the end of a message, and the white space after it that some templates
        trim."""
        kept = text.rstrip() if self._trim("x ") == "x" else text
        return kept, text[len(kept) :]

    def question(self, turn: str, question: str) -> Pieces:
        """From where the conversation stands to where the answer begins."""
        if turn != "read":
            return (*self.opening(turn), self._trim(question), *self.answer)
        text = self._trim(f"x{question}")[1:]
        return ("", f"\n\n{text}" if text else "", *self.answer)

    def facts(self) -> dict[str, Any]:
        """All of it, for a program without templates. In its lists every second piece is the
        system message's, and null. trim: strip, lstrip, rstrip or str, done to what is said."""

        def apart(pieces: Pieces) -> list[str | None]:
            return [None if n % 2 else piece for n, piece in enumerate(pieces)]

        return {
            "start": apart(self.start),
            "answer": apart(self.answer),
            "between": None if self._between is None else apart(self._between),
            "why": self._why if self._between is None else "",
            "end": self._end,
            "trim": self._trim.__name__,
        }

    def _take_apart(self) -> None:
        # A template may print the time, and the second may change between two renderings.
        for last in (False, False, True):
            try:
                self._first_turn()
                self._later_turns()
            except TemplateError as e:
                if last or isinstance(e, _Failed):
                    raise
            if self._between is not None:
                return

    def _first_turn(self) -> None:
        text = self._first_text()
        if self.system and SYSTEM not in text:
            raise AHNError(
                "the chat template has no place for a system message; drop --system-prompt"
            )
        whole = self._render(self.system, PROBE)
        if self._render(self.system, PROBE) != whole:
            raise TemplateError("the chat template says something else each time")
        for given in (self.system, self.system.strip()):
            self._given = given
            self.start, self.answer = (self._pieces(part) for part in text.split(MARKS[0]))
            for trim in (str, str.strip, str.lstrip, str.rstrip):
                if "".join((*self.start, trim(PROBE), *self.answer)) == whole:
                    self._trim = trim
                    return
        raise TemplateError("the chat template changes what it is given")

    def _first_text(self) -> str:
        """One message rendered, in the form of content that the template takes."""
        failures: list[AHNError] = []
        for self._listed in (False, True):
            try:
                text = self._try(MARKS[0])
            except AHNError as e:
                failures.append(e)
                continue
            if text.count(MARKS[0]) == 1:
                return text
            failures.append(TemplateError("the chat template does not say a message just once"))
        raise failures[0]

    def _try(self, *contents: str) -> str:
        """The messages rendered, with a mark for the system message if there is one."""
        try:
            return self._render(SYSTEM if self.system else "", *contents)
        except TemplateError as e:
            if not self.system:
                raise
            self._render("", *contents)
            raise AHNError(f"with a system message {e}; drop --system-prompt") from None

    def _later_turns(self) -> None:
        """Find what stands between answer and next message, if it is the same each time."""
        one, said, two, reply, three = MARKS
        self._between, self._why = None, "says later turns otherwise than the first"
        try:
            first = self._try(one)
            start, answer = first.split(one)
            text = self._try(one, said, two)
            # The prompt for an answer may go on, as with <think>, where a past answer does not.
            header, rest = text.removeprefix(start + one).split(said)
            between, end = rest.split(two)
            again = self._try(one, said, two, reply, three)
            probed = self._try(one, said, PROBE)
        except AHNError as e:
            self._why = f"fails after an answer ({e})"
            return
        except ValueError:  # not one of each
            return
        parts = (start, one, header, said, between, two)
        if not (
            answer.startswith(header)
            and "".join((*parts, answer)) == text
            and "".join((*parts, header, reply, between, three, answer)) == again
            and "".join((*parts[:-1], self._trim(PROBE), answer)) == probed
        ):
            return
        self._between = self._pieces(between)

    def _render(self, system: str, *contents: str) -> str:
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": system})
        for n, content in enumerate(contents):
            messages.append({"role": "assistant" if n % 2 else "user", "content": content})
        if self._listed:
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            text = render(self.tokenizer, messages, add_generation_prompt=True)
        except Exception as e:  # whatever the template's own code raises
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise _Failed(f"the chat template failed ({reason})") from None
        if len(text) > LONGEST:
            raise TemplateError(f"the chat template writes {len(text):,} characters of its own")
        return text

    def _pieces(self, text: str) -> Pieces:
        """Scaffolding, with the system message as content where its mark stands."""
        first, *rest = text.split(SYSTEM)
        return (first, *(piece for part in rest for piece in (self._given, part)))


def _in_time(work: Callable[[], None]) -> None:
    """Do the work, but do not wait for ever: a template is a program."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with bounded():
                work()
        except BaseException as e:
            failed.append(e)

    worker = Thread(target=run, daemon=True)
    worker.start()
    worker.join(SECONDS)
    if worker.is_alive():
        raise TemplateError(f"the chat template does not end within {SECONDS:.0f} s")
    if failed:
        raise failed[0]
