"""What a server keeps of its clients, without HTTP: documents, jobs, memories and names."""

import asyncio
import io
import json
import os
import secrets
import threading
from pathlib import Path

import pytest
from serving import model, tokenizer, wait_until

from ahn_mlx.errors import AHNError
from ahn_mlx.serve import digests as module
from ahn_mlx.serve.app import end
from ahn_mlx.serve.build import build
from ahn_mlx.serve.digests import Files
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.service import new_id
from ahn_mlx.serve.shelf import Kept

TEXT = b"One two three. " * 60


@pytest.fixture
def files(tmp_path):
    found = Files(tmp_path / "files")
    yield found
    found.close()


class Built:
    """A service with a directory of memories, and what was made for it."""

    def __init__(self, directory):
        loaded = model(), tokenizer()
        self.service, self.digests, _ = build(
            *loaded, name="tiny", rows=2, memories=directory, step=16
        )
        self.library, self.files = self.digests.library, self.digests.files

    def upload(self, text=TEXT):
        return self.files.add("book.txt", io.BytesIO(text))["id"]

    def ended(self, job):
        wait_until(lambda: job.status not in ("queued", "reading"))
        # What the worker still notes.
        self.digests._worker.submit(int).result(30)
        return job

    def digest(self, name, text=TEXT):
        return self.ended(self.digests.start(name, [self.upload(text)], ""))

    def end(self):
        end(self.service, self.digests)


@pytest.fixture
def built(tmp_path):
    made = Built(tmp_path)
    yield made
    made.end()


def status(work, *given):
    with pytest.raises(APIError) as error:
        work(*given)
    return error.value.status


def held(engine):
    """Until the gate is open the engine computes nothing."""
    here, gate = threading.Event(), threading.Event()
    engine.call(lambda: (here.set(), gate.wait(30)))
    assert here.wait(10)
    return gate


# Documents


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("a.PDF", ".pdf"), ("a.epub", ".epub"), ("a", ".txt"), ("a.json", ".txt")),
        *(("a.123456789", ".txt"), ("a.12345678", ".12345678"), ("a.t x", ".txt"), ("..", ".txt")),
        *(("a.tar.gz", ".gz"), ("a.t\u00e9", ".txt"), ("../../x.TXT", ".txt")),
    ],
)
def test_a_document_is_kept_under_a_name_of_ours(files, name, suffix):
    facts = files.add(name, io.BytesIO(TEXT))
    assert files.path(facts["id"]) == files.directory / f"{facts['id']}{suffix}"
    assert files.path(facts["id"]).read_bytes() == TEXT
    assert facts["filename"] == name and facts["bytes"] == len(TEXT)
    assert files.all() == [files.get(facts["id"])] == [facts]


def test_documents_are_bounded_in_number(files, monkeypatch):
    monkeypatch.setattr(module, "MAX_FILES", 2)
    ids = [files.add("a", io.BytesIO(b"x"))["id"] for _ in range(2)]
    assert status(files.add, "a", io.BytesIO(b"x")) == 409
    files.delete(ids[0])
    assert files.add("a", io.BytesIO(b"x"))


def test_a_document_that_cannot_be_noted_is_not_there(files, monkeypatch):
    def full(file, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OSError, match="No space"):
        files.add("a.txt", io.BytesIO(b"x"))
    assert list(files.directory.glob("file-*")) == []

    unlink = Path.unlink

    def denied(path, missing_ok=False):
        if path.suffix == ".txt":
            raise OSError(30, "Read-only file system")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", denied)  # from here on, as of a broken disk
    with pytest.raises(OSError, match="No space"):  # what went wrong first
        files.add("a.txt", io.BytesIO(b"x"))
    assert files.all() == []


def test_only_ids_of_documents_find_one(files):
    (files.directory / "notes.json").write_text("{}")
    for wrong in ("notes", "../files/notes", f"file-{'0' * 32}", f"job-{'0' * 32}"):
        assert status(files.get, wrong) == 404
    facts = files.add("a.txt", io.BytesIO(b"x"))
    (files.directory / f"{facts['id']}.json").unlink()  # half deleted
    assert status(files.get, facts["id"]) == 404 and files.all() == []


@pytest.mark.parametrize(
    "said",
    [
        *("", '{"filename": "mi', "[]", "[" * 99_999, '"filename"', "{}", "\0"),
        *(
            '{"filename": 5, "created_at": "x"}',
            '{"filename": "x"}',
            '{"filename": "x", "stored": "/"}',
        ),
    ],
)
def test_a_document_is_there_whatever_became_of_what_was_known_of_it(files, said):
    facts, other = (files.add(name, io.BytesIO(b"It")) for name in ("mine.txt", "b.txt"))
    os.utime(files.path(facts["id"]), (1, 7))
    (files.directory / f"{facts['id']}.json").write_text(said)
    expected = {**facts, "filename": f"{facts['id']}.txt", "created_at": 7}
    assert files.get(facts["id"]) == expected
    assert sorted(files.all(), key=str) == sorted([expected, other], key=str)
    assert files.text(facts["id"]) == "It"
    files.delete(facts["id"])
    assert files.all() == [other]


