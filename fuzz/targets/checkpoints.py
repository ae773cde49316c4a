"""Directories of models: settings, headers, indexes, pickles, cards, and all of them at once."""

import io
import json
import math
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import GDN, GOLDEN, byte_tokenizer
from mlx.utils import tree_flatten

from ahn_mlx.checkpoints import card, directory, load, pickles, safetensors
from ahn_mlx.checkpoints.baseconfig import (
    check_quantization,
    check_same_base,
    has_own_window,
    read_config,
)
from ahn_mlx.checkpoints.formats import Reader, describe, describe_config
from ahn_mlx.model.augment import build, build_base
from ahn_mlx.model.config import AHNConfig
from ahn_mlx.model.division import Part
from ahn_mlx.model.names import is_memory
from ahn_mlx.model.ranks import Ranks

from ..mutate import of_json, of_zip, product
from ..oracle import Target, also

ROPE = (
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_type", "type", "factor", "yarn"),
    *(
        "llama3",
        "longrope",
        "linear",
        "dynamic",
        "default",
        "mrope",
        "attention_factor",
        "truncate",
    ),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "short_factor"),
    *("long_factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"),
)
CONFIG = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "torch_dtype", "dtype", "eos_token_id", "hidden_act"),
    *("attention_bias", "layer_types", "sliding_window", "use_sliding_window", "architectures"),
    *("max_window_layers", "quantization", "quantization_config", "bits", "group_size", "mode"),
    *("text_config", "ahn_release", "full_attention", "sliding_attention", "qwen2", "qwen3"),
    *("llama", "mistral", "gemma3_text", "phi3", "gpt2", "mixtral", "affine", "silu", *ROPE),
)
SETTINGS = (
    *("ahn", "memory", "window", "sinks", "sink_positions", "fa_layer_ids", "router"),
    *("query_projection", "gated_deltanet", "deltanet", "mamba2", "absolute", "clamped"),
    *("_ahn_implementation", "GatedDeltaNet", "DeltaNet", "Mamba2", "num_attn_sinks"),
    *("use_ahn_router", "use_q_proj", "sliding_window", "window_gain"),
)
HEADER = (
    *(
        "__metadata__",
        "dtype",
        "shape",
        "data_offsets",
        "format",
        "mlx",
        "pt",
        "F32",
        "F16",
        "BF16",
    ),
    *("U32", "U8", "I64", "BOOL", "F8_E4M3", "C64", "model.embed_tokens.weight", "lm_head.weight"),
)
PICKLED = (
    *("ctorch._utils\n_rebuild_tensor_v2\n", "ctorch._utils\n_rebuild_parameter\n", "storage"),
    *("ctorch\nFloatStorage\n", "ctorch\nBFloat16Storage\n", "ctorch\nLongStorage\n", "cpu"),
    *("ccollections\nOrderedDict\n", "ctorch\nSize\n", "cbuiltins\neval\n", "cos\nsystem\n"),
    *("ctorch._utils\n_rebuild_sparse_tensor\n", "ctorch\ndevice\n", "cuda:0", "meta", "\x80\x02"),
    *("model.norm.weight", "(", ")", "}", "u.", "R", "Q", "t", "\x86", "\x87", "q\0", "X\5\0\0\0"),
)


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def configs() -> list[bytes]:
    """Of golden models, and of others whose settings are written otherwise."""
    found = [json.loads(f.read_text()) for f in sorted(GOLDEN.glob("*/*/config.json"))]
    base = json.loads((GDN / "base/config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    layers = base["num_hidden_layers"]
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    llama = {k: v for k, v in base.items() if not k.startswith("rope")} | {"model_type": "llama"}
    return [
        *map(text, found),
        text({**base, "rope_scaling": yarn}),
        text({**base, "rope_scaling": {**yarn, "attention_factor": 1.1386, "truncate": True}}),
        text({**llama, "rope_parameters": nested, "layer_types": ["full_attention"] * layers}),
        text({**llama, "rope_parameters": {"rope_type": "llama3", "factor": 8, "rope_theta": 5e5}}),
        text(
            {**base, "quantization": {"group_size": 64, "bits": 4}, "torch_dtype": "torch.float16"}
        ),
        text({**base, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        text({**base, "eos_token_id": [1, "2", None], "head_dim": 16, "hidden_act": "gelu"}),
        text({**base, "model_type": "gemma3_text", "rope_parameters": nested, "sliding_window": 8}),
        text({**base, "ahn": {"memory": "mamba2", "window": 32, "sinks": 4, "fa_layer_ids": [1]}}),
    ]


def _put(name: str) -> Any:
    def prepare(data: bytes, place: Path) -> bytes:
        (place / name).write_bytes(data)
        return data

    return prepare


def _config(data: bytes, place: Path, out: Path) -> None:
    for missing in (place / "config.json", out):
        with also():
            read_config(missing)
    config = read_config(place)
    has_own_window(config)
    for work in (
        lambda: check_quantization(place, config),
        lambda: check_same_base(place, config, place, _base()),
        lambda: check_same_base(place, _base(), place, config),
        lambda: describe_config(place),
        lambda: load.built(place, AHNConfig.from_dict, config),
    ):
        with also():
            work()


@cache
def _base() -> dict[str, Any]:
    return dict(json.loads((GDN / "base/config.json").read_text()))


def _generation(data: bytes, place: Path) -> Path:
    """Beside a tokenizer, or without one if it begins with white space."""
    path = place / ("alone" if data[:1].isspace() else "told")
    if not path.exists():
        path.mkdir() if path.name == "alone" else byte_tokenizer(path)
        shutil.copyfile(GDN / "base/config.json", path / "config.json")
    (path / "generation_config.json").write_bytes(data)
    return path


def _settings(data: bytes, place: Path) -> Any:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {"ahn": value}


def _ahn(value: Any, place: Path, out: Path) -> None:
    config = AHNConfig.from_dict(value)
    AHNConfig.from_dict({"ahn": json.loads(json.dumps(config.to_dict()))})


def settings() -> list[bytes]:
    """Of configs that have some, ours and the release's."""
    found = map(json.loads, configs())
    ours = [c for c in found if "ahn" in c or "_ahn_implementation" in c]
    return [text({k: v for k, v in c.items() if k in SETTINGS}) for c in ours]


# Files of tensors


def packed(data: bytes, fill: bytes = b"\0") -> bytes:
    """What begins as JSON is a header, which gets its length and as many bytes as it says."""
    if not data.startswith(b"{"):
        return data
    try:
        entries = json.loads(data).values()
        ends = [
            e["data_offsets"][1] for e in entries if isinstance(e, dict) and "data_offsets" in e
        ]
        size = min(max([x for x in ends if type(x) is int], default=0), 1 << 18)
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        size = 8
    return struct.pack("<Q", len(data)) + data + fill * max(size, 0)


def _tensors(data: bytes, place: Path) -> Path:
    file = place / "model.safetensors"
    # A header with a space at its end is one of NaN.
    file.write_bytes(packed(data, b"\xff" if data.endswith(b" ") else b"\0"))
    return file


def _read_tensors(file: Path, place: Path, out: Path) -> None:
    header, metadata = safetensors.read_header_and_metadata(file)
    arrays = directory.load_safetensors(file)
    assert arrays.keys() == header.keys()
    mx.eval(arrays)
    safetensors.not_finite(arrays.items())
    for name, x in arrays.items():
        assert x.shape == header[name].shape
        if x.dtype in safetensors.EXPONENT:
            with also():
                directory.check_finite(name, x)
    _again({n: x for n, x in arrays.items() if x.dtype in safetensors.WRITTEN}, out / "again")


def _again(arrays: dict[str, mx.array], file: Path) -> None:
    """Written by us, and read in parts as ranks do, it is the same."""
    layout = {n: safetensors.Layout(x.dtype, x.shape) for n, x in arrays.items()}
    with safetensors.TensorWriter(file, layout, {"format": "mlx"}) as writer:
        for name, x in arrays.items():
            writer.put(name, x)
    for name, info in safetensors.read_header(file).items():
        whole = safetensors.bits(arrays[name])
        for axis, n in enumerate(info.shape[:2]):
            part = Part(axis, n // 3, n - n // 3, n)
            found = safetensors.bits(safetensors.read_part(file, info, part))
            held = np.take(whole, range(part.start, part.stop), axis)
            found = np.take(found, range(part.stop - part.start), axis)
            assert found.tobytes() == held.tobytes(), f"{name} {part}"


def in_order(header: Any) -> Any:
    """The header with its tensors one after the other, as large as their shapes are."""
    end = 0
    for about in header.values() if isinstance(header, dict) else ():
        try:
            size = safetensors.ITEM_SIZE[about["dtype"]] * product(about["shape"])
            if 0 <= size < 1 << 18:
                about["data_offsets"] = [end, end := end + size]
        except (TypeError, KeyError, ValueError):
            continue
    return header


def _mended(value: Any) -> Any:
    """What the target `model` takes, with a header that is right."""
    if isinstance(value, dict):
        in_order(value.get("header"))
    return value


def headers() -> list[bytes]:
    raw = (GDN / "ahn_only/model.safetensors").read_bytes()
    whole = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    whole = {k: v for k, v in whole.items() if isinstance(v, dict) and "dtype" in v}
    found = [text(in_order(dict(list(whole.items())[:3])))]
    kinds = {"F32": 4, "BF16": 2, "U32": 4, "BOOL": 1, "I64": 8, "F8_E4M3": 1}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for kind, size in kinds.items():
        header[kind] = {"dtype": kind, "shape": [2, 3], "data_offsets": [end, end + 6 * size]}
        end += 6 * size
    small = text(header)
    lfs = b"version https://git-lfs.github.com/spec/v1\n"
    return [*found, small, small + b" ", packed(small), text({}), lfs]


def _index(data: bytes, place: Path) -> Path:
    """An index beside shards; JSON with `files` has headers of a whole directory by their names, or
    what a link of that name leads to. It lies as in huggingface-hub's cache."""
    path = place / "models--a--b/snapshots/1"
    if not path.exists():
        shutil.copytree(GDN / "merged_sharded", path)
    try:
        files = json.loads(data)["files"]
        files = dict(files) if isinstance(files, dict) else {}
    except (ValueError, TypeError, KeyError, RecursionError):
        (path / directory.INDEX).write_bytes(data)
        return path
    path = place / "models--a--c/snapshots/1"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (place / "models--a--c/blobs").mkdir(exist_ok=True)
    (place / "models--a--c/blobs/1").write_bytes(headers()[3])
    for name, value in list(files.items())[:9]:
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > 90:
            continue
        if isinstance(value, str) and value and "\0" not in value and len(value) < 200:
            (path / name).symlink_to(value)
        else:
            header = json.dumps(value).encode()
            mark = b"\xef\xbb\xbf" if value == {"": "mark"} else b""
            is_header = "safe" in Path(name).suffix
            (path / name).write_bytes(packed(header) if is_header else mark + header)
    return path


def _read_index(path: Path, place: Path, out: Path) -> None:
    directory.read_unused(path)
    arrays = directory.read_tensors(path)
    with also():
        directory.copy_files(("config.json", "x.json"), [path], out)
    for name, x in arrays.items():
        if x.dtype in safetensors.EXPONENT and x.size < 1 << 12:
            with also():
                directory.check_finite(name, x)
    with also():
        load.describe(path)


def indexes() -> list[bytes]:
    whole = json.loads((GDN / "merged_sharded" / directory.INDEX).read_text())
    names = dict(list(whole["weight_map"].items())[:3])
    found = [whole, {**whole, "weight_map": names}, {"weight_map": {"a": "../b"}}]
    one = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    two = {"b": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}
    shards = [f"{n}-0000{i}-of-00002.safetensors" for n in ("model", "weights") for i in (1, 2)]
    both = {shards[0]: one, shards[1]: two}
    listed = {"weight_map": {"a": shards[0], "b": shards[1]}}
    map_a = {"weight_map": {"b": shards[1]}}
    for files in (
        both,
        {**both, "config.json": {"": "mark"}, "x.json": {}},
        {shards[0]: {**one, **two}, shards[1]: two, directory.INDEX: listed},
        {**both, "config.json": {}, "unused.safetensors": one, "pytorch_model.bin": {}},
        {shards[0]: one},
        {**both, "model-00001-of-00003.safetensors": one},
        {shards[0]: one, shards[1]: one},
        {**both, directory.INDEX: listed},
        {shards[0]: one, shards[1]: {**two, **one}, directory.INDEX: map_a},
        {shards[0]: {**one, **two}, shards[1]: {}, directory.INDEX: listed},
        {"weights.00.safetensors": one, "weights.01.safetensors": two},
        {"weights.01.safetensors": two},
        {"consolidated.safetensors": one, "config.json": "../../blobs/1"},
        {"pytorch_model.bin": {}, "model.gguf": {}},
        {"model.safetensors": "../../blobs/1", "config.json": {}},
        {"model.safetensors": "/etc/passwd"},
        {"model.safetensors": one, "config.json": "../../../out"},
    ):
        found.append({"files": files})
    return list(map(text, found))


def _model(data: bytes, place: Path) -> None:
    """config, header and index of one directory, in one JSON; and a tokenizer."""
    if not (place / "tokenizer.json").exists():
        shutil.copytree(byte_tokenizer(place / "t"), place, dirs_exist_ok=True)
        shutil.rmtree(place / "t")
    for name in (directory.INDEX, "generation_config.json"):
        (place / name).unlink(missing_ok=True)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = {}
    value = value if isinstance(value, dict) else {}
    for name in ("config.json", directory.INDEX, "generation_config.json"):
        if name in value:
            (place / name).write_text(json.dumps(value[name]), errors="replace")
    header = json.dumps(value.get("header", {})).encode()
    fill = b"\xff" if value.get("nan") is True else b"\0"
    (place / "model.safetensors").write_bytes(packed(header, fill))


def _load_model(_: None, place: Path, out: Path) -> None:
    config, _ = describe(place)
    if "ahn" in config or "_ahn_implementation" in config:
        model, _ = load.load_model(place)
        with also():  # which judges a tokenizer too
            load.load(place, dtype="float32")
        with also():
            load.load_model(place, ranks=Ranks(mx.distributed.init()))
    else:
        model, _ = load.load_plain(place)
        load.finish(model, None, place)
    model(mx.array([[1, 2, 3]]))


def models() -> list[bytes]:
    """Of a few numbers, with a memory of each kind; a part quantized; one without."""
    found = []
    for number, memory in enumerate(("gated_deltanet", "deltanet", "mamba2", None)):
        family = ("qwen2", "qwen3", "llama", "gemma2")[number]
        config = {
            **{"model_type": family, "hidden_size": 64, "num_hidden_layers": 1},
            **{"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1},
            **{"rms_norm_eps": 1e-6, "vocab_size": 8, "rope_theta": 5e5, "head_dim": 32},
            **{"tie_word_embeddings": True, "max_position_embeddings": 64},
        }
        if memory is not None:
            config["ahn"] = {"memory": memory, "window": 8, "sinks": 2}
        made = build(config) if memory is not None else build_base(config)
        shapes = {name: x.shape for name, x in tree_flatten(made.parameters())}  # type: ignore[misc]
        header, end = {}, 0
        for name, shape in shapes.items():
            size = 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        found.append(text({"config.json": config, "header": header}))
        if memory == "deltanet":
            found.append(text({"config.json": config, "header": header, "nan": True}))
            own = {name: x for name, x in header.items() if is_memory(name)}
            found.append(text({"config.json": config, "header": in_order(own)}))
        config = {**config, "quantization": {"group_size": 64, "bits": 4}}
        parts = {"weight": ("U32", [8, 8]), "scales": ("F32", [8, 1]), "biases": ("F32", [8, 1])}
        header.pop("model.embed_tokens.weight")
        for part, (dtype, shape) in parts.items():
            size = 4 * math.prod(shape)
            about = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            header[f"model.embed_tokens.{part}"] = about
            end += size
        del header["model.norm.weight"]
        shapes = {"data_offsets": [end, end + 256], "shape": [64], "dtype": "F32"}
        header["model.norm.weight"] = shapes
        both = {"config.json": config, "generation_config.json": {"eos_token_id": [1, 2]}}
        found.append(text({**both, "header": in_order(header)}))
    return found


# Cards


def _written_card(data: bytes, place: Path) -> Path:
    """As in huggingface-hub's cache, where a directory's name says where it is from."""
    path = place / "models--a--b/snapshots/1"
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_bytes(data)
    for name in ("plain", "packed"):
        if not (place / name).exists():
            (place / name).mkdir()
            packed = {"quantization": {"group_size": 64, "bits": 4}} if name == "packed" else {}
            config = json.loads((GDN / "merged/config.json").read_text())
            (place / name / "config.json").write_bytes(text({**config, **packed}))
    return path


def _card(path: Path, place: Path, out: Path) -> None:
    origins = [*card.read_origins(path), card.origin("base", path)]
    card.base_model(path)
    # What a conversion of it would say, and what is read of that; it takes long.
    if (size := (path / card.CARD).stat().st_size) % 8:
        return
    other = place / ("plain" if size % 16 else "packed")
    card.write_card(other, other.name, origins)
    assert card.read_origins(other) == origins, origins
    named = [o.repo for o in origins if o.revision]
    assert card.base_model(other) == (named or [""])[0]


def cards() -> list[bytes]:
    found = [
        b"---\nlicense: mit\nbase_model: [a/b]\nahn_sources:\n- part: base\n  repo: a/b\n---\n# x",
        b"---\nbase_model: Qwen/Qwen2.5-3B\nlicense_name: other\na: &a [1, 2]\nb: *a\n---\n",
        b"---\nlicense: [mit]\nahn_sources:\n- part: base\n  repo: a|b\n  revision: '1'\n---\n",
        b"---\na: " + b"[" * 600 + b"\n---\n",
        b"no front matter",
    ]
    return [text + b"\n" * n for text in found for n in range(16)]


# Pickles of torch


def _pickle(data: bytes, place: Path) -> Path:
    """P: a pickle, in an archive as torch writes it; a list in JSON: tensors, pickled by us.
    Anything else: the archive itself, or an index beside one."""
    file = place / "pytorch_model.bin"
    (place / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    if data.startswith(b"["):
        data = b"P" + _pickled(json.loads(data))
    if data.startswith(b"P") and not data.startswith(b"PK"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as z:
            z.writestr("archive/data.pkl", data[1:])
            z.writestr("archive/byteorder", "little")
            for key in range(2):
                z.writestr(f"archive/data/{key}", bytes(64))
            z.writestr("archive/version", "3\n")
        file.write_bytes(buffer.getvalue())
    elif data.startswith(b"{"):
        (place / "pytorch_model.bin.index.json").write_bytes(data)
    else:
        file.write_bytes(data)
    return file


def _pickled(tensors: list[tuple[str, str, str, int, int, Any, Any]]) -> bytes:
    """name, type of storage, its key and length, first number, shape and strides of each."""
    import torch

    class Storage(tuple[Any, ...]):
        pass

    class Tensor(tuple[Any, ...]):
        def __reduce__(self) -> Any:
            storage, first, shape, strides = self
            rest = (first, tuple(shape), tuple(strides), False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, (storage, *rest)

    class Pickler(pickle.Pickler):
        def persistent_id(self, x: Any) -> Any:
            return tuple(x) if isinstance(x, Storage) else None

    made = {}
    for name, kind, key, length, first, shape, strides in tensors:
        storage = Storage(("storage", getattr(torch, kind), key, "cpu", length))
        made[name] = Tensor((storage, first, shape, strides))
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(made)
    return buffer.getvalue()


def _read_pickle(file: Path, place: Path, out: Path) -> None:
    files = pickles.find_files(place)
    sources = pickles.read_headers(place, files)
    read = Reader()
    for source in sources.values():
        if source.info.dtype in safetensors.FLOATS:
            read(source)
    if not (place / "config.json").exists():
        shutil.copyfile(GDN / "base/config.json", place / "config.json")
    with also():
        describe(place)


def _pickles() -> list[bytes]:
    """None without torch, which reads what is accepted."""
    if not find_spec("torch"):
        return []
    import torch

    plain = pickle.dumps({"a": 1, "b": [1.5, "x", None]}, protocol=2)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("archive/data.pkl", plain)
        z.writestr("archive/version", "3\n")
    found = [b"P" + plain, buffer.getvalue(), text({"weight_map": {"a": "pytorch_model.bin"}})]
    with zipfile.ZipFile(io.BytesIO(_saved(torch, torch.ones(2, 3)))) as z:
        name = next(n for n in z.namelist() if n.endswith("data.pkl"))
        found.append(b"P" + z.read(name))
    found += [_saved(torch, torch.ones(2, 3)), _saved(torch, torch.ones(3).to(torch.bfloat16))]
    found.append(_saved(torch, torch.eye(3).to_sparse()))
    head = ("lm_head.weight", "BFloat16Storage", "0", 16, 8, [2, 4], [4, 1])
    norm = ("model.norm.weight", "FloatStorage", "1", 16, 0, [16], [1])
    found.append(text([head, norm, ("x", "LongStorage", "1", 8, 1, [2, 2], [0, 1])]))
    return found


def _saved(torch: Any, x: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": x}, buffer)
    return buffer.getvalue()


def _packed(data: bytes, longest: int, seed: int) -> bytes:
    """Pickles, in archives or not, byte by byte; their archives, part by part; JSON, by values."""
    change = _TORCH if data.startswith(b"PK") else _INDEX
    return change(data, longest, seed)


_JSON = of_json((*CONFIG, *SETTINGS))
_STORAGES = tuple(f"{kind}Storage" for kind in ("Half", "Double", "Int", "Bool", "ComplexFloat"))
_INDEX = of_json(("weight_map", "pytorch_model.bin", "../x", "x", "0", "1", *_STORAGES))
_TORCH = of_zip(("archive/data.pkl", "archive/data/0", "archive/byteorder", "archive/version"))
TARGETS = [
    Target(
        "config",
        _put("config.json"),
        _config,
        configs,
        (
            *("checkpoints/baseconfig.py", "checkpoints/directory.py", "checkpoints/formats.py"),
            "model/config.py",
        ),
        (*CONFIG, *SETTINGS),
        _JSON,
    ),
    Target(
        "generation",
        _generation,
        lambda path, place, out: read_config(path),
        lambda: [
            *(b'{"eos_token_id": [1, 2]}', b'{"eos_token_id": "x"}', b"{}"),
            *(b' {"eos_token_id": ["x", 1]}', b'{"eos_token_id": "no such"}'),
        ],
        ("checkpoints/baseconfig.py", "checkpoints/directory.py"),
        ("eos_token_id", "bos_token_id", "pad_token_id", "max_length"),
        of_json(("eos_token_id",)),
    ),
    Target(
        "ahn-settings", _settings, _ahn, settings, ("model/config.py",), SETTINGS, of_json(SETTINGS)
    ),
    Target(
        "safetensors",
        _tensors,
        _read_tensors,
        headers,
        ("checkpoints/safetensors.py", "checkpoints/directory.py"),
        HEADER,
        of_json(HEADER, in_order),
    ),
    Target(
        "index",
        _index,
        _read_index,
        indexes,
        ("checkpoints/directory.py", "checkpoints/formats.py"),
        ("weight_map", "metadata", "total_size", "model-00001-of-00003.safetensors", "..", "\0"),
        of_json(("weight_map", "metadata", "model-00001-of-00003.safetensors", "../x", "x")),
    ),
    Target(
        "model",
        _model,
        _load_model,
        models,
        tuple(f"checkpoints/{name}.py" for name in ("load", "formats", "baseconfig", "directory")),
        (*CONFIG, *SETTINGS, *HEADER),
        of_json((*CONFIG, *SETTINGS, *HEADER), _mended),
        longest=1 << 15,
    ),
    Target(
        "card",
        _written_card,
        _card,
        cards,
        ("checkpoints/card.py",),
        ("---\n", "license", "base_model", "ahn_sources", "part", "repo", "revision", "&a", "*a"),
    ),
    Target(
        "pickles",
        _pickle,
        _read_pickle,
        _pickles,
        ("checkpoints/pickles.py", "checkpoints/formats.py"),
        PICKLED,
        _packed,
    ),
]
