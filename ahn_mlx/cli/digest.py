"""ahn-mlx digest: a document in, its memory as a file out."""

import hashlib
import json
import os
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError, show
from ..hub.published import has_bits_to_choose
from ..outputs.files import OutFile, real_path
from ..outputs.parts import clear_parts, working_on
from .command import Word
from .options import (
    check_numbers,
    force_option,
    is_given,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    prompt_file_option,
    quiet_option,
    template_options,
    window_bits_options,
)
from .ranks import OnRanks, is_first, pipeline_option, share
from .terminal import day, in_bytes, progress_bar, say, stop_between_steps, warn_slow
from .words import is_there, looks_like_file, memory_name, read_typed


@click.command(cls=OnRanks)
@click.argument("prompt_file", cls=Word, nargs=-1, metavar="FILE...")
@no_effect(
    *("window", "sinks", "dtype", "q_bits", "kv_bits", "kv_group_size", "system"),
    "no_chat_template",
    when=lambda options: options["append"],
    why="with --append: {out} goes on as it began",
)
@no_effect("force", when=lambda options: options["append"], why="with --append, which adds")
@loading_options
@prompt_file_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="File to write. Default: that of the document, .ahn.",
)
@click.option("--append", is_flag=True, help="Go on reading where OUT stopped.")
@force_option
@window_bits_options
@template_options
@click.option("--checkpoint-every", default=16384, show_default=True, help="Tokens between saves.")
@quiet_option
@pipeline_option
@needs_memory
def digest(**options: Any) -> None:
    """Read a document once; ask about it any number of times with ahn-mlx ask.

    What was read so far is kept in OUT.partial. Ctrl-C saves there too, and the same command
    goes on from there.

    \b
    ahn-mlx digest book.txt                            # writes book.ahn
    ahn-mlx digest volume2.txt -o book.ahn --append
    ahn-mlx digest book.txt --model ahn-gdn-3b -o book.ahn --kv-bits 8
    """
    check_numbers(options)
    files = list(options["prompt_file"])
    out = options["out"] = options["out"] or Path(share(lambda: _name_for(files)))
    partial = out.parent / f"{out.name}.partial"  # "." has no name
    name = ", ".join("standard input" if f == "-" else f for f in files or ["-"])
    with ExitStack() as held:
        text = share(lambda: _text_for(held, partial, files, options))
        _digest(text, name, partial, options)


def _digest(text: str, name: str, partial: Path, options: dict[str, Any]) -> None:
    """Read the text, and write OUT."""
    out: Path = options["out"]
    warn_slow()
    session = _begun(out, options)
    if before := session.last_read(name):
        say(f"note: {before['name']} was read before, {day(before['read'])}; it is read again")
    session, done = _read(session, text, partial, options)
    finished = session.fork()
    finished.note_text(name, done["done"])
    try:
        share(lambda: _check_out(out, partial, options))
        finished.save(out)
    except AHNError as e:
        session.save(partial, **done)
        raise AHNError(f"{e}; what was read is kept in {partial}") from None
    if is_first():
        partial.unlink(missing_ok=True)
        say(f"{out}: {session.tokens:,} tokens in {in_bytes(out.stat().st_size)}")


def _name_for(files: list[str]) -> str:
    _refuse_question(files)
    return str(memory_name(files))


def _text_for(held: ExitStack, partial: Path, files: list[str], options: dict[str, Any]) -> str:
    """The text, if what it leaves can be written. Removes what killed runs have left there.
    held: gets the lock by which other runs know of this one."""
    out: Path = options["out"]
    _refuse_question(files)
    _check_out(out, partial, options)
    text = read_typed(files, has_prompt=False)
    if not text.strip():
        raise AHNError("the text is empty; give a text to read")
    held.enter_context(working_on(real_path(out)))
    _check_out(out, partial, options)  # another may just have ended
    for file in (out, partial):
        clear_parts(real_path(file))
    return text


def _begun(out: Path, options: dict[str, Any]) -> Any:
    """The session that reads the text: a new one, or where OUT stopped."""
    from ..reading import memoryfile
    from ..reading.session import Session
    from ..reading.template import TemplateError

    if options["append"]:
        facts = share(lambda: memoryfile.read_facts(out))
        name = options["name"] if is_given("name") else None
        model, tokenizer = load_as_read(facts, name, options["ahn"])
        return Session.load(out, model, tokenizer)
    model, tokenizer = load_model(options)
    try:
        return Session(
            model,
            tokenizer,
            system=options["system"],
            kv_bits=int(options["kv_bits"]) if options["kv_bits"] else None,
            kv_group_size=int(options["kv_group_size"]),
            chat=not options["no_chat_template"],
        )
    except TemplateError as e:
        raise AHNError(f"{e}; use --ignore-chat-template") from None


