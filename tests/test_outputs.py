"""No command replaces a file that it did not make, or that it reads, and it says so first."""

import ctypes
import fcntl
import os
import resource
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import click
import mlx.core as mx
import pytest
from checkpoints import GDN, same, talking_model
from click.testing import CliRunner

from ahn_mlx import AHNError, Session, load
from ahn_mlx.checkpoints.directory import load_safetensors
from ahn_mlx.cli import cli
from ahn_mlx.outputs import directories, files, parts, pictures
from ahn_mlx.outputs.files import OutFile, check_writable
from ahn_mlx.outputs.parts import clear_parts, new_part, parts_of, share, working_on
from ahn_mlx.reading import memoryfile

TEXT = "It is a far, far better thing that I do, than I have ever done. "


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with a model, a text, and a memory of it."""
    place = tmp_path_factory.mktemp("made")
    (place / "book.txt").write_text(TEXT * 8)
    path = talking_model("qwen2-gdn", place)
    session = Session(*load(path), origin={"name": str(path)})
    session.step = 16
    session.read(TEXT * 8)
    session.save(place / "book.ahn")
    return place


@pytest.fixture
def place(made, tmp_path) -> Path:
    """The same, to be damaged."""
    for name in ("book.txt", "book.ahn"):
        shutil.copy(made / name, tmp_path)
    shutil.copytree(made / "model", tmp_path / "model")
    return tmp_path


def run(*args: object, said: str = "") -> str:
    done = CliRunner().invoke(cli, list(map(str, args)), input=said, catch_exceptions=False)
    return done.output


def refuse(*args: object) -> str:
    """The command fails with one line and leaves nothing behind."""
    with pytest.raises((AHNError, click.UsageError)) as error:
        run(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(place: Path) -> dict[Path, bytes | None]:
    files = sorted(place.rglob("*"))
    return {f: f.read_bytes() if f.is_file() else None for f in files}


# Name -> arguments before the path that is written; {} is the place. None of them has a model
# to load, so what is refused is refused before that.
FILES: dict[str, list[str]] = {
    "digest": ["digest", "--model", "no/such", "--prompt-file", "{}/book.txt", "-o"],
    "inspect": ["inspect", "--model", "no/such", "--memory", "{}/book.ahn", "-o"],
    "compare": ["compare", "--model", "no/such", "--text", "{}/book.txt", "--out"],
    "estimate": ["estimate", "--out"],
}
ENDS = {"digest": ".ahn", "inspect": ".html", "compare": ".png", "estimate": ".png"}
FORCED = ("inspect", "compare", "estimate")

# The same for directories.
DIRECTORIES: dict[str, list[str]] = {
    "convert": ["convert", "--base", str(GDN / "base"), "--ahn", str(GDN / "ahn_only"), "--out"],
    "export": ["export-pytorch", "--model", str(GDN / "merged"), "--out"],
    "train": ["train", "--model", "no/such", "--data", "{}/book.txt", "--out"],
}


def arguments(name: str, place: Path) -> list[str]:
    return [a.format(place) for a in {**FILES, **DIRECTORIES}[name]]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_stays(place, name):
    out = place / f"precious{ENDS[name]}"
    out.write_text("precious")
    before = contents(place)
    assert str(out) in refuse(*arguments(name, place), out)
    assert contents(place) == before


@pytest.mark.parametrize("name", ["inspect", "compare", "estimate"])
def test_what_another_command_made_stays(place, name):
    out = place / f"picture{ENDS[name]}"
    shutil.copy(place / "book.ahn", out)
    assert "choose another name, or --force" in refuse(*arguments(name, place), out)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "kind", ["itself", "link", "hard link", "spelling", "through nothing", "link to a part"]
)
@pytest.mark.parametrize("name", FORCED)
def test_what_is_read_stays(place, name, kind, forced):
    """Even with --force, and by whatever name."""
    end, model = ENDS[name], place / "model"
    read = place / f"book{end}"
    if name in ("inspect", "compare"):
        (place / ("book.ahn" if name == "inspect" else "book.txt")).rename(read)
    if name == "estimate":
        read = model / f"drawn{end}"
        read.write_text("a file of the model")
    given = {
        "inspect": ["inspect", "--memory", read, "--model", model, "-o"],
        "compare": ["compare", "--text", read, "--model", model, "--out"],
        "estimate": ["estimate", "--model", model, "--out"],
    }[name]
    out = place / f"out{end}"
    if kind == "itself":
        out = read
    elif kind == "link":
        out.symlink_to(read)
    elif kind == "hard link":
        os.link(read, out)
    elif kind == "spelling":
        out = place / "model" / ".." / read.relative_to(place)
    elif kind == "through nothing":
        out = place / "absent" / ".." / read.relative_to(place)
    else:
        out.symlink_to(model / "model.safetensors")
    before = contents(place)
    assert "is what this command reads" in refuse(*given, out, *["--force"] * forced)
    assert contents(place) == before


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(place, name):
    end, command = ENDS[name], arguments(name, place)
    (place / f"directory{end}").mkdir()
    os.mkfifo(place / f"pipe{end}")
    (place / f"loop{end}").symlink_to(place / f"loop{end}")
    (place / f"null{end}").symlink_to(os.devnull)
    (place / f"dangling{end}").symlink_to(place / "absent" / "file")
    before = sorted(place.rglob("*"))
    assert "is a directory" in refuse(*command, place / f"directory{end}")
    assert "not a regular file" in refuse(*command, place / f"pipe{end}")
    assert "symbolic links" in refuse(*command, place / f"loop{end}")
    assert "not a regular file" in refuse(*command, place / f"null{end}")
    assert "absent: no such directory" in refuse(*command, place / f"dangling{end}")
    assert "absent: no such directory" in refuse(*command, place / "absent" / f"a{end}")
    assert "not a directory" in refuse(*command, place / "book.txt" / f"a{end}").lower()
    assert "too long" in refuse(*command, place / ("a" * 300 + end))
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", [*FILES, *DIRECTORIES])
def test_a_place_that_cannot_be_written_to(place, name):
    closed = place / "closed"
    closed.mkdir(0o555)
    if os.access(closed, os.W_OK):  # root may write everywhere but here
        closed = Path("/proc")
        if not closed.is_dir():
            pytest.skip("no place that root cannot write to")
    assert f"{closed}: cannot be written to" in refuse(
        *arguments(name, place), closed / f"out{ENDS.get(name, '')}"
    )


@pytest.mark.parametrize("name", FORCED)
def test_force_replaces_a_file_but_no_directory(place, name):
    end, command = ENDS[name], arguments(name, place)
    command = [a.replace("no/such", str(place / "model")) for a in command]
    command[-1:-1] = ["--segments", "1", "--seq-len", "40"] if name == "compare" else []
    out = place / f"out{end}"
    out.write_text("no longer wanted")
    out.chmod(0o444)
    run(*command, out, "--force")
    first = out.read_bytes()
    assert first.startswith(b"<!doctype html" if end == ".html" else b"\x89PNG")
    run(*command, out)  # its own is replaced without
    link = place / f"link{end}"
    link.symlink_to(out)
    run(*command, link)
    assert link.is_symlink() and out.read_bytes()[:8] == first[:8]
    (place / f"directory{end}").mkdir()
    assert "is a directory" in refuse(*command, place / f"directory{end}", "--force")
    out.chmod(0o444)
    assert "is read-only" in refuse(*command, out)
    assert not [f for f in place.iterdir() if ".part" in f.name]


@pytest.mark.parametrize("end", [".png", ".svg", ".pdf"])
def test_pictures_of_each_kind_are_known_again(tmp_path, end):
    out = tmp_path / f"costs{end}"
    for _ in range(2):
        run("estimate", "--out", out)
    assert [f.name for f in tmp_path.iterdir()] == [out.name]
    from matplotlib.figure import Figure

    Figure().savefig(out)
    assert "not a picture of ours" in refuse("estimate", "--out", out)


@pytest.mark.parametrize("name", ["costs", "costs.txt", "costs.html", ".png"])
def test_a_picture_has_a_name_that_says_which(tmp_path, name):
    """matplotlib would write costs.png for the first."""
    assert ".png, .svg, .pdf" in refuse("estimate", "--out", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_matplotlib_missing_or_failing(tmp_path, monkeypatch):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):  # needs LaTeX
        monkeypatch.setenv("PATH", "")
        assert "matplotlib cannot draw it" in refuse("estimate", "--out", tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refuse(
        *("compare", "--text", "absent.txt", "--out", tmp_path / "a.png")
    )
    assert not list(tmp_path.iterdir())


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """A limit on file size fails in a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", [*FORCED, "save", "digest", "export"])
def test_a_full_disk(place, name):
    model, out = place / "model", place / f"out{ENDS.get(name, '')}"
    command = (
        [a.replace("no/such", str(model)) for a in arguments(name, place)]
        if (name != "save")
        else ["chat", "--model", model]
    )
    if name == "compare":
        command[-1:-1] = ["--segments", "1", "--seq-len", "40"]
    before = contents(place)
    with small_files(2000):
        if name == "save":
            said = run(*command, said=f"/read {place}/book.txt\n/save {out}\n")
        else:
            said = refuse(*command, out)
    assert f"{out}" in said and "File too large" in said
    assert contents(place) == before