def test_what_is_no_text_is_said_by_the_clients_name(files):
    facts = files.add("mine.txt", io.BytesIO(b"\0\1\2" * 50))
    with pytest.raises(AHNError, match=r"^mine\.txt: ") as error:
        files.text(facts["id"])
    assert str(files.directory) not in str(error.value)


def test_halves_of_a_document_are_cleared_by_the_next_server(tmp_path):
    files = Files(tmp_path)
    whole, lost = (files.add("a.txt", io.BytesIO(b"x"))["id"] for _ in range(2))
    (tmp_path / f"{lost}.json").unlink()
    (tmp_path / f"file-{secrets.token_hex(16)}.json").write_text("{}")
    files.close()
    again = Files(tmp_path)
    assert sorted(f.name for f in tmp_path.glob("file-*")) == [f"{whole}.json", f"{whole}.txt"]
    again.close()


# Jobs


def test_a_job_needs_its_documents_and_a_name_that_is_free(built):
    digests, gone = built.digests, f"file-{'0' * 32}"
    assert status(digests.start, "book", [gone], "") == 404 and digests.jobs == {}
    made = built.digest("book")
    assert (made.status, made.error) == ("done", None)
    assert status(digests.start, "book", made.files, "") == 409  # there is such a memory
    assert status(digests.resume, made.id) == 409
    built.library.delete("book")
    again = digests.start("book", made.files, "")  # of a job that is over the name is free
    assert built.ended(again).status == "done" and len(digests.jobs) == 2
    gate = held(built.service.engine)
    waiting = digests.start("other", made.files, "")
    assert status(digests.start, "other", made.files, "") == 409
    assert status(digests.resume, waiting.id) == 409
    gate.set()
    built.ended(waiting)


def test_a_job_that_is_cancelled_before_it_begins_reads_nothing(built):
    gate = held(built.service.engine)
    first, second = (built.digests.start(name, [built.upload()], "") for name in ("a", "b"))
    wait_until(lambda: first.status == "reading")
    assert second.status == "queued"
    assert built.digests.cancel(second.id).status == "cancelled"
    gate.set()
    assert built.ended(first).status == "done"
    assert (second.status, second.tokens_read, second.tokens) == ("cancelled", 0, 0)
    assert built.library.names() == ["a"]


def test_a_job_is_noted_as_it_is(built):
    """So that a server that is killed leaves what the next one can go on with."""
    noted = lambda job: json.loads((built.digests.directory / f"{job.id}.json").read_text())  # noqa: E731
    gate = held(built.service.engine)
    first, second = (built.digests.start(name, [built.upload()], "") for name in ("a", "b"))
    assert noted(second)["status"] == "queued" and noted(second)["error"] is None
    built.digests.cancel(second.id)
    assert noted(second)["status"] == "cancelled"
    second.error = "as it was"
    built.digests.resume(second.id)
    assert (noted(second)["status"], noted(second)["error"]) == ("queued", None)
    gate.set()
    assert [built.ended(job).status for job in (first, second)] == ["done", "done"]
    assert noted(second) == {k: v for k, v in second.shown().items() if k != "object"}


def test_a_job_that_is_deleted_leaves_nothing(built):
    digests = built.digests
    job = digests.start("long", [built.upload(TEXT * 200)], "")
    wait_until(lambda: job.tokens_read > 100)
    digests.delete(job.id)
    digests._worker.submit(int).result(30)
    assert status(digests.get, job.id) == 404
    assert not list(digests.directory.iterdir()) and built.library.names() == []
    assert not list(built.library.directory.glob(".job-*"))


def test_what_fails_is_said_without_paths(built):
    job = built.digest("broken", b"\0\1\2" * 50)
    assert job.status == "failed" and job.error.startswith("book.txt: ")
    path = built.files.path(job.files[0])
    path.unlink()
    again = built.ended(built.digests.resume(job.id))
    assert again.status == "failed" and again.error
    assert str(built.library.directory) not in again.error


def test_jobs_of_a_server_that_ended(tmp_path):
    built = Built(tmp_path)
    done, waits = built.digest("made"), built.digest("lost")
    built.end()
    for job, said in ((done, "done"), (waits, "queued")):
        known = tmp_path / "jobs" / f"{job.id}.json"
        known.write_text(json.dumps({**json.loads(known.read_text()), "status": said}))
    built.library.delete("lost")
    gone = f"job-{'0' * 32}"
    for job_id in (done.id, waits.id, gone):
        (tmp_path / f".{job_id}.partial").write_bytes(b"x")
    whole = json.loads((tmp_path / "jobs" / f"{done.id}.json").read_text())
    for name, text in (("x", "{}"), ("y", "[" * 99_999), ("z", ""), ("copy", json.dumps(whole))):
        (tmp_path / "jobs" / f"job-{name}.json").write_text(text)
    for n, wrong in enumerate(
        [{"tokens": "5"}, {"files": "x"}, {"files": [5]}, {"name": None}, {"error": 5}, {"x": 1}]
    ):
        odd = {**whole, "id": f"job-{n:032}", **wrong}
        (tmp_path / "jobs" / f"job-{n:032}.json").write_text(json.dumps(odd))
    again = Built(tmp_path)
    assert {j.id: j.status for j in again.digests.jobs.values()} == {
        **{done.id: "done", waits.id: "paused"}
    }
    # What is still wanted stays.
    assert [f.name for f in tmp_path.glob(".job-*")] == [f".{waits.id}.partial"]
    again.end()


