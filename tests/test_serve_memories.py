"""Documents become memories, memories are models, conversations are saved and go on."""

import json
import re
import shutil

import mlx.core as mx
import pytest
from serving import Site, model, serving, tokenizer, wait_until

from ahn_mlx.reading.session import Session

CHAT = "/v1/chat/completions"
BOOK = "Call me Ishmael. Some years ago, never mind how long precisely. " * 12
ENDLESS = {"max_tokens": 1_000_000, "logit_bias": {"258": -100}}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("memories")) as site:
        yield site


def upload(site: Site, text: bytes, name: str = "book.txt") -> str:
    response = site.client.post("/v1/files", files={"file": (name, text)}, data={"purpose": "x"})
    assert response.status_code == 200, response.text
    assert response.json()["bytes"] == len(text)
    return response.json()["id"]


def digest(site: Site, name: str, text: bytes = BOOK.encode(), **options) -> dict:
    body = {"name": name, "file_id": upload(site, text), **options}
    job = site.ok("/v1/memories", body)
    return ended(site, job["id"])


def ended(site: Site, job_id: str) -> dict:
    def state():
        return site.ok(f"/v1/memory_jobs/{job_id}")

    wait_until(lambda: state()["status"] not in ("queued", "reading"))
    return state()


def arrays(session: Session) -> list[mx.array]:
    return [x for c in session.caches for x in (*c.state, *c.trace) if isinstance(x, mx.array)]


def same(a: Session, b: Session) -> bool:
    return a.tail.ids == b.tail.ids and all(
        mx.array_equal(x, y).item() for x, y in zip(arrays(a), arrays(b), strict=True)
    )


def asked(site: Site, name: str, question: str, **options) -> str:
    messages = [{"role": "user", "content": question}]
    answer = site.ok(CHAT, {"model": name, "messages": messages, "max_tokens": 12, **options})
    return answer["choices"][0]["message"]["content"]


def test_a_digest_is_bit_for_bit_the_command_lines(site: Site, tmp_path):
    running = site.client.build_request(
        "POST",
        CHAT,
        json={
            **{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True},
            **ENDLESS,
        },
    )
    response = site.client.send(running, stream=True)  # somebody is answered meanwhile
    try:
        job = digest(site, "whale", system="You read.")
    finally:
        response.close()
    assert job["status"] == "done" and job["tokens"] == job["tokens_read"] > len(BOOK)
    made, words = model(), tokenizer()
    alone = Session(made, words, step=16, system="You read.")
    alone.read(BOOK)
    alone.save(tmp_path / "alone.ahn")
    served = Session.load(site.digests.library.file("whale"), made, words)
    assert same(served, alone)
    # And it is asked as ahn-mlx ask does.
    expected = "".join(alone.fork().ask("Who?", max_tokens=12))
    assert asked(site, "tiny@whale", "Who?") == expected
    assert asked(site, "tiny", "Who?") != expected


def test_a_book_is_a_model_for_every_client(site: Site):
    digest(site, "moby-dick")
    assert "tiny@moby-dick" in [m["id"] for m in site.ok("/v1/models")["data"]]
    assert site.ok("/v1/models/tiny@moby-dick")["id"] == "tiny@moby-dick"
    first = asked(site, "tiny@moby-dick", "Who?")
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
    ]
    body = {"model": "tiny@moby-dick", "messages": messages, "max_tokens": 8}
    usage = site.ok(CHAT, body)["usage"]
    assert usage["prompt_tokens"] > len(BOOK)
    assert usage["prompt_tokens_details"]["cached_tokens"] > len(BOOK)
    # Without the snapshot the same words are read after the book.
    site.service.shelf.clear()
    again = site.ok(CHAT, body)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 0
    assert abs(again["prompt_tokens"] - usage["prompt_tokens"]) < 30
    system = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    assert site.ok(CHAT, {**body, "messages": system})["usage"]["prompt_tokens"] > len(BOOK)
    text = {"model": "tiny@moby-dick", "prompt": " and then", "max_tokens": 4}
    assert site.ok("/v1/completions", text)["usage"]["prompt_tokens"] > len(BOOK)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert site.post(CHAT, {**body, "tools": tools}).json()["error"]["param"] == "tools"
    refused = site.post(CHAT, {**body, "messages": messages[1:]})
    assert refused.status_code == 400
    assert site.post(CHAT, {**body, "model": "tiny@other"}).status_code == 404


