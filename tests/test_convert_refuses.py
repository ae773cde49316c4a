"""What conversion refuses is one line that names the culprit, and leaves no trace."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import GDN, REPO, copies, edit_config, edit_tensors, read_json, run
from forkserver import command

from ahn_mlx.checkpoints import convert as convert_module
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_tensors
from ahn_mlx.errors import AHNError
from ahn_mlx.outputs import directories


@pytest.fixture
def parts(tmp_path):
    return copies(tmp_path)


def refuse(match: str, *args: object, **options: object) -> str:
    """Conversion fails with this one line and leaves nothing beside or above `out`."""
    out = Path(str(args[2]))
    before = sorted(out.parent.parent.rglob("*"))
    with pytest.raises(AHNError, match=match) as error:
        convert(*args, **options)  # type: ignore[arg-type]
    assert sorted(out.parent.parent.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


# --- tensors that do not fit ---


def test_missing_tensor(parts):
    base, ahn, out = parts
    edit_tensors(ahn, **{"layers.1.ahn.fn.dt_bias": None})
    name = r"'model\.layers\.1\.ahn\.fn\.dt_bias' of shape \[4\] is missing"
    assert str(ahn) in refuse(name, base, ahn, out)
    edit_tensors(base, **{"layers.0.mlp.up_proj.weight": None, "model.norm.weight": None})
    name = r"'model\.layers\.0\.mlp\.up_proj\.weight' of shape \[128, 64\] is missing"
    assert str(base) in refuse(name + r" \(and 2 more\)", base, ahn, out)


def test_extra_tensor(parts):
    base, ahn, out = parts
    edit_tensors(ahn, **{"model.layers.3.ahn.fn.A_log": mx.ones(4)})
    refuse(r"ahn/model.safetensors: unexpected tensor 'model.layers.3.ahn", base, ahn, out)


def test_memory_of_another_kind(parts):
    base, ahn, out = parts
    edit_config(ahn, _ahn_implementation="DeltaNet")
    refuse(r"unexpected tensor .*ahn\.fn\.A_log.*deltanet", base, ahn, out)


def test_misshapen_tensor(parts):
    base, ahn, out = parts
    edit_tensors(base, **{"layers.2.self_attn.k_proj.weight": mx.zeros((64, 64))})
    refuse(r"2\.self_attn\.k_proj\.weight' has shape \[64, 64\].*\[32, 64\]", base, ahn, out)
    # the same number of values is not enough
    edit_tensors(base, **{"layers.2.self_attn.k_proj.weight": mx.zeros((64, 32))})
    refuse(r"has shape \[64, 32\].*needs \[32, 64\]", base, ahn, out)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part, name", [(0, "layers.1.mlp.up_proj.weight"), (1, "1.ahn.fn.A_log")])
def test_not_finite(parts, bad, part, name):
    base, ahn, out = parts
    path = parts[part]
    x = next(x for n, x in read_tensors(path).items() if n.endswith(name))
    flat = x.reshape(-1)
    flat[-1] = bad
    edit_tensors(path, **{name: flat.reshape(x.shape)})
    message = refuse(f"{name}' holds NaN or infinity", base, ahn, out)
    assert str(path / "model.safetensors") in message


def test_too_large_for_float16(parts):
    base, ahn, out = parts
    edit_tensors(base, **{"model.norm.weight": mx.full((64,), 1e5)})
    refuse("model.norm.weight' has values too large for float16", base, ahn, out, "float16")
    convert(base, ahn, out, "bfloat16")


def test_integers(parts):
    base, ahn, out = parts
    edit_tensors(base, **{"model.norm.weight": mx.zeros((64,), mx.int32)})
    refuse("model.norm.weight' is I32, not one of F32", base, ahn, out)


# --- checkpoints that do not belong together ---


@pytest.mark.parametrize(
    "field, value",
    [
        *[("hidden_size", 128), ("num_attention_heads", 8), ("num_key_value_heads", 4)],
        *[("model_type", "qwen3"), ("num_hidden_layers", 2), ("rope_theta", 1e4)],
        ("intermediate_size", 160),
    ],
)
def test_another_base(parts, field, value):
    base, ahn, out = parts
    ours = read_json(ahn)[field]
    edit_config(ahn, **{field: value})
    message = refuse(f"{field} is {value!r} there and {ours!r} in", base, ahn, out)
    assert str(base) in message and str(ahn) in message


def test_roles(parts, tmp_path):
    base, ahn, out = parts
    out.parent.mkdir()
    merged = shutil.copytree(GDN / "merged", tmp_path / "in/merged")
    refuse("holds only AHN tensors; give their base", None, ahn, out)
    refuse("holds a whole model.*leave out --base", base, merged, out)
    refuse("holds AHN tensors itself", merged, ahn, out)
    refuse("in/base: config.json has no AHN fields", None, base, out)
    refuse("in/base: config.json has no AHN fields", base, base, out)
    refuse("does not exist", base, tmp_path / "absent", out)
    refuse("does not exist", tmp_path / "absent", ahn, out)
    (ahn / "config.json").unlink()
    refuse("not a model directory", base, ahn, out)


def test_tokenizer_that_links_to_a_private_file(parts):
    """It would be copied into a directory that is made to be shared."""
    base, ahn, out = parts
    (base / "tokenizer_config.json").symlink_to("/etc/passwd")
    refuse("tokenizer_config.json: a link out", base, ahn, out)


def test_quantized_by_others(parts):
    base, ahn, out = parts
    edit_config(base, quantization_config={"bits": 4, "quant_method": "gptq"})
    refuse("in/base: quantized, but not by MLX", base, ahn, out)
    edit_config(base, quantization_config=None, quantization={"bits": 4, "group_size": 64})
    refuse("in/base: .*says it is quantized", base, ahn, out)


def test_other_bad_input(parts):
    base, ahn, out = parts
    refuse("dtype must be one of", base, ahn, out, "float64")
    edit_config(ahn, sliding_window=0)
    refuse("in/ahn: window must be", base, ahn, out)
    edit_config(ahn, sliding_window=12, fa_layer_ids="0,9")
    refuse("names layer 9", base, ahn, out)
    edit_config(ahn, fa_layer_ids="", model_type="gpt2")
    edit_config(base, model_type="gpt2")
    refuse("in/base: config.json does not describe a gpt2", base, ahn, out)
    edit_config(ahn, model_type="qwen2")
    edit_config(base, model_type="qwen2", intermediate_size=None)
    refuse("in/base: .*intermediate_size", base, ahn, out)
    raw = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(raw[:-1])
    refuse("in/base/model.safetensors: damaged", base, ahn, out)
    (ahn / "model.safetensors").rename(ahn / "pytorch_model.bin")
    refuse("pytorch_model.bin: not a checkpoint of torch", base, ahn, out)
    (ahn / "pytorch_model.bin").rename(ahn / "x.gguf")
    refuse("no model.safetensors; it has 'x.gguf'", base, ahn, out)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 1 << 40},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": -4},
        {"head_dim": 1 << 20},
        {"vocab_size": "256"},
        {"rope_theta": 2**63, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": {}}},
        {"rope_parameters": {"rope_theta": []}, "rope_theta": None},
        {"quantization": {"bits": 1 << 40, "group_size": 64}},
    ],
)
def test_absurd_config(parts, fields):
    """In both, so that they agree."""
    base, ahn, out = parts
    edit_config(base, **fields)
    edit_config(ahn, **fields)
    assert str(base.parent) in refuse("config.json|in/base: ", base, ahn, out)


# --- where it may write ---


def test_out_overlaps_input(parts):
    base, ahn, _ = parts
    link = base.parent.parent / "link"
    link.symlink_to(base)
    for out in (base, ahn, base / "sub/x", base.parent, link, ahn / ".." / "base"):
        refuse("overlaps the input", base, ahn, out, force=True)


def test_out_in_use(parts):
    base, ahn, out = parts
    out.parent.mkdir()
    out.write_text("a file")
    refuse("is a file", base, ahn, out, force=True)
    out.unlink()
    out.mkdir()
    convert(base, ahn, out)  # an empty directory is fine
    first = (out / "model.safetensors").read_bytes()
    refuse("not empty; --force", base, ahn, out)
    convert(base, ahn, out, "bfloat16", force=True)
    assert (out / "model.safetensors").read_bytes() != first
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_force_spares_what_is_not_a_model(parts):
    base, ahn, out = parts
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    refuse("something other than a model", base, ahn, out, force=True)
    shutil.rmtree(out)
    convert(base, ahn, out)
    (out / "photos").mkdir()
    refuse("something other than a model", base, ahn, out, force=True)
    assert (out / "photos").exists()


def test_user_writes_into_out_meanwhile(parts, monkeypatch):
    """The check is made again at the moment of replacing."""
    base, ahn, out = parts
    convert(base, ahn, out)
    copy = convert_module._copy_tokenizer

    def intrude(*args):
        copy(*args)
        (out / "photos").mkdir()

    monkeypatch.setattr(convert_module, "_copy_tokenizer", intrude)
    with pytest.raises(AHNError, match="not empty"):
        convert(base, ahn, out, force=True)
    assert (out / "photos").exists() and (out / "model.safetensors").exists()
    assert [p.name for p in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("at", ["write_weights", "_copy_tokenizer"])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted(parts, monkeypatch, at, existing):
    base, ahn, out = parts
    if existing:
        convert(base, ahn, out)
    before = {p: p.read_bytes() for p in out.parent.rglob("*.*")} if existing else {}
    done = getattr(convert_module, at)

    def interrupt(*args):
        done(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(base, ahn, out, "bfloat16", force=True)
    assert out.parent.exists() == existing
    assert {p: p.read_bytes() for p in out.parent.rglob("*.*")} == before


def test_interrupted_between_renames(parts, monkeypatch):
    base, ahn, out = parts
    convert(base, ahn, out)
    before = (out / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(directories, "_exchange", lambda a, b: False)  # a disk that cannot
    monkeypatch.setattr(directories.Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(base, ahn, out, "bfloat16", force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kilobytes", [0, 2, 300, 526])
def test_disk_full(parts, kilobytes):
    """A limit on file size fails in a write, as a full disk does; the last at the file's end."""
    base, ahn, out = parts
    convert(base, ahn, out, "bfloat16")
    before = {p: p.read_bytes() for p in out.iterdir()}
    limit = kilobytes << 10

    def limited(*words):
        """What it says goes into a file, too, which a limit of nothing would not let it."""
        if limit:
            return command("convert", *words, limits={"RLIMIT_FSIZE": limit})
        bound = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
        return run(*words, preexec_fn=bound)

    for force, target in ((["--force"], out), ([], out.parent / "new/model")):
        result = limited("--base", base, "--ahn", ahn, "--out", target, *force)
        assert result.returncode == 2, result.stderr
        assert result.stderr == f"error: {target}: File too large; nothing was written\n"
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_ctrl_c(tmp_path):
    """The real signal, while weights are being written."""
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); "
        "from ahn_mlx import cli; from ahn_mlx.checkpoints import shards; "
        "finite = shards.is_finite; "
        "shards.is_finite = lambda x: (time.sleep(0.2), finite(x))[1]; "
        "sys.argv = ['ahn-mlx', 'convert', '--ahn', sys.argv[2], '--out', sys.argv[3]]; cli.main()"
    )
    out = tmp_path / "deep/er/out"
    command = [sys.executable, "-c", program, str(REPO), str(GDN / "merged"), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.time() + 30
    while not any(out.parent.glob(".out.*.part/model*")) and time.time() < end:
        time.sleep(0.05)
    assert any(out.parent.glob(".out.*.part/model*"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
