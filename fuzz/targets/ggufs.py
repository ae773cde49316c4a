"""GGUF: headers, the settings in them, tensors and tokenizers."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoints import GDN, read_json
from tokenizers import pre_tokenizers

from ahn_mlx.checkpoints import gguf
from ahn_mlx.checkpoints.baseconfig import normalise
from ahn_mlx.checkpoints.formats import describe
from ahn_mlx.checkpoints.ggufheader import ARRAY, KINDS, NUMBERS, STRING
from ahn_mlx.checkpoints.ggufile import GGUFile
from ahn_mlx.checkpoints.ggufmodels import ARCHITECTURES
from ahn_mlx.checkpoints.load import load_plain
from ahn_mlx.checkpoints.tokenizer import load_tokenizer

from ..mutate import of_json, product
from ..oracle import Target

TOKENIZER = (
    *("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"),
    *("padding_token_id", "unknown_token_id", "add_bos_token", "add_eos_token", "eot_token_id"),
)
WORDS = (
    *("general.architecture", "general.alignment", "split.count", "split.no", "qwen2", "llama"),
    *("split.tensors.count", "qwen3", "rope.scaling.type", "rope.scaling.factor", "yarn", "linear"),
    *("token_embd.weight", "output.weight", "blk.0.attn_q.weight", "attention.head_count", "gpt2"),
    *("rope.freq_base", "rope.dimension_count", "rope_freqs.weight", "tokenizer.chat_template"),
    *(f"tokenizer.ggml.{name}" for name in TOKENIZER),
    *("smollm", "llama-bpe", "<|im_end|>", "a b"),
)


def _string(value: Any) -> bytes:
    raw = str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _pack(form: str, value: Any) -> bytes:
    try:
        return struct.pack("<" + form, value)
    except (struct.error, OverflowError, ValueError):
        return bytes(struct.calcsize("<" + form))


def _value(kind: Any, value: Any) -> bytes:
    """kind: a number of a type, or [ARRAY, type]."""
    if kind == STRING:
        return _pack("I", STRING) + _string(value)
    if isinstance(kind, list) and len(kind) == 2:
        item, values = kind[1], value if isinstance(value, list) else [value]
        head = _pack("I", ARRAY) + _pack("I", item) + _pack("Q", len(values))
        if item == STRING:
            return head + b"".join(map(_string, values))
        form = NUMBERS.get(item, "B") if isinstance(item, int) else "B"
        return head + b"".join(_pack(form, v) for v in values)
    form = NUMBERS.get(kind, "B") if isinstance(kind, int) else "B"
    return _pack("I", kind) + _pack(form, value)


def encode(facts: dict[str, Any]) -> bytes:
    """A file as JSON describes it: entries [name, type, value], tensors [name, shape, type,
    offset], and how many bytes come after them."""
    entries, tensors = facts["entries"], facts["tensors"]
    out = b"GGUF" + _pack("I", facts.get("version", 3))
    out += _pack("Q", len(tensors)) + _pack("Q", len(entries))
    for name, kind, value in entries:
        out += _string(name) + _value(kind, value)
    for name, shape, kind, offset in tensors:
        out += _string(name) + _pack("I", len(shape)) + b"".join(_pack("Q", n) for n in shape)
        out += _pack("I", kind) + _pack("Q", offset)
    return out + bytes(-len(out) % 32) + bytes(min(max(int(facts["bytes"]), 0), 1 << 18))


def _in_order(facts: Any) -> Any:
    """With its tensors one after the other, as large as their shapes are."""
    try:
        end = 0
        for tensor in facts["tensors"]:
            _, shape, kind, _ = tensor
            size = product(shape) // KINDS[kind].values * KINDS[kind].size
            if not 0 <= size < 1 << 17:
                return facts
            tensor[3], end = end, end + -(-size // 32) * 32
        facts["bytes"] = end
    except (TypeError, KeyError, ValueError):
        pass
    return facts


def _file(data: bytes, place: Path) -> Path:
    """JSON is a file, or the parts of one; anything else is the file itself."""
    for part in place.glob("*.gguf"):
        part.unlink()
    file = place / "model.gguf"
    if data.startswith(b'{"parts"'):
        with suppress(ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError):
            parts = [encode(part) for part in json.loads(data)["parts"][:4]]
            files = [place / f"model-{n + 1:05d}-of-{len(parts):05d}.gguf" for n in range(4)]
            for path, part in zip(files, parts, strict=False):
                path.write_bytes(part)
            return files[0]
    if data.startswith(b"{"):
        with suppress(ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError):
            data = encode(json.loads(data))
    file.write_bytes(data)
    return file


def _read(file: Path, place: Path, out: Path) -> None:
    found = GGUFile(file)
    normalise(file, found.config())
    for source in found.sources().values():
        found.read(source.name)
    found.expanded()
    describe(file)
    load_tokenizer(file, {})
    load_plain(file)


def described() -> dict[str, Any]:
    """A whole model of a few rows, with a tokenizer of bytes."""
    U32, F32, BOOL = 4, 6, 7
    config = read_json(GDN / "base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "ab", "<|im_end|>"]
    width, wide, layers = 32, 32, 1
    entries: list[Any] = [
        ["general.architecture", STRING, "qwen2"],
        ["qwen2.embedding_length", U32, width],
        ["qwen2.block_count", U32, layers],
        ["qwen2.feed_forward_length", U32, wide],
        ["qwen2.attention.head_count", U32, 2],
        ["qwen2.attention.head_count_kv", U32, 1],
        ["qwen2.context_length", U32, 512],
        ["qwen2.attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]],
        ["qwen2.rope.freq_base", F32, 1e6],
        ["tokenizer.ggml.model", STRING, "gpt2"],
        ["tokenizer.ggml.pre", STRING, "qwen2"],
        ["tokenizer.ggml.tokens", [ARRAY, STRING], tokens],
        ["tokenizer.ggml.token_type", [ARRAY, 5], [1] * 257 + [3]],
        ["tokenizer.ggml.merges", [ARRAY, STRING], ["a b"]],
        ["tokenizer.ggml.eos_token_id", U32, 257],
        ["tokenizer.ggml.add_bos_token", BOOL, False],
        ["tokenizer.chat_template", STRING, "{{ messages[0].content }}"],
    ]
    shapes = {"token_embd.weight": [width, len(tokens)], "output_norm.weight": [width]}
    for part, shape in {
        **{"attn_q": [width, 32], "attn_k": [width, 16], "attn_v": [width, 16]},
        **{"attn_output": [32, width], "ffn_gate": [width, wide], "ffn_up": [width, wide]},
        **{"ffn_down": [wide, width]},
    }.items():
        shapes[f"blk.0.{part}.weight"] = shape
    for part, n in {"attn_q": 32, "attn_k": 16, "attn_v": 16}.items():
        shapes[f"blk.0.{part}.bias"] = [n]
    shapes |= {f"blk.0.{norm}.weight": [width] for norm in ("attn_norm", "ffn_norm")}
    tensors, offset = [], 0
    for name, shape in shapes.items():
        kind = 8 if len(shape) == 2 and name.startswith(("blk.0.ffn", "token")) else 0
        tensors.append([name, shape, kind, offset])
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        size = count // KINDS[kind].values * KINDS[kind].size
        offset += -(-size // 32) * 32
    return {"version": 3, "entries": entries, "tensors": tensors, "bytes": offset}


def files() -> list[bytes]:
    whole = described()
    llama = json.loads(json.dumps(whole).replace("qwen2.", "llama."))
    llama["entries"][0][2] = "llama"
    llama["tensors"] = [t for t in llama["tensors"] if not t[0].endswith(".bias")]
    scaled = json.loads(json.dumps(whole))
    scaled["entries"] += [
        ["qwen2.rope.scaling.type", STRING, "yarn"],
        ["qwen2.rope.scaling.factor", 6, 4.0],
        ["qwen2.rope.scaling.original_context_length", 4, 128],
    ]
    split = json.loads(json.dumps(whole))
    split["entries"] += [["split.count", 2, 2], ["split.no", 2, 0], ["split.tensors.count", 5, 3]]
    small = {**whole, "entries": whole["entries"][:9], "tensors": whole["tensors"][:2]}
    found = [json.dumps(x).encode() for x in (whole, llama, scaled, split, small, *_others(llama))]
    found += [json.dumps({"parts": parts}).encode() for parts in _parts(whole)]
    large = b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1)
    return [*found, encode(small), b"", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), large]


def _others(llama: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each architecture, with what it says beside; and quantized otherwise."""
    found = []
    for kind, known in ARCHITECTURES.items():
        made = json.loads(json.dumps(llama).replace("llama.", f"{kind}."))
        made["entries"][0][2] = kind
        keys = [*known.settings.values(), known.epsilon[1], "attention.key_length"]
        there = {name for name, _, _ in made["entries"]}
        for key in keys:
            if (name := f"{kind}.{key}") not in there:
                real = "scale" in key or "epsilon" in key or "softcapping" in key
                made["entries"].append([name, 6 if real else 4, 16])
        if known.attending:
            for entry in made["entries"]:
                if entry[0].endswith("head_count_kv"):
                    entry[1:] = [[ARRAY, 5], [1]]
        found.append(made)
    for key, kind, value in (
        *(("rope.dimension_count", 4, 8), ("rope.dimension_sections", [ARRAY, 5], [1, 2])),
        *(("rope.scaling.yarn_beta_fast", 6, 32.0), ("rope.scaling.attn_factor", 6, 2.0)),
        ("attention.head_count_kv", [ARRAY, 5], [1, 1]),
    ):
        made = json.loads(json.dumps(llama))
        made["entries"] = [x for x in made["entries"] if x[0] != f"llama.{key}"]
        made["entries"] += [[f"llama.{key}", kind, value]]
        made["entries"] += [
            ["llama.rope.scaling.type", STRING, "yarn"],
            ["llama.rope.scaling.factor", 6, 4.0],
            ["llama.rope.scaling.original_context_length", 4, 128],
        ]
        found.append(made)
    for number, of_type in KINDS.items():
        if of_type.values == 32:
            made = json.loads(json.dumps(llama))
            for tensor in made["tensors"]:
                if "ffn_up" in tensor[0]:
                    tensor[2] = number
            found.append(_in_order(made))
    return found


