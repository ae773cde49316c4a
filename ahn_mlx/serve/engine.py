"""The one thread that computes: commands, one token of every row, one chunk of prompts or else of
one document, and again. Whatever fails is told to the request it belongs to; the thread goes
on. What libraries raise is of any kind: a panic in one of them is no Exception.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..reading.session import Session
from .acts import Acts
from .answers import Answer, Reading, Request
from .metrics import Metrics
from .parameters import APIError
from .sampling import Chosen

log = logging.getLogger("ahn_mlx.serve")

STUCK = 120.0  # seconds without a turn before /health says so


class Reader(Protocol):
    """What reads something chunk by chunk."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""

    def advance(self) -> bool:
        """One chunk; whether it was the last."""

    def fail(self, error: BaseException) -> None:
        """It cannot go on."""

    def end(self) -> None:
        """It is cancelled, or the server ends."""


class Engine:
    """rows: answers at a time. Its methods may be called from any thread."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        rows: int,
        metrics: Metrics | None = None,
    ):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.metrics = metrics or Metrics()
        self.acts = Acts(model, tokenizer, rows)
        self.beat = time.monotonic()
        self._free, self._lock = rows, threading.Lock()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._prompts: deque[Reading] = deque()
        self._documents: deque[Reader] = deque()
        self._answers: list[Answer] = []
        self._answers_alone = 0.0  # until then: they have as much time as documents
        self._deadline: float | None = None  # when what still runs is cut
        self._stopping = self._ended = False
        self._last_step = 0.0
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    # From other threads

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return self._free

    @property
    def reading(self) -> int:
        return len(self._prompts) + len(self._documents)

    @property
    def stuck(self) -> bool:
        """Whether the thread has ended or no longer turns."""
        return not self.thread.is_alive() or time.monotonic() - self.beat > STUCK

    @property
    def over(self) -> bool:
        """Whether the server is to end: another rank was told to, or is gone."""
        return self.acts.pressed or self.acts.broken is not None

    def check_free(self, n: int) -> None:
        """Raise APIError, at once, if n rows are not free."""
        if n > self.rows:
            raise APIError(f"{n} answers at once, but this server has {self.rows} rows", param="n")
        if self._ended or self._deadline is not None:
            raise APIError("the server is stopping", status=503, code="stopping")
        if n > self._free:
            raise APIError(
                f"all {self.rows} rows are busy; try again later",
                status=429,
                code="rate_limit_exceeded",
                after=1,
            )

    def reserve(self, n: int) -> None:
        """Take n rows. Raises APIError as check_free."""
        with self._lock:
            self.check_free(n)
            self._free -= n

    def release(self, n: int = 1) -> None:
        """Give rows back."""
        with self._lock:
            self._free += n

    def submit(self, request: Request) -> None:
        """Answer a request that has its rows."""
        self._put(lambda: self._begin(request))

    def add(self, document: Reader) -> None:
        """Read something in the background: while no prompt waits, and half of the time at most
        while others are answered."""
        self._put(lambda: self._documents.append(document))

    def _put(self, command: Callable[[], None]) -> None:
        """Raises APIError once the thread has ended: what is put is obeyed."""
        with self._lock:
            if self._ended:
                raise APIError("the server is stopping", status=503, code="stopping")
            self._commands.put(command)

    def call(self, work: Callable[[], Any]) -> "Future[Any]":
        """Do what needs MLX between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as e:
                future.set_exception(e)

        try:
            self._put(run)
        except APIError as e:
            future.set_exception(e)
        return future

    def wake(self) -> None:
        """Something was cancelled."""
        self._commands.put(lambda: None)

    def drain(self, seconds: float) -> None:
        """Take nothing new; what still runs after so long is cut."""
        with self._lock:
            if self._deadline is None:
                self._deadline = time.monotonic() + seconds
        self.wake()

    def stop(self) -> None:
        """End the thread, after what it is doing; readers keep what they have read."""
        self.drain(0)
        self._stopping = True
        self.wake()
        self.thread.join()

    # In the thread

    def _run(self) -> None:
        try:
            while not self._stopping and self.acts.broken is None:
                self.beat = time.monotonic()
                self._guarded(self._turn)
        finally:
            with self._lock:
                self._ended = True
            # What came last is told, too, that there is no more.
            self._obey(wait=False)
            self._finish()
            self._guarded(self.acts.end)
            # MLX's own threads would outlive this one, and the process be aborted.
            mx.clear_streams()

    def _turn(self) -> None:
        self._obey()
        self._drop_cancelled()
        self._decode()
        self._read()

    def _obey(self, wait: bool = True) -> None:
        """All commands there are; if there is nothing else to do, wait for one."""
        idle = wait and not self._answers and not self.reading
        try:
            command = self._commands.get(timeout=1.0) if idle else self._commands.get_nowait()
            while True:
                self._guarded(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            if idle:
                self._guarded(self.acts.beat)

    def _finish(self) -> None:
        """Cut what runs."""
        for answer in self._answers:
            self._guarded(answer.cut)
        for reader in (*self._prompts, *self._documents):
            self._guarded(reader.end)
        self._answers, self._prompts, self._documents = [], deque(), deque()

    def _guarded(self, work: Callable[[], Any]) -> None:
        """What fails here is nobody's answer: others go on, or end."""
        try:
            work()
        except BaseException as e:
            if self.acts.broken is None:  # which is said once, when the server has ended
                log.error("%s in the engine", type(e).__name__)  # no words of a client's

    def _begin(self, request: Request) -> None:
        try:
            self._prompts.append(Reading(request, self))
        except BaseException as e:
            self.release(request.n)
            self._guarded(partial(request.fail, e))

    def _drop_cancelled(self) -> None:
        late = self._deadline is not None and time.monotonic() > self._deadline
        for answer in [a for a in self._answers if a.request.cancelled or late]:
            self._guarded(answer.cut)
            self._answers.remove(answer)
        for prompt in [p for p in self._prompts if p.cancelled or late]:
            self._guarded(prompt.end)
            self._prompts.remove(prompt)
        for document in [d for d in self._documents if d.cancelled or late]:
            self._guarded(document.end)
            self._documents.remove(document)

    def _read(self) -> None:
        """One chunk: of prompts, those first that wait longest, or of a document if none does."""
        began, room = time.monotonic(), 1.0
        if self._prompts:
            while self._prompts and (share := self._prompts[0].share) <= room:
                room -= share
                self._advance(self._prompts)
        elif self._documents and not (self._answers and began < self._answers_alone):
            self._advance(self._documents)
            ended = time.monotonic()
            self._answers_alone = ended + (ended - began)

    def _advance(self, readers: deque[Any]) -> None:
        reader = readers.popleft()
        try:
            if not reader.advance():
                readers.append(reader)
        except BaseException as e:
            self._guarded(partial(reader.fail, e))
            self._guarded(mx.clear_cache)

    def answer(self, answers: Sequence[Answer]) -> None:
        """What has been read is answered from the next step on."""
        self._answers += [a for a in answers if not a.ended]

    def _decode(self) -> None:
        """One token of each row."""
        if not self._answers:
            if self._last_step:
                self._guarded(self.acts.clear)
            self._last_step = 0.0
            return
        try:
            logits = self._step(self._answers)
        except BaseException as e:
            self._guarded(mx.clear_cache)
            self._guarded(self.acts.clear)
            self._fail(self._answers, e)
            self._answers = []
            return
        self.take(self._answers, logits)
        self._answers = [a for a in self._answers if not a.ended]
        self.metrics.count("steps_total")
        now = time.monotonic()
        if self._last_step:
            self.metrics.time("token_seconds", now - self._last_step)
        self._last_step = now

    def _step(self, answers: Sequence[Answer]) -> mx.array:
        """Logits [n, V]."""
        return self.acts.step([a.session for a in answers], [a.next for a in answers])

    def leave(self, session: Session) -> None:
        """A conversation has its caches again."""
        self.acts.leave(session)

    def take(self, answers: Sequence[Answer], logits: mx.array) -> None:
        """Choose and deliver a token of each. logits: [n, V]."""
        try:
            chosen = self._choose(answers, logits)
        except BaseException as e:
            self._fail(answers, e)
            return
        for answer, found in zip(answers, chosen, strict=True):
            if found is None:
                continue
            try:
                answer.take(found)
            except BaseException as e:
                self._fail([answer], e)

    def _choose(self, answers: Sequence[Answer], logits: mx.array) -> list[Chosen | None]:
        """A token of each; None for one that has failed."""
        likely, finite = mx.argmax(logits, axis=-1), mx.isfinite(mx.max(logits, axis=-1))
        chosen: list[Chosen | None] = []
        for i, answer in enumerate(answers):
            try:
                chosen.append(answer.choose(likely[i], logits[i]))
            except BaseException as e:
                self._fail([answer], e)
                chosen.append(None)
        mx.eval(chosen, finite)
        for i, answer in enumerate(answers):
            if chosen[i] is not None and not finite[i].item():
                said = "the model's numbers are not finite; try another --dtype"
                self._fail([answer], APIError(said, status=500))
                chosen[i] = None
        return chosen

    def _fail(self, answers: Sequence[Answer], error: BaseException) -> None:
        for answer in answers:
            self._guarded(partial(answer.fail, error))


def fresh(
    engine: Engine,
    kv_bits: int | None,
    group_size: int,
    step: int | None = None,
) -> Session:
    """A session that has read nothing. Raises AHNError for a model whose rows would grow."""
    if engine.model.ahn.fa_layer_ids:
        layers = ", ".join(map(str, engine.model.ahn.fa_layer_ids))
        raise AHNError(
            f"layers {layers} keep full attention (fa_layer_ids), whose cache grows; serve a"
            " model without"
        )
    make = lambda: engine.acts.make("", False, step, kv_bits, group_size)  # noqa: E731
    session: Session = engine.call(make).result()
    return session
