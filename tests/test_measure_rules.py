"""Commands that measure, score, convert and list, in this process: what they say and pass on."""

import io
import json
import math
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import mlx.core as mx
import numpy as np
import pytest
import suites as invented
from checkpoints import GDN, edit_config, make_base, memory_of, talking_model
from click.testing import CliRunner
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from terminals import FAST, Clock, Typing

from ahn_mlx import AHNConfig, AHNError, load
from ahn_mlx.checkpoints.load import load_model
from ahn_mlx.cli import bench as benching
from ahn_mlx.cli import cli, suites, synthetic, terminal
from ahn_mlx.cli import compare as comparing
from ahn_mlx.evaluate import synthetic as tasks
from ahn_mlx.evaluate.generators import sentences_of
from ahn_mlx.evaluate.mixers import MIXERS
from ahn_mlx.evaluate.recall import MEASURES, Recall, make_documents
from ahn_mlx.evaluate.run import Cost
from ahn_mlx.measure import compare as measure
from ahn_mlx.measure import cost, speed
from ahn_mlx.measure.compare import Bucket, Comparison, Stretch
from ahn_mlx.measure.doctor import Finding
from ahn_mlx.outputs.pictures import picture
from ahn_mlx.reading.text import read_documents
from ahn_mlx.reading.tokens import Encoder

NIAH = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")
TEXT = "".join(f"The {n}th of so many sentences is about {n * n} things. " for n in range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("measured"))
    edit_config(path, eos_token_id=list(range(1, 256, 6)))
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "BLAS", FAST)  # nothing is said of it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path


def run(*words, code=0, **more):
    done = CliRunner().invoke(cli, list(map(str, words)), **more)
    assert done.exit_code == code, done.exception or done.output
    return done


def refused(*words):
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert isinstance(done.exception, AHNError), done.exception or done.output
    return str(done.exception)


def window_asked(monkeypatch, commands):
    """What a command asks of its model, which is as far as it comes."""
    asked = {}

    def load_model(options):
        asked.update(options)
        raise AHNError("as far as that")

    monkeypatch.setattr(commands, "load_model", load_model)
    return asked


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_of(text):
    """Rows of the table in it."""
    rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if set("".join(row)) != {"-"}]


# --- bench ---


def benched(model, monkeypatch, *more):
    # Two seconds to read, six to decode.
    monkeypatch.setattr(benching, "time", Clock(10, 12, 20, 26))
    words = ("bench", model, "--window", 20, "--sinks", 4, "--context", 1100, "--tokens", 3)
    return run(*words, *more)


def counts_of(model):
    """FLOPs of reading and of a token; bytes of the cache, and that a token moves."""
    made, _ = load_model(model, window=20, sinks=4, dtype="float32")
    shape = cost.shape_of({**vars(made.args), "ahn": made.ahn.to_dict()})
    weights = sum(x.nbytes for _, x in tree_flatten(made.parameters()))
    cache = sum(cost.cache_bytes(shape, "ahn", 1104, 4).values())
    prefill = sum(cost.flops(shape, "ahn", 1100).values())
    step = sum(cost.flops(shape, "ahn", 1, before=1100).values())
    return prefill, step, cache, weights + cache


def test_bench_says_what_was_measured_beside_what_was_counted(model, monkeypatch):
    prefill, step, cache, moved = counts_of(model)
    done = benched(model, monkeypatch, "--chip", "m1")
    assert table_of(done.stdout) == [
        [f"{model}, 1,100 tokens read", "measured", "counted"],
        ["prefill, tokens/s", "550.0", ""],
        ["prefill, GFLOP/s", f"{prefill / 2e9:,.1f}", "2,600.0 at most"],
        ["decode, tokens/s", "0.5", f"{68.25e9 / moved:,.1f} at most"],
        ["decode, GFLOP/s", f"{step / 2e9:,.1f}", ""],
        ["decode, GB/s", f"{moved / 2e9:,.1f}", "68.2 at most"],
        ["cache, MB", f"{cache / 1e6:,.2f}", f"{cache / 1e6:,.2f}"],
        ["peak memory, MB", cells(done.stdout.splitlines()[-1])[1], f"{moved / 1e6:,.1f} at least"],
    ]
    assert speed.recall(str(model)) == prefill / 2
    plain = table_of(benched(model, monkeypatch).stdout)
    assert [row[2] for row in plain] == ["counted", "", "", "", "", "", *(r[2] for r in plain[6:])]
    no_peak = table_of(benched(model, monkeypatch, "--chip", "m4").stdout)
    assert (no_peak[2][2], no_peak[3][2][-7:], no_peak[5][2]) == ("", "at most", "120.0 at most")


def test_bench_as_json(model, monkeypatch):
    prefill, step, cache, moved = counts_of(model)
    facts = json.loads(benched(model, monkeypatch, "--json").stdout)
    peak = facts.pop("peak_memory_bytes")
    assert facts == {
        **{"model": str(model), "context": 1100, "tokens": 3, "prefill_seconds": 2},
        **{"prefill_flops": prefill, "decode_seconds_per_token": 2, "decode_flops_per_token": step},
        **{"decode_bytes_per_token": moved, "cache_bytes": cache, "counted_cache_bytes": cache},
    }
    assert moved < peak == mx.get_peak_memory()


def test_bench_reads_so_many_tokens_in_steps(model, monkeypatch):
    read = []

    def noting(low, high, shape):
        read.append((low, high, shape))
        return mx.zeros(shape, mx.int32)

    monkeypatch.setattr(mx.random, "randint", noting)
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    err = benched(model, monkeypatch).stderr
    assert read == [(0, 256, (1, n)) for n in (512, 512, 76)]
    found = re.findall(r"reading: ([\d,]+) of ([\d,]+) tokens", err)
    assert found == [("512", "1,100"), ("1,024", "1,100")]


