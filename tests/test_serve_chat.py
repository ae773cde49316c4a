"""Chat completions and completions, as OpenAI's clients ask for them."""

import concurrent.futures
import json

import httpx
import mlx.core as mx
import pytest
from serving import CHATML, CONTROL, Site, serving, wait_until

from ahn_mlx.serve.chat import Conversation

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
ENDLESS = {"max_tokens": 1_000_000, "logit_bias": {"258": -100}}


@pytest.fixture(scope="module")
def site():
    with serving(rows=4) as site:
        yield site


def said(answer) -> str:
    return answer["choices"][0]["message"]["content"]


def test_an_answer_and_its_usage(site: Site):
    answer = site.chat("Call me Ishmael.")
    prompt = f"<|im_start|>user\nCall me Ishmael.{CONTROL}\n<|im_start|>assistant\n"
    tokens = len(prompt) - 2 * len("<|im_start|>") - len(CONTROL) + 3
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == tokens + 12
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_streams_say_the_same_and_end(site: Site):
    for options in ({}, {"stream_options": {}}, {"stream_options": None}):
        body = {"model": "tiny", "messages": HI, "max_tokens": 20, **options}
        events = site.stream(CHAT, body)
        assert events[-1] == "[DONE]"
        deltas = [c["delta"] for e in events[:-1] for c in e["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        text = "".join(d.get("content") or "" for d in deltas)
        assert text == said(site.ok(CHAT, body))
        assert [c["finish_reason"] for e in events[:-1] for c in e["choices"]][-1] == "length"
    usage = {**body, "stream_options": {"include_usage": True}}
    events = site.stream(CHAT, usage)
    assert events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] == 20
    assert all(e["usage"] is None for e in events[:-2])


def test_many_at_once_say_what_each_says_alone(site: Site):
    texts = ["One", "Two " * 30, "Three", "Four " * 60, "Five", "Six " * 9]
    alone = [said(site.chat(t, max_tokens=30)) for t in texts]

    def ask(text):
        while True:
            response = site.post(
                CHAT,
                {
                    **{"model": "tiny", "max_tokens": 30},
                    "messages": [{"role": "user", "content": text}],
                },
            )
            if response.status_code != 429:
                return said(response.json())
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "rate_limit_error"

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, texts)) == alone


def test_a_conversation_goes_on_from_a_snapshot_as_if_it_had_been_read_again(site: Site):
    first = said(site.chat("Where is the whale?"))
    again = site.chat("Where is the whale?", first, "And now?")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    # Whoever trims what was said finds it too.
    other = site.chat("Where is the whale?", first.strip() + "\n", "And now?")
    assert said(other) == said(again)
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    # A prompt that equals a cached one: answered as before.
    assert said(site.chat("Where is the whale?")) == first
    # Another conversation does not find it.
    fresh = site.chat("Where is the whale!", first, "And now?")
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_snapshots_and_whole_conversations_give_the_same_text():
    """While windows hold all of it; of letters, which are the same tokens when read again."""
    with serving(window=400) as site:
        letters = site.service.engine.tokenizer.encode("abcdefghij", add_special_tokens=False)
        wish = {"logit_bias": {str(i): 100 for i in letters}}
        first = said(site.chat("A", max_tokens=6, **wish))
        assert first.isalpha()
        cached = site.chat("A", first, "B", max_tokens=20)
        site.service.shelf.clear()
        whole = site.chat("A", first, "B", max_tokens=20)
        reused = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (cached, whole)]
        assert reused[0] > 0 and reused[1] == 0
        assert whole["usage"]["prompt_tokens"] == cached["usage"]["prompt_tokens"]
        assert said(whole) == said(cached)


