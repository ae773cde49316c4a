"""What others got wrong: each is asked of a real server, which must refuse and live on."""

import json
import socket
import time
from contextlib import closing

import httpx
import pytest
from serving import CONTROL, Site, serving, wait_until

from ahn_mlx.serve.chat import Conversation

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
BODY = {"model": "tiny", "messages": HI, "max_tokens": 2}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("memories")) as site:
        yield site


@pytest.fixture(autouse=True)
def alive(site: Site):
    """After each of these tests the server answers as before."""
    yield
    site.idle()
    assert site.ok(CHAT, BODY)["usage"]["completion_tokens"] == 2
    assert site.ok("/health")["status"] == "ok"


def refused(response: httpx.Response, status: int, *words: str) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert all(word in json.dumps(error) for word in words), error
    return error


# Bodies


@pytest.mark.parametrize(
    "more, param",
    [
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 4}, "n"),
        ({"n": 1 << 62}, "n"),
        ({"seed": 1 << 80}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"x": 1}}, "x"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "x"}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template": "{% for i in range(9**9) %}x{% endfor %}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"adapters": "/etc"}, "adapters"),
        ({"draft_model": "/etc"}, "draft_model"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{}]}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": CONTROL}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [None]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages"),
        ({"model": "/etc"}, "model"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"model": "tiny@"}, "model"),
        ({"model": "tiny@../../etc/passwd"}, "name"),
        ({"model": "tiny@/etc/passwd"}, "name"),
        ({"model": "tiny@a\u0000b"}, "name"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(site: Site, more, param):
    response = site.post(CHAT, {**BODY, **more})
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"] == param


def test_null_is_absent(site: Site):
    names = ("stop", "n", "seed", "tools", "stream", "stream_options", "logit_bias", "top_p")
    assert site.ok(CHAT, {**BODY, **dict.fromkeys(names)})


def test_nothing_is_fetched(site: Site):
    with closing(socket.create_server(("127.0.0.1", 0))) as bait:
        bait.settimeout(0.3)
        url = f"http://127.0.0.1:{bait.getsockname()[1]}/x.png"
        content = [{"type": "image_url", "image_url": {"url": url}}]
        response = site.post(CHAT, {**BODY, "messages": [{"role": "user", "content": content}]})
        refused(response, 400, "image_url")
        with pytest.raises(TimeoutError):
            bait.accept()


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"model": "\\ud800"}', "UTF-8"),
        (b'{"temperature": NaN}', "no number"),
        (b'{"temperature": 1e999, "model": "tiny", "messages": []}', ""),
        (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested"),
        (b'{"model": "tiny", "messages": ' + b"[" * 60 + b"]" * 60 + b"}", ""),
    ],
)
def test_a_body_that_is_no_request_is_refused(site: Site, data, word):
    response = site.client.post(CHAT, content=data, headers={"content-type": "application/json"})
    refused(response, 400, word)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", CHAT])
def test_every_api_refuses_in_its_own_format(site: Site, path):
    response = site.post(path, {"model": "tiny", "what": 1})
    assert response.status_code == 400
    answer = response.json()
    if path == "/v1/messages":
        assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    else:
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["param"] == "what"


@pytest.mark.parametrize(
    "prompt", [[], "", [""], [1.5], [[]], [["a"]], [-1], [259], [[1 << 70]], [None], {"a": 1}, True]
)
def test_prompts_of_every_kind(site: Site, prompt):
    response = site.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 2})
    assert response.status_code == 400, response.text


