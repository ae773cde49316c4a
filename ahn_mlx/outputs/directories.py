"""A model directory on its way out: it is written beside its final name and takes it
when complete, and nothing but a model is ever replaced."""

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AHNError
from .files import check_named, check_writable, real_path, same_file, sync
from .parts import new_part

# A training has more, and so has a directory where someone keeps notes.
MODEL_FILES = re.compile(
    r"(model[\w.-]*|unused)\.safetensors|model\.safetensors\.index\.json"
    r"|(config|generation_config|chat_template|special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer(_config)?\.json|tokenizer\.model|(vocab|merges)\.txt|chat_template\.jinja"
    r"|ahn_model\.py|README\.md|LICENSE[\w.]*|\.gitattributes|\.DS_Store"
    r"|(model|plain)\.mlxfn|weights\.safetensors|tokenizer\.bin|manifest\.json"  # for apps
)


def check_out(out: Path, inputs: list[Path], force: bool) -> Path:
    """The real path of `out`, if writing there harms nothing that is not to be replaced."""
    check_named(out)
    real = real_path(out)
    for path in inputs:
        given = real_path(path)
        if _lies_in(real, given) or _lies_in(given, real):
            raise AHNError(f"{out}: --out overlaps the input {path}; choose another directory")
    check_kind(out)
    in_use = real.is_dir() and any(real.iterdir())
    if in_use and not force:
        raise AHNError(f"{out}: the directory is not empty; --force replaces a model in it")
    if in_use and not _is_model_dir(real):
        raise AHNError(f"{out}: holds something other than a model, which --force does not replace")
    check_writable(nearest(real.parent))  # where it is made, to be renamed
    return real


def check_kind(out: Path) -> None:
    """Raise AHNError if `out` is there and no directory."""
    for path in (out, real_path(out)):
        if os.path.lexists(path) and not path.is_dir():
            kind = "a file" if path.is_file() else "not a directory"
            raise AHNError(f"{out}: is {kind}; choose a directory")


def nearest(path: Path) -> Path:
    """The path itself, or what is there of those above it."""
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def _lies_in(path: Path, directory: Path) -> bool:
    """Also where a file system does not tell spellings apart."""
    return path.is_relative_to(directory) or any(
        same_file(p, directory) for p in (path, *path.parents)
    )


def _is_model_dir(path: Path) -> bool:
    """Nothing but what a model directory has: --force must not delete anything else."""
    config, weights = path / "config.json", any(path.glob("model*.safetensors"))
    known = all(f.is_file() and MODEL_FILES.fullmatch(f.name) for f in path.iterdir())
    for_apps = (path / "manifest.json").is_file() and (path / "model.mlxfn").is_file()
    return known and (for_apps or (config.is_file() and weights))


@contextmanager
def reporting(out: Path, inputs: list[Path]) -> Iterator[None]:
    """An OSError in here becomes one line on the file that it is about."""
    try:
        yield
    except OSError as e:
        # Writing reports no file name, or one in the directory that is gone by now.
        file = Path(e.filename or out)
        where = file if any(file.is_relative_to(p) for p in inputs) else out
        raise AHNError(f"{where}: {e.strerror or e}; nothing was written") from None


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new directory beside `out` that takes its name at the end, or vanishes."""
    created = [p for p in out.parents if not p.exists()]  # innermost first
    directory: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_part(out, Path.mkdir) as directory:
            yield directory
            for file in directory.iterdir():
                sync(file)
            if force and out.exists() and _is_model_dir(out):
                _swap(directory, out)
            else:
                directory.rename(out)  # works where nothing or an empty directory is
    except BaseException:  # Ctrl-C too
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        for path in created:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def _swap(directory: Path, out: Path) -> None:
    """Put `directory` in the place of `out`, or leave `out` as it was."""
    if not _exchange(directory, out):
        new, directory = directory, out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
        out.rename(directory)
        try:
            new.rename(out)
        except BaseException:
            directory.rename(out)
            raise
    shutil.rmtree(directory, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two directories change their names in one step, if the system has one and the disk
    knows it: of two steps a kill may come between."""
    libc = ctypes.CDLL(None)
    swap, here = 2, -100  # RENAME_SWAP of macOS, RENAME_EXCHANGE of Linux; AT_FDCWD
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "darwin":
        return bool(libc.renamex_np(*names, swap) == 0)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(here, names[0], here, names[1], swap) == 0)
    return False
