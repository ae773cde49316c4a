"""A model that has read something and can be asked: read, ask, save, fork.

Tokens are read in steps of a fixed size counted from the start, and then those that fill no
step, the tail; reading more begins before the tail again. So a memory that is saved, loaded and
continued is, bit for bit, the memory of one that read all at once.
"""

import asyncio
import copy
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.identity import model_identity
from ..errors import AHNError
from ..hub.zoo import ZOO
from ..model.augment import memory_cache, memory_layers
from ..model.cache import AHNCache
from ..model.ranks import share
from ..model.trace import Trace
from . import memoryfile
from .caches import each, fork, joined, make_caches
from .generate import prefill_step
from .layout import MAX_SPACE, MAX_STEP, MAX_TEXTS, NAME, PREVIEW
from .penalty import Seen, note, nothing_seen
from .sampling import Cutter, Sampling
from .tail import Tail, before, undo
from .template import Pieces, Template
from .text import readable
from .tokens import Encoder, check_ids

# How a model was got.
ORIGIN = ("name", "dtype", "q_bits", "ahn")


class _End:
    """Of a thread that computed: without this MLX's own threads outlive it, and the process
    is aborted when it exits."""

    def __del__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            mx.clear_streams()


# What is kept here goes when its thread does, and in that thread.
_thread = threading.local()


