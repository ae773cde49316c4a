"""Questions and conversations, in this process: what is answered, said, kept and refused."""

import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.nn as nn
import pytest
from checkpoints import make_base, memory_of, talking_model
from mlx.utils import tree_flatten
from terminals import (
    SAMPLING,
    TEXT,
    Clock,
    Screen,
    Typing,
    bars,
    laid_out,
    pressed,
    refused,
    remembered,
    run,
)

from ahn_mlx import AHNError, Session, load
from ahn_mlx.cli import ask as asking
from ahn_mlx.cli import settings, talk
from ahn_mlx.cli.options import check_numbers
from ahn_mlx.cli.talk import Talk, print_answer
from ahn_mlx.cli.terminal import Left
from ahn_mlx.reading import memoryfile

LONG = TEXT * 21  # 1,113 tokens
HELPS = "(/help lists them, // begins a message with a slash)"
SMALLER = "take a smaller model, fewer --q-bits or a smaller --window"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="module")
def loaded(model):
    return load(model)


@pytest.fixture(scope="module")
def kept(loaded, model, tmp_path_factory):
    return remembered(loaded, model, tmp_path_factory.mktemp("kept") / "book.ahn")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, kept):
    return laid_out(tmp_path, monkeypatch, kept)


def facts_of(file):
    return memoryfile.read_facts(Path(file))


class Impatient:
    """A session at which Ctrl-C is pressed when so many pieces have come."""

    def __init__(self, session, pieces, times=1):
        self.session, self.pieces, self.times = session, pieces, times

    def __getattr__(self, name):
        return getattr(self.session, name)

    def fork(self):
        return Impatient(self.session.fork(), self.pieces, self.times)

    def ask(self, question, **more):
        if not self.pieces:
            os.kill(os.getpid(), signal.SIGINT)
        for n, text in enumerate(self.session.ask(question, **more), 1):
            if n == self.pieces:
                for _ in range(self.times):
                    os.kill(os.getpid(), signal.SIGINT)
            yield text


@pytest.fixture
def session(loaded, model):
    return Session(*loaded, origin={"name": str(model)})


# --- ask, chat ---


def test_questions_and_what_they_are_asked_of(place, monkeypatch):
    assert asking._words(("book.ahn", "Who?"), None, None) == ("book.ahn", "Who?")
    assert asking._words(("Who?",), Path("b.ahn"), None) == ("b.ahn", "Who?")
    assert asking._words(("book.ahn",), None, "Who?") == ("book.ahn", "Who?")
    assert asking._words(("book.ahn",), None, "") == ("book.ahn", "")
    assert asking._words((), Path("b.ahn"), None) == ("b.ahn", None)
    for args, said in (
        (
            ((), None, None),
            'which memory? Give a file of ahn-mlx digest: ahn-mlx ask FILE "Who is the captain?"',
        ),
        (((), None, "Who's?"), "ahn-mlx ask FILE 'Who'\"'\"'s?'"),
        (
            (("book.ahn",), Path("b.ahn"), None),
            "'book.ahn' is a second file; a question is of one memory, b.ahn",
        ),
    ):
        with pytest.raises(AHNError) as error:
            asking._words(*args)
        assert said in str(error.value)
    monkeypatch.setattr(sys, "stdin", Typing("Who?\n"))
    assert asking._piped() is None
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffWho?\r\n"))
    assert asking._piped().strip() == "Who?"


def test_ask_answers_once_and_as_json(place, loaded):
    few = ("book.ahn", "-m", 4)
    done = run("ask", *few, "Who?")
    expected = "".join(Session.load("book.ahn", *loaded).ask("Who?", max_tokens=4))
    assert done.stdout == expected + "\n" and "first token after" in done.stderr
    facts = json.loads(run("ask", *few, "Who?", "--json").stdout)
    assert (facts["text"], facts["tokens"], facts["finish_reason"]) == (expected, 4, "length")
    assert json.loads(run("ask", *few, "--json", said="Who?").stdout)["text"] == expected
    said = 'no question; give one: ahn-mlx ask book.ahn "Who is the captain?"'
    for words, piped in ((("-p", " "), ""), ((), ""), (("--json",), "\n")):
        assert refused("ask", *few, *words, said=piped) == said
    assert "--interactive has no effect with --json" in refused(
        "ask", *few, "Who?", "--json", "--interactive"
    )
    # One question, and then more of them.
    done = run("ask", *few, "Who?", "--interactive", said="Who?\n/stats\n")
    assert done.stdout == f"{expected}\n{expected}\n" and "218 tokens" in done.stderr


