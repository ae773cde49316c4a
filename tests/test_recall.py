"""Recall and the tasks made here: three mixers, numbers by hand, and what is printed."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GDN, chat_tokenizer, edit_config, talking_model
from click.testing import CliRunner
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model as load_plain

from ahn_mlx import AHNError, load_model
from ahn_mlx.cli import cli
from ahn_mlx.evaluate import synthetic
from ahn_mlx.evaluate.generators import NOISE
from ahn_mlx.evaluate.mixers import MIXERS, mixing
from ahn_mlx.evaluate.recall import (
    MEASURES,
    PLACES,
    Recall,
    _place,
    _values,
    make_documents,
    measure,
)

SHAPE = {"documents": 3, "needles": 3, "tokens": 260}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))
    edit_config(path, eos_token_id=list(range(1, 256, 6)))
    return path


@pytest.fixture(scope="module")
def loaded(path):
    return load_model(path, dtype="float32")[0], load_tokenizer(path)


@pytest.fixture(scope="module")
def made(loaded):
    documents = make_documents(loaded[1], NOISE, **SHAPE)
    return documents, measure(*loaded, documents)


def test_documents_have_facts_with_values_of_one_token(loaded, made) -> None:
    tokenizer = loaded[1]
    for document in made[0]:
        assert len(document.ids) <= 260 and len({*document.values, *document.unseen}) == 6
        for stem, value, at in zip(document.stems, document.values, document.at, strict=True):
            assert document.ids[at] == value
            # The fact is the stem and the value, word for word.
            before = document.ids[at - len(stem) + 1 : at]
            assert tokenizer.decode(stem[1:]) == tokenizer.decode(before)
        text = tokenizer.decode(document.ids)
        assert all(f"room {tokenizer.decode([v])}." not in text for v in document.unseen)
        # At even distances, half of one from either end.
        assert np.abs(np.array(document.at) / len(document.ids) - [1 / 6, 3 / 6, 5 / 6]).max() < 0.1


def test_documents_are_the_haystack_in_its_order_and_as_long_as_they_may_be(loaded) -> None:
    """Sentences of it go round, from one that is drawn on; facts stand between them."""
    encode, decode = loaded[1].encode, loaded[1].decode
    lengths = []
    for tokens in range(200, 240):
        (document,) = make_documents(loaded[1], NOISE, documents=1, needles=2, tokens=tokens)
        text = decode(document.ids)
        for stem, value in zip(document.stems, document.values, strict=True):
            fact = f"{decode(stem)[1:]}{decode([value])}."
            assert fact in text
            text = text.replace(fact, "").replace("  ", " ").strip()
        start = next(n for n, sentence in enumerate(NOISE) if text.startswith(sentence))
        told = ""
        for n in range(99):
            longer = f"{told} {NOISE[(start + n) % len(NOISE)]}".strip()
            if len(longer) > len(text):
                break
            told = longer
        assert told == text
        left = tokens - len(document.ids)
        assert 0 <= left < len(encode(f" {NOISE[(start + n) % len(NOISE)]}"))
        lengths.append(left)
    assert 0 in lengths


def test_documents_are_those_of_their_seed(loaded) -> None:
    first, same, other = (make_documents(loaded[1], NOISE, **SHAPE, seed=n) for n in (0, 0, 1))
    assert make_documents(loaded[1], NOISE, **SHAPE) == first == same != other


def test_all_letters_are_values_where_no_word_is_one_token(loaded) -> None:
    shape = {"documents": 1, "needles": 13, "tokens": 900}
    (document,) = make_documents(loaded[1], NOISE, **shape)
    letters = loaded[1].decode(sorted([*document.values, *document.unseen]))
    assert letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    with pytest.raises(AHNError, match="has no 28 words or letters that are one token"):
        make_documents(loaded[1], NOISE, **{**shape, "needles": 14})


def test_values_are_one_token_between_their_stem_and_a_full_stop() -> None:
    """Tokenizers of whole words and of letters, in which some are one with what is beside them."""

    def encoder(words: list[str], more: tuple[str, ...] = ()):
        known = {" Anna": 1, " hid": 2, " the": 3, " letter": 4, " in": 5, " room": 6, " ": 7}
        known |= {word: 100 + n for n, word in enumerate([*words, *more])} | {".": 8}

        def encode(_: str, text: str) -> list[int]:
            ids = []
            while text:
                found = max((w for w in known if text.startswith(w)), key=len, default=text[0])
                ids.append(known.get(found) or 1000 + ord(found))
                text = text[len(found) :]
            return ids

        return encode

    rooms = [" kitchen", " garden", " attic", " library", " market", " stable"]
    stem, values = _values(encoder(rooms), 6)
    assert stem == "{} hid the letter in the" and list(values.items()) == [
        (room, 100 + n) for n, room in enumerate(rooms)
    ]
    # Too few: two that are no one token, with the full stop or with what comes before.
    for more in ((" kitchen.", " garden."), (" the kitchen", " the garden")):
        assert [*_values(encoder(rooms, more), 4)[1]] == rooms[2:]
    stem, letters = _values(encoder(rooms), 7)
    assert stem == "{} hid the letter in room " and len(letters) == 26
    with pytest.raises(AHNError, match="has no 26 words or letters that are one token"):
        _values(encoder([], ("Q.",)), 26)


def test_what_is_read_is_told_while_it_is(loaded, made) -> None:
    told: list[int] = []
    measure(*loaded, made[0][:2], told.append)
    assert told == 3 * [len(document.ids) for document in made[0][:2]]
    # Nothing is said by a template, which need not be there.
    bare = measure(loaded[0], chat_tokenizer(template=None), made[0][:1])
    assert np.array_equal(bare.table, made[1].table[:, :1])


def test_a_model_that_knows_nothing_has_no_preference(path, made) -> None:
    model, _ = load_model(path, dtype="float32")
    model.model.norm.weight = mx.zeros_like(model.model.norm.weight)
    table = measure(model, load_tokenizer(path), made[0][:1]).table
    # All values are alike: none is likelier than the true one.
    assert np.abs(table - [np.log(256), 0, 0, 1, 1]).max() < 1e-5


def test_full_attention_is_that_of_the_plain_model(made) -> None:
    """All of the document and the question at once, by mlx-lm's own model."""
    base, _ = load_plain(GDN / "base")
    documents, recall = made
    for d, document in enumerate(documents):
        for n, (stem, value) in enumerate(zip(document.stems, document.values, strict=True)):
            logits = base(mx.array([document.ids + stem]), cache=make_prompt_cache(base))[0, -1]
            log = np.array(nn_log(logits))
            others = [v for v in document.values if v != value]
            expected = [
                -log[value],
                log[value] - log[others].mean(),
                log[value] - log[document.unseen].mean(),
                log[value] >= log[others].max(),
                log[value] >= log[document.unseen].max(),
            ]
            assert np.allclose(recall.table[MIXERS.index("full"), d, n], expected, atol=1e-3)


