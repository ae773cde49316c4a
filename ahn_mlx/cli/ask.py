"""ahn-mlx ask: a question to a digested document."""

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError, show
from ..reading.text import readable, typed_line
from .digest import load_as_read
from .options import (
    check_numbers,
    complete_file,
    json_option,
    moved_ahn_option,
    moved_model_option,
    needs_memory,
    no_effect,
    quiet_option,
    sampling_of,
    sampling_options,
)
from .ranks import OnRanks, pipeline_option, share
from .terminal import Left, say, waiting, warn_slow
from .words import memory_and_question

EXAMPLE = 'ahn-mlx ask book.ahn "Who is the captain?"'


@click.command(cls=OnRanks)
@click.argument("words", metavar="[FILE] [QUESTION]", nargs=-1, shell_complete=complete_file)
@click.option("--memory", "file", type=click.Path(path_type=Path), help="The same as FILE.")
@click.option("-p", "--prompt", help="The same as QUESTION.")
@moved_model_option
@moved_ahn_option
@click.option("--interactive", is_flag=True, help="Several questions, each of the same memory.")
@sampling_options
@json_option
@quiet_option
@no_effect(
    "interactive",
    when=lambda options: options["as_json"],
    why="with --json, which answers one question",
)
@pipeline_option
@needs_memory
def ask(
    words: tuple[str, ...], file: Path | None, name: str | None, interactive: bool, **options: Any
) -> None:
    """Ask about FILE, which ahn-mlx digest has written. The memory is not changed.

    Without a QUESTION, it is what is piped in; at a terminal you are asked for one after
    another, and /help lists what else can be done there.

    \b
    ahn-mlx ask book.ahn "Who is the captain?"
    ahn-mlx ask book.ahn
    echo "Who is the captain?" | ahn-mlx ask book.ahn
    ahn-mlx ask book.ahn "Who is the captain?" --json
    """
    check_numbers(options)
    memory, question = share(lambda: _words(words, file, options["prompt"]))
    if question is None and not interactive:
        question = _piped()
        interactive = question is None and not options["as_json"]
        if question is None and options["as_json"]:
            raise AHNError(f"no question; give one: {EXAMPLE}")
    if question is not None and not question.strip():
        raise AHNError(f"no question; give one: {EXAMPLE}")
    from .talk import Talk, print_answer

    session = load_session(Path(memory), name, options["ahn"])
    code = 0
    if question is not None:
        try:
            code = print_answer(session.fork(), question, sampling_of(options), options["as_json"])
        except KeyboardInterrupt as e:
            if not isinstance(e, Left):
                say("stopped before the answer began")
            sys.exit(130)
    if interactive:
        code = Talk(session, sampling_of(options), Path(memory), keeps=False).run()
    sys.exit(code)


def _words(words: tuple[str, ...], file: Path | None, prompt: str | None) -> tuple[str, str | None]:
    """The file and the question, given as words or by their options."""
    found, question = memory_and_question(words)
    if question is not None and prompt is not None:
        raise AHNError(f"{show(question)} and --prompt: one question at a time")
    question = question if prompt is None else prompt
    if found is not None and file is not None:
        raise AHNError(f"{show(str(found))} is a second file; a question is of one memory, {file}")
    memory = found or file
    if memory is None:
        asked = shlex.quote(question) if question else '"Who is the captain?"'
        raise AHNError(f"which memory? Give a file of ahn-mlx digest: ahn-mlx ask FILE {asked}")
    return str(memory), question


def _piped() -> str | None:
    """The question on standard input, or None if someone sits there."""
    return None if sys.stdin.isatty() else readable(typed_line(sys.stdin.read()))


def load_session(file: Path, name: str | None, ahn: Path | None) -> Any:
    """The session of a memory file, with its model. name, ahn: where that is now, if not as the
    file says."""
    with waiting(f"loading {file}"):
        from ..reading import memoryfile
        from ..reading.session import Session

        facts = share(lambda: memoryfile.read_facts(file))
        warn_slow()
        model, tokenizer = load_as_read(facts, name, ahn)
        return Session.load(file, model, tokenizer)
