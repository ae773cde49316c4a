"""ahn-mlx ask: a question to a digested document."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..reading.text import readable, typed_line
from .digest import load_as_read
from .options import check_numbers, needs_memory, sampling_options
from .terminal import Left, say, waiting, warn_slow

EXAMPLE = 'ahn-mlx ask book.ahn "Who is the captain?"'


@click.command()
@click.argument("words", metavar="[FILE] [QUESTION]", nargs=-1)
@click.option("--memory", "file", type=click.Path(path_type=Path), help="The same as FILE.")
@click.option("--model", "name", help="Where the model is now. Default: as when digested.")
@click.option("--interactive", is_flag=True, help="Several questions, each of the same memory.")
@sampling_options
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
    """
    check_numbers(options)
    file, question = _words(words, file)
    if question is None and not interactive:
        question = _piped()
        interactive = question is None
    if question is not None and not question.strip():
        raise AHNError(f"no question; give one: {EXAMPLE}")
    from .talk import Talk, print_answer, sampling_of

    session = load_session(file, name)
    code = 0
    if question is not None:
        try:
            code = print_answer(session.fork(), question, sampling_of(options))
        except KeyboardInterrupt as e:
            if not isinstance(e, Left):
                say("stopped before the answer began")
            sys.exit(130)
    if interactive:
        code = Talk(session, sampling_of(options), file, keeps=False).run()
    sys.exit(code)


def _words(words: tuple[str, ...], file: Path | None) -> tuple[Path, str | None]:
    """Which of the words is the file, and which the question."""
    if file is None:
        if not words:
            raise AHNError(f"no memory; give the file that ahn-mlx digest wrote: {EXAMPLE}")
        first, *words_left = words
        if not os.path.exists(first):
            _complain(first, words_left)
        file, words = Path(first), tuple(words_left)
    if len(words) > 1:
        whole = " ".join(words)
        if os.path.exists(words[0]):
            raise AHNError(f"{words[0]} is a second file; a question is of one memory, {file}")
        raise AHNError(
            f"the question is {len(words)} words; put it in quotes:"
            f" ahn-mlx ask {shlex.quote(str(file))} {shlex.quote(whole)}"
        )
    return file, words[0] if words else None


def _complain(first: str, rest: list[str]) -> None:
    """Raise AHNError of a file that is not there, if it was meant as the question."""
    found = next((word for word in rest if os.path.exists(word)), None)
    if found is not None:
        question = " ".join(word for word in (first, *rest) if word != found)
        right = f"ahn-mlx ask {shlex.quote(found)} {shlex.quote(question)}"
        raise AHNError(f"{first}: no such file; the file comes first: {right}")
    if len(first.split()) > 1 and not rest:
        raise AHNError(f"no memory file, only a question: ahn-mlx ask FILE {shlex.quote(first)}")


def _piped() -> str | None:
    """The question on standard input, or None if someone sits there."""
    return None if sys.stdin.isatty() else readable(typed_line(sys.stdin.read()))


def load_session(file: Path, name: str | None) -> Any:
    """The session of a memory file, with its model."""
    with waiting(f"loading {file}"):
        from ..reading import memoryfile
        from ..reading.session import Session

        facts = memoryfile.read_facts(file)
        warn_slow()
        model, tokenizer = load_as_read(facts, name)
        return Session.load(file, model, tokenizer)
