"""The header of one GGUF file that may come from anyone: its metadata and where its tensors
are, judged before they are believed."""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import AHNError, show
from .directory import check_member
from .safetensors import MAX_DIM

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
    39: Kind("MXFP4", 32, 17),
}


class Tensor(NamedTuple):
    kind: Kind
    shape: tuple[int, ...]
    begin: int
    end: int


class Header:
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
        self._at = 0
        try:
            self._read()
        except (struct.error, UnicodeDecodeError) as e:
            raise self._broken(f"its header ends or errs at byte {self._at:,}: {e}") from None

    def _read(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise AHNError(f"{self.file}: not a GGUF file")
        if (version := self._number("I")) not in VERSIONS:
            if version.to_bytes(4, "big")[0] in VERSIONS:
                raise AHNError(f"{self.file}: a big-endian GGUF file; fetch the little-endian one")
            raise AHNError(f"{self.file}: GGUF version {version} is not known; convert it anew")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > MAX_ENTRIES:
            raise self._broken(f"it claims {tensors} tensors and {entries} entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self._string()
            if name in self.metadata:
                raise self._broken(f"its entry {show(name)} is there twice")
            self.metadata[name] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", np.uint32(32))
        if not isinstance(alignment, np.integer) or alignment < 8 or alignment % 8:
            raise self._broken(f"its alignment is {show(str(alignment))}")
        self._place(infos, int(alignment))

    def _place(self, infos: list[tuple[str, Kind, tuple[int, ...], int]], alignment: int) -> None:
        """Where each tensor's bytes are; they begin on the next multiple of alignment."""
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        end = 0
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            size = math.prod(shape) // kind.values * kind.size
            if offset < end or start + offset + size > len(self.data):
                raise self._broken(f"tensor {show(name)} overlaps another or the file's end")
            if offset % alignment:
                raise self._broken(f"tensor {show(name)} begins at no multiple of {alignment}")
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
        raise self._broken(f"a value at byte {self._at:,} is no number, string or list of them")

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode()

    def _number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self._bytes(struct.calcsize("<" + kind)))[0]

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self._at:
            raise self._broken(f"{count:,} bytes are missing at byte {self._at:,}")
        self._at += count
        return self.data[self._at - count : self._at]

    def _broken(self, why: str) -> AHNError:
        return AHNError(f"{self.file}: damaged GGUF file, {why}; fetch it again")
