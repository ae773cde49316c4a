"""Seeds for the fuzz targets, of a small model:

    python embed/fuzz/corpus.py APP.ahnmodel MEMORY.ahn... OUT

writes OUT/manifest, OUT/tokenizer, OUT/tensors and OUT/memory. Memory files of texts of several
lengths (empty, less than a window, with a tail, after an answer) make the best seeds.
"""

import sys
from pathlib import Path

TEXTS = (
    "Call me Ishmael.",
    "It's 12345, isn't it?\r\n\r\n  \tYES!",
    "caf\u00e9 cafe\u0301 \u1100\u1161\u11a8 \U0001f468\u200d\U0001f469",
    "<|im_end|>",
)


def main(app: Path, memories: list[Path], out: Path) -> None:
    seeds = {
        "manifest/real": (app / "manifest.json").read_bytes(),
        "tokenizer/tables": b"\0" + (app / "tokenizer.bin").read_bytes(),
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


def tiny() -> bytes:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return len(text).to_bytes(8, "little") + text + bytes(8)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(x) for x in sys.argv[2:-1]], Path(sys.argv[-1]))
