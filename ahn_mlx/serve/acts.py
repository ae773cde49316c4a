"""All that is done with the model: what the engine's thread calls, and the other ranks do alike.

Rank 0 alone has clients, and decides. Before each act it tells the others its name, and what it is
done with; sessions have numbers, which all count alike. After it all say how it went, so that one
that has ended is missed before anyone is told anything.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary, finalize

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..model.augment import dtype_of
from ..model.ranks import Lost, Ranks
from ..model.together import Together
from ..reading.session import Session
from ..reading.tail import Tail
from .parameters import APIError

P = ParamSpec("P")
T = TypeVar("T")

END = ""  # the name of what comes last


def act(method: Callable[Concatenate["Acts", P], T]) -> Callable[Concatenate["Acts", P], T]:
    """Of a method: other ranks do it too. It takes sessions, paths and JSON, by position."""

    @wraps(method)
    def done(self: "Acts", /, *given: P.args, **named: P.kwargs) -> T:
        if self.ranks is None:
            return method(self, *given, **named)
        return self._alike(method.__name__, given, partial(method, self, *given, **named))

    done.__dict__["alone"] = method
    return done


class Acts:
    """rows: answers at a time. pressed: whether some rank was told to end. broken: what has parted
    the ranks, after which nothing is done any more."""

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, rows: int):
        self.model, self.tokenizer = model, tokenizer
        self.ranks: Ranks | None = model.ranks
        self.pressed = False
        self.broken: BaseException | None = None
        self._together = Together()
        # Products of float32 have a fixed shape: their last bits depend on it, and an answer
        # must not depend on who else is answered.
        self._width = rows if dtype_of(model) == mx.float32 else 0
        self._alone = bool(model.own_layers)
        self._count = 0
        self._number: WeakKeyDictionary[Session, int] = WeakKeyDictionary()
        self._gone: deque[int] = deque()  # sessions that rank 0 no longer has
        self._held: dict[int, Session] = {}  # by other ranks

    # What is done

    @act
    def make(
        self, system: str, chat: bool, step: int | None, kv_bits: int | None, group_size: int
    ) -> Session:
        """A session that has read nothing; as Session takes these."""
        return Session(
            self.model,
            self.tokenizer,
            system=system,
            step=step,
            kv_bits=kv_bits,
            kv_group_size=group_size,
            chat=chat,
        )

    @act
    def load(self, file: Path) -> Session:
        """That of a memory's file."""
        return Session.load(file, self.model, self.tokenizer)

    @act
    def save(self, session: Session, file: Path, facts: dict[str, Any]) -> None:
        """As Session.save."""
        session.save(file, **facts)

    @act
    def fork(self, session: Session) -> Session:
        """As Session.fork."""
        return session.fork()

    @act
    def begin(self, session: Session) -> Session:
        """A fork that is to be answered: what is read now stays, and nobody goes back before the
        tail."""
        fork = session.fork()
        fork.tail, fork.space = Tail(), ""
        return fork

    @act
    def read(self, session: Session, ids: list[int]) -> None:
        """As Session.read_ids."""
        session.read_ids(ids)

    @act
    def prefill(self, session: Session, ids: list[int]) -> None:
        """A part of a prompt, which leaves no tail."""
        self.model(mx.array([ids]), cache=session.caches)
        mx.eval([c.state for c in session.caches])
        mx.clear_cache()

    @act
    def first(self, session: Session, token: int) -> mx.array:
        """Logits [1, V] after the first token of all: a row has something to attend to."""
        logits: mx.array = self.model(mx.array([[token]]), cache=session.caches)[0, -1:]
        mx.eval(logits, [c.state for c in session.caches])
        return logits

    @act
    def step(self, rows: Sequence[Session], tokens: list[int]) -> mx.array:
        """Logits [n, V] of the tokens after these, one of each row."""
        if self._alone:
            return self._step_alone(rows, tokens)
        width = self._width or len(rows)
        order, layers = self._together.layers([session.caches for session in rows], width)
        ids = mx.array([[tokens[i]] for i in order] + [[0]] * (width - len(order)))
        logits: mx.array = self.model(ids, cache=layers)[:, -1]
        logits = logits[mx.argsort(mx.array(order))]
        mx.eval(logits, self._together.held())
        return logits

    def _step_alone(self, rows: Sequence[Session], tokens: list[int]) -> mx.array:
        """As step, where layers have caches that only mlx-lm knows: one row after the other."""
        said = [
            self.model(mx.array([[token]]), cache=session.caches)[0, -1:]
            for session, token in zip(rows, tokens, strict=True)
        ]
        logits = mx.concatenate(said)
        mx.eval(logits, [[c.state for c in session.caches] for session in rows])
        return logits

    @act
    def leave(self, session: Session) -> None:
        """A session that had a row has its caches again."""
        if not self._alone:
            self._together.leave(session.caches)

    @act
    def clear(self) -> None:
        """No session has a row any more."""
        self._together.clear()

    @act
    def beat(self) -> None:
        """Nothing, where nothing is to be done: but ranks that end are missed."""

    # Of several ranks

    def press(self, *_: Any) -> None:
        """This rank was told to end; rank 0 hears of it after the next act."""
        self.pressed = True

    def end(self) -> None:
        """Tell the others that nothing more comes."""
        if self.ranks is not None and self.broken is None:
            self.ranks.share(lambda: [END, [], []])

    def follow(self) -> None:
        """On another rank than 0: do what that one does, until it ends. Raises AHNError if it is
        not there any more."""
        assert self.ranks is not None
        while True:
            heard: Any = self.ranks.share(lambda: None)
            name, told, gone = heard
            for number in gone:
                del self._held[number]
            if name == END:
                return
            given = [self._given(kind, value) for kind, value in told]
            with suppress(AHNError, APIError, OSError):  # which rank 0 tells its client
                self._agreed(partial(getattr(type(self), name).alone, self, *given))
            if self.broken is not None:
                raise self.broken

    def _alike(self, name: str, given: Sequence[Any], work: Callable[[], T]) -> T:
        if self.broken is not None:
            raise _parted()
        assert self.ranks is not None
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        told = [self._told(value) for value in given]
        with self._unbroken():
            self.ranks.share(lambda: [name, told, gone])
        return self._agreed(work)

    def _agreed(self, work: Callable[[], T]) -> T:
        """What `work` makes, or the AHNError or OSError that it raises on all ranks."""
        failed: Exception | None = None
        with self._unbroken():
            try:
                made = work()
            except (AHNError, OSError) as e:
                failed = e
            self._check(failed is not None)
        try:
            if failed is not None:
                raise failed
        finally:
            failed = (
                None  # it holds this frame, and sessions would stay until they are searched for
            )
        if isinstance(made, Session):
            self._note(made)
        return made

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """Whatever fails here parts the ranks: what they say after that may wait for ever."""
        try:
            yield
        except BaseException as e:
            self.broken = e
            raise _parted() from None

    def _check(self, failed: bool) -> None:
        """Raise AHNError unless all ranks are there, and either all have failed or none."""
        assert self.ranks is not None
        said: Any = self.ranks.sum(mx.array([1, int(failed), int(self.pressed)])).tolist()
        there, failures, pressed = said
        if there != self.ranks.size or failures not in (0, there):
            raise Lost
        self.pressed = self.pressed or bool(pressed)

    def _note(self, session: Session) -> None:
        """Number a session that all have made."""
        number = self._count = self._count + 1
        if self.ranks is not None and self.ranks.rank:
            self._held[number] = session
            return
        self._number[session] = number
        finalize(session, self._gone.append, number)

    def _told(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, Session):
            return "session", self._number[value]
        if isinstance(value, list) and value and isinstance(value[0], Session):
            return "sessions", [self._number[session] for session in value]
        return ("file", str(value)) if isinstance(value, Path) else ("", value)

    def _given(self, kind: str, value: Any) -> Any:
        if kind == "session":
            return self._held[value]
        if kind == "sessions":
            return [self._held[number] for number in value]
        return Path(value) if kind == "file" else value


def _parted() -> APIError:
    """What clients are told."""
    return APIError("the server has lost one of its machines", status=503, code="stopping")
