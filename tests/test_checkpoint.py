"""Directories that are incomplete or hostile give one line, never a traceback."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoints import BOM, GDN, GOLDEN, IDS, model_dir, read_json, same

from ahn_mlx.checkpoints import formats, identity
from ahn_mlx.checkpoints.baseconfig import read_config
from ahn_mlx.checkpoints.claims import check_size
from ahn_mlx.checkpoints.directory import (
    INDEX,
    Source,
    check_member,
    copy_files,
    find_files,
    load_safetensors,
    read_headers,
    read_tensors,
)
from ahn_mlx.checkpoints.directory import read_json as read_json_file
from ahn_mlx.checkpoints.formats import describe
from ahn_mlx.checkpoints.load import built, load_model
from ahn_mlx.checkpoints.safetensors import TensorInfo
from ahn_mlx.errors import AHNError
from ahn_mlx.model.names import is_memory, published_name, rename_published

SMALL = GDN / "ahn_only"
CONFIG = read_json(GDN / "base")


def one_line(error: pytest.ExceptionInfo[AHNError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


# --- what is sound is read ---


@pytest.mark.parametrize("begin", [b"", BOM])
def test_files_beside_a_model_are_copied_without_a_bom(begin, tmp_path):
    for place in ("first", "second", "out"):
        (tmp_path / place).mkdir()
    (tmp_path / "second/a.json").write_bytes(begin + b'{"a": 1}')
    for place in ("first", "second"):
        (tmp_path / place / "b.txt").write_text(place)
    inputs = [tmp_path / "first", tmp_path / "second"]
    copy_files(["a.json", "b.txt", "c.json"], inputs, tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a.json": b'{"a": 1}', "b.txt": b"first"}
    # In what is no JSON it may mean something.
    (tmp_path / "first/c.jinja").write_bytes(BOM + b"{{ x }}")
    copy_files(["c.jinja"], inputs, tmp_path / "out")
    assert (tmp_path / "out/c.jinja").read_bytes() == BOM + b"{{ x }}"


@pytest.mark.parametrize("number", [1 << 63, -1 << 63])
def test_numbers_that_no_library_takes_are_no_settings(number, tmp_path):
    for value in (number, [number], {"b": number}):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "a": value}))
        read_config(tmp_path)
    for value in (number + (1 if number > 0 else -1), [1, 2 * number], {"b": float("nan")}):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "a": value}))
        with pytest.raises(AHNError, match=r"'[ab]' is no setting") as refused:
            read_config(tmp_path)
        one_line(refused)


def test_sound_directories():
    single = mx.load(str(GDN / "merged/model.safetensors"))
    assert same(read_tensors(GDN / "merged"), single)
    assert same(read_tensors(GDN / "merged_sharded"), single)
    assert read_config(GDN / "merged")["_ahn_implementation"] == "GatedDeltaNet"
    for name in ("merged", "merged_sharded", "merged_bf16"):
        assert describe(GDN / name)[0]["model_type"] == "qwen2"
    info = read_headers(SMALL)["model.layers.1.ahn.fn.o_proj.weight"].info
    assert (info.dtype, info.shape) == ("F32", (4, 16, 16))


def test_shards_without_index(tmp_path):
    for file in (GDN / "merged_sharded").glob("model-*"):
        shutil.copy(file, tmp_path)
    assert same(read_tensors(tmp_path), read_tensors(GDN / "merged"))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(AHNError, match="shard 2 of 3 is missing"):
        read_tensors(tmp_path)


def test_the_first_shard_is_missing_of_those_that_say_no_number_of_all(tmp_path):
    mx.save_safetensors(str(tmp_path / "weights.01.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(AHNError, match=r"shard 1 is missing; fetch it again"):
        read_tensors(tmp_path)


def test_cache_of_huggingface_hub(tmp_path):
    """Snapshots are links to ../../blobs, which is no escape."""
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(SMALL, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert same(read_tensors(snapshot), read_tensors(SMALL))
    assert read_config(snapshot) == read_config(SMALL)


# --- wrong sets of files ---


def index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        *["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b.safetensors"],
        *["a\0b.safetensors", "config.json", 7, None, ["model.safetensors"]],
    ],
)
def test_index_names_other_places(tmp_path, name):
    path = model_dir(tmp_path / "m")
    shutil.copy(path / "model.safetensors", tmp_path / "secret.safetensors")
    index(path, {"a": name})
    with pytest.raises(AHNError, match="not the name of a safetensors file") as error:
        read_tensors(path)
    one_line(error)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_index_without_map(tmp_path, weight_map):
    index(model_dir(tmp_path), weight_map)
    with pytest.raises(AHNError, match="weight_map must map"):
        read_tensors(tmp_path)


def test_index_and_files_disagree(tmp_path):
    path = shutil.copytree(GDN / "merged_sharded", tmp_path / "m")
    names = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    index(path, {**names, name: "model-00001-of-00003.safetensors"})
    with pytest.raises(AHNError, match=f"00001.*{name}.*missing"):
        read_tensors(path)
    index(path, {**names, "lm_head.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(AHNError, match=r"lm_head.weight.*missing"):
        describe(path)
    index(path, names)
    (path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(AHNError, match=r"model-00003-of-00003.safetensors: missing"):
        read_tensors(path)


def test_tensor_in_two_files(tmp_path, capsys):
    path = model_dir(tmp_path)
    (path / "model.safetensors").rename(path / "model-1-of-2.safetensors")
    shutil.copy(path / "model-1-of-2.safetensors", path / "model-2-of-2.safetensors")
    with pytest.raises(AHNError, match=r"'a' is in model-1-of-2\.safetensors too"):
        read_tensors(path)
    index(path, {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"})
    with pytest.raises(AHNError, match=r"model-2-of-2\.safetensors: tensor 'b' is missing"):
        read_tensors(path)
    assert capsys.readouterr().err == ""


# --- which files count ---

OLD, NEW = mx.zeros((2,)), mx.ones((2,))


def save(path: Path, name: str, **tensors: mx.array) -> None:
    mx.save_safetensors(str(path / name), tensors)


def test_the_index_decides_which_shard_counts(tmp_path, capsys):
    """A shard that was used again holds another's tensor, too."""
    path = model_dir(tmp_path, a=OLD, b=NEW)
    save(path, "extra.safetensors", a=NEW)
    index(path, {"a": "extra.safetensors", "b": "model.safetensors"})
    for _ in range(2):
        found = read_tensors(path)
        assert same(found, {"a": NEW, "b": NEW})
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "not want 'a' of model.safetensors; it is left" in said
        index(path, {"b": "model.safetensors", "a": "extra.safetensors"})


