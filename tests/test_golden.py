"""Converter and model against what the PyTorch release computes (tests/golden/README.md)."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from ahn_mlx import AHNError, load_model
from ahn_mlx.checkpoints.convert import convert

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(p.name for p in GOLDEN.glob("qwen*"))


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory):
    """(model converted from the published layout, golden tensors)."""
    folder = GOLDEN / request.param
    out = tmp_path_factory.mktemp(request.param) / "model"
    if (folder / "base").is_dir():
        convert(folder / "base", folder / "ahn_only", out)
    else:
        convert(None, folder / "merged", out)
    return load_model(out, dtype="float32")[0], mx.load(str(folder / "golden.safetensors"))


def read(model, cache, ids, step):
    """Logits [L, V] of ids [1, L], `step` tokens at a time."""
    parts = []
    for i in range(0, ids.shape[1], step):
        parts.append(model(ids[:, i : i + step], cache=cache)[0])
        mx.eval(parts[-1], [c.state for c in cache])
    return mx.concatenate(parts)


def follow(model, cache, logits, golden, tokens, expected):
    """Decode greedily: ids exactly, logits within 1e-3."""
    for n, token in enumerate(golden[tokens][0].tolist()):
        assert logits.argmax().item() == token
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        assert mx.abs(logits - golden[expected][n]).max() < 1e-3


def same_states(cache, golden, name):
    for i, layer in enumerate(cache):
        assert mx.abs(layer.memory - golden[f"{name}.{i}"]).max() < 1e-4


@pytest.mark.parametrize(
    "step", [1, 7, 16, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 40))]
)
def test_prefill_and_decode(case, step):
    model, golden = case
    cache = model.make_cache()
    logits = read(model, cache, golden["input_ids"], step)
    assert mx.abs(logits - golden["prefill_logits"]).max() < 1e-3
    same_states(cache, golden, "state_after_prefill")
    follow(model, cache, logits[-1], golden, "decode_tokens", "decode_logits")
    same_states(cache, golden, "state_after_decode")


def test_crossing_the_boundary_while_decoding(case):
    model, golden = case
    cache = model.make_cache()
    logits = read(model, cache, golden["short_input_ids"], 10)
    assert mx.abs(logits - golden["base_short_logits"]).max() < 1e-3
    follow(model, cache, logits[-1], golden, "cross_tokens", "cross_decode_logits")
    same_states(cache, golden, "cross_state")


@pytest.mark.parametrize("step", [7, 40, 100])
def test_long_prompt(case, step):
    model, golden = case
    if "long_input_ids" not in golden:
        assert model.ahn.router or model.ahn.query_projection  # the other six have one
        return
    cache = model.make_cache()
    logits = read(model, cache, golden["long_input_ids"], step)
    assert mx.abs(logits - golden["long_prefill_logits"]).max() < 1e-3
    follow(model, cache, logits[-1], golden, "long_tokens", "long_decode_logits")
    same_states(cache, golden, "long_state")


def test_without_cache_and_in_batches(case):
    model, golden = case
    ids = mx.concatenate([golden["input_ids"], golden["input_ids"][:, ::-1]])
    both = model(ids)
    assert mx.abs(both[0] - golden["prefill_logits"]).max() < 1e-3
    cache = model.make_cache()
    alone = read(model, cache, ids[1:], 7)
    assert mx.abs(both[1] - alone).max() < 1e-3
    cache = model.make_cache()
    model(ids[:, :-6], cache=cache)
    one_by_one = [model(ids[:, i : i + 1], cache=cache)[:, 0] for i in range(-6, -1)]
    assert mx.abs(mx.stack(one_by_one, axis=1) - both[:, -6:-1]).max() < 1e-3


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.ahn.fn.o_proj.weight"])
def test_not_a_number_in_a_model_directory(name, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen2-gdn" / "merged", out)
    weights = dict(mx.load(str(out / "model.safetensors")))
    weights[name] = mx.full(weights[name].shape, mx.nan)
    mx.save_safetensors(str(out / "model.safetensors"), weights)
    ours = name.replace("ahn.fn", "self_attn.ahn")
    with pytest.raises(AHNError, match=f"{out}: tensor {ours} holds NaN"):
        load_model(out)
