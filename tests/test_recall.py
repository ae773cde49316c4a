"""Recall and the tasks made here: three mixers, numbers by hand, and what is printed."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import GDN, edit_config, talking_model
from click.testing import CliRunner
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.utils import load_model as load_plain

from ahn_mlx import AHNError, load_model
from ahn_mlx.cli import cli
from ahn_mlx.evaluate import synthetic
from ahn_mlx.evaluate.generators import NOISE
from ahn_mlx.evaluate.mixers import MIXERS, mixing
from ahn_mlx.evaluate.recall import MEASURES, PLACES, Recall, make_documents, measure

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
        gaps = np.diff(document.at)
        assert gaps.min() > 40 and gaps.max() < 130


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


def test_facts_are_where_the_cache_has_them(loaded, made) -> None:
    documents, recall = made
    config = loaded[0].ahn
    for d, document in enumerate(documents):
        for n, at in enumerate(document.at):
            last = len(document.ids) + len(document.stems[n]) - 1
            kept = at > last - config.window
            place = "sinks" if at < config.sinks else "window" if kept else "beyond"
            assert PLACES[int(recall.places[d, n])] == place


def test_what_has_no_room_is_refused(loaded) -> None:
    for shape, message in (({"tokens": 60}, "has no room"), ({"needles": 99}, "from 2 to 16")):
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
