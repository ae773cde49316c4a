"""Requests that are made of the server's own description: none makes it fail or wait for ever."""

import json
import subprocess

import pytest
from checkpoints import talking_model
from serving import environment, started, wait_until

pytestmark = pytest.mark.slow

MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["user", "assistant", "system"]},
        "content": {"type": ["string", "array"], "maxLength": 400},
    },
}
# So that requests come as far as the engine, and answers are short.
KNOWN = {
    "model": {"enum": ["model", "model@book", "model@none"]},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 20},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 20},
    "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": 20},
    "messages": {"type": "array", "minItems": 1, "maxItems": 4, "items": MESSAGE},
}


def narrowed(document, names):
    """The description with values that there are."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                kind = path.split("/")[2], parameter["name"]
                parameter["schema"] = {"type": "string", "enum": [*names[kind], "..", "x y"]}
            content = operation.get("requestBody", {}).get("content", {})
            fields = content.get("application/json", {}).get("schema", {}).get("properties", {})
            fields |= {name: value for name, value in KNOWN.items() if name in fields}
    return document


def test_requests_of_the_description(tmp_path):
    memories = tmp_path / "memories"
    memories.mkdir()
    model = talking_model("qwen2-gdn", tmp_path)
    program = environment(tmp_path / "environment", "schemathesis") / "schemathesis"
    with started("--model", model, "--rows", 3, "--memories", memories) as (_, client, _):
        text = {"file": ("a.txt", b"One two three. " * 100)}
        file_id = client.post("/v1/files", files=text).json()["id"]
        wanted = {"name": "book", "file_id": file_id}
        job = client.post("/v1/memories", json=wanted).json()["id"]
        wait_until(lambda: client.get(f"/v1/memory_jobs/{job}").json()["status"] == "done")
        hi = {"model": "model", "input": "Hi", "max_output_tokens": 3}
        said = client.post("/v1/responses", json=hi).json()["id"]
        names = {("files", "id"): [file_id], ("memory_jobs", "id"): [job]}
        names |= {("memories", "name"): ["book", "other"], ("conversations", "id"): [said]}
        names |= {("models", "model"): ["model", "model@book"]}
        document = tmp_path / "openapi.json"
        document.write_text(json.dumps(narrowed(client.get("/openapi.json").json(), names)))
        checks = "not_a_server_error,status_code_conformance,content_type_conformance"
        command = [program, "run", document, "--url", client.base_url, "--checks", checks]
        command += ["--phases", "fuzzing", "--max-time", 45, "--request-timeout", 30, "--seed", 1]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-2000:]
        metrics = client.get("/metrics").text
        assert 'status="5' not in metrics
        for route in ("chat/completions", "completions", "messages", "responses"):
            assert f'route="/v1/{route}",status="200"' in metrics
        wait_until(lambda: client.get("/health").json()["rows_free"] == 3)
