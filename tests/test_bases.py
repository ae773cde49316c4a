"""A trained memory on its base, found by whatever names it."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import (
    GDN,
    IDS,
    TRAINING,
    edit_config,
    edit_tensors,
    make_base,
    memory_of,
    read_json,
    talking_model,
)
from click.testing import CliRunner
from mlx.utils import tree_flatten
from test_model import tiny

import ahn_mlx
from ahn_mlx import AHNError, load_model
from ahn_mlx.checkpoints import card
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.cli import cli
from ahn_mlx.hub import bases, zoo
from ahn_mlx.hub.published import DEFAULT, MODELS, has_bits_to_choose
from ahn_mlx.reading import memoryfile
from ahn_mlx.train.output import load_base as load_training

TEXT = "It is a far, far better thing that I do, than I have ever done. " * 8


def run(*args: object) -> str:
    done = CliRunner().invoke(cli, list(map(str, args)), catch_exceptions=False)
    return done.output


@pytest.fixture
def place(tmp_path) -> Path:
    """A base that can talk and the memory of the golden model, with a base in its config."""
    model = talking_model("qwen2-gdn", tmp_path / "talking")
    base = shutil.copytree(GDN / "base", tmp_path / "base")
    for file in model.glob("tokenizer*"):
        shutil.copy(file, base)
    ahn = shutil.copytree(GDN / "ahn_only", tmp_path / "ahn")
    edit_config(ahn, ahn_base=str(base))
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path


def test_on_its_base_a_memory_is_the_converted_model(place):
    convert(place / "base", place / "ahn", place / "out")
    converted, _ = load_model(place / "out", dtype="float32")
    model, _ = ahn_mlx.load(place / "base", ahn=place / "ahn", dtype="float32")
    assert model.ahn == converted.ahn
    assert mx.array_equal(model(IDS), converted(IDS))
    wider, _ = ahn_mlx.load(place / "base", ahn=place / "ahn", window=30, sinks=5)
    assert (wider.ahn.window, wider.ahn.sinks) == (30, 5)


@pytest.mark.parametrize("variant", ["qwen2-gdn-router", "qwen3-mamba2", "qwen2-dn"])
def test_routers_and_other_memories(variant, tmp_path):
    golden = GDN.with_name(variant)
    known = golden / "base" if (golden / "base").is_dir() else GDN / "base"
    base = shutil.copytree(known, tmp_path / "base")
    for file in talking_model("qwen2-gdn", tmp_path / "talking").glob("tokenizer*"):
        shutil.copy(file, base)
    convert(base, golden / "ahn_only", tmp_path / "out")
    converted, _ = load_model(tmp_path / "out", dtype="float32")
    model, _ = ahn_mlx.load(base, ahn=golden / "ahn_only", dtype="float32")
    assert mx.array_equal(model(IDS), converted(IDS))


def test_what_was_digested_with_it_is_asked_with_it(place, monkeypatch):
    monkeypatch.chdir(place)
    few = ["--max-tokens", 2]
    assert run("generate", "--ahn", "ahn", "--prompt", "Why?", *few)
    assert "tokens in" in run("digest", "--ahn", "ahn", "--prompt-file", "book.txt", "-o", "a.ahn")
    origin = memoryfile.read_facts(place / "a.ahn")["model"]
    assert (origin["name"], origin["ahn"]) == (str(place / "base"), str(place / "ahn"))
    monkeypatch.chdir("/")
    memory = place / "a.ahn"
    assert "first token after" in run("ask", "--memory", memory, "Why?", *few)
    more = ["--append", "--prompt-file", place / "book.txt"]
    assert "tokens in" in run("digest", *more, "-o", memory)
    assert memoryfile.read_facts(memory)["model"]["ahn"] == str(place / "ahn")
    (place / "ahn").rename(place / "moved")
    with pytest.raises(AHNError, match="ahn: does not exist"):
        run("ask", "--memory", memory, "Why?", *few)
    assert "first token" in run("ask", "--memory", memory, "--ahn", place / "moved", "Why?", *few)


def test_a_training_says_its_base(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    monkeypatch.chdir(tmp_path)
    assert bases.base_of(memory) == str(base)
    assert bases.whole_name("base") == str(base)
    assert bases.whole_name(DEFAULT) == DEFAULT
    assert bases.whole_name("Qwen/Qwen2.5-3B") == "Qwen/Qwen2.5-3B"
    base.rename(tmp_path / "moved")
    with pytest.raises(AHNError, match=r"memory: its base .* is not there; give --model BASE"):
        bases.base_of(memory)


@pytest.mark.parametrize("named", ["Qwen/Qwen2.5-3B-Instruct", ["Qwen/Qwen2.5-3B-Instruct", "b"]])
def test_a_card_says_the_base_too(tmp_path, named):
    ahn = shutil.copytree(GDN / "ahn_only", tmp_path / "ahn")
    with pytest.raises(AHNError, match="does not say which base"):
        bases.base_of(ahn)
    (ahn / "README.md").write_text(f"---\nbase_model: {json.dumps(named)}\n---\n")
    assert bases.base_of(ahn) == "Qwen/Qwen2.5-3B-Instruct"


@pytest.mark.parametrize("named", [5, [], {}, [None], ["", 3]])
def test_a_card_that_names_no_base(tmp_path, named):
    ahn = shutil.copytree(GDN / "ahn_only", tmp_path / "ahn")
    edit_config(ahn, ahn_base=named)
    (ahn / "README.md").write_text(f"---\nbase_model: {json.dumps(named)}\n---\n")
    with pytest.raises(AHNError, match="does not say which base"):
        bases.base_of(ahn)


def test_names_of_bases(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(bases.hub, "download", lambda repo: fetched.append(repo) or tmp_path)
    assert bases.find_base(str(GDN / "base")) == GDN / "base"
    for name in ("ahn-gdn-3b", "ahn-dn-7b", "some/repo"):
        assert bases.find_base(name) == tmp_path
    assert fetched == [*(MODELS[n].base.repo for n in ("ahn-gdn-3b", "ahn-dn-7b")), "some/repo"]
    # A directory of a repository's name is meant; ours stands for what it stands for.
    monkeypatch.chdir(tmp_path)
    for name in ("ahn-gdn-3b", "some/repo", DEFAULT):
        Path(name).mkdir(parents=True)
    assert bases.find_base("ahn-gdn-3b") == Path("ahn-gdn-3b")
    assert bases.find_base("some/repo") == Path("some/repo")
    assert bases.find_base(DEFAULT).suffix == ".gguf"
    gguf = tmp_path / "a.gguf"
    gguf.touch()
    assert bases.find_base(str(gguf)) == gguf
    (tmp_path / "a.bin").touch()
    with pytest.raises(AHNError, match=r"is a file, but no \.gguf"):
        bases.find_base(str(tmp_path / "a.bin"))
    for name in ("qwen", "./qwen", "/no/such/place", "a/b/c", "../no-such-place"):
        with pytest.raises(AHNError, match="no model"):
            bases.find_base(name)


def test_the_small_base_by_name():
    assert bases.find_base(DEFAULT).suffix == ".gguf"
    base = bases.load_base(DEFAULT)
    repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.origin == card.Origin("base", repo, "", "apache-2.0")
    assert base.path == bases.find_base(DEFAULT) and base.config["num_hidden_layers"] == 30
    assert None not in base.config.values()
    assert base.tokenizer.eos_token_ids == {0, 2}
    assert not mx.all(base.model.model.norm.weight == 1)  # as it begins


def test_on_a_gpu_a_base_stays_as_it_is_stored(place, monkeypatch):
    """But for the small one, which is stored in few bits."""
    for module in ("ahn_mlx.hub.zoo", "ahn_mlx.checkpoints.load"):
        monkeypatch.setattr(f"{module}.default_dtype", lambda: None)
    model, _ = ahn_mlx.load(place / "base", ahn=place / "ahn")
    assert model.model.norm.weight.dtype == mx.float32
    assert (zoo._stored(None), zoo._stored("float16")) == ("bfloat16", "float16")
    monkeypatch.undo()
    assert zoo._stored(None) == "float32"


def test_a_router_that_a_memory_lacks_begins_as_none(place):
    """In half its loudness at first, its outputs are twice as large."""
    found = {}
    for router in (False, True):
        options = {**TRAINING, "base": str(place / "base"), "router": router, "sinks": 0}
        base = load_training({**options, "window": 12, "query_projection": False})
        bases.put_memory(base, place / "ahn")
        base.model.eval()
        found[router] = base.model(IDS)
    assert mx.allclose(found[True], found[False], atol=1e-4)
    assert mx.abs(found[False][:, 20:]).max() > 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"0.ahn.fn.o_proj.weight": None}, r"tensor model\.layers\.0\.ahn\.fn\.o_proj"),
        ({"0.ahn.fn.a_proj.weight": mx.zeros((3, 3))}, "does not fit this model"),
        ({"0.ahn.fn.dt_bias": mx.zeros((1,))}, "dt_bias does not fit this model"),
        ({"1.ahn.fn.o_proj.weight": mx.zeros((4, 16, 8))}, "o_proj.* does not fit this model"),
        ({"model.layers.0.ahn.fn.x_proj.weight": mx.ones((4, 4))}, "x_proj.* does not fit"),
        ({"0.ahn.fn.o_proj.weight": mx.full((4, 16, 16), mx.nan)}, "holds NaN"),
        ({"model.norm.weight": mx.ones((64,))}, "holds a whole model, not a memory"),
    ],
)
def test_a_memory_that_does_not_fit(place, damage, said):
    edit_tensors(place / "ahn", **damage)
    with pytest.raises(AHNError, match=said) as error:
        ahn_mlx.load(place / "base", ahn=place / "ahn")
    assert str(place / "ahn") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_memory_of_half_precision_takes_the_models(place, dtype):
    """Its decays are float32 always."""
    tensors = mx.load(str(place / "ahn/model.safetensors"))
    half = {name: x.astype(mx.bfloat16) for name, x in tensors.items()}
    mx.save_safetensors(str(place / "ahn/model.safetensors"), half)
    model, _ = ahn_mlx.load(place / "base", ahn=place / "ahn", dtype=dtype)
    found = {name: x.dtype for name, x in tree_flatten(model.parameters())}
    decays = {name for name in found if name.endswith(("A_log", "dt_bias"))}
    assert len(decays) == 2 * 3 and {found.pop(name) for name in decays} == {mx.float32}
    # None: of the fast one on the CPU.
    assert dtype is None or set(found.values()) == {getattr(mx, dtype)}
    assert (model.origin.dtype, model.origin.q_bits) == (dtype, None)


def test_bits_of_a_published_name_are_remembered(place, monkeypatch):
    """Whoever asks a saved memory loads the model of these."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    models = place / "ahn-mlx/models"
    ahn = read_json(place / "talking/model")["ahn"]
    for window, end in ((20, ""), (24, "-4bit"), (28, "-8bit")):
        made = shutil.copytree(place / "talking/model", models / f"ahn-gdn-3b{end}")
        edit_config(made, ahn={**ahn, "window": window})
    for bits, window in ((None, 24), (4, 24), (8, 28), (0, 20)):
        model, _ = ahn_mlx.load("ahn-gdn-3b", q_bits=bits)
        assert (model.origin.name, model.origin.q_bits) == ("ahn-gdn-3b", bits)
        assert model.ahn.window == window


