"""What a server keeps and who asks for it by which path: documents, jobs, memories,
conversations."""

import time
from pathlib import Path

import pytest
from serving import Site, serving, wait_until
from test_serve_memories import digest, upload

from ahn_mlx.serve.app import GRACE
from ahn_mlx.serve.openapi import ROUTES

BY_NAME = [(m, path) for m, path, *_ in ROUTES if "{" in path and not path.endswith("/restore")]
KEPT = [(m, p) for m, p, *_ in ROUTES if any(f"/{w}" in p for w in ("files", "memor", "convers"))]
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("kept")) as site:
        yield site


@pytest.fixture(scope="module")
def bare():
    with serving() as site:
        yield site


def removed(site: Site, path: str) -> object:
    answer = site.client.delete(path)
    assert answer.status_code == 200, answer.text
    assert site.client.get(path).status_code == 404
    return answer.json()


@pytest.mark.parametrize(("method", "path"), BY_NAME)
def test_what_is_not_there_is_not_found(method, path, site: Site):
    where = path.replace("{id}", "none").replace("{name}", "none").replace("{model}", "none")
    answer = site.client.request(
        method, where, json={"name": "a"} if method == "post" else None, content=None
    )
    if method == "put":  # what is sent is looked at, and is no memory
        assert answer.status_code == 400 and "none: damaged" in answer.json()["error"]["message"]
    else:
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), KEPT)
def test_a_server_without_a_directory_says_so(method, path, bare: Site):
    where = path.replace("{id}", "none").replace("{name}", "none")
    answer = bare.client.request(method, where)
    said = "this server keeps no memories; start it with --memories DIR"
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, said)


def test_a_document(site: Site):
    before = {f["id"] for f in site.ok("/v1/files")["data"]}
    name = upload(site, b"A text.", "a.md")
    facts = site.ok(f"/v1/files/{name}")
    assert (facts["object"], facts["filename"], facts["bytes"]) == ("file", "a.md", 7)
    listed = site.ok("/v1/files")
    assert listed["object"] == "list"
    assert {f["id"] for f in listed["data"]} - before == {name} and facts in listed["data"]
    assert removed(site, f"/v1/files/{name}") == {"id": name, "object": "file", "deleted": True}


