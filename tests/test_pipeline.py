"""Layers divided among processes, against one process; tests/pipelined.py is what they run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import REPO
from several import environments, report, wait
from several import run as several
from test_ranks import (  # noqa: F401, fixtures
    TEXT,
    arrays_of,
    check_scores,
    check_stopped,
    directory,
    first,
    one,
    place,
)

from ahn_mlx import AHNError
from ahn_mlx.model.division import heads_of_each, layers_of_each

PROGRAM = REPO / "tests/pipelined.py"


def run(n, folder, *parts):
    """What each rank prints."""
    command = [sys.executable, str(PROGRAM), str(folder), *parts]
    files = [[folder / f"{rank}.{name}" for name in ("out", "err")] for rank in range(n)]
    ranks = [
        subprocess.Popen(
            command, env=environment, cwd=REPO, stdout=out.open("w"), stderr=err.open("w")
        )
        for environment, (out, err) in zip(environments(n, folder), files, strict=True)
    ]
    codes = wait([rank.pid for rank in ranks], None)
    ended = [
        [codes[rank.pid], *(f.read_text() for f in pair)]
        for rank, pair in zip(ranks, files, strict=True)
    ]
    assert not any(codes.values()), report(ended)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


def check_logits(found):
    first, *others = found
    for case in first["logits"]:
        assert case["same"] and case["off"] < 1e-4 * max(1, case["largest"]), case
    parts = [first, *others]
    for cases in zip(*(part["logits"] for part in parts), strict=True):
        for case in cases:  # the layers of a rank, and no others, are held by it
            assert abs(case["weights"] - case["layers"]) < 0.35 * case["layers"], case
        assert sum(case["weights"] for case in cases) == pytest.approx(1)


def check_memories(found):
    assert found[0]["memories"] == {"answers": 1, "arrays": True, "same": True}


def test_two_ranks_compute_write_and_send_what_one_process_does(tmp_path):
    found = run(2, tmp_path, "memories", "messages")
    check_memories(found)
    # Rank 1 is the one that passes hidden states on.
    pipelined, divided = found[1]["messages"][:3], found[1]["messages"][3:]
    assert {case["case"].split()[1] for case in pipelined} == {"True"}
    assert {case["case"].split()[1] for case in divided} == {"False"}
    for case in pipelined + divided:
        assert case["given"] == case["counted"] > 0, case
    if sys.platform == "linux":  # which counts what is given to each connection
        for case in pipelined + divided + found[0]["messages"][3:]:
            assert case["wire"] == case["ring"], case


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_have_the_logits_of_one_process_and_work_at_once(n, tmp_path):
    found = run(n, tmp_path, "logits", "ahead", *(["memories"] if n == 3 else []))
    check_logits(found)
    # Each has read steps before the last one in the row takes any of them.
    assert found[0]["ahead"] == [True] * (n - 1)
    if n == 3:
        check_memories(found)


@pytest.mark.parametrize(("layers", "ranks"), [(30, 4), (5, 2), (7, 7), (36, 1), (61, 8)])
def test_layers_are_divided_evenly_in_their_order(layers, ranks):
    found = layers_of_each(layers, ranks)
    assert [i for run in reversed(found) for i in run] == list(range(layers))
    sizes = [len(run) for run in found]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(AHNError, match="--pipeline has no effect on one process"):
        one("generate", "Hello?", "--pipeline")
    with pytest.raises(AHNError, match="5 layers cannot be run by 6 ranks; start at most 5"):
        layers_of_each(5, 6)
    with pytest.raises(
        AHNError, match=r"2 key/value heads .* 4 ranks; start 2, or take --pipeline"
    ):
        heads_of_each(2, 4)
    with pytest.raises(AHNError, match=r"1 key/value heads .*; take --pipeline"):
        heads_of_each(1, 2)


@pytest.mark.slow
def test_answers_and_scores_are_those_of_one_process(directory, place):  # noqa: F811
    check_scores(directory, place, "--pipeline")


def test_a_rank_ends_when_all_that_it_passes_on_has_left(directory, place):  # noqa: F811
    """It has nothing to wait for itself: the last layers are another's."""
    common = ("--model", directory, "--pipeline", "--json")
    recall = ("eval", "recall", *common, "--documents", 1, "--needles", 2, "--tokens", 600)
    for ended in several(
        (2, recall), (2, ("compare", "book.txt", *common, "--stream", 200)), late=True
    ):
        assert json.loads(first(ended))


@pytest.mark.slow
def test_commands_divide_layers_and_lose_nothing_when_a_rank_ends(directory, place):  # noqa: F811
    Path("book.txt").write_text(TEXT * 12)
    reads = ("digest", "book.txt", "--model", directory, "--checkpoint-every", 512, "-o")
    one(*reads, "one.ahn")
    call, partial = (*reads, "several.ahn", "--pipeline"), "several.ahn.partial"
    asks = ("Which times?", "-m", 12)
    stopped, killed, last, answered, generated = several(
        (2, call, (1, signal.SIGINT, partial)),
        (2, call, (1, signal.SIGKILL, partial)),
        (2, call),
        (2, ("ask", "one.ahn", *asks, "--pipeline")),
        (2, ("generate", "book.txt", *asks, "--pipeline", "--model", directory)),
    )
    check_stopped(stopped, killed)
    assert [code for code, *_ in last] == [0, 0], report(last)
    ours, theirs = arrays_of("several.ahn"), arrays_of("one.ahn")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(x, theirs[name]).item() for name, x in ours.items())
    answer = first(answered)
    assert answer.strip() and answer == one("ask", "several.ahn", *asks)
    assert first(generated) == one("generate", "book.txt", *asks, "--model", directory)
