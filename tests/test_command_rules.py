"""How a command line is taken apart, which options there are, and how a command ends."""

import errno
import io
import json
import os
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import click
import pytest
from checkpoints import make_base, memory_of, talking_model
from click.core import ParameterSource
from click.testing import CliRunner

import ahn_mlx.cli as program
from ahn_mlx import AHNError, __version__
from ahn_mlx.cli import COMMANDS, cli, options, ranks
from ahn_mlx.cli import command as parsing
from ahn_mlx.cli.command import ELSEWHERE, RENAMED, Command, Group, Several, Word
from ahn_mlx.cli.models import _place
from ahn_mlx.cli.synthetic import SYNTHETIC
from ahn_mlx.hub.published import DEFAULT
from ahn_mlx.model.ranks import LOST, Lost


def invoke(*words, **more):
    return CliRunner().invoke(cli, list(map(str, words)), **more)


def refusal(*words, command=cli):
    done = CliRunner().invoke(command, list(map(str, words)), standalone_mode=False)
    assert done.exception is not None, done.output
    error = done.exception
    return error.format_message() if isinstance(error, click.UsageError) else str(error)


def commands():
    for name in COMMANDS:
        found = cli.get_command(click.Context(cli), name)
        if isinstance(found, click.Group):
            yield from ((f"{name} {sub}", c) for sub, c in found.commands.items())
        else:
            yield name, found


# --- which options there are ---

