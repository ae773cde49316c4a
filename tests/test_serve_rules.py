"""How a server draws tokens, takes answers apart and counts: by hand, without a model."""

import asyncio
import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from engines import wish

from ahn_mlx.errors import AHNError
from ahn_mlx.serve.answers import Done, Token
from ahn_mlx.serve.metrics import BUCKETS, HELP, Metrics
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.parts import Part, Parts
from ahn_mlx.serve.sampling import Sampler, _filtered, begun
from ahn_mlx.serve.service import Answered, Said, gathered, told

# By falling probability: tokens 2, 0, 3, 1.
P = np.array([0.3, 0.05, 0.5, 0.15])
LOGITS = mx.array(np.log(P) + 7.0)


def chosen(**options):
    return Sampler(wish(**options), 0, None)(LOGITS)


def test_the_likeliest_token_and_what_is_reported_of_it():
    assert chosen().token.item() == 2 and chosen().logprob is None
    one = chosen(top_logprobs=0)
    assert one.top is None and one.logprob.item() == pytest.approx(math.log(0.5), rel=1e-5)
    three = chosen(top_logprobs=3)
    assert three.top.tolist() == [2, 0, 3]
    assert np.allclose(np.exp(np.array(three.top_logprobs)), [0.5, 0.3, 0.15], rtol=1e-5)
    assert chosen(top_logprobs=1).top.tolist() == [2]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_is_reported_is_sorted_and_computed_in_float32(dtype):
    logits = mx.random.normal((500,), key=mx.random.key(2)).astype(dtype) * 3
    found = Sampler(wish(top_logprobs=20), 0, None)(logits)
    exact = np.array(logits.astype(mx.float32), dtype=np.float64)
    exact -= np.log(np.exp(exact).sum())
    reported = np.array(found.top_logprobs)
    assert np.allclose(reported, np.sort(exact)[:-21:-1], atol=1e-4)
    assert np.allclose(reported, exact[found.top.tolist()], atol=1e-4)
    assert found.logprob.item() == pytest.approx(exact.max(), abs=1e-4)


def test_biases_and_penalties_move_logits():
    assert chosen(bias={1: 2.31}).token.item() == 1 and chosen(bias={1: 2.29}).token.item() == 2
    sampler = Sampler(wish(presence=0.6, frequency=0.0), 0, None)
    sampler.took(2)
    sampler.took(2)
    assert sampler(LOGITS).token.item() == 0  # once, however often
    assert Sampler(wish(presence=0.6), 0, None)(LOGITS).token.item() == 2
    sampler = Sampler(wish(frequency=0.3), 0, None)
    sampler.took(2)
    assert sampler(LOGITS).token.item() == 2
    sampler.took(2)
    assert sampler(LOGITS).token.item() == 0 and sampler.counts == {2: 2}
    both = Sampler(wish(presence=0.25, frequency=0.25, bias={2: 0.1}), 0, None)
    both.took(2)
    assert both(LOGITS).token.item() == 2
    both.took(2)
    assert both(LOGITS).token.item() == 0
    unasked = Sampler(wish(), 0, None)
    unasked.took(2)
    assert unasked.counts == {}


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        *(({}, True), ({"bias": {1: 0.0}}, False), ({"presence": 1.0}, False)),
        *(({"frequency": 1.0}, False), ({"top_logprobs": 0}, False), ({"temp": 0.5}, False)),
    ],
)
def test_what_the_engine_may_choose_by_itself(options, plain):
    assert Sampler(wish(**options), 0, None).plain is plain


