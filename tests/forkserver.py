"""Commands as processes of their own that begin at once: a parent that has imported everything
forks one for each. So a test can kill, starve and race hundreds of them.

As a program this is that parent: lines of JSON come in, lines of JSON go out. On Linux with a C
compiler a library (faults.c) counts what a command does to the disk and sends.
"""

import atexit
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
NOBODY = 65534
COUNTS = sys.platform == "linux" and shutil.which("cc") is not None


@dataclass
class Run:
    """A command that was started. status: as of os.wait; negative for a signal. operations: how
    many of the disk and of sockets there were, if it came to its end; 0 if nobody counts."""

    pid: int
    place: Path
    server: "ForkServer"
    begun: float = field(default_factory=time.monotonic)
    status: int | None = None
    seconds: float = 0.0

    def wait(self, timeout: float = 300) -> int:
        """Its exit code. After that time it is killed, and the test fails."""
        if self.ends_within(timeout):
            assert self.status is not None
            return self.status
        self.kill()
        raise AssertionError(f"it has not ended after {timeout} s: {self.said}")

    def ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.status is None and (left := until - time.monotonic()) > 0:
            self.server.listen(left)
        return self.status is not None

    def kill(self) -> None:
        if self.status is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, signal.SIGKILL)
        while self.status is None:
            self.server.listen(300)

    @property
    def out(self) -> str:
        return (self.place / "stdout").read_text(errors="replace")

    @property
    def said(self) -> str:
        """On stderr."""
        return (self.place / "stderr").read_text(errors="replace")

    @property
    def operations(self) -> int:
        return int((self.place / "operations").read_text())


class ForkServer:
    """place: where streams of the commands are kept. env: of all of them."""

    def __init__(self, place: Path, **env: str):
        self.place, self.count = place, 0
        place.mkdir(parents=True, exist_ok=True)
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        fixed = {"PYTHONPATH": str(REPO), "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if COUNTS:
            fixed["LD_PRELOAD"] = str(place.resolve() / "faults.so")
            source = Path(__file__).with_name("faults.c")
            build = ["cc", "-O1", "-shared", "-fPIC", "-o", fixed["LD_PRELOAD"], source, "-ldl"]
            subprocess.run(build, check=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**plain, **fixed, **env},
        )
        self.runs: dict[int, Run] = {}
        assert self._line(600) == {"ready": True}

    def start(self, *words: object, **how: Any) -> Run:
        """how: env; limits, by the names of resource; user; cwd; stdin, a file. Where operations
        are counted also die, before which it is killed, and torn, whether a write is half done
        by then; deny, from which on the disk is read-only."""
        self.count += 1
        place = self.place / str(self.count)
        place.mkdir()
        for name in ("stdout", "stderr"):
            (place / name).touch()
        asked = {"words": [str(w) for w in words], "place": str(place), **how}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        while "pid" not in (said := self._line(300)):
            self._end(said)
        run = self.runs[said["pid"]] = Run(said["pid"], place, self)
        return run

    def run(self, *words: object, timeout: float = 300, **how: Any) -> Run:
        """One that has come to its end."""
        run = self.start(*words, **how)
        run.wait(timeout)
        return run

    def listen(self, seconds: float) -> None:
        """Take in the end of a command, if one comes within that time."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], seconds)[0]:
            self._end(self._line(300))

    def _end(self, said: dict[str, Any]) -> None:
        run = self.runs.pop(said["ended"])
        run.status, run.seconds = said["status"], time.monotonic() - run.begun

    def _line(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], seconds)[0], "the parent is silent"
        line = b""
        # Unbuffered, so that select knows of all there is.
        while not line.endswith(b"\n"):
            line += (byte := os.read(self.process.stdout.fileno(), 1))
            assert byte, "the parent has ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        for run in list(self.runs.values()):
            run.kill()
        self.process.kill()
        self.process.wait()


@cache
def _shared() -> ForkServer:
    place = Path(tempfile.mkdtemp(prefix="ahn-mlx-forks-"))
    server = ForkServer(place)
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    atexit.register(server.close)
    return server


def command(*words: object, **how: Any) -> "subprocess.CompletedProcess[str]":
    """A command from its begin to its end, where it is its own process that counts, and not how a
    shell starts it. how: as of ForkServer.run."""
    run = _shared().run(*words, **how)
    return subprocess.CompletedProcess(list(words), run.wait(), run.out, run.said)


def _child(asked: dict[str, Any]) -> None:
    place = Path(asked["place"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT, 0o666), number)
    os.dup2(os.open(asked.get("stdin", os.devnull), os.O_RDONLY), 0)
    os.environ.update(asked.get("env", {}))
    if any(name.startswith("HF_") for name in asked.get("env", {})):
        importlib.reload(importlib.import_module("huggingface_hub.constants"))
    os.chdir(asked.get("cwd", place))
    operations = os.open(place / "operations", os.O_WRONLY | os.O_CREAT)
    for name, limit in asked.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if "user" in asked:
        os.setgroups([])
        os.setgid(asked["user"])
        os.setuid(asked["user"])
    sys.argv = ["ahn-mlx", *asked["words"]]
    code: Any = 1
    faults = ctypes.CDLL(None) if COUNTS else None
    if faults:
        faults.faults_begin.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_long)
        faults.faults_end.restype = ctypes.c_long
    try:
        from ahn_mlx.cli import main

        if faults:
            faults.faults_begin(asked.get("die", 0), asked.get("torn", 0), asked.get("deny", 0))
        main()
    except SystemExit as e:
        code = e.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os.write(operations, str(faults.faults_end() if faults else 0).encode())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _serve() -> None:
    import pkgutil

    import ahn_mlx

    for found in pkgutil.walk_packages(ahn_mlx.__path__, "ahn_mlx."):
        if found.name.rsplit(".", 1)[1] not in ("__main__", "shim", "harness"):
            importlib.import_module(found.name)
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "jieba", "tokenizers"):
        importlib.import_module(name)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def say(value: dict[str, Any]) -> None:
        os.write(1, json.dumps(value).encode() + b"\n")

    say({"ready": True})
    waiting = b""
    while True:
        ready = select.select([0, heard], [], [])[0]
        if heard in ready:
            os.read(heard, 1000)
            while (ended := _ended()) is not None:
                say({"ended": ended[0], "status": os.waitstatus_to_exitcode(ended[1])})
        if 0 in ready:
            waiting += (more := os.read(0, 1 << 16))
            if not more:
                return
            *lines, waiting = waiting.split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _child(json.loads(line))
                say({"pid": pid})


def _ended() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


if __name__ == "__main__":
    _serve()