CHOICE = "[{}]".format
DTYPES = CHOICE("float32|bfloat16|float16")
LOADING = {
    "--model TEXT": DEFAULT,
    "--ahn PATH": None,
    "--window INTEGER": None,
    "--sinks INTEGER": None,
    f"--dtype {DTYPES}": None,
    "--q-bits [0|4|8]": None,
}
SAMPLING = {
    "-m, --max-tokens INTEGER": 256,
    "--temp FLOAT": 0.0,
    "--top-p FLOAT": 1.0,
    "--top-k INTEGER": 0,
    "--min-p FLOAT": 0.0,
    "--seed INTEGER": None,
    "--repetition-penalty FLOAT": 1.0,
    "--repetition-context-size INTEGER": 20,
    "--stop TEXT": (),
}
TEMPLATE = {"--system-prompt TEXT": "", "--ignore-chat-template": False}
BITS = {"--kv-bits [8|4]": None, "--kv-group-size [32|64|128]": "64"}
FILES = {"-f, --prompt-file FILE": ()}
QUIET, JSON, FORCE = {"-q, --quiet": False}, {"--json": False}, {"--force": False}
RANKS = {"--pipeline": False}
MOVED = {"--model TEXT": None, "--ahn PATH": None}
OUT = {"-o, --out PATH": None}
SUITE = {
    **LOADING,
    "--tasks TEXT": None,
    "--protocol [ahn|published]": "ahn",
    "--mixer [memory|window|full]": "memory",
    "--limit INTEGER": None,
    "--data PATH": None,
    "--prompts PATH": None,
    **{**OUT, **RANKS, **JSON, **QUIET},
}
MADE = {**LOADING, "--text FILE": None, "--seed INTEGER": 0}
MADE |= {**RANKS, **JSON, **OUT, **FORCE, **QUIET}
TASKS = {"--length INTEGER": 2048, "--items INTEGER": 4, **MADE}
OPTIONS = {
    "generate": {
        **{**LOADING, **FILES, "-p, --prompt TEXT": None, **TEMPLATE, **SAMPLING, **BITS},
        **{"--prefill-step-size INTEGER": None, "--verbose": False, **JSON, **QUIET, **RANKS},
    },
    "digest": {
        **{**LOADING, **FILES, **OUT, "--append": False, **FORCE, **BITS, **TEMPLATE},
        **{"--checkpoint-every INTEGER": 16384, **QUIET, **RANKS},
    },
    "ask": {
        **{"--memory PATH": None, "-p, --prompt TEXT": None, **MOVED, "--interactive": False},
        **{**SAMPLING, **JSON, **QUIET, **RANKS},
    },
    "chat": {
        **{**LOADING, **SAMPLING, **BITS, "--system-prompt TEXT": "", "--memory PATH": None},
        **RANKS,
    },
    "inspect": {
        "--memory PATH": None,
        **{**OUT, "--text FILE": None, **MOVED, **FORCE, **QUIET},
    },
    "bench": {
        **{**LOADING, "--context INTEGER": 2048, "--tokens INTEGER": 32, "--chip NAME": None},
        **{**JSON, **QUIET},
    },
    "export-app": {**LOADING, **OUT, "--chunk INTEGER": 512, **FORCE, **QUIET},
    "export-pytorch": {
        **{"--model TEXT": None, **OUT, "--layout [ahn-only|merged]": "merged", **FORCE, **QUIET}
    },
    "upload": {"--model TEXT": None, "--repo ORG/NAME": None, "--private": False, **QUIET},
    "eval longbench": SUITE,
    "eval infinitebench": SUITE,
    "eval lveval": {**SUITE, f"--length {CHOICE('16k|32k|64k|128k|256k')}": "128k"},
    "eval recall": {
        **{"--documents INTEGER": 14, "--needles INTEGER": 8, "--tokens INTEGER": 915, **MADE}
    },
    "eval niah": {**TASKS, "--tasks TEXT": None},
    **{f"eval {name}": TASKS for name in ("passkey", "vt", "babi1", "babi2", "babi3")},
    "eval lm-eval": {**LOADING, "--mixer [memory|window|full]": "memory"},
}
TEXTS_TO_COMPLETE = {"--text", "--prompt-file", "words", "data", "text", "prompt_file"}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_command_has_these_options_and_says_what_they_are(name):
    command = dict(commands())[name]
    context = click.Context(command)
    found = {}
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        spelled, said = option.get_help_record(context)
        default = option.get_default(context)
        default = None if "UNSET" in repr(default) else default  # click's own nothing
        found[spelled] = () if option.multiple else default
        assert said, spelled  # what it is for
        if option.show_default and default is not None:
            shown = ", ".join(default) if option.multiple else default
            assert f"[default: {shown}" in said
        if default not in (None, "", False, ()):
            assert option.show_default, spelled
        if option.multiple:
            assert spelled.split()[-2] in ("--stop", "--prompt-file"), spelled
    assert found == OPTIONS[name]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        *((["generate", option, "bo"], "file bo") for option in ("-f", "--prompt-file")),
        *((["eval", name, "--text", "bo"], "file bo") for name in ("recall", "passkey")),
        (["inspect", "--text", "bo"], "file bo"),
        *((["ask", "bo"], "file bo"), (["ask", "--memory", "bo"], "file bo")),
        *(([name, "--model", "./no"], "dir ./no") for name in ("ask", "chat", "inspect", "upload")),
        (["rm", "ahn-gdn-14"], "plain ahn-gdn-14b"),
        (["models", "ahn-dn-3"], "plain ahn-dn-3b"),
        (["digest", "bo"], "file bo"),
        (["--ver"], "plain --version"),
    ],
)
def test_the_shell_completes_names_of_files_and_models(words, found, tmp_path, monkeypatch):
    from click.shell_completion import BashComplete

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    *before, incomplete = words
    items = BashComplete(cli, {}, "ahn-mlx", "").get_completions(before, incomplete)
    assert " ".join(f"{item.type} {item.value}" for item in items) == found


def test_commands_are_completed_with_their_lines():
    from click.shell_completion import BashComplete

    items = BashComplete(cli, {}, "ahn-mlx", "").get_completions([], "in")
    assert [(i.value, i.help) for i in items] == [("inspect", COMMANDS["inspect"][2])]
    items = BashComplete(cli, {}, "ahn-mlx", "").get_completions([], "--v")
    assert [i.value for i in items] == ["--version"]


