"""The conversation at a prompt, as a person at a terminal has it and as a pipe does."""

import os
import re
import stat
import sys
import time
from pathlib import Path

import pexpect
import pytest
from checkpoints import REPO, talking_model
from click.testing import CliRunner, Result
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from ahn_mlx import Session, load
from ahn_mlx.cli import cli
from ahn_mlx.cli.prompt import Prompt, _Words

TEXT = "It was the best of times, it was the worst of times. "
READY = r"(?s)\?2004h.*?\?12l\x1b\[\?25h"  # the prompt stands, and lines may be pasted
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, two memories, of which one is of another window, and texts."""
    place = tmp_path_factory.mktemp("talk")
    path = talking_model("qwen2-gdn", place)
    for name, window in (("book.ahn", None), ("other.ahn", 20)):
        session = Session(*load(path, window=window), origin={"name": str(path)})
        session.read(TEXT * 4)
        session.save(place / name)
    (place / "story.txt").write_text(TEXT * 2)
    (place / "my book.txt").write_text(TEXT * 2)
    (place / "chapters").mkdir()
    (place / "chapters/1.txt").write_text(TEXT * 2)
    (place / "chapters/2.txt").write_text(TEXT * 2)
    (place / "long.txt").write_text(TEXT * 4_000)
    return place


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)


class Terminal:
    """Someone at a terminal of this many rows and columns."""

    def __init__(self, place: Path, *args: object, size: tuple[int, int] = (30, 100), **env: str):
        known = {"PYTHONPATH": str(REPO), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        known |= {"OPENBLAS_NUM_THREADS": "1", "XDG_STATE_HOME": str(place / "state")}
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "ahn_mlx", *map(str, args)],
            env={**os.environ, **known, **env},
            dimensions=size,
            encoding="utf-8",
            timeout=60,
        )

    def shown(self, until: str = READY) -> str:
        """What appears until the next prompt, or until this, without escape sequences."""
        self.child.expect(until)
        return ESCAPE.sub("", self.child.before + self.child.after)

    def type(self, keys: str, until: str = READY) -> str:
        self.child.send(keys)
        return self.shown(until)

    def left(self) -> int:
        """The exit code after Ctrl-C and again, soon; one may fall between two prompts."""
        for _ in range(5):
            self.child.send("\x03")
            if self.child.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=0.5) == 0:
                break
        return self.code()

    def code(self) -> int:
        self.child.expect(pexpect.EOF)
        self.child.close()
        # As a shell has it: a Ctrl-C that falls into Python's own end kills it.
        ended = self.child.exitstatus
        return 128 + self.child.signalstatus if ended is None else ended


def talk(*args: object, said: str = "") -> Result:
    return CliRunner().invoke(cli, list(map(str, args)), input=said, catch_exceptions=False)


# --- at a terminal ---


def test_a_conversation_at_a_terminal(place):
    me = Terminal(place, "chat", "--model", "model", "--max-tokens", 4)
    banner = me.shown()
    assert "model | window 12 + 4 sinks | memory gated_deltanet" in banner
    assert "/help lists the commands" in banner
    assert "4 tokens, " in me.type("Hi there\r")
    assert "did you mean /regenerate?" in me.type("/regenerat\r")
    me.child.send("/rea\t")
    me.child.send(" my\t")
    said = me.type("\r")
    assert r"my\ book.txt" in said and "reading: " in said and "read 113 tokens" in said
    said = me.type(f"'{place}/story.txt'\r")  # dropped
    assert "story.txt is a file" in said and f"/read {place}/story.txt" in said
    assert "read 106 tokens" in me.type("\r")
    me.child.send("\x1b[200~one\ntwo\nthree\x1b[201~")
    assert me.type("\r").count("first token") == 1  # one message
    me.child.send("half a line")
    assert "Ctrl-C again, or Ctrl-D, leaves" in me.type("\x03")
    said = me.type("\x1b[A\r")  # the key for up, in history
    assert "three" in said and "first token" in said
    said = me.type("/exit\r")
    assert "219 tokens were read and not saved; /save FILE keeps them" in said
    me.child.send("/exit\r")
    assert me.code() == 0
    history = place / "state/ahn-mlx/history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+one\n+two\n+three\n" in history.read_text()


def test_what_is_dropped_on_a_terminal_takes_one_enter(place):
    me = Terminal(place, "chat", "--model", "model", size=(30, 250))
    me.shown()
    drop = "\x1b[200~{}\x1b[201~".format
    escaped = str(place / "my book.txt").replace(" ", "\\ ")
    me.child.send(drop(f"{place}/story.txt "))
    me.child.send(drop(f"{escaped} "))  # a second one, beside it
    said = me.type("\r")
    assert f"/read {place}/story.txt {escaped}" in said and "read 259 tokens" in said
    me.child.send(drop(f"file://{place}/chapters"))
    assert "read 243 tokens" in me.type("\r")
    me.child.send(drop(f"'{place}/book.ahn'"))
    assert "loaded 218 tokens" in me.type("\r")
    me.child.send(drop(f"{place}/absent.txt"))  # a message like any other
    assert "no such file, and no command" in me.type("\r")
    me.child.send("/stats" + drop(f" {place}/story.txt"))
    assert "/stats takes nothing after it" in me.type("\r")


def test_history_is_kept_and_ctrl_c_stops_an_answer(place):
    state = place / "kept"
    (state / "ahn-mlx").mkdir(parents=True)
    (state / "ahn-mlx/history").write_text("\n# a time\n+What was said before?\n")
    many = ("--max-tokens", 10**6)
    me = Terminal(place, "chat", "--model", "model", *many, XDG_STATE_HOME=str(state))
    me.shown()
    assert "What was said before?" in me.type("\x1b[A", "before.")
    me.child.send("\r")
    me.shown("reading")
    time.sleep(0.5)
    assert "first token" in me.type("\x03")
    assert "Ctrl-C again" in me.type("x\x03")
    assert "first token" not in me.type("/stats\r")
    me.child.send("/regenerate\r")  # it was cut, so that more of it may come
    me.shown("reading")
    time.sleep(0.5)
    assert me.left() == 130


def test_ctrl_c_while_it_reads(place):
    me = Terminal(place, "chat", "--model", "model")
    me.shown()
    me.child.send("/read long.txt\r")
    me.shown(r"reading: +\d+%\|[^|]*\| [1-9]")
    assert "stopped; the conversation is as it was" in me.type("\x03")
    assert "0 tokens, " in me.type("/stats\r")
    me.child.send("/read long.txt\r")
    me.shown(r"reading: +\d+%\|[^|]*\| [1-9]")
    assert me.left() == 130


def test_ask_at_a_terminal_asks_for_questions(place):
    before = (place / "book.ahn").read_bytes()
    me = Terminal(place, "ask", "book.ahn", "--max-tokens", 3)
    banner = me.shown()
    assert "book.ahn: " in banner and "each question is asked of it as it is" in banner
    assert "3 tokens, " in me.type("Who?\r")
    me.child.send("\x03")
    me.shown("leaves")
    me.shown()
    me.child.send("\x03")
    assert me.code() == 130
    assert (place / "book.ahn").read_bytes() == before


@pytest.mark.parametrize("name", ["dumb", "xterm"])
def test_a_narrow_terminal_and_a_state_that_cannot_be_kept(place, name):
    (place / "file").touch()
    where = {"TERM": name, "NO_COLOR": "1", "XDG_STATE_HOME": str(place / "file")}
    me = Terminal(place, "chat", "--model", "model", "--max-tokens", 9, size=(6, 20), **where)
    ready = "> " if name == "dumb" else READY
    me.shown("commands")
    me.shown(ready)
    assert "9 tokens" in me.type(
        "Caf\u00e9 \u4e16\u754c \U0001f600, and more than a row\r", "9 tokens"
    )
    me.shown(ready)
    me.child.send("\x04")
    assert me.code() == 0


def test_a_terminal_that_closes_ends_it_quietly(place):
    errors = place / "errors"
    program = f"exec {sys.executable} -m ahn_mlx chat --model model --max-tokens 1000000 2>{errors}"
    env = {**os.environ, "PYTHONPATH": str(REPO), "TERM": "xterm", "XDG_STATE_HOME": str(place)}
    child = pexpect.spawn("/bin/sh", ["-c", program], env=env, encoding="utf-8", timeout=60)
    child.expect(READY)
    child.send("Hi\r")
    child.expect("!|\ufffd|[0-9a-zA-Z]{3}")
    child.close(force=False)
    assert not child.isalive()
    assert "Traceback" not in errors.read_text() and "rror" not in errors.read_text()


# --- in a pipe ---

# What is typed, and what is said to it.
SAYS = [
    ("/stats", "0 tokens, 0.0 MB of memory"),
    ("/STATS", "0 tokens, 0.0 MB of memory"),
    ("/", "/read FILE...      read texts as part of the conversation"),
    ("/?", "/read FILE...      read texts as part of the conversation"),
    ("/help", "/read FILE...      read texts as part of the conversation"),
    ("/regenerate", "there is no answer to give once more"),
    ("Hi\n/regenerate", "at temp 0 the answer would be the same; /set temp 0.7 first"),
    ("/set temp 1\n/set seed 5\nHi\n/regenerate", "with this seed the answer would be the same"),
    ("Hi\n/reset\n/regenerate", "there is no answer"),
    ("Hi\n/reset", "back to 0 tokens"),
    ("/set", "max-tokens           3\n"),
    ("/set temp 0.5\n/set", "temp                 0.5\n"),
    ("/set TOP_P 0.5", "top-p 0.5\n"),
    ("/set seed 5\n/set seed none", "seed none\n"),
    ("/set temp nan", "error: temp must be 0, which is greedy, or from 0.001 to 1e30, not nan"),
    ("/set top-p 2", "error: top-p must be above 0"),
    ("/set max-tokens few", "error: max-tokens must be a whole number, not 'few'"),
    ("/set temp hot", "error: temp must be a number, not 'hot'"),
    ("/set seed 1.5", "error: seed must be a whole number, not '1.5'"),
    ('/set stop "a', "error: stop: the quotation does not end"),
    ("/set top-p 0.5", "it has no effect at temp 0, which is greedy; /set temp"),
    ("/set repetition-context-size 5", "it has no effect without repetition-penalty"),
    ("/set colour red", "error: no setting colour; there are max-tokens, temp, top-p"),
    ("/model", "window     12 tokens"),
    ("/model", "weights    float32, "),
    ("/read", "error: /read needs a file: /read FILE..."),
    ("/save", "error: /save needs a file: /save FILE"),
    ("/stats now", "error: /stats takes nothing after it"),
    ("/read story.txt my\\ book.txt", "read 259 tokens"),
    ("/read absent.txt story.txt", "error: absent.txt: No such file or directory"),
    ('/read "story.txt', 'error: /read "story.txt: the quotation does not end'),
    ("/load story.txt 'book.ahn", "the quotation does not end"),
    ('/save "new.ahn', "the quotation does not end"),
    ("/read it's.txt", "error: it's.txt: No such file or directory"),
    ("/read book.ahn", "error: book.ahn: is a memory, not a document; /load book.ahn goes on"),
    ("/read st*.txt", "read 112 tokens"),
    ("/read ~", ": is too much to read; give a folder in it, or files"),
    ("/read /", "error: /: is too much to read"),
    ("/read chapters", "read 249 tokens"),
    ("/read absent*", "error: absent*: no file has such a name"),
    ("/save model", "error: model: is a directory"),
    ("/load book.ahn", "loaded 218 tokens"),
    ("/load story.txt", "error: story.txt: is not a memory"),
    ("/load other.ahn", "here; ahn-mlx chat --memory other.ahn starts with it"),
    ("/loda x", "error: no such command: /loda; did you mean /load? (/help lists them"),
    ("/write x", "error: no such command: /write (/help lists them, // begins a message"),
    ("/no/such.txt", "error: /no/such.txt: no such file, and no command"),
    ("//stats", "first token after"),
    ("{place}/story.txt", "story.txt is a file; /read "),
    ("file://{place}/my%20book.txt", "my book.txt is a file; /read '"),
    ("{place}/book.ahn", "book.ahn is a file; /load "),
    ("{place}/chapters/", "chapters is a folder; /read "),
]


@pytest.mark.parametrize(("typed", "said"), SAYS, ids=[typed for typed, _ in SAYS])
def test_what_a_line_is_answered_with(place, typed, said):
    lines = typed.replace("{place}", str(place)) + "\n/quit\nnever said\n"
    done = talk("chat", "--model", "model", "--max-tokens", 3, said=lines)
    assert done.exit_code == 0
    assert said in done.stderr
    assert "window 12 + 4" not in done.stderr and "> " not in done.stdout  # no banner in a pipe


def test_a_setting_that_has_its_default_again_is_not_idle(place):
    said = "/set seed 5\n/set seed none\n/set top-k none\n/set temp 1\n/set top-k 3\n"
    rows = talk("chat", "--model", "model", said=said).stderr.splitlines()
    idle = "it has no effect at temp 0, which is greedy; /set temp"
    assert rows == ["seed 5", idle, "seed none", "top-k 0", "temp 1.0", "top-k 3"]


def test_an_answer_once_more_is_of_the_same_state(place):
    """At a temperature it is drawn anew, and stands in the place of the one before."""
    lines = "Hi\n/stats\n/set temp 1\n/regenerate\n/stats\n/set temp 0\n/regenerate\n/stats\n"
    done = talk("chat", "--model", "model", "--max-tokens", 9, said=lines)
    assert len(set(re.findall(r"^\d+ tokens, .* of memory", done.stderr, re.MULTILINE))) == 1
    first, second, third = done.stdout.split("\n", 2)
    assert third.rstrip("\n") == first != second


def test_what_a_model_says_does_nothing_to_the_terminal(place):
    drawn = ("--temp", 1, "--seed", 3, "--max-tokens", 60)
    answer = "".join(
        Session.load(place / "book.ahn", *load(place / "model")).ask("Who?", max_tokens=60, temp=1)
    )
    assert "\x1b" in answer or re.search(r"[\x00-\x08]", answer)  # the model does say such things
    for command in (
        ("ask", "book.ahn", "Who?", *drawn),
        ("generate", "--model", "model", "--prompt", "Who?", *drawn),
    ):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", talk(*command).stdout)


@pytest.mark.parametrize(
    ("typed", "ends"),
    [
        ("/re", ["/read", "/regenerate", "/reset"]),
        ("/S", ["/save", "/set", "/stats"]),
        ("re", []),
        ("/set t", ["temp"]),
        ("/read my", ["\\ book.txt"]),
        ("/read my\\ b", ["ook.txt"]),
        ("/read 'my b", ["ook.txt"]),
        ("/read story.txt my", ["\\ book.txt"]),
        ("/load bo", ["ok.ahn"]),
        ("/read mod", ["el/"]),
        ("/stats mod", []),
    ],
)
def test_completion(typed, ends):
    words = {"/read": Prompt.PATHS, "/load": Prompt.PATHS, "/set": ("temp", "seed"), "/stats": ()}
    words |= {"/regenerate": (), "/reset": (), "/save": Prompt.PATHS}
    found = _Words(words).get_completions(Document(typed), CompleteEvent())
    assert sorted(completion.text for completion in found) == ends


# --- ask ---

QUESTION = 'ahn-mlx ask book.ahn "Who is the captain?"'
ASKED_WRONGLY = [
    ([], f"which memory? Give a file of ahn-mlx digest: {QUESTION.replace('book.ahn', 'FILE')}"),
    (["book.ahn"], f"no question; give one: {QUESTION}"),  # of an empty pipe
    (["book.ahn", " "], "the question is empty"),
    (["book.ahn", "-p", " "], "no question; give one"),
    (["book.ahn", "who", "is", "it"], 'a question of several words goes in quotes: "who is it"'),
    (["who is it?"], "which memory? Give a file of ahn-mlx digest: ahn-mlx ask FILE 'who is it?'"),
    (["book.ahn", "other.ahn", "who"], "'book.ahn' and 'other.ahn': one memory file at a time"),
    (["book.ahn", "who", "--memory", "other.ahn"], "'book.ahn' is a second file"),
    (["book.ahn", "who", "-p", "what"], "'who' and --prompt: one question at a time"),
    (["absent.ahn", "who"], "'absent.ahn': no such file"),
]


@pytest.mark.parametrize(("words", "said"), ASKED_WRONGLY)
def test_ask_says_how_to_ask(words, said):
    done = CliRunner().invoke(cli, ["ask", *words])
    assert said in str(done.exception)


@pytest.mark.parametrize(
    ("words", "piped"),
    [
        (["book.ahn", "Who?"], ""),
        (["Who?", "book.ahn"], ""),
        (["book.ahn", "-p", "Who?"], ""),
        (["book.ahn"], "Who?\n"),
        (["--memory", "book.ahn", "Who?"], ""),
        (["book.ahn", "--interactive"], "Who?\n"),
    ],
)
def test_ways_to_ask(place, words, piped):
    done = talk("ask", *words, "--max-tokens", 5, said=piped)
    expected = Session.load(place / "book.ahn", *load(place / "model")).ask("Who?", max_tokens=5)
    assert done.exit_code == 0 and "first token after" in done.stderr
    assert done.stdout.strip() == "".join(c for c in "".join(expected) if c.isprintable()).strip()


def test_questions_leave_the_memory_alone(place):
    lines = "Who?\nWho?\n/regenerate\n/stats\n/read story.txt\n/save a.ahn\n/load a.ahn\n/reset\n"
    done = talk("ask", "book.ahn", "--interactive", "--max-tokens", 5, said=lines)
    first, second, *rest = done.stdout.splitlines()
    assert first == second and not rest
    assert "218 tokens, " in done.stderr
    assert (
        done.stderr.count("questions do not change a memory; ahn-mlx chat --memory book.ahn") == 4
    )
