"""What ranks do with a model and tell each other, all in one process: it carries what they say."""

import copy
import threading
from collections import deque
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import talking_model
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from several import random_model

from ahn_mlx import AHNConfig, AHNError, augment
from ahn_mlx.checkpoints.load import load_model
from ahn_mlx.model import pipeline
from ahn_mlx.model.division import heads_of_each, part_of, rows_of_each
from ahn_mlx.model.families import tiny_config
from ahn_mlx.model.pipeline import IN_FLIGHT, TOGETHER, Pipeline, entire, is_away, own_layers
from ahn_mlx.model.ranks import Lost, Ranks, _Embedding, _Head, _is_part, _numbers, join, share
from ahn_mlx.platform import LAUNCHED, launched_rank

IDS = [n * 7 % 90 for n in range(40)]


class Board:
    """What carries messages here, in the place of a network: one of each rank at a time."""

    def __init__(self, size):
        self.size, self.given, self.sent = size, [None] * size, deque()
        self.barrier = threading.Barrier(size, timeout=10)

    def all(self, rank, x):
        mx.eval(x)
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class Group:
    """Of one rank, as MLX's."""

    def __init__(self, rank, board):
        self.board, self.rank, self.size = board, lambda: rank, lambda: board.size


@pytest.fixture(autouse=True)
def wire(monkeypatch):
    """Groups of this file are no groups of MLX."""

    def all_sum(x, *, group, stream=None):
        first, *others = group.board.all(group.rank(), x)
        return sum(others, first)

    def all_gather(x, *, group, stream=None):
        return mx.concatenate(group.board.all(group.rank(), x))

    def send(x, to, *, group, stream):
        assert stream is pipeline._stream
        group.board.sent.append((group.rank(), to, x))
        return x

    def recv(shape, dtype, of, *, group, stream):
        assert stream is pipeline._stream
        came, to, x = group.board.sent.popleft()
        assert (came, to, x.shape, x.dtype) == (of, group.rank(), tuple(shape), dtype)
        return x

    for one in (all_sum, all_gather, send, recv):
        monkeypatch.setattr(mx.distributed, one.__name__, one)


def relay(size):
    """Called from the last to the first: what one sends waits for the next."""
    board = Board(size)
    return [Pipeline(Group(rank, board)) for rank in range(size)]


CASES = [
    *(("qwen3", 2, {}), ("qwen3", 3, {"fa_layer_ids": [1, 4]})),
    *(("helium", 2, {}), ("gemma3_text", 3, {}), ("qwen3_next", 2, {})),
]


@pytest.mark.parametrize(("family", "size", "ahn"), CASES)
def test_each_rank_has_a_run_of_layers_and_the_first_has_the_logits(family, size, ahn):
    settings = {"memory": "gated_deltanet", "window": 12, "sinks": 3, "sink_positions": "clamped"}
    config = {**tiny_config(family), "num_hidden_layers": 6, "ahn": {**settings, **ahn}}
    whole = random_model("", "", None, **config)
    parts = []
    for ranks in relay(size):
        parts.append(random_model("", "", None, **config))
        ranks.cut(parts[-1])
        assert parts[-1].ranks is ranks and ranks.parts(parts[-1]) == {}
    cached, caches = whole.make_cache(), [part.make_cache() for part in parts]
    for ids in (IDS[:9], IDS[9:31], IDS[31:32], IDS[32:]):
        wanted = whole(mx.array([ids]), cache=cached)
        for part, cache in reversed(list(zip(parts, caches, strict=True))):
            said = part(mx.array([ids]), cache=cache)
            assert (said.shape, said.dtype) == (wanted.shape, wanted.dtype)
            if part.ranks.rank:
                assert not said.any().item()
            assert len(part.ranks._sent) <= IN_FLIGHT
        assert mx.abs(said - wanted).max().item() < 1e-4 * mx.abs(wanted).max().item()
    every = {name for name, _ in tree_flatten(whole.parameters())}
    runs = [list(own_layers(part)) for part in parts]
    assert [i for run in reversed(runs) for i in run] == list(range(6)) == list(own_layers(whole))
    for part, run, cache in zip(parts, runs, caches, strict=True):
        held = {name for name, _ in tree_flatten(part.parameters())}
        first, last = run[0] == 0, run[-1] == 5
        tied = "lm_head.weight" not in every
        for name in every:
            there = not name.startswith("model.layers.") or int(name.split(".")[2]) in run
            if name.startswith("model.embed_tokens."):
                there = first or (tied and last)
            if name.startswith("lm_head."):
                there = last
            assert (name in held) == there, name
        away = [is_away(copy.copy(layer)) for layer in part.model.layers]
        assert away == [i not in run for i in range(6)]
        assert entire(part) is not part and entire(whole) is whole
        # Asked, a layer that is away says what it is.
        assert part.model.embed_tokens.weight.shape == whole.model.embed_tokens.weight.shape
        assert {name for name, _ in tree_flatten(entire(part).parameters())} == every
        for i, (ours, theirs) in enumerate(zip(cache, cached, strict=True)):
            if hasattr(theirs, "offset"):
                assert ours.offset == theirs.offset == 40
            if i not in run and isinstance(ours, KVCache):
                assert ours.keys.shape[1] == ours.keys.shape[3] == 1


