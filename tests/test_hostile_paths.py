"""Whatever is given as a path: a device, a pipe that nobody writes to, a link in a circle, a name
without end or with a NUL in it, a directory for a file and the reverse. Every command that takes
one says so in one line, at once, and reads and writes nothing but what was meant."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from faultcases import CASES, Place, one_line

from ahn_mlx.cli import COMMANDS, cli

SECONDS = 300  # of a machine that does much else
# What a parameter of that name takes; a new one is not in here, and then a test fails.
TAKES = {
    **dict.fromkeys(("prompt_file", "prompt_file_word", "text", "text_word"), "text"),
    **dict.fromkeys(("data_word",), "text"),
    **dict.fromkeys(("memory", "memory_word", "file", "file_word", "files"), "memory"),
    **dict.fromkeys(("name", "name_word", "base", "ahn", "ahn_word"), "model"),
    **dict.fromkeys(("memories", "prompts", "directory", "data"), "folder"),
    **dict.fromkeys(("out", "plot"), "out"),
    "api_key_file": "key",
    "words": "words",
}
NO_PATH = {"prompt", "system", "stop", "host", "allow_origin", "revision", "base_revision"}
NO_PATH |= {"tasks", "repo", "compare", "args", "windows", "context"}
VALUES = click.INT, click.FLOAT, click.BOOL


def commands() -> Iterator[tuple[str, click.Command]]:
    """All there are, those of groups by both their names."""
    for name in COMMANDS:
        found = cli.get_command(click.Context(cli), name)
        assert found is not None
        if isinstance(found, click.Group):
            context = click.Context(found)
            for part in found.list_commands(context):
                inner = found.get_command(context, part)
                assert inner is not None
                yield f"{name} {part}", inner
        else:
            yield name, found


def takes(command: str, parameter: str) -> str:
    """What kind of a path, if any."""
    if parameter in ("ahn", "ahn_word") and command == "convert":
        return "model"
    if parameter == "data" and command == "train":
        return "text"
    return TAKES.get(parameter, "")


def parameters() -> list[tuple[str, str]]:
    """All that may be a path."""
    return [
        (name, str(p.name))
        for name, command in commands()
        for p in command.params
        if not isinstance(p.type, (click.Choice, *map(type, VALUES)))
        if p.name not in NO_PATH
    ]


def test_every_parameter_that_may_be_a_path_is_tested() -> None:
    unknown = [p for p in parameters() if not takes(*p)]
    assert not unknown, "say in TAKES or NO_PATH what these take"
    assert {name for name, _ in parameters()} <= set(GIVEN), "say in GIVEN what they need"


def _synthetic(place: Place) -> dict[str, Any]:
    return {"name": place.model, "text": place.book}


def _suite(place: Place) -> dict[str, Any]:
    given = {"name": place.model, "data": place.data, "prompts": place.prompts}
    return {**given, "out": place.out / "answers"}


# What each command is given beside the path that is tested.
GIVEN: dict[str, Any] = {
    "generate": lambda p: {"words": p.book, "prompt": "Who?", "name": p.model},
    "digest": lambda p: {"prompt_file": p.book, "name": p.model, "out": p.out / "new.ahn"},
    "ask": lambda p: {"file": p.memory, "prompt": "Who?"},
    "chat": lambda p: {"name": p.model},
    "serve": lambda p: {"name": p.model},
    "memory info": lambda p: {},
    "memory verify": lambda p: {},
    "inspect": lambda p: {"file": p.memory, "name": p.model, "out": p.out / "new.html"},
    "models": lambda p: {},
    "pull": lambda p: {},
    "rm": lambda p: {},
    "convert": lambda p: {"base": p.base, "ahn": p.ahn, "out": p.out / "new"},
    "train": lambda p: {"data": p.book, "base": p.trainable, "out": p.out / "new"},
    "compare": lambda p: {"text": p.book, "name": p.model, "plot": p.out / "new.png"},
    **{f"eval {n}": _synthetic for n in ("recall", "passkey", "niah", "vt")},
    **{f"eval babi{n}": _synthetic for n in (1, 2, 3)},
    **{f"eval {n}": _suite for n in ("longbench", "infinitebench", "lveval")},
    "eval lm-eval": lambda p: {"args": "--help"},
    "eval score": lambda p: {},
    "export-pytorch": lambda p: {"name": p.model, "out": p.out / "new"},
    "export-app": lambda p: {"name": p.model, "out": p.out / "new"},
    "upload": lambda p: {"name": p.model, "repo": "me/mine"},
    "estimate": lambda p: {},
    "bench": lambda p: {},
}
# Of an output the file's ending, else it is refused for that.
ENDS = {"digest": ".ahn", "inspect": ".html", "plot": ".png"}
FOLDERS = ("a folder of links out", "a folder of pipes", "a folder of devices")
KINDS = (
    *("a pipe", "zero", "full", "random", "a circle", "long", "deep", "NUL", "no name", "wrong"),
    *FOLDERS,
)
# A pipe is as good as a file of text or a key: whoever names one knows who writes to it.
PIPES = ("text", "words", "key")


def hostile(place: Place, kind: str, sort: str, end: str) -> str:
    """A path of that kind, where something of that sort is wanted."""
    at = place.out / f"given{end}"
    match kind:
        case "a pipe":
            os.mkfifo(at)
        case "zero" | "full" | "random":
            device = {"zero": "/dev/zero", "full": "/dev/full", "random": "/dev/urandom"}[kind]
            at.symlink_to(device)
        case "a circle":
            at.symlink_to(at)
        case "long":
            return str(place.out / ("a" * 4096 + end))
        case "deep":
            return str(place.out) + "/a" * 2048 + end
        case "NUL":
            return f"{place.out}/a\0b{end}"
        case "no name":
            return f"{place.out}/absent/\udcff{end}"
        case "wrong":  # a directory for a file, a file for a directory
            at.write_text("no model") if sort in ("model", "folder") or not end else at.mkdir()
        case _:
            source = place.data if sort == "folder" else place.model
            at.mkdir()
            for file in source.iterdir():
                if kind == FOLDERS[0]:
                    (at / file.name).symlink_to(place.path / "secret")
                elif kind == FOLDERS[1]:
                    os.mkfifo(at / file.name)
                else:
                    (at / file.name).symlink_to("/dev/zero")
    return str(at)


def words_of(place: Place, command: str, parameter: str, path: str) -> list[object]:
    found = dict(commands())[command]
    twin = parameter.removesuffix("_word")
    given = {k: v for k, v in GIVEN[command](place).items() if k not in (parameter, twin)}
    words: list[object] = command.split()
    for p in found.params:
        value = path if p.name == parameter else given.get(p.name)
        if value is not None and isinstance(p, click.Option):
            words += [max(p.opts, key=len), value]
    for p in found.params:
        value = path if p.name == parameter else given.get(p.name)
        if value is not None and isinstance(p, click.Argument):
            words += ["--", value]
    return words


def snapshot(place: Place) -> dict[str, tuple[int, int]]:
    """All but what a command may write to."""
    found = (p for part in (place.inputs, place.path / "secret") for p in (part, *part.rglob("*")))
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in found}


def check(place: Place, command: str, parameter: str, kind: str) -> None:
    sort = takes(command, parameter)
    if kind == "a pipe" and sort in PIPES:
        return
    if kind in FOLDERS and (sort not in ("model", "folder") or parameter == "memories"):
        return  # a server shows what it has, and what is wrong with it
    if (kind == "wrong" and sort in ("text", "words")) or command in ("eval lm-eval", "models"):
        return
    place.clear()
    end = ENDS.get(parameter, ENDS.get(command, "")) if sort == "out" else ".ahn"
    path = hostile(place, kind, sort, end if sort in ("out", "memory", "words") else "")
    before = snapshot(place)
    there = sorted(p for p in place.out.rglob("*"))
    run = place.server.run(*words_of(place, command, parameter, path), timeout=SECONDS)
    said = one_line(run)
    # Memory that is not enough is no answer either, nor is what Python says to itself.
    assert "memory (" not in said and "secret" not in said.replace(str(place.path), ""), said
    assert snapshot(place) == before
    left = [p for p in place.out.rglob("*") if p.suffix != ".lock" and p not in there]
    assert [p for p in left if not p.is_dir()] == [], said


@pytest.mark.parametrize("n", range(len(KINDS)))
def test_a_path_that_is_none_is_one_line(place, n):
    """Each parameter with one kind, and each kind with some parameters."""
    for i, (command, parameter) in enumerate(parameters()):
        if i % len(KINDS) == n:
            check(place, command, parameter, KINDS[(i // len(KINDS) + n) % len(KINDS)])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("command", "parameter"), parameters())
def test_every_path_that_is_none_is_one_line(place, command, parameter, kind):
    check(place, command, parameter, kind)


@pytest.mark.parametrize("typed", ["/save", "/load", "/read"])
def test_a_path_that_is_typed_in_a_chat(place, typed):
    """Each is one line, and the conversation goes on."""
    place.clear()
    paths = []
    for n, kind in enumerate(KINDS):
        if kind not in FOLDERS and not (kind == "a pipe" and typed == "/read"):
            paths.append(hostile(place, kind, "memory", f"{n}.ahn"))
    said = place.out / "typed"
    said.write_bytes(os.fsencode("".join(f"{typed} {path}\n" for path in paths)))
    before = snapshot(place), sorted(place.out.rglob("*"))
    run = place.server.run("chat", "--model", place.model, stdin=str(said))
    assert run.status == 0, run.said
    errors = [line for line in run.said.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(paths) and "Traceback" not in run.said, run.said
    assert not any(f"did you mean {path}?" in run.said for path in paths)
    assert (snapshot(place), sorted(place.out.rglob("*"))) == before


LINKS = [name for name in CASES if name not in ("pull", "upload", "digest --append")]


@pytest.mark.parametrize("link", ["a link", "a hard link"])
@pytest.mark.parametrize("name", LINKS)
def test_what_an_output_is_linked_to_stays(place, name, link):
    """Neither by its name nor by force is anything written through it."""
    place.clear()
    words = CASES[name].words(place)
    out = Path(str(words[words.index("-o") + 1]))
    secret = place.path / "secret"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(secret) if link == "a link" else os.link(secret, out)
    run = place.server.run(*words)
    assert str(out) in one_line(run) or str(secret) in one_line(run)
    assert secret.read_text() == "secret"
    forced = {"compare", "inspect", "estimate", "eval recall"} & {name}
    if forced and link == "a hard link":  # whose name alone is replaced
        assert place.server.run(*words, "--force").status == 0
        assert secret.read_text() == "secret" and not out.samefile(secret)


@pytest.mark.parametrize("link", ["a link", "a hard link"])
def test_a_memory_that_is_linked_to_is_appended_to_by_the_name_that_was_given(place, link):
    place.clear()
    other = place.out / "other.ahn"
    shutil.copy(place.memory, other)
    out = place.out / "book.ahn"
    out.symlink_to(other) if link == "a link" else os.link(other, out)
    run = place.server.run(*CASES["digest --append"].words(place))
    assert run.status == 0, run.said
    assert out.is_symlink() == (link == "a link")
    assert (other.read_bytes() == place.memory.read_bytes()) == (link == "a hard link")
    assert out.read_bytes() != place.memory.read_bytes()


def test_names_that_a_file_system_may_take_for_one(place):
    """Book and book are one file on a Mac: the second neither replaces nor reads the first."""
    place.clear()
    shutil.copy(place.memory, place.out / "Book.ahn")
    before = (place.out / "Book.ahn").read_bytes()
    run = place.server.run(
        *("digest", place.more, "--model", place.model, "-o", place.out / "book.ahn")
    )
    same = (place.out / "BOOK.AHN").exists()
    assert run.status == (2 if same else 0), run.said
    assert (place.out / "Book.ahn").read_bytes() == before


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/full"])
def test_an_input_without_end(place, device):
    """Through a pipe, and by names that say that it is a text."""
    place.clear()
    ask = ("generate", "--prompt", "Why?", "--model", place.model)
    assert "standard input: is a binary file" in one_line(place.server.run(*ask, stdin=device))
    for name in ("a.txt", "a.jsonl", "a.html", "a.pdf"):
        (place.out / name).symlink_to(device)
        run = place.server.run(*ask, "-f", place.out / name)
        assert f"{name}: is a device" in one_line(run)
    train = ("train", place.out / "a.jsonl", "--model", place.trainable, "-o", place.out / "mine")
    assert "a.jsonl: is a device" in one_line(place.server.run(*train))
    for name in ("hotpotqa.jsonl", "data.zip"):
        data = place.out / f"data-{name}"
        data.mkdir()
        (data / name).symlink_to(device)
        words = CASES["eval longbench"].words(place)
        words[words.index(place.data)] = data
        assert name in one_line(place.server.run(*words))
