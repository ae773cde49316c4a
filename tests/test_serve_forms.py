"""Messages, tools, stops and answers in the forms of three APIs, one value at a time, without a
model."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from ahn_mlx.serve import anthropic, openai, responses
from ahn_mlx.serve.answers import Read, Token
from ahn_mlx.serve.parameters import APIError, parse
from ahn_mlx.serve.parts import Part
from ahn_mlx.serve.service import Answered, Said, normal_call


def refused(act, *given, **named) -> APIError:
    with pytest.raises(APIError) as error:
        act(*given, **named)
    assert error.value.status == 400
    return error.value


def asked(**values):
    return parse({"model": "m", "messages": [0], **values}, openai.CHAT)


def wish(top=None, **values):
    return openai.wish_of(asked(**values), 50, top)


def test_a_wish_has_defaults():
    found = wish()
    assert found.sampling.max_tokens == 1024 and found.sampling.temp == 0
    assert (found.sampling.top_p, found.sampling.top_k, found.sampling.min_p) == (1, 0, 0)
    assert (found.sampling.repetition_penalty, found.sampling.repetition_context_size) == (1, 0)
    assert (found.sampling.seed, found.sampling.stop, found.bias, found.top_logprobs) == (
        None,
        (),
        {},
        None,
    )
    assert (found.presence, found.frequency) == (0, 0)


def test_a_wish_is_what_was_asked_for():
    found = wish(
        **{"max_tokens": 7, "temperature": 0.001, "top_p": 0.5, "top_k": 3, "min_p": 0.25},
        **{"repetition_penalty": 1.5, "seed": -1, "stop": "x", "presence_penalty": -2},
        **{"frequency_penalty": 2, "logit_bias": {"0": -100, "49": 100}, "top": 4},
        stream_options={"include_usage": True},
    )
    sampling = found.sampling
    assert (sampling.max_tokens, sampling.temp, sampling.top_p) == (7, 0.001, 0.5)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.25, 1.5)
    assert sampling.seed == 2**64 - 1 and sampling.stop == ("x",) and found.top_logprobs == 4
    assert found.bias == {0: -100.0, 49: 100.0}
    assert (found.presence, found.frequency) == (-2, 2)
    assert wish(max_tokens=7, max_completion_tokens=9).sampling.max_tokens == 9
    assert 0 < wish(top_p=0).sampling.top_p < 1e-6
    assert wish(seed=5).sampling.seed == 5
    assert refused(wish, temperature=0.0009).param == "temperature"
    assert refused(wish, stream_options={"other": 1}).param == "other"


def test_stops_are_a_few_short_texts():
    assert wish(stop=16 * ["x" * 1000]).sampling.stop == 16 * ("x" * 1000,)
    assert wish(stop=[]).sampling.stop == ()
    for stop in (17 * ["x"], ["x" * 1001], [""], [5]):
        assert refused(wish, stop=stop).param == "stop"
    assert "stop[1]" in refused(wish, stop=["x", ""]).message


def test_biases_are_of_tokens_that_there_are():
    assert len(openai._bias({str(n): 0 for n in range(10_000)}, 10_000)) == 10_000
    many = {str(n): 0 for n in range(10_001)}
    assert "more than 10,000" in refused(openai._bias, many, 1 << 20).message
    for name in ("50", "-1", "1.0", "x", "\u0663", "0000000001", ""):
        assert refused(wish, logit_bias={name: 0}).param == "logit_bias"
    assert wish(logit_bias={"000000001": 0}).bias == {1: 0}
    for value in (-100.5, 100.5, "1", None):
        assert refused(wish, logit_bias={"1": value}).param == "logit_bias"


def message(role="user", content="x", **more):
    given = {"role": role, **({} if content is None else {"content": content}), **more}
    (found,) = openai.messages_of([given])
    return found


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GIVEN = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}


def test_messages_as_templates_take_them():
    for role in ("system", "user", "assistant", "tool"):
        assert message(role) == {"role": role, "content": "x"}
    assert message("developer") == {"role": "system", "content": "x"}
    more = {"name": "n", "tool_call_id": "t", "refusal": "r", "annotations": [], "reasoning": "q"}
    kept = {"role": "user", "content": "x", "name": "n", "tool_call_id": "t"}
    assert message(**more, reasoning_content="w") == kept
    assert message("assistant", None) == {"role": "assistant", "content": ""}
    said = message("assistant", None, tool_calls=[CALL])
    assert said == {"role": "assistant", "content": "", "tool_calls": [GIVEN]}
    parts = [{"type": kind, "text": kind[0]} for kind in ("text", "input_text", "output_text")]
    assert message(content=[*parts, {"type": "refusal", "refusal": "r"}])["content"] == "tior"
    assert message(content=[])["content"] == ""
    assert message(name="x" * 1000, tool_call_id="y" * 1000)["name"] == "x" * 1000


@pytest.mark.parametrize(
    ("given", "word"),
    [
        *((7, "messages[0] must be an object"), ({"content": "x"}, "messages[0].'role'")),
        *(({"role": "boss", "content": "x"}, "role must be one of"), ({"role": "user"}, "content")),
        ({"role": "user", "content": 5}, "messages[0].content must be a string or an array"),
        ({"role": "user", "content": [5]}, "content[0]: 'None' is not supported"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "content[0]: 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text must be a string"),
        ({"role": "user", "content": [{"type": "refusal", "text": "x"}]}, "content[0].text"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "is for the assistant"),
        ({"role": "user", "content": "x", "name": "x" * 1001}, "name must be at most 1,000"),
        ({"role": "user", "content": "x", "tool_call_id": "x" * 1001}, "at most 1,000"),
        ({"role": "assistant", "tool_calls": 129 * [CALL]}, "at most 128"),
        ({"role": "assistant", "tool_calls": [5]}, "calls of functions with names"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}, "with names"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "with names"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]},
            "arguments must be a string of JSON",
        ),
    ],
)
def test_messages_that_are_none(given, word):
    assert word in refused(openai.messages_of, [given]).message.replace("the length of ", "")


def test_calls_have_objects_for_arguments_where_they_are_one():
    assert normal_call(CALL) == GIVEN
    for text in ("{", "[" * 10**5, '{"a": NaN}'):
        call = {"function": {"name": "f", "arguments": text}}
        expected = {"name": "f", "arguments": text}
        assert normal_call(call) == {"type": "function", "id": "", "function": expected}
    assert openai._given_call({"id": 7, "function": {"name": "f"}}, "x") == {
        **{"type": "function", "id": "7", "function": {"name": "f", "arguments": ""}},
    }


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("able", [True, False])
def test_tools_are_functions_that_this_model_can_call(able):
    tokenizer = SimpleNamespace(has_tool_calling=able)

    def found(tools, choice=None):
        return openai.tools_of({"tools": tools, "tool_choice": choice}, tokenizer)

    assert found(None) == found([]) == found([TOOL], "none") == []
    for choice in (None, "auto"):
        if able:
            assert found([TOOL], choice) == [TOOL]
        else:
            error = refused(found, [TOOL], choice)
            assert (error.param, error.code) == ("tools", "unsupported")
    for choice in ("required", {"type": "function"}, 5):
        assert refused(found, [TOOL], choice).param == "tool_choice"
    for tool in (5, {}, {"type": "function"}, {**TOOL, "type": "x"}, {"function": {"name": "f"}}):
        assert "tools[1] must be a function with a name" in refused(found, [TOOL, tool]).message
    for name, wrong in (("name", 5), ("parameters", [])):
        tool = {"type": "function", "function": {"name": "f", name: wrong}}
        assert refused(found, [tool]).param == "tools"
    assert (
        found([{"type": "function", "function": {"name": "f", "parameters": None}}], "none") == []
    )


def test_prompts_are_texts_or_tokens():
    assert openai._prompts("a", 9) == ["a"]
    assert openai._prompts(["a", "b"], 9) == ["a", "b"]
    assert openai._prompts([0, 8], 9) == [[0, 8]]
    assert openai._prompts([[0], [8], "x"], 9) == [[0], [8], "x"]
    assert len(openai._prompts(128 * ["a"], 9)) == 128
    for given in ([], 129 * ["a"], [9], [-1], [[]], [[9]], [True], [[1.0]], [None], [{}]):
        assert refused(openai._prompts, given, 9).param == "prompt"


def test_anthropic_tools_and_texts():
    tool = {"name": "x" * 200, "input_schema": {"a": 1}, "description": "d", "type": "custom"}
    function = {"name": "x" * 200, "parameters": {"a": 1}, "description": "d"}
    assert anthropic._tool(tool, "t") == {"type": "function", "function": function}
    bare = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert anthropic._tool({"name": "f", "cache_control": {}}, "t") == bare
    for given in (5, {}, {"name": ""}, {"name": "x" * 201}, {"name": "f", "type": "bash"}):
        refused(anthropic._tool, given, "t")
    block = {"type": "text", "text": "b", "cache_control": {}, "citations": None}
    assert anthropic._text("a", "w") == "a"
    assert anthropic._text([{"type": "text", "text": "a"}, block], "w") == "ab"
    for given, param in ((5, "w"), ([5], "w[0]"), ([block, {"type": "image"}], "w[1]")):
        assert refused(anthropic._text, given, "w").param == param
    assert refused(anthropic._text, [{"type": "text"}], "w").param == "text"


def test_anthropic_messages_may_be_several():
    def found(content, role="user"):
        return anthropic._messages({"role": role, "content": content}, "m")

    assert found("x") == [{"role": "user", "content": "x"}]
    result = {
        "type": "tool_result",
        "tool_use_id": "t" * 1000,
        "content": [{"type": "text", "text": "r"}],
    }
    said = {"role": "tool", "content": "r", "tool_call_id": "t" * 1000}
    assert found([result]) == [said]
    assert found([result, {"type": "text", "text": "x"}]) == [
        said,
        {"role": "user", "content": "x"},
    ]
    assert found([{**result, "content": None}])[0]["content"] == ""
    use = {"type": "tool_use", "id": "u", "name": "n" * 200, "input": {"a": 1}}
    thought = [{"type": "thinking", "thinking": "t"}, {"type": "redacted_thinking"}]
    function = {"name": "n" * 200, "arguments": {"a": 1}}
    calls = [{"type": "function", "id": "u", "function": function}]
    expected = [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert found([*thought, use], "assistant") == expected
    assert found(thought, "assistant") == [{"role": "assistant", "content": ""}]
    for content, role in (
        *(([use], "user"), ([result], "assistant"), (thought, "user"), ([5], "user")),
        *(([{**use, "name": "n" * 201}], "assistant"), ([{**use, "input": "x"}], "assistant")),
        *(([{**use, "name": None}], "assistant"), ([{**result, "tool_use_id": 5}], "user")),
        *(([{**result, "tool_use_id": "t" * 1001}], "user"), ("x", "system"), (None, "user")),
    ):
        refused(found, content, role)
    assert refused(anthropic._messages, 5, "m").param == "messages"


def answer(reason="stop", stop=None, calls=(), content="", reasoning="", tokens=3) -> Answered:
    found = Answered()
    found.content, found.reasoning, found.calls = content, reasoning, list(calls)
    found.done = SimpleNamespace(reason=reason, stop=stop, tokens=tokens)
    return found


RUNNING = SimpleNamespace(prompt_tokens=20, reused=12)
MADE = {"id": "call_7", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_why_an_answer_ended():
    def ending(*given, **named):
        found = answer(*given, **named)
        return (*anthropic._ending(found).values(), openai._finish(found), responses._status(found))

    assert ending() == ("end_turn", None, "stop", "completed")
    assert ending("length") == ("max_tokens", None, "length", "incomplete")
    assert ending("stop", "x") == ("stop_sequence", "x", "stop", "completed")
    assert ending("stop", calls=[MADE]) == ("tool_use", None, "tool_calls", "completed")
    assert ending("cancelled") == ("end_turn", None, "cancelled", "completed")


def test_what_an_answer_took():
    found = answer(tokens=5)
    assert anthropic._usage(RUNNING, found) == {
        **{"input_tokens": 8, "cache_read_input_tokens": 12, "cache_creation_input_tokens": 0},
        "output_tokens": 5,
    }
    assert anthropic._usage(RUNNING, None)["output_tokens"] == 0
    assert openai.usage_of(RUNNING, [found, answer(tokens=4), Answered()]) == {
        **{"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29},
        "prompt_tokens_details": {"cached_tokens": 12},
    }
    usage = responses._whole({}, RUNNING, found)["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (20, 5, 25)
    assert usage["input_tokens_details"] == {"cached_tokens": 12, "cache_write_tokens": 0}


def test_calls_of_an_answer():
    use = {"type": "tool_use", "id": "call_7", "name": "f", "input": {"a": 1}}
    assert anthropic._use(MADE) == use
    for text in ("[1]", "{", '{"a": 1e999}', "[" * 10**5):
        call = {**MADE, "function": {"name": "f", "arguments": text}}
        assert anthropic._use(call)["input"] == {}
    assert responses._call_item(MADE) == {
        **{"id": "fc_7", "type": "function_call", "call_id": "call_7", "name": "f"},
        **{"arguments": '{"a": 1}', "status": "completed"},
    }


def test_blocks_of_a_message():
    use, thought = anthropic._use(MADE), {"type": "thinking", "thinking": "t", "signature": ""}
    text = {"type": "text", "text": "x"}
    for given, blocks in (
        *(({}, [{**text, "text": ""}]), ({"content": "x"}, [text]), ({"calls": [MADE]}, [use])),
        *(({"reasoning": "t"}, [thought]), ({"content": "x", "calls": [MADE]}, [text, use])),
        ({"content": "x", "reasoning": "t", "calls": [MADE]}, [thought, text, use]),
    ):
        assert anthropic._blocks(answer(**given)) == blocks


def test_a_whole_response():
    head = {"id": "r", "status": "in_progress"}
    whole = responses._whole(head, RUNNING, answer("length", content="x", reasoning="t"), "m")
    assert whole["id"] == "r" and whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    thought, said = whole["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "t"}]
    assert (thought["type"], thought["summary"], thought["id"][:3]) == ("reasoning", [], "rs_")
    part = {"type": "output_text", "text": "x", "annotations": [], "logprobs": []}
    expected = {"id": "m", "type": "message", "role": "assistant", "status": "incomplete"}
    assert said == {**expected, "content": [part]}
    (call,) = responses._whole(head, RUNNING, answer(calls=[MADE]))["output"]
    assert call["type"] == "function_call"
    empty = responses._whole(head, RUNNING, answer())
    assert empty["incomplete_details"] is None and empty["output"][0]["id"][:4] == "msg_"
    assert responses._message_item("m", "x", "in_progress")["content"] == []


def test_items_of_a_response():
    assert responses._messages("x") == [{"role": "user", "content": "x"}]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'}
    made = {"type": "function", "id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
    output = {"type": "function_call_output", "call_id": "c", "output": "o"}
    text = {"role": "developer", "content": [{"type": "input_text", "text": "x"}]}
    plain = {"type": "message", "role": "user", "content": "y", "id": "i", "status": "completed"}
    assert responses._messages([call, output, text, plain]) == [
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "o", "tool_call_id": "c"},
        {"role": "system", "content": "x"},
        {"role": "user", "content": "y"},
    ]
    bare = {"type": "function_call", "name": "f"}
    found = responses._item(bare, "i")["tool_calls"][0]
    assert (found["id"], found["function"]["arguments"]) == ("", {})
    for given in (
        *(
            5,
            {"type": "image"},
            {"role": "user"},
            {"content": "x"},
            {"role": "boss", "content": ""},
        ),
        *({**call, "name": ""}, {**call, "name": None}, {**call, "name": "x" * 201}),
        *(
            {**plain, "id": "x" * 1001},
            {**plain, "status": "x" * 101},
            {**plain, "phase": "x" * 101},
        ),
        {**output, "call_id": "x" * 1001},
    ):
        refused(responses._item, given, "i")
    most = {"id": "x" * 1000, "status": "x" * 100, "phase": "x" * 100, "call_id": "x" * 1000}
    assert responses._item({**call, **most, "name": "x" * 200}, "i")["role"] == "assistant"


def test_tools_of_a_response():
    full = {
        "type": "function",
        "name": "f",
        "description": "d",
        "parameters": {"a": 1},
        "strict": True,
    }
    function = {"name": "f", "description": "d", "parameters": {"a": 1}}
    bare = {"type": "function", "name": "g"}
    assert responses._tools([full, bare]) == [
        {"type": "function", "function": function},
        {"type": "function", "function": {"name": "g"}},
    ]
    for given in (5, {"type": "function"}, {"name": "f"}, {**bare, "type": "custom"}):
        refused(responses._tools, [given])


OTHER = {"id": "call_8", "type": "function", "function": {"name": "g", "arguments": "{}"}}
ENDED = SimpleNamespace(reason="stop", stop=None, tokens=6)
TOKENS = [Token(7, -0.5, ((7, -0.5), (8, -1.0))), Token(8, -0.25), Token(9, -2.0)]
# A prompt that is read, a thought, half a character, two texts, and two calls.
ITEMS = [
    Said(0, [], None, None, Read(3, 20)),
    Said(0, [Part("reasoning", "t")], TOKENS[0], None),
    Said(0, [], TOKENS[1], None),
    Said(0, [Part("content", "aä"), Part("content", "b")], TOKENS[2], None),
    Said(0, [Part("call", "", MADE)], None, None),
    Said(0, [Part("call", "", OTHER)], None, ENDED),
]
PIECE = {7: "p", 8: "", 9: "aäb"}
SERVICE = SimpleNamespace(
    engine=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: PIECE[ids[0]]))
)


def streamed(events, items, n=1):
    """What comes of items: an event's name, if it has one, and its data; or a comment."""
    answered = [Answered() for _ in range(n)]

    async def stream():
        for item in items:
            if item.read is None:
                answered[item.choice].add(item)
            yield item

    async def all_of():
        return [line async for line in events(stream(), answered)]

    found = []
    for text in asyncio.run(all_of()):
        assert text.endswith("\n\n") and "\\u" not in text
        *kind, data = text[:-2].split("\n")
        if data.startswith("data: {"):
            data = json.loads(data.removeprefix("data: "))
        found.append((kind[0].removeprefix("event: "), data) if kind else data)
    return found


