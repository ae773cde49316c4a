"""ahn-mlx memory info, verify: what is in a memory file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from .command import Group
from .options import json_option
from .terminal import day, in_bytes


class Memory(Group):
    """Knows a file where a command should be."""

    def no_such(self, ctx: click.Context, typed: str) -> str:
        if typed.endswith(".ahn") or Path(typed).is_file():
            return f"No such command {typed!r}. Did you mean ahn-mlx memory info {typed!r}?"
        return super().no_such(ctx, typed)


@click.group(cls=Memory)
def memory() -> None:
    """Look into the files that ahn-mlx digest writes.

    \b
    ahn-mlx memory info book.ahn
    ahn-mlx memory verify book.ahn
    """


@memory.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def info(file: Path, as_json: bool) -> None:
    """Print what was read, by which model, and the sizes of what is kept."""
    about = describe(file)
    if as_json:
        click.echo(json.dumps(about, ensure_ascii=True))
        return
    for label, value in _rows(about):
        # A file may come from anyone: no control characters reach the terminal.
        text = "".join(c if c.isprintable() else " " for c in value)
        click.echo(f"{label:<20} {text}".rstrip())


def describe(file: Path) -> dict[str, Any]:
    """What a memory says of itself; sizes in bytes, times in seconds since 1970."""
    from ..checkpoints.safetensors import read_header
    from ..reading.layout import kind_of, tokens_of
    from ..reading.memoryfile import read_facts

    facts, header = read_facts(file), read_header(file)
    parts = dict.fromkeys(("window, sinks, gates", "state", "trace", "tail", "tokens seen"), 0)
    for name, tensor in header.items():
        parts[_part(name)] += tensor.end - tensor.begin
    windows = [layer for layer in facts["layers"] if kind_of(layer) == "window"]
    return {
        "file": str(file),
        "version": facts["version"],
        "model": facts["model"]["name"],
        "kind": facts.get("memory"),
        "dtype": facts.get("base", {}).get("dtype"),
        "bits": facts.get("base", {}).get("bits"),
        "window_bits": windows[0][3] if windows else None,
        "window": facts["window"],
        "sinks": facts["sinks"],
        "system": facts["system"],
        "tokens": facts["tokens"],
        "step": facts["step"],
        "tail": max(0, facts["tokens"] - tokens_of(facts["layers"][0])),
        "turn": facts["turn"],
        "unfinished": "job" in facts,
        "saved": facts["saved"],
        "texts": facts.get("texts", []),
        "earlier_texts": facts.get("earlier", 0),
        "begins": facts["preview"],
        "bytes": {**parts, "file": file.stat().st_size},
    }


def _part(name: str) -> str:
    if name in ("tail", "pending") or ".tail." in name:
        return "tail"
    if name == "seen":
        return "tokens seen"
    if ".trace." in name:
        return "trace"
    return "state" if name.endswith(".memory") else "window, sinks, gates"


def _rows(about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = about["kind"] and f"{about['kind']}, {about['dtype']}"
    bits = [f"{about[k]}-bit {what}" for k, what in BITS.items() if about[k] is not None]
    yield "model", about["model"] or "(not said; give --model to ask)"
    yield "memory", ", ".join([kind or "(version 1 does not say)", *bits])
    yield "window + sinks", f"{about['window']:,} + {about['sinks']:,} tokens"
    if about["system"]:
        yield "system message", about["system"][:LONGEST]
    since = f", {about['tail']:,} of them since the last step of {about['step']:,}"
    yield "tokens", f"{about['tokens']:,}{since if about['tail'] else ''}"
    yield "saved", day(about["saved"])
    if about["unfinished"]:
        yield "unfinished", "digest was stopped; the same command goes on"
    if about["earlier_texts"]:
        yield "read", f"{about['earlier_texts']:,} earlier texts"
    for text in about["texts"]:
        yield (
            "read",
            f"{day(text['read'])}  {text['tokens']:,} tokens  {text['name'] or '(no name)'}",
        )
    for part, size in about["bytes"].items():
        if size:
            yield part, in_bytes(size)
    yield "begins", about["begins"]


LONGEST = 200  # characters of a system message that are shown
BITS = {"bits": "base", "window_bits": "window"}


@memory.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def verify(files: tuple[Path, ...]) -> None:
    """Check FILES as far as that goes without their model; exit code 2 if one is damaged."""
    from ..reading.memoryfile import verify as check

    broken = []
    for file in files:
        try:
            check(file)
            click.echo(f"{file}: sound")
        except AHNError as e:
            broken.append(str(e))
    if broken:
        raise AHNError("; ".join(broken))
