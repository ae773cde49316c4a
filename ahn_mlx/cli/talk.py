"""The one loop of questions and answers: of `ahn-mlx chat`, where each becomes part of the
memory, and of `ahn-mlx ask`, where each is asked of the same memory."""

import errno
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

from ..errors import AHNError, nearest
from ..outputs.files import OutFile
from ..reading.text import typed_line, typed_path, typed_paths
from . import settings
from .options import needs_memory
from .prompt import Prompt
from .ranks import share
from .terminal import Answer, Left, progress_bar, say, stop_between_steps, waiting
from .words import read_typed

# Name -> (argument, line of the help, whether it changes the conversation or keeps it).
COMMANDS = {
    "/read": ("FILE...", "read texts as part of the conversation", True),
    "/save": ("FILE", "write the conversation's memory", True),
    "/load": ("FILE", "go on with a saved one", True),
    "/reset": ("", "back to how it began", True),
    "/regenerate": ("", "the last answer once more", False),
    "/set": ("NAME VALUE", "change a setting of answers; alone, list them", False),
    "/stats": ("", "tokens, and bytes of memory", False),
    "/model": ("", "which model answers", False),
    "/help": ("", "this list", False),
    "/exit": ("", "or /quit, or Ctrl-D; Ctrl-C stops an answer", False),
}
HIDDEN = {"/quit": "/exit", "/": "/help", "/?": "/help"}
TWICE = 1.0  # seconds after one Ctrl-C in which another is the second


