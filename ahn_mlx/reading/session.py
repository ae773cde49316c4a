"""A model that has read something and can be asked: read, ask, save, fork.

Tokens are read in steps of a fixed size counted from the start; what does not fill a
step waits. So a memory that is saved, loaded and continued is, bit for bit, the memory of
one that read all at once.
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
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..hub.zoo import ZOO
from ..model.cache import AHNCache
from ..model.trace import Trace
from . import memoryfile
from .generate import prefill_step
from .layout import MAX_STEP, PREVIEW, Cache, make_caches
from .template import Pieces, Template
from .text import readable
from .tokens import Encoder, check_ids


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
    zoo.load. system: system message, kept in the sinks.
    step: tokens read at a time. kv_bits, kv_group_size: as in AHNCache. chat: speak through
    the tokenizer's chat template; otherwise texts are continued as they are.

    Raises AHNError if there is no chat template that can be taken apart, and with `system`
    but without `chat`.
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
        self.origin = {**(origin or {}), "name": _absolute((origin or {}).get("name", ""))}
        if system and not chat:
            raise AHNError("--system needs the chat template; drop --no-chat-template")
        self.template = Template(tokenizer, system) if chat else None
        self.encoder = Encoder(tokenizer)
        self.step = prefill_step() if step is None else step
        if not 1 <= self.step <= MAX_STEP:
            raise AHNError(f"step must be from 1 to {MAX_STEP:,} tokens, not {self.step}")
        self.caches: list[Cache] = make_caches(model, kv_bits, kv_group_size)
        for layer, cache in zip(model.layers, self.caches, strict=True):
            if isinstance(cache, AHNCache):
                cache.trace = Trace.start(layer.self_attn.n_heads)
        self.pending: list[int] = []
        self.preview = ""
        # Where the conversation stands: "start", "read" (a message is open), "answered"
        # (the end of the answer has been read too) or "cut" (it has not).
        self.turn = "start"
        self._whole = True  # no layer is ahead of another
        self._answering = False  # what is read or asked meanwhile would be lost

    @property
    def tokens(self) -> int:
        """Tokens read and generated so far."""
        return self.caches[0].offset + len(self.pending)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(c.nbytes for c in self.caches)

    def read(self, text: str, progress: Callable[[int], None] = lambda read: None) -> None:
        """Read more of the user's message. progress: called with tokens read of this text."""
        self._check()
        self.read_ids(self.encode(text), progress)

    def opening(self) -> Pieces:
        """What the template puts before more text of the user, as pieces for the encoder.
        Raises TemplateError if it cannot be taken apart after an answer."""
        return self.template.opening(self.turn) if self.template else ("",)

    def encode(self, text: str, opening: Pieces | None = None) -> list[int]:
        """Token ids of a text that continues this conversation.

        opening: of the run that began to read it; what a template prints may be of its time.
        """
        opening = self.opening() if opening is None else opening
        if not self.preview:
            self.preview = " ".join(readable(text[: 2 * PREVIEW]).split())[:PREVIEW]
        if self.template and self.turn != "read":
            text = self.template.begin(text)
        begin, self.turn = self._begin(), "read"
        return [*begin, *self.encoder(*opening, text)]

    def read_ids(self, ids: list[int], progress: Callable[[int], None] = lambda read: None) -> None:
        """Read token ids, as many as fill steps; the rest waits.

        To stop, raise from `progress`, between steps: the session is then as after so many
        ids. After an exception inside of a step it cannot go on, and says so.
        """
        self._check()
        check_ids(ids, self.model)
        before = len(self.pending)
        waiting = [*self.pending, *ids]
        for start in range(0, len(waiting) - self.step + 1, self.step):
            self._whole = False
            self.model(mx.array([waiting[start : start + self.step]]), cache=self.caches)
            mx.eval([c.state for c in self.caches])
            mx.clear_cache()
            self._whole = True
            self.pending = []
            progress(start + self.step - before)
        self.pending = waiting[len(waiting) // self.step * self.step :]
        progress(len(ids))

    def ask(
        self,
        question: str,
        *,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        progress: Callable[[int, int], None] = lambda read, total: None,
    ) -> Iterator[str]:
        """Ask, and read the answer as it comes; question and answer become part of the memory.

        Closing the iterator ends the answer there. Any other exception before or in it
        leaves the session as it was. Raises AHNError if there is nothing to answer.
        """
        self._check()
        if not hasattr(_thread, "end"):
            _thread.end = _End()
        ids = [*self.pending, *self._question(question)]
        check_ids(ids, self.model)
        if not ids:
            raise AHNError("nothing to continue; read a text or ask a question first")
        caches = _fork(self.caches)
        finish, said = "", 0
        self._answering = True
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                ids,
                max_tokens=max_tokens,
                sampler=make_sampler(temp=temp, top_p=top_p),
                prompt_cache=caches,
                prefill_step_size=self.step,
                prompt_progress_callback=progress,
            ):
                finish, said = response.finish_reason or "", said + 1
                yield response.text
        except GeneratorExit:
            pass
        finally:
            self._answering = False
        if said:
            # What is left to compute belongs to this thread; the next question may not.
            mx.eval([c.state for c in caches])
            self.caches, self.pending = caches, []
            self.turn = "answered" if finish == "stop" else "cut"

    async def stream(self, question: str, **options: Any) -> AsyncIterator[str]:
        """As ask, for asynchronous code: the event loop stays free."""
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
        """Another session with the same past. It costs nothing until one of them goes on."""
        other = copy.copy(self)
        other.caches, other.pending = _fork(self.caches), list(self.pending)
        other._answering = False
        return other

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write all of it to one file, by a temporary name.

        Raises AHNError if that cannot be, would replace what is no memory, or could not be
        loaded again, which holds for numbers that are not finite.
        """
        self._check()
        window, sinks = self.model.ahn.window, self.model.ahn.sinks
        identity = {**self.origin, **memoryfile.model_identity(self.model)}
        known = {
            "model": identity,
            "tokenizer": memoryfile.tokenizer_identity(self.tokenizer),
            "tokens": self.tokens,
            "window": window,
            "sinks": sinks,
            "step": self.step,
            "turn": self.turn,
            "chat": self.template is not None,
            "system": self.template.system if self.template else "",
            "preview": self.preview,
            "saved": int(time.time()),
        }
        memoryfile.save(Path(path), self.model, self.caches, self.pending, {**known, **facts})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: TokenizerWrapper) -> "Session":
        """Go on where a saved session was. Raises AHNError if the file is damaged or of
        another model, tokenizer, window or version."""
        caches, pending, facts = memoryfile.load(Path(path), model, tokenizer)
        session = cls(
            model,
            tokenizer,
            origin={k: facts["model"].get(k) for k in ("name", "dtype", "q_bits", "ahn")},
            system=facts["system"],
            step=facts["step"],
            chat=facts["chat"],
        )
        session.caches, session.pending = caches, pending
        session.preview, session.turn = facts["preview"], facts["turn"]
        return session

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
            return self.encoder(*self.template.question(self.turn, question))
        return [*self._begin(), *self.encoder("", question)] if question else []

    def _begin(self) -> list[int]:
        """What the tokenizer puts before a text; a chat template says it by itself."""
        return self.encoder.begin if self.turn == "start" and not self.template else []


def _absolute(name: str) -> str:
    """What finds a model from any directory: a directory's whole path; other names as they are."""
    return os.path.abspath(name) if name not in ZOO and os.path.isdir(name) else name


def _fork(caches: list[Cache]) -> list[Cache]:
    """Caches of their own on the same arrays: MLX copies a buffer that two of them hold
    before one writes to it."""
    forks: list[Cache] = []
    for cache in caches:
        other = copy.copy(cache)
        if isinstance(other, KVCache) and not other.empty():
            # It assigns to slices, which changes the very array object.
            keys, values, offset = cache.state
            other.state = mx.array(keys), mx.array(values), offset
        forks.append(other)
    return forks
