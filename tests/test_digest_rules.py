"""Commands that read texts and memories, in this process: what they pass on, say and refuse."""

import io
import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import make_base, memory_of, talking_model
from click.testing import CliRunner
from terminals import (
    TEXT,
    Typing,
    bars,
    laid_out,
    pressed,
    refused,
    remembered,
    run,
)

from ahn_mlx import AHNError, Session, load
from ahn_mlx.cli import cli, words
from ahn_mlx.cli import digest as digesting
from ahn_mlx.cli import generate as generating
from ahn_mlx.cli.memory import _part
from ahn_mlx.reading import inspect as report
from ahn_mlx.reading import memoryfile


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


# --- generate ---


def test_generate_says_what_it_has_read(model, monkeypatch):
    bars(monkeypatch)
    done = run(
        "generate",
        "--model",
        model,
        "story.txt",
        "Who?",
        "-m",
        3,
        "--verbose",
        "--prefill-step-size",
        50,
    )
    lines = done.stderr.splitlines()
    made = Session(*load(model))
    tokens = len(made._question(f"{TEXT * 2}\n\nWho?"))
    assert lines[0].startswith(f"{model}: AHNConfig(memory='gated_deltanet', window=12, sinks=4")
    assert lines[0].endswith(f", 3 layers, {tokens} tokens")
    read = [x for x in lines if x.startswith("reading: ")]
    found = [re.match(r"reading: (\d+) of (\d+) tokens, .*, cache ([\d.]+) MB$", x) for x in read]
    assert [int(x[1]) for x in found if x] == [50, 100, tokens - 1, tokens][: len(found)]
    assert {int(x[2]) for x in found if x} == {tokens} and float(found[-1][3]) < 0.1
    # The bar is gone before the answer comes.
    assert "tokens/s" in lines[-1]
    plain = run("generate", "--model", model, "story.txt", "Who?", "-m", 3)
    assert plain.stdout == done.stdout and "AHNConfig" not in plain.stderr


def test_generate_as_json_has_all_of_it(model):
    done = run("generate", "--model", model, "Hi", "-m", 4, "--json")
    facts = json.loads(done.stdout)
    text = run("generate", "--model", model, "Hi", "-m", 4).stdout
    assert facts["text"] == text.removesuffix("\n") and facts["model"] == str(model)
    assert facts["generation_tokens"] == 4 and facts["finish_reason"] == "length"
    assert "tokens/s" not in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_the_answer_so_far(model, as_json, monkeypatch):
    pressed(monkeypatch, 1)
    words = ["generate", "--model", model, "Hi", *(["--json"] if as_json else [])]
    done = run(*words, code=130)
    assert as_json or "tokens/s" in done.stderr
    if as_json:
        assert json.loads(done.stdout)["finish_reason"] == "interrupted"


def test_generate_passes_on_what_it_was_told(model):
    words = ("generate", "--model", model, "Hi", "-m", 4, "-q")
    plain = run(*words).stdout
    # A system message, and a text as it is, are other prompts.
    system = run(*words, "--system-prompt", "Be brief.", "--json").stdout
    bare = run(*words, "--ignore-chat-template", "--json").stdout
    counts = [json.loads(x)["prompt_tokens"] for x in (system, bare)]
    made = Session(*load(model), system="Be brief.")
    assert counts == [len(made._question("Hi")), 2]
    drawn = run(*words, "--temp", 1, "--seed", 3).stdout
    assert drawn == run(*words, "--temp", 1, "--seed", 3).stdout != plain
    assert run(*words, "--stop", plain[0]).stdout == ""