@pytest.mark.parametrize("name", ["digest", "inspect", "convert", "train", "compare", "estimate"])
def test_the_usage_says_what_must_be_given(name):
    usage = invoke(name, "--help").output.split("\n\n")[0]
    needed = {"inspect": " FILE", "convert": " AHN", "train": " DATA...", "compare": " TEXT"}
    assert usage.endswith(
        needed.get(name, {"digest": " [FILE...]", "estimate": " [MODEL]"}.get(name))
    )


# --- options that change nothing, and numbers out of range ---


@click.command()
@options.no_effect("a", "b", when=lambda options: options["c"], why="with --c, which is {c}")
@click.option("--a", default=1)
@click.option("-b", "--bee", "b", envvar="BEE")
@click.option("--c", default="")
def idle(**given):
    click.echo(f"ran {given['a']}")


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        (["--c", "x"], {}, "ran 1"),
        (["--a", "1"], {}, "ran 1"),
        (["--a", "1", "--c", "x"], {}, "--a has no effect with --c, which is x"),
        (["-b", "1", "--c", "x"], {}, "--bee has no effect with --c, which is x"),
        (["--c", "x"], {"env": {"BEE": "1"}}, "--bee has no effect with --c, which is x"),
        (["--c", "x"], {"default_map": {"a": 3}}, "ran 3"),
    ],
)
def test_what_was_typed_and_changes_nothing_is_refused(words, more, said):
    done = CliRunner().invoke(idle, words, **more)
    assert (str(done.exception) if done.exception else done.output.strip()) == said


def test_a_setting_that_there_is_not_was_not_given():
    with click.Context(idle) as context:
        assert not options.is_given("a")
        context.set_parameter_source("a", ParameterSource.COMMANDLINE)
        assert options.is_given("a") and not options.is_given("nothing")


@pytest.mark.parametrize(
    ("name", "least"),
    [("window", 1), ("sinks", 0), ("prefill_step_size", 1), ("checkpoint_every", 1), ("chunk", 1)],
)
def test_numbers_have_a_least(name, least):
    spelled = f"--{name.replace('_', '-')}"
    options.check_numbers({name: least})
    options.check_numbers({name: None})
    with pytest.raises(AHNError, match=f"{spelled} must be at least {least}, not {least - 1}"):
        options.check_numbers({name: least - 1})


def test_numbers_of_an_answer_are_judged_as_they_are_there():
    options.check_numbers({})
    with pytest.raises(AHNError, match=r"^--repetition-penalty must be above 0"):
        options.check_numbers({"repetition_penalty": 0.0, "temp": 1.0})
    given = {"temp": 0.5, "window": 3, "stop": ("a",)}
    assert options.sampling_of(given) == {"temp": 0.5, "stop": ("a",)}


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        *(
            (name, {"temp": 0}, "at --temp 0, which is greedy; give --temp")
            for name in ("top_p", "top_k", "min_p", "seed")
        ),
        *((name, {"temp": 0.1, "repetition_penalty": 1}, "") for name in ("top_p", "seed", "temp")),
        ("repetition_context_size", {"repetition_penalty": 1}, "without --repetition-penalty"),
        ("repetition_context_size", {"repetition_penalty": 1.1}, ""),
        ("repetition_penalty", {"temp": 0, "repetition_penalty": 1}, ""),
    ],
)
def test_why_a_setting_is_idle(name, settings, why):
    assert options.why_idle(name, settings) == why


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("command"))


def loading(name, **more):
    plain = {"window": None, "sinks": None, "dtype": None, "q_bits": None, "ahn": None}
    return {"name": str(name), **plain, **more}


@pytest.mark.parametrize("words", [("digest", "a.txt", "-o", "a"), ("generate", "a"), ("serve",)])
def test_groups_are_of_quantized_caches(words, tmp_path):
    place = ("--model", str(tmp_path / "none"))
    said = refusal(*words, *place, "--kv-group-size", "32")
    assert "--kv-group-size has no effect without --kv-bits" in said
    assert "no effect" not in refusal(*words, *place, "--kv-group-size", "32", "--kv-bits", "8")


