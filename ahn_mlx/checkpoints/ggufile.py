"""One GGUF file that may come from anyone, as the base of a conversion: a header judged
before it is believed, the config.json it stands for, and its tensors one at a time.

Q4_0, Q4_1 and Q8_0 are repacked as MLX packs them, without loss. Other quantizations are
expanded to float16 by the package gguf.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import AHNError, show
from .directory import Source, check_member
from .gguf import GROUP, NAMES, unpermute
from .safetensors import FLOATS, MAX_DIM, STORED, TensorInfo

MAX_ENTRIES = 1 << 16  # metadata entries or tensors
VERSIONS = (2, 3)

# Types of metadata values: id -> format of struct.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
NUMBERS |= {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Kind(NamedTuple):
    """A type of tensor: values per block, bytes per block."""

    name: str
    values: int
    size: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    30: Kind("BF16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    8: Kind("Q8_0", 32, 34),
    # The rest takes the package gguf.
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    20: Kind("IQ4_NL", 32, 18),
    23: Kind("IQ4_XS", 256, 136),
}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # kept quantized

# Architecture -> whether its files have query and key rows in llama.cpp's order.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}


class Tensor(NamedTuple):
    kind: Kind
    shape: tuple[int, ...]
    begin: int
    end: int


class GGUFile:
    """metadata: numbers as NumPy has them, strings, lists of strings. Raises AHNError on a
    header that is not one, or that promises what the file does not hold."""

    def __init__(self, file: Path):
        check_member(file)
        self.file = file
        with file.open("rb") as f:
            try:
                self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise self._broken("it is empty") from None
        self.at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError) as e:
            raise self._broken(f"its header ends or errs at byte {self.at:,}: {e}") from None

    def _read_header(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise AHNError(f"{self.file}: not a GGUF file")
        if (version := self._number("I")) not in VERSIONS:
            raise AHNError(f"{self.file}: GGUF version {version} is not known; convert it anew")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > MAX_ENTRIES:
            raise self._broken(f"it claims {tensors} tensors and {entries} entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self._string()
            self.metadata[name] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        if alignment < 1 or alignment % 8:
            raise self._broken(f"its alignment is {alignment}")
        start = -(-self.at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        end = 0
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            size = math.prod(shape) // kind.values * kind.size
            if offset < end or start + offset + size > len(self.data):
                raise self._broken(f"tensor {show(name)} overlaps another or the file's end")
            if name in self.tensors:
                raise self._broken(f"tensor {show(name)} is there twice")
            end = offset + size
            self.tensors[name] = Tensor(kind, shape, start + offset, start + end)

    def _tensor_info(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name, ndim = self._string(), self._number("I")
        if ndim > 4:
            raise self._broken(f"tensor {show(name)} has {ndim} dimensions")
        shape = tuple(self._number("Q") for _ in range(ndim))[::-1]
        number, offset = self._number("I"), self._number("Q")
        kind = KINDS.get(number)
        if kind is None:
            raise AHNError(f"{self.file}: tensor {show(name)} has type {number}; use Q4_K or Q8_0")
        if not shape or any(not 1 <= n <= MAX_DIM for n in shape) or shape[-1] % kind.values:
            raise self._broken(f"tensor {show(name)} has the shape {list(shape)}")
        return name, kind, shape, offset

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, count = self._number("I"), self._number("Q")
            if item == STRING and count * 8 <= len(self.data):
                return [self._string() for _ in range(count)]
            if item in NUMBERS:
                dtype = np.dtype(NUMBERS[item]).newbyteorder("<")
                return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)
        elif kind in NUMBERS:
            return np.dtype(NUMBERS[kind]).type(self._number(NUMBERS[kind]))
        raise self._broken(f"a value at byte {self.at:,} is no number, string or list of them")

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode()

    def _number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self._bytes(struct.calcsize("<" + kind)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self._broken(f"{count:,} bytes are missing at byte {self.at:,}")
        self.at += count
        return self.data[self.at - count : self.at]

    def _broken(self, why: str) -> AHNError:
        return AHNError(f"{self.file}: damaged GGUF file, {why}; fetch it again")

    def config(self) -> dict[str, Any]:
        """The config.json that mlx_lm would read. Raises AHNError for other architectures."""
        kind = self.metadata.get("general.architecture")
        if kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise AHNError(f"{self.file}: holds a {show(kind)} model, not one of {known}")
        if "rope_freqs.weight" in self.tensors:
            raise AHNError(f"{self.file}: has rope_freqs, which nothing explains; use safetensors")
        embedding = self.tensors.get("token_embd.weight")
        heads = self._setting("attention.head_count")
        width = self._setting("embedding_length")
        config = {
            "model_type": kind,
            "hidden_size": width,
            "num_hidden_layers": self._setting("block_count"),
            "intermediate_size": self._setting("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": self._setting("attention.key_length", width // max(heads, 1)),
            "max_position_embeddings": self._setting("context_length"),
            "vocab_size": embedding.shape[0] if embedding else 0,
            # The file's float32 has digits that the value was not written with.
            "rms_norm_eps": float(f"{self._setting('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(f"{self._setting('rope.freq_base', 10000.0):.6g}"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        kind = embedding.kind.name if embedding else ""
        config["torch_dtype"] = {"F32": "float32", "BF16": "bfloat16"}.get(kind, "float16")
        if scaling := self._rope_scaling():
            config["rope_scaling"] = scaling
        ends = (self.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot"))
        if ids := sorted({int(i) for i in ends if i is not None}):
            config["eos_token_id"] = ids
        packed = [BITS[t.kind.name] for t in self.tensors.values() if t.kind.name in BITS]
        if packed:
            # Of most tensors; mlx_lm sees the bits of each in its shape.
            bits = max(packed, key=packed.count)
            config["quantization"] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
            config["quantization_config"] = config["quantization"]
        return config

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind = self._setting("rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": float(self._setting("rope.scaling.factor"))}
        if kind == "yarn":
            trained = self._setting("rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = trained
        return scaling

    def _setting(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.metadata['general.architecture']}.{key}", default)
        if value is None or isinstance(value, list | np.ndarray):
            raise AHNError(f"{self.file}: its metadata lacks {key} or has one for each layer")
        return value.item() if isinstance(value, np.generic) else value

    def sources(self) -> dict[str, Source]:
        """mlx_lm's names, and what each will be read as."""
        sources = {}
        for name, tensor in self.tensors.items():
            stem, _, last = name.rpartition(".")
            *block, part = stem.split(".")  # blk.3.attn_q
            if part not in NAMES or last not in ("weight", "bias") or len(block) not in (0, 2):
                raise AHNError(f"{self.file}: unexpected tensor {show(name)}")
            prefix = f"model.layers.{block[1]}." if block else ""
            for ending, dtype, shape in _parts(tensor, last):
                info = TensorInfo(dtype, shape, tensor.begin, tensor.end)
                source = Source(f"{stem}.{ending}", self.file, info)
                sources[f"{prefix}{NAMES[part]}.{ending}"] = source
        return sources

    def read(self, name: str) -> mx.array:
        """What a source of this name stands for: a tensor, or a part of a quantized one."""
        stem, _, ending = name.rpartition(".")
        stored = name if ending == "bias" else f"{stem}.weight"
        tensor = self.tensors[stored]
        x = self._array(stored, tensor, ending)
        part = stem.rsplit(".", 1)[-1]
        if part in ("attn_q", "attn_k") and ARCHITECTURES[self.metadata["general.architecture"]]:
            config = self.config()
            heads = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            x = unpermute(x, config[heads])
        return x

    def _array(self, name: str, tensor: Tensor, ending: str) -> mx.array:
        kind, shape = tensor.kind.name, tensor.shape
        raw = np.frombuffer(self.data, np.uint8, tensor.end - tensor.begin, tensor.begin)
        if kind in FLOATS:
            return mx.array(raw).view(STORED[kind]).reshape(shape)
        if kind in BITS:
            part = _repack(kind, raw.reshape(-1, tensor.kind.size), ending)
            return mx.array(np.ascontiguousarray(part)).reshape(*shape[:-1], -1)
        try:
            from gguf import GGMLQuantizationType, dequantize
        except ImportError:
            raise AHNError(
                f"{self.file}: tensor {show(name)} is {kind}; pip install gguf, which expands it"
            ) from None
        rows = raw.reshape(*shape[:-1], -1)
        return mx.array(dequantize(rows, GGMLQuantizationType[kind]).astype(np.float16))