def test_a_template_that_cannot_be_taken_apart_says_what_helps(model, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in model.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (odd / "tokenizer_config.json").write_text(json.dumps(config))
    assert refused("generate", "--model", odd, "Hi").endswith("; use --ignore-chat-template")
    said = refused("digest", "story.txt", "--model", odd, "-o", "a.ahn")
    assert said.endswith("; use --ignore-chat-template")
    assert refused("chat", "--model", odd).endswith(
        "; chat cannot do without, ahn-mlx digest and ask can"
    )
    few = ("-m", 2, "-q", "--ignore-chat-template")
    assert run("generate", "--model", odd, "Hi", *few).stdout
    run("digest", "story.txt", "--model", odd, "-o", "a.ahn", "--ignore-chat-template")
    assert json.loads(run("memory", "info", "a.ahn", "--json").stdout)["tokens"] == 106


def test_what_is_there_is_read_though_it_may_be_the_question(model, place):
    (place / "notes").write_text("A note.")
    (place / "Who").write_text("A note.")
    few = ("generate", "--model", model, "-m", 1)
    note = "note: 'notes' is there and is read; --prompt makes it the question"
    assert note in run(*few, "notes").stderr
    for more in (("notes", "Why?"), ("notes", "-p", "Why?"), ("story.txt",), ("-p", "notes")):
        assert "is there and is read" not in run(*few, *more).stderr
    assert "is there and is read" not in run(*few, "-", said="Hi").stderr
    near = "note: 'stor' is the question; did you mean story.txt?"
    assert near in run(*few, "stor").stderr
    assert "is the question" not in run(*few, "stor of").stderr
    assert "is the question" not in run(*few, "zzz").stderr


@pytest.mark.parametrize(
    ("words", "said", "message"),
    [
        (["Hi", "-p", "Ho"], "", "'Hi' and --prompt: one question at a time"),
        (["-", "-p", "-"], "x", "standard input is the document or the question, not both"),
        (["-f", "-", "-f", "-"], "x", "standard input can be read once; give one -"),
        (["-p", " "], "", "the question is empty; give one, or leave it out"),
        (["-p", "-"], " \n", "the question is empty; give one, or leave it out"),
        ([], "", "the prompt is empty; give a document or a question"),
        ([], " \n", "the prompt is empty; give a document or a question"),
    ],
)
def test_what_generate_refuses(words, said, message):
    assert refused("generate", *words, said=said) == message


def test_a_question_from_a_pipe_has_no_document_in_it(monkeypatch):
    def read(words, said="", **given):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        options = {"prompt": None, "prompt_file": (), **given}
        monkeypatch.setattr(generating, "is_given", lambda name: given.get(name) is not None)
        return generating._read(words, options)

    assert read(("Who?",), "A text.") == ("A text.", "Who?")
    assert read((), "\nWho?\n\n", prompt="-") == ("", "Who?")
    assert read(("story.txt",), "Who?", prompt="-") == (TEXT * 2, "Who?")
    assert read((), "", prompt="Who?", prompt_file=("story.txt",)) == (TEXT * 2, "Who?")
    assert read((), "Text", prompt="Who?") == ("Text", "Who?")
    assert read((), "Text") == ("Text", None)
    assert read(("Who?",), "") == ("", "Who?")
    assert generating._typed(("story.txt", "Who?"), {"prompt": None, "prompt_file": ("b",)}) == (
        ["story.txt", "b"],
        "Who?",
    )


def test_what_waits_in_a_pipe_is_noted_where_nothing_asks(model, monkeypatch):
    said = "note: what is piped in is not read; -p - makes it the question"
    for files, question, noted in (
        (("story.txt",), None, True),
        (("story.txt",), "Who?", False),
        (("story.txt", "-"), None, False),
        ((), None, False),
    ):
        heard = []
        monkeypatch.setattr(generating, "is_piped_in", lambda: True)
        monkeypatch.setattr(generating, "is_given", lambda name: False)
        monkeypatch.setattr(generating, "say", heard.append)
        given = (*files, question) if question else files
        generating._typed(given, {"prompt": None, "prompt_file": ()})
        assert (said in heard) is noted, files


# --- digest ---


def facts_of(file):
    return memoryfile.read_facts(Path(file))


def same_but_for_times(a, b):
    one, two = (mx.load(str(x), format="safetensors", return_metadata=True) for x in (a, b))
    assert one[0].keys() == two[0].keys()
    assert all(mx.array_equal(one[0][k], two[0][k], equal_nan=True) for k in one[0])
    kept = [json.loads(x[1]["ahn"]) for x in (one, two)]
    for facts in kept:
        facts.pop("saved")
        for text in facts["texts"]:
            text.pop("read")
    assert kept[0] == kept[1]


LONG = TEXT * 21  # 1,113 tokens


def test_a_stopped_digest_goes_on_as_if_it_had_not(model, place, monkeypatch):
    (place / "long.txt").write_text(LONG)
    words = ("digest", "long.txt", "--model", model, "--checkpoint-every", 1)
    bars(monkeypatch)
    whole = run(*words, "-o", "whole.ahn")
    tokens = facts_of("whole.ahn")["tokens"]
    size = Path("whole.ahn").stat().st_size
    assert whole.stderr.splitlines()[-1] == f"whole.ahn: {tokens:,} tokens in {size / 1e3:.1f} KB"
    read = re.findall(r"reading: ([\d,]+) of ([\d,]+) tokens", whole.stderr)
    assert [x for x, _ in read] == ["512", "1,024"] and read[0][1] == f"{tokens:,}"
    with monkeypatch.context() as patch:
        pressed(patch, 500)
        done = run(*words, "-o", "a.ahn", code=130)
    said = f"stopped after 512 of {tokens:,} tokens; the same command goes on"
    assert done.stderr.splitlines()[-1] == said
    partial = facts_of("a.ahn.partial")
    assert partial["done"] == 512 and partial["tokens"] == 512 and not Path("a.ahn").exists()
    assert json.loads(run("memory", "info", "a.ahn.partial", "--json").stdout)["unfinished"]
    done = run(*words, "-o", "a.ahn")
    assert done.stderr.splitlines()[0] == "going on after 512 tokens"
    read = re.findall(r"reading: ([\d,]+) of", done.stderr)
    assert read[0] == "1,024" and not Path("a.ahn.partial").exists()
    same_but_for_times("a.ahn", "whole.ahn")


def test_what_is_saved_on_the_way_is_whole_steps(model, place, monkeypatch):
    """The partial file of a run that was killed after it had saved."""
    (place / "long.txt").write_text(LONG)
    saved = []
    save = Session.save

    def noting(session, path, **facts):
        saved.append((Path(path).name, session.tokens, facts.get("done")))
        save(session, path, **facts)

    monkeypatch.setattr(Session, "save", noting)
    words = ("digest", "long.txt", "--model", model, "-o", "a.ahn", "--checkpoint-every")
    tokens = len(LONG.encode()) + len("[user]")
    for every, steps in ((1, [512, 1024]), (513, [1024]), (16384, [])):
        saved.clear()
        run(*words, every, *(["--force"] if Path("a.ahn").exists() else []))
        assert saved[:-1] == [("a.ahn.partial", n, n) for n in steps]
        assert saved[-1] == ("a.ahn", tokens, None)
    saved.clear()
    # What goes on begins with the tail of what was read before.
    run("digest", "long.txt", "-o", "a.ahn", "--append", "--checkpoint-every", 512)
    at = [n for name, n, _ in saved if name == "a.ahn.partial"]
    assert at == [n for n in range(512, 2 * tokens, 512) if n > tokens]
    assert [done for name, _, done in saved if name == "a.ahn.partial"] == [n - tokens for n in at]


@pytest.mark.parametrize("change", ["text", "system", "bits", "done", "damage", "none"])
def test_a_partial_file_of_something_else_is_begun_anew(change, model, place, monkeypatch):
    (place / "long.txt").write_text(LONG)
    words = ["digest", "long.txt", "--model", model, "-o", "a.ahn"]
    with monkeypatch.context() as patch:
        pressed(patch, 500)
        run(*words, code=130)
    more = []
    file = place / "a.ahn.partial"
    said = "note: a.ahn.partial is of another text or setting; starting anew"
    if change == "text":
        (place / "long.txt").write_text(LONG + "!")
    if change == "system":
        more = ["--system-prompt", "Be brief."]
    if change == "bits":
        more = ["--sinks", 2]
        said = "starting anew"
    if change == "done":
        held = Session.load(file, *load(model))
        held.save(file, **{k: facts_of(file)[k] for k in ("job", "opening")}, done=3)
        said = "note: a.ahn.partial: damaged, 3 is not what it has read; starting anew"
    if change == "damage":
        file.write_bytes(file.read_bytes()[:-7])
        said = "; starting anew"
    if change == "none":
        said = "going on after 512 tokens"
    done = run(*words, *more)
    assert said in done.stderr and ("going on" in done.stderr) == (change == "none")
    assert not file.exists() and Path("a.ahn").exists()


def test_a_text_that_was_read_before_is_noted(model, place):
    run("digest", "story.txt", "--model", model)
    first = facts_of("story.ahn")
    done = run("digest", "story.txt", "-o", "story.ahn", "--append")
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("note:")]
    assert re.fullmatch(r"note: story.txt was read before, \d{4}-\d\d-\d\d; it is read again", line)
    facts = facts_of("story.ahn")
    assert [t["name"] for t in facts["texts"]] == ["story.txt"] * 2
    assert facts["texts"][0]["tokens"] == first["tokens"] == 112
    assert facts["texts"][1]["tokens"] == facts["tokens"] - 112
    done = run("digest", "-", "story.txt", "-o", "b.ahn", "--model", model, said="More.")
    assert facts_of("b.ahn")["texts"][0]["name"] == "standard input, story.txt"
    run("digest", "-o", "c.ahn", "--model", model, said="More.")
    assert facts_of("c.ahn")["texts"][0]["name"] == "standard input"
    assert "note:" not in done.stderr