def test_bench_decodes_one_token_after_the_other(model, monkeypatch):
    chosen, argmax = [], mx.argmax

    def noting(x, axis):
        chosen.append(argmax(x, axis=axis))
        return chosen[-1]

    monkeypatch.setattr(mx, "argmax", noting)
    benched(model, monkeypatch)
    assert [token.shape for token in chosen] == 4 * [(1, 1)]


# --- compare ---


def bucket(first, end, window, memory, error, full=3.0):
    nll = {"full": full, "window": 3.2, "memory": 3.1}
    errors = {"nll": 0.1, "kl": error, "gap": 0.01}
    return Bucket(first, end, end - first, nll, {"window": window, "memory": memory}, errors)


def comparison(ratios=(0.5, 0.75), memory=0.2, full=3.0):
    parts = [bucket(96, 128, 0.2, 0.1, 0.01), bucket(1280, 2560, 0.4, 0.42, 0.05)]
    return Comparison(parts, bucket(96, 2560, 0.3, memory, 0.02, full), list(ratios))


def test_a_comparison_in_words(capsys):
    comparing._print(comparison())
    out = capsys.readouterr().out
    head, first, second, total = table_of(out)
    assert head == [
        *("positions", "tokens", "NLL, full", "NLL, window", "NLL, memory", "KL, window"),
        *("KL, memory", "difference", "KL ratio", "memory"),
    ]
    numbers = ["3.0000", "3.2000", "3.1000"]
    assert first == [
        "96 to 128",
        "32",
        *numbers,
        "0.2000",
        "0.1000",
        "-0.1000 ± 0.0100",
        "0.500",
        "helps",
    ]
    assert second[:2] == ["1,280 to 2,560", "1,280"]
    assert second[5:] == ["0.4000", "0.4200", "+0.0200 ± 0.0500", "1.050", "noise"]
    assert total[:2] == ["all", "2,464"] and total[-2:] == ["0.667", "helps"]
    assert out.splitlines()[-2:] == [
        "The memory helps. KL with memory is 0.667 of the window's (segments 0.500 to 0.750);"
        " 50.0% of the NLL gap is closed",
        "±: standard error over tokens; noise: less than two of them away from 0",
    ]
    comparing._print(comparison([0.5], 0.4, 3.19))
    assert capsys.readouterr().out.splitlines()[-2] == (
        "The memory harms. KL with memory is 1.333 of the window's;"
        " the window alone is as good in NLL, as far as so few tokens tell"
    )
    comparing._print(comparison([0.5], 0.31))
    said = "No difference that could not be chance: take more of the text. KL with memory is 1.033"
    assert said in capsys.readouterr().out


def compared(model, *more):
    words = ("compare", "book.txt", "--model", model, "--window", 20, "--sinks", 4)
    return run(*words, "--segments", 2, "--seq-len", 96, *more)


def test_a_text_is_compared(model, monkeypatch):
    made, tokenizer = load(model, window=20, sinks=4)
    ids = Encoder(tokenizer)("", TEXT)
    expected = measure.compare(made, measure.segments(ids, [], 96, 2), 20, 4)
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = compared(model, "--json")
    assert re.findall(r"comparing: (\d) of (\d) segments", done.stderr) == [("1", "2"), ("2", "2")]
    assert json.loads(done.stdout) == json.loads(
        json.dumps(
            {
                "buckets": [b._asdict() for b in expected.buckets],
                "total": expected.total._asdict(),
                "kl_ratio": expected.ratio,
                "kl_ratio_by_segment": expected.ratios,
                "nll_gap_closed": expected.gap_closed,
            }
        )
    )
    printed = table_of(compared(model).stdout)
    assert [row[0] for row in printed] == ["positions", "24 to 32", "32 to 64", "64 to 95", "all"]
    assert done.stdout.startswith('{\n  "buckets"')


def test_a_picture_of_a_comparison(model, drawn, place):
    done = compared(model, "--out", "a.svg")
    assert done.stderr.splitlines()[-1] == "wrote a.svg"
    figure, how = drawn[-1]
    assert how["dpi"] == 120 and list(figure.get_size_inches()) == [8, 4.5]
    title = figure.axes[0].get_title().splitlines()
    assert title == [
        f"{model} on book.txt",
        "the lower, the nearer to full attention; numbers: memory / window",
    ]
    (place / "b.png").write_text("not ours")
    assert refused("compare", "book.txt", "--model", model, "-o", "b.png").endswith("or --force")
    assert refused("compare", "book.txt", "-o", "a.jpg").endswith(".png, .svg, .pdf")
    (place / "c.png").write_text("It was. " * 999)
    for reads in (["c.png", "--model", model], ["book.txt", "--model", ".", ""][:3]):
        said = refused("compare", *reads, "-o", "c.png", "--force")
        assert said == "c.png: is what this command reads; choose another name"


