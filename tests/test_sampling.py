"""How an answer is drawn and where it ends: what is refused, and stop texts in any pieces."""

import itertools
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import talking_model

import ahn_mlx
from ahn_mlx import AHNError, Session
from ahn_mlx.reading.generate import Run, prefill_step
from ahn_mlx.reading.penalty import note, nothing_seen
from ahn_mlx.reading.sampling import Cutter, Sampling
from ahn_mlx.serve.sampling import Sampler, Wish

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1, 1.5, "8", None, True]),
        ("temp", [-0.1, INF, NAN, 1e-9, 1e31, 10**400, "hot", None, True, [1]]),
        ("top_p", [0, -1, 1.01, NAN, "1"]),
        ("top_k", [-1, 2.0, NAN, "3", False]),
        ("min_p", [-0.1, 1.1, NAN, INF]),
        ("repetition_penalty", [0, -1, NAN, INF, "1.1"]),
        ("repetition_context_size", [-1, -5, 2.5]),
        ("seed", [-1, 2**64, 1.0, "1"]),
        ("stop", ["", [""], ("a", ""), [1], 5, None, {"a"}]),
    ],
)
def test_what_no_answer_can_be_drawn_with_is_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(AHNError, match=rf"^{name} must be .+, not ") as error:
            Sampling(**{name: value})
        assert "\n" not in str(error.value)


def test_what_answers_are_drawn_with_is_taken() -> None:
    Sampling(temp=1, top_p=1, top_k=10**9, min_p=1, repetition_penalty=1.3, seed=2**64 - 1)
    Sampling(temp=0.001, top_p=1e-9, top_k=0, min_p=0, seed=0, max_tokens=1)
    Sampling(repetition_penalty=1e-3, repetition_context_size=0)
    assert Sampling(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


# --- stop texts ---


def cut(pieces: list[str], *stops: str) -> tuple[list[str], bool]:
    cutter = Cutter(stops)
    given = [cutter.add(piece) for piece in pieces]
    return [*given, cutter.rest()], cutter.found


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("One. Two.", ["."], "One"),
        ("One. Two.", ["Two"], "One. "),
        ("One. Two.", ["Three", "T", "."], "One"),
        ("abcabd.", ["abd"], "abc"),  # its beginning comes twice
        ("aaab", ["aab"], "a"),
        ("xabcd", ["abcd", "bc"], "xa"),  # bc is complete first
        ("xab", ["b", "ab"], "x"),  # both at once
        ("stop", ["stop"], ""),
        ("no such", ["stop"], "no such"),
        ("one \N{GRINNING FACE} two", ["\N{GRINNING FACE}"], "one "),
        ("unfinished st", ["stop"], "unfinished st"),
        ("anything", [], "anything"),
    ],
)
def test_an_answer_ends_before_a_stop_text_wherever_its_pieces_end(
    text: str, stops: list[str], kept: str
) -> None:
    draw = random.Random(text)
    splits = [[text], list(text)]
    for _ in range(20):
        at = sorted(draw.choices(range(len(text) + 1), k=3))
        splits.append([text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)])
    for pieces in splits:
        given, found = cut(pieces, *stops)
        assert ("".join(given), found) == (kept, any(s in text for s in stops)), pieces


def test_what_may_be_a_stop_text_waits_and_the_rest_does_not() -> None:
    assert cut(["ab", "st", "x", "sto", "p", "more"], "stop")[0] == [
        "ab",
        "",
        "stx",
        "",
        "",
        "",
        "",
    ]


def test_which_stop_text_was_found_is_known() -> None:
    for stops, text, given, found in (
        *(
            (("b",), "ab", "a", "b"),
            (("bc", "b"), "abc", "a", "b"),
            (("x", "cd"), "abcde", "ab", "cd"),
        ),
        (("abc", "bc"), "xabc", "x", "abc"),
    ):
        whole = Cutter(stops)
        assert (whole.add(text), whole.found, whole.stop, whole.add("more")) == (
            given,
            True,
            found,
            "",
        )
    assert (Cutter(("b",)).add("ac"), Cutter(("b",)).stop) == ("ac", "")


# --- in an answer ---


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path: Path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("speaking"))
    return ahn_mlx.load(path)


