"""Pure functions of arrays: the recurrences and windowed attention.

Each file holds the oracle, the fast forms, and the one function that chooses.
"""

from .delta import delta_rule, gated_delta_rule
from .mamba2 import ssd
from .window import window_attention

__all__ = ["delta_rule", "gated_delta_rule", "ssd", "window_attention"]
