"""Models by name, through the real huggingface-hub client against a hub on loopback."""

import hashlib
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from checkpoints import GDN, REPO, Evil, byte_tokenizer, pickled, read_json, same
from filelock import FileLock
from forkserver import command
from huggingface_hub import HfApi, constants, get_session
from standin import StandIn

from ahn_mlx import AHNError
from ahn_mlx.checkpoints import card
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_tensors
from ahn_mlx.checkpoints.load import load_model
from ahn_mlx.hub import datasets, disk, download, fetch, published, zoo

NAME = "ahn-gdn-3b"
BASE = published.MODELS[NAME].base.repo
AHN = published.MODELS[NAME].repo


class Machine:
    """A user's machine: its caches, and the commands run there."""

    def __init__(self, path: Path, hub: StandIn):
        self.models = path / "cache/ahn-mlx/models"
        self.hub_cache = path / "hf/hub"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
            "PYTHONPATH": str(REPO),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(path / "hf"),
            "XDG_CACHE_HOME": str(path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }

    def start(self, *args: str, **env: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "ahn_mlx", *args]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, env={**self.env, **env}, text=True, **pipes)

    def run(self, *args: str, **env: str) -> str:
        """What a command that succeeds prints."""
        done = command(*args, env={**self.env, **env})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refuse(self, *args: str, **env: str) -> str:
        """The one line of a command that does not, which makes no model."""
        before = self.there()
        done = command(*args, env={**self.env, **env})
        err = done.stderr
        assert (done.returncode, done.stdout) == (2, ""), err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and err.endswith(errors[0] + "\n") and "Traceback" not in err
        assert self.there() == before
        return errors[0]

    def there(self) -> list[str]:
        """All that is in the models' directory, but for the locks."""
        found = self.models.iterdir() if self.models.exists() else ()
        return sorted(p.name for p in found if p.suffix != ".lock")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandIn]:
    standin = StandIn()
    standin.add(BASE, GDN / "base", byte_tokenizer(tmp_path / "tokenizer"), README__md=b"# Qwen\n")
    standin.add(AHN, GDN / "ahn_only", README__md=b"---\nlicense: apache-2.0\n---\n# AHN\n")
    yield standin
    standin.close()


@pytest.fixture
def machine(tmp_path: Path, hub: StandIn) -> Machine:
    return Machine(tmp_path, hub)


@pytest.fixture
def here(tmp_path: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The hub of this process, which is a user's machine."""
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", files),
        ("HF_HUB_CACHE", str(tmp_path / "hf/hub")),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    return hub


def test_the_cost_of_a_repository(machine: Machine, hub: StandIn) -> None:
    said = machine.run("estimate", "--model", BASE, "--context", "1000", "--window", "99")
    assert "window 99" in said
    assert hub.downloads("config.json") == hub.downloads()
    assert "no such repository" in machine.refuse("estimate", "--model", "no-such/model")


# --- first use ---


def test_first_use_by_name(machine: Machine, hub: StandIn) -> None:
    ask = ("generate", "--model", NAME, "--prompt", "Hello", "--max-tokens", "4")
    process = machine.start(*ask)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "generation 4 tokens" in err and "converting, once" in err
    assert machine.there() == [f"{NAME}-4bit"]
    model = machine.models / f"{NAME}-4bit"
    config = read_json(model)
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert (config["ahn"]["window"], config["ahn"]["sinks"]) == (12, 4)  # the checkpoint's
    origins = card.read_origins(model)
    assert [(o.repo, o.revision) for o in origins] == [
        (BASE, hub.commit(BASE)),
        (AHN, hub.commit(AHN)),
    ]
    assert [o.licence for o in origins] == ["qwen-research", "apache-2.0"]
    # The second time nothing is asked, and the answer is the same.
    hub.asked.clear()
    assert machine.run(*ask) == out
    assert hub.asked == []


def test_quantizations_live_side_by_side(machine: Machine, hub: StandIn, tmp_path: Path) -> None:
    machine.run("pull", NAME)
    hub.asked.clear()
    machine.run("pull", NAME, "--q-bits", "0")
    assert hub.downloads() == []
    assert machine.there() == [NAME, f"{NAME}-4bit"]
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "same")
    assert same(read_tensors(machine.models / NAME), read_tensors(tmp_path / "same"))
    listed = machine.run("models")
    assert next(x for x in listed.splitlines() if x.startswith(NAME)).count("GB") == 3
    assert machine.run("rm", NAME).count("removed") == 2
    assert machine.there() == []
    assert f"{NAME}: not on this machine" in machine.refuse("rm", NAME)