def test_a_whole_model_is_no_memory(place):
    convert(place / "base", place / "ahn", place / "out")
    with pytest.raises(AHNError, match="holds a whole model, not a memory; give it as --model"):
        run("generate", "--ahn", place / "out", "--prompt", "Why?")


def test_another_base_is_refused(place):
    edit_config(place / "ahn", rope_theta=5.0)
    with pytest.raises(AHNError, match="was trained for another base"):
        ahn_mlx.load(place / "base", ahn=place / "ahn")


def test_convert_takes_the_names_that_train_takes(place, monkeypatch):
    monkeypatch.setattr(bases.hub, "download", lambda repo: place / "base")
    assert "wrote" in run(
        *("convert", "--base", "ahn-gdn-3b", "--ahn", place / "ahn", "--out", place / "out")
    )
    model, _ = load_model(place / "out", dtype="float32")
    other, _ = ahn_mlx.load(place / "base", ahn=place / "ahn", dtype="float32")
    np.testing.assert_array_equal(np.array(model(IDS)), np.array(other(IDS)))


def test_parameters_that_come_with_us_are_all_there_or_refused(tmp_path, capsys):
    plain, model = tiny(window=10, sinks=3)
    stored = set(zoo._shapes(plain))
    shapes = {name: shape for name, shape in zoo._shapes(model).items() if name not in stored}
    memory = {name: mx.random.normal(shape) for name, shape in shapes.items()}
    file = tmp_path / "ours.safetensors"
    mx.save_safetensors(str(file), memory)
    zoo._load_memory(model, stored, file)
    found = dict(tree_flatten(model.parameters()))
    assert len(memory) > 10 and all(mx.array_equal(found[name], x) for name, x in memory.items())
    assert capsys.readouterr().err == ""
    first = min(memory)
    for wrong in (
        {name: x for name, x in memory.items() if name != first},
        {**memory, "a": mx.zeros(1)},
        {**memory, first: mx.zeros((1, 2, 3))},
    ):
        mx.save_safetensors(str(file), wrong)
        with pytest.raises(AHNError, match="is missing, extra or misshapen; reinstall"):
            zoo._load_memory(model, stored, file)
    file.write_bytes(b"x")
    with pytest.raises(AHNError, match=r"ours.safetensors: .*; reinstall"):
        zoo._load_memory(model, stored, file)
    file.unlink()
    zoo._load_memory(model, stored, file)
    assert "note: ours has no trained memory yet" in capsys.readouterr().err
    left = dict(tree_flatten(model.parameters()))
    gates = {name for name in memory if not mx.array_equal(left[name], memory[name])}
    assert gates == {
        name
        for name in memory
        if name.endswith(("b_proj.weight", "a_proj.weight", "g_proj.weight"))
    }
    assert not any(mx.any(left[name]) for name in gates)