def test_digest_passes_on_what_it_was_told(place):
    base = make_base(place / "base", vocab_size=256)
    memory = memory_of(base, place / "memory")
    words = ["digest", "story.txt", "--model", base, "--ahn", memory]
    run(*words, "-o", "a.ahn", "--kv-bits", 4, "--kv-group-size", 32, "--window", 9, "--sinks", 2)
    facts = facts_of("a.ahn")
    assert (facts["window"], facts["sinks"], facts["system"]) == (9, 2, "")
    assert [layer[3:] for layer in facts["layers"]] == [[4, 32]] * 2
    assert facts["model"]["ahn"] == str(memory) and facts["chat"] is True
    run(*words, "-o", "b.ahn", "--system-prompt", "Be brief.")
    assert facts_of("b.ahn")["system"] == "Be brief."
    run(*words, "-o", "c.ahn", "--ignore-chat-template")
    assert facts_of("c.ahn")["chat"] is False
    info = json.loads(run("memory", "info", "a.ahn", "--json").stdout)
    assert info["window_bits"] == 4 and info["bits"] is None
    assert (
        "memory               gated_deltanet, float32, 4-bit window\n"
        in run("memory", "info", "a.ahn").stdout
    )
    # What goes on takes its memory from where that was, or is now.
    memory.rename(place / "elsewhere")
    assert "memory" in refused("digest", "story.txt", "-o", "a.ahn", "--append")
    run("digest", "story.txt", "-o", "a.ahn", "--append", "--ahn", place / "elsewhere")
    assert facts_of("a.ahn")["model"]["ahn"] == str(place / "elsewhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["story.txt", "Who is it?"],
            "digest takes no question; ahn-mlx ask story.ahn 'Who is it?' does",
        ),
        (
            ["my book.txt", "Who is it?"],
            "digest takes no question; ahn-mlx ask 'my book.ahn' 'Who is it?' does",
        ),
        (["-", "Who is it"], "digest takes no question; ahn-mlx ask book.ahn 'Who is it' does"),
        (["Who?", "-o", "a.ahn"], "digest takes no question; ahn-mlx ask book.ahn 'Who?' does"),
        (["Who", "-o", "a.ahn"], "Who: No such file or directory"),
        (["absent file.txt", "-o", "a.ahn"], "absent file.txt: No such file or directory"),
        (
            ["story.txt", "-o", "book.ahn"],
            "book.ahn: exists; --append reads more into it, --force replaces it, or choose another",
        ),
        (
            ["story.txt", "--append", "-o", "none.ahn"],
            "none.ahn: no such file; ahn-mlx digest writes one",
        ),
        (["story.txt", "-o", "."], ".: is a directory; give the name of a file"),
        (
            ["book.ahn", "-o", "b.ahn"],
            "book.ahn: is a memory, not a document; ahn-mlx ask reads it",
        ),
        (["story.txt", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1, not 0"),
        (
            ["story.txt", "-o", "story.txt", "--force"],
            "story.txt: is there and is not a memory; choose another name",
        ),
    ],
)
def test_what_digest_refuses(words, said, place):
    (place / "my book.txt").write_text(TEXT)
    assert refused("digest", *words, "--model", "no-such-model") == said or said in refused(
        "digest", *words
    )