def answered(speaking: tuple[Any, Any], **sampling: Any) -> tuple[str, str, int]:
    """Text, why it ended, and how many pieces, of a session and of a run alike."""
    session = Session(*speaking)
    pieces = list(session.ask("Why?", **sampling))
    prompt = Session(*speaking)._question("Why?")
    run = Run(*speaking, prompt, Sampling(**sampling))
    assert list(run) == pieces
    assert run.finish_reason == session.finish_reason
    assert run.facts()["generation_tokens"] == len(pieces)
    return "".join(pieces), session.finish_reason, len(pieces)


def test_a_stop_text_ends_the_answer_of_a_model(speaking: tuple[Any, Any]) -> None:
    whole, reason, count = answered(speaking, max_tokens=24)
    assert reason == "length" and count == 24
    stop = whole[len(whole) // 2 :][:3]
    text, reason, fewer = answered(speaking, max_tokens=24, stop=(stop,))
    assert text == whole[: whole.index(stop)]
    assert reason == "stop" and fewer < count


def test_seconds_of_a_run_are_those_of_prompt_and_answer(
    speaking: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(100.0)
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr("ahn_mlx.reading.generate.time", clock)
    read: list[int] = []
    run = Run(*speaking, list(range(1, 40)), Sampling(max_tokens=5), step=16)
    run.progress = lambda n, _: read.append(n)
    assert run.facts()["prompt_seconds"] == run.facts()["generation_seconds"] == 0
    list(run)
    facts = run.facts()
    # The clock goes on by one each time that it is looked at: at each step, and at each token.
    assert (facts["prompt_seconds"], facts["generation_seconds"]) == (len(read), 5)
    assert read[-1] == facts["prompt_tokens"] == 39 and "39 tokens" in run.summary()
    assert f"prompt 39 tokens, {39 / len(read):.1f} tokens/s" in run.summary()
    assert "generation 5 tokens, 1.0 tokens/s" in run.summary()


@pytest.mark.parametrize(("penalty", "count"), [(1.0, 0), (1.1, 1), (2.0, 1)])
def test_only_a_penalty_of_one_is_none(penalty: float, count: int) -> None:
    for back in (0, 20):
        wish = Sampling(repetition_penalty=penalty, repetition_context_size=back)
        assert len(wish.begin(9, nothing_seen(9))["logits_processors"]) == count


@pytest.mark.parametrize(("dtype", "tokens"), [(mx.float32, 512), (None, 2048)])
def test_steps_are_shorter_where_they_are_as_fast(
    dtype: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ahn_mlx.reading.generate.default_dtype", lambda: dtype)
    assert prefill_step() == tokens


def test_a_conversation_goes_on_after_a_stop_text(speaking: tuple[Any, Any]) -> None:
    session = Session(*speaking)
    whole = "".join(session.fork().ask("Why?", max_tokens=12))
    list(session.ask("Why?", max_tokens=12, stop=(whole[4:6],)))
    assert session.turn == "cut"
    assert list(session.ask("And?", max_tokens=2))


def test_settings_reach_the_sampler(speaking: tuple[Any, Any]) -> None:
    greedy = answered(speaking, max_tokens=16)[0]
    hot = {"max_tokens": 16, "temp": 5.0}
    drawn = answered(speaking, **hot, seed=7)[0]
    assert drawn == answered(speaking, **hot, seed=7)[0] != greedy
    assert drawn != answered(speaking, **hot, seed=8)[0]
    zero = answered(speaking, **hot, seed=0)[0]
    assert zero == answered(speaking, **hot, seed=0)[0] != drawn
    # Each of these leaves nothing but the likeliest token.
    for narrow in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert answered(speaking, **hot, **narrow, seed=7)[0] == greedy
    assert answered(speaking, **hot, top_k=10**6, seed=7)[0] == drawn  # more than there are
    assert answered(speaking, max_tokens=16, repetition_penalty=5.0)[0] != greedy


# --- in a server's answer ---

CHANCES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.84}, {1, 3, 4}),
        ({"top_p": 0.86}, {0, 1, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 4}, {0, 1, 3, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.36}, {1, 3, 4}),
        ({"min_p": 0.39}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_p": 0.84, "top_k": 2}, {1, 3}),
        ({"top_p": 0.41, "top_k": 4}, {1, 3}),
        ({"top_k": 3, "min_p": 0.5}, {1, 3}),
        ({"top_k": 1, "min_p": 0.1}, {1}),
    ],
)
def test_a_server_draws_from_the_likeliest_tokens(settings: dict[str, Any], kept: set[int]) -> None:
    logits = mx.array(np.log(CHANCES), dtype=mx.float32) + 3
    drawn = {
        Sampler(Wish(Sampling(temp=1.0, **settings)), seed, None)(logits).token.item()
        for seed in range(60 if len(kept) < 5 else 120)
    }
    assert drawn == kept


