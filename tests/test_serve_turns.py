"""Who has the engine's next turn; and that no request ends its thread, whatever fails."""

import time
from functools import partial
from itertools import pairwise

import mlx.core as mx
import pytest
from checkpoints import chat_tokenizer
from engines import PROMPTS, cancel, finish, made, running, small, start, wish
from serving import wait_until

from ahn_mlx.model.together import Together
from ahn_mlx.reading.sampling import Cutter
from ahn_mlx.reading.session import Session
from ahn_mlx.serve import answers
from ahn_mlx.serve import engine as engine_module
from ahn_mlx.serve.answers import Request
from ahn_mlx.serve.engine import Engine
from ahn_mlx.serve.metrics import Metrics
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.sampling import Sampler


@pytest.fixture(scope="module")
def engine():
    with running(made("gated_deltanet"), chat_tokenizer(), rows=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(engine):
    return small(engine)


def test_rows_that_are_busy_are_refused_at_once_and_a_cancelled_one_is_free(engine, base):
    running = [start(engine, base, PROMPTS[2], max_tokens=100_000)[0] for _ in range(4)]
    with pytest.raises(APIError, match="busy") as e:
        engine.reserve(1)
    assert (e.value.status, e.value.after) == (429, 1)
    cancel(engine, running[0])
    wait_until(lambda: engine.free == 1)
    finish(start(engine, base, PROMPTS[0])[1])
    cancel(engine, *running[1:])
    wait_until(lambda: engine.free == 4)


def test_a_long_prompt_delays_a_row_by_one_chunk_at_most(engine, base):
    order: list[str] = []

    def submit(name, ids):
        sampling = wish(max_tokens=100_000)
        request = Request(base, ids, sampling, lambda e: order.append(f"{name}{type(e).__name__}"))
        engine.reserve(1)
        engine.submit(request)
        return request

    row = submit("row", PROMPTS[0])
    wait_until(lambda: "rowPiece" in order)
    prompt = submit("long", PROMPTS[5])  # 13 steps of 16 tokens
    wait_until(lambda: "longPiece" in order)
    cancel(engine, row, prompt)
    wait_until(lambda: engine.free == 4)
    reads = [i for i, name in enumerate(order) if name == "longRead"]
    assert len(reads) == 13
    assert all("rowPiece" in order[a:b] for a, b in pairwise(reads))


def test_two_prompts_are_read_by_turns(engine, base):
    order: list[str] = []
    requests = []
    for name in "ab":
        sampling = wish(max_tokens=1)
        tell = lambda e, name=name: order.append(name)  # noqa: E731
        requests.append(Request(base, PROMPTS[5], sampling, tell))
        engine.reserve(1)
    # In one turn of the engine.
    engine.call(lambda: [engine.submit(r) for r in requests]).result()
    wait_until(lambda: engine.free == 4)
    assert "".join(order).startswith("abababab")


def test_short_prompts_share_a_chunk(engine, base):
    order: list[str] = []

    def arrive():
        for name, n in (("a", 5), ("b", 11), ("c", 2), ("d", 20)):
            engine.reserve(1)
            tell = lambda e, name=name: order.append(f"{name}{type(e).__name__}")  # noqa: E731
            engine.submit(Request(base, PROMPTS[5][:n], wish(max_tokens=1), tell))

    engine.call(arrive).result()
    wait_until(lambda: engine.free == 4)
    # 16 tokens of a and b at a time, and then a step for them.
    assert order[:3] == ["aRead", "bRead", "aPiece"]
    assert order.index("cRead") < order.index("dRead") and order.count("dRead") == 2


class Document:
    """What is read in the background: it notes its chunks, which take a while."""

    cancelled = False

    def __init__(self, order, seconds=0.0, chunks=3):
        self.order, self.seconds, self.left = order, seconds, chunks

    def advance(self):
        time.sleep(self.seconds)
        self.order.append("document")
        self.left -= 1
        return self.left == 0

    def fail(self, error):
        self.order.append(type(error).__name__)

    def end(self):
        self.order.append("end")


def test_prompts_come_before_documents(engine, base):
    order: list[str] = []

    def arrive():
        engine.add(Document(order))
        for name in "ab":
            engine.reserve(1)
            tell = lambda e, name=name: order.append(name)  # noqa: E731
            engine.submit(Request(base, PROMPTS[5], wish(max_tokens=1), tell))

    engine.call(arrive).result()
    wait_until(lambda: order.count("document") == 3)
    first = order.index("document")
    # Each says 13 chunks, a token and its end; the last ones while the document has its turn.
    assert min(order[:first].count(name) for name in "ab") >= 13


def test_a_document_leaves_half_of_the_time_to_answers(engine, base):
    order: list[str] = []
    tell = lambda e: order.append(type(e).__name__)  # noqa: E731
    engine.reserve(1)
    request = Request(base, PROMPTS[0], wish(max_tokens=100_000), tell)
    engine.submit(request)
    wait_until(lambda: "Piece" in order)
    engine.add(Document(order, seconds=0.5))
    wait_until(lambda: order.count("document") == 3)
    cancel(engine, request)
    wait_until(lambda: engine.free == 4)
    chunks = [i for i, name in enumerate(order) if name == "document"]
    assert all(order[a:b].count("Piece") > 2 for a, b in pairwise(chunks))


class Breaks(BaseException):
    """As a panic in a library: no Exception."""


class Times:
    """Fails at one call of many, and is itself again."""

    def __init__(self, real, at, error):
        self.real, self.left, self.error = real, at, error

    def __get__(self, instance, kind):
        return partial(self, instance)

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **options)


