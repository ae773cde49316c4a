"""Mamba2 as memory: a decaying sum of outer products (paper, appendix)."""

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .layers import GateProjection, HeadProjection, Scale, decay_init


class Mamba2(nn.Module):
    """Step size from the evicted token; gate first, then one norm over all heads.

    hidden: C; heads: H query heads; head_dim: D.
    """

    kind = "mamba2"
    gate_count = 1  # step size

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

    @property
    def rates(self) -> mx.array:
        """A [H] < 0, of decay per step size."""
        return -mx.exp(self.A_log)

    def gates(self, h: mx.array) -> mx.array:
        """h [B, L, C] -> [B, L, H, 1], dt after softplus, float32."""
        return nn.softplus(self.dt_proj(h).astype(mx.float32) + self.dt_bias)[..., None]

    def scan(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        gates: mx.array,
        state: mx.array | None,
        gradients: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Write T evicted tokens, read after each; shapes as in ops.ssd."""
        return ops.ssd(q, k, v, gates[..., 0], self.rates, state)

    def output(self, o: mx.array, h: mx.array) -> mx.array:
        """o [B, T, H, D] float32, h [B, T, C] -> [B, H, T, D] in h's dtype."""
        u = o * nn.silu(self.g_proj(h).astype(mx.float32))[..., None]
        y = mx.fast.rms_norm(u.flatten(-2), self.norm.weight.astype(mx.float32), 1e-5)
        return self.o_proj(y.reshape(o.shape).swapaxes(1, 2).astype(h.dtype))
