"""The weights of a model directory on their way out: planned from headers alone, then
read, checked, cast, perhaps quantized, and written, one tensor at a time."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from tqdm import tqdm

from ..errors import AHNError, show
from .directory import INDEX, UNUSED, Source, check_finite
from .formats import Reader
from .safetensors import MLX_FORMAT, STORED, Layout, TensorWriter, is_finite

SHARD_BYTES = 5 << 30  # as mlx_lm
GROUP = 64  # values per scale, as mlx_lm
Q_BITS = (0, 4, 8)  # that a base is converted to; 0 is as it is


class Tensor(NamedTuple):
    """One tensor of a plan: where it is now, and what is to be written of it.

    dtype: of the values, or of their scales if quantized. bits: quantize to so many, or 0.
    more: what is added to the values first, if anything.
    """

    source: Source
    dtype: mx.Dtype
    bits: int = 0
    more: mx.array | None = None

    def layout(self, name: str) -> dict[str, Layout]:
        """What is written under `name` and, of a quantized tensor, beside it."""
        shape = self.source.info.shape
        if not self.bits:
            return {name: Layout(self.dtype, shape)}
        *rows, columns = shape
        scales = Layout(self.dtype, (*rows, columns // GROUP))
        packed = Layout(mx.uint32, (*rows, columns * self.bits // 32))
        return dict(zip(_parts(name), (packed, scales, scales), strict=True))

    def write(self, name: str, x: mx.array, writer: TensorWriter) -> None:
        """Write the tensor, which has just been read as `x`."""
        if not self.bits:
            writer.put(name, x)
            return
        parts = mx.quantize(x, group_size=GROUP, bits=self.bits)
        for part, value in zip(_parts(name), parts, strict=True):
            writer.put(part, value)


def _parts(name: str) -> tuple[str, str, str]:
    stem = name.removesuffix("weight")
    return name, f"{stem}scales", f"{stem}biases"


def write_weights(
    directory: Path,
    plan: dict[str, Tensor],
    parameters: int,
    metadata: Mapping[str, str] = MLX_FORMAT,
) -> None:
    """Write the files and the index that mlx_lm would write; of at most SHARD_BYTES each.

    parameters: their number, for the index. Raises AHNError on a tensor that is not finite.
    """
    layouts = {name: plan[name].layout(name) for name in sorted(plan, key=by_layer)}
    sizes = {name: sum(x.nbytes for x in layout.values()) for name, layout in layouts.items()}
    shards = _shards(sizes)
    weight_map: dict[str, str] = {}
    read = Reader()
    bar = tqdm(
        total=sum(sizes.values()),
        desc=directory.name.strip(".").split(".")[0],
        unit="B",
        unit_scale=True,
        delay=1,
        disable=None,
    )
    with bar:
        for i, names in enumerate(shards, 1):
            numbered = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else numbered
            layout = {part: x for name in names for part, x in layouts[name].items()}
            weight_map.update(dict.fromkeys(layout, file))
            with TensorWriter(directory / file, layout, metadata) as writer:
                for name in names:
                    plan[name].write(name, _read(plan[name], read), writer)
                    bar.update(sizes[name])
                    mx.clear_cache()
    totals = {"total_size": sum(sizes.values()), "total_parameters": parameters}
    write_json(
        directory / INDEX, {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
    )


def write_unused(directory: Path, sources: list[Source]) -> None:
    """Keep what no model uses but the PyTorch release stores, for the way back."""
    if not sources:
        return
    layout = {s.name: Layout(STORED[s.info.dtype], s.info.shape) for s in sources}
    read = Reader()
    with TensorWriter(directory / UNUSED, layout) as writer:
        for source in sources:
            writer.put(source.name, read(source))


def _read(tensor: Tensor, read: Reader) -> mx.array:
    """A tensor in its dtype, and finite."""
    x = read(tensor.source)
    if not mx.issubdtype(x.dtype, mx.floating):
        return x  # packed by a quantizer
    if tensor.more is not None:
        x = mx.add(x, tensor.more, stream=mx.cpu)
    cast = x.astype(tensor.dtype, stream=mx.cpu)
    if not is_finite(cast):
        file, name = tensor.source.file, tensor.source.name
        try:
            check_finite(name, x)
        except AHNError as e:
            raise AHNError(f"{file}: {e}") from None
        short = str(cast.dtype).rsplit(".", 1)[-1]
        raise AHNError(
            f"{file}: tensor {show(name)} has values too large for {short}; "
            "use --dtype bfloat16 or float32"
        )
    return cast


def by_layer(name: str) -> list[str | int]:
    """Layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names, grouped in order so that a group's bytes stay within SHARD_BYTES."""
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room = max(room - size, 0)
    return shards


def write_json(file: Path, value: dict[str, Any]) -> None:
    """An object, sorted, for people to read."""
    file.write_text(json.dumps(dict(sorted(value.items())), indent=4) + "\n")