def test_events_of_a_message():
    head = {"id": "msg_1", "content": [], "stop_reason": None}
    usage = anthropic._usage(RUNNING, answer(tokens=6))
    found = streamed(lambda s, a: anthropic._events(RUNNING, s, a, head), ITEMS)
    assert all(data["type"] == kind for kind, data in found)

    def start(n, block):
        return "content_block_start", {"index": n, "content_block": block}

    def delta(n, **said):
        return "content_block_delta", {"index": n, "delta": said}

    def stop(n):
        return "content_block_stop", {"index": n}

    use = {"type": "tool_use", "input": {}}
    assert [(kind, {k: v for k, v in data.items() if k != "type"}) for kind, data in found] == [
        ("message_start", {"message": {**head, "usage": {**usage, "output_tokens": 0}}}),
        ("ping", {}),
        start(0, {"type": "thinking", "thinking": "", "signature": ""}),
        delta(0, type="thinking_delta", thinking="t"),
        stop(0),
        start(1, {"type": "text", "text": ""}),
        *(delta(1, type="text_delta", text="aä"), delta(1, type="text_delta", text="b"), stop(1)),
        start(2, {**use, "id": "call_7", "name": "f"}),
        *(delta(2, type="input_json_delta", partial_json='{"a": 1}'), stop(2)),
        start(3, {**use, "id": "call_8", "name": "g"}),
        *(delta(3, type="input_json_delta", partial_json="{}"), stop(3)),
        (
            "message_delta",
            {"delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": usage},
        ),
        ("message_stop", {}),
    ]
    cut = [ITEMS[3], Said(0, [], None, ENDED)]
    kinds = [kind for kind, _ in streamed(lambda s, a: anthropic._events(RUNNING, s, a, {}), cut)]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_events_of_a_response():
    head = {"id": "resp_1"}
    found = streamed(lambda s, a: responses._events(RUNNING, s, a, head), ITEMS)
    assert found.pop(2) == ": read 3 of 20"
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    assert all(data["type"] == kind for kind, data in found)
    name = found[2][1]["item"]["id"]
    assert name.startswith("msg_")
    begun = {"response": {**head, "status": "in_progress", "output": [], "usage": None}}
    part = {"type": "output_text", "annotations": [], "logprobs": []}
    item = {"id": name, "type": "message", "role": "assistant"}
    text = {"item_id": name, "output_index": 0, "content_index": 0}

    def called(n, call, number):
        function = call["function"]
        where = {"item_id": f"fc_{number}", "output_index": n}
        made = {"id": f"fc_{number}", "type": "function_call", "call_id": call["id"], **function}
        waiting = {**made, "arguments": "", "status": "in_progress"}
        said = function["arguments"]
        return [
            ("response.output_item.added", {"output_index": n, "item": waiting}),
            ("response.function_call_arguments.delta", {**where, "delta": said}),
            (
                "response.function_call_arguments.done",
                {**where, "arguments": said, "name": function["name"]},
            ),
            (
                "response.output_item.done",
                {"output_index": n, "item": {**made, "status": "completed"}},
            ),
        ]

    last = found.pop()
    own = ("type", "sequence_number")
    assert [(kind, {k: v for k, v in data.items() if k not in own}) for kind, data in found] == [
        ("response.created", begun),
        ("response.in_progress", begun),
        (
            "response.output_item.added",
            {"output_index": 0, "item": {**item, "status": "in_progress", "content": []}},
        ),
        ("response.content_part.added", {**text, "part": {**part, "text": ""}}),
        ("response.output_text.delta", {**text, "delta": "aä", "logprobs": []}),
        ("response.output_text.delta", {**text, "delta": "b", "logprobs": []}),
        ("response.output_text.done", {**text, "text": "aäb", "logprobs": []}),
        ("response.content_part.done", {**text, "part": {**part, "text": "aäb"}}),
        (
            "response.output_item.done",
            {
                "output_index": 0,
                "item": {**item, "status": "completed", "content": [{**part, "text": "aäb"}]},
            },
        ),
        *called(1, MADE, 7),
        *called(2, OTHER, 8),
    ]
    kind, whole = last
    assert kind == "response.completed" and whole["response"]["id"] == "resp_1"
    assert [one["type"] for one in whole["response"]["output"]] == [
        *("reasoning", "message", "function_call", "function_call"),
    ]
    assert whole["response"]["output"][1]["id"] == name
    short = [ITEMS[4], Said(0, [], None, SimpleNamespace(reason="length", stop=None, tokens=1))]
    kinds = [kind for kind, _ in streamed(lambda s, a: responses._events(RUNNING, s, a, {}), short)]
    assert kinds[2] == "response.output_item.added" and kinds[-1] == "response.incomplete"
    assert "response.output_text.done" not in kinds


