"""Who may ask, and how much: each rule of the guard at its bounds, without a server or a model."""

import asyncio
import json
import resource
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ahn_mlx.serve import guard
from ahn_mlx.serve.app import _http_error
from ahn_mlx.serve.guard import Guard
from ahn_mlx.serve.parameters import APIError

HOSTS = ("localhost", "::1")
PAGE = "https://page.example"


async def app(scope, receive, send):
    """Reads its body to the end, and says how long it was."""
    size, more = 0, scope["method"] in ("POST", "PUT")
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(
    method="GET", path="/v1/models", headers=(), body=(), key=None, hosts=HOSTS, origins=(), app=app
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer. headers: beside a Host, unless they have one.
    body: its pieces."""
    given = list(headers)
    if not any(name == "host" for name, _ in given):
        given.insert(0, ("host", "localhost:8080"))
    scope = {"type": "http", "method": method, "path": path, "scheme": "http"}
    scope["headers"] = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in given]
    pieces, sent = list(body) or [b""], []

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    guarded = Guard(app, key, hosts, frozenset(origins))
    asyncio.run(guarded(scope, receive, send))
    start, *rest = sent
    found = {k.decode(): v.decode() for k, v in start["headers"]}
    return start["status"], found, b"".join(message.get("body", b"") for message in rest)


def error(answer) -> dict[str, Any]:
    return json.loads(answer[2])["error"]


def test_every_answer_has_the_headers_of_a_careful_server():
    status, headers, body = ask()
    careful = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    assert (status, headers, body) == (200, {"a": "b", **careful}, b"0")
    status, headers, body = ask(headers=[("host", "elsewhere")])
    assert (status, headers["content-type"]) == (403, "application/json")
    assert headers["content-length"] == str(len(body)) and headers.items() >= careful.items()
    assert "access-control-allow-origin" not in headers and "connection" not in headers


@pytest.mark.parametrize(
    ("host", "taken"),
    [
        *(("localhost", True), ("LOCALHOST:1", True), ("[::1]:80", True), ("[::1]", True)),
        *(("::1", True), ("localhost.evil.example", False), ("evil:localhost", False)),
        *(("localhost:80:80", False), ("", False), ("127.0.0.1", False)),
    ],
)
def test_a_server_answers_to_its_names(host, taken):
    answer = ask(headers=[("host", host)])
    assert answer[0] == (200 if taken else 403)
    if not taken:
        assert error(answer)["code"] == "host"
    assert ask(headers=[("host", host)], hosts=None, key="k")[0] == 401  # any name, with a key


def test_one_host_is_named():
    assert ask(headers=[("host", "localhost"), ("host", "localhost")])[0] == 400
    scope_without = [("x", "y"), ("host", "localhost")]
    assert ask(headers=scope_without)[0] == 200
    assert guard.LOOPBACK == ("localhost", "127.0.0.1", "::1")


def test_pages_of_other_origins_ask_only_if_they_are_allowed():
    def of(origin, **more):
        return ask(headers=[("origin", origin)], **more)

    assert of("http://localhost:8080")[0] == of("HTTP://LOCALHOST:8080")[0] == 200
    for origin in (PAGE, "http://localhost:8081", "https://localhost:8080", "null"):
        assert of(origin)[0] == 403 and error(of(origin))["code"] == "origin"
    status, headers, _ = of(PAGE, origins=[PAGE])
    assert (status, headers["access-control-allow-origin"], headers["vary"]) == (
        200,
        PAGE,
        "Origin",
    )
    assert "vary" not in of("http://localhost:8080", origins=[PAGE])[1]
    assert of("https://page.example.evil", origins=[PAGE])[0] == 403
    status, headers, body = of(PAGE, origins=[PAGE], method="OPTIONS", key="k")
    assert (status, body, headers["access-control-max-age"]) == (204, b"", "600")
    assert headers["access-control-allow-methods"] == "GET, POST, PUT, DELETE"
    assert "authorization" in headers["access-control-allow-headers"]
    assert ask(method="OPTIONS", key="k")[0] == 401  # of nobody's page
    assert ask(headers=[("origin", PAGE)], origins=[PAGE], key="k")[0] == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-api-key", "k\u00e4y")], 401),
        *(([("authorization", "Bearer key")], 200), ([("x-api-key", "key")], 200)),
        *(([("authorization", "key")], 200), ([("authorization", "Bearer  key")], 401)),
        *(([], 401), ([("x-api-key", "")], 401), ([("x-api-key", "keys")], 401)),
        ([("x-api-key", "wrong"), ("authorization", "Bearer key")], 200),
    ],
)
def test_a_key_is_asked_of_everyone(headers, status):
    answer = ask(headers=headers, key="key")
    assert answer[0] == status
    if status == 401:
        said = error(answer)
        assert (said["code"], said["type"]) == ("invalid_api_key", "authentication_error")


def test_the_page_itself_needs_no_key():
    assert ask(path="/", key="key")[0] == 200
    assert ask(path="/other", key="key")[0] == 401


def post(size: str | None = "2", kind: str | None = "application/json", **more):
    headers = [] if size is None else [("content-length", size)]
    headers += [] if kind is None else [("content-type", kind)]
    return ask("POST", "/v1/messages", headers, more.pop("body", [b"{}"]), **more)


def test_bodies_are_json_of_a_known_size():
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert post(kind=kind)[::2] == (200, b"2")
    for kind in ("text/plain", None, "application/jsonx"):
        answer = post(kind=kind)
        assert answer[0] == 415 and json.loads(answer[2])["type"] == "error"  # as Anthropic's
    assert post("0", None, body=[b""])[0] == post(None, None, body=[b""])[0] == 200
    chunked = [("transfer-encoding", "chunked")]
    assert ask("POST", "/v1/models", chunked)[0] == 415
    for length in ("-1", "x", "1" * 21, "", "1.5", "+2"):
        assert post(length)[0] == 400
    assert ask("GET", headers=[("content-length", "x")])[0] == 200
    assert ask("PATCH", headers=[("content-length", "5")])[0] == 415


def test_bodies_are_16_mib_and_uploads_4_gib():
    most = 16 << 20
    assert post(str(most))[0] == 200
    answer = post(str(most + 1))
    assert answer[0] == 413 and answer[1]["connection"] == "close"
    # Whatever it says of its length.
    halves = [bytes(most // 2), bytes(most // 2)]
    assert post(None, body=halves)[::2] == (200, str(most).encode())
    assert post(None, body=[*halves, b"x"])[0] == 413
    for method, path in (("POST", "/v1/files"), ("PUT", "/v1/memories/a")):

        def upload(size, method=method, path=path):
            return ask(method, path, [("content-length", str(size))], [b"x"])

        assert upload(4 << 30)[0] == 200 and upload((4 << 30) + 1)[0] == 413
    for method, path in (("PUT", "/v1/files"), ("POST", "/v1/memories/a"), ("PUT", "/v1/memories")):
        assert not guard.is_upload(method, path)


def test_errors_of_routes_are_told_unless_an_answer_has_begun():
    async def fails(scope, receive, send):
        raise APIError("later", status=503, after=7, param="p")

    status, headers, body = ask(app=fails)
    assert (status, headers["retry-after"]) == (503, "7")
    assert json.loads(body)["error"]["param"] == "p"

    async def begins(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        raise APIError("late")

    with pytest.raises(APIError, match="late"):
        ask(app=begins)
    assert guard.error_headers(APIError("x", status=408)) == {"connection": "close"}
    assert guard.error_headers(APIError("x", status=400)) == {}


def test_what_is_no_request_passes():
    seen = []

    async def other(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Guard(other, "key", None, frozenset())({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


def test_a_body_arrives_in_a_minute_and_an_upload_at_64_kib_a_second(monkeypatch):
    async def deadlines(upload):
        waits = []

        async def waits_for(act, seconds):
            waits.append(round(seconds, 1))
            return await act

        monkeypatch.setattr(guard.asyncio, "wait_for", waits_for)
        pieces = [bytes(640 << 10), b"", b"x"]

        async def receive():
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        body = guard._Body(receive, upload)
        for _ in range(3):
            await body.receive()
        return waits

    assert asyncio.run(deadlines(False)) == [60.0, 60.0, 60.0]
    assert asyncio.run(deadlines(True)) == [60.0, 70.0, 70.0]


@pytest.mark.parametrize(
    ("soft", "hard", "asked"),
    [(256, 10_000, 2304), (256, 1000, 1000), (2304, 10_000, None), (256, -1, 2304), (-1, -1, None)],
)
def test_a_process_may_have_as_many_files_as_connections(monkeypatch, soft, hard, asked):
    none = resource.RLIM_INFINITY
    limits = tuple(none if n == -1 else n for n in (soft, hard))
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda what, to: set_to.append(to))
    guard.allow_connections()
    assert set_to == ([] if asked is None else [(asked, limits[1])])


@pytest.mark.parametrize(
    ("failed", "status", "said"),
    [
        (HTTPException(404), 404, "there is no such route"),
        (HTTPException(405, headers={"Allow": "POST"}), 405, "this route has no such method"),
        (HTTPException(400, "too many parts"), 400, "too many parts"),
        (HTTPException(418, ""), 418, "the server failed"),
        (KeyError("secret"), 500, "the server failed"),
    ],
)
def test_what_fails_outside_of_routes_is_said_in_the_form_of_the_api(failed, status, said):
    for path, known in (("/v1/models", ("param", "code")), ("/v1/messages", ())):
        request = Request({"type": "http", "method": "GET", "path": path, "headers": []})
        answer = asyncio.run(_http_error(request, failed))
        found = json.loads(answer.body)["error"]
        assert (answer.status_code, found["message"]) == (status, said)
        assert set(known) <= found.keys() and (known or "param" not in found)
        assert answer.headers.get("allow") == ("POST" if status == 405 else None)