def test_what_appears_meanwhile_stays(tmp_path):
    file = tmp_path / "a.txt"
    out = OutFile(file, "a text of ours", lambda file: False)
    with pytest.raises(AHNError, match="is not a text of ours"), out.writing() as part:
        part.write_text("ours")
        file.write_text("theirs")
    assert file.read_text() == "theirs" and list(tmp_path.iterdir()) == [file]


def test_ctrl_c_leaves_nothing(tmp_path):
    out = OutFile(tmp_path / "a.txt", "a text of ours", lambda file: True)
    with pytest.raises(KeyboardInterrupt), out.writing() as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_have_left_vanishes_and_nothing_that_is_written_now(tmp_path):
    file = tmp_path / "a.txt"
    out = OutFile(file, "a text of ours", lambda file: True)
    left = tmp_path / ".a.txt.0123abcd.part"
    left.write_text("half")
    other = tmp_path / ".b.txt.0123abcd.part"
    other.write_text("of another")
    with out.writing() as first:
        assert not left.exists()
        first.write_text("first")
        with out.writing() as second:
            second.write_text("second")
            assert first.exists()
        assert file.read_text() == "second"
    assert file.read_text() == "first"
    assert sorted(tmp_path.iterdir()) == [other, file]


@pytest.mark.parametrize("atomic", [True, False])
def test_a_directory_is_replaced_and_nothing_is_left(tmp_path, monkeypatch, atomic):
    out = tmp_path / "model"
    if not atomic:
        monkeypatch.setattr(directories, "_exchange", lambda a, b: False)
    left = tmp_path / ".model.0123abcd.part"
    left.mkdir()
    (left / "half").touch()
    for n in range(2):
        with directories.replacing(out, force=True) as part:
            assert not left.exists()
            for name in ("config.json", "model.safetensors"):
                (part / name).write_text(str(n))
        assert (out / "config.json").read_text() == str(n)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_works_on_a_thing_at_a_time(tmp_path):
    for path in (tmp_path, tmp_path / "book.ahn"):
        with working_on(path), pytest.raises(AHNError, match="another process"), working_on(path):
            pass
        with working_on(path):
            assert len(list(tmp_path.iterdir())) == 1
        assert not list(tmp_path.iterdir())