def test_a_memory_may_be_replaced_or_read_into_where_that_was_asked(model, place):
    run("digest", "story.txt", "--model", model, "-o", "book.ahn", "--force")
    assert facts_of("book.ahn")["tokens"] == 112
    (place / "book.ahn.partial").write_text("mine")
    said = refused("digest", "story.txt", "--model", model, "-o", "book.ahn", "--force")
    assert said.startswith("book.ahn.partial: is there and is not a memory")


def test_what_was_read_is_kept_where_it_cannot_be_written(model, place, monkeypatch):
    """Another has written OUT meanwhile."""
    encode = Session.encode

    def meanwhile(session, *words, **more):
        (place / "a.ahn").write_bytes((place / "book.ahn").read_bytes())
        return encode(session, *words, **more)

    monkeypatch.setattr(Session, "encode", meanwhile)
    said = refused("digest", "story.txt", "--model", model, "-o", "a.ahn")
    assert said.startswith("a.ahn: exists; ") and said.endswith(
        "; what was read is kept in a.ahn.partial"
    )
    partial = facts_of("a.ahn.partial")
    assert partial["done"] == 112 and partial["texts"] == [] and partial["job"]


def test_where_the_model_of_a_memory_is(model, place):
    window = {"window": 12, "sinks": 4}
    facts = {"model": {"name": "", "dtype": "float16"}, **window}
    with pytest.raises(AHNError, match="does not say which model it is of; give --model"):
        digesting.load_as_read(facts, None)
    found, _ = digesting.load_as_read(facts, str(model))
    assert (found.origin.dtype, found.origin.name) == ("float16", str(model))
    assert (found.ahn.window, found.ahn.sinks) == (12, 4)
    facts = {"model": {"name": str(model)}, "window": 20, "sinks": 1}
    found, _ = digesting.load_as_read(facts, None)
    assert (found.ahn.window, found.ahn.sinks) == (20, 1)
    # A published base may be of other bits; of any other there is nothing to choose.
    facts = {"model": {"name": "ahn-gdn-3b", "q_bits": "8"}, **window}
    found, _ = digesting.load_as_read(facts, str(model))
    assert found.origin.q_bits is None
    gone = {"model": {"name": str(place / "gone")}, **window}
    with pytest.raises(AHNError, match=r"gone', is not there; --model says where it is now$"):
        digesting.load_as_read(gone, None)
    (place / "empty").mkdir()
    for name, given in ((str(place / "empty"), None), ("empty", None), ("x", str(place / "empty"))):
        with pytest.raises(AHNError) as error:
            digesting.load_as_read({"model": {"name": name}, **window}, given)
        assert "--model says where" not in str(error.value)
    with pytest.raises(
        AHNError,
        match=r"no-such.*; --model says where the memory's model is now$",
    ):
        digesting.load_as_read({"model": {"name": "no-such"}, **window}, None)
    with pytest.raises(AHNError) as error:
        digesting.load_as_read({"model": {"name": "no-such"}, **window}, "neither")
    assert "--model says where" not in str(error.value)


