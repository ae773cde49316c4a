"""Artificial Hippocampus Networks (arXiv 2510.07318) on MLX.

    import ahn_mlx
    model, tokenizer = ahn_mlx.load("path/to/converted/model")

The platform is set up before anything imports MLX; names are imported when first used,
so that `ahn-mlx --help` need not load a framework.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from . import platform as platform
except KeyboardInterrupt:
    # The command line has not begun to listen.
    if sys.argv[0].endswith(("ahn-mlx", "-m")):
        sys.exit(130)
    raise

if TYPE_CHECKING:
    from .checkpoints.load import load_model as load_model
    from .errors import AHNError as AHNError
    from .hub.zoo import load as load
    from .model.augment import augment as augment
    from .model.config import AHNConfig as AHNConfig
    from .reading.session import Session as Session

__version__ = "0.1.0"
__all__ = ["AHNConfig", "AHNError", "Session", "__version__", "augment", "load", "load_model"]

_HOME = {
    "AHNConfig": ".model.config",
    "AHNError": ".errors",
    "Session": ".reading.session",
    "augment": ".model.augment",
    "load": ".hub.zoo",
    "load_model": ".checkpoints.load",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