def other(model, give):
    """A decoder whose layers are called otherwise."""

    class Other(type(model.model)):
        def __call__(self, ids, cache=None, input_embeddings=None):
            h = self.embed_tokens(ids)
            for layer, c in zip(self.layers, cache, strict=True):
                h = give(layer, h, c, self)
            return self.norm(h)

    model.model.__class__ = Other
    return model


def test_layers_that_are_not_one_after_the_other_are_refused():
    def made():
        args = llama.ModelArgs("llama", 32, 3, 32, 4, rms_norm_eps=1e-5, vocab_size=64)
        return augment(llama.Model(args), AHNConfig(window=8))

    first = relay(2)[0]
    one = other(made(), lambda layer, h, c, inner: layer(h, None, c))
    first.cut(one)
    assert own_layers(one) == range(1, 3)
    for give in (
        lambda layer, h, c, inner: layer(2 * h, None, c),
        lambda layer, h, c, inner: layer(h, mx.zeros((1, 1)), c),
        lambda layer, h, c, inner: layer(h, mask=mx.zeros((1, 1)), cache=c),
        lambda layer, h, c, inner: [layer(h, None, c)][0:1] and h,
    ):
        with pytest.raises(AHNError, match="layers of a llama model are not one after the other"):
            relay(2)[0].cut(other(made(), give))


def test_a_rank_stops_only_where_all_ask():
    def work(ranks):
        one = Pipeline(ranks.group)
        return [one.any(one.rank == 1 and n == 2) for n in range(2 * TOGETHER)]

    wanted = [n == TOGETHER - 1 for n in range(2 * TOGETHER)]
    assert each(2, work) == [wanted, wanted]


def run_of(layers, kept=()):
    return SimpleNamespace(run=layers, ahn=SimpleNamespace(fa_layer_ids=kept))


def test_arrays_of_a_file_go_to_the_ranks_that_have_their_layers():
    shape = (1, 2, 3, 4)
    arrays = {f"layers.{i}.keys": mx.full(shape, i) for i in range(12)}
    arrays["tail"] = mx.array([7.0])
    runs = (range(8, 12), range(2, 8), range(2))
    mx.eval(arrays)

    def divided(ranks):
        held = arrays if ranks.rank == 0 else {}
        return Pipeline(ranks.group).divided(held, run_of(runs[ranks.rank], (1, 10)))

    own = each(3, divided)
    for run, found in zip(runs, own, strict=True):
        here = {f"layers.{i}.keys" for i in run}
        counted = {f"layers.{i}.keys" for i in (1, 10)} - here
        assert found.keys() == here | counted | {"tail"}
        for name, x in found.items():
            assert x.shape == ((1, 1, 3, 1) if name in counted else arrays[name].shape)
            assert mx.array_equal(
                x, arrays[name][:, :1, :, :1] if name in counted else arrays[name]
            )
    gathered = lambda r: Pipeline(r.group).gathered(own[r.rank], run_of(runs[r.rank]))  # noqa: E731
    whole, *others = each(3, gathered)
    assert others == [{}, {}]
    assert whole.keys() == arrays.keys()
    assert all(mx.array_equal(x, arrays[name]) for name, x in whole.items())


