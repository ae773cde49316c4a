"""lm-evaluation-harness over our sessions: numbers by hand, and contexts that are read once."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import chat_tokenizer, talking_model
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ahn_mlx import AHNError, load_model

pytest.importorskip("lm_eval")

from ahn_mlx.evaluate.harness import AHNLM, _sampling
from ahn_mlx.reading.generate import prefill_step

TEXT = "It was the best of times, it was the worst of times." * 2


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(path) -> AHNLM:
    tokenizer = load_tokenizer(path)
    tokenizer._tokenizer.eos_token = "!"  # one of the model's 256
    return AHNLM(load_model(path, dtype="float32")[0], tokenizer)


def requests(*args: tuple) -> list:
    return [SimpleNamespace(args=a) for a in args]


def by_hand(lm: AHNLM, context: str, said: str) -> tuple[float, bool]:
    """All of it in one pass; one token is one byte."""
    return of_ids(lm, lm.tokenizer.encode(context + said), len(said.encode()))


def of_ids(lm: AHNLM, ids: list[int], n: int) -> tuple[float, bool]:
    """Of the last n."""
    logits = lm.model(mx.array([ids]), cache=lm.model.make_cache())[0].astype(mx.float32)
    log = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    rows, targets = log[-n - 1 : -1], ids[-n:]
    likeliest = bool((rows.argmax(axis=-1) == targets).all())
    return float(rows[np.arange(n), targets].sum()), likeliest


def test_choices_are_scored_after_their_context(lm) -> None:
    asked = [(TEXT, " yes"), ("Who?", " me"), (TEXT, " no, it was not"), (TEXT, " ?")]
    found = lm.loglikelihood(requests(*asked))
    for pair, (score, likeliest) in zip(asked, found, strict=True):
        expected = by_hand(lm, *pair)
        assert abs(score - expected[0]) < 1e-2 and likeliest == expected[1]


def test_what_is_likeliest_is_said_to_be(lm) -> None:
    for n in range(len(TEXT), 10, -1):
        context = TEXT[:n].rstrip()
        ids = mx.array([lm.tokenizer.encode(context)])
        likeliest = lm.model(ids, cache=lm.model.make_cache())[0, -1].argmax().item()
        letter = lm.tokenizer.decode([likeliest])
        if letter.isascii() and letter.isprintable() and lm.tokenizer.encode(letter):
            found = lm.loglikelihood(requests((context, letter), (context, letter + "@")))
            assert found[0][1] and found[0][0] > found[1][0]
            # That what comes after it is not the likeliest is not forgotten.
            assert not by_hand(lm, context, letter + "@")[1] and not found[1][1]
            return
    raise AssertionError("no context is followed by a letter")


def test_white_space_between_belongs_to_what_follows(lm) -> None:
    one, other = lm.loglikelihood(requests((TEXT + " ", "a"), (TEXT, " a")))
    assert one == other


def test_a_shared_context_is_read_once(lm, capsys) -> None:
    read: list[int] = []
    ours = lm.model

    class Counting:
        def __call__(self, tokens, **options):
            read.append(tokens.size)
            return ours(tokens, **options)

        def __getattr__(self, name):
            return getattr(ours, name)

    counted = AHNLM(Counting(), lm.tokenizer)
    counted.loglikelihood(requests((TEXT, " a"), (TEXT, " b"), (TEXT, " c")))
    # The context but for its last token, then that and each choice but for its last.
    assert sum(read) == len(TEXT) - 1 + 3 * 2
    read.clear()
    # Also where another comes between, in whatever order.
    counted.loglikelihood(requests((TEXT, " b"), ("Who?", " c"), (TEXT, " a")))
    assert sum(read) == len(TEXT) - 1 + 3 + 3 * 2
    assert "choices: 100%" in capsys.readouterr().err


def test_all_of_a_text_is_scored(lm) -> None:
    (found,) = lm.loglikelihood_rolling(requests((TEXT,)))
    ids = [lm.tokenizer.encode("!")[0], *lm.tokenizer.encode(TEXT)]
    logits = lm.model(mx.array([ids]), cache=lm.model.make_cache())[0].astype(mx.float32)
    log = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    assert abs(found - log[np.arange(len(ids) - 1), ids[1:]].sum()) < 0.05


def test_answers_end_where_the_task_says(lm) -> None:
    long, short = lm.generate_until(
        requests((TEXT, {"max_gen_toks": 30}), (TEXT, {"max_gen_toks": 2, "until": "zzz"}))
    )
    assert long.startswith(short[:1]) and len(short) <= 2
    stop = long[1:2]
    (cut,) = lm.generate_until(requests((TEXT, {"max_gen_toks": 30, "until": [stop, ""]})))
    assert cut == long.split(stop)[0]


@pytest.mark.parametrize("more", [-1, 0, 1, 2])
def test_a_text_longer_than_a_step_is_scored_step_by_step(lm, more) -> None:
    """As sums of what each step's end leaves, which one pass has at once."""
    text = (TEXT * 30)[: 2 * prefill_step() + more]
    (found,) = lm.loglikelihood_rolling(requests((text,)))
    ids = [lm.tokenizer.encode("!")[0], *lm.tokenizer.encode(text)]
    assert found == pytest.approx(of_ids(lm, ids, len(text))[0], rel=1e-4)


