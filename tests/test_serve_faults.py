"""A server whose machine stops, or whose disk is full: what it has confirmed is there when it is
started again, what it had not finished goes on or is gone, and the rest is as it was."""

import io
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from faultcases import (
    TEXT,
    Place,
    address_space,
    content,
    disk,
    fill,
    moments,
    needs_counts,
    spread,
)
from forkserver import Run

from ahn_mlx.reading import memoryfile
from ahn_mlx.serve.digests import Files

BOOK = (TEXT * 30).encode()


def start(place: Place, **how: Any) -> Run:
    memories = place.out / "memories"
    memories.mkdir(exist_ok=True)
    words = ("serve", "--model", place.model, "--port", 0, "--rows", 1, "--memories", memories)
    return place.server.start(*words, **how)


@contextmanager
def client(run: Run) -> Iterator[httpx.Client]:
    """Once it listens; if it ends before, all requests fail."""
    found = None
    while run.status is None and not found:
        run.ends_within(0.02)
        found = re.search(r"(http://\S+)/v1 serves", run.out)
    url = found[1] if found else "http://127.0.0.1:9"
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


class Refused(Exception):
    """What the server cannot do, with its reason."""


def ok(response: httpx.Response) -> Any:
    if response.status_code not in (200, 201, 202):
        raise Refused(response.text)
    return response.json()


def work(client: httpx.Client, place: Place, told: list[str]) -> None:
    """All that a user wants, as far as it is not done. told: what the server has confirmed."""

    there = {memory["id"] for memory in ok(client.get("/v1/memories"))["data"]}
    assert there >= {name for name in told if "-" not in name}
    files = ok(client.get("/v1/files"))["data"]
    assert {f["id"] for f in files} >= {name for name in told if name.startswith("file-")}
    if "given" not in there:
        ok(client.put("/v1/memories/given", content=place.memory.read_bytes()))
    told.append("given")
    if not files:
        files = [ok(client.post("/v1/files", files={"file": ("book.txt", BOOK)}))]
        told.append(files[0]["id"])
    jobs = ok(client.get("/v1/memory_jobs"))["data"]
    if not jobs and "read" not in there:
        wanted = {"name": "read", "file_id": files[0]["id"]}
        jobs = [ok(client.post("/v1/memories", json=wanted))]
    for job in jobs:
        if job["status"] in ("paused", "failed"):
            ok(client.post(f"/v1/memory_jobs/{job['id']}/resume"))
        while (state := ok(client.get(f"/v1/memory_jobs/{job['id']}")))["status"] != "done":
            if state["status"] == "failed":
                raise Refused(state["error"])
            assert state["status"] in ("queued", "reading"), state
            time.sleep(0.01)
    told.append("read")


def contents(place: Place) -> dict[str, Any]:
    """By name, but for names that are drawn; jobs and documents as what they say."""
    found: dict[str, Any] = {}
    for file in sorted((place.out / "memories").rglob("*")):
        if file.is_dir():
            continue
        if file.suffix == ".json":
            facts = json.loads(file.read_text())
            keys = ("filename", "bytes", "status", "name", "tokens")
            found[f"{file.parent.name} {len(found)}"] = {k: facts.get(k) for k in keys}
        else:
            drawn = re.sub("[0-9a-f]{32}", "", file.name)
            found[f"{file.parent.name} {drawn}"] = content(file)
    return found


def check_sound(place: Place) -> None:
    memories = place.out / "memories"
    for file in memories.glob("[!.]*.ahn"):
        memoryfile.verify(file)
    for facts in (memories / "files").glob("file-*.json"):
        json.loads(facts.read_text())
        assert facts.with_suffix(".txt").read_bytes() == BOOK


def whole(place: Place) -> tuple[dict[str, Any], int, int]:
    """What is there after the work, its operations, and its bytes."""
    place.clear()
    run = start(place)
    with client(run) as asked:
        work(asked, place, [])
    os.kill(run.pid, signal.SIGINT)
    run.wait()
    files = [p for p in (place.out / "memories").rglob("*") if p.is_file()]
    return contents(place), run.operations, sum(f.stat().st_size for f in files)


def stopped(place: Place, faults: list[dict[str, int]], final: dict[str, Any]) -> int:
    """Each is a server that comes to harm, and one that is started after it. Returns how often the
    first did not come to the end of the work."""
    short = 0
    for fault in faults:
        place.clear()
        told: list[str] = []
        run = start(place, **fault)
        with client(run) as asked:
            try:
                work(asked, place, told)
            except Refused as e:
                assert "deny" in fault and "ead-only file system" in str(e), e
                assert str(place.out) not in str(e)
            except (httpx.HTTPError, OSError):
                pass
        short += "read" not in told
        run.kill()
        check_sound(place)
        run = start(place)
        with client(run) as asked:
            work(asked, place, told)
            assert contents(place) == final, fault
        run.kill()
    return short


def test_halves_of_a_document_are_gone_when_the_server_starts_again(tmp_path: Path) -> None:
    files = Files(tmp_path / "files")
    data = {"a.txt": b"text", "b.json": b'{"text": "It"}', "c.PDF": b"%PDF", "d": b"bare"}
    kept = {files.add(name, io.BytesIO(text))["id"]: text for name, text in data.items()}
    whole = sorted((tmp_path / "files").iterdir())
    (tmp_path / "files" / f"file-{'0' * 32}.txt").write_text("nobody knows of it")
    (tmp_path / "files" / f"file-{'1' * 32}.json").write_text("{}")
    (tmp_path / "files" / f".file-{'2' * 32}.txt.0123abcd.part").write_text("half")
    (tmp_path / "files" / "notes.txt").write_text("of somebody else")
    there = sorted((tmp_path / "files").iterdir())
    second = Files(tmp_path / "files")  # while the first may be writing them
    assert sorted((tmp_path / "files").iterdir()) == there
    files.close()
    second.close()
    files = Files(tmp_path / "files")
    assert sorted((tmp_path / "files").iterdir()) == [*whole, tmp_path / "files/notes.txt"]
    assert {f["id"] for f in files.all()} == kept.keys()
    assert all(files.path(file_id).read_bytes() == text for file_id, text in kept.items())