def test_tasks_that_are_made_here_have_a_size():
    for command in SYNTHETIC:
        found = {p.name: p for p in command.params}
        assert [found[name].default for name in ("length", "items")] == [2048, 4], command.name
        assert all(found[name].show_default for name in ("length", "items"))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("a-4bit", 4), ("a-8bit", 8), ("a-3", None), ("a-3b", None), ("rabbit", None)],
)
def test_bits_of_a_model_stand_at_the_end_of_its_name(name, bits, tmp_path):
    assert _place(tmp_path / name)["bits"] == bits


def test_a_model_is_loaded_as_it_was_asked_for(directory, tmp_path):
    model, tokenizer = options.load_model(loading(directory, window=7, sinks=2, dtype="float16"))
    assert (model.ahn.window, model.ahn.sinks) == (7, 2) and tokenizer.vocab_size == 256
    assert vars(model.origin) == {
        "name": str(directory),
        "dtype": "float16",
        "q_bits": None,
        "ahn": None,
    }
    assert str(model.layers[0].self_attn.q_proj.weight.dtype) == "mlx.core.float16"
    assert model.ranks is None
    with pytest.raises(AHNError, match="--q-bits has no effect"):
        options.load_model(loading(directory, q_bits="8"))
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    model, _ = options.load_model(loading(base, ahn=memory))
    assert model.ahn.window == 60 and model.origin.ahn == str(memory)


def test_a_memory_names_its_base_unless_a_model_is_typed(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    few = ["-m", 1, "--ahn", memory, "--json", "Hi"]
    found = json.loads(invoke("generate", *few).stdout)
    assert found["model"] == str(base)
    assert "no-such" in str(invoke("generate", *few, "--model", "no-such").exception)


def test_the_bits_of_a_published_name_reach_who_loads_it(monkeypatch):
    asked = {}

    def resolve(name, q_bits):
        asked[name] = q_bits
        raise AHNError("as far as that")

    monkeypatch.setattr("ahn_mlx.hub.download.resolve", resolve)
    for bits in (None, "0", "8"):
        with pytest.raises(AHNError, match="as far as that"):
            options.load_model(loading("ahn-gdn-3b", q_bits=bits))
        assert asked.pop("ahn-gdn-3b") == (None if bits is None else int(bits))


# --- slips ---


AFTER = "A text that begins with a dash goes after --, as in: --"


@click.command(cls=Command)
@click.argument("file", cls=Word, metavar="FILE")
@click.argument("words", nargs=-1)
@click.option("--memory", "file", type=click.Path())
@click.option("--out", "-o", type=click.Path(), multiple=True)
@click.option("--text", multiple=True)
@click.option("--prompt", default="-")
@click.option("--max-tokens", "--max", default=2)
@click.option("--old", default=2)
@click.option("-v", is_flag=True)
def made(**given):
    click.echo(json.dumps(given))


@click.command(cls=Command)
@click.argument("many", cls=Word, nargs=-1, metavar="FILE...", needed=True)
@click.option("--many", "-f", multiple=True)
@click.option("--quiet", "-q", is_flag=True)
@click.option("--size", type=int)
def several(**given):
    click.echo(json.dumps(given))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a\0b"], "'a\\x00b' has a NUL in it."),
        (["--max_tokens=1"], "No such option '--max_tokens'. Did you mean --max-tokens?"),
        (["-max=1"], "No such option '-max=1'. Did you mean --max?"),
        (["\u2013v"], "No such option '\u2013v'. Did you mean -v?"),
        (["--v"], "No such option '--v'. Did you mean -v?"),
        (["\u2014o=3"], "No such option '\u2014o=3'. Did you mean -o?"),
        (["--zzz"], "No such option '--zzz'."),
        (["--out="], "--out is empty; give a name or leave it out."),
        (["--memory", ""], "--memory is empty; give a name or leave it out."),
        (["--out", "a", "--out", ""], "--out is empty; give a name or leave it out."),
        (["", "b"], "FILE is empty; give a name or leave it out."),
        (["--prompt", "a", "--prompt", "b"], "--prompt is given twice; give it once."),
        (["--memory", "a", "--memory", "b"], "--memory is given twice; give it once."),
        (["--out", "--prompt"], "Option '--out' requires an argument, before --prompt."),
        (["-o", "-v"], "Option '--out' requires an argument, before -v."),
        (["a", "--memory", "b"], "'a' and --memory both say it; give one."),
        (
            ["--max-new-tokens", "3"],
            "No such option '--max-new-tokens'. Did you mean --max-tokens?",
        ),
        (["--ctx-size", "3"], "No such option '--ctx-size'."),
        (["--question", "3"], "No such option '--question'. Did you mean --prompt?"),
        (["--file", "3"], "No such option '--file'. Did you mean --text?"),
        (["--system", "3"], "No such option '--system'."),
        (["--plot", "3"], "--plot is now --out."),
        (
            ["-5 is " + "x" * 50],
            f"No such option '-5'. {AFTER} {'-5 is ' + 'x' * 34!r}",
        ),
        (
            ["--zzz=a b"],
            f"No such option '--zzz'. {AFTER} '--zzz=a b'",
        ),
    ],
)
def test_a_slip_has_its_answer(words, said):
    assert refusal(*words, command=made) == said


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], {}),
        (["a"], {"file": "a"}),
        (["--memory", "a"], {"file": "a"}),
        (["a", "b", "c"], {"file": "a", "words": ["b", "c"]}),
        (["--text", "a", "--text", "b"], {"text": ["a", "b"]}),
        (["--max", "1", "--max", "3"], {"max_tokens": 3}),  # the last counts
        (["--prompt", ""], {"prompt": ""}),
        (["--", "-max=1"], {"file": "-max=1"}),
        (["--", "a", "--max"], {"file": "a", "words": ["--max"]}),
        (["-"], {"file": "-"}),
        (["--"], {}),
        (["a", ""], {"file": "a", "words": [""]}),
    ],
)
def test_what_is_no_slip_is_taken(words, found):
    done = CliRunner().invoke(made, words)
    plain = {"file": None, "words": [], "out": [], "text": [], "prompt": "-"}
    plain |= {"max_tokens": 2, "old": 2, "v": False}
    assert json.loads(done.output) == {**plain, **found}


