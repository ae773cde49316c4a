"""What tells a model from any other: its settings, and hashes of its weights."""

import hashlib
import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .safetensors import bits

SMALL = 1 << 14  # numbers of a weight whose values count


def model_identity(model: nn.Module) -> dict[str, str]:
    """Hashes of the settings, of names, shapes and dtypes of all weights, and of the values
    of the small ones, which differ between trainings. Of a model that several processes run
    it is that of the whole."""
    ahn = {**model.ahn.to_dict(), "window": 0, "sinks": 0}
    weights = vars(model).get("whole") or _of_weights(model)
    return {"settings": hash_of([vars(model.args), ahn]), **weights}


def note_whole(model: nn.Module) -> None:
    """Before a process leaves of a model only its part. No large weight is read."""
    vars(model)["whole"] = _of_weights(model)


def _of_weights(model: nn.Module) -> dict[str, str]:
    parameters: Any = sorted(tree_flatten(model.parameters()))
    layout = [(name, x.shape, str(x.dtype)) for name, x in parameters]
    small: list[mx.array] = [x for _, x in parameters if x.size <= SMALL]
    mx.eval(small)
    values = hashlib.sha256()
    for x in small:
        values.update(bits(x).data)
    return {"weights' shapes": hash_of(layout), "weights": values.hexdigest()}


def hash_of(facts: Any) -> str:
    """Of what JSON can say, or str."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
