"""What a session remembers beside its caches, each by itself: texts, space, turns, tokens seen."""

import asyncio
import inspect
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import serving
from checkpoints import CHATML, chat_tokenizer
from mlx_lm.generate import generate_step

from ahn_mlx import AHNError
from ahn_mlx.checkpoints.identity import model_identity
from ahn_mlx.measure.cost import cache_bytes
from ahn_mlx.model.augment import memory_layers
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.reading import memoryfile
from ahn_mlx.reading import session as module
from ahn_mlx.reading.caches import make_caches
from ahn_mlx.reading.generate import Run
from ahn_mlx.reading.layout import MAX_SPACE, MAX_TEXTS, NAME, PREVIEW
from ahn_mlx.reading.session import Session
from ahn_mlx.reading.tail import Tail
from ahn_mlx.serve.build import build

TRIMS = CHATML.replace("m.content", "m.content | trim")


@pytest.fixture(scope="module")
def model():
    return serving.model()


@pytest.fixture
def new(model):
    def made(template=CHATML, **options):
        return Session(model, chat_tokenizer(template), **{"step": 16, **options})

    return made


def text_of(session, ids):
    return session.tokenizer.decode(ids)


def seen(session):
    return set(np.flatnonzero(session.seen).tolist())


def test_a_system_message_needs_a_template(new):
    with pytest.raises(AHNError, match="--system-prompt needs the chat template"):
        new(system="Be brief.", chat=False)
    assert new(system="Be brief.").template.system == "Be brief."
    for step in (0, -1, (1 << 16) + 1):
        with pytest.raises(AHNError, match="step must be from 1 to 65,536"):
            new(step=step)
    assert (new(step=1).step, new(step=1 << 16).step) == (1, 1 << 16)


def test_texts_are_listed_the_last_ones_by_name(new, tmp_path):
    session = new()
    session.read("x")
    for n in range(MAX_TEXTS + 2):
        session.note_text(f"{n % 7}", n)
    assert (len(session.texts), session.earlier) == (MAX_TEXTS, 3)
    assert [text["tokens"] for text in session.texts] == list(range(2, MAX_TEXTS + 2))
    last = max(n for n in range(MAX_TEXTS + 2) if n % 7 == 3)
    assert session.last_read("3")["tokens"] == last and session.last_read("9") is None
    session.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", session.model, session.tokenizer)
    assert (again.texts, again.earlier) == (session.texts, 3)
    session.note_text("a\x1b[31m\n" + "x" * 300, 1)
    assert session.texts[-1]["name"] == ("a [31m " + "x" * 300)[:NAME]
    assert session.last_read("a\x1b[31m\n" + "x" * 300) is session.texts[-1]


def test_white_space_waits_for_what_follows_it(new, tmp_path):
    """A template that trims would drop it at the end of a message, and not within one."""
    session = new(TRIMS)
    ids = session.encode("  One  ")
    assert text_of(session, ids).endswith("user\nOne") and session.space == "  "
    assert text_of(session, session.encode(" two \n")) == "   two" and session.space == " \n"
    session.read_ids(ids)
    session.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", session.model, session.tokenizer)
    assert again.space == " \n" and text_of(again, again.encode("3")) == " \n3"
    asked = session.encoder(*session.template.question("read", "Who?"))
    assert text_of(session, session._question("Who?")) == " \n" + text_of(session, asked)
    list(session.ask("Who?", max_tokens=2))
    assert (session.space, session.tail) == ("", Tail())
    session.encode("x" + " " * (MAX_SPACE + 5))
    assert len(session.space) == MAX_SPACE
    kept = new()
    assert text_of(kept, kept.encode("  One  ")).endswith("user\n  One  ") and kept.space == ""


def test_a_preview_is_of_the_first_text(new):
    session = new()
    session.read("Call me\n\n  Ishmael. " + "x" * 300)
    assert session.preview == ("Call me Ishmael. " + "x" * 300)[:PREVIEW]
    session.read("Some years ago")
    assert session.preview.startswith("Call me Ishmael.")


def test_a_preview_is_taken_from_the_begin_alone(new):
    session = new()
    session.read(" " * PREVIEW + "Call" + " " * PREVIEW + "me")
    assert session.preview == "Call"