def test_pull_brings_it_up_to_date(machine: Machine, hub: StandIn) -> None:
    machine.run("pull", NAME)
    before = (machine.models / f"{NAME}-4bit/model.safetensors").stat()
    machine.run("pull", NAME)
    assert (machine.models / f"{NAME}-4bit/model.safetensors").stat() == before
    old = hub.commit(AHN)
    new = hub.add(AHN, GDN / "ahn_only", README__md=b"# newer\n")
    machine.run("pull", NAME)
    assert card.read_origins(machine.models / f"{NAME}-4bit")[1].revision == new != old
    # And back, pinned, from what is in the user's cache.
    machine.run("pull", NAME, "--revision", old, HF_HUB_OFFLINE="1")
    assert card.read_origins(machine.models / f"{NAME}-4bit")[1].revision == old


def test_each_part_comes_at_the_revision_that_was_asked_for(here: StandIn, tmp_path: Path) -> None:
    models = tmp_path / "cache/ahn-mlx/models"
    old = [here.commit(BASE), here.commit(AHN)]
    tokenizer, more = byte_tokenizer(tmp_path / "same"), {"README__md": b"# newer\n"}
    new = [here.add(BASE, GDN / "base", tokenizer, **more), here.add(AHN, GDN / "ahn_only", **more)]
    for wanted, made_of in (
        ({"base_revision": old[0]}, [old[0], new[1]]),
        ({"revision": old[1]}, [new[0], old[1]]),
        ({"revision": old[1], "base_revision": old[0]}, old),
        ({}, new),
    ):
        download.pull(NAME, **wanted)
        origins = card.read_origins(models / f"{NAME}-4bit")
        assert [origin.revision for origin in origins] == made_of
    old, new = (here.add("me/mine", GDN / "ahn_only", note__txt=note) for note in (b"1", b"2"))
    for wanted, commit in ((old, old), (None, new), (old, old)):
        found = download.pull("me/mine", revision=wanted)
        assert found == models / "me--mine" and found.resolve().name == commit
    with pytest.raises(AHNError, match="has no revision v9"):
        download.pull("me/mine", revision="v9")
    assert found.resolve().name == old


def test_repository_that_is_converted_already(machine: Machine, hub: StandIn, tmp_path) -> None:
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "ours")
    hub.add("me/small", tmp_path / "ours", byte_tokenizer(tmp_path / "more"))
    ask = ("generate", "--model", "me/small", "--prompt", "Hello", "--max-tokens", "2")
    out = machine.run(*ask)
    assert machine.there() == ["me--small"]
    assert not any("custom" in path or path.endswith(".py") for _, path, _ in hub.asked)
    hub.asked.clear()
    assert machine.run(*ask) == out
    assert hub.asked == []
    assert "me/small" in machine.run("models")
    machine.run("rm", "me/small")
    assert machine.there() == [] and any(machine.hub_cache.rglob("model.safetensors"))
    refused = machine.refuse("generate", "--model", "me/small", "--q-bits", "8", "--prompt", "x")
    assert "converted already" in refused


def test_upload(machine: Machine, hub: StandIn) -> None:
    """What is uploaded runs elsewhere, and its card says so."""
    upload = ("upload", "--model", NAME, "--repo", "me/mine")
    hub.token = "secret"
    refused = machine.refuse(*upload, HF_TOKEN="wrong")
    assert "hf auth login" in refused
    machine.run("pull", NAME, HF_TOKEN="secret")
    plain = {"HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1"}
    assert machine.run(*upload, **plain) == f"{hub.url}/me/mine\n"
    model = machine.models / f"{NAME}-4bit"
    uploaded = hub.repos["me/mine"]
    assert uploaded.keys() == {p.name for p in model.iterdir()}
    for file in model.glob("*.*"):
        assert (uploaded[file.name] == file.read_bytes()) == (file.name != "README.md")
    before = dict(uploaded)
    # What was to be private would be there for all to see.
    assert "--private has no effect on me/mine" in machine.refuse(*upload, "--private", **plain)
    assert hub.repos["me/mine"] == before
    text = uploaded["README.md"].decode()
    assert "--model me/mine\n" in text and hub.commit(BASE) in text
    ask = ("generate", "--model", "me/mine", "--prompt", "Hello", "--max-tokens", "2")
    machine.run(*ask, HF_TOKEN="secret")
    assert [p for _, p, _ in hub.asked if p.endswith("me/mine/resolve/main/ahn_model.py")] == []