def test_a_job_whose_memory_was_made_before_the_server_was_killed(tmp_path):
    built = Built(tmp_path)
    made = [built.digest(name) for name in ("whole", "other")]
    tokens = made[0].tokens
    built.end()
    (tmp_path / "files" / f"{made[1].files[0]}.json").write_text(
        '{"filename": "b", "created_at": 1}'
    )
    for job in made:
        known = tmp_path / "jobs" / f"{job.id}.json"
        known.write_text(
            json.dumps({**json.loads(known.read_text()), "status": "reading", "tokens": 0})
        )
    again = Built(tmp_path)
    whole, other = (again.digests.jobs[job.id] for job in made)
    assert (whole.status, whole.tokens, whole.tokens_read) == ("done", tokens, tokens) and tokens
    assert other.status == "paused"  # the memory of this name is of another document
    again.end()


# Memories


def test_names_are_those_of_memories(built):
    built.digest("b")
    built.digest("a.1")
    for other in ("no name.ahn", ".hidden.ahn", "x.txt"):
        (built.library.directory / other).write_bytes(b"x")
    (built.library.directory / "folder.ahn").mkdir()
    assert built.library.names() == ["a.1", "b"]


def test_a_memory_that_is_larger_than_a_row_is_not_opened(built):
    built.digest("book")
    built.library.row_bytes = 1000
    with pytest.raises(APIError, match="a row 1,000; start the server with the --kv-bits"):
        asyncio.run(built.library.open("book"))


def test_another_file_of_a_name_is_another_memory(built):
    built.digest("book")
    library, file = built.library, built.library.file("book")

    async def twice():
        first, same = await library.open("book"), await library.open("book")
        assert first[1] == same[1] and first[0] is same[0]
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1000))
        other = await library.open("book")
        assert other[1] != first[1] and other[0] is not first[0]

    asyncio.run(twice())


def test_nothing_takes_the_place_of_what_is_there(built):
    built.digest("book")
    library = built.library
    data = library.file("book").read_bytes()
    link = library.directory / "link.ahn"
    link.symlink_to(library.directory / "nowhere")
    assert status(library.file, "link", False) == 409

    async def chunks(taken):
        yield data
        if taken:  # by somebody else, meanwhile
            (library.directory / f"{taken}.ahn").write_bytes(b"other")

    assert asyncio.run(library.upload("copy", chunks("")))["id"] == "copy"
    whole, data = data, data[:-1]
    with pytest.raises(APIError, match=r"broken.*damaged") as damaged:
        asyncio.run(library.upload("broken", chunks("")))
    assert str(library.directory) not in damaged.value.message
    assert "broken" not in library.names()
    data = whole
    with pytest.raises(APIError) as error:
        asyncio.run(library.upload("new", chunks("new")))
    assert error.value.status == 409
    assert (library.directory / "new.ahn").read_bytes() == b"other"


def test_a_conversation_keeps_its_system_message(built):
    service, library = built.service, built.library
    session = service.engine.call(lambda: service.engine.acts.make("", True, 16, None, 64)).result()
    session.read("Where?")
    session.turn = "cut"
    kept = Kept(session, (5,), "Be brief.")
    facts = asyncio.run(library.save(kept, "talk"))
    assert facts["tokens"] == session.tokens + 1
    service.shelf.clear()
    asyncio.run(library.restore("talk", "mine"))
    found = service.shelf.get("id:mine")
    assert (found.system, found.ended, found.unread) == ("", "", ())
    brief = service.engine.call(
        lambda: service.engine.acts.make("Be brief.", True, 16, None, 64)
    ).result()
    brief.read("Where?")
    brief.turn = "answered"
    asyncio.run(library.save(Kept(brief), "brief"))
    asyncio.run(library.restore("brief", "yours"))
    assert service.shelf.get("id:yours").system == "Be brief."
    assert service.shelf.get("id:yours").ended == "<|im_end|>"


# Names


def test_a_model_is_asked_for_by_its_name(built):
    service = built.service
    assert (service.check_model("tiny"), service.check_model("tiny@a")) == ("", "a")
    for wrong in ("tiny@", "", "@a", "Tiny", "other@a", "tin"):
        assert status(service.check_model, wrong) == 404
    ids = {new_id("resp_") for _ in range(50)}
    assert len(ids) == 50 and {len(x) for x in ids} == {5 + 32}
