"""Responses, Anthropic's messages, health, metrics, and the document that describes all."""

import re
import time

import pytest
from serving import Site, serving
from test_serve_chat import WEATHER, force

from ahn_mlx.serve.app import App
from ahn_mlx.serve.openapi import ROUTES

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def site():
    with serving(rows=6) as site:
        yield site


def text_of(response) -> str:
    return response["output"][0]["content"][0]["text"]


def test_responses_go_on_from_any_of_them(site: Site):
    body = {"model": "tiny", "input": "One", "max_output_tokens": 10, "instructions": "Be."}
    first = site.ok("/v1/responses", body)
    assert first["object"] == "response" and first["status"] == "incomplete"
    assert first["incomplete_details"] == {"reason": "max_output_tokens"}
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "One"}]
    chat = site.ok(
        "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 10}
    )
    assert text_of(first) == chat["choices"][0]["message"]["content"]
    after = {**body, "previous_response_id": first["id"], "input": "Two"}
    del after["instructions"]
    second = site.ok("/v1/responses", after)
    other = site.ok("/v1/responses", {**after, "input": "Three"})  # a fork
    again = site.ok("/v1/responses", after)
    assert text_of(second) == text_of(again) != text_of(other)
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
    whole = [*messages, chat["choices"][0]["message"], {"role": "user", "content": "Two"}]
    said = site.ok("/v1/chat/completions", {"model": "tiny", "messages": whole, "max_tokens": 10})
    assert said["choices"][0]["message"]["content"] == text_of(second)
    refused = site.post("/v1/responses", {**after, "instructions": "Be other."})
    assert refused.json()["error"]["param"] == "instructions"
    refused = site.post("/v1/responses", {**after, "previous_response_id": "resp_x"})
    assert refused.status_code == 404


def test_a_response_says_what_was_asked(site: Site):
    plain = {"model": "tiny", "input": "One", "max_output_tokens": 3}
    made = site.ok("/v1/responses", plain)
    usual = {
        **{"object": "response", "model": "tiny", "error": None, "instructions": None},
        **{"previous_response_id": None, "parallel_tool_calls": True, "metadata": {}},
        **{"temperature": 0.0, "top_p": 1.0, "max_output_tokens": 3, "tools": []},
        **{"tool_choice": "auto", "truncation": "disabled", "store": True},
        **{"text": {"format": {"type": "text"}}},
    }
    assert {name: made[name] for name in usual} == usual
    asked = {
        **{"instructions": "Be.", "temperature": 0.5, "top_p": 0.25, "metadata": {"a": "b"}},
        **{"tools": [{"type": "function", **WEATHER["function"]}], "tool_choice": "none"},
    }
    other = site.ok("/v1/responses", {**plain, **asked})
    assert {name: other[name] for name in usual} == {**usual, **asked}
    assert other["id"] != made["id"] and abs(other["created_at"] - time.time()) < 60
    after = site.ok("/v1/responses", {**plain, "previous_response_id": made["id"]})
    assert after["previous_response_id"] == made["id"]


@pytest.mark.parametrize(
    "text",
    [
        {"format": {"type": "json_object"}},
        {"format": {"type": "text", "strict": True}},
        {"format": {"type": "text"}, "verbosity": "low"},
        {"verbosity": "low"},
    ],
)
def test_a_response_is_text(text, site: Site):
    asked = {"model": "tiny", "input": "Hi", "max_output_tokens": 1}
    refused = site.post("/v1/responses", {**asked, "text": text})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "text"
    for plain in ({}, {"format": None}, {"format": {"type": "text"}}):
        assert site.ok("/v1/responses", {**asked, "text": plain})["object"] == "response"


def test_responses_stream(site: Site):
    body = {"model": "tiny", "input": HI, "max_output_tokens": 10}
    events = site.stream("/v1/responses", body)
    kinds = [e["type"] for e in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(site.ok("/v1/responses", body))
    assert text_of(events[-1]["response"]) == "".join(deltas)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_instructions_stay_with_all_that_follows(site: Site):
    body = {"model": "tiny", "input": "One", "max_output_tokens": 4}
    answer = site.ok("/v1/responses", {**body, "instructions": "Be brief."})
    for _ in range(2):  # each after the one before
        answer = site.ok("/v1/responses", {**body, "previous_response_id": answer["id"]})
        assert site.service.shelf.get(f"id:{answer['id']}").system == "Be brief."


def test_responses_call_tools(site: Site):
    tool = {"type": "function", **WEATHER["function"]}
    body = {"model": "tiny", "input": "Weather?", "max_output_tokens": 200, "tools": [tool]}
    undo = force(site, CALL)
    try:
        first = site.ok("/v1/responses", body)
    finally:
        undo()
    (call,) = first["output"]
    assert (call["type"], call["name"]) == ("function_call", "weather")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Rain"}
    after = {**body, "input": [result], "previous_response_id": first["id"]}
    assert site.ok("/v1/responses", {**after, "max_output_tokens": 5})["usage"]["output_tokens"]
    undo = force(site, CALL)
    try:
        kinds = [e["type"] for e in site.stream("/v1/responses", body)]
    finally:
        undo()
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/messages", {"messages": HI, "max_tokens": 2}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 2}),
    ],
)
def test_one_question_is_answered_once(path, body, site: Site):
    before = site.service.metrics.value("answers_total")
    site.ok(path, {"model": "tiny", **body})
    site.idle()
    assert site.service.metrics.value("answers_total") == before + 1