# --- memory ---


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("tail", "tail"), ("pending", "tail"), ("layers.0.tail.keys", "tail")),
        *(("seen", "tokens seen"), ("layers.0.trace.sums", "trace"), ("layers.1.memory", "state")),
        *(("layers.0.keys", "window, sinks, gates"), ("layers.0.tail.memory", "tail")),
    ],
)
def test_a_tensor_is_of_one_part(name, part):
    assert _part(name) == part


def test_what_a_memory_says_of_itself(loaded, place):
    session = Session(*loaded, system="s" * 300, step=16)
    session.origin = {"name": ""}
    session.note_text("", 1234)
    session.read("a\x1b" * 21, name="b")
    session.save("a.ahn")
    lines = run("memory", "info", "a.ahn").stdout.splitlines()
    rows = [(line[:20].rstrip(), line[21:]) for line in lines]
    found = dict(rows)
    assert found["model"] == "(not said; give --model to ask)"
    assert found["system message"] == "s" * 200
    n = session.tokens
    assert found["tokens"] == f"{n:,}, {n % 16:,} of them since the last step of 16"
    read = [value for label, value in rows if label == "read"]
    assert [x.split("  ", 1)[1] for x in read] == ["1,234 tokens  (no name)", f"{n} tokens  b"]
    assert "\x1b" not in "".join(lines) and found["begins"].startswith("a")
    assert [label for label, _ in rows][-7:] == [
        *("window, sinks, gates", "state", "trace", "tail", "tokens seen", "file", "begins")
    ]
    whole = Session(*loaded, step=1)
    whole.read(TEXT)
    whole.save("b.ahn")
    lines = run("memory", "info", "b.ahn").stdout.splitlines()
    found = {line[:20].rstrip(): line[21:] for line in lines}
    assert found["tokens"] == f"{whole.tokens}" and "tail" not in found


