"""Options that several commands have, what they mean, and which have no effect when."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ..errors import AHNError
from ..hub.published import CONVERTED, DEFAULT, has_bits_to_choose
from ..platform import default_dtype, enough_memory
from ..reading.sampling import Sampling, complaint
from .command import QUIET, spelling
from .ranks import here
from .terminal import say, waiting

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def is_given(name: str) -> bool:
    """Whether an option of the command that runs was typed, by the name of its parameter."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source not in (
        ParameterSource.DEFAULT,
        ParameterSource.DEFAULT_MAP,
    )


def no_effect(*names: str, when: Callable[[dict[str, Any]], Any], why: str) -> Decorator:
    """Refuse options that were typed where they change nothing.

    names: of their parameters. when: whether these options make them idle. why: in which case,
    and what to do; may name {options}. Raises AHNError before the command begins.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def checked(**options: Any) -> Any:
            for parameter in click.get_current_context().command.params:
                if parameter.name in names and is_given(parameter.name) and when(options):
                    option = spelling(parameter)
                    raise AHNError(f"{option} has no effect {why.format(**options)}")
            return command(**options)

        return checked

    return add


def _on_its_base(command: Callable[..., Any]) -> Callable[..., Any]:
    """A trained memory knows the base that it belongs to."""

    @functools.wraps(command)
    def named(**options: Any) -> Any:
        if options["ahn"] and not is_given("name"):
            from ..hub.bases import base_of

            options["name"] = base_of(options["ahn"])
        return command(**options)

    return named


def complete_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """For the shell: names of files."""
    return [CompletionItem(incomplete, type="file")]


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """For the shell: models that have a name or are on this machine, else directories."""
    from ..hub.published import model_names

    names = [n for n in model_names() if n.startswith(incomplete)]
    return [CompletionItem(n) for n in names] or [CompletionItem(incomplete, type="dir")]


def _model(**attributes: Any) -> Decorator:
    about = {"help": "Name, ORG/NAME or directory.", **attributes}
    return click.option("--model", "name", shell_complete=complete_model, **about)


model_option = _model(default=DEFAULT, show_default=True)
plain_model_option = _model()
moved_model_option = _model(help="Where the model is now. Default: as when digested.")
moved_ahn_option = click.option(
    "--ahn", type=click.Path(path_type=Path), help="Where its trained memory is now."
)
text_option = functools.partial(
    click.option, "--text", metavar="FILE", shell_complete=complete_file
)
memory_option = click.option(
    "--memory", "file", type=click.Path(path_type=Path), help="From ahn-mlx digest."
)
prompt_file_option = click.option(
    "-f",
    "--prompt-file",
    multiple=True,
    metavar="FILE",
    shell_complete=complete_file,
    help="Document to read; - is standard input. Repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one object of JSON.")
quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=lambda ctx, param, value: ctx.meta.update({QUIET: value}),
    help="Nothing on stderr but errors.",
)

_LOADING = (
    model_option,
    click.option(
        "--ahn",
        type=click.Path(path_type=Path),
        help="Memory from ahn-mlx train, put on --model; by default on the base it was trained on.",
    ),
    click.option("--window", type=int, help="Tokens kept losslessly. Default: the model's."),
    click.option("--sinks", type=int, help="First tokens kept for ever. Default: the model's."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Default: float32 on the CPU, else as stored.",
    ),
    click.option(
        "--q-bits",
        type=click.Choice(["0", "4", "8"]),
        help="Base of a published name. [default: 4]",
    ),
    no_effect("q_bits", when=lambda options: options["ahn"], why="with --ahn: a base is as it is"),
    no_effect(
        "q_bits",
        when=lambda options: not has_bits_to_choose(options["name"]),
        why=f"on {{name}}: {CONVERTED}",
    ),
    _on_its_base,
)
# Settings of answers that change nothing: which, when, and what is said of it.
_IDLE: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], bool], str], ...] = (
    (
        ("top_p", "top_k", "min_p", "seed"),
        lambda options: options["temp"] == 0,
        "at --temp 0, which is greedy; give --temp",
    ),
    (
        ("repetition_context_size",),
        lambda options: options["repetition_penalty"] == 1,
        "without --repetition-penalty",
    ),
)
_SAMPLING: tuple[Decorator, ...] = (
    click.option("-m", "--max-tokens", default=256, show_default=True, help="Longest answer."),
    click.option("--temp", default=0.0, show_default=True, help="Temperature; 0 is greedy."),
    click.option("--top-p", default=1.0, show_default=True, help="Nucleus sampling."),
    click.option("--top-k", default=0, show_default=True, help="Draw from so many; 0: all."),
    click.option("--min-p", default=0.0, show_default=True, help="Least part of the likeliest."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option(
        "--repetition-penalty", default=1.0, show_default=True, help="Of repeated tokens; 1: none."
    ),
    click.option(
        "--repetition-context-size",
        default=20,
        show_default=True,
        help="Tokens it looks back; 0: all that was ever read.",
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="Ends the answer before it. Repeatable."
    ),
    *(no_effect(*names, when=when, why=why) for names, when, why in _IDLE),
)
_TEMPLATE = (
    click.option(
        "--system-prompt",
        "system",
        default="",
        help="System message. Default: the chat template's.",
    ),
    click.option(
        "--ignore-chat-template", "no_chat_template", is_flag=True, help="Read the text as it is."
    ),
    no_effect(
        "system",
        when=lambda options: options["no_chat_template"],
        why="with --ignore-chat-template, which has no messages",
    ),
)
_WINDOW_BITS = (
    click.option("--kv-bits", type=click.Choice(["8", "4"]), help="Quantize sinks and window."),
    click.option(
        "--kv-group-size",
        type=click.Choice(["32", "64", "128"]),
        default="64",
        show_default=True,
        help="Numbers that share a scale.",
    ),
    no_effect(
        "kv_group_size",
        when=lambda options: options["kv_bits"] is None,
        why="without --kv-bits",
    ),
)


def _all(options: tuple[Decorator, ...]) -> Decorator:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


loading_options = _all(_LOADING)
sampling_options = _all(_SAMPLING)
template_options = _all(_TEMPLATE)
window_bits_options = _all(_WINDOW_BITS)
force_option = click.option("--force", is_flag=True, help="Replace a file that is there.")

needs_memory = enough_memory("take a smaller model, fewer --q-bits or a smaller --window")


def check_numbers(options: dict[str, Any]) -> None:
    """Raise AHNError for a number out of range, of whichever of these options are there."""
    lows = {"window": 1, "sinks": 0, "prefill_step_size": 1, "checkpoint_every": 1, "chunk": 1}
    for name, low in lows.items():
        value = options.get(name)
        if value is not None and value < low:
            raise AHNError(f"{_option(name)} must be at least {low}, not {value}")
    for name, value in sampling_of(options).items():
        if wrong := complaint(name, value):
            raise AHNError(f"{_option(name)} {wrong}")


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """Those of these options that say how an answer is drawn, as Sampling takes them."""
    return {k: options[k] for k in Sampling.__dataclass_fields__ if k in options}


def why_idle(name: str, sampling: dict[str, Any]) -> str:
    """Why one of these settings changes nothing, in the words of the command line, or ""."""
    return next((why for names, when, why in _IDLE if name in names and when(sampling)), "")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def load_model(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of the loading options."""
    with waiting(f"loading {options['name']}"):
        from ..hub import zoo

        model, tokenizer = zoo.load(
            options["name"],
            window=options["window"],
            sinks=options["sinks"],
            dtype=options["dtype"],
            q_bits=None if options["q_bits"] is None else int(options["q_bits"]),
            ahn=options["ahn"],
            ranks=here(),
        )
    bits = next((m.bits for m in model.modules() if hasattr(m, "bits")), None)
    if bits and default_dtype() is not None:
        say(f"note: weights are packed in {bits} bits, which a CPU multiplies slowly")
    return model, tokenizer
