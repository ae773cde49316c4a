"""A model directory on its way out: it is written beside its final name and takes it
when complete, and nothing but a model is ever replaced."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AHNError


def check_out(out: Path, inputs: list[Path], force: bool) -> Path:
    """The real path of `out`, if writing there harms nothing that is not to be replaced."""
    real = Path(os.path.realpath(out))
    for path in inputs:
        given = Path(os.path.realpath(path))
        if real.is_relative_to(given) or given.is_relative_to(real):
            raise AHNError(f"{out}: --out overlaps the input {path}; choose another directory")
    if not os.path.lexists(real):
        return real
    if not real.is_dir():
        raise AHNError(f"{out}: is a file; choose a directory")
    if any(real.iterdir()) and not force:
        raise AHNError(f"{out}: the directory is not empty; --force replaces a model in it")
    if any(real.iterdir()) and not _is_model_dir(real):
        raise AHNError(f"{out}: holds something other than a model, which --force does not replace")
    return real


def _is_model_dir(path: Path) -> bool:
    """Nothing but what a model directory has: --force must not delete anything else."""
    config, weights = path / "config.json", any(path.glob("model*.safetensors"))
    return config.is_file() and weights and all(f.is_file() for f in path.iterdir())


@contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A new directory beside `out` that takes its name at the end, or vanishes."""
    created = [p for p in out.parents if not p.exists()]  # innermost first
    directory = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        directory.mkdir(parents=True)
        yield directory
        if force and out.exists() and _is_model_dir(out):
            _swap(directory, out)
        else:
            directory.rename(out)  # works where nothing or an empty directory is
    except BaseException:  # Ctrl-C too
        shutil.rmtree(directory, ignore_errors=True)
        for path in created:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
        raise


def _swap(directory: Path, out: Path) -> None:
    """Put `directory` in the place of `out`, or leave `out` as it was."""
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    out.rename(old)
    try:
        directory.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
