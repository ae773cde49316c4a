"""mlx-lm's own programs on a converted model, as processes: the right text, or one line."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import GDN, edit_tensors, talking_model

BIN = Path(sys.executable).parent
TRUST = ("--trust-remote-code",)


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A model whose memory changes what it says, in a window of 12 and 4 sinks."""
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("loud"))
    weights = mx.load(str(path / "model.safetensors"))
    noise = {n: mx.random.normal(x.shape) for n, x in weights.items() if "ahn.o_proj" in n}
    edit_tensors(path, **noise)
    return path


def program(name, *args):
    command = [str(BIN / f"mlx_lm.{name}"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def generate(model, *more):
    fixed = ("--ignore-chat-template", "--max-tokens", 40, "--prompt", "Call me Ishmael.")
    return program("generate", "--model", model, *TRUST, *fixed, *more)


def test_generate_with_a_quantized_window(loud):
    """Asked for after every step; the head of these models is too small for any group."""
    result = generate(loud, "--kv-bits", 8, "--quantized-kv-start", 0, "--kv-group-size", 32)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(
        "error: a key/value group size of 32 does not divide the head size 16"
    )


def test_a_draft_model_is_refused(loud, tmp_path):
    """It would have to take back what the memory has taken in."""
    draft = shutil.copytree(GDN / "base", tmp_path / "draft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(loud / name, draft)
    result = generate(loud, "--draft-model", draft)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "leave out --draft-model" in result.stderr.splitlines()[-1]


def test_prompts_are_not_cached_for_nothing(loud, tmp_path):
    out = tmp_path / "prompt.safetensors"
    result = program(
        "cache_prompt", "--model", loud, *TRUST, "--prompt", "x", "--prompt-cache-file", out
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr and not out.exists()
    assert "use ahn-mlx digest, then ahn-mlx ask" in result.stderr.splitlines()[-1]


@contextmanager
def serving(loud):
    """The URL of a new mlx_lm.server, a real process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(BIN / "mlx_lm.server"), "--model", str(loud), *TRUST, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def answer(url, n):
    """What the n-th of some prompts of 1 to 90 characters is continued with. None begins as
    another does: where a prompt is one that it has kept, mlx-lm's server ends its thread."""
    text = (
        chr(ord("a") + n) + "he whale swam on and on, past islands of ice and ships of wood. " * 2
    )
    body = {"prompt": text[: 1 + n * 37 % 90], "max_tokens": 8 + n % 5 * 7, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["choices"][0]["text"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read()) from None
        except ConnectionResetError:  # five may wait to be accepted there
            time.sleep(0.1)


@pytest.mark.slow
def test_a_server_answers_many_at_once_as_each_alone(loud):
    with serving(loud) as url, ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda n: answer(url, n), range(24)))
    with serving(loud) as url:
        alone = [answer(url, n) for n in range(24)]
    assert together == alone and len(set(alone)) > 12
