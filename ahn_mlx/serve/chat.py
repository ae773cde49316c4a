"""Messages of a client as token ids: what the chat template says of them, and what of it a
session that has read some of them has still to read.

A client's words are content, whatever they say, and a client's templates are never run.
"""

import hashlib
import json
import secrets
from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..reading.sandbox import render
from ..reading.session import Session
from ..reading.tokens import Encoder
from .parameters import APIError
from .shelf import Kept, Shelf

Message = dict[str, Any]  # role, content (a string), perhaps tool_calls, tool_call_id, name
TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)


class Conversation(NamedTuple):
    """model: name that was asked for. messages: in the form of Message. tools: as OpenAI has
    them. memory: the session of a book, if the name has one, with what tells it from others."""

    model: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    memory: Session | None = None
    identity: str = ""

    def keys(self) -> list[str]:
        """Names of the states after one message, after two, ..."""
        hashed = hashlib.sha256(_text([self.model, self.identity, self.tools]))
        found = []
        for message in self.messages:
            hashed.update(_text(_canonical(message)))
            found.append(hashed.hexdigest())
        return found

    def then(self, answer: Message) -> str:
        """Names the state after an answer to all of them."""
        return self._replace(messages=[*self.messages, answer]).keys()[-1]

    @property
    def system(self) -> str:
        """The first message, if it is the system's."""
        first = self.messages[0]
        return first["content"] if first["role"] == "system" else ""


class Prompt(NamedTuple):
    """session: what to go on from. ids: to be read by it. reused: tokens it has read of the
    conversation already. thinking: whether the answer begins inside of a thought."""

    session: Session
    ids: list[int]
    reused: int
    thinking: bool