@pytest.mark.parametrize("private", [True, False])
def test_what_is_uploaded_is_as_private_as_was_asked(
    private: bool, here: StandIn, tmp_path: Path
) -> None:
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "model")
    for name in ("README.md", ".secret"):
        (tmp_path / "model" / name).write_text("mine")
    assert download.upload(tmp_path / "model", "me/mine", private) == f"{here.url}/me/mine"
    assert here.private == {"me/mine": private}
    sent = here.repos["me/mine"]
    assert ".secret" not in sent and b"--model me/mine" in sent["README.md"]
    with pytest.raises(AHNError, match="not a converted model"):
        download.upload(GDN / "ahn_only", "me/other", private)
    assert "me/other" not in here.repos


def test_what_is_replaced_while_it_is_uploaded(
    here: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "model")
    upload_folder = HfApi.upload_folder

    def slow(*args: object, **options: object) -> object:
        convert(GDN / "base", GDN / "ahn_only", tmp_path / "model", force=True)
        return upload_folder(*args, **options)

    monkeypatch.setattr(HfApi, "upload_folder", slow)
    with pytest.raises(AHNError, match=r"model: deleted or replaced while it was read"):
        download.upload(tmp_path / "model", "me/mine")


def test_what_a_directory_links_to_is_not_uploaded(here: StandIn, tmp_path: Path) -> None:
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "model/notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(AHNError, match=r"notes\.txt: a link out of its directory"):
        download.upload(tmp_path / "model", "me/mine")
    assert "me/mine" not in here.repos
    (tmp_path / "model/notes.txt").unlink()
    for _ in range(2):  # what is there already is no obstacle
        download.upload(tmp_path / "model", "me/mine")
    assert here.private == {"me/mine": False}
    before = dict(here.repos["me/mine"])
    (tmp_path / "model/more.txt").write_text("private")
    with pytest.raises(AHNError, match="--private has no effect on me/mine"):
        download.upload(tmp_path / "model", "me/mine", private=True)
    assert here.repos["me/mine"] == before
    here.token = "another"
    with pytest.raises(AHNError, match="me/mine: no such repository, or it is private"):
        download.upload(tmp_path / "model", "me/mine")


# --- the same in this process ---


def test_a_name_is_made_once(here: StandIn, tmp_path: Path, capsys) -> None:
    models = tmp_path / "cache/ahn-mlx/models"
    models.mkdir(parents=True)
    left = models / f".{NAME}-4bit.0123.part"
    left.mkdir()
    made = download.resolve(NAME)
    said = capsys.readouterr().err
    assert f"fetching {AHN} and {BASE}\n" in said and f"converting, once, to {made}" in said
    assert made == models / f"{NAME}-4bit" and not left.exists()
    assert (made / "README.md").read_text().count(f"\n# {NAME}\n") == 1
    assert read_json(made)["quantization"]["bits"] == 4
    assert read_json(download.resolve(NAME, 0)).get("quantization") is None
    assert read_json(download.resolve(NAME, 8))["quantization"]["bits"] == 8
    before = (made / "model.safetensors").stat()
    download.pull(NAME)  # nothing is newer
    assert (made / "model.safetensors").stat() == before
    for lock in models.glob(".*.lock"):
        lock.unlink()
    here.asked.clear()
    assert download.resolve(NAME) == download.find(str(made)) == made
    assert here.asked == [] and not any(models.glob(".*.lock"))
    for refused in (lambda: download.resolve("me/mine", 4), lambda: download.pull("me/mine", 0)):
        with pytest.raises(AHNError, match="--q-bits has no effect on me/mine: it is converted"):
            refused()
    with pytest.raises(AHNError, match="--base-revision: me/mine is one repository"):
        download.pull("me/mine", base_revision="main")


def test_a_linked_repository_is_removed_and_kept(here: StandIn, tmp_path: Path) -> None:
    here.add("me/mine", GDN / "ahn_only")
    link = download.resolve("me/mine")
    snapshot, left = link.resolve(), link.with_name(".me--mine.01ab.part")
    left.mkdir()
    assert download.remove("me/mine") == [link]
    assert [path.suffix for path in link.parent.iterdir()] == [".lock"]
    assert (snapshot / "model.safetensors").is_file()
    with pytest.raises(AHNError, match="me/mine: not on this machine"):
        download.remove("me/mine")


