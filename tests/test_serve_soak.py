"""The server for a long time: no error, no row and no byte is lost, whatever clients do."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
from checkpoints import REPO, talking_model
from serving import started, wait_until

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
ROWS = 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("soak"))


def resident(process) -> int:
    """Bytes of a process in memory."""
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def body(messages, **options):
    return {"model": "model", "messages": messages, "max_tokens": 16, **options}


def idle(client) -> None:
    """Wait until all rows are free and nothing is read."""
    wait_until(lambda: client.get("/health").json()["rows_free"] == ROWS)
    wait_until(lambda: "ahn_reading 0\n" in client.get("/metrics").text)


def together(client, work, workers: int) -> None:
    """Several clients at a time: work(client, random numbers of its own)."""

    async def all_of_them() -> None:
        async with httpx.AsyncClient(
            base_url=client.base_url, timeout=120, trust_env=False, limits=httpx.Limits()
        ) as other:
            numbers = [random.Random(n) for n in range(workers)]
            await asyncio.gather(*(work(other, number) for number in numbers))

    asyncio.run(all_of_them())


def test_a_million_tokens(directory):
    """2,000 requests in 32 conversations."""
    sizes, tokens, asked = [], itertools.count(), itertools.count(1)
    total = 0
    with started("--model", directory, "--rows", ROWS) as (process, client, _):

        async def ask(other, messages, number):
            nonlocal total
            if number.random() < 0.3:
                answer = (await other.post("/v1/messages", json=body(messages))).json()
                usage = answer["usage"]
                total += usage["input_tokens"] + usage["cache_read_input_tokens"]
                total += usage["output_tokens"]
                return answer["content"][0]["text"]
            if number.random() < 0.5:
                answer = (await other.post(CHAT, json=body(messages, temperature=0.8))).json()
                total += answer["usage"]["total_tokens"]
                return answer["choices"][0]["message"]["content"]
            wanted = body(messages, stream=True, stream_options={"include_usage": True})
            said = ""
            async with other.stream("POST", CHAT, json=wanted) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        assert "error" not in event, event
                        for choice in event["choices"]:
                            said += choice["delta"].get("content", "")
                        total += (event.get("usage") or {}).get("total_tokens", 0)
            return said

        async def talk(other, number):
            conversations = [[] for _ in range(32 // ROWS)]
            for n in range(2000 // ROWS):
                messages = conversations[n % len(conversations)]
                if len(messages) > 18:
                    messages.clear()
                words = [f"{next(tokens)} {number.random():.6f}" for _ in range(6)]
                messages.append({"role": "user", "content": " ".join(words)})
                said = await ask(other, messages, number)
                messages.append({"role": "assistant", "content": said})
                if next(asked) % 100 == 0:
                    sizes.append(resident(process))

        # MLX keeps a little for each length of a chunk that it has seen, in an empty window and in
        # a full one, and the library of the tokenizer the first 10,000 words.
        for n in range(1, 1025):
            prompt = {"model": "model", "prompt": "x" * n, "max_tokens": 1}
            assert client.post("/v1/completions", json=prompt).status_code == 200
        for first in "abcdefghijkl":
            words = (first + "".join(rest) for rest in itertools.product("abcdefghij", repeat=3))
            read = {"model": "model", "messages": [{"role": "user", "content": " ".join(words)}]}
            assert client.post("/v1/messages/count_tokens", json=read).status_code == 200
        together(client, talk, ROWS)
        idle(client)
        metrics = client.get("/metrics").text
    assert len(sizes) == 20 and total >= 1_000_000
    assert 'status="200"' in metrics and 'status="5' not in metrics and "failed" not in metrics
    assert max(sizes[-3:]) <= 1.02 * max(sizes[5:8]), sizes


def test_a_thousand_that_leave(directory, tmp_path):
    with started("--model", directory, "--rows", ROWS, "--memories", tmp_path) as found:
        process, client, _ = found
        expected = client.post(CHAT, json=body(HI)).json()["choices"]
        text = {"file": ("a.txt", b"One two three. " * 2000)}
        file_id = client.post("/v1/files", files=text).json()["id"]
        endless, sizes, names = {"max_tokens": 1_000_000}, [], itertools.count()
        seen: set[int] = set()

        async def stream(other, number):
            wanted = body([{"role": "user", "content": "Hi" * number.randrange(900)}], stream=True)
            async with other.stream("POST", CHAT, json={**wanted, **endless}) as response:
                seen.add(response.status_code)
                pieces = number.randrange(12)
                async for _ in response.aiter_lines():
                    if (pieces := pieces - 1) < 0:
                        return

        async def wait(other, number):
            path = number.choice([CHAT, "/v1/messages"])
            wanted = {**body([{"role": "user", "content": "Hi" * 900}]), **endless}
            with contextlib.suppress(httpx.TimeoutException):
                await other.post(path, json=wanted, timeout=number.random() / 5)

        async def read(other, number):
            wanted = {"name": f"m{next(names)}", "file_id": file_id}
            job = (await other.post("/v1/memories", json=wanted)).json()
            path = f"/v1/memory_jobs/{job['id']}"
            await asyncio.sleep(number.random() / 10)
            if number.random() < 0.5:
                await other.post(f"{path}/cancel")
            assert (await other.delete(path)).status_code == 200

        async def leave(other, number):
            for n in range(1000 // ROWS):
                await number.choice([stream, stream, wait, read])(other, number)
                if n in (30, 120):
                    sizes.append(resident(process))

        together(client, leave, ROWS)
        idle(client)
        assert seen <= {200, 429}
        assert client.post(CHAT, json=body(HI)).json()["choices"] == expected
        assert max(sizes[ROWS:]) <= 1.02 * max(sizes[:ROWS]) + (8 << 20), sizes
        assert 'status="5' not in client.get("/metrics").text


def test_more_than_there_is_room_for(directory):
    with started("--model", directory, "--rows", 2) as (process, client, _):
        streams, wanted = [], body(HI, stream=True, max_tokens=1_000_000)
        for _ in range(2):
            streams.append(client.stream("POST", CHAT, json=wanted))
            assert streams[-1].__enter__().status_code == 200
        sizes = []
        for _ in range(200):
            response = client.post(CHAT, json=body(HI))
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            sizes.append(resident(process))
        assert sizes[-1] <= 1.02 * sizes[100]
        for stream in streams:
            stream.__exit__(None, None, None)
        wait_until(lambda: client.get("/health").json()["rows_free"] == 2)
        assert client.post(CHAT, json=body(HI)).status_code == 200


def test_many_streams_and_idle_connections_are_small():
    """200 streams and 1,000 connections that say nothing, without a model."""
    command = [sys.executable, REPO / "tests/stub_server.py"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        asyncio.run(_crowd(port, process))
    finally:
        process.kill()
        process.communicate()


async def _crowd(port, process) -> None:
    data = json.dumps({**body(HI, stream=True, max_tokens=30), "model": "stub"}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    async def stream() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        words = 0
        while (line := await reader.readline()) and b"[DONE]" not in line:
            words += b'"word "' in line
        writer.close()
        return words

    waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1000)]
    streams = [asyncio.create_task(stream()) for _ in range(200)]
    await asyncio.sleep(2)
    size = resident(process)
    assert await asyncio.gather(*streams) == [30] * 200
    assert size < 150e6
    for _, writer in waiting:
        writer.close()


BOOK = " ".join(f"Word number {n}." for n in range(6000))


def arrays(file):
    found = mx.load(str(file), format="safetensors")
    assert isinstance(found, dict)
    return found


def test_killed_and_started_again(directory, tmp_path):
    """What is finished is whole, what is not goes on, and both are the command line's."""
    book = tmp_path / "book.txt"
    book.write_text(BOOK)
    memories = tmp_path / "memories"
    memories.mkdir()
    options = ("--model", directory, "--rows", 2, "--memories", memories)
    question = body([{"role": "user", "content": "Which word?"}], model="model@short")

    def job(client, name, text):
        file_id = client.post("/v1/files", files={"file": ("book.txt", text)}).json()["id"]
        wanted = {"name": name, "file_id": file_id}
        return client.post("/v1/memories", json=wanted).json()["id"]

    def state(client, job_id):
        return client.get(f"/v1/memory_jobs/{job_id}").json()

    with started(*options) as (process, client, _):
        short = job(client, "short", BOOK[:3000])
        wait_until(lambda: state(client, short)["status"] == "done")
        said = client.post(CHAT, json=question).json()["choices"]
        long = job(client, "long", BOOK)
        # After what was read has been kept once, and before the end.
        wait_until(lambda: state(client, long)["tokens_read"] > 20_000)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with started(*options) as (process, client, _):
        assert (state(client, short)["status"], state(client, long)["status"]) == ("done", "paused")
        assert client.post(CHAT, json=question).json()["choices"] == said
        assert client.post(f"/v1/memory_jobs/{long}/resume").status_code == 200
        wait_until(lambda: state(client, long)["tokens_read"] >= 16_384)
        wait_until(lambda: state(client, long)["status"] == "done")
    digest = [sys.executable, "-m", "ahn_mlx", "digest", "--model", directory, book]
    subprocess.run([*digest, "-o", tmp_path / "cli.ahn"], cwd=REPO, check=True, capture_output=True)
    ours, theirs = arrays(memories / "long.ahn"), arrays(tmp_path / "cli.ahn")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[k], theirs[k]).item() for k in ours)