def test_jobs_are_cancelled_and_resumed_to_the_same_memory(site: Site, tmp_path):
    digest(site, "whole", b"One two three. " * 150)
    file_id = upload(site, b"One two three. " * 150)
    job = site.ok("/v1/memories", {"name": "parts", "file_id": file_id})
    wait_until(lambda: site.ok(f"/v1/memory_jobs/{job['id']}")["tokens_read"] > 100)
    assert site.ok(f"/v1/memory_jobs/{job['id']}/cancel", {})["status"] == "cancelled"
    stopped = ended(site, job["id"])
    wait_until(lambda: (site.digests.directory.parent / f".{job['id']}.partial").is_file())
    assert 0 < stopped["tokens_read"] < stopped["tokens"]
    assert site.client.get("/v1/memories/parts").status_code == 404
    site.ok(f"/v1/memory_jobs/{job['id']}/resume", {})
    assert ended(site, job["id"])["status"] == "done"
    loaded = [
        Session.load(site.digests.library.file(name), model(), tokenizer())
        for name in ("whole", "parts")
    ]
    assert same(*loaded)
    assert not list(site.digests.library.directory.glob(".*.partial"))
    assert site.post(f"/v1/memory_jobs/{job['id']}/resume", {}).status_code == 409
    assert site.client.delete(f"/v1/memory_jobs/{job['id']}").json()["deleted"]
    assert site.client.get(f"/v1/memory_jobs/{job['id']}").status_code == 404
    assert "parts" in [m["id"] for m in site.ok("/v1/memories")["data"]]


def test_what_is_read_when_the_server_ends_is_kept(tmp_path):
    text = b"One two three. " * 2000
    with serving(tmp_path, rows=1) as site:
        wanted = {"name": "long", "file_id": upload(site, text)}
        job = site.ok("/v1/memories", wanted)
        wait_until(lambda: site.ok(f"/v1/memory_jobs/{job['id']}")["tokens_read"] > 50)
        twice = site.post("/v1/memories", wanted)
        assert (twice.status_code, twice.json()["error"]["code"]) == (409, "exists")
        assert site.post(f"/v1/memory_jobs/{job['id']}/resume", {}).status_code == 409
        other = site.ok("/v1/memories", {**wanted, "name": "other"})  # which waits
        assert site.ok(f"/v1/memory_jobs/{other['id']}")["status"] == "queued"
        site.ok(f"/v1/memory_jobs/{other['id']}/cancel", {})
    with serving(tmp_path, rows=1) as site:
        paused = site.ok(f"/v1/memory_jobs/{job['id']}")
        assert paused["status"] == "paused" and 0 < paused["tokens_read"] < paused["tokens"]
        site.ok(f"/v1/memory_jobs/{job['id']}/resume", {})
        wait_until(
            lambda: (
                site.ok(f"/v1/memory_jobs/{job['id']}")["tokens_read"] > paused["tokens_read"] + 50
            )
        )
        begun = site.service.metrics.value("tokens_digested_total")
        now = site.ok(f"/v1/memory_jobs/{job['id']}")["tokens_read"]
        assert begun <= now - paused["tokens_read"] + 50  # not from the start again


def test_what_a_server_was_at_that_was_killed(tmp_path):
    """What its jobs say on the disk is of their begin; the memory of one is there."""
    with serving(tmp_path) as site:
        jobs = [digest(site, name, b"One two three. " * 40) for name in ("made", "lost")]
    (tmp_path / "lost.ahn").unlink()
    for job, read in zip(jobs, (0, 7), strict=True):
        known = tmp_path / "jobs" / f"{job['id']}.json"
        facts = {**json.loads(known.read_text()), "status": "reading", "tokens_read": read}
        known.write_text(json.dumps({**facts, "tokens": 2 * read}))
    with serving(tmp_path) as site:
        made, lost = (site.ok(f"/v1/memory_jobs/{job['id']}") for job in jobs)
    assert made == jobs[0] and made["tokens"] > 0
    assert (lost["status"], lost["tokens_read"], lost["tokens"]) == ("paused", 7, 14)
    noted = json.loads((tmp_path / "jobs" / f"{jobs[0]['id']}.json").read_text())
    assert noted["status"] == "done" and noted["tokens"] == made["tokens"]