class Session:
    """A conversation whose memory has a fixed size.

    origin: how the model was got, for whoever loads a file: its "name", and arguments of
    ahn_mlx.load, whose models know it by themselves. system: system message, kept in the sinks.
    step: tokens read at a time. kv_bits, kv_group_size: as in AHNCache. chat: speak through
    the tokenizer's chat template; otherwise texts are continued as they are.

    Raises AHNError if there is no chat template that can be taken apart, and with `system`
    but without `chat`.

    >>> session = ahn_mlx.Session(model, tokenizer, system="Be brief.")
    >>> session.read("Call me Ishmael.")
    >>> session.turn
    'read'
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        origin: Mapping[str, Any] | None = None,
        system: str = "",
        step: int | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
        chat: bool = True,
    ):
        self.model, self.tokenizer = model, tokenizer
        known: Mapping[str, Any] = origin or _origin_of(model) or {"name": ""}
        self.origin = {**known, "name": _absolute(known["name"])}
        if system and not chat:
            raise AHNError("--system-prompt needs the chat template; drop --ignore-chat-template")
        self.template = Template(tokenizer, system) if chat else None
        self.encoder = Encoder(tokenizer)
        self.step = prefill_step() if step is None else step
        if not 1 <= self.step <= MAX_STEP:
            raise AHNError(f"step must be from 1 to {MAX_STEP:,} tokens, not {self.step}")
        self.caches: list[Any] = make_caches(model, kv_bits, kv_group_size)
        for i, attention in memory_layers(model):
            memory_cache(self.caches[i]).trace = Trace.start(attention.n_heads)
        self.tail = Tail()
        # Which tokens were read and said; None if a file does not say it.
        self.seen: Seen | None = nothing_seen(model.args.vocab_size)
        self.preview = ""
        # What was read: name, when (seconds since 1970) and tokens of the last MAX_TEXTS texts,
        # and how many there were before those.
        self.texts: list[dict[str, Any]] = []
        self.earlier = 0
        # White space at the end of the message, which the template trims unless more follows.
        self.space = ""
        # Where the conversation stands: "start", "read" (a message is open), "answered"
        # (the end of the answer has been read too) or "cut" (it has not).
        self.turn = "start"
        self.finish_reason = ""  # of the last answer: "stop", "length", or "" if it was closed
        self._whole = True  # no layer is ahead of another
        self._answering = False  # what is read or asked meanwhile would be lost

    def __repr__(self) -> str:
        name = self.origin["name"] or "a model without a name"
        return f"<Session of {name}: {self.tokens:,} tokens, turn {self.turn!r}>"

    @property
    def tokens(self) -> int:
        """Tokens read and generated so far."""
        counts = (c.offset for c in each(self.caches) if isinstance(c, AHNCache | KVCache))
        return int(next(counts))

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(c.nbytes for c in self.caches)

    def read(
        self, text: str, progress: Callable[[int], None] = lambda read: None, *, name: str = ""
    ) -> None:
        """Read more of the user's message. progress: called with tokens read of this text.
        name: of the text, which a file lists.

        >>> session.read("It was the best of times.", name="book.txt")
        >>> session.texts[-1]["name"]
        'book.txt'
        """
        self._check()
        if not text:
            raise AHNError("the text is empty; give a text to read")
        ids = self.encode(text)
        self.read_ids(ids, progress)
        self.note_text(name, len(ids))

    def note_text(self, name: str, tokens: int) -> None:
        """List a text that has been read by `encode` and `read_ids`."""
        text = {"name": _listed(name), "read": int(time.time()), "tokens": tokens}
        texts = [*self.texts, text]
        self.earlier += max(0, len(texts) - MAX_TEXTS)
        self.texts = texts[-MAX_TEXTS:]

    def last_read(self, name: str) -> dict[str, Any] | None:
        """What is listed of the last text of this name, or None."""
        return next((t for t in reversed(self.texts) if t["name"] == _listed(name)), None)

    def opening(self) -> Pieces:
        """What the template puts before more text of the user, as pieces for the encoder.
        Raises TemplateError if it cannot be taken apart after an answer."""
        return self.template.opening(self.turn) if self.template else ("",)

    def encode(self, text: str, opening: Pieces | None = None, *, alone: bool = False) -> list[int]:
        """Token ids of a text that continues this conversation.

        opening: of the run that began to read it; what a template prints may be of its time.
        alone: other ranks do not call this.
        """
        opening = self.opening() if opening is None else opening
        preview = " ".join(readable(text[: 2 * PREVIEW]).split())[:PREVIEW]
        text, space = self.space + text if self.turn == "read" else text, ""
        if self.template:
            text = text if self.turn == "read" else self.template.begin(text)
            text, space = self.template.end(text)
        # A template may print the time, and clocks differ.
        ranks = None if alone else self.model.ranks
        ids = share(ranks, lambda: [*self._begin(), *self.encoder(*opening, text)])
        # Not before a text that cannot be read is refused.
        self.preview = self.preview or preview
        self.space, self.turn = space[:MAX_SPACE], "read"
        return ids

    def read_ids(self, ids: list[int], progress: Callable[[int], None] = lambda read: None) -> None:
        """Read token ids: from the last full step on, in full steps, and the tail at the end.

        To stop, raise from `progress`, between steps: the session is then as after so many
        ids. After an exception inside of a step it cannot go on, and says so.
        """
        self._check()
        check_ids(ids, self.model)
        if ids:
            self._go_back_and_read(ids, progress)
        progress(len(ids))

    def _go_back_and_read(self, ids: list[int], progress: Callable[[int], None]) -> None:
        waiting, known = [*self.tail.ids, *ids], len(self.tail.ids)
        if known:
            self._whole = False
            self.caches, self.tail = self._before_tail(self.caches), Tail()
        full = len(waiting) // self.step * self.step
        for start in range(0, full, self.step):
            self._read_step(waiting[start : start + self.step])
            progress(start + self.step - known)
        if rest := waiting[full:]:
            past = tuple(before(cache, len(rest)) for cache in each(self.caches))
            self._read_step(rest)
            self.tail = Tail(tuple(rest), past)

    def _before_tail(self, caches: list[Any]) -> list[Any]:
        pairs = zip(each(caches), self.tail.before, strict=True)
        return joined(caches, [undo(*pair) for pair in pairs])

    def _read_step(self, ids: list[int]) -> None:
        self._whole = False
        self.note_ids(ids)
        self.model(mx.array([ids]), cache=self.caches)
        mx.eval([c.state for c in self.caches])
        mx.clear_cache()
        self._whole = True

    def ask(
        self,
        question: str,
        *,
        progress: Callable[[int, int], None] = lambda read, total: None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Ask, and read the answer as it comes; question and answer become part of the memory.

        sampling: what Sampling takes. Each piece is a token's, and may be empty.
        Closing the iterator ends the answer there. Any other exception before or in it
        leaves the session as it was. Without a chat template an empty question lets the text
        go on from its tail. Raises AHNError if there is nothing to answer.

        >>> answer = "".join(session.ask("Who speaks?", max_tokens=4))
        """
        self._check()
        settings = Sampling(**sampling)
        if not hasattr(_thread, "end"):
            _thread.end = _End()
        ids = share(self.model.ranks, lambda: self._question(question))
        caches = fork(self.caches)
        if not ids:  # the text goes on from its last tokens
            ids = list(self.tail.ids)
            caches = self._before_tail(caches) if ids else caches
        check_ids(ids, self.model)
        if not ids:
            raise AHNError("nothing to continue from; ask something, or read a text first")
        finish, said, cutter = "", [], Cutter(settings.stop)
        seen = None if self.seen is None else note(self.seen, ids)
        self._answering = True
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                ids,
                prompt_cache=caches,
                prefill_step_size=self.step,
                prompt_progress_callback=progress,
                **settings.begin(self.model.args.vocab_size, seen, self.model.ranks),
            ):
                finish = response.finish_reason or ""
                said.append(response.token)
                yield cutter.add(response.text) + (cutter.rest() if finish else "")
                if cutter.found:
                    break
        except GeneratorExit:
            pass
        finally:
            self._answering = False
            if self.model.ranks is not None:
                self.model.ranks.settle()
        self.finish_reason = "stop" if cutter.found else finish
        if said:
            # What is left to compute belongs to this thread; the next question may not.
            mx.eval([c.state for c in caches])
            self.caches, self.tail, self.space = caches, Tail(), ""
            self.note_ids([*ids, *said])
            self.turn = "answered" if finish == "stop" else "cut"

    async def stream(self, question: str, **options: Any) -> AsyncIterator[str]:
        """As ask, for asynchronous code: the event loop stays free.

        >>> async def answer(question):
        ...     return "".join([text async for text in session.stream(question, max_tokens=4)])
        """
        loop = asyncio.get_running_loop()
        answer = self.ask(question, **options)
        with ThreadPoolExecutor(max_workers=1) as worker:
            try:
                while (text := await loop.run_in_executor(worker, next, answer, None)) is not None:
                    yield text
            finally:
                await loop.run_in_executor(worker, answer.close)  # type: ignore[attr-defined]
                await loop.run_in_executor(worker, mx.clear_streams)

    def fork(self) -> "Session":
        """Another session with the same past. It costs nothing until one of them goes on.

        >>> fork = session.fork()
        >>> fork.read("It was the worst of times.")
        >>> fork.tokens > session.tokens
        True
        """
        other = copy.copy(self)
        other.caches = fork(self.caches)
        other._answering = False
        return other

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write all of it to one file, by a temporary name. facts: more to write down, as JSON.

        >>> session.save("book.ahn")

        Raises AHNError if that cannot be, would replace what is no memory, or could not be
        loaded again, which holds for numbers that are not finite.
        """
        self._check()
        window, sinks = self.model.ahn.window, self.model.ahn.sinks
        identity = {**self.origin, **model_identity(self.model)}
        known = {
            "model": identity,
            "tokenizer": memoryfile.tokenizer_identity(self.tokenizer),
            "memory": self.model.ahn.memory,
            "base": memoryfile.base_facts(self.model),
            "tokens": self.tokens,
            "window": window,
            "sinks": sinks,
            "step": self.step,
            "turn": self.turn,
            "chat": self.template is not None,
            "system": self.template.system if self.template else "",
            "preview": self.preview,
            "texts": self.texts,
            "saved": int(time.time()),
            **({"earlier": self.earlier} if self.earlier else {}),
            **({"space": self.space} if self.space else {}),
        }
        held = self.caches, self.tail, self.seen
        memoryfile.save(Path(path), self.model, *held, {**known, **facts})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: TokenizerWrapper) -> "Session":
        """Go on where a saved session was. Raises AHNError if the file is damaged or of
        another model, tokenizer, window or version.

        >>> session.save("book.ahn")
        >>> again = ahn_mlx.Session.load("book.ahn", model, tokenizer)
        >>> again.tokens == session.tokens
        True
        """
        caches, tail, seen, facts = memoryfile.load(Path(path), model, tokenizer)
        session = cls(
            model,
            tokenizer,
            origin=_origin_of(model) or {k: v for k, v in facts["model"].items() if k in ORIGIN},
            system=facts["system"],
            step=facts["step"],
            chat=facts["chat"],
        )
        session.caches, session.tail, session.seen = caches, tail, seen
        session.preview, session.turn = facts["preview"], facts["turn"]
        session.texts, session.earlier = facts.get("texts", []), facts.get("earlier", 0)
        session.space = facts.get("space", "")
        if tail.ids and not tail.before:  # a file of version 1
            session.tail = Tail()
            session.read_ids(list(tail.ids))
        return session

    def note_ids(self, ids: list[int]) -> None:
        """Count tokens as read, for a penalty over all that was; whoever feeds the caches
        otherwise than by read_ids and ask says so here."""
        self.seen = None if self.seen is None else note(self.seen, ids)

    def _check(self) -> None:
        if not self._whole:
            raise AHNError("the session was interrupted inside of a step; load or make another")
        if self._answering:
            raise AHNError(
                "the session is answering; take its answer to the end, close it, or fork first"
            )

    def _question(self, question: str) -> list[int]:
        """Token ids from here to where the answer begins."""
        if self.template:
            first, said, *rest = self.template.question(self.turn, question)
            if self.turn == "read" and said:
                said = self.space + said
            return self.encoder(first, said, *rest)
        return [*self._begin(), *self.encoder("", question)] if question else []

    def _begin(self) -> list[int]:
        """What the tokenizer puts before a text; a chat template says it by itself."""
        return self.encoder.begin if self.turn == "start" and not self.template else []


def _origin_of(model: nn.Module) -> dict[str, Any]:
    return {k: getattr(model.origin, k) for k in ORIGIN} if hasattr(model, "origin") else {}


def _listed(name: str) -> str:
    """A file's name need not be text, and a file may come from anyone."""
    return "".join(c if c.isprintable() else " " for c in readable(name))[:NAME]


def _absolute(name: str) -> str:
    """What finds a model from any directory: a directory's whole path; other names as they are."""
    return os.path.abspath(name) if name not in ZOO and os.path.isdir(name) else name