def test_a_terminal_that_asks_for_json_has_to_give_a_question(place, monkeypatch):
    monkeypatch.setattr(asking, "_piped", lambda: None)
    assert refused("ask", "book.ahn", "--json").startswith("no question; give one")
    done = run("ask", "book.ahn", "-m", 2, said="Who?\n")  # and else it is asked for questions
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(("times", "said"), [(1, "stopped before the answer began\n"), (2, "")])
def test_ctrl_c_before_an_answer(times, said, place, monkeypatch):
    pressed(monkeypatch, 1, times)
    done = run("ask", "book.ahn", "Who?", code=130)
    assert done.stderr == said and done.stdout == ""


def test_an_answer_that_is_cut_has_the_code_130(place, monkeypatch, session, capsys):
    monkeypatch.setattr(
        asking,
        "load_session",
        lambda *_: Impatient(Session.load("book.ahn", session.model, session.tokenizer), 2),
    )
    assert run("ask", "book.ahn", "Who?", code=130).stdout.endswith("\n")
    facts = json.loads(run("ask", "book.ahn", "Who?", "--json", code=130).stdout)
    assert facts["tokens"] == 2 and facts["finish_reason"] == "interrupted"


def test_a_memory_goes_on_as_it_began(place, model, tmp_path):
    found = asking.load_session(Path("book.ahn"), None, None)
    assert found.tokens == 218 and found.origin["name"] == str(model)
    moved = tmp_path / "moved"
    moved.symlink_to(model)
    assert asking.load_session(Path("book.ahn"), str(moved), None).origin["name"] == str(moved)


def test_chat_begins_as_it_was_told(place):
    base = make_base(place / "base", vocab_size=256)
    memory = memory_of(base, place / "memory")
    words = ["chat", "--model", base, "--ahn", memory, "-m", 1]
    more = ["--kv-bits", 4, "--kv-group-size", 32, "--system-prompt", "Be brief."]
    run(*words, *more, "--sinks", 30, said="Hi\n/save a.ahn\n")
    facts = facts_of("a.ahn")
    assert facts["system"] == "Be brief." and facts["talked"] is True
    assert [layer[3:] for layer in facts["layers"]] == [[4, 32]] * 2
    run(*words, said="Hi\n/save b.ahn\n")
    assert facts_of("b.ahn")["system"] == ""


def test_a_system_message_should_be_kept_by_the_sinks(model):
    session = Session(*load(model), system="Be brief.")
    tokens = len(session.encoder(*session.opening()))
    words = ("chat", "--model", model, "--system-prompt", "Be brief.", "--sinks")
    note = f"note: the system message has {tokens} tokens, of which the sinks keep {tokens - 1}"
    assert note in run(*words, tokens - 1).stderr
    assert "note: the system" not in run(*words, tokens).stderr
    assert "note: the system" not in run("chat", "--model", model, "--sinks", 0).stderr


def test_chat_goes_on_with_a_memory(place, model, tmp_path):
    done = run("chat", "book.ahn", said="/stats\n/model\n")
    assert "218 tokens" in done.stderr and f"model      {model}" in done.stderr
    moved = tmp_path / "moved"
    moved.symlink_to(model)
    done = run("chat", "--memory", "book.ahn", "--model", moved, said="/model\n")
    assert f"model      {moved}" in done.stderr


# --- an answer ---


def test_the_numbers_of_an_answer(session, monkeypatch, capsys):
    given = {**SAMPLING, "max_tokens": 5}
    monkeypatch.setattr(talk, "time", Clock(100, 102.5, 110.5))
    assert print_answer(session.fork(), "Hi", given) == 0
    out, err = capsys.readouterr()
    # Four tokens came after the first, in eight seconds.
    assert err == "first token after 2.5 s | 5 tokens, 0.5 tokens/s\n" and out.endswith("\n")
    monkeypatch.setattr(talk, "time", Clock(100, 102.50049, 110.5))
    assert print_answer(session.fork(), "Hi", given, as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "model": session.origin["name"],
        "text": out.removesuffix("\n"),
        "tokens": 5,
        "first_token_s": 2.5,
        "seconds": 10.5,
        "finish_reason": "length",
    }
    monkeypatch.setattr(talk, "time", Clock(100, 102.5, 110.5))
    print_answer(session.fork(), "Hi", {**given, "max_tokens": 1})
    assert capsys.readouterr().err == "first token after 2.5 s | 1 tokens, 0.0 tokens/s\n"