def nn_log(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits)


def test_the_window_alone_is_a_memory_without_output(path, made) -> None:
    model, _ = load_model(path, dtype="float32")
    for layer in model.layers:
        projection = layer.self_attn.ahn.o_proj
        projection.weight = mx.zeros_like(projection.weight)
    documents, recall = made
    document = documents[0]
    caches = model.make_cache()
    model(mx.array([document.ids]), cache=caches)
    logits = model(mx.array([document.stems[0]]), cache=caches)[0, -1]
    nll = -nn_log(logits)[document.values[0]].item()
    assert abs(recall.table[MIXERS.index("window"), 0, 0, 0] - nll) < 1e-3
    memory, window, full = (recall.table[i, ..., 0] for i in range(3))
    assert not np.allclose(memory, window) and not np.allclose(window, full)


def test_mixers_leave_the_model_as_it_was(loaded) -> None:
    model, _ = loaded
    config, x = model.ahn, mx.arange(60)[None] % 256
    before = np.array(model(x, cache=model.make_cache()))
    for mixer in ("window", "full"):
        with mixing(model, mixer):
            assert not np.allclose(np.array(model(x, cache=model.make_cache())), before)
    assert model.ahn is config
    assert np.array_equal(np.array(model(x, cache=model.make_cache())), before)


def test_shares_are_of_facts_beyond_the_window() -> None:
    """memory, window, full of two documents with two facts, one of them within the window."""
    nll = np.array([[[1, 3.5], [1, 3.0]], [[1, 4.0], [1, 4.0]], [[9, 2.0], [9, 2.0]]])
    table = np.repeat(nll[..., None], len(MEASURES), axis=-1)
    places = np.array([[1, 2], [1, 2]])
    recall = Recall(places, 10 * places, table)
    share, error = recall.share("nll")
    # (0.5 + 1) / (2 + 2); without the one 1 / 2, without the other 0.5 / 2.
    assert share == pytest.approx(0.375) and error == pytest.approx(0.125)
    assert recall.mean("full", "nll", "window") == 9 and recall.count("sinks") == 0
    with warnings.catch_warnings(action="error"):
        assert np.isnan(recall.mean("full", "nll", "sinks"))
        # Nothing beyond the window; and one document, whose error nobody knows.
        assert np.isnan(Recall(places * 0, 10 * places, table).share("nll")).all()
        share, error = Recall(places[:1], 10 * places[:1], table[:, :1]).share("nll")
    assert share == pytest.approx(0.25) and np.isnan(error)


