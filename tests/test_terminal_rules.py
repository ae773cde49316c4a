"""What a terminal shows, in this process: one of so many columns, whose bytes are looked at."""

import fcntl
import io
import os
import re
import signal
import socket
import struct
import sys
import termios
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.shortcuts import CompleteStyle
from terminals import Screen, Typing

from ahn_mlx.cli import prompt as prompting
from ahn_mlx.cli import terminal
from ahn_mlx.cli.prompt import Prompt
from ahn_mlx.cli.terminal import (
    Answer,
    Left,
    columns,
    day,
    in_bytes,
    is_piped_in,
    printable,
    progress_bar,
    say,
    stop_between_steps,
    waiting,
)


@pytest.fixture
def screen():
    """A terminal of 20 columns."""
    made = Screen(20)
    yield made
    Answer.coming = None
    made.close()


# --- texts, sizes and days ---


def test_what_moves_a_cursor_is_not_shown():
    every = "".join(map(chr, range(0x200)))
    kept = "\t\n" + "".join(map(chr, [*range(32, 127), *range(160, 0x200)]))
    assert printable(every) == kept


@pytest.mark.parametrize(
    ("size", "said"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 KB"), (999_949, "999.9 KB")),
        *(
            (10**6, "1.0 MB"),
            (10**9 - 1, "1000.0 MB"),
            (10**9, "1.0 GB"),
            (23 * 10**11, "2300.0 GB"),
        ),
    ],
)
def test_a_size_has_the_unit_that_fits_it(size, said):
    assert in_bytes(size) == said


def test_a_day_is_that_of_this_place(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert day(1_700_000_000) == "2023-11-15" and day(0) == "1970-01-01"
        assert day(1 << 80) == day(-(1 << 60)) == "in no year that there is"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_columns_are_those_of_a_terminal(screen, monkeypatch):
    screen.take(monkeypatch)
    assert columns(screen.stream) == 20 and columns(io.StringIO()) == 0
    unknown = Screen(0)
    assert columns(unknown.stream) == 80
    unknown.close()
    assert columns(unknown.stream) == 0
    with open(os.devnull) as nothing:
        assert columns(nothing) == 0


@pytest.mark.parametrize("fast", [False, True])
def test_a_slow_blas_and_what_helps(fast, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "BLAS", SimpleNamespace(fast=fast, name="slow one"))
    monkeypatch.setattr(terminal, "BLAS_COMMANDS", ("get this", "get that"))
    terminal.warn_slow()
    said = "note: reading will be slow (slow one); get this or get that\n"
    assert capsys.readouterr().err == ("" if fast else said)


# --- lines ---


@pytest.mark.parametrize(
    ("line", "indent", "shown"),
    [
        ("short", 0, "\rshort\n"),
        ("a note of more than a row", 0, "\ra note of more than\na row\n"),
        ("/set   change a thing here", 9, "\r/set   change a\n         thing here\n"),
        ("/set   change a thing here", 10, "\r/set   change a\nthing here\n"),
        ("a/path/that/is/longer/than/a/row", 0, "\ra/path/that/is/longer/than/a/row\n"),
        ("two words-with-a-hyphen", 0, "\rtwo\nwords-with-a-hyphen\n"),
        ("red\x1b[31m\x07", 0, "\rred[31m\n"),
        ("one\n\ntwo", 0, "\rone\n\ntwo\n"),
    ],
)
def test_a_line_on_a_terminal(line, indent, shown, screen, monkeypatch):
    screen.take(monkeypatch)
    say(line, indent)
    assert screen.came() == shown


def test_a_line_in_a_log_is_as_it_is(capsys):
    say("long " * 40 + "\x07end", 3)
    assert capsys.readouterr() == ("", "long " * 40 + "end\n")


def test_a_line_stands_above_a_bar_and_between_pieces_of_an_answer(screen, monkeypatch):
    screen.take(monkeypatch)
    answer = Answer()
    assert Answer.coming is answer
    answer.write("A ship ")
    assert screen.came() == "A ship"
    say("a note")
    assert screen.came() == "\n\ra note\n"
    answer.write("is here")
    answer.end()
    # The gap before a word goes with the line that ended.
    assert screen.came() == "is here\n" and Answer.coming is None
    say("after")
    assert screen.came() == "\rafter\n"
    with progress_bar(10, "reading", "tokens") as bar:
        bar.refresh()
        before = screen.came()
        assert before.endswith("]") or "reading" in before
        say("above")
        shown = screen.came()
    assert "\rabove\n" in shown and shown.index("above") < shown.rindex("reading")


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["one ", "two"], "one two\n"),
        (["a" * 20, "b"], "a" * 20 + "\nb\n"),
        (["a" * 19, " b"], "a" * 19 + "\nb\n"),
        (["a" * 18, " b"], "a" * 18 + " b\n"),
        (["a b\n\n  c\n"], "a b\n\n  c\n"),
        (["a\tb"], "a    b\n"),
        (["\u4e16" * 11], "\u4e16" * 10 + "\n" + "\u4e16\n"),
        (["a" * 17, " \u4e16b"], "a" * 17 + " \u4e16\nb\n"),
        (["a" * 19, "\u4e16"], "a" * 19 + "\n\u4e16\n"),
        (["a" * 45], "a" * 20 + "\n" + "a" * 20 + "\n" + "a" * 5 + "\n"),
        (["\x1b[1m", "x\x00"], "[1mx\n"),
        ([], ""),
        (["  "], ""),
        (["end \n"], "end\n"),
        (["x ", "\n", " y"], "x\n y\n"),
        (["\u4e16"], "\u4e16\n"),
    ],
)
def test_an_answer_on_a_terminal_of_20_columns(pieces, shown, screen, monkeypatch):
    screen.take(monkeypatch)
    answer = Answer()
    for piece in pieces:
        answer.write(piece)
    answer.end()
    assert screen.came() == shown


