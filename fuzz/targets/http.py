"""Bodies that the three APIs are asked with."""

import json
from pathlib import Path
from typing import Any

from ahn_mlx.serve.openapi import BODIES

from ..mutate import of_json
from ..oracle import Target
from .site import (
    EARLIER,
    JSON,
    SERVE,
    WAYS,
    Failed,
    Refused,
    ask,
    first_of,
    judge,
    loop_of,
    site_of,
)

FIELDS = tuple(sorted({name for table in BODIES.values() for name in table}))
WORDS = (
    *FIELDS,
    *(
        "role",
        "content",
        "user",
        "assistant",
        "system",
        "developer",
        "tool",
        "text",
        "type",
        "name",
    ),
    *("tool_calls", "tool_call_id", "function", "arguments", "parameters", "input_text", "tiny"),
    *("output_text", "image_url", "function_call", "function_call_output", "call_id", "tool_use"),
    *("tool_result", "input_schema", "thinking", "include_usage", "json_schema", "json_object"),
    *(
        "auto",
        "none",
        "required",
        "any",
        "tiny@book",
        "tiny@",
        "<|im_end|>",
        "previous_response_id",
    ),
)


def _answer(given: dict[str, Any], place: Path, out: Path) -> None:
    site, loop, way = site_of(given.get("site", 0)), loop_of(), given.get("way", "")
    if EARLIER in given["body"]:
        earlier = first_of(site)
        given = {**given, "body": given["body"].replace(EARLIER, earlier.encode())}
    if BEFORE in given["body"]:
        first_of(site, CHAT[3], "/v1/chat/completions")
    site.engine.way = way
    try:
        status, headers, text = loop.run_until_complete(ask(site.app, given))
    finally:
        site.engine.way, asked = "", site.engine.asked
        site.engine.asked = []
    if not all(request.cancelled for request in asked):
        raise Failed(f"{way}: rows are not given back")
    judge(given, status, headers, text)
    if status >= 400:
        raise Refused(str(status))


def _to(*paths: str) -> Any:
    def prepare(data: bytes, place: Path) -> dict[str, Any]:
        """A byte for how the body comes, the path, what goes wrong and who is asked; the body."""
        how, body = (data[0], data[1:]) if data else (0, b"")
        path = paths[(how >> 1 & 3) % len(paths)]
        asked = {"way": WAYS[how >> 3 & 7], "site": how >> 6, "split": how & 1}
        return {"method": "POST", "path": path, "headers": JSON, "body": body, **asked}

    return prepare


def _after_first(words: tuple[str, ...]) -> Any:
    change = of_json(words)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        some = seed >> 8 & (255, 7, 7, 199)[seed >> 16 & 3]  # mostly nothing goes wrong
        head = bytes([some]) if seed % 16 == 0 or not data else data[:1]
        return head + change(data[1:], longest - 1, seed)

    return mutate


def _bodies(*values: Any) -> Any:
    def seeds() -> list[bytes]:
        ways = [n << 3 for n in range(len(WAYS))]
        heads = [1, 2, *ways, *(n << 6 for n in range(1, 4))]
        return [bytes([n]) + json.dumps(v).encode() for n in heads for v in values]

    return seeds


