"""Commands that train and serve, in this process: what they begin with, write and say."""

import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import click
import mlx.core as mx
import pytest
from checkpoints import make_base, memory_of, read_json, talking_model
from click.testing import CliRunner
from matplotlib.figure import Figure
from terminals import FAST, pressed

from ahn_mlx import AHNError, load
from ahn_mlx.cli import cli, ranks, terminal
from ahn_mlx.cli import serve as serving
from ahn_mlx.cli import train as training
from ahn_mlx.model.ranks import LOST
from ahn_mlx.serve import acts, app
from ahn_mlx.train import loop, metrics, output, validation

TEXT = "".join(f"The {n}th of so many sentences is about {n * n} things. " for n in range(60))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("trained") / "base")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "BLAS", FAST)  # nothing is said of it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


def run(*words, code=0):
    done = invoke(*words)
    assert done.exit_code == code, done.exception or done.output
    return done


def refused(*words):
    done = invoke(*words)
    assert isinstance(done.exception, AHNError), done.exception or done.output
    return str(done.exception)


# --- train ---


def words_of(base, out, *more):
    words = ("train", "book.txt", "--model", base, "-o", out, "--window", "8+2@32")
    return (*words, "--layerwise", 0, *more)


def steps_of(out):
    return [line["step"] for line in metrics.read_metrics(Path(out) / metrics.METRICS)]


def measured(out):
    return [line["step"] for line in validation.read_validation(Path(out) / validation.VALIDATION)]


def test_a_training_says_and_writes_what_it_does(base, monkeypatch, place):
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = run(*words_of(base, "my out", "--steps", 5, "--save-every", 2))
    lines = done.stderr.splitlines()
    bars = [x for x in lines if x.startswith("training: ")]
    found = [
        re.match(r"training: (\d) of 5 steps, .*, loss=([\d.]+), tokens_per_s=(\d+)$", x)
        for x in bars
    ]
    assert [x[1] for x in found if x] == ["1", "2", "3", "4", "5"]
    losses = [line["loss"] for line in metrics.read_metrics(place / "my out" / metrics.METRICS)]
    assert [x[2] for x in found if x] == [f"{loss:.4f}" for loss in losses]
    assert all(int(x[3]) > 0 for x in found if x)
    assert steps_of("my out") == [0, 1, 2, 3, 4]
    assert measured("my out") == [0, 2, 4, 5]  # at each save, and at the end
    name = shlex.quote("my out")
    last = [x for x in lines if not x.startswith("training: ")][-5:]
    assert last[0] == "wrote my out" and last[1].startswith("held out: KL ")
    assert last[2:] == [
        "use it, and measure it on a text that it has not seen:",
        f"  ahn-mlx generate FILE QUESTION --ahn {name}",
        f"  ahn-mlx compare FILE --ahn {name} -o compare.png",
    ]
    assert sorted(p.name for p in (place / "my out").iterdir()) == sorted(output.FILES)
    config = read_json(place / "my out")
    assert "layer-wise" not in done.stderr and config["ahn_base"] == str(base)
    speeds = [
        json.loads(x)["tokens_per_second"]
        for x in (place / "my out" / metrics.METRICS).read_text().splitlines()
    ]
    assert speeds == pytest.approx([int(x[3]) for x in found if x], abs=0.6)


def test_a_log_has_few_lines(base):
    done = run(*words_of(base, "out", "--steps", 3))
    assert not re.search(r"^training: ", done.stderr, re.MULTILINE)


def test_a_fit_says_what_it_explains(base):
    done = run(*words_of(base, "out")[:-2], "--layerwise", 2, "--steps", 0)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("layer-wise")]
    assert re.fullmatch(
        r"layer-wise: the memory explains -?[\d.]+% of what the window misses", line
    )
    assert measured("out") == [0] and not (Path("out") / metrics.METRICS).exists()


