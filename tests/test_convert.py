"""What conversion writes is bit for bit what it read."""

import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx_lm.utils
import pytest
from checkpoints import GDN, GOLDEN, REPO, copies, edit_config, edit_tensors, read_json, run, same
from click.testing import CliRunner
from mlx.utils import tree_flatten
from tqdm import tqdm

from ahn_mlx.checkpoints import shards
from ahn_mlx.checkpoints.convert import RELEASE_FIELDS, convert
from ahn_mlx.checkpoints.directory import read_headers, read_tensors
from ahn_mlx.checkpoints.load import load_model
from ahn_mlx.cli.convert import convert as command
from ahn_mlx.model.augment import build
from ahn_mlx.model.names import rename_published

VARIANTS = sorted(p.name for p in GOLDEN.glob("qwen*"))
WITH_BASE = [v for v in VARIANTS if (GOLDEN / v / "base").exists()]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@pytest.fixture
def parts(tmp_path):
    return copies(tmp_path)


# --- round trips ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged(variant, tmp_path):
    """Every parameter, bit for bit; the model computes what PyTorch computed."""
    source = GOLDEN / variant / "merged"
    convert(None, source, tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    assert same(written, rename_published(read_tensors(source)))
    model, config = load_model(tmp_path / "out", dtype="float32")
    assert config["ahn"]["window"] == 12 and config["ahn"]["sinks"] == 4
    golden = mx.load(str(GOLDEN / variant / "golden.safetensors"))
    logits = model(golden["input_ids"])[0]
    assert mx.abs(logits - golden["prefill_logits"]).max().item() < 1e-3


def test_a_card_has_the_title_that_was_given_or_the_name(tmp_path):
    for title, said in (("A model of mine", "A model of mine"), ("", "out")):
        convert(None, GOLDEN / VARIANTS[0] / "merged", tmp_path / "out", force=True, title=title)
        assert f"\n# {said}\n" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("variant", WITH_BASE)
def test_base_and_ahn_are_the_merged_model(variant, tmp_path):
    path = GOLDEN / variant
    convert(path / "base", path / "ahn_only", tmp_path / "two")
    convert(None, path / "merged", tmp_path / "one")
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_shards_in(tmp_path):
    convert(None, GDN / "merged_sharded", tmp_path / "many")
    convert(None, GDN / "merged", tmp_path / "one")
    assert same(read_tensors(tmp_path / "many"), read_tensors(tmp_path / "one"))


def test_shards_out(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    convert(None, GDN / "merged", tmp_path / "out")
    files = sorted(f.name for f in (tmp_path / "out").glob("model*.safetensors"))
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))
    ]
    assert len(files) == 6
    assert all((tmp_path / "out" / f).stat().st_size < 104_000 for f in files)
    tensors = rename_published(read_tensors(GDN / "merged"))
    assert same(read_tensors(tmp_path / "out"), tensors)
    load_model(tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(x.size for x in tensors.values())
    # In the order of the layers, so that a layer's tensors are close together.
    first = [n for n, f in index["weight_map"].items() if f == files[0]]
    assert "model.embed_tokens.weight" in first and not any(".layers.2." in n for n in first)


def test_a_shard_is_filled_to_its_last_byte(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    sizes = {"a": 60, "b": 40, "c": 1, "d": 99, "e": 150, "f": 100, "g": 1}
    assert shards._shards(sizes) == [["a", "b"], ["c", "d"], ["e"], ["f"], ["g"]]
    assert shards._shards({"a": 0, "b": 100, "c": 1}) == [["a", "b"], ["c"]]
    names = [f"model.layers.{i}.x" for i in (0, 2, 10, 11)]
    assert sorted(names, key=shards.by_layer) == names


def test_shards_are_as_large_as_mlx_lms_and_settings_are_for_people(tmp_path):
    assert shards.SHARD_BYTES == mlx_lm.utils.MAX_FILE_SIZE_GB << 30
    shards.write_json(tmp_path / "a.json", {"b": [1], "a": {}})
    assert (tmp_path / "a.json").read_text() == (
        '{\n    "a": {},\n    "b": [\n        1\n    ]\n}\n'
    )


def test_progress_is_in_bytes_and_ends_at_all_of_them(tmp_path, monkeypatch):
    class Bar(tqdm):
        def __init__(self, **options):
            seen.append(options["total"])
            super().__init__(**options)

        def update(self, n=1):
            seen[0] -= n
            super().update(n)

    seen = []
    monkeypatch.setattr(shards, "tqdm", Bar)
    convert(None, GDN / "merged", tmp_path / "out")
    assert seen == [0]


def is_decay(name: str) -> bool:
    return name.endswith((".A_log", ".dt_bias"))


@pytest.mark.parametrize("variant", ["qwen2-gdn", "qwen3-mamba2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(variant, dtype, tmp_path):
    source = GOLDEN / variant / "merged"
    convert(None, source, tmp_path / "out", dtype)
    expected = {
        name: x if is_decay(name) else x.astype(DTYPES[dtype])
        for name, x in rename_published(read_tensors(source)).items()
    }
    assert sum(map(is_decay, expected)) == 6
    assert same(read_tensors(tmp_path / "out"), expected)
    assert read_json(tmp_path / "out")["torch_dtype"] == dtype


def test_bfloat16_in(tmp_path):
    """Kept as it is, but for the decays."""
    convert(None, GDN / "merged_bf16", tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    source = rename_published(read_tensors(GDN / "merged_bf16"))
    assert {x.dtype for x in source.values()} == {mx.bfloat16}
    assert same(written, {n: x.astype(mx.float32) if is_decay(n) else x for n, x in source.items()})


def test_converting_again_changes_the_dtype(tmp_path):
    convert(None, GDN / "merged", tmp_path / "a")
    convert(None, tmp_path / "a", tmp_path / "b", "bfloat16")
    convert(None, GDN / "merged", tmp_path / "c", "bfloat16")
    assert same(read_tensors(tmp_path / "b"), read_tensors(tmp_path / "c"))
    assert read_json(tmp_path / "b") == read_json(tmp_path / "c")


# --- what the config says ---


def test_config(parts):
    base, ahn, out = parts
    edit_config(base, my_note="kept", eos_token_id=7)
    edit_config(ahn, dy_sliding_window=64, dy_num_attn_sinks=8, my_note="of the other")
    convert(base, ahn, out)
    config = read_json(out)
    assert config["ahn"] == {
        **{"memory": "gated_deltanet", "window": 12, "sinks": 4, "sink_positions": "absolute"},
        **{"fa_layer_ids": [], "router": False, "query_projection": False},
    }
    assert not RELEASE_FIELDS & set(config)
    kept = {k: v for k, v in read_json(base).items() if k not in RELEASE_FIELDS}
    release = {k: v for k, v in read_json(ahn).items() if k in RELEASE_FIELDS}
    del release["save_ahn_only"]
    assert config.pop("ahn_release") == release
    assert (out / config.pop("model_file")).is_file()
    assert {k: v for k, v in config.items() if k != "ahn"} == {
        **{**kept, "eos_token_id": [7], "rope_scaling": None}
    }


def test_head_that_is_tied_or_not(parts, capsys):
    base, ahn, out = parts
    embedding = read_tensors(base)["model.embed_tokens.weight"]
    edit_tensors(base, **{"lm_head.weight": embedding})
    convert(base, ahn, out)  # a copy is no loss
    assert "lm_head.weight" not in read_headers(out)
    assert "the head" not in capsys.readouterr().err
    head = mx.random.normal((256, 64))
    edit_tensors(base, **{"lm_head.weight": head})
    for stated, said in ((True, "the head is kept"), (None, ""), (False, "")):
        edit_config(base, tie_word_embeddings=stated)
        convert(base, ahn, out, force=True)
        assert mx.array_equal(read_tensors(out)["lm_head.weight"], head)
        assert read_json(out)["tie_word_embeddings"] is False
        lines = [x for x in capsys.readouterr().err.splitlines() if "warning" not in x]
        assert said in "".join(lines) and len(lines) == bool(said)


def test_layers_with_full_attention(parts):
    """The release stores a memory for them all the same."""
    base, ahn, out = parts
    edit_config(ahn, fa_layer_ids="1")
    convert(base, ahn, out)
    memory = {name.split(".")[2] for name in read_headers(out) if ".ahn." in name}
    assert memory == {"0", "2"}
    load_model(out)


def test_tokenizer(parts, capsys):
    base, ahn, out = parts
    convert(base, ahn, out)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and str(base) in warning
    (base / "tokenizer.json").write_text("base")
    (ahn / "tokenizer.json").write_text("ahn")
    (ahn / "chat_template.jinja").write_text("ahn")
    (base / "notes.txt").write_text("private")
    (base / "tokenization_x.py").write_text("code")
    convert(base, ahn, out, force=True)
    assert capsys.readouterr().err == ""
    assert (out / "tokenizer.json").read_text() == "base"
    assert (out / "chat_template.jinja").read_text() == "ahn"
    assert not (out / "notes.txt").exists() and not (out / "tokenization_x.py").exists()
    generation = "generation_config.json"
    written, given = (json.loads((path / generation).read_text()) for path in (out, base))
    assert written == given


# --- the command ---


def test_script(parts):
    base, ahn, out = parts
    result = run("--base", base, "--ahn", ahn, "--out", out)
    assert (result.returncode, result.stdout) == (0, f"wrote {out}\n")
    assert result.stderr.count("\n") == 1  # no tokenizer; and no progress bar without a terminal
    result = run("--base", base, "--ahn", ahn, "--out", out)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {out}: ") and result.stderr.count("\n") == 1


def test_help_and_usage():
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0 and "--base Qwen2.5-3B-Instruct -o" in result.output
    for args in ([], ["--ahn", "x"], ["--ahn", "x", "--out", "y", "--dtype", "int4"]):
        assert CliRunner().invoke(command, args).exit_code == 2


def test_memory_stays_at_a_few_tensors(tmp_path):
    """235 MB of weights in tensors of at most 4 MB, cast on the way."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:2]; from pathlib import Path; "
        "from ahn_mlx.checkpoints.convert import convert; import ahn_mlx.model.augment; "
        "from tests.resident import most; before = most(); "
        "convert(None, Path(sys.argv[2]), Path(sys.argv[3]), 'bfloat16'); "
        "print(most() - before)"
    )
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(GDN / "merged/config.json", source)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    edit_config(source, **sizes, num_attention_heads=8)
    tensors = dict(tree_flatten(build(read_json(source)).parameters()))
    assert sum(x.nbytes for x in tensors.values()) > 220 << 20
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    command = [sys.executable, "-c", program, str(REPO), str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert int(result.stdout) < 48 << 20
    assert os.path.getsize(tmp_path / "out/model.safetensors") > 110 << 20
