"""Seeds for the fuzz targets, of a small model:

    python embed/fuzz/corpus.py APP.ahnmodel MEMORY.ahn... OUT

writes OUT/manifest, OUT/tokenizer, OUT/tensors and OUT/memory. Memory files of texts of several
lengths (empty, less than a window, with a tail, after an answer) make the best seeds.
"""

import struct
import sys
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ahn_mlx.apps.tokenizer import PATTERNS, byte_signs, pack_tokenizer

TEXTS = (
    "Call me Ishmael.",
    "It's 12345, isn't it?\r\n\r\n  \tYES!",
    "caf\u00e9 cafe\u0301 \u1100\u1161\u11a8 \U0001f468\u200d\U0001f469",
    "<|im_end|>",
)


def main(app: Path, memories: list[Path], out: Path) -> None:
    tables = (app / "tokenizer.bin").read_bytes()
    seeds = {
        "manifest/real": (app / "manifest.json").read_bytes(),
        "tokenizer/tables": b"\0" + tables,
        "tokenizer/small": b"\0" + small(tables),
        **{f"tokenizer/kind{n}": b"\0" + small(kind(n)) for n in range(4)},
        "tensors/weights": header(app / "weights.safetensors"),
        "tensors/tiny": tiny(),
    }
    seeds |= {f"tokenizer/text{n}": b"\1" + text.encode() for n, text in enumerate(TEXTS)}
    for n, file in enumerate(memories):
        seeds[f"memory/{n}"] = file.read_bytes()
        seeds[f"tensors/memory{n}"] = header(file)
    for name, data in seeds.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


def header(file: Path) -> bytes:
    """The beginning of a file of tensors, as far as its header goes."""
    with file.open("rb") as f:
        start = f.read(8)
        return start + f.read(int.from_bytes(start, "little"))


def kind(n: int) -> bytes:
    """Tables with a few merges: of GPT-2's splitter, of SmolLM2's, and of the others with NFC."""
    vocab = {c: i for i, c in enumerate(sorted(byte_signs()))}
    merges = [("t", "h"), ("th", "e"), ("1", "2"), ("\u0120", "x")]
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    bpe = Tokenizer(models.BPE(vocab, merges, ignore_merges=n == 3))
    split = pre_tokenizers.Digits(individual_digits=True)
    if n >= 2:
        split = pre_tokenizers.Split(Regex(list(PATTERNS)[n - 2]), "isolated")
        bpe.normalizer = normalizers.NFC()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=n < 2)
    bpe.pre_tokenizer = last if n == 0 else pre_tokenizers.Sequence([split, last])
    bpe.add_special_tokens([AddedToken("<|im_end|>", normalized=False, special=True)])
    bpe.add_tokens([AddedToken("x\r", normalized=False)])
    return pack_tokenizer(TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=bpe)))


def small(tables: bytes) -> bytes:
    """Tables with the first few characters of each kind, which are read faster."""
    at, out = 24, tables[:24]
    for section in range(13):
        (n,) = struct.unpack_from("<Q", tables, at)
        data = tables[at + 8 : at + 8 + n]
        if section >= 6:
            # Ranges and marks are two numbers; a decomposition is four mostly; a pair is three.
            row = {11: 16, 12: 12}.get(section, 8)
            data = data[: 16 * row]
        out += struct.pack("<Q", len(data)) + data + b"\0" * (-len(data) % 8)
        at += 8 + n + -n % 8
    return out


def tiny() -> bytes:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return len(text).to_bytes(8, "little") + text + bytes(8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(x) for x in sys.argv[2:-1]], Path(sys.argv[-1]))
