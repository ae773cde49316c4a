"""Two of each command at once on one target: both end well, or one refuses in one line, and what
is there then is one of the two wholes. A reader beside a writer; a deletion beside a reader."""

import os
import shutil
import signal
import time

import pytest
from faultcases import CASES, NAME, QUICK, Place, Words, check_sound, needs_counts, one_line
from several import environments

from ahn_mlx.outputs.parts import working_on
from ahn_mlx.reading import memoryfile


def changed(place: Place, words: Words) -> Words:
    """The same command with another result, where it has an option that does that."""
    other: dict[object, Words] = {
        "convert": ["--dtype", "float16"],
        "export-app": ["--window", 8],
        "digest": ["--window", 8] if "--append" not in words else [],
        "train": ["--seed", 1] if "--resume" not in words else [],
        "compare": ["--window", 8],
        "inspect": ["--text", place.book],
        "estimate": ["--window", 99],
        "export-pytorch": ["--layout", "ahn-only"],
    }
    new = [w for w in words if w not in ("--dtype", "bfloat16")]
    return [*new, *other.get(words[0], [])]


def result(place: Place, name: str, words: Words) -> dict[str, object]:
    place.clear()
    CASES[name].prepare(place)
    run = place.server.run(*words)
    assert run.status == 0, run.said
    return place.contents()


@pytest.mark.parametrize("name", QUICK)
def test_two_at_once(place, name):
    case = CASES[name]
    ours, theirs = case.words(place), changed(place, case.words(place))
    wholes = [result(place, name, words) for words in (ours, theirs)]
    for delay in (0.0, 0.15):
        place.clear()
        case.prepare(place)
        before = place.contents()
        first = place.server.start(*ours)
        time.sleep(delay)
        second = place.server.start(*theirs)
        ends = [run.wait() for run in (first, second)]
        assert set(ends) <= {0, 2} and 0 in ends, (first.said, second.said)
        for run in (first, second):
            if run.status:
                said = one_line(run)
                assert "another process" in said or str(place.out) in said or "exists" in said
        check_sound(place, before, *wholes)
        found = place.contents()
        # What was read before somebody else had the name is kept, and said so.
        found = {k: v for k, v in found.items() if not k.endswith(".partial")}
        assert found in wholes


def test_of_two_that_append_one_refuses(place):
    """Else the text of the first would be lost."""
    case = CASES["digest --append"]
    place.clear()
    case.prepare(place)
    first = place.server.start(*case.words(place))
    while not (place.out / ".book.ahn.lock").exists():
        time.sleep(0.001)
    second = place.server.run(*case.words(place))
    assert "another process works on it" in one_line(second)
    assert first.wait() == 0, first.said
    names = [text["name"] for text in memoryfile.read_facts(place.out / "book.ahn")["texts"]]
    assert names == [str(place.book), str(place.more)]


def test_ranks_of_one_training_are_refused_together(place):
    """Rank 0 alone sees that the directory is taken; the others do not wait for it."""
    place.clear()
    out = place.out / "mine"
    out.mkdir()
    ours = ("MLX_HOSTFILE", "MLX_RANK")
    told = [{k: told[k] for k in ours} for told in environments(2, place.out)]
    with working_on(out):
        ranks = [place.server.start(*CASES["train"].words(place), env=env) for env in told]
        assert [run.wait() for run in ranks] == [2, 2], [run.said for run in ranks]
    assert all("another process works on it" in run.said for run in ranks)
    assert list(out.iterdir()) == []


def test_a_part_that_somebody_writes_is_left_alone(place):
    """One command stands still while it writes; another of the same target begins and ends."""
    case = CASES["convert"]
    place.clear()
    first = place.server.start(*case.words(place))
    while not list(place.out.glob("deep/.model.*.part/*")) and first.status is None:
        first.ends_within(0.001)
    assert first.status is None
    os.kill(first.pid, signal.SIGSTOP)
    held = list(place.out.glob("deep/.model.*.part"))
    second = place.server.run(*case.words(place))
    assert second.status == 0 and all(part.exists() for part in held), second.said
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait() == 2
    assert "not empty" in one_line(first)
    assert place.contents() == result(place, "convert", case.words(place))


def test_a_reader_sees_a_whole_model_or_none(place):
    """While it is replaced again and again."""
    case = CASES["convert --force"]
    place.clear()
    case.prepare(place)
    shutil.copytree(place.model, place.out / "deep/model", dirs_exist_ok=True)
    model = ("--model", place.out / "deep/model")
    for n in range(4):
        writer = place.server.start(*case.words(place))
        readers = [
            place.server.start("generate", "Why?", *model, "-m", 2),
            place.server.start("export-pytorch", *model, "-o", place.out / f"read{n}"),
        ]
        assert writer.wait() == 0, writer.said
        for reader in readers:
            if reader.wait():
                one_line(reader)
        assert (place.out / f"read{n}").exists() == (readers[1].status == 0)


def test_a_reader_sees_a_whole_memory(place):
    place.clear()
    shutil.copy(place.memory, place.out / "book.ahn")
    writer = place.server.start(*CASES["digest --append"].words(place))
    while writer.status is None:
        run = place.server.run("memory", "verify", place.out / "book.ahn")
        assert run.status == 0, run.said
    assert writer.status == 0, writer.said
    assert place.server.run("memory", "verify", place.out / "book.ahn").status == 0


def test_a_reader_sees_whole_answers(place):
    """Of a suite that runs: as many as there are."""
    case = CASES["eval longbench"]
    place.clear()
    writer = place.server.start(*case.words(place))
    while writer.status is None:
        run = place.server.run("eval", "score", place.out / "answers")
        if run.status:
            one_line(run)
    assert writer.status == 0, writer.said
    assert place.server.run("eval", "score", place.out / "answers").status == 0


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_model_is_deleted_while_it_comes(place, delay):
    """One waits for the other; what is there then is whole or not there."""
    place.clear()
    pull = place.server.start("pull", NAME)
    time.sleep(delay)
    gone = place.server.run("rm", NAME)
    for run in (pull, gone):
        if run.wait():
            one_line(run)
    assert place.server.run("generate", "Why?", "--model", NAME, "-m", 2).status == 0


@pytest.mark.parametrize("delay", [0.05, 0.2])
def test_a_model_is_deleted_while_it_is_read(place, delay):
    """It is whole or not there: the reader answers, fetches it again, or says in one line that it
    is gone."""
    place.clear()
    assert place.server.run("pull", NAME).status == 0
    reader = place.server.start("generate", "Why?", "--model", NAME, "-m", 2)
    time.sleep(delay)
    gone = place.server.run("rm", NAME)
    assert gone.status == 0, gone.said
    if reader.wait():
        one_line(reader)
    assert place.server.run("generate", "Why?", "--model", NAME, "-m", 2).status == 0


@needs_counts
@pytest.mark.slow
def test_a_deletion_that_is_killed_leaves_no_half_of_a_model(place):
    for die in range(1, 24):
        place.clear()
        assert place.server.run("pull", NAME).status == 0
        run = place.server.run("rm", NAME, die=die)
        models = place.out / "cache/ahn-mlx/models"
        if run.status == 0:
            break
        for model in models.glob("[!.]*"):
            assert len(list(model.iterdir())) > 5, die
        place.server.run("rm", NAME)
        assert [p.name for p in models.iterdir() if p.suffix != ".lock"] == []
