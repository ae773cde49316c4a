"""What /set changes: the sampling options of the command line, typed without their dashes."""

import shlex
from typing import Any

import click

from ..errors import AHNError, show
from .options import check_numbers, sampling_options, why_idle

_SETTER = click.command(sampling_options(lambda **options: None))
_SETTINGS = {str(p.name): p for p in _SETTER.params if not getattr(p, "is_flag", False)}
NAMES = tuple(name.replace("_", "-") for name in _SETTINGS)


def row(name: str, value: Any, width: int = 0) -> str:
    """A setting and its value as they are typed."""
    if isinstance(value, tuple | list):
        value = " ".join(map(repr, value)) or None
    return f"{name.replace('_', '-'):<{width}} {'none' if value is None else value}"


def change(typed: str, sampling: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The sampling after `NAME VALUE`, or `NAME` alone, and what to say of it. Raises AHNError."""
    name, _, value = typed.partition(" ")
    parameter = _SETTINGS.get(name.removeprefix("--").replace("-", "_").lower())
    if parameter is None:
        raise AHNError(f"no setting {name}; there are {', '.join(NAMES)}")
    key, why = str(parameter.name), ""
    if value.strip():
        sampling = {**sampling, key: _value(parameter, value.strip())}
        try:
            check_numbers(sampling)
        except AHNError as e:
            raise AHNError(str(e).removeprefix("--")) from None
        if sampling[key] != _value(parameter, "none"):
            why = why_idle(key, sampling).replace("give --", "/set ").replace("--", "")
    return sampling, [row(key, sampling[key]), *([f"it has no effect {why}"] if why else ())]


def _value(parameter: click.Parameter, typed: str) -> Any:
    """A value as the command line would take it, or the default. Raises AHNError."""
    name, option = str(parameter.name), max(parameter.opts, key=len)
    try:
        words = shlex.split(typed) if parameter.multiple else [typed]
        given = [] if typed.lower() in ("none", "default") else [f"{option}={w}" for w in words]
        value: Any = _SETTER.make_context("/set", given).params[name]
    except click.UsageError:
        kind = "a whole number" if parameter.type is click.INT else "a number"
        raise AHNError(f"{option.lstrip('-')} must be {kind}, not {show(typed)}") from None
    except ValueError:
        raise AHNError(f"{option.lstrip('-')}: the quotation does not end") from None
    return value