def test_an_answer_that_ends_by_itself(session, capsys, monkeypatch):
    first = next(iter(session.fork().ask("Hi", max_tokens=1)))
    session.tokenizer = load(session.origin["name"])[1]
    session.tokenizer._eos_token_ids = {session.tokenizer.encode(first)[0]}
    assert print_answer(session, "Hi", SAMPLING, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "stop"
    assert talk._name(session) == session.origin["name"]
    session.origin = {"name": None}
    assert talk._name(session) == "a model"


def test_what_a_question_takes_to_read_is_shown(session, monkeypatch, capsys):
    bars(monkeypatch)
    print_answer(session, "x" * 700, SAMPLING)
    err = capsys.readouterr().err
    assert re.search(r"^reading: \d+ of 7\d\d tokens, ", err)
    assert "first token after" in err.splitlines()[-1]


def test_how_much_of_a_question_is_read_grows_to_all_of_it(session, monkeypatch, capsys):
    bars(monkeypatch)
    print_answer(session, "x" * 1700, SAMPLING)
    found = re.findall(r"reading: ([\d,]+) of ([\d,]+) tokens", capsys.readouterr().err)
    read, of = ([int(x.replace(",", "")) for x in column] for column in zip(*found, strict=True))
    assert {*of} == {of[0]} and sorted({*read})[-4:] == [512, 1024, 1536, of[0] - 1]


def test_ctrl_c_in_an_answer_keeps_what_came(session, capsys):
    given = {**SAMPLING, "max_tokens": 9}
    assert print_answer(Impatient(session.fork(), 2), "Hi", given) == 130
    out, err = capsys.readouterr()
    assert err.split(" | ")[1].startswith("2 tokens, ")
    assert print_answer(Impatient(session.fork(), 2), "Hi", given, as_json=True) == 130
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"] + "\n" == out and facts["finish_reason"] == "interrupted"
    with pytest.raises(Left):
        print_answer(Impatient(session.fork(), 2, times=2), "Hi", given)
    with pytest.raises(KeyboardInterrupt):
        print_answer(Impatient(session.fork(), 0), "Hi", given)


# --- a conversation ---


def talking(session, keeps=True, file=None, typed=None, monkeypatch=None, **sampling):
    return Talk(session, {**SAMPLING, **sampling}, file, keeps)


def said_of(capsys):
    return capsys.readouterr().err


def test_a_conversation_is_not_that_of_who_began_it(session, capsys):
    me = talking(session)
    assert me._take("Hi") and me.session.tokens > 0 == session.tokens
    before, question, given = me.last
    assert (before.tokens, question, given, me.finished) == (0, "Hi", me.sampling, True)
    assert given is not me.sampling
    tokens = me.session.tokens
    assert me._take("//a slash") and me.last[1] == "/a slash" and me.session.tokens > tokens
    me._take("/reset")
    assert me.session.tokens == 0 and me.last is None and "back to 0 tokens" in said_of(capsys)
    asked = talking(session, keeps=False)
    asked._take("Hi")
    assert asked.session.tokens == 0 and asked.last[1] == "Hi"
    assert not me._take("/exit") and not me._take("/QUIT") and me._take("")


def test_reading_is_part_of_the_conversation(session, capsys, place, monkeypatch):
    bars(monkeypatch)
    me = talking(session)
    me._take("Hi")
    tokens = me.session.tokens
    capsys.readouterr()
    me._take("/read story.txt")
    err = said_of(capsys)
    read = me.session.tokens - tokens
    assert err.splitlines()[-1] == f"read {read:,} tokens" and me.last is None
    assert me.unsaved == read and me.session.texts[-1]["name"] == "story.txt"
    assert re.search(r"reading: (\d+) of \1 tokens", err)
    me._take("/READ story.txt 'story.txt'")
    assert "twice" in said_of(capsys) and me.unsaved == read
    me._take("/read 'story.txt'")
    assert me.unsaved == me.session.tokens - tokens
    me._take("/save a.ahn")
    assert (
        said_of(capsys).splitlines()[-1] == f"saved {me.session.tokens:,} tokens"
        and me.unsaved == 0
    )
    assert facts_of("a.ahn")["talked"] is True
    me._take("/read story.txt")
    me._take("/load a.ahn")
    assert said_of(capsys).splitlines()[-1] == f"loaded {me.session.tokens:,} tokens"
    assert me.unsaved == 0 and me.last is None and len(me.session.texts) == 2
    me._take("/read story.txt")
    me._take("/reset")
    assert me.unsaved == 0


def test_ctrl_c_while_it_reads_leaves_the_conversation(session, capsys, place, monkeypatch):
    (place / "long.txt").write_text(LONG)
    me = talking(session)
    with monkeypatch.context() as patch:
        pressed(patch, 512)
        assert me._take("/read long.txt")
    assert said_of(capsys) == "stopped; the conversation is as it was\n"
    assert me.session.tokens == 0 == me.unsaved and me.stopped > 0
    with monkeypatch.context() as patch:
        pressed(patch, 512, times=2)
        with pytest.raises(Left):
            me._take("/read long.txt")


def test_an_answer_that_was_cut_may_be_given_once_more(session, capsys):
    me = talking(Impatient(session, 2), max_tokens=9)
    assert me.stopped == -talk.TWICE
    me._take("Hi")
    assert me.stopped > 0 and not me.finished and me.last[1] == "Hi"
    me._take("/regenerate")
    assert "would be the same" not in said_of(capsys)


@pytest.mark.parametrize(
    ("given", "change", "said"),
    [
        ({}, {}, "error: at temp 0 the answer would be the same; /set temp 0.7 first"),
        (
            {"temp": 1.0, "seed": 3},
            {},
            "error: with this seed the answer would be the same; /set seed none first",
        ),
        (
            {"temp": 1.0, "seed": 0},
            {},
            "error: with this seed the answer would be the same; /set seed none first",
        ),
        ({"temp": 1.0}, {}, ""),
        ({}, {"max_tokens": 4}, ""),
        ({"temp": 1.0, "seed": 3}, {"seed": 4}, ""),
    ],
)
def test_an_answer_once_more_is_another(given, change, said, session, capsys):
    me = talking(session, **given)
    me._take("Hi")
    tokens = me.session.tokens
    capsys.readouterr()
    me.sampling = {**me.sampling, **change}
    me._take("/regenerate")
    err = said_of(capsys)
    assert (said in err) if said else "first token" in err
    assert me.session.tokens - tokens == (change.get("max_tokens", 3) - 3 if not said else 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/read", "error: /read needs a file: /read FILE..."),
        ("/save  ", "error: /save needs a file: /save FILE"),
        ("/load", "error: /load needs a file: /load FILE"),
        ("/stats x", "error: /stats takes nothing after it"),
        ("/exit x", "error: /exit takes nothing after it"),
        ("/regenerate", "error: there is no answer to give once more; ask something"),
        ("/read 'story.txt", "error: /read 'story.txt: the quotation does not end"),
        ("/read it's", "error: it's: No such file or directory"),
        (
            "/read book.ahn",
            "error: book.ahn: is a memory, not a document; /load book.ahn goes on with it",
        ),
        (
            "/save book.ahn",
            "error: book.ahn: is there and is not a saved conversation; choose another name",
        ),
        (
            "/save story.txt",
            "error: story.txt: is there and is not a saved conversation; choose another name",
        ),
        (
            "/set",
            f"{'max-tokens':<20} 3\n{'temp':<20} 0.0\n{'top-p':<20} 1.0\n{'top-k':<20} 0\n",
        ),
        ("/set temp 2", "temp 2.0\n"),
        ("/set temp", "temp 0.0\n"),
        (
            "/rea x",
            f"error: no such command: /rea; did you mean /read? {HELPS}",
        ),
        (
            "/zzz",
            "error: no such command: /zzz (/help lists them, // begins a message with a slash)",
        ),
        (
            "/qit",
            f"error: no such command: /qit; did you mean /quit? {HELPS}",
        ),
        ("/a/b c", "error: /a/b: no such file, and no command (// begins a message with a slash)"),
    ],
)
def test_what_is_said_to_a_line(line, said, session, capsys):
    assert talking(session)._take(line)
    assert said in said_of(capsys)


