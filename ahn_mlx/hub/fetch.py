"""Files from the hub over a network that may stall. huggingface-hub finds them and brings the
small ones; the weights are fetched here into its cache, because what has come of a file stays
there when it stops, and is gone on from. Silence is announced, and it has an end."""

import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from filelock import FileLock
from huggingface_hub import HfApi, constants, errors, get_session, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
)
from tqdm import tqdm

from ..errors import AHNError, show

SILENT = 20.0  # seconds without a byte after which it is said
GIVE_UP = 120.0  # and after which it ends
PAUSE = 1.0  # seconds before the first other attempt; doubles up to 8
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a hub that may give another one soon

LOGIN = "if this network wants a login, open a page in a browser first, then run it again"
AGAIN = "run the same command again, it goes on where this one stopped"

T = TypeVar("T")


class Line:
    """What comes from the hub, and what is said when nothing does. heard: when it last answered
    or sent a part of a file. came: when it last sent a part of a file."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.heard = self.came = time.monotonic()
        self._lock = threading.Lock()  # huggingface-hub asks from several threads
        self._said = 0.0

    def gets(self, size: int) -> None:
        """So many bytes of a file have come."""
        self.heard = self.came = time.monotonic()
        self.bar.update(size)

    def say(self, text: str) -> None:
        """One line on stderr, above the bar if there is one."""
        if self.bar is not None:
            self.bar.clear()
        print(text, file=sys.stderr, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def check(self) -> None:
        """Say that nothing comes, or raise AHNError if that has lasted too long."""
        with self._lock:
            silence = time.monotonic() - self.heard
            if silence >= GIVE_UP:
                raise AHNError(
                    f"nothing has come for {silence:.0f} s; check the network, then run the same"
                    " command again: it goes on where this one stops"
                )
            if silence >= SILENT and time.monotonic() - self._said >= SILENT:
                self._said = time.monotonic()
                self.say(
                    f"nothing has come from the hub for {silence:.0f} s; trying until"
                    f" {GIVE_UP:.0f} s (Ctrl-C keeps what has come)"
                )

    def asks(self, request: httpx2.Request) -> None:
        """Before each request, huggingface-hub's too: it waits for ever for some answers."""
        if _line is not self:
            return
        self.check()
        limits = request.extensions.get("timeout", {})
        keys = ("connect", "read", "write", "pool")
        timeout = {k: min(limits.get(k) or SILENT, SILENT) for k in keys}
        request.extensions = {**request.extensions, "timeout": timeout}

    def answers(self, response: httpx2.Response) -> None:
        if _line is not self:
            return
        if response.status_code in BUSY:
            self.say(f"the hub answers {response.status_code}; trying again")
        elif self.bar is None:  # of weights the bytes count, not the beginning of an answer
            self.heard = time.monotonic()

    def attach(self) -> None:
        """Listen to huggingface-hub's client, which makes itself anew after some errors."""
        hooks = get_session().event_hooks
        if self.asks not in hooks["request"]:
            hooks["request"].append(self.asks)
            hooks["response"].append(self.answers)


_line: Line | None = None  # the one that is open


@contextmanager
def listening() -> Iterator[Line]:
    """While files are fetched: huggingface-hub's own bars and warnings are silent."""
    global _line
    logger = logging.getLogger("huggingface_hub")
    level, line, before = logger.level, Line(), _line
    logger.setLevel(logging.CRITICAL)
    disable_progress_bars()
    _line = line
    try:
        yield line
    finally:
        _line = before
        logger.setLevel(level)
        enable_progress_bars()


def persist(line: Line, act: Callable[[], T]) -> T:
    """Do it, again and again while the hub is busy, silent or breaks off. Raises what else it
    raises, and AHNError or that when no part of a file has come for too long."""
    begun, pause = time.monotonic(), PAUSE
    while True:
        try:
            line.attach()
            return act()
        except (httpx2.HTTPError, OSError) as e:
            trouble = _trouble(e)
            if line.came > begun:
                begun, pause = line.came, PAUSE
            if trouble is None:
                raise
            line.check()
            if time.monotonic() - begun >= GIVE_UP:
                raise
        if trouble:
            line.say(f"{trouble}; trying again")
        time.sleep(pause)
        pause = min(2 * pause, 8 * PAUSE)


class _Broken(OSError):
    """A connection that ended in the middle of a file, or could not be made again."""


