"""Documents that are uploaded, and jobs that read them into memories: one at a time, between
the answers. What has been read is kept when a job is cancelled, and when the server ends.
"""

import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ..errors import AHNError
from ..outputs.files import replacing
from ..outputs.parts import clear_part, parts_in, share
from ..reading import memoryfile
from ..reading.session import Session
from ..reading.template import TemplateError
from ..reading.text import one_line, read_file
from .acts import Acts
from .engine import Engine
from .memories import Library
from .parameters import APIError

CHECKPOINT = 16384  # tokens between saves
ID = re.compile(r"(file|job)-[0-9a-f]{32}")
SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
MAX_FILES = 1000


class Files:
    """Uploaded documents, in a directory of their own and under names of ours."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._held, self.alone = share(directory)
        if self.alone:
            self._clear()

    def close(self) -> None:
        os.close(self._held)

    def _clear(self) -> None:
        """Of a document and what is known of it a server that was killed may leave one."""
        directory = self.directory
        for part in parts_in(directory):
            clear_part(part)
        names = sorted(f.name for f in directory.glob("file-*") if ID.fullmatch(f.stem))
        count = Counter(Path(name).stem for name in names)
        for name in names:
            if count[Path(name).stem] == 1:
                (directory / name).unlink(missing_ok=True)

    def add(self, name: str, source: IO[bytes]) -> dict[str, Any]:
        """Keep a document. name: what the client calls it."""
        if len(list(self.directory.glob("*.json"))) >= MAX_FILES:
            raise APIError(f"there are {MAX_FILES} files already; delete some", status=409)
        suffix = Path(name).suffix.lower()
        if not SUFFIX.fullmatch(suffix) or suffix == ".json":  # as what is known of it ends
            suffix = ".txt"
        file_id = f"file-{secrets.token_hex(16)}"
        target = self.directory / f"{file_id}{suffix}"
        with replacing(target) as part, part.open("wb") as f:
            while chunk := source.read(1 << 20):
                f.write(chunk)
        try:
            _write(self._known(file_id), {"filename": name[:200], "created_at": int(time.time())})
        except BaseException:  # nobody would know of it
            with suppress(OSError):  # what cannot be removed the next server clears
                target.unlink()
            raise
        return self._facts(target)

    def get(self, file_id: str) -> dict[str, Any]:
        """What is known of a document."""
        return self._facts(self.path(file_id))

    def all(self) -> list[dict[str, Any]]:
        found = []
        for file_id, file in self._stored().items():
            if self._known(file_id).is_file():
                with suppress(APIError):
                    found.append(self._facts(file))
        return found

    def path(self, file_id: str) -> Path:
        file = self._stored().get(file_id)
        if file is None or not self._known(file_id).is_file():
            raise _no_file(file_id)
        return file

    def delete(self, file_id: str) -> None:
        self.path(file_id).unlink(missing_ok=True)
        self._known(file_id).unlink(missing_ok=True)

    def text(self, file_id: str) -> str:
        """What a document says. Raises AHNError with the client's name for it."""
        path = self.path(file_id)
        try:
            return read_file(path)
        except AHNError as e:
            name = self._facts(path)["filename"]
            raise AHNError(str(e).replace(str(path), name)) from None

    def _known(self, file_id: str) -> Path:
        return self.directory / f"{file_id}.json"

    def _stored(self) -> dict[str, Path]:
        """Documents by their ids, in the order of these."""
        there = sorted(self.directory.glob("file-*"))
        return {f.stem: f for f in there if f.suffix != ".json" and ID.fullmatch(f.stem)}

    def _facts(self, path: Path) -> dict[str, Any]:
        """Of a stored document. What its client said of it may be damaged: the disk knows some."""
        try:
            about = path.stat()
        except OSError:  # just deleted
            raise _no_file(path.stem) from None
        facts = {"filename": path.name, "created_at": int(about.st_mtime)}
        try:
            said = json.loads(self._known(path.stem).read_text())
            facts |= {k: said[k] for k, v in facts.items() if type(said[k]) is type(v)}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        return {
            **{"id": path.stem, "object": "file", "bytes": about.st_size, **facts},
            **{"purpose": "user_data", "status": "processed"},
        }


def _no_file(file_id: str) -> APIError:
    return APIError(f"there is no file {file_id[:100]!r}", status=404, code="not_found")


def _write(file: Path, facts: dict[str, Any]) -> None:
    with replacing(file) as part:
        part.write_text(json.dumps(facts))