@pytest.mark.parametrize(
    ("options", "left"),
    [
        *(({}, {0, 1, 2, 3}), ({"top_k": 1}, {2}), ({"top_k": 2}, {2, 0})),
        *(({"top_k": 4}, {0, 1, 2, 3}), ({"top_k": 9}, {0, 1, 2, 3})),
        *(({"top_p": 0.49}, {2}), ({"top_p": 0.51}, {2, 0}), ({"top_p": 0.81}, {2, 0, 3})),
        *(({"top_p": 1e-9}, {2}), ({"top_p": 0.99}, {0, 1, 2, 3})),
        *(({"min_p": 0.59}, {2, 0}), ({"min_p": 0.61}, {2}), ({"min_p": 0.09}, {0, 1, 2, 3})),
        *(({"top_p": 0.81, "top_k": 2}, {2, 0}), ({"top_p": 0.51, "top_k": 3}, {2, 0})),
        ({"top_k": 3, "min_p": 0.4}, {2, 0}),
    ],
)
def test_what_may_be_drawn(options, left):
    found = np.array(_filtered(mx.array(np.log(P)), wish(temp=1.0, **options).sampling))
    assert set(np.flatnonzero(np.isfinite(found)).tolist()) == left
    assert np.allclose(found[list(left)], np.log(P)[list(left)])


def test_draws_follow_seed_and_temperature():
    def drawn(seed, temp, n=400):
        sampler = Sampler(wish(temp=temp), seed, None)
        return [sampler(LOGITS).token.item() for _ in range(n)]

    warm = drawn(1, 1.0)
    assert warm == drawn(1, 1.0) != drawn(2, 1.0)
    assert abs(warm.count(2) / 400 - 0.5) < 0.08 and abs(warm.count(0) / 400 - 0.3) < 0.08
    assert drawn(1, 0.2).count(2) / 400 > 0.88
    assert drawn(1, 5.0).count(1) / 400 > 0.12


@pytest.mark.parametrize(
    ("text", "marks", "n"),
    [
        *(("ab<", ("<think>",), 1), ("ab<thi", ("<think>",), 4), ("<think>", ("<think>",), 0)),
        *(("", ("<a>",), 0), ("ab", (), 0), ("<", ("<",), 0), ("x<t", ("<tool>", "<think>"), 2)),
        *(("<a<", ("<ab>",), 1), ("<to", ("<t>", "<tool>"), 3), ("t", ("<t>",), 0)),
        *(("<think", ("<think>",), 6), ("x<<", ("<<a>",), 2)),
    ],
)
def test_what_may_be_the_begin_of_a_mark_waits(text, marks, n):
    assert begun(text, marks) == n


def tokenizer(**changed):
    known = {"think_start": "<think>", "think_end": "</think>", "has_thinking": True}
    known |= {"tool_call_start": "<call>", "tool_call_end": "</call>", "has_tool_calling": True}
    known["tool_parser"] = lambda text, tools: json.loads(text)
    return SimpleNamespace(**{**known, **changed})


TEXT = 'a<think>b</think>c<call>{"name": "f", "arguments": {"x": "\u00e4"}}</call>d'


def taken(text, step, tools=({},), thinking=False, **changed):
    parts = Parts(tokenizer(**changed), list(tools), thinking)
    found = []
    for n in range(0, len(text), step):
        found += parts(text[n : n + step])
    found += parts("", last=True)
    joined = []
    for part in found:
        if joined and joined[-1][0] == part.kind != "call":
            joined[-1] = (part.kind, joined[-1][1] + part.text)
        else:
            joined.append((part.kind, part.text if part.call is None else part.call["function"]))
    return joined


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_an_answer_is_taken_apart_however_it_comes(step):
    call = {"name": "f", "arguments": '{"x": "\u00e4"}'}
    whole = [("content", "a"), ("reasoning", "b"), ("content", "c"), ("call", call)]
    assert taken(TEXT, step) == [*whole, ("content", "d")]
    assert taken(TEXT, step, tools=())[2] == ("content", TEXT.split("</think>")[1])
    assert taken(TEXT, step, has_tool_calling=False)[2][1].startswith("c<call>")
    assert taken(TEXT, step, has_thinking=False)[0] == ("content", "a<think>b</think>c")
    assert taken("b</think>c", step, thinking=True) == [("reasoning", "b"), ("content", "c")]
    assert taken("b<call>", step, thinking=True) == [("reasoning", "b<call>")]
    open_end = taken('<call>{"name": "f"}', step, tool_call_end="")
    assert open_end == [("call", {"name": "f", "arguments": "{}"})]
    assert taken("<call>no</call>x", step) == [("content", "<call>no</call>x")]
    assert taken("a<", step) == [("content", "a<")]
    two = taken('<call>[{"name": "f"}, {"name": "g", "arguments": "y"}]</call>', step)
    assert two[1] == ("call", {"name": "g", "arguments": "y"})
    after = taken('<call>{"name": "f"}</call>x<call>{"name": "g"}</call>', step)
    assert [what for kind, what in after if kind == "call"] == [
        {"name": "f", "arguments": "{}"},
        {"name": "g", "arguments": "{}"},
    ]
    ids = [part.call["id"] for part in Parts(tokenizer(), [{}])('<call>[{"name": "f"}]</call>')]
    assert len(ids[0]) == len("call_") + 24