def each(size, work):
    """What each rank makes, or the error that it raises."""
    board, found = Board(size), [None] * size

    def one(rank):
        try:
            found[rank] = work(Ranks(Group(rank, board)))
            mx.eval(found[rank])
        except BaseException as e:
            found[rank] = e
            if not isinstance(e, AHNError | OSError):
                board.barrier.abort()  # others would wait for it

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for e in found:
        if isinstance(e, Exception) and not isinstance(
            e, AHNError | OSError | threading.BrokenBarrierError
        ):
            raise e
    return found


@pytest.mark.parametrize("root", [0, 2])
def test_what_one_makes_all_have(root):
    made = {"a": (1, 2), "ä": None}
    found = each(3, lambda r: r.share(lambda: made if r.rank == root else 1 / 0, root))
    assert found == 3 * [{"a": [1, 2], "ä": None}]
    assert each(2, lambda r: r.share(lambda: "")) == ["", ""]
    assert share(None, lambda: (1,)) == (1,)
    assert each(2, lambda r: share(r, lambda: (1,))) == [[1], [1]]

    for kind in (AHNError, FileNotFoundError):

        def fail(kind=kind):
            raise kind("no such file: ü")

        found = each(3, lambda r, fail=fail: r.share(fail, root))
        assert [str(e) for e in found] == 3 * ["no such file: ü"]
        kinds = [kind if rank == root else AHNError for rank in range(3)]
        assert [type(e) for e in found] == kinds


def test_one_that_says_nonsense_is_lost(monkeypatch):
    monkeypatch.setattr(Ranks, "_send", lambda self, message, root: b"{")
    with pytest.raises(Lost, match="another rank has ended"):
        Ranks(Group(1, Board(1))).share(lambda: 1)


def test_arrays_are_told_bit_for_bit():
    odd = [0.0, -0.0, float("nan"), float("inf"), 1e-42]
    arrays = {str(dtype): mx.array(odd).astype(dtype) for dtype in (mx.float32, mx.bfloat16)}
    arrays |= {"n": mx.array([[1, -5]], dtype=mx.int8)}
    arrays |= {"u": mx.array([2**32 - 1], dtype=mx.uint32), "none": mx.zeros((0, 3))}
    mx.eval(arrays)  # threads have streams of their own

    def bits(x):
        return x.view(mx.uint8) if mx.issubdtype(x.dtype, mx.floating) and x.size else x

    for root in (0, 1):
        for found in each(
            2, lambda r, root=root: dict(r.spread(arrays if r.rank == root else {}, root))
        ):
            assert list(found) == list(arrays)
            for name, x in arrays.items():
                assert found[name].dtype == x.dtype
                assert mx.array_equal(bits(found[name]), bits(x)), name


def test_all_are_asked():
    assert each(3, lambda r: r.any(r.rank == 1)) == [True] * 3
    assert each(3, lambda r: r.any(False)) == [False] * 3
    assert each(2, lambda r: r.check()) == [None, None]
    assert all(isinstance(e, Lost) for e in each(2, lambda r: [vars(r).update(size=3), r.check()]))


