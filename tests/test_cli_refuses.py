"""Bad input gets one line on stderr and exit code 2, never a traceback."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from forkserver import command

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "qwen2-gdn" / "merged"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def refused(*args: str, stdin: bytes = b"") -> str:
    """Run the command, check the form of its complaint, return it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(stdin)
        file.flush()
        done = command(*args, stdin=file.name, cwd=os.getcwd())
    said = done.stderr
    assert done.returncode == 2, said
    assert done.stdout == ""
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["nonsense"], "No such command"),
        (["convert"], "Missing option"),
        (["convert", "--ahn", "no-such", "--out", "no-such-either"], "no-such"),
        (["generate", "--nonsense"], "No such option"),
        (["generate", "--max-tokens", "many"], "not a valid integer"),
        (["generate", "--dtype", "float8"], "float8"),
        (["compare", "--text", "a", "--text=c"], "--text is given twice"),
        (["memory", "info", "README.md"], "README.md: is not a memory"),
        (["memory", "info", "docs"], "docs: is a directory, not a memory"),
        (["generate", "--prompt", "Hi", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["generate", "--prompt", "Hi", "--max-tokens", "-1"], "--max-tokens must be at least 1"),
        (["generate", "--prompt", "Hi", "--window", "0"], "--window must be at least 1"),
        (["generate", "--prompt", "Hi", "--sinks", "-1"], "--sinks must be at least 0"),
        (["generate", "--prompt", "Hi", "--prefill-step-size", "0"], "--prefill-step-size"),
        (["generate", "--prompt", "Hi", "--temp", "-0.1"], "--temp must be 0, which is greedy, or"),
        (["generate", "--prompt", "Hi", "--temp", "nan"], "--temp must be 0, which is greedy, or"),
        (["generate", "--prompt", "Hi", "--top-p", "0"], "--top-p"),
        (["generate", "--prompt", "Hi", "--top-p", "1.5"], "--top-p"),
        (["generate", "--prompt", "Hi", "--seed", "-1"], "--seed"),
        (["generate", "--prompt", ""], "the question is empty"),
        (["generate", "--prompt", " \n "], "the question is empty"),
        (["generate"], "the prompt is empty"),
        (["generate", "--prompt-file", "-"], "the prompt is empty"),
        (["generate", "--prompt-file", "no-such.txt"], "no-such.txt: No such file"),
        (["generate", "--prompt-file", "no-such/"], "no-such"),
        (["generate", "--prompt-file", "no-such*"], "no-such*: no file has such a name"),
        (["generate", "-p", "a", "--prompt", "b"], "--prompt is given twice"),
        (["generate", "--prompt", "Hi", "--model", "no-such"], "no model directory no-such"),
    ],
)
def test_bad_option(args: list[str], reason: str) -> None:
    assert reason in refused(*args)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty" in refused("generate", "--prompt-file", str(tmp_path / "empty.txt"))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    said = refused("generate", "--prompt-file", str(tmp_path / "latin.txt"))
    assert "latin.txt: not UTF-8 text (byte 3)" in said
    assert "standard input: not UTF-8" in refused("generate", stdin=b"\xff\xfa")


def test_not_a_model_directory(tmp_path: Path) -> None:
    assert "config.json" in refused("generate", "--prompt", "Hi", "--model", str(tmp_path))


def test_tokenizer_missing() -> None:
    assert "no usable tokenizer" in refused("generate", "--prompt", "Hi", "--model", str(GOLDEN))


def test_nothing_to_read_at_a_terminal() -> None:
    import pty

    parent, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ahn_mlx", "generate"],
        env=ENV,
        stdin=child,
        capture_output=True,
        timeout=60,
    )
    os.close(parent)
    os.close(child)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: nothing to read; give a document")
