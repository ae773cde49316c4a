"""Conversations that decode together: whoever else is there, what a row holds is the same."""

import mlx.core as mx
import pytest
from engines import made

from ahn_mlx.model.together import Together
from ahn_mlx.model.trace import Trace

WIDTH, WINDOW, SINKS = 5, 600, 8  # so that a window has 256, 512, then 608 slots
SLOTS = (256, 512, WINDOW + SINKS)
IDS = mx.random.randint(0, 256, (1, 700), key=mx.random.key(3))


def model_of(memory, **options):
    return made(memory, window=WINDOW, sinks=SINKS, **options)


def read(model, n):
    caches = model.make_cache()
    for at in range(0, n, 200):
        model(IDS[:, at : min(at + 200, n)], cache=caches)
    return caches


def step(model, together, rows, token):
    """Logits [n, V] of the next token of each row, in their order."""
    order, layers = together.layers(rows, WIDTH)
    ids = mx.full((WIDTH, 1), token)
    logits = model(ids, cache=layers)[:, -1]
    mx.eval(logits, together.held())
    assert sorted(order) == list(range(len(rows)))
    # As many slots as its own tokens ask for, whoever is beside it; one more is for what leaves.
    for part in layers[0].parts:
        sizes = {next(n for n in SLOTS if n > read or n == SLOTS[-1]) for read in part.offsets}
        assert sizes == {part.rows.buffers[0].shape[2]}
    return [logits[order.index(i)] for i in range(len(rows))]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.offset == b.offset
        assert all(x.shape == y.shape for x, y in zip(a.buffers, b.buffers, strict=True))
        assert all(mx.array_equal(x, y).item() for x, y in zip(a.buffers, b.buffers, strict=True))
        assert (a.memory is None) == (b.memory is None)
        assert a.memory is None or mx.array_equal(a.memory, b.memory).item()


@pytest.mark.parametrize("memory", ["gated_deltanet", "deltanet", "mamba2"])
def test_a_row_is_bit_for_bit_what_it_is_alone(memory):
    model, starts, steps = model_of(memory), (250, 506, 640, 3, 603), 9
    expected = []
    for n in starts:
        caches, together = read(model, n), Together()
        said = [step(model, together, [caches], t)[0] for t in range(steps)]
        together.leave(caches)
        expected.append((said, caches))
    rows, together = [read(model, n) for n in starts], Together()
    # Rows come and go; each says its tokens in order, whenever it is there.
    said: list[list[mx.array]] = [[] for _ in starts]
    turns = [(0,), (3, 0, 1), (1, 4, 2, 0, 3), (2, 1), (4, 3, 0)]
    while any(len(tokens) < steps for tokens in said):
        for turn in turns:
            here = [i for i in turn if len(said[i]) < steps]
            by_token: dict[int, list[int]] = {}
            for i in here:
                by_token.setdefault(len(said[i]), []).append(i)
            for token, who in by_token.items():
                found = step(model, together, [rows[i] for i in who], token)
                for i, logits in zip(who, found, strict=True):
                    said[i].append(logits)
                    together.leave(rows[i])
    for i, (wanted, caches) in enumerate(expected):
        assert all(mx.array_equal(x, y).item() for x, y in zip(said[i], wanted, strict=True))
        same(rows[i], caches)


def test_rows_that_stay_are_not_disturbed_by_those_that_go():
    model = model_of("gated_deltanet")
    first, second, third = (read(model, n) for n in (251, 100, 400))
    alone, solo, together = read(model, 251), read(model, 251), Together()
    by_itself = Together()
    for token in range(12):  # from 256 slots, beside one, to 512, beside another
        rows = [[first], [second, first, third], [third, first]][token % 3]
        for row in (second, third):
            if not any(row is r for r in rows):
                together.leave(row)
        step(model, together, rows, token)
        step(model, by_itself, [solo], token)
        model(mx.array([[token]]), cache=alone)
    together.leave(first)
    by_itself.leave(solo)
    same(first, solo)
    for a, b in zip(first, alone, strict=True):
        assert a.offset == b.offset == 263
        pairs = zip(a.buffers, b.buffers, strict=True)
        assert all(mx.allclose(x, y, atol=1e-4).item() for x, y in pairs)


def test_who_is_not_asked_for_is_dropped_and_who_left_owns_what_it_holds():
    model, together = model_of("deltanet"), Together()
    rows = [read(model, n) for n in (40, 50)]
    step(model, together, rows, 1)
    assert all(cache.nbytes == 0 for caches in rows for cache in caches)  # not held twice
    rows[0][0].trace = noted = Trace.start(2)
    together.leave(rows[0])
    assert rows[0][0].trace is noted
    kept = [mx.array(x) for x in rows[0][0].buffers]
    step(model, together, rows[1:], 2)
    assert all(map(lambda x, y: mx.array_equal(x, y).item(), kept, rows[0][0].buffers))
    assert [layer.offsets for layer in together.layers(rows[1:], 2)[1][0].parts] == [[52]]
    step(model, together, [rows[0]], 3)
    together.leave(rows[1])  # was dropped
    assert all(cache.nbytes == 0 for caches in rows for cache in caches)
    together.clear()
    assert together.held() == []


def test_windows_of_other_bits_are_rows_of_their_own():
    model, together = model_of("gated_deltanet", hidden=128), Together()
    plain, other = read(model, 90), read(model, 90)
    few = [cache.to_quantized(group_size=32, bits=8) for cache in other]
    again = [cache.to_quantized(group_size=32, bits=8) for cache in read(model, 90)]
    said = step(model, together, [few, plain], 7)
    assert len(together.layers([few, plain], 2)[1][0].parts) == 2
    assert mx.array_equal(said[0], step(model, Together(), [again], 7)[0]).item()