def test_one_snapshot_comes_though_its_branch_moves_on(here: StandIn, monkeypatch) -> None:
    old = here.add("me/mine", GDN / "ahn_only", chat_template__jinja=b"x", code__py=b"x")
    whole = download.fetch_weights

    def moves(*given: object) -> None:
        here.add("me/mine", GDN / "ahn_only", note__txt=b"newer")
        whole(*given)

    monkeypatch.setattr(download, "fetch_weights", moves)
    path = download.download("me/mine")
    assert path.name == old and (path / "model.safetensors").is_file()
    assert (path / "chat_template.jinja").is_file() and not (path / "code.py").exists()


def test_a_link_that_leads_nowhere_is_made_anew_or_removed(here: StandIn, tmp_path: Path) -> None:
    here.add("me/mine", GDN / "ahn_only")
    for make in (download.resolve, lambda name: download.remove(name)[0]):
        link = download.resolve("me/mine")
        shutil.rmtree(tmp_path / "hf")
        assert link.is_symlink() and not link.exists()
        left = link.with_name(".me--mine.01ab.part")
        left.mkdir()
        assert make("me/mine") == link
        assert not left.exists() and link.exists() == (make is download.resolve)
    assert not link.is_symlink()


def test_what_another_process_has_made_meanwhile_is_taken(here: StandIn, monkeypatch) -> None:
    whole = download._locked

    @contextmanager
    def waited(directory: Path) -> Iterator[None]:
        with whole(directory):
            directory.mkdir()
            yield

    monkeypatch.setattr(download, "_locked", waited)
    assert download.resolve("me/mine").is_dir() and here.asked == []


def test_who_has_to_wait_for_another_says_so(here: StandIn, tmp_path: Path, monkeypatch) -> None:
    models = tmp_path / "cache/ahn-mlx/models"
    (models / NAME).mkdir(parents=True)
    other, said = FileLock(models / f".{NAME}.lock"), []
    other.acquire()
    monkeypatch.setattr(download, "_say", lambda line: (said.append(line), other.release()))
    download.remove(NAME)
    assert said == [f"{NAME}: another process is at work on it; waiting"]
    assert not (models / NAME).exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(AHNError, match="Not a directory; free it or set XDG_CACHE_HOME"):
        download.resolve(NAME)


def test_a_repository_has_one_kind_of_weights(here: StandIn, tmp_path: Path) -> None:
    more = {"pytorch_model__bin": b"x", "code__py": b"x", "empty__safetensors": b""}
    here.add("me/mine", GDN / "ahn_only", **more)
    found = download.download("me/mine")
    assert {"model.safetensors", "empty.safetensors", "config.json"} <= set(os.listdir(found))
    assert here.downloads(".bin") == here.downloads(".py") == []
    here.add("me/old", **{"config__json": b"{}", "pytorch_model__bin": b"x" * 99})
    old = download.download("me/old")
    assert (old / "pytorch_model.bin").read_bytes() == b"x" * 99
    here.add("me/bare", model__safetensors=b"y")
    assert (download.download("me/bare") / "model.safetensors").read_bytes() == b"y"
    assert set(os.listdir(download.config_dir(BASE))) == {"config.json"}
    here.asked.clear()
    download.download("me/mine")
    assert here.downloads(".safetensors") == []


def test_without_a_network_it_is_what_has_come_before(here: StandIn, monkeypatch) -> None:
    made = download.pull(NAME)
    download.remove(NAME)
    here.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download.pull(NAME) == made and made.is_dir() and here.asked == []
    with pytest.raises(AHNError, match="me/mine: is not in the cache and HF_HUB_OFFLINE is set"):
        download.pull("me/mine")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_arrives_damaged_is_fetched_again(file: str, here: StandIn) -> None:
    here.altered = {file}
    with pytest.raises(AHNError, match=f"{AHN}: {file} arrived damaged and was deleted"):
        download.download(AHN)
    here.altered = set()
    found = download.download(AHN)
    assert (found / file).read_bytes() == here.repos[AHN][file]