def test_the_last_word_waits_until_it_is_whole(screen, monkeypatch):
    screen.take(monkeypatch)
    answer = Answer()
    answer.write("one tw")
    assert screen.came() == "one"
    answer.write("o\u4e16")
    assert screen.came() == " two\u4e16"
    answer.write("z")
    assert screen.came() == ""
    answer.write("\n")
    assert screen.came() == "z\n"


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["a  b\t", "x" * 99, " "], "a  b\t" + "x" * 99 + " \n"),
        (["a\n", ""], "a\n"),
        (["a", ""], "a\n"),
        (["a", "\n"], "a\n"),
        ([], ""),
        ([""], ""),
        (["a\x1b", "b"], "ab\n"),
    ],
)
def test_an_answer_elsewhere_is_as_it_is_and_ends_its_line(pieces, shown, capsys):
    answer = Answer()
    assert Answer.coming is None
    for piece in pieces:
        answer.write(piece)
    answer.end()
    assert capsys.readouterr().out == shown


# --- waiting ---


def test_how_long_someone_waits_who_is_told():
    """A line after a second, and then each half minute; Ctrl-C is answered at once, as people see
    it, and a second one leaves after a second."""
    assert (terminal.WAIT, terminal.BETWEEN) == (1.0, 30.0)
    assert (terminal.MENTION, terminal.LEAVE) == (0.3, 1.0)


def test_what_is_waited_for_is_said_on_a_terminal_alone(screen, monkeypatch, capsys):
    screen.take(monkeypatch)
    monkeypatch.setattr(terminal, "WAIT", 0.02)
    with waiting("loading a"):
        until = time.monotonic() + 5
        shown = ""
        while not shown and time.monotonic() < until:
            shown = screen.came()
    assert shown == "\rloading a\n"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with waiting("loading a"):
        time.sleep(0.06)
    assert sys.stderr.getvalue() == ""


def test_a_wait_that_is_over_is_not_said(screen, monkeypatch):
    screen.take(monkeypatch)
    with waiting("loading a"):
        timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert [t.daemon for t in timers] == [True]
    for timer in timers:
        timer.join()
    assert screen.came() == ""


def lines_of(capsys, monkeypatch, between=1e-9, **bar):
    monkeypatch.setattr(terminal, "BETWEEN", between)
    with progress_bar(**bar) as shown:
        for _ in range(20):
            shown.update(100)
    return capsys.readouterr().err.splitlines()


def test_a_bar_in_a_log_has_a_line_each_tenth(capsys, monkeypatch):
    found = lines_of(capsys, monkeypatch, total=2400, what="reading", unit="tokens", done=400)
    begins = [re.match(r"reading: ([\d,]+) of ([\d,]+) tokens, .*tokens/s$", x) for x in found]
    assert [x[1] for x in begins] == ["700", "1,000", "1,300", "1,600", "1,900", "2,200"]
    assert {x[2] for x in begins} == {"2,400"}
    found = lines_of(capsys, monkeypatch, total=5, what="asking", unit="items")
    assert len(found) == 20 and found[0].startswith("asking: 5 of 5 items, ")  # no more than all
    assert lines_of(capsys, monkeypatch, 30.0, total=2400, what="reading", unit="tokens") == []