def test_what_was_read_has_been_computed(new, tmp_path):
    session = new()
    session.read("Call me Ishmael. " * 20)
    states = [x for cache in session.caches for x in cache.state if isinstance(x, mx.array)]
    mx.export_to_dot(str(tmp_path / "graph"), *states)
    assert states and "shape=rectangle" not in (tmp_path / "graph").read_text()


@pytest.mark.parametrize(
    "ours", [Session, Run, build, cache_bytes, make_caches, AHNCache, AHNCache.to_quantized]
)
def test_groups_of_quantized_caches_are_as_large_as_those_of_mlx_lm(ours):
    takes = inspect.signature(ours).parameters
    found = takes.get("kv_group_size") or takes["group_size"]
    assert found.default == inspect.signature(generate_step).parameters["kv_group_size"].default


def test_tokens_that_there_are_not_are_not_read(new):
    session = new()
    session.read("One")
    before = session.tokens, session.tail
    for ids in ([259], [5, -1]):
        with pytest.raises(AHNError, match="is not among the model's 259"):
            session.read_ids(ids)
    assert (session.tokens, session.tail) == before
    session.read_ids([])
    assert (session.tokens, session.tail) == before


def test_progress_counts_the_tokens_of_this_text(new):
    session, told = new(), []
    session.read_ids([1] * 10, told.append)
    session.read_ids([2] * 30, told.append)
    assert told == [10, 6, 22, 30]
    assert (session.tail.ids, session.tokens) == ((2,) * 8, 40)
    assert seen(session) == {1, 2}


def test_what_breaks_while_the_tail_is_taken_back_is_known(new, monkeypatch):
    session = new()
    session.read_ids([1] * 10)

    def breaks(*_):
        raise MemoryError

    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(module, "undo", breaks)
        session.read_ids([2] * 10)
    with pytest.raises(AHNError, match="was interrupted inside of a step"):
        session.read_ids([2])
    with pytest.raises(AHNError, match="was interrupted inside of a step"):
        next(session.ask("Who?"))


def test_a_penalty_knows_the_text_the_question_and_the_answer(new):
    session = new()
    session.read("One two three.")
    question = session._question("Who is it?")
    known = seen(session) | set(question)
    everything = {"repetition_penalty": 1e6, "repetition_context_size": 0}
    pieces = list(session.ask("Who is it?", max_tokens=60, **everything))
    assert known <= seen(session)
    assert len(seen(session)) == len(known) + len(pieces)  # none was said twice


def test_what_a_file_says_of_tokens_comes_back(new, tmp_path):
    session = new()
    session.read("One two three.")
    session.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", session.model, session.tokenizer)
    assert seen(again) == seen(session) != set()


def test_a_question_is_read_in_the_sessions_steps(new):
    session, told = new(), []
    list(session.ask("x" * 100, progress=lambda *at: told.append(at), max_tokens=1))
    total = told[-1][1]
    assert [read for read, _ in told[:6]] == [0, 16, 32, 48, 64, 80]
    assert {n for _, n in told} == {total} and total > 100


def test_how_an_answer_ends_is_how_the_next_message_begins(new, monkeypatch):
    session = new()
    whole = "".join(session.fork().ask("Who?", max_tokens=30))
    list(session.ask("Who?", max_tokens=30))
    assert (session.turn, session.finish_reason) == ("cut", "length")
    stopped = new()
    list(stopped.ask("Who?", max_tokens=30, stop=(whole[8:10],)))
    assert (stopped.turn, stopped.finish_reason) == ("cut", "stop")
    ended = new()
    monkeypatch.setattr(ended.tokenizer, "_eos_token_ids", set(range(259)))
    assert "".join(ended.ask("Who?", max_tokens=30)) == ""
    assert (ended.turn, ended.finish_reason) == ("answered", "stop")


def test_a_file_says_whose_it_is(new, model, tmp_path):
    lies = dict.fromkeys(model_identity(model), "a lie")
    session = new(origin={**lies, "name": "mine"})
    session.read("One")
    session.save(tmp_path / "a.ahn", preview="Another", job="1" * 64, done=3)
    facts = memoryfile.read_facts(tmp_path / "a.ahn")
    assert facts["model"] == {"name": "mine", **model_identity(model)}
    assert (facts["preview"], facts["done"]) == ("Another", 3)


