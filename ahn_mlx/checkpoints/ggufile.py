"""A base in a GGUF file, or in the parts of a split one: the config.json that it stands for,
its tensors one at a time, and its tokenizer.

Q4_0, Q4_1 and Q8_0 are repacked as MLX packs them, without loss. Other quantizations are
expanded to float16 by the package gguf.
"""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError, show
from ..platform import pip_install
from . import gguf
from .directory import Source
from .ggufheader import Header, Tensor
from .ggufmodels import ARCHITECTURES, BARE, names_of, shaped
from .safetensors import FLOATS, STORED, TensorInfo

GROUP = 32  # values per scale in Q4_0, Q4_1 and Q8_0
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # kept quantized

# What only llama.cpp does to scaled positions, unless it is 1.
FACTORS = ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")


class GGUFile:
    """metadata: as a Header has it, of the first part. Raises AHNError on a file that is
    damaged, or a part whose others are not beside it."""

    def __init__(self, file: Path):
        self.parts = _open_parts(file)
        self.file, self.metadata = self.parts[0].file, self.parts[0].metadata
        self._part: dict[str, Header] = {}  # of each tensor
        for part in self.parts:
            for name in part.tensors:
                if other := self._part.get(name):
                    raise AHNError(
                        f"{part.file}: tensor {show(name)} is in {other.file.name} too, they "
                        "are not of one split model; fetch all parts again"
                    )
                self._part[name] = part

    def config(self) -> dict[str, Any]:
        """The config.json that mlx_lm would read. Raises AHNError for other architectures."""
        kind = self._architecture()
        known = ARCHITECTURES[kind]
        for name in self._part:
            if name.startswith("rope_"):
                stem = name.partition(".")[0]
                raise AHNError(f"{self.file}: has {stem}, which nothing explains; use safetensors")
        if self._entry("rope.dimension_sections") is not None:
            raise AHNError(f"{self.file}: turns heads in sections, as for pictures; use another")
        heads = self._setting("attention.head_count")
        each, pairs = self._pairs(heads)
        width = self._setting("embedding_length")
        config = {
            "model_type": known.family,
            "hidden_size": width,
            "num_hidden_layers": self._setting("block_count"),
            "intermediate_size": self._setting("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": pairs,
            "head_dim": self._setting("attention.key_length", width // max(heads, 1)),
            "max_position_embeddings": self._setting("context_length"),
            "vocab_size": self._embedding().shape[0],
            known.epsilon[0]: self._real(known.epsilon[1]),
            "rope_theta": self._real("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in self._part,
            **known.fixed,
        }
        for entry, name in known.there.items():
            config[entry] = name in self._part
        for entry, name in known.lacks.items():
            config[entry] = name not in self._part
        if known.attending:
            config[known.attending] = [i for i, n in enumerate(each) if n]
        for entry, key in known.settings.items():
            whole = type(value := self._setting(key)) is int
            config[entry] = value if whole else self._real(key)
        if known.scaled_by_width is not None:
            wide = known.scaled_by_width == config["num_hidden_layers"]
            config["query_pre_attn_scalar"] = width // heads if wide else config["head_dim"]
        turned = self._setting("rope.dimension_count", config["head_dim"])
        if known.partial:
            config["partial_rotary_factor"] = turned / config["head_dim"]
        elif turned != config["head_dim"]:
            raise AHNError(
                f"{self.file}: rotates {turned} of the {config['head_dim']} values of a head, "
                f"a {kind} model of mlx_lm rotates all"
            )
        floats = {"F32": "float32", "BF16": "bfloat16"}
        config["torch_dtype"] = floats.get(self._embedding().kind.name, "float16")
        if scaling := self._rope_scaling():
            config["rope_scaling"] = scaling
        try:
            ends = gguf.end_ids(self.metadata, config["vocab_size"])
        except AHNError as e:
            raise AHNError(f"{self.file}: {e}") from None
        if ends:
            config["eos_token_id"] = ends
        if bits := self._bits():
            config["quantization"] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
            config["quantization_config"] = config["quantization"]
        return config

    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer inside. Raises AHNError if there is none that we know."""
        try:
            return gguf.load_tokenizer(self.metadata, self._embedding().shape[0])
        except AHNError as e:
            raise AHNError(f"{self.file}: {e}") from None

    def _pairs(self, heads: int) -> tuple[list[int], int]:
        """Key/value heads of each layer, if the file says so, and of those that have any."""
        found = self._entry("attention.head_count_kv", heads)
        if not isinstance(found, list):
            return [], self._setting("attention.head_count_kv", heads)
        kinds = {n for n in found if n}
        if not ARCHITECTURES[self._architecture()].attending or len(kinds) != 1:
            raise AHNError(f"{self.file}: its layers have {show(found)} key/value heads")
        return found, kinds.pop()

    def _architecture(self) -> str:
        kind = gguf.entry(self.metadata, "general.architecture")
        if not isinstance(kind, str) or kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise AHNError(f"{self.file}: holds a {show(kind)} model, not one of {known}")
        return kind

    def _embedding(self) -> Tensor:
        name = "token_embd.weight"
        if name not in self._part:
            raise AHNError(f"{self.file}: has no tensor {name}; fetch it again")
        return self._part[name].tensors[name]

    def _bits(self) -> int:
        """Of most packed tensors, 0 if there are none; mlx_lm sees those of each in its shape."""
        kinds = [tensor.kind.name for part in self.parts for tensor in part.tensors.values()]
        packed = [BITS[name] for name in kinds if name in BITS]
        return max(packed, key=packed.count, default=0)

    def _rope_scaling(self) -> dict[str, Any] | None:
        factor = self._setting("rope.scaling.factor", self._setting("rope.scale_linear", 0))
        # llama.cpp takes a factor alone for a linear one.
        kind = self._entry("rope.scaling.type", "linear" if factor else "none")
        if kind == "none":
            return None
        if not isinstance(kind, str) or not factor:
            raise AHNError(f"{self.file}: its rope.scaling is {show(kind)} by {show(factor)}")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            trained = self._setting("rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = trained
            for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
                if self._entry(f"rope.scaling.{theirs}") is not None:
                    scaling[ours] = self._setting(f"rope.scaling.{theirs}")
        for key in FACTORS:
            if (value := self._setting(f"rope.scaling.{key}", 1)) != 1:
                raise AHNError(
                    f"{self.file}: mlx_lm knows no rope.scaling.{key}, which is {value:.6g} here"
                )
        return scaling

    def _entry(self, key: str, default: Any = None) -> Any:
        return gguf.entry(self.metadata, f"{self._architecture()}.{key}", default)

    def _real(self, key: str, default: float | None = None) -> float:
        """The file's float32 has digits that the value was not written with."""
        return float(f"{self._setting(key, default):.6g}")

    def _setting(self, key: str, default: float | None = None) -> Any:
        value = self._entry(key, default)
        if type(value) not in (int, float):
            raise AHNError(f"{self.file}: its metadata lacks {key} or has no one number for it")
        return value

    def sources(self) -> dict[str, Source]:
        """mlx_lm's names, and what each will be read as."""
        sources, config = {}, self.config()
        try:
            names = names_of(self._architecture(), config)
        except AHNError as e:
            raise AHNError(f"{self.file}: {e}") from None
        for name, part in self._part.items():
            tensor = part.tensors[name]
            stem, _, last = name.rpartition(".")  # blk.3.attn_q
            if stem not in names or last not in ("weight", "bias"):
                raise AHNError(f"{part.file}: unexpected tensor {show(name)}")
            if tensor.kind.name in BITS and len(tensor.shape) < 2:
                raise AHNError(f"{part.file}: tensor {show(name)} is a vector, and quantized")
            if (heads := self._permuted(stem)) and tensor.shape[0] % (2 * heads):
                raise AHNError(
                    f"{part.file}: tensor {show(name)} has {tensor.shape[0]} rows, which {heads}"
                    " heads of pairs cannot share"
                )
            theirs = names[stem]
            for ending, dtype, shape in _readings(tensor, last):
                info = TensorInfo(dtype, shaped(stem, shape), tensor.begin, tensor.end)
                source = Source(f"{stem}.{ending}", part.file, info)
                bare = theirs.endswith(f".{BARE}")
                sources[theirs if bare else f"{theirs}.{ending}"] = source
        return sources

    def read(self, name: str) -> mx.array:
        """What a source of this name stands for: a tensor, or a piece of a quantized one."""
        stem, _, ending = name.rpartition(".")
        stored = name if ending == "bias" else f"{stem}.weight"
        x = self._array(stored, ending)
        x = x.reshape(shaped(stem, x.shape))
        role = stem.rsplit(".", 1)[-1]
        known = ARCHITECTURES[self._architecture()]
        if role.endswith("norm") and ending == "weight" and known.offset:
            x = (x.astype(mx.float32) - known.offset).astype(x.dtype)
        heads = self._permuted(stem)
        return gguf.unpermute(x, heads) if heads else x

    def _permuted(self, stem: str) -> int:
        """Heads of a tensor whose rows are stored as RoPE pairs; 0 of any other."""
        role = stem.rsplit(".", 1)[-1]
        if role not in ("attn_q", "attn_k") or not ARCHITECTURES[self._architecture()].permuted:
            return 0
        heads: int = self._setting("attention.head_count")
        return self._setting("attention.head_count_kv", heads) if role == "attn_k" else heads

    def expanded(self) -> dict[str, mx.array]:
        """Every tensor in float32 under mlx_lm's name: on the CPU, quantized products are ten
        times slower than OpenBLAS."""
        sources = self.sources()
        weights = {}
        for name, source in sources.items():
            stem, _, ending = name.rpartition(".")
            if ending in ("scales", "biases"):
                continue
            x = self.read(source.name)
            if ending == "weight" and f"{stem}.scales" in sources:
                scales, biases = (
                    self.read(sources[f"{stem}.{kind}"].name).astype(mx.float32)
                    for kind in ("scales", "biases")
                )
                # 32 // bits values per word, GROUP values per scale.
                bits = x.shape[-1] * 32 // (scales.shape[-1] * GROUP)
                x = mx.dequantize(x, scales, biases, group_size=GROUP, bits=bits)
            weights[name] = x.astype(mx.float32)
        return weights

    def _array(self, name: str, ending: str) -> mx.array:
        part = self._part[name]
        kind, shape, begin, end = part.tensors[name]
        raw = np.frombuffer(part.data, np.uint8, end - begin, begin)
        if kind.name in FLOATS:
            return mx.array(raw).view(STORED[kind.name]).reshape(shape)
        with np.errstate(all="ignore"):  # what is not finite is found out later, by name
            if kind.name in BITS:
                piece = _repack(kind.name, raw.reshape(-1, kind.size), ending)
                return mx.array(np.ascontiguousarray(piece)).reshape(*shape[:-1], -1)
            return mx.array(_dequantize(part.file, name, kind.name, raw.reshape(*shape[:-1], -1)))


def _open_parts(file: Path) -> list[Header]:
    """The file; if it is one part of a split model, all parts, which lie beside it."""
    given = Header(file)
    count = gguf.entry(given.metadata, "split.count", 0)
    if type(count) is not int or count < 2:
        return [given]
    named = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", file.name, re.DOTALL)
    if not named or int(named[3]) != count:
        raise AHNError(
            f"{file}: one of the {count} parts of a split model, but not named like "
            f"NAME-00001-of-{count:05d}.gguf; give the parts their own names"
        )
    parts: list[Header] = []
    for i in range(count):
        path = file.with_name(f"{named[1]}-{i + 1:05d}-of-{named[3]}.gguf")
        if not path.exists():
            raise AHNError(
                f"{path}: missing; {file.name} is one of the {count} parts of a split model, "
                "put all of them there"
            )
        part = given if path == file else Header(path)
        if not _belongs(part, i, parts[0] if parts else part, given):
            raise AHNError(
                f"{path}: not part {i + 1} of the split model that {file.name} is of; "
                "fetch all parts again"
            )
        parts.append(part)
    return parts


def _belongs(part: Header, i: int, first: Header, given: Header) -> bool:
    """Whether a file is part i of the model that `given` is a part of and `first` begins."""
    said, expected = (
        [gguf.entry(x.metadata, f"split.{key}") for key in ("no", "count", "tensors.count")]
        for x in (part, given)
    )
    kind, of = (gguf.entry(x.metadata, "general.architecture") for x in (part, first))
    return said == [i, *expected[1:]] and kind in (None, of)  # later parts need not say


def _dequantize(file: Path, name: str, kind: str, rows: np.ndarray) -> np.ndarray:
    """A quantization that MLX does not have, in float16."""
    try:
        from gguf import GGMLQuantizationType, dequantize

        return dequantize(rows, GGMLQuantizationType[kind]).astype(np.float16)
    except ImportError:
        raise AHNError(
            f"{file}: tensor {show(name)} is {kind}; {pip_install('gguf')}, which expands it"
        ) from None
    except Exception as e:  # of many kinds, by its version
        reason = show(str(e))
        raise AHNError(
            f"{file}: tensor {show(name)} is {kind}; the package gguf cannot expand it ({reason})"
        ) from None


def _readings(tensor: Tensor, last: str) -> list[tuple[str, str, tuple[int, ...]]]:
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