def test_help_lists_what_there_is(session, capsys):
    me = talking(session)
    for line in ("/help", "/", "/?"):
        me._take(line)
        lines = said_of(capsys).splitlines()
        assert lines[0] == "/read FILE...      read texts as part of the conversation"
        assert [x.split()[0] for x in lines] == list(talk.COMMANDS) and len(lines) == 10
        assert lines[6] == "/stats             tokens, and bytes of memory"
    asked = talking(session, keeps=False, file=Path("my book.ahn"))
    asked._take("/help")
    names = [x.split()[0] for x in said_of(capsys).splitlines()]
    assert names == ["/regenerate", "/set", "/stats", "/model", "/help", "/exit"]
    for line in ("/read story.txt", "/save a.ahn", "/load a.ahn", "/reset"):
        asked._take(line)
        assert said_of(capsys) == (
            f"error: {line.split()[0]}: questions do not change a memory;"
            " ahn-mlx chat --memory 'my book.ahn' goes on with it\n"
        )


def test_help_and_settings_go_on_below_themselves(session, monkeypatch):
    screen = Screen(44)
    me = talking(session)
    screen.take(monkeypatch)
    me._take("/help")
    assert (
        "\r/read FILE...      read texts as part of the\n" + " " * 19 + "conversation\n"
        in screen.came()
    )
    me.sampling["stop"] = ("a long text to stop at",)
    me._take("/set")
    assert f"\r{'stop':<20} 'a long text to stop\n{' ' * 21}at'\n" in screen.came()
    me.session.origin = {"name": "a/path of/many words and/a few more"}
    me._take("/model")
    assert "\rmodel      a/path of/many words and/a few\n" + " " * 11 + "more\n" in screen.came()
    screen.close()


