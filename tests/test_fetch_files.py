"""Large files of a hub, part by part: what is asked for, what is kept, and what is refused."""

import hashlib
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import errors
from huggingface_hub.hf_api import RepoFile
from test_fetch import REQUEST, Bar, Clock

from ahn_mlx import AHNError
from ahn_mlx.hub import fetch

DATA = bytes(range(250)) * 4
SIZE = len(DATA)
SHA = hashlib.sha256(DATA).hexdigest()


class Body(httpx2.SyncByteStream):
    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            yield part


class Hub:
    """Each answer is (status, headers, parts of the body), or what is raised."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    @contextmanager
    def stream(self, method, url, headers):
        self.asked.append(headers)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, Exception):
            raise found
        code, named, parts = found
        yield httpx2.Response(code, headers=named, stream=Body(parts), request=REQUEST)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def fetched(monkeypatch, tmp_path, clock, capsys):
    """The file that comes of these answers, from what is there already."""

    def get(*answers, have=b""):
        hub, line, part = Hub(*answers), fetch.Line(), tmp_path / "part"
        line.bar = Bar()
        part.write_bytes(have)
        monkeypatch.setattr(fetch, "get_session", lambda: hub)
        monkeypatch.setattr(line, "attach", lambda: None)
        try:
            fetch._fetch(line, "https://hub.example/file", part, SIZE)
        finally:
            hub.bytes, hub.did = part.read_bytes(), [n for n in line.bar.did if type(n) is int]
            hub.said = capsys.readouterr().err
        return hub

    return get


def part(begin, end=SIZE, code=206):
    return (
        code,
        {"Content-Length": str(SIZE - begin)},
        [DATA[begin : begin + 9], DATA[begin + 9 : end]],
    )


def test_a_file_is_asked_for_from_where_it_ends(fetched):
    whole = fetched(part(0, code=200))
    assert whole.bytes == DATA and "Range" not in whole.asked[0]
    assert whole.asked[0]["Accept-Encoding"] == "identity"
    rest = fetched(part(100), have=DATA[:100])
    assert rest.bytes == DATA and rest.asked[0]["Range"] == "bytes=100-"
    assert sum(rest.did) == SIZE - 100
    # One that knows no ranges sends all of it again.
    again = fetched(part(0, code=200), have=b"x" * 100)
    assert again.bytes == DATA and sum(again.did) == SIZE - 100
    assert fetched(part(0, code=200), have=b"x" * (SIZE + 1)).bytes == DATA
    assert fetched(part(0, code=200), have=DATA).asked == []


def test_a_file_that_breaks_off_goes_on(fetched, clock):
    broken = (200, {"Content-Length": str(SIZE)}, [DATA[:300], httpx2.ReadError("reset")])
    found = fetched(broken, part(300))
    assert found.bytes == DATA and found.asked[1]["Range"] == "bytes=300-"
    assert found.said == "the connection broke; trying again\n" and clock.slept == [1]
    # It may also just end.
    found = fetched((200, {}, [DATA[:300]]), (206, {}, [DATA[300:400]]), part(400))
    assert found.bytes == DATA and [a.get("Range") for a in found.asked[1:]] == [
        *("bytes=300-", "bytes=400-"),
    ]
    assert clock.slept == [1, 1, 1]


def test_a_hub_that_never_sends_the_rest_is_given_up(fetched, clock):
    begun = clock.now
    with pytest.raises(AHNError, match="nothing has come for"):
        fetched((206, {}, []), have=DATA[:5])
    assert fetch.GIVE_UP <= clock.now - begun < fetch.GIVE_UP + 9


def test_what_is_no_part_of_the_file_is_refused(fetched):
    with pytest.raises(AHNError, match="sends more than the 1,000 bytes it lists"):
        fetched((206, {}, [DATA[5:], b"more"]), have=DATA[:5])
    with pytest.raises(AHNError, match="sends 12 bytes of 'text/html' for a file of 1,000"):
        fetched((200, {"Content-Length": "12", "Content-Type": "text/html; x"}, [b"please login"]))
    for code in (403, 404, 416):
        with pytest.raises(errors.HfHubHTTPError):
            fetched((code, {"Content-Length": str(SIZE)}, [DATA]))
    with pytest.raises(httpx2.ConnectError):
        fetched(httpx2.ConnectError("no network"))
    # A network that was there may come back.
    found = fetched(httpx2.ConnectError("no network"), part(100), have=DATA[:100])
    assert found.bytes == DATA
    broken = (200, {"Content-Length": str(SIZE)}, [httpx2.ReadError("reset")])
    assert fetched(broken, httpx2.ConnectError("down"), part(0, code=200)).bytes == DATA


def test_a_part_that_comes_ends_the_silence(clock):
    line = fetch.Line()
    line.bar = Bar()
    clock.now += 50
    line.gets(7)
    assert (line.heard, line.came, line.bar.did) == (clock.now, clock.now, [7])


class Listed:
    """A repository's cache, and what its hub lists."""

    def __init__(self, tmp_path, monkeypatch):
        self.cache = tmp_path / "models--a--b"
        self.snapshot = self.cache / "snapshots" / ("c" * 40)
        self.snapshot.mkdir(parents=True)
        self.files, self.fetched = [], []
        api = SimpleNamespace(list_repo_tree=lambda *_, **__: self.files)
        monkeypatch.setattr(fetch, "HfApi", lambda: api)
        monkeypatch.setattr(fetch, "_fetch", self._fetch)

    def add(self, path, sha=SHA, size=SIZE, lfs=True):
        known = {"lfs": {"size": size, "oid": sha, "sha256": sha, "pointerSize": 1}} if lfs else {}
        self.files.append(RepoFile(path=path, size=size, oid="1" * 40, **known))

    def _fetch(self, line, url, part, size):
        self.fetched.append((url.rpartition("/")[2], part.name, size))
        part.write_bytes(DATA[:size])

    def get(self, *patterns):
        line = fetch.Line()
        line.attach = lambda: None
        fetch.fetch_weights(line, "a/b", self.snapshot, list(patterns) or ["*.safetensors"])