class Talk:
    """A conversation at a prompt.

    session: to begin with; it is not changed. sampling: as sampling_of. file: the memory file
    that it came from, if any. keeps: whether questions and answers become part of the memory.
    """

    def __init__(self, session: Any, sampling: dict[str, Any], file: Path | None, keeps: bool):
        self.origin, self.session = session, session.fork()
        self.sampling, self.file, self.keeps = sampling, file, keeps
        self.commands = {n: row for n, row in COMMANDS.items() if keeps or not row[2]}
        self.last: tuple[Any, str, dict[str, Any]] | None = None  # before, question, sampling
        self.finished = True  # the last answer came to its own end, or max_tokens
        self.unsaved = 0  # tokens of /read
        self.stopped = -TWICE  # when Ctrl-C stopped something
        self.edited, self.default = False, ""  # whether, and with what, a prompt can begin

    def run(self) -> int:
        """Read lines until there are no more, and answer them; the exit code."""
        paths = Prompt.PATHS
        follow = {"/read": paths, "/save": paths, "/load": paths, "/set": settings.NAMES}
        words = {name: follow.get(name, ()) for name in self.commands}
        prompt = Prompt(words, self._pasted)
        self.edited = prompt.editor is not None
        if prompt.seen:
            self._banner()
        hinted = False
        while True:
            try:
                default, self.default = self.default, ""
                just_stopped = time.monotonic() - self.stopped < TWICE
                line = typed_line(prompt.line(default, just_stopped))
                if not line or self._take(line):
                    continue
            except EOFError:
                pass
            except Left:
                return 130
            if prompt.typed and self.unsaved > self.session.model.ahn.capacity and not hinted:
                read = f"{self.unsaved:,} tokens were read and not saved"
                say(f"{read}; /save FILE keeps them, /exit again leaves")
                hinted = True  # once: who leaves again means it
                continue
            return 0

    def _take(self, line: str) -> bool:
        """Answer a line or carry it out. Returns whether to go on."""
        command, _, argument = line.partition(" ")
        command = HIDDEN.get(command.lower(), command.lower())
        try:
            if command in COMMANDS:
                return self._command(command, argument.strip())
            if not self._is_file(line):
                self._question(line)
        except BrokenPipeError:  # nobody listens
            raise
        except Left:
            raise
        except KeyboardInterrupt:
            self.stopped = time.monotonic()
            say("stopped; the conversation is as it was")
        except AHNError as e:
            say(f"error: {e}")
        except OSError as e:
            if e.errno == errno.EIO and not e.filename:  # the terminal has closed
                raise Left from None
            say(f"error: {e.filename}: {e.strerror}" if e.filename else f"error: {e}")
        return True

    def _is_file(self, line: str) -> bool:
        """Whether a line is no message but files that were dropped there; then offer to read
        them."""
        what, reads = share(lambda: _offered(line))
        if not what:
            return False
        if not self.keeps:
            raise AHNError(f"{what}; {self._elsewhere()}")
        if not self.edited:
            raise AHNError(f"{what}; {reads}")
        say(f"{what}; Enter goes on as below, Ctrl-C does not")
        self.default = reads
        return True

    def _pasted(self, text: str) -> str:
        """What stands at the prompt after files were dropped on it, or any other paste."""
        paths = _dropped(text.strip()) if self.keeps else []
        return f"{_reading(paths)} " if paths else text

    @needs_memory
    def _command(self, command: str, argument: str) -> bool:
        if command not in self.commands:
            raise AHNError(f"{command}: questions do not change a memory; {self._elsewhere()}")
        takes = COMMANDS[command][0]
        if argument and not takes:
            raise AHNError(f"{command} takes nothing after it")
        if takes.startswith("FILE") and not argument:
            raise AHNError(f"{command} needs a file: {command} {takes}")
        if takes.startswith("FILE") and _is_open(argument):
            raise AHNError(f"{command} {argument}: the quotation does not end")
        if command == "/exit":
            return False
        action = getattr(self, f"_{command[1:]}")
        action(argument) if takes else action()
        return True

    def _elsewhere(self) -> str:
        return f"ahn-mlx chat --memory {shlex.quote(str(self.file))} goes on with it"

    def _question(self, line: str) -> None:
        if line.startswith("/") and "\n" not in line:
            if not line.startswith("//"):
                raise AHNError(_unknown(line, self.commands))
            line = line[1:]
        self._answer(self.session.fork(), line)

    @needs_memory
    def _answer(self, before: Any, question: str) -> None:
        """Answer a question to a session, and go on with what that makes of it."""
        after = before.fork()
        self.last, self.finished = None, False
        code = print_answer(after, question, self.sampling)
        self.last, self.finished = (before, question, dict(self.sampling)), code == 0
        if code:
            self.stopped = time.monotonic()
        if self.keeps:
            self.session = after

    def _read(self, argument: str) -> None:
        files = typed_paths(argument)
        mend = "/load {file} goes on with it"
        text = share(lambda: read_typed(files, has_prompt=False, memory=mend))
        after = self.session.fork()  # Ctrl-C leaves the conversation as it was
        with stop_between_steps() as check:
            ids = after.encode(text)
            check()
            with progress_bar(len(ids), "reading", "tokens") as bar:

                def progress(read: int) -> None:
                    bar.update(read - bar.n)
                    check()

                after.read_ids(ids, progress)
        read = after.tokens - self.session.tokens
        after.note_text(", ".join(files), len(ids))
        self.session, self.last = after, None
        self.unsaved += read
        say(f"read {read:,} tokens")

    def _save(self, argument: str) -> None:
        """Of what is there, only an earlier conversation is replaced: a digest may have taken
        hours."""
        from ..reading import memoryfile

        def is_chat(file: Path) -> bool:
            return memoryfile.is_memory(file) and bool(memoryfile.read_facts(file).get("talked"))

        file = Path(typed_path(argument))
        share(lambda: OutFile(file, "a saved conversation", is_chat).check())
        with waiting(f"saving {file}"):
            self.session.save(file, talked=True)
        self.unsaved = 0
        say(f"saved {self.session.tokens:,} tokens")

    def _load(self, argument: str) -> None:
        from ..reading.memoryfile import OtherModel

        file = Path(typed_path(argument))
        try:
            with waiting(f"loading {file}"):
                loaded = type(self.session).load(file, self.session.model, self.session.tokenizer)
        except OtherModel as e:
            what = f"here; ahn-mlx chat --memory {shlex.quote(str(file))} starts with it"
            raise AHNError(f"{e}, {what}") from None
        self.session, self.last, self.unsaved = loaded, None, 0
        say(f"loaded {loaded.tokens:,} tokens")

    def _reset(self) -> None:
        self.session, self.last, self.unsaved = self.origin.fork(), None, 0
        say(f"back to {self.session.tokens:,} tokens")

    def _regenerate(self) -> None:
        if self.last is None:
            raise AHNError("there is no answer to give once more; ask something")
        before, question, sampling = self.last
        if self.finished and sampling == self.sampling:
            if sampling["temp"] == 0:
                raise AHNError("at temp 0 the answer would be the same; /set temp 0.7 first")
            if sampling["seed"] is not None:
                raise AHNError("with this seed the answer would be the same; /set seed none first")
        self._answer(before, question)

    def _set(self, argument: str) -> None:
        if not argument:
            for name, value in self.sampling.items():
                say(settings.row(name, value, width=20), indent=21)
            return
        self.sampling, said = settings.change(argument, self.sampling)
        for line in said:
            say(line)

    def _stats(self) -> None:
        say(f"{self.session.tokens:,} tokens, {self.session.nbytes / 1e6:.1f} MB of memory")

    def _model(self) -> None:
        for label, value in _about(self.session):
            say(f"{label:<10} {value}", indent=11)

    def _help(self) -> None:
        for name, (argument, line, _) in self.commands.items():
            say(f"{f'{name} {argument}':<18} {line}", indent=19)

    def _banner(self) -> None:
        """What someone who begins should know."""
        ahn = self.session.model.ahn
        window = f"window {ahn.window:,} + {ahn.sinks:,} sinks"
        say(f"{Path(_name(self.session)).name} | {window} | memory {ahn.memory}")
        if self.file is not None:
            each = "" if self.keeps else "; each question is asked of it as it is"
            say(f"{self.file}: {self.session.tokens:,} tokens read{each}")
        say("/help lists the commands")