def test_bars_of_a_comparison():
    figure = Figure()
    comparing.draw_buckets(figure, comparison(), "m on book")
    (axes,) = figure.axes
    alone, memory = axes.containers[0], axes.containers[-1]
    places = [
        [round(bar.get_x() + bar.get_width() / 2, 6) for bar in bars] for bars in (alone, memory)
    ]
    assert places == [[-0.2, 0.8, 1.8], [0.2, 1.2, 2.2]]
    assert {round(bar.get_width(), 6) for bar in axes.patches} == {0.4}
    colours = [Figure().add_subplot().plot([0], color=c)[0].get_color() for c in ("C7", "C1")]
    assert colours == ["C7", "C1"]
    from matplotlib.colors import to_rgba

    assert alone[0].get_facecolor() == to_rgba("C7") and memory[0].get_facecolor() == to_rgba("C1")
    bars = memory.errorbar
    ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    assert [[round(y, 6) for y in pair] for pair in ends] == [
        [0.08, 0.12],
        [0.32, 0.52],
        [0.16, 0.24],
    ]
    assert len(bars.lines[1]) == 2 and bars.lines[1][0].get_markersize() == 8  # caps, twice 4
    marks = [t.get_text() for t in axes.texts]
    assert marks == ["0.50", "1.05\nnoise", "0.67"]
    assert all(t.xyann == (0, 3) for t in axes.texts)
    assert list(axes.get_xticks()) == [0, 1, 2]
    ticks = [t.get_text() for t in axes.get_xticklabels()]
    assert ticks == ["96\nto 128", "1,280\nto 2,560", "all"]
    (line,) = (x for x in axes.lines if list(x.get_xdata()) == [1.5, 1.5])
    assert (line.get_color(), line.get_linewidth()) == ("C7", 0.8)
    assert axes.margins()[1] == 0.25 and axes.get_xlabel() == "position in the text, tokens"
    assert axes.get_ylabel() == "KL from full attention (nats per token)"
    legend = axes.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [
        "window alone",
        "with memory, ± 2 standard errors of the difference",
    ]
    assert legend._loc == 2  # upper left
    assert axes.get_title().startswith("m on book\n")


