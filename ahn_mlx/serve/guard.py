"""What stands before every route: who may ask from where, how large a request may be, and how
long it may take to arrive.
"""

import asyncio
import hmac
import json
import re
import resource
import socket
from contextlib import suppress
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .anthropic import anthropic_error
from .pages import FILES
from .parameters import APIError
from .stream import openai_error

MAX_JSON = 16 << 20  # bytes
MAX_UPLOAD = 4 << 30
MAX_HEADERS = 32 << 10
MAX_CONNECTIONS = 2048
HEADERS_SECONDS = 10.0
BODY_SECONDS = 60.0  # for a body to arrive
SLOWEST = 64 << 10  # bytes per second of an upload, after these
SEND_SECONDS = 60.0  # for a client that does not take what it asked for
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_upload(method: str, path: str) -> bool:
    """Whether a route takes a file and not JSON."""
    return (method, path) == ("POST", "/v1/files") or (
        method == "PUT" and path.startswith("/v1/memories/")
    )


class Guard:
    """key: that every request must bring, or None. hosts: names that the server goes by; None
    for any, which needs a key. origins: of web pages that may ask."""

    def __init__(
        self, app: ASGIApp, key: str | None, hosts: tuple[str, ...] | None, origins: frozenset[str]
    ):
        assert key is not None or hosts is not None
        self.app, self.key, self.hosts, self.origins = app, key, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        origin = next((v for k, v in headers if k == "origin"), None)
        allowed = origin if origin in self.origins else None
        answer = _Answer(send, allowed)
        try:
            self._check(scope, headers, origin)
            if scope["method"] == "OPTIONS" and allowed:
                await answer.preflight()
                return
            if scope["path"] not in FILES:  # the page itself, which asks for the key
                self._check_key(headers)
            upload = is_upload(scope["method"], scope["path"])
            self._check_body(scope, headers, upload)
        except APIError as e:
            await answer.error(e, scope["path"])
            return
        body = _Body(receive, upload)
        try:
            await self.app(scope, body.receive, answer.send)
        except APIError as e:
            if answer.started:
                raise
            await answer.error(e, scope["path"])

    def _check(self, scope: Scope, headers: list[tuple[str, str]], origin: str | None) -> None:
        hosts = [v for k, v in headers if k == "host"]
        if len(hosts) != 1:
            raise APIError("one Host header is needed", status=400)
        if self.hosts is not None and _name(hosts[0]) not in self.hosts:
            raise APIError(f"this server is not called {hosts[0][:100]!r}", status=403, code="host")
        own = f"{scope.get('scheme', 'http')}://{hosts[0]}"
        if origin is not None and origin not in self.origins and origin.lower() != own.lower():
            raise APIError(
                "web pages of other origins may not ask; --allow-origin lets one",
                status=403,
                code="origin",
            )

    def _check_key(self, headers: list[tuple[str, str]]) -> None:
        if self.key is None:
            return
        given = [v.removeprefix("Bearer ") for k, v in headers if k == "authorization"]
        given += [v for k, v in headers if k == "x-api-key"]
        found = [hmac.compare_digest(g.encode("latin-1"), self.key.encode()) for g in given]
        if not any(found):
            raise APIError("the API key is missing or wrong", status=401, code="invalid_api_key")

    def _check_body(self, scope: Scope, headers: list[tuple[str, str]], upload: bool) -> None:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        kind = next((v for k, v in headers if k == "content-type"), "").split(";")[0].strip()
        length = next((v for k, v in headers if k == "content-length"), "0")
        bodyless = length == "0" and not any(k == "transfer-encoding" for k, _ in headers)
        if not upload and kind.lower() != "application/json" and not bodyless:
            raise APIError("Content-Type must be application/json", status=415)
        limit = MAX_UPLOAD if upload else MAX_JSON
        if not re.fullmatch("[0-9]{1,20}", length):
            raise APIError("Content-Length must be a number of bytes", status=400)
        if int(length) > limit:
            raise APIError(f"the body is larger than {limit:,} bytes", status=413)


class _Body:
    """A body with limits."""

    def __init__(self, receive: Receive, upload: bool):
        self._receive, self._upload = receive, upload
        self._left = MAX_UPLOAD if upload else MAX_JSON
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:  # whoever asks now waits for the client to leave
            return await self._receive()
        now = asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), self._until - now)
        except TimeoutError:
            raise APIError("the body did not arrive in time", status=408) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._left -= size
            if self._upload:
                self._until += size / SLOWEST
            self._whole = not message.get("more_body", False)
            if self._left < 0:
                raise APIError("the body is too large", status=413)
        return message


class _Answer:
    """What is sent, with the headers that every answer has."""

    def __init__(self, send: Send, origin: str | None):
        self._send, self._origin, self.started = send, origin, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message.get("headers", ()), *self._headers()]}
        await asyncio.wait_for(self._send(message), SEND_SECONDS)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
        if self._origin is not None:
            origin = self._origin.encode("latin-1")
            found += [(b"access-control-allow-origin", origin), (b"vary", b"Origin")]
        return found

    async def error(self, error: APIError, path: str) -> None:
        body = json.dumps(error_body(error, path)).encode()
        known = {"content-type": "application/json", "content-length": str(len(body))}
        known |= error_headers(error)
        headers = [(k.encode(), v.encode()) for k, v in known.items()]
        start = {"type": "http.response.start", "status": error.status, "headers": headers}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key, *"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body"})


def error_body(error: APIError, path: str) -> dict[str, Any]:
    """In the format of the API that a path belongs to."""
    return anthropic_error(error) if path.startswith("/v1/messages") else openai_error(error)


def error_headers(error: APIError) -> dict[str, str]:
    """Those that say more of an error."""
    found = {} if error.after is None else {"retry-after": str(error.after)}
    if error.status in (408, 413):  # the rest of the body may still come
        found["connection"] = "close"
    return found


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def allow_connections() -> None:
    """Let the process have that many files open; macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Protocol(H11Protocol):
    """HTTP/1.1 with a deadline for headers, and a bounded number of connections."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        # asyncio sets it only where a socket says its protocol; without it each word waits 40 ms.
        connected = transport.get_extra_info("socket")
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._watch()
        else:
            self._unwatch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # A next header that has begun already.
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._watch()

    def _watch(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_SECONDS, self.transport.abort)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
