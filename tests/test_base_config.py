"""However a base's config is written, every door sees the same model: training, comparing,
direct loading, conversion, the estimate. What cannot run is refused by name at all of them."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm.utils
import pytest
from checkpoints import (
    BOM,
    FAMILIES,
    GOLDEN,
    IDS,
    TRAINING,
    edit_config,
    edit_tensors,
    make_base,
    memory_of,
    read_json,
)
from mlx_lm.convert import convert as mlx_lm_convert

from ahn_mlx import AHNError, load_model
from ahn_mlx.checkpoints import baseconfig
from ahn_mlx.checkpoints.baseconfig import check_config, check_quantization, normalise
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_tensors
from ahn_mlx.checkpoints.formats import describe
from ahn_mlx.checkpoints.load import load_plain
from ahn_mlx.cli.estimate import config_of
from ahn_mlx.hub import zoo
from ahn_mlx.measure.cost import shape_of
from ahn_mlx.train.output import load_base


def expected(path: Path, **config) -> mx.array:
    """mlx-lm's own model of these weights with a config that it understands."""
    config = {**read_json(path), **config}
    module = FAMILIES[config["model_type"]]
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = mx.load(str(path / "model.safetensors"))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    logits = model(IDS)[0]
    mx.eval(logits)  # before a file is replaced
    return logits


def estimate(base: Path) -> dict[str, object]:
    """The base's part of its sizes."""
    options = {"name": str(base), "window": None, "sinks": None, "memory": None}
    shape = asdict(shape_of(config_of(options)))
    return {k: v for k, v in shape.items() if k not in ("ahn", "gates", "readout")}


def through_all_doors(base: Path, tmp_path: Path) -> dict[str, mx.array]:
    """Logits of the base as each command sees it, within the window."""
    memory = memory_of(base, tmp_path / "memory")
    convert(base, memory, tmp_path / "out")
    models = {
        "train": load_base({**TRAINING, "base": str(base)})[0],
        "compare": zoo.load(base, ahn=memory, dtype="float32")[0],
        "plain": load_plain(base)[0],
        "convert": load_model(tmp_path / "out", dtype="float32")[0],
    }
    return {door: model(IDS)[0] for door, model in models.items()}


# --- one model, many spellings ---

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
OLD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WHOLE = {"original_max_position_embeddings": 512}  # as max_position_embeddings
TWO = ["full_attention"] * 2