@pytest.mark.parametrize("asked", [True, False])
def test_chunks_of_a_chat(asked):
    head, running = {"id": "c"}, SimpleNamespace(**vars(RUNNING), answers=2)
    found = {"stream_options": {"include_usage": asked}, "logprobs": asked}
    items = [*ITEMS, Said(1, [Part("content", "z")], TOKENS[2], None)]
    items.append(Said(1, [], None, SimpleNamespace(reason="length", stop=None, tokens=1)))
    said = streamed(lambda s, a: openai._chat_chunks(SERVICE, running, s, a, head, found), items, 2)
    assert said.pop() == "data: [DONE]" and said.pop(2) == ": read 3 of 20"
    usage = {"usage": None} if asked else {}
    if asked:
        counted = openai.usage_of(running, [answer(tokens=6), answer(tokens=1)])
        kept = {"id": "c", "object": "chat.completion.chunk", "choices": []}
        assert said.pop() == {**kept, "usage": counted}
    choices = []
    for chunk in said:
        (choice,) = chunk["choices"]
        kept = {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}
        assert chunk == {**kept, **usage}
        ends = choice["finish_reason"]
        tokens = choice["logprobs"] and [t["logprob"] for t in choice["logprobs"]["content"]]
        choices.append((choice["index"], choice["delta"], tokens, ends))

    def called(n, call):
        return {"tool_calls": [{"index": n, **call}]}

    def at(n):
        return [TOKENS[n].logprob] if asked else None

    role = {"role": "assistant", "content": ""}
    assert choices == [
        *((0, role, None, None), (1, role, None, None)),
        (0, {"reasoning_content": "t"}, at(0), None),
        *([(0, {}, at(1), None)] if asked else []),
        *((0, {"content": "aä"}, at(2), None), (0, {"content": "b"}, None, None)),
        *((0, called(0, MADE), None, None), (0, called(1, OTHER), None, None)),
        (0, {}, None, "tool_calls"),
        *((1, {"content": "z"}, at(2), None), (1, {}, None, "length")),
    ]


