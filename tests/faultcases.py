"""What the tests of faults do with each command: how it is called, how it is called again after it
was stopped, and what is then to be found on the disk."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import suites
from checkpoints import GDN, byte_tokenizer, talking_model
from forkserver import COUNTS, ForkServer
from standin import StandIn

from ahn_mlx.checkpoints.safetensors import read_header_and_metadata
from ahn_mlx.hub.published import MODELS
from ahn_mlx.reading import memoryfile

NAME = "ahn-gdn-3b"
TEXT = "It is a far, far better thing that I do, than I have ever done. "
Words = list[object]


class Place:
    """A machine with inputs that stay, and a directory `out` to which all is written: its user's
    files, and the caches of ours and of huggingface-hub."""

    def __init__(self, path: Path | None = None):
        # In memory, where there is such a place: of hundreds of runs each waits for the disk.
        memory = Path("/dev/shm")
        quick = memory if os.access(memory, os.W_OK) else None
        self.path = path or Path(tempfile.mkdtemp(prefix="ahn-mlx-", dir=quick))
        self.hub = hub = StandIn()
        path = self.path
        path.chmod(0o755)  # others read it too
        self.inputs, self.out = path / "in", path / "out"
        self.inputs.mkdir(parents=True)
        self.out.mkdir()
        self.model = talking_model("qwen2-gdn", self.inputs)
        self.base, self.ahn = GDN / "base", GDN / "ahn_only"
        self.book, self.more = self.inputs / "book.txt", self.inputs / "more.txt"
        self.book.write_text(TEXT * 60)
        self.more.write_text(TEXT[::-1] * 40)
        self.trainable = shutil.copytree(self.base, self.inputs / "base")
        shutil.copytree(byte_tokenizer(self.inputs / "bytes"), self.trainable, dirs_exist_ok=True)
        self.data = self.inputs / "data"
        self.data.mkdir()
        for name, data in suites.files_of("longbench").items():
            (self.data / name).write_bytes(data)
        self.prompts = suites.write_prompts(self.inputs / "prompts")
        hub.add(MODELS[NAME].base.repo, self.trainable)
        hub.add(MODELS[NAME].repo, self.ahn)
        self.server = ForkServer(
            path / "runs",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(self.out / "hf"),
            XDG_CACHE_HOME=str(self.out / "cache"),
            HF_TOKEN="of-a-test",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_XET="1",
        )
        (path / "secret").write_text("secret")
        (path / "secret.json").write_text('{"secret": "of the user"}')
        self.memory = self.inputs / "book.ahn"
        done = self.server.run("digest", self.book, "--model", self.model, "-o", self.memory)
        assert done.status == 0, done.said

    def close(self) -> None:
        self.server.close()
        self.hub.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def clear(self) -> None:
        for path in self.out.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.hub.repos.pop("me/mine", None)
        self.hub.stored.clear()
        self.hub.private.clear()
        self.hub.breaks = 0

    def contents(self) -> dict[str, Any]:
        """All that there is, as far as it has to be the same each time."""
        files = (p for p in sorted(self.out.rglob("*")) if _counts(p))
        found = {str(p.relative_to(self.out)): content(p) for p in files}
        uploaded = self.hub.repos.get("me/mine", {})
        return found | {f"hub/{name}": data for name, data in uploaded.items()}


def _counts(path: Path) -> bool:
    """Not what locks leave, nor what huggingface-hub leaves of its own where it was stopped."""
    theirs = path.suffix in (".incomplete", ".tmp", ".TAG") or path.name.startswith("tmp_")
    theirs |= path.name.startswith("dummy_file_")  # what it tries links with
    theirs &= "hf" in path.parts and not path.name.endswith(".ahn-mlx.incomplete")
    lock = path.name.endswith(".lock")
    return (path.is_symlink() or not path.is_dir()) and not lock and not theirs


def content(file: Path) -> Any:
    """What has to be the same each time: not when it was made, nor how fast."""
    if file.is_symlink():
        return str(file.readlink())
    if file.suffix in (".ahn", ".partial"):
        facts = memoryfile.read_facts(file)
        facts["texts"] = [{**text, "read": 0} for text in facts["texts"]]
        arrays: Any = mx.load(str(file), format="safetensors")
        return {**facts, "saved": 0}, {k: digest(x) for k, x in arrays.items()}
    if file.name == "training.safetensors":  # MLX writes its tensors in any order
        _, metadata = read_header_and_metadata(file)
        arrays = mx.load(str(file))
        return {**metadata, "seconds": ""}, {k: digest(x) for k, x in arrays.items()}
    if file.suffix == ".mlxfn":  # MLX writes addresses into it
        return file.stat().st_size
    if file.name == "manifest.json":
        sums = ("files", "sha256")
        return {k: v for k, v in json.loads(file.read_text()).items() if k not in sums}
    if file.name == "metrics.jsonl":
        return [{**line, "tokens_per_second": 0} for line in lines(file)]
    return hashlib.sha256(file.read_bytes()).hexdigest()


def digest(x: mx.array) -> str:
    flat = x.reshape(-1).view(mx.uint8)  # a number alone has no last axis
    return hashlib.sha256(bytes(memoryview(flat))).hexdigest()


def lines(file: Path) -> list[Any]:
    """Of JSON; a last one that was cut is none."""
    whole = file.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.split(b"\n") if line]


@dataclass(frozen=True)
class Case:
    """words: of the command. again: after it was stopped. prepare: what is there before. until: of
    what a user sees, that is there when the command has done its work, and not before."""

    words: Callable[[Place], Words]
    again: Callable[[Place], Words] | None = None
    prepare: Callable[[Place], object] = lambda place: None

    def next(self, place: Place) -> Words:
        return (self.again or self.words)(place)


def _train(place: Place) -> Words:
    given = ["train", place.book, "--model", place.trainable, "-o", place.out / "mine"]
    given += ["--window", 12, "--sinks", 4, "--seq-len", 64, "--steps", 4, "--layerwise", 1]
    return [*given, "--save-every", 2, "--lr", 1e-3]


def _train_again(place: Place) -> Words:
    begun = (place.out / "mine/training.safetensors").exists()
    return [*_train(place), *["--resume"] * begun]


def _resume(place: Place) -> Words:
    return [*_train(place), "--resume"]


def _begin_training(place: Place) -> None:
    """One that was killed after it had saved once."""
    kept = place.inputs / "begun"
    if not kept.exists():
        run = place.server.start(*_train(place))
        while not (place.out / "mine/training.safetensors").exists():
            assert not run.ends_within(0.001), run.said
        run.kill()
        assert run.status == -9, run.said
        shutil.copytree(place.out / "mine", kept)
        place.clear()
    shutil.copytree(kept, place.out / "mine")


def _copy_memory(place: Place) -> None:
    shutil.copy(place.memory, place.out / "book.ahn")


def _append_again(place: Place) -> Words:
    """Unless it was stopped after its end."""
    if memoryfile.read_facts(place.out / "book.ahn")["tokens"] > len(TEXT * 80):
        return ["memory", "verify", place.out / "book.ahn"]
    return _append(place)


def _append(place: Place) -> Words:
    given = ["digest", place.more, "--model", place.model, "-o", place.out / "book.ahn"]
    return [*given, "--append", "--checkpoint-every", 512]


def _ours(place: Place) -> Words:
    return ["--base", place.base, "--ahn", place.ahn, "-o", place.out / "deep/model"]


def _digest(place: Place) -> Words:
    given = ["digest", place.book, "--model", place.model, "-o", place.out / "book.ahn"]
    return [*given, "--checkpoint-every", 512]


def _once(words: Callable[[Place], Words], made: str) -> Callable[[Place], Words]:
    """Where the command refuses what it has made."""

    def again(place: Place) -> Words:
        return ["models"] if (place.out / made).exists() else words(place)

    return again


def _convert(place: Place) -> Words:
    return ["convert", *_ours(place)]


def _replace(place: Place) -> Words:
    return ["convert", *_ours(place), "--dtype", "bfloat16", "--force"]


def _old_model(place: Place) -> None:
    done = place.server.run(*_convert(place))
    assert done.status == 0, done.said


def _export(place: Place) -> Words:
    return ["export-pytorch", "--model", place.model, "-o", place.out / "merged"]


def _app(place: Place) -> Words:
    return ["export-app", "--model", place.model, "--chunk", 1, "-o", place.out / "app"]


def _eval(place: Place) -> Words:
    given = ["eval", "longbench", "--model", place.model, "--prompts", place.prompts]
    given += ["--tasks", "triviaqa,hotpotqa", "--data", place.data, "-o", place.out / "answers"]
    return given


def _recall(place: Place) -> Words:
    given = ["eval", "recall", "--model", place.model, "--documents", 1, "--needles", 2]
    return [*given, "--tokens", 900, "-o", place.out / "recall.png"]


def _compare(place: Place) -> Words:
    given = ["compare", place.book, "--model", place.model, "--segments", 1, "--seq-len", 64]
    return [*given, "-o", place.out / "compare.png"]


def _inspect(place: Place) -> Words:
    given = ["inspect", place.memory, "--model", place.model]
    return [*given, "-o", place.out / "book.html"]


def _upload(place: Place) -> Words:
    return ["upload", place.model, "--repo", "me/mine", "--private"]


CASES = {
    "convert": Case(_convert, _once(_convert, "deep/model")),
    "convert --force": Case(_replace, prepare=_old_model),
    "export-pytorch": Case(_export, _once(_export, "merged")),
    "export-app": Case(_app, _once(_app, "app")),
    "digest": Case(_digest, _once(_digest, "book.ahn")),
    "digest --append": Case(_append, _append_again, _copy_memory),
    "train": Case(_train, _train_again),
    "train --resume": Case(_resume, prepare=_begin_training),
    "eval longbench": Case(_eval),
    "eval recall": Case(_recall),
    "compare": Case(_compare),
    "inspect": Case(_inspect),
    "estimate": Case(lambda place: ["estimate", "-o", place.out / "costs.png"]),
    "pull": Case(lambda place: ["pull", NAME]),
    "upload": Case(_upload),
}


needs_counts = pytest.mark.skipif(not COUNTS, reason="needs Linux and a C compiler")
# The others take long, and write through the same doors.
HEAVY = ("export-app", "eval recall", "eval longbench", "compare", "estimate")
HEAVY += ("train", "train --resume")
QUICK = [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in CASES]


def check_sound(place: Place, before: dict[str, Any], *finals: dict[str, Any]) -> None:
    """What has its final name is whole, and what was there is there or has been replaced. finals:
    what may be there in the end."""
    for file in sorted(place.out.rglob("*")):
        name = str(file.relative_to(place.out))
        if file.is_symlink() or "/." in f"/{name}" or not _counts(file):
            continue
        if file.suffix in (".ahn", ".partial"):
            memoryfile.verify(file)
        elif file.name == "training.safetensors":
            read_header_and_metadata(file)
        elif file.suffix == ".jsonl":
            lines(file)
        elif file.suffix == ".png":
            assert file.read_bytes().endswith(b"IEND\xaeB`\x82"), name
        elif "/blobs/" in name and file.suffix != ".incomplete":
            data = file.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            assert file.name in (git, hashlib.sha256(data).hexdigest()), name
        elif name.startswith("out/mine/") or name.startswith("mine/"):
            if file.suffix == ".safetensors":
                read_header_and_metadata(file)
            elif file.suffix == ".json":
                assert json.loads(file.read_text())
        elif not name.startswith(("hf/", "answers/")):
            assert content(file) in [known.get(name) for known in (before, *finals)], name
    for name in before:
        needed = all(name in final for final in finals)
        assert (place.out / name).exists() or not needed, f"{name} is lost"


def one_line(run: Any) -> str:
    """What a command that was refused says: progress and notes, then one line."""
    said = [x for x in re.split(r"[\r\n]", run.said) if x]
    assert run.status == 2 and said, (run.status, run.said)
    assert "Traceback" not in run.said and said[-1].startswith("error: "), run.said
    assert sum(x.startswith("error: ") for x in said) == 1, run.said
    return said[-1]


def spread(most: int, count: int, chance: random.Random) -> list[int]:
    """So many numbers below that one, or all; at random, but from all parts of them."""
    count = min(count, most)
    return [chance.randrange(i * most // count, (i + 1) * most // count) for i in range(count)]


def moments(operations: int, count: int, chance: random.Random) -> list[dict[str, int] | float]:
    """When to kill: before operations, half of these half done. Where they are few, or nobody
    counts them, also after parts of the time that it takes."""
    chosen = [{"die": 1 + n // 2, "torn": n % 2} for n in spread(2 * operations, count, chance)]
    return [*chosen, *(chance.uniform(0, 0.9) for _ in range(count - len(chosen)))]


def address_space(pid: int) -> int:
    """Bytes that a process has."""
    found = re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


@contextmanager
def disk(directory: Path, size: int) -> Iterator[None]:
    """A small disk of its own in that place. Skips where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True) if _mounts() else None
    if done is None or done.returncode:
        pytest.skip("a small disk can be mounted by root on Linux alone")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(ballast: Path, room: int) -> None:
    """Leave so many bytes of a disk free."""
    free = shutil.disk_usage(ballast.parent).free
    try:
        with ballast.open("wb") as file:
            file.write(bytes(max(0, free - room)))
    except OSError as e:  # another process has taken the rest
        if room or e.errno != errno.ENOSPC:
            raise


def _mounts() -> bool:
    return sys.platform == "linux" and shutil.which("mount") is not None
