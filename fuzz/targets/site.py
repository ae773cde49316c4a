"""A server for requests: the whole application in this process, above an engine that computes
nothing, and what every answer must keep to."""

import asyncio
import json
import tempfile
import time
from concurrent.futures import Future, wait
from functools import cache
from pathlib import Path
from typing import Any

from serving import TOOLS, model, tokenizer

from ahn_mlx.errors import AHNError
from ahn_mlx.outputs.parts import parts_in
from ahn_mlx.reading.session import Session
from ahn_mlx.serve import digests
from ahn_mlx.serve.acts import Acts
from ahn_mlx.serve.answers import Done, Piece, Read, Request, Token
from ahn_mlx.serve.app import end, make_app
from ahn_mlx.serve.digests import Digests, Files
from ahn_mlx.serve.engine import fresh
from ahn_mlx.serve.guard import LOOPBACK
from ahn_mlx.serve.memories import Library
from ahn_mlx.serve.metrics import Metrics
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.service import Service
from ahn_mlx.serve.shelf import Shelf

THOUGHT = "Let me see.</think>So it is."
SAID = 'Well, <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> so it is.'


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
        places = (self.place, self.place / "jobs", self.place / "files")
        halves = [half.name for place in places for half in parts_in(place)]
        left = [f for f in self.place.rglob("*") if f.name not in self.kept and not f.is_dir()]
        for file in left:
            file.unlink()
        for name, data in self.kept.items():
            if not (self.place / name).exists():
                (self.place / name).write_bytes(data)
        if halves:
            raise Failed(f"{halves[0]} is left")


@cache
def loop_of() -> Loop:
    digests.CHECKPOINT, digests.MAX_FILES = 32, 8  # as few as an input is short
    return Loop()


@cache
def site_of(kind: int) -> Site:
    return Site(kind)


class Failed(Exception):
    """A status of the server's own fault, or an answer that is none."""


async def ask(app: Any, given: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
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
            loop_of().ahead += 100 if way == "late" else 0
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


EARLIER = b"resp_0"  # stands for the response to FIRST
FIRST = {"model": "tiny", "input": "Hi", "instructions": "Be brief."}


def first_of(site: Site, body: Any = None, path: str = "/v1/responses") -> str:
    """The id of an answer that can be gone on from, or of none."""
    first = {"method": "POST", "path": path, "headers": JSON, "split": False}
    asked = ask(site.app, {**first, "body": json.dumps(body or FIRST).encode()})
    _, _, text = loop_of().run_until_complete(asked)
    return str(json.loads(text).get("id"))


def judge(given: dict[str, Any], status: int, headers: dict[str, str], text: bytes) -> None:
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


SERVE = (*(f"serve/{n}.py" for n in ("guard", "parameters", "service", "chat", "parts", "stream")),)