def test_one_token_after_a_context_is_scored(lm) -> None:
    asked = [(TEXT, "."), ("", "I"), ("", "It"), (" ", "I")]
    found = lm.loglikelihood(requests(*asked))
    for (context, said), (score, _) in zip(asked, found, strict=True):
        # Before what has nothing before it there is what ends a text.
        expected = by_hand(lm, context.rstrip() or "!", context[len(context.rstrip()) :] + said)
        assert abs(score - expected[0]) < 1e-2


def with_tokenizer(path: Path, copy: Path, change, **settings: bool) -> AHNLM:
    """The same model, with another tokenizer.json."""
    shutil.copytree(path, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))
    return AHNLM(load_model(copy, dtype="float32")[0], load_tokenizer(copy))


def test_what_begins_a_text_is_there_once(lm, path, tmp_path) -> None:
    """Also where a template has put it there already."""

    def begins(tokenizer: dict) -> None:
        mark = {"id": "!", "ids": [tokenizer["model"]["vocab"]["!"]], "tokens": ["!"]}
        piece = {"Sequence": {"id": "A", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, piece],
            "pair": [piece, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"!": mark},
        }

    begun = with_tokenizer(path, tmp_path / "a", begins)
    assert begun.encoder.begin == lm.tokenizer.encode("!")
    asked = requests(("Who", "?"), ("!Who", "?"), ("", "?"))
    expected = [by_hand(lm, context, "?")[0] for context in ("!Who", "!Who", "!")]
    assert [score for score, _ in begun.loglikelihood(asked)] == pytest.approx(expected, abs=1e-3)


