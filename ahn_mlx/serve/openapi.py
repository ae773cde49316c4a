"""The server's own description, made of the tables that requests are checked by."""

from typing import Any

from .. import __version__
from .anthropic import COUNT, MESSAGES
from .openai import CHAT, COMPLETIONS
from .parameters import Field, Table
from .responses import RESPONSES

DIGEST: Table = {
    "name": Field("string", required=True, low=1, high=100, note="of the memory to be"),
    "file_id": Field("string", high=100, note="of /v1/files"),
    "file_ids": Field("array", low=1, high=100, note="several, which are read as one text"),
    "system": Field("string", "", high=1 << 20, note="system message, kept in the sinks"),
}
SAVE: Table = {"name": Field("string", required=True, low=1, high=100, note="of a memory")}

BODIES: dict[str, Table] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT,
    "/v1/memories": DIGEST,
    "/v1/conversations/{id}/save": SAVE,
    "/v1/conversations/{id}/restore": SAVE,
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILE = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file"],
            "properties": {"file": _BINARY["schema"], "purpose": {"type": "string"}},
        }
    }
}
# Method and path of the routes, what each does, and the statuses of success.
ROUTES: tuple[tuple[str, str, str, int], ...] = (
    ("post", "/v1/chat/completions", "An answer to a conversation", 200),
    ("post", "/v1/completions", "The continuation of a text", 200),
    ("post", "/v1/responses", "An answer, which can be gone on from", 200),
    ("post", "/v1/messages", "An answer, as Anthropic's clients want it", 200),
    ("post", "/v1/messages/count_tokens", "Tokens of a conversation", 200),
    ("get", "/v1/models", "The model, and each memory as a model", 200),
    ("get", "/v1/models/{model}", "One of them", 200),
    ("get", "/health", "Whether the engine turns", 200),
    ("get", "/metrics", "Counters for Prometheus", 200),
    ("get", "/openapi.json", "This document", 200),
    ("get", "/v1/files", "Documents", 200),
    ("post", "/v1/files", "Upload a document", 200),
    ("get", "/v1/files/{id}", "A document", 200),
    ("delete", "/v1/files/{id}", "Delete a document", 200),
    ("get", "/v1/memories", "Memories", 200),
    ("post", "/v1/memories", "Read documents into a memory", 202),
    ("get", "/v1/memories/{name}", "A memory", 200),
    ("put", "/v1/memories/{name}", "Upload a memory file", 201),
    ("delete", "/v1/memories/{name}", "Delete a memory", 200),
    ("get", "/v1/memories/{name}/content", "Download a memory file", 200),
    ("get", "/v1/memory_jobs", "Jobs", 200),
    ("get", "/v1/memory_jobs/{id}", "A job, with its progress", 200),
    ("delete", "/v1/memory_jobs/{id}", "Forget a job and what it has read", 200),
    ("post", "/v1/memory_jobs/{id}/cancel", "Stop a job; what it has read is kept", 200),
    ("post", "/v1/memory_jobs/{id}/resume", "Go on with a job", 200),
    ("post", "/v1/conversations/{id}/save", "Write a conversation as a memory", 200),
    ("post", "/v1/conversations/{id}/restore", "Go on with a saved one under this id", 200),
)


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for method, path, what, status in ROUTES:
        paths.setdefault(path, {})[method] = _operation(method, path, what, status)
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ahn-mlx serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(method: str, path: str, what: str, status: int) -> dict[str, Any]:
    said = {"application/json": {"schema": {"type": "object"}}}
    if path in BODIES and "stream" in BODIES[path]:
        said = {**said, "text/event-stream": {"schema": {"type": "string"}}}
    if path == "/metrics":
        said = {"text/plain": {"schema": {"type": "string"}}}
    if path.endswith("/content"):
        said = {"application/octet-stream": _BINARY}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {
        "summary": what,
        "responses": {
            str(status): {"description": what, "content": said},
            "default": {"description": "An error that says what is wrong", "content": error},
        },
    }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        text = {"type": "string", "minLength": 1, "maxLength": 100}
        found["parameters"] = [
            {"name": n, "in": "path", "required": True, "schema": text} for n in names
        ]
    if method == "post" and path in BODIES:
        schema = _schema(BODIES[path])
        content = {"application/json": {"schema": schema}}
        found["requestBody"] = {"required": True, "content": content}
    elif (method, path) == ("post", "/v1/files"):
        found["requestBody"] = {"required": True, "content": _FILE}
    elif method == "put":
        content = {"application/octet-stream": _BINARY}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _schema(table: Table) -> dict[str, Any]:
    return {
        "type": "object",
        "required": [name for name, f in table.items() if f.required],
        "properties": {name: f.schema() for name, f in table.items()},
        "additionalProperties": False,
    }