def test_words_follow_what_options_say():
    done = CliRunner().invoke(several, ["a", "-f", "b", "c", "--many", "d"])
    assert json.loads(done.output)["many"] == ["b", "d", "a", "c"]
    assert refusal(command=several) == "Missing argument FILE (or --many)."
    done = CliRunner().invoke(several, ["-f", "b"])
    assert json.loads(done.output) == {"many": ["b"], "quiet": False, "size": None}
    context = several.make_context("several", ["a"])
    assert context.get_parameter_source("many") is ParameterSource.COMMANDLINE
    # A number that is missing is click's to name, and a file may be called like one.
    assert "'x' is not a valid integer" in refusal("a", "--size", "x", command=several)
    word = several.params[0]
    assert word.make_metavar(context) == "FILE..." and not word.required
    assert made.params[0].make_metavar(context) == "[FILE]"
    assert Word(["a"], needed=True).make_metavar(context) == ""


def test_a_mistake_belongs_to_the_command_that_made_it():
    for words in (["--zzz"], ["--out"], ["a", "--memory", "b"], ["\u2013v"]):
        done = CliRunner().invoke(made, words, standalone_mode=False)
        assert done.exception.ctx.command is made, words
    for words in (["zzz"], ["memory", "zzz"], ["memory", "-z"], ["-z"], ["--model", "x"]):
        done = CliRunner().invoke(cli, words, standalone_mode=False)
        command = cli if words[0] != "memory" else cli.get_command(click.Context(cli), "memory")
        assert done.exception.ctx.command is command, words


def test_completion_needs_nothing():
    context = several.make_context("several", ["--zzz"], resilient_parsing=True)
    assert context.params["quiet"] is not None