def test_what_an_api_has_no_word_for_leaves_an_answer_to_chance(site: Site):
    plain = {"model": "tiny", "temperature": 1}
    messages = {**plain, "messages": HI, "max_tokens": 20}
    said = {site.ok("/v1/messages", messages)["content"][0]["text"] for _ in range(3)}
    assert len(said) == 3
    asked = {**plain, "input": "Hi", "max_output_tokens": 20}
    assert len({text_of(site.ok("/v1/responses", asked)) for _ in range(3)}) == 3


def test_anthropic_messages(site: Site):
    body = {"model": "tiny", "max_tokens": 10, "messages": HI, "system": "Be."}
    answer = site.ok("/v1/messages", body)
    assert answer["type"] == "message" and answer["stop_reason"] == "max_tokens"
    assert answer["usage"]["output_tokens"] == 10
    messages = [{"role": "system", "content": "Be."}, *HI]
    chat = site.ok(
        "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 10}
    )
    text = chat["choices"][0]["message"]["content"]
    assert answer["content"] == [{"type": "text", "text": text}]
    shown = {k: body[k] for k in ("model", "messages", "system")}
    counted = site.ok("/v1/messages/count_tokens", shown)
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]
    events = site.stream("/v1/messages", body)
    kinds = [e["type"] for e in events if e["type"] != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(deltas) == text
    cut = site.ok("/v1/messages", {**body, "stop_sequences": [text[3:5]]})
    assert cut["stop_reason"] == "stop_sequence" and cut["stop_sequence"] == text[3:5]
    parts = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    same = {**body, "messages": [{"role": "user", "content": parts}]}
    assert site.ok("/v1/messages", same)["content"] == answer["content"]


def test_anthropic_tools(site: Site):
    function = WEATHER["function"]
    tool = {"name": "weather", "input_schema": function["parameters"], "description": "x"}
    body = {"model": "tiny", "max_tokens": 200, "messages": HI, "tools": [tool]}
    undo = force(site, f"Well. {CALL}")
    try:
        answer = site.ok("/v1/messages", body)
    finally:
        undo()
    text, use = answer["content"]
    assert text == {"type": "text", "text": "Well. "} and answer["stop_reason"] == "tool_use"
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "Rain"}
    messages = [
        *HI,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    after = site.ok("/v1/messages", {**body, "messages": messages, "max_tokens": 4})
    assert after["usage"]["cache_read_input_tokens"] > 50
    undo = force(site, CALL)
    try:
        events = site.stream("/v1/messages", body)
    finally:
        undo()
    parts = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert [p["type"] for p in parts] == ["input_json_delta"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "more, word",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages[0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"stop_sequences": [1]}, "stop[0]"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ],
)
def test_anthropic_refusals_name_what_is_wrong(site: Site, more, word):
    response = site.post("/v1/messages", {"model": "tiny", "max_tokens": 4, "messages": HI, **more})
    assert response.status_code == 400
    answer = response.json()
    assert answer["type"] == "error" and word in answer["error"]["message"]


def test_health_and_metrics(site: Site):
    before = site.service.metrics.value("tokens_read_total")
    usage = site.chat("How much of this is read?", max_tokens=5)["usage"]
    # The last token of a prompt goes in with the first step.
    after = site.service.metrics.value("tokens_read_total")
    assert after - before == usage["prompt_tokens"] - 1 > 20
    health = site.ok("/health")
    assert health["status"] == "ok" and 0 <= health["heartbeat_seconds"] < 5
    beat = re.search(r"^ahn_heartbeat_seconds (\S+)$", site.client.get("/metrics").text, re.M)
    assert beat and 0 <= float(beat[1]) < 5
    text = site.client.get("/metrics").text
    values = dict(re.findall(r"^(ahn_\w+(?:{[^}]*})?) (\S+)$", text, re.M))
    assert int(values["ahn_tokens_generated_total"]) >= 5
    assert values["ahn_rows"] == "6" and values["ahn_rows_busy"] == "0"
    assert int(values["ahn_row_bytes"]) == health["row_bytes"]
    assert 'ahn_requests_total{route="/v1/chat/completions",status="200"}' in values
    assert int(values["ahn_first_token_seconds_count"]) >= 1
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) ahn_\w+ .+|ahn_\w+({[^}]*})? \S+", line), line


def test_the_heartbeat_tells_when_the_thread_is_stuck(site: Site, monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.engine.STUCK", -1.0)
    response = site.client.get("/health")
    assert response.status_code == 503 and response.json()["status"] == "stuck"


def test_row_bytes_are_those_of_a_full_row(site: Site):
    site.chat("x" * 300, max_tokens=80)
    kept = [kept.session.nbytes for kept, _ in site.service.shelf._kept.values()]
    full = max(kept)
    slot = site.service.row_bytes - full  # what leaves next is held while a row answers
    assert 0 <= slot < site.service.row_bytes / 30


def test_the_document_lists_every_route(site: Site):
    document = site.ok("/openapi.json")
    listed = {(m.upper(), path) for path, ms in document["paths"].items() for m in ms}
    served = {
        (method, route.path)
        for route in App(site.service, None).routes()
        for method in route.methods
        if method != "HEAD"
    }
    assert listed == served == {(m.upper(), path) for m, path, *_ in ROUTES}
    for methods in document["paths"].values():
        for operation in methods.values():
            for schema in str(operation).split("'$ref': '")[1:]:
                assert schema.startswith("#/components/schemas/Error")