def _trouble(error: BaseException | None) -> str | None:
    """What to say of an error that may not come again a little later; None of any other. Of
    silence and a busy hub it is said elsewhere."""
    for e in _causes(error):
        if isinstance(e, httpx2.TimeoutException) or status(e) in BUSY:
            return ""
        if isinstance(e, httpx2.RemoteProtocolError | httpx2.ReadError | _Broken):
            return "the connection broke"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def status(error: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, revision: str | None = None) -> str:
    """What a user can do about a failed request."""
    match error:
        case errors.GatedRepoError():
            return "needs your consent on its page and a token; then run hf auth login"
        case errors.RepositoryNotFoundError():
            return "no such repository, or it is private; check the name, or run hf auth login"
        case errors.RevisionNotFoundError():
            return f"has no revision {revision}; give a branch, a tag or a commit"
        case AHNError():
            return str(error)
    for e in _causes(error):
        match e:
            case errors.OfflineModeIsEnabled():
                return "is not in the cache and HF_HUB_OFFLINE is set; unset it to download"
            case httpx2.ProxyError():
                return f"the proxy refuses ({_short(e)}); check HTTPS_PROXY, or unset it"
            case httpx2.ConnectError() if "SSL" in str(e) or "certificate" in str(e).lower():
                return f"no safe connection ({_short(e)}); check the clock, or {LOGIN}"
            case json.JSONDecodeError() | errors.FileMetadataError():
                return f"what answers is not the hub; {LOGIN}"
            case httpx2.TimeoutException():
                return f"the hub does not answer; {AGAIN}"
            case errors.HfHubHTTPError():
                return f"the hub answers {status(e)}; try again later"
    match error:
        case errors.LocalEntryNotFoundError() | httpx2.ConnectError():
            return "is not in the cache and the hub cannot be reached; check the network"
        case errors.HTTPError() | _Broken():
            return f"the connection broke ({_short(error)}); {AGAIN}"
        case OSError(strerror=str() as reason):
            return f"cannot be stored: {reason}; free some space, or set HF_HOME to another disk"
        case _:
            return _short(error)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def fetch_weights(line: Line, repo: str, snapshot: Path, patterns: list[str]) -> None:
    """Bring the large files of a snapshot into huggingface-hub's cache, where it finds them.

    Raises AHNError if the disk has no room for them or the network ends for good.
    """
    cache = snapshot.parent.parent
    blobs = _missing(line, repo, snapshot, patterns)
    if not blobs:
        return
    (cache / "blobs").mkdir(exist_ok=True)
    parts = {sha: cache / "blobs" / f"{sha}.ahn-mlx.incomplete" for sha in blobs}
    have = sum(_size(part) for part in parts.values())
    total = sum(size for _, size in blobs.values())
    free = shutil.disk_usage(cache).free
    if total - have > free:
        raise AHNError(
            f"needs {(total - have) / 1e9:.2f} GB in {constants.HF_HUB_CACHE}, where"
            f" {free / 1e9:.2f} GB are free; free some, or set HF_HOME to another disk"
        )
    if have:
        line.say(f"{repo}: going on after {have / 1e6:,.0f} of {total / 1e6:,.0f} MB")
    with _bar(line, repo, total, have):
        for sha, (path, size) in blobs.items():
            url = hf_hub_url(repo, path, revision=snapshot.name)
            locks = cache.parent / ".locks" / cache.name  # huggingface-hub's own
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / f"{sha}.lock"):
                if not (cache / "blobs" / sha).exists():
                    _fetch(line, url, parts[sha], size)
                    parts[sha].replace(cache / "blobs" / sha)


def _missing(
    line: Line, repo: str, snapshot: Path, patterns: list[str]
) -> dict[str, tuple[str, int]]:
    """Path and size of each large file that has not come, by its checksum."""
    api, blobs = HfApi(), snapshot.parent.parent / "blobs"
    found = persist(
        line, lambda: list(api.list_repo_tree(repo, revision=snapshot.name, recursive=True))
    )
    return {
        e.lfs.sha256: (e.path, e.lfs.size)
        for e in found
        if isinstance(e, RepoFile)
        and e.lfs
        and e.lfs.size > 0
        and re.fullmatch("[0-9a-f]{64}", e.lfs.sha256)  # it becomes a name
        and any(fnmatch(e.path, p) for p in patterns)
        and not (blobs / e.lfs.sha256).exists()
    }


@contextmanager
def _bar(line: Line, what: str, total: int, done: int) -> Iterator[None]:
    line.bar = tqdm(
        total=total,
        initial=done,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
        dynamic_ncols=True,
    )
    try:
        yield
    finally:
        line.bar.close()
        line.bar = None


def _fetch(line: Line, url: str, part: Path, size: int) -> None:
    """One file, from where its part ends. The part stays when this stops."""
    connected = False

    def more() -> None:
        nonlocal connected
        have = _size(part)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with get_session().stream("GET", url, headers=headers) as response:
                connected = True
                hf_raise_for_status(response)
                begin = _begin(response, have, size)
                line.bar.update(begin - have)
                with part.open("r+b" if begin else "wb") as file:
                    file.seek(begin)
                    for chunk in response.iter_raw():
                        file.write(chunk)
                        line.gets(len(chunk))
                        if file.tell() > size:
                            raise AHNError(f"the hub sends more than the {size:,} bytes it lists")
        except httpx2.ConnectError as e:
            # A network that was there may come back; one that never was does not.
            if not connected and not have:
                raise
            raise _Broken(str(e)) from None
        if _size(part) < size:
            raise _Broken("the connection ended early")

    if _size(part) > size:
        part.unlink()
    while _size(part) < size:
        persist(line, more)


def _begin(response: httpx2.Response, have: int, size: int) -> int:
    """Where in the file the body begins. Raises AHNError if it is not that file."""
    begin = have if response.status_code == 206 else 0
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and begin + int(length) != size:
        kind = response.headers.get("Content-Type", "").split(";")[0]
        raise AHNError(
            f"{response.url.host} sends {int(length):,} bytes of {show(kind)} for a file of"
            f" {size:,}; {LOGIN}"
        )
    return begin


def _size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return 0