def test_leftovers_are_told_from_other_files(tmp_path):
    ours = tmp_path / ".*.ahn.0123abcd.part"
    for file in (ours, tmp_path / ".other.ahn.0123abcd.part", tmp_path / ".*.ahn.mine.part"):
        file.touch()
    assert parts_of(tmp_path / "*.ahn") == [ours]


# --- memories ---


def digest(place: Path, *args: object) -> list[object]:
    model, text = place / "model", place / "book.txt"
    return ["digest", "--model", model, "--prompt-file", text, *args, "-o"]


def test_a_digest_replaces_nothing(place):
    (place / "new.ahn.partial").write_text("precious")
    assert "new.ahn.partial: is there and is not a memory" in refuse(
        *digest(place), place / "new.ahn"
    )
    assert "--append" in refuse(*digest(place), place / "book.ahn")
    assert "is a directory" in refuse(*digest(place), ".")
    shutil.copy(place / "book.txt", place / "text.ahn")
    assert "is not a memory" in refuse(*digest(place, "--append"), place / "text.ahn")
    assert (place / "new.ahn.partial").read_text() == "precious"


def test_a_digest_whose_name_is_taken_meanwhile_is_kept(place, monkeypatch):
    read = Session.read_ids

    def intrude(self, *args):
        read(self, *args)
        (place / "new.ahn").write_text("theirs")

    monkeypatch.setattr(Session, "read_ids", intrude)
    said = refuse(*digest(place), place / "new.ahn")
    assert "exists" in said and f"kept in {place}/new.ahn.partial" in said
    assert (place / "new.ahn").read_text() == "theirs"
    monkeypatch.undo()
    (place / "new.ahn").unlink()
    said = run(*digest(place), place / "new.ahn")
    assert "going on after" in said
    assert "sound" in run("memory", "verify", place / "new.ahn")
    assert not (place / "new.ahn.partial").exists()


