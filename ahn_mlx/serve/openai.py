"""OpenAI's chat completions and completions."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from ..reading.sampling import Sampling
from .answers import Token
from .chat import Message
from .parameters import APIError, Field, Table, check, parse
from .sampling import Wish
from .service import Answered, Running, Said, Service, gathered, new_id, normal_call, said
from .stream import SSE

MAX_TOKENS = 1 << 20
TEXT = 1 << 25  # characters

_SAMPLING: Table = {
    "model": Field("string", required=True, high=300, note="the server's, or NAME@MEMORY"),
    "stream": Field("boolean", False),
    "stream_options": Field("object"),
    "max_tokens": Field("integer", low=1, high=MAX_TOKENS),
    "temperature": Field("number", 0.0, 0, 2, note="0, the default, is greedy"),
    "top_p": Field("number", 1.0, 0, 1),
    "top_k": Field("integer", 0, 0, 1 << 20),
    "min_p": Field("number", 0.0, 0, 1),
    "seed": Field("integer", low=-(2**63), high=2**64 - 1),
    "stop": Field("text or array", high=TEXT),
    "n": Field("integer", 1, 1, 128),
    "logit_bias": Field("object"),
    "presence_penalty": Field("number", 0.0, -2, 2),
    "frequency_penalty": Field("number", 0.0, -2, 2),
    "repetition_penalty": Field("number", 1.0, 0.01, 100, note="of all that was read"),
    "user": Field("string", high=1000, note="ignored"),
}
CHAT: Table = {
    **_SAMPLING,
    "messages": Field("array", required=True, low=1, high=10_000),
    "max_completion_tokens": Field("integer", low=1, high=MAX_TOKENS),
    "logprobs": Field("boolean", False),
    "top_logprobs": Field("integer", low=0, high=20),
    "tools": Field("array", high=128),
    "tool_choice": Field("any", note='"auto" or "none"'),
    "parallel_tool_calls": Field("boolean", choices=(True,)),
    "response_format": Field("object", note='{"type": "text"}'),
    "metadata": Field("object", note="ignored"),
    "store": Field("boolean", note="ignored"),
    "service_tier": Field("string", choices=("auto", "default")),
}
COMPLETIONS: Table = {
    **_SAMPLING,
    "prompt": Field("text or array", required=True, high=TEXT),
    "logprobs": Field("integer", low=0, high=20),
    "echo": Field("boolean", choices=(False,)),
    "best_of": Field("integer", choices=(1,)),
    "suffix": Field("string", choices=("",)),
}
DEFAULT_TOKENS = 1024

_ROLES = ("system", "developer", "user", "assistant", "tool")
# What clients repeat of answers, and what is of no effect.
_PARTS_OF_MESSAGE = {
    **{"role": Field("string", required=True, choices=_ROLES), "content": Field("any")},
    **{"name": Field("string", high=1000), "tool_calls": Field("array", high=128)},
    **{"tool_call_id": Field("string", high=1000), "refusal": Field("string", high=TEXT)},
    **{"annotations": Field("array"), "reasoning_content": Field("string", high=TEXT)},
    **{"reasoning": Field("string", high=TEXT)},
}


def wish_of(found: dict[str, Any], vocabulary: int, top: int | None) -> Wish:
    """Of a parsed body. vocabulary: tokens that the model has. top: log probabilities to report."""
    options = found.get("stream_options")
    if options:
        parse(options, {"include_usage": Field("boolean", False)}, "stream_options.")
    limit = found.get("max_completion_tokens") or found["max_tokens"] or DEFAULT_TOKENS
    if 0 < found["temperature"] < 0.001:
        raise APIError("temperature must be 0 or at least 0.001", param="temperature")
    sampling = Sampling(
        max_tokens=limit,
        temp=float(found["temperature"]),
        top_p=float(found["top_p"]) or 1e-9,  # at least the likeliest
        top_k=found["top_k"],
        min_p=float(found["min_p"]),
        repetition_penalty=float(found.get("repetition_penalty", 1)),
        repetition_context_size=0,
        seed=None if found["seed"] is None else found["seed"] % 2**64,
        stop=_stops(found["stop"]),
    )
    return Wish(
        sampling,
        _bias(found["logit_bias"] or {}, vocabulary),
        float(found["presence_penalty"]),
        float(found["frequency_penalty"]),
        top,
    )


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    text = Field("string", low=1, high=1000)
    if len(stops) > 16:
        raise APIError("stop has more than 16 strings", param="stop")
    return tuple(check(s, text, f"stop[{i}]", "stop") for i, s in enumerate(stops))


def _bias(bias: dict[str, Any], vocabulary: int) -> dict[int, float]:
    if len(bias) > 10_000:
        raise APIError("logit_bias has more than 10,000 tokens", param="logit_bias")
    found = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocabulary):
            raise APIError(
                f"logit_bias: {name[:20]!r} is not among the {vocabulary:,} tokens",
                param="logit_bias",
            )
        number = Field("number", low=-100, high=100)
        found[int(name)] = float(check(value, number, f"logit_bias[{name}]", "logit_bias"))
    return found


def messages_of(found: list[Any]) -> list[Message]:
    """A client's messages, in the form that templates take."""
    return [_message(m, f"messages[{i}]") for i, m in enumerate(found)]


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise APIError(f"{where} must be an object", param="messages")
    known = parse(given, _PARTS_OF_MESSAGE, f"{where}.")
    role = "system" if known["role"] == "developer" else known["role"]
    calls = known["tool_calls"] or []
    if known["content"] is None and role != "assistant":
        raise APIError(f"{where}.content is required", param="messages")
    content = text_of(known["content"], f"{where}.content")
    message: Message = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise APIError(f"{where}.tool_calls is for the assistant", param="messages")
        message["tool_calls"] = [_given_call(c, f"{where}.tool_calls") for c in calls]
    for name in ("name", "tool_call_id"):
        if known[name] is not None:
            message[name] = known[name]
    return message


