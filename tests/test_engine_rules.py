"""What the engine's thread does at its edges: full rows, deadlines, what is cancelled or fails."""

import queue
import threading
import time

import mlx.core as mx
import pytest
from checkpoints import chat_tokenizer
from engines import PROMPTS, cancel, finish, made, running, small, start
from serving import wait_until

from ahn_mlx.serve.answers import Done, Failed
from ahn_mlx.serve.engine import fresh
from ahn_mlx.serve.parameters import APIError

ENDLESS = {"max_tokens": 10**6}  # the model has no token that ends an answer


@pytest.fixture
def engine():
    with running(made("deltanet"), chat_tokenizer(), rows=3) as engine:
        yield engine


@pytest.fixture
def base(engine):
    return small(engine)


class Document:
    """Something that is read until it is told to end."""

    def __init__(self):
        self.cancelled, self.ended, self.steps = False, 0, 0

    def advance(self):
        self.steps += 1
        return False

    def fail(self, error):
        raise error

    def end(self):
        self.ended += 1


class Gate:
    """Keeps the thread where it is."""

    def __init__(self, engine):
        self.here, self._open = threading.Event(), threading.Event()
        engine.call(self._stay)
        assert self.here.wait(10)

    def _stay(self):
        self.here.set()
        assert self._open.wait(30)

    def open(self):
        self._open.set()


def refused(engine, n):
    with pytest.raises(APIError) as error:
        engine.reserve(n)
    return error.value


def events(told):
    """All that has been told so far."""
    return [told.get() for _ in range(told.qsize())]


def test_rows_are_reserved_to_the_last_one(engine):
    most = refused(engine, 4)
    assert (most.status, most.param) == (400, "n") and "has 3 rows" in most.message
    engine.reserve(3)
    busy = refused(engine, 1)
    assert (busy.status, busy.code, busy.after) == (429, "rate_limit_exceeded", 1)
    engine.release(2)
    assert engine.free == 2 and refused(engine, 3).status == 429
    engine.reserve(2)
    engine.release(3)


def test_an_engine_that_ends_takes_nothing_new_and_lets_the_rest_end(engine, base):
    _, told = start(engine, base, PROMPTS[0], max_tokens=120)
    engine.drain(60)
    engine.drain(0)  # the first counts
    stopping = refused(engine, 1)
    assert (stopping.status, stopping.code) == (503, "stopping")
    assert engine.thread.is_alive()
    assert finish(told)[1][0].tokens == 120


def test_what_still_runs_after_the_time_is_cut(engine, base):
    document = Document()
    engine.add(document)
    _, answer = start(engine, base, PROMPTS[0], **ENDLESS)
    prompt, told = start(engine, base, [1] * 400_000)
    wait_until(lambda: engine.metrics.value("tokens_generated_total") > 3)
    wait_until(lambda: engine.reading == 2)
    engine.drain(0)
    done = finish(answer)[1][0]
    assert (done.reason, prompt.cancelled) == ("length", False)
    wait_until(lambda: engine.free == 3 and engine.reading == 0)
    failed = next(e for e in events(told) if isinstance(e, Failed))
    assert failed.error.status == 503 and document.ended == 1
    assert engine.thread.is_alive() and not engine.stuck


def test_a_thread_that_does_not_turn_is_stuck(engine, monkeypatch):
    assert not engine.stuck
    monkeypatch.setattr("ahn_mlx.serve.engine.STUCK", 0.2)
    gate = Gate(engine)
    wait_until(lambda: engine.stuck)
    gate.open()
    engine.call(lambda: None).result(10)
    monkeypatch.setattr("ahn_mlx.serve.engine.STUCK", 120.0)
    assert not engine.stuck
    engine.stop()
    assert engine.stuck
    with pytest.raises(APIError, match="stopping"):
        engine.add(Document())
    with pytest.raises(APIError, match="stopping"):
        engine.call(lambda: 1).result(10)


def test_an_answer_of_one_token_is_no_step(engine, base):
    """The first token of all is drawn while the prompt is read."""
    _, told = start(engine, base, [7], max_tokens=1)
    _, other = start(engine, base, PROMPTS[0], max_tokens=40)
    assert finish(told)[1][0].tokens == 1
    finish(other)
    engine.call(lambda: None).result(10)
    assert engine.free == 3 and events(told) == []