@pytest.fixture
def listed(tmp_path, monkeypatch):
    return Listed(tmp_path, monkeypatch)


def test_large_files_that_are_wanted_and_not_there_are_fetched(listed):
    other = "d" * 64
    listed.add("model.safetensors")
    listed.add("pytorch_model.bin", "e" * 64)
    listed.add("config.json", lfs=False)
    listed.add("empty.safetensors", "f" * 64, 0)
    listed.add("b.safetensors", other, 7)
    listed.get()
    assert listed.fetched == [
        ("model.safetensors", f"{SHA}.ahn-mlx.incomplete", SIZE),
        ("b.safetensors", f"{other}.ahn-mlx.incomplete", 7),
    ]
    blobs = listed.cache / "blobs"
    assert sorted(f.name for f in blobs.iterdir()) == sorted([SHA, other])
    assert (blobs / SHA).read_bytes() == DATA
    listed.get()
    assert len(listed.fetched) == 2
    listed.get("*.bin")
    assert listed.fetched[2][0] == "pytorch_model.bin"


@pytest.mark.parametrize("sha", ["../../../x", "A" * 64, "a" * 63, "a" * 65, f"{'a' * 60}/../"])
def test_a_checksum_that_is_none_names_no_file(listed, sha):
    listed.add("model.safetensors", sha)
    listed.get()
    assert listed.fetched == [] and not (listed.cache / "blobs").exists()


def test_what_another_process_has_brought_meanwhile_is_not_fetched(listed, monkeypatch):
    listed.add("model.safetensors")

    class Lock:
        def __init__(self, path):
            assert path.name == f"{SHA}.lock" and path.parent.name == listed.cache.name

        def __enter__(self):
            (listed.cache / "blobs" / SHA).write_bytes(DATA)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(fetch, "FileLock", Lock)
    listed.get()
    assert listed.fetched == []


@pytest.mark.parametrize(("have", "free", "fits"), [(0, SIZE, True), (0, SIZE - 1, False)])
def test_there_must_be_room_for_what_is_to_come(listed, monkeypatch, have, free, fits):
    listed.add("model.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if fits:
        listed.get()
        assert listed.fetched
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        listed.get()  # nothing is to come
    else:
        with pytest.raises(AHNError, match=r"needs 0\.00 GB in .* free some"):
            listed.get()
        blobs = listed.cache / "blobs"
        (blobs / f"{SHA}.ahn-mlx.incomplete").write_bytes(b"x")  # a part needs no room again
        listed.get()
        assert listed.fetched