@pytest.mark.parametrize("asked", [True, False])
def test_chunks_of_a_text(asked):
    head, running = {"id": "t"}, SimpleNamespace(**vars(RUNNING), answers=1)
    found = {"stream_options": {"include_usage": True} if asked else None}
    found["logprobs"] = 0 if asked else None
    items = [*ITEMS[:1], *ITEMS[2:4], Said(0, [], None, ENDED)]
    said = streamed(lambda s, a: openai._text_chunks(SERVICE, running, s, a, head, found), items)
    assert said.pop() == "data: [DONE]" and said.pop(0) == ": read 3 of 20"
    if asked:
        usage = openai.usage_of(running, [answer(tokens=6)])
        assert said.pop() == {**head, "choices": [], "usage": usage}

    def chunk(text, token, ends):
        of_token = {"tokens": [PIECE[token.id]], "token_logprobs": [token.logprob]} if token else {}
        logprobs = {**of_token, "top_logprobs": [{}]} if token and asked else None
        choice = {"index": 0, "text": text, "finish_reason": ends, "logprobs": logprobs}
        return {**head, "choices": [choice], **({"usage": None} if asked else {})}

    assert said == [
        *([chunk("", TOKENS[1], None)] if asked else []),
        *(chunk("aäb", TOKENS[2], None), chunk("", None, "stop")),
    ]


