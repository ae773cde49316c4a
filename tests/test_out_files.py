"""What is written, by itself: names that files take when they are complete, locks, and what
killed writers leave."""

import ctypes
import fcntl
import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ahn_mlx import AHNError
from ahn_mlx.outputs import directories, files, parts, pictures
from ahn_mlx.outputs.files import OutFile, check_writable
from ahn_mlx.outputs.parts import clear_parts, new_part, parts_of, share, working_on


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


def test_what_was_replaced_may_be_gone_before_it_is_deleted(tmp_path, monkeypatch):
    a, b = model(tmp_path / "a", "a"), model(tmp_path / "b", "b")

    def exchange(new: Path, old: Path) -> bool:
        shutil.rmtree(old)
        new.rename(old)
        return True

    monkeypatch.setattr(directories, "_exchange", exchange)
    directories._swap(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (b / "config.json").read_text() == "a"


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


def test_what_is_no_file_to_replace_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name, target in (("loop", "loop.txt"), ("null", os.devnull), ("dangling", "absent/file")):
        (tmp_path / f"{name}.txt").symlink_to(target)
    (tmp_path / "theirs.txt").write_text("theirs")
    (tmp_path / "read.txt").write_text("read")
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).touch()
    before = sorted(tmp_path.rglob("*"))
    reads = (tmp_path / "other.txt", tmp_path / "in", tmp_path / "read.txt")
    for name, force, message in (
        ("directory.txt", None, "is a directory; give the name of a file"),
        ("directory.txt", True, "is a directory; give the name of a file"),
        ("pipe.txt", True, "is not a regular file; give the name of one"),
        ("null.txt", True, "is not a regular file"),
        ("loop.txt", True, "cannot be written (Too many levels of symbolic links)"),
        ("dangling.txt", True, "absent: no such directory; make it first"),
        ("absent/a.txt", None, "absent: no such directory; make it first"),
        ("theirs.txt/a.txt", None, "cannot be written (Not a directory); choose another name"),
        ("a" * 300 + ".txt", None, "cannot be written (File name too long)"),
        ("read.txt", True, "is what this command reads; choose another name"),
        ("in/b.txt", True, "is what this command reads"),
        ("absent/../read.txt", True, "is what this command reads"),
        ("theirs.txt", None, "is there and is not a text of ours; choose another name"),
        ("theirs.txt", False, "is there and is not a text of ours; choose another name, or --f"),
        ("new.md", None, "give a name that ends in .txt, .text"),
        ("txt", None, "give a name that ends in .txt, .text"),
    ):
        given = tmp_path / name if "absent/.." not in name else Path(name)
        out = OutFile(given, "a text of ours", lambda file: False, reads, force, (".txt", ".text"))
        with pytest.raises(AHNError) as error:
            out.check()
        assert message in str(error.value), name
        assert str(error.value).endswith("name") or "another name" not in message or force is False
    assert sorted(tmp_path.rglob("*")) == before
    for name, force, ours in (
        *(("new.txt", None, False), ("NEW.TEXT", None, False), ("theirs.txt", True, False)),
        *(("theirs.txt", None, True), ("theirs.txt", False, True)),
    ):
        out = OutFile(
            *(tmp_path / name, "a text of ours", lambda file, ours=ours: ours, reads, force),
            endings=(".txt", ".text"),
        )
        with out.writing() as part:
            part.write_text("ours")
        assert (tmp_path / name).read_text() == "ours"
    anything = OutFile(tmp_path / "new.md", "a text of ours", lambda file: False)
    anything.check()
    if Path("/proc").is_dir():
        with pytest.raises(AHNError, match=r"/proc: cannot be written to \(.+\); choose"):
            OutFile(Path("/proc/a.txt"), "a text", lambda file: True).check()
        with pytest.raises(AHNError, match=r"/proc: cannot be written to"):
            directories.check_out(Path("/proc/a/b"), [], False)
    with pytest.raises(AHNError, match=r"pipe.txt: is not a directory; choose another place"):
        check_writable(tmp_path / "pipe.txt")
    for name, kind in (("theirs.txt", "a file"), ("pipe.txt", "not a directory")):
        with pytest.raises(AHNError, match=rf"{name}: is {kind}; choose a directory"):
            directories.check_out(tmp_path / name, [], True)