FAULTS = [
    *[(answers, name) for name in ("check_ids", "Sampler", "Cutter", "Answer")],
    *[(answers.Answer, name) for name in ("choose", "take", "_end")],
    *[(answers.Reading, name) for name in ("advance", "_answer")],
    *[(engine_module, name) for name in ("Reading",)],
    *[
        (Engine, name)
        for name in ("_step", "leave", "_choose", "_obey", "_drop_cancelled", "answer")
    ],
    *[(Metrics, name) for name in ("count", "time")],
    *[(Sampler, name) for name in ("__call__", "took")],
    (Cutter, "add"),
    *[(Together, name) for name in ("layers", "held", "leave")],
    (Session, "fork"),
]


MUST_BE_TOLD = ("choose", "take", "_step", "_choose", "layers", "leave")


def test_a_row_is_free_even_if_ending_fails(engine, base, monkeypatch):
    request, told = start(engine, base, PROMPTS[0], max_tokens=100_000)
    told.get(timeout=30)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "leave", Times(None, 1, Breaks()))
        cancel(engine, request)
        wait_until(lambda: engine.free == 4)


@pytest.mark.parametrize("at, error", [(1, RuntimeError), (2, Breaks), (7, MemoryError)])
def test_no_fault_ends_the_thread_or_loses_a_row(engine, base, monkeypatch, error, at):
    expected, _ = finish(start(engine, base, PROMPTS[0], max_tokens=5)[1])
    for where, name in FAULTS:
        fault = Times(getattr(where, name), at, error())
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fault)
            started = [
                start(engine, base, PROMPTS[i], n, temp=0.5, stop=("never",), max_tokens=5)
                for i, n in ((0, 1), (2, 2))
            ]
            # Not one client waits for ever, and none gets an answer of a step that failed.
            failed = 0
            for (_, told), n in zip(started, (1, 2), strict=True):
                try:
                    finish(told, n)
                except APIError as e:
                    assert (e.status, error.__name__ in str(e)) == (500, True), name
                    failed += 1
            assert failed or name not in MUST_BE_TOLD or fault.left > 0, name
        wait_until(lambda: engine.free == 4)
        assert finish(start(engine, base, PROMPTS[0], max_tokens=5)[1])[0] == expected, name
    assert engine.thread.is_alive() and not engine.stuck


def test_a_document_that_fails_and_one_that_is_cancelled(engine):
    order: list[str] = []
    bad, gone, good = (Document(order, chunks=n) for n in (1, 10**9, 1))
    bad.order = None  # so that it fails
    bad.fail = lambda error: order.append(type(error).__name__)
    gone.cancelled = True
    for document in (bad, gone, good):
        engine.add(document)
    wait_until(lambda: len(order) == 3)
    assert sorted(order) == ["AttributeError", "document", "end"]
    assert engine.reading == 0


def test_what_fails_is_told_and_the_thread_goes_on(engine, base):
    with pytest.raises(APIError, match="not among the model's"):
        finish(start(engine, base, [5, 1 << 30])[1])
    with pytest.raises(APIError, match="empty"):
        finish(start(engine, base, [])[1])

    def bad(*_):
        raise Breaks

    # Whoever listens is gone, and every word to it fails.
    engine.reserve(1)
    engine.submit(Request(base, [1, 2], wish(max_tokens=4), bad))
    with pytest.raises(Breaks):
        engine.call(bad).result(timeout=30)
    assert len(finish(start(engine, base, PROMPTS[2])[1])[0][0]) == 24
    wait_until(lambda: engine.free == 4)
    assert engine.thread.is_alive() and not engine.stuck


def test_numbers_that_are_not_finite_end_an_answer_and_no_other():
    model = made("gated_deltanet", tied=False)
    model.model.embed_tokens.weight[7] = float("nan")
    mx.eval(model.parameters())
    with running(model, chat_tokenizer(), rows=2) as engine:
        session = small(engine)
        beside = start(engine, session, [1, 2, 3], max_tokens=8, bias={9: 100})[1]
        for ids in ([7], [1, 7], [7] * 40):
            with pytest.raises(APIError, match="not finite") as e:
                finish(start(engine, session, ids)[1])
            assert e.value.status == 500
        assert [t for t, _ in finish(beside)[0][0]] == [9] * 8
        wait_until(lambda: engine.free == 2)
