"""Quantized bases, stretched positions and pickles: the converted model is the one given."""

import json
import shutil
import sys
import zipfile
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from checkpoints import (
    GDN,
    IDS,
    Evil,
    byte_tokenizer,
    close,
    copies,
    edit_config,
    edit_tensors,
    logits,
    pickled,
    read_json,
    same,
)
from mlx_lm.convert import convert as mlx_lm_convert

from ahn_mlx import AHNError
from ahn_mlx.checkpoints import pickles
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import Source, read_tensors
from ahn_mlx.checkpoints.safetensors import TensorInfo
from ahn_mlx.model.names import published_name

# --- quantized here, or by MLX before ---


@pytest.fixture
def parts(tmp_path):
    base, ahn, out = copies(tmp_path)
    shutil.copytree(byte_tokenizer(tmp_path / "tokenizer"), base, dirs_exist_ok=True)
    return base, ahn, out


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_as_mlx_lm_does(parts, tmp_path, bits):
    """The base's tensors bit for bit, the memory's as they were."""
    base, ahn, out = parts
    convert(base, ahn, out, q_bits=bits)
    mlx_lm_convert(str(base), str(tmp_path / "theirs"), quantize=True, q_bits=bits)
    ours, theirs = read_tensors(out), read_tensors(tmp_path / "theirs")
    memory = {k for k in ours if ".ahn." in k}
    assert same({k: x for k, x in ours.items() if k not in memory}, theirs)
    given = read_tensors(ahn)
    assert all(same({"": ours[k]}, {"": given[published_name(k)]}) for k in memory)
    settings = read_json(tmp_path / "theirs")["quantization"]
    assert read_json(out)["quantization"] == settings == {**settings, "bits": bits}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in ours.values())
    # And a base that is quantized already is taken as it is.
    convert(tmp_path / "theirs", ahn, tmp_path / "again")
    assert same(read_tensors(tmp_path / "again"), ours)
    assert mx.array_equal(logits(tmp_path / "again"), logits(out))
    with pytest.raises(AHNError, match="quantized already"):
        convert(tmp_path / "theirs", ahn, tmp_path / "third", q_bits=8)


def test_other_quantizations_of_mlx(parts, tmp_path):
    """Mixed bits, and scales that are not floats."""
    base, ahn, _ = parts
    for name, options in {
        "mixed": {"quant_predicate": "mixed_3_6"},
        "mxfp4": {"q_mode": "mxfp4"},
    }.items():
        mlx_lm_convert(str(base), str(tmp_path / name), quantize=True, **options)
        convert(tmp_path / name, ahn, tmp_path / f"{name}-ahn")
        theirs = read_tensors(tmp_path / name)
        ours = read_tensors(tmp_path / f"{name}-ahn")
        assert same({k: ours[k] for k in theirs}, theirs)
        assert mx.isfinite(logits(tmp_path / f"{name}-ahn")).all()


def test_quantized_tensors_that_do_not_fit(parts, tmp_path):
    base, ahn, out = parts
    mlx_lm_convert(str(base), str(tmp_path / "q"), quantize=True)
    whole = shutil.copytree(tmp_path / "q", tmp_path / "whole")
    for change, match in (
        ({"layers.0.mlp.up_proj.biases": None}, r"up_proj\.biases' of shape \[128, 1\] is missing"),
        ({"layers.0.mlp.up_proj.scales": mx.zeros((128, 0))}, "not quantized as MLX does it"),
        ({"layers.0.mlp.up_proj.scales": mx.zeros((64, 1))}, r"shape \[64, 1\]"),
        ({"layers.0.mlp.up_proj.weight": mx.zeros((128, 8))}, r"is F32, not one of U32"),
    ):
        shutil.rmtree(tmp_path / "q")
        shutil.copytree(whole, tmp_path / "q")
        edit_tensors(tmp_path / "q", **change)
        (tmp_path / "q/model.safetensors.index.json").unlink()
        with pytest.raises(AHNError, match=match):
            convert(tmp_path / "q", ahn, out)
        assert not out.parent.exists()