def test_what_the_model_is(session, capsys, place, model):
    me = talking(session)
    me._take("/model")
    rows = dict(line.split(None, 1) for line in said_of(capsys).splitlines())
    size = sum(x.nbytes for _, x in tree_flatten(session.model.parameters()))
    assert rows == {
        "model": str(model),
        "base": "qwen2, 3 layers",
        "memory": "gated_deltanet",
        "window": "12 tokens",
        "sinks": "4 tokens, absolute positions",
        "weights": f"float32, {size / 1e6:.1f} MB",
    }
    base = make_base(place / "base", vocab_size=256)
    made = load(base, ahn=memory_of(base, place / "memory"))
    nn.quantize(made[0].layers[0].mlp, bits=4, group_size=32)
    rows = dict(talk._about(Session(*made, kv_bits=8, kv_group_size=32)))
    assert rows["window"] == "60 tokens in 8 bits" and rows["weights"].startswith(
        "4 bits, rest float32, "
    )
    me._take("/stats")
    tokens = f"0 tokens, {session.nbytes / 1e6:.1f} MB of memory\n"
    assert said_of(capsys) == tokens


def test_a_memory_of_another_model_starts_another_chat(session, capsys, place, model):
    other = Session(*load(model, window=20), origin={"name": str(model)})
    other.read(TEXT)
    other.save("other one.ahn")
    talking(session)._take("/load 'other one.ahn'")
    said = said_of(capsys)
    assert said.endswith(", here; ahn-mlx chat --memory 'other one.ahn' starts with it\n")


