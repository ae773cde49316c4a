"""One answer: how it ends, what it leaves behind, and what is counted of it."""

import numpy as np
import pytest
import serving
from checkpoints import chat_tokenizer
from engines import PROMPTS, running, small, start

from ahn_mlx.reading.penalty import note, nothing_seen
from ahn_mlx.reading.sampling import Sampling
from ahn_mlx.serve.answers import Done, Failed, Piece, Read
from ahn_mlx.serve.parameters import APIError

END = 258  # <|im_end|>
LETTERS = chat_tokenizer().encode("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)
GO_ON = {token: -1e9 for token in range(259) if token not in LETTERS}


@pytest.fixture(scope="module")
def engine():
    with running(serving.model(), chat_tokenizer(), rows=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(engine):
    return small(engine)


def told_of(engine, base, ids=PROMPTS[0], **options):
    """Pieces and the end of one answer."""
    options = {"bias": GO_ON, "max_tokens": 12, **options}
    _, told = start(engine, base, ids, **options)
    pieces = []
    while not isinstance(event := told.get(timeout=60), Done):
        assert not isinstance(event, Failed), event
        pieces += [event] if isinstance(event, Piece) else []
    engine.call(lambda: None).result(10)
    assert told.empty() and engine.free == 3  # nothing comes after the end
    return pieces, event


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_an_answer_that_is_long_enough_is_cut(engine, base):
    pieces, done = told_of(engine, base)
    assert (done.reason, done.tokens, done.ended, done.stop) == ("length", 12, "", None)
    assert done.session.turn == "cut" and done.last == pieces[-1].token.id
    assert all(piece.token is not None for piece in pieces) and len(pieces) == 12


def test_an_answer_ends_at_any_token_that_ends_one(engine, base, monkeypatch):
    pieces, done = told_of(engine, base, bias={END: 1e9})
    assert (pieces, done.reason, done.tokens) == ([], "stop", 1)
    assert (done.ended, done.last, done.stop) == ("<|im_end|>", END, None)
    assert done.session.turn == "answered"
    monkeypatch.setattr(engine.tokenizer, "_eos_token_ids", {END, LETTERS[0]})
    pieces, done = told_of(engine, base, bias={LETTERS[0]: 1e9})
    assert (pieces, done.reason, done.ended) == ([], "stop", "a")


def test_a_stop_text_ends_an_answer_and_one_that_only_began_is_said(engine, base):
    whole = text_of(told_of(engine, base)[0])
    ids = [piece.token.id for piece in told_of(engine, base)[0]]
    stop = whole[5:7]
    pieces, done = told_of(engine, base, stop=(stop,))
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert (done.reason, done.stop, done.ended) == ("stop", stop, "")
    assert done.session.turn == "cut" and done.tokens == whole.index(stop) + 2
    # The last letters might be the begin of it: they wait, and are not lost.
    pieces, done = told_of(engine, base, stop=(whole[-2:] + "never",))
    assert text_of(pieces) == whole and (done.reason, done.stop) == ("length", None)
    assert [p.token.id for p in pieces if p.token] == ids
    assert [p.text for p in pieces if p.token is None] == [whole[-2:]]


def test_what_was_read_and_said_is_known_afterwards(engine, base):
    ids = PROMPTS[2]
    pieces, done = told_of(engine, base, ids, max_tokens=5)
    said = [piece.token.id for piece in pieces]
    vocabulary = engine.model.args.vocab_size
    assert np.array_equal(done.session.seen, note(nothing_seen(vocabulary), [*ids, *said]))
    assert done.session.tokens == len(ids) + len(said) - 1 and base.tokens == 0
    everything = {"repetition_penalty": 1e6, "repetition_context_size": 0}
    again, _ = told_of(engine, done.session, [*said[-1:], 1], max_tokens=5, **everything)
    fresh = [piece.token.id for piece in again]
    assert len({*fresh, *said, *ids, 1}) == len({*said, *ids, 1}) + len(fresh)
    assert Sampling(**everything).penalty(done.session.seen) is not None


def test_how_much_of_a_prompt_is_read_is_told(engine, base):
    """But for its last token, which goes in with the first step."""
    _, told = start(engine, base, PROMPTS[3], max_tokens=1)
    read = []
    while not isinstance(event := told.get(timeout=60), Done):
        read += [event] if isinstance(event, Read) else []
    assert read == [Read(n, 70) for n in (16, 32, 48, 64, 69)]


def test_what_is_counted(engine, base):
    count, times = engine.metrics.value, engine.metrics._times
    before = [count(f"tokens_{what}_total") for what in ("read", "generated")]
    firsts = times["first_token_seconds"][-2]
    told_of(engine, base, PROMPTS[3])  # 70 tokens; the last goes in with the first step
    after = [count(f"tokens_{what}_total") for what in ("read", "generated")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [69, 12]
    assert times["first_token_seconds"][-2] == firsts + 1
    for reason, options in (("length", {}), ("stop", {"bias": {END: 1e9}})):
        known = engine.metrics._counts["answers_total", f'reason="{reason}"']
        told_of(engine, base, **options)
        assert engine.metrics._counts["answers_total", f'reason="{reason}"'] == known + 1


def test_of_several_answers_one_that_fails_ends_all(engine, base):
    request, told = start(engine, base, PROMPTS[0], n=2, max_tokens=10**6, bias=GO_ON)
    while not isinstance(told.get(timeout=60), Piece):
        pass

    def fails(*_):
        raise APIError("no more", status=418)

    answers = engine.call(lambda: list(engine._answers)).result(10)
    assert len(answers) == 2
    answers[1].choose = fails
    while not isinstance(event := told.get(timeout=60), Failed):
        pass
    assert event.error.status == 418 and request.cancelled
    engine.call(lambda: None).result(10)
    engine.call(lambda: None).result(10)
    assert engine.free == 3
    engine.call(lambda: answers[0].fail(KeyError("late"))).result(10)  # it has ended already
    engine.call(lambda: answers[0].cut()).result(10)
    assert engine.free == 3
    rest = [told.get() for _ in range(told.qsize())]
    assert not any(isinstance(e, Failed) for e in rest)
    assert [e.reason for e in rest if isinstance(e, Done)] == ["cancelled"]


def test_a_prompt_that_is_none_is_refused_and_its_row_is_free(engine, base):
    for ids, word in (([], "empty"), ([259], "not among"), ([-1], "not among")):
        _, told = start(engine, base, ids)
        event = told.get(timeout=60)
        assert isinstance(event, Failed) and word in event.error.message
        assert event.error.status == 400
        engine.call(lambda: None).result(10)
        assert engine.free == 3
