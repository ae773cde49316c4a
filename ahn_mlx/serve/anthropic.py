"""Anthropic's messages."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from .chat import Message, Prompt
from .openai import MAX_TOKENS, TEXT, tools_of, vocabulary, wish_of
from .parameters import APIError, Field, Table, check, parse, plain_json
from .service import Answered, Running, Said, Service, gathered, new_id, said
from .stream import SSE

_ASKED: Table = {
    "model": Field("string", required=True, high=300, note="the server's, or NAME@MEMORY"),
    "messages": Field("array", required=True, low=1, high=10_000),
    "system": Field("text or array", high=TEXT),
    "tools": Field("array", high=128),
    "tool_choice": Field("object", note='{"type": "auto"} or {"type": "none"}'),
}
MESSAGES: Table = {
    **_ASKED,
    "max_tokens": Field("integer", required=True, low=1, high=MAX_TOKENS),
    "stream": Field("boolean", False),
    "temperature": Field("number", 0.0, 0, 1, note="0, the default, is greedy"),
    "top_p": Field("number", 1.0, 0, 1),
    "top_k": Field("integer", 0, 0, 1 << 20),
    "stop_sequences": Field("array", high=16),
    "metadata": Field("object", note="ignored"),
    "service_tier": Field("string", choices=("auto", "standard_only")),
}
COUNT: Table = _ASKED

_TEXT_BLOCK: Table = {
    "type": Field("string", required=True),
    "text": Field("string", required=True, high=TEXT),
    "cache_control": Field("object"),  # ignored: conversations are kept anyway
    "citations": Field("any"),
}


def anthropic_error(error: APIError) -> dict[str, Any]:
    """The body of an error as Anthropic has it."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kinds |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
    return {
        "type": "error",
        "error": {"type": kinds.get(error.status, kind), "message": error.message},
    }


def _failure(error: APIError) -> str:
    return _event("error", anthropic_error(error))


