"""One of two processes that read a text together is killed, at any moment: the other ends, what is
there is whole, and the same command goes on to the same memory. The other is told to end where it
has not by itself, as mlx.launch does: MLX may wait for ever for what a dead process would say."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from forkserver import ForkServer, Run
from several import environments
from test_ranks import TEXT, arrays_of, directory  # noqa: F401, a fixture

KILLS = 20
VARIABLES = ("MLX_HOSTFILE", "MLX_RANK")
BY_ITSELF = 8.0  # seconds; it waits for five before it says why
TOLD = 10.0


def start(server: ForkServer, place: Path, *words: object) -> list[Run]:
    return [
        server.start(*words, cwd=str(place), env={name: found[name] for name in VARIABLES})
        for found in environments(2, place)
    ]


def same(file: Path, expected: dict[str, mx.array]) -> bool:
    """Bit for bit, but for means over the heads of both, which a save on the way rounds."""
    found = arrays_of(str(file))
    return found.keys() == expected.keys() and all(
        mx.allclose(found[name], x, rtol=1e-6).item()
        if name.endswith("trace.0")
        else mx.array_equal(found[name], x).item()
        for name, x in expected.items()
    )


@pytest.mark.long
@pytest.mark.parametrize("how", [(), ("--pipeline",)], ids=["heads", "layers"])
def test_a_text_that_two_read_survives_the_death_of_either(directory, tmp_path, how):  # noqa: F811
    (tmp_path / "book.txt").write_text(TEXT * 20)
    reads: list[Any] = ["digest", "book.txt", "--model", directory, "--checkpoint-every", 2048]
    reads += [*how, "-o"]
    server, drawn = ForkServer(tmp_path / "forks"), random.Random(28)
    try:
        begun = time.monotonic()
        whole = start(server, tmp_path, *reads, "whole.ahn")
        assert [run.wait() for run in whole] == [0, 0], [run.said for run in whole]
        took = time.monotonic() - begun
        expected = arrays_of(str(tmp_path / "whole.ahn"))
        book, partial = tmp_path / "book.ahn", tmp_path / "book.ahn.partial"
        ended, resumed, finished, told = [], 0, 0, 0
        for n in range(KILLS):
            resumed += partial.exists()
            ranks = start(server, tmp_path, *reads, book.name)
            if n % 2:  # however slow the machine has become meanwhile
                while not partial.exists() and not ranks[0].ends_within(0.05):
                    pass
            time.sleep(drawn.uniform(0, took))
            killed, other = drawn.sample(ranks, 2)
            killed.kill()
            begun = time.monotonic()
            if not other.ends_within(BY_ITSELF):
                told += 1
                os.kill(other.pid, signal.SIGTERM)
                assert other.ends_within(TOLD), other.said
            ended.append(time.monotonic() - begun)
            assert killed.status in (-signal.SIGKILL, 0), killed.said
            assert other.status in (0, 2, -signal.SIGTERM), other.said
            assert other.status != 2 or "error: " in other.said.splitlines()[-1], other.said
            if partial.exists():
                arrays_of(str(partial))
            if book.exists():
                assert same(book, expected)
                finished += 1
                book.unlink()
        last = start(server, tmp_path, *reads, book.name)
        assert [run.wait() for run in last] == [0, 0], [run.said for run in last]
        assert same(book, expected)
        assert not partial.exists()
        seconds = f"{max(ended):.1f} s at most, {sorted(ended)[KILLS // 2]:.1f} s as a rule"
        print(f"a digest of {took:.1f} s; the other ended after {seconds}; {told} were told to")
        print(f"resumed {resumed} times, finished {finished}")
        assert resumed >= KILLS // 4, (resumed, finished)
    finally:
        server.close()