def test_tokens_of_a_step_are_all_of_them(base, monkeypatch):
    wrote = []

    def noting(self, step, loss, tokens, drawn):
        wrote.append((step, tokens, drawn))
        return 1.0

    monkeypatch.setattr(metrics.Metrics, "write", noting)
    run(*words_of(base, "out", "--steps", 2, "--batch-size", 2, "--accumulate", 3))
    assert [(step, tokens) for step, tokens, _ in wrote] == [(0, 192), (1, 192)]
    assert str(wrote[0][2]) == "8+2@32"
    wrote.clear()
    run(*words_of(base, "other", "--window", "4+1@16", "--steps", 6, "--batch-size", 2))
    # As many tokens of whichever is drawn.
    assert {str(drawn) for _, _, drawn in wrote} == {"8+2@32", "4+1@16"}
    assert {tokens for _, tokens, _ in wrote} == {64}


def test_ctrl_c_saves_and_the_run_goes_on(base, monkeypatch, place):
    words = words_of(base, "out", "--save-every", 20)
    with monkeypatch.context() as patch:
        pressed(patch, 3)
        done = run(*words, "--steps", 6, code=130)
    assert done.stderr.splitlines()[-1] == "stopped after 3 of 6 steps; --resume goes on"
    assert loop.read_settings(place / "out")[1] == 3 and measured("out") == [0]
    assert "curves.png" in os.listdir("out")
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = run("train", "book.txt", "-o", "out", "--resume")
    assert re.findall(r"training: (\d) of (\d) steps", done.stderr) == [
        ("4", "6"),
        ("5", "6"),
        ("6", "6"),
    ]
    assert steps_of("out") == [0, 1, 2, 3, 4, 5] and measured("out") == [0, 6]
    # More steps, and the same settings; what was typed is typed anew.
    settings, step = loop.read_settings(place / "out")
    assert (settings["window"], settings["sinks"], settings["seq_len"], step) == (8, 2, 32, 6)
    run("train", "book.txt", "-o", "out", "--resume", "--steps", 7)
    assert steps_of("out")[-1] == 6 and loop.read_settings(place / "out")[0]["steps"] == 7
    said = refused("train", "book.txt", "-o", "out", "--resume", "--seq-len", 64, "--steps", 8)
    assert "trained with --seq-len 32, not 64" in said
    run("train", "book.txt", "-o", "out", "--resume", "--steps", 8, "--window", "8+2@32")
    assert refused("train", "book.txt", "-o", "none", "--resume").endswith("train without --resume")


def test_a_step_of_a_run_that_goes_on_is_measured_if_it_was_not(base, place):
    run(*words_of(base, "out", "--steps", 2, "--save-every", 2))
    (place / "out" / validation.VALIDATION).write_text("")
    run("train", "book.txt", "-o", "out", "--resume", "--steps", 3, "--save-every", 2)
    assert measured("out") == [2, 3]
    (place / "out" / validation.VALIDATION).write_text("")
    run("train", "book.txt", "-o", "out", "--resume", "--steps", 4, "--save-every", 5)
    assert measured("out") == [4]  # 3 is no step that is saved


def test_a_run_by_the_clock(base, monkeypatch):
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = run(*words_of(base, "out", "--minutes", 0.02))
    found = re.findall(r"training: (\d+) of (\d+) seconds, ", done.stderr)
    assert found and {total for _, total in found} == {"1"} and found[-1][0] == "1"
    assert len(steps_of("out")) >= 1
    settings, step = loop.read_settings(Path("out"))
    assert settings["minutes"] == 0.02 and step == len(steps_of("out"))
    # Steps that are typed take the place of minutes.
    run("train", "book.txt", "-o", "out", "--resume", "--steps", step + 1)
    settings, more = loop.read_settings(Path("out"))
    assert settings["minutes"] == 0.0 and more == step + 1


def test_a_run_that_was_stopped_by_the_clock_says_so(base, monkeypatch):
    with monkeypatch.context() as patch:
        pressed(patch, 0)
        done = run(*words_of(base, "out", "--minutes", 5), code=130)
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"stopped after \d+ steps, 0.0 of 5 minutes; --resume goes on", said)