# Fields of config.json (None removes one), and the rope_scaling that they mean.
SPELLINGS = {
    "flat": ({"rope_theta": 5e5}, None),
    "nested": ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}}, None),
    "nested, typed": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}},
        None,
    ),
    "both, alike": ({"rope_theta": 500000, "rope_parameters": {"rope_theta": 5e5}}, None),
    "by layer": (
        {
            **{"rope_theta": None, "layer_types": TWO},
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
        None,
    ),
    "by layer, alike": (
        {
            "rope_theta": None,
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, **LINEAR},
                "sliding_attention": {"rope_theta": 500000, "type": "linear", "factor": 2},
            },
        },
        LINEAR,
    ),
    "yarn, old": ({"rope_scaling": OLD}, YARN),
    "yarn, new": ({"rope_scaling": YARN}, YARN),
    "yarn, nested": ({"rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 5e5}}, YARN),
    "yarn, nested, null beside": (
        {"rope_theta": None, "rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 5e5}},
        YARN,
    ),
    "yarn, added by hand": (
        {
            **{"rope_theta": None, "rope_scaling": OLD},
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        },
        YARN,
    ),
    "yarn, its positions unsaid": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {**YARN, **WHOLE},
    ),
    "llama3, its positions unsaid": ({"rope_scaling": LLAMA3}, {**LLAMA3, **WHOLE}),
    "its positions beside": (
        {
            **{"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings": 128,
        },
        YARN,
    ),
    "many-dimensional, of a model for pictures": (
        {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}},
        None,
    ),
    "no tie": ({"tie_word_embeddings": None}, None),
    "dtype": ({"torch_dtype": None, "dtype": "float32"}, None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "family", [f if f == "qwen2" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_every_door_sees_the_same_base(family, spelling, tmp_path):
    base = make_base(tmp_path / "base", family)
    fields, scaling = SPELLINGS[spelling]
    logits = expected(base, rope_scaling=scaling)
    other = expected(base, rope_theta=1e4)
    shape = estimate(base)
    edit_config(base, **fields)
    if spelling == "flat":
        text = (base / "config.json").read_bytes()
        (base / "config.json").write_bytes(BOM + text)
    seen = through_all_doors(base, tmp_path)
    for door, x in seen.items():
        assert mx.abs(x - logits).max().item() < 1e-3, door
    assert mx.abs(other - logits).max().item() > 0.1  # positions do matter here
    assert estimate(base) == estimate(tmp_path / "out") == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_theta_that_nobody_states_is_that_of_transformers(family, tmp_path):
    base = make_base(tmp_path / "base", family)
    logits = expected(base, rope_theta=1e4)
    edit_config(base, rope_theta=None)
    for door, x in through_all_doors(base, tmp_path).items():
        assert mx.abs(x - logits).max().item() < 1e-3, door


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_kept(family, stated, tmp_path, capsys):
    base = make_base(tmp_path / "base", family, tie_word_embeddings=False)
    logits = expected(base)
    edit_config(base, tie_word_embeddings=stated)
    for door, x in through_all_doors(base, tmp_path).items():
        assert mx.abs(x - logits).max().item() < 1e-3, door
    said = capsys.readouterr().err
    assert ("differ; the head is kept" in said) == (stated is True)
    assert not estimate(base)["tied"] and not estimate(tmp_path / "out")["tied"]


def test_a_head_of_its_own_that_is_missing_is_not_made_of_the_embedding(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    for stated, tied in ((None, True), (True, True), (False, False)):
        edit_config(base, tie_word_embeddings=stated)
        assert describe(base)[0]["tie_word_embeddings"] is tied
    with pytest.raises(AHNError, match=r"lm_head.weight.* is missing"):
        load_plain(base)


def test_a_head_that_is_a_copy_costs_nothing(tmp_path, capsys):
    base = make_base(tmp_path / "base", "llama")
    logits = expected(base)
    embedding = read_tensors(base)["model.embed_tokens.weight"]
    mx.eval(embedding)
    edit_tensors(base, **{"lm_head.weight": embedding})
    for x in through_all_doors(base, tmp_path).values():
        assert mx.abs(x - logits).max().item() < 1e-3
    assert estimate(base)["tied"] and "head" not in capsys.readouterr().err


def test_a_quantized_head_that_is_a_copy(tmp_path):
    base = make_base(tmp_path / "base")
    mlx_lm_convert(str(base), str(tmp_path / "q"), quantize=True, q_group_size=32)
    logits = load_plain(tmp_path / "q")[0](IDS)[0]
    mx.eval(logits)
    tensors = mx.load(str(tmp_path / "q/model.safetensors"))
    parts = ("weight", "scales", "biases")
    head = {f"lm_head.{part}": tensors[f"model.embed_tokens.{part}"] for part in parts}
    mx.eval(tensors)
    (tmp_path / "q/model.safetensors.index.json").unlink()
    mx.save_safetensors(str(tmp_path / "q/model.safetensors"), {**tensors, **head})
    assert mx.array_equal(load_plain(tmp_path / "q")[0](IDS)[0], logits)
    # Of an embedding that is not quantized it is none.
    mx.save_safetensors(str(tmp_path / "q/model.safetensors"), {**read_tensors(base), **head})
    assert describe(tmp_path / "q")[0]["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_share_nothing_need_not_be_counted(family, tmp_path):
    base = make_base(tmp_path / "base", family, num_key_value_heads=2)
    logits = expected(base)
    edit_config(base, num_key_value_heads=None)
    assert mx.abs(load_plain(base)[0](IDS)[0] - logits).max().item() < 1e-3


def test_config_alone_is_read_as_transformers_does(tmp_path):
    """Of a repository whose weights have not been downloaded."""
    base = make_base(tmp_path / "base", "qwen3")
    (base / "model.safetensors").unlink()
    edit_config(base, tie_word_embeddings=None, rope_theta=None)
    assert not estimate(base)["tied"]


# --- bases in other formats ---


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_base(family, tmp_path):
    base = make_base(tmp_path / "base", family, tie_word_embeddings=False)
    mlx_lm_convert(str(base), str(tmp_path / "q"), quantize=True, q_group_size=32)
    logits = mlx_lm.utils.load_model(tmp_path / "q")[0](IDS)[0]
    edit_config(tmp_path / "q", tie_word_embeddings=None, rope_theta=None)
    edit_config(tmp_path / "q", rope_parameters={"rope_theta": 5e5})
    for door, x in through_all_doors(tmp_path / "q", tmp_path).items():
        assert mx.abs(x - logits).max().item() < 1e-3, door
    # The memory is not quantized, and its config does not say so.
    assert "quantization" not in read_json(tmp_path / "memory")


@pytest.mark.parametrize("variant", ["qwen2-gdn", "qwen3-gdn"])
def test_gguf_base(variant, tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import to_gguf

    base, memory = GOLDEN / variant / "base", GOLDEN / variant / "ahn_only"
    file = to_gguf(base, tmp_path / "base.gguf", "F32")
    model, config = load_plain(file)
    logits = expected(base)
    assert config["rope_theta"] == read_json(base)["rope_theta"]
    assert mx.abs(model(IDS)[0] - logits).max().item() < 1e-3
    convert(file, memory, tmp_path / "out")
    ids = IDS[:, :16]  # its window
    assert mx.abs(load_model(tmp_path / "out")[0](ids) - model(ids)).max().item() < 1e-3
    assert estimate(file) == estimate(base)


def test_pickled_base(tmp_path):
    torch = pytest.importorskip("torch")
    base = make_base(tmp_path / "base", "llama")
    logits = expected(base)
    tensors = {k: torch.tensor(x.tolist()) for k, x in read_tensors(base).items()}
    torch.save(tensors, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    for door, x in through_all_doors(base, tmp_path).items():
        assert mx.abs(x - logits).max().item() < 1e-3, door


# --- what cannot run ---

SLIDING = ["full_attention", "sliding_attention"]
QWEN = {"use_sliding_window": True, "sliding_window": 32}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}

REFUSED = {
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*numbers"),
    "dynamic, nested": (
        {
            **{"rope_theta": None, "rope_scaling": None},
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0},
        },
        "'dynamic'.*numbers",
    ),
    "a rope type of tomorrow": ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, "spiral"),
    "a rope type that is no name": ({"rope_scaling": {"rope_type": [1], "factor": 2}}, r"\[1\]"),
    "a factor without a type": ({"rope_scaling": {"factor": 2.0}}, "no rope_type"),
    "a factor below zero": (
        {"rope_scaling": {"rope_type": "linear", "factor": -2}},
        "factor of RoPE.*-2",
    ),
    "a factor that is a text": ({"rope_scaling": {**YARN, "factor": "4"}}, "factor of RoPE.*'4'"),
    "yarn without a factor": ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    "two rope types": ({"rope_scaling": {**YARN, "type": "linear"}}, "'yarn' and 'linear'"),
    "two thetas": ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is stated twice"),
    "theta that is no number": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": "5e5"}},
        "rope_theta must be a positive number",
    ),
    "layers that differ": (
        {
            **{"layer_types": SLIDING, "rope_theta": None},
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5},
                "sliding_attention": {"rope_theta": 1e4},
            },
        },
        "'full_attention' and 'sliding_attention'",
    ),
    "yarn, louder": ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor 1.0"),
    "yarn, not truncated": ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
    "half of each head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "half of each head, nested": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "layers that slide": (
        {**QWEN, "max_window_layers": 1, "model_type": "qwen2"},
        "use_sliding_window",
    ),
    "layers that slide, by type": ({**QWEN, "layer_types": SLIDING}, "layer_types"),
    "layers of another kind": (
        {"layer_types": ["full_attention", "linear_attention"]},
        "layer_types",
    ),
    "fewer types than layers": ({"layer_types": ["full_attention"]}, "layer_types"),
    "end tokens that are none": ({"eos_token_id": [1.5]}, "eos_token_id.*1.5"),
}


def doors(base: Path, memory: Path, out: Path) -> dict[str, object]:
    options = {"name": str(base), "window": None, "sinks": None, "memory": None}
    return {
        "train": lambda: load_base({**TRAINING, "base": str(base)}),
        "compare": lambda: zoo.load(base, ahn=memory),
        "convert": lambda: convert(base, memory, out),
        "estimate": lambda: shape_of(config_of(options)),
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_is_refused_at_every_door(kind, tmp_path):
    family = "qwen2"
    base = make_base(tmp_path / "base", family)
    memory, out = memory_of(base, tmp_path / "memory"), tmp_path / "out"
    fields, match = REFUSED[kind]
    edit_config(base, **fields)
    for door, enter in doors(base, memory, out).items():
        with pytest.raises(AHNError, match=match) as error:
            enter()
        assert str(base) in str(error.value) or door == "estimate", door
    assert not out.exists()


def test_what_only_one_family_passes_over(tmp_path):
    for family, fields in (
        ("qwen3", {"attention_bias": True}),
        ("qwen2", {"head_dim": 16}),
    ):
        base = make_base(tmp_path / family, family)
        edit_config(base, **fields)
        with pytest.raises(AHNError, match=next(iter(fields))):
            describe(base)
    # And what llama's class does know.
    base = make_base(tmp_path / "llama", "llama", attention_bias=True, mlp_bias=True)
    assert mx.abs(load_plain(base)[0](IDS)[0] - expected(base)).max().item() < 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
        {**QWEN, "max_window_layers": 2},
        {**QWEN, "sliding_window": None, "max_window_layers": 0},
        {"layer_types": TWO, **QWEN, "max_window_layers": 0},
        {"layer_types": SLIDING, "use_sliding_window": False},
    ],
)
def test_a_window_that_is_not_in_use(fields, tmp_path):
    """null is a value of its own: sliding_window is 4,096 where it is not stated."""
    base = make_base(tmp_path / "base")
    logits = expected(base)
    config = {**read_json(base), **fields}
    (base / "config.json").write_text(json.dumps(config))
    assert mx.abs(load_plain(base)[0](IDS)[0] - logits).max().item() < 1e-3