def test_heads_of_a_memorys_file_are_divided_and_gathered():
    arrays = {
        "layers.0.memory": mx.random.normal((1, 4, 3, 3)),
        "layers.11.keys": mx.random.normal((1, 2, 5, 3)),
        "layers.0.trace.0": mx.array([[3.0, 4.0]]),
        "ids": mx.array([5, 6, 7]),
    }
    mx.eval(arrays)
    own = each(2, lambda r: r.divided(arrays if r.rank == 0 else {}, None))
    for rank, found in enumerate(own):
        assert found.keys() == arrays.keys()
        assert mx.array_equal(
            found["layers.0.memory"], arrays["layers.0.memory"][:, 2 * rank :][:, :2]
        )
        assert mx.array_equal(found["layers.11.keys"], arrays["layers.11.keys"][:, rank : rank + 1])
        for name in ("layers.0.trace.0", "ids"):
            assert mx.array_equal(found[name], arrays[name])
    for rank, found in enumerate(own):
        found["layers.0.trace.0"] = mx.array([[2.0 + 2 * rank, 1.0 + 6 * rank]])  # of its heads
        mx.eval(found)
    first, second = each(2, lambda r: r.gathered(own[r.rank], None))
    assert second == {} and first.keys() == arrays.keys()
    assert all(mx.allclose(x, arrays[name]) for name, x in first.items())


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("vocabulary", "size"), [(10, 2), (11, 3), (5, 4)])
def test_rows_of_the_vocabulary(vocabulary, size, bits):
    """Two rows of three, three and two of eleven; and one without any."""
    mx.random.seed(3)
    weights = mx.random.normal((vocabulary, 64))
    ids, x = mx.array([[0, vocabulary - 1, 3, 2, 4]]), mx.random.normal((1, 5, 64))
    mx.eval(weights, ids, x)

    def made(kind):
        module = kind(vocabulary, 64) if kind is nn.Embedding else kind(64, vocabulary, bias=False)
        module.weight = weights
        return module if bits is None else module.to_quantized(group_size=32, bits=bits)

    embedding, head = made(nn.Embedding), made(nn.Linear)
    wanted = [embedding(ids), embedding.as_linear(x), head(x)]
    rows = rows_of_each(vocabulary, size)

    def work(ranks):
        ours = ranks._cut_vocabulary(made(nn.Embedding), _Embedding)
        theirs = ranks._cut_vocabulary(made(nn.Linear), _Head)
        assert {len(x) for x in (*ours.values(), *theirs.values()) if isinstance(x, mx.array)} == {
            rows
        }
        return [ours(ids), ours.as_linear(x), theirs(x)]

    for found in each(size, work):
        assert not isinstance(found, BaseException), found
        assert all(a.shape == b.shape for a, b in zip(found, wanted, strict=True))
        assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", ["gated_deltanet", "mamba2"])
def test_heads_of_two_ranks_compute_what_the_whole_does(kind):
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    whole = random_model(kind, "clamped", None, **config)
    wanted = chunks_of(whole)
    models = [random_model(kind, "clamped", None, **config) for _ in range(2)]

    def work(ranks):
        model = models[ranks.rank]
        parts = ranks.parts(model)
        ranks.cut(model)
        attention = model.layers[0].self_attn
        assert (attention.n_heads, attention.n_kv_heads, model.ranks) == (2, 1, ranks)
        held = dict(tree_flatten(model.parameters()))
        every = dict(tree_flatten(whole.parameters()))
        for name, part in parts.items():
            index = (slice(None),) * part.axis + (slice(part.start, part.stop),)
            own = held[name].swapaxes(0, part.axis)[: part.stop - part.start].swapaxes(0, part.axis)
            assert mx.array_equal(own, every[name][index]), name
        assert {name.split(".")[-2] for name in parts} >= {"q_proj", "o_proj", "embed_tokens"}
        assert sum(x.size for x in held.values()) < 0.6 * sum(x.size for x in every.values())
        return chunks_of(model)

    for found in each(2, work):
        assert not isinstance(found, BaseException), found
        assert mx.abs(found - wanted).max().item() < 1e-3 * mx.abs(wanted).max().item()


@pytest.mark.parametrize("kind", ["qwen2-gdn", "qwen2-mamba2"])
def test_two_ranks_read_what_is_theirs_of_a_model(kind, tmp_path):
    path = talking_model(kind, tmp_path)
    wanted = chunks_of(load_model(path)[0])
    for found in each(2, lambda ranks: chunks_of(load_model(path, ranks=ranks)[0])):
        assert not isinstance(found, BaseException), found
        assert mx.abs(found - wanted).max().item() < 1e-3 * mx.abs(wanted).max().item()