class Chat:
    """fresh: a session that has read nothing. Used by one thread at a time: tokenizers are not
    made for more."""

    def __init__(self, tokenizer: TokenizerWrapper, fresh: Session, shelf: Shelf):
        self.tokenizer, self.fresh, self.shelf = tokenizer, fresh, shelf
        self.encoder = Encoder(tokenizer)
        self._nonce = secrets.token_hex(8)
        self._lock = Lock()

    def prompt(self, conversation: Conversation) -> Prompt:
        """What a conversation is for the model. Raises APIError for what the template refuses."""
        with self._lock:
            try:
                return self._prompt(conversation)
            except AHNError as e:
                raise APIError(str(e), param="messages") from None

    def plain(self, text: str, session: Session | None) -> Prompt:
        """A text that is continued as it is."""
        with self._lock:
            try:
                ids = self.encoder("", text)
            except AHNError as e:
                raise APIError(str(e), param="prompt") from None
        if session is None:
            return Prompt(self.fresh, [*self.encoder.begin, *ids], 0, False)
        return Prompt(session, ids, 0, False)

    def follow(self, kept: Kept, messages: list[Message], tools: list[dict[str, Any]]) -> Prompt:
        """More messages after a session that was answered."""
        asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        if kept.system:
            asked.insert(0, {"role": "system", "content": kept.system})
        with self._lock:
            try:
                conversation = Conversation("", [*asked, *messages], tools)
                text = self._render(conversation, marked=True)
                ids = self.encoder(*self._after(conversation, len(asked), kept, text))
                return Prompt(kept.session, [*kept.unread, *ids], kept.tokens, self._thinks(text))
            except AHNError as e:
                raise APIError(str(e), param="input") from None

    def _prompt(self, conversation: Conversation) -> Prompt:
        messages = conversation.messages
        if not self.tokenizer.has_chat_template:
            raise APIError("the model has no chat template; use /v1/completions")
        if not messages:
            raise APIError("there are no messages", param="messages")
        self._check_names(conversation)
        text = self._render(conversation, marked=True)
        thinking, keys = self._thinks(text), conversation.keys()
        for count in range(len(messages) - 1, 0, -1):
            if messages[count - 1]["role"] != "assistant":
                continue
            kept = self.shelf.get(keys[count - 1])
            if kept is None:
                continue
            try:
                ids = self.encoder(*self._after(conversation, count, kept, text))
            except _NotThere:
                continue
            return Prompt(kept.session, [*kept.unread, *ids], kept.tokens, thinking)
        if conversation.memory is not None:
            ids = self.encoder(*self._of_memory(conversation, text))
            return Prompt(conversation.memory, ids, 0, thinking)
        return Prompt(self.fresh, self._whole(conversation, text), 0, thinking)

    def _whole(self, conversation: Conversation, text: str) -> list[int]:
        """All of it, from the begin."""
        exact = self._render(conversation, marked=False)
        pieces = self._pieces(conversation, text, exact)
        if pieces is not None:
            return self.encoder(*pieces)
        # A template that looks at what it is given, or tool calls, whose text is not ours.
        self._check_plain([m["content"] for m in conversation.messages], "messages")
        return self.encoder(exact)

    def _check_names(self, conversation: Conversation) -> None:
        """What is no content stands in the template's own text."""
        self._check_plain(conversation.tools, "tools")
        others = [
            [v for k, v in m.items() if k not in ("role", "content")] for m in conversation.messages
        ]
        self._check_plain(others, "messages")

    def _check_plain(self, words: Any, param: str) -> None:
        """Raise APIError if words of the client would be control tokens."""
        text = json.dumps(words, ensure_ascii=False)
        for token in self.encoder.controls.values():
            if token.content in text:
                raise APIError(
                    f"{token.content!r} is a control token, which the chat template cannot keep"
                    f" apart from {param}; take it out",
                    param=param,
                )

    def _after(
        self, conversation: Conversation, count: int, kept: Kept, text: str
    ) -> tuple[str, ...]:
        """Pieces from where a session stands after `count` messages."""
        before = self._render(
            conversation._replace(messages=conversation.messages[:count]), marked=True, ask=False
        )
        if not text.startswith(before):
            raise _NotThere("the chat template says a message otherwise once others follow it")
        mark = self._mark(count - 1)
        said, calls = before.rfind(mark), conversation.messages[count - 1].get("tool_calls")
        at = before.rfind(kept.ended, max(said, 0)) if kept.ended else -1
        if at >= 0:
            at += len(kept.ended)
        elif said >= 0 and not calls:
            at = said + len(mark)
        else:
            raise _NotThere("the chat template does not say where an answer ends")
        return self._filled(conversation, text[at:], str)

    def _of_memory(self, conversation: Conversation, text: str) -> tuple[str, ...]:
        """Pieces after a book: the first message asks about it, the others follow."""
        session = conversation.memory
        assert session is not None
        if session.template is None:
            raise APIError(
                "this memory was read without the chat template; use /v1/completions", param="model"
            )
        if conversation.tools:
            raise APIError("tools cannot be used with a memory", param="tools")
        messages = conversation.messages
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None or any(m["role"] != "system" for m in messages[:first]):
            raise APIError("the first message must be the user's", param="messages")
        question = "\n\n".join(m["content"] for m in messages[: first + 1])
        first_piece, said, *others = session.template.question(session.turn, question)
        said = session.space + said if session.turn == "read" and said else said
        asked = (first_piece, said, *others)
        end = len(asked) - len(session.template.answer)
        mark = self._mark(first)
        if mark not in text:
            raise APIError("the chat template does not say the first message", param="messages")
        rest = self._filled(conversation, text[text.index(mark) + len(mark) :], str)
        return (*asked[:end], *rest)

    def _mark(self, index: int) -> str:
        return f"MESSAGE-{self._nonce}-{index}-"

    def _thinks(self, text: str) -> bool:
        start = self.tokenizer.think_start if self.tokenizer.has_thinking else None
        return bool(start) and text.rstrip().endswith(str(start))

    def _pieces(self, conversation: Conversation, text: str, exact: str) -> tuple[str, ...] | None:
        """Scaffolding and contents by turns, if together they are what the template says."""
        for trim in TRIMS:
            pieces = self._filled(conversation, text, trim)
            if "".join(pieces) == exact:
                return pieces
        return None

    def _filled(
        self, conversation: Conversation, text: str, trim: Callable[[str], str]
    ) -> tuple[str, ...]:
        """Pieces of a text with marks."""
        pieces, at = [], 0
        for i, message in enumerate(conversation.messages):
            mark = self._mark(i)
            found = text.find(mark, at)
            if found >= 0:
                pieces += [text[at:found], trim(message["content"])]
                at = found + len(mark)
        return (*pieces, text[at:])

    def _render(self, conversation: Conversation, marked: bool, ask: bool = True) -> str:
        """What the template says. marked: with marks for contents. ask: up to where the answer
        begins."""
        messages = [dict(m) for m in conversation.messages]
        if marked:
            for i, message in enumerate(messages):
                # A template may ask whether there is any.
                message["content"] = self._mark(i) if message["content"] else ""
        try:
            return render(
                self.tokenizer,
                messages,
                tools=conversation.tools or None,
                add_generation_prompt=ask,
            )
        except Exception as e:  # whatever the template's own code raises
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise APIError(f"the chat template refuses this ({reason})", param="messages") from None


class _NotThere(AHNError):
    """A session that cannot be gone on from."""


def _text(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True).encode() + b"\n"


def _canonical(message: Message) -> Any:
    """What counts of a message: clients trim answers, and make up the rest."""
    content = message["content"]
    if message["role"] == "assistant":
        content = content.strip()
    return [message["role"], content, _calls_of(message), message.get("tool_call_id")]


def _calls_of(message: Message) -> list[Any]:
    return [
        [call["function"]["name"], call["function"]["arguments"]]
        for call in message.get("tool_calls") or ()
    ]
