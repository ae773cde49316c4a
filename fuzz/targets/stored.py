"""Requests of all other routes, one after the other: documents, jobs, memories; and what comes
over a socket."""

import asyncio
import json
import logging
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any

from uvicorn.server import ServerState

from ahn_mlx.reading import memoryfile
from ahn_mlx.serve import guard
from ahn_mlx.serve.app import Server
from ahn_mlx.serve.openapi import ROUTES

from ..mutate import of_json
from ..oracle import Target
from .http import ASK, CHAT
from .site import (
    EARLIER,
    FIRST,
    HEADERS,
    JSON,
    SERVE,
    WAYS,
    Failed,
    Loop,
    Refused,
    Site,
    ask,
    first_of,
    judge,
    loop_of,
    site_of,
)

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
    site, loop = site_of(number), loop_of()
    if isinstance(steps, bytes):
        return _raw(site, steps)
    known = {EARLIER: b"", FILE.encode(): b"", JOB.encode(): b""}
    refused = None
    try:
        for step in steps:
            if EARLIER in step["body"] and not known[EARLIER]:
                known[EARLIER] = first_of(site).encode()
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
                status, headers, text = loop.run_until_complete(ask(site.app, step))
                if step["method"] != "GET":
                    site.settle()
            finally:
                site.engine.way, site.engine.asked = "", []
            if not all(request.cancelled for request in asked):
                raise Failed(f"{step['way']}: rows are not given back")
            judge(step, status, headers, text)
            if status >= 400:
                refused = Refused(str(status))
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
        file = site.place / folder / last
        if last and last not in site.kept and not file.is_dir():
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
        transport = _Transport(loop_of())
        protocol = guard.Protocol(server.config, state, {}, loop_of())
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
        said = loop_of().run_until_complete(talk())
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
TARGETS = [
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
