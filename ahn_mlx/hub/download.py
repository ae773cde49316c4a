"""Models of the hub on this machine: downloaded by huggingface-hub, converted once, and
kept in the user's cache directory, one directory per model and quantization.

A directory is complete or not there. Whoever makes one holds its lock.
"""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import (
    HfApi,
    errors,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
)

from ..checkpoints import card
from ..checkpoints.baseconfig import read_config
from ..checkpoints.directory import check_member, unreplaced
from ..checkpoints.formats import describe
from ..errors import AHNError
from ..model.config import AHNConfig
from ..outputs.parts import clear_part, clear_parts, part_of, parts_in
from .disk import model_dir, variants
from .fetch import explain, fetch_weights, listening, persist
from .published import CONVERTED, DEFAULT_Q_BITS, MODELS, Published, models_dir

# What a checkpoint is made of; code is not.
SMALL = ["*.json", "*.txt", "*.jinja", "tokenizer.model", "README.md"]
WEIGHTS = "*.safetensors"
PICKLES = "*.bin"


def find(name_or_path: str) -> Path:
    """A directory as it is, or what `resolve` has for a name."""
    path = Path(name_or_path)
    return path if os.path.isdir(path) else resolve(name_or_path)


def resolve(name: str, q_bits: int | None = None) -> Path:
    """The model's directory, made on first use; afterwards the hub is not asked again.

    q_bits: 0, 4 (the default) or 8 bits for the base of a name; a repository is as it is.
    """
    directory = model_dir(name, _check_q_bits(name, q_bits))
    return directory if directory.is_dir() else _make(name, directory, q_bits)


