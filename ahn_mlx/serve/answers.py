"""A request on its way: its prompt is read in chunks, then each of its answers has a row."""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..reading.sampling import Cutter
from ..reading.session import Session
from ..reading.tokens import check_ids
from .acts import Acts
from .metrics import Metrics
from .parameters import APIError
from .sampling import Chosen, Sampler, Wish


class Host(Protocol):
    """What an answer needs of the engine."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    metrics: Metrics
    acts: Acts

    def release(self, n: int = 1) -> None:
        """Give rows back."""

    def answer(self, answers: "Sequence[Answer]") -> None:
        """Take these into the next step."""

    def leave(self, session: Session) -> None:
        """Have a session again that answered."""

    def take(self, answers: "Sequence[Answer]", logits: mx.array) -> None:
        """Choose and deliver a token of each; logits [n, V]."""


class Read(NamedTuple):
    """So many of so many prompt tokens have been read."""

    tokens: int
    total: int


class Token(NamedTuple):
    """logprob and top are there if they were asked for; top: (token, log probability)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """More text of an answer, perhaps none yet, and the token that brought it."""

    choice: int
    text: str
    token: Token | None


class Done(NamedTuple):
    """An answer ended. reason: "stop", "length" or "cancelled". stop: the string that ended it.
    session: where it stands, but for `last`, which it has not read; ended: text of the token that
    ended it."""

    choice: int
    reason: str
    tokens: int
    session: Session
    last: int
    ended: str
    stop: str | None


class Failed(NamedTuple):
    """Nothing more comes."""

    error: APIError


Event = Read | Piece | Done | Failed


@dataclass
class Request:
    """session: what it goes on from, which stays as it is. ids: to be read first. n: answers,
    numbered from `first` on. tell: called in the engine's thread."""

    session: Session
    ids: list[int]
    wish: Wish
    tell: Callable[[Event], None]
    n: int = 1
    first: int = 0
    cancelled: bool = False
    began: float = field(default_factory=time.monotonic)

    def fail(self, error: BaseException) -> None:
        """Tell what went wrong, without words of the request."""
        if not isinstance(error, APIError):
            known = isinstance(error, AHNError)
            error = APIError(
                str(error) if known else f"the request failed ({type(error).__name__})",
                status=400 if known else 500,
            )
        self.tell(Failed(error))


class Reading:
    """A prompt that is being read. Raises AHNError for tokens that there are not."""

    def __init__(self, request: Request, engine: Host):
        self.request, self.engine = request, engine
        self.session = engine.acts.begin(request.session)
        self._waiting = list(request.ids)
        self._total = len(self._waiting)
        if not self._waiting:
            raise APIError("the prompt is empty")
        check_ids(self._waiting, engine.model)
        self.session.note_ids(self._waiting)

    @property
    def cancelled(self) -> bool:
        return self.request.cancelled

    @property
    def share(self) -> float:
        """What it reads next, as a part of a whole step."""
        return len(self._waiting[: self.session.step]) / self.session.step

    def advance(self) -> bool:
        """One step of the prompt, as the session reads, but for the last token."""
        n = min(self.session.step, len(self._waiting) - 1)
        if n:
            self.engine.acts.prefill(self.session, self._waiting[:n])
            del self._waiting[:n]
            self.engine.metrics.count("tokens_read_total", n)
            self.request.tell(Read(self._total - len(self._waiting), self._total))
        if len(self._waiting) > 1:
            return False
        self._answer()
        return True

    def _answer(self) -> None:
        request, engine = self.request, self.engine
        last = self._waiting[0]
        empty = self.session.caches[0].empty()
        logits = engine.acts.first(self.session, last) if empty else None
        seed = request.wish.sampling.seed
        seed = secrets.randbits(64) if seed is None else seed
        answers = []
        for i in range(request.n):
            session = self.session if i == request.n - 1 else engine.acts.fork(self.session)
            sampler = Sampler(request.wish, (seed + i) % 2**64, session.seen)
            answers.append(Answer(request, engine, session, request.first + i, last, sampler))
        if logits is not None:
            engine.take(answers, mx.repeat(logits, len(answers), axis=0))
        engine.answer(answers)

    def fail(self, error: BaseException) -> None:
        self.engine.release(self.request.n)
        self.request.fail(error)

    def end(self) -> None:
        self.fail(APIError("the request was cancelled", status=503, code="cancelled"))