def test_what_cannot_be_drawn_is_said_and_the_training_goes_on(base, monkeypatch, place):
    def savefig(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", savefig)
    done = run(*words_of(base, "out", "--steps", 1))
    (note,) = [x for x in done.stderr.splitlines() if x.startswith("note: ")]
    assert note.startswith(
        "note: out/curves.png: matplotlib cannot draw it (RuntimeError: no font)"
    )
    assert note.endswith("; training goes on without")
    assert not (place / "out/curves.png").exists() and steps_of("out") == [0]


def test_another_training_of_the_same_place_is_refused(base, place):
    options = {"out": place / "out", "base": str(base), "ahn": None, "data": (), "resume": False}
    with ExitStack() as held, ExitStack() as other:
        training._take_place(held, options)
        assert (place / "out").is_dir()
        with pytest.raises(AHNError):
            training._take_place(other, options)
    (place / "out/notes.txt").write_text("mine")
    with pytest.raises(AHNError), ExitStack() as held:
        training._take_place(held, options)


def test_a_trained_memory_is_trained_further(base, place):
    memory = memory_of(base, place / "memory")
    words = ("train", "book.txt", "--ahn", memory, "-o", "out", "--window", "8+2@32", "--steps", 1)
    done = run(*words)
    config = read_json(place / "out")
    assert config["ahn_base"] == str(base) and "layer-wise" not in done.stderr
    said = f"{memory}: is what the training begins from; choose another --out"
    assert refused(*words[:4], "-o", memory) == said
    assert "no-such" in refused(*words, "--model", "no-such", "-o", "b")


def given(**more):
    """Options as a command gets them, where nothing was typed."""
    plain = {"ahn": None, "memory": "gated_deltanet", "sink_positions": "clamped"}
    return {**plain, "router": False, "window_gain": False, **more}


@pytest.fixture
def typed(monkeypatch):
    names = set()
    monkeypatch.setattr(training, "is_given", names.__contains__)
    return names


def test_a_memory_brings_what_is_not_chosen_again(base, place, typed):
    memory = memory_of(base, place / "memory")
    options = given(memory="deltanet", sink_positions="absolute")
    training._take_memory(options, memory)
    assert options == {
        **given(memory="gated_deltanet", sink_positions="clamped"),
        "query_projection": output._queries_fit(load(base, ahn=memory)[0]),
    }
    typed |= {"memory", "sink_positions"}
    options = given(memory="deltanet", sink_positions="absolute", router=True, window_gain=True)
    training._take_memory(options, memory)
    assert (options["memory"], options["sink_positions"]) == ("deltanet", "absolute")
    assert options["router"] is True and options["window_gain"] is True


def test_a_router_and_its_gain_stay(base, place):
    for option in ("--router", "--window-gain"):
        out = place / f"out{option}"
        run(*words_of(base, out, "--steps", 0, option))
        options = given(base=str(base), out=out)
        with click.Context(training.train):
            training._take_memory(options, out)
        assert options["router"] is True
        assert options["window_gain"] is (option == "--window-gain")


def test_windows_that_a_step_draws_from(typed):
    def taken(*texts, sinks=64, seq_len=4096):
        options = {"sinks": sinks, "seq_len": seq_len}
        training._take_windows(options, texts)
        return options

    assert taken("1024") == {"window": 1024, "sinks": 64, "seq_len": 4096, "windows": ""}
    assert taken("8+2@64", "9") == {
        **{"window": 8, "sinks": 2, "seq_len": 64},
        "windows": "8+2@64 9+64@4096",
    }
    typed.add("sinks")
    assert taken("8@64", "9", sinks=3)["windows"] == "8+3@64 9+3@4096"
    for texts in (("8+2",), ("8+0", "9+1")):
        with pytest.raises(
            AHNError, match=r"^--sinks has no effect where each --window says its own; leave it out"
        ):
            taken(*texts)
    typed.add("seq_len")
    with pytest.raises(AHNError, match=r"^--seq-len has no effect"):
        taken("8@64")


def checked(**more):
    options = {"window": 8, "sinks": 2, "seq_len": 11, "layerwise": 0, "steps": 0, "warmup": 0}
    options |= {"accumulate": 1, "batch_size": 1, "save_every": 1, "seed": 0, "lr": 1e-30}
    options |= {"weight_decay": 0.0, "minutes": 0.0, "windows": "", "random_window": False}
    options |= {"loss": "kl", "grad_checkpoint": False}
    training._check({**options, **more})


MOST = 2**31
LONGER = "take longer sequences or a smaller --window"


@pytest.mark.parametrize(
    "good",
    [
        {"seq_len": 12},
        *(
            {"seq_len": 12, name: MOST}
            for name in (
                "steps",
                "layerwise",
                "warmup",
                "seed",
                "batch_size",
                "accumulate",
                "save_every",
            )
        ),
        {"seq_len": MOST, "window": MOST - 4},
        {"seq_len": 64, "random_window": True, "window": 999},
        {"seq_len": 12, "weight_decay": 1e300, "lr": 1e300},
        {"windows": "8+2@12 1+0@3", "steps": 1},
        {"windows": "8+2@12 1+0@3", "minutes": 1.0},
        {"seq_len": 12, "minutes": 1e-9, "typed": "minutes"},
    ],
)
def test_settings_at_their_edges_are_taken(good, typed):
    typed |= {good.get("typed")}
    checked(**{k: v for k, v in good.items() if k != "typed"})


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            {},
            f"--seq-len 11: nothing leaves a window of 10 tokens; {LONGER}",
        ),
        *(
            (
                {"seq_len": 12, name: low - 1},
                f"--{name.replace('_', '-')} must be at least {low}, not {low - 1}",
            )
            for name, low in {
                **{"window": 1, "sinks": 0, "seq_len": 2, "layerwise": 0, "steps": 0, "warmup": 0},
                **{"accumulate": 1, "batch_size": 1, "save_every": 1, "seed": 0},
            }.items()
        ),
        *(
            (
                {"seq_len": 12, name: MOST + 1},
                f"--{name.replace('_', '-')} must be at most 2,147,483,648",
            )
            for name in ("window", "sinks", "seq_len", "steps", "seed", "save_every")
        ),
        *(
            ({"seq_len": 12, "lr": x}, f"--lr must be above 0 and finite, not {x}")
            for x in (0.0, -1.0, float("inf"), float("nan"))
        ),
        *(
            (
                {"seq_len": 12, "weight_decay": x},
                f"--weight-decay must be at least 0 and finite, not {x}",
            )
            for x in (-0.1, float("inf"), float("nan"))
        ),
        *(
            (
                {"seq_len": 12, "minutes": x, "typed": "minutes"},
                f"--minutes must be above 0, not {x:g}",
            )
            for x in (0.0, -1.0, float("inf"))
        ),
        (
            {"seq_len": 64, "windows": "8+2@12 9+0@99", "random_window": True, "steps": 1},
            "--random-window draws windows of its own; give one --window",
        ),
        (
            {"seq_len": 64, "windows": "8+2@12 9+0@99"},
            "with --steps 0, which trains no step, one --window has an effect; give one",
        ),
        (
            {"windows": "8+2@12 9+0@10", "steps": 1},
            f"--seq-len 10: nothing leaves a window of 9 tokens; {LONGER}",
        ),
        ({"windows": "8+2@12 0+4@99", "steps": 1}, "--window must be at least 1, not 0"),
        (
            {"seq_len": 63, "random_window": True},
            "--random-window needs --seq-len of at least 64, not 63",
        ),
    ],
)
def test_settings_that_no_run_can_have(bad, said, typed):
    typed |= {bad.get("typed")}
    with pytest.raises(AHNError) as error:
        checked(**{k: v for k, v in bad.items() if k != "typed"})
    assert str(error.value) == said


