"""No command replaces a file that it did not make, or that it reads, and it says so first."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import mlx.core as mx
import pytest
from checkpoints import GDN, same, talking_model
from click.testing import CliRunner

from ahn_mlx import AHNError, Session, load
from ahn_mlx.checkpoints.directory import load_safetensors
from ahn_mlx.cli import cli
from ahn_mlx.outputs.files import check_named, replacing
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


def test_what_a_link_names_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real/a.txt")
    for text in ("new", "newer"):
        with replacing(tmp_path / "link.txt") as part:
            assert part.parent == tmp_path / "real"
            part.write_text(text)
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "real/a.txt").read_text() == text
    assert sorted(f.name for f in (tmp_path / "real").iterdir()) == ["a.txt"]


@pytest.mark.parametrize("name", ["-", "a\0b", os.fsdecode(b"a\xff")])
def test_names_that_nothing_is_written_to(name):
    with pytest.raises(AHNError, match=r"standard output|no name has|is not UTF-8"):
        check_named(Path(name))