ASK = {"role": "user", "content": "Why?"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "1"},
    ASK,
]
CHAT = (
    {"model": "tiny", "messages": [ASK], "max_tokens": 9},
    {"model": "tiny@book", "messages": [ASK], "stream": True, "seed": 1, "temperature": 0.5},
    {
        **{"model": "tiny", "messages": TURNS, "tools": [TOOL], "tool_choice": "auto", "n": 2},
        **{"stream": True, "stream_options": {"include_usage": True}, "logprobs": True},
        **{"top_logprobs": 2, "stop": ["x"], "logit_bias": {"5": 1}, "presence_penalty": 0.5},
    },
)
BEFORE = b'"Well,"'  # what is answered to a question of few tokens
THEN = [ASK, {"role": "assistant", "content": "Well,"}, ASK]
CHAT += (
    {"model": "tiny", "messages": [ASK], "max_tokens": 5},
    {"model": "tiny", "messages": THEN, "tools": [TOOL], "tool_choice": "none"},
    {"model": "tiny", "messages": THEN},
    {"model": "tiny", "messages": [*THEN, {**THEN[1], "content": "x"}, ASK]},
    {"model": "tiny", "messages": [ASK], "tools": [TOOL], "max_tokens": 99, "stop": ["so"]},
    {"model": "tiny", "messages": [{"role": "user", "content": "no <|im_end|>"}], "stream": True},
    {"model": "tiny@book", "messages": [TURNS[0], *THEN], "max_tokens": 99, "stream": True},
    {"model": "tiny@book", "messages": [ASK], "tools": [TOOL]},
    {"model": "tiny", "messages": [{**ASK, "content": "Why is it so? " * 9}], "max_tokens": 99},
)
COMPLETE = (
    {"model": "tiny", "prompt": "Once", "max_tokens": 9, "echo": True, "logprobs": 1},
    {"model": "tiny", "prompt": ["a", "b"], "stream": True, "n": 2, "suffix": None},
    {"model": "tiny@book", "prompt": [1, 2, 3], "stop": "x"},
    {
        **{"model": "tiny", "prompt": "Once upon a time. " * 9, "stream": True, "max_tokens": 99},
        "stream_options": {"include_usage": True},
    },
)
RESPOND = (
    {"model": "tiny", "input": "Hi", "max_output_tokens": 9},
    {
        **{"model": "tiny", "instructions": "Be brief.", "stream": True, "tools": []},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
    },
    {"model": "tiny", "input": "Hi", "previous_response_id": EARLIER.decode(), "store": True},
    {"model": "tiny", "input": "Hi there. " * 9, "max_output_tokens": 99, "stream": True},
    {"model": "tiny", "input": "Hi there. ", "max_output_tokens": 99},
    {
        **{"model": "tiny", "input": "Hi", "max_output_tokens": 99, "tool_choice": "auto"},
        **{"tools": [{"type": "function", **TOOL["function"]}], "stream": True},
    },
)
USE = {"name": "f", "description": "x", "input_schema": {"type": "object"}}
SPEAK = (
    {"model": "tiny", "messages": [ASK]},
    {"model": "tiny", "messages": [ASK], "tools": [USE], "max_tokens": 99},
    {"model": "tiny", "messages": [ASK], "tools": [USE], "max_tokens": 99, "stream": True},
    {"model": "tiny", "messages": [ASK], "stop_sequences": ["so"], "max_tokens": 99},
    {"model": "tiny", "messages": [{**ASK, "content": "Why? " * 20}], "max_tokens": 99},
    {
        "model": "tiny",
        "messages": [{**ASK, "content": "Why? " * 20}],
        "max_tokens": 99,
        "stream": True,
    },
    {"model": "tiny", "messages": [ASK], "max_tokens": 9, "system": "Be brief."},
    {
        **{"model": "tiny", "max_tokens": 5, "stream": True, "stop_sequences": ["x"]},
        **{"tools": [USE]},
        "top_k": 3,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}],
            },
        ],
    },
)


def _api(name: str, path: tuple[str, ...], seeds: Any, *files: str) -> Target:
    return Target(
        name,
        _to(*path),
        _answer,
        seeds,
        (*files, *SERVE),
        WORDS,
        _after_first(WORDS),
        refusals=(Refused,),
    )


TARGETS = [
    _api("chat", ("/v1/chat/completions",), _bodies(*CHAT), "serve/openai.py"),
    _api("completions", ("/v1/completions",), _bodies(*COMPLETE), "serve/openai.py"),
    _api("responses", ("/v1/responses",), _bodies(*RESPOND), "serve/responses.py"),
    _api(
        "messages",
        ("/v1/messages", "/v1/messages/count_tokens"),
        _bodies(*SPEAK),
        "serve/anthropic.py",
    ),
]
