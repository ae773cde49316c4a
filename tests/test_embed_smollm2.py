"""The default model through the library in embed/, against itself in Python."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import resident
from checkpoints import chat_tokenizer, talking_model
from test_embed import by_model, by_python
from test_embed_tokenizer import BOOK

import ahn_mlx
from ahn_mlx.apps.export import export_app
from ahn_mlx.reading.generate import Run, make_prompt
from ahn_mlx.reading.sampling import Sampling
from embed import logits, needs_tools, run, sample

pytestmark = [needs_tools, pytest.mark.slow]

PASSAGE = BOOK[20_000:27_000]  # more than the window
QUESTION = "Who is speaking to whom? Answer in a few words."


@pytest.fixture(scope="module", params=["clamped", "absolute"])
def smollm2(request, tmp_path_factory):
    model, tokenizer = ahn_mlx.load(NAME)
    for layer in model.layers:
        layer.self_attn.config = replace(layer.self_attn.config, sink_positions=request.param)
    model.ahn = replace(model.ahn, sink_positions=request.param)
    out = tmp_path_factory.mktemp("smollm2") / "app"
    export_app(model, tokenizer, out)
    return model, tokenizer, out


NAME = "ahn-gdn-smollm2-135m"


def test_a_passage_is_answered_as_ahn_mlx_generate_does(smollm2, tmp_path):
    """Text in, text out: 64 tokens, beyond the window."""
    model, tokenizer, app = smollm2
    file = tmp_path / "passage.txt"
    file.write_text(PASSAGE)
    prompt = make_prompt(tokenizer, PASSAGE, QUESTION)
    assert len(prompt) > model.ahn.capacity
    expected = "".join(Run(model, tokenizer, prompt, Sampling(max_tokens=64)))
    found = sample(app, "--read", file, "--max-tokens", 64, "--ask", QUESTION)
    assert found == expected + "\n"


def test_logits_far_beyond_the_window(smollm2):
    model, tokenizer, app = smollm2
    ids = tokenizer.encode(PASSAGE)[:1_330]
    parts = [ids[:512], ids[512:1024], ids[1024:1300], *([x] for x in ids[1300:1312])]
    found = logits(app, parts)
    expected = by_model(model, parts)
    assert abs(found - expected).max() < 1e-4
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert (found == by_python(app, model, parts)).all()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc, which counts memory")
def test_exporting_holds_no_second_copy_of_the_weights(smollm2, tmp_path):
    """Beyond the 549 MB of the model: next to nothing in MLX, and a small part in the process."""
    model, tokenizer, _ = smollm2
    resident.start_over()
    before = resident.most()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    export_app(model, tokenizer, tmp_path / "app", chunk=64)
    assert held > 500e6
    assert mx.get_peak_memory() - held < 1e6
    assert resident.most() - before < 150e6


def test_no_window_is_copied_in_a_hundred_steps(smollm2):
    _, _, app = smollm2
    moved, beyond, _ = run("ahn-probe", "decode", app, 100).stdout.split()
    assert int(moved) == 0
    # What one step takes beyond what is held is a small part of all windows.
    assert int(beyond) < 30 * 2 * 3 * 1088 * 64 * 4 / 10


def test_memory_is_flat_over_a_hundred_thousand_tokens(tmp_path):
    """Of a small model; the last numbers are not above the first."""
    model, _ = ahn_mlx.load(talking_model("qwen2-gdn", tmp_path), dtype="float32")
    export_app(model, chat_tokenizer(), tmp_path / "app")
    said = run("ahn-probe", "memory", tmp_path / "app", 100_000).stdout.split()
    active = [int(x) for x in said[::2]]
    assert len(active) == 10 and max(active[2:]) <= max(active[:2]) + 4096