def test_what_is_one_token_with_the_context_is_scored_after_it(lm, path, tmp_path) -> None:
    def merges(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["ed"] = vocabulary.pop("~")
        tokenizer["model"]["merges"] = [["e", "d"]]

    merging = with_tokenizer(path, tmp_path / "a", merges)
    assert len(merging.tokenizer.encode("bed")) == 2
    (found,) = merging.loglikelihood(requests(("be", "d")))
    assert found[0] == pytest.approx(by_hand(lm, "be", "d")[0], abs=1e-3)


def test_what_follows_a_context_is_in_the_middle_of_a_text(lm, path, tmp_path) -> None:
    """For a tokenizer that puts a space before a text."""
    spaced = with_tokenizer(path, tmp_path / "a", lambda t: None, add_prefix_space=True)
    assert spaced.tokenizer.encode("be") == lm.tokenizer.encode(" be")
    (found,) = spaced.loglikelihood(requests(("be", "d")))
    assert found[0] == pytest.approx(by_hand(lm, " be", "d")[0], abs=1e-3)


def test_what_the_model_does_not_know_is_refused(path, tmp_path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer._tokenizer.add_tokens(["zz"])
    model = AHNLM(load_model(path, dtype="float32")[0], tokenizer)
    for ask in (model.loglikelihood_rolling, lambda its: model.loglikelihood([*its, *its])):
        with pytest.raises(AHNError, match="256"):
            ask(requests(("zz",) if ask == model.loglikelihood_rolling else ("a", "zz")))


def test_a_model_is_loaded_as_it_is_said(path) -> None:
    made = AHNLM(str(path), window=20, sinks=2, dtype="bfloat16", mixer="full", batch_size=1)
    assert (made.model.ahn.window, made.model.ahn.sinks, made.mixer) == (20, 2, "full")
    assert made.model.layers[0].input_layernorm.weight.dtype == mx.bfloat16
    assert made.tokenizer_name == str(path).replace("/", "__")
    with pytest.raises(AHNError, match="--q-bits has no effect"):
        AHNLM(str(path), q_bits=8)


def test_messages_are_said_by_the_template(lm) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    said = lm.apply_chat_template(asked)
    assert said.endswith("[assistant]") and "Hi" in said
    assert lm.apply_chat_template(asked, add_generation_prompt=True) == said
    begun = [*asked, {"role": "assistant", "content": "Well"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == f"{said}Well"
    assert lm.chat_template() == lm.chat_template(False) == ""
    assert lm.chat_template(True) == lm.tokenizer.chat_template != ""
    bare = AHNLM(lm.model, chat_tokenizer(template=None))
    assert bare.chat_template(True) == ""
    # Which scores as well as any other.
    bare.tokenizer._tokenizer.eos_token = "!"
    assert bare.loglikelihood(requests(("a", "b"))) == lm.loglikelihood(requests(("a", "b")))
    assert bare.loglikelihood_rolling(requests(("ab",))) == lm.loglikelihood_rolling(
        requests(("ab",))
    )


def test_answers_are_kept_for_another_run(lm) -> None:
    """By lm-eval, which is given each with what was asked."""
    kept: list[tuple] = []
    hook = lm.cache_hook
    lm.cache_hook = SimpleNamespace(add_partial=lambda *its: kept.append(its))
    try:
        scores = lm.loglikelihood(requests(("b", "c"), ("a", "b")))
        texts = lm.loglikelihood_rolling(requests(("a",), ("bc",), ("d",)))
        settings = {"max_gen_toks": 3}
        said = lm.generate_until(requests(("a", settings), ("b", settings), ("c", settings)))
    finally:
        lm.cache_hook = hook
    assert kept == [
        ("loglikelihood", ("a", "b"), scores[1]),
        ("loglikelihood", ("b", "c"), scores[0]),
        *(("loglikelihood_rolling", (x,), y) for x, y in zip(("a", "bc", "d"), texts, strict=True)),
        *(("generate_until", (x, settings), y) for x, y in zip("abc", said, strict=True)),
    ]


SETTINGS = {
    "nothing": ({}, (256, 0, 1, ())),
    "greedy": (
        {"until": "a", "max_new_tokens": 5, "temperature": 0.5, "do_sample": False},
        (5, 0, 1, ("a",)),
    ),
    "drawn": (
        {"until": ["a", "", "b"], "max_gen_toks": 7, "max_new_tokens": 5, "do_sample": True}
        | {"temperature": 0.5, "top_p": 0.9},
        (7, 0.5, 0.9, ("a", "b")),
    ),
    "drawn at no temperature": ({"do_sample": True, "until": None}, (256, 0, 1, ())),
}


@pytest.mark.parametrize(("settings", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_settings_of_a_task_are_those_of_transformers(settings, expected) -> None:
    found = _sampling(settings)
    assert (found.max_tokens, found.temp, found.top_p, found.stop) == expected


def test_without_lm_eval_it_says_how_to_get_it(monkeypatch) -> None:
    for name in ("lm_eval", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ahn_mlx.evaluate.harness")
    with pytest.raises(AHNError, match=r"needs lm-eval: pip install 'ahn-mlx\[lm-eval\]'"):
        importlib.import_module("ahn_mlx.evaluate.harness")