def test_answers_add_up():
    answer, done = Answered(), Done(0, "stop", 3, None, 7, "", None)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    answer.add(Said(0, [Part("content", "a"), Part("reasoning", "r")], Token(1), None))
    answer.add(Said(0, [Part("content", "b"), Part("call", "", call)], Token(2), done))
    answer.add(Said(0, [], None, None))
    assert (answer.content, answer.reasoning, answer.calls) == ("ab", "r", [call])
    assert [t.id for t in answer.tokens] == [1, 2] and answer.done is done
    normal = {**call, "function": {"name": "f", "arguments": {"a": 1}}}
    assert answer.message == {"role": "assistant", "content": "ab", "tool_calls": [normal]}
    assert "tool_calls" not in Answered().message


def test_a_client_that_leaves_ends_the_work():
    async def run(messages, steps):
        cancelled, taken = [], []

        async def stream():
            for n in range(steps):
                taken.append(n)
                await asyncio.sleep(0)
                yield n
            if steps == 1:
                raise APIError("failed")

        async def receive():
            if not messages:
                await asyncio.sleep(60)
            return {"type": messages.pop(0)}

        http, running = SimpleNamespace(receive=receive), SimpleNamespace()
        running.cancel = lambda: cancelled.append(True)
        try:
            await gathered(http, running, stream())
            said = None
        except APIError as error:
            said = error.status, error.message
        assert cancelled == [True]
        return said, len(taken)

    assert asyncio.run(run(["http.request"], 5)) == (None, 5)
    said, n = asyncio.run(run(["http.request", "http.disconnect"], 10**6))
    assert said == (499, "the client has left") and n < 1000
    assert asyncio.run(run([], 1)) == ((400, "failed"), 1)


def test_what_failed_is_told_without_its_words():
    error = APIError("mine", status=409)
    assert told(error) is error
    known = told(AHNError("a mistake of the request's"))
    assert (known.status, known.message) == (400, "a mistake of the request's")
    assert (told(KeyError("secret")).status, told(KeyError("secret")).message) == (
        *(500, "the server failed (KeyError)"),
    )


def test_metrics_are_what_prometheus_reads():
    metrics = Metrics()
    metrics.count("steps_total")
    metrics.count("answers_total", 2, reason="stop")
    metrics.count("answers_total", reason="length")
    for seconds in (0.05, 0.06, 400.0):
        metrics.time("token_seconds", seconds)
    assert metrics.value("answers_total") == 3 and metrics.value("steps_total") == 1
    lines = metrics.text({"rows": 4.0, "row_bytes": 1234567890.0}).splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    below = [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    bounds = ("0.05", "0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "300", "+Inf")
    assert samples == [
        'ahn_answers_total{reason="length"} 1',
        'ahn_answers_total{reason="stop"} 2',
        "ahn_steps_total 1",
        *(f'ahn_token_seconds_bucket{{le="{b}"}} {n}' for b, n in zip(bounds, below, strict=True)),
        *("ahn_token_seconds_sum 400.11", "ahn_token_seconds_count 3"),
        *("ahn_rows 4", "ahn_row_bytes 1234567890"),
    ]
    kinds = [line for line in lines if line.startswith("# TYPE")]
    assert kinds == [
        *("# TYPE ahn_answers_total counter", "# TYPE ahn_steps_total counter"),
        *("# TYPE ahn_token_seconds histogram", "# TYPE ahn_rows gauge"),
        "# TYPE ahn_row_bytes gauge",
    ]
    assert lines[0] == f"# HELP ahn_answers_total {HELP['answers_total']}"
    assert len(BUCKETS) == 11
