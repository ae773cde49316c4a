"""Mamba2 as memory: a decaying sum of outer products (paper, appendix)."""

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


class Mamba2(nn.Module):
    """Step size from the evicted token; gate first, then one norm over all heads.

    hidden: C; heads: H query heads; head_dim: D.
    """

    kind = "mamba2"
    gate_count = 1  # step size
    group: mx.distributed.Group | None = None  # of the ranks that have the other heads

    def __init__(self, hidden: int, heads: int, head_dim: int):
        super().__init__()
        self.A_log, self.dt_bias = decay_init(heads)
        self.dt_proj = GateProjection(hidden, heads, bias=True)
        self.g_proj = GateProjection(hidden, heads, bias=True)
        self.norm = Scale(heads * head_dim)
        self.o_proj = HeadProjection(heads, head_dim, head_dim)

    @property
    def norm_weight(self) -> mx.array:
        """[H D]."""
        return self.norm.weight

    def derive(self) -> Derived:
        """What project and scan take; rates are A [H] < 0, of decay per step size."""
        return derive([self.dt_proj], self.g_proj, -mx.exp(self.A_log))

    def project(self, h: mx.array, derived: Derived) -> tuple[mx.array, mx.array]:
        """h [B, L, C] -> gates [B, L, H, 1], dt after softplus, in h's dtype, and the output
        gate [B, L, H] before silu."""
        x, z = project(h, derived, len(self.o_proj.weight))
        return _gates(x, self.dt_bias).astype(h.dtype), z

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
        """Write T evicted tokens, read after each; shapes as in ops.ssd."""
        return ops.ssd(q, k, v, gates[..., 0], rates, state)

    def gated(self, o: mx.array, z: mx.array, dtype: mx.Dtype) -> mx.array:
        """o [B, T, H, D] float32, z [B, T, H] -> [B, H, T, D] for o_proj, in this dtype."""
        y = (o * silu(z)).flatten(-2)
        if self.group is None:
            y = mx.fast.rms_norm(y, None, 1e-5)
        else:
            squares = y.square().sum(axis=-1, keepdims=True)
            width = y.shape[-1] * self.group.size()
            total = mx.distributed.all_sum(squares, group=self.group)
            y = y * mx.rsqrt(total / width + 1e-5)
        y = y.reshape(o.shape) * self.norm.weight.reshape(o.shape[2:]).astype(mx.float32)
        return y.astype(dtype).swapaxes(1, 2)


@mx.compile
def _gates(x: mx.array, dt_bias: mx.array) -> mx.array:
    return nn.softplus(x.astype(mx.float32) + dt_bias[:, None]).astype(x.dtype)
