"""The engine: whoever else is answered, an answer is the same."""

import gc
import threading
import time

import mlx.core as mx
import pytest
from checkpoints import chat_tokenizer, talking_model
from engines import PROMPTS, cancel, finish, made, running, small, start
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load as load_tokenizer
from serving import wait_until
from test_ranks_rules import Board, Group, wire  # noqa: F401, a fixture

from ahn_mlx import AHNConfig, AHNError, augment, load_model
from ahn_mlx.model.ranks import Ranks
from ahn_mlx.serve.acts import Acts
from ahn_mlx.serve.answers import Piece
from ahn_mlx.serve.budget import row_bytes
from ahn_mlx.serve.build import build
from ahn_mlx.serve.engine import fresh
from ahn_mlx.serve.parameters import APIError


def load(variant, path):
    path = talking_model(variant, path)
    return load_model(path, dtype="float32")[0], load_tokenizer(path)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load("qwen2-gdn", tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def engine(loaded):
    with running(*loaded, rows=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(engine):
    return small(engine)


def alone(model, ids, n):
    """Greedy tokens by the caches of one row and nothing of the server."""
    caches, found = model.make_cache(), []
    for at in range(0, len(ids) - 1, 16):
        model(mx.array([ids[at : min(at + 16, len(ids) - 1)]]), cache=caches)
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


@pytest.mark.parametrize(
    "memory, options",
    [
        ("deltanet", {}),
        ("mamba2", {}),
        ("gated_deltanet", {"router": True, "window_gain": True}),
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


def test_answers_of_several_have_numbers_and_seeds_that_follow_each_other(engine, base):
    drawn = {"temp": 1.5, "max_tokens": 6}
    told = start(engine, base, PROMPTS[0], n=3, first=4, seed=2**64 - 2, **drawn)[1]
    found, done = finish(told, 3, 4)
    assert done.keys() == {4, 5, 6}
    for seed, tokens in zip((2**64 - 2, 2**64 - 1, 0), found, strict=True):
        assert finish(start(engine, base, PROMPTS[0], seed=seed, **drawn)[1])[0] == [tokens]


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


def test_a_server_that_cannot_be_leaves_no_thread():
    threads = threading.active_count()
    with pytest.raises(AHNError, match="do not fit in"):
        build(made("deltanet"), chat_tokenizer(), name="tiny", rows=10**9)
    assert threading.active_count() == threads


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

        def full() -> int:
            read = session.fork()
            for n in range(2 * read.caches[0].capacity):
                model(mx.array([[n]]), cache=read.caches)
                mx.eval([c.state for c in read.caches])
            return sum(c.nbytes for c in read.caches)

        assert row == engine.call(full).result()

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


class Two:
    """Ranks of which the other says what it is told to, of each act: whether it has failed."""

    size, rank = 2, 0

    def __init__(self, failed: int):
        self.failed = failed

    def share(self, value):
        return value()

    def sum(self, mine):
        return mine + mx.array([1, self.failed, 0])


@pytest.mark.parametrize("failed", [0, 1])
def test_ranks_that_part_do_nothing_more(loaded, tmp_path, failed):
    """One has failed, the other has not: what they hold is no longer alike."""
    acts = Acts(*loaded, rows=1)
    acts.ranks = Two(failed)
    if failed:  # both have
        for _ in range(2):
            with pytest.raises(AHNError, match="no such file"):
                acts.load(tmp_path / "none.ahn")
        assert acts.broken is None
        return
    for _ in range(2):
        with pytest.raises(APIError, match="lost one of its machines"):
            acts.load(tmp_path / "none.ahn")
    assert acts.broken is not None


def test_ranks_do_alike_what_the_first_does(tmp_path):
    board, three = Board(2), []
    for _ in range(3):
        three.append(Acts(made("gated_deltanet"), chat_tokenizer(), rows=2))
    alone, first, other = three
    first.ranks, other.ranks = (Ranks(Group(rank, board)) for rank in range(2))
    ended = []

    def follow():
        try:
            ended.append(other.follow())
        except BaseException as e:
            ended.append(e)
            board.barrier.abort()

    def work(acts):
        session = acts.make("", False, 16, None, 64)
        acts.read(session, PROMPTS[3])
        fork, empty = acts.begin(session), acts.begin(acts.make("", False, 8, 4, 32))
        acts.prefill(fork, PROMPTS[2])
        said = [acts.first(empty, 7), acts.step([fork, empty], [5, 9])]
        acts.leave(fork)
        said.append(acts.step([empty], [3]))
        acts.leave(empty)
        acts.clear()
        again = acts.fork(fork)
        said.append(acts.step([again], [5]))
        acts.leave(again)
        return (session, fork, empty, again), [x.tolist() for x in said]

    def held(session):
        return [x.tolist() for c in session.caches for x in (*c.buffers, c.memory) if x is not None]

    thread = threading.Thread(target=follow)
    thread.start()
    ours, theirs = work(first), work(alone)
    assert ours[1] == theirs[1]
    for mine, one in zip(ours[0], theirs[0], strict=True):
        assert held(mine) == held(other._held[first._number[mine]]) == held(one)
    with pytest.raises(AHNError, match="no such file"):
        first.load(tmp_path / "none.ahn")
    numbers = {first._number[session] for session in ours[0]}
    assert numbers <= other._held.keys()
    del ours, mine
    gc.collect()
    assert not first.pressed and other._held
    other.press()
    first.beat()
    assert first.pressed and not numbers & other._held.keys()
    first.end()
    thread.join(20)
    assert ended == [None] and first.broken is other.broken is None
