"""ahn-mlx chat: a conversation without end in constant memory."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..outputs.files import OutFile
from ..reading.text import read_file, typed_line, typed_path
from .ask import load_session, print_answer
from .options import (
    check_numbers,
    is_given,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    origin_of,
    sampling_options,
    window_bits_options,
)
from .terminal import say, stop_between_steps, warn_slow

HELP = """/read FILE    read a text as part of the conversation
/save FILE    write the conversation's memory
/load FILE    go on with a saved one
/stats        tokens, and bytes of memory
/reset        forget everything
/help, /quit  (Ctrl-C stops an answer, Ctrl-D quits)"""


@click.command()
@no_effect(
    *("window", "sinks", "dtype", "q_bits", "kv_bits", "kv_group_size", "system"),
    when=lambda options: options["memory"],
    why="with --memory: {memory} goes on as it began",
)
@loading_options
@sampling_options
@window_bits_options
@click.option("--system", default="", help="System message, kept in the sinks.")
@click.option(
    "--memory", type=click.Path(path_type=Path), help="Begin with a digested text or saved chat."
)
@needs_memory
def chat(**options: Any) -> None:
    """Talk without end: the memory of the conversation does not grow.

    /help lists what can be done besides talking.

    \b
    ahn-mlx chat
    ahn-mlx chat --memory book.ahn
    ahn-mlx chat --model ahn-gdn-3b --system "You are a patient teacher."
    """
    check_numbers(options)
    from ..reading.template import TemplateError

    try:
        session = _session(options)
        if session.template:
            session.template.opening("answered")
    except TemplateError as e:
        raise AHNError(f"{e}; chat cannot do without, ahn-mlx digest and ask can") from None
    _talk(session, options)


def _session(options: dict[str, Any]) -> Any:
    """The one to begin with: of a file, or new."""
    if options["memory"]:
        name = options["name"] if is_given("name") else None
        return load_session(options["memory"], name, options["seed"], options["ahn"])
    from ..reading.session import Session

    warn_slow()
    model, tokenizer = load_model(options)
    if options["seed"] is not None:
        import mlx.core as mx

        mx.random.seed(options["seed"])
    session = Session(
        model,
        tokenizer,
        origin=origin_of(options),
        system=options["system"],
        kv_bits=int(options["kv_bits"]) if options["kv_bits"] else None,
        kv_group_size=int(options["kv_group_size"]),
    )
    beginning = len(session.encoder(*session.opening()))
    if options["system"] and beginning > model.ahn.sinks:
        sinks = model.ahn.sinks
        say(f"note: the system message has {beginning} tokens, of which the sinks keep {sinks}")
    return session


def _talk(origin: Any, options: dict[str, Any]) -> None:
    """Read lines and answer them; /reset goes back to `origin`."""
    sampling = {k: options[k] for k in ("max_tokens", "temp", "top_p")}
    session = origin.fork()
    ask_user = _reader()
    while True:
        try:
            line = typed_line(ask_user())
        except EOFError:
            return
        except KeyboardInterrupt:  # an empty line, as in a shell
            continue
        if not line:
            continue
        command, *rest = line.split(None, 1)
        try:
            if not line.startswith("/"):
                print_answer(session, line, sampling)
                continue
            if command == "/quit":
                return
            session = _command(command, typed_path("".join(rest)), session, origin)
        except BrokenPipeError:  # nobody listens
            raise
        except (AHNError, OSError) as e:
            say(f"error: {e}")


def _command(command: str, argument: str, session: Any, origin: Any) -> Any:
    """Carry out a line that begins with a slash. Returns the session to go on with."""
    if command in ("/read", "/save", "/load") and not argument:
        raise AHNError(f"{command} needs a file: {command} FILE")
    if command == "/read":
        text = read_file(argument)
        other = session.fork()  # Ctrl-C leaves the conversation as it was
        with stop_between_steps() as check:
            try:
                other.read(text, lambda read: check())
            except KeyboardInterrupt:
                say("stopped; nothing of it was kept")
                return session
        say(f"read {other.tokens - session.tokens:,} tokens")
        return other
    if command == "/save":
        _save(session, Path(argument))
        say(f"saved {session.tokens:,} tokens")
    elif command == "/load":
        return type(session).load(argument, session.model, session.tokenizer)
    elif command == "/stats":
        say(f"{session.tokens:,} tokens, {session.nbytes / 1e6:.1f} MB of memory")
    elif command == "/reset":
        return origin.fork()
    elif command == "/help":
        say(HELP)
    else:
        raise AHNError(f"no such command: {command}; /help lists them")
    return session


def _save(session: Any, file: Path) -> None:
    """Write the conversation. Of what is there, only an earlier one is replaced: a digest
    may have taken hours."""
    from ..reading import memoryfile

    def is_chat(file: Path) -> bool:
        return memoryfile.is_memory(file) and bool(memoryfile.read_facts(file).get("talked"))

    OutFile(file, "a saved conversation", is_chat).check()
    session.save(file, talked=True)


def _reader() -> Callable[[], str]:
    """How to get a line from the user: with editing and history where that is possible."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: input()
    from prompt_toolkit import PromptSession

    return PromptSession("> ").prompt