def test_the_model_is_that_of_the_index(tmp_path):
    """Also where a file of mlx-lm's own pattern lies beside it."""
    path = shutil.copytree(GDN / "merged_sharded", tmp_path / "m")
    logits = load_model(path)[0](IDS)
    mx.eval(logits)
    first = path / "model-00001-of-00003.safetensors"
    stale = {name: x * 0 for name, x in mx.load(str(first)).items()}
    save(path, "model-00001-of-00002.safetensors", **stale)
    save(path, "model.safetensors", **stale)
    save(path, "model_old.safetensors", **stale)
    assert mx.array_equal(load_model(path)[0](IDS), logits)


def test_tensor_that_the_index_does_not_list(tmp_path, capsys):
    path = model_dir(tmp_path, a=OLD, b=NEW, c=NEW)
    index(path, {"a": "model.safetensors"})
    assert same(read_tensors(path), {"a": OLD, "b": NEW, "c": NEW})
    said = capsys.readouterr().err
    assert "does not list 'b' (and 1 more); it is read all the same" in said
    save(path, "other.safetensors", b=OLD, d=OLD)
    index(path, {"a": "model.safetensors", "d": "other.safetensors"})
    with pytest.raises(AHNError, match=r"other.safetensors: tensor 'b' is in model.saf"):
        read_tensors(path)


