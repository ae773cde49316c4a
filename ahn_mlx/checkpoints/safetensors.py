"""One safetensors file that may come from anyone: its header is read and judged in pure
Python before MLX opens it, and files are written tensor by tensor, so that memory holds
one tensor and not one model."""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import AHNError, show
from ..model.division import Part

FETCH = "fetch it again"  # of a damaged file that came from elsewhere
MAX_HEADER = 100 << 20  # bytes; the format's own limit
MAX_DIM = 2**31 - 1  # MLX counts dimensions in int32
MAX_NDIM = 8

# What the format calls a dtype -> its size in bytes, for those that MLX loads.
ITEM_SIZE = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
ITEM_SIZE |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "C64": 8}
FLOATS = ("F32", "F16", "BF16")
WRITTEN = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
WRITTEN |= {mx.uint32: "U32", mx.uint8: "U8"}  # quantized
STORED = {text: dtype for dtype, text in WRITTEN.items()}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}  # for users
MLX_FORMAT = {"format": "mlx"}

# Where a float's exponent bits are.
EXPONENT = {mx.float32: 0x7F800000, mx.float16: 0x7C00, mx.bfloat16: 0x7F80}


class Layout(NamedTuple):
    """What a tensor will be."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


class TensorInfo(NamedTuple):
    """What a header says about a tensor; begin and end count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and places of the tensors in a file. Raises AHNError if the header is
    not one, or promises anything that the file does not hold."""
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """As read_header, and what the header says beside its tensors."""
    entries, data_size = _read_json(file)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # MLX writes null for none
        metadata = {}
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise _broken(file, "its __metadata__ is not text")
    header = {name: _tensor_info(file, name, entry) for name, entry in entries.items()}
    _check_layout(file, header, data_size)
    return header, metadata


def _read_json(file: Path) -> tuple[dict[str, Any], int]:
    """The header's object and the number of bytes that follow it."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        if len(start) < 8:
            raise _broken(file, f"it has {size} bytes")
        if start == b"version ":
            raise AHNError(f"{file}: is a pointer of git-lfs; git lfs pull fetches the file")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            raise _broken(file, f"its header claims {length} bytes")
        if 8 + length > size:
            raise _broken(file, f"its header claims {length} bytes, the file has {size}")
        raw = f.read(length)
    try:
        # strict UTF-8: json would guess UTF-16, and MLX would not
        entries = json.loads(
            raw.decode(), object_pairs_hook=_no_repeats, parse_constant=_no_constants
        )
        for name in entries:
            name.encode()  # half a surrogate pair is JSON, but not a name
    except (ValueError, RecursionError, AttributeError, TypeError) as e:
        raise _broken(file, f"its header is not valid JSON ({show(str(e))})") from None
    if not isinstance(entries, dict):
        raise _broken(file, "its header is not an object")
    return entries, size - 8 - length


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"{show(mode(name for name, _ in pairs))} appears twice")
    return result


