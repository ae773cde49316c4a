"""Data of others, as data: files of dataset repositories at a revision, and single texts whose
check sum is known. Nothing of them is executed."""

import hashlib
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, hf_hub_download

from ..errors import AHNError
from ..outputs.files import replacing
from .fetch import explain
from .published import models_dir

LONGEST = 1 << 20  # bytes of a text that is fetched by its check sum


def dataset_revision(repo: str, revision: str | None = None) -> str:
    """The commit that a branch or tag of a dataset is now. Raises AHNError if it cannot be had."""
    try:
        found: Any = HfApi().dataset_info(repo, revision=revision, timeout=30).sha
        return str(found)
    except (errors.HTTPError, OSError, ValueError) as e:
        raise AHNError(f"{repo}: {explain(e, revision)}; or give --data") from None


def dataset_file(repo: str, name: str, revision: str) -> Path:
    """A file of a dataset at a commit, in huggingface-hub's cache. Raises AHNError, and then
    what has come is kept and used by the next try."""
    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
    except (errors.HTTPError, OSError, ValueError) as e:
        raise AHNError(f"{repo} {name}: {explain(e, revision)}; or give --data") from None


def checked_text(url: str, sha256: str) -> str:
    """A small text from the network, kept in the user's cache directory. sha256: how its
    check sum begins. Raises AHNError if it cannot be had or is another."""
    kept = models_dir().parent / "texts" / sha256
    if kept.is_file() and _is(data := kept.read_bytes(), sha256):
        return data.decode()
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(LONGEST)
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as e:
        reason = getattr(e, "reason", e)
        raise AHNError(f"{url}: cannot be fetched ({reason}); check the network") from None
    if not _is(data, sha256):
        raise AHNError(f"{url}: is not the text with check sum {sha256}; it was changed")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as part:
        part.write_bytes(data)
    return data.decode()


def _is(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest().startswith(sha256)