def test_old_and_foreign_names_are_no_names_of_ours():
    names = {o for _, command in commands() for p in command.params for o in p.opts}
    for old, new in RENAMED.items():
        assert new in names, old
    assert all(new in names for news in ELSEWHERE.values() for new in news)
    assert not names & set(ELSEWHERE)


@click.group(cls=Group)
@click.option("--verbose", is_flag=True)
def grouped(verbose):
    """A group."""


grouped.add_command(made)
grouped.add_command(several)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mad"], "No such command 'mad'. Did you mean made?"),
        (["zzz"], "No such command 'zzz'."),
        (["--verbos"], "No such option '--verbos'. Did you mean --verbose?"),
        (["--zzz"], "No such option '--zzz'. Options come after a command."),
        (
            ["--zzz", "a b", "made", "c"],
            "Options come after the command. Did you mean grouped made --zzz 'a b' c?",
        ),
        (
            ["-z", "several", "made"],
            "Options come after the command. Did you mean grouped several -z made?",
        ),
        (["--", "--zz"], "No such option '--zz'. Options come after a command."),
    ],
)
def test_a_slip_before_a_command(words, said):
    assert refusal(*words, command=grouped) == said


def test_quiet_drops_what_is_said_on_stderr():
    @click.command(cls=Command)
    @options.quiet_option
    def talk():
        click.echo("out")
        click.echo("err", err=True)
        print("err", file=sys.stderr)

    quiet, loud = (CliRunner().invoke(talk, words) for words in (["-q"], []))
    assert (quiet.stdout, quiet.stderr) == ("out\n", "")
    assert (loud.stdout, loud.stderr) == ("out\n", "err\nerr\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_that_is_one_process_refuses_to_be_one_of_several(rank, monkeypatch):
    monkeypatch.setenv("MLX_RANK", rank)
    assert Command.alone and not Several.alone
    assert refusal("a", command=made) == "made is one process; start it without mlx.launch"
    ran = CliRunner().invoke(Several("ran", callback=lambda: click.echo("ran")), [])
    assert ran.output == "ran\n"


# --- several processes ---


@pytest.fixture
def launched(monkeypatch):
    """One of several processes, which joins the others as these say."""
    monkeypatch.setenv("MLX_RANK", "1")
    settled = []
    kinds = []
    here = SimpleNamespace(rank=1, settle=lambda: settled.append(1), settled=settled, kinds=kinds)
    here.share = lambda make: ("shared", make())

    def join(kind):
        kinds.append(kind.__name__)
        return here

    monkeypatch.setattr("ahn_mlx.model.ranks.join", join)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    yield here
    ranks._here = None


def on_ranks(callback, *more):
    return ranks.OnRanks("it", callback=callback, params=[*more])


def test_one_process_shares_with_itself(capsys):
    assert ranks.here() is None and ranks.is_first() and ranks.share(lambda: 5) == 5
    command = ranks.pipeline_option(click.command(cls=ranks.OnRanks)(lambda: click.echo("ran")))
    assert CliRunner().invoke(command, []).output == "ran\n"
    with pytest.raises(AHNError, match="--pipeline has no effect on one process"):
        command.main(["--pipeline"], standalone_mode=False)
    assert not ranks.is_lost(RuntimeError("[ring] gone"))


@pytest.mark.parametrize("words", [[], ["--pipeline"]])
def test_a_rank_is_silent_and_asks_the_first(launched, words):
    seen = {}

    @ranks.pipeline_option
    @click.command(cls=ranks.OnRanks)
    def work():
        print("heard by nobody")
        print("nor this", file=sys.stderr)
        seen.update(here=ranks.here(), first=ranks.is_first(), stdin=sys.stdin)
        seen["shared"] = ranks.share(lambda: 7)
        seen["lost"] = [
            ranks.is_lost(RuntimeError(f"{x} gone")) for x in ("[ring]", "[mpi]", "[x]")
        ]
        return 3

    sys.stdin = io.StringIO("a line\nanother\n")
    out, err = sys.stdout, sys.stderr
    assert work.main(words, standalone_mode=False) == 3
    assert sys.stdout is sys.stderr and sys.stdout.name == os.devnull
    sys.stdout, sys.stderr = out, err
    assert seen["here"] is launched and not seen["first"] and seen["shared"] == ("shared", 7)
    assert seen["lost"] == [True, True, False]
    assert launched.kinds == [("Pipeline" if words else "Ranks")] and launched.settled == [1]
    lines = seen["stdin"]
    assert lines.isatty() and lines.buffer is lines
    assert lines.readline() == ("shared", "a line\n")
    with pytest.raises(AHNError, match="has no end; give a file, or the words"):
        lines.read()
    launched.rank = 0
    assert ranks.is_first()


def test_the_first_rank_is_heard(launched, monkeypatch, capsys):
    monkeypatch.setenv("MLX_RANK", "0")
    on_ranks(lambda: print("heard")).main([], standalone_mode=False)
    assert capsys.readouterr().out == "heard\n"


def test_a_fault_on_a_rank_is_heard(launched, monkeypatch):
    def broken():
        raise ValueError("a fault of ours")

    silent, real = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", real)
    with pytest.raises(ValueError, match="of ours"):
        on_ranks(broken).main([], standalone_mode=False)
    assert sys.stderr is real and launched.settled == []
    assert silent.getvalue() == ""


def test_why_a_rank_ends_is_said_late(monkeypatch):
    waited, heard = [], io.StringIO()
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "__stderr__", heard)
    monkeypatch.setenv("MLX_RANK", "2")
    ranks.fail("error: no")
    assert waited == [5.0] and heard.getvalue() == "rank 2: error: no\n"


