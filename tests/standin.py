"""A stand-in for the hub on loopback: serves directories under real repository names to the
real huggingface-hub client, remembers what was asked, and fails as told."""

import base64
import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class StandIn:
    """repos: repository -> file -> content.

    token: what every request must bring, if anything. gated: repositories that need consent.
    cut: file -> bytes after which the connection breaks, once. altered: files with one byte
    wrong. stop: file -> bytes after which nothing more comes, though the connection stays.
    drip: seconds between two bytes of weights. mute: nothing is answered, to any request. busy: so
    many requests are answered 503 first. portal: a page of HTML is the answer to everything;
    pages: to requests for these files. sizes: what is listed instead of a file's size.
    asked: (method, path, Range header) of all requests. stored: large files that were
    uploaded, by checksum. old: what a commit had, while it lasted. private: whether a repository
    was made so. breaks: the connection breaks in the middle of the answer to that request from
    now on, the first being 1.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.token = ""
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.altered: set[str] = set()
        self.stop: dict[str, int] = {}
        self.drip = 0.0
        self.mute = False
        self.busy = 0
        self.portal = False
        self.pages: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.closing = threading.Event()
        self.asked: list[tuple[str, str, str]] = []
        self.stored: dict[str, bytes] = {}
        self.old: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.breaks = 0
        self.hold = threading.Event()  # downloads of weights wait for it
        self.hold.set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.hold.set()
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, *directories: Path, **files: bytes) -> str:
        """Serve the files of directories; returns the commit."""
        content = {f.name: f.read_bytes() for d in directories for f in sorted(d.iterdir())}
        self.repos[repo] = {**content, **{k.replace("__", "."): v for k, v in files.items()}}
        commit = self.commit(repo)
        self.old[commit] = dict(self.repos[repo])
        return commit

    def commit(self, repo: str) -> str:
        names = sorted((name, git_sha1(data)) for name, data in self.repos[repo].items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def downloads(self, end: str = "") -> list[tuple[str, str, str]]:
        """The GET requests for files whose path ends so."""
        return [
            a for a in self.asked if a[0] == "GET" and "/resolve/" in a[1] and a[1].endswith(end)
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # who asked has left
            super().handle()

    def parse_request(self) -> bool:
        whole = super().parse_request()
        self.hub.breaks -= 1
        if self.hub.breaks == 0:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
            self.close_connection = True
            return False
        return whole

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_CONNECT(self) -> None:
        self._send(407, b"")

    def do_PUT(self) -> None:
        self.hub.stored[self.path.rsplit("/", 1)[1]] = self._body()
        self._send(200, b"")

    def do_POST(self) -> None:
        body = self._body()
        self.path = urlsplit(self.path).path
        self.hub.asked.append(("POST", self.path, ""))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._fail(401, "RepoNotFound")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.hub.repos else 200
            if status == 200:
                self.hub.repos[repo] = {}
                # As its clients before 1.0 say it, and as later ones do.
                private = asked.get("private") or asked.get("visibility") == "private"
                self.hub.private[repo] = bool(private)
            return self._send(status, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode())
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            modes = [{"path": f, "uploadMode": modes[f.endswith(LFS)]} for f in files]
            return self._json({"files": [{**m, "shouldIgnore": False} for m in modes]})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._upload_to(o) for o in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if self.path.endswith("/commit/main"):
            return self._commit(body)
        self._fail(404, "EntryNotFound")

    def _upload_to(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.hub.url}/store/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, body: bytes) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.stored[value["oid"]]
        commit = self.hub.commit(repo)
        page = f"{self.hub.url}/{repo}/commit/{commit}"
        self._json({"commitUrl": page, "commitOid": commit, "commitMessage": ""})

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("who sent it has left")
        return body

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range") or ""))
        if self.hub.mute:
            self.hub.closing.wait()
            self.close_connection = True
            return None
        if self.hub.portal:
            return self._send(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        if self.hub.busy:
            self.hub.busy -= 1
            return self._send(503, b"")
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._fail(401, "RepoNotFound")
        parts = path.strip("/").split("/")
        if parts[0] == "datasets":  # files of a dataset; a model's have no such word
            parts = parts[1:]
        api = parts[:2] in (["api", "models"], ["api", "datasets"])
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.hub.repos:
            return self._fail(404, "RepoNotFound")
        if repo in self.hub.gated:
            return self._fail(403, "GatedRepo")
        commit = self.hub.commit(repo)
        if api and len(parts) == 4:
            private = self.hub.private.get(repo, False)
            return self._json({"id": repo, "sha": commit, "siblings": [], "private": private})
        revision = parts[5] if api else parts[3]
        files = self.hub.repos[repo]
        if revision not in ("main", commit):
            if revision not in self.hub.old:
                return self._fail(404, "RevisionNotFound")
            files, commit = self.hub.old[revision], revision
        if api and parts[4] == "revision":
            return self._json({"id": repo, "sha": commit, "siblings": []})
        if api:
            return self._json([self._entry(*item) for item in files.items()])
        self._file(files, "/".join(parts[4:]), commit)

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
        if name.endswith(LFS):
            oid = hashlib.sha256(data).hexdigest()
            # What git has of it is a pointer.
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"
            )
            entry["oid"] = git_sha1(pointer.encode())
            size = self.hub.sizes.get(name, len(data))
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": len(pointer)}
        return entry

    def _file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        data = files.get(name)
        if data is None:
            return self._fail(404, "EntryNotFound")
        lfs = name.endswith(LFS)
        etag = hashlib.sha256(data).hexdigest() if lfs else git_sha1(data)
        if name in self.hub.pages and self.command == "GET":
            return self._send(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        if name in self.hub.altered:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if span := self.headers.get("Range"):
            start = int(span.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if span else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if lfs:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if lfs:
            self.hub.hold.wait()
        if name in self.hub.cut:
            self.wfile.write(data[start : start + self.hub.cut.pop(name)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if name in self.hub.stop:
            self.wfile.write(data[start : self.hub.stop[name]])
            self.wfile.flush()
            self.hub.closing.wait()
        while lfs and self.hub.drip and start < len(data) and not self.hub.closing.is_set():
            self.wfile.write(data[start : start + 1])
            start += 1
            time.sleep(self.hub.drip)
        self.wfile.write(data[start:])

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode())

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