def test_a_bar_says_more_where_it_is_told(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    with progress_bar(10, "training", "steps") as bar:
        bar.set_postfix(loss="1.5")
        bar.update(1)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("training: 1 ")]
    assert line.endswith(", loss=1.5")


def test_work_that_lasts_is_begun_with_a_line(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "WAIT", 0.01)
    for total, said in ((2400, "reading 2,000 tokens\n"), (0, "")):
        with progress_bar(total, "reading", "tokens", 400 if total else 0) as bar:
            assert bar.timer.daemon
            bar.timer.join()
        assert capsys.readouterr().err == said
    monkeypatch.setattr(terminal, "WAIT", 0.5)
    with progress_bar(10, "reading", "tokens") as bar:
        pass
    bar.timer.join()
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_goes_when_it_is_full(screen, monkeypatch):
    screen.take(monkeypatch)
    with progress_bar(100_000, "reading", "tokens") as bar:
        bar.update(50_000)
        bar.refresh()
        assert bar.timer is None
        shown = screen.came()
    rows = shown.split("\r")
    assert rows[1] == " " * 19 and all(len(row) <= 19 for row in rows)
    assert "reading:" in rows[-1] and len(rows[-1]) <= 17
    assert screen.came().endswith("\r" + " " * 19 + "\r\r")


def test_a_bar_on_a_wide_terminal_says_how_far_it_is(monkeypatch):
    wide = Screen(100)
    monkeypatch.setattr(sys, "stderr", wide.stream)
    for unit, said in (("tokens", "50.0k/100k"), ("items", "50000/100000")):
        with progress_bar(100_000, "reading", unit) as bar:
            bar.update(50_000)
            bar.refresh()
            shown = wide.came().split("\r")[-1]
            assert shown.startswith("reading:  50%|") and said in shown and f" {unit}/s" in shown
            assert len(shown) <= 97
            fcntl.ioctl(wide.stream, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
            bar.refresh()
            assert len(wide.came().split("\r")[-1]) <= 57
            fcntl.ioctl(wide.stream, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 100, 0, 0))
        wide.came()
    wide.close()