def test_what_is_known_of_a_token():
    assert openai._logprob(SERVICE, TOKENS[0]) == {
        **{"token": "p", "logprob": -0.5, "bytes": [112]},
        "top_logprobs": [
            {"token": "p", "logprob": -0.5, "bytes": [112]},
            {"token": "", "logprob": -1.0, "bytes": []},
        ],
    }
    assert openai._old_logprobs(SERVICE, TOKENS[:1]) == {
        **{"tokens": ["p"], "token_logprobs": [-0.5], "top_logprobs": [{"p": -0.5, "": -1.0}]},
    }
    found = answer(content="x", calls=[MADE], reasoning="r")
    found.tokens = TOKENS[2:]
    assert openai._choice(SERVICE, 3, found, True) == {
        **{"index": 3, "finish_reason": "tool_calls"},
        "logprobs": {"content": [openai._logprob(SERVICE, TOKENS[2])]},
        "message": {
            **{"role": "assistant", "content": "x", "refusal": None, "reasoning_content": "r"},
            "tool_calls": [MADE],
        },
    }
    silent = openai._choice(SERVICE, 0, answer(calls=[MADE]), False)
    assert silent["message"]["content"] is None and silent["logprobs"] is None
    plain = openai._choice(SERVICE, 0, answer(), False)
    assert plain["message"] == {"role": "assistant", "content": "", "refusal": None}
