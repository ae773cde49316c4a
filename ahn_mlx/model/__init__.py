"""A plain mlx-lm decoder with a window and a memory: its settings, attention, cache.

The `ahn_model.py` of every converted directory imports ModelArgs and build from here.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("ModelArgs", "build"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import guest  # takes MLX, which --help need not load

    return getattr(guest, name)
