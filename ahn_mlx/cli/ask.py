"""ahn-mlx ask: a question to a digested document."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..reading.text import typed_line
from .digest import load_as_read
from .options import check_numbers, needs_memory, sampling_options
from .terminal import say, stop_between_steps, warn_slow


@click.command()
@click.argument("question", required=False, default="")
@click.option(
    "--memory", "file", required=True, type=click.Path(path_type=Path), help="From ahn-mlx digest."
)
@click.option("--model", "name", help="Where the model is now. Default: as when digested.")
@click.option("--ahn", type=click.Path(path_type=Path), help="Where its trained memory is now.")
@click.option("--interactive", is_flag=True, help="Several questions, each of the same memory.")
@sampling_options
@needs_memory
def ask(
    question: str, file: Path, name: str | None, ahn: Path | None, interactive: bool, **options: Any
) -> None:
    """Ask about a document that ahn-mlx digest has read. The memory is not changed.

    \b
    ahn-mlx ask --memory book.ahn "Who is the captain?"
    ahn-mlx ask --memory book.ahn --interactive
    """
    check_numbers(options)
    if not question.strip() and not interactive:
        raise AHNError("no question; give one, or --interactive")
    session = load_session(file, name, options["seed"], ahn)
    sampling = {k: options[k] for k in ("max_tokens", "temp", "top_p")}
    code = 0
    if question.strip():
        code = print_answer(session.fork(), question, sampling)
    for line in _typed() if interactive else ():
        print_answer(session.fork(), line, sampling)
    sys.exit(code)


def _typed() -> Iterator[str]:
    """Lines of standard input, asked for where someone is typing."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        if line := typed_line(line):
            yield line


def load_session(file: Path, name: str | None, seed: int | None, ahn: Path | None = None) -> Any:
    """The session of a memory file, with its model."""
    from ..reading import memoryfile
    from ..reading.session import Session

    facts = memoryfile.read_facts(file)
    warn_slow()
    model, tokenizer = load_as_read(facts, name, ahn)
    if seed is not None:
        import mlx.core as mx

        mx.random.seed(seed)
    return Session.load(file, model, tokenizer)


@needs_memory
def print_answer(session: Any, question: str, sampling: dict[str, Any]) -> int:
    """Stream the answer to stdout and its numbers to stderr; the exit code."""
    start, first, count, code = time.perf_counter(), 0.0, 0, 0
    with stop_between_steps() as check:
        answer = session.ask(question, progress=lambda read, total: check(), **sampling)
        try:
            for text in answer:
                first = first or time.perf_counter() - start
                count += 1
                print(text, end="", flush=True)
                check()
        except KeyboardInterrupt:
            code = 130
        finally:
            answer.close()
    print(flush=True)
    seconds = time.perf_counter() - start
    rate = (count - 1) / (seconds - first) if count > 1 else 0
    say(f"first token after {first:.1f} s | {count} tokens, {rate:.1f} tokens/s")
    return code