# --- rotary positions ---


def test_yarn(parts, tmp_path):
    """Within the window the model is mlx_lm's with the same rope scaling."""
    base, ahn, out = parts
    edit_config(ahn, sliding_window=64)
    convert(base, ahn, out, yarn=4)
    scaling = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512}
    config = read_json(out)
    assert config["rope_scaling"] == scaling and config["max_position_embeddings"] == 2048
    edit_config(base, rope_scaling=scaling)
    plain, _ = mlx_lm.utils.load_model(base)
    assert close(logits(out), plain(IDS)[0])
    convert(GDN / "base", ahn, tmp_path / "short")
    assert not close(logits(out), logits(tmp_path / "short"))
    with pytest.raises(AHNError, match="rope scaling already"):
        convert(base, ahn, tmp_path / "x", yarn=2)
    for factor, longest in ((1.25, 640), (1000, 512_000)):
        convert(GDN / "base", ahn, out, yarn=factor, force=True)
        assert read_json(out)["max_position_embeddings"] == longest
    for factor in (1, 0, -1, float("nan"), float("inf"), 1000.5):
        with pytest.raises(AHNError, match="--yarn must be above 1"):
            convert(GDN / "base", ahn, tmp_path / "x", yarn=factor)
    edit_config(base, rope_scaling=None, max_position_embeddings=None)
    with pytest.raises(AHNError, match="no max_position_embeddings"):
        convert(base, ahn, tmp_path / "x", yarn=2)


def test_rope_settings_of_transformers_5(parts, tmp_path):
    base, ahn, out = parts
    nested = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0}
    edit_config(base, rope_theta=None, rope_parameters=nested)
    edit_config(ahn, rope_theta=None)
    convert(base, ahn, out)
    edit_config(base, rope_theta=5e4, rope_parameters=None, rope_scaling=nested)
    convert(base, ahn, tmp_path / "flat")
    assert mx.array_equal(logits(out), logits(tmp_path / "flat"))
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "other")
    assert not close(logits(out), logits(tmp_path / "other"))


# --- pickles ---


def refuse_pickle(base, ahn, out, match):
    with pytest.raises(AHNError, match=match) as error:
        convert(base, ahn, out)
    assert "\n" not in str(error.value) and not out.parent.exists()


def test_pickles_that_are_none(parts, tmp_path):
    base, ahn, out = parts
    file = base / "pytorch_model.bin"
    (base / "model.safetensors").rename(file)
    refuse_pickle(base, ahn, out, "pytorch_model.bin: not a checkpoint of torch 1.6 or later")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(1 << 24))  # 16 MB in 16 kB
    refuse_pickle(base, ahn, out, "compressed entries")
    file.unlink()
    file.symlink_to("/etc/passwd")
    refuse_pickle(base, ahn, out, "a link out")
    file.unlink()
    index = base / "pytorch_model.bin.index.json"
    for bad in ("../x.bin", "x.safetensors", "a/b.bin", 3):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        refuse_pickle(base, ahn, out, "not the name of a bin file beside it")
    index.write_text("{}")
    refuse_pickle(base, ahn, out, "weight_map")


def test_pickle_without_torch(parts, tmp_path, monkeypatch):
    base, ahn, out = parts
    (base / "model.safetensors").unlink()
    pickled(base / "pytorch_model.bin", Evil(str(tmp_path / "trace")))
    monkeypatch.setitem(sys.modules, "torch", None)
    refuse_pickle(base, ahn, out, "reading it takes torch; .*pip install.* torch")
    assert not (tmp_path / "trace").exists()


