"""What loading makes of a directory: whose settings count, what keeps its dtype, what is
refused."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import GDN, GOLDEN, edit_config, edit_tensors, read_json
from mlx.utils import tree_flatten

import ahn_mlx
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.export import export_pytorch
from ahn_mlx.checkpoints.load import load_model, load_plain
from ahn_mlx.errors import AHNError
from ahn_mlx.hub import download
from ahn_mlx.hub.bases import base_of, load_base
from ahn_mlx.model.names import is_memory
from ahn_mlx.reading.text import read_file

MERGED = next(path for path in sorted(GOLDEN.glob("*/merged")))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("load") / "model"
    convert(GDN / "base", GDN / "ahn_only", out)
    return out


@pytest.fixture
def copied(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "model")


def test_settings_are_the_checkpoints_or_those_that_are_asked_for(converted):
    for path in (converted, MERGED):
        model, config = load_model(path)
        window, sinks = model.ahn.window, model.ahn.sinks
        assert config["ahn"] == model.ahn.to_dict() and not model.training
        for asked in ({"window": 7}, {"sinks": 1}, {"window": 7, "sinks": 0}):
            model, config = load_model(path, **asked)
            found = {"window": model.ahn.window, "sinks": model.ahn.sinks}
            assert found == {"window": window, "sinks": sinks, **asked}
            assert config["ahn"] == model.ahn.to_dict()
            assert {layer.self_attn.config.window for layer in model.layers} == {found["window"]}
    with pytest.raises(AHNError, match="window must be a whole number"):
        load_model(converted, window=0)


def test_what_is_computed_in_float32_stays_so(converted):
    for dtype, wanted in (("bfloat16", mx.bfloat16), ("float16", mx.float16)):
        model, _ = load_model(converted, dtype=dtype)
        kept = {n: x.dtype for n, x in tree_flatten(model.parameters())}
        decay = {n for n in kept if n.endswith(("A_log", "dt_bias"))}
        assert decay and {kept[n] for n in decay} == {mx.float32}
        assert {x for n, x in kept.items() if n not in decay} == {wanted}
    with pytest.raises(AHNError, match=r"dtype must be one of .*, not 'int8'"):
        load_model(converted, dtype="int8")


def test_packed_weights_stay_packed_in_any_dtype(tmp_path):
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "q", q_bits=4)
    before = load_model(tmp_path / "q", dtype="float32")[0](mx.arange(20)[None])
    model, _ = load_model(tmp_path / "q", dtype="bfloat16")
    kinds = {n: x.dtype for n, x in tree_flatten(model.parameters())}
    packed = {n for n in kinds if f"{n.removesuffix('weight')}scales" in kinds and "weight" in n}
    assert packed and {kinds[n] for n in packed} == {mx.uint32}
    assert mx.allclose(model(mx.arange(20)[None]), before, atol=0.1 * mx.abs(before).max().item())


def test_a_part_of_a_model_is_none(converted):
    with pytest.raises(AHNError, match="holds only AHN tensors; convert it with its base"):
        load_model(GDN / "ahn_only")
    for whole in (converted, MERGED):
        with pytest.raises(AHNError, match=r"holds AHN tensors itself .*; give a plain base"):
            load_plain(whole)
    with pytest.raises(AHNError, match="has no AHN fields"):
        load_model(GDN / "base")


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ({"num_hidden_layers": 900}, "num_hidden_layers is 900, but there are"),
        ({"hidden_size": 16_000}, "describes a model of .* its files hold"),
        ({"vocab_size": 160_000}, "describes a model of .* its files hold"),
    ],
)
def test_what_a_config_claims_is_not_made(copied, tmp_path, claims, said):
    plain = shutil.copytree(GDN / "base", tmp_path / "plain")
    mx.reset_peak_memory()
    before = mx.get_peak_memory()
    for load, path in ((load_model, copied), (load_plain, plain)):
        edit_config(path, **claims)
        with pytest.raises(AHNError, match=said):
            load(path)
    assert mx.get_peak_memory() - before < 64 << 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["norm.weight", "ahn.o_proj.weight"])
def test_numbers_that_are_none_are_named(copied, name, value):
    tensors = mx.load(str(copied / "model.safetensors"))
    whole = next(n for n in tensors if n.endswith(name))
    edit_tensors(copied, **{whole: mx.full(tensors[whole].shape, value)})
    with pytest.raises(AHNError, match=rf"tensor {whole} holds NaN or infinity"):
        load_model(copied)


@pytest.mark.parametrize(
    ("mode", "group", "bits"), [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4)]
)
def test_packed_weights_are_as_their_config_says(tmp_path, mode, group, bits):
    plain, config = load_plain(GDN / "base")
    nn.quantize(plain, group, bits, mode=mode)
    (tmp_path / "q").mkdir()
    mx.save_safetensors(
        str(tmp_path / "q/model.safetensors"), dict(tree_flatten(plain.parameters()))
    )
    settings = {"group_size": group, "bits": bits, "mode": mode}
    text = {**read_json(GDN / "base"), "quantization": settings}
    (tmp_path / "q/config.json").write_text(json.dumps(text))
    loaded, _ = load_plain(tmp_path / "q")
    ids = mx.arange(20)[None]
    assert mx.array_equal(loaded(ids), plain(ids))
    edit_config(tmp_path / "q", **{**read_json(GDN / "base"), "quantization": settings})
    shutil.copy(GDN / "base/model.safetensors", tmp_path / "q/model.safetensors")
    with pytest.raises(AHNError, match="says it is quantized, its tensors are not"):
        load_plain(tmp_path / "q")


@pytest.mark.parametrize(
    ("size", "bits"), [(0, 4), (1, 4), (3, 1), (64, 0), (64, 7), (-64, 4), (256, 4), (64.0, 4)]
)
def test_groups_that_would_end_the_process_are_refused(tmp_path, size, bits):
    """MLX divides by them. They stand in the settings, of all or of a layer."""
    path = tmp_path / "q"
    convert(GDN / "base", GDN / "ahn_only", path, q_bits=4)
    whole = read_json(path)["quantization"]
    asked = {"group_size": size, "bits": bits}
    for settings in ({**whole, **asked}, {**whole, "model.embed_tokens": asked}):
        edit_config(path, quantization=settings)
        with pytest.raises(AHNError, match=r"not quantized as MLX does it|under quantization is"):
            load_model(path)


@pytest.mark.parametrize("groups", [128, 64, 21, 32])
def test_groups_that_follow_from_shapes_are_those_of_mlx(tmp_path, groups):
    """Of 64 columns: none, one or three of them, or two."""
    path = tmp_path / "q"
    convert(GDN / "base", GDN / "ahn_only", path, q_bits=4)
    (path / "model.safetensors.index.json").unlink()
    tensors = mx.load(str(path / "model.safetensors"))
    mx.eval(tensors)
    name = next(n for n in tensors if n.endswith("q_proj.scales")).removesuffix(".scales")
    wrong = mx.zeros((tensors[f"{name}.scales"].shape[0], groups))
    edit_tensors(path, **{f"{name}.scales": wrong, f"{name}.biases": wrong})
    with pytest.raises(
        AHNError, match=f"not quantized as MLX does it .groups of {64 // groups} in"
    ):
        load_model(path)


def test_tensors_must_be_those_of_the_model(copied):
    (copied / "model.safetensors.index.json").unlink()
    tensors = mx.load(str(copied / "model.safetensors"))
    mx.eval(tensors)
    memory = next(n for n in tensors if is_memory(n) and n.endswith("o_proj.weight"))
    norm = "model.norm.weight"
    for change, said in (
        ({memory: None}, r"model: tensor .*o_proj\.weight.* is missing"),
        ({norm: None}, r"tensor 'model\.norm\.weight' of shape \[64\] is missing"),
        ({norm: mx.zeros((65,))}, r"has shape \[65\], this qwen2 model with gated_deltanet memory"),
        ({norm: mx.zeros((64,), dtype=mx.int32)}, "is I32, not one of"),
        ({"model.layers.0.more": mx.zeros((2,))}, "unexpected tensor"),
    ):
        edit_tensors(copied, **change)
        with pytest.raises(AHNError, match=said):
            load_model(copied)
        mx.save_safetensors(str(copied / "model.safetensors"), tensors)


# Of the library's functions; the commands look at a name before they are called.
READ = {
    "load": ahn_mlx.load,
    "load, the memory": lambda name: ahn_mlx.load(MERGED, ahn=name),
    "load_model": load_model,
    "load_plain": load_plain,
    "load_base": load_base,
    "base_of": lambda name: base_of(Path(name)),
    "find": download.find,
    "remove": download.remove,
    "convert": lambda name: convert(None, Path(name), Path("out")),
    "convert, the base": lambda name: convert(Path(name), GDN / "ahn_only", Path("out")),
    "convert, to": lambda name: convert(None, MERGED, Path(name)),
    "export_pytorch": lambda name: export_pytorch(Path(name), Path("out")),
    "export_pytorch, to": lambda name: export_pytorch(MERGED, Path(name)),
    "upload": lambda name: download.upload(Path(name), "a/b"),
    "Session.load": lambda name: ahn_mlx.Session.load(name, load_model(MERGED)[0], None),
    "read_file": read_file,
}
NAMES = ["a" * 5000, "/" + "b" * 300, "a\0b", "c" * 300 + ".gguf", "d/" * 3000, "e" * 300 + "/f"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:9]))
@pytest.mark.parametrize("what", READ)
def test_what_no_file_can_be_called_is_refused(what, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AHNError):
        READ[what](name)
    assert list(tmp_path.iterdir()) == []
