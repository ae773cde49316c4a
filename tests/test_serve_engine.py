"""The engine: whoever else is answered, an answer is the same; and no request ends the thread."""

import queue
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import mlx.core as mx
import pytest
from checkpoints import chat_tokenizer, talking_model
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ahn_mlx import AHNConfig, AHNError, augment, load_model
from ahn_mlx.reading.sampling import Cutter, Sampling
from ahn_mlx.reading.session import Session
from ahn_mlx.serve import answers
from ahn_mlx.serve import engine as engine_module
from ahn_mlx.serve.answers import Done, Failed, Piece, Request
from ahn_mlx.serve.budget import row_bytes
from ahn_mlx.serve.engine import Engine, fresh
from ahn_mlx.serve.metrics import Metrics
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.sampling import Sampler, Wish

# Within the window, just full, far beyond it; and one token alone.
PROMPTS = [[(7 * i + n) % 256 for i in range(n)] for n in (5, 1, 31, 70, 12, 200)]


def load(variant, path):
    path = talking_model(variant, path)
    return load_model(path, dtype="float32")[0], load_tokenizer(path)


def small(engine, **options):
    session = fresh(engine, options.get("bits"), options.get("group", 64))
    session.step = 16
    return session


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load("qwen2-gdn", tmp_path_factory.mktemp("serve"))


@contextmanager
def running(*loaded, rows):
    engine = Engine(*loaded, rows=rows)
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def engine(loaded):
    with running(*loaded, rows=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(engine):
    return small(engine)


WISHES = ("bias", "presence", "frequency", "top_logprobs")


def wish(**options):
    own = {k: options.pop(k) for k in WISHES if k in options}
    return Wish(Sampling(**{"max_tokens": 24, **options}), **own)


def start(engine, base, ids, n=1, **options):
    told: queue.SimpleQueue = queue.SimpleQueue()
    request = Request(base, ids, wish(**options), told.put, n)
    engine.reserve(n)
    engine.submit(request)
    return request, told


def finish(told, n=1):
    """Tokens of each answer, and how each ended."""
    tokens, done = [[] for _ in range(n)], {}
    while len(done) < n:
        event = told.get(timeout=60)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Piece) and event.token:
            tokens[event.choice].append((event.token.id, event.token.logprob))
        if isinstance(event, Done):
            done[event.choice] = event
    return tokens, done


def alone(model, ids, n):
    """Greedy tokens by the caches of one row and nothing of the server."""
    caches, found = model.make_cache(), []
    for start in range(0, len(ids) - 1, 16):
        model(mx.array([ids[start : min(start + 16, len(ids) - 1)]]), cache=caches)
    token = ids[-1]
    for _ in range(n):
        token = mx.argmax(model(mx.array([[token]]), cache=caches)[0, -1]).item()
        found.append(token)
    return found


def check_company(engine, base, model, prompts):
    options = {"top_logprobs": 0, "max_tokens": 24}
    one_by_one = []
    for ids in prompts:
        tokens, _ = finish(start(engine, base, ids, **options)[1])
        one_by_one.append(tokens[0])
        assert [t for t, _ in tokens[0]] == alone(model, ids, 24)
    waiting, running, together = list(enumerate(prompts)), {}, {}
    while waiting or running:
        try:
            i, ids = waiting[-1]
            running[i] = start(engine, base, ids, **options)[1]
            waiting.pop()
        except (APIError, IndexError):  # all rows are busy, or all have begun
            i, told = running.popitem()
            together[i] = finish(told)[0][0]
    # The very same numbers, not only the same tokens.
    assert [together[i] for i in range(len(prompts))] == one_by_one


def test_answers_are_the_same_alone_and_in_company(engine, base, loaded):
    check_company(engine, base, loaded[0], PROMPTS)


def made(memory, hidden=64, heads=2, tied=True, **options):
    """A model of random parameters whose memory is heard."""
    args = llama.ModelArgs("llama", hidden, 2, hidden, heads, rms_norm_eps=1e-5, vocab_size=256)
    args.tie_word_embeddings = tied
    mx.random.seed(0)
    model = augment(llama.Model(args), AHNConfig(memory, 12, 4, "clamped", **options))
    for layer in model.layers:
        projection = layer.self_attn.ahn.o_proj
        projection.weight = mx.random.normal(projection.weight.shape)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(
    "memory, options",
    [
        ("deltanet", {}),
        ("mamba2", {}),
        ("gated_deltanet", {"router": True}),
        ("gated_deltanet", {"query_projection": True}),
    ],
)
def test_every_memory_answers_the_same_in_company(memory, options):
    model = made(memory, **options)
    with running(model, chat_tokenizer(), rows=3) as engine:
        check_company(engine, small(engine), model, PROMPTS[1:4])


def test_a_wide_model_answers_the_same_in_company():
    """Of products this large a BLAS computes other last bits for one row than for four."""
    model = made("gated_deltanet", hidden=576, heads=9)
    with running(model, chat_tokenizer(), rows=4) as engine:
        check_company(engine, small(engine), model, PROMPTS[:4])


def test_seeds_repeat_whatever_else_runs(engine, base):
    drawn = {"temp": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 11}
    first, _ = finish(start(engine, base, PROMPTS[0], n=2, **drawn)[1], 2)
    other = start(engine, base, PROMPTS[3], temp=2.0, seed=5, max_tokens=40)[1]
    again, _ = finish(start(engine, base, PROMPTS[0], n=2, **drawn)[1], 2)
    finish(other)
    assert first == again
    assert first[0] != first[1]
    assert finish(start(engine, base, PROMPTS[0], n=2, **{**drawn, "seed": 12})[1], 2)[0] != first