def test_save_replaces_a_saved_conversation_alone(place):
    (place / "notes.txt").write_text("precious")
    (place / "empty").touch()
    (place / "link.ahn").symlink_to(place / "book.ahn")
    before = contents(place)
    chat = ["chat", "--memory", place / "book.ahn", "--model", place / "model", "--max-tokens", 1]
    names = ("notes.txt", "book.ahn", "link.ahn", "empty", "model", "absent/a", "model/config.json")
    said = run(*chat, said="Hi\n" + "".join(f"/save {place}/{name}\n" for name in names))
    assert said.count("error: ") == len(names) and "\nsaved " not in said
    assert contents(place) == before
    said = run(*chat, said=f"Hi\n/save {place}/talk.ahn\nSo?\n/save {place}/talk.ahn\n")
    assert "error: " not in said
    first = memoryfile.read_facts(place / "talk.ahn")["tokens"]
    chat[2] = place / "talk.ahn"
    said = run(*chat, said=f"And?\n/save {place}/talk.ahn\n")
    assert "error: " not in said
    assert memoryfile.read_facts(place / "talk.ahn")["tokens"] > first


# --- directories ---


@pytest.mark.parametrize("name", [*FILES, *DIRECTORIES])
def test_a_name_that_none_should_have(place, name):
    """Standard output's, and what MLX would not read again."""
    end, command = ENDS.get(name, ""), arguments(name, place)
    before = sorted(place.rglob("*"))
    assert "\\udcff" in refuse(*command, place / f"\udcff{end}")
    assert "not UTF-8" in refuse(*command, place / f"\udcff{end}")
    assert "standard output is not written to" in refuse(*command, "-")
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_what_mlx_would_not_open_says_what_to_do(tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.zeros(1)})
    (tmp_path / "a.safetensors").rename(tmp_path / "\udcff.safetensors")
    with pytest.raises(AHNError, match=r"\\udcff.safetensors: its path is not UTF-8.*rename it"):
        load_safetensors(tmp_path / "\udcff.safetensors")


@pytest.mark.parametrize("name", DIRECTORIES)
def test_what_is_no_directory_is_refused(place, name):
    command = arguments(name, place)
    os.mkfifo(place / "pipe")
    before = sorted(place.rglob("*"))
    assert "is a file" in refuse(*command, place / "book.txt")
    assert "not a directory" in refuse(*command, place / "pipe")
    assert "not a directory" in refuse(*command, place / "book.txt" / "out")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("file", ["README.md", "config.json", "model.safetensors", "notes.txt"])
@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_with_other_things_stays(place, name, file, forced):
    out = place / "out"
    out.mkdir()
    (out / file).write_text("precious")
    force = ["--force"] * forced if name != "train" else ["--resume"] * forced
    assert "not empty" in (said := refuse(*arguments(name, place), out, *force)) or forced, said
    assert [f.name for f in out.iterdir()] == [file]
    assert (out / file).read_text() == "precious"