def test_files_that_are_dropped(session, capsys, place):
    me = talking(session)
    line = f"{place}/story.txt"
    assert me._take(line)
    assert said_of(capsys) == f"error: {line} is a file; /read {line}\n" and me.default == ""
    me.edited = True
    me._take(f"{place}")
    assert said_of(capsys) == f"{place} is a folder; Enter goes on as below, Ctrl-C does not\n"
    assert me.default == f"/read {place}"
    me._take(f"'{place}/book.ahn'")
    assert me.default == f"/load {place}/book.ahn"
    capsys.readouterr()
    asked = talking(session, keeps=False, file=Path("a.ahn"))
    asked._take(line)
    said = f"error: {line} is a file; ahn-mlx chat --memory a.ahn goes on with it\n"
    assert said_of(capsys) == said
    (place / "my book.txt").touch()
    assert me._pasted(f" {place}/my\\ book.txt ") == f"/read '{place}/my book.txt' "
    assert me._pasted("a text") == "a text" and asked._pasted(line) == line


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("{}/story.txt", ["story.txt"]),
        ("'{}/story.txt' {}/book.ahn", ["story.txt", "book.ahn"]),
        ('"{}/story.txt"', ["story.txt"]),
        ("file://{}/story.txt", ["story.txt"]),
        ("{}/story.txt\n{}/book.ahn", []),
        ("{}/story.txt {}/absent", []),
        ("{}/absent", []),
        ("story.txt", []),
        ("read {}/story.txt", []),
        ("'story.txt'", []),
        ("~/story.txt", ["story.txt"]),
    ],
)
def test_what_is_dropped_are_files_that_are_there(text, paths, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert talk._dropped(text.replace("{}", str(place))) == [place / path for path in paths]


@pytest.mark.parametrize(
    ("typed", "is_open"),
    [
        *(("'a", True), ("b 'a", True), ('"a b', True), ("it's", False), ("'a'", False)),
        *(("a", False), ("'there", False), ('"a" b', False)),
    ],
)
def test_a_quotation_that_does_not_end(typed, is_open, place):
    (place / "'there").touch()
    assert talk._is_open(typed) is is_open


def test_what_goes_wrong_is_said_and_it_goes_on(session, capsys, monkeypatch):
    me = talking(session)

    def failing(error):
        def command():
            raise error

        monkeypatch.setattr(me, "_stats", command)
        return me._take("/stats")

    for error, said in (
        (OSError(28, "No space", "/a"), "error: /a: No space\n"),
        (OSError("odd"), "error: odd\n"),
        (OSError(5, "Input/output error", "/a"), "error: /a: Input/output error\n"),
        (AHNError("odd"), "error: odd\n"),
        (
            MemoryError("x"),
            f"error: not enough memory (x); {SMALLER}\n",
        ),
        (KeyboardInterrupt(), "stopped; the conversation is as it was\n"),
    ):
        assert failing(error) and said_of(capsys) == said
    assert me.stopped > 0
    for error, ends in (
        (BrokenPipeError(), BrokenPipeError),
        (OSError(5, "Input"), Left),
        (Left(), Left),
    ):
        with pytest.raises(ends):
            failing(error)


def conversation(session, lines, monkeypatch, keeps=True, file=None, stdin=Typing):
    monkeypatch.setattr(sys, "stdin", stdin(lines))
    return Talk(session, dict(SAMPLING), file, keeps).run()


def test_lines_are_answered_until_there_are_no_more(session, capsys, monkeypatch):
    assert conversation(session, "/stats\n\n/stats\n", monkeypatch, stdin=io.StringIO) == 0
    assert said_of(capsys) == "0 tokens, 0.0 MB of memory\n" * 2
    assert conversation(session, "/stats\n/exit\n/stats\n", monkeypatch, stdin=io.StringIO) == 0
    assert said_of(capsys).count("0 tokens") == 1
    assert conversation(session, "^C\n^C\n/stats\n", monkeypatch) == 130
    assert "0 tokens" not in said_of(capsys)


@pytest.mark.parametrize(("later", "leaves"), [(0.99, True), (1.01, False)])
def test_a_ctrl_c_within_a_second_of_another_leaves(later, leaves, session, capsys, monkeypatch):
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[-1], perf_counter=time.perf_counter)
    monkeypatch.setattr(talk, "time", clock)

    me = talking(Impatient(session, 2), max_tokens=9)
    me._take("Hi")
    assert me.stopped == 100.0
    now.append(100.0 + later)
    monkeypatch.setattr(sys, "stdin", Typing("^C\n/exit\n"))
    capsys.readouterr()
    assert me.run() == (130 if leaves else 0)
    assert not me.edited  # without a terminal
    assert ("(Ctrl-C again, or Ctrl-D, leaves)" in said_of(capsys)) is not leaves


def test_what_was_read_and_not_saved_is_said_once(session, capsys, monkeypatch, place):
    (place / "few.txt").write_text("a" * 10)  # and six of the template
    for lines, typed, times in (
        ("/read story.txt\n/exit\n/stats\n/exit\n/stats\n", Typing, 1),
        ("/read story.txt\n/exit\n/stats\n", io.StringIO, 0),
        ("/read story.txt\n/save a.ahn\n/exit\n/stats\n", Typing, 0),
        ("/read few.txt\n/exit\n/stats\n", Typing, 0),
    ):
        assert conversation(session, lines, monkeypatch, stdin=typed) == 0
        err = said_of(capsys)
        found = re.findall(
            r"112 tokens were read and not saved; /save FILE keeps them, /exit again leaves\n", err
        )
        assert len(found) == times, lines
        assert err.count(" MB of memory") == times