def test_a_memory_of_another_name_is_not_made(here: StandIn, tmp_path: Path) -> None:
    here.add(AHN, GDN.with_name("qwen2-dn") / "ahn_only")
    with pytest.raises(AHNError, match=f"{AHN}: holds a deltanet memory, not the gated_delt"):
        download.pull(NAME)
    here.add(AHN, GDN / "base")
    with pytest.raises(AHNError, match=f"{AHN}: .*no AHN fields"):
        download.pull(NAME)
    assert here.downloads(f"{BASE}/resolve/") == [] and disk.on_disk() == []


SIZE = len((GDN / "base/model.safetensors").read_bytes())


@pytest.mark.parametrize(("have", "span"), [(0, ""), (1000, "bytes=1000-"), (SIZE + 1, "")])
def test_weights_go_on_where_their_part_ends(
    have: int, span: str, here: StandIn, tmp_path: Path, capsys
) -> None:
    data = here.repos[BASE]["model.safetensors"]
    blobs = tmp_path / "hf/hub" / f"models--{BASE.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(data).hexdigest()}.ahn-mlx.incomplete"
    if have:
        part.write_bytes((data + b"x")[:have])
    found = download.download(BASE)
    assert [a[2] for a in here.downloads("model.safetensors")] == [span]
    assert (found / "model.safetensors").read_bytes() == data and not part.exists()
    assert ("going on after" in capsys.readouterr().err) == bool(have)


def test_a_connection_that_breaks_is_gone_on_from(here: StandIn, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fetch, "PAUSE", 0.01)
    here.cut["model.safetensors"] = 5000
    found = download.download(BASE)
    assert [a[2] for a in here.downloads("model.safetensors")] == ["", "bytes=5000-"]
    assert (found / "model.safetensors").read_bytes() == here.repos[BASE]["model.safetensors"]
    assert "the connection broke; trying again" in capsys.readouterr().err


def test_a_disk_has_room_for_what_is_still_to_come(
    here: StandIn, tmp_path: Path, monkeypatch
) -> None:
    data = here.repos[BASE]["model.safetensors"]
    blobs = tmp_path / "hf/hub" / f"models--{BASE.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(data).hexdigest()}.ahn-mlx.incomplete"
    part.write_bytes(data[:1000])
    free = [SIZE - 1001]
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, *free))
    with pytest.raises(AHNError, match=r"needs 0\.00 GB in .*/hf/hub, where 0\.00 GB"):
        download.download(BASE)
    free[0] += 1
    assert (download.download(BASE) / "model.safetensors").is_file()


def test_a_hub_that_was_never_there_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    line, url = fetch.Line(), "http://127.0.0.1:9/file"
    monkeypatch.setattr(fetch, "GIVE_UP", 0.0)
    part = tmp_path / "part"
    with fetch._bar(line, "x", 10, 0), pytest.raises(httpx2.ConnectError):
        fetch._fetch(line, url, part, 10)
    part.write_bytes(b"123")
    # What has begun may go on, once there is a network again.
    with fetch._bar(line, "x", 10, 3), pytest.raises((fetch._Broken, AHNError)):
        fetch._fetch(line, url, part, 10)
    assert line.bar is None and part.read_bytes() == b"123"