def test_control_tokens_in_messages_are_text(site: Site):
    plain = site.chat("x" * len(CONTROL))
    spelled = site.chat(CONTROL)
    assert spelled["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


def test_several_answers_seeds_and_stop_strings(site: Site):
    wish = {"temperature": 1.0, "seed": 3, "n": 2, "top_p": 0.95, "top_k": 90, "min_p": 0.01}
    one, two = (site.chat("Say", max_tokens=20, **wish) for _ in range(2))
    texts = [c["message"]["content"] for c in one["choices"]]
    assert texts == [c["message"]["content"] for c in two["choices"]]
    assert len(set(texts)) == 2 and [c["index"] for c in one["choices"]] == [0, 1]
    text = said(site.chat("Say", max_tokens=20))
    stop = text[4:6]
    cut = site.chat("Say", max_tokens=20, stop=[stop])
    assert said(cut) == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Say"}], "max_tokens": 20}
    events = site.stream(CHAT, {**body, "stop": stop})
    deltas = [c["delta"].get("content") or "" for e in events[:-1] for c in e["choices"]]
    assert "".join(deltas) == text[: text.index(stop)]


def test_several_prompts_have_several_answers_each(site: Site):
    wish = {"model": "tiny", "max_tokens": 6, "temperature": 1.5, "seed": 3, "n": 2}
    alone = [site.ok(TEXT, {**wish, "prompt": text})["choices"] for text in ("One", "Two")]
    both = site.ok(TEXT, {**wish, "prompt": ["One", "Two"]})["choices"]
    assert [c["index"] for c in both] == [0, 1, 2, 3]
    assert [c["text"] for c in both] == [c["text"] for choices in alone for c in choices]


def test_what_is_kept_of_a_conversation(site: Site):
    shelf, reused = site.service.shelf, "tokens_reused_total"
    shelf.clear()
    system = {"role": "system", "content": "Be brief."}
    body = {"model": "tiny", "messages": [system, *HI], "max_tokens": 5, "n": 2}
    answer = site.ok(CHAT, {**body, "temperature": 1.0, "seed": 1})
    texts = [c["message"]["content"] for c in answer["choices"]]
    assert len(shelf) == 2 and texts[0] != texts[1]
    asked = Conversation("tiny", body["messages"], [])
    first, second = (shelf.get(asked.then({"role": "assistant", "content": t})) for t in texts)
    assert shelf.get(f"id:{answer['id']}") is first is not second
    assert first.system == "Be brief." and len(first.unread) == 1 and first.ended == ""
    before = site.service.metrics.value(reused)
    more = [{"role": "assistant", "content": texts[1]}, {"role": "user", "content": "And?"}]
    usage = site.ok(CHAT, {**body, "n": 1, "messages": [*body["messages"], *more]})["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert site.service.metrics.value(reused) - before == cached == second.tokens
    # Of one that nobody heard nothing is kept.
    known = set(shelf._kept)
    with site.client.stream("POST", CHAT, json={**body, **ENDLESS, "stream": True}) as response:
        next(response.iter_lines())
    site.idle()
    assert set(shelf._kept) == known


def test_logprobs(site: Site):
    answer = site.chat("Say", max_tokens=3, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for token in content:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
        assert len(token["top_logprobs"]) == 2
        assert bytes(token["bytes"]).decode() == token["token"]
    body = {"model": "tiny", "messages": HI, "max_tokens": 3, "logprobs": True}
    refused = site.post(CHAT, {**body, "logprobs": False, "top_logprobs": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
    shown = [c["logprobs"] for e in site.stream(CHAT, body)[:-1] for c in e["choices"]]
    assert sum(len(x["content"]) for x in shown if x) == 3


def test_completions(site: Site):
    body = {"model": "tiny", "prompt": "Call me", "max_tokens": 8}
    answer = site.ok(TEXT, body)
    assert answer["object"] == "text_completion" and answer["usage"]["prompt_tokens"] == 7
    text = answer["choices"][0]["text"]
    assert "".join(c["text"] for e in site.stream(TEXT, body)[:-1] for c in e["choices"]) == text
    two = site.ok(TEXT, {**body, "prompt": ["a", "Call me"]})
    assert [c["index"] for c in two["choices"]] == [0, 1] and two["choices"][1]["text"] == text
    ids = site.service.engine.tokenizer.encode("Call me")
    assert site.ok(TEXT, {**body, "prompt": ids})["choices"][0]["text"] == text
    assert site.ok(TEXT, {**body, "prompt": [ids]})["choices"][0]["text"] == text
    # The earlier prompt and its answer, which ends a stock server for good.
    assert site.ok(TEXT, {**body, "prompt": "Call me" + text})["choices"][0]["text"]
    logprobs = site.ok(TEXT, {**body, "logprobs": 1})["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 8


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def force(site: Site, text: str):
    """logit_bias cannot spell a text; a tokenizer that decodes to it can."""
    ids = site.service.engine.tokenizer.encode(text, add_special_tokens=False)
    engine = site.service.engine
    step, left = engine.take, list(ids)

    def take(answers, logits):
        forced = mx.zeros_like(logits)
        token = left.pop(0) if left else 258
        forced[:, token] = 1e4
        step(answers, forced)

    engine.take = take
    return lambda: setattr(engine, "take", step)


@pytest.mark.parametrize("said", ["a <tool", "<tool_call", "a <"])
def test_what_might_have_begun_a_call_is_said_at_the_end(said, site: Site):
    undo = force(site, said)
    try:
        answer = site.chat("Weather?", max_tokens=200, tools=[WEATHER])
    finally:
        undo()
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")


def test_tools_are_called_and_their_results_read(site: Site):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    undo = force(site, f"Let me see. {call}")
    try:
        answer = site.chat("Weather?", max_tokens=200, tools=[WEATHER])
    finally:
        undo()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (made,) = choice["message"]["tool_calls"]
    assert made["function"]["name"] == "weather"
    assert json.loads(made["function"]["arguments"]) == {"city": "Oslo"}
    messages = [
        {"role": "user", "content": "Weather?"},
        choice["message"],
        {"role": "tool", "content": "Rain", "tool_call_id": made["id"]},
    ]
    body = {"model": "tiny", "messages": messages, "tools": [WEATHER], "max_tokens": 8}
    after = site.ok(CHAT, body)
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    # Without the snapshot it is the same conversation, of as many tokens.
    other = [{"role": "user", "content": "weather?"}, *messages[1:]]
    assert (
        site.ok(CHAT, {**body, "messages": other})["usage"]["prompt_tokens"]
        - after["usage"]["prompt_tokens"]
        < 8
    )
    undo = force(site, f"a{call}b")
    try:
        body = {**body, "messages": messages[:1], "max_tokens": 200}
        events = site.stream(CHAT, body)
    finally:
        undo()
    deltas = [c["delta"] for e in events[:-1] for c in e["choices"]]
    assert "".join(d.get("content") or "" for d in deltas) == "ab"
    assert [c["function"]["name"] for d in deltas for c in d.get("tool_calls", [])] == ["weather"]


def test_what_is_no_call_is_text(site: Site):
    text = "<tool_call>\nnot json</tool_call>"
    undo = force(site, text)
    try:
        answer = site.chat("Weather?", max_tokens=200, tools=[WEATHER])
    finally:
        undo()
    assert said(answer) == text and answer["choices"][0]["finish_reason"] == "stop"
    assert "tool_calls" not in answer["choices"][0]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(site: Site, stream):
    body = {"model": "tiny", "messages": HI, "stream": stream, **ENDLESS}
    with httpx.Client(base_url=site.url, timeout=60, trust_env=False) as client:
        if stream:
            with client.stream("POST", CHAT, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, timeout=1.0)
    site.idle()


def test_models(site: Site):
    assert [m["id"] for m in site.ok("/v1/models")["data"]] == ["tiny"]
    assert site.ok("/v1/models/tiny")["object"] == "model"
    for path in ("/v1/models/other", "/v1/models/tiny@book"):
        assert site.client.get(path).status_code == 404


def test_what_a_template_refuses_is_said():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with serving(template=strict + CHATML, rows=1) as site:
        body = {"model": "tiny", "messages": [{"role": "system", "content": "x"}]}
        response = site.post(CHAT, body)
        assert response.status_code == 400 and "user first" in response.json()["error"]["message"]
    with serving(template=None, rows=1) as site:
        response = site.post(CHAT, {"model": "tiny", "messages": HI})
        assert response.status_code == 400 and "/v1/completions" in response.text


def test_ending_lets_answers_end(monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.app.GRACE", 0.5)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with serving(rows=1) as site:
            future = pool.submit(site.chat, "Hi", **ENDLESS)
            wait_until(lambda: site.service.metrics.value("tokens_generated_total") > 3)
            # The server is asked to end while the client still listens.
            site.server.should_exit = True
            answer = future.result()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] > 3
