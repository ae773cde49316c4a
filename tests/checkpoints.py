"""Small checkpoints for tests: the golden ones, and copies to be damaged."""

import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.load import load_model
from ahn_mlx.train.output import load_base, write_checkpoint

REPO = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
GDN = GOLDEN / "qwen2-gdn"
IDS = mx.arange(40)[None] * 7 % 256


def read_json(path: Path) -> dict:
    """config.json of a directory."""
    return json.loads((path / "config.json").read_text())


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and mx.array_equal(a[k], b[k]).item() for k in a
    )


def logits(path: Path) -> mx.array:
    """What a directory's model makes of IDS, beyond its window [L, V]."""
    return load_model(path, dtype="float32")[0](IDS)[0]


def close(a: mx.array, b: mx.array) -> bool:
    return mx.abs(a - b).max().item() < 1e-4


def copies(path: Path) -> tuple[Path, Path, Path]:
    """A base and its AHN parameters, to be damaged, and where to write."""
    base = shutil.copytree(GDN / "base", path / "in/base")
    ahn = shutil.copytree(GDN / "ahn_only", path / "in/ahn")
    return base, ahn, path / "out/model"


def edit_config(path: Path, **fields: object) -> None:
    """Set fields; None removes one."""
    config = {**read_json(path), **fields}
    kept = {k: v for k, v in config.items() if v is not None}
    (path / "config.json").write_text(json.dumps(kept))


def edit_tensors(path: Path, **changes: mx.array | None) -> None:
    """Set tensors by the end of their name; None removes one."""
    tensors = mx.load(str(path / "model.safetensors"))
    for end, value in changes.items():
        name = next((n for n in tensors if n.endswith(end)), end)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    mx.eval(tensors)
    mx.save_safetensors(str(path / "model.safetensors"), tensors)


def byte_bpe() -> Tokenizer:
    """One token per byte, 0 to 255 in the order of their signs."""
    bpe = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def byte_tokenizer(path: Path) -> Path:
    """A directory with the tokenizer of the golden models: one token per byte."""
    path.mkdir(parents=True)
    byte_bpe().save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # 256, 257, 258


def chat_tokenizer(
    template: str | None = CHATML, bpe: Tokenizer | None = None, plain: tuple[str, ...] = ()
) -> TokenizerWrapper:
    """One token per byte, CONTROLS, and then `plain`: added tokens that are not special."""
    bpe = bpe or byte_bpe()
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROLS])
    bpe.add_tokens([AddedToken(t, normalized=False) for t in plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=template
    )
    return TokenizerWrapper(tokenizer)


def model_dir(path: Path, config: object = None, **tensors: mx.array) -> Path:
    path.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config or read_json(GDN / "base"))
    (path / "config.json").write_text(text)
    mx.save_safetensors(str(path / "model.safetensors"), tensors or {"a": mx.ones((2, 3))})
    return path


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The converter as a user starts it."""
    command = [sys.executable, str(REPO / "convert.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


class Evil:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, "w"))


def pickled(path, value):
    """A .bin file as torch lays it out, with any pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        z.writestr("archive/version", "3\n")
    path.write_bytes(buffer.getvalue())


CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talking_model(variant: str, directory: Path) -> Path:
    """A golden model, converted, with a tokenizer of bytes and a chat template."""
    out = directory / "model"
    convert(GOLDEN / variant / "base", GOLDEN / variant / "ahn_only", out)
    shutil.copytree(byte_tokenizer(out.with_name("tokenizer")), out, dirs_exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
BOM = b"\xef\xbb\xbf"
TRAINING = {
    **{"memory": "gated_deltanet", "window": 60, "sinks": 4, "sink_positions": "clamped"},
    **{"router": False, "window_gain": False},
    **{"dtype": "float32", "seed": 0, "data": ["a.txt"]},
}


def make_base(path: Path, family: str = "qwen2", **config) -> Path:
    """A base of random parameters, with the tokenizer of bytes."""
    config = {
        **{"model_type": family, "hidden_size": 64, "num_hidden_layers": 2},
        **{"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"rms_norm_eps": 1e-6, "vocab_size": 264, "max_position_embeddings": 512},
        **{"rope_theta": 5e5, "tie_word_embeddings": True, "torch_dtype": "float32"},
        **({} if family == "qwen2" else {"head_dim": 32}),
        **config,
    }
    mx.random.seed(3)
    module = FAMILIES[family]
    parameters = tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters())
    # Loud enough that positions matter.
    weights = {k: mx.random.normal(x.shape) * 0.3 if x.ndim > 1 else x for k, x in parameters}
    byte_tokenizer(path)
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    return path


def memory_of(base: Path, out: Path) -> Path:
    """What training writes before its first step."""
    options = {**TRAINING, "base": str(base)}
    out.mkdir()
    write_checkpoint(out, load_base(options), options)
    return out
