"""A server whose machine stops, or whose disk is full: what it has confirmed is there when it is
started again, what it had not finished goes on or is gone, and the rest is as it was."""

import io
import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from faultcases import TEXT, Place, content, disk, fill
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


def work(client: httpx.Client, place: Place, told: list[str]) -> None:
    """All that a user wants, as far as it is not done. told: what the server has confirmed."""

    def ok(response: httpx.Response) -> Any:
        assert response.status_code in (200, 201, 202), response.text
        return response.json()

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
        if job["status"] == "paused":
            ok(client.post(f"/v1/memory_jobs/{job['id']}/resume"))
        while (state := ok(client.get(f"/v1/memory_jobs/{job['id']}")))["status"] != "done":
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
        assert (memories / "files" / json.loads(facts.read_text())["stored"]).read_bytes() == BOOK


def whole(place: Place) -> tuple[dict[str, Any], int, float]:
    place.clear()
    run, begun = start(place), time.monotonic()
    with client(run) as asked:
        work(asked, place, [])
        seconds = time.monotonic() - begun
        found = contents(place)
    run.kill()
    # What it would say at its end, had it not been killed: as many as there are names.
    return found, 3 * len(found), seconds


def kills(place: Place, count: int) -> int:
    final, changes, seconds = whole(place)
    chance, done = random.Random(0), 0
    for n in range(count):
        place.clear()
        told: list[str] = []
        how = {"die": 1 + n // 2 % changes} if n % 2 else {}
        run, moment = start(place, **how), chance.uniform(0.3, 1) * seconds
        with client(run) as asked:
            asked.timeout = httpx.Timeout(moment if not n % 2 else 60)
            with suppress(httpx.HTTPError, OSError):
                work(asked, place, told)
        done += "read" not in told
        run.kill()
        check_sound(place)
        run = start(place)
        with client(run) as asked:
            work(asked, place, told)
            assert contents(place) == final, n
        run.kill()
    return done


def test_halves_of_a_document_are_gone_when_the_server_starts_again(tmp_path: Path) -> None:
    files = Files(tmp_path / "files")
    data = {"a.txt": b"text", "b.json": b'{"text": "It"}', "c.PDF": b"%PDF", "d": b"bare"}
    kept = {files.add(name, io.BytesIO(text))["id"]: text for name, text in data.items()}
    whole = sorted((tmp_path / "files").iterdir())
    (tmp_path / "files" / f"file-{'0' * 32}.txt").write_text("nobody knows of it")
    (tmp_path / "files" / f"file-{'1' * 32}.json").write_text("{}")
    (tmp_path / "files" / f".file-{'2' * 32}.txt.0123abcd.part").write_text("half")
    (tmp_path / "files" / "notes.txt").write_text("of somebody else")
    files = Files(tmp_path / "files")
    assert sorted((tmp_path / "files").iterdir()) == [*whole, tmp_path / "files/notes.txt"]
    assert {f["id"] for f in files.all()} == kept.keys()
    assert all(files.path(file_id).read_bytes() == text for file_id, text in kept.items())


def test_a_killed_server_loses_nothing(place: Place) -> None:
    assert kills(place, 4)


@pytest.mark.slow
def test_fifty_kills(place: Place) -> None:
    done = kills(place, 50)
    print(f"serve: {done} kills before the end of the work")
    assert done > 25


@pytest.mark.parametrize("room", [0, 8192, 40960])
def test_a_full_disk_is_an_answer(place: Place, room: int) -> None:
    """With a reason, and the server goes on."""
    place.clear()
    with disk(place.out, 4 << 20):
        run = start(place)
        with client(run) as asked:
            assert asked.get("/v1/memories").status_code == 200
            ballast = place.out / "ballast"
            fill(ballast, room)
            large = {"file": ("book.txt", BOOK * 40)}
            for response in (
                asked.put("/v1/memories/given", content=place.memory.read_bytes()),
                asked.post("/v1/files", files=large),
            ):
                assert response.status_code >= 400, response.text
                said = json.dumps(response.json())
                assert "No space left" in said and str(place.out) not in said
            left = [p for p in (place.out / "memories").rglob("*") if p.is_file()]
            assert left == []
            ballast.unlink()
            work(asked, place, [])
        run.kill()