class Strided:
    """What is looked at of torch's tensors, which are not installed everywhere."""

    def __init__(self, nbytes=8, layout="strided", device="cpu", dtype="torch.float16"):
        self.nbytes, self.layout, self.device = nbytes, layout, SimpleNamespace(type=device)
        self.dtype, self.shape = dtype, (2, nbytes // 4)

    def numel(self):
        return self.nbytes // 2

    def element_size(self):
        return 2


def test_what_torch_unpickles_is_judged(tmp_path, monkeypatch):
    file, asked = tmp_path / "pytorch_model.bin", []
    pickled(file, {})
    size, given = file.stat().st_size, [None]

    def load(path, **options):
        asked.append((path, options))
        if isinstance(given[0], Exception):
            raise given[0]
        return given[0]

    torch = SimpleNamespace(load=load, Tensor=Strided, strided="strided")
    monkeypatch.setitem(sys.modules, "torch", torch)
    for given[0] in ({}, {"a": Strided(size)}, {str(n): Strided(size) for n in range(4)}):
        assert pickles.load(file) == given[0]
    assert asked[0] == (file, {"map_location": "cpu", "weights_only": True, "mmap": True})
    for given[0], said in (
        ([Strided()], "not a dictionary of named tensors"),
        ({1: Strided()}, "not a dictionary of named tensors"),
        ({"a": Strided(), "b": 3}, "not a dictionary of named tensors"),
        ({"a": Strided(size + 1)}, "tensor 'a' is larger than the file, or sparse"),
        ({"a": Strided(), "b": Strided(layout="coo")}, "tensor 'b' is larger .* or sparse"),
        ({"a": Strided(device="meta")}, "tensor 'a' is larger than the file, or sparse"),
        ({str(n): Strided(size) for n in range(5)}, "its tensors are larger than the file"),
        (ValueError(), "nothing in it was run \\('ValueError'\\)"),
        (ValueError(" x" * 300 + "\nsecond"), "nothing in it was run \\('x( x)+ ?\\.\\.\\.\\)"),
        (ValueError("first\nsecond"), "nothing in it was run \\('first'\\)"),
    ):
        with pytest.raises(AHNError, match=f"pytorch_model.bin: .*{said}") as refused:
            pickles.load(file)
        assert len(str(refused.value)) < len(str(file)) + 250
    given[0] = {"a": Strided(), "b": Strided(16, dtype="torch.int8")}
    shutil.copy(GDN / "base/config.json", tmp_path)
    found = pickles.read_headers(tmp_path, pickles.find_files(tmp_path))
    assert found == {
        "a": Source("a", file, TensorInfo("F16", (2, 2), 0, 8)),
        "b": Source("b", file, TensorInfo("torch.int8", (2, 4), 0, 16)),
    }


def test_pickle_with_code_in_it(parts, tmp_path):
    pytest.importorskip("torch")
    base, ahn, out = parts
    (base / "model.safetensors").unlink()
    for value in (Evil(str(tmp_path / "trace")), {"a": Evil(str(tmp_path / "trace"))}):
        pickled(base / "pytorch_model.bin", value)
        refuse_pickle(base, ahn, out, "nothing in it was run")
        assert not (tmp_path / "trace").exists()
    for value in ({"a": 3}, [1], {}):
        pickled(base / "pytorch_model.bin", value)
        refuse_pickle(base, ahn, out, "not a dictionary|is missing")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("variant", ["merged", "merged_bf16"])
def test_pickle(variant, shards, tmp_path):
    """What torch saved is what its safetensors hold, bit for bit."""
    torch = pytest.importorskip("torch")
    source = GDN / variant
    tensors = {}
    for name, x in read_tensors(source).items():
        bits = torch.from_numpy(np.array(x.view(mx.uint8)))
        tensors[name] = bits.view(getattr(torch, str(x.dtype).split(".")[-1])).reshape(x.shape)
    path = tmp_path / "in"
    path.mkdir()
    shutil.copy(source / "config.json", path)
    files = [f"pytorch_model-{i}-of-{shards}.bin" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        torch.save({n: tensors[n] for n, f in weight_map.items() if f == file}, path / file)
    if shards == 1:
        (path / files[0]).rename(path / "pytorch_model.bin")
    else:
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(None, path, tmp_path / "out")
    convert(None, source, tmp_path / "same")
    for name in ("model.safetensors", "unused.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
