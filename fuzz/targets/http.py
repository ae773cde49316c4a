"""Requests: the whole application in this process, above an engine that computes nothing."""

import asyncio
import json
import shutil
import tempfile
import time
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

from serving import TOOLS, model, tokenizer

from ahn_mlx.errors import AHNError
from ahn_mlx.serve.acts import Acts
from ahn_mlx.serve.answers import Done, Piece, Request, Token
from ahn_mlx.serve.app import make_app
from ahn_mlx.serve.digests import Digests, Files
from ahn_mlx.serve.engine import fresh
from ahn_mlx.serve.guard import LOOPBACK
from ahn_mlx.serve.memories import Library
from ahn_mlx.serve.metrics import Metrics
from ahn_mlx.serve.openapi import BODIES, ROUTES
from ahn_mlx.serve.service import Service
from ahn_mlx.serve.shelf import Shelf

from ..mutate import of_json
from ..oracle import Target

SAID = 'Well, <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> so it is.'
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


class Engine:
    """All that an application asks of one; what it says is always the same."""

    def __init__(self) -> None:
        self.model, self.tokenizer = model(window=12), tokenizer(TOOLS)
        self.acts = Acts(self.model, self.tokenizer, 4)
        self.metrics, self.rows, self.free, self.reading = Metrics(), 4, 4, 0
        self.stuck, self.beat = False, time.monotonic()

    def check_free(self, n: int) -> None:
        pass

    reserve = release = check_free

    def wake(self) -> None:
        pass

    def call(self, work: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except BaseException as e:
            future.set_exception(e)
        return future

    def add(self, document: Any) -> None:
        try:
            while not document.advance():
                pass
        except AHNError as e:
            document.fail(e)

    def submit(self, request: Request) -> None:
        for n in range(request.n):
            session = request.session.fork()
            said = SAID[: request.wish.sampling.max_tokens or 3]
            for part in (said[:9], said[9:]):
                request.tell(Piece(request.first + n, part, Token(65)))
            done = Done(request.first + n, "stop", len(said), session, 258, "<|im_end|>", None)
            request.tell(done)


@cache
def _application() -> tuple[Any, Any, Path, asyncio.AbstractEventLoop]:
    engine: Any = Engine()
    place = Path(tempfile.mkdtemp()).resolve()
    base = fresh(engine, None, 64)
    base.step = 16
    shelf = Shelf(1 << 22)
    library = Library(place, engine, shelf, 1 << 30)

    def make(system: str, chat: bool) -> Any:
        from ahn_mlx.reading.session import Session

        return Session(engine.model, engine.tokenizer, system=system, step=16, chat=chat)

    digests = Digests(library, Files(place / "files"), make)
    made = make("", True)
    made.read("It was a book. " * 9)
    made.save(place / "book.ahn")
    service = Service("tiny", engine, base, shelf, engine.metrics, library, 1, 1 << 30)
    app = make_app(service, digests, "key", LOOPBACK, frozenset({"http://page"}))
    return app, digests, place, asyncio.new_event_loop()


class Failed(Exception):
    """A status of the server's own fault, or an answer that is none."""


async def _ask(app: Any, given: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """What is answered to a request as h11 would hand it over."""
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in given["headers"]]
    path = given["path"]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"},
        **{"method": given["method"], "path": path, "root_path": "", "query_string": b""},
        **{"raw_path": path.encode("utf-8", "surrogatepass"), "headers": headers},
        **{"client": ("127.0.0.1", 5), "server": ("127.0.0.1", 80)},
    }
    body = given["body"]
    pieces = [body[: len(body) // 2], body[len(body) // 2 :]] if given["split"] else [body]
    coming = [
        {"type": "http.request", "body": piece, "more_body": n < len(pieces) - 1}
        for n, piece in enumerate(pieces)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        if coming:
            return coming.pop(0)
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = next(m for m in sent if m["type"] == "http.response.start")
    text = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    found = {k.decode("latin-1"): v.decode("latin-1") for k, v in start["headers"]}
    return start["status"], found, text


def _answer(given: dict[str, Any], place: Path, out: Path) -> None:
    app, digests, kept, loop = _application()
    if EARLIER in given["body"]:
        first = {"method": "POST", "path": "/v1/responses", "headers": JSON, "split": False}
        asked = _ask(app, {**first, "body": json.dumps(FIRST).encode()})
        _, _, text = loop.run_until_complete(asked)
        earlier = json.loads(text)["id"].encode()
        given = {**given, "body": given["body"].replace(EARLIER, earlier)}
    status, headers, text = loop.run_until_complete(_ask(app, given))
    kind = headers.get("content-type", "").partition(";")[0]
    if status >= 500:
        raise Failed(f"{status} for {given['method']} {given['path']}: {text[:500]!r}")
    if kind == "application/json" and text:
        json.loads(text)
    plain = status in (400, 416) and kind == "text/plain"  # of Starlette, to a Range
    if status >= 400 and (not (plain or kind == "application/json") or len(text) > 4000):
        raise Failed(f"{status} with {kind}, {len(text)} bytes: {text[:300]!r}")
    if kind == "text/event-stream":
        for event in text.decode().replace("\r", "").split("\n\n"):
            for line in event.split("\n"):
                name, _, value = line.partition(": ")
                if name == "data" and value != "[DONE]":
                    found = json.loads(value)
                    if str(found.get("type")) == "error" or "error" in found:
                        raise Failed(f"an error in a stream: {value[:500]}")
    if status >= 400:
        raise Refused(str(status))


class Refused(Exception):
    """As it should be."""


HEADERS = [["host", "localhost"], ["authorization", "Bearer key"]]
JSON = [*HEADERS, ["content-type", "application/json"]]


def _to(*paths: str) -> Any:
    def prepare(data: bytes, place: Path) -> dict[str, Any]:
        """A byte for the path and how the body comes, then the body."""
        how, body = (data[0], data[1:]) if data else (0, b"")
        path = paths[(how >> 1) % len(paths)]
        return {"method": "POST", "path": path, "headers": JSON, "body": body, "split": how & 1}

    return prepare


def _after_first(words: tuple[str, ...]) -> Any:
    change = of_json(words)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        head = bytes([seed >> 8 & 255]) if seed % 16 == 0 or not data else data[:1]
        return head + change(data[1:], longest - 1, seed)

    return mutate


def _bodies(*values: Any) -> Any:
    def seeds() -> list[bytes]:
        return [bytes([n]) + json.dumps(v).encode() for n in (0, 1) for v in values]

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
COMPLETE = (
    {"model": "tiny", "prompt": "Once", "max_tokens": 9, "echo": True, "logprobs": 1},
    {"model": "tiny", "prompt": ["a", "b"], "stream": True, "n": 2, "suffix": None},
    {"model": "tiny@book", "prompt": [1, 2, 3], "stop": "x"},
)
EARLIER = b"resp_0"  # stands for the response to FIRST
FIRST = {"model": "tiny", "input": "Hi", "instructions": "Be brief."}
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
    {
        **{"model": "tiny", "input": "Hi", "max_output_tokens": 99, "tool_choice": "auto"},
        **{"tools": [{"type": "function", **TOOL["function"]}], "stream": True},
    },
)
SPEAK = (
    {"model": "tiny", "messages": [ASK], "max_tokens": 9, "system": "Be brief."},
    {
        **{"model": "tiny", "max_tokens": 5, "stream": True, "stop_sequences": ["x"]},
        **{"tools": [{"name": "f", "input_schema": {"type": "object"}}], "top_k": 3},
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

# Whatever else a request may be


def _request(data: bytes, place: Path) -> dict[str, Any]:
    """JSON has method, path, headers and body; what is missing is as it should be."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    value = value if isinstance(value, dict) else {"body": data.decode("latin-1")}
    headers = []
    pairs = value.get("headers")
    for pair in pairs if isinstance(pairs, list) else HEADERS:
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair):
            # What h11 lets through.
            name = "".join(c for c in pair[0].lower() if c.isascii() and (c.isalnum() or c in "-_"))
            text = "".join(c for c in pair[1] if 32 <= ord(c) < 256 and ord(c) != 127).strip()
            if name == "content-length" and not (text.isascii() and text.isdigit()):
                continue
            headers.append((name or "x", text))
    body = value.get("body", "")
    raw = body.encode("utf-8", "replace") if isinstance(body, str) else json.dumps(body).encode()
    method, path = value.get("method", "GET"), value.get("path", "/")
    method = method if isinstance(method, str) and method.isascii() and method.isalpha() else "GET"
    path = "/" + str(path).lstrip("/").encode("utf-8", "replace").decode()
    return {"method": method, "path": path, "headers": headers, "body": raw, "split": False}


def _stored(given: dict[str, Any], place: Path, out: Path) -> None:
    _, digests, kept, _ = _application()
    jobs = len(digests.jobs)
    try:
        _answer(given, place, out)
    finally:
        # Jobs run beside; then nothing is left for the next request.
        if len(digests.jobs) != jobs:
            digests._worker.submit(lambda: None).result()
        if len(digests.jobs) > 20 or len(list((kept / "files").iterdir())) > 40:
            for job in list(digests.jobs):
                digests.delete(job)
            shutil.rmtree(kept / "files")
            (kept / "files").mkdir()
        for file in kept.iterdir():
            if file.suffix in (".part", ".ahn") and file.name != "book.ahn":
                if file.suffix == ".part":
                    raise Failed(f"{file.name} is left")
                file.unlink()


UPLOAD = (
    '--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
    "Content-Type: text/plain\r\n\r\nOne two three.\r\n--b--\r\n"
)


def _requests() -> list[bytes]:
    """Each route as it is meant, and a few as they are not."""
    found: list[Any] = []
    for method, path, _, _ in ROUTES:
        for name in ("book", "resp_0"):
            named = path
            for part in ("{model}", "{id}", "{name}"):
                named = named.replace(part, name)
            found.append({"method": method.upper(), "path": named, "headers": JSON, "body": "{}"})
    form = [*HEADERS, ["content-type", "multipart/form-data; boundary=b"]]
    found.append({"method": "POST", "path": "/v1/files", "headers": form, "body": UPLOAD})
    wanted = {"name": "new", "file_id": "file-" + "0" * 32, "system": "x"}
    found.append({"method": "POST", "path": "/v1/memories", "headers": JSON, "body": wanted})
    found.append({"method": "PUT", "path": "/v1/memories/new", "headers": HEADERS, "body": "x"})
    saved = {"name": "talk"}
    for what in ("save", "restore"):
        path = f"/v1/conversations/resp_0/{what}"
        found.append({"method": "POST", "path": path, "headers": JSON, "body": saved})
    found.append({"method": "GET", "path": "/", "headers": [["host", "[::1]:80"], ["origin", "x"]]})
    cross = [["host", "127.0.0.1"], ["origin", "http://page"], ["x-api-key", "key"]]
    found.append({"method": "OPTIONS", "path": "/v1/models", "headers": cross})
    return [json.dumps(x).encode() for x in found]


PATHS = (
    *(path for _, path, _, _ in ROUTES),
    *(
        "GET",
        "POST",
        "PUT",
        "DELETE",
        "OPTIONS",
        "HEAD",
        "PATCH",
        "host",
        "origin",
        "authorization",
    ),
    *("x-api-key", "Bearer key", "content-type", "content-length", "transfer-encoding", "chunked"),
    *("application/json", "multipart/form-data; boundary=b", "localhost", "[::1]", "..", "%2e%2e"),
    *("book", "file-" + "0" * 32, "filename", "if-range", "range", "bytes=0-", "bytes=5-2", UPLOAD),
    *(
        "name",
        "file_id",
        "file_ids",
        "system",
        "--b\r\n",
        "--b--",
        "\r\n\r\n",
        "filename*=UTF-8''x",
    ),
)
SERVE = (*(f"serve/{n}.py" for n in ("guard", "parameters", "service", "chat", "parts", "stream")),)


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
    *(
        Target(
            name,
            _request,
            _stored,
            _requests,
            ("serve/app.py", "serve/guard.py", "serve/memories.py", "serve/digests.py"),
            PATHS,
            mutate,
            refusals=(Refused,),
        )
        for name, mutate in (("stored", of_json(PATHS)), ("paths", None))
    ),
]
