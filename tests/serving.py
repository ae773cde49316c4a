"""A small model behind a real server on loopback, for tests that ask it as clients do."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from checkpoints import CHATML, REPO, chat_tokenizer
from mlx_lm.models import llama
from mlx_lm.tool_parsers import json_tools

from ahn_mlx import AHNConfig, augment
from ahn_mlx.serve.app import Server, end, make_app
from ahn_mlx.serve.build import build
from ahn_mlx.serve.guard import LOOPBACK
from ahn_mlx.serve.openapi import ROUTES

CONTROL = "<|im_end|>"
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template: str | None = TOOLS) -> Any:
    found = chat_tokenizer(template)
    found._tool_parser = json_tools.parse_tool_call
    found._tool_call_start, found._tool_call_end = "<tool_call>", "</tool_call>"
    return found


def model(window: int = 60, vocabulary: int = 259) -> Any:
    """Of random parameters, whose memory is heard; one token a byte."""
    args = llama.ModelArgs("llama", 64, 2, 96, 2, rms_norm_eps=1e-5, vocab_size=vocabulary)
    mx.random.seed(4)
    made = augment(llama.Model(args), AHNConfig("gated_deltanet", window, 4, "clamped"))
    made.apply_to_modules(_louder)
    mx.eval(made.parameters())
    made.eval()
    return made


def _louder(_: str, module: Any) -> None:
    for name, x in list(module.items()):
        if isinstance(x, mx.array) and x.ndim > 1:
            module[name] = mx.random.normal(x.shape) * 0.3


class Site:
    """A running server. client: of httpx."""

    def __init__(self, service: Any, digests: Any, url: str, client: httpx.Client, server: Any):
        self.service, self.digests, self.url = service, digests, url
        self.client, self.server = client, server

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def ok(self, path: str, body: Any = None) -> Any:
        response = self.client.get(path) if body is None else self.client.post(path, json=body)
        assert response.status_code in (200, 201, 202), response.text
        return response.json()

    def chat(self, *contents: str, **options: Any) -> Any:
        """Messages of the user and the assistant by turns."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
        body = {"model": self.service.name, "messages": messages, "max_tokens": 12, **options}
        return self.ok("/v1/chat/completions", body)

    def stream(self, path: str, body: Any) -> list[Any]:
        """The data of all events, [DONE] as it is."""
        found = []
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    found.append(data if data == "[DONE]" else json.loads(data))
        return found

    def idle(self) -> None:
        """Wait until all rows are free."""
        wait_until(lambda: self.service.engine.free == self.service.engine.rows)


@contextmanager
def started(*args: object) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, str]]:
    """ahn-mlx serve as a process of its own: it, a client, and what it says of rows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ahn_mlx", "serve", "--port", "0", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    try:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+)/v1 serves (\S+)$", first)
        assert found, (first, process.stderr and process.stderr.read())
        with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as client:
            yield process, client, second
    finally:
        process.kill()
        process.communicate()


# What pip and npm say of a registry that is not there.
UNREACHED = re.compile(
    "Could not find a version|NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution"
    "|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|E40[34]"
)


def install(*command: object, cwd: Path) -> None:
    """Run a package manager, and skip the test where it reaches no registry."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode and UNREACHED.search(done.stderr):
        pytest.skip(f"cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    assert done.returncode == 0, done.stderr


def environment(path: Path, *packages: str) -> Path:
    """Programs of packages from the registry, in an environment of their own."""
    path.mkdir(exist_ok=True)
    install(sys.executable, "-m", "venv", path, cwd=path)
    install(path / "bin/python", "-m", "pip", "install", "-q", *packages, cwd=path)
    return path / "bin"


def wait_until(true: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)


def documented(response: httpx.Response) -> None:
    """Whatever succeeds has the status that the document says."""
    asked = response.request.method.lower(), response.request.url.path
    for method, path, _, status in ROUTES:
        if method == asked[0] and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), asked[1]):
            assert not response.is_success or response.status_code == status, asked


@contextmanager
def serving(
    memories: Path | None = None,
    key: str | None = None,
    origins: frozenset[str] = frozenset(),
    rows: int = 3,
    hosts: Any = LOOPBACK,
    template: str | None = TOOLS,
    loaded: Any = None,
    step: int | None = 16,
    **options: Any,
) -> Iterator[Site]:
    service, digests, _ = build(
        *(loaded or (model(**options), tokenizer(template))),
        name="tiny",
        rows=rows,
        memories=memories,
        step=step,
    )
    app = make_app(service, digests, key, hosts, origins)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = Server(app, service, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{port}"
    asks: dict[str, Any] = {"headers": {"authorization": f"Bearer {key}"} if key else {}}
    asks |= {"event_hooks": {"response": [documented]}, "timeout": 60, "trust_env": False}
    try:
        with httpx.Client(base_url=url, **asks) as client:
            yield Site(service, digests, url, client, server)
    finally:
        server.should_exit = True
        thread.join()
        end(service, digests)


__all__ = [
    "CHATML",
    "CONTROL",
    "Site",
    "environment",
    "install",
    "model",
    "serving",
    "started",
    "tokenizer",
    "wait_until",
]
