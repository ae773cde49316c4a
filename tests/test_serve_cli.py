"""ahn-mlx serve as it is started: what it prints, what it refuses, how it ends."""

import json
import re
import signal
import socket

import pytest
from checkpoints import talking_model
from serving import started, wait_until

from ahn_mlx import AHNError
from ahn_mlx.cli import cli


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("serve"))


def refused(*args: object) -> str:
    with pytest.raises(AHNError) as e:
        cli.main(["serve", *map(str, args)], standalone_mode=False)
    return str(e.value)


@pytest.mark.slow
def test_it_says_what_a_row_costs_and_ends_cleanly(directory, tmp_path):
    with started("--model", directory, "--rows", 2, "--memories", tmp_path) as found:
        process, client, rows = found
        assert re.match(r"2 rows of [\d.]+ MB, .*; \d+ rows fit in this machine$", rows)
        facts = client.get("/health").json()
        assert facts["rows"] == 2 and f"{facts['row_bytes'] / 1e6:.1f} MB" in rows
        file = {"file": ("book.txt", b"One two three. " * 40_000)}
        file_id = client.post("/v1/files", files=file).json()["id"]
        job = client.post("/v1/memories", json={"name": "book", "file_id": file_id}).json()
        path = f"/v1/memory_jobs/{job['id']}"
        wait_until(lambda: client.get(path).json()["tokens_read"] > 0)
        body = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        body |= {"max_tokens": 1_000_000}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(line for line in lines if "content" in line)
            process.send_signal(signal.SIGINT)
            data = [line for line in lines if line.startswith("data: ")]
        assert data[-1] == "data: [DONE]"
        ended = [json.loads(d[6:])["choices"][0]["finish_reason"] for d in data[:-1]]
        assert ended[-1] in ("length", "stop")
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in process.stderr.read()
    assert (tmp_path / f".{job['id']}.partial").is_file()
    assert json.loads((tmp_path / "jobs" / f"{job['id']}.json").read_text())["status"] == "paused"


def test_what_it_refuses_before_it_loads_a_model(directory, tmp_path):
    key = tmp_path / "key"
    key.write_text("short\n")
    assert "--api-key-file" in refused("--host", "0.0.0.0")
    assert "16 ASCII characters" in refused("--api-key-file", key)
    assert "No such file" in refused("--api-key-file", tmp_path / "none")
    assert "no such directory" in refused("--memories", tmp_path / "none")
    assert "--rows must be at least 1" in refused("--rows", 0)
    assert "--port must be" in refused("--port", 70000)
    assert "without a path" in refused("--allow-origin", "http://a.b/c")
    assert "--allow-origin" in refused("--allow-origin", "*")
    elsewhere = ("--host", "192.0.2.1", "--memories", tmp_path)
    assert "cannot listen" in refused(*elsewhere, "--api-key-file", _key(key))


def test_memories_have_a_place_if_nobody_says_where(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    elsewhere = ("--host", "192.0.2.1", "--api-key-file", _key(tmp_path / "key"))
    assert "cannot listen" in refused(*elsewhere)
    assert (tmp_path / "ahn-mlx" / "memories").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert "give a directory as --memories" in refused(*elsewhere)


def _key(file):
    file.write_text("0123456789abcdef\n")
    return file


def test_more_rows_than_fit_are_refused(directory):
    assert "do not fit" in refused("--model", directory, "--rows", 10_000_000, "--port", 0)
    taken = socket.create_server(("127.0.0.1", 0))
    assert "cannot listen" in refused("--port", taken.getsockname()[1])
    taken.close()
