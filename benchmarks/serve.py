"""The server: rows together against one alone, first tokens under load, a book that was read
before, and mlx-lm's own server with the same base beside it."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
from mlx_lm.utils import save_model
from tqdm import tqdm

from ahn_mlx.hub import zoo

from .measure import table

# mlx-lm's server, with caches as large as our windows. It batches no other rotating ones.
STOCK = """
import ahn_mlx, sys
from mlx_lm import server
from mlx_lm.models import cache, llama
size = int(sys.argv.pop())
llama.Model.make_cache = lambda self: [cache.RotatingKVCache(size) for _ in self.layers]
server.main()
"""


@contextmanager
def ours(rows: int, memories: Path, model: Any, tokenizer: Any) -> Iterator[httpx.Client]:
    """A client of our server in this process."""
    from ahn_mlx.serve.app import Server, end, make_app
    from ahn_mlx.serve.build import build

    service, digests, _ = build(model, tokenizer, name=zoo.DEFAULT, rows=rows, memories=memories)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = Server(make_app(service, digests), service, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with _client(port) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        end(service, digests)


@contextmanager
def stock(directory: Path, capacity: int) -> Iterator[httpx.Client]:
    """A client of mlx-lm's server with the base model."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = ["--model", str(directory), "--port", str(port), "--log-level", "ERROR"]
    command = [sys.executable, "-c", STOCK, *arguments, str(capacity)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ))
    try:
        with _client(port) as client:
            yield client
    finally:
        process.kill()
        process.wait()


@contextmanager
def _client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False) as client:
        for _ in range(600):
            try:
                client.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield client


def base(directory: Path) -> None:
    """The base model as a directory of mlx-lm's."""
    model, tokenizer = zoo.smollm2_base()
    save_model(directory, model)
    tokenizer.save_pretrained(str(directory))
    config = {**vars(model.args)}
    (directory / "config.json").write_text(json.dumps(config, default=str))


def ask(client: httpx.Client, name: str, text: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first words of an answer, and tokens of all of it."""
    body = {
        "model": name,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun, first, said = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise click.ClickException(response.read().decode()[:300])
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                if not first and choice["delta"].get("content"):
                    first = time.perf_counter() - begun
            said = (event.get("usage") or {}).get("completion_tokens", said)
    return first, said


def rate(client: httpx.Client, name: str, clients: int, tokens: int) -> float:
    """Tokens per second of so many clients together, their short prompts included."""
    texts = [f"Count to {n + 100}." for n in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        begun = time.perf_counter()
        said = sum(n for _, n in pool.map(lambda t: ask(client, name, t, tokens), texts))
        return said / (time.perf_counter() - begun)


@contextmanager
def busy(client: httpx.Client, name: str, clients: int) -> Iterator[None]:
    """So many clients that are answered meanwhile."""
    stop = threading.Event()

    def work(n: int) -> None:
        while not stop.is_set():
            ask(client, name, f"Count to {n + 100}.", 32)

    with ThreadPoolExecutor(clients) as pool:
        for n in range(clients):
            pool.submit(work, n)
        time.sleep(2)
        yield
        stop.set()


def digest(client: httpx.Client, name: str, text: str, wait: bool) -> str:
    """The id of the job that reads a text."""
    files = {"file": (f"{name}.txt", text.encode())}
    file_id = client.post("/v1/files", files=files).json()["id"]
    body = {"name": name, "file_id": file_id}
    job: str = client.post("/v1/memories", json=body).json()["id"]
    while wait and client.get(f"/v1/memory_jobs/{job}").json()["status"] != "done":
        time.sleep(0.1)
    return job


@click.command()
@click.option("--rows", default=8, show_default=True, help="Answers at a time.")
@click.option("--tokens", default=48, show_default=True, help="Of each answer.")
@click.option("--book", default=4096, show_default=True, help="Words of the book.")
@click.option("--rounds", default=3, show_default=True, help="Turns; the median counts.")
def serve(rows: int, tokens: int, book: int, rounds: int) -> None:
    """Ratios of the server with the default model: throughput, first tokens, a book asked."""
    model, tokenizer = zoo.load(zoo.DEFAULT, dtype="float32")
    words = " ".join(f"word{n % 997}" for n in range(book))
    with tempfile.TemporaryDirectory() as found:
        root = Path(found)
        for name in ("memories", "single", "base"):
            (root / name).mkdir()
        base(root / "base")
        with (
            ours(rows, root / "memories", model, tokenizer) as many,
            ours(1, root / "single", model, tokenizer) as one,
            stock(root / "base", model.ahn.capacity) as theirs,
        ):
            their_name = str(root / "base")
            measures = {
                "one client": lambda: rate(many, zoo.DEFAULT, 1, tokens),
                f"{rows} clients": lambda: rate(many, zoo.DEFAULT, rows, tokens),
                "one client, --rows 1": lambda: rate(one, zoo.DEFAULT, 1, tokens),
                "one client, mlx_lm.server": lambda: rate(theirs, their_name, 1, tokens),
                f"{rows} clients, mlx_lm.server": lambda: rate(theirs, their_name, rows, tokens),
            }
            _throughput(measures, rounds)
            _first(many, rows, words, rounds)


def _throughput(measures: dict[str, Any], rounds: int) -> None:
    for measure in measures.values():
        measure()  # warm up
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in tqdm(range(rounds), desc="throughput", leave=False):
        for name, measure in measures.items():
            found[name].append(measure())
    median = {name: statistics.median(values) for name, values in found.items()}
    alone = median["one client"]
    table(
        ["", "tokens/s", "/ one client"],
        [[name, f"{value:.1f}", f"{value / alone:.2f}"] for name, value in median.items()],
    )
    click.echo()


def _first(client: httpx.Client, rows: int, words: str, rounds: int) -> None:
    """Seconds to the first token."""
    name, question = zoo.DEFAULT, "What is this about?"

    def median(model: str, text: str) -> float:
        # Another question each time: no snapshot knows it.
        times = [ask(client, model, f"{text} {time.time()}", 2)[0] for _ in range(rounds)]
        return statistics.median(times)

    quiet = median(name, question)
    found = {"nobody else": quiet}
    with busy(client, name, rows - 1):
        found[f"{rows - 1} others are answered"] = median(name, question)
    job = digest(client, "meanwhile", words * 8, wait=False)
    while client.get(f"/v1/memory_jobs/{job}").json()["status"] == "queued":
        time.sleep(0.1)
    found["a document is read"] = median(name, question)
    client.post(f"/v1/memory_jobs/{job}/cancel", json={})
    digest(client, "book", words, wait=True)
    found["a book, as a model"] = median(f"{name}@book", question)
    found["a book, sent along"] = median(name, f"{words}\n\n{question}")
    rows_of = [[what, f"{s:.2f}", f"{s / quiet:.1f}"] for what, s in found.items()]
    table(["first token while", "seconds", "/ nobody else"], rows_of)