def test_a_step_that_fails_ends_all_rows_once(engine, base, monkeypatch):
    expected = [finish(start(engine, base, ids)[1])[0] for ids in PROMPTS[2:4]]
    whole = engine.acts.step
    failures = []

    def step(rows, tokens):
        if len(rows) < 2 or failures:
            return whole(rows, tokens)
        failures.append(whole(rows, tokens))  # after the rows have moved together
        raise MemoryError

    gate = Gate(engine)
    both = [start(engine, base, ids, **ENDLESS)[1] for ids in PROMPTS[2:4]]
    monkeypatch.setattr(engine.acts, "step", step)
    gate.open()
    wait_until(lambda: engine.free == 3)
    engine.call(lambda: None).result(10)
    for told in both:
        *_, last = events(told)
        assert isinstance(last, Failed) and last.error.status == 500
    assert engine.acts._together.held() == []
    assert [finish(start(engine, base, ids)[1])[0] for ids in PROMPTS[2:4]] == expected
    assert engine.free == 3 and all(told.empty() for told in both)


def test_work_that_is_cancelled_is_not_done(engine):
    gate, done = Gate(engine), []
    future = engine.call(lambda: done.append(1))
    assert future.cancel()
    gate.open()
    engine.call(lambda: None).result(10)
    assert done == []


def test_what_is_asked_in_the_last_turn_is_done(engine):
    class Last(Document):
        def advance(self):
            engine._stopping = True
            self.future = engine.call(lambda: 7)
            return False

    last = Last()
    engine.add(last)
    engine.thread.join(10)
    assert last.future.result(10) == 7 and last.ended == 1


def test_an_engine_that_has_ended_waits_for_no_work(engine, monkeypatch):
    waits, get = [], queue.SimpleQueue.get

    class Commands(queue.SimpleQueue):
        def get(self, block=True, timeout=None):
            waits.append(engine._ended)
            return get(self, block, timeout)

    monkeypatch.setattr(engine, "_commands", Commands())
    engine.stop()
    assert not any(waits)


def test_an_engine_without_work_waits_for_some(engine, monkeypatch):
    turns, whole = [], engine._turn
    monkeypatch.setattr(engine, "_turn", lambda: (turns.append(1), whole()))
    engine.call(lambda: None).result(10)
    time.sleep(0.3)
    assert len(turns) < 5


def test_times_between_tokens_add_up_to_less_than_they_took(engine, base):
    begun = time.monotonic()
    for _ in range(2):
        finish(start(engine, base, PROMPTS[0], max_tokens=20)[1])
        time.sleep(0.2)  # between two answers is no time between two tokens
    engine.call(lambda: None).result(10)
    *_, count, total = engine.metrics._times["token_seconds"]
    assert count == 2 * 19 and 0 < total < time.monotonic() - begun - 0.2


def test_one_that_is_cancelled_ends_in_the_next_turn(engine, base):
    request, told = start(engine, base, PROMPTS[0], **ENDLESS)
    document = Document()
    engine.add(document)
    wait_until(lambda: document.steps > 2)
    document.cancelled = True
    cancel(engine, request)
    wait_until(lambda: engine.free == 3 and engine.reading == 0)
    done = next(e for e in events(told) if isinstance(e, Done))
    assert done.reason == "cancelled" and document.ended == 1
    steps = document.steps
    engine.call(lambda: mx.eval(mx.zeros(1))).result(10)
    assert document.steps == steps


def test_a_session_that_has_read_nothing_needs_no_chat_template() -> None:
    with running(made("deltanet"), chat_tokenizer(None), rows=1) as engine:
        session = fresh(engine, None, 64, step=16)
        assert (session.tokens, session.turn, session.step) == (0, "start", 16)


def test_an_engine_without_work_is_seen_to_live(engine) -> None:
    engine.call(int).result()  # and now it has nothing to do
    before = engine.beat
    wait_until(lambda: engine.beat > before + 0.5, 5)
    assert not engine.stuck


def test_what_an_act_has_read_is_computed(engine, tmp_path) -> None:
    acts, session = engine.acts, fresh(engine, None, 64, step=16)

    def left(*arrays) -> bool:
        """Whether something is still to be computed."""
        states = [x for c in session.caches for x in c.state if isinstance(x, mx.array)]
        mx.export_to_dot(str(tmp_path / "graph"), *arrays, *states)
        return "shape=rectangle" in (tmp_path / "graph").read_text()

    def work() -> list[bool]:
        found = [left(acts.first(session, 65))]
        acts.prefill(session, list(range(66, 90)))
        found.append(left())
        acts.read(session, list(range(60, 76)))
        found.append(left())
        found.append(left(acts.step([session], [65])))
        return found

    assert engine.call(work).result() == [False] * 4
    assert acts.end() is None  # where there are no other ranks nobody is told
