"""Training with a router: it begins by changing nothing, and learns fast enough to matter."""

import json

import mlx.core as mx
import pytest
from checkpoints import GDN
from test_training import SETTINGS, base_model, place, sequences, train  # noqa: F401

import ahn_mlx
from ahn_mlx.memory import MEMORIES
from ahn_mlx.train import layerwise, loop
from ahn_mlx.train.streams import silenced, study

TOKENS = mx.arange(100)[None] * 7 % 256


def test_a_memory_that_had_none_begins_as_it_was(place, tmp_path):  # noqa: F811
    """In half its loudness at first, its outputs are twice as large; and on from there it stays."""
    release, on = GDN / "ahn_only", tmp_path / "on"
    done = train(place, on, "--steps", 0, "--ahn", release, "--router")
    assert done.returncode == 0, done.stderr
    assert json.loads((on / "config.json").read_text())["use_ahn_router"] is True
    without, _ = ahn_mlx.load(place / "base", ahn=release, dtype="float32")
    routed, _ = ahn_mlx.load(place / "base", ahn=on, dtype="float32")
    assert not without.ahn.router and routed.ahn.router
    assert mx.allclose(routed(TOKENS), without(TOKENS), atol=1e-5)
    with silenced(without):
        assert not mx.allclose(routed(TOKENS), without(TOKENS), atol=1e-2)

    again = tmp_path / "again"
    done = train(place, again, "--steps", 1, "--ahn", on)  # not asked for again
    assert done.returncode == 0, done.stderr
    trained = mx.load(str(again / "model.safetensors"))
    alphas = [x for n, x in trained.items() if n.endswith("ahn_router.alpha")]
    assert alphas and any(x.any().item() for x in alphas)


def test_a_gain_by_window_begins_as_none_and_is_learned(place, tmp_path):  # noqa: F811
    """By itself, of a memory that has a router already, and on from there unasked."""
    first, gains, again = (tmp_path / name for name in ("first", "gains", "again"))
    for out, options in (
        (first, ("--steps", 0, "--ahn", GDN / "ahn_only", "--router")),
        (gains, ("--steps", 0, "--ahn", first, "--window-gain")),
        (again, ("--steps", 1, "--ahn", gains)),
    ):
        done = train(place, out, *options)
        assert done.returncode == 0, done.stderr
    without, _ = ahn_mlx.load(place / "base", ahn=first, dtype="float32")
    begun, _ = ahn_mlx.load(place / "base", ahn=gains, dtype="float32")
    assert not without.ahn.window_gain and begun.ahn.window_gain
    assert mx.array_equal(begun(TOKENS), without(TOKENS))
    trained = mx.load(str(again / "model.safetensors"))
    gammas = [x for n, x in trained.items() if n.endswith("ahn_router.gamma")]
    assert gammas and any(x.any().item() for x in gammas)
    done = train(place, tmp_path / "both", "--steps", 0, "--ahn", GDN / "ahn_only", "--window-gain")
    assert done.returncode == 0, done.stderr
    both, _ = ahn_mlx.load(place / "base", ahn=tmp_path / "both", dtype="float32")
    assert both.ahn.router and mx.allclose(both(TOKENS), begun(TOKENS), atol=1e-5)


def test_a_router_that_its_file_should_have_is_not_made_up(place, tmp_path):  # noqa: F811
    on = tmp_path / "on"
    done = train(place, on, "--steps", 0, "--ahn", GDN / "ahn_only", "--router")
    assert done.returncode == 0, done.stderr
    weights = mx.load(str(on / "model.safetensors"))
    weights.pop("model.layers.1.ahn_router.alpha")
    mx.save_safetensors(str(on / "model.safetensors"), weights)
    with pytest.raises(ahn_mlx.AHNError, match=r"layers\.1\.ahn_router\.alpha does not fit"):
        ahn_mlx.load(place / "base", ahn=on)
    mx.save_safetensors(
        str(on / "model.safetensors"), {n: x for n, x in weights.items() if "router" not in n}
    )
    with pytest.raises(ahn_mlx.AHNError, match=r"ahn_router\.alpha does not fit"):
        ahn_mlx.load(place / "base", ahn=on)


@pytest.mark.parametrize("memory", MEMORIES)
def test_layers_are_fitted_as_without_one(place, memory):  # noqa: F811
    found, explained = [], []
    for router in (False, True):
        model, tokenizer = base_model(place, memory, router)
        explained.append(layerwise.fit(model, sequences(place, tokenizer), 2, 12, 4))
        found.append(study(model, TOKENS, 12, 4, inference=True).hidden)
    assert explained[0] == pytest.approx(explained[1], rel=1e-5)
    assert mx.allclose(*found, atol=1e-4)


def test_it_learns_at_a_rate_of_its_own(place):  # noqa: F811
    """Its numbers have to come as far as ones; those of gates as hundredths."""
    model, tokenizer = base_model(place, router=True, window_gain=True)
    settings = loop.Settings(**{**vars(SETTINGS), "lr": 1e-3, "warmup": 1})
    trainer = loop.Trainer(model, sequences(place, tokenizer), settings)
    before = dict(trainer.parameters)
    after = trainer.updated(loop._tree({n: mx.full(x.shape, 7.0) for n, x in before.items()}))
    for name in before:
        if ".router." in name:
            assert mx.allclose(before[name] - after[name], mx.array(0.2), rtol=1e-2), name
    assert sum(".router." in name for name in before) == 3 * len(model.layers)