def chunks_of(model):
    """Logits behind a window that fills and turns."""
    caches, said = model.make_cache(), []
    for ids in (IDS[:9], IDS[9:31], IDS[31:]):
        said.append(model(mx.array([ids]), cache=caches))
    logits = mx.concatenate(said, axis=1)
    mx.eval(logits)
    return logits


def test_parts_are_found_by_what_is_left_of_numbers():
    for n in (5, 300):
        whole = _numbers((n, 2, 3), 0)
        assert whole.shape == (n, 2, 3) and len(set(whole[:, 0, 0].tolist())) > min(n, 100) / 2
        assert _numbers((2, n, 3), 1)[1, :, 2].tolist() == whole[:, 1, 0].tolist()
        for axis in (0, 1):
            numbers, half = _numbers((n, n), axis), -(-n // 2)
            shape = (half, n) if axis == 0 else (n, half)
            for rank in range(2):
                part = part_of((n, n), shape, rank)
                held = mx.split(numbers, [half], axis=axis)[rank]
                missing = half - held.shape[axis]
                pad = [(0, missing if i == axis else 0) for i in range(2)]
                assert _is_part(mx.pad(held, pad), part, numbers)
                assert not _is_part(mx.pad(held, pad)[::-1, ::-1], part, numbers)
                if missing:
                    assert not _is_part(mx.pad(held, pad, constant_values=1), part, numbers)
    assert part_of((4, 4), (2, 2), 0) is None and part_of((4, 4), (4, 4), 0) is None


def test_a_model_that_cannot_be_divided_is_refused():
    ranks = Ranks(Group(0, Board(2)))
    with pytest.raises(
        AHNError, match="mlx-lm cannot divide heads of a this model; take --pipeline"
    ):
        ranks.cut(SimpleNamespace(args=None))
    model = random_model("deltanet", "clamped", None, num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(AHNError, match="3 key/value heads cannot be divided among 2 ranks"):
        ranks.cut(model)
    for heads, mend in ((8, "start 2 or 4 or 8, or take --pipeline"), (1, "take --pipeline")):
        with pytest.raises(AHNError, match=f"among 3 ranks; {mend}$"):
            heads_of_each(heads, 3)


def test_one_process_has_no_ranks(monkeypatch):
    join.cache_clear()
    monkeypatch.delenv("MLX_RANK", raising=False)
    assert join() is None
    join.cache_clear()
    monkeypatch.setattr("ahn_mlx.model.ranks.launched_rank", lambda: 0)
    alone = mx.distributed.init()
    monkeypatch.setattr(mx.distributed, "init", lambda: alone)
    assert alone.size() == 1 and join() is None and join(Pipeline) is None
    two = Group(1, Board(2))
    monkeypatch.setattr(mx.distributed, "init", lambda: two)
    for kind in (Ranks, Pipeline):
        join.cache_clear()
        ranks = join() if kind is Ranks else join(kind)
        assert type(ranks) is kind and (ranks.rank, ranks.size) == (1, 2)
    join.cache_clear()

    def unreachable():
        raise RuntimeError("no route")

    monkeypatch.setattr(mx.distributed, "init", unreachable)
    with pytest.raises(AHNError, match="cannot be reached: no route"):
        join()
    join.cache_clear()


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        *(({}, None), ({"MLX_RANK": "0"}, 0), ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}, 1)),
        *(({"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"}, None), ({"MLX_RANK": "x"}, None)),
        *(({"PMI_RANK": "3", "PMI_SIZE": "4"}, 3), ({"OMPI_COMM_WORLD_RANK": "0"}, 0)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_which_process_of_several_this_one_is(given, rank, monkeypatch):
    for name in (*LAUNCHED, *LAUNCHED.values()):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == rank