def _given_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise APIError(f"{where} must be calls of functions with names", param="messages")
    if not isinstance(function.get("arguments", ""), str | dict):
        raise APIError(f"{where}: arguments must be a string of JSON", param="messages")
    called = {"name": function["name"], "arguments": function.get("arguments", "")}
    return normal_call({"id": str(call.get("id", "")), "function": called})


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, parts of text, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise APIError(f"{where} must be a string or an array", param="messages")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise APIError(
                f"{where}[{i}]: {str(kind)[:100]!r} is not supported, only text",
                param=f"{where}[{i}].{str(kind)[:100]}",
                code="unsupported",
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise APIError(f"{where}[{i}].text must be a string", param="messages")
        texts.append(text)
    return "".join(texts)


def tools_of(found: dict[str, Any], tokenizer: TokenizerWrapper) -> list[dict[str, Any]]:
    """Functions that may be called. Raises APIError if this model cannot."""
    choice, tools = found["tool_choice"], found["tools"] or []
    if choice not in (None, "auto", "none"):
        raise APIError('tool_choice must be "auto" or "none"', param="tool_choice")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named or tool.get("type") != "function":
            raise APIError(f"tools[{i}] must be a function with a name", param="tools")
        assert isinstance(function, dict)
        if not isinstance(function.get("parameters", {}), dict | None):
            raise APIError(f"tools[{i}].function.parameters must be an object", param="tools")
    if tools and choice != "none" and not tokenizer.has_tool_calling:
        raise APIError("this model cannot call tools", param="tools", code="unsupported")
    return [] if choice == "none" else tools


def usage_of(running: Running, answered: list[Answered]) -> dict[str, Any]:
    said = sum(a.done.tokens for a in answered if a.done)
    return {
        "prompt_tokens": running.prompt_tokens,
        "completion_tokens": said,
        "total_tokens": running.prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": running.reused},
    }


async def chat_completions(service: Service, http: HTTPRequest, body: dict[str, Any]) -> Response:
    """POST /v1/chat/completions"""
    found = parse(body, CHAT)
    tokenizer = service.engine.tokenizer
    top = None
    if found["logprobs"]:
        top = found["top_logprobs"] or 0
    elif found["top_logprobs"] is not None:
        raise APIError("top_logprobs needs logprobs", param="top_logprobs")
    if (found["response_format"] or {"type": "text"}) != {"type": "text"}:
        raise APIError('response_format must be {"type": "text"}', param="response_format")
    wish = wish_of(found, vocabulary(service), top)
    tools = tools_of(found, tokenizer)
    messages = messages_of(found["messages"])
    service.engine.check_free(found["n"])
    conversation = await service.conversation(found["model"], messages, tools)
    prompt = await service.aside(service.chat.prompt, conversation)
    running = service.start([prompt], wish, found["n"])
    answer_id, answered = new_id("chatcmpl-"), list[Answered]()
    stream = said(service, running, tools, conversation, answer_id, answered)
    head = {"id": answer_id, "created": int(time.time()), "model": found["model"]}
    if found["stream"]:
        return SSE(running, _chat_chunks(service, running, stream, answered, head, found))
    await gathered(http, running, stream)
    choices = [_choice(service, i, a, top is not None) for i, a in enumerate(answered)]
    usage = usage_of(running, answered)
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})


def vocabulary(service: Service) -> int:
    """Tokens that the model has."""
    size: int = service.engine.model.args.vocab_size
    return size


def _finish(answer: Answered) -> str:
    assert answer.done is not None
    return "tool_calls" if answer.calls else answer.done.reason