def test_a_place_is_by_the_sinks_and_the_window() -> None:
    config = SimpleNamespace(sinks=4, window=10)
    found = [_place(at, distance, config) for at in (3, 4) for distance in (9, 10)]
    assert found == [0, 0, 1, 2]


def test_facts_are_where_the_cache_has_them(loaded, made) -> None:
    documents, recall = made
    config = loaded[0].ahn
    for d, document in enumerate(documents):
        for n, at in enumerate(document.at):
            last = len(document.ids) + len(document.stems[n]) - 1
            kept = at > last - config.window
            place = "sinks" if at < config.sinks else "window" if kept else "beyond"
            assert PLACES[int(recall.places[d, n])] == place
            assert recall.distances[d, n] == last - at


def test_what_has_no_room_is_refused(loaded) -> None:
    for shape, message in (
        *(({"tokens": 60}, "has no room"), ({"needles": 17}, "from 2 to 16")),
        ({"needles": 1}, "from 2 to 16"),
    ):
        with pytest.raises(AHNError, match=message):
            make_documents(loaded[1], NOISE, **{**SHAPE, **shape})


def invoke(*args: object) -> str:
    result = CliRunner().invoke(cli, ["eval", *map(str, args)])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_recall_prints_shares_and_draws(path, tmp_path) -> None:
    words = ("--documents", 2, "--needles", 2, "--tokens", 700, "--window", 40, "--sinks", 4)
    out = tmp_path / "recall.png"
    printed = invoke("recall", "--model", path, *words, "-o", out)
    assert "share of NLL that the memory keeps: " in printed and " +- " in printed
    assert out.read_bytes().startswith(b"\x89PNG")
    found = json.loads(invoke("recall", "--model", path, *words, "--json"))
    assert found["shares"].keys() == {"nll", "bound", "seen"}
    assert found["places"]["beyond"]["needles"] >= 2


def test_made_tasks_are_asked_of_all_mixers(path, tmp_path) -> None:
    words = ("--model", path, "--length", 420, "--items", 1, "--window", 60, "--sinks", 4)
    found = json.loads(invoke("babi1", *words, "--json"))
    assert found["mixers"] == list(MIXERS) and len(found["items"]) == 5
    assert {i["depth"] for i in found["items"]} == {0, 0.25, 0.5, 0.75, 1}
    assert sum(s["n"] for s in found["summary"]) == 5
    printed = invoke("passkey", *words, "-o", tmp_path / "a.svg")
    assert "memory - window" in printed and (tmp_path / "a.svg").is_file()


def test_what_made_tasks_cost_is_said_before_they_are_asked(path) -> None:
    words = ("--length", 420, "--items", 1, "--window", 60, "--sinks", 4)
    said = CliRunner().invoke(cli, ["eval", "niah", "--model", str(path), *map(str, words)]).stderr
    # Five depths, three mixers, 420 tokens each.
    assert "15 questions, 6,300 tokens at most: about 1 min at this model's speed here" in said


def test_a_long_question_is_heard_of_while_it_is_read(loaded) -> None:
    calls: list[int] = []
    shape = {"length": 420, "count": 1, "progress": calls.append}
    next(synthetic.ask(*loaded, ["passkey"], NOISE, **shape))
    assert calls[-1] == 1 and calls.count(1) == 3 and calls[0] == 0


def test_answers_are_as_long_as_a_task_lets_them(loaded, path) -> None:
    """Of at most forty tokens, by a model that never ends one itself."""
    tokenizer = load_tokenizer(path)
    tokenizer._eos_token_ids = {999}
    asked = list(synthetic.ask(loaded[0], tokenizer, ["vt"], NOISE, length=420, count=1))
    assert [a.depth for a in asked] == [0, 0.25, 0.5, 0.75, 1]
    items = synthetic.Items(tokenizer, NOISE)
    for answered in asked:
        made = items.make("vt", length=420, depth=answered.depth, index=0, seed=0)
        assert answered.distance == max(made.item.distances) > min(made.item.distances)
        assert answered.place == synthetic.place_of(made, loaded[0].ahn)
        assert all(20 < len(said) <= 40 for said in answered.answers)
        assert answered.scores == tuple(
            synthetic.score("vt", made.item, said) for said in answered.answers
        )


