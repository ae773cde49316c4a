"""Machines stop at any moment: a command that is killed, or whose disk is full, loses nothing
that it had finished, leaves nothing half-made, and ends in the same bytes when it is run again."""

import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faultcases import (
    CASES,
    QUICK,
    Case,
    Place,
    address_space,
    check_sound,
    disk,
    fill,
    moments,
    needs_counts,
    one_line,
    spread,
)
from forkserver import NOBODY

MANY, SOME = 50, 2  # kills
FULL = 20


def begun(place: Place, case: Case) -> dict[str, Any]:
    """What is there before the command."""
    place.clear()
    case.prepare(place)
    return place.contents()


def whole(place: Place, case: Case) -> tuple[dict[str, Any], int, float, int]:
    """What a run leaves that nothing interrupts, its operations, how long it takes, and how many
    bytes there are then."""
    begun(place, case)
    run = place.server.run(*case.words(place))
    assert run.status == 0, run.said
    size = sum(f.lstat().st_size for f in place.out.rglob("*") if not f.is_dir())
    return place.contents(), run.operations, run.seconds, size


def kill(place: Place, case: Case, moment: dict[str, int] | float, seconds: float) -> bool:
    """Whether it was killed before its end."""
    if isinstance(moment, dict):
        run = place.server.start(*case.words(place), **moment)
        run.wait()
    else:
        run = place.server.start(*case.words(place))
        if not run.ends_within(moment * seconds):
            run.kill()
    assert run.status in (-9, 0), run.said
    return run.status == -9


def complete(contents: dict[str, Any]) -> dict[str, Any]:
    """What has a final name."""
    return {name: x for name, x in contents.items() if "/." not in f"/{name}"}


def check_end(place: Place, case: Case, final: dict[str, Any], why: object) -> None:
    """The command that was stopped, run again, ends in the same files."""
    again = case.next(place)
    run = place.server.run(*again)
    assert run.status == 0, (why, run.said)
    found = place.contents()
    if again != case.words(place):  # it had its end, but for what it would have gone on from
        found = {k: v for k, v in found.items() if not k.endswith(".partial")}
    assert found == final, why


def killed(place: Place, name: str, count: int) -> Counter[str]:
    """What was there after so many kills: all of it, nothing, or what the next run goes on from."""
    case, found = CASES[name], Counter[str]()
    final, operations, seconds, _ = whole(place, case)
    for moment in moments(operations, count, random.Random(name)):
        before = begun(place, case)
        dead = kill(place, case, moment, seconds)
        check_sound(place, before, final)
        left = complete(place.contents())
        found["kills"] += dead
        found["finished" if left == final else "vanished" if left == before else "resumed"] += dead
        check_end(place, case, final, moment)
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_killed_command_loses_nothing(place, name):
    assert killed(place, name, SOME)["kills"]


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_fifty_kills(place, name):
    found = killed(place, name, MANY)
    print(f"{name}: {dict(found)}")
    assert found["kills"] > MANY / 4  # all, where operations are counted


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
            check_end(place, case, final, room)
    return refused


@pytest.mark.parametrize("name", QUICK)
def test_a_full_disk_is_one_line(place, name):
    if name != "upload":  # which writes nothing
        assert filled(place, name, SOME)


@pytest.mark.long
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
        check_end(place, case, final, i)


@pytest.mark.parametrize("name", ["pull", "upload"])
def test_a_connection_that_breaks(place, name):
    broken(place, name, SOME)


@pytest.mark.long
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


def denied(place: Place, name: str, count: int) -> None:
    """The disk takes nothing from some operation on, as one that the system has found broken."""
    case = CASES[name]
    final, operations, *_ = whole(place, case)
    for n in spread(operations, count, random.Random(name)):
        before = begun(place, case)
        run = place.server.run(*case.words(place), deny=1 + n)
        if run.status:
            one_line(run)
        check_sound(place, before, final)
        left = complete(place.contents())
        assert run.status or left == final, n
        check_end(place, case, final, n)


@needs_counts
@pytest.mark.parametrize("name", [p for p in QUICK if p != "upload"])
def test_a_disk_that_becomes_read_only(place, name):
    denied(place, name, SOME)


@needs_counts
@pytest.mark.long
@pytest.mark.parametrize("name", WRITERS)
def test_twenty_disks_that_become_read_only(place, name):
    denied(place, name, FULL)


def starved(place: Place, name: str, room: int) -> None:
    """A command that gets so many bytes of memory more than it began with."""
    case = CASES[name]
    final, *_ = whole(place, case)
    before = begun(place, case)
    size = address_space(place.server.process.pid)
    run = place.server.start(*case.words(place), limits={"RLIMIT_AS": size + room})
    if not run.ends_within(20):
        run.kill()  # OpenBLAS asks for its memory for ever
    assert "Traceback" not in run.said
    if run.status not in (0, -6, -9, -11):  # MLX and OpenBLAS end a process that has none
        assert "memory" in one_line(run).lower(), run.said
    check_sound(place, before, final)
    check_end(place, case, final, room)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="macOS has no such limit")
@pytest.mark.parametrize("room", [1 << 20, 1 << 26])
@pytest.mark.parametrize("name", CASES)
def test_memory_that_is_not_enough(place, name, room):
    starved(place, name, room)