def judged(**fields) -> dict[str, object]:
    """The normal form of a plain model's config with other fields; None removes one."""
    config = {**read_json(GOLDEN / "qwen2-gdn/base"), "max_window_layers": None, **fields}
    return normalise(Path("config.json"), {k: v for k, v in config.items() if v is not None})


# Of YaRN by 4, mlx-lm's own factor is 0.1 ln 4 + 1 = 1.13863, and 1 where nothing is stretched.
PLAIN = {
    "as wide as heads are": {"head_dim": 16},
    "each head whole": {"partial_rotary_factor": 1.0},
    "swish": {"hidden_act": "swish"},
    "the largest factor": {"rope_scaling": {**LINEAR, "factor": 1e6}},
    "a small factor": {"rope_scaling": {**YARN, "factor": 1.5, "attention_factor": 1.0405}},
    "a factor below 1": {"rope_scaling": {**YARN, "factor": 0.5, "attention_factor": 1.0}},
    "a window that llama passes over": {"model_type": "llama", **QWEN, "max_window_layers": 0},
    "full attention of llama": {"model_type": "llama", "layer_types": ["full_attention"] * 3},
    "a memory's window": {**QWEN, "max_window_layers": 0, "ahn": {"window": 32}},
    "the release's": {**QWEN, "max_window_layers": 0, "_ahn_implementation": "DeltaNet"},
    "28 layers before it": {**QWEN, "num_hidden_layers": 28},
}
OTHER = {
    "too large a factor": ({"rope_scaling": {**LINEAR, "factor": 1.01e6}}, "factor of RoPE"),
    "a bit louder": ({"rope_scaling": {**YARN, "attention_factor": 1.1403}}, "attention_factor"),
    "as if not stretched": (
        {"rope_scaling": {**YARN, "factor": 1.5, "attention_factor": 1.0}},
        "attention_factor",
    ),
    "loud in words": ({"rope_scaling": {**YARN, "attention_factor": "1.1386"}}, "attention_factor"),
    "layers of llama that slide": (
        {"model_type": "llama", "layer_types": [*SLIDING, "full_attention"]},
        "layer_types",
    ),
    "a layer after 28": ({**QWEN, "num_hidden_layers": 29}, "use_sliding_window"),
    "a window of 4,096, unsaid": (
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        "use_sliding_window",
    ),
    "layers before it in words": ({**QWEN, "max_window_layers": "3"}, "use_sliding_window"),
    "types in a word": ({"layer_types": "full_attention"}, "layer_types must be a list"),
    "rotary settings of one type": (
        {"layer_types": SLIDING, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters of .* differ",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_settings_that_change_nothing(name):
    assert judged(**PLAIN[name])["hidden_size"] == 64


@pytest.mark.parametrize("name", OTHER)
def test_settings_that_make_another_model(name):
    fields, match = OTHER[name]
    with pytest.raises(AHNError, match=match):
        judged(**fields)


LARGEST = {
    **{"hidden_size": 2**20, "head_dim": 4096, "intermediate_size": 2**24, "vocab_size": 2**24},
    **{"num_hidden_layers": 1000, "num_attention_heads": 4096, "num_key_value_heads": 4096},
    **{"max_position_embeddings": 2**40, "rms_norm_eps": 1.0, "rope_theta": 1e15},
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_number_of_each_setting(name):
    most = LARGEST[name]
    for good in (1, most):
        check_config(Path("config.json"), {"model_type": "llama", name: good})
    for bad in (0, most + 1 if type(most) is int else 1.01 * most):
        with pytest.raises(AHNError, match=f"{name} must be a .*, not {bad}"):
            check_config(Path("config.json"), {"model_type": "llama", name: bad})


@pytest.mark.parametrize("name", ["bits", "group_size"])
def test_the_largest_number_of_a_quantization(name, tmp_path):
    sound = {"bits": 4, "group_size": 64}
    for good in (1, 1024):
        check_quantization(tmp_path, {"quantization": {**sound, name: good}})
    for bad in (0, 1025, True, 4.0):
        with pytest.raises(AHNError, match=f"config.json: {name} under quantization is {bad}"):
            check_quantization(tmp_path, {"quantization": {**sound, name: bad}})


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float32", "dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, None),
    ],
)
def test_a_dtype_is_stated_once(fields, dtype):
    found = judged(**fields)
    assert found.get("torch_dtype") == dtype and "dtype" not in found


@pytest.mark.parametrize(
    ("model_type", "runs", "fields", "own"),
    [
        ("mistral", "llama", {"sliding_window": 32}, False),
        ("qwen2", "qwen2", {"sliding_window": 32}, False),
        ("gemma3_text", "gemma3_text", {"sliding_window": 32}, True),
        ("gemma3_text", "gemma3_text", {"sliding_window": 32, "use_sliding_window": True}, True),
        ("gemma3_text", "gemma3_text", {"sliding_window": 32, "use_sliding_window": False}, False),
        ("gemma3_text", "gemma3_text", {"sliding_window": None}, False),
    ],
)
def test_what_runs_a_model_and_whether_it_slides(model_type, runs, fields, own):
    assert baseconfig.family({"model_type": model_type}) == runs
    assert baseconfig.has_own_window({"model_type": model_type, **fields}) is own


@pytest.mark.parametrize(
    "scaling",
    [None, LINEAR, {**YARN, "attention_factor": 1.1386}, {**LLAMA3, **WHOLE}, {**LONG, **WHOLE}],
    ids=lambda s: s["rope_type"] if s else "default",
)
def test_what_is_accepted_runs_past_the_window(scaling, tmp_path):
    """The compiled step gives what a whole prefill does."""
    base = make_base(tmp_path / "base", rope_scaling=scaling)
    model = load_base({**TRAINING, "window": 8, "base": str(base)}).model
    model.eval()
    whole = model(IDS)[0]
    cache = model.make_cache()
    parts = [model(IDS[:, :16], cache=cache)[0]]
    parts += [model(IDS[:, n : n + 1], cache=cache)[0] for n in range(16, 40)]
    assert mx.abs(mx.concatenate(parts) - whole).max().item() < 1e-3


# --- a memory and its base ---


def test_the_same_base_in_another_spelling(tmp_path):
    memory = memory_of(make_base(tmp_path / "old"), tmp_path / "memory")
    new = shutil.copytree(tmp_path / "old", tmp_path / "new")
    edit_config(new, rope_theta=None, rope_parameters={"rope_theta": 500000})
    convert(new, memory, tmp_path / "out")
    zoo.load(new, ahn=memory)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_theta": None},
    ],
)
def test_another_base_in_any_spelling(fields, tmp_path):
    """The tensors fit, so that only the config can tell."""
    memory = memory_of(make_base(tmp_path / "old"), tmp_path / "memory")
    new = shutil.copytree(tmp_path / "old", tmp_path / "new")
    edit_config(new, **fields)
    for door, enter in doors(new, memory, tmp_path / "out").items():
        if door in ("convert", "compare"):
            with pytest.raises(AHNError, match="another base, rope_theta"):
                enter()