def test_all_files_are_verified_and_the_damaged_named(place):
    data = (place / "book.ahn").read_bytes()
    for name in ("a.ahn", "c.ahn"):
        (place / name).write_bytes(data[:-9])
    done = CliRunner().invoke(cli, ["memory", "verify", "a.ahn", "book.ahn", "c.ahn"])
    assert done.stdout == "book.ahn: sound\n"
    said = str(done.exception).split("; ")
    assert said[0].startswith("a.ahn: damaged") and any(
        x.startswith("c.ahn: damaged") for x in said
    )
    assert run("memory", "verify", "book.ahn").stdout == "book.ahn: sound\n"


# --- inspect ---


def test_a_page_on_a_memory(loaded, place, model):
    session = Session.load(place / "book.ahn", *loaded)
    (place / "book.txt").write_text(TEXT * 4)
    for more, text in (([], None), (["--text", "book.txt"], TEXT * 4)):
        done = run("inspect", "book.ahn", "-o", "a.html", *more)
        assert (place / "a.html").read_text() == report.page(session, "book.ahn", text)
        assert done.stderr.splitlines()[-1] == "wrote a.html"
    (place / "b.HTM").write_text("not ours")
    said = refused("inspect", "book.ahn", "-o", "b.HTM")
    assert said == "b.HTM: is there and is not a page of inspect; choose another name, or --force"
    run("inspect", "book.ahn", "-o", "b.HTM", "--force")
    assert refused("inspect", "book.ahn", "-o", "a.txt").endswith(
        "give a name that ends in .html, .htm"
    )
    (place / "p.html").write_text("a text")
    for reads in (["p.html", "--text", "p.html"], [model / "p.html"]):
        (Path(reads[0])).write_text("x")
        said = refused("inspect", "book.ahn", "--force", "-o", *reads)
        assert "is what this command reads" in said
        Path(reads[0]).unlink()
    elsewhere = place / "elsewhere"
    elsewhere.symlink_to(model)
    (elsewhere / "p.html").write_text("x")
    said = refused(
        "inspect", "book.ahn", "--force", "-o", elsewhere / "p.html", "--model", elsewhere
    )
    assert "is what this command reads" in said
    (elsewhere / "p.html").unlink()


# --- words ---


@pytest.mark.parametrize(
    ("word", "is_file"),
    [
        *(
            (w, True)
            for w in (
                "a.txt",
                "my book.PDF",
                "a.docx",
                "a.doc",
                "b.ahn",
                "~x",
                "a/b",
                "a*",
                "a.abcde",
                "a\\b",
            )
        ),
        *(
            (w, False)
            for w in (
                "a",
                "a.abcdef",
                "what is a.b c",
                "a.txt?",
                "is it a/b",
                "a.txt ? ",
                "3.1 of it",
                "",
            )
        ),
    ],
)
def test_what_looks_like_a_file(word, is_file):
    assert words.looks_like_file(word) is is_file


