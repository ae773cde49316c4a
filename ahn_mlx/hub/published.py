"""Names of models and what is known of them without a download: repositories, shapes,
sizes. The published ones are Qwen2.5-Instruct with each of the three memories."""

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import nearest, show
from ..model.config import PUBLISHED_NAMES, AHNConfig

DEFAULT = "ahn-gdn-smollm2-135m"
DEFAULT_Q_BITS = 4


@dataclass(frozen=True)
class Base:
    """A base model. config: the fields of its config.json that fix its parameters."""

    repo: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A name. repo: of the AHN parameters; empty if they come with this package."""

    name: str
    base: Base
    memory: str
    repo: str

    @property
    def ahn(self) -> AHNConfig:
        """Settings where the checkpoint's config.json has none: window 32,640, 128 sinks. Ours
        read with a projection of the query, where the memory can."""
        return AHNConfig(memory=self.memory, query_projection=not self.repo)


def _qwen(
    size: str, hidden: int, layers: int, heads: int, kv_heads: int, wide: int, vocabulary: int
) -> Base:
    config = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": size == "3B",
    }
    return Base(f"Qwen/Qwen2.5-{size}-Instruct", config)


QWEN = {
    "3B": _qwen("3B", 2048, 36, 16, 2, 11008, 151936),
    "7B": _qwen("7B", 3584, 28, 28, 4, 18944, 152064),
    "14B": _qwen("14B", 5120, 48, 40, 8, 13824, 152064),
}

SMOLLM2 = Base(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
)

# The release's own short names of the memories.
SHORT = {"GDN": "GatedDeltaNet", "DN": "DeltaNet", "Mamba2": "Mamba2"}

MODELS = {
    **{
        (name := f"ahn-{short}-smollm2-135m".lower()): Published(
            name, SMOLLM2, PUBLISHED_NAMES[long], ""
        )
        for short, long in SHORT.items()
    },
    **{
        (name := f"ahn-{short}-{size}".lower()): Published(
            name,
            base,
            PUBLISHED_NAMES[long],
            f"ByteDance-Seed/AHN-{short}-for-Qwen-2.5-Instruct-{size}",
        )
        for size, base in QWEN.items()
        for short, long in SHORT.items()
    },
}


def models_dir() -> Path:
    """Where converted models are: ~/.cache/ahn-mlx/models, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ahn-mlx" / "models"


def model_names() -> list[str]:
    """The names above, and repositories on this machine, as they are typed."""
    place = models_dir()
    found = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
    return [*MODELS, *(n.replace("--", "/", 1) for n in found if "--" in n and n[0] != ".")]


def no_such_model(name: str) -> str:
    """What is said of a name that is none: the one that is near, or else all of them."""
    if meant := nearest(name, MODELS):
        return f"no model {show(name)}; did you mean {meant}?"
    return f"no model directory {name}; names: {', '.join(MODELS)}; or give ORG/NAME"


# Of all other models.
CONVERTED = "it is converted already and has the bits it has"


def has_bits_to_choose(name: str) -> bool:
    """Whether what is loaded by this name is converted here, from a published base."""
    return name in MODELS and bool(MODELS[name].repo) and not Path(name).is_dir()


@cache
def parameters(name: str) -> tuple[int, int]:
    """How many parameters the base and its memory have, counted on the model itself."""
    from mlx.utils import tree_flatten

    from ..model.augment import build
    from ..model.names import is_memory

    entry = MODELS[name]
    model = build({**entry.base.config, "ahn": entry.ahn.to_dict()})
    arrays: Any = tree_flatten(model.parameters())
    sizes = {key: math.prod(x.shape) for key, x in arrays}
    memory = sum(size for key, size in sizes.items() if is_memory(key))
    return sum(sizes.values()) - memory, memory