def test_what_was_not_typed_is_as_it_was(base, place, typed):
    run(*words_of(base, "out", "--steps", 2, "--lr", 0.5, "--loss", "ce"))
    options = given(out=place / "out", base="default", steps=500, lr=1e-4, loss="kl", minutes=None)
    training._as_before(options)
    assert (options["base"], options["steps"], options["lr"], options["loss"]) == (
        str(base),
        2,
        0.5,
        "ce",
    )
    typed |= {"steps", "lr", "base"}
    options = given(out=place / "out", base="mine", steps=9, lr=0.1, loss="kl", minutes=None)
    training._as_before(options)
    assert (options["base"], options["steps"], options["lr"], options["loss"]) == (
        "mine",
        9,
        0.1,
        "ce",
    )
    assert options["minutes"] == 0.0 and options["query_projection"] is not None
    other = given(out=place / "out", base="mine", steps=9, lr=0.1, loss="kl", ahn=Path("another"))
    training._as_before(other)
    assert "query_projection" not in other


def test_settings_of_the_command_reach_the_run(base, monkeypatch, place):
    seen = {}

    class Noted(Exception):
        pass

    def noting(model, data, settings, resumed):
        seen.update(settings=settings, data=data, resumed=resumed, ahn=model.ahn)
        raise Noted

    monkeypatch.setattr(loop, "Trainer", noting)
    words = words_of(base, "out", "--steps", 7, "--seed", 3, "--sink-positions", "absolute")
    words = (
        *words,
        "--kind",
        "deltanet",
        "--window-gain",
        "--loss",
        "distill",
        "--grad-checkpoint",
    )
    run(*words, "--warmup", 2, "--weight-decay", 0.5, "--accumulate", 2, "--batch-size", 3, code=1)
    settings, ahn = seen["settings"], seen["ahn"]
    assert (settings.window, settings.sinks, settings.seq_len, settings.windows) == (8, 2, 32, "")
    assert (settings.steps, settings.seed, settings.loss, settings.lr) == (7, 3, "distill", 1e-4)
    assert (settings.warmup, settings.weight_decay, settings.minutes) == (2, 0.5, 0.0)
    assert (settings.accumulate, settings.batch_size, settings.grad_checkpoint) == (2, 3, True)
    assert settings.layerwise == 0 and seen["resumed"] is None and not settings.random_window
    assert (ahn.memory, ahn.sink_positions) == ("deltanet", "absolute")
    assert ahn.router and ahn.window_gain and (ahn.window, ahn.sinks) == (8, 2)
    assert seen["data"].of(32) is seen["data"]