def test_a_bar_without_a_total_counts(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    with progress_bar(0, "opening", "pages") as bar:
        bar.total = 3
        bar.update(2)
    assert capsys.readouterr().err.startswith("opening: 2 of 3 pages, ")


# --- what is piped in ---


def test_what_is_piped_in_is_seen_and_not_taken(tmp_path, monkeypatch):
    def seen(end):
        with os.fdopen(os.dup(end)) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            return is_piped_in()

    (tmp_path / "a").write_text("text")
    with (tmp_path / "a").open() as file:
        assert seen(file.fileno())
        os.lseek(file.fileno(), 4, os.SEEK_SET)
        assert not seen(file.fileno())
    end, begin = os.pipe()
    assert not seen(end)
    os.write(begin, b"x" * 256)
    assert seen(end) and os.read(end, 300) == b"x" * 256
    os.close(begin)
    assert not seen(end)
    os.close(end)
    a, b = socket.socketpair()
    assert not seen(a.fileno())
    b.send(b"x")
    assert seen(a.fileno())
    a.close()
    b.close()
    with open(os.devnull) as nothing:
        assert not seen(nothing.fileno())
    closed = (tmp_path / "a").open()
    closed.close()
    for other in (io.StringIO("x"), None, closed):
        monkeypatch.setattr(sys, "stdin", other)
        assert not is_piped_in()


# --- Ctrl-C ---


def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def test_ctrl_c_is_heard_between_two_steps():
    with stop_between_steps() as check:
        check()
        press()
        with pytest.raises(KeyboardInterrupt) as stopped:
            check()
        assert not isinstance(stopped.value, Left)
        with pytest.raises(Left):
            press()
            time.sleep(1)


def test_a_terminal_that_closes_ends_the_program():
    with stop_between_steps() as check:
        press(signal.SIGHUP)
        press(signal.SIGHUP)  # a shell and the system may both say it
        with pytest.raises(Left):
            check()


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(ignored):
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with stop_between_steps() as check:
            press(ignored)
            check()
            assert signal.getsignal(ignored) is signal.SIG_IGN
            watched = signal.set_wakeup_fd(-1)
            assert (watched == -1) == (ignored == signal.SIGINT)
            if watched != -1:
                signal.set_wakeup_fd(watched, warn_on_full_buffer=False)
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_several_processes_stop_together(monkeypatch):
    told = []

    def any_of(fact):
        told.append(fact)
        return len(told) > 1

    monkeypatch.setattr(terminal, "here", lambda: SimpleNamespace(any=any_of))
    with stop_between_steps() as check:
        check()
        with pytest.raises(KeyboardInterrupt):
            check()  # another was pressed
    with stop_between_steps() as check:
        press()
        with pytest.raises(KeyboardInterrupt):
            check()
    assert told == [False, False, True]


class Gone(BaseException):
    """os._exit was called."""


@pytest.mark.parametrize(
    ("signals", "seen", "end", "shown"),
    [
        (b"", True, None, ""),
        (b"\x02", True, None, "\rstopping after this\nstep; Ctrl-C again\nleaves at once\n"),
        (b"\x02", False, None, ""),
        (b"\x01\x01", True, None, ""),
        (b"\x02\x02", True, 130, ""),
        (b"\x02\x01\x02\x02", True, 130, ""),
    ],
)
def test_a_step_that_goes_on_is_left_after_a_second_ctrl_c(
    signals, seen, end, shown, screen, monkeypatch
):
    screen.take(monkeypatch)
    monkeypatch.setattr(terminal, "MENTION", 0.02)
    monkeypatch.setattr(terminal, "LEAVE", 0.02)
    if not seen:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    left = []

    def leave(code):
        left.append(code)
        raise Gone

    monkeypatch.setattr(os, "_exit", leave)
    close, begin = os.pipe()
    os.write(begin, signals) if signals else None
    came = []

    def end_it():
        until = time.monotonic() + 10
        while "".join(came) != shown and time.monotonic() < until:
            came.append(screen.came())
        # Who is to leave has time for it; of others nothing more comes.
        gone.wait(10 if end else 0.1)
        os.close(begin)

    gone = threading.Event()
    ending = threading.Thread(target=end_it)
    ending.start()
    with suppress(Gone):
        terminal._watch(close)
    gone.set()
    ending.join()
    os.close(close)
    assert left == ([] if end is None else [end]) and "".join([*came, screen.came()]) == shown


def test_a_thread_hears_signals_as_long_as_a_run():
    before = threading.active_count()
    with terminal._answering_at_once():
        assert threading.active_count() == before + 1
        (own,) = [t for t in threading.enumerate() if t.name.endswith("(_watch)")]
        assert own.daemon
        begin = signal.set_wakeup_fd(-1)
        assert begin != -1 and not os.get_blocking(begin)
        signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
    assert threading.active_count() == before and signal.set_wakeup_fd(-1) == -1
    with pytest.raises(OSError):
        os.fstat(begin)


# --- lines of a person ---

WORDS = {"/read": Prompt.PATHS, "/set": ("temp", "seed", "top-p"), "/stats": ()}


def plain(text):
    return text


def test_lines_of_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    prompt = Prompt(WORDS, plain)
    assert (prompt.typed, prompt.seen, prompt.editor) == (False, False, None)
    assert [prompt.line(), prompt.line("default")] == ["one\n", "two"]
    with pytest.raises(EOFError):
        prompt.line()
    assert capsys.readouterr() == ("", "")


def test_lines_that_are_typed_where_nobody_sees(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Typing("one\n"))
    prompt = Prompt(WORDS, plain)
    assert (prompt.typed, prompt.seen, prompt.editor) == (True, False, None)
    assert prompt.line() == "one\n" and capsys.readouterr().err == "> "


def test_a_dumb_terminal_has_no_editor(screen, monkeypatch):
    screen.take(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdin", Typing("^C\none\n^C\n^C\n"))
    prompt = Prompt(WORDS, plain)
    assert (prompt.typed, prompt.seen, prompt.editor) == (True, True, None)
    assert prompt.line() == "one\n"
    assert screen.came() == "> \r(Ctrl-C again, or\nCtrl-D, leaves)\n> "
    with pytest.raises(Left):
        prompt.line()
    assert screen.came() == "> \r(Ctrl-C again, or\nCtrl-D, leaves)\n> "
    monkeypatch.setattr(sys, "stdin", Typing("^C\n"))
    with pytest.raises(Left):  # one was pressed just before
        prompt.line(pressed=True)
    assert screen.came() == "> "


def test_ctrl_c_in_a_pipe_leaves_at_once(monkeypatch, capsys):
    class Pressed(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Pressed())
    with pytest.raises(Left):
        Prompt(WORDS, plain).line()
    assert capsys.readouterr().err == ""


@pytest.fixture
def begin(screen, monkeypatch, tmp_path):
    """A prompt on a terminal, with an editor, and keys that are typed there."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with create_pipe_input() as keys, create_app_session(input=keys):

        def made():
            screen.take(monkeypatch)
            monkeypatch.setattr(sys, "stdin", Typing())
            prompt = Prompt(WORDS, lambda text: f"<{text}>")
            prompt.keys = keys
            return prompt

        yield made


def typed(editor, text, **more):
    editor.keys.send_text(text)
    return editor.line(**more)


def test_a_line_is_edited(begin, screen):
    editor = begin()
    assert editor.typed and editor.seen and editor.editor is not None
    assert typed(editor, "one\r") == "one"
    assert "> " in screen.came()
    assert typed(editor, "X\r", default="two") == "twoX"
    assert typed(editor, "\x1b[A\r") == "twoX"  # the key for up, in history
    session = editor.editor
    assert session.complete_style is CompleteStyle.READLINE_LIKE
    assert not session.complete_while_typing and session.enable_suspend
    assert typed(editor, "/st\t\r") == "/stats"
    # What a terminal sends around what is pasted.
    assert typed(editor, "\x1b[200~a\r\nb\rc\x1b[201~\r") == "<a\nb\nc>"
    assert typed(editor, "x\x1b[200~a\x1b[201~\r") == "xa"
    editor.keys.send_text("\x04")
    with pytest.raises(EOFError):
        editor.line()


def test_ctrl_c_clears_a_line_and_then_leaves(begin, screen):
    editor = begin()
    assert typed(editor, "half\x03one\r") == "one"
    assert "(Ctrl-C again, or" in screen.came()
    assert typed(editor, "half\x03one\r", pressed=True) == "one"  # it cleared something
    editor.keys.send_text("\x03")
    with pytest.raises(Left):
        editor.line(pressed=True)
    editor.keys.send_text("\x03\x03")
    with pytest.raises(Left):
        editor.line(default="")
    assert typed(editor, "\x03one\r", default="there") == "one"


def test_lines_are_kept_for_oneself(begin, tmp_path):
    editor = begin()
    typed(editor, "one\r")
    typed(editor, "caf\u00e9 \x1b[200~a\nb\x1b[201~\r")
    file = tmp_path / "state/ahn-mlx/history"
    assert "+one\n" in file.read_text() and "+caf\u00e9 a\n+b\n" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    history = prompting._history()
    assert list(history.load_history_strings()) == ["caf\u00e9 a\nb", "one"]
    for size, kept in ((10_000, True), (10_001, False)):
        history.store_string("y" * size)
        assert ("y" * size in list(history.load_history_strings())) is kept
    history.store_string("odd \udce9")
    assert "odd" in next(iter(history.load_history_strings()))


def test_a_history_that_cannot_be_kept_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    history = prompting._history()
    history.store_string("one")
    assert history.load_history_strings() == [] and (tmp_path / "file").read_bytes() == b""


def test_where_lines_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for state in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        place = str(tmp_path / ".local/state/ahn-mlx/history")
        assert str(prompting._history().filename) == place
    monkeypatch.setenv("XDG_STATE_HOME", "/a")
    assert str(prompting._history().filename) == "/a/ahn-mlx/history"
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    assert isinstance(prompting._history(), InMemoryHistory)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/", [("/read", -1), ("/set", -1), ("/stats", -1)]),
        ("/S", [("/set", -2), ("/stats", -2)]),
        ("s", []),
        ("", []),
        ("/SET t", [("temp", -1), ("top-p", -1)]),
        ("/set ", [("temp", 0), ("seed", 0), ("top-p", 0)]),
        ("/zzz t", []),
        ("/read a", [("\\ b.txt", 0), ("dir/", 0)]),
        ("/read 'a", [(" b.txt", 0), ("dir/", 0)]),
        ("/read adir/o", [("ld\\'s.txt", 0)]),
        ('/read "adir/o', [("ld's.txt", 0)]),
        ("/read x\\ y.txt a", [("\\ b.txt", 0), ("dir/", 0)]),
        ("/read a\\ b", [(".txt", 0)]),
        ("/read zzz", []),
        ("/read ~/ho", [("me.txt", 0)]),
    ],
)
def test_what_completes_a_line(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "adir"))
    (tmp_path / "adir").mkdir()
    for name in ("a b.txt", "adir/old's.txt", "adir/home.txt"):
        (tmp_path / name).touch()
    completions = prompting._Words(WORDS).get_completions(Document(text), CompleteEvent())
    completions = list(completions)
    assert [(c.text, c.start_position) for c in completions] == found
    if text == "/read a":
        assert [c.display_text for c in completions] == ["a b.txt", "adir/"]