@pytest.mark.parametrize(("count", "labels"), [(3, 3), (8, 8), (9, 5), (20, 7)])
def test_bars_of_a_stream(count, labels):
    found = [
        Stretch(8192 * n, 8192 * (n + 1), {"window": 3.0, "memory": 2.9 + 0.2 * (n % 2)}, 0.01)
        for n in range(count)
    ]
    figure = Figure()
    comparing.draw_stream(figure, found, "m on book")
    (axes,) = figure.axes
    (bars,) = (c for c in axes.containers if hasattr(c, "patches"))
    assert len(bars) == count and {round(bar.get_width(), 6) for bar in bars} == {0.7}
    assert [round(bar.get_height(), 6) for bar in bars[:2]] == [0.1, -0.1]
    from matplotlib.colors import to_rgba

    assert bars[0].get_facecolor() == to_rgba("C1")
    error = bars.errorbar
    assert [round(y, 6) for y in error.lines[2][0].get_segments()[0][:, 1]] == [0.08, 0.12]
    assert error.lines[1][0].get_markersize() == 8
    (zero,) = (x for x in axes.lines if list(x.get_ydata()) == [0, 0])
    assert (zero.get_color(), zero.get_linewidth()) == ("C7", 0.8)
    every = -(-count // 8)
    assert list(axes.get_xticks()) == [*range(0, count, every)] and len(axes.get_xticks()) == labels
    shown = [t.get_text() for t in axes.get_xticklabels()]
    assert shown[1] == f"{8192 * every:,}\nto {8192 * (every + 1):,}"
    assert axes.get_xlabel() == "position in the text, tokens"
    assert axes.get_ylabel() == "NLL of window alone minus with memory\n(nats per token)"
    assert axes.get_title() == "m on book\nabove 0 the memory helps; bars show ± 2 standard errors"


def test_a_stream_is_compared(model, drawn, monkeypatch):
    made, tokenizer = load(model, window=20, sinks=4)
    ids = Encoder(tokenizer)("", TEXT)
    (one,) = measure.stream(made, mx.array([ids[:300]]), 100)
    words = ("compare", "book.txt", "--model", model, "--window", 20, "--sinks", 4)
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = run(*words, "--stream", 300, "--stream-from", 100)
    assert re.findall(r"comparing: (\d+) of (\d+) tokens", done.stderr) == [
        ("299", "598"),
        ("598", "598"),
    ]
    numbers = [f"{one.nll['window']:.4f}", f"{one.nll['memory']:.4f}"]
    difference = f"{one.nll['memory'] - one.nll['window']:+.4f} ± {one.error:.4f}"
    verdict = measure.judge(one.difference, one.error)
    assert table_of(done.stdout) == [
        ["positions", "NLL, window", "NLL, memory", "difference", "memory"],
        ["100 to 299", *numbers, difference, verdict],
        ["all", *numbers, difference, verdict],
    ]
    assert done.stdout.splitlines()[-2:] == [comparing.SENTENCES[verdict], comparing.ERRORS]
    done = run(*words, "--stream", 300, "--stream-from", 100, "--json", "-o", "a.png")
    assert json.loads(done.stdout) == [json.loads(json.dumps(one._asdict()))]
    figure, how = drawn[-1]
    assert how["dpi"] == 120 and figure.axes[0].get_title().startswith(
        f"{model} on book.txt\nabove"
    )
    whole = json.loads(
        run(*words, "--stream", len(ids), "--stream-from", len(ids) - 2, "--json").stdout
    )
    assert whole[0]["first"] == len(ids) - 2
    for stream, first in ((len(ids) + 1, 0), (300, 299), (300, -1)):
        said = refused(*words, "--stream", stream, "--stream-from", first)
        assert said == f"--stream {stream} from {first}: the text has {len(ids):,} tokens"


def test_all_stretches_are_one_by_their_lengths():
    found = [
        Stretch(10, 40, {"window": 3.0, "memory": 2.0}, 0.1),
        Stretch(40, 50, {"window": 1.0, "memory": 4.0}, 0.3),
    ]
    whole = comparing._whole(found)
    assert (whole.first, whole.end, whole.nll) == (10, 50, {"window": 2.5, "memory": 2.5})
    assert whole.error == pytest.approx(math.hypot(0.075, 0.075))


@pytest.mark.parametrize(
    ("options", "tokens", "fewer"),
    [
        ({}, 2048 * 3 + 5, "--segments 3"),
        ({}, 2048, "--segments 1"),
        ({"window": 64, "sinks": 4}, 2047, "--segments 1 --seq-len 1024"),
        ({}, 2047, "--segments 1 --seq-len 1024 --window 512 --sinks 4"),
        ({"window": 1018, "sinks": 4}, 2047, "--segments 1 --seq-len 1024"),
        ({"window": 1019, "sinks": 4}, 2047, "--segments 1 --seq-len 1024 --window 512 --sinks 4"),
        ({}, 3, "--segments 1 --seq-len 16 --window 8 --sinks 4"),
        ({"window": 5}, 63, "--segments 1 --seq-len 32 --window 16 --sinks 4"),
        ({"window": 5, "sinks": 0}, 32, "--segments 1 --seq-len 32"),
        (
            {"name": "ahn-gdn-smollm2-135m", "segments": 1},
            1100,
            "--segments 1 --seq-len 1024 --window 512 --sinks 4",
        ),
        ({"name": "ahn-gdn-smollm2-135m", "seq_len": 4096}, 2048, "--segments 1 --seq-len 2048"),
    ],
)
def test_what_would_do_for_a_short_text(options, tokens, fewer):
    given = {"name": "a/b", "window": None, "sinks": None, "seq_len": 2048, "segments": 8}
    given |= {"text": "a.txt", **options}
    L = given["seq_len"]
    what = (
        f"{given['segments']} segments of {L:,} tokens"
        if given["segments"] > 1
        else f"a segment of {L:,} tokens"
    )
    said = comparing._too_short(given, tokens, "so many bytes")
    assert said == f"a.txt: so many bytes are fewer than {what}; give {fewer}, or a longer text"


def test_what_compare_refuses(model, place):
    for option, name in (("--segments", 0), ("--seq-len", 0), ("--stream", 0)):
        assert refused("compare", "book.txt", option, name) == f"{option} must be at least 1, not 0"
    size = len(TEXT)
    said = refused("compare", "book.txt", "--segments", 1, "--seq-len", size + 1, "--model", "none")
    assert said.startswith(
        f"book.txt: {size:,} bytes are fewer than a segment of {size + 1:,} tokens"
    )
    (place / "wide.txt").write_text("\u00e9" * 50)
    said = refused("compare", "wide.txt", "--segments", 1, "--seq-len", 100, "--model", "none")
    assert "none" in said and "fewer" not in said  # a hundred bytes may be as many tokens
    (place / "few.txt").write_text("a" * 90)
    words = ("compare", "few.txt", "--model", model, "--window", 9, "--sinks", 2, "--segments", 1)
    assert "few.txt: 90 bytes are fewer" in refused(*words, "--seq-len", 91)
    run(*words, "--seq-len", 90)


# --- recall, and tasks made here ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recall", "--documents", "0"], "--documents must be at least 1, not 0"),
        (["recall", "--needles", "1"], "--needles must be at least 2, not 1"),
        (["recall", "--tokens", "0"], "--tokens must be at least 1, not 0"),
        (["vt", "--length", "0"], "--length must be at least 1, not 0"),
        (["babi1", "--items", "0"], "--items must be at least 1, not 0"),
        (["vt", "--window", "0"], "--window must be at least 1, not 0"),
        (
            ["niah", "--tasks", "niah_single,zzz,aaa"],
            f"--tasks: no task aaa; there are {', '.join(NIAH)}",
        ),
        (["recall", "--text", "few.txt"], "few.txt: has no sentences of 20 to 400 characters"),
        (["passkey", "--out", "a.txt"], "a.txt: give a name that ends in .png, .svg, .pdf"),
        (
            ["passkey", "--out", "few.png", "--text", "few.png", "--force"],
            "few.png: is what this command reads; choose another name",
        ),
        (
            ["recall", "--out", "own.png", "--model", ".", "--force"],
            "own.png: is what this command reads; choose another name",
        ),
        (["recall", "--force"], "--force has no effect without --out"),
    ],
)
def test_what_is_not_asked(words, said, place):
    for name in ("few.txt", "few.png", "own.png"):
        (place / name).write_text("A few.")
    if "--model" not in words:
        words = [*words, "--model", "no-such"]
    assert refused("eval", *words) == said
    for least in (["recall", "--documents", 1], ["vt", "--items", 1], ["vt", "--length", 1]):
        assert "no-such" in refused("eval", *least, "--model", "no-such")


def test_the_begin_of_a_measurement(place, monkeypatch):
    options = {"plot": None, "text": None, "name": "a", "force": False, "count": 1}
    out, sentences = synthetic._begin(options, {"count": 1})
    assert out is None and sentences == sentences_of(read_documents([str(synthetic.TEXT)], False))
    options |= {"text": "book.txt", "plot": Path("a.png")}
    out, sentences = synthetic._begin(options, {"count": 1})
    assert out.path == Path("a.png") and sentences == sentences_of(TEXT)
    assert out.reads == (Path("book.txt"), Path("a")) and out.force is False


def recalled():
    """Two documents of three facts, of which two are beyond the window."""
    table = np.arange(3 * 2 * 3 * 5, dtype=float).reshape(3, 2, 3, 5) / 100
    return Recall(np.array([[0, 2, 2], [1, 2, 2]]), np.array([[30, 20, 10], [40, 20, 10]]), table)


