"""Server-sent events: what ends them, and what they say when something fails on the way."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .parameters import APIError
from .service import Running, told


def openai_error(error: APIError) -> dict[str, Any]:
    """The body of an error as OpenAI has it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, kind)
    known = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": known}


def openai_failure(error: APIError) -> str:
    """The same as the last event of a stream."""
    return f"data: {json.dumps(openai_error(error))}\n\ndata: [DONE]\n\n"


class SSE(StreamingResponse):
    """A stream; when the client leaves, or never comes to read it, its rows are free."""

    def __init__(
        self,
        running: Running,
        lines: AsyncIterator[str],
        failure: Callable[[APIError], str] = openai_failure,
    ):
        async def guarded() -> AsyncIterator[str]:
            try:
                async for line in lines:
                    yield line
            except Exception as e:
                yield failure(told(e))

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(guarded(), media_type="text/event-stream", headers=headers)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