def test_a_file_is_for_its_own_settings(new, model, tmp_path):
    session = new()
    session.read("One two three.")
    file = tmp_path / "a.ahn"
    session.save(file)
    for option, value in (("window", 61), ("sinks", 5)):
        other = augment_again(model, **{option: value})
        with pytest.raises(memoryfile.OtherModel, match=f"has {option} .*drop --{option}"):
            Session.load(file, other, session.tokenizer)
    with pytest.raises(memoryfile.OtherModel, match=r"\(settings differ\)"):
        Session.load(file, augment_again(model, sink_positions="absolute"), session.tokenizer)
    assert Session.load(file, augment_again(model), session.tokenizer).tokens == session.tokens


def augment_again(model, **changed):
    """The same weights with other settings."""
    other = serving.model()
    other.ahn = replace(model.ahn, **changed)
    for _, attention in memory_layers(other):
        attention.config = other.ahn
    return other


def test_what_is_no_memory_says_so(tmp_path):
    file = tmp_path / "a.ahn"
    for data in (b"It was the best of times.", b"", b"\0" * 100):
        file.write_bytes(data)
        with pytest.raises(AHNError, match=r"(is not a memory|damaged).*digest"):
            memoryfile.read_facts(file)
    file.write_bytes(b"It was the best of times.")
    with pytest.raises(AHNError, match=r"is not a memory; ahn-mlx digest writes one$"):
        memoryfile.read_facts(file)
    deep = 70 * "[" + 70 * "]"
    mx.save_safetensors(str(tmp_path / "b"), {}, {"ahn": f'{{"version": 2, "x": {deep}}}'})
    with pytest.raises(AHNError, match="nested deeper than 64"):
        memoryfile.read_facts(tmp_path / "b.safetensors")


def test_a_text_begins_as_the_tokenizer_begins_one(new):
    bare, chat = new(chat=False), new()
    bare.encoder.begin = chat.encoder.begin = [256]
    assert bare._question("One")[0] == 256
    assert bare.encode("One")[0] == 256 and 256 not in bare.encode("two")
    assert 256 not in bare._question("Who?")
    assert 256 not in chat.encode("One") and bare._question("") == []
    with pytest.raises(AHNError, match="nothing to continue from"):
        next(new(chat=False).ask(""))


def test_an_asynchronous_answer_that_is_closed_is_over(new):
    session = new()

    async def first():
        answer = session.stream("Who?", max_tokens=1000)
        text = await anext(answer)
        with pytest.raises(AHNError, match="is answering"):
            session.read("more")
        await answer.aclose()
        assert (session._answering, session.turn) == (False, "cut")
        session.read("And?")
        return text

    asyncio.run(first())
    assert session.turn == "read"


@pytest.mark.parametrize(
    ("metadata", "memory"),
    [
        ({"ahn": "{}"}, True),
        ({"ahn": "no json"}, True),
        *((({}, False)), ({"format": "mlx"}, False), ({"ahn_": "{}"}, False)),
    ],
)
def test_a_memory_is_told_by_its_header(metadata, memory, tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": mx.zeros(1)}, metadata)
    assert memoryfile.is_memory(tmp_path / "a.safetensors") is memory
    # A tensor of that name makes none, nor does what is behind the header.
    header = b'{"ahn":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for raw in (header, b'{"__metadata__":{}}'):
        (tmp_path / "b").write_bytes(len(raw).to_bytes(8, "little") + raw + b'{"ahn":1}')
        assert memoryfile.is_memory(tmp_path / "b") is False


def test_a_file_is_the_same_in_whatever_order_facts_are_given(new, tmp_path):
    session = new()
    session.read("One two three.")
    session.save(tmp_path / "a.ahn", job="1" * 64, done=3)
    session.save(tmp_path / "b.ahn", done=3, job="1" * 64)
    assert (tmp_path / "a.ahn").read_bytes() == (tmp_path / "b.ahn").read_bytes()


def test_a_trace_may_grow_by_a_block_within_the_tail(new, tmp_path):
    """Of 64 tokens. Behind the four sinks 176 have left the window before it, 191 with it."""
    session = new(chat=False)
    session.read_ids([65] * (4 + 176 + 60))
    session.read_ids([65] * 15)
    session.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", session.model, session.tokenizer)
    sizes = []
    for i, _ in memory_layers(session.model):
        trace, same = (s.caches[i].trace for s in (session, again))
        assert mx.array_equal(trace.strengths, same.strengths)
        sizes.append(trace.strengths.shape[1])
    assert set(sizes) == {4}