# --- how it ends ---


@pytest.fixture
def end(monkeypatch, capsys):
    """The exit code and what was said, of a doctor who does this."""

    def run(does, *words):
        if does is not None:
            monkeypatch.setattr("ahn_mlx.measure.doctor.examine", does)
        monkeypatch.setattr(sys, "argv", ["ahn-mlx", *(words or ("doctor",))])
        with pytest.raises(SystemExit) as left:
            program.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return run


def raising(error):
    def does():
        raise error

    return does


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (AHNError("no  such\nthing"), 2, "error: no such thing\n"),
        (click.ClickException("a b"), 2, "error: a b\n"),
        (KeyboardInterrupt(), 130, "\n"),  # below the terminal's own ^C
        (click.Abort(), 130, ""),
        (OSError(errno.ENOSPC, "No space", "/a/b"), 2, "error: /a/b: No space\n"),
        (OSError(errno.ENOSPC, "No space"), 2, "error: No space\n"),
        (OSError("odd"), 2, "error: odd\n"),
        (
            MemoryError("x"),
            2,
            "error: not enough memory (x); close other programs, or take a smaller model or text\n",
        ),
        (SystemExit(7), 7, ""),
    ],
)
def test_a_command_ends_with_one_line_and_a_code(error, code, said, end):
    assert end(raising(error)) == (code, "", said)


def test_a_command_that_ends_well_has_the_code_0(end):
    code, out, _ = end(lambda: [])
    assert (code, out) == (0, "everything needed is there\n")
    assert end(None, "--version") == (0, f"ahn-mlx, version {__version__}\n", "")
    code, out, err = end(None, "help")
    assert code == 0 and err == "" and out.startswith("Usage: ahn-mlx [OPTIONS] COMMAND")
    assert end(None, "-h") == (0, out, "")
    code, out, err = end(None, "zzz")
    assert (code, out, err) == (2, "", "error: No such command 'zzz'. See ahn-mlx --help\n")
    code, out, err = end(None, "memory", "info")
    assert code == 2 and err.endswith(" See ahn-mlx memory info --help\n")