@pytest.mark.parametrize(("sent", "size"), [(10, 10), (11, 10), (300_000, 10)])
def test_a_hub_that_sends_more_than_it_lists(sent: int, size: int, tmp_path: Path) -> None:
    """And does not say how much."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * sent)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    line, part = fetch.Line(), tmp_path / "part"
    url = f"http://127.0.0.1:{server.server_port}/file"
    try:
        with fetch._bar(line, "x", size, 0):
            if sent > size:
                with pytest.raises(AHNError, match="sends more than the 10 bytes it lists"):
                    fetch._fetch(line, url, part, size)
            else:
                fetch._fetch(line, url, part, size)
                assert part.read_bytes() == b"x" * size
    finally:
        server.shutdown()
        server.server_close()


def test_a_dataset_comes_at_its_revision(here: StandIn, tmp_path: Path) -> None:
    old = here.add("some/data", a__jsonl=b"1")
    new = here.add("some/data", a__jsonl=b"2")
    waits, hook = [], get_session().event_hooks["request"]

    def note(request: httpx2.Request) -> None:
        if "/datasets/" in request.url.path:  # the library asks for other things, too
            waits.append(request.extensions["timeout"]["read"])

    hook.append(note)
    try:
        assert datasets.dataset_revision("some/data") == new != old
        assert datasets.dataset_revision("some/data", old) == old
    finally:
        hook.remove(note)
    assert waits == [30, 30]
    for commit, text in ((old, b"1"), (new, b"2")):
        assert datasets.dataset_file("some/data", "a.jsonl", commit).read_bytes() == text
    assert (tmp_path / "hf/hub/datasets--some--data").is_dir()
    for refused, said in (
        (lambda: datasets.dataset_revision("some/data", "v9"), "some/data: has no revision v9"),
        (
            lambda: datasets.dataset_file("some/data", "a.jsonl", "v9"),
            "a.jsonl: has no revision v9",
        ),
        (lambda: datasets.dataset_revision("no/such"), "no/such: no such repository"),
    ):
        with pytest.raises(AHNError, match=f"{said}.*; or give --data"):
            refused()


# --- what goes wrong ---


def test_cut_connection_is_resumed(machine: Machine, hub: StandIn) -> None:
    # A cut in the middle of it: the golden files are small.
    hub.repos[BASE]["more.safetensors"] = bytes(24 << 20)
    hub.cut["more.safetensors"] = 21 << 20
    machine.run("pull", NAME)
    ranges = [span for _, _, span in hub.downloads("more.safetensors")]
    assert ranges == ["", f"bytes={21 << 20}-"]
    assert machine.there() == [f"{NAME}-4bit"]


def test_killed_while_downloading(machine: Machine, hub: StandIn) -> None:
    hub.hold.clear()
    process = machine.start("pull", NAME)
    wait(lambda: hub.downloads("model.safetensors"))
    process.kill()
    process.communicate(timeout=30)
    hub.hold.set()
    assert machine.there() == []
    machine.run("pull", NAME)
    load_model(machine.models / f"{NAME}-4bit")


def test_killed_while_converting(machine: Machine, hub: StandIn) -> None:
    machine.run("pull", NAME, "--q-bits", "0")
    left = machine.models / f".{NAME}-4bit.0123.part"
    shutil.copytree(machine.models / NAME, left)
    (left / "model.safetensors").write_bytes(b"half of")
    machine.run("pull", NAME)
    assert machine.there() == [NAME, f"{NAME}-4bit"]


def test_damaged_download_is_found_and_mended(machine: Machine, hub: StandIn) -> None:
    for file in ("model.safetensors", "config.json"):
        hub.altered = {file}
        assert f"{file} arrived damaged and was deleted" in machine.refuse("pull", NAME)
    hub.altered = set()
    machine.run("pull", NAME)


def test_what_the_hub_denies(machine: Machine, hub: StandIn) -> None:
    assert "has no revision v9" in machine.refuse("pull", NAME, "--revision", "v9")
    hub.gated = {BASE}
    refused = machine.refuse("pull", NAME)
    assert refused.startswith(f"error: {BASE}: needs your consent") and "hf auth login" in refused
    hub.gated = set()
    hub.token = "secret"
    assert f"{AHN}: no such repository, or it is private" in machine.refuse("pull", NAME)
    machine.run("pull", NAME, HF_TOKEN="secret")
    machine.run("rm", NAME)
    hub.token = ""
    del hub.repos[AHN]
    assert f"{AHN}: no such repository" in machine.refuse("pull", NAME, HF_HOME=str(machine.models))


def test_offline(machine: Machine, hub: StandIn) -> None:
    refused = machine.refuse("pull", NAME, HF_HUB_OFFLINE="1")
    assert f"{AHN}: is not in the cache and HF_HUB_OFFLINE is set" in refused
    assert "hub cannot be reached" in machine.refuse("pull", NAME, HF_ENDPOINT="http://127.0.0.1:9")
    machine.run("pull", NAME)
    machine.run("rm", NAME)
    hub.asked.clear()
    machine.run("pull", NAME, HF_HUB_OFFLINE="1")  # from what was downloaded
    assert hub.asked == [] and machine.there() == [f"{NAME}-4bit"]


def test_disk_full(machine: Machine, hub: StandIn) -> None:
    """A limit on file size fails in a write, as a full disk does."""
    command = [sys.executable, "-m", "ahn_mlx", "pull", NAME, "--q-bits", "0"]
    for kilobytes in (100, 500):  # the download, then what is made of it
        limit = kilobytes << 10
        done = subprocess.run(
            command,
            env=machine.env,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)),
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: "), done.stderr
        assert "File too large" in last and machine.there() == []
    machine.run(*command[3:])
    assert machine.there() == [NAME]


def test_two_at_once(machine: Machine, hub: StandIn) -> None:
    hub.hold.clear()
    first = machine.start("pull", NAME)
    wait(lambda: hub.downloads("model.safetensors"))
    ask = ("generate", "--model", NAME, "--prompt", "Hello", "--max-tokens", "2")
    second = machine.start(*ask)
    assert second.stderr
    assert "another process is at work on it; waiting" in second.stderr.readline()
    hub.hold.set()
    for process in (first, second):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert len(hub.downloads("model.safetensors")) == 2  # base and AHN, once
    assert machine.there() == [f"{NAME}-4bit"]


def test_ctrl_c_while_downloading(machine: Machine, hub: StandIn) -> None:
    hub.hold.clear()
    process = machine.start("pull", NAME)
    wait(lambda: hub.downloads("model.safetensors"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    hub.hold.set()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    assert machine.there() == []


# --- repositories that are not what they should be ---


def test_wrong_memory(machine: Machine, hub: StandIn) -> None:
    hub.add(AHN, GDN.parent / "qwen2-dn/ahn_only")
    assert "holds a deltanet memory, not the gated_deltanet of its name" in machine.refuse(
        "pull", NAME
    )


def test_hostile_repositories(machine: Machine, hub: StandIn, tmp_path: Path) -> None:
    whole = dict(hub.repos[AHN])
    header = struct.pack("<Q", 1 << 60) + b"{}"
    hub.repos[AHN] = {**whole, "model.safetensors": header}
    assert "its header claims 1152921504606846976 bytes" in machine.refuse("pull", NAME)
    absurd = whole["config.json"].replace(b'"hidden_size": 64', b'"hidden_size": 1099511627776')
    hub.repos[AHN] = {**whole, "config.json": absurd}
    assert "hidden_size must be a whole number from 1 to" in machine.refuse("pull", NAME)
    del whole["model.safetensors"]
    pickled(tmp_path / "evil.bin", Evil(str(tmp_path / "trace")))
    hub.repos[AHN] = {**whole, "pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()}
    refused = machine.refuse("pull", NAME)
    assert "reading it takes torch" in refused or "nothing in it was run" in refused
    assert not (tmp_path / "trace").exists()


def test_file_names_that_lead_out(machine: Machine, hub: StandIn, tmp_path: Path) -> None:
    before = sorted(p for p in tmp_path.rglob("*") if "hf" not in p.parts)
    for name in ("../../../../../evil.json", "/evil.json", "a/../../../../../evil.json"):
        hub.repos[AHN] = {name: b"{}", **hub.repos[AHN]}
        machine.refuse("pull", NAME)
        assert not any(tmp_path.rglob("evil.json"))
        assert not Path("/evil.json").exists()
        del hub.repos[AHN][name]
    after = sorted(p for p in tmp_path.rglob("*") if "hf" not in p.parts and "cache" not in p.parts)
    assert after == [p for p in before if "cache" not in p.parts]


@pytest.mark.parametrize("name", ["../x", "a/../b", "x/..", "ahn-gdn-4b", "a/b/c", "-/-", "./x"])
def test_names_that_are_none(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(AHNError, match="no model "):
        download.resolve(name)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AHNError, match="comes inside the package"):
        download.find(published.DEFAULT)


def test_what_is_on_a_machine_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = tmp_path / "ahn-mlx/models"
    assert disk.variants(NAME) == disk.on_disk() == []
    ours = [NAME, f"{NAME}-4bit", f"{NAME}-8bit"]
    others = ["ahn-gdn-7b", "me--small", "me--small-4bit"]
    for name in (*ours, *others, f".{NAME}-4bit.01ab.part", f"{NAME}-xbit"):
        (models / name).mkdir(parents=True)
    for name in ("a-file", f".{NAME}-4bit.lock"):
        (models / name).touch()
    assert disk.variants(NAME) == [models / name for name in ours]
    assert disk.variants("me/small") == [models / "me--small"]
    assert disk.on_disk() == sorted(models / name for name in (*ours, *others, f"{NAME}-xbit"))
    assert [disk.model_dir(NAME, bits).name for bits in (0, 4, 8)] == ours
    assert disk.model_dir(NAME).name == ours[1]
    assert download.remove(NAME) == [models / name for name in ours]
    assert disk.variants(NAME) == [] and (models / "ahn-gdn-7b").is_dir()
    left = {path.name for path in models.iterdir() if path.suffix != ".lock"}
    assert left == {*others, f"{NAME}-xbit", "a-file"}


def wait(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- what the names stand for ---


def test_published_parameters() -> None:
    """The counts of the paper's table, in millions."""
    table = {
        "3b": {"mamba2": 11.9, "dn": 11.8, "gdn": 13.0},
        "7b": {"mamba2": 18.6, "dn": 18.5, "gdn": 21.3},
        "14b": {"mamba2": 51.4, "dn": 51.1, "gdn": 61.0},
    }
    base = {"3b": 3085938688, "7b": 7615616512, "14b": 14770033664}
    names = [f"ahn-{memory}-{size}" for size in table for memory in table[size]]
    assert sorted([*zoo.ZOO, *names]) == sorted(published.MODELS)
    for size, row in table.items():
        for memory, millions in row.items():
            found = published.parameters(f"ahn-{memory}-{size}")
            assert found[0] == base[size] and round(found[1] / 1e6, 1) == millions
    entry = published.MODELS["ahn-mamba2-14b"]
    assert entry.repo == "ByteDance-Seed/AHN-Mamba2-for-Qwen-2.5-Instruct-14B"
    assert (entry.ahn.window, entry.ahn.sinks) == (32_640, 128)