def test_what_is_printed_of_recall(capsys):
    found = recalled()
    synthetic._print_recall(found)
    out = capsys.readouterr().out
    rows = table_of(out)
    assert rows[0] == [
        *("facts", "number", "mixer", "NLL", "margin, bound", "margin, seen"),
        *("first, bound", "first, seen"),
    ]
    assert [row[:3] for row in rows[1:]] == [
        [place, number, mixer]
        for place, number in (("sinks", "1"), ("window", "1"), ("beyond", "4"))
        for mixer in MIXERS
    ]
    for row in rows[1:]:
        means = [found.mean(row[2], m, row[0]) for m in MEASURES]
        assert row[3:] == [*(f"{x:.3f}" for x in means[:3]), *(f"{x:.1%}" for x in means[3:])]
    said = [line for line in out.splitlines() if line.startswith("share")]
    assert said == [
        f"share of {label} that the memory keeps: {share:.1%} +- {error:.1%}"
        for name, label in (("nll", "NLL"), ("seen", "seen"), ("bound", "bound"))
        for share, error in [found.share(name)]
    ]
    one = Recall(found.places[:1], found.distances[:1], found.table[:, :1])
    synthetic._print_recall(one)
    assert capsys.readouterr().out.splitlines()[-1].endswith("%, of one document")
    near = Recall(np.minimum(found.places, 1), found.distances, found.table)
    synthetic._print_recall(near)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no fact is beyond the window; give more --tokens or a smaller --window"
    )


def test_a_picture_of_recall(drawn):
    found = recalled()
    synthetic._plot_recall(found, 25, picture(Path("a.png")))
    figure, how = drawn[-1]
    (axes,) = figure.axes
    assert how["dpi"] == 120 and list(figure.get_size_inches()) == [6, 4]
    *curves, end = axes.lines
    assert [line.get_label() for line in curves] == list(MIXERS)
    for i, line in enumerate(curves):
        assert list(line.get_xdata()) == [35, 20, 10] and line.get_marker() == "o"
        np.testing.assert_allclose(line.get_ydata(), found.table[i, :, :, 0].mean(axis=0))
    assert list(end.get_xdata()) == [25, 25] and end.get_label() == "end of the window"
    assert (end.get_color(), end.get_linestyle()) == ("grey", ":")
    assert axes.get_xlabel() == "tokens since the fact"
    assert axes.get_ylabel() == "NLL of the value (nats)" and axes.get_legend() is not None


def test_recall_is_asked_as_it_was_told(model, monkeypatch, drawn):
    made, tokenizer = load(model, window=40, sinks=4)
    given = {"documents": 2, "needles": 2, "tokens": 300, "seed": 3}
    documents = make_documents(tokenizer, sentences_of(TEXT), **given)
    words = [x for name, value in given.items() for x in (f"--{name}", value)]
    words = ["eval", "recall", "--model", model, "--text", "book.txt", *words]
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = run(*words, "--window", 40, "--sinks", 4, "--json", "-o", "a.png")
    from ahn_mlx.evaluate.recall import measure as by_hand

    expected = by_hand(made, tokenizer, documents)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected.facts()))
    assert done.stdout.startswith('{\n  "documents": 2')
    total = 3 * sum(len(d.ids) for d in documents)
    read = re.findall(r"reading: ([\d,]+) of ([\d,]+) tokens", done.stderr)
    assert len(read) == 6 and read[-1] == (f"{total:,}", f"{total:,}")
    (axes,) = drawn[-1][0].axes
    assert list(axes.lines[-1].get_xdata()) == [40, 40]


@pytest.mark.parametrize(
    ("given", "window"),
    [({}, (256, 32)), ({"window": 9}, (9, 32)), ({"sinks": 0}, (256, 0))],
)
def test_recall_has_a_short_window_unless_one_is_typed(given, window, monkeypatch):
    asked = window_asked(monkeypatch, synthetic)
    words = [x for name, value in given.items() for x in (f"--{name}", value)]
    assert refused("eval", "recall", *words) == "as far as that"
    assert (asked["window"], asked["sinks"]) == window


def answered(task="vt", depth=0.5, place="beyond", distance=10, scores=(1.0, 0.5, 0.0)):
    return tasks.Answered(task, depth, place, distance, scores, ("a", "b", "c"))


def test_made_tasks_are_asked_and_printed(model, monkeypatch, drawn):
    made, tokenizer = load(model, window=60, sinks=4)
    given = {"length": 300, "count": 1, "seed": 5}
    expected = list(tasks.ask(made, tokenizer, ["passkey"], sentences_of(TEXT), **given))
    words = ("eval", "passkey", "--model", model, "--length", 300, "--items", 1, "--seed", 5)
    words = (*words, "--text", "book.txt", "--window", 60, "--sinks", 4)
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    done = run(*words, "--json", "-o", "a.png")
    facts = json.loads(done.stdout)
    found = tasks.summarize(expected)
    assert facts["mixers"] == list(MIXERS) and done.stdout.startswith('{\n  "mixers"')
    assert facts["items"] == json.loads(json.dumps([x._asdict() for x in expected]))
    assert len(facts["summary"]) == len(found)
    assert done.stderr.startswith("15 questions, 4,500 tokens at most: about ")
    read = re.findall(r"asking: ([\d,]+) of ([\d,]+) questions", done.stderr)
    assert read[0] == ("1", "15") and read[-1] == ("15", "15")
    (axes,) = drawn[-1][0].axes
    assert axes.get_ylabel() == "score" and list(axes.lines[-1].get_xdata()) == [60, 60]

    # What is printed of other answers, without asking them.
    def asked(model, tokenizer, names, sentences, progress, **how):
        yield answered()
        yield answered(scores=(0.0, 0.5, 1.0))
        yield answered("babi1", place="sinks", scores=(0.25, 0.5, 1.0))

    monkeypatch.setattr("ahn_mlx.evaluate.synthetic.ask", asked)
    head, two, one = table_of(run(*words).stdout)
    assert head == ["task", "facts", "items", *MIXERS, "memory - window"]
    assert two == [
        "vt",
        "beyond",
        "2",
        "50.0 +- 50.0",
        "50.0 +- 0.0",
        "50.0 +- 50.0",
        "+0.0 +- 50.0",
    ]
    assert one[:4] == ["babi1", "sinks", "1", "25.0 +- nan"] and one[-1] == "-25.0 +- nan"


