"""What stands on a terminal, and in a log, after the program has spoken there."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pexpect
import pyte
import pytest

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
BEGIN = "import sys, time\nfrom ahn_mlx.cli.terminal import Answer, progress_bar, say\n"


def screen(*args: str, columns: int) -> list[str]:
    """The rows that stand on a terminal when Python has run this."""
    shown = pyte.Screen(columns, 20)
    stream = pyte.Stream(shown)
    run = pexpect.spawn(
        sys.executable, [*args], env=ENV, dimensions=(20, columns), encoding="utf-8", timeout=60
    )
    run.expect(pexpect.EOF)
    stream.feed(run.before)
    return "\n".join(row.rstrip() for row in shown.display).rstrip("\n").split("\n")


def after(program: str, columns: int = 20) -> list[str]:
    return screen("-c", BEGIN + program, columns=columns)


SAID = [
    ("say('a note of more than a row of it')", ["a note of more than", "a row of it"]),
    ("say('/set   change a thing here', 7)", ["/set   change a", "       thing here"]),
    ("say('/set   change a thing here', 12)", ["/set   change a", "thing here"]),
    ("say('  ahn-mlx ask\\n\\nx')", ["  ahn-mlx ask", "", "x"]),
    ("say('a/path/that/is/longer/than/a/row')", ["a/path/that/is/longe", "r/than/a/row"]),
    ("say('twenty-wide-twenty-w')", ["twenty-wide-twenty-w"]),
    ("print('^C', end='', file=sys.stderr); say('stopped')", ["stopped"]),
]


def test_a_line_is_broken_between_words() -> None:
    rows = after("\n".join(call for call, _ in SAID))
    assert rows == [row for _, expected in SAID for row in expected]


WHALE = ["Call me Ishmael.", "Some years ago,", "", "    never mind how", "long"]
WIDE = ["\u4e16\u754c" * 5, "\u4e16\u754c abc " + "\u4e16" * 5, "\u4e16" * 7 + " caf\u00e9"]
ANSWERS = [
    ("Call me Ishmael. Some years ago,\n\n    never mind how long\n", WHALE),
    ("\u4e16\u754c" * 6 + " abc " + "\u4e16" * 12 + " cafe\u0301", WIDE),
    ("a " + "b" * 45 + " c", ["a", "b" * 20, "b" * 20, "b" * 5 + " c"]),
    ("\tx\n" + "y" * 20 + "\nz", ["    x", "y" * 20, "z"]),
    ("red\x1b[31m \x07", ["red[31m"]),
    ("", []),
]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_an_answer_is_broken_between_words_as_it_comes(size: int) -> None:
    answers = [[said[at : at + size] for at in range(0, len(said), size)] for said, _ in ANSWERS]
    program = f"""
for pieces in {answers!r}:
    answer = Answer()
    for piece in pieces:
        answer.write(piece)
    answer.end()
"""
    rows = [unicodedata.normalize("NFC", row) for row in after(program)]
    assert rows == [row for _, expected in ANSWERS for row in expected]


def test_an_answer_in_a_pipe_is_as_it_is() -> None:
    said = "a  b\t " + "word " * 50 + "\n\n  end "
    program = f"answer = Answer(); answer.write({said!r}); answer.end(); say('x ' * 100)"
    done = subprocess.run([sys.executable, "-c", BEGIN + program], env=ENV, capture_output=True)
    assert done.stdout.decode() == f"{said}\n"
    assert done.stderr.decode() == "x " * 100 + "\n"


NOTE = """
answer = Answer()
answer.write("A ship is ")
print("^C", end="", file=sys.stderr, flush=True)
say("a note")
answer.write("a ship")
answer.end()
say("the end")
"""


def test_a_note_within_an_answer_has_its_own_line() -> None:
    assert after(NOTE) == ["A ship is^C", "a note", "a ship", "the end"]


BAR = """
with progress_bar(1000, "reading", "tokens") as bar:
    bar.update(500)
    bar.refresh()
    print("^C", end="", file=sys.stderr, flush=True)
    {then}
"""


@pytest.mark.parametrize("columns", [20, 100])
def test_nothing_is_left_of_a_bar_that_someone_speaks_into(columns: int) -> None:
    twice = BAR.format(then="say('stopped')") + BAR.format(then="bar.close(); say('x')")
    assert after(twice, columns) == ["stopped", "x"]
    end = "; import os; os._exit(0)"
    rows = after(BAR.format(then=f"say('a note'){end}"), columns)
    assert rows[0] == "a note" and rows[1].startswith("reading:") and len(rows) == 2
    rows = after(BAR.format(then=f"bar.refresh(){end}"), columns)
    assert len(rows) == 1 and "^" not in rows[0] and len(rows[0]) <= columns - 3


def test_an_error_is_broken_between_words() -> None:
    rows = screen("-m", "ahn_mlx", "generate", "no-such.txt", "Who?", columns=30)
    assert rows == [
        *("error: 'no-such.txt': no such", "file; if it is the question,", "give it with --prompt")
    ]


LINES = """
import ahn_mlx.cli.terminal as terminal
terminal.BETWEEN = 0.01
with progress_bar(2400, "reading", "tokens", 400) as bar:
    sys.stdin.readline()
    for _ in range(20):
        time.sleep(0.02)
        bar.update(100)
"""


def test_a_log_has_a_line_when_it_begins_and_one_every_tenth() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", BEGIN + LINES],
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stderr
    assert run.stderr.readline() == b"reading 2,000 tokens\n"  # while it waits
    out, err = run.communicate(b"\n", timeout=60)
    lines = err.decode().split("\n")
    assert out == b"" and lines.pop() == "" and "\r" not in err.decode()
    assert all(line.startswith("reading: ") and " tokens/s" in line for line in lines)
    read = [line.split(": ")[1].split(",")[:2] for line in lines]
    assert 2 <= len(read) <= 8  # every 240 or more, of 2,000
    assert lines[0].startswith("reading: 700 of 2,400 tokens, ")


def test_a_last_step_may_go_beyond_what_was_to_be_done() -> None:
    """As one of a training by the clock does."""
    program = "import ahn_mlx.cli.terminal as terminal; terminal.BETWEEN = 0\nimport time\n"
    program += "with progress_bar(10, 'training', 'seconds') as bar: bar.update(9); bar.update(9)"
    done = subprocess.run([sys.executable, "-c", BEGIN + program], env=ENV, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr.decode().splitlines()[-1].startswith("training: 10 of 10 seconds, ")
    shown = screen("-c", BEGIN + program, columns=100)
    assert "Traceback" not in " ".join(shown), shown


def test_short_work_leaves_nothing_in_a_log() -> None:
    program = "with progress_bar(50, 'reading', 'tokens') as bar: bar.update(50); say('done')"
    done = subprocess.run([sys.executable, "-c", BEGIN + program], env=ENV, capture_output=True)
    assert (done.stdout, done.stderr) == (b"", b"done\n")


@pytest.mark.parametrize("within", ["ahn_mlx.platform", "click", "ahn_mlx.cli.command"])
def test_ctrl_c_while_the_program_is_loaded_ends_it_quietly(within: str) -> None:
    program = f"""
import sys
class Pressed:
    def find_spec(name, *_):
        if name == {within!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Pressed)
sys.argv[0] = "/usr/bin/ahn-mlx"
from ahn_mlx.cli import main
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENV, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
