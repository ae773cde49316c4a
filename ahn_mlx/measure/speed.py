"""How fast this machine read a model when `bench` measured it, kept for `estimate`."""

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import AHNError
from ..hub.published import models_dir
from ..outputs.files import replacing


def _file() -> Path:
    return models_dir().parent / "bench.json"


def _known() -> dict[str, Any]:
    """FLOP/s by name; nothing of a file that is not there or not ours."""
    try:
        found = json.loads(_file().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def record(name: str, flops: float) -> None:
    """Keep the FLOP/s at which a model read. A cache that cannot be written is no error."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with replacing(_file()) as part:
            part.write_text(json.dumps({**_known(), name: flops}))
    except (OSError, AHNError):
        pass


def recall(name: str) -> float | None:
    """FLOP/s at which this machine read that model, if that was ever measured."""
    found: Any = _known().get(name)
    # Also of a whole number of 400 digits, which is no float.
    return float(found) if type(found) in (int, float) and 0 < found <= sys.float_info.max else None
