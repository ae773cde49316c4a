"""A model that is deleted, or replaced by another, while it is read: nothing is made of two halves,
and nothing of a directory that is gone."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import (
    GDN,
    TRAINING,
    byte_tokenizer,
    make_base,
    memory_of,
    talking_model,
)
from click.testing import CliRunner
from transformers import AutoTokenizer

import ahn_mlx
from ahn_mlx import AHNError
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.export import export_pytorch
from ahn_mlx.checkpoints.load import load
from ahn_mlx.cli import cli
from ahn_mlx.train.output import load_base

Deed = Callable[[Path], object]


def gone(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def another(path: Path) -> None:
    gone(path)
    shutil.copytree(path.with_name("elsewhere"), path)


def removed_and_made_anew(path: Path) -> None:
    """The new one may get the number of the old one's inode."""
    shutil.copytree(path, path.with_name("elsewhere"))
    shutil.rmtree(path)
    shutil.copytree(path.with_name("elsewhere"), path)


def first(deed: Deed, path: Path, act: Callable[..., Any]) -> Callable[..., Any]:
    """A call that finds the deed done, the first time."""
    left = [deed]

    def call(*args: Any, **options: Any) -> Any:
        while left:
            left.pop()(path)
        return act(*args, **options)

    return call


@pytest.mark.parametrize("deed", [gone, another, removed_and_made_anew])
def test_while_a_model_is_loaded(deed, tmp_path, monkeypatch):
    model = talking_model(GDN.name, tmp_path)
    slow = first(deed, model, AutoTokenizer.from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", slow)
    with pytest.raises(AHNError, match=r"model: deleted or replaced while it was read; try again"):
        ahn_mlx.load(model)
    if deed is not gone:
        ahn_mlx.load(model)


@pytest.mark.parametrize("deed", [gone, another])
def test_while_its_tensors_are_read(deed, tmp_path, monkeypatch):
    model = talking_model(GDN.name, tmp_path)
    monkeypatch.setattr(mx, "load", first(deed, model, mx.load))
    with pytest.raises(AHNError, match=r"model: deleted or replaced while it was read; try again"):
        ahn_mlx.load_model(model)


@pytest.mark.parametrize("deed", [gone, another])
def test_while_a_base_is_loaded(deed, tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    slow = first(deed, base, AutoTokenizer.from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", slow)
    with pytest.raises(AHNError, match=r"base: deleted or replaced while it was read"):
        load_base({**TRAINING, "base": str(base)})


@pytest.mark.parametrize("deed", [gone, another])
def test_while_a_memory_is_put_into_its_base(deed, tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    slow = first(deed, memory, AutoTokenizer.from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", slow)
    with pytest.raises(AHNError, match=r"memory: deleted or replaced while it was read"):
        ahn_mlx.load(base, ahn=memory)


def test_while_its_files_are_deleted_one_after_the_other(tmp_path, monkeypatch):
    """transformers makes up a tokenizer without a word."""
    model = talking_model(GDN.name, tmp_path)
    slow = first(lambda p: (p / "tokenizer.json").unlink(), model, AutoTokenizer.from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", slow)
    with pytest.raises(AHNError, match=r"model: no usable tokenizer"):
        ahn_mlx.load(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_while_one_of_its_files_is_opened(name, tmp_path, monkeypatch):
    base, whole = make_base(tmp_path / "base"), io.open

    def slow(file, *args, **options):
        if Path(str(file)).name == name:
            os.unlink(file)
        return whole(file, *args, **options)

    monkeypatch.setattr(io, "open", slow)
    with pytest.raises(AHNError, match=rf"base/{name}: deleted while it was read; try again"):
        load_base({**TRAINING, "base": str(base)})


@pytest.mark.parametrize("deed", [gone, another])
@pytest.mark.parametrize("part", ["base", "memory"])
def test_while_it_is_converted(part, deed, tmp_path, monkeypatch):
    """The model that was at the target stays."""
    both = (byte_tokenizer(tmp_path / "base"), tmp_path / "memory")
    for path, source in zip(both, ("base", "ahn_only"), strict=True):
        shutil.copytree(GDN / source, path, dirs_exist_ok=True)
    convert(*both, tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino
    monkeypatch.setattr(shutil, "copyfile", first(deed, tmp_path / part, shutil.copyfile))
    with pytest.raises(AHNError, match=rf"{part}: deleted or replaced while it was read"):
        convert(*both, tmp_path / "out", force=True)
    assert (tmp_path / "out").stat().st_ino == before
    assert {p.name for p in tmp_path.iterdir()} <= {"base", "memory", "out", "elsewhere"}


@pytest.mark.parametrize("deed", [gone, another])
def test_while_it_is_exported(deed, tmp_path, monkeypatch):
    model = talking_model(GDN.name, tmp_path)
    monkeypatch.setattr(shutil, "copyfile", first(deed, model, shutil.copyfile))
    with pytest.raises(AHNError, match=r"model: deleted or replaced while it was read"):
        export_pytorch(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a\0b", "pipe", "nothing"])
def test_what_is_no_model_is_told_as_before(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AHNError) as caught:
        load(tmp_path / name)
    assert "replaced" not in str(caught.value)


def test_what_fails_by_itself_is_told_as_before(tmp_path):
    with pytest.raises(AHNError, match=r"nothing: does not exist"):
        ahn_mlx.load(make_base(tmp_path / "base"), ahn=tmp_path / "nothing")


def test_a_text_that_the_tokenizer_knows_nothing_of(tmp_path):
    """No token is made of it; mlx-lm has nothing to begin with."""
    model = talking_model(GDN.name, tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["o"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("generate", "--model", str(model), "--ignore-chat-template", "--max-tokens", "1")
    assert CliRunner().invoke(cli, [*words, "-p", "hood"]).exit_code == 0
    run = CliRunner().invoke(cli, [*words, "-p", "ooo"])
    assert isinstance(run.exception, AHNError)
    assert "the tokenizer makes no token of the prompt" in str(run.exception)
