"""Names of models and what is known of them without a download: repositories, shapes,
sizes. The published ones are Qwen2.5-Instruct with each of the three memories."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import nearest, show
from ..model.config import PUBLISHED_NAMES, AHNConfig

DEFAULT = "ahn-gdn-smollm2-135m"
DEFAULT_Q_BITS = 4


@dataclass(frozen=True)
class Counts:
    """How many weights a model has, of all layers together.

    projections: q, k, v and o. vectors: norms and biases. embedding: the head's, too, unless it
    is the embedding. gates: what the memory computes for each token. readout: what it computes
    where it is read. memory_vectors: the memory's other parameters.
    """

    projections: int
    mlp: int
    embedding: int
    vectors: int
    gates: int = 0
    readout: int = 0
    memory_vectors: int = 0

    @property
    def memory(self) -> int:
        return self.gates + self.readout + self.memory_vectors


@dataclass(frozen=True)
class Base:
    """A base model. config: the fields of its config.json that fix its parameters. counts: its
    own weights. memories: gates, readout and vectors of each memory's published form."""

    repo: str
    config: dict[str, Any]
    counts: Counts
    memories: dict[str, tuple[int, int, int]]


# The small models' own window.
SMALL: dict[str, Any] = {"window": 1024, "sinks": 64, "sink_positions": "clamped"}


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
        have a router, DeltaNet's with a gain by window, and read with a projection of the query
        where the memory can."""
        ours = not self.repo
        gains = ours and self.memory == "deltanet"
        return AHNConfig(memory=self.memory, router=ours, query_projection=ours, window_gain=gains)

    @property
    def settings(self) -> AHNConfig:
        """As it is loaded."""
        return self.ahn if self.repo else replace(self.ahn, **SMALL)


def _qwen(
    sizes: tuple[str, int, int, int, int, int, int],
    counts: tuple[int, int, int, int],
    gates: tuple[int, int, int],
    readout: int,
    vectors: tuple[int, int, int],
) -> Base:
    """sizes: name, hidden size, layers, heads, heads of keys and values, MLP, vocabulary.
    gates, vectors: of the three memories, as in SHORT."""
    size, hidden, layers, heads, kv_heads, wide, vocabulary = sizes
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
    memories = {
        memory: (g, readout, v)
        for memory, g, v in zip(PUBLISHED_NAMES.values(), gates, vectors, strict=True)
    }
    return Base(f"Qwen/Qwen2.5-{size}-Instruct", config, Counts(*counts), memories)


# What is counted on the models themselves is written down here, so that it is known at once.
QWEN = {
    "3B": _qwen(
        ("3B", 2048, 36, 16, 2, 11008, 151936),
        (339_738_624, 2_434_793_472, 311_164_928, 241_664),
        (3_538_944, 2_359_296, 2_359_296),
        9_437_184,
        (5_760, 4_608, 76_032),
    ),
    "7B": _qwen(
        ("7B", 3584, 28, 28, 4, 18944, 152064),
        (822_083_584, 5_703_204_864, 2 * 544_997_376, 333_312),
        (8_429_568, 5_619_712, 5_619_712),
        12_845_056,
        (5_152, 3_584, 103_488),
    ),
    "14B": _qwen(
        ("14B", 5120, 48, 40, 8, 13824, 152064),
        (3_019_898_880, 10_192_158_720, 2 * 778_567_680, 840_704),
        (29_491_200, 19_660_800, 19_660_800),
        31_457_280,
        (9_984, 6_144, 253_440),
    ),
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
    Counts(26_542_080, 79_626_240, 28_311_552, 35_136),
    {
        # The first reads with a projection of the query; each has a router, the second's a gain.
        "gated_deltanet": (466_560, 2_211_840, 3_000),
        "deltanet": (311_040, 1_105_920, 2_730),
        "mamba2": (311_040, 1_105_920, 18_900),
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
    if name.startswith((".", "/", "~")):
        return f"no model directory {name}"
    if meant := nearest(name, MODELS):
        return f"no model {show(name)}; did you mean {meant}?"
    typed = name.lower()
    if meant := ", ".join(n for n, e in MODELS.items() if typed in f"{n} {e.base.repo.lower()}"):
        return f"no model {show(name)}; did you mean one of {meant}?"
    return f"no model directory {name}; names: {', '.join(MODELS)}; or give ORG/NAME"


# Of all other models.
CONVERTED = "it is converted already and has the bits it has"


def has_bits_to_choose(name: str) -> bool:
    """Whether what is loaded by this name is converted here, from a published base."""
    return name in MODELS and bool(MODELS[name].repo) and not Path(name).is_dir()


def on_base(repo: str) -> Published | None:
    """The first of the names on this base, whose sizes are known."""
    return next((entry for entry in MODELS.values() if entry.base.repo == repo), None)


def counts(name: str, memory: str) -> Counts:
    """Of a name's base with one of the memories, as published."""
    base = MODELS[name].base
    gates, readout, vectors = base.memories[memory]
    return replace(base.counts, gates=gates, readout=readout, memory_vectors=vectors)


def parameters(name: str) -> tuple[int, int]:
    """How many parameters the base and its memory have."""
    found = counts(name, MODELS[name].memory)
    base = found.projections + found.mlp + found.embedding + found.vectors
    return base, found.memory
