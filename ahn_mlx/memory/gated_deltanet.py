"""Gated DeltaNet as memory: a delta rule that also forgets (paper, equation 6)."""

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .layers import GateProjection, HeadProjection, Scale, decay_init


class GatedDeltaNet(nn.Module):
    """Gates from the evicted token, output norm and gate from the reading one.

    hidden: C; heads: H query heads; head_dim: D; query_projection: read with a
    projection of the raw queries.
    """

    kind = "gated_deltanet"
    gate_count = 2  # write strength and log decay
    rates = None  # of decay, where gates alone do not say it

    def __init__(self, hidden: int, heads: int, head_dim: int, query_projection: bool = False):
        super().__init__()
        self.A_log, self.dt_bias = decay_init(heads)
        self.a_proj = GateProjection(hidden, heads)
        self.b_proj = GateProjection(hidden, heads)
        self.g_proj = GateProjection(hidden, heads)
        self.o_norm = Scale(head_dim)
        self.o_proj = HeadProjection(heads, head_dim, head_dim)
        if query_projection:
            # [H, D, C / H] in the PyTorch release; C / H is the width of a raw query.
            self.q_proj = HeadProjection(heads, head_dim, hidden // heads)
            # Not zero: then neither it nor o_proj would have a gradient.
            eye = mx.eye(head_dim, hidden // heads)
            self.q_proj.weight = mx.repeat(eye[None], heads, axis=0)

    @property
    def norm_weight(self) -> mx.array:
        """[D]."""
        return self.o_norm.weight

    def gates(self, h: mx.array) -> mx.array:
        """h [B, L, C] -> [B, L, H, 2], beta and log decay g, float32."""
        return _gates(self.b_proj(h), self.a_proj(h), self.dt_bias, self.A_log)

    def scan(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        gates: mx.array,
        state: mx.array | None,
        gradients: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Write T evicted tokens, read after each; shapes as in ops.gated_delta_rule."""
        return ops.gated_delta_rule(q, k, v, gates[..., 1], gates[..., 0], state, gradients)

    def output(self, o: mx.array, h: mx.array) -> mx.array:
        """o [B, T, H, D] float32, h [B, T, C] -> [B, H, T, D] in h's dtype."""
        return norm_gate_project(self, o, h)


@mx.compile
def _gates(b: mx.array, a: mx.array, dt_bias: mx.array, A_log: mx.array) -> mx.array:
    beta = mx.sigmoid(b.astype(mx.float32))
    step = nn.softplus(a.astype(mx.float32) + dt_bias)
    return mx.stack([beta, -mx.exp(A_log) * step], axis=-1)


def norm_gate_project(memory: nn.Module, o: mx.array, h: mx.array) -> mx.array:
    """Norm first, then gate, then the projection of each head (both delta rules)."""
    y = _norm_gate(o, memory.o_norm.weight, memory.g_proj(h))
    return memory.o_proj(y.swapaxes(1, 2).astype(h.dtype))


@mx.compile
def _norm_gate(o: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    gate = nn.silu(z.astype(mx.float32))[..., None]
    return mx.fast.rms_norm(o, weight.astype(mx.float32), 1e-5) * gate