@pytest.mark.parametrize("name", ["convert", "export"])
@pytest.mark.parametrize("file", ["thesis.txt", "training.safetensors", "data.json", "photos/"])
def test_force_deletes_nothing_but_a_model(place, name, file):
    out = place / "out"
    command = [*arguments(name, place), out]
    run(*command)
    if file.endswith("/"):
        (out / file).mkdir()
    else:
        (out / file).write_text("precious")
    before = contents(place)
    assert "something other than a model" in refuse(*command, "--force")
    assert contents(place) == before
    shutil.rmtree(out / file) if file.endswith("/") else (out / file).unlink()
    run(*command, "--force")


def test_a_training_replaces_nothing_that_it_reads(place):
    options = ["--kind", "deltanet", "--window", 12, "--sinks", 4, "--seq-len", 64]
    options += ["--steps", 1, "--layerwise", 0, "--data", place / "book.txt"]
    base, out = shutil.copytree(GDN / "base", place / "base"), place / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "model" / name, base)
    options += ["--model", base]
    (place / "link").symlink_to(base)
    for taken in (base, place / "link", place / "out" / ".." / "base"):
        assert "begins from" in refuse("train", *options, "--out", taken)
    assert "not empty" in refuse("train", *options, "--out", place)
    ahn = ["--ahn", GDN / "ahn_only"]
    assert "begins from" in refuse(
        *("train", "--data", place / "book.txt", *ahn, "--out", GDN / "ahn_only")
    )
    assert "train without --resume" in refuse("train", *options, "--out", out, "--resume")
    assert not out.exists()
    out.mkdir()  # an empty one is fine, and what a killed run has left
    (out / ".training.safetensors.0123abcd.part").touch()
    run("train", *options, "--out", out)
    files = {"training.safetensors", "metrics.jsonl", "model.safetensors", "config.json"}
    files |= {"README.md", "curves.png"}  # of so little text nothing is held out
    assert {f.name for f in out.iterdir()} == files
    before, weights = contents(out), mx.load(str(out / "model.safetensors"))
    mx.eval(weights)
    assert "has a training already" in refuse("train", *options, "--out", out)
    os.link(out / "metrics.jsonl", place / "log.jsonl")
    said = refuse("train", *options, "--data", place / "log.jsonl", "--out", out, "--resume")
    assert "metrics.jsonl: is what --data reads" in said
    assert contents(out) == before
    run("train", *options, "--out", out, "--resume")
    assert same(mx.load(str(out / "model.safetensors")), weights)


def test_curves_that_cannot_be_drawn_do_not_stop_a_training(tmp_path, capsys):
    import matplotlib

    from ahn_mlx.train.curves import write_curves

    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n')
    (tmp_path / "curves.png").mkdir()
    write_curves(tmp_path, "kl")
    assert "is a directory" in capsys.readouterr().err
    (tmp_path / "curves.png").rmdir()
    with matplotlib.rc_context({"text.usetex": True}), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        write_curves(tmp_path, "kl")
    assert "cannot draw" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
    write_curves(tmp_path, "kl")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_killed_command_tried_a_directory_with_vanishes(tmp_path):
    (tmp_path / ".probe.0123abcd.part").touch()
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_of_the_input_that_it_names_or_of_what_is_written(tmp_path):
    out, given = tmp_path / "out", tmp_path / "in"
    named = [(given / "a", given / "a"), (out / "b", out), (tmp_path / "c", out), (None, out)]
    for file, where in named:
        with pytest.raises(AHNError) as error, directories.reporting(out, [tmp_path / "x", given]):
            raise OSError(28, "No space left", file and str(file))
        assert str(error.value) == f"{where}: No space left; nothing was written"
    with pytest.raises(AHNError, match="out: odd; nothing"), directories.reporting(out, []):
        raise OSError("odd")


def test_locks_lie_in_a_directory_or_beside_a_file(tmp_path):
    for path, name in ((tmp_path, ".lock"), (tmp_path / "book.ahn", ".book.ahn.lock")):
        with working_on(path):
            assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("force", [False, True])
