"""Options that several commands have, what they mean, and which have no effect when."""

import functools
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from ..errors import AHNError
from ..hub.published import CONVERTED, DEFAULT, has_bits_to_choose
from ..platform import enough_memory
from .terminal import waiting

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
                    option = max(parameter.opts, key=len)
                    raise AHNError(f"{option} has no effect {why.format(**options)}")
            return command(**options)

        return checked

    return add


model_option = click.option(
    "--model", "name", default=DEFAULT, show_default=True, help="Name, ORG/NAME or directory."
)

_LOADING = (
    model_option,
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
    no_effect(
        "q_bits",
        when=lambda options: not has_bits_to_choose(options["name"]),
        why=f"on {{name}}: {CONVERTED}",
    ),
)
_SAMPLING = (
    click.option("--max-tokens", default=256, show_default=True, help="Longest answer."),
    click.option("--temp", default=0.0, show_default=True, help="Temperature; 0 is greedy."),
    click.option("--top-p", default=1.0, show_default=True, help="Nucleus sampling."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    no_effect(
        *("top_p", "seed"),
        when=lambda options: options["temp"] == 0,
        why="at --temp 0, which is greedy; give --temp",
    ),
)
_TEMPLATE = (
    click.option("--system", default="", help="System message. Default: the chat template's."),
    click.option("--no-chat-template", is_flag=True, help="Read the text as it is."),
    no_effect(
        "system",
        when=lambda options: options["no_chat_template"],
        why="with --no-chat-template, which has no messages",
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
    lows = {"max_tokens": 1, "window": 1, "sinks": 0, "prefill_step_size": 1, "checkpoint_every": 1}
    for name, low in lows.items():
        value = options.get(name)
        if value is not None and value < low:
            raise AHNError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if not options.get("temp", 0) >= 0:
        raise AHNError(f"--temp must be at least 0, not {options['temp']}")
    if not 0 < options.get("top_p", 1) <= 1:
        raise AHNError(f"--top-p must be above 0 and at most 1, not {options['top_p']}")
    seed = options.get("seed")
    if seed is not None and not 0 <= seed < 2**64:
        raise AHNError(f"--seed must be from 0 to 2**64 - 1, not {seed}")


def load_model(options: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer of the loading options."""
    from ..hub import zoo

    with waiting(f"loading {options['name']}"):
        return zoo.load(
            options["name"],
            window=options["window"],
            sinks=options["sinks"],
            dtype=options["dtype"],
            q_bits=None if options["q_bits"] is None else int(options["q_bits"]),
        )
