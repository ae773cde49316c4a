"""What makes a transformer an AHN model: memory kind, window, sinks.

Read from the `ahn` entry that our own config.json holds, or from the fields of
the PyTorch release (`_ahn_implementation`, `sliding_window`, ...).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import AHNError, show

# Names in the PyTorch release -> ours.
PUBLISHED_NAMES = {
    "GatedDeltaNet": "gated_deltanet",
    "DeltaNet": "deltanet",
    "Mamba2": "mamba2",
}
SINK_POSITIONS = ("absolute", "clamped")
LARGEST = 1 << 30  # of a window: MLX counts positions in int32


@dataclass(frozen=True)
class AHNConfig:
    """Settings of the memory (paper, section 2).

    memory: "gated_deltanet", "deltanet" or "mamba2".
    window: W, recent tokens kept losslessly.
    sinks: S, first tokens kept for ever.
    sink_positions: "absolute" (true positions, as in the paper) or "clamped"
        (a sink is never seen farther away than window + sinks).
    fa_layer_ids: layers that keep full attention and get no memory.
    router: scale each head's memory by how much it has compressed.
    query_projection: the memory reads with a projection of the raw queries.
    window_gain: the router has a gain by window, which the PyTorch release's has not.

    Raises AHNError on a value out of range.

    >>> ahn_mlx.AHNConfig(memory="mamba2", window=4096, sinks=64).capacity
    4160
    """

    memory: str = "gated_deltanet"
    window: int = 32640
    sinks: int = 128
    sink_positions: str = "absolute"
    fa_layer_ids: tuple[int, ...] = field(default=())
    router: bool = False
    query_projection: bool = False
    window_gain: bool = False

    def __post_init__(self) -> None:
        _one_of("memory", self.memory, tuple(PUBLISHED_NAMES.values()))
        _one_of("sink_positions", self.sink_positions, SINK_POSITIONS)
        _whole("window", self.window, 1)
        _whole("sinks", self.sinks, 0)
        object.__setattr__(self, "fa_layer_ids", _layer_ids(self.fa_layer_ids))
        for name in ("router", "query_projection", "window_gain"):
            if not isinstance(getattr(self, name), bool):
                raise AHNError(f"{name} must be true or false, not {show(getattr(self, name))}")
        if self.window_gain and not self.router:
            raise AHNError("window_gain is a router's, and router is false")
        if self.query_projection and self.memory != "gated_deltanet":
            # The other two memories ignore the flag, as in the PyTorch release.
            object.__setattr__(self, "query_projection", False)

    @property
    def capacity(self) -> int:
        """Tokens kept losslessly: window + sinks."""
        return self.window + self.sinks

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "AHNConfig":
        """Read a model's config.json, ours or the PyTorch release's.

        Raises AHNError when it has no AHN fields or a value is out of range.
        """
        if "ahn" in config:
            ours = config["ahn"]
            if not isinstance(ours, dict):
                raise AHNError(f"'ahn' in config.json must be an object, not {show(ours)}")
            unknown = sorted(set(ours) - set(cls.__dataclass_fields__))
            if unknown:
                raise AHNError(f"unknown setting {show(unknown[0])} under 'ahn' in config.json")
            return cls(**ours)
        published = config.get("_ahn_implementation")
        if published is None:
            raise AHNError("config.json has no AHN fields ('ahn' or '_ahn_implementation')")
        _one_of("_ahn_implementation", published, tuple(PUBLISHED_NAMES))
        window, sinks = config.get("sliding_window"), config.get("num_attn_sinks")
        return cls(
            memory=PUBLISHED_NAMES[published],
            window=cls.window if window is None else window,
            sinks=cls.sinks if sinks is None else sinks,
            fa_layer_ids=config.get("fa_layer_ids") or (),
            router=config.get("use_ahn_router") or False,
            query_projection=config.get("use_q_proj") or False,
        )

    def to_dict(self) -> dict[str, Any]:
        """The `ahn` entry of our config.json."""
        found = {**asdict(self), "fa_layer_ids": list(self.fa_layer_ids)}
        if not self.window_gain:  # versions before it know all else
            del found["window_gain"]
        return found


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise AHNError(f"{name} must be one of {', '.join(allowed)}, not {show(value)}")


def _whole(name: str, value: Any, low: int) -> None:
    # type() and not isinstance(): true is an int in Python
    if type(value) is not int or value < low:
        raise AHNError(f"{name} must be a whole number of at least {low}, not {show(value)}")
    if value > LARGEST:
        raise AHNError(f"{name} must be at most {LARGEST:,}, not {show(value)}")


def _layer_ids(value: Any) -> tuple[int, ...]:
    """Accept (1, 2), [1, 2] and the release's "1,2"."""
    items = value.split(",") if isinstance(value, str) else value
    said = show(value)
    if not isinstance(items, list | tuple) or not all(type(x) in (int, str) for x in items):
        raise AHNError(f"fa_layer_ids must be layer numbers such as 0,5, not {said}")
    try:
        ids = tuple(sorted({int(x) for x in items if str(x).strip()}))
    except ValueError:
        raise AHNError(f"fa_layer_ids must be layer numbers such as 0,5, not {said}") from None
    if ids and ids[0] < 0:
        raise AHNError(f"fa_layer_ids must not be negative, not {said}")
    return ids
