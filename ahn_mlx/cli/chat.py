"""ahn-mlx chat: a conversation without end in constant memory."""

import sys
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from .ask import load_session
from .command import Word
from .options import (
    check_numbers,
    is_given,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    sampling_of,
    sampling_options,
    window_bits_options,
)
from .ranks import OnRanks, pipeline_option
from .terminal import say, warn_slow


@click.command(cls=OnRanks)
@click.argument("memory", cls=Word, metavar="FILE")
@no_effect(
    *("window", "sinks", "dtype", "q_bits", "kv_bits", "kv_group_size", "system"),
    when=lambda options: options["memory"],
    why="with --memory: {memory} goes on as it began",
)
@loading_options
@sampling_options
@window_bits_options
@click.option("--system-prompt", "system", default="", help="System message, kept in the sinks.")
@click.option(
    "--memory", type=click.Path(path_type=Path), help="Begin with a digested text or saved chat."
)
@pipeline_option
@needs_memory
def chat(**options: Any) -> None:
    """Talk without end: the memory of the conversation does not grow.

    /help lists what can be done besides talking.

    \b
    ahn-mlx chat
    ahn-mlx chat book.ahn
    ahn-mlx chat --model ahn-gdn-3b --system-prompt "You are a patient teacher."
    """
    check_numbers(options)
    from ..reading.template import TemplateError

    try:
        session = _session(options)
        if session.template:
            session.template.opening("answered")
    except TemplateError as e:
        raise AHNError(f"{e}; chat cannot do without, ahn-mlx digest and ask can") from None
    from .talk import Talk

    sys.exit(Talk(session, sampling_of(options), options["memory"], keeps=True).run())


def _session(options: dict[str, Any]) -> Any:
    """The one to begin with: of a file, or new."""
    if options["memory"]:
        name = options["name"] if is_given("name") else None
        return load_session(options["memory"], name, options["ahn"])
    warn_slow()
    model, tokenizer = load_model(options)
    from ..reading.session import Session

    session = Session(
        model,
        tokenizer,
        system=options["system"],
        kv_bits=int(options["kv_bits"]) if options["kv_bits"] else None,
        kv_group_size=int(options["kv_group_size"]),
    )
    beginning = len(session.encoder(*session.opening()))
    if options["system"] and beginning > model.ahn.sinks:
        sinks = model.ahn.sinks
        say(f"note: the system message has {beginning} tokens, of which the sinks keep {sinks}")
    return session
