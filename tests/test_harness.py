"""lm-evaluation-harness over our sessions: numbers by hand, and contexts that are read once."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import talking_model
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ahn_mlx import load_model

pytest.importorskip("lm_eval")

from ahn_mlx.evaluate.harness import AHNLM

TEXT = "It was the best of times, it was the worst of times." * 2


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> AHNLM:
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))
    tokenizer = load_tokenizer(path)
    tokenizer._tokenizer.eos_token = "!"  # one of the model's 256
    return AHNLM(load_model(path, dtype="float32")[0], tokenizer)


def requests(*args: tuple) -> list:
    return [SimpleNamespace(args=a) for a in args]


def by_hand(lm: AHNLM, context: str, said: str) -> tuple[float, bool]:
    """All of it in one pass; one token is one byte."""
    ids = lm.tokenizer.encode(context + said)
    logits = lm.model(mx.array([ids]), cache=lm.model.make_cache())[0].astype(mx.float32)
    log = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    n = len(said.encode())
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
            return
    raise AssertionError("no context is followed by a letter")


def test_white_space_between_belongs_to_what_follows(lm) -> None:
    one, other = lm.loglikelihood(requests((TEXT + " ", "a"), (TEXT, " a")))
    assert one == other


def test_a_shared_context_is_read_once(lm) -> None:
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