def test_a_picture_of_scores_by_depth(drawn):
    found = [
        answered(depth=0, distance=30, scores=(1.0, 0.0, 0.5)),
        answered(depth=1, distance=5, scores=(0.5, 0.25, 1.0)),
        answered(depth=0, distance=40, scores=(0.0, 0.5, 0.5)),
    ]
    synthetic._plot_scores(found, 12, picture(Path("a.png")))
    (axes,) = drawn[-1][0].axes
    *curves, end = axes.lines
    assert [list(line.get_xdata()) for line in curves] == [[5, 35]] * 3
    assert [list(line.get_ydata()) for line in curves] == [[50, 50], [25, 25], [100, 50]]
    assert [line.get_label() for line in curves] == list(MIXERS)
    assert list(end.get_xdata()) == [12, 12] and axes.get_ylabel() == "score"


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["niah"], ("niah_single",)),
        (
            ["niah", "--tasks", "niah_multikey, niah_multiquery"],
            ("niah_multikey", "niah_multiquery"),
        ),
        (["niah", "--tasks", "niah_multivalue"], ("niah_multivalue",)),
        *(([name], (name,)) for name in ("passkey", "vt", "babi1", "babi2", "babi3")),
    ],
)
def test_which_tasks_are_asked(words, chosen, monkeypatch):
    asked = []
    monkeypatch.setattr(synthetic, "_ask", lambda names, options: asked.append(names))
    run("eval", *words)
    assert asked == [chosen]
    shown = run("eval", words[0], "--help").output
    assert f"ahn-mlx eval {words[0]}\n" in shown and f"ahn-mlx eval {words[0]} --" in shown
    assert "At each of five depths." in shown


# --- suites ---


def agreed(monkeypatch, seconds, said, seen=True):
    monkeypatch.setattr(sys, "stdin", Typing(said))
    monkeypatch.setattr(sys, "stderr", Typing() if seen else io.StringIO())
    suites.agree(Cost(3, 1000, seconds), "items")
    return sys.stdin.read()


def test_who_sits_there_is_asked_before_more_than_a_minute(monkeypatch, capsys):
    assert agreed(monkeypatch, 60, "n\n") == "n\n"  # nobody asked
    assert agreed(monkeypatch, 61, "n\n", seen=False) == "n\n"
    assert agreed(monkeypatch, 61, "y\n") == ""
    assert agreed(monkeypatch, 61, "\n") == ""  # which is yes
    with pytest.raises(click.Abort):
        agreed(monkeypatch, 61, "n\n")
    assert "go on?" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    suites.agree(Cost(3, 1000, 61), "items")


@pytest.fixture(scope="module")
def invention(tmp_path_factory):
    return invented.place(tmp_path_factory.mktemp("suites"))


def suite(invention, name, *more):
    words = ["eval", name, "--model", invention / "model", "--prompts", invention / "prompts"]
    return [*words, "--data", invention / name, *more]


def test_a_suite_is_asked_and_scored(invention, monkeypatch, place):
    monkeypatch.setattr(terminal, "BETWEEN", 1e-9)
    words = suite(invention, "longbench", "--tasks", "hotpotqa, qmsum", "--limit", 1, "-o", "out")
    done = run(*words)
    read = re.findall(r"asking: (\d) of (\d) items", done.stderr)
    assert read == [("1", "2"), ("2", "2")]
    assert re.search(r"^2 items, [\d,]+ tokens at most: about \d", done.stderr)
    assert done.stderr.splitlines()[-1] == "wrote out/result.json"
    head, *rows = table_of(done.stdout)
    assert head == ["task", "items", "score", "standard error", "paper"]
    assert [row[:2] for row in rows[:2]] == [["hotpotqa", "1"], ["qmsum", "1"]]
    result = json.loads((place / "out/result.json").read_text())
    differs = [x for x in done.stdout.splitlines() if x.startswith("differs from the paper: ")]
    assert differs == [f"differs from the paper: {x}" for x in result["deviations"]] != []
    # Once more, and nothing is left to ask.
    again = run(*words, "--json")
    assert json.loads(again.stdout) == result and again.stdout.startswith('{\n  "')
    assert "items" not in again.stderr and again.stderr.endswith("wrote out/result.json\n")
    assert table_of(run("eval", "score", "out").stdout)[0] == head
    run_json = json.loads((place / "out/run.json").read_text())
    asked = json.dumps(run_json)
    for said in ('"protocol": "ahn"', '"mixer": "memory"', '"limit": 1', '"suite": "longbench"'):
        assert said in asked
    scored = json.loads(run("eval", "score", "out", "--protocol", "published", "--json").stdout)
    assert scored["protocol"] == "published" != result["protocol"]
    (place / "out/zzz.jsonl").write_text("{}\n")
    note = "note: out/zzz.jsonl: is not scored, there is no such task"
    assert note in run("eval", "score", "out").stderr