def test_a_document_that_is_no_text_fails_by_its_own_name(site: Site):
    job = digest(site, "broken", b"\x00\x01\x02" * 50)
    assert job["status"] == "failed" and "binary" in job["error"]
    assert str(site.digests.directory.parent) not in json.dumps(job)
    assert digest(site, "broken2", b"  \n")["status"] == "failed"


def test_what_the_system_refuses_is_said_with_its_reason(site: Site):
    file_id = upload(site, b"text")
    stored = site.digests.files.path(file_id)
    stored.unlink()
    stored.mkdir()  # which nothing removes as a file
    refused = site.client.delete(f"/v1/files/{file_id}")
    said = refused.json()["error"]["message"]
    assert refused.status_code == 500 and re.search("directory|permitted", said)
    assert str(stored.parent) not in said
    stored.rmdir()


@pytest.mark.parametrize("job_id", [f"job-{'0' * 32}", "x", "file-1"])
def test_a_job_that_there_is_not(site: Site, job_id: str):
    path = f"/v1/memory_jobs/{job_id}"
    for refused in (
        *(site.client.get(path), site.client.delete(path)),
        *(site.post(f"{path}/{act}", {}) for act in ("cancel", "resume")),
    ):
        assert refused.status_code == 404 and repr(job_id) in refused.json()["error"]["message"]


def test_files(site: Site):
    file_id = upload(site, b"text", "../../etc/passwd.TXT")
    facts = site.ok(f"/v1/files/{file_id}")
    assert facts["object"] == "file" and facts["bytes"] == 4
    assert file_id in [f["id"] for f in site.ok("/v1/files")["data"]]
    stored = [f.name for f in site.digests.files.directory.iterdir() if file_id in f.name]
    assert sorted(stored) == [f"{file_id}.json", f"{file_id}.txt"]
    assert site.client.delete(f"/v1/files/{file_id}").json()["deleted"]
    assert site.client.get(f"/v1/files/{file_id}").status_code == 404
    assert not [f for f in site.digests.files.directory.iterdir() if file_id in f.name]
    assert site.client.post("/v1/files", data={"purpose": "x"}).status_code == 415
    assert site.client.post("/v1/files", files={"other": b"x"}).status_code == 400
    two = [("file", ("a.txt", b"x")), ("file", ("b.txt", b"y"))]
    assert site.client.post("/v1/files", files=two).status_code == 400
    for n, status in ((10, 200), (11, 400)):
        fields = {f"field{i}": "x" for i in range(n)}
        text = {"file": ("a.txt", b"x")}
        assert site.client.post("/v1/files", files=text, data=fields).status_code == status
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert site.client.post("/v1/files", content=b"--x--junk", headers=kind).status_code == 400
    assert site.client.post("/v1/files", content=b"--y\r\n", headers=kind).status_code == 400


@pytest.mark.parametrize("name", ["..", ".x", "a/b", "a b", "a" * 101, "", "x\u0000", "\u00e9"])
def test_names_of_memories_are_names(site: Site, name):
    file_id = upload(site, b"x")
    response = site.post("/v1/memories", {"name": name, "file_id": file_id})
    assert response.status_code == 400 and response.json()["error"]["param"] == "name"


