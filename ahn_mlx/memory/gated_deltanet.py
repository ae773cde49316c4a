"""Gated DeltaNet as memory: a delta rule that also forgets (paper, equation 6)."""

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .layers import (
    Derived,
    GateProjection,
    HeadProjection,
    Scale,
    decay_init,
    derive,
    project,
    silu,
)


class GatedDeltaNet(nn.Module):
    """Gates from the evicted token, output norm and gate from the reading one.

    hidden: C; heads: H query heads; head_dim: D; query_projection: read with a
    projection of the raw queries.
    """

    kind = "gated_deltanet"
    gate_count = 2  # write strength and log decay

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

    def derive(self) -> Derived:
        """What project takes."""
        return derive([self.b_proj, self.a_proj], self.g_proj, -mx.exp(self.A_log))

    def project(self, h: mx.array, derived: Derived) -> tuple[mx.array, mx.array]:
        """h [B, L, C] -> gates [B, L, H, 2], beta and log decay g, in h's dtype, and the
        output gate [B, L, H] before silu."""
        x, z = project(h, derived, len(self.o_proj.weight))
        return _gates(x, self.dt_bias, derived.rates).astype(h.dtype), z

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
        """Write T evicted tokens, read after each; shapes as in ops.gated_delta_rule."""
        beta, g = (x.squeeze(-1) for x in mx.split(gates, 2, axis=-1))
        return ops.gated_delta_rule(q, k, v, g, beta, state, gradients)

    def gated(self, o: mx.array, z: mx.array, dtype: mx.Dtype) -> mx.array:
        """o [B, T, H, D] float32, z [B, T, H] -> [B, H, T, D] for o_proj, in this dtype."""
        return norm_gate(o, self.o_norm.weight, z).astype(dtype).swapaxes(1, 2)


# Of the two gates of a head, which writes.
WRITES = mx.array([True, False])


@mx.compile
def _gates(x: mx.array, dt_bias: mx.array, rates: mx.array) -> mx.array:
    y = x.astype(mx.float32)
    decay = rates[:, None] * nn.softplus(y + dt_bias[:, None])
    return mx.where(WRITES, mx.sigmoid(y), decay).astype(x.dtype)


@mx.compile
def norm_gate(o: mx.array, weight: mx.array, z: mx.array) -> mx.array:
    """Norm first, then gate (both delta rules), in z's dtype."""
    y = mx.fast.rms_norm(o, None, 1e-5) * (silu(z) * weight.astype(mx.float32))
    return y.astype(z.dtype)