def pull(
    name: str,
    q_bits: int | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> Path:
    """As resolve, but as the hub has it now, or at these revisions (branch, tag or commit).

    revision: of the AHN parameters, or of a repository ORG/NAME. base_revision: of the base.
    Raises AHNError, and then what was there stays.
    """
    directory = model_dir(name, _check_q_bits(name, q_bits))
    if base_revision is not None and name not in MODELS:
        raise AHNError(f"--base-revision: {name} is one repository; use --revision")
    return _make(name, directory, q_bits, revision, base_revision, update=True)


def remove(name: str) -> list[Path]:
    """Delete what was made for a name, in all quantizations. The downloads it was made
    from belong to huggingface-hub and stay. Returns the directories that are gone."""
    gone = variants(name)
    for left in parts_in(models_dir()):  # by a deletion that was killed, or anything else
        clear_part(left)
    if not gone:
        raise AHNError(f"{name}: not on this machine; see ahn-mlx models")
    for directory in gone:
        with _locked(directory):
            if os.path.lexists(directory):
                left = part_of(directory)
                directory.rename(left)  # a model is whole or not there
                left.unlink() if left.is_symlink() else shutil.rmtree(left)
    return gone


def upload(directory: Path, repo: str, private: bool = False) -> str:
    """Put a model directory on the hub, its card with the new name; returns the page.

    Files that are there already are not sent again. Raises AHNError, also without a token.
    """
    config, _ = describe(directory)
    if "ahn" not in config:
        raise AHNError(f"{directory}: not a converted model; see ahn-mlx convert")
    for file in sorted(directory.iterdir()):
        if not file.name.startswith("."):
            check_member(file)  # a link may lead to what is not for others
    text = card.card(directory, repo, card.read_origins(directory))
    try:
        api = HfApi()
        page = api.create_repo(repo, private=private, exist_ok=True)
        # One that was there already may be public, and would get what was to be private.
        if private and not api.model_info(repo).private:
            raise AHNError(
                f"--private has no effect on {repo}: it is there already; see its settings on"
                " its page, and drop --private"
            )
        with unreplaced(directory):
            api.upload_folder(
                repo_id=repo, folder_path=directory, ignore_patterns=[card.CARD, ".*"]
            )
        api.upload_file(repo_id=repo, path_in_repo=card.CARD, path_or_fileobj=text.encode())
    except AHNError:
        raise
    except (errors.HTTPError, OSError, ValueError) as e:
        raise AHNError(f"{repo}: {explain(e)}") from None
    return str(page)


def _check_q_bits(name: str, q_bits: int | None) -> int:
    if q_bits is not None and name not in MODELS:
        raise AHNError(f"--q-bits has no effect on {name}: {CONVERTED}")
    return DEFAULT_Q_BITS if q_bits is None else q_bits


def _make(
    name: str,
    directory: Path,
    q_bits: int | None,
    revision: str | None = None,
    base_revision: str | None = None,
    update: bool = False,
) -> Path:
    with _locked(directory):
        if directory.is_dir() and not update:
            return directory  # another process has just made it
        clear_parts(directory)
        repos = [MODELS[name].repo, MODELS[name].base.repo] if name in MODELS else [name]
        _say(f"fetching {' and '.join(repos)}")
        if name not in MODELS:
            _link(download(name, revision), directory)
            return directory
        entry = MODELS[name]
        ahn = download(entry.repo, revision)
        _check_memory(entry, ahn)
        base = download(entry.base.repo, base_revision)
        made_from = [origin.revision for origin in card.read_origins(directory)]
        if made_from != [base.name, ahn.name]:
            bits = DEFAULT_Q_BITS if q_bits is None else q_bits
            from ..checkpoints.convert import (
                convert,  # takes a second, which errors need not wait for
            )

            _say(f"{name}: converting, once, to {directory}")
            convert(base, ahn, directory, force=True, q_bits=bits, title=name)
        return directory


def _check_memory(entry: Published, ahn: Path) -> None:
    """See that the repository holds what its name says."""
    try:
        found = AHNConfig.from_dict(read_config(ahn)).memory
    except AHNError as e:
        raise AHNError(f"{entry.repo}: {e}") from None
    if found != entry.memory:
        raise AHNError(f"{entry.repo}: holds a {found} memory, not the {entry.memory} of its name")


def _link(snapshot: Path, directory: Path) -> None:
    """A converted repository is used where huggingface-hub keeps it."""
    new = part_of(directory)
    new.symlink_to(snapshot)
    new.replace(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Be the only process that changes this directory."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory.with_name(f".{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"{directory.name}: another process is at work on it; waiting")
            lock.acquire()
    except OSError as e:
        raise AHNError(
            f"{directory.parent}: {e.strerror or e}; free it or set XDG_CACHE_HOME"
        ) from None
    try:
        yield
    finally:
        lock.release()


def config_dir(repo: str) -> Path:
    """A directory with the config.json of a repository, and perhaps nothing else of it.

    Raises AHNError, saying what to do, if it cannot be had.
    """
    with _explained(repo), listening() as line:
        return Path(persist(line, lambda: hf_hub_download(repo, "config.json"))).parent


def download(repo: str, revision: str | None = None) -> Path:
    """A repository's snapshot in huggingface-hub's cache, checked against its checksums."""

    def fetch(patterns: list[str], commit: str | None = revision) -> Path:
        options: dict[str, Any] = {"revision": commit, "allow_patterns": patterns}
        return Path(persist(line, lambda: snapshot_download(repo, **options)))

    with _explained(repo, revision), listening() as line:
        path = fetch(SMALL)
        for weights in ([WEIGHTS], [WEIGHTS, PICKLES]):
            if not is_offline_mode():
                fetch_weights(line, repo, path, weights)
            fetch([*SMALL, *weights], path.name)
            if any(path.glob(WEIGHTS)):
                break
    _verify(repo, path)
    return path


@contextmanager
def _explained(repo: str, revision: str | None = None) -> Iterator[None]:
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as e:
        raise AHNError(f"{repo}: {explain(e, revision)}") from None


def _verify(repo: str, path: Path) -> None:
    """Compare every file with its checksum, and delete what differs: huggingface-hub compares
    sizes alone. It names what it stores by the checksum that the hub gave."""
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.is_symlink()):
        stored = file.parent / file.readlink()
        expected = stored.name
        with file.open("rb") as f:
            if re.fullmatch("[0-9a-f]{64}", expected):
                actual = hashlib.file_digest(f, "sha256").hexdigest()
            elif re.fullmatch("[0-9a-f]{40}", expected):  # as git does
                actual = _git_sha1(f.read())
            else:
                continue
        if actual != expected:
            for damaged in (file.resolve(), stored, file):
                damaged.unlink(missing_ok=True)
            name = file.relative_to(path)
            raise AHNError(f"{repo}: {name} arrived damaged and was deleted; run it again")


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
