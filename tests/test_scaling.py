"""What docs/scaling.md says: its proxy before two servers, and its numbers."""

import json
import re
import shutil
import socket
import subprocess
from contextlib import contextmanager

import httpx
import pytest
from checkpoints import REPO
from click.testing import CliRunner
from serving import serving, wait_until

from ahn_mlx.cli.estimate import estimate

TEXT = (REPO / "docs/scaling.md").read_text()
KEY = "0123456789abcdef"


@contextmanager
def nginx(folder, *servers):
    """The configuration of the document before these servers; yields its address."""
    found = re.search(r"```nginx\n(.*?)```", TEXT, re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = found[1].replace("listen 80;", f"listen 127.0.0.1:{port};")
    for n, server in enumerate(servers, 11):
        config = config.replace(f"192.168.1.{n}:8080", server.removeprefix("http://"))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"pid {folder}/pid;\nerror_log {folder}/errors;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}\n{config}\n}}\n"
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "-g", "daemon off;"])
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx.get(address, trust_env=False).status_code < 500)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_a_proxy_keeps_conversations_where_they_are_known(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    options = {"memories": books, "key": KEY, "hosts": None}
    with serving(**options) as one, serving(**options) as two:
        sites = (one, two)
        with nginx(tmp_path, one.url, two.url) as address:
            headers = {"authorization": f"Bearer {KEY}"}
            ask = {"model": "tiny", "input": "Hello", "max_output_tokens": 4}

            def client(**more):
                return httpx.Client(
                    base_url=address, headers={**headers, **more}, timeout=60, trust_env=False
                )

            def knows(answer):
                """Which servers can go on from it."""
                more = {**ask, "previous_response_id": answer["id"]}
                return [s.post("/v1/responses", more).status_code == 200 for s in sites]

            where = set()
            for name in "abcdefgh":
                with client(**{"x-conversation": name}) as asking:
                    first = asking.post("/v1/responses", json=ask).json()
                    more = {**ask, "previous_response_id": first["id"]}
                    for _ in range(3):
                        assert asking.post("/v1/responses", json=more).status_code == 200
                where.add(tuple(knows(first)))
            assert where == {(True, False), (False, True)}

            # A browser: the page sets the cookie, and its own requests are of its own origin.
            where = set()
            for _ in range(8):
                with client(origin=address) as page:
                    cookie = page.get("/").headers["set-cookie"]
                    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
                    first = page.post("/v1/responses", json=ask).json()
                    more = {**ask, "previous_response_id": first["id"]}
                    second = page.post("/v1/responses", json=more)
                    assert second.status_code == 200 and "set-cookie" not in second.headers
                where.add(tuple(knows(first)))
            assert where == {(True, False), (False, True)}

            # By address and key: all of them at one.
            with client() as plain:
                found = {tuple(knows(plain.post("/v1/responses", json=ask).json()))}
                plain.cookies.clear()
                found |= {tuple(knows(plain.post("/v1/responses", json=ask).json()))}
                assert len(found) == 1

            with client(**{"x-conversation": "a"}) as asking:
                sent = asking.post("/v1/files", files={"file": ("b.txt", b"One two. " * 40)})
                body = {"name": "book", "file_id": sent.json()["id"]}
                job = asking.post("/v1/memories", json=body).json()["id"]
                path = f"/v1/memory_jobs/{job}"
                wait_until(lambda: asking.get(path).json()["status"] == "done")
                assert job in one.digests.jobs and job not in two.digests.jobs
                for site in sites:  # a book is a model of both
                    names = [m["id"] for m in site.ok("/v1/models")["data"]]
                    assert "tiny@book" in names
                book = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3}
                body = {"model": "tiny@book", **book, "stream": True}
                for name in "abcdefgh":
                    with asking.stream(
                        "POST", "/v1/chat/completions", json=body, headers={"x-conversation": name}
                    ) as answer:
                        lines = [x for x in answer.iter_lines() if x.startswith("data: ")]
                    assert answer.status_code == 200 and lines[-1] == "data: [DONE]"
            with httpx.Client(base_url=address, trust_env=False) as stranger:
                assert stranger.get("/v1/models").status_code == 401


ROWS = re.findall(r"^\| `ahn-mlx (estimate [^`]+)` \|(.+)\|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("command", "numbers"), ROWS, ids=[c for c, _ in ROWS])
def test_rows_of_a_machine_are_what_the_command_beside_them_prints(command, numbers):
    done = CliRunner().invoke(estimate, [*command.split()[1:], "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)["ahn"]["rows"]
    assert [f"{n:,}" for n in rows.values()] == numbers.replace(" ", "").split("|")
    assert list(rows) == ["16", "32", "64", "128", "512"]
    assert "| command | 16 GB | 32 GB | 64 GB | 128 GB | 512 GB |" in TEXT


def test_what_a_rank_sends_is_what_the_commands_print():
    for block in re.findall(r"\$ ahn-mlx (estimate .*--ranks.*)\n((?:    .*\n)+)", TEXT):
        printed = CliRunner().invoke(estimate, block[0].split()[1:]).output
        lines = [line.strip() for line in block[1].splitlines() if line.strip() != "..."]
        assert lines and all(line in printed for line in lines)
    pipelined = CliRunner().invoke(estimate, ["ahn-gdn-14b", "--ranks", "2", "--pipeline"]).output
    assert "sends in a ring" in pipelined and "10.248" in pipelined
