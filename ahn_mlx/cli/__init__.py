"""The command line. Commands are thin; each is imported when it is called.

A mistake that the user can mend is one line on stderr and exit code 2.
"""

import importlib
import io
import os
import sys
from pathlib import Path

from .. import __version__

try:
    import click
    from click.shell_completion import CompletionItem

    from ..errors import AHNError
    from ..platform import enough_memory, launched_rank
    from .command import Group
except KeyboardInterrupt:
    sys.exit(130)

# transformers warns about absent frameworks and long inputs, which are normal here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Name -> (module, attribute, line in the overview).
COMMANDS = {
    "generate": (".cli.generate", "generate", "Read a document and answer a question."),
    "digest": (".cli.digest", "digest", "Read a document once and keep what it left."),
    "ask": (".cli.ask", "ask", "Ask about a digested document."),
    "chat": (".cli.chat", "chat", "Talk without end in constant memory."),
    "serve": (".cli.serve", "serve", "Serve many clients in memory that does not grow."),
    "memory": (".cli.memory", "memory", "Look into a digested document's file."),
    "inspect": (".cli.inspect", "inspect", "Draw what a digested document left."),
    "models": (".cli.models", "models", "List models by name, and what is on this machine."),
    "families": (".cli.families", "families", "List the kinds of models a memory fits."),
    "pull": (".cli.models", "pull", "Download and convert a model."),
    "rm": (".cli.models", "rm", "Delete a converted model."),
    "convert": (".cli.convert", "convert", "Convert a checkpoint of the PyTorch release."),
    "train": (".cli.train", "train", "Train a memory for a model from texts."),
    "compare": (".cli.compare", "compare", "Measure what a memory is worth on a text."),
    "eval": (".cli.evaluate", "evaluate", "Score a model on suites and tasks made here."),
    "export-pytorch": (".cli.export", "export_pytorch", "Write a model back for PyTorch."),
    "export-app": (".cli.export_app", "export_app", "Write a model for apps without Python."),
    "upload": (".cli.export", "upload", "Put a converted model on the hub."),
    "estimate": (".cli.estimate", "estimate", "Count FLOPs and bytes of a model."),
    "bench": (".cli.bench", "bench", "Measure a model on this machine."),
    "doctor": (".cli.doctor", "doctor", "Say what this machine has and lacks."),
}


class Lazy(Group):
    """Knows its commands by name, so that help and typing errors are instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(
            importlib.import_module(module, __package__.rsplit(".", 1)[0]), attribute
        )
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def no_such(self, ctx: click.Context, typed: str) -> str:
        if Path(typed).is_file():
            reads = "ask" if typed.endswith(".ahn") else "generate"
            return f"No such command {typed!r}. Of a file: ahn-mlx {reads} {typed!r} 'A question?'"
        return super().no_such(ctx, typed)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = {name: line for name, (_, _, line) in COMMANDS.items()}
        found = [CompletionItem(n, help=h) for n, h in commands.items() if n.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Artificial Hippocampus Networks on MLX: long documents in constant memory.

    \b
    ahn-mlx generate book.txt "Who is the narrator?"
    ahn-mlx generate book.txt "How does it end?" --model ahn-gdn-3b
    ahn-mlx models
    ahn-mlx doctor
    """


def main() -> None:
    """Run a command; errors become one line and an exit code."""
    _open_streams()
    _tolerate()
    try:
        # Of the commands that have no better advice.
        with enough_memory("close other programs, or take a smaller model or text"):
            code = cli.main(prog_name="ahn-mlx", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        code = 2
    except click.UsageError as e:
        command = e.ctx.command_path if e.ctx else "ahn-mlx"
        code = _fail(f"{e.format_message()} See {command} --help")
    except (AHNError, click.ClickException) as e:
        code = _fail(str(e))
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader has left (`| head`). Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as e:
        named = f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e)
        code = _fail(_gone_directory() or named)
    except RuntimeError as e:
        from .ranks import is_lost

        if not is_lost(e):
            raise
        from ..model.ranks import LOST

        code = _fail(LOST)
    sys.exit(code or 0)


def _gone_directory() -> str:
    """What to say if the directory that the command runs in was deleted; the system names none
    where a path begins there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        here = os.environ.get("PWD", "the working directory")
        return f"{here}: the working directory is not there any more; cd to another"
    return ""


def _open_streams() -> None:
    """Streams that the caller has closed lead nowhere. Else the next file that is opened takes
    their number: MLX takes 0 for a failure, and what is printed would go into it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115, stays open
            setattr(sys, name, nowhere)


def _tolerate() -> None:
    """What a terminal cannot show is replaced, and what was typed or piped in need not be
    text: files' names and models' answers are of any kind."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _fail(message: str) -> int:
    line = f"error: {' '.join(message.split())}"
    if launched_rank():
        from .ranks import fail as say
    else:
        from .terminal import say

    say(line)
    return 2