def test_a_servers_temperature_flattens_what_is_drawn_from() -> None:
    logits = mx.array(np.log(CHANCES), dtype=mx.float32)
    count, wish = 600, Wish(Sampling(temp=2.0))
    drawn = [Sampler(wish, seed, None)(logits).token.item() for seed in range(count)]
    expected = CHANCES**0.5 / (CHANCES**0.5).sum()
    for token, chance in enumerate(expected):
        spread = (count * chance * (1 - chance)) ** 0.5
        assert abs(drawn.count(token) - count * chance) < 4 * spread


def test_what_a_server_adds_to_logits_is_what_it_reports() -> None:
    """Penalty, then bias, presence and frequency of what the answer has."""
    logits = np.array([1.0, -1.0, 0.5, 2.0, -0.5, 3.0])
    seen = note(nothing_seen(6), [1, 2])
    sampling = Sampling(repetition_penalty=2.0, repetition_context_size=0)
    wish = Wish(sampling, {0: 1.5, 3: -4.0}, presence=0.5, frequency=0.25, top_logprobs=6)
    sampler = Sampler(wish, 0, seen)
    assert not sampler.plain
    sampler(mx.array(logits, dtype=mx.float32))
    for token in (3, 5, 3):
        sampler.took(token)
        found = sampler(mx.array(logits, dtype=mx.float32))
    changed = np.array([1.0, -2.0, 0.25, 1.0, -0.5, 1.5])
    changed += np.array([1.5, 0, 0, -4.0 - 0.5 - 2 * 0.25, 0, -0.5 - 0.25])
    chances = changed - np.log(np.exp(changed).sum())
    assert found.token.item() == changed.argmax() == 0
    assert found.top.tolist() == np.argsort(-chances).tolist()
    np.testing.assert_allclose(np.array(found.top_logprobs), np.sort(chances)[::-1], rtol=1e-5)
    np.testing.assert_allclose(found.logprob.item(), chances[0], rtol=1e-5)
    # Each by itself.
    for one, token in (({"frequency": 2.0}, 3), ({"presence": 2.0}, 3), ({"frequency": -9.0}, 5)):
        alone = Sampler(Wish(Sampling(), **one), 0, None)
        alone.took(5)
        assert alone(mx.array(logits, dtype=mx.float32)).token.item() == token
    for plain in (Wish(Sampling()), Wish(Sampling(top_p=0.5))):
        assert Sampler(plain, 0, None).plain
    for other in ({"bias": {1: 1.0}}, {"presence": 1.0}, {"frequency": 1.0}, {"top_logprobs": 0}):
        assert not Sampler(Wish(Sampling(), **other), 0, None).plain


def test_a_session_refuses_what_sampling_refuses(speaking: tuple[Any, Any]) -> None:
    session = Session(*speaking)
    with pytest.raises(AHNError, match="temp must be"):
        next(session.ask("Why?", temp=INF))
    assert list(session.ask("Why?", max_tokens=1))


@pytest.mark.parametrize("name", ["cache", "read", "generated", "finish_reason", "said", "_times"])
def test_what_a_run_counts_is_not_given(speaking: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        Run(*speaking, [1], **{name: []})


def test_an_answer_is_greedy_and_short_if_nothing_is_said() -> None:
    usual = {"max_tokens": 256, "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    usual |= {"repetition_penalty": 1.0, "repetition_context_size": 20, "seed": None, "stop": ()}
    assert asdict(Sampling()) == usual
