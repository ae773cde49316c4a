"""An attention layer with a window and a memory: the only place where cache and memory meet.

It takes over the projections of an mlx-lm attention layer, so that parameter names,
quantization and sharding stay those of the plain model, and adds to its heads what
the memory remembers of the tokens that have left the window (paper, equation 5).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache import AHNCache
from .config import AHNConfig
from .memory import MEMORIES, Router
from .ops import window_attention
from .ops.window import attend

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class AHNAttention(nn.Module):
    """Sinks + window + memory in place of full attention.

    attention: an mlx-lm attention layer with q/k/v/o projections and RoPE, and
    perhaps q_norm and k_norm. hidden: width C of the hidden state.
    """

    def __init__(self, attention: nn.Module, config: AHNConfig, hidden: int):
        super().__init__()
        for name in (*PROJECTIONS, "rope", "q_norm", "k_norm"):
            if name in attention:
                self[name] = attention[name]
        self.n_heads = attention.n_heads
        self.n_kv_heads = attention.n_kv_heads
        self.scale = attention.scale
        self.config = config
        head_dim = attention.k_proj.weight.shape[0] // self.n_kv_heads
        options = {"query_projection": True} if config.query_projection else {}
        self.ahn = MEMORIES[config.memory](hidden, self.n_heads, head_dim, **options)
        if config.router:
            self.router = Router(self.n_heads)

    def __call__(self, x: mx.array, mask: Any = None, cache: AHNCache | None = None) -> mx.array:
        """x [B, L, C] normed hidden states -> [B, L, C]. Visibility is decided here: the
        mask, made for full attention, is not used."""
        if cache is None:
            cache = AHNCache(self.config.window, self.config.sinks)
        B, L, _ = x.shape
        raw = self.q_proj(x).reshape(B, L, self.n_heads, -1)
        k = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1)
        v = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        q = self.q_norm(raw) if "q_norm" in self else raw
        k = self.k_norm(k) if "k_norm" in self else k
        q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
        offset = cache.offset
        q, k, q_sink = self._rotate(q, k, offset, cache.capacity)
        gates = self.ahn.gates(x).transpose(0, 2, 1, 3).astype(x.dtype)  # [B, H, L, G]

        keys, values, evicted = cache.update(k, v, gates)
        if L == 1:
            # Every slot in use is visible, in whatever order.
            heads = attend(q, keys, values, self.scale, None, q_sink, cache.sinks)
        else:
            heads = window_attention(
                q,
                keys,
                values,
                offset=offset,
                window=cache.window,
                sinks=cache.sinks,
                scale=self.scale,
                q_sink=q_sink,
            )
        if evicted is not None:
            T = evicted[0].shape[2]
            if self.config.query_projection:
                reading = self.rope(self.ahn.q_proj(raw.swapaxes(1, 2)), offset=offset)
            else:
                reading = q
            heads = _add_tail(heads, self._remember(reading[:, :, -T:], x[:, -T:], evicted, cache))
        return self.o_proj(heads.transpose(0, 2, 1, 3).reshape(B, L, -1))

    def _rotate(
        self, q: mx.array, k: mx.array, offset: int, capacity: int
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Queries and keys [B, heads, L, D] at their positions t, and, where sinks are
        clamped, the queries at min(t, capacity); None where that is t."""
        B, H, L, D = q.shape
        clamped = self.config.sink_positions == "clamped" and offset + L > capacity
        if not clamped:
            return self.rope(q, offset=offset), self.rope(k, offset=offset), None
        if L == 1:
            # One call for all three: a second batch row stands at the clamped position.
            rows = mx.concatenate([q, k], axis=1)
            positions = mx.array([offset] * B + [capacity] * B)
            rows = self.rope(mx.concatenate([rows, rows]), offset=positions)
            return rows[:B, :H], rows[:B, H:], rows[B:, :H]
        near = max(0, capacity - offset)
        # Each query beyond becomes a sequence of one token, to share one position.
        far = q[:, :, near:].reshape(B, -1, 1, D)
        far = self.rope(far, offset=capacity).reshape(B, H, L - near, D)
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        return q, k, mx.concatenate([q[:, :, :near], far], axis=2) if near else far

    def _remember(
        self,
        q: mx.array,
        h: mx.array,
        evicted: tuple[mx.array, ...],
        cache: AHNCache,
    ) -> mx.array:
        """Write the evicted tokens, read with q [B, H, T, D] and h [B, T, C] -> [B, H, T, D]."""
        k, v, gates = (e.swapaxes(1, 2) for e in evicted)
        o, cache.memory = self.ahn.scan(q.swapaxes(1, 2), k, v, gates, cache.memory)
        m = self.ahn.output(o, h)
        if self.config.router:
            last = cache.offset - cache.capacity
            n = mx.arange(last - q.shape[2] + 1, last + 1)
            m = (m * self.router(n, cache.window)).astype(h.dtype)
        return m


def _add_tail(x: mx.array, tail: mx.array) -> mx.array:
    """x [B, H, L, D] with tail [B, H, T, D] added to its last T rows."""
    rest = x.shape[2] - tail.shape[2]
    if rest == 0:
        return x + tail
    return mx.concatenate([x[:, :, :rest], x[:, :, rest:] + tail], axis=2)
