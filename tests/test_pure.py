"""The model as a pure function, written by mx.export_function and read again, against the
model with caches."""

import mlx.core as mx
import pytest
from checkpoints import GOLDEN
from mlx_lm.models.llama import Model, ModelArgs
from test_batch import VARIANTS, tiny

from ahn_mlx import AHNConfig, AHNError, augment, load_model
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.model.pure import initial_state, pure_step

IDS = [(7 * n + n * n) % 251 for n in range(80)]


def written(model, L, state, file):
    """The step for L tokens, through a file."""
    example = (mx.zeros((1, L), mx.int32), mx.array([3]), mx.array([L]), *state)
    mx.export_function(str(file), pure_step(model), *example)
    return mx.import_function(str(file))


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_steps_equal_the_model(variant, tmp_path):
    """One at a time and in padded chunks, filling, crossing and wrapping a window of 12 + 4."""
    folder = GOLDEN / variant
    parts = (folder / "base", folder / "ahn_only")
    convert(*parts if parts[0].is_dir() else (None, folder / "merged"), tmp_path / "model")
    model, _ = load_model(tmp_path / "model", dtype="float32")
    state = initial_state(model)
    steps = {L: written(model, L, state, tmp_path / f"{L}.mlxfn") for L in (1, 12)}
    cache, at = model.make_cache(), 0
    for n in (1, 1, 7, 12, 1, 3, 1, 12, 12, 1, 1):
        L = 1 if n == 1 else 12
        ids = IDS[at : at + n] + [0] * (L - n)
        logits, *state = steps[L](mx.array([ids]), mx.array([at]), mx.array([n]), *state)
        expected = model(mx.array([IDS[at : at + n]]), cache=cache)
        mx.eval(logits, state, expected)
        at += n
        assert mx.abs(logits[:, :n] - expected).max() < 1e-4
        assert mx.array_equal(logits[:, :n].argmax(axis=-1), expected.argmax(axis=-1))
    memory = [c.memory for c in cache]
    assert all(mx.abs(a - b).max() < 1e-4 for a, b in zip(state[6::7], memory, strict=True))


def test_sixty_four_tokens_at_once(tmp_path):
    """A window of 80, so that 64 fit; clamped sinks; two rows at different places."""
    args = ModelArgs("llama", 32, 2, 32, 4, rms_norm_eps=1e-5, vocab_size=256)
    model = augment(Model(args), AHNConfig(window=80, sinks=3, sink_positions="clamped"))
    step = written(model, 64, initial_state(model), tmp_path / "64.mlxfn")
    state, cache = initial_state(model), model.make_cache()
    for at, n in ((0, 64), (64, 9), (73, 64), (137, 64)):
        ids = [(5 * t + t * t) % 256 for t in range(at, at + n)]
        padded = mx.array([ids + [0] * (64 - n)])
        logits, *state = step(padded, mx.array([at]), mx.array([n]), *state)
        expected = model(mx.array([ids]), cache=cache)
        assert mx.abs(logits[:, :n] - expected).max() < 1e-4


def test_full_attention_has_no_fixed_size():
    with pytest.raises(AHNError, match="layers 0 keep full attention"):
        pure_step(tiny(fa_layer_ids=(0,)))


def test_one_token_writes_in_place():
    """A window of 16 MB: what one more token takes is a small part of it."""
    args = ModelArgs("llama", 64, 1, 32, 1, rms_norm_eps=1e-5, vocab_size=256)
    model = augment(Model(args), AHNConfig(window=32768, sinks=8))
    mx.eval(model.parameters())
    step, state = pure_step(model), initial_state(model)
    mx.eval(state)
    for at in range(6):
        if at == 3:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
        token, place = mx.array([[at]]), mx.array([at])
        logits, *state = step(token, place, mx.array([1]), *state)
        mx.eval(logits, state)
    assert mx.get_peak_memory() - before < state[0].nbytes / 2
