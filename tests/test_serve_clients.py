"""OpenAI's and Anthropic's own clients, as their users run them, against a real server. They are
installed into environments of their own, and skipped where they cannot be."""

import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import talking_model
from serving import environment, install, started

KEY = "0123456789abcdef"
SCRIPTS = Path(__file__).parent / "clients"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("clients")
    key = path / "key"
    key.write_text(KEY)
    model = talking_model("qwen2-gdn", path)
    with started("--model", model, "--api-key-file", key) as (_, client, _):
        yield str(client.base_url)


def check(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    path = tmp_path_factory.mktemp("environment")
    return environment(path, "openai", "anthropic", "langchain-openai") / "python"


@pytest.mark.parametrize("script", ["openai_python.py", "anthropic_python.py"])
def test_clients_for_python(url, python, script):
    check(python, SCRIPTS / script, url, KEY)


def test_clients_for_javascript(url, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    shutil.copy(SCRIPTS / "clients.mjs", tmp_path)
    install("npm", "install", "--prefix", tmp_path, "openai", "@anthropic-ai/sdk", cwd=tmp_path)
    check("node", tmp_path / "clients.mjs", url, KEY)