@dataclass
class Job:
    """status: queued, reading, done, cancelled, paused (the server ended) or failed."""

    name: str
    files: list[str]
    system: str = ""
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(16)}")
    status: str = "queued"
    tokens_read: int = 0
    tokens: int = 0
    error: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def shown(self) -> dict[str, Any]:
        return {"object": "memory.job", **asdict(self)}


def _read_job(file: Path) -> Job | None:
    """None if the file is damaged, or no job's."""
    try:
        job = Job(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    usual = asdict(Job("", [], id=file.stem, error=job.error))
    fits = all(type(getattr(job, name)) is type(value) for name, value in usual.items())
    error = "" if job.error is None else job.error
    texts = [*job.files, error] if fits else [None]
    return job if all(isinstance(x, str) for x in texts) and job.id == file.stem else None


_GONE = Job("", [], status="gone")


class Reading:
    """A document between the answers: the engine's reader of one step at a time."""

    def __init__(
        self,
        acts: Acts,
        session: Session,
        ids: list[int],
        done: int,
        tell: Callable[[int], None],
        keep: Callable[[int], None],
    ):
        self.acts, self.session, self.ids, self.at = acts, session, ids, done
        self.tell, self.keep = tell, keep
        self.cancelled = False
        self.future: Future[bool] = Future()
        self._kept = done

    def advance(self) -> bool:
        """One step, as the command line reads it."""
        n = self.session.step - len(self.session.tail.ids)
        block = self.ids[self.at : self.at + n]
        self.acts.read(self.session, block)
        self.at += len(block)
        self.tell(self.at)
        if self.at >= len(self.ids):
            self.future.set_result(True)
            return True
        if self.at - self._kept >= CHECKPOINT:
            self.keep(self.at)
            self._kept = self.at
        return False

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def end(self) -> None:
        try:
            self.keep(self.at)
            self.future.set_result(False)
        except Exception as e:
            self.fail(e)


class Digests:
    """All jobs. session: makes one for a document with a system message, in the engine."""

    def __init__(self, library: Library, files: Files, make: Callable[[str, bool], Session]):
        self.library, self.files, self._make = library, files, make
        self.engine: Engine = library.engine
        self.directory = library.directory / "jobs"
        self.directory.mkdir(exist_ok=True)
        self._worker = ThreadPoolExecutor(1, "digests")
        self._reading: Reading | None = None
        self.stopping = False  # set before the engine ends
        self.jobs: dict[str, Job] = {}
        for file in sorted(self.directory.glob("job-*.json")):
            if (job := _read_job(file)) is None:
                continue  # not one of ours
            self.jobs[job.id] = job
            if job.status in ("queued", "reading"):
                self._after_a_death(job)
        for part in (*parts_in(self.directory), *parts_in(library.directory)):
            clear_part(part)
        for file in library.directory.glob(".job-*.partial") if files.alone else ():
            job_id = file.name[1:].removesuffix(".partial")
            if ID.fullmatch(job_id) and self.jobs.get(job_id, _GONE).status in ("done", "gone"):
                file.unlink(missing_ok=True)

    def _after_a_death(self, job: Job) -> None:
        """Of a job that a server was at when it ended: paused, if its memory is not there."""
        made = self._made_of(job)
        if made is None:
            job.status = "paused"
            return
        job.status, job.tokens, job.tokens_read = "done", made, made
        with suppress(OSError):  # a full disk: it is found again next time
            self._note(job)

    def _made_of(self, job: Job) -> int | None:
        """Tokens of its document in a memory that is there, though the server was killed before it
        had said so; None if there is none."""
        try:
            facts = memoryfile.read_facts(self.library.file(job.name))
            names = ", ".join(self.files.get(f)["filename"] for f in job.files)
        except (APIError, OSError, KeyError, ValueError):
            return None
        last = facts.get("texts", [])[-1:]
        return last[0]["tokens"] if last and last[0]["name"] == names else None

    def get(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise APIError(f"there is no job {job_id[:100]!r}", status=404, code="not_found")
        return self.jobs[job_id]

    def start(self, name: str, files: list[str], system: str) -> Job:
        """Queue a job for a new memory."""
        self.library.file(name, there=False)
        for file_id in files:
            self.files.path(file_id)
        if any(j.name == name and j.status in ("queued", "reading") for j in self.jobs.values()):
            raise APIError(f"there is a job for {name!r} already", status=409, code="exists")
        job = Job(name, files, system)
        self._queue(job)
        return job

    def resume(self, job_id: str) -> Job:
        """Go on with a job that was cancelled, paused, or failed."""
        job = self.get(job_id)
        if job.status in ("queued", "reading", "done"):
            raise APIError(f"the job is {job.status}", status=409)
        self.library.file(job.name, there=False)
        self._queue(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """Stop a job within a step; what it has read is kept."""
        job = self.get(job_id)
        if job.status in ("queued", "reading"):
            self._cancel(job)
            self._note(job)
        return job

    def _cancel(self, job: Job) -> None:
        job.status = "cancelled"
        if self._reading is not None and self._current == job.id:
            self._reading.cancelled = True
            self.engine.wake()

    def delete(self, job_id: str) -> None:
        """Forget a job and what it has read, but not a memory that it has made. On a full disk
        too: nothing is written."""
        job = self.get(job_id)
        self._cancel(job)
        self._worker.submit(self._partial(job).unlink, missing_ok=True)
        self._file(job).unlink(missing_ok=True)
        del self.jobs[job.id]

    def stop(self) -> None:
        """After the engine has ended: what was being read is kept."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.files.close()

    _current = ""

    def _queue(self, job: Job) -> None:
        """Note it, and then let it begin: one that cannot be noted is as it was."""
        _write(self._file(job), asdict(replace(job, status="queued", error=None)))
        job.status, job.error = "queued", None
        self.jobs[job.id] = job
        self._worker.submit(self._run, job)

    def _note(self, job: Job) -> None:
        if job.id in self.jobs:
            _write(self._file(job), asdict(job))

    def _file(self, job: Job) -> Path:
        return self.directory / f"{job.id}.json"

    def _partial(self, job: Job) -> Path:
        return self.library.directory / f".{job.id}.partial"

    def _run(self, job: Job) -> None:
        if job.status != "queued" or self.stopping:
            return
        job.status = "reading"
        try:
            finished = self._read(job)
            if finished:
                job.status = "done"
            elif job.status == "reading":
                job.status = "paused"
        except Exception as e:
            if self.stopping:  # what was kept last is kept
                job.status = "paused"
                self._note(job)
                return
            known = isinstance(e, AHNError | APIError | OSError)
            job.error = self.library.said(e, job.name) if known else type(e).__name__
            job.status = "failed"
        finally:
            self._reading = None
        self._note(job)

    def _read(self, job: Job) -> bool:
        """Whether it came to its end."""
        names = [self.files.get(f)["filename"] for f in job.files]
        texts = [self.files.text(f) for f in job.files]
        text = texts[0]
        if len(texts) > 1:  # as ahn-mlx digest puts them together
            pairs = zip(names, texts, strict=True)
            text = "\n".join(f"=== {one_line(n)} ===\n\n{t.strip()}\n" for n, t in pairs)
        session = self._session(job.system)
        opening, done, partial = session.opening(), 0, self._partial(job)
        resumed: Session | None = None
        acts = self.engine.acts
        if partial.is_file():
            facts = memoryfile.read_facts(partial)
            opening, done = tuple(facts["opening"]), facts["done"]
            resumed = self.engine.call(lambda: acts.load(partial)).result()
        ids = session.encode(text, opening, alone=True)
        session = resumed or session
        job.tokens, job.tokens_read = len(ids), done
        out = self.library.file(job.name, there=False)

        def tell(read: int) -> None:
            self.engine.metrics.count("tokens_digested_total", read - job.tokens_read)
            job.tokens_read = read

        def keep(read: int) -> None:
            acts.save(session, partial, {"job": job.id, "done": read, "opening": opening})

        self._reading, self._current = Reading(acts, session, ids, done, tell, keep), job.id
        self._reading.cancelled = job.status == "cancelled"
        self.engine.add(self._reading)
        if not self._reading.future.result():
            return False
        session.note_text(", ".join(names), len(ids))
        self.library.file(job.name, there=False)  # a conversation may have taken it meanwhile
        self.engine.call(lambda: acts.save(session, out, {})).result()
        partial.unlink(missing_ok=True)
        return True

    def _session(self, system: str) -> Session:
        try:
            found: Session = self.engine.call(lambda: self._make(system, True)).result()
        except TemplateError:
            found = self.engine.call(lambda: self._make("", False)).result()
        return found