def test_settings_of_names() -> None:
    """Ours see their sinks near, and have a router; DeltaNet's knows how wide its window is."""
    for name, entry in published.MODELS.items():
        ours = "smollm2" in name
        for ahn in (entry.ahn, entry.settings):
            assert ahn.router is ours
            assert ahn.query_projection is (name == "ahn-gdn-smollm2-135m")
            assert ahn.window_gain is (name == "ahn-dn-smollm2-135m")
        found = (entry.settings.window, entry.settings.sinks, entry.settings.sink_positions)
        assert found == ((1024, 64, "clamped") if ours else (32_640, 128, "absolute"))
        assert (entry.ahn.window, entry.ahn.sinks) == (32_640, 128)
    assert published.on_base(BASE).name == NAME
    assert published.on_base("HuggingFaceTB/SmolLM2-135M-Instruct").name == published.DEFAULT
    assert published.on_base("no/such") is None


def test_names_are_completed_and_corrected(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert published.model_names() == list(published.MODELS)
    for name in ("me--a--b", ".me--x.01.part", f"{NAME}-4bit", "x--y"):
        (published.models_dir() / name).mkdir(parents=True)
    assert published.model_names() == [*published.MODELS, "me/a--b", "x/y"]
    for typed, said in (
        ("./x", "no model directory ./x"),
        ("~x", "no model directory ~x"),
        ("ahn-gdn-3c", "no model 'ahn-gdn-3c'; did you mean ahn-gdn-3b?"),
        ("14B-Instruct", "did you mean one of ahn-gdn-14b, ahn-dn-14b, ahn-mamba2-14b?"),
        ("qqq", f"no model directory qqq; names: {', '.join(published.MODELS)}; or give ORG/"),
    ):
        assert said in published.no_such_model(typed)
    assert published.has_bits_to_choose(NAME)
    assert not published.has_bits_to_choose(published.DEFAULT)
    assert not published.has_bits_to_choose("me/a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert not published.has_bits_to_choose(NAME)  # a directory is meant


def test_default_window(hub: StandIn, machine: Machine) -> None:
    hub_config = hub.repos[AHN]["config.json"]
    assert b'"sliding_window": 12' in hub_config
    text = hub_config.replace(b'"sliding_window": 12,', b"").replace(b'"num_attn_sinks": 4,', b"")
    hub.repos[AHN]["config.json"] = text
    machine.run("pull", NAME)
    ahn = read_json(machine.models / f"{NAME}-4bit")["ahn"]
    assert (ahn["window"], ahn["sinks"]) == (32_640, 128)


def test_models_on_this_machine_are_whole_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.on_disk() == []
    place = tmp_path / "ahn-mlx" / "models"
    for name in ("b", "a", ".c.0123abcd.part"):
        (place / name).mkdir(parents=True)
    (place / "notes").write_text("")
    assert disk.on_disk() == [place / "a", place / "b"]
