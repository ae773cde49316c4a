"""ahn-mlx eval lm-eval: tasks of lm-evaluation-harness."""

import sys
import tempfile
from typing import Any

import click

from ..errors import AHNError, foreign
from .command import Command
from .options import check_numbers, load_model, loading_options, needs_memory


@click.command("lm-eval", cls=Command)
@loading_options
@click.option(
    "--mixer",
    type=click.Choice(["memory", "window", "full"]),
    default="memory",
    show_default=True,
    help="window: the memory adds nothing; full: all of the text.",
)
@click.argument("args", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- ARGS")
@needs_memory
def lm_eval(args: tuple[str, ...], mixer: str, **options: Any) -> None:
    """Run tasks of lm-evaluation-harness; what stands after -- is what its own command takes.

    \b
    ahn-mlx eval lm-eval -- --tasks niah_single_1 --limit 5
    ahn-mlx eval lm-eval --model ahn-gdn-3b -- --tasks arc_easy --limit 100
    """
    check_numbers(options)
    from ..evaluate import harness  # its import registers the model

    tokenizer = load_model(options)[1]
    with tempfile.TemporaryDirectory() as directory:
        # Tasks that make their own texts measure them with a tokenizer that they load.
        tokenizer.save_pretrained(directory)
        settings = {"model": options.pop("name"), **options, "mixer": mixer}
        given = [f"{k}={v}" for k, v in settings.items() if v is not None]
        words = args[1:] if args[0] == "run" else args
        _run([*given, f"tokenizer={directory}"], list(words), harness.NAME)


def _run(given: list[str], words: list[str], name: str) -> None:
    """Its own program, which takes its words from the command line."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", "run", "--model", name, "--model_args", *given, *words]
    try:
        with foreign(lambda reason: f"lm-eval: {reason}"):
            cli_evaluate()
    except SystemExit as e:
        if e.code:
            raise AHNError("lm-eval: has said above what is wrong with its options") from None
    finally:
        sys.argv = before