class Answer:
    """One row. next: the token that goes into the next step."""

    def __init__(
        self,
        request: Request,
        engine: Host,
        session: Session,
        index: int,
        last: int,
        sampler: Sampler,
    ):
        self.request, self.engine, self.session = request, engine, session
        self.index, self.next, self.sampler = index, last, sampler
        self.ended = False
        self._said = 0
        self._cut = Cutter(request.wish.sampling.stop)
        self._detokenizer = engine.tokenizer.detokenizer

    def choose(self, likely: mx.array, logits: mx.array) -> Chosen:
        """likely: the token of the largest logit; logits: [V]."""
        return Chosen(likely) if self.sampler.plain else self.sampler(logits)

    def take(self, chosen: Chosen) -> None:
        """A token has come."""
        token = self.next = int(chosen.token.item())  # type: ignore[arg-type]
        self._said += 1
        self.session.note_ids([token])
        self.sampler.took(token)
        self.engine.metrics.count("tokens_generated_total")
        if self._said == 1:
            waited = time.monotonic() - self.request.began
            self.engine.metrics.time("first_token_seconds", waited)
        tokenizer = self.engine.tokenizer
        if token in tokenizer.eos_token_ids:
            self._end("stop", ended=tokenizer.decode([token]))
            return
        self._detokenizer.add_token(token)
        text = self._cut.add(self._detokenizer.last_segment)
        self.request.tell(Piece(self.index, text, _facts(token, chosen)))
        if self._cut.found:
            self._end("stop")
        elif self._said >= self.request.wish.sampling.max_tokens:
            self._end("length")

    def _end(self, reason: str, ended: str = "") -> None:
        """Say what was held back, and leave the row."""
        if not self._cut.found:
            with suppress(KeyError):  # half a character, and then a token of another kind
                self._detokenizer.finalize()
            text = self._cut.add(self._detokenizer.last_segment) + self._cut.rest()
            if text:
                self.request.tell(Piece(self.index, text, None))
        stop = self._cut.found
        self.engine.leave(self.session)
        self.session.turn = "answered" if ended else "cut"
        self.engine.metrics.count("answers_total", reason=reason)
        self.ended = True
        self.engine.release()
        self.request.tell(
            Done(
                self.index,
                "stop" if stop else reason,
                self._said,
                self.session,
                self.next,
                ended,
                self._cut.stop if stop else None,
            )
        )

    def cut(self) -> None:
        """End here: nobody listens any more, or the server ends."""
        if self.ended:
            return
        try:
            self._end("cancelled" if self.request.cancelled else "length")
        except BaseException as e:
            self.fail(e)

    def fail(self, error: BaseException) -> None:
        """Only this answer; but who asked for several gets none."""
        if not self.ended:
            self.ended = self.request.cancelled = True
            self.engine.release()
            self.request.fail(error)
            self.engine.metrics.count("answers_total", reason="failed")


def _facts(token: int, chosen: Chosen) -> Token:
    if chosen.logprob is None:
        return Token(token)
    top: tuple[tuple[int, float], ...] = ()
    if chosen.top is not None and chosen.top_logprobs is not None:
        ids: Any = chosen.top.tolist()
        top = tuple(zip(ids, chosen.top_logprobs.tolist(), strict=True))  # type: ignore[arg-type]
    return Token(token, float(chosen.logprob.item()), top)  # type: ignore[arg-type]
