"""Losses and gradients against what the PyTorch release computes in training."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from ahn_mlx import load_model
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.model.augment import head
from ahn_mlx.model.names import published_name
from ahn_mlx.ops import chunks, delta, mamba2, window
from ahn_mlx.platform import Tiles
from ahn_mlx.train import losses
from ahn_mlx.train.streams import Stream, install, study, teach, trainable

GOLDEN = Path(__file__).parent / "golden"

# Variant, loss, case, window, sinks, and the loss that the release computed.
CASES = [
    ("qwen2-gdn", "kl", "kl", 12, 0, 5.214225769042969),
    ("qwen2-gdn", "ce", "ce", 12, 0, 10.288705825805664),
    ("qwen2-gdn", "distill", "distill", 12, 0, 0.01929636113345623),
    ("qwen2-gdn", "kl", "kl_sinks", 32, 32, 4.563714027404785),
    ("qwen2-gdn-router", "kl", "kl", 12, 0, 5.2365546226501465),
    ("qwen2-gdn-router", "kl", "kl_sinks", 32, 32, 4.327748775482178),
    ("qwen2-gdn-qproj", "kl", "kl", 12, 0, 5.890530109405518),
    ("qwen2-dn", "kl", "kl", 12, 0, 5.888588905334473),
    ("qwen2-mamba2", "kl", "kl", 12, 0, 6.403226852416992),
]


@pytest.fixture(params=["cpu", "cpu, checkpointed", "gpu, checkpointed"])
def checkpoint(request, monkeypatch) -> bool:
    """With the forms of this device, or with those that gradients take on a GPU, in small tiles."""
    if request.param.startswith("gpu"):
        for module in (delta, mamba2, window):
            monkeypatch.setattr(module, "on_cpu", lambda: False)
        for module in (chunks, window):
            monkeypatch.setattr(module, "tiles", lambda: Tiles(8, 8))
    return "checkpointed" in request.param


@pytest.mark.parametrize("variant, loss, case, window, sinks, expected", CASES)
def test_loss_and_gradients(
    tmp_path, monkeypatch, variant, loss, case, window, sinks, expected, checkpoint
):
    convert(None, GOLDEN / variant / "merged", tmp_path / "model")
    model, _ = load_model(tmp_path / "model", dtype="float32")
    golden = mx.load(str(GOLDEN / variant / "train.safetensors"))
    prefix = "kl_sinks.train" if case == "kl_sinks" else "train"
    tokens, labels = (golden[f"{prefix}.{name}"] for name in ("input_ids", "labels"))
    monkeypatch.setattr(losses, "ROWS", 7)  # several blocks, the last one ragged
    parameters = trainable(model)

    keep = loss == "distill"
    teacher = teach(model, tokens, keep)

    def objective(parameters):
        install(model, parameters)
        student = study(model, tokens, window, sinks, keep, checkpoint)
        value = getattr(losses, loss)(model, teacher, student, labels, window + sinks)
        return value, student.hidden

    (value, hidden), gradients = mx.value_and_grad(objective)(parameters)
    for name, states in (("teacher", teacher.hidden), ("student", hidden)):
        difference = head(model, states) - golden[f"{prefix}.{name}_logits"]
        assert mx.abs(difference).max() < 1e-3
    assert value.item() == pytest.approx(expected, rel=1e-5)
    theirs = {
        name.removeprefix(f"{case}.grad."): g
        for name, g in golden.items()
        if name.startswith(f"{case}.grad.")
    }
    ours = {published_name(name): g for name, g in gradients.items()}
    assert theirs and set(theirs) == set(ours)
    for name, g in theirs.items():
        difference = mx.linalg.norm(ours[name].reshape(g.shape) - g)
        # 1e-6 is what float32 leaves of a loss of about 5.
        assert difference < 1e-4 * mx.linalg.norm(g) + 1e-6, name


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_logits_of_more_rows_take_no_more_memory(loss, apart):
    """Of one sequence, or of many."""
    words = 5000
    model = llama.Model(llama.ModelArgs("llama", 8, 1, 8, 1, rms_norm_eps=1e-5, vocab_size=words))
    mx.eval(model.parameters())

    def peak(blocks: int) -> int:
        shape = (blocks, losses.ROWS) if apart else (1, blocks * losses.ROWS)
        labels = mx.zeros(shape, dtype=mx.int32)
        x = mx.random.normal((*labels.shape, 8))
        mx.eval(x, labels)

        def value(x):
            return losses.LOSSES[loss](model, Stream(0.5 * x, []), Stream(x, []), labels, 0)

        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(value)(x))
        return mx.get_peak_memory() - held

    assert peak(16) < 1.2 * peak(4)