def _no_constants(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _tensor_info(file: Path, name: str, entry: Any) -> TensorInfo:
    """Judge one header entry by itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise _broken(file, f"tensor {show(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise AHNError(
            f"{file}: tensor {show(name)} has dtype {show(dtype)}, which MLX cannot load; "
            "save it as F32, F16 or BF16"
        )
    if not _naturals(shape) or len(shape) > MAX_NDIM or any(n > MAX_DIM for n in shape):
        raise _broken(file, f"tensor {show(name)} has the shape {show(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(file, f"tensor {show(name)} has the offsets {show(offsets)}")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if info.end - info.begin != expected:
        raise _broken(
            file,
            f"tensor {show(name)} needs {expected} bytes and has {info.end - info.begin}",
        )
    return info


def _naturals(value: Any) -> bool:
    # type() and not isinstance(): true is an int in Python
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(file: Path, header: dict[str, TensorInfo], data_size: int) -> None:
    """Tensors must fill the file from the header to its end, without gap or overlap."""
    end = 0
    for name, info in sorted(header.items(), key=lambda item: item[1][2:]):
        if info.end > data_size:
            raise _broken(
                file,
                f"tensor {show(name)} ends at byte {info.end} of {data_size}",
            )
        if info.begin != end:
            what = "overlaps another" if info.begin < end else "leaves a gap before it"
            raise _broken(file, f"tensor {show(name)} {what}")
        end = info.end
    if end != data_size:
        raise _broken(file, f"{data_size - end} bytes after the last tensor belong to none")


def _broken(file: Path, why: str) -> AHNError:
    return AHNError(f"{file}: damaged safetensors file, {why}; {FETCH}")


@contextmanager
def mended(mend: str) -> Iterator[None]:
    """Around the reading of a file that this program wrote itself: what to do if it is damaged."""
    try:
        yield
    except AHNError as e:
        if not str(e).endswith(FETCH):
            raise
        raise AHNError(str(e).removesuffix(FETCH) + mend) from None


def read_part(file: Path, info: TensorInfo, part: Part) -> mx.array:
    """A part of a tensor; nothing else of the file is read but where its tensors begin. Raises
    AHNError if the file ends before."""
    shape = (*info.shape[: part.axis], part.size, *info.shape[part.axis + 1 :])
    before = math.prod(info.shape[: part.axis])
    row = math.prod(info.shape[part.axis + 1 :]) * ITEM_SIZE[info.dtype]  # of one index, in bytes
    held = np.zeros((before, part.size * row), dtype=np.uint8)
    wanted = held[:, : (part.stop - part.start) * row]
    with file.open("rb", buffering=0) as f:
        (length,) = struct.unpack("<Q", f.read(8))
        first = 8 + length + info.begin + part.start * row
        for i, to in enumerate(wanted if wanted.size else ()):  # of nothing there may be much
            f.seek(first + i * info.shape[part.axis] * row)
            while len(to):  # the system gives two gigabytes at most
                if not (n := f.readinto(to.data)):
                    raise _broken(file, "it ends too early")
                to = to[n:]
    return mx.array(held).view(STORED[info.dtype]).reshape(shape)


class TensorWriter:
    """A new file, open for writing: the header first, from what is promised in `layout`,
    then each tensor into its place, in any order, so that memory holds only one.

    layout: name -> dtype and shape. metadata: of the header; PyTorch's readers ask for a format.
    """

    def __init__(
        self, file: Path, layout: Mapping[str, Layout], metadata: Mapping[str, str] = MLX_FORMAT
    ):
        self.layout = dict(layout)
        self.offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        begin = 0
        # Widest first, as the format's own writer does: every tensor is then aligned.
        for name in sorted(layout, key=lambda name: -layout[name].dtype.size):
            dtype, shape = layout[name]
            end = begin + layout[name].nbytes
            header[name] = {"dtype": WRITTEN[dtype], "shape": shape, "data_offsets": [begin, end]}
            self.offsets[name] = begin
            begin = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self.start = 8 + len(raw)
        self.file = file.open("wb")
        self.file.write(struct.pack("<Q", len(raw)) + raw)

    def put(self, name: str, x: mx.array) -> None:
        """Write one tensor. Each is written once, as promised."""
        if Layout(x.dtype, x.shape) != self.layout.pop(name):
            raise RuntimeError(f"{name} is {x.dtype} {x.shape}, which is not what was promised")
        self.file.seek(self.start + self.offsets[name])
        self.file.write(bits(x).data)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.file as f:
            if kind is None:
                if self.layout:
                    raise RuntimeError(f"{min(self.layout)} was promised and not written")
                f.flush()
                os.fsync(f.fileno())  # some disks report that they are full only here


def bits(x: mx.array) -> "np.ndarray[Any, Any]":
    """The elements of an array as unsigned integers. NumPy has no bfloat16."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[x.itemsize]
    return np.ascontiguousarray(np.asarray(x.view(unsigned)))


def not_finite(arrays: Iterable[tuple[str, mx.array]]) -> str | None:
    """The first of these floats that holds NaN or infinity."""
    floats = [(name, x) for name, x in arrays if mx.issubdtype(x.dtype, mx.floating)]
    # A sum is quick on any device; only where it is not finite each number is looked at.
    sums: list[Any] = [x.sum().astype(mx.float32) for _, x in floats]
    mx.eval(sums)
    for (name, x), total in zip(floats, sums, strict=True):
        if not math.isfinite(total.item()) and not is_finite(x):
            return name
    return None


def is_finite(x: mx.array) -> bool:
    """No NaN and no infinity, that is, no exponent of all ones. Several times faster than
    mx.isfinite on CPU."""
    mask = EXPONENT[x.dtype]
    flat = bits(x).reshape(-1)
    step = 1 << 22  # bounds the copy that the mask makes
    return all(
        ((flat[i : i + step] & mask) != mask).all()  # an empty array is finite
        for i in range(0, flat.size, step)
    )
