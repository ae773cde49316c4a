"""Requests: the whole application in this process, above an engine that computes nothing."""

import asyncio
import json
import logging
import re
import socket
import tempfile
import time
from concurrent.futures import Future, wait
from functools import cache
from pathlib import Path
from typing import Any

from serving import TOOLS, model, tokenizer
from uvicorn.server import ServerState

from ahn_mlx.errors import AHNError
from ahn_mlx.reading import memoryfile
from ahn_mlx.reading.session import Session
from ahn_mlx.serve import digests, guard
from ahn_mlx.serve.acts import Acts
from ahn_mlx.serve.answers import Done, Piece, Read, Request, Token
from ahn_mlx.serve.app import Server, end, make_app
from ahn_mlx.serve.digests import Digests, Files
from ahn_mlx.serve.engine import fresh
from ahn_mlx.serve.guard import LOOPBACK
from ahn_mlx.serve.memories import Library
from ahn_mlx.serve.metrics import Metrics
from ahn_mlx.serve.openapi import BODIES, ROUTES
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.service import Service
from ahn_mlx.serve.shelf import Shelf

from ..mutate import of_json
from ..oracle import Target

THOUGHT = "Let me see.</think>So it is."
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


THINKING = TOOLS.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
# Looks at what it is given, refuses, and says no end of an answer.
ODD = (
    "{% if messages | length == 3 %}:{% endif %}"
    "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content | length % 2 }}{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
    "{% if not loop.last %};{% endif %}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)
# What goes wrong with a request, beside what it says: the engine is full, or fails, as it should or
# not, ends while it reads, or takes its time with a document; the client leaves, in the middle of
# its body or later, or stalls.
WAYS = ("", "full", "fails", "breaks", "ends", "gone", "leaves", "late", "slow")


class Engine:
    """All that an application asks of one; what it says is always the same. way: of WAYS."""

    way = ""

    def __init__(self, words: Any) -> None:
        self.model, self.tokenizer = _model(), words
        self.acts = Acts(self.model, self.tokenizer, 4)
        self.metrics, self.rows, self.free, self.reading = Metrics(), 4, 4, 0
        self.stuck, self.beat = False, time.monotonic()
        self.asked: list[Request] = []
        self.slow: Any = None  # a document that is read when all else is done

    def check_free(self, n: int) -> None:
        if self.way == "full":
            raise APIError("all rows are busy", status=429, code="rate_limit_exceeded", after=1)

    reserve = check_free

    def wake(self) -> None:
        pass

    def stop(self) -> None:
        if self.slow is not None:
            self.slow.end()
        self.slow = None

    def call(self, work: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            if self.way == "breaks":
                raise ValueError("as the engine breaks")
            future.set_result(work())
        except BaseException as e:
            future.set_exception(e)
        return future

    def add(self, document: Any) -> None:
        if self.way == "slow" and self.slow is None:
            self.slow = document
            return
        try:
            while not document.cancelled and not document.advance():
                if self.way in ("fails", "breaks"):
                    raise AHNError("as the engine fails")
                if self.way == "ends":
                    break
        except AHNError as e:
            document.fail(e)
        if not document.future.done():
            document.end()

    def submit(self, request: Request) -> None:
        self.asked.append(request)
        if len(request.ids) > 40:
            request.tell(Read(16, len(request.ids)))
        wish, thinks = request.wish.sampling, self.tokenizer.has_thinking
        said = (THOUGHT if thinks else SAID)[: wish.max_tokens or 3]
        stop = next((text for text in wish.stop if text in said), None)
        said = said if stop is None else said[: said.index(stop)]
        for n in range(request.n):
            session = request.session.fork()
            request.tell(Piece(request.first + n, said[:9], Token(65)))
            if self.way in ("fails", "breaks"):
                request.fail((AHNError if self.way == "fails" else ValueError)("as it fails"))
            if self.way in ("fails", "breaks", "leaves"):
                return
            request.tell(Piece(request.first + n, said[9:], Token(65)))
            session.turn = "answered"
            done = Done(request.first + n, "stop", len(said), session, 258, "<|im_end|>", stop)
            request.tell(done)


class Loop(asyncio.SelectorEventLoop):
    """Its clock can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


@cache
def _model() -> Any:
    return model(window=12)


class Site:
    """A server and its directory, if it has one: of a model that calls tools, one that thinks, with
    rows that are small, one without a chat template, or one with an odd one and no directory."""

    def __init__(self, kind: int):
        template, self.has_memories = ((TOOLS, 1), (THINKING, 1), (None, 1), (ODD, 0))[kind]
        words = tokenizer(template)
        if kind == 1:
            words._think_start, words._think_end = "<think>", "</think>"
        if kind > 1:
            words._tool_parser = None
        self.engine = Engine(words)
        self.place = Path(tempfile.mkdtemp()).resolve()
        self.row = 1000 if kind == 1 else 1 << 30
        self.service: Any = None
        self.digests: Any = None
        self.begin()
        for name, chat in (("book", template is not None), ("plain", False))[
            : 2 * self.has_memories
        ]:
            made = self.make("", chat)
            made.read("It was a book. " * 9)
            made.save(self.place / f"{name}.ahn")
        (self.place / "torn.ahn").write_bytes(b"x" * 99)
        self.kept = {f.name: f.read_bytes() for f in self.place.glob("*.ahn")}

    def make(self, system: str, chat: bool) -> Session:
        return self.engine.acts.make(system, chat, 16, None, 64)

    def begin(self) -> None:
        """As a server does, and one that was killed has left what is there."""
        engine: Any = self.engine
        if self.service is not None:
            end(self.service, self.digests)
        base = fresh(engine, None, 64, 16)
        shelf, library = Shelf(1 << 22), None
        if self.has_memories:
            library = Library(self.place, engine, shelf, self.row)
            self.digests = Digests(library, Files(self.place / "files"), self.make)
        self.service = Service("tiny", engine, base, shelf, engine.metrics, library, 1, self.row)
        origins = frozenset({"http://page"})
        self.app = make_app(self.service, self.digests, "key", LOOPBACK, origins)

    def settle(self) -> None:
        """Wait for what runs beside."""
        if self.digests is None:
            return
        beside = self.digests._worker.submit(lambda: None)
        while not beside.done() and self.engine.slow is None:
            wait([beside], timeout=0.01)

    def finish(self) -> None:
        """What was slow, too."""
        self.engine.way, slow, self.engine.slow = "", self.engine.slow, None
        if slow is not None:
            self.engine.add(slow)
        self.settle()

    def clear(self) -> None:
        """Nothing is left for the next input."""
        if self.digests is None:
            return
        self.finish()
        jobs = list(self.digests.jobs)
        for job in jobs:
            self.digests.delete(job)
        if jobs:
            self.settle()
        left = [f for f in self.place.rglob("*") if f.name not in self.kept and not f.is_dir()]
        for file in left:
            file.unlink()
        for name, data in self.kept.items():
            if not (self.place / name).exists():
                (self.place / name).write_bytes(data)
        if halves := [f.name for f in left if f.suffix == ".part"]:
            raise Failed(f"{halves[0]} is left")


@cache
def _loop() -> Loop:
    digests.CHECKPOINT, digests.MAX_FILES = 32, 8  # as few as an input is short
    return Loop()


@cache
def _site(kind: int) -> Site:
    return Site(kind)


class Failed(Exception):
    """A status of the server's own fault, or an answer that is none."""


async def _ask(app: Any, given: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """What is answered to a request as h11 would hand it over."""
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in given["headers"]]
    path, way = given["path"], given.get("way", "")
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"},
        **{"method": given["method"], "path": path, "root_path": "", "query_string": b""},
        **{"raw_path": path.encode("utf-8", "surrogatepass"), "headers": headers},
        **{"client": ("127.0.0.1", 5), "server": ("127.0.0.1", 80)},
    }
    body = given["body"]
    split = given["split"] or way in ("gone", "late")
    pieces = [body[: len(body) // 2], body[len(body) // 2 :]] if split else [body]
    coming = [
        {"type": "http.request", "body": piece, "more_body": n < len(pieces) - 1}
        for n, piece in enumerate(pieces)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        if way in ("gone", "late") and len(coming) == 1:
            coming.clear()
            _loop().ahead += 100 if way == "late" else 0
        if coming:
            return coming.pop(0)
        if way in ("gone", "leaves"):
            return {"type": "http.disconnect"}
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = next(m for m in sent if m["type"] == "http.response.start")
    text = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    found = {k.decode("latin-1"): v.decode("latin-1") for k, v in start["headers"]}
    return start["status"], found, text


def _answer(given: dict[str, Any], place: Path, out: Path) -> None:
    site, loop, way = _site(given.get("site", 0)), _loop(), given.get("way", "")
    if EARLIER in given["body"]:
        earlier = _first(site)
        given = {**given, "body": given["body"].replace(EARLIER, earlier.encode())}
    if BEFORE in given["body"]:
        _first(site, CHAT[3], "/v1/chat/completions")
    site.engine.way = way
    try:
        status, headers, text = loop.run_until_complete(_ask(site.app, given))
    finally:
        site.engine.way, asked = "", site.engine.asked
        site.engine.asked = []
    if not all(request.cancelled for request in asked):
        raise Failed(f"{way}: rows are not given back")
    _judge(given, status, headers, text)
    if status >= 400:
        raise Refused(str(status))


def _first(site: Site, body: Any = None, path: str = "/v1/responses") -> str:
    """The id of an answer that can be gone on from, or of none."""
    first = {"method": "POST", "path": path, "headers": JSON, "split": False}
    asked = _ask(site.app, {**first, "body": json.dumps(body or FIRST).encode()})
    _, _, text = _loop().run_until_complete(asked)
    return str(json.loads(text).get("id"))


def _judge(given: dict[str, Any], status: int, headers: dict[str, str], text: bytes) -> None:
    """Raises Failed. That an engine broke is said, and nothing more."""
    kind, way = headers.get("content-type", "").partition(";")[0], given.get("way", "")
    told = b"(ValueError)" in text and way == "breaks"
    if status >= 500 and not told:
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
                    error = str(found.get("type")) == "error" or "error" in found
                    if error and way not in ("fails", "breaks"):
                        raise Failed(f"an error in a stream: {value[:500]}")


class Refused(Exception):
    """As it should be."""


HEADERS = [["host", "localhost"], ["authorization", "Bearer key"]]
JSON = [*HEADERS, ["content-type", "application/json"]]


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

# Whatever else a request may be

FILE, JOB = "file-" + "0" * 32, "job-" + "0" * 32  # stand for what was uploaded or begun last
BOOK = "the book"  # stands for a memory's file


def _request(value: Any) -> dict[str, Any]:
    """JSON has method, path, headers and body; what is missing is as it should be."""
    value = value if isinstance(value, dict) else {"body": str(value)}
    headers = []
    pairs, body = value.get("headers"), value.get("body", "")
    usual = JSON if "body" in value else HEADERS
    for pair in pairs if isinstance(pairs, list) else usual:
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair):
            # What h11 lets through.
            name = "".join(c for c in pair[0].lower() if c.isascii() and (c.isalnum() or c in "-_"))
            text = "".join(c for c in pair[1] if 32 <= ord(c) < 256 and ord(c) != 127).strip()
            if name == "content-length" and not (text.isascii() and text.isdigit()):
                continue
            headers.append((name or "x", text))
    raw = body.encode("utf-8", "replace") if isinstance(body, str) else json.dumps(body).encode()
    method, path, way = value.get("method", "GET"), value.get("path", "/"), value.get("way", "")
    method = method if isinstance(method, str) and method.isascii() and method.isalpha() else "GET"
    path = "/" + str(path).lstrip("/").encode("utf-8", "replace").decode()
    restart = value.get("restart")
    raw = json.dumps(restart).encode() if isinstance(restart, dict) else raw
    asked = {"way": way if way in WAYS else "", "restart": restart, "split": False}
    return {"method": method, "path": path, "headers": headers, "body": raw, **asked}


def _requests_of(data: bytes, place: Path) -> tuple[int, list[dict[str, Any]] | bytes]:
    """Which site, and a request or a few, one after the other; or what comes over a socket."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return (data[0] >> 1) % 4 if data else 0, data
    steps = value.get("steps") if isinstance(value, dict) else None
    steps = steps[:9] if isinstance(steps, list) else [value]
    site = value.get("site") if isinstance(value, dict) else 0
    return site % 4 if type(site) is int else 0, [_request(step) for step in steps]


def _stored(given: tuple[int, list[dict[str, Any]] | bytes], place: Path, out: Path) -> None:
    number, steps = given
    site, loop = _site(number), _loop()
    if isinstance(steps, bytes):
        return _raw(site, steps)
    known = {EARLIER: b"", FILE.encode(): b"", JOB.encode(): b""}
    refused = None
    try:
        for step in steps:
            if EARLIER in step["body"] and not known[EARLIER]:
                known[EARLIER] = _first(site).encode()
            for name, now in known.items():
                step["body"] = step["body"].replace(name, now or name)
                step["path"] = step["path"].replace(name.decode(), (now or name).decode())
            if isinstance(step["restart"], dict):
                _killed(site, json.loads(step["body"]))
                continue
            if step["body"] == BOOK.encode():
                step["body"] = site.kept["book.ahn"]
            site.engine.way, asked = step["way"], site.engine.asked
            try:
                status, headers, text = loop.run_until_complete(_ask(site.app, step))
                if step["method"] != "GET":
                    site.settle()
            finally:
                site.engine.way, site.engine.asked = "", []
            if not all(request.cancelled for request in asked):
                raise Failed(f"{step['way']}: rows are not given back")
            _judge(step, status, headers, text)
            if status >= 400:
                refused = Refused(f"{step['path']}: {status}")
            elif found := re.search(rb'"id": ?"((file-|job-|resp_)[0-9a-f]{32})"', text):
                stands = {b"file-": FILE.encode(), b"job-": JOB.encode()}.get(found[2], EARLIER)
                known[stands] = found[1]
        if site.digests is not None and site.digests.jobs:
            site.finish()
            _look(site, any(step["way"] == "breaks" for step in steps))
    finally:
        if any(step["method"] != "GET" or step["restart"] is not None for step in steps):
            site.clear()
    if refused is not None:
        raise refused


def _look(site: Site, broke: bool) -> None:
    """At what jobs have made. broke: whether the engine did."""
    for job in site.digests.jobs.values() if site.digests is not None else ():
        if job.error is not None and job.error.isidentifier() and not broke:
            raise Failed(f"a job failed with {job.error}")
        file = site.place / f"{job.name}.ahn"
        if job.status == "done" and file.is_file():
            memoryfile.verify(file)


def _killed(site: Site, files: dict[str, Any]) -> None:
    """The server begins again, where one that was killed has left files."""
    for name, value in files.items() if site.has_memories else ():
        folder, _, last = name.rpartition("/")
        if (
            folder not in ("", "jobs", "files")
            or not last.isprintable()
            or len(last.encode("utf-8", "replace")) > 90
        ):
            continue
        # What is known of a document is there as a whole, or not at all.
        facts = value if isinstance(value, dict) else {}
        whole = all(isinstance(facts.get(x), str) for x in ("filename", "stored"))
        file = site.place / folder / last
        torn = folder == "files" and last.endswith(".json") and not whole
        if last and last not in site.kept and not file.is_dir() and not torn:
            text = value if isinstance(value, str) else json.dumps(value)
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
    site.begin()


class _Transport(asyncio.Transport):
    """Takes what is written."""

    def __init__(self, loop: Loop) -> None:
        super().__init__({"socket": _socket(), "peername": ("127.0.0.1", 5)})
        self.written, self.closed = bytearray(), False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    resume_reading, abort = pause_reading, close


@cache
def _socket() -> socket.socket:
    return socket.socket()


def _raw(site: Site, data: bytes) -> None:
    """What comes over a socket. A byte first: whether it comes in two pieces, by whom it is
    taken, and whether there are too many connections."""
    how, data = (data[0], data[1:]) if data else (0, b"")
    pieces = [data[: len(data) // 2], data[len(data) // 2 :]] if how & 1 else [data]
    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await site.app(scope, receive, noted)
        except Exception as e:
            raise Failed(f"raised {e!r}") from e

    async def talk() -> bytes:
        server = _server(site)
        server.config.loaded_app, state = app, ServerState()
        state.connections |= set(range(guard.MAX_CONNECTIONS * (how >> 7)))
        transport = _Transport(_loop())
        protocol = guard.Protocol(server.config, state, {}, _loop())
        protocol.connection_made(transport)
        for piece in pieces:
            if piece and not transport.is_closing():
                protocol.data_received(piece)
                await asyncio.sleep(0)
        while state.tasks and not (protocol.cycle and protocol.cycle.more_body):
            await asyncio.wait(set(state.tasks))
        protocol.eof_received()
        protocol.connection_lost(None)
        if state.tasks:
            await asyncio.wait(set(state.tasks))
        return bytes(transport.written)

    try:
        said = _loop().run_until_complete(talk())
    finally:
        if statuses:  # else nothing has come to a route
            site.clear()
    if said and not re.match(rb"HTTP/1\.1 [1-4]\d\d ", said):
        raise Failed(f"{said[:300]!r}")
    if any(status >= 500 for status in statuses):
        raise Failed(f"{statuses}: {said[:500]!r}")
    if not statuses or max(statuses) >= 400:
        raise Refused(str(statuses))


@cache
def _server(site: Site) -> Server:
    made = Server(site.app, site.service, "127.0.0.1", 0)
    made.config.load()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return made


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
    texts = [json.dumps(x).encode() for x in found]
    texts += [json.dumps({"site": 3, **x}).encode() for x in found if "GET" in x["method"]]
    return texts


def _stories() -> list[dict[str, Any]]:
    """What clients do one after the other."""
    form = [*HEADERS, ["content-type", "multipart/form-data; boundary=b"]]
    put = {"method": "POST", "path": "/v1/files", "headers": form, "body": UPLOAD}
    longer = {**put, "body": UPLOAD.replace("One", "One " * 12)}
    odd = {**put, "body": UPLOAD.replace("a.txt", "a.json").replace("One", "%PDF-1.4")}
    read = {"method": "POST", "path": "/v1/memories", "body": {"name": "new", "file_id": FILE}}
    both = {**read, "body": {"name": "new", "file_ids": [FILE, FILE], "system": "Be brief."}}
    job, asked = f"/v1/memory_jobs/{JOB}", {"model": "tiny@new", "messages": [ASK]}
    again, stop = ({"method": "POST", "path": f"{job}/{x}"} for x in ("resume", "cancel"))
    ask = {"method": "POST", "path": "/v1/chat/completions", "body": asked}
    drop = [{"method": "DELETE", "path": x} for x in (job, f"/v1/files/{FILE}", "/v1/memories/new")]
    respond = {"method": "POST", "path": "/v1/responses", "body": FIRST}
    after = {**respond, "body": {**FIRST, "previous_response_id": "resp_0"}}
    save = {"method": "POST", "path": "/v1/conversations/resp_0/save", "body": {"name": "talk"}}
    back = {"method": "POST", "path": "/v1/conversations/x/restore", "body": {"name": "talk"}}
    after_x = {**respond, "body": {"model": "tiny", "input": "Hi", "previous_response_id": "x"}}
    upload = {"method": "PUT", "path": "/v1/memories/other", "headers": HEADERS, "body": BOOK}
    of_file = {"id": FILE, "object": "file", "filename": "a.txt", "stored": f"{FILE}.txt"}
    of_job = {"name": "book", "files": [FILE], "id": JOB, "status": "reading"}
    left = {
        f"files/{FILE}.json": of_file,
        f"files/{FILE}.txt": "One two.",
        f"files/file-{'1' * 32}.txt": "alone",
        "files/.x.00.part": "",
        f"jobs/{JOB}.json": of_job,
        f"jobs/job-{'1' * 32}.json": "torn",
        f"jobs/job-{'2' * 32}.json": {**of_job, "name": "new", "id": f"job-{'2' * 32}"},
        f".job-{'3' * 32}.partial": "x",
        "jobs/.x.00.part": "",
    }
    made = {f"jobs/{JOB}.json": {**of_job, "name": "new"}}
    slow, other = {**read, "way": "slow"}, {**read, "body": {"name": "more", "file_id": FILE}}
    jobs = {"path": "/v1/memory_jobs"}
    resume = {"method": "POST", "path": f"/v1/memory_jobs/job-{'2' * 32}/resume"}
    steps = [
        [put, read, {"path": job}, {"path": "/v1/models/tiny@new"}, ask, *drop],
        [longer, put, {**both, "way": "ends"}, again, {"path": "/v1/memory_jobs"}, stop],
        [longer, {**read, "way": "ends"}, stop, {"restart": {}}, again, ask],
        [longer, {**read, "way": "fails"}, {"path": job}, again],
        [longer, {**read, "way": "breaks"}, odd, read, drop[0]],
        [longer, slow, read, again, jobs, stop, again],
        [longer, slow, other, stop, drop[0], drop[1], jobs],
        [longer, slow, jobs, {"restart": {}}, jobs],
        [put, read, {"restart": made}, jobs],
        [put] * 9,
        [respond, save, save, back, after, after_x],
        [respond, {**save, "way": "breaks"}],
        [upload, {**upload, "path": "/v1/memories/book"}, {"path": "/v1/memories/other/content"}],
        [{"path": "/v1/memories"}, {"method": "DELETE", "path": "/v1/memories/torn"}],
        [{"path": f"/v1/conversations/x/{x}", "method": "POST", "body": {"name": "plain"}}
         for x in ("save", "restore")],
        [{**ask, "body": {**asked, "model": f"tiny@{x}"}} for x in ("plain", "torn", "book")],
        [{**put, "way": "gone"}, {**upload, "way": "late"}, {**ask, "way": "leaves"}],
        [{"restart": left}, {"path": "/v1/memory_jobs"}, {"path": "/v1/files"}, resume],
    ]  # fmt: skip
    big = [["content-length", str(1 << 40)], *JSON]
    steps.append([{**ask, "headers": big}, {**ask, "headers": [*HEADERS, ["content-length", "2"]]}])
    few = (steps[0], *(some for some in steps if some[0] in (respond, upload)))
    return [
        *({"site": 0, "steps": some} for some in steps),
        *({"site": site, "steps": some} for some in few for site in (1, 2)),
    ]


def _sockets() -> list[bytes]:
    """Bytes of clients."""
    head = b"Host: localhost\r\nAuthorization: Bearer key\r\nContent-Type: application/json\r\n"
    body = json.dumps(CHAT[0]).encode()
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    get = b"GET /health HTTP/1.1\r\n" + head + b"\r\n"
    sized = head + b"Content-Length: %d\r\n\r\n%s"
    post = b"POST /v1/chat/completions HTTP/1.1\r\n"
    found = [get, get + get, post + sized % (len(body), body), post + sized % (99, b"{")]
    found += [post + chunked % (len(body), body), b"GET / HTTP/1.0\r\n\r\n", get[:30], b"\0"]
    return [bytes([n]) + x for n in (0, 1, 128) for x in found]


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
    *(*WAYS, "way", "site", "steps", "restart", BOOK, FILE, JOB, "new", "talk", "jobs/", "files/"),
    *("status", "queued", "reading", "paused", "done", "tokens_read", "stored", "resp_0"),
    *("book", "filename", "if-range", "range", "bytes=0-", "bytes=5-2", UPLOAD),
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
            _requests_of,
            _stored,
            seeds,
            ("serve/app.py", "serve/memories.py", "serve/digests.py", *SERVE),
            PATHS,
            mutate,
            refusals=(Refused,),
        )
        for name, seeds, mutate in (
            (
                "stored",
                lambda: [*_requests(), *(json.dumps(x).encode() for x in _stories())],
                of_json(PATHS),
            ),
            ("paths", lambda: [*_requests(), *_sockets()], None),
        )
    ),
]
