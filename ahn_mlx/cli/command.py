"""How a command line is taken apart: click's way, and help where people type otherwise.

What the last version called differently is refused with its new name, what is nearly right is
answered with what is right, and what an option says can be said without it where that is clear.
"""

import io
import shlex
from contextlib import nullcontext, redirect_stderr
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ..errors import AHNError, nearest, show
from ..platform import launched_rank

QUIET = "ahn_mlx.quiet"  # of a context: whether --quiet was given
# Of the last version: the old spelling, and the new one where a command has it.
RENAMED = {
    "--base": "--model",
    "--bits": "--kv-bits",
    "--memory": "--kind",
    "--no-chat-template": "--ignore-chat-template",
    "--plot": "--out",
    "--system": "--system-prompt",
    "--weight-bits": "--q-bits",
}
# What other programs call what ours call otherwise; the first that a command has is meant.
ELSEWHERE = {
    "--context-length": ("--window",),
    "--ctx-size": ("--window",),
    "--file": ("--prompt-file", "--text", "--data"),
    "--max-kv-size": ("--window",),
    "--max-new-tokens": ("--max-tokens",),
    "--output": ("--out",),
    "--quantize": ("--q-bits",),
    "--question": ("--prompt",),
    "--temperature": ("--temp",),
}
# Of two of these one would not be read; of other options the last counts, as people expect.
ONCE = ("file", "memory", "prompt", "text")
# What may be empty: a name or a file that is, is a variable of the shell that is not set.
TEXTS = ("prompt", "stop", "system", "words")
# What editors and web pages make of a hyphen.
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"


class Word(click.Argument):
    """What an option says, typed without it: `inspect book.ahn` is `inspect --memory book.ahn`.

    Its one declaration is the name of the option's parameter, which gets the value. needed:
    whether one of the two must be given.
    """

    def __init__(self, declarations: list[str], needed: bool = False, **attributes: Any):
        self.option, self.needed = declarations[0], needed
        super().__init__([f"{self.option}_word"], required=False, **attributes)

    def make_metavar(self, ctx: click.Context) -> str:
        return self.metavar or "" if self.needed else f"[{self.metavar}]"

    def merge(self, ctx: click.Context) -> None:
        """Give the option its value. Raises click.UsageError if it has one, or there is none."""
        option = self._option(ctx)
        typed, before = ctx.params.pop(f"{self.option}_word"), ctx.params[self.option]
        if typed not in (None, ()):
            if not option.multiple and _is_typed(ctx, self.option):
                raise click.UsageError(f"{typed!r} and {spelling(option)} both say it; give one.")
            value = option.type_cast_value(ctx, typed)
            ctx.params[self.option] = (*before, *value) if option.multiple else value
            ctx.set_parameter_source(self.option, ParameterSource.COMMANDLINE)
        elif self.needed and not _is_typed(ctx, self.option):
            hint = f"{_name(self)} (or {spelling(option)})"
            raise click.MissingParameter(None, ctx, self, hint)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return self._option(ctx).shell_complete(ctx, incomplete)

    def _option(self, ctx: click.Context) -> click.Parameter:
        return next(p for p in ctx.command.params if p.name == self.option)


def spelling(parameter: click.Parameter) -> str:
    """The long one."""
    return max(parameter.opts, key=len)


def _name(parameter: click.Parameter) -> str:
    """Of an option its spelling, of an argument what the usage calls it."""
    if isinstance(parameter, click.Option):
        return spelling(parameter)
    return (parameter.metavar or parameter.name or "").strip("[].").upper()


def _is_typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


