"""The memories: each turns evicted tokens into a state, and a state into an output."""

from .deltanet import DeltaNet
from .gated_deltanet import GatedDeltaNet
from .mamba2 import Mamba2
from .router import UNLEARNED, Router, gain

Memory = GatedDeltaNet | DeltaNet | Mamba2

MEMORIES = {memory.kind: memory for memory in (GatedDeltaNet, DeltaNet, Mamba2)}

__all__ = [
    "MEMORIES",
    "UNLEARNED",
    "DeltaNet",
    "GatedDeltaNet",
    "Mamba2",
    "Memory",
    "Router",
    "gain",
]
