"""Artificial Hippocampus Networks (arXiv 2510.07318) on MLX.

    import ahn_mlx
    model, tokenizer = ahn_mlx.load("path/to/converted/model")

The platform is set up before anything imports MLX; names are imported when first used,
so that `ahn-mlx --help` need not load a framework.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import platform as platform

if TYPE_CHECKING:
    from .config import AHNConfig as AHNConfig
    from .errors import AHNError as AHNError
    from .model import augment as augment
    from .model import load_model as load_model
    from .session import Session as Session
    from .zoo import load as load

__version__ = "0.1.0"
__all__ = ["AHNConfig", "AHNError", "Session", "__version__", "augment", "load", "load_model"]

_HOME = {
    "AHNConfig": ".config",
    "AHNError": ".errors",
    "Session": ".session",
    "augment": ".model",
    "load": ".zoo",
    "load_model": ".model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