def test_large_bodies_are_not_held(site: Site, monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.guard.MAX_JSON", 1000)
    refused(site.post(CHAT, {**BODY, "user": "x" * 990}), 413)

    def chunks():
        for _ in range(40):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    response = site.client.post(CHAT, content=chunks(), headers=headers)
    assert response.status_code == 413


# Headers


def test_only_json_is_json(site: Site):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        headers = {"content-type": kind}
        response = site.client.post(CHAT, content=json.dumps(BODY), headers=headers)
        assert response.status_code == 415
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert site.client.post(CHAT, content=json.dumps(BODY), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/openapi.json"])
def test_another_host_or_origin_is_refused(site: Site, path):
    port = site.url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
        assert site.client.get(path, headers={"host": host}).status_code in (400, 403)
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"):
        assert site.client.get(path, headers={"origin": origin}).status_code == 403
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert site.client.get(path, headers={"host": host}).status_code == 200
    own = {"origin": site.url}
    response = site.client.get(path, headers=own)
    assert response.status_code == 200
    assert not [h for h in response.headers if h.startswith("access-control")]


def test_an_origin_that_is_let_in():
    with serving(rows=1, origins=frozenset({"http://localhost:3000"})) as site:
        headers = {"origin": "http://localhost:3000"}
        response = site.post(CHAT, BODY, headers=headers)
        assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert site.client.options(CHAT, headers=headers).status_code == 204
        assert site.client.options(CHAT, headers={"origin": "http://a.b"}).status_code == 403
        refused(site.post("/v1/none", {}, headers=headers), 404)


def test_every_route_wants_the_key(tmp_path):
    with serving(tmp_path, key="a-key-of-16-letters", hosts=None, rows=1) as site:
        assert site.ok(CHAT, BODY)
        paths = site.ok("/openapi.json")["paths"]
        for wrong in ("", "Bearer a-key-of-16-letterz", "Basic \xe9"):
            for path, methods in paths.items():
                for method in methods:
                    named = path.replace("{", "").replace("}", "")
                    headers = {"authorization": wrong.encode("latin-1")}
                    response = site.client.request(method, named, headers=headers)
                    assert response.status_code == 401, (method, path)
        with httpx.Client(base_url=site.url, trust_env=False) as client:
            headers = {"x-api-key": "a-key-of-16-letters"}
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.get("/v1/models").status_code == 401
            response = client.post("/v1/messages", json={})
            assert response.json()["error"]["type"] == "authentication_error"


def raw(site: Site, *parts: bytes, pause: float = 0.0, seconds: float = 15) -> bytes:
    """What comes back for these bytes, until the server closes."""
    host, _, port = site.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        found = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while data := connection.recv(65536):
                found += data
        except (ConnectionResetError, BrokenPipeError):
            pass
        return found


def test_requests_that_are_no_http(site: Site):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    kind = b"Content-Type: application/json\r\n"
    for length in (b"-1", b"x", b"1e9", b"99999999999999999999999"):
        answer = raw(site, head + kind + b"Content-Length: " + length + b"\r\n\r\n")
        assert answer.split()[1] in (b"400", b"413")
    both = b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"
    assert raw(site, head + kind + both).split()[1] == b"400"
    assert raw(site, b"\x16\x03\x01\x00\xff" * 20 + b"\r\n\r\n").split()[1] == b"400"
    assert raw(site, b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n").split()[1] == b"400"
    hosts = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n"
    assert raw(site, hosts).split()[1] == b"400"


def test_half_a_header_is_not_waited_for(site: Site, monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.guard.HEADERS_SECONDS", 0.5)
    assert raw(site, b"GET /health HT") == b""
    assert raw(site) == b""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for pieces in ((head + b"\r\n", head), (head + b"\r\n" + head,)):
        assert raw(site, *pieces).count(b"HTTP/1.1 200") == 1  # the second is half


def test_half_a_body_is_not_waited_for(site: Site, monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.guard.BODY_SECONDS", 0.5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    assert raw(site, head).split()[1] == b"408"
    # One that drips goes on no longer.
    begun = time.monotonic()
    assert raw(site, head, *[b" "] * 900, pause=0.1)[:12] in (b"", b"HTTP/1.1 408")
    assert time.monotonic() - begun < 60


def test_words_are_not_held_back(site: Site):
    """Nagle's algorithm would wait 40 ms for an acknowledgement, answer by answer."""
    site.ok("/health")
    for connection in list(site.server.server_state.connections):
        connected = connection.transport.get_extra_info("socket")
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_connections_are_bounded(site: Site, monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.guard.MAX_CONNECTIONS", 5)
    host, _, port = site.url.removeprefix("http://").partition(":")
    held = [socket.create_connection((host, int(port)), timeout=10) for _ in range(8)]
    try:
        closed = 0
        for connection in held[5:]:
            try:
                closed += connection.recv(1) == b""
            except ConnectionResetError:
                closed += 1
        assert closed == 3
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: len(site.server.server_state.connections) <= 2)


def test_routes_that_are_not_there(site: Site):
    refused(site.client.get("/v1/nothing"), 404)
    refused(site.client.get(CHAT), 405)
    refused(site.client.get("/v1/files/..%2f..%2fetc%2fpasswd"), 404)
    refused(site.client.get("/v1/files/file-1/../../x"), 404)


def test_what_breaks_in_the_engine_says_nothing_of_the_request(site: Site, monkeypatch, caplog):
    def broken(*_):
        raise ValueError("the secret prompt")

    monkeypatch.setattr(site.service.engine, "_step", broken)
    for stream in (False, True):
        response = site.post(CHAT, {**BODY, "stream": stream})
        assert response.status_code == (200 if stream else 500)
        assert "ValueError" in response.text and "secret" not in response.text
    monkeypatch.undo()
    assert "secret" not in caplog.text


def test_a_slow_upload_ends(site: Site, monkeypatch):
    monkeypatch.setattr("ahn_mlx.serve.guard.BODY_SECONDS", 0.5)
    head = b"PUT /v1/memories/slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    assert raw(site, head, b"x").split()[1] == b"408"
    assert site.client.get("/v1/memories/slow").status_code == 404


def test_long_conversations_are_found_in_one_pass(site: Site):
    """Hashing every beginning anew would be a hundred million messages."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "x" * 9} for i in range(9_999)]
    begun = time.monotonic()
    keys = Conversation("tiny", messages, []).keys()
    assert len(set(keys)) == len(keys) == 9_999
    assert time.monotonic() - begun < 20
    assert Conversation("tiny", messages[:7], []).keys() == keys[:7]
