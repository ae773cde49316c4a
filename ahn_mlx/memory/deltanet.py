"""DeltaNet as memory: Gated DeltaNet that never forgets (paper, appendix)."""

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .gated_deltanet import norm_gate_project
from .layers import GateProjection, HeadProjection, Scale


class DeltaNet(nn.Module):
    """Write strength from the evicted token, output norm and gate from the reading one.

    hidden: C; heads: H query heads; head_dim: D.
    """

    kind = "deltanet"
    gate_count = 1  # write strength
    rates = None  # nothing decays

    def __init__(self, hidden: int, heads: int, head_dim: int):
        super().__init__()
        self.b_proj = GateProjection(hidden, heads)
        self.g_proj = GateProjection(hidden, heads)
        self.o_norm = Scale(head_dim)
        self.o_proj = HeadProjection(heads, head_dim, head_dim)

    @property
    def norm_weight(self) -> mx.array:
        """[D]."""
        return self.o_norm.weight

    def gates(self, h: mx.array) -> mx.array:
        """h [B, L, C] -> [B, L, H, 1], beta, float32."""
        return mx.sigmoid(self.b_proj(h).astype(mx.float32))[..., None]

    def scan(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        gates: mx.array,
        state: mx.array | None,
        gradients: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Write T evicted tokens, read after each; shapes as in ops.delta_rule."""
        return ops.delta_rule(q, k, v, gates[..., 0], state, gradients)

    def output(self, o: mx.array, h: mx.array) -> mx.array:
        """o [B, T, H, D] float32, h [B, T, C] -> [B, H, T, D] in h's dtype."""
        return norm_gate_project(self, o, h)
