"""What commands make of their options, in this process."""

import signal
from types import SimpleNamespace

import pytest
from checkpoints import GDN, talking_model
from click.testing import CliRunner

from ahn_mlx import AHNError
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.cli import cli, terminal
from ahn_mlx.cli import serve as serving
from ahn_mlx.cli.options import load_model
from ahn_mlx.cli.suites import _names, agree
from ahn_mlx.cli.terminal import progress_bar, stop_between_steps
from ahn_mlx.evaluate.run import Cost

SERVE = {"rows": 1, "port": 0, "allow_origin": (), "host": "127.0.0.1", "api_key_file": None}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("cli"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({"port": port}, "--port must be from 0 to 65535") for port in (-1, 65536)),
        *(({"port": port}, "") for port in (0, 1, 65535)),
        *(({"rows": 0}, "--rows must be at least 1"), ({"rows": 1}, "")),
        *(
            ({"allow_origin": ("https://a.b", origin)}, "--allow-origin must be as")
            for origin in ("a.b", "ftp://a.b", "http://", "http://a.b/", "http://*", "http://a b")
        ),
        ({"allow_origin": ("https://a.b", "http://localhost:3000")}, ""),
        *(({"host": host}, "can be reached from other machines") for host in ("0.0.0.0", "::")),
        *(({"host": host}, "") for host in ("localhost", "::1", "127.0.0.1")),
        ({"host": "0.0.0.0", "api_key_file": "key"}, ""),
    ],
)
def test_a_server_is_asked_for_what_it_can_be(given, said):
    if not said:
        serving._check({**SERVE, **given})
        return
    with pytest.raises(AHNError, match=said):
        serving._check({**SERVE, **given})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((1, "about 1 min"), (89, "about 1 min"), (91, "about 2 min"), (3540, "about 59 min")),
        *((3600, "about 1 h 0 min"), (7500, "about 2 h 5 min"), (0, "about 1 min")),
    ],
)
def test_what_a_suite_takes_is_said_before_it_is_asked(seconds, said, capsys):
    agree(Cost(1200, 34_567, seconds), "items")
    told = capsys.readouterr().err
    assert told == f"1,200 items, 34,567 tokens at most: {said} at this model's speed here\n"


def test_names_of_tasks():
    assert _names(" a, b ,,c") == ("a", "b", "c") and _names(None) == _names(" ,") == ()
    shown = CliRunner().invoke(cli, ["eval", "lveval", "--help"]).output
    assert "[default: 128k]" in " ".join(shown.split())


@pytest.mark.parametrize(
    "options",
    [("--context", "0"), ("--tokens", "0"), ("--window", "0"), ("--sinks", "-1")],
)
def test_a_bench_of_nothing_is_refused(directory, options):
    done = CliRunner().invoke(cli, ["bench", str(directory), *options])
    assert isinstance(done.exception, AHNError)
    assert str(done.exception).startswith(f"{options[0]} must be at least")


def test_packed_weights_on_a_cpu_are_slow_and_that_is_said(directory, tmp_path, capsys):
    given = {"window": None, "sinks": None, "dtype": None, "q_bits": None, "ahn": None}
    load_model({"name": str(directory), **given})
    assert "packed" not in capsys.readouterr().err
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "small", q_bits=4)
    with pytest.raises(AHNError, match="tokenizer"):
        load_model({"name": str(tmp_path / "small"), **given})
    for file in directory.glob("*token*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    load_model({"name": str(tmp_path / "small"), **given})
    assert "note: weights are packed in 4 bits, which a CPU multiplies" in capsys.readouterr().err


def test_a_bar_goes_on_from_what_is_done():
    with progress_bar(100, "reading", "tokens", 40) as bar:
        assert (bar.n, bar.total) == (40, 100)


def test_signals_are_theirs_again_after_a_run():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stop_between_steps() as check:
        check()
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("fast", "dtype", "said"), [(False, 1, 1), (True, 1, 0), (False, None, 0)])
def test_a_slow_blas_is_named_where_it_computes(fast, dtype, said, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "BLAS", SimpleNamespace(fast=fast, name="slow one"))
    monkeypatch.setattr(terminal, "default_dtype", lambda: dtype)
    terminal.warn_slow()
    assert capsys.readouterr().err.count("note: reading will be slow (slow one)") == said


@pytest.mark.parametrize(
    ("option", "least"),
    [
        *(("window", 1), ("sinks", 0), ("seq-len", 2), ("layerwise", 0), ("steps", 0)),
        *(("warmup", 0), ("accumulate", 1), ("batch-size", 1)),
    ],
)
def test_numbers_of_a_training_have_a_least(directory, tmp_path, option, least):
    common = ["train", "--model", str(directory), "--data", str(tmp_path / "none.txt"), "--out"]
    for value, good in ((least, True), (least - 1, False)):
        asked = [*common, str(tmp_path / "out"), f"--{option}", str(value)]
        said = str(CliRunner().invoke(cli, asked).exception)
        assert (f"--{option} must be at least {least}" in said) is not good, said
