"""An attention layer with a window and a memory: the only place where cache and memory meet.

It takes over the projections of an mlx-lm attention layer, so that parameter names,
quantization and sharding stay those of the plain model, and adds to its heads what
the memory remembers of the tokens that have left the window (paper, equation 5).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..memory import MEMORIES, Router
from ..memory.forms import scan, step
from ..ops import window_attention
from ..ops.window import attend, attend_to_all
from .cache import AHNCache, Turn, pack, unpack
from .config import AHNConfig

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
        if x.shape[1] == 1 and cache.full:
            return self._decode(x, cache)
        return self.merge(self.heads(x, cache))

    def heads(self, x: mx.array, cache: AHNCache) -> mx.array:
        """x [B, L, C] -> [B, H, L, D], attention + memory of each head, before o_proj.

        In training mode only by operations that have gradients.
        """
        offset = cache.offset
        q, k, v, gates, raw = self.project(x)
        q, k, q_sink = self._rotate(q, k, offset, cache.capacity)
        if x.shape[1] == 1:
            return attend(q, *cache.fill(k, v, gates), self.scale)
        update = cache.update(k, v, gates)
        heads = window_attention(q, update, self.scale, q_sink, self.training)
        if T := update.evicts:
            if self.config.query_projection:
                q = self.rope(self.ahn.q_proj(raw), offset=offset)
            o, cache.memory = scan(self.ahn, q[:, :, -T:], update, cache.memory, self.training)
            m = self.ahn.output(o, x[:, -T:])
            if self.config.router:
                last = update.end - cache.capacity
                # In training the paper counts sinks as part of the window.
                window = cache.capacity if self.training else cache.window
                loudness = self.router(mx.arange(last - T + 1, last + 1), window)
                m = (m * loudness).astype(m.dtype)
            if cache.trace is not None:
                first, strength = update.end - T - cache.window, update.evicted()[2][..., 0]
                cache.trace = cache.trace.add(first, strength, heads[:, :, -T:], m)
            heads = _add_tail(heads, m)
        return heads

    def _decode(self, x: mx.array, cache: AHNCache) -> mx.array:
        """One token when the window is full: the same shapes for ever, so compiled once."""
        if "_step" not in self.__dict__:
            self._step = mx.compile(self._decode_step, inputs=self.state)
        last = cache.offset + 1 - cache.capacity
        out, turn, cache.memory = self._step(
            x,
            mx.array([cache.offset, cache.capacity]),
            mx.array([last]),
            tuple(cache.turn()),
            cache.memory,
            cache.window,
            cache.sinks,
            cache.bits,
            cache.group_size,
        )
        cache.turned(Turn(*turn))
        return out

    def _decode_step(
        self,
        x: mx.array,
        positions: mx.array,
        n: mx.array,
        turn: tuple[Any, ...],
        memory: mx.array | None,
        window: int,
        sinks: int,
        bits: int | None,
        group_size: int,
    ) -> tuple[mx.array, tuple[Any, ...], mx.array]:
        """A pure function of arrays: positions [2], the token's and where sinks are clamped;
        n [1], tokens evicted so far. Returns output, turn and memory."""
        q, k, v, gates, raw = self.project(x)
        B, H = q.shape[:2]
        q_sink = None
        if self.config.sink_positions == "clamped":
            # One call for all three: a second batch row stands at the clamped position.
            rows = mx.concatenate([q, k], axis=1)
            rows = self.rope(mx.concatenate([rows, rows]), offset=mx.repeat(positions, B))
            q, k, q_sink = rows[:B, :H], rows[:B, H:], rows[B:, :H]
        else:
            q, k = (self.rope(heads, offset=positions[0]) for heads in (q, k))
        before = Turn(*turn)
        after, (keys, values) = before.put(pack(k, v, gates, bits, group_size))
        # Every slot is visible, in whatever order.
        heads = attend_to_all(q, keys, values, self.scale, q_sink, sinks)
        if self.config.query_projection:
            q = self.rope(self.ahn.q_proj(raw), offset=positions[0])
        evicted = unpack(before.leaving, bits, group_size)
        loudness = self.router(n, window) if self.config.router else None
        heads, memory = step(self.ahn, q, evicted, memory, heads, x, loudness)
        return self.merge(heads), tuple(after), memory

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function can be neither copied nor pickled; it is made again.
        return {name: value for name, value in self.__dict__.items() if name != "_step"}

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """x [B, L, C] -> q [B, H, L, D], k and v [B, Hkv, L, D], gates [B, H, L, G], and
        the queries before their norm."""
        B, L, _ = x.shape
        raw = self.q_proj(x).reshape(B, L, self.n_heads, -1)
        k = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1)
        v = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1)
        q = self.q_norm(raw) if "q_norm" in self else raw
        k = self.k_norm(k) if "k_norm" in self else k
        gates = self.ahn.gates(x).astype(x.dtype)
        q, k, v, gates, raw = (y.swapaxes(1, 2) for y in (q, k, v, gates, raw))
        return q, k, v, gates, raw

    def merge(self, heads: mx.array) -> mx.array:
        """Heads [B, H, L, D] -> [B, L, C]."""
        return self.o_proj(heads.swapaxes(1, 2).flatten(2))

    def _rotate(
        self, q: mx.array, k: mx.array, offset: int, capacity: int
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Queries and keys [B, heads, L, D] at their positions t, and, where sinks are
        clamped, the queries at min(t, capacity); None where that is t."""
        B, H, L, D = q.shape
        clamped = self.config.sink_positions == "clamped" and offset + L > capacity
        if not clamped:
            return self.rope(q, offset=offset), self.rope(k, offset=offset), None
        near = max(0, capacity - offset)
        # Each query beyond becomes a sequence of one token, to share one position.
        far = q[:, :, near:].reshape(B, -1, 1, D)
        far = self.rope(far, offset=capacity).reshape(B, H, L - near, D)
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        return q, k, mx.concatenate([q[:, :, :near], far], axis=2) if near else far


def _add_tail(x: mx.array, tail: mx.array) -> mx.array:
    """x [B, H, L, D] with tail [B, H, T, D] added to its last T rows."""
    rest = x.shape[2] - tail.shape[2]
    if rest == 0:
        return x + tail
    return mx.concatenate([x[:, :, :rest], x[:, :, rest:] + tail], axis=2)