def test_what_is_there(place):
    for word in ("story.txt", "-", "*.txt", "./story.txt", f"file://{place}/story.txt", "."):
        assert words.is_there(word), word
    for word in ("", "absent", "*.zzz", "story"):
        assert not words.is_there(word), word
    (place / "lost").symlink_to("nowhere")
    (place / "within").mkdir()
    (place / "within/deep.xyz").touch()
    assert words.is_there("lost") and words.is_there("**/*.xyz") and not words.is_there("*.xyz")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["who", "is"], 'a question of several words goes in quotes: "who is"'),
        (["Who is it?", "Why is it?"], "'Who is it?' and 'Why is it?': one question at a time"),
        (
            ["Who is it?", "zzz"],
            "'zzz': no such file; if it is the question, give it with --prompt",
        ),
        (["Who is it?", "stor"], "'stor': no such file; did you mean story.txt?"),
        (["stor", "xyz"], "'stor': no such file; did you mean story.txt?"),
        (["Who is it?", " "], "'Who is it?' and ' ': one question at a time"),
        ([" "], "the question is empty; give one, or leave it out"),
        (
            ["zzz.txt", "Who?"],
            "'zzz.txt': no such file; if it is the question, give it with --prompt",
        ),
        (["stroy.txt", "Who?"], "'stroy.txt': no such file; did you mean story.txt?"),
    ],
)
def test_words_that_are_neither(given, said):
    with pytest.raises(AHNError) as error:
        words.files_and_question(given)
    assert str(error.value) == said


def test_files_and_their_names(place):
    assert words.files_and_question([]) == ([], None)
    assert words.memory_and_question([f"file://{place}/book.ahn"]) == (place / "book.ahn", None)
    assert words.memory_and_question([]) == (None, None)
    with pytest.raises(AHNError, match=r"'boo': no such file; did you mean book\.ahn"):
        words.memory_and_question(["boo"])
    assert words.memory_and_question(["boo", "book.ahn"]) == (Path("book.ahn"), "boo")
    assert words.memory_and_question(["stor"]) == (None, "stor")  # which is no memory
    for names in (["story.txt"], ["./x/../story.txt"], [f"{place}/story.pdf"]):
        assert words.memory_name(names) == Path("story.ahn")
    assert words.memory_name(["."]) == Path(f"{place.name}.ahn")
    for names in ([], ["-"], ["a.txt", "b.txt"], ["*.txt"], ["/"], ["a.txt", "-"]):
        with pytest.raises(
            AHNError, match=r"no name for the memory; give one with -o, as in -o book.ahn"
        ):
            words.memory_name(names)


def test_what_is_read_where_it_is_typed(place, monkeypatch, capsys):
    assert words.read_typed(["story.txt"], False) == TEXT * 2
    for name in ("book.ahn", "BOOK.AHN"):
        (place / name).write_bytes((place / "book.ahn").read_bytes())
        with pytest.raises(
            AHNError, match=f"{name}: is a memory, not a document; /load {name} does"
        ):
            words.read_typed([name], False, "/load {file} does")
    (place / "dir.ahn").mkdir()
    (place / "dir.ahn/a.txt").write_text("A text.")
    assert words.read_typed(["dir.ahn"], False) == "A text."
    monkeypatch.setenv("HOME", str(place))
    for name in (".", "/", "~", str(place.parent)):
        with pytest.raises(AHNError, match=": is too much to read; give a folder in it, or files"):
            words.read_typed([name], False)
    monkeypatch.setenv("HOME", str(place / "dir.ahn/within"))
    (place / "dir.ahn/within").mkdir()
    (place / "other").mkdir()
    (place / "other/a.txt").write_text("B")
    assert words.read_typed(["other"], False) == "B"
    monkeypatch.setattr(sys, "stdin", Typing())
    assert words.read_typed([], True) == ""
    with pytest.raises(AHNError, match="nothing to read"):
        words.read_typed([], False)


def test_pages_are_counted_while_they_are_read(place, monkeypatch, capsys):
    def reading(files, has_prompt, progress):
        for read in (1, 2, 4):
            progress(read, 8)
        return f"{files} {has_prompt}"

    monkeypatch.setattr(words, "read_documents", reading)
    bars(monkeypatch)
    assert words.read_typed(["a"], True) == "['a'] True"
    found = re.findall(r"opening: (\d) of (\d) pages", capsys.readouterr().err)
    assert found == [("1", "8"), ("2", "8"), ("4", "8")]
