"""Machines stop at any moment: a command that is killed, or whose disk is full, loses nothing
that it had finished, leaves nothing half-made, and ends in the same bytes when it is run again."""

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from faultcases import CASES, QUICK, Case, Place, check_sound, disk, fill, one_line
from forkserver import NOBODY

MANY, SOME = 50, 2  # kills
FULL = 20


def begun(place: Place, case: Case) -> dict[str, Any]:
    """What is there before the command."""
    place.clear()
    case.prepare(place)
    return place.contents()


def whole(place: Place, case: Case) -> tuple[dict[str, Any], int, float, int]:
    """What a run leaves that nothing interrupts, how often it changes the disk, how long it
    takes, and how many bytes there are then."""
    begun(place, case)
    run = place.server.run(*case.words(place))
    assert run.status == 0, run.said
    size = sum(f.lstat().st_size for f in place.out.rglob("*") if not f.is_dir())
    return place.contents(), run.changes, run.seconds, size


def moments(changes: int, count: int, chance: random.Random) -> list[int | float]:
    """When to kill: before changes of the disk, spread over all of them; and the rest at parts
    of the time that it takes."""
    steps = min(changes, max(1, 2 * count // 3))
    before = [1 + (2 * i + 1) * changes // (2 * steps) for i in range(steps)]
    return [*before, *(chance.random() for _ in range(count - steps))]


def kill(place: Place, case: Case, moment: int | float, seconds: float) -> bool:
    """Whether it was killed before its end."""
    if isinstance(moment, int):
        run = place.server.start(*case.words(place), die=moment)
        run.wait()
    else:
        run = place.server.start(*case.words(place))
        if not run.ends_within(moment * seconds):
            run.kill()
    assert run.status in (-9, 0), run.said
    return run.status == -9


def killed(place: Place, name: str, count: int) -> int:
    """Returns how often it was killed."""
    case, kills = CASES[name], 0
    final, changes, seconds, _ = whole(place, case)
    for moment in moments(changes, count, random.Random(name)):
        before = begun(place, case)
        kills += kill(place, case, moment, seconds)
        check_sound(place, before, final)
        run = place.server.run(*case.next(place))
        assert run.status == 0, (moment, run.said)
        assert place.contents() == final, moment
    return kills


@pytest.mark.parametrize("name", QUICK)
def test_a_killed_command_loses_nothing(place, name):
    assert killed(place, name, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fifty_kills(place, name):
    kills = killed(place, name, MANY)
    print(f"{name}: {kills} kills")
    assert kills > MANY / 2


def filled(place: Place, name: str, count: int) -> int:
    """Runs the command on disks that are too small, and then on one that is not. Returns how
    often it was refused."""
    case, refused = CASES[name], 0
    final, _, _, size = whole(place, case)
    for i in range(count):
        room = size * i // count // 4096 * 4096 + 4096
        place.clear()
        with disk(place.out, 64 << 20):
            before = begun(place, case)
            ballast = place.out / ".ballast.lock"
            fill(ballast, room)
            run = place.server.run(*case.words(place))
            if run.status:
                one_line(run)
                refused += 1
            check_sound(place, before, final)
            ballast.unlink()
            again = place.server.run(*case.next(place))
            assert again.status == 0, again.said
            assert place.contents() == final, room
    return refused


@pytest.mark.parametrize("name", QUICK)
def test_a_full_disk_is_one_line(place, name):
    if name != "upload":  # which writes nothing
        assert filled(place, name, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_full_disks(place, name):
    if name != "upload":
        refused = filled(place, name, FULL)
        print(f"{name}: {refused} refusals")
        assert refused


def broken(place: Place, name: str, count: int) -> None:
    """The connection breaks in the middle of an answer, each time of another one."""
    case = CASES[name]
    place.hub.asked.clear()
    final, *_ = whole(place, case)
    requests = -place.hub.breaks
    assert requests > 3
    for i in range(min(count, requests)):
        begun(place, case)
        place.hub.breaks = 1 + i * requests // min(count, requests)
        run = place.server.run(*case.words(place), timeout=300)
        if run.status:
            one_line(run)
            place.hub.breaks = 0
            run = place.server.run(*case.next(place))
        assert run.status == 0, run.said
        assert place.contents() == final, i


@pytest.mark.parametrize("name", ["pull", "upload"])
def test_a_connection_that_breaks(place, name):
    broken(place, name, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pull", "upload"])
def test_each_connection_that_breaks(place, name):
    broken(place, name, MANY)


WRITERS = [name for name in CASES if name != "upload"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_may_not_be_written_to(place, name):
    case = CASES[name]
    before = begun(place, case)
    there = sorted(place.out.rglob("*"))
    for path in (place.out, *there):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        # Root may write everywhere.
        how = {} if os.geteuid() else {"user": NOBODY}
        run = place.server.run(*case.words(place), **how)
        assert re.search("Permission denied|read-only", one_line(run)), run.said
        assert sorted(place.out.rglob("*")) == there and place.contents() == before
    finally:
        for path in (place.out, *there):
            path.chmod(0o755 if path.is_dir() else 0o644)


def starved(place: Place, name: str, room: int) -> None:
    """A command that gets so many bytes of memory more than it began with."""
    case = CASES[name]
    final, *_ = whole(place, case)
    before = begun(place, case)
    status = Path(f"/proc/{place.server.process.pid}/status").read_text()
    size = int(re.search(r"VmSize:\s+(\d+)", status)[1]) << 10
    run = place.server.start(*case.words(place), limits={"RLIMIT_AS": size + room})
    if not run.ends_within(20):
        run.kill()  # OpenBLAS asks for its memory for ever
    assert "Traceback" not in run.said
    if run.status not in (0, -6, -9, -11):  # MLX and OpenBLAS end a process that has none
        assert "memory" in one_line(run).lower(), run.said
    check_sound(place, before, final)
    run = place.server.run(*case.next(place))
    assert run.status == 0 and place.contents() == final, run.said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="macOS has no such limit")
@pytest.mark.parametrize("room", [1 << 20, 1 << 26])
@pytest.mark.parametrize("name", CASES)
def test_memory_that_is_not_enough(place, name, room):
    starved(place, name, room)