def _read(
    session: Any, text: str, partial: Path, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The session after the text, or after the rest of it where an earlier run was stopped,
    and what its partial file says of that. It is saved on the way; Ctrl-C saves and exits."""
    from ..reading.template import TemplateError

    try:
        opening = session.opening()
    except TemplateError as e:
        advice = "digest into another file, without --append"
        raise AHNError(f"{options['out']}: {e}; {advice}") from None
    start, job = session.tokens, _job(session, text, options)
    resumed, facts = _resume(partial, session, job)
    # A template may print the time: what was begun keeps the time of its begin.
    opening = tuple(facts.get("opening", opening))
    ids, done = session.encode(text, opening), facts.get("done", 0)
    session = resumed or session
    # Saved after full steps: a tail would be read twice.
    every = -(-options["checkpoint_every"] // session.step) * session.step
    with stop_between_steps() as check, progress_bar(len(ids), "reading", "tokens", done) as bar:
        try:
            while done < len(ids):
                block = ids[done : done + every - len(session.tail.ids)]

                def progress(read: int, done: int = done) -> None:
                    bar.update(done + read - bar.n)
                    check()

                session.read_ids(block, progress)
                done += len(block)
                if done < len(ids):
                    session.save(partial, job=job, done=done, opening=opening)
        except KeyboardInterrupt:
            read = session.tokens - start
            session.save(partial, job=job, done=read, opening=opening)
            say(f"stopped after {read:,} of {len(ids):,} tokens; the same command goes on")
            sys.exit(130)
    return session, {"job": job, "done": len(ids), "opening": opening}


def _refuse_question(files: list[str]) -> None:
    """Raise AHNError for one among the names of files."""
    for word in files:
        if is_there(word) or looks_like_file(word) or not (word.endswith("?") or " " in word):
            continue
        where = [memory_name([f]) for f in files if f != word and f != "-"]
        asks = f"ahn-mlx ask {shlex.quote(str(where[0])) if where else 'book.ahn'}"
        raise AHNError(f"digest takes no question; {asks} {shlex.quote(word)} does")


def _check_out(out: Path, partial: Path, options: dict[str, Any]) -> None:
    """Raise AHNError unless both can be written and nothing is lost by it."""
    if os.path.isfile(real_path(out)) and not (options["append"] or options["force"]):
        mend = "--append reads more into it, --force replaces it, or choose another name"
        raise AHNError(f"{out}: exists; {mend}")
    from ..reading.memoryfile import is_memory  # takes a second

    for file in (out, partial):
        OutFile(file, "a memory", is_memory).check()


def load_as_read(
    facts: dict[str, Any], name: str | None, ahn: Path | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer that fit a memory. name, ahn: where they are now, if not as it says."""
    options = {k: facts["model"].get(k) for k in ("name", "dtype", "q_bits", "ahn")}
    options["ahn"] = ahn or options["ahn"]
    options |= {"window": facts["window"], "sinks": facts["sinks"]}
    if name is not None:
        options["name"] = name
        if not has_bits_to_choose(name):
            options["q_bits"] = None
    if not options["name"]:
        raise AHNError("the memory does not say which model it is of; give --model")
    if name is None and os.path.isabs(options["name"]) and not os.path.exists(options["name"]):
        gone = show(options["name"])
        raise AHNError(f"the memory's model, {gone}, is not there; --model says where it is now")
    try:
        return load_model(options)
    except AHNError as e:
        if name is not None or os.path.exists(options["name"]):
            raise
        raise AHNError(f"{e}; --model says where the memory's model is now") from None


def _job(session: Any, text: str, options: dict[str, Any]) -> str:
    """Names what is read, and how: not by token ids, which may have the time in them."""
    template = session.template
    facts = [
        *(session.tokens, session.turn, options["kv_bits"], options["kv_group_size"]),
        *((template.system, session.tokenizer.chat_template) if template else ()),
        text,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _resume(partial: Path, session: Any, job: str) -> tuple[Any, dict[str, Any]]:
    """The session of an interrupted run of the same job, with what its file says, or none."""
    from ..model.ranks import Lost
    from ..reading import memoryfile
    from ..reading.session import Session

    if not share(partial.is_file):
        return None, {}
    try:
        facts = share(lambda: memoryfile.read_facts(partial))
        if facts.get("job") != job:
            say(f"note: {partial} is of another text or setting; starting anew")
            return None, {}
        resumed = Session.load(partial, session.model, session.tokenizer)
        if resumed.tokens - session.tokens != facts["done"]:
            raise AHNError(f"{partial}: damaged, {facts['done']} is not what it has read")
    except Lost:
        raise
    except AHNError as e:
        say(f"note: {e}; starting anew")
        return None, {}
    say(f"going on after {facts['done']:,} tokens")
    return resumed, facts