def test_a_memory_has_the_window_that_is_asked_for(tmp_path):
    base = make_base(tmp_path / "base")
    for file in talking_model("qwen2-gdn", tmp_path / "talking").glob("tokenizer*"):
        shutil.copy(file, base)
    memory = memory_of(base, tmp_path / "memory")
    kept, _ = ahn_mlx.load(base, ahn=memory, dtype="float32")
    model, _ = ahn_mlx.load(base, ahn=memory, window=9, sinks=2, dtype="bfloat16")
    assert (model.ahn.window, model.ahn.sinks) == (9, 2) != (kept.ahn.window, kept.ahn.sinks)
    assert not model.training and not kept.training
    assert model.model.norm.weight.dtype == mx.bfloat16
    assert {x.dtype for _, x in tree_flatten(kept.parameters())} == {mx.float32}
    assert (model.origin.name, model.origin.ahn) == (str(base), str(memory))
    assert (model.origin.dtype, model.origin.q_bits) == ("bfloat16", None)
    plain = talking_model("qwen2-gdn", tmp_path / "plain")
    other, _ = ahn_mlx.load(plain, window=7, sinks=1, dtype="float32")
    assert (other.ahn.window, other.ahn.sinks, other.origin.ahn) == (7, 1, None)
    assert other.origin.name == str(plain)


def test_bits_can_be_chosen_of_what_is_converted_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert has_bits_to_choose("ahn-gdn-3b") and not has_bits_to_choose("me/mine")
    assert not has_bits_to_choose("ahn-gdn-smollm2-135m")  # comes inside a package
    (tmp_path / "ahn-gdn-3b").mkdir()  # a directory of that name is loaded instead
    assert not has_bits_to_choose("ahn-gdn-3b") and has_bits_to_choose("ahn-gdn-7b")