class Command(click.Command):
    """A command that knows what people type instead of its options.

    alone: whether it is one process, and refuses to be one of several.
    """

    alone = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # of the shell's completion
            return super().parse_args(ctx, args)
        options = {o: p for p in self.params for o in p.opts if isinstance(p, click.Option)}
        try:
            # No shell can give one, but a program can; no path and no text has one.
            if wrong := next((arg for arg in args if "\0" in arg), None):
                raise click.UsageError(f"{show(wrong)} has a NUL in it.")
            _refuse_dashes(args, options)
            _refuse_lost(self.make_parser(ctx).parse_args(list(args)), options)
            rest = super().parse_args(ctx, args)
            for parameter in self.params:
                if isinstance(parameter, Word):
                    parameter.merge(ctx)
        except click.NoSuchOption as e:
            raise click.UsageError(_no_such(e.option_name, args, options), ctx) from None
        except click.UsageError as e:
            e.ctx = e.ctx or ctx  # whose help is named
            raise
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run it. With --quiet what anyone says on stderr is dropped; errors are said later."""
        if self.alone and launched_rank() is not None:
            raise AHNError(f"{ctx.command_path} is one process; start it without mlx.launch")
        with redirect_stderr(io.StringIO()) if ctx.meta.get(QUIET) else nullcontext():
            return super().invoke(ctx)


class Several(Command):
    """A command that mlx.launch may start as several processes."""

    alone = False


def _refuse_dashes(args: list[str], options: dict[str, Any]) -> None:
    """Raise click.UsageError for an option with other dashes than it has."""
    for arg in args[: args.index("--")] if "--" in args else args:
        name = arg.split("=")[0].lstrip(DASHES)
        typed = arg[: len(arg.split("=")[0]) - len(name)]
        right = "-" if len(name) == 1 else "--"
        if name and typed and typed != right and right + name in options:
            raise click.UsageError(f"No such option {arg!r}. Did you mean {right + name}?")


def _refuse_lost(parsed: tuple[Any, list[str], list[Any]], options: dict[str, Any]) -> None:
    """Raise click.UsageError for texts that would not be read, for a missing value in whose
    place the next option was taken, and for names that are empty."""
    values, _, given = parsed
    for parameter in given:
        value = values.get(parameter.name)
        taken = value if isinstance(value, list | tuple) else [value]
        is_name = isinstance(parameter.type, click.Path) or parameter.type is click.STRING
        if "" in taken and is_name and parameter.name not in TEXTS:
            raise click.UsageError(f"{_name(parameter)} is empty; give a name or leave it out.")
        if not isinstance(parameter, click.Option):
            continue
        if parameter.name in ONCE and not parameter.multiple and given.count(parameter) > 1:
            raise click.UsageError(f"{spelling(parameter)} is given twice; give it once.")
        if after := next((t for t in taken if isinstance(t, str) and t in options), None):
            name = spelling(parameter)
            raise click.UsageError(f"Option {name!r} requires an argument, before {after}.")


def _no_such(typed: str, args: list[str], options: dict[str, Any]) -> str:
    new = RENAMED.get(typed)
    if new in options:
        return f"{typed} is now {new}."
    said = f"No such option {typed!r}."
    text = next((a for a in args if a.startswith(typed) and any(map(str.isspace, a))), "")
    if text:
        return f"{said} A text that begins with a dash goes after --, as in: -- {text[:40]!r}"
    meant = next((o for o in ELSEWHERE.get(typed, ()) if o in options), "")
    if not meant and typed not in ELSEWHERE:
        # Dashes, which all have, would make short ones alike.
        name = nearest(typed.lstrip("-"), (o[2:] for o in options if o.startswith("--")))
        meant = f"--{name}" if name else ""
    return f"{said} Did you mean {meant}?" if meant else said


class Group(click.Group):
    """A group that knows which command was probably meant."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = list(args)  # click takes them away
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            said = f"No such option {e.option_name!r}."
            if meant := nearest(e.option_name, [o for p in self.get_params(ctx) for o in p.opts]):
                raise click.UsageError(f"{said} Did you mean {meant}?", ctx) from None
            command = next((a for a in rest if a in self.list_commands(ctx)), "")
            if not command:
                raise click.UsageError(f"{said} Options come after a command.", ctx) from None
            rest.remove(command)
            right = shlex.join([*ctx.command_path.split(), command, *rest])
            said = f"Options come after the command. Did you mean {right}?"
            raise click.UsageError(said, ctx) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        typed = args[0]  # click takes it away
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            e.ctx = e.ctx or ctx
            if typed.startswith("-"):
                raise
            raise click.UsageError(self.no_such(ctx, typed), ctx) from None

    def no_such(self, ctx: click.Context, typed: str) -> str:
        """What is said of a command that is none."""
        said = f"No such command {typed!r}."
        meant = nearest(typed, self.list_commands(ctx))
        return f"{said} Did you mean {meant}?" if meant else said
