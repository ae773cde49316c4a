"""DeltaNet as memory: Gated DeltaNet that never forgets (paper, appendix)."""

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .gated_deltanet import norm_gate
from .layers import Derived, GateProjection, HeadProjection, Scale, derive, project


class DeltaNet(nn.Module):
    """Write strength from the evicted token, output norm and gate from the reading one.

    hidden: C; heads: H query heads; head_dim: D.
    """

    kind = "deltanet"
    gate_count = 1  # write strength

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

    def derive(self) -> Derived:
        """What project takes."""
        return derive([self.b_proj], self.g_proj, mx.zeros(len(self.o_proj.weight)))

    def project(self, h: mx.array, derived: Derived) -> tuple[mx.array, mx.array]:
        """h [B, L, C] -> gates [B, L, H, 1], beta, in h's dtype, and the output gate
        [B, L, H] before silu."""
        x, z = project(h, derived, len(self.o_proj.weight))
        return _gates(x).astype(h.dtype), z

    def scan(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        gates: mx.array,
        state: mx.array | None,
        rates: mx.array,
        gradients: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Write T evicted tokens, read after each; shapes as in ops.delta_rule."""
        return ops.delta_rule(q, k, v, gates[..., 0], state, gradients)

    def gated(self, o: mx.array, z: mx.array, dtype: mx.Dtype) -> mx.array:
        """o [B, T, H, D] float32, z [B, T, H] -> [B, H, T, D] for o_proj, in this dtype."""
        return norm_gate(o, self.o_norm.weight, z).astype(dtype).swapaxes(1, 2)


@mx.compile
def _gates(x: mx.array) -> mx.array:
    return mx.sigmoid(x.astype(mx.float32)).astype(x.dtype)
