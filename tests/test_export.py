"""What conversion does can be undone, and what it writes runs without us."""

import shutil
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import pytest
import yaml
from checkpoints import (
    GDN,
    GOLDEN,
    byte_tokenizer,
    edit_config,
    edit_tensors,
    read_json,
    same,
)

from ahn_mlx import AHNConfig, AHNError
from ahn_mlx.checkpoints import card, shards
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_tensors
from ahn_mlx.checkpoints.export import export_pytorch
from ahn_mlx.checkpoints.load import load, load_model

VARIANTS = sorted(p.name for p in GOLDEN.glob("qwen*"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A converted directory with a 4-bit base."""
    path = tmp_path_factory.mktemp("quantized")
    base = shutil.copytree(GDN / "base", path / "base")
    shutil.copytree(byte_tokenizer(path / "tokenizer"), base, dirs_exist_ok=True)
    convert(base, GDN / "ahn_only", path / "out", q_bits=4)
    return path / "out"


def is_pytorch(path):
    with open(path / "model.safetensors", "rb") as f:
        return b'"format":"pt"' in f.read(200)


# --- back to PyTorch ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant, tmp_path):
    """Every tensor and setting, those that MLX has no use for included."""
    source = GOLDEN / variant
    convert(None, source / "merged", tmp_path / "mlx")
    for layout, given in (("merged", "merged"), ("ahn-only", "ahn_only")):
        export_pytorch(tmp_path / "mlx", tmp_path / layout, layout)
        assert same(read_tensors(tmp_path / layout), read_tensors(source / given))
        assert read_json(tmp_path / layout) == read_json(source / given)
        files = {p.name for p in (source / given).iterdir()}
        assert {p.name for p in (tmp_path / layout).iterdir()} == files
        assert is_pytorch(tmp_path / layout)


def test_bfloat16_there_and_back(tmp_path):
    """Decays are widened on the way there."""
    convert(None, GDN / "merged_bf16", tmp_path / "mlx")
    assert read_tensors(tmp_path / "mlx")["model.layers.0.self_attn.ahn.A_log"].dtype == mx.float32
    export_pytorch(tmp_path / "mlx", tmp_path / "back")
    assert same(read_tensors(tmp_path / "back"), read_tensors(GDN / "merged_bf16"))


def test_float32_decays_beside_bfloat16(tmp_path):
    convert(None, GDN / "merged", tmp_path / "mlx", "bfloat16")
    export_pytorch(tmp_path / "mlx", tmp_path / "back", "ahn-only")
    back, given = read_tensors(tmp_path / "back"), read_tensors(GDN / "ahn_only")
    for name, x in given.items():
        keeps = name.endswith((".A_log", ".dt_bias", ".D"))
        assert same({name: back[name]}, {name: x if keeps else x.astype(mx.bfloat16)})


def test_what_the_release_has_no_word_for_becomes_what_it_has(tmp_path):
    """At the window that is exported a gain by window is a beta."""
    convert(None, GOLDEN / "qwen2-gdn-router/merged", tmp_path / "mlx")
    config = read_json(tmp_path / "mlx")
    edit_config(tmp_path / "mlx", ahn={**config["ahn"], "window": 21, "window_gain": True})
    weights = read_tensors(tmp_path / "mlx")
    for name in [name for name in weights if name.endswith("router.beta")]:
        gamma = mx.random.normal(weights[name].shape)
        weights[name.replace("beta", "gamma")] = gamma
    mx.save_safetensors(str(tmp_path / "mlx/model.safetensors"), weights)
    with_gain, _ = load_model(tmp_path / "mlx")
    ids = mx.arange(90)[None] * 7 % 64
    for layout in ("merged", "ahn-only"):
        export_pytorch(tmp_path / "mlx", tmp_path / layout, layout)
        given = read_tensors(GOLDEN / "qwen2-gdn-router/merged")
        assert read_tensors(tmp_path / layout).keys() <= given.keys()
        assert not AHNConfig.from_dict(read_json(tmp_path / layout)).window_gain
    back, _ = load_model(tmp_path / "merged")
    assert mx.allclose(back(ids), with_gain(ids), atol=1e-5)
    elsewhere, _ = load_model(tmp_path / "mlx", window=30)
    assert not mx.allclose(load_model(tmp_path / "merged", window=30)[0](ids), elsewhere(ids))


def test_twice_there_and_back(tmp_path):
    convert(None, GDN / "merged", tmp_path / "a")
    convert(None, tmp_path / "a", tmp_path / "b")
    export_pytorch(tmp_path / "b", tmp_path / "back")
    assert same(read_tensors(tmp_path / "back"), read_tensors(GDN / "merged"))


def test_release_is_split(tmp_path):
    export_pytorch(GDN / "merged_sharded", tmp_path / "out", "ahn-only")
    assert same(read_tensors(tmp_path / "out"), read_tensors(GDN / "ahn_only"))


def test_memory_of_a_quantized_base(quantized, tmp_path):
    export_pytorch(quantized, tmp_path / "out", "ahn-only")
    assert same(read_tensors(tmp_path / "out"), read_tensors(GDN / "ahn_only"))
    with pytest.raises(AHNError, match="base is quantized"):
        export_pytorch(quantized, tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()


def test_memory_that_the_release_has_not_made(tmp_path):
    """Settings that only training needs are filled in."""
    convert(None, GDN / "merged", tmp_path / "mlx")
    edit_config(tmp_path / "mlx", ahn_release=None)
    export_pytorch(tmp_path / "mlx", tmp_path / "out", "ahn-only")
    made, given = read_json(tmp_path / "out"), read_json(GDN / "ahn_only")
    assert {k for k in made.keys() | given.keys() if made.get(k) != given.get(k)} <= {
        "max_window_layers"
    }
    with pytest.raises(AHNError, match="not empty"):
        export_pytorch(tmp_path / "mlx", tmp_path / "out", "ahn-only")
    export_pytorch(tmp_path / "mlx", tmp_path / "out", "merged", force=True)
    assert read_json(tmp_path / "out")["save_ahn_only"] is False
    with pytest.raises(AHNError, match="no AHN fields"):
        export_pytorch(GDN / "base", tmp_path / "other")
    with pytest.raises(AHNError, match="layout must be one of ahn-only, merged, not 'both'"):
        export_pytorch(tmp_path / "mlx", tmp_path / "other", "both")


def test_what_is_exported_with_a_base_has_its_tokenizer_and_shards(tmp_path, monkeypatch):
    convert(None, GDN / "merged", tmp_path / "mlx")
    shutil.copytree(byte_tokenizer(tmp_path / "tokenizer"), tmp_path / "mlx", dirs_exist_ok=True)
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    for layout, whole in (("merged", True), ("ahn-only", False)):
        export_pytorch(tmp_path / "mlx", tmp_path / layout, layout)
        names = {path.name for path in (tmp_path / layout).iterdir()}
        assert ("tokenizer.json" in names) is whole
        assert ("model.safetensors.index.json" in names) is whole
        assert ("model.safetensors" in names) is not whole
    assert same(read_tensors(tmp_path / "merged"), read_tensors(GDN / "merged"))


def test_a_memory_that_lacks_a_part_or_has_one_of_no_use(tmp_path):
    convert(None, GDN / "merged_bf16", tmp_path / "mlx")
    edit_tensors(tmp_path / "mlx", **{"layers.0.self_attn.ahn.o_proj.weight": None})
    (tmp_path / "mlx/model.safetensors.index.json").unlink()
    export_pytorch(tmp_path / "mlx", tmp_path / "out", "ahn-only")
    found = read_tensors(tmp_path / "out")
    decays = [found[f"model.layers.{i}.ahn.fn.A_log"].dtype for i in (0, 1)]
    assert decays == [mx.float32, mx.bfloat16]
    edit_tensors(tmp_path / "mlx", **{"layers.1.self_attn.ahn.dt_bias": mx.zeros((4,), mx.int32)})
    with pytest.raises(AHNError, match=r"tensor 'model\.layers\.1\.self_attn\.ahn\..*' is I32"):
        export_pytorch(tmp_path / "mlx", tmp_path / "other", "ahn-only")


# --- in stock mlx_lm ---


def test_stock_mlx_lm_loads_it(quantized):
    """The same model as ours, in a process that has not heard of us."""
    program = (
        "import sys, mlx_lm, mlx.core as mx; "
        "model, tokenizer = mlx_lm.load(sys.argv[1], trust_remote_code=True); "
        "ids = mx.array([tokenizer.encode('Where does a window end, and a memory begin?')]); "
        "cache = model.make_cache(); "
        "print(type(cache[0]).__name__, mx.argmax(model(ids, cache=cache)[0], -1).tolist())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(quantized)]
    theirs = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    model, tokenizer = load(quantized)
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(quantized))
    ids = mx.array([tokenizer.encode("Where does a window end, and a memory begin?")])
    assert ids.shape[1] > 2 * 16
    ours = mx.argmax(model(ids, cache=model.make_cache())[0], -1).tolist()
    assert theirs.stdout == f"AHNCache {ours}\n"


def test_stock_mlx_lm_generates(quantized):
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(quantized)]
    command += ["--trust-remote-code", "--prompt", "A memory " * 5, "--max-tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Generation: 3 tokens" in done.stdout


# --- model cards ---


def test_card(quantized):
    text = (quantized / card.CARD).read_text()
    for part in (
        "library_name: mlx",
        "| base | base |",
        "| memory | ahn_only |",
        "| kind of memory | gated_deltanet |",
        "| window | 12 tokens and 4 sinks |",
        "| quantization | 4 bits in groups of 64; memory is not |",
        "--model out",
    ):
        assert part in text
    assert str(quantized.parent) not in text


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "apache-2.0"), "other"),
        (("mit", ""), "other"),
        (("", ""), "other"),
    ],
)
def test_a_card_names_a_licence_that_all_parts_have(licences, said, tmp_path):
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "out")
    commit = "0123" * 10
    origins = [
        card.Origin("base", "a/base", commit, licences[0]),
        card.Origin("memory", "mine", "", licences[1]),
    ]
    text = card.card(tmp_path / "out", "me/mine", origins)
    (tmp_path / "README.md").write_text(text)
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["base_model"]) == (said, ["a/base"])
    assert card.read_origins(tmp_path) == origins
    assert card.base_model(tmp_path) == "a/base"
    for part, licence in zip(("base", "memory"), licences, strict=True):
        assert f"| licence of the {part} | {licence or 'see there'} |" in text
    assert "| quantization | none |" in text
    assert f"| base | a/base at {commit} |" in text and "| memory | mine |" in text


def test_card_quotes_what_anyone_wrote(tmp_path):
    base = shutil.copytree(GDN / "base", tmp_path / "base")
    (base / card.CARD).write_text('---\nlicense: "a | b\\n# c"\n---\n')
    convert(base, GDN / "ahn_only", tmp_path / "out")
    assert "| licence of the base | a \\| b # c |" in (tmp_path / "out" / card.CARD).read_text()
    for broken in ("---\n[\n---\n", "---\nlicense: [1, 2]\n---\n", "no front matter", "\0\xff"):
        (base / card.CARD).write_text(broken)
        assert card.origin("base", base).licence == ""
    (base / card.CARD).unlink()
    (base / card.CARD).symlink_to("/etc/passwd")
    with pytest.raises(AHNError, match="a link out"):
        card.origin("base", base)