def _parts(whole: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """A split model; one whose parts have a tensor twice; and parts of two."""
    count = len(whole["tensors"])
    head, tail = whole["tensors"][:4], whole["tensors"][4:]

    def part(n: int, tensors: Any, first: bool, said: int = count) -> dict[str, Any]:
        entries = [["split.no", 2, n], ["split.count", 2, 2], ["split.tensors.count", 5, said]]
        made = {**whole, "entries": [*(whole["entries"] if first else ()), *entries]}
        return dict(_in_order(json.loads(json.dumps({**made, "tensors": tensors}))))

    one, two = part(0, head, True), part(1, tail, False)
    return [[one, two], [one, part(1, head, False)], [one, part(1, tail, False, 9)], [one]]


def _metadata(data: bytes, place: Path) -> Any:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = {}
    value = value if isinstance(value, dict) else {}
    known = ("tokens", "token_type", "merges")
    found = {}
    for name, x in value.items():
        name = name if name.startswith("tokenizer.") else f"tokenizer.ggml.{name}"
        # A header has strings, numbers, and lists of one of them.
        if isinstance(x, list) and name.rpartition(".")[2] in known:
            x = x if all(isinstance(i, str) for i in x) else [i for i in x if type(i) is int]
        if isinstance(x, str | int | float | bool | list):
            found[name] = x
    return found


def _tokenizer(metadata: Any, place: Path, out: Path) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 3
    gguf.end_ids(metadata, count)
    tokenizer = gguf.load_tokenizer(metadata, count)
    ids = tokenizer.encode("Hello ab \u00e9", add_special_tokens=False)
    tokenizer.decode(ids)


def tokenizers() -> list[bytes]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {"model": "gpt2", "pre": "qwen2", "tokens": [*alphabet, "ab", "<|im_end|>"]}
    known |= {"token_type": [1] * 257 + [3], "merges": ["a b"], "eos_token_id": 257}
    few = {**known, "tokens": ["a", "b", "ab", "<s>"], "token_type": [1, 1, 1, 3]}
    few |= {"eos_token_id": 3, "pre": "llama-bpe", "bos_token_id": 3, "add_bos_token": True}
    return [json.dumps(x).encode() for x in (known, few)]


TARGETS = [
    Target(
        "gguf",
        _file,
        _read,
        files,
        (
            *("checkpoints/ggufheader.py", "checkpoints/ggufile.py", "checkpoints/gguf.py"),
            *("checkpoints/tokenizer.py", "checkpoints/formats.py"),
        ),
        WORDS,
        of_json(WORDS, _in_order),
        longest=1 << 15,
    ),
    Target(
        "gguf-tokenizer",
        _metadata,
        _tokenizer,
        tokenizers,
        ("checkpoints/gguf.py",),
        WORDS,
        of_json((*WORDS, *TOKENIZER)),
    ),
]