def _choice(service: Service, i: int, answer: Answered, logprobs: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = answer.calls
        message["content"] = answer.content or None
    tokens = {"content": [_logprob(service, t) for t in answer.tokens]} if logprobs else None
    return {"index": i, "message": message, "logprobs": tokens, "finish_reason": _finish(answer)}


def _logprob(service: Service, token: Token) -> dict[str, Any]:
    def one(i: int, value: float | None) -> dict[str, Any]:
        text = service.engine.tokenizer.decode([i])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    top = [one(i, value) for i, value in token.top]
    return {**one(token.id, token.logprob), "top_logprobs": top}


async def _chat_chunks(
    service: Service,
    running: Running,
    stream: AsyncIterator[Said],
    answered: list[Answered],
    head: dict[str, Any],
    found: dict[str, Any],
) -> AsyncIterator[str]:
    usage = bool((found["stream_options"] or {}).get("include_usage"))
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(i: int, delta: dict[str, Any], **more: Any) -> str:
        choice = {"index": i, "delta": delta, "finish_reason": None, "logprobs": None, **more}
        return _line({**head, "choices": [choice], **({"usage": None} if usage else {})})

    for i in range(running.answers):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for item in stream:
        if item.read is not None:
            yield f": read {item.read.tokens} of {item.read.total}\n\n"
            continue
        calls = len(answered[item.choice].calls) - sum(p.call is not None for p in item.parts)
        more = {}
        if item.token is not None and found["logprobs"]:
            more = {"logprobs": {"content": [_logprob(service, item.token)]}}
            if not item.parts:
                yield chunk(item.choice, {}, **more)
        for part in item.parts:
            delta: dict[str, Any] = {"content": part.text}
            if part.kind == "reasoning":
                delta = {"reasoning_content": part.text}
            elif part.call is not None:
                delta, calls = {"tool_calls": [{"index": calls, **part.call}]}, calls + 1
            yield chunk(item.choice, delta, **more)
            more = {}
        if item.done is not None:
            yield chunk(item.choice, {}, finish_reason=_finish(answered[item.choice]))
    if usage:
        yield _line({**head, "choices": [], "usage": usage_of(running, answered)})
    yield "data: [DONE]\n\n"


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def completions(service: Service, http: HTTPRequest, body: dict[str, Any]) -> Response:
    """POST /v1/completions"""
    found = parse(body, COMPLETIONS)
    top = found["logprobs"]
    wish = wish_of(found, vocabulary(service), top)
    given = _prompts(found["prompt"], vocabulary(service))
    service.engine.check_free(len(given) * found["n"])
    memory, _ = await service.open(found["model"])
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(await service.aside(service.chat.plain, prompt, memory))
        else:
            empty = await service.aside(service.chat.plain, "", memory)
            prompts.append(empty._replace(ids=prompt))
    running = service.start(prompts, wish, found["n"])
    answer_id, answered = new_id("cmpl-"), list[Answered]()
    stream = said(service, running, [], None, answer_id, answered)
    head = {"id": answer_id, "created": int(time.time()), "model": found["model"]}
    head = {**head, "object": "text_completion"}
    if found["stream"]:
        return SSE(running, _text_chunks(service, running, stream, answered, head, found))
    await gathered(http, running, stream)
    choices = [
        {
            **{"index": i, "text": a.content, "finish_reason": _finish(a)},
            "logprobs": None if top is None else _old_logprobs(service, a.tokens),
        }
        for i, a in enumerate(answered)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage_of(running, answered)})


def _prompts(prompt: Any, vocabulary: int) -> list[Any]:
    """Texts or lists of tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise APIError("prompt is empty", param="prompt")
    if all(type(x) is int for x in prompt):
        prompt = [prompt]
    if len(prompt) > 128:
        raise APIError("prompt has more than 128 texts", param="prompt")
    for given in prompt:
        ids = isinstance(given, list) and all(type(x) is int and 0 <= x < vocabulary for x in given)
        if not (isinstance(given, str) or (ids and given)):
            raise APIError("prompt must be a text, texts, or tokens of the model", param="prompt")
    return list(prompt)


def _old_logprobs(service: Service, tokens: list[Token]) -> dict[str, Any]:
    found = [_logprob(service, t) for t in tokens]
    return {
        "tokens": [f["token"] for f in found],
        "token_logprobs": [f["logprob"] for f in found],
        "top_logprobs": [{t["token"]: t["logprob"] for t in f["top_logprobs"]} for f in found],
    }


async def _text_chunks(
    service: Service,
    running: Running,
    stream: AsyncIterator[Said],
    answered: list[Answered],
    head: dict[str, Any],
    found: dict[str, Any],
) -> AsyncIterator[str]:
    usage = bool((found["stream_options"] or {}).get("include_usage"))
    async for item in stream:
        if item.read is not None:
            yield f": read {item.read.tokens} of {item.read.total}\n\n"
            continue
        text = "".join(part.text for part in item.parts)
        shown = item.token is not None and found["logprobs"] is not None
        if not (text or shown or item.done):
            continue
        choice = {
            **{"index": item.choice, "text": text},
            "finish_reason": _finish(answered[item.choice]) if item.done else None,
            "logprobs": _old_logprobs(service, [item.token]) if shown and item.token else None,
        }
        yield _line({**head, "choices": [choice], **({"usage": None} if usage else {})})
    if usage:
        yield _line({**head, "choices": [], "usage": usage_of(running, answered)})
    yield "data: [DONE]\n\n"