def test_a_base_may_be_stretched_but_not_shrunk(tmp_path):
    base = make_base(tmp_path / "base")
    plain = memory_of(base, tmp_path / "plain")
    edit_config(base, rope_scaling={**YARN, **WHOLE})
    convert(base, plain, tmp_path / "a")
    stretched = memory_of(base, tmp_path / "stretched")
    edit_config(base, rope_scaling=None)
    with pytest.raises(AHNError, match="another base, rope_scaling"):
        convert(base, stretched, tmp_path / "b")
    convert(base, stretched, tmp_path / "b", yarn=4.0)
    assert load_model(tmp_path / "a")[1]["rope_scaling"] == {**YARN, **WHOLE}


def test_the_normal_form_is_one(tmp_path):
    """Read again, it says the same; the base's own words stay."""
    file = SimpleNamespace(name="x", parent=tmp_path)
    for family in FAMILIES:
        for fields, scaling in SPELLINGS.values():
            config = read_json(make_base(tmp_path / "base", family))
            shutil.rmtree(tmp_path / "base")
            config = {k: v for k, v in {**config, **fields, "note": 1}.items() if v is not None}
            once = normalise(file, config)
            assert normalise(file, once) == once
            assert once["rope_scaling"] == scaling and once["note"] == 1
            assert not {"dtype", "rope_parameters"} & set(once)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *[("model_type", "qwen3"), ("hidden_size", 65), ("num_hidden_layers", 3)],
        *[("num_attention_heads", 4), ("num_key_value_heads", 2), ("head_dim", 16)],
        *[("intermediate_size", 97), ("rope_theta", 1e4), ("rope_scaling", {"rope_type": "yarn"})],
    ],
)
def test_a_memory_is_of_the_base_that_it_was_trained_on(name, other, tmp_path):
    base = {**read_json(make_base(tmp_path / "base")), "head_dim": 32}
    check = baseconfig.check_same_base
    check(Path("b"), base, Path("a"), base)
    with pytest.raises(AHNError, match=rf"^a: was trained for another base, {name} is "):
        check(Path("b"), base, Path("a"), {**base, name: other})
    for one, two in (({name: None}, {}), ({}, {name: None})):  # one says nothing of it
        check(Path("b"), {**base, **one}, Path("a"), {**base, **two})


def test_a_file_by_itself_ends_where_it_says(tmp_path):
    """What lies beside a GGUF file is not its own."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    config = read_json(make_base(tmp_path / "base", eos_token_id=7))
    assert normalise(tmp_path / "a.gguf", config)["eos_token_id"] == [7]
    assert normalise(tmp_path / "config.json", config)["eos_token_id"] == [7, 9]
