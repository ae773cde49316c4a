"""ahn-mlx eval longbench, infinitebench, lveval and score: published suites, and predictions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..hub.published import MODELS
from .command import Command
from .estimate import print_table
from .options import (
    check_numbers,
    json_option,
    load_model,
    loading_options,
    needs_memory,
    quiet_option,
)
from .ranks import OnRanks, is_first, pipeline_option
from .terminal import progress_bar, say, stop_between_steps, waiting, warn_slow

LENGTHS = ("16k", "32k", "64k", "128k", "256k")
PAPER_WINDOWS = {"longbench": (8064, 128)}  # of the others the model has the paper's
MIXERS = ("memory", "window", "full")
HEAD = ["task", "items", "score", "standard error", "paper"]


def _path(name: str, about: str, **attributes: Any) -> Callable[..., Any]:
    return click.option(*name.split("/"), type=click.Path(path_type=Path), help=about, **attributes)


_SUITE = (
    loading_options,
    click.option("--tasks", help="Of these names, with commas. Default: the paper's."),
    click.option(
        "--protocol",
        type=click.Choice(["ahn", "published"]),
        default="ahn",
        show_default=True,
        help="The paper's way, or the suite's own.",
    ),
    click.option(
        "--mixer",
        type=click.Choice(MIXERS),
        default="memory",
        show_default=True,
        help="window: the memory adds nothing; full: all of the text.",
    ),
    click.option("--limit", type=int, help="Items of each task, evenly spaced. Default: all."),
    _path("--data", "Directory with the suite's files. Default: downloaded."),
    _path("--prompts", "Directory with the prompts' file. Default: downloaded."),
    _path("-o/--out", "Directory of the predictions; a run goes on there.", required=True),
    pipeline_option,
    json_option,
    quiet_option,
    needs_memory,
)


def _suite(name: str, examples: str, length: bool = False) -> click.Command:
    def command(**options: Any) -> None:
        _ask_suite(name, options)

    command.__doc__ = examples
    decorated: Any = command
    if length:
        decorated = click.option(
            *("--length",),
            type=click.Choice(LENGTHS),
            default="128k",
            show_default=True,
            help="Of the documents, in words or characters.",
        )(decorated)
    for option in reversed(_SUITE):
        decorated = option(decorated)
    made: click.Command = click.command(name, cls=OnRanks)(decorated)
    return made


longbench = _suite(
    "longbench",
    """Questions about documents of up to 32,000 tokens; 21 tasks, the paper has six of them.

    \b
    ahn-mlx eval longbench --model ahn-gdn-3b --out longbench-3b
    ahn-mlx eval longbench --tasks hotpotqa,qmsum --mixer window -o window
    """,
)
infinitebench = _suite(
    "infinitebench",
    """Questions about whole novels, in English and Chinese.

    \b
    ahn-mlx eval infinitebench --model ahn-gdn-7b --limit 10 -o infinite-7b
    """,
)
lveval = _suite(
    "lveval",
    """Questions about documents of up to 256k words, among others that mislead.

    \b
    ahn-mlx eval lveval --model ahn-gdn-3b --limit 10 --out lveval-3b
    """,
    length=True,
)


def _ask_suite(name: str, options: dict[str, Any]) -> None:
    check_numbers(options)
    if options["limit"] is not None and options["limit"] < 1:
        raise AHNError(f"--limit must be at least 1, not {options['limit']}")
    from ..evaluate.suites import suite_of

    suite = suite_of(name, options["protocol"], options.get("length", ""))
    tasks = suite.chosen(_names(options["tasks"]))
    if options["name"] in MODELS and MODELS[options["name"]].repo and name in PAPER_WINDOWS:
        for key, value in zip(("window", "sinks"), PAPER_WINDOWS[name], strict=True):
            options[key] = value if options[key] is None else options[key]
    from ..evaluate.run import SuiteRun, check_given, follow

    if is_first():
        check_given(suite, tasks, options["data"], options["prompts"])
    warn_slow()
    model, tokenizer = load_model(options)
    if not is_first():
        with stop_between_steps() as check:
            follow(model, tokenizer, options["mixer"], check)
        return

    given = ("out", "protocol", "mixer", "limit", "data", "prompts")
    settings = {key: options[key] for key in given}
    length = options.get("length", "")
    with waiting("reading the records"):
        run = SuiteRun(suite, model, tokenizer, tasks, length=length, **settings)
        cost = run.cost()
    if cost.items:
        agree(cost, "items")
        with (
            progress_bar(cost.items, "asking", "items") as bar,
            stop_between_steps() as check,
        ):

            def asked(task: str, n: int) -> None:
                bar.update(n)
                check()

            run.ask(asked)
    _show(run.result(), options["as_json"])
    say(f"wrote {options['out'] / 'result.json'}")


def _names(tasks: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())


def agree(cost: Any, things: str) -> None:
    """Say what a run costs, and ask, where someone sits, if that is more than a minute."""
    hours, minutes = divmod(round(cost.seconds / 60), 60)
    took = f"{hours} h {minutes} min" if hours else f"{max(1, minutes)} min"
    tokens = f"{cost.tokens:,} tokens at most"
    say(f"{cost.items:,} {things}, {tokens}: about {took} at this model's speed here")
    someone = sys.stdin.isatty() and sys.stderr.isatty()
    if someone and cost.seconds > 60:
        click.confirm("go on?", default=True, abort=True, err=True)


def _show(result: dict[str, Any], as_json: bool) -> None:
    for note in result["notes"]:
        say(f"note: {note}")
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    from ..evaluate.results import rows_of

    print_table(HEAD, rows_of(result))
    for line in result["deviations"]:
        click.echo(f"differs from the paper: {line}")


@click.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--protocol",
    type=click.Choice(["ahn", "published"]),
    help="The paper's way, or the suite's own. Default: as they were made.",
)
@json_option
def score(directory: Path, protocol: str | None, as_json: bool) -> None:
    """Score predictions, also other programs', in the published layout.

    \b
    ahn-mlx eval score longbench-3b
    ahn-mlx eval score pred/my-model --protocol published
    """
    from ..evaluate.results import score_directory

    _show(score_directory(directory, protocol), as_json)
