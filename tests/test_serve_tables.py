"""What the three APIs take: bounds as the server's document has them, bodies, and errors."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from ahn_mlx.serve import anthropic, responses
from ahn_mlx.serve.openapi import ROUTES, document
from ahn_mlx.serve.parameters import APIError, Field, parse_json, plain_json
from ahn_mlx.serve.stream import SSE, openai_error, openai_failure

LONG = 1 << 25
# By endpoint: name, type ("!" if it must be there), bounds or what is allowed.
SAMPLING = """
    model string! - 300; stream boolean; temperature number 0 2; top_p number 0 1
"""
OPENAI = f"""{SAMPLING};
    stream_options object; max_tokens integer 1 1048576; top_k integer 0 1048576
    min_p number 0 1; seed integer {-(2**63)} {2**64 - 1}; stop text; n integer 1 128
    logit_bias object; presence_penalty number -2 2; frequency_penalty number -2 2
    repetition_penalty number 0.01 100; user string - 1000
"""
TABLES = {
    "/v1/chat/completions": f"""{OPENAI};
        messages array! 1 10000; max_completion_tokens integer 1 1048576; logprobs boolean
        top_logprobs integer 0 20; tools array - 128; tool_choice any
        parallel_tool_calls boolean =[true]; response_format object; metadata object
        store boolean; service_tier string =["auto","default"]
    """,
    "/v1/completions": f"""{OPENAI};
        prompt text!; logprobs integer 0 20; echo boolean =[false]; best_of integer =[1]
        suffix string =[""]
    """,
    "/v1/responses": f"""{SAMPLING};
        input text!; instructions string - {LONG}; previous_response_id string - 200
        max_output_tokens integer 1 1048576; tools array - 128; tool_choice any
        parallel_tool_calls boolean =[true]; text object; truncation string =["disabled"]
        store boolean; metadata object; user string - 1000
        service_tier string =["auto","default"]
    """,
    "/v1/messages/count_tokens": """
        model string! - 300; messages array! 1 10000; system text; tools array - 128
        tool_choice object
    """,
    "/v1/memories": f"""
        name string! 1 100; file_id string - 100; file_ids array 1 100; system string - {1 << 20}
    """,
    "/v1/conversations/{id}/save": "name string! 1 100",
    "/v1/conversations/{id}/restore": "name string! 1 100",
}
TABLES["/v1/messages"] = f"""{TABLES["/v1/messages/count_tokens"]};
    max_tokens integer! 1 1048576; stream boolean; temperature number 0 1; top_p number 0 1
    top_k integer 0 1048576; stop_sequences array - 16; metadata object
    service_tier string =["auto","standard_only"]