# --- serve ---


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        *((b"0123456789abcdef", True), (b" 0123456789abcdef\n\n", True), (b"x" * 4095, True)),
        *((b"0123456789abcde", False), (b"x" * 4096, False), (b"0123456789 abcdef", False)),
        *(("0123456789abcde\u00e9".encode(), False), (b"", False), (b"0123456\n789abcdef0", False)),
    ],
)
def test_a_key_is_one_line(key, is_one, place):
    (place / "key").write_bytes(key)
    if is_one:
        assert serving._key(place / "key") == key.decode().strip()
        return
    with pytest.raises(
        AHNError, match="key: a key is one line of 16 ASCII characters or more without"
    ):
        serving._key(place / "key")


def test_a_key_that_cannot_be_read(place):
    assert serving._key(None) is None
    (place / "key").write_bytes(b"\xff" * 20)
    for name, said in (
        ("key", "key: is not text"),
        ("none", "none: No such file"),
        (".", ".: Is a"),
    ):
        with pytest.raises(AHNError) as error:
            serving._key(Path(name))
        assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *((h, True) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((h, False) for h in ("0.0.0.0", "::", "10.0.0.1", "example.org", "LOCALHOST.", "")),
    ],
)
def test_who_can_be_reached_from_here_alone(host, own):
    assert serving._is_loopback(host) is own