def test_a_suite_is_asked_as_it_was_told(invention, monkeypatch):
    asked = {}

    class Noted(Exception):
        pass

    def noting(suite, model, tokenizer, tasks, **settings):
        asked.update(settings, suite=suite, tasks=[t.name for t in tasks], model=model)
        raise Noted

    monkeypatch.setattr("ahn_mlx.evaluate.run.SuiteRun", noting)
    words = suite(invention, "lveval", "-o", "out", "--length", "16k", "--mixer", "window")
    run(*words, "--protocol", "published", "--limit", 3, "--window", 9, code=1)
    assert asked.pop("suite").name == "lveval" and asked.pop("model").ahn.window == 9
    assert len(asked.pop("tasks")) == len(invented.LVEVAL)
    assert asked == {
        **{"length": "16k", "out": Path("out"), "protocol": "published", "mixer": "window"},
        **{"limit": 3, "data": invention / "lveval", "prompts": invention / "prompts"},
    }
    run(*suite(invention, "longbench", "-o", "out"), code=1)
    assert asked["length"] == "" and asked["limit"] is None and asked["protocol"] == "ahn"


@pytest.mark.parametrize(
    ("name", "model", "given", "window"),
    [
        ("longbench", "ahn-gdn-3b", {}, (8064, 128)),
        ("longbench", "ahn-gdn-3b", {"window": 9}, (9, 128)),
        ("longbench", "ahn-gdn-3b", {"sinks": 0}, (8064, 0)),
        ("longbench", "ahn-gdn-smollm2-135m", {}, (None, None)),
        ("longbench", "me/mine", {}, (None, None)),
        ("infinitebench", "ahn-gdn-3b", {}, (None, None)),
    ],
)
def test_published_models_have_the_papers_window(name, model, given, window, monkeypatch):
    asked = window_asked(monkeypatch, suites)
    words = [x for key, value in given.items() for x in (f"--{key}", value)]
    assert refused("eval", name, "--model", model, "-o", "out", *words) == "as far as that"
    assert (asked["window"], asked["sinks"]) == window


def test_what_a_suite_refuses(invention, place):
    words = suite(invention, "longbench", "-o", "out", "--limit")
    assert refused(*words, 0) == "--limit must be at least 1, not 0"
    assert "zzz" in refused(*words, 1, "--tasks", "zzz")
    missing = refused("eval", "longbench", "-o", "out", "--data", place, "--model", "none")
    assert "data.zip" in missing and "none" not in missing.replace(str(place), "")
    missing = refused("eval", "longbench", "-o", "out", "--prompts", place, "--model", "none")
    assert "dataset2prompt.json" in missing
    done = CliRunner().invoke(cli, ["eval", "longbench"])
    assert done.exit_code == 2 and "Missing option '-o' / '--out'" in done.output


# --- lm-eval ---


@pytest.fixture
def harness(monkeypatch):
    """lm-evaluation-harness, which says what it was asked."""
    asked = []
    lm_eval = {name: ModuleType(f"lm_eval{name}") for name in ("", ".__main__", ".api")}
    model, registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
    model.LM = object
    registry.register_model = lambda name: lambda made: made
    lm_eval[".__main__"].cli_evaluate = lambda: asked.append((list(sys.argv), ends(asked)))
    lm_eval |= {".api.model": model, ".api.registry": registry}
    for name, module in lm_eval.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    monkeypatch.delitem(sys.modules, "ahn_mlx.evaluate.harness", raising=False)

    def ends(asked):
        directory = next(x for x in sys.argv if x.startswith("tokenizer="))
        there = sorted(p.name for p in Path(directory.removeprefix("tokenizer=")).iterdir())
        if ends.error:
            raise ends.error
        return there

    ends.error = None
    asked.append(ends)
    yield asked
    sys.modules.pop("ahn_mlx.evaluate.harness", None)


def test_the_harness_is_asked_with_its_own_words(harness, model):
    before = sys.argv
    words = ("eval", "lm-eval", "--model", model, "--window", 9, "--mixer", "full")
    run(*words, "--", "--tasks", "a", "--limit", 5)
    argv, there = harness[1]
    assert argv[:4] == ["lm-eval", "run", "--model", "ahn-mlx"] and sys.argv is before
    at = argv.index("--model_args")
    assert argv[at + 1 : -5] == [f"model={model}", "window=9", "mixer=full"]
    directory = argv[-5].removeprefix("tokenizer=")
    assert argv[-4:] == ["--tasks", "a", "--limit", "5"] and not Path(directory).exists()
    assert "tokenizer_config.json" in there
    run("eval", "lm-eval", "--model", model, "--", "run", "--tasks", "run")
    argv, _ = harness[2]
    assert argv[-2:] == ["--tasks", "run"] and argv[-4:-3] == ["mixer=memory"]
    assert argv.count("run") == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(2), "lm-eval: has said above what is wrong with its options"),
        (KeyError("odd"), "lm-eval: "),
        (SystemExit(0), None),
    ],
)
def test_what_the_harness_fails_by(harness, model, error, said):
    harness[0].error = error
    before = sys.argv
    words = ("eval", "lm-eval", "--model", model, "--", "--tasks", "a")
    if said is None:
        run(*words)
    else:
        assert refused(*words).startswith(said)
    assert sys.argv is before
    assert "--window must be at least 1" in refused(*words[:4], "--window", 0, *words[4:])


# --- doctor, families, convert, export ---


