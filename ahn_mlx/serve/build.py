"""A service from a model: engine, rows, shelf and memories."""

import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..reading.session import Session
from .budget import check_rows, machine_bytes, row_bytes, weight_bytes
from .digests import Digests, Files
from .engine import Engine, fresh
from .memories import Library
from .metrics import Metrics
from .service import Service
from .shelf import Shelf


def build(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    *,
    name: str,
    rows: int,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    memories: Path | None = None,
    step: int | None = None,
) -> tuple[Service, Digests | None, int]:
    """Service, its digests if there is a directory, and how many rows would fit.

    name: of the model. step: tokens read at a time. Raises AHNError for a model whose rows
    would grow, and for more rows than fit.
    """
    mx.eval(model.parameters())
    metrics = Metrics()
    engine = Engine(model, tokenizer, rows, metrics)
    try:
        base = fresh(engine, kv_bits, kv_group_size, step)
        row = row_bytes(engine, base)
        fit = check_rows(rows, row, weight_bytes(engine), machine_bytes())
    except BaseException:
        engine.stop()
        raise
    shelf = Shelf(rows * row)

    def make(system: str, chat: bool) -> Session:
        return engine.acts.make(system, chat, step, kv_bits, kv_group_size)

    library = digests = None
    if memories is not None:
        library = Library(memories, engine, shelf, row + row // 50)
        digests = Digests(library, Files(memories / "files"), make)
    created = int(time.time())
    service = Service(Path(name).name, engine, base, shelf, metrics, library, created, row)
    return service, digests, fit
