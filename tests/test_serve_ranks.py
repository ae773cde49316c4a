"""A server whose model is on several processes: it answers as that of one, and ends as a whole."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import httpx
import mlx.core as mx
import pytest
from checkpoints import REPO, chat_tokenizer
from serving import serving, wait_until
from several import GIVEN_UP, TOLD, environments, random_model
from test_ranks import TEXT, arrays_of, directory  # noqa: F401, a fixture

from ahn_mlx import AHNError
from ahn_mlx.checkpoints.identity import note_whole
from ahn_mlx.checkpoints.load import load
from ahn_mlx.model.ranks import join
from ahn_mlx.serve.acts import Acts

CHAT = "/v1/chat/completions"
ENDLESS = {"max_tokens": 1_000_000, "logit_bias": {"258": -100}}


@contextmanager
def started(
    n: int,
    place: Path,
    *args: object,
) -> Iterator[tuple[list[subprocess.Popen[str]], httpx.Client]]:
    """ahn-mlx serve as so many processes, and a client of the first."""
    (place / "hosts").mkdir()
    command = [sys.executable, "-m", "ahn_mlx", "serve", "--port", "0", *map(str, args)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(command, env=environment, cwd=REPO, **pipes)
        for environment in environments(n, place / "hosts")
    ]
    try:
        assert ranks[0].stdout is not None
        said = ranks[0].stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+)/v1 serves (\S+)$", said)
        assert found, (said, [rank.kill() or rank.communicate() for rank in ranks])
        with httpx.Client(base_url=found[1], timeout=60, trust_env=False) as client:
            yield ranks, client
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def ok(response: httpx.Response) -> Any:
    assert response.status_code in (200, 201, 202), response.text
    return response.json()


def digest(client: httpx.Client, name: str, text: str) -> str:
    """The path of a job that reads a text."""
    document = ok(client.post("/v1/files", files={"file": ("book.txt", text.encode())}))
    job = ok(client.post("/v1/memories", json={"name": name, "file_id": document["id"]}))
    return f"/v1/memory_jobs/{job['id']}"


def talk(client: httpx.Client, name: str) -> list[Any]:
    """What a server answers: two at once, one of them drawn; more of one; a book; and a memory
    that is none."""

    def ask(*contents: str, model: str = name, **options: Any) -> Any:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
        body = {"model": model, "messages": messages, "max_tokens": 16, **options}
        answer = ok(client.post(CHAT, json=body))
        return answer["id"], answer["choices"][0]["message"]["content"], answer["usage"]

    drawn = {"temperature": 1.0, "seed": 5, "n": 2}
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(ask, TEXT), threads.submit(ask, TEXT[:90], **drawn)]
        (talked, said, _), (_, other, _) = (one.result() for one in both)
    *_, more, usage = ask(TEXT, said, "And then?")
    assert usage["prompt_tokens_details"]["cached_tokens"] > 100
    ok(client.post(f"/v1/conversations/{talked}/save", json={"name": "talk"}))
    job = digest(client, "book", TEXT)
    wait_until(lambda: ok(client.get(job))["status"] not in ("queued", "reading"))
    assert ok(client.get(job))["status"] == "done"
    book = ask("Which times?", model=f"{name}@book")[1]
    refused = client.put("/v1/memories/none", content=b"no memory")
    assert refused.status_code == 400
    return [said, other, more, book, refused.json()["error"]["message"]]


def test_answers_and_memories_are_those_of_one_and_a_rank_that_dies_ends_all(
    directory,  # noqa: F811
    tmp_path,
):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    with serving(one, loaded=load(directory, dtype="float32"), step=None) as site:
        expected = talk(site.client, "tiny")
    with started(2, tmp_path, "--model", directory, "--rows", 3, "--memories", two) as found:
        (first, last), client = found
        assert talk(client, "model") == expected
        job = digest(client, "long", TEXT * 400)
        wait_until(lambda: ok(client.get(job))["tokens_read"] > 0)
        body = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], **ENDLESS}
        with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(line for line in lines if "content" in line)
            last.kill()
            begun, rest = time.monotonic(), ""
            # As mlx.launch does: MLX may wait for ever for what is gone.
            ends = Timer(TOLD, first.kill)
            ends.start()
            with suppress(httpx.TransportError):
                rest = "".join(lines)
        said = first.communicate(timeout=60)[1]
        ends.cancel()
        assert "Traceback" not in said
        if first.returncode == -signal.SIGKILL:
            assert GIVEN_UP in said, said
        else:
            assert first.returncode == 2 and time.monotonic() - begun < 30
            assert "lost one of its machines" in rest
            assert said.splitlines()[-1].startswith("error: another rank has ended"), said
    for name in ("book.ahn", "talk.ahn"):
        ours, theirs = arrays_of(str(two / name)), arrays_of(str(one / name))
        assert ours.keys() == theirs.keys()
        for array, x in theirs.items():
            assert mx.allclose(ours[array], x, rtol=1e-3, atol=1e-3).item(), array
    assert not (two / "long.ahn").exists()


@pytest.mark.slow
def test_ctrl_c_on_one_ends_all_and_keeps_what_was_read(directory, tmp_path):  # noqa: F811
    memories = tmp_path / "memories"
    memories.mkdir()
    with started(2, tmp_path, "--model", directory, "--memories", memories) as found:
        ranks, client = found
        job = digest(client, "long", TEXT * 400)
        wait_until(lambda: ok(client.get(job))["tokens_read"] > 0)
        ranks[1].send_signal(signal.SIGINT)
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
        assert ranks[0].communicate()[1].splitlines()[-1].startswith("stopped in")
    (partial,) = memories.glob(".job-*.partial")
    arrays_of(str(partial))
    assert json.loads((memories / "jobs" / f"{partial.stem[1:]}.json").read_text())["tokens_read"]


@pytest.mark.slow
def test_a_rank_that_dies_while_nobody_asks_is_missed(directory, tmp_path):  # noqa: F811
    with started(2, tmp_path, "--model", directory, "--memories", tmp_path) as found:
        ranks, _ = found
        ranks[1].kill()
        assert ranks[0].wait(timeout=30) == 2
        said = ranks[0].communicate()[1].splitlines()
        assert said[-1].startswith("error: another rank has ended")


def test_other_ranks_hold_what_the_first_does_and_fail_as_it_does(tmp_path):
    """This file as a program is one of them."""
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=environment, cwd=REPO, stdout=subprocess.PIPE, text=True)
        for environment in environments(2, tmp_path)
    ]
    said = [json.loads(rank.communicate(timeout=300)[0]) for rank in ranks]
    assert said == [{"refused": 2, "tokens": [40, 41], "held": 1}] * 2


def act_with_others(place: Path) -> dict[str, Any]:
    model, tokenizer = random_model("gated_deltanet", "clamped", None), chat_tokenizer()
    ranks = join()
    assert ranks is not None
    note_whole(model)
    ranks.cut(model)
    acts = Acts(model, tokenizer, 2)
    if ranks.rank:
        acts.follow()
        (session,) = acts._held.values()
        return {"refused": 2, "tokens": [40, session.tokens], "held": len(acts._held)}
    session = acts.make("", True, 16, None, 64)
    acts.read(session, list(range(40)))
    refused = 0
    for work in (partial(acts.load, place / "none"), partial(acts.read, session, [1 << 20])):
        try:
            work()
        except AHNError:
            refused += 1
    del work
    rows = [acts.begin(session) for _ in range(3)]
    for _ in range(2):
        acts.step(rows, [1, 2, 3])
    acts.leave(rows[0])
    tokens = [session.tokens, rows.pop(1).tokens]
    del session, rows
    acts.clear()
    kept = acts.make("", True, 16, None, 64)
    acts.prefill(kept, list(range(41)))
    acts.end()
    return {"refused": refused, "tokens": [tokens[0], kept.tokens], "held": len(acts._number)}


if __name__ == "__main__":
    print(json.dumps(act_with_others(Path(sys.argv[1]))))