def _parts(tensor: Tensor, last: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Ending, dtype and shape of what a tensor is read as."""
    kind, (*rows, columns) = tensor.kind.name, tensor.shape
    if kind not in BITS:
        return [(last, kind if kind in FLOATS else "F16", tensor.shape)]
    groups = (*rows, columns // GROUP)
    packed = (*rows, columns * BITS[kind] // 32)
    return [("weight", "U32", packed), ("scales", "F16", groups), ("biases", "F16", groups)]


def _repack(kind: str, blocks: np.ndarray, ending: str) -> np.ndarray:
    """Blocks of GROUP values as MLX has them: packed values, scales or biases."""
    scales = blocks[:, :2].copy().view(np.float16)
    if ending == "scales":
        return scales
    if ending == "biases":
        if kind == "Q4_1":
            return blocks[:, 2:4].copy().view(np.float16)
        return scales * np.float16(-8 if kind == "Q4_0" else -128)
    if kind == "Q8_0":  # signed
        return (blocks[:, 2:] ^ 0x80).view(np.uint32)
    values = blocks[:, 2:] if kind == "Q4_0" else blocks[:, 4:]
    # The first half of the values is in the low nibbles, the second in the high ones.
    nibbles = np.concatenate([values & 15, values >> 4], axis=1)
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.uint32)
