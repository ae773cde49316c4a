"""The server: rows together against one alone, mlx-lm's own server with the same base beside it,
first tokens under load, and a book that was read before. All answers have the same length."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import click
import httpx
from mlx_lm.utils import save_model
from tqdm import tqdm

from ahn_mlx.hub import zoo
from ahn_mlx.reading.generate import prefill_step

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


class Asker:
    """A client that asks one server. ends: ids of tokens that would end an answer too early."""

    def __init__(self, client: httpx.Client, model: str, ends: Iterable[int]):
        self.client, self.model = client, model
        self.numbers = count(100)  # no question is asked twice: a server may know it
        self.bias = {str(token): -100 for token in ends}

    @contextmanager
    def stream(self, text: str, tokens: int, memory: str = "") -> Iterator[Iterator[str]]:
        """Pieces of an answer of so many tokens. Raises if it turns out to be shorter."""
        body = {
            **{"model": self.model + memory, "messages": [{"role": "user", "content": text}]},
            **{"max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": self.bias},
            **{"stream_options": {"include_usage": True}},
        }
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise click.ClickException(response.read().decode()[:300])
            yield self._pieces(response.iter_lines(), tokens)

    def _pieces(self, lines: Iterator[str], tokens: int) -> Iterator[str]:
        said = None
        for line in lines:
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    yield text
            said = (event.get("usage") or {}).get("completion_tokens", said)
        if said != tokens:
            raise click.ClickException(f"an answer has {said} tokens, not {tokens}")

    def first(self, text: str, memory: str = "") -> float:
        """Seconds to the first words of an answer."""
        begun = time.perf_counter()
        with self.stream(text, 4, memory) as pieces:
            next(pieces)
            waited = time.perf_counter() - begun
            for _ in pieces:  # to its end, so that its row is free
                pass
        return waited

    def rate(self, clients: int, tokens: int, memory: str = "") -> float:
        """Tokens per second of so many clients together, their short prompts included."""

        def answer(_: int) -> None:
            with self.stream(f"Count to {next(self.numbers)}.", tokens, memory) as pieces:
                for _ in pieces:
                    pass

        with ThreadPoolExecutor(clients) as pool:
            begun = time.perf_counter()
            list(pool.map(answer, range(clients)))
            return clients * tokens / (time.perf_counter() - begun)

    @contextmanager
    def busy(self, clients: int) -> Iterator[None]:
        """So many clients are answered meanwhile."""
        stop, begun = threading.Event(), threading.Barrier(clients + 1)

        def work() -> None:
            with self.stream(f"Count to {next(self.numbers)}.", 1 << 20) as pieces:
                next(pieces)
                begun.wait()
                while not stop.is_set():
                    next(pieces)

        with ThreadPoolExecutor(clients) as pool:
            found = [pool.submit(work) for _ in range(clients)]
            begun.wait()
            try:
                yield
            finally:
                stop.set()
            for future in found:
                future.result()
        while self.client.get("/health").json()["rows_free"] < clients:
            time.sleep(0.01)


@contextmanager
def reading(client: httpx.Client, name: str, text: str) -> Iterator[None]:
    """A document is read meanwhile."""
    job = digest(client, name, text)
    while client.get(f"/v1/memory_jobs/{job}").json()["tokens_read"] == 0:
        time.sleep(0.02)
    yield
    client.post(f"/v1/memory_jobs/{job}/cancel")


def digest(client: httpx.Client, name: str, text: str) -> str:
    """The id of the job that reads a text."""
    files = {"file": (f"{name}.txt", text.encode())}
    file_id = client.post("/v1/files", files=files).json()["id"]
    body = {"name": name, "file_id": file_id}
    job: str = client.post("/v1/memories", json=body).json()["id"]
    return job


def read(client: httpx.Client, name: str, text: str, step: int) -> float:
    """Seconds that a chunk of a document takes which becomes a memory."""
    begun, job = time.perf_counter(), digest(client, name, text)
    while (facts := client.get(f"/v1/memory_jobs/{job}").json())["status"] != "done":
        time.sleep(0.02)
    return (time.perf_counter() - begun) * step / float(facts["tokens"])


@click.command()
@click.option("--rows", default=8, show_default=True, help="Answers at a time.")
@click.option("--tokens", default=32, show_default=True, help="Of each answer.")
@click.option("--book", default=1024, show_default=True, help="Words of the book.")
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
            ends = tokenizer.eos_token_ids
            ask = Asker(many, zoo.DEFAULT, ends)
            single = Asker(one, zoo.DEFAULT, ends)
            other = Asker(theirs, str(root / "base"), ends)
            chunk = read(many, "book", words, prefill_step())
            _throughput(
                {
                    "one client": lambda n: ask.rate(1, n),
                    "one client, a book as a model": lambda n: ask.rate(1, n, "@book"),
                    f"{rows} clients": lambda n: ask.rate(rows, n),
                    "one client, --rows 1": lambda n: single.rate(1, n),
                    "one client, mlx_lm.server": lambda n: other.rate(1, n),
                    f"{rows} clients, mlx_lm.server": lambda n: other.rate(rows, n),
                },
                tokens,
                rounds,
            )
            _first(ask, rows, words, rounds, chunk)


def _throughput(measures: dict[str, Callable[[int], float]], tokens: int, rounds: int) -> None:
    for measure in measures.values():
        measure(2)  # warm up
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in tqdm(range(rounds), desc="throughput", leave=False):
        for name, measure in measures.items():
            found[name].append(measure(tokens))
    median = {name: statistics.median(values) for name, values in found.items()}
    alone = median["one client"]
    table(
        ["", "tokens/s", "/ one client"],
        [[name, f"{value:.1f}", f"{value / alone:.2f}"] for name, value in median.items()],
    )
    click.echo()


def _first(ask: Asker, rows: int, words: str, rounds: int, chunk: float) -> None:
    """Seconds to the first token, of questions that no snapshot knows."""

    def median(memory: str = "") -> float:
        asked = (f"What is {next(ask.numbers)}?" for _ in range(rounds))
        return statistics.median(ask.first(question, memory) for question in asked)

    others, found = f"{rows - 1} others are answered", dict[str, float]()
    median()  # warm up
    found["nobody else"] = quiet = median()
    with ask.busy(rows - 1):
        found[others] = median()
    with reading(ask.client, "meanwhile", words * 32):
        found["a document is read"] = median()
        with ask.busy(rows - 1):
            found[f"a document is read, {others}"] = median()
    found["(a chunk of a document)"] = chunk
    found["a book, as a model"] = median(memory="@book")
    found["a book, sent along"] = ask.first(f"{words} What is this?")
    rows_of = [[what, f"{s:.2f}", f"{s / quiet:.1f}"] for what, s in found.items()]
    table(["first token while", "seconds", "/ nobody else"], rows_of)