def test_a_command_without_words_says_what_there_is(monkeypatch, capsys):
    for words in ([], ["memory"]):
        monkeypatch.setattr(sys, "argv", ["ahn-mlx", *words])
        with pytest.raises(SystemExit) as left:
            program.main()
        said = capsys.readouterr()
        assert left.value.code == 2 and said.out == "" and "Usage: ahn-mlx" in said.err


def test_a_fault_of_ours_is_a_traceback(end, monkeypatch):
    for lost in (RuntimeError("[ring] a peer"), ValueError("odd")):
        with pytest.raises(type(lost)):
            end(raising(lost))
    monkeypatch.setattr(ranks, "_here", SimpleNamespace(rank=0))
    assert end(raising(RuntimeError("[ring] a peer"))) == (
        2,
        "",
        f"error: {' '.join(LOST.split())}\n",
    )
    assert issubclass(Lost, AHNError)


def test_what_another_rank_fails_by_is_said_by_it(end, monkeypatch):
    heard = io.StringIO()
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "__stderr__", heard)
    code, out, err = end(None)
    assert (code, out, err) == (2, "", "")
    assert heard.getvalue().startswith("rank 1: error: ahn-mlx doctor is one process")


def test_a_reader_who_has_left_ends_it_quietly(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ahn-mlx", "doctor"])
    monkeypatch.setattr("ahn_mlx.measure.doctor.examine", raising(BrokenPipeError()))
    with (tmp_path / "out").open("w") as out, redirect_stdout(out):
        with pytest.raises(SystemExit) as left:
            program.main()
        print("to nobody", flush=True)
    assert left.value.code == 1 and (tmp_path / "out").read_text() == ""


def test_a_directory_that_is_gone_is_named(end, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert program._gone_directory() == ""
    (tmp_path / "here").rmdir()
    for known, name in (("/a/b", "/a/b"), (None, "the working directory")):
        monkeypatch.setenv("PWD", known) if known else monkeypatch.delenv("PWD")
        said = f"error: {name}: the working directory is not there any more; cd to another\n"
        assert end(raising(FileNotFoundError(2, "No such file", "x"))) == (2, "", said)
    monkeypatch.chdir(tmp_path)


def test_streams_that_are_closed_lead_nowhere(monkeypatch):
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        kept = getattr(sys, name)
        monkeypatch.setattr(sys, name, None)
        program._open_streams()
        found = getattr(sys, name)
        assert (found.name, found.mode, found.encoding) == (os.devnull, mode, "utf-8")
        found.close()
        monkeypatch.setattr(sys, name, kept)
        program._open_streams()
        assert getattr(sys, name) is kept


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    into = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", into)
    program._tolerate()
    out.write("caf\u00e9")
    out.flush()
    assert out.buffer.getvalue() == b"caf?" and into.read() == "caf\udce9"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    program._tolerate()  # of other streams nothing is asked


def test_a_file_instead_of_a_command_is_answered_with_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, reads in (("book.ahn", "ask"), ("ahn", "generate"), ("a.txt", "generate")):
        (tmp_path / name).touch()
        assert refusal(name) == (
            f"No such command {name!r}. Of a file: ahn-mlx {reads} {name!r} 'A question?'"
        )
    assert refusal("absent.ahn") == "No such command 'absent.ahn'."
    assert "Did you mean ahn-mlx memory info 'absent.ahn'?" in refusal("memory", "absent.ahn")
    assert "Did you mean ahn-mlx memory info 'a.txt'?" in refusal("memory", "a.txt")
    assert refusal("memory", "b.txt") == "No such command 'b.txt'."


def test_the_overview_has_every_command_and_its_line():
    shown = invoke("--help").output
    part = " ".join(shown.split("Commands:")[1].split())
    assert part == " ".join(f"{name} {line}" for name, (_, _, line) in COMMANDS.items())
    assert cli.list_commands(click.Context(cli)) == list(COMMANDS)
    assert cli.get_command(click.Context(cli), "zzz") is None
    for name in COMMANDS:
        assert invoke("help", name).output == invoke(name, "--help").output != ""
    assert parsing.spelling(made.params[3]) == "--out"