def test_two_servers_of_one_directory(place: Place) -> None:
    """Documents and memories of one are there for the other, and nothing of either is cleared."""
    final, *_ = whole(place)
    place.clear()
    first, second, told = start(place), start(place), list[str]()
    with client(first) as asked, client(second) as other:
        ok(other.get("/v1/memories"))
        work(asked, place, told)
        for path in ("/v1/memories", "/v1/files"):
            assert ok(asked.get(path)) == ok(other.get(path)) != []
        again = other.put("/v1/memories/given", content=place.memory.read_bytes())
        assert again.status_code == 409, again.text
        assert contents(place) == final
    first.kill()
    second.kill()


def kills(place: Place, count: int) -> int:
    final, operations, _ = whole(place)
    return stopped(place, moments(operations, count, random.Random("serve")), final)


@needs_counts
def test_a_killed_server_loses_nothing(place: Place) -> None:
    assert kills(place, 4)


@needs_counts
@pytest.mark.long
def test_fifty_kills(place: Place) -> None:
    done = kills(place, 50)
    print(f"serve: {done} kills before the end of the work")
    assert done > 25


def denials(place: Place, count: int) -> None:
    final, operations, _ = whole(place)
    faults = [{"deny": 1 + n} for n in spread(operations, count, random.Random("serve"))]
    stopped(place, faults, final)


@needs_counts
def test_a_disk_that_becomes_read_only(place: Place) -> None:
    denials(place, 3)


@needs_counts
@pytest.mark.long
def test_twenty_disks_that_become_read_only(place: Place) -> None:
    denials(place, 20)


def filled(place: Place, count: int) -> int:
    """A disk without room for the work, and then with it. Returns how often it was refused."""
    final, _, size = whole(place)
    refused = 0
    for i in range(count):
        place.clear()
        with disk(place.out, 4 << 20):
            run, told = start(place), list[str]()
            with client(run) as asked:
                ok(asked.get("/v1/memories"))
                ballast = place.out / "ballast"
                fill(ballast, size * i // count)
                try:
                    work(asked, place, told)
                except Refused as e:
                    assert "No space left" in str(e) and str(place.out) not in str(e)
                    refused += 1
                check_sound(place)
                ballast.unlink()
                work(asked, place, told)
                assert contents(place) == final, i
            run.kill()
    return refused


def test_a_full_disk_is_an_answer(place: Place) -> None:
    """With a reason, and the server goes on."""
    assert filled(place, 4) > 2


@pytest.mark.long
def test_twenty_full_disks(place: Place) -> None:
    refused = filled(place, 20)
    print(f"serve: {refused} refusals")
    assert refused > 10


def test_an_upload_that_is_larger_than_the_disk_leaves_nothing(place: Place) -> None:
    place.clear()
    with disk(place.out, 1 << 16):
        run = start(place)
        with client(run) as asked:
            answer = asked.post("/v1/files", files={"file": ("book.txt", BOOK * 40)})
            assert answer.status_code >= 400 and "No space left" in answer.text
            left = [p for p in (place.out / "memories").rglob("*") if p.is_file()]
            assert left == []
        run.kill()


def test_a_job_that_could_not_be_noted_can_be_asked_for_again(place: Place) -> None:
    """A full disk refuses it, and it is as if nobody had asked; so is going on with one."""
    place.clear()
    with disk(place.out, 4 << 20):
        run = start(place)
        with client(run) as asked:
            book = {"file": ("book.txt", BOOK * 8)}
            wanted = {"name": "read", "file_id": ok(asked.post("/v1/files", files=book))["id"]}
            ballast = place.out / "ballast"
            fill(ballast, 0)
            assert "No space left" in asked.post("/v1/memories", json=wanted).text
            assert ok(asked.get("/v1/memory_jobs"))["data"] == []
            ballast.unlink()
            job = "/v1/memory_jobs/" + ok(asked.post("/v1/memories", json=wanted))["id"]
            assert ok(asked.post(f"{job}/cancel"))["status"] == "cancelled"
            fill(ballast, 0)
            assert "No space left" in asked.post(f"{job}/resume").text
            assert ok(asked.get(job))["status"] == "cancelled"
            ballast.unlink()
            assert ok(asked.post(f"{job}/resume"))["status"] == "queued"
            fill(ballast, 0)
            assert asked.delete(job).status_code == 200
            assert ok(asked.get("/v1/memory_jobs"))["data"] == []
        run.kill()


@pytest.mark.long
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
@pytest.mark.parametrize("room", [1 << 20, 1 << 24, 1 << 26])
def test_memory_that_is_taken_away(place: Place, room: int) -> None:
    """From a server that serves: it refuses, or it ends, and the next one goes on."""
    final, *_ = whole(place)
    place.clear()
    run, told = start(place), list[str]()
    with client(run) as asked:
        asked.timeout = httpx.Timeout(20)  # OpenBLAS asks for its memory for ever
        ok(asked.get("/v1/memories"))
        size = address_space(run.pid)
        resource.prlimit(run.pid, resource.RLIMIT_AS, (size + room, size + room))
        with suppress(httpx.HTTPError, OSError, Refused):
            work(asked, place, told)
    run.kill()
    check_sound(place)
    run = start(place)
    with client(run) as asked:
        work(asked, place, told)
        assert contents(place) == final
    run.kill()