@needs_memory
def print_answer(
    session: Any, question: str, sampling: dict[str, Any], as_json: bool = False
) -> int:
    """Stream the answer to stdout and its numbers to stderr, or all of it as one JSON object to
    stdout when it has ended; the exit code.

    Ctrl-C keeps the answer so far. Raises KeyboardInterrupt if it comes while the question is
    read, and Left for a second one or a terminal that closed.
    """
    start, first, count, code = time.perf_counter(), 0.0, 0, 0
    pieces: list[str] = []
    bar, shown = None, Answer()

    def progress(read: int, total: int) -> None:
        nonlocal bar
        bar = progress_bar(total, "reading", "tokens") if bar is None else bar
        bar.update(read - bar.n)
        check()

    with stop_between_steps() as check:
        answer = session.ask(question, progress=progress, **sampling)
        try:
            for text in answer:
                if bar is not None and not first:
                    bar.close()
                first = first or time.perf_counter() - start
                count += 1
                pieces.append(text)
                if not as_json:
                    shown.write(text)
                check()
        except KeyboardInterrupt as e:
            if isinstance(e, Left) or not count:
                raise
            code = 130
        finally:
            if bar is not None:
                bar.close()
            answer.close()
            shown.end()
    seconds = time.perf_counter() - start
    rate = (count - 1) / (seconds - first) if count > 1 else 0
    if as_json:
        ended = "stop" if session.turn == "answered" else "length"
        facts = {
            **{"model": _name(session), "text": "".join(pieces), "tokens": count},
            **{"first_token_s": round(first, 3), "seconds": round(seconds, 3)},
            "finish_reason": "interrupted" if code else ended,
        }
        print(json.dumps(facts), flush=True)
    else:
        say(f"first token after {first:.1f} s | {count} tokens, {rate:.1f} tokens/s")
    return code


def _dropped(text: str) -> list[Path]:
    """The paths that a text is and that are there; none if it is anything else."""
    if not text.startswith(("/", "~/", "'", '"', "file://")) or "\n" in text:
        return []
    paths = [Path(path) for path in typed_paths(text)]
    return paths if all(path.is_absolute() and path.exists() for path in paths) else []


def _offered(line: str) -> tuple[str, str]:
    """What files that a line is are, and the line that reads them; empty if it is none."""
    if not (paths := _dropped(line)):
        return "", ""
    return f"{paths[0]} is a {'folder' if paths[0].is_dir() else 'file'}", _reading(paths)


def _reading(paths: list[Path]) -> str:
    """The line that reads these, or goes on with a memory."""
    from ..reading.memoryfile import is_memory

    command = "/load" if paths[0].is_file() and is_memory(paths[0]) else "/read"
    return f"{command} {shlex.join(map(str, paths))}"


def _is_open(typed: str) -> bool:
    """Whether a quotation in it does not end; an apostrophe within a word is none."""
    if Path(typed).exists() or not re.search(r"(^|\s)['\"]", typed):
        return False
    try:
        shlex.split(typed)
    except ValueError:
        return True
    return False


def _unknown(line: str, commands: dict[str, Any]) -> str:
    """What to say of a line that begins with a slash and is no command."""
    first = line.split()[0]
    if "/" in first[1:]:
        return f"{first}: no such file, and no command (// begins a message with a slash)"
    near = nearest(first, [*commands, *HIDDEN])
    mend = f"; did you mean {near}?" if near else ""
    return f"no such command: {first}{mend} (/help lists them, // begins a message with a slash)"


def _name(session: Any) -> str:
    return str(session.origin["name"] or "a model")


def _about(session: Any) -> list[tuple[str, str]]:
    """Labels and facts of the model that answers."""
    from mlx.utils import tree_flatten

    from ..model.augment import dtype_of

    model, ahn = session.model, session.model.ahn
    weights: Any = tree_flatten(model.parameters())
    packed = sorted({part.bits for part in model.modules() if getattr(part, "bits", None)})
    kept = next((c.bits for c in session.caches if getattr(c, "bits", None)), None)
    dtype = str(dtype_of(model)).removeprefix("mlx.core.")
    base = f"{', '.join(map(str, packed))} bits, rest {dtype}" if packed else dtype
    return [
        ("model", _name(session)),
        ("base", f"{model.args.model_type}, {len(model.layers)} layers"),
        ("memory", ahn.memory),
        ("window", f"{ahn.window:,} tokens" + (f" in {kept} bits" if kept else "")),
        ("sinks", f"{ahn.sinks:,} tokens, {ahn.sink_positions} positions"),
        ("weights", f"{base}, {sum(x.nbytes for _, x in weights) / 1e6:.1f} MB"),
    ]