@pytest.mark.parametrize(
    "files, taken",
    [
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model.safetensors", "model-00001-of-00001.safetensors"], "model.safetensors"),
        (["model.safetensors", "model-2.safetensors"], "model.safetensors"),
        (["model.safetensors", "adapter_model.safetensors"], "model.safetensors"),
        (["consolidated.safetensors", "weights.00.safetensors"], "consolidated.safetensors"),
        (["model-1-of-1.safetensors", "consolidated.safetensors"], "model-1-of-1.safetensors"),
    ],
)
def test_one_of_several_checkpoints(files, taken, tmp_path, capsys):
    path = model_dir(tmp_path)
    (path / "model.safetensors").unlink()
    for name in files:
        save(path, name, a=NEW if name == taken else OLD)
    assert same(read_tensors(path), {"a": NEW})
    said = capsys.readouterr().err
    assert f"read from {taken}" in said and "is left out" in said and said.count("\n") == 1
    other = next(name for name in files if name != taken)
    assert repr(other) in said


@pytest.mark.parametrize(
    "names",
    [
        ["consolidated.safetensors"],
        ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"],
        [f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2)],
        ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"],
        ["weights.00.safetensors", "weights.01.safetensors"],
        ["pytorch_model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.safetensors"],
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_usual_names_of_shards(names, indexed, tmp_path, capsys):
    path = model_dir(tmp_path)
    (path / "model.safetensors").unlink()
    tensors = {f"t{i}": NEW * i for i in range(len(names))}
    for name, (key, x) in zip(names, tensors.items(), strict=True):
        save(path, name, **{key: x})
    if indexed:
        stem = names[0].split("-")[0].split(".")[0]
        weight_map = dict(zip(tensors, names, strict=True))
        file = path / f"{stem}.safetensors.index.json"
        file.write_bytes(BOM + json.dumps({"weight_map": weight_map}).encode())
    assert same(read_tensors(path), tensors)
    assert capsys.readouterr().err == ""
    if len(names) > 1:
        (path / names[0]).unlink()
        with pytest.raises(AHNError, match=r"missing"):
            read_tensors(path)


def test_shards_of_two_checkpoints(tmp_path):
    path = model_dir(tmp_path)
    (path / "model.safetensors").unlink()
    for name in ("model-1-of-1", "model-1-of-2", "model-2-of-2"):
        save(path, f"{name}.safetensors", a=NEW)
    with pytest.raises(AHNError, match="of two checkpoints; remove one"):
        read_tensors(path)
    save(path, "model-1-of-3.safetensors", a=NEW)
    with pytest.raises(AHNError, match=r"model-1-of-\d\.safetensors and model-1-of-\d\.s.* of two"):
        read_tensors(path)


def test_shards_of_an_index_that_is_stale(tmp_path):
    """The whole model is there in one file, but the index knows better."""
    path = model_dir(tmp_path)
    index(path, {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"})
    with pytest.raises(AHNError, match=r"model-1-of-2.safetensors: missing"):
        read_tensors(path)


def test_pickles_beside_safetensors_are_named(tmp_path, capsys):
    path = shutil.copytree(GDN / "merged", tmp_path / "m")
    (path / "pytorch_model.bin").write_bytes(b"x")
    (path / "training_args.bin").write_bytes(b"x")
    (path / "model.Q4_0.gguf").write_bytes(b"x")
    describe(path)
    said = capsys.readouterr().err
    assert "'model.Q4_0.gguf' (and 1 more) is left out" in said and said.count("\n") == 1


# --- links and pipes ---


def test_a_member_is_in_its_directory_or_where_the_hub_keeps_it(tmp_path):
    """snapshots/REVISION/* may link to blobs/*; nothing else may lead anywhere."""
    snapshot, plain = tmp_path / "a/snapshots/1", tmp_path / "b/model"
    for directory in (snapshot, plain, tmp_path / "a/blobs", tmp_path / "b/model-other"):
        directory.mkdir(parents=True)
    blobs = [tmp_path / "a/blobs/x", tmp_path / "a/refs", tmp_path / "b/model-other/x"]
    for n, file in enumerate((*blobs, tmp_path / "b/blobs", plain / "own", tmp_path / "blobs")):
        file.write_text(str(n))
    for place, leads, good in (
        *((snapshot, blobs[0], True), (snapshot, blobs[1], False), (snapshot, blobs[2], False)),
        *((plain, blobs[0], False), (plain, blobs[2], False), (plain, tmp_path / "b/blobs", False)),
        (plain, tmp_path / "blobs", False),
        (plain, plain / "own", True),
    ):
        link = place / "link"
        link.symlink_to(leads)
        if good:
            check_member(link)
        else:
            with pytest.raises(AHNError, match="link: a link out of its directory"):
                check_member(link)
        link.unlink()
    (plain / "gone").symlink_to(plain / "nowhere")
    os.mkfifo(plain / "pipe")
    for name, what in (("gone", "missing"), ("pipe", "not a regular file"), ("no", "missing")):
        with pytest.raises(AHNError, match=f"{name}: {what}; fetch it again"):
            check_member(plain / name)
    # A file that was to be there is not passed over for another checkpoint beside it.
    (plain / "model.safetensors").symlink_to(plain / "nowhere")
    (plain / "model-00001-of-00001.safetensors").write_bytes(b"x")
    assert find_files(plain).paths == [plain / "model.safetensors"]


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
def test_a_path_that_mlx_does_not_open_is_named(tmp_path):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    directory.mkdir()
    with pytest.raises(AHNError, match="its path is not UTF-8, which MLX does not open; rename"):
        load_safetensors(directory / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_links_out_of_the_directory(tmp_path, name):
    path = model_dir(tmp_path / "m")
    secret = tmp_path / "secret"
    shutil.copy(path / ("config.json" if "config" in name else name), secret)
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(secret)
    with pytest.raises(AHNError, match=f"{name}: a link out of its directory"):
        describe(path)


@pytest.mark.parametrize("target", ["nowhere", "config.json"])
def test_broken_links_and_loops(tmp_path, target):
    path = model_dir(tmp_path / "m")
    (path / "config.json").unlink()
    (path / "config.json").symlink_to(target)
    with pytest.raises(AHNError, match=r"config.json: (missing|not a regular)"):
        read_config(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipe_instead_of_file(tmp_path, name):
    """Opening it would wait for ever."""
    path = model_dir(tmp_path / "m")
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(AHNError, match=f"{name}: not a regular file"):
        describe(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "mine.safetensors", None])
def test_no_safetensors(tmp_path, name):
    path = model_dir(tmp_path)
    (path / "model.safetensors").unlink()
    if name:
        (path / name).write_bytes(b"x")
    with pytest.raises(AHNError, match=f"no model.safetensors.*{name or ''}.*as safetensors"):
        read_tensors(path)


# --- config.json ---


def test_not_a_model_directory(tmp_path):
    with pytest.raises(AHNError, match="does not exist"):
        read_config(tmp_path / "absent")
    with pytest.raises(AHNError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(AHNError, match="is a file"):
        read_config(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 200_000, '{"a": ' + "9" * 9999 + "}"])
def test_config_is_not_json(tmp_path, text):
    (model_dir(tmp_path) / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(AHNError, match=r"config.json: not valid JSON") as error:
        describe(tmp_path)
    one_line(error)


def test_an_index_may_be_larger_than_a_config(tmp_path):
    path = model_dir(tmp_path)
    room = " " * (4 << 20)
    index(path, {"a": "model.safetensors"})
    (path / INDEX).write_text((path / INDEX).read_text() + room)
    assert read_tensors(path)
    sound = (path / "config.json").read_text()
    (path / "config.json").write_text(sound + room[len(sound) :])
    assert read_config(path)["model_type"]
    (path / "config.json").write_text(sound + room)
    with pytest.raises(AHNError, match=r"config\.json: larger than 4 MB"):
        read_config(path)


@pytest.mark.parametrize(
    "name, value",
    [("hidden_size", v) for v in (0, -64, 2**40, 64.0, "64", True, [64], float("nan"))]
    + [("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("vocab_size", 10**12)]
    + [("rms_norm_eps", v) for v in (0, -1, "1", float("nan"), float("inf"), False)]
    + [("rope_theta", []), ("rope_scaling", "yarn"), ("quantization", 4), ("text_config", 1)]
    + [("text_config", None), ("architectures", 1)]
    + [("model_type", None), ("model_type", 2), ("tie_word_embeddings", "yes")]
    + [("quantization", {}), ("quantization", {"bits": "4", "group_size": 64})],
)
def test_absurd_values(tmp_path, name, value):
    with pytest.raises(AHNError, match=name) as error:
        describe(model_dir(tmp_path, {**CONFIG, name: value}))
    assert "config.json: " in one_line(error)


@pytest.mark.parametrize("text", ["[]", "{", "3"])
def test_generation_config(tmp_path, text):
    (model_dir(tmp_path) / "generation_config.json").write_text(text)
    with pytest.raises(AHNError, match=r"generation_config.json: (must hold|not valid)"):
        describe(tmp_path)


def test_quantized_by_others(tmp_path):
    ours = {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {}}
    describe(model_dir(tmp_path, {**CONFIG, **ours}))
    theirs = {"quantization_config": {"quant_method": "gptq"}}
    for config in ({**CONFIG, **theirs}, CONFIG):
        with pytest.raises(AHNError, match="not by MLX"):
            describe(model_dir(tmp_path, config))
        (tmp_path / "hf_quant_config.json").write_text("{")


def test_config_must_be_an_object(tmp_path):
    with pytest.raises(AHNError, match="must hold an object"):
        read_config(model_dir(tmp_path, "[1]"))


def test_settings_are_nested_at_most_64_deep(tmp_path):
    for deep in (63, 64):
        (tmp_path / "a.json").write_text('{"a": ' + "[" * deep + "1" + "]" * deep + "}")
        if deep == 63:
            read_json_file(tmp_path / "a.json")
    with pytest.raises(AHNError, match="nested deeper than 64"):
        read_json_file(tmp_path / "a.json")


def source(*shape: int, dtype: str = "F32") -> Source:
    return Source("x", Path("m.safetensors"), TensorInfo(dtype, shape, 0, 0))


@pytest.mark.parametrize(
    ("width", "height", "held", "fits"),
    [
        (8, 4, source(2, 8), True),  # a head may be the embedding again
        (8, 4, source(3, 5), False),
        (8, 4, source(1, 1, dtype="U32"), True),  # as MLX packs numbers of two bits
        (11, 3, source(1, 1, dtype="U32"), False),
    ],
)
def test_a_model_has_at_most_twice_the_numbers_of_its_files(width, height, held, fits, tmp_path):
    model = nn.Linear(width, height, bias=False)
    if fits:
        check_size(tmp_path, model, {"weight": held})
        return
    shapes = rf"\[{height}, {width}\]; it has {re.escape(str(list(held.info.shape)))} in m.safe"
    with pytest.raises(AHNError, match=rf"{tmp_path}/config.json: .* whose 'weight' .* {shapes}"):
        check_size(tmp_path, model, {"weight": held})
    gguf = tmp_path / "m.gguf"
    with pytest.raises(AHNError, match=f"{gguf}: describes"):
        check_size(gguf, model, {"weight": held})


def test_the_parameter_that_is_too_large_by_most_is_named(tmp_path):
    sizes = {"layers.0": 100, "layers.1": 150, "layers.2": 150}
    model = nn.Sequential(*(nn.Linear(n, 1, bias=False) for n in sizes.values()))
    held = {"layers.0.weight": source(1, 100), "layers.1.weight": source(1, 1)}
    with pytest.raises(
        AHNError, match=r"whose 'layers\.2\.weight' has shape \[1, 150\]; its files"
    ):
        check_size(tmp_path, model, held)


def test_what_is_said_of_a_config_is_no_book(tmp_path):
    def refuse(_):
        raise AHNError("x" * 900)

    with pytest.raises(AHNError) as refused:
        built(tmp_path, refuse, {})
    assert str(refused.value) == f"{tmp_path}: " + "x" * 400
    path = shutil.copytree(GDN / "merged", tmp_path / "q")
    settings, odd = {"group_size": 32, "bits": 4}, "model.layers.0.mlp.up_proj"
    settings[odd] = {**settings, "mode": "y" * 900}
    (path / "config.json").write_text(json.dumps({**read_json(path), "quantization": settings}))
    tensors = dict(mx.load(str(path / "model.safetensors")))
    mx.eval(tensors)
    save(path, "model.safetensors", **tensors, **{f"{odd}.scales": mx.zeros((1, 1))})
    with pytest.raises(AHNError, match=r"not quantized as MLX does it \(.*yyy\)$") as refused:
        load_model(path)
    assert len(str(refused.value)) == len(f"{path}: not quantized as MLX does it ()") + 200
    with pytest.raises(AHNError, match=r"dtype must be one of .*, not 'int8'"):
        load_model(GDN / "merged", dtype="int8")


def test_tensors_are_read_as_often_as_they_are_asked_for(monkeypatch):
    """From a file that is opened once for all of them, however many."""
    opened, real = [], formats.load_safetensors
    monkeypatch.setattr(formats, "load_safetensors", lambda f: opened.append(f) or real(f))
    read, sources = formats.Reader(), read_headers(GDN / "merged")
    expected = mx.load(str(GDN / "merged/model.safetensors"))
    assert same({name: read(each) for name, each in sources.items()}, expected)
    assert len(opened) == 1
    assert same({name: read(each) for name, each in sources.items()}, expected)


def test_a_model_is_known_by_the_values_of_its_small_weights():
    """Those of at most 16,384 numbers."""
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(16_385, 1, bias=False))
    before = identity._of_weights(model)
    large, small = model.layers[1], model.layers[0]
    large.weight = large.weight + 1
    assert identity._of_weights(model) == before
    small.weight = small.weight + 1
    after = identity._of_weights(model)
    assert after["weights"] != before["weights"]
    assert after["weights' shapes"] == before["weights' shapes"]
    assert identity.hash_of({"a": 1, "b": mx.float32}) == identity.hash_of(
        {"b": mx.float32, "a": 1}
    )


def test_path_with_brackets(tmp_path):
    """Which a glob would expand."""
    path = shutil.copytree(GDN / "merged", tmp_path / "model[1]")
    assert same(read_tensors(path), read_tensors(GDN / "merged"))
    load_model(path)


# --- names and values ---


def test_published_names_and_back():
    for variant in sorted(GOLDEN.glob("qwen*")):
        published = read_headers(variant / "ahn_only")
        ours = rename_published({name: name for name in published})
        assert all(".self_attn.ahn." in n or ".self_attn.router." in n for n in ours)
        assert {published_name(n): n for n in ours} == {v: k for k, v in ours.items()}
        assert {n for n in published if n not in ours.values()} == {
            n for n in published if n.endswith("ahn.fn.D")
        }
        assert rename_published(ours) == ours
        assert all(map(is_memory, published)) and all(map(is_memory, ours))


def test_names_that_stay_and_names_that_go():
    plain = {"model.layers.0.self_attn.q_proj.weight": 1, "lm_head.weight": 2, "ahn.fn.x": 3}
    gone = {"model.layers.0.self_attn.rotary_emb.inv_freq": 4, "model.layers.1.ahn.fn.D": 5}
    assert rename_published({**plain, **gone}) == plain
    assert not any(map(is_memory, plain))
    twice = {"model.layers.0.ahn.fn.A_log": 1, "model.layers.0.self_attn.ahn.A_log": 2}
    with pytest.raises(AHNError, match="two names"):
        rename_published(twice)
    # Layers with full attention have a memory in the release, which nothing uses.
    layers = {f"model.layers.{i}.ahn.fn.A_log": i for i in (1, 2, 10, 11)}
    assert list(rename_published(layers, (1, 10)).values()) == [2, 11]
