"""A network that stalls, breaks, drips and lies, between real commands and a hub on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import REPO
from standin import StandIn

NAME = "me/model"
WEIGHTS = bytes(range(256)) * 1000
PATIENCE = 2.0  # seconds, where users have 120
PROGRAM = f"""
import ahn_mlx.hub.fetch as fetch
fetch.SILENT, fetch.GIVE_UP, fetch.PAUSE = 0.5, {PATIENCE}, 0.1
from ahn_mlx.cli import main
main()
"""

slow = pytest.mark.slow


class Machine:
    """A user's machine with little patience."""

    def __init__(self, path: Path, url: str):
        self.path = path
        taken = ("HF_", "HUGGING", "HTTP", "http", "NO_PROXY", "no_proxy", "ALL_PROXY")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(taken)},
            "PYTHONPATH": str(REPO),
            "HF_ENDPOINT": url,
            "HF_HOME": str(path / "hf"),
            "XDG_CACHE_HOME": str(path / "cache"),
        }

    def start(self, *args: str, **env: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PROGRAM, *args]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env={**self.env, **env}, text=True, **pipes)

    def pull(self, code: int, **env: str) -> list[str]:
        """The lines on stderr of a command that ends so."""
        process = self.start("pull", NAME, **env)
        _, err = process.communicate(timeout=60)
        lines = err.splitlines()
        assert process.returncode == code, err
        assert sum(line.startswith("error: ") for line in lines) == (code == 2)
        assert "Traceback" not in err and "HTTP Error" not in err and "urllib" not in err
        return lines

    def weights(self) -> bytes:
        return (self.path / "cache/ahn-mlx/models/me--model/model.safetensors").read_bytes()

    def kept(self) -> list[int]:
        """Sizes of what has come of files that are not complete."""
        return [p.stat().st_size for p in (self.path / "hf").rglob("*.incomplete")]


@pytest.fixture
def hub() -> Iterator[StandIn]:
    standin = StandIn()
    standin.repos[NAME] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    yield standin
    standin.close()


@pytest.fixture
def machine(tmp_path: Path, hub: StandIn) -> Machine:
    return Machine(tmp_path, hub.url)


def test_a_stall_is_announced_and_ends_and_what_has_come_stays(
    machine: Machine, hub: StandIn
) -> None:
    hub.stop["model.safetensors"] = 100_000
    begun = time.monotonic()
    *said, error = machine.pull(2)
    assert time.monotonic() - begun > PATIENCE
    assert any("nothing has come from the hub for" in line for line in said)
    assert "check the network, then run the same command again" in error
    assert machine.kept() == [100_000]
    hub.stop.clear()
    hub.asked.clear()
    assert any(f"{NAME}: going on after" in line for line in machine.pull(0))
    assert [span for _, _, span in hub.downloads(".safetensors")] == ["bytes=100000-"]
    assert machine.weights() == WEIGHTS and machine.kept() == []


@slow
def test_a_part_of_another_file_is_not_believed(machine: Machine, hub: StandIn) -> None:
    hub.stop["model.safetensors"] = 100_000
    machine.pull(2)
    hub.stop.clear()
    (part,) = (machine.path / "hf").rglob("*.incomplete")
    part.write_bytes(bytes(100_000))
    assert "arrived damaged and was deleted; run it again" in machine.pull(2)[-1]
    machine.pull(0)
    assert machine.weights() == WEIGHTS


def test_what_is_busy_is_asked_again(machine: Machine, hub: StandIn) -> None:
    hub.busy = 2
    said = machine.pull(0)
    assert said.count("the hub answers 503; trying again") == 2
    assert machine.weights() == WEIGHTS


def test_a_login_page_is_not_the_file(machine: Machine, hub: StandIn) -> None:
    hub.portal = True
    assert "if this network wants a login" in machine.pull(2)[-1]
    hub.portal = False
    hub.pages = {"model.safetensors"}
    assert "sends 19 bytes of 'text/html' for a file of 256,000" in machine.pull(2)[-1]
    assert machine.kept() == []


@slow
def test_no_answer_at_all(machine: Machine, hub: StandIn) -> None:
    hub.mute = True
    *said, error = machine.pull(2)
    assert any("nothing has come from the hub for" in line for line in said)
    assert "nothing has come for" in error
    process = machine.start("estimate", "--model", NAME)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "nothing has come for" in err.splitlines()[-1]


@slow
def test_drips_are_no_stall(machine: Machine, hub: StandIn) -> None:
    """Slower than patience lasts, but never silent."""
    hub.repos[NAME]["model.safetensors"] = bytes(10)
    hub.drip = 0.3
    assert machine.pull(0) == [f"fetching {NAME}"]
    assert machine.weights() == bytes(10)


@slow
def test_a_hub_that_is_always_busy(machine: Machine, hub: StandIn) -> None:
    hub.busy = 1000
    assert "nothing has come for" in machine.pull(2)[-1]


@slow
def test_connections_that_break_one_after_the_other(machine: Machine, hub: StandIn) -> None:
    hub.cut["model.safetensors"] = 100_000
    assert "the connection broke; trying again" in machine.pull(0)
    assert machine.weights() == WEIGHTS
    assert [s for _, _, s in hub.downloads(".safetensors")] == ["", "bytes=100000-"]


@slow
def test_networks_that_lead_elsewhere(machine: Machine, hub: StandIn) -> None:
    nowhere = machine.pull(2, HF_ENDPOINT="http://no-such-host.invalid")
    assert "the hub cannot be reached; check the network" in nowhere[-1]
    unsafe = machine.pull(2, HF_ENDPOINT=hub.url.replace("http:", "https:"))
    assert "no safe connection" in unsafe[-1]
    refused = machine.pull(2, HF_ENDPOINT="https://hub.invalid", HTTPS_PROXY=hub.url)
    assert "the proxy refuses (407" in refused[-1] and "HTTPS_PROXY" in refused[-1]


@slow
def test_ctrl_c_keeps_what_has_come(machine: Machine, hub: StandIn) -> None:
    hub.stop["model.safetensors"] = 100_000
    process = machine.start("pull", NAME)
    deadline = time.monotonic() + 30
    while machine.kept() != [100_000] and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert machine.kept() == [100_000]
    hub.stop.clear()
    machine.pull(0)
    assert machine.weights() == WEIGHTS


@slow
def test_a_disk_without_room(machine: Machine, hub: StandIn) -> None:
    hub.sizes["model.safetensors"] = 1 << 60
    error = machine.pull(2)[-1]
    assert "needs 1152921504.61 GB" in error and "set HF_HOME to another disk" in error