def test_where_memories_are_kept(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    for data, kept in (("", ".local/share"), (str(place / "data"), "data")):
        monkeypatch.setenv("XDG_DATA_HOME", data)
        for _ in range(2):
            assert serving._own_memories() == place / kept / "ahn-mlx/memories"
        assert (place / kept / "ahn-mlx/memories").is_dir()
    monkeypatch.setenv("XDG_DATA_HOME", str(place / "book.txt"))
    with pytest.raises(AHNError) as error:
        serving._own_memories()
    said = f"{place}/book.txt/ahn-mlx/memories: Not a directory; give a directory as --memories"
    assert str(error.value) == said


def test_an_address_is_listened_at_or_named(place):
    with serving._listen("127.0.0.1", 0) as listening:
        assert listening.family == socket.AF_INET
        port = listening.getsockname()[1]
        with pytest.raises(AHNError) as error:
            serving._listen("127.0.0.1", port)
        said = f"cannot listen at 127.0.0.1 port {port} (Address already in use"
        assert str(error.value).startswith(said) and str(error.value).endswith("); give another")
    if socket.has_ipv6:
        try:
            with serving._listen("::1", 0) as listening:
                assert listening.family == socket.AF_INET6
        except AHNError as e:
            assert "cannot listen at ::1" in str(e)
    with pytest.raises(AHNError, match=r"cannot listen at a\.b"):
        serving._listen("a.b" * 90, 1)


def test_what_must_be_there_before_a_model_is_loaded(place, monkeypatch):
    options = {"memories": place, "host": "127.0.0.1", "port": 0}
    with serving._open(options) as listening:
        assert listening.getsockname()[0] == "127.0.0.1" and options["memories"] == place
    monkeypatch.setenv("XDG_DATA_HOME", str(place / "data"))
    options["memories"] = None
    serving._open(options).close()
    assert options["memories"] == place / "data/ahn-mlx/memories"
    with pytest.raises(AHNError, match="none: no such directory"):
        serving._open({**options, "memories": place / "none"})
    for missing in ("starlette", "uvicorn"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(AHNError) as error:
                serving._open(options)
            assert str(error.value) == f"{missing} is missing: pip install 'ahn-mlx[serve]'"


@pytest.fixture
def served(monkeypatch):
    """Servers that end at once, and what they were made of."""
    made = []

    def begin(server, sockets):
        made.append((server, sockets))
        if begin.error:
            raise begin.error

    begin.error = None
    made.append(begin)
    monkeypatch.setattr(app.Server, "run", begin)
    make = app.make_app

    def noting(*words):
        made.append(words)
        return make(*words)

    monkeypatch.setattr(app, "make_app", noting)
    return made


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_what_is_served_and_where(error, served, directory, place):
    (place / "memories").mkdir()
    served[0].error = error
    origins = ["--allow-origin", "https://a.b", "--allow-origin", "http://localhost:3000"]
    done = run(
        "serve", "--model", directory, "--rows", 2, "--port", 0, "--memories", "memories", *origins
    )
    _, (service, digests, key, hosts, allowed), (server, (listening,)) = served
    port = server.config.port
    assert server.config.host == "127.0.0.1" and port > 0 and listening.fileno() == -1  # closed
    row = service.row_bytes / 1e6
    lines = done.stdout.splitlines()
    assert lines[0] == f"http://127.0.0.1:{port}/v1 serves model"
    assert re.fullmatch(
        rf"2 rows of {row:.1f} MB, as much again for what waits; \d+ rows fit in this machine",
        lines[1],
    )
    assert lines[2:] == [
        f"documents and conversations, in a browser: http://127.0.0.1:{port}/",
        "memories: memories",
    ]
    assert re.fullmatch(r"stopped in \d+\.\d s\n", done.stderr)
    assert key is None and hosts == ("localhost", "127.0.0.1", "::1", "127.0.0.1")
    assert allowed == {"https://a.b", "http://localhost:3000"} and digests is not None
    assert digests.stopping and not service.engine.thread.is_alive()


def test_a_server_that_others_can_reach_has_a_key(served, directory, place):
    (place / "key").write_text("0123456789abcdef\n")
    words = ("serve", "--model", directory, "--rows", 1, "--port", 0, "--memories", ".")
    done = run(*words, "--host", "0.0.0.0", "--api-key-file", "key")
    _, (service, _, key, hosts, allowed), (server, _) = served
    assert key == "0123456789abcdef" and hosts is None and allowed == frozenset()
    assert server.config.host == "0.0.0.0"
    assert done.stdout.splitlines()[-1] == (
        "other machines can reach this server; every request must bring the key"
    )
    served[1:] = []
    run(*words, "--host", "LOCALHOST", "--api-key-file", "key")
    hosts = served[1][3]
    assert hosts is None  # by another spelling it is another's
    served[1:] = []
    run(*words, "--host", "localhost", "--api-key-file", "key")
    assert "localhost" in served[1][3]


def test_a_window_of_few_bits_is_served_so(served, place):
    base = make_base(place / "base", vocab_size=256)
    memory = memory_of(base, place / "memory")
    words = ("serve", "--model", base, "--ahn", memory, "--rows", 1, "--port", 0, "--memories", ".")
    run(*words, "--kv-bits", 4, "--kv-group-size", 32, "--window", 9)
    service = served[1][0]
    cache = service.fresh.caches[0]
    assert (cache.bits, cache.group_size) == (4, 32) and service.engine.acts.model.ahn.window == 9
    assert service.name == "base"


def test_what_has_parted_the_ranks_is_raised_in_the_end(served, directory, place, monkeypatch):
    noted = []
    build = serving.threading.Timer

    def timer(seconds, what):
        made = build(seconds, what)
        noted.append((seconds, what, made))
        return made

    monkeypatch.setattr(serving, "threading", SimpleNamespace(Timer=timer))
    words = ("serve", "--model", directory, "--rows", 1, "--port", 0, "--memories", ".")
    run(*words)
    seconds, what, made = noted.pop()
    assert (seconds, what) == (30.0, serving._leave) and made.daemon
    assert not made.is_alive() and made.finished.is_set() and made.ident is None
    stop = app.end

    def broken(service, digests):
        stop(service, digests)
        service.engine.acts.broken = AHNError(LOST)

    monkeypatch.setattr(app, "end", broken)
    assert refused(*words) == " ".join(LOST.split())
    here = SimpleNamespace(rank=0, share=lambda make: make(), any=bool, settle=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(app, "end", stop)
        patch.setattr(serving, "here", lambda: here)
        run(*words)
    assert noted[-1][2].ident is not None and noted[-1][2].finished.is_set()  # it was started


def test_a_rank_that_is_gone_is_not_waited_for_for_ever(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    serving._leave()
    assert left == [2] and capsys.readouterr().err == f"error: {LOST}\n"


def test_other_ranks_follow(directory, monkeypatch):
    model, tokenizer = load(directory)
    followed = []
    before = signal.getsignal(signal.SIGINT)

    def follow(self):
        followed.append((self, signal.getsignal(signal.SIGINT)))

    monkeypatch.setattr(acts.Acts, "follow", follow)
    try:
        serving._follow({"rows": 3}, model, tokenizer)
    finally:
        signal.signal(signal.SIGINT, before)
    ((made, handler),) = followed
    assert handler == made.press and made.model is model and made._width == 3
    assert threading.current_thread() is threading.main_thread()


def test_who_is_first_serves_and_the_others_follow(directory, monkeypatch, place):
    called = []
    for name in ("_run", "_follow"):
        monkeypatch.setattr(serving, name, lambda *words, name=name: called.append((name, words)))
    words = ("serve", "--model", directory, "--port", 0, "--memories", ".", "--rows", 3)
    run(*words)
    name, (options, key, listening, model, tokenizer) = called.pop()
    assert name == "_run" and key is None and options["rows"] == 3 and listening.fileno() == -1
    assert model.ahn.window == 12 and tokenizer is not None
    monkeypatch.setattr(serving, "is_first", lambda: False)
    run(*words)
    name, (options, model, tokenizer) = called.pop()
    assert name == "_follow" and options["rows"] == 3 and model.ahn.window == 12
    assert refused(*words, "--window", 0) == "--window must be at least 1, not 0"
    assert refused(*words[:-1], 0) == "--rows must be at least 1, not 0" and ranks.is_first()
    assert mx.default_device() is not None
