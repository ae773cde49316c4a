"""What all APIs share: a model by its name, a request on its rows, and what comes of it."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.requests import Request as HTTPRequest

from ..errors import AHNError
from ..reading.session import Session
from .answers import Done, Event, Failed, Piece, Read, Request, Token
from .chat import Chat, Conversation, Message, Prompt
from .engine import Engine
from .memories import Library
from .metrics import Metrics
from .parameters import APIError, plain_json
from .parts import Part, Parts
from .sampling import Wish
from .shelf import Kept, Shelf


@dataclass
class Service:
    """name: of the model, for clients. library: memories, or None without a directory."""

    name: str
    engine: Engine
    fresh: Session
    shelf: Shelf
    metrics: Metrics
    library: Library | None
    created: int
    row_bytes: int
    chat: Chat = field(init=False)
    tokenizing: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.chat = Chat(self.engine.tokenizer, self.fresh, self.shelf)
        self.tokenizing = ThreadPoolExecutor(1, "tokenizing")

    async def aside(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do what takes long and needs no MLX, outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, work, *args)

    def check_model(self, name: str) -> str:
        """The memory in a model's name, or "". Raises APIError if there is no such model."""
        base, at, memory = name.partition("@")
        if base != self.name or (at and not memory):
            raise APIError(
                f"the model {name[:200]!r} does not exist; this server has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return memory

    async def open(self, name: str) -> tuple[Session | None, str]:
        """The session that a model's name begins with, and what tells it from others."""
        memory = self.check_model(name)
        if not memory:
            return None, ""
        if self.library is None:
            raise APIError(
                f"the model {name[:200]!r} does not exist; start the server with --memories",
                status=404,
                param="model",
                code="model_not_found",
            )
        return await self.library.open(memory)

    async def conversation(
        self, model: str, messages: list[Message], tools: list[dict[str, Any]]
    ) -> Conversation:
        memory, identity = await self.open(model)
        return Conversation(model, messages, tools, memory, identity)

    def start(self, prompts: Sequence[Prompt], wish: Wish, n: int = 1) -> "Running":
        """Answer all prompts, n times each. Raises APIError if rows are busy."""
        return Running(self, prompts, wish, n)


class Running:
    """Answers on their way. Whoever has it cancels it in the end, whatever happened."""

    def __init__(self, service: Service, prompts: Sequence[Prompt], wish: Wish, n: int):
        self.prompts, self.answers = prompts, n * len(prompts)
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        service.engine.reserve(self.answers)
        for prompt in prompts:
            service.metrics.count("tokens_reused_total", prompt.reused)
        self._requests = [
            Request(prompt.session, prompt.ids, wish, self._tell, n, i * n)
            for i, prompt in enumerate(prompts)
        ]
        for request in self._requests:
            service.engine.submit(request)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, with what was read before."""
        return sum(p.session.tokens + len(p.ids) for p in self.prompts)

    @property
    def reused(self) -> int:
        return sum(p.reused for p in self.prompts)

    def _tell(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.cancel()

    async def events(self) -> AsyncIterator[Read | Piece | Done]:
        """What comes, to the last answer's end. Raises APIError if it fails."""
        left = self.answers
        while left:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            left -= isinstance(event, Done)
            yield event

    def cancel(self) -> None:
        """Nobody listens any more."""
        for request in self._requests:
            request.cancelled = True
        self._service.engine.wake()


class Said(NamedTuple):
    """A part of an answer, with the token that brought it, or its end."""

    choice: int
    parts: list[Part]
    token: Token | None
    done: Done | None
    read: Read | None = None


class Answered:
    """An answer so far: its parts together."""

    def __init__(self) -> None:
        self.content, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[Token] = []
        self.done: Done | None = None

    def add(self, said: Said) -> None:
        for part in said.parts:
            if part.kind == "content":
                self.content += part.text
            elif part.kind == "reasoning":
                self.reasoning += part.text
            elif part.call is not None:
                self.calls.append(part.call)
        if said.token is not None:
            self.tokens.append(said.token)
        self.done = said.done or self.done

    @property
    def message(self) -> Message:
        """As a client will say it next time."""
        found: Message = {"role": "assistant", "content": self.content}
        if self.calls:
            found["tool_calls"] = [normal_call(call) for call in self.calls]
        return found


def normal_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call as templates want it: its arguments as an object, if they are one."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            function["arguments"] = plain_json(function["arguments"])
    return {"type": "function", "id": call.get("id", ""), "function": function}


async def said(
    service: Service,
    running: Running,
    tools: list[dict[str, Any]],
    conversation: Conversation | None,
    answer_id: str,
    answered: list[Answered],
) -> AsyncIterator[Said]:
    """Events with texts taken apart, collected in `answered`; what was said is kept for the
    next question. conversation: None for a text that is continued."""
    chat = conversation is not None
    parts = [
        Parts(service.engine.tokenizer, tools, chat and p.thinking) if chat else None
        for p in running.prompts
        for _ in range(running.answers // len(running.prompts))
    ]
    answered += [Answered() for _ in parts]
    async for event in running.events():
        if isinstance(event, Read):
            yield Said(0, [], None, None, event)
            continue
        i, take = event.choice, parts[event.choice]
        text = event.text if isinstance(event, Piece) else ""
        done = event if isinstance(event, Done) else None
        if take is None:
            found = [Part("content", text)] if text else []
        else:
            found = take(text, last=done is not None)
        item = Said(i, found, event.token if isinstance(event, Piece) else None, done)
        answered[i].add(item)
        if done is not None and done.reason != "cancelled":
            system = conversation.system if conversation is not None else ""
            keys = [f"id:{answer_id}"] if i == 0 else []
            if conversation is not None:
                keys.append(conversation.then(answered[i].message))
            kept = Kept(done.session, (done.last,), system, done.ended)
            service.shelf.put(kept, *keys)
        yield item


async def gathered(http: HTTPRequest, running: Running, stream: AsyncIterator[Said]) -> None:
    """Take a stream to its end, unless the client leaves: then nobody computes any further."""

    async def take() -> None:
        async for _ in stream:
            pass

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    taking, watching = asyncio.ensure_future(take()), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((taking, watching), return_when=asyncio.FIRST_COMPLETED)
        if not taking.done():
            raise APIError("the client has left", status=499)
        taking.result()
    finally:
        running.cancel()
        for task in (taking, watching):
            task.cancel()
        await asyncio.gather(taking, watching, return_exceptions=True)


def new_id(kind: str) -> str:
    """An id that nobody guesses."""
    return f"{kind}{secrets.token_hex(16)}"


def told(error: BaseException) -> APIError:
    """What a client is told of an error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, AHNError):
        return APIError(str(error))
    return APIError(f"the server failed ({type(error).__name__})", status=500)
