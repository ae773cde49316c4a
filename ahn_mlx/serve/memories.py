"""A directory of memories: books that are model names, and documents on their way to be one.

Every name that a client gives is judged before it becomes the name of a file, and what a client
uploads is checked as any memory file is.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import AHNError
from ..outputs.files import replacing
from ..reading import memoryfile
from ..reading.session import Session
from ..reading.template import Template, TemplateError
from .engine import Engine
from .parameters import APIError
from .shelf import Kept, Shelf

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Library:
    """directory: of the memories. row_bytes: what a row has room for."""

    def __init__(self, directory: Path, engine: Engine, shelf: Shelf, row_bytes: int):
        self.directory, self.engine, self.shelf = directory, engine, shelf
        self.row_bytes = row_bytes

    def file(self, name: str, there: bool = True) -> Path:
        """Of a memory. there: whether it must exist, or must not."""
        if not NAME.fullmatch(name):
            raise APIError(
                "a memory's name is up to 100 letters, digits, and . _ - in between", param="name"
            )
        file = self.directory / f"{name}.ahn"
        if there and not file.is_file():
            raise APIError(f"there is no memory {name!r}", status=404, code="model_not_found")
        if not there and os.path.lexists(file):  # a link may lead out of the directory
            raise APIError(f"there is a memory {name!r} already", status=409, code="exists")
        return file

    def names(self) -> list[str]:
        """Of all memories."""
        found = (f.name.removesuffix(".ahn") for f in self.directory.glob("*.ahn") if f.is_file())
        return sorted(name for name in found if NAME.fullmatch(name))

    def facts(self, name: str) -> dict[str, Any]:
        """What a memory says of itself."""
        file = self.file(name)
        try:
            known = memoryfile.read_facts(file)
        except (AHNError, OSError) as e:
            return {"id": name, "object": "memory", "error": self.said(e, name)}
        size, saved = file.stat().st_size, known["saved"]
        kept = {k: known[k] for k in ("tokens", "window", "sinks", "preview", "turn")}
        return {"id": name, "object": "memory", "bytes": size, "created": saved, **kept}

    def said(self, error: BaseException, name: str) -> str:
        """What went wrong, without the paths of this machine."""
        text = error.strerror if isinstance(error, OSError) else str(error)
        text = re.sub(rf"{re.escape(str(self.directory))}[^:\s]*", name, text or "")
        return text or type(error).__name__

    async def open(self, name: str) -> tuple[Session, str]:
        """The session of a memory, and what tells this file from others of its name."""
        file = self.file(name)
        stat = file.stat()
        identity = f"{stat.st_mtime_ns}-{stat.st_size}"
        key = f"memory:{name}:{identity}"
        kept = self.shelf.get(key)
        if kept is None:
            session = await self._in_engine(lambda: self._load(file), name)
            kept = Kept(session)
            self.shelf.put(kept, key)
        return kept.session, identity

    def _load(self, file: Path) -> Session:
        session = self.engine.acts.load(file)
        if session.nbytes > self.row_bytes:
            raise AHNError(
                f"{file}: has {session.nbytes:,} bytes, a row {self.row_bytes:,}; start the server"
                " with the --kv-bits that it was read with"
            )
        return session

    async def _in_engine(self, work: Any, name: str) -> Any:
        try:
            return await asyncio.wrap_future(self.engine.call(work))
        except (AHNError, OSError) as e:
            raise APIError(self.said(e, name)) from None

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> dict[str, Any]:
        """Take a memory file over, if it is one and fits this model."""
        file = self.file(name, there=False)
        try:
            with replacing(file) as part:
                with part.open("wb") as f:
                    async for chunk in chunks:
                        f.write(chunk)
                await self._in_engine(lambda: self._load(part), name)
                self.file(name, there=False)
        except AHNError as e:
            raise APIError(self.said(e, name)) from None
        return self.facts(name)

    async def save(self, kept: Kept, name: str) -> dict[str, Any]:
        """Write a conversation as a memory, which ahn-mlx chat and ask can go on with."""
        file = self.directory / f"{name}.ahn"
        if not NAME.fullmatch(name) or not (
            file.is_file() and memoryfile.is_memory(file) and self._talked(file)
        ):
            file = self.file(name, there=False)
        await self._in_engine(lambda: self._save(kept, file), name)
        return self.facts(name)

    def _talked(self, file: Path) -> bool:
        try:
            return bool(memoryfile.read_facts(file).get("talked"))
        except (AHNError, OSError):
            return False

    def _save(self, kept: Kept, file: Path) -> None:
        acts = self.engine.acts
        session = acts.fork(kept.session)
        acts.read(session, list(kept.unread))
        if session.template is None:
            with suppress(TemplateError):
                session.template = Template(self.engine.tokenizer, kept.system)
        acts.save(session, file, {"talked": True})

    async def restore(self, name: str, conversation: str) -> None:
        """Let a saved conversation be gone on with under this id."""
        session, _ = await self.open(name)
        tokenizer = self.engine.tokenizer
        ended = ""
        if session.turn == "answered" and tokenizer.eos_token_id is not None:
            ended = tokenizer.decode([tokenizer.eos_token_id])
        if session.turn not in ("answered", "cut"):
            raise APIError("this memory is a text and no conversation; ask it by its model name")
        system = session.template.system if session.template else ""
        self.shelf.put(Kept(session, (), system, ended), f"id:{conversation}")

    def delete(self, name: str) -> None:
        """Remove a memory."""
        file = self.file(name)
        if not memoryfile.is_memory(file):
            raise APIError(f"{name!r} is no memory", status=409)
        file.unlink()