def _event(kind: str, value: dict[str, Any]) -> str:
    data = json.dumps({"type": kind, **value}, ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n"


async def _asked(
    service: Service, found: dict[str, Any]
) -> tuple[Any, Prompt, list[dict[str, Any]]]:
    """The conversation, its prompt, and tools."""
    tools = [_tool(t, f"tools[{i}]") for i, t in enumerate(found["tools"] or [])]
    choice = (found["tool_choice"] or {"type": "auto"}).get("type")
    if choice not in ("auto", "none"):
        raise APIError('tool_choice must be of type "auto" or "none"', param="tool_choice")
    tools = tools_of({"tools": tools, "tool_choice": choice}, service.engine.tokenizer)
    messages: list[Message] = []
    if found["system"]:
        messages.append({"role": "system", "content": _text(found["system"], "system")})
    for i, given in enumerate(found["messages"]):
        messages += _messages(given, f"messages[{i}]")
    conversation = await service.conversation(found["model"], messages, tools)
    prompt = await service.aside(service.chat.prompt, conversation)
    return conversation, prompt, tools


def _tool(given: Any, where: str) -> dict[str, Any]:
    known = {
        **{"name": Field("string", required=True, low=1, high=200)},
        **{"description": Field("string", high=TEXT), "input_schema": Field("object", {})},
        **{"type": Field("string", choices=("custom",)), "cache_control": Field("object")},
    }
    if not isinstance(given, dict):
        raise APIError(f"{where} must be an object", param="tools")
    found = parse(given, known, f"{where}.")
    function = {"name": found["name"], "parameters": found["input_schema"]}
    if found["description"]:
        function["description"] = found["description"]
    return {"type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise APIError(f"{where} must be a string or an array", param=where)
    texts = []
    for i, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text":
            kind = block.get("type") if isinstance(block, dict) else None
            name = f"{where}[{i}]"
            raise APIError(f"{name}: {str(kind)[:100]!r} is not supported, only text", param=name)
        texts.append(parse(block, _TEXT_BLOCK, f"{where}[{i}].")["text"])
    return "".join(texts)


def _messages(given: Any, where: str) -> list[Message]:
    """One message of a client, which may be several of a template."""
    if not isinstance(given, dict):
        raise APIError(f"{where} must be an object", param="messages")
    known = {
        "role": Field("string", required=True, choices=("user", "assistant")),
        "content": Field("text or array", required=True, high=TEXT),
    }
    found = parse(given, known, f"{where}.")
    role, content = found["role"], found["content"]
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[Message] = []
    texts: list[Any] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            said = _text(block.get("content") or "", f"{where}.content[{i}].content")
            call = check(block.get("tool_use_id"), Field("string", high=1000), "tool_use_id", where)
            results.append({"role": "tool", "content": said, "tool_call_id": call})
        elif kind == "tool_use" and role == "assistant":
            name = check(block.get("name"), Field("string", high=200), f"{where}.name", "messages")
            given_input = check(block.get("input"), Field("object"), f"{where}.input", "messages")
            function = {"name": name, "arguments": given_input}
            calls.append({"type": "function", "id": str(block.get("id", "")), "function": function})
        elif kind in ("thinking", "redacted_thinking") and role == "assistant":
            continue
        else:
            texts.append(block)
    message: Message = {"role": role, "content": _text(texts, f"{where}.content")}
    if calls:
        message["tool_calls"] = calls
    return [*results, *([message] if texts or calls or not results else [])]


async def messages(service: Service, http: HTTPRequest, body: dict[str, Any]) -> Response:
    """POST /v1/messages"""
    found = parse(body, MESSAGES)
    spare = {"stop": found["stop_sequences"], "n": 1, "seed": None, "min_p": 0, "logit_bias": None}
    spare |= {"presence_penalty": 0, "frequency_penalty": 0, "stream_options": None}
    wish = wish_of({**found, **spare}, vocabulary(service), None)
    service.engine.check_free(1)
    conversation, prompt, tools = await _asked(service, found)
    running = service.start([prompt], wish)
    answer_id, answered = new_id("msg_"), list[Answered]()
    stream = said(service, running, tools, conversation, answer_id, answered)
    head = {
        **{"id": answer_id, "type": "message", "role": "assistant", "model": found["model"]},
        **{"content": [], "stop_reason": None, "stop_sequence": None},
    }
    if found["stream"]:
        return SSE(running, _events(running, stream, answered, head), _failure)
    await gathered(http, running, stream)
    answer = answered[0]
    said_of_it = {**_ending(answer), "usage": _usage(running, answer)}
    return JSONResponse({**head, "content": _blocks(answer), **said_of_it})


def _blocks(answer: Answered) -> list[dict[str, Any]]:
    """Thoughts, words and calls; a text without any if there is nothing else."""
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content or not (answer.calls or answer.reasoning):
        blocks.append({"type": "text", "text": answer.content})
    return blocks + [_use(call) for call in answer.calls]


async def count_tokens(service: Service, http: HTTPRequest, body: dict[str, Any]) -> Response:
    """POST /v1/messages/count_tokens"""
    _, prompt, _ = await _asked(service, parse(body, COUNT))
    return JSONResponse({"input_tokens": prompt.session.tokens + len(prompt.ids)})


def _use(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        given = plain_json(function["arguments"])
    except (ValueError, RecursionError):
        given = {}
    given = given if isinstance(given, dict) else {}
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": given}


def _ending(answer: Answered) -> dict[str, Any]:
    assert answer.done is not None
    reason = {"length": "max_tokens"}.get(answer.done.reason, "end_turn")
    if answer.calls:
        reason = "tool_use"
    elif answer.done.stop is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": answer.done.stop}


def _usage(running: Running, answer: Answered | None) -> dict[str, int]:
    said = answer.done.tokens if answer and answer.done else 0
    return {
        "input_tokens": running.prompt_tokens - running.reused,
        "cache_read_input_tokens": running.reused,
        "cache_creation_input_tokens": 0,
        "output_tokens": said,
    }


async def _events(
    running: Running, stream: AsyncIterator[Said], answered: list[Answered], head: dict[str, Any]
) -> AsyncIterator[str]:
    yield _event("message_start", {"message": {**head, "usage": _usage(running, None)}})
    open_kind, n = "", -1
    starts = {
        "content": {"type": "text", "text": ""},
        "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
    }
    async for item in stream:
        if item.read is not None:
            yield _event("ping", {})
            continue
        for part in item.parts:
            if open_kind and (part.kind != open_kind or part.call is not None):
                yield _event("content_block_stop", {"index": n})
                open_kind = ""
            if part.call is not None:
                n += 1
                block = {**_use(part.call), "input": {}}
                yield _event("content_block_start", {"index": n, "content_block": block})
                text = part.call["function"]["arguments"]
                delta = {"type": "input_json_delta", "partial_json": text}
                yield _event("content_block_delta", {"index": n, "delta": delta})
                yield _event("content_block_stop", {"index": n})
                continue
            if not open_kind:
                n, open_kind = n + 1, part.kind
                start = {"index": n, "content_block": starts[part.kind]}
                yield _event("content_block_start", start)
            delta = {"type": "text_delta", "text": part.text}
            if part.kind == "reasoning":
                delta = {"type": "thinking_delta", "thinking": part.text}
            yield _event("content_block_delta", {"index": n, "delta": delta})
    if open_kind:
        yield _event("content_block_stop", {"index": n})
    ending = {"delta": _ending(answered[0]), "usage": _usage(running, answered[0])}
    yield _event("message_delta", ending)
    yield _event("message_stop", {})