def test_memories_go_up_and_down_and_are_checked(site: Site):
    digest(site, "first", b"A text to keep. " * 20)
    content = site.client.get("/v1/memories/first/content").content
    facts = site.ok("/v1/memories/first")
    assert facts["bytes"] == len(content) and facts["preview"].startswith("A text to keep.")

    def put(name, data):
        kind = {"content-type": "application/octet-stream"}
        return site.client.put(f"/v1/memories/{name}", content=data, headers=kind)

    assert put("second", content).status_code == 201
    assert asked(site, "tiny@second", "What?") == asked(site, "tiny@first", "What?")
    assert put("second", content).status_code == 409
    assert put("..%2fescaped", content).status_code in (400, 404)
    sizes = content[:8] + content[8:].replace(b'"shape":[1', b'"shape":[9', 1)
    wrong = [b"", b"{}", content[:-1], content[:100], sizes, content[:-9] + b"\xff" * 9]
    huge = (1 << 62).to_bytes(8, "little") + content[8:]
    for data in (*wrong, huge, content + b"x"):
        response = put("third", data)
        assert response.status_code == 400, response.text
        assert str(site.digests.directory.parent) not in response.text
    assert site.client.get("/v1/memories/third").status_code == 404
    left = [f.name for f in site.digests.library.directory.iterdir()]
    assert not [name for name in left if "third" in name or "escaped" in name]
    assert site.client.delete("/v1/memories/second").json()["deleted"]
    assert site.post(CHAT, {"model": "tiny@second", "messages": []}).status_code == 400
    response = site.post("/v1/completions", {"model": "tiny@second", "prompt": "x"})
    assert response.status_code == 404


def test_a_damaged_memory_in_the_directory_is_said(site: Site):
    digest(site, "good", b"A text to keep. " * 20)
    good = site.digests.library.file("good")
    bad = shutil.copy(good, good.with_name("bad.ahn"))
    bad.write_bytes(bad.read_bytes()[:-4] + b"oops")
    response = site.post("/v1/completions", {"model": "tiny@bad", "prompt": "x"})
    assert response.status_code == 400
    assert "bad" in response.text and str(good.parent) not in response.text
    bad.write_bytes(b"no memory")
    assert next(m for m in site.ok("/v1/memories")["data"] if m["id"] == "bad")["error"]
    assert site.client.delete("/v1/memories/bad").status_code == 409
    bad.unlink()


def test_conversations_are_saved_and_restored(site: Site):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Where?"}]
    first = site.ok(CHAT, {"model": "tiny", "messages": messages, "max_tokens": 10})
    facts = site.ok(f"/v1/conversations/{first['id']}/save", {"name": "talk"})
    assert facts["tokens"] == first["usage"]["total_tokens"]
    body = {"model": "tiny", "input": "And?", "max_output_tokens": 10}
    direct = site.ok("/v1/responses", {**body, "previous_response_id": first["id"]})
    site.service.shelf.clear()
    gone = site.post("/v1/responses", {**body, "previous_response_id": first["id"]})
    assert gone.status_code == 404
    site.ok("/v1/conversations/mine/restore", {"name": "talk"})
    restored = site.ok("/v1/responses", {**body, "previous_response_id": "mine"})
    assert restored["output"][0]["content"] == direct["output"][0]["content"]
    # The file is one of ahn-mlx chat's.
    session = Session.load(site.digests.library.file("talk"), model(), tokenizer())
    assert session.turn == "cut" and session.template.system == "Be."
    said = "".join(session.ask("And?", max_tokens=10))
    assert said == direct["output"][0]["content"][0]["text"]
    assert site.ok(f"/v1/conversations/{restored['id']}/save", {"name": "talk"})
    digest(site, "text", b"words " * 30)
    taken = site.post(f"/v1/conversations/{restored['id']}/save", {"name": "text"})
    assert taken.status_code == 409
    assert site.post("/v1/conversations/none/save", {"name": "x"}).status_code == 404
    assert site.post("/v1/conversations/x/restore", {"name": "text"}).status_code == 400


def test_without_a_directory_there_are_no_memories():
    with serving(rows=1) as site:
        for path in ("/v1/files", "/v1/memories", "/v1/memory_jobs"):
            response = site.client.get(path)
            assert response.status_code == 404 and "--memories" in response.text
        asked = site.post(
            "/v1/chat/completions",
            {"model": "tiny@book", "messages": [{"role": "user", "content": "Hi"}]},
        )
        assert asked.status_code == 404 and "--memories" in asked.text
        said = asked.json()["error"]
        assert (said["param"], said["code"]) == ("model", "model_not_found")
