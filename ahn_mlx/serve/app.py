"""Routes, and a server for them that ends cleanly."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import mlx.core as mx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import AHNError
from . import anthropic, openai, responses
from .digests import Digests
from .guard import (
    LOOPBACK,
    MAX_HEADERS,
    Guard,
    Protocol,
    allow_connections,
    error_body,
    error_headers,
)
from .openapi import DIGEST, SAVE, document
from .pages import page_routes
from .parameters import APIError, parse, parse_json
from .service import Service, told

GRACE = 10.0  # seconds for answers that run when the server is to end

Work = Callable[[Service, Request, dict[str, Any]], Awaitable[Response]]


class App:
    """service: what answers. digests: of its memories, if it has a directory."""

    def __init__(self, service: Service, digests: Digests | None):
        self.service, self.digests = service, digests

    def routes(self) -> list[Route]:
        """All there are."""
        posts: dict[str, Work] = {
            "/v1/chat/completions": openai.chat_completions,
            "/v1/completions": openai.completions,
            "/v1/responses": responses.responses,
            "/v1/messages": anthropic.messages,
            "/v1/messages/count_tokens": anthropic.count_tokens,
        }
        found = [
            Route(path, self._counted(path, self._json(work)), methods=["POST"])
            for path, work in posts.items()
        ]
        others: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.metrics),
            ("GET", "/openapi.json", self.openapi),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model}", self.model),
            ("POST", "/v1/files", self.upload),
            ("GET", "/v1/files", self.files),
            ("GET", "/v1/files/{id}", self.file),
            ("DELETE", "/v1/files/{id}", self.delete_file),
            ("POST", "/v1/memories", self.digest),
            ("GET", "/v1/memories", self.memories),
            ("GET", "/v1/memories/{name}", self.memory),
            ("GET", "/v1/memories/{name}/content", self.download),
            ("PUT", "/v1/memories/{name}", self.put_memory),
            ("DELETE", "/v1/memories/{name}", self.delete_memory),
            ("GET", "/v1/memory_jobs", self.jobs),
            ("GET", "/v1/memory_jobs/{id}", self.job),
            ("DELETE", "/v1/memory_jobs/{id}", self.delete_job),
            ("POST", "/v1/memory_jobs/{id}/cancel", self.cancel_job),
            ("POST", "/v1/memory_jobs/{id}/resume", self.resume_job),
            ("POST", "/v1/conversations/{id}/save", self.save),
            ("POST", "/v1/conversations/{id}/restore", self.restore),
        ]
        found += [Route(path, self._counted(path, w), methods=[m]) for m, path, w in others]
        return found

    def _json(self, work: Work) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            return await work(self.service, request, parse_json(await request.body()))

        return handle

    def _counted(
        self, path: str, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def counted(request: Request) -> Response:
            try:
                response = await handle(request)
            except Exception as e:
                if isinstance(e, ClientDisconnect):  # while its body was read: nobody listens
                    e = APIError("the client has left", status=499)
                elif isinstance(e, HTTPException):
                    e = APIError(e.detail, status=e.status_code)
                elif isinstance(e, AHNError | OSError) and self.digests is not None:
                    status = 500 if isinstance(e, OSError) else 400
                    e = APIError(self.digests.library.said(e, "memories"), status=status)
                elif not isinstance(e, APIError):
                    logging.getLogger("ahn_mlx.serve").error("%s in %s", type(e).__name__, path)
                response = error_response(told(e), request.url.path)
            code = str(response.status_code)
            self.service.metrics.count("requests_total", route=path, status=code)
            return response

        return counted

    # What there is

    async def health(self, request: Request) -> Response:
        engine = self.service.engine
        ahn = engine.model.ahn
        facts = {
            **{"status": "stuck" if engine.stuck else "ok", "model": self.service.name},
            **{"heartbeat_seconds": time.monotonic() - engine.beat},
            **{"rows": engine.rows, "rows_free": engine.free, "row_bytes": self.service.row_bytes},
            **{"window": ahn.window, "sinks": ahn.sinks},
            **{"active_bytes": mx.get_active_memory(), "memories": self.digests is not None},
        }
        return JSONResponse(facts, 503 if engine.stuck else 200)

    async def metrics(self, request: Request) -> Response:
        engine, shelf = self.service.engine, self.service.shelf
        gauges = {
            **{"rows": engine.rows, "rows_busy": engine.rows - engine.free},
            **{"reading": engine.reading, "kept": len(shelf), "kept_bytes": shelf.nbytes},
            **{"row_bytes": self.service.row_bytes},
            **{"heartbeat_seconds": time.monotonic() - engine.beat},
        }
        text = self.service.metrics.text(gauges)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    async def models(self, request: Request) -> Response:
        library = self.service.library
        books = [f"{self.service.name}@{name}" for name in library.names()] if library else []
        return JSONResponse(
            {"object": "list", "data": [self._model(n) for n in (self.service.name, *books)]}
        )

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        memory = self.service.check_model(name)
        if memory:
            self._digests().library.file(memory)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        made = {"created": self.service.created, "owned_by": "ahn-mlx"}
        return {"id": name, "object": "model", **made}

    # Documents and memories

    def _digests(self) -> Digests:
        if self.digests is None:
            raise APIError(
                "this server keeps no memories; start it with --memories DIR", status=404
            )
        return self.digests

    async def upload(self, request: Request) -> Response:
        files = self._digests().files
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise APIError("Content-Type must be multipart/form-data", status=415)
        async with request.form(max_files=1, max_fields=10) as form:
            given = form.get("file")
            if given is None or isinstance(given, str):
                raise APIError("a part named 'file' is needed", param="file")
            source, name = given.file, given.filename or "file.txt"
            facts = await asyncio.to_thread(files.add, name, source)
        return JSONResponse(facts)

    async def files(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._digests().files.all()})

    async def file(self, request: Request) -> Response:
        return JSONResponse(self._digests().files.get(request.path_params["id"]))

    async def delete_file(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        self._digests().files.delete(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def digest(self, request: Request) -> Response:
        digests = self._digests()
        found = parse(parse_json(await request.body()), DIGEST)
        files = found["file_ids"] or ([found["file_id"]] if found["file_id"] else [])
        if not files or not all(isinstance(f, str) for f in files):
            raise APIError("'file_id' is required", param="file_id", code="missing")
        job = digests.start(found["name"], files, found["system"])
        return JSONResponse(job.shown(), 202)

    async def memories(self, request: Request) -> Response:
        library = self._digests().library
        return JSONResponse(
            {"object": "list", "data": [library.facts(name) for name in library.names()]}
        )

    async def memory(self, request: Request) -> Response:
        return JSONResponse(self._digests().library.facts(request.path_params["name"]))

    async def download(self, request: Request) -> Response:
        file = self._digests().library.file(request.path_params["name"])
        return FileResponse(file, media_type="application/octet-stream", filename=file.name)

    async def put_memory(self, request: Request) -> Response:
        library = self._digests().library
        facts = await library.upload(request.path_params["name"], request.stream())
        return JSONResponse(facts, 201)

    async def delete_memory(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._digests().library.delete(name)
        return JSONResponse({"id": name, "object": "memory", "deleted": True})

    async def jobs(self, request: Request) -> Response:
        data = [job.shown() for job in self._digests().jobs.values()]
        return JSONResponse({"object": "list", "data": data})

    async def job(self, request: Request) -> Response:
        return JSONResponse(self._digests().get(request.path_params["id"]).shown())

    async def cancel_job(self, request: Request) -> Response:
        return JSONResponse(self._digests().cancel(request.path_params["id"]).shown())

    async def resume_job(self, request: Request) -> Response:
        return JSONResponse(self._digests().resume(request.path_params["id"]).shown())

    async def delete_job(self, request: Request) -> Response:
        job_id = request.path_params["id"]
        self._digests().delete(job_id)
        return JSONResponse({"id": job_id, "object": "memory.job", "deleted": True})

    async def save(self, request: Request) -> Response:
        library = self._digests().library
        name = parse(parse_json(await request.body()), SAVE)["name"]
        kept = self.service.shelf.get(f"id:{request.path_params['id']}")
        if kept is None:
            raise APIError("the conversation is not kept, or no longer", status=404)
        return JSONResponse(await library.save(kept, name))

    async def restore(self, request: Request) -> Response:
        library, name = self._digests().library, request.path_params["id"]
        found = parse(parse_json(await request.body()), SAVE)
        if not name.replace("-", "").replace("_", "").isalnum() or len(name) > 100:
            raise APIError("an id has up to 100 letters, digits, - and _", param="id")
        await library.restore(found["name"], name)
        return JSONResponse({"id": name, "object": "conversation", "memory": found["name"]})


def error_response(error: APIError, path: str) -> JSONResponse:
    """In the format of the API that the path belongs to."""
    return JSONResponse(error_body(error, path), error.status, error_headers(error))


async def _http_error(request: Request, e: Exception) -> Response:
    status = e.status_code if isinstance(e, HTTPException) else 500
    texts = {404: "there is no such route", 405: "this route has no such method"}
    detail = e.detail if isinstance(e, HTTPException) else ""
    error = APIError(texts.get(status, detail or "the server failed"), status=status)
    response = error_response(error, request.url.path)
    if isinstance(e, HTTPException) and e.headers:
        response.headers.update(e.headers)
    return response


def make_app(
    service: Service,
    digests: Digests | None = None,
    key: str | None = None,
    hosts: tuple[str, ...] | None = LOOPBACK,
    origins: frozenset[str] = frozenset(),
) -> ASGIApp:
    """Routes behind the guard; see Guard."""
    handlers = {HTTPException: _http_error}
    app = Starlette(
        routes=[*page_routes(), *App(service, digests).routes()], exception_handlers=handlers
    )
    return Guard(app, key, hosts, origins)


class Server(uvicorn.Server):
    """Answers that run when it is to end have some seconds, and are then cut and told so."""

    def __init__(self, app: ASGIApp, service: Service, host: str, port: int):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_level="warning",
                h11_max_incomplete_event_size=MAX_HEADERS,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(GRACE) + 20,
            )
        )
        self._service = service
        allow_connections()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.engine.over

    async def shutdown(self, sockets: Any = None) -> None:
        self._service.engine.drain(GRACE)
        await super().shutdown(sockets)


def end(service: Service, digests: Digests | None) -> None:
    """Stop the engine, and keep what jobs have read."""
    if digests is not None:
        digests.stopping = True
    service.engine.stop()
    if digests is not None:
        digests.stop()
    service.tokenizing.shutdown(wait=True)