def test_what_is_no_document(site: Site):
    answer = site.client.post("/v1/files", content=b"x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for parts in ({"other": ("a.txt", b"x")}, {"file": (None, b"x")}):
        answer = site.client.post("/v1/files", files=parts)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "file"
    two = [("file", ("a.txt", b"x")), ("file", ("b.txt", b"x"))]
    assert site.client.post("/v1/files", files=two).status_code == 400
    many = {f"field{n}": "x" for n in range(11)}
    answer = site.client.post("/v1/files", files={"file": ("a.txt", b"x")}, data=many)
    assert answer.status_code == 400


def test_a_job(site: Site):
    answer = site.post("/v1/memories", {"name": "job", "file_id": upload(site, b"One two three.")})
    assert answer.status_code == 202
    name = answer.json()["id"]
    path = f"/v1/memory_jobs/{name}"
    wait_until(lambda: site.ok(path)["status"] == "done")
    listed = site.ok("/v1/memory_jobs")
    assert listed["object"] == "list" and site.ok(path) in listed["data"]
    assert site.ok(f"{path}/cancel", {})["status"] == "done"  # and stays so
    assert site.post(f"{path}/resume", {}).status_code == 409
    assert removed(site, path) == {"id": name, "object": "memory.job", "deleted": True}
    assert site.ok("/v1/memories/job")["id"] == "job"


@pytest.mark.parametrize(
    "body", [{}, {"file_ids": []}, {"file_ids": [1]}, {"file_ids": [None]}, {"file_id": ""}]
)
def test_a_job_without_documents(body, site: Site):
    answer = site.post("/v1/memories", {"name": "without", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] in ("file_id", "file_ids") and "file_id" in error["message"]


def test_a_memory(site: Site, tmp_path: Path):
    assert digest(site, "one", b"One two three.", system="Be brief.")["status"] == "done"
    facts = site.ok("/v1/memories/one")
    listed = site.ok("/v1/memories")
    assert listed["object"] == "list" and facts in listed["data"]
    answer = site.client.get("/v1/memories/one/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert 'filename="one.ahn"' in answer.headers["content-disposition"]
    again = site.client.put("/v1/memories/two", content=answer.content)
    assert again.status_code == 201 and again.json()["id"] == "two"
    assert site.client.get("/v1/memories/two/content").content == answer.content
    assert "tiny@two" in {m["id"] for m in site.ok("/v1/models")["data"]}
    model = site.ok("/v1/models/tiny@two")
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny@two", "model", "ahn-mlx")
    assert removed(site, "/v1/memories/two") == {"id": "two", "object": "memory", "deleted": True}
    assert site.client.get("/v1/models/tiny@two").status_code == 404
    assert "tiny@two" not in {m["id"] for m in site.ok("/v1/models")["data"]}


def test_a_conversation(site: Site):
    said = site.ok(CHAT, {"model": "tiny", "messages": HI, "max_tokens": 3})
    kept = site.ok(f"/v1/conversations/{said['id']}/save", {"name": "talk"})
    assert kept["id"] == "talk" and "tiny@talk" in {m["id"] for m in site.ok("/v1/models")["data"]}
    back = site.ok("/v1/conversations/other/restore", {"name": "talk"})
    assert back["id"] == "other"
    assert site.ok("/v1/conversations/other/save", {"name": "more"})["id"] == "more"
    for body in ({}, {"name": ""}, {"name": "a/b"}, {"name": 1}):
        for act in ("save", "restore"):
            answer = site.post(f"/v1/conversations/{said['id']}/{act}", body)
            assert answer.status_code == 400, answer.text
    assert site.post("/v1/conversations/other/restore", {"name": "never"}).status_code == 404


def test_what_a_server_says_of_itself(site: Site):
    health = site.ok("/health")
    engine, service = site.service.engine, site.service
    assert (health["status"], health["model"], health["memories"]) == ("ok", "tiny", True)
    assert (health["rows"], health["rows_free"]) == (engine.rows, engine.rows)
    assert (health["window"], health["sinks"]) == (60, 4)
    assert health["row_bytes"] == service.row_bytes > 0 and health["active_bytes"] > 0
    assert 0 <= health["heartbeat_seconds"] < 30
    model = site.ok("/v1/models/tiny")
    assert model["id"] == "tiny" and abs(model["created"] - time.time()) < 3600
    text = site.client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in text.text.splitlines() if line[0] != "#")
    assert float(lines["ahn_rows"]) == engine.rows and float(lines["ahn_rows_busy"]) == 0
    assert float(lines["ahn_kept"]) == len(service.shelf)
    assert float(lines["ahn_kept_bytes"]) == service.shelf.nbytes
    assert float(lines["ahn_row_bytes"]) == service.row_bytes
    assert float(lines["ahn_reading"]) == 0


def test_answers_have_their_time_when_a_server_ends(site: Site):
    """Longer than the engine waits for those that run."""
    config = site.server.config
    assert GRACE < config.timeout_graceful_shutdown <= 2 * GRACE + 20
    assert not config.access_log and not config.server_header and not config.proxy_headers


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_who_says_a_message_is_said(path, site: Site):
    answer = site.post(path, {"model": "tiny", "max_tokens": 2, "messages": [{"content": "Hi"}]})
    assert answer.status_code == 400 and "role" in answer.json()["error"]["message"]


def test_messages_are_answered_as_chat_is_where_it_does_not_mind_repetition(site: Site):
    asked = {"model": "tiny", "max_tokens": 40, "messages": HI}
    answer = site.ok("/v1/messages", asked)["content"][0]["text"]
    chat = site.chat("Hi", max_tokens=40)["choices"][0]["message"]["content"]
    minds = site.chat("Hi", max_tokens=40, frequency_penalty=1)["choices"][0]["message"]["content"]
    assert answer == chat != minds


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/v1/completions"])
def test_streams_are_events(path, site: Site):
    said = {"/v1/responses": {"input": "Hi"}, "/v1/completions": {"prompt": "Hi"}}
    asked = {"model": "tiny", "stream": True, **said.get(path, {"messages": HI, "max_tokens": 2})}
    with site.client.stream("POST", path, json=asked) as response:
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"


def test_seeds_of_64_bits_are_different(site: Site):
    drawn = {
        site.chat("Hi", seed=seed, temperature=1.5, max_tokens=20)["choices"][0]["message"][
            "content"
        ]
        for seed in (0, 1, 2**32, 2**62, 2**63, 2**64 - 1)
    }
    assert len(drawn) == 6
