"""OpenAI's responses: a conversation that the server remembers, by the id of any answer in it."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from .chat import Conversation, Message, Prompt
from .openai import MAX_TOKENS, TEXT, text_of, tools_of, vocabulary, wish_of
from .parameters import APIError, Field, Table, check, parse
from .service import Answered, Running, Said, Service, gathered, new_id, normal_call, said
from .stream import SSE, openai_error

RESPONSES: Table = {
    "model": Field("string", required=True, high=300, note="the server's, or NAME@MEMORY"),
    "input": Field("text or array", required=True, low=1, high=TEXT),
    "instructions": Field("string", high=TEXT),
    "previous_response_id": Field("string", high=200, note="goes on from there, also repeatedly"),
    "max_output_tokens": Field("integer", low=1, high=MAX_TOKENS),
    "stream": Field("boolean", False),
    "temperature": Field("number", 0.0, 0, 2, note="0, the default, is greedy"),
    "top_p": Field("number", 1.0, 0, 1),
    "tools": Field("array", high=128),
    "tool_choice": Field("any", note='"auto" or "none"'),
    "parallel_tool_calls": Field("boolean", choices=(True,)),
    "text": Field("object", note='{"format": {"type": "text"}}'),
    "truncation": Field("string", choices=("disabled",)),
    "store": Field("boolean", note="answers are kept while there is room, whatever it says"),
    "metadata": Field("object", note="ignored"),
    "user": Field("string", high=1000, note="ignored"),
    "service_tier": Field("string", choices=("auto", "default")),
}
_ITEM: Table = {
    "type": Field("string", "message"),
    "id": Field("string", high=1000),
    "status": Field("string", high=100),
    "role": Field("string", choices=("system", "developer", "user", "assistant")),
    "content": Field("text or array", high=TEXT),
    "call_id": Field("string", high=1000),
    "name": Field("string", high=200),
    "arguments": Field("string", high=TEXT),
    "output": Field("text or array", high=TEXT),
    "phase": Field("string", high=100),
}


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [_item(item, f"input[{i}]") for i, item in enumerate(given)]


def _item(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise APIError(f"{where} must be an object", param="input")
    found = parse(item, _ITEM, f"{where}.")
    kind = found["type"]
    if kind == "function_call":
        name = check(found["name"], Field("string", low=1), f"{where}.name", "input")
        function = {"name": name, "arguments": found["arguments"] or "{}"}
        call = normal_call({"id": found["call_id"] or "", "function": function})
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        said = text_of(found["output"], f"{where}.output")
        return {"role": "tool", "content": said, "tool_call_id": found["call_id"] or ""}
    if kind != "message" or found["role"] is None or found["content"] is None:
        raise APIError(f"{where} is no message, call, or output of a call", param="input")
    role = "system" if found["role"] == "developer" else found["role"]
    return {"role": role, "content": text_of(found["content"], f"{where}.content")}


def _tools(given: list[Any]) -> list[dict[str, Any]]:
    known: Table = {
        **{"type": Field("string", required=True, choices=("function",))},
        **{"name": Field("string", required=True), "description": Field("string")},
        **{"parameters": Field("object", {}), "strict": Field("boolean")},
    }
    tools = []
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise APIError(f"tools[{i}] must be an object", param="tools")
        found = parse(tool, known, f"tools[{i}].")
        function = {k: found[k] for k in ("name", "description", "parameters") if found[k]}
        tools.append({"type": "function", "function": function})
    return tools


async def _asked(
    service: Service, found: dict[str, Any], tools: list[dict[str, Any]]
) -> tuple[Conversation, Prompt]:
    messages, previous = _messages(found["input"]), found["previous_response_id"]
    if previous is None:
        if found["instructions"]:
            messages.insert(0, {"role": "system", "content": found["instructions"]})
        conversation = await service.conversation(found["model"], messages, tools)
        return conversation, await service.aside(service.chat.prompt, conversation)
    service.check_model(found["model"])
    if found["instructions"]:
        raise APIError(
            "instructions stand at the begin of a conversation and cannot be changed after"
            " previous_response_id",
            param="instructions",
        )
    kept = service.shelf.get(f"id:{previous}")
    if kept is None:
        raise APIError(
            "the response is not kept, or no longer; send the whole conversation",
            status=404,
            param="previous_response_id",
            code="not_found",
        )
    prompt = await service.aside(service.chat.follow, kept, messages, tools)
    begin = [{"role": "system", "content": kept.system}] if kept.system else []
    after = Conversation(found["model"], [*begin, *messages], tools, None, f"after {previous}")
    return after, prompt


async def responses(service: Service, http: HTTPRequest, body: dict[str, Any]) -> Response:
    """POST /v1/responses"""
    found = parse(body, RESPONSES)
    form = (found["text"] or {}).get("format") or {"type": "text"}
    if form != {"type": "text"} or set(found["text"] or {}) - {"format"}:
        raise APIError('text must be {"format": {"type": "text"}}', param="text")
    spare = {"max_tokens": found["max_output_tokens"], "stop": None, "n": 1, "seed": None}
    spare |= {"top_k": 0, "min_p": 0, "logit_bias": None, "stream_options": None}
    spare |= {"presence_penalty": 0, "frequency_penalty": 0}
    wish = wish_of({**found, **spare}, vocabulary(service), None)
    listed = {"tools": _tools(found["tools"] or []), "tool_choice": found["tool_choice"]}
    tools = tools_of(listed, service.engine.tokenizer)
    service.engine.check_free(1)
    conversation, prompt = await _asked(service, found, tools)
    running = service.start([prompt], wish)
    answer_id, answered = new_id("resp_"), list[Answered]()
    stream = said(service, running, tools, conversation, answer_id, answered)
    head = {
        **{"id": answer_id, "object": "response", "created_at": int(time.time())},
        **{"model": found["model"], "error": None, "incomplete_details": None},
        **{"instructions": found["instructions"], "metadata": found["metadata"] or {}},
        **{"previous_response_id": found["previous_response_id"], "parallel_tool_calls": True},
        **{"temperature": found["temperature"], "top_p": found["top_p"]},
        **{"max_output_tokens": found["max_output_tokens"], "tools": found["tools"] or []},
        **{"tool_choice": found["tool_choice"] or "auto", "truncation": "disabled"},
        **{"text": {"format": {"type": "text"}}, "store": True},
    }
    if found["stream"]:
        return SSE(running, _events(running, stream, answered, head), _failure)
    await gathered(http, running, stream)
    return JSONResponse(_whole(head, running, answered[0]))


def _failure(error: APIError) -> str:
    return _event("error", 0, {**openai_error(error)["error"]})


def _event(kind: str, number: int, value: dict[str, Any]) -> str:
    data = json.dumps({**value, "type": kind, "sequence_number": number}, ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n"


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(name: str, text: str, status: str = "completed") -> dict[str, Any]:
    content = [] if status == "in_progress" else [_text_part(text)]
    kind = {"type": "message", "role": "assistant"}
    return {"id": name, **kind, "status": status, "content": content}


def _call_item(call: dict[str, Any]) -> dict[str, Any]:
    known = {"call_id": call["id"], **call["function"], "status": "completed"}
    return {"id": f"fc_{call['id'].removeprefix('call_')}", "type": "function_call", **known}


def _reasoning_item(name: str, text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": name, "type": "reasoning", "summary": [], "content": content}


def _status(answer: Answered) -> str:
    assert answer.done is not None
    return "incomplete" if answer.done.reason == "length" else "completed"


def _whole(
    head: dict[str, Any], running: Running, answer: Answered, name: str = ""
) -> dict[str, Any]:
    assert answer.done is not None
    output: list[dict[str, Any]] = []
    if answer.reasoning:
        output.append(_reasoning_item(new_id("rs_"), answer.reasoning))
    if answer.content or not answer.calls:
        output.append(_message_item(name or new_id("msg_"), answer.content, _status(answer)))
    output += [_call_item(call) for call in answer.calls]
    said = answer.done.tokens
    usage = {
        **{"input_tokens": running.prompt_tokens, "output_tokens": said},
        "input_tokens_details": {"cached_tokens": running.reused, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": running.prompt_tokens + said,
    }
    status = _status(answer)
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    ending = {"status": status, "incomplete_details": details}
    return {**head, **ending, "output": output, "usage": usage}


async def _events(
    running: Running, stream: AsyncIterator[Said], answered: list[Answered], head: dict[str, Any]
) -> AsyncIterator[str]:
    number = -1

    def event(kind: str, **value: Any) -> str:
        nonlocal number
        number += 1
        return _event(kind, number, value)

    begun = {**head, "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    name, n, opened = new_id("msg_"), 0, False
    async for item in stream:
        if item.read is not None:
            yield f": read {item.read.tokens} of {item.read.total}\n\n"
            continue
        where = {"item_id": name, "output_index": n, "content_index": 0}
        for part in item.parts:
            if part.kind != "content":
                continue
            if not opened:
                opened = True
                started = _message_item(name, "", "in_progress")
                yield event("response.output_item.added", output_index=n, item=started)
                yield event("response.content_part.added", **where, part=_text_part(""))
            more = {"delta": part.text, "logprobs": []}
            yield event("response.output_text.delta", **where, **more)
    answer = answered[0]
    if opened:
        whole_part = _text_part(answer.content)
        yield event("response.output_text.done", **where, text=answer.content, logprobs=[])
        yield event("response.content_part.done", **where, part=whole_part)
        ended = _message_item(name, answer.content, _status(answer))
        yield event("response.output_item.done", output_index=n, item=ended)
        n += 1
    for call in answer.calls:
        made = _call_item(call)
        where = {"item_id": made["id"], "output_index": n}
        waiting = {**made, "arguments": "", "status": "in_progress"}
        yield event("response.output_item.added", output_index=n, item=waiting)
        text = made["arguments"]
        yield event("response.function_call_arguments.delta", **where, delta=text)
        done = {"arguments": text, "name": made["name"]}
        yield event("response.function_call_arguments.done", **where, **done)
        yield event("response.output_item.done", output_index=n, item=made)
        n += 1
    whole = _whole(head, running, answer, name)
    yield event(f"response.{whole['status']}", response=whole)