def test_what_doctor_finds_is_a_line_each(monkeypatch):
    found = [Finding("MLX", "mlx 1"), Finding("BLAS", "slow", "get one")]
    found.append(Finding("compiler", "none; apt", optional=True))
    monkeypatch.setattr("ahn_mlx.measure.doctor.examine", lambda: found)
    assert run("doctor").stdout.splitlines() == [
        *(f"{'MLX':<26} mlx 1", f"{'BLAS':<26} slow", f"{'compiler':<26} none; apt"),
        "to mend BLAS: get one",
    ]
    assert json.loads(run("doctor", "--json").stdout) == {
        "MLX": {"value": "mlx 1", "mend": ""},
        "BLAS": {"value": "slow", "mend": "get one"},
        "compiler": {"value": "none; apt", "mend": ""},
    }
    del found[1]
    said = "everything needed is there; optional, and not there: compiler"
    assert run("doctor").stdout.splitlines()[-1] == said
    found.append(Finding("GPU", "none", optional=True))
    assert run("doctor").stdout.splitlines()[-1] == said + ", GPU"


def test_families_by_whether_they_can_have_a_memory(monkeypatch):
    from ahn_mlx.model.families import Verdict

    judged = {"llama": True, "odd": False, "new": None, "qwen2": True}
    monkeypatch.setattr("ahn_mlx.model.families.families", lambda: list(judged))
    words = {"llama": "", "odd": "no attention", "new": "not known", "qwen2": "biases"}
    monkeypatch.setattr(
        "ahn_mlx.model.families.judge", lambda name: Verdict(name, judged[name], words[name])
    )
    mlx_lm = version("mlx-lm")
    assert run("families").stdout.splitlines() == [
        f"2 of 4 families of mlx-lm {mlx_lm} can have a memory:",
        "  llama",
        f"  {'qwen2':<18} biases",
        f"1 of 4 families of mlx-lm {mlx_lm} cannot:",
        f"  {'odd':<18} no attention",
        f"1 of 4 families of mlx-lm {mlx_lm} were not tried:",
        f"  {'new':<18} not known",
    ]
    found = json.loads(run("families", "--json").stdout)
    assert found == {name: {"fits": judged[name], "words": words[name]} for name in judged}
    assert run("families").stderr == ""  # where nobody sees a bar
    screen = Typing()
    monkeypatch.setattr(sys, "stderr", screen)
    from ahn_mlx.cli.families import families

    families.callback(as_json=True)
    assert "trying: 100%|" in screen.getvalue() and " families/s" in screen.getvalue()


def test_a_checkpoint_is_converted_and_written_back(place):
    words = ("convert", GDN / "ahn_only", "--base", GDN / "base", "-o", "out")
    done = run(*words)
    assert done.stdout == "wrote out\n"
    assert json.loads((place / "out/config.json").read_text()).get("quantization") is None
    assert refused(*words).startswith("out: ")
    run(*words, "--force", "--q-bits", 4, "--dtype", "float16")
    config = json.loads((place / "out/config.json").read_text())
    assert config["quantization"]["bits"] == 4 and "float16" in json.dumps(config)
    run(*words, "--force", "--yarn", 2.0)
    assert "yarn" in (place / "out/config.json").read_text()
    for layout, more in (("merged", []), ("ahn-only", ["--layout", "ahn-only"])):
        done = run("export-pytorch", "out", "-o", layout, *more)
        assert done.stdout == f"wrote {layout}\n"
        run("export-pytorch", "out", "-o", layout, *more, "--force")
    sizes = [
        sum(p.stat().st_size for p in Path(x).glob("*.safetensors")) for x in ("merged", "ahn-only")
    ]
    assert sizes[0] > 2 * sizes[1]
    assert refused("export-pytorch", "out", "-o", "merged").startswith("merged: ")
    said = refused("convert", "zzz", "--base", GDN / "base", "-o", "b")
    assert "zzz" in said


def test_a_base_is_called_as_it_was_typed(place, monkeypatch):
    (place / "cache").mkdir()
    (place / "cache/base").symlink_to(GDN / "base")
    monkeypatch.setattr("ahn_mlx.hub.bases.find_base", lambda name: place / "cache/base")
    given = {}

    def convert(base, **options):
        given.update(options, base=base)
        raise AHNError(f"{base}: is odd")

    monkeypatch.setattr("ahn_mlx.checkpoints.convert.convert", convert)
    assert (
        refused("convert", "a", "--base", "me/mine", "-o", "b", "--q-bits", 8) == "me/mine: is odd"
    )
    assert given == {
        **{"base": place / "cache/base", "ahn": Path("a"), "out": Path("b"), "dtype": None},
        **{"q_bits": 8, "yarn": None, "force": False},
    }
    assert refused("convert", "a", "-o", "b") == "None: is odd"
    assert given["base"] is None and given["q_bits"] == 0


def test_what_is_uploaded_and_where(monkeypatch, place, model):
    asked = []

    def upload(*words):
        asked.append(words)
        return "https://there"

    monkeypatch.setattr("ahn_mlx.hub.download.upload", upload)
    assert run("upload", model, "--repo", "me/mine").stdout == "https://there\n"
    run("upload", "--model", model, "--repo", "me/mine", "--private")
    assert asked == [(model, "me/mine", False), (model, "me/mine", True)]


def test_an_app_is_exported_as_it_was_told(place, monkeypatch):
    base = make_base(place / "base")
    memory = memory_of(base, place / "memory")
    asked = {}
    monkeypatch.setattr(
        "ahn_mlx.apps.export.export_app",
        lambda model, tokenizer, out, **more: asked.update(more, out=out, window=model.ahn.window),
    )
    words = ("export-app", "--model", base, "--ahn", memory, "-o", "app")
    assert run(*words).stdout == "wrote app\n"
    assert asked == {"out": Path("app"), "chunk": 512, "force": False, "window": 60}
    run(*words, "--chunk", 1, "--force", "--window", 9)
    assert asked == {"out": Path("app"), "chunk": 1, "force": True, "window": 9}
    assert refused(*words, "--chunk", 0) == "--chunk must be at least 1, not 0"
    assert AHNConfig().window == 32640