def test_who_begins_sees_what_there_is(session, monkeypatch, place, loaded):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(200)
    with monkeypatch.context() as patch:
        screen.take(patch)
        conversation(session, "/exit\n", patch)
        shown = screen.came()
    name = Path(session.origin["name"]).name
    head = f"\r{name} | window 12 + 4 sinks | memory gated_deltanet\n"
    assert shown == head + "\r/help lists the commands\n> "
    found = Session.load("book.ahn", *loaded)
    for keeps, more in ((True, ""), (False, "; each question is asked of it as it is")):
        with monkeypatch.context() as patch:
            screen.take(patch)
            conversation(found, "/exit\n", patch, keeps, Path("book.ahn"))
            shown = screen.came()
        assert f"\rbook.ahn: 218 tokens read{more}\n" in shown
    screen.close()


def test_a_prompt_completes_what_a_conversation_has(session, monkeypatch):
    made = []

    class Noting(talk.Prompt):
        def __init__(self, words, pasted):
            made.append(words)
            super().__init__(words, pasted)

    monkeypatch.setattr(talk, "Prompt", Noting)
    conversation(session, "", monkeypatch, stdin=io.StringIO)
    conversation(session, "", monkeypatch, keeps=False, file=Path("a"), stdin=io.StringIO)
    paths = Noting.PATHS
    assert made[0] == {
        **{"/read": paths, "/save": paths, "/load": paths, "/reset": (), "/regenerate": ()},
        **{"/set": settings.NAMES, "/stats": (), "/model": (), "/help": (), "/exit": ()},
    }
    assert set(made[1]) == {"/regenerate", "/set", "/stats", "/model", "/help", "/exit"}


# --- settings ---


@pytest.mark.parametrize(
    ("typed", "name", "value", "said"),
    [
        ("temp 0.5", "temp", 0.5, ["temp 0.5"]),
        ("--temp 0.5", "temp", 0.5, ["temp 0.5"]),
        ("MAX_TOKENS 9", "max_tokens", 9, ["max-tokens 9"]),
        ("max-tokens default", "max_tokens", 256, ["max-tokens 256"]),
        ("seed 5", "seed", 5, ["seed 5", "it has no effect at temp 0, which is greedy; /set temp"]),
        ("seed NONE", "seed", None, ["seed none"]),
        ("top-p 1", "top_p", 1.0, ["top-p 1.0"]),
        (
            "repetition-context-size 5",
            "repetition_context_size",
            5,
            ["repetition-context-size 5", "it has no effect without repetition-penalty"],
        ),
        ("stop 'a b' c", "stop", ("a b", "c"), ["stop 'a b' 'c'"]),
        ("stop none", "stop", (), ["stop none"]),
        ("stop", "stop", (), ["stop none"]),
        ("temp", "temp", 0.0, ["temp 0.0"]),
    ],
)
def test_a_setting_is_changed(typed, name, value, said):
    before = dict(SAMPLING)
    after, lines = settings.change(typed, before)
    assert after == {**before, name: value} and lines == said and before == SAMPLING
    check_numbers(after)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "colour red",
            "no setting colour; there are max-tokens, temp, top-p, top-k, min-p, "
            "seed, repetition-penalty, repetition-context-size, stop",
        ),
        ("temp -1", "temp must be 0, which is greedy, or from 0.001 to 1e30, not -1.0"),
        ("temp hot", "temp must be a number, not 'hot'"),
        ("seed 1.5", "seed must be a whole number, not '1.5'"),
        ("stop 'a", "stop: the quotation does not end"),
        ("stop ''", "stop must be texts that are not empty, not ''"),
        ("temp 1 2", "temp must be a number, not '1 2'"),
    ],
)
def test_what_a_setting_cannot_be(typed, said):
    with pytest.raises(AHNError) as error:
        settings.change(typed, dict(SAMPLING))
    assert str(error.value) == said


def test_rows_of_settings_stand_below_each_other():
    assert (
        settings.row("top_p", 0.5, 8) == "top-p    0.5"
        and settings.row("top_p", 0.5) == "top-p 0.5"
    )
    assert settings.row("stop", ["a"]) == "stop 'a'" and settings.row("seed", None) == "seed none"