"""
ASKED = "model: the server's, or NAME@MEMORY; temperature: 0, the default, is greedy"
SAID = {
    "/v1/chat/completions": f"""{ASKED}; repetition_penalty: of all that was read
        tool_choice: "auto" or "none"; response_format: {{"type": "text"}}
        user: ignored; metadata: ignored; store: ignored
    """,
    "/v1/completions": f"{ASKED}; repetition_penalty: of all that was read; user: ignored",
    "/v1/responses": f"""{ASKED}; previous_response_id: goes on from there, also repeatedly
        tool_choice: "auto" or "none"; text: {{"format": {{"type": "text"}}}}
        store: answers are kept while there is room, whatever it says
        metadata: ignored; user: ignored
    """,
    "/v1/messages": f"""{ASKED}; tool_choice: {{"type": "auto"}} or {{"type": "none"}}
        metadata: ignored
    """,
    "/v1/messages/count_tokens": f"""{ASKED.split(";")[0]}
        tool_choice: {{"type": "auto"}} or {{"type": "none"}}
    """,
    "/v1/memories": """
        name: of the memory to be; file_id: of /v1/files
        file_ids: several, which are read as one text; system: system message, kept in the sinks
    """,
    "/v1/conversations/{id}/save": "name: of a memory",
    "/v1/conversations/{id}/restore": "name: of a memory",
}
NAMES = {"integer": ("minimum", "maximum"), "string": ("minLength", "maxLength")}
NAMES |= {"number": NAMES["integer"], "array": ("minItems", "maxItems")}


def lines_of(table: str) -> list[str]:
    return [x.strip() for x in table.replace("\n", ";").split(";") if x.strip()]


def described(line: str) -> tuple[str, dict, bool]:
    name, kind, *bounds = line.split()
    required, kind = kind.endswith("!"), kind.rstrip("!")
    kinds = {"any": {}, "text": {"type": ["string", "array", "null"]}}
    found = dict(kinds.get(kind, {"type": [kind, "null"]}))
    if required and "type" in found:
        found["type"].remove("null")
    if bounds and bounds[0].startswith("="):
        found["enum"] = [*json.loads(bounds.pop(0)[1:]), None]
    for bound, word in zip(bounds, NAMES.get(kind, ()), strict=False):
        if bound != "-":
            found[word] = json.loads(bound)
    return name, found, required


@pytest.mark.parametrize("path", TABLES)
def test_the_document_says_all_that_is_taken_and_its_bounds(path):
    expected = list(map(described, lines_of(TABLES[path])))
    operation = document()["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    said = {
        name: {k: v for k, v in one.items() if k != "description"}
        for name, one in schema["properties"].items()
    }
    assert said == {name: found for name, found, _ in expected}
    words = {
        n: one["description"] for n, one in schema["properties"].items() if "description" in one
    }
    assert words == dict(line.split(": ", 1) for line in lines_of(SAID[path]))
    assert set(schema["required"]) == {name for name, _, required in expected if required}
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    assert operation["requestBody"]["required"] is True
    streams = (
        "text/event-stream"
        in operation["responses"]["200" if path[:9] != "/v1/memor" else "202"]["content"]
    )
    assert streams is ("stream boolean" in TABLES[path])


def test_what_fails_on_the_way_is_the_last_event():
    async def lines(error):
        yield "data: 1\n\n"
        if error is not None:
            raise error

    async def told(error, *failure):
        stream = SSE(SimpleNamespace(cancel=lambda: None), lines(error), *failure)
        return [piece async for piece in stream.body_iterator]

    assert asyncio.run(told(None)) == ["data: 1\n\n"]
    error = APIError("no more", status=503, code="stopping")
    assert asyncio.run(told(error)) == ["data: 1\n\n", openai_failure(error)]
    assert asyncio.run(told(error, lambda e: e.message)) == ["data: 1\n\n", "no more"]
    (_, last) = asyncio.run(told(KeyError("secret")))
    assert "secret" not in last and last.endswith("[DONE]\n\n")


def test_the_document_says_what_comes_and_goes():
    paths = document()["paths"]

    def of(method, path):
        found = paths[path][method]
        (status,) = found["responses"].keys() - {"default"}
        return int(status), list(found["responses"][status]["content"]), found

    assert of("get", "/metrics")[:2] == (200, ["text/plain"])
    assert of("get", "/v1/memories/{name}/content")[:2] == (200, ["application/octet-stream"])
    assert of("post", "/v1/memories")[:2] == (202, ["application/json"])
    status, _, put = of("put", "/v1/memories/{name}")
    assert status == 201
    binary = {"type": "string", "format": "binary"}
    body = {"content": {"application/octet-stream": {"schema": binary}}, "required": True}
    assert put["requestBody"] == body
    operations = [x for path in paths.values() for x in path.values()]
    taken = [x["requestBody"] for x in operations if "requestBody" in x]
    assert len(taken) == 10 and all(body["required"] is True for body in taken)
    (file,) = of("post", "/v1/files")[2]["requestBody"]["content"].items()
    assert file[0] == "multipart/form-data" and file[1]["schema"]["required"] == ["file"]
    assert file[1]["schema"]["properties"] == {"file": binary, "purpose": {"type": "string"}}
    text = {"type": "string", "minLength": 1, "maxLength": 100}
    assert put["parameters"] == [{"name": "name", "in": "path", "required": True, "schema": text}]
    for one in (x for methods in paths.values() for x in methods.values()):
        error = one["responses"]["default"]["content"]["application/json"]["schema"]
        assert error == {"$ref": "#/components/schemas/Error"}
    assert "requestBody" not in of("get", "/v1/memories")[2]
    assert "parameters" not in of("get", "/v1/memories")[2]
    schemes = document()["components"]["securitySchemes"]
    assert schemes["bearer"] == {"type": "http", "scheme": "bearer"}
    assert schemes["key"] == {"type": "apiKey", "in": "header", "name": "x-api-key"}


def test_the_document_has_each_route_with_its_status():
    statuses = {("post", "/v1/memories"): 202, ("put", "/v1/memories/{name}"): 201}
    paths, words = document()["paths"], []
    for path, methods in paths.items():
        for method, operation in methods.items():
            expected = {str(statuses.get((method, path), 200)), "default"}
            assert operation["responses"].keys() == expected, (method, path)
            words.append(operation["summary"])
    assert len(set(words)) == len(words) == len(ROUTES) and all(words)
    of = "/v1/files /v1/files/{id} /v1/memories /v1/memories/{name} /v1/memories/{name}/content"
    of += " /v1/memory_jobs /v1/memory_jobs/{id} /v1/memory_jobs/{id}/cancel"
    of += " /v1/memory_jobs/{id}/resume /v1/conversations/{id}/save /v1/conversations/{id}/restore"
    of += " /v1/chat/completions /v1/completions /v1/responses /v1/messages /v1/models"
    of += " /v1/messages/count_tokens /v1/models/{model} /health /metrics /openapi.json"
    assert paths.keys() == set(of.split())


def test_schemas_of_fields():
    assert Field("any", required=True).schema() == {}
    assert Field("object", low=1, high=2, note="x").schema() == {
        **{"type": ["object", "null"], "description": "x"},
    }
    choice = Field("string", choices=("a", "b"), required=True)
    assert choice.schema() == {"type": ["string"], "enum": ["a", "b"]}


def refused(act, *given, **named) -> APIError:
    with pytest.raises(APIError) as error:
        act(*given, **named)
    assert error.value.status == 400
    return error.value


def test_errors_have_the_names_of_each_api():
    said = {
        **{400: ("invalid_request_error", "invalid_request_error")},
        **{401: ("authentication_error", "authentication_error")},
        **{403: ("invalid_request_error", "permission_error")},
        **{404: ("invalid_request_error", "not_found_error")},
        **{413: ("invalid_request_error", "request_too_large")},
        **{429: ("rate_limit_error", "rate_limit_error"), 499: 2 * ("invalid_request_error",)},
        **{500: ("server_error", "api_error"), 503: ("server_error", "overloaded_error")},
    }
    for status, (ours, theirs) in said.items():
        error = APIError("no", status=status, param="p", code="c")
        known = {"message": "no", "type": ours, "param": "p", "code": "c"}
        assert openai_error(error) == {"error": known}
        assert anthropic.anthropic_error(error) == {
            **{"type": "error", "error": {"type": theirs, "message": "no"}},
        }
    assert openai_failure(APIError("no")).endswith("\n\ndata: [DONE]\n\n")
    event, data = anthropic._failure(APIError("no")).split("\n", 1)
    assert event == "event: error" and json.loads(data[5:])["type"] == "error"
    kind, data = responses._failure(APIError("no")).split("\n", 1)
    assert kind == "event: error" and json.loads(data[5:])["sequence_number"] == 0


def test_bodies_are_objects_of_bounded_depth():
    def nested(n):
        return b'{"a": ' + n * b"[" + n * b"]" + b"}"

    assert parse_json(nested(64)) and parse_json(b'{"a": 1e308}') == {"a": 1e308}
    for data, word in (
        *(
            (nested(65), "deeper than 64"),
            (nested(10**5), "deeper than 64"),
            (b"[]", "a JSON object"),
        ),
        *((b"\xff", "not UTF-8"), (b"{", "not JSON"), (b'{"a": NaN}', "NaN is no number")),
        *((b'{"a": 1e999}', "1e999 is no number"), (b'{"a": "\\ud83d"}', "not")),
        (b'{"\\ud83d": 1}', "not"),
    ):
        assert word in refused(parse_json, data).message
    assert plain_json('["\\u00e4", null, true]') == ["\u00e4", None, True]
