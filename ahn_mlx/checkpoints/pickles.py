"""pytorch_model.bin and its shards, through torch. Nothing in them is executed: torch
unpickles tensors alone (weights_only), and maps the file instead of reading it."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import AHNError, show
from ..platform import pip_install
from . import directory
from .directory import Files, Source, check_member
from .safetensors import STORED, TensorInfo

# What torch calls a dtype -> what safetensors does, for those that models have.
DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


TIMES = 4  # that tensors may share what is in the file, as head and embedding do


def find_files(path: Path) -> Files:
    """The files of a directory that holds a checkpoint in this format, or none."""
    return directory.find_files(path, "bin", ("pytorch_model",))


def load(file: Path) -> dict[str, Any]:
    """torch's tensors, mapped. Raises AHNError without torch, and for all but tensors."""
    check_member(file)
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as z:
            entries = z.infolist()
    except Exception:  # of many kinds
        raise AHNError(f"{file}: not a checkpoint of torch 1.6 or later; save it again") from None
    if any(e.compress_type or e.file_size > size for e in entries):
        raise AHNError(f"{file}: has compressed entries, which torch does not write")
    try:
        import torch
    except ImportError:
        raise AHNError(
            f"{file}: reading it takes torch; {pip_install('torch')}, or save it as safetensors"
        ) from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # whatever a broken pickle makes torch raise
        reason = str(e).strip().splitlines()[0][:150] if str(e).strip() else type(e).__name__
        raise AHNError(
            f"{file}: holds other things than tensors, or is damaged; nothing in it was run "
            f"({show(reason)})"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()
    ):
        raise AHNError(f"{file}: not a dictionary of named tensors; save the model's state_dict")
    for name, x in tensors.items():
        # Views of a few bytes that claim to be terabytes; and what is not one number after another.
        if x.layout != torch.strided or x.device.type != "cpu" or x.nbytes > size:
            raise AHNError(f"{file}: tensor {show(name)} is larger than the file, or sparse")
    if sum(x.nbytes for x in tensors.values()) > TIMES * size:
        raise AHNError(f"{file}: its tensors are larger than the file; save the model's state_dict")
    return tensors


def read_headers(path: Path, files: Files) -> dict[str, Source]:
    """Every tensor of the files, as headers of safetensors would describe them."""
    return directory.gather(path, files, _file_sources)


def _file_sources(file: Path) -> Iterator[Source]:
    for name, x in load(file).items():
        dtype = DTYPES.get(str(x.dtype), str(x.dtype))
        yield Source(name, file, TensorInfo(dtype, tuple(x.shape), 0, x.numel() * x.element_size()))


def to_mlx(x: Any) -> mx.array:
    """A copy of torch's tensor, bit for bit."""
    import torch

    # What is contiguous may have any stride where there is but one of it.
    flat = x.detach().contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)
    dtype = STORED[DTYPES[str(x.dtype)]]
    return mx.array(flat.numpy()).view(dtype).reshape(tuple(x.shape))