def test_a_session_that_was_answered_goes_on_as_one_that_was_not_in_a_pool(engine, base, loaded):
    ids, more = PROMPTS[3], PROMPTS[2]
    tokens, done = finish(start(engine, base, ids)[1])
    answer = [t for t, _ in tokens[0]]
    after = done[0].session
    assert after.tokens == len(ids) + 23 and done[0].last == answer[-1]
    again, _ = finish(start(engine, after, [answer[-1], *more])[1])
    caches = loaded[0].make_cache()
    # In the steps in which it was read.
    for part in (ids[:16], ids[16:32], ids[32:48], ids[48:64], ids[64:69]):
        loaded[0](mx.array([part]), cache=caches)
    for token in (ids[-1], *answer[:-1]):
        loaded[0](mx.array([[token]]), cache=caches)
    waiting, found = [answer[-1], *more], []
    for part in (waiting[:16], waiting[16:-1]):
        loaded[0](mx.array([part]), cache=caches)
    token = waiting[-1]
    for _ in range(24):
        token = mx.argmax(loaded[0](mx.array([[token]]), cache=caches)[0, -1]).item()
        found.append(token)
    assert [t for t, _ in again[0]] == found


def wait_until(true):
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


def cancel(engine, *requests):
    for request in requests:
        request.cancelled = True
    engine.wake()


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
    *[(answers, name) for name in ("check_ids", "Sampler", "Cutter", "give_back", "Answer")],
    *[(answers.Answer, name) for name in ("choose", "take", "_end")],
    *[(answers.Reading, name) for name in ("advance", "_answer")],
    *[(engine_module, name) for name in ("Reading", "prepare", "together")],
    *[(Engine, name) for name in ("_step", "_choose", "_obey", "_drop_cancelled", "answer")],
    *[(Metrics, name) for name in ("count", "time")],
    *[(Sampler, name) for name in ("__call__", "took")],
    (Cutter, "add"),
    (Session, "fork"),
]


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
            # Not one client waits for ever, be it told of the fault or not.
            for (_, told), n in zip(started, (1, 2), strict=True):
                try:
                    finish(told, n)
                except APIError as e:
                    assert (e.status, error.__name__ in str(e)) == (500, True), name
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


def test_penalties_and_bias(engine, base):
    plain, _ = finish(start(engine, base, PROMPTS[0])[1])
    token = plain[0][0][0]
    banned, _ = finish(start(engine, base, PROMPTS[0], bias={token: -1e9})[1])
    assert token not in [t for t, _ in banned[0]]
    forced, _ = finish(start(engine, base, PROMPTS[0], bias={9: 1e9})[1])
    assert {t for t, _ in forced[0]} == {9}
    varied, _ = finish(start(engine, base, PROMPTS[0], frequency=1e6)[1])
    assert len({t for t, _ in varied[0]}) == 24


def test_logprobs_are_those_of_the_model(engine, base, loaded):
    told = start(engine, base, PROMPTS[0], top_logprobs=3, max_tokens=1)[1]
    event = told.get(timeout=30)
    while not isinstance(event, Piece):
        event = told.get(timeout=30)
    logits = loaded[0](mx.array([PROMPTS[0]]))[0, -1]
    expected = mx.log(mx.softmax(logits)).tolist()
    best = sorted(range(len(expected)), key=lambda i: -expected[i])[:3]
    assert [i for i, _ in event.token.top] == best
    for i, value in event.token.top:
        assert value == pytest.approx(expected[i], abs=1e-4)


def test_a_model_whose_rows_would_grow_is_refused():
    args = llama.ModelArgs("llama", 64, 3, 64, 2, rms_norm_eps=1e-5, vocab_size=256)
    model = augment(llama.Model(args), AHNConfig("deltanet", 12, 4, fa_layer_ids=(1,)))
    with (
        running(model, chat_tokenizer(), rows=1) as engine,
        pytest.raises(AHNError, match="layers 1 keep full attention"),
    ):
        fresh(engine, None, 64)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_windows_step_beside_others(bits):
    with running(made("gated_deltanet"), chat_tokenizer(), rows=3) as engine:
        whole, few = (small(engine, bits=b, group=32) for b in (None, bits))
        expected = finish(start(engine, few, PROMPTS[3])[1])[0]
        beside = start(engine, whole, PROMPTS[2])[1]
        assert finish(start(engine, few, PROMPTS[3])[1])[0] == expected
        finish(beside)


def test_nothing_grows(engine, base):
    def held() -> int:
        mx.clear_cache()
        return mx.get_active_memory()

    for ids in PROMPTS:
        finish(start(engine, base, ids)[1])
    before = engine.call(held).result()
    for n in range(12):
        finish(start(engine, base, PROMPTS[n % len(PROMPTS)], temp=1.0 + n / 100)[1])
    assert engine.call(held).result() <= before + 4096


def test_rows_hold_what_is_said_of_them():
    """Weights, rows, and nothing that a chunk needed."""
    model = made("gated_deltanet")
    with running(model, chat_tokenizer(), rows=4) as engine:
        session = small(engine)
        row = row_bytes(engine, session)
        requests = []

        def held() -> int:
            mx.clear_cache()
            return mx.get_active_memory()

        before = engine.call(held).result()
        for ids in PROMPTS[2:]:
            requests.append(start(engine, session, ids, max_tokens=100_000)[0])
        for ended in (False, True):
            if ended:
                cancel(engine, *requests)
            wait_until(lambda: engine.reading == 0)
            time.sleep(0.5)
            assert engine.call(held).result() <= before + 4 * row * 1.02 + 16384
