"""How many bytes a row has, and how many rows a machine has room for."""

import os
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import AHNError
from ..measure.cost import rows_that_fit
from ..model.augment import shape_of_attention
from ..model.cache import AHNCache
from ..reading.caches import each, most_bytes
from ..reading.session import Session
from .engine import Engine


def row_bytes(engine: Engine, fresh: Session) -> int:
    """Of a row whose window is full."""

    def measure() -> int:
        session = engine.acts.fork(fresh)
        engine.acts.prefill(session, [0])
        total, D = 0, shape_of_attention(engine.model).head_dim
        for cache in each(session.caches):
            if not isinstance(cache, AHNCache):
                total += most_bytes(cache, fresh.step)
                continue
            assert cache.buffers is not None
            slots = cache.buffers[0].shape[2]
            H = cache.buffers[-1].shape[1]
            total += sum(x.nbytes for x in cache.buffers) // slots * (cache.capacity + 1)
            total += 4 * H * D * D
        return total

    found: int = engine.call(measure).result()
    return found


def weight_bytes(engine: Engine) -> int:
    """Of the model."""
    parameters: Any = tree_flatten(engine.model.parameters())
    return sum(x.nbytes for _, x in parameters)


def machine_bytes() -> int:
    """What MLX may use of this machine's memory."""
    info = mx.device_info()
    if "max_recommended_working_set_size" in info:
        return int(info["max_recommended_working_set_size"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def check_rows(rows: int, row: int, weights: int, machine: int) -> int:
    """Rows that fit. Raises AHNError if there are to be more."""
    fit = rows_that_fit(row, weights, machine)
    if rows > fit:
        raise AHNError(
            f"{rows} rows of {row / 1e6:.1f} MB do not fit in {machine / 1e9:.1f} GB beside a"
            f" model of {weights / 1e9:.1f} GB, {fit} do; take fewer --rows, a smaller --window or"
            " --kv-bits 8"
        )
    return fit