def test_a_text_without_a_template_is_asked_bare(loaded) -> None:
    tokenizer = chat_tokenizer(template=None)
    asked = synthetic.Items(tokenizer, NOISE).make(
        *("passkey",), length=300, depth=0, index=0, seed=0
    )
    text = f"{asked.item.document}\n\n{asked.item.question}\n{asked.item.prefix}"
    assert tokenizer.decode(asked.prompt) == text and asked.item.prefix == "The pass key is"


def answered(place: str, *scores: float, task: str = "vt") -> synthetic.Answered:
    return synthetic.Answered(task, 0.5, place, 10, scores, ("", "", ""))


def test_scores_are_summed_by_task_and_place() -> None:
    """memory, window, full of three items beyond the window, and one of another task within."""
    with warnings.catch_warnings(action="error"):
        beyond, one = synthetic.summarize(
            [
                answered("beyond", 1, 0.5, 1),
                answered("window", 0.25, 0, 1, task="babi1"),
                answered("beyond", 0, 0.5, 1),
                answered("beyond", 0.5, 0.5, 1),
            ]
        )
    assert (beyond.task, beyond.place, beyond.n) == ("vt", "beyond", 3)
    assert beyond.means == [0.5, 0.5, 1] and beyond.gain == 0
    # Of 1, 0 and 1/2 the standard deviation is 1/2.
    assert beyond.errors == pytest.approx([0.5 / 3**0.5, 0, 0])
    assert beyond.gain_error == pytest.approx(0.5 / 3**0.5)
    assert (one.task, one.place, one.n, one.gain) == ("babi1", "window", 1, 0.25)
    assert one.means == [0.25, 0, 1] and np.isnan([*one.errors, one.gain_error]).all()
    two = [answered("sinks", 1, 0, 0.5), answered("sinks", 0, 0, 0.5)]
    (row,) = synthetic.summarize(two)
    assert row.errors == pytest.approx([0.5, 0, 0]) and row.gain == 0.5


@pytest.mark.parametrize("task", ["passkey", "niah", "vt", "babi1", "babi2", "babi3"])
def test_help_shows_examples_of_its_own_task_line_by_line(task) -> None:
    help_ = invoke(task, "--help")
    examples = [x.strip() for x in help_.splitlines() if x.strip().startswith("ahn-mlx ")]
    assert "\\b" not in help_ and "\b" not in help_
    assert len(examples) == 2 and all(x.startswith(f"ahn-mlx eval {task}") for x in examples)


def test_answers_are_scored_by_their_task(loaded) -> None:
    items = synthetic.Items(loaded[1], NOISE)
    where = {"length": 420, "depth": 0.5, "index": 0, "seed": 0}
    said = {"passkey": "{} is it", "niah_multivalue": "{}", "vt": "{}", "babi2": "the {}. Not so"}
    for task, form in said.items():
        item = items.make(task, **{**where, "length": 900}).item
        right = form.format(" ".join(item.answers))
        assert synthetic.score(task, item, right) == 1
        assert synthetic.score(task, item, "") == 0
    prompt = items.make("passkey", **where).prompt
    assert loaded[1].decode(prompt).endswith("[assistant]The pass key is")


def test_where_an_item_belongs_is_its_hardest_fact(loaded) -> None:
    items, config = synthetic.Items(loaded[1], NOISE), loaded[0].ahn
    first, last = (items.make("passkey", length=300, depth=d, index=0, seed=0) for d in (0, 1))
    wide = type(config)(window=len(last.prompt), sinks=4)
    assert synthetic.place_of(last, wide) == "window"
    assert synthetic.place_of(first, type(config)(window=20, sinks=4)) == "beyond"
    assert synthetic.place_of(first, type(config)(window=20, sinks=120)) == "sinks"
    # To the token: a fact that ends with the last sink, and one that is the window's first.
    (distance,), total = first.item.distances, len(first.prompt)
    for sinks, window, place in (
        *((total - distance, 1, "sinks"), (total - distance - 1, 1, "beyond")),
        *((1, distance, "window"), (1, distance - 1, "beyond")),
    ):
        assert synthetic.place_of(first, type(config)(window=window, sinks=sinks)) == place
    both = first._replace(item=replace(first.item, distances=[1, distance]))
    assert synthetic.place_of(both, type(config)(window=1, sinks=1)) == "beyond"