def test_a_model_is_replaced_by_force_and_a_directory_of_other_things_never(tmp_path, force):
    """Whatever a model may have beside its weights, and what one for apps has."""
    out = tmp_path / "out"

    def said(*names):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in names:
            (out / name).touch()
        try:
            assert directories.check_out(out, [], force) == out
        except AHNError as error:
            return str(error).split("; ")[0].removeprefix(f"{out}: ")
        return "taken"

    model = ("config.json", "model.safetensors")
    app = ("manifest.json", "model.mlxfn")
    more = (
        *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "LICENSE.txt"),
        *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "unused.safetensors"),
        *("chat_template.jinja", "generation_config.json", "README.md", ".DS_Store"),
    )
    other = "holds something other than a model, which --force does not replace"
    full = "the directory is not empty"
    assert said() == "taken"
    for names in (model, app, (*model, *more), (*app, "plain.mlxfn", "weights.safetensors")):
        assert said(*names) == ("taken" if force else full)
    for names in (
        (*model, "notes.txt"),
        ("config.json",),
        ("model.safetensors",),
        app[:1],
        app[1:],
    ):
        assert said(*names) == (other if force else full)
    assert said(*model, "tokenizer.model.bak") == (other if force else full)


def test_what_overlaps_an_input_is_no_place_to_write_to(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in ("in", "in/deep", "in/new/er", ".", "link", "link/new"):
        with pytest.raises(AHNError, match=r"overlaps the input .*; choose another"):
            directories.check_out(tmp_path / out, [tmp_path / "other", tmp_path / "in"], True)
    assert directories.check_out(tmp_path / "inner/new", [tmp_path / "in"], False).name == "new"
    assert directories.nearest(tmp_path / "a/b/c") == tmp_path
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert directories.nearest(tmp_path / "gone/b") == tmp_path / "gone"


def test_a_picture_of_ours_says_so_in_its_bytes(tmp_path):
    marks = {".png": b"..tEXtSoftware\0ahn-mlx..", ".svg": b"<dc:title>ahn-mlx</dc:title>"}
    marks[".pdf"] = b"/Creator (ahn-mlx)"
    for end, mark in marks.items():
        for name, data in (("a" + end, mark), ("A" + end.upper(), mark), ("b" + end, mark[:-4])):
            (tmp_path / name).write_bytes(data)
            assert pictures.is_picture(tmp_path / name) is (data == mark)
    (tmp_path / "a.txt").write_bytes(marks[".pdf"])
    assert not pictures.is_picture(tmp_path / "a.txt")
    with (tmp_path / "a.pdf").open("ab") as file:
        file.truncate(1 << 26)
        assert pictures.is_picture(tmp_path / "a.pdf")
        file.truncate((1 << 26) + 1)
        assert not pictures.is_picture(tmp_path / "a.pdf")


def opened() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("lost", ["deleted", "gone", "locked", "replaced"])
def test_a_part_that_somebody_takes_before_it_is_locked_is_made_anew(tmp_path, monkeypatch, lost):
    """Just after it was made, or just before it is locked."""
    made, others = [], []
    lock = parts._lock

    def make(part: Path) -> None:
        part.touch()
        made.append(part)
        if len(made) == 1 and lost == "deleted":
            part.unlink()
        if len(made) == 1 and lost == "locked":
            others.append(os.open(part, os.O_RDONLY))
            assert lock(others[0])

    def late(held: int) -> bool | None:
        if len(made) == 1 and lost in ("gone", "replaced"):
            made[0].unlink()
            if lost == "replaced":
                made[0].touch()
        return lock(held)

    monkeypatch.setattr(parts, "_lock", late)
    before = opened()
    with new_part(tmp_path / "a", make) as part:
        assert made[1:] == [part] and part.exists() and part != made[0]
        assert opened() == before + 1 + len(others)
    assert opened() == before + len(others)
    for other in others:
        os.close(other)


@pytest.mark.parametrize("lost", ["gone", "replaced"])
def test_a_lock_that_has_just_been_given_up_is_taken_anew(tmp_path, monkeypatch, lost):
    lock, path = parts._lock, tmp_path / ".a.lock"
    times = iter((lost, "", ""))

    def late(held: int) -> bool | None:
        match next(times):
            case "gone":
                path.unlink()
            case "replaced":
                path.rename(tmp_path / "old")
                path.touch()
        return lock(held)

    monkeypatch.setattr(parts, "_lock", late)
    before = opened()
    with working_on(tmp_path / "a"):
        assert opened() == before + 1 and path.exists()
        monkeypatch.undo()
        with (
            pytest.raises(AHNError, match="another process works on it"),
            working_on(path.parent / "a"),
        ):
            pass
        assert opened() == before + 1
        path.unlink()  # by whoever tidies up
    assert opened() == before


def test_what_is_no_file_vanishes_with_what_killed_writers_have_left(tmp_path):
    """A link, but not what it names; a pipe, which nobody writes to; a directory."""
    (tmp_path / "kept").write_text("precious")
    (tmp_path / ".a.01.part").symlink_to(tmp_path / "kept")
    (tmp_path / ".a.02.part").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".a.03.part").mkdir()
    (tmp_path / ".a.03.part/half").touch()
    (tmp_path / ".a.04.part").touch()
    held = parts._open(tmp_path / ".a.04.part")
    assert fcntl.fcntl(held, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(held)
    with pytest.raises(OSError, match="symbolic links"):
        parts._open(tmp_path / ".a.01.part")
    os.mkfifo(tmp_path / ".a.05.part")
    before = opened()
    clear_parts(tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["kept"] and opened() == before
    assert parts_of(tmp_path / "absent/a") == []
    part = tmp_path / ".a.06.part"
    assert parts.is_part(part, tmp_path / "a") and not parts.is_part(part, tmp_path / "b/a")
    assert not parts.is_part(tmp_path / "a", tmp_path / "a")


def test_who_works_in_a_directory_knows_whether_others_do(tmp_path):
    first, alone = share(tmp_path)
    second, not_alone = share(tmp_path)
    assert alone is True and not_alone is False
    os.close(first)
    third, not_alone = share(tmp_path)
    assert not_alone is False
    os.close(second)
    os.close(third)
    last, alone = share(tmp_path)
    assert alone is True
    os.close(last)


def test_a_disk_without_locks_stops_nobody(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    left = tmp_path / ".a.01.part"
    left.touch()
    with (
        new_part(tmp_path / "a", Path.touch),
        working_on(tmp_path / "a"),
        working_on(tmp_path / "a"),
    ):
        assert left.exists()
    held, alone = share(tmp_path)
    os.close(held)
    assert alone is False


def test_a_directory_that_cannot_be_made_leaves_nothing(tmp_path):
    for keep in (False, True):
        with pytest.raises(KeyError), directories.replacing(tmp_path / "a/b/out", False) as part:
            (part / "half").touch()
            if keep:
                (tmp_path / "a/notes.txt").touch()
            raise KeyError
        assert sorted(tmp_path.rglob("*")) == ([tmp_path / "a", tmp_path / "a/notes.txt"] * keep)
    with pytest.raises(KeyError), directories.replacing(tmp_path / "a/out", False) as part:
        shutil.rmtree(part)
        raise KeyError
    assert len(list(tmp_path.rglob("*"))) == 2


def test_what_is_written_is_on_the_disk_before_its_name_says_so(tmp_path, monkeypatch):
    safe, fsync = set(), os.fsync
    out, file = tmp_path / "new/out", tmp_path / "a.txt"
    inner = [out / name for name in ("config.json", "model.safetensors")]

    def noted(number: int) -> None:
        assert not out.exists() and not file.exists()
        safe.add(os.fstat(number).st_ino)
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    with directories.replacing(out, False) as part:
        for path in inner:
            (part / path.name).write_text("a")
    assert {path.stat().st_ino for path in inner} == safe
    shutil.rmtree(out)
    safe.clear()
    with files.replacing(file) as part:
        part.write_text("a")
    assert safe == {file.stat().st_ino}


def model(path: Path, text: str) -> Path:
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).write_text(text)
    return path


def test_a_model_is_there_whatever_happens(tmp_path, monkeypatch):
    a, b = model(tmp_path / "a", "a"), model(tmp_path / "b", "b")
    assert directories._exchange(a, b)
    assert (a / "config.json").read_text() == "b" and (b / "config.json").read_text() == "a"
    assert not directories._exchange(a, tmp_path / "absent")
    # Without force it is not replaced, and what is no model never.
    with pytest.raises(OSError, match="not empty"), directories.replacing(a, False) as part:
        (part / "config.json").touch()
    (b / "notes.txt").touch()
    with pytest.raises(OSError, match="not empty"), directories.replacing(b, True) as part:
        (part / "config.json").touch()
    assert (a / "config.json").read_text() == "b"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    if sys.platform != "darwin":
        assert not directories._exchange(a, b)
        with pytest.raises(FileNotFoundError):
            directories._swap(tmp_path / "absent", a)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (a / "config.json").read_text() == "b"


def test_a_directory_is_no_file_of_a_model(tmp_path):
    out = model(tmp_path / "out", "a")
    assert directories._is_model_dir(out)
    (out / "README.md").mkdir()
    assert not directories._is_model_dir(out)


def test_an_input_is_known_by_another_spelling(tmp_path, monkeypatch):
    """On a disk that does not tell cases apart; and one that is not there yet."""
    (tmp_path / "in").mkdir()
    assert directories.check_out(tmp_path / "IN/new", [tmp_path / "in"], False).name == "new"
    with pytest.raises(AHNError, match="overlaps the input"):
        directories.check_out(tmp_path / "absent/new", [tmp_path / "absent"], False)
    monkeypatch.setattr(os.path, "samefile", lambda a, b: str(a).lower() == str(b).lower())
    with pytest.raises(AHNError, match="overlaps the input"):
        directories.check_out(tmp_path / "IN/new", [tmp_path / "in"], False)
    for path in (Path("-"), Path("a\0b")):
        for check in (
            lambda path=path: directories.check_out(path, [], False),
            OutFile(path, "a text of ours", lambda file: True).check,
        ):
            with pytest.raises(AHNError, match=r"standard output|no name has"):
                check()


def test_a_read_only_file_stays_whoever_may_run_it(tmp_path):
    file = tmp_path / "a.txt"
    file.touch()
    for mode, said in ((0o555, True), (0o444, True), (0o577, False), (0o464, False)):
        file.chmod(mode)
        out = OutFile(file, "a text of ours", lambda file: True)
        if said:
            with pytest.raises(AHNError, match=r"is read-only; choose another name$"):
                out.check()
        else:
            out.check()


def test_an_error_of_another_file_is_not_explained(tmp_path):
    file = tmp_path / "a.txt"
    for error, message in (
        *((OSError(28, "No space left"), "No space left"), (OSError("odd"), "odd")),
        *((OSError(), "OSError"), (OSError(13, "Denied", str(file)), "Denied")),
    ):
        said = rf"a\.txt: cannot be written \({message}\); free"
        with pytest.raises(AHNError, match=said), files.replacing(file):
            raise error
    with pytest.raises(AHNError, match="Gone"), files.replacing(file) as part:
        raise OSError(2, "Gone", str(part))
    other = OSError(2, "Gone", str(tmp_path / "b.txt"))
    with pytest.raises(OSError, match="Gone") as found, files.replacing(file):
        raise other
    assert found.value is other and not list(tmp_path.iterdir())
    file.touch()
    with pytest.raises(FileExistsError):
        files._empty_file(file)
    assert not files.same_file(file, tmp_path / "absent")


def test_a_picture_has_its_size_and_is_known_by_its_kind(tmp_path, monkeypatch):
    figure = pictures.new_figure(2, 1)
    assert figure.get_size_inches().tolist() == [2, 1]
    assert type(figure.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    file = tmp_path / "a.png"
    pictures.save_picture(figure, pictures.picture(file))
    assert struct.unpack(">II", file.read_bytes()[16:24]) == (300, 150)
    pictures.save_picture(figure, pictures.picture(file), dpi=50)
    assert struct.unpack(">II", file.read_bytes()[16:24]) == (100, 50)
    file.write_bytes(b"another")
    with pytest.raises(AHNError, match="is not a picture of ours"):
        pictures.picture(file)
    with pytest.raises(OSError, match="full"), pictures._drawing("a"):
        raise OSError("full")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for make in (lambda: pictures.new_figure(1, 1, "a.png"), lambda: pictures.picture(file)):
        with pytest.raises(AHNError, match=r"a\.png needs matplotlib: .*pip install matplotlib"):
            make()
