"""An attention layer with a window and a memory: the only place where cache and memory meet.

It takes over the projections of an mlx-lm attention layer, so that parameter names,
quantization and sharding stay those of the plain model, and adds to its heads what
the memory remembers of the tokens that have left the window (paper, equation 5).
"""

from threading import RLock
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..memory import MEMORIES, Router
from ..memory.forms import scan, step
from ..memory.layers import Derived, Kept
from ..ops import window_attention
from ..ops.ring import Place, write_slots
from ..ops.window import Logits, attend, attend_to_all
from .cache import AHNCache, BatchAHNCache, PureCache, Watched
from .config import AHNConfig
from .fit import fit_of, plain_facts
from .slots import Rows, pack, unpack
from .together import RowsCache

# Tokens of a batch whose attention is computed at once, to all slots.
PIECE = 256


class AHNAttention(nn.Module):
    """Sinks + window + memory in place of full attention.

    attention: an mlx-lm attention layer. hidden: width C of the hidden state. Raises AHNError
    if no reading of the layer fits.
    """

    def __init__(self, attention: nn.Module, config: AHNConfig, hidden: int):
        super().__init__()
        self.fit = fit = fit_of(attention, hidden)
        # A model file may ask its attention whether it is local, and the like.
        facts = plain_facts(attention).items()
        self.__dict__.update({name: x for name, x in facts if not hasattr(AHNAttention, name)})
        for name in fit.children:
            self[name] = attention[name]
        self.n_heads, self.n_kv_heads = fit.n_heads, fit.n_kv_heads
        self.head_dim, self.scale = fit.head_dim, fit.scale
        self.config = config
        options = {"query_projection": True} if config.query_projection else {}
        self.ahn = MEMORIES[config.memory](hidden, self.n_heads, self.head_dim, **options)
        if config.router:
            self.router = Router(self.n_heads, config.window_gain)
        self._lock, self._derived = RLock(), Kept()

    def __call__(
        self,
        x: mx.array,
        mask: Any = None,
        cache: AHNCache | BatchAHNCache | PureCache | RowsCache | None = None,
    ) -> mx.array:
        """x [B, L, C] normed hidden states -> [B, L, C]. Visibility is decided here: the
        mask, made for full attention, is not used."""
        if cache is None:
            cache = AHNCache(self.config.window, self.config.sinks)
        # While one thread traces the step, the layer's parameters are placeholders.
        with self._lock:
            if isinstance(cache, PureCache):
                settings = (cache.window, cache.sinks, cache.bits, cache.group_size)
                derived = self.ahn.derive()
                out, after = self.step(x, cache.place, cache.rows, derived, *settings, plain=True)
                cache.rows = Rows(*after)
                return out
            if isinstance(cache, RowsCache):
                return self._rows(x, cache)
            if isinstance(cache, BatchAHNCache):
                return self._batch(x, cache)
            if x.shape[1] == 1 and cache.full:
                return self._decode(x, cache)
            heads = self.heads(x, cache)
            if cache.watched is not None:
                cache.watched.append(Watched(x, heads))
            return self.merge(heads, x)

    @property
    def logits(self) -> Logits | None:
        """What is done with the scores beyond their scale."""
        return self.fit.logits(self)

    def heads(self, x: mx.array, cache: AHNCache) -> mx.array:
        """x [B, L, C] -> [B, H, L, D], attention + memory of each head, before o_proj.

        In training mode only by operations that have gradients.
        """
        offset = cache.offset
        # In training nothing of a trace may stay here.
        derived = self.ahn.derive() if self.training else self._derive(offset == 0)
        q, k, v, raw = self.project(x)
        gates, z = self.gates(x, derived)
        q, k, q_sink = self._rotate(q, k, offset, cache.capacity)
        if x.shape[1] == 1:
            return attend(q, *cache.fill(k, v, gates), self.scale, logits=self.logits)
        update = cache.update(k, v, gates)
        heads = window_attention(q, update, self.scale, q_sink, self.training, self.logits)
        if T := update.evicts:
            if self.config.query_projection:
                q = self.turn(self.ahn.q_proj(raw), offset)
            q, rates = q[:, :, -T:], derived.rates
            o, cache.memory = scan(self.ahn, q, update, cache.memory, rates, self.training)
            # In training the memory is float32, whatever the base is.
            m = self.ahn.o_proj(self.ahn.gated(o, z[:, -T:], x.dtype)).astype(x.dtype)
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

    def _decode(self, x: mx.array, cache: AHNCache | BatchAHNCache) -> mx.array:
        """One token of each row: the same shapes for ever, so compiled once."""
        if "_compiled" not in self.__dict__:
            self._compiled = mx.compile(self.step, inputs=self.state)
        rows, place = cache.turn()
        settings = (cache.window, cache.sinks, cache.bits, cache.group_size)
        derived = self._derive()
        out, after = self._compiled(x, tuple(place), tuple(rows), tuple(derived), *settings)
        cache.turned(Rows(*after))
        return out

    def _batch(self, x: mx.array, cache: BatchAHNCache) -> mx.array:
        """Rows at places of their own, in pieces that no window is too small for."""
        if cache.rows is None:
            B, H, D = 1, self.n_heads, self.head_dim
            kv = mx.zeros((B, self.n_kv_heads, 1, D), dtype=x.dtype)
            gates = mx.zeros((B, H, 1, self.ahn.gate_count), dtype=x.dtype)
            cache.start(pack(kv, kv, gates, cache.bits, cache.group_size))
        if x.shape[1] == 1:
            return self._decode(x, cache)
        settings = (cache.window, cache.sinks, cache.bits, cache.group_size)
        derived = self._derive(min(cache.offsets) == 0)
        parts, n = [], min(PIECE, cache.window)
        for start in range(0, x.shape[1], n):
            part = x[:, start : start + n]
            rows, place = cache.turn(part.shape[1])
            out, after = self.step(part, tuple(place), tuple(rows), tuple(derived), *settings)
            cache.turned(Rows(*after), part.shape[1])
            parts.append(out)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def _rows(self, x: mx.array, cache: RowsCache) -> mx.array:
        """One token of each of several conversations, and padding; x [B, 1, C]."""
        if "_compiled_row" not in self.__dict__:
            self._compiled_row = mx.compile(self._row, inputs=self.state)
        where, derived = cache.place, self._derive()
        q, k, v, raw = self.project(x)
        gates, z = self.gates(x, derived)
        q, q_sink = self._turn(q, where, cache.sinks)
        k, asks = self.fit.turn_keys(self, k, where.at), q
        if self.config.query_projection:
            asks = self.turn(self.ahn.q_proj(raw), where.at)
        heads, n = [], 0
        for part in cache.parts:
            own = slice(n, n + len(part.offsets))
            mine = (q[own], None if q_sink is None else q_sink[own], asks[own], z[own])
            new, settings = (k[own], v[own], gates[own]), (part.window, part.sinks)
            rows, place = part.turn()
            said, after = self._compiled_row(
                *(mine, new, tuple(place), tuple(rows), tuple(derived)),
                *(*settings, part.bits, part.group_size),
            )
            part.turned(Rows(*after))
            heads.append(said)
            n = own.stop
        if rest := x.shape[0] - n:
            heads.append(mx.zeros((rest, *heads[0].shape[1:]), dtype=heads[0].dtype))
        return self.merge(mx.concatenate(heads), x)

    def _row(
        self,
        mine: tuple[Any, ...],
        new: tuple[mx.array, mx.array, mx.array],
        place: tuple[Any, ...],
        rows: tuple[Any, ...],
        derived: tuple[Any, ...],
        window: int,
        sinks: int,
        bits: int | None,
        group_size: int,
    ) -> tuple[mx.array, tuple[Any, ...]]:
        """What is a conversation's own in a step: its window and its memory [n, H, 1, D]."""
        (q, q_sink, asks, z), where, before = mine, Place(*place), Rows(*rows)
        written = pack(*new, bits, group_size)
        left, buffers = before.leaving, write_slots(before.buffers, written, where.slots)
        heads, leaving = attend_to_all(
            q, buffers, self.scale, q_sink, sinks, where, logits=self.logits
        )
        left = unpack(left, bits, group_size)
        loudness = self.router(where.evicted, window) if self.config.router else None
        rates = Derived(*derived).rates
        heads, memory = step(self.ahn, asks, left, before.memory, heads, z, rates, loudness)
        return heads, tuple(Rows(buffers, leaving, memory))

    def step(
        self,
        x: mx.array,
        place: tuple[Any, ...],
        rows: tuple[Any, ...],
        derived: tuple[Any, ...],
        window: int,
        sinks: int,
        bits: int | None,
        group_size: int,
        plain: bool = False,
    ) -> tuple[mx.array, tuple[Any, ...]]:
        """L <= W tokens of B rows, as a pure function of arrays: nothing in it depends on what
        a row has read, so that windows that fill, that are just full and that wrap are one.

        x: [B, L, C]. place, rows, derived: the fields of Place, Rows and Derived, rows without
        None. plain: only by operations that mx.export_function can write. Returns [B, L, C],
        and rows.
        """
        where, before, parameters = Place(*place), Rows(*rows), Derived(*derived)
        q, k, v, raw = self.project(x)
        gates, z = self.gates(x, parameters)
        q, q_sink = self._turn(q, where, sinks)
        k = self.fit.turn_keys(self, k, where.at)
        new = pack(k, v, gates, bits, group_size)
        if x.shape[1] == 1 and where.valid is None:
            left, buffers = before.leaving, write_slots(before.buffers, new, where.slots)
            heads, leaving = attend_to_all(
                q, buffers, self.scale, q_sink, sinks, where, plain, self.logits
            )
            after = Rows(buffers, leaving, before.memory)
        else:
            after, keys, values, left = before.put_chunk(new, where)
            heads = attend(
                q, keys, values, self.scale, where.seen, q_sink, sinks, plain, self.logits
            )
        if self.config.query_projection:
            q = self.turn(self.ahn.q_proj(raw), where.at)
        left = unpack(left, bits, group_size)
        loudness = self.router(where.evicted, window) if self.config.router else None
        heads, memory = step(self.ahn, q, left, before.memory, heads, z, parameters.rates, loudness)
        return self.merge(heads, x), tuple(after._replace(memory=memory))

    def _derive(self, begins: bool = False) -> Derived:
        """What follows from the memory's parameters. begins: a text does; they may have been
        changed in place since the last one."""
        if begins:
            self._derived.drop()
        return self._derived.of(self.ahn)

    def _turn(self, q: mx.array, where: Place, sinks: int) -> tuple[mx.array, mx.array | None]:
        """Queries [B, H, L, D] at their positions, and as the sinks see them, if they do."""
        B, H, L, D = q.shape
        turn = self.fit.turn_queries
        if sinks == 0 or self.fit.rope is None or self.config.sink_positions != "clamped":
            return turn(self, q, where.at), None
        if L == 1:
            # Both at once.
            twice = mx.broadcast_to(q, (2, *q.shape)).reshape(2 * B, H, 1, D)
            twice = turn(self, twice, where.both)
            return twice[:B], twice[B:]
        alone = q.swapaxes(1, 2).reshape(B * L, H, 1, D)
        near = turn(self, alone, where.near.flatten()).reshape(B, L, H, D).swapaxes(1, 2)
        return turn(self, q, where.at), near

    def __getstate__(self) -> dict[str, Any]:
        # What cannot be copied or pickled, or need not; it is made again.
        made = ("_compiled", "_compiled_row", "_lock", "_derived")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._derived = RLock(), Kept()

    def project(self, x: mx.array) -> tuple[mx.array, ...]:
        """x [B, L, C] -> q [B, H, L, D], k and v [B, Hkv, L, D], and the queries before their
        norm."""
        return self.fit.project(self, x)

    def turn(self, x: mx.array, offset: Any) -> mx.array:
        """x [B, heads, L, D] at the positions from `offset` on, as RoPE alone turns it."""
        return self.fit.turn(self, x, offset)

    def gates(self, x: mx.array, derived: Derived) -> tuple[mx.array, mx.array]:
        """x [B, L, C] -> gates [B, H, L, G] of the memory, and its output gate [B, L, H]."""
        gates, z = self.ahn.project(x, derived)
        return gates.swapaxes(1, 2), z

    def merge(self, heads: mx.array, x: mx.array) -> mx.array:
        """Heads [B, H, L, D], and the x that they came from -> [B, L, C]."""
        return self.fit.merge(self, heads, x)

    def _rotate(
        self, q: mx.array, k: mx.array, offset: int, capacity: int
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Queries and keys [B, heads, L, D] at their positions t, and, where sinks are
        clamped, the queries at min(t, capacity); None where that is t."""
        B, H, L, D = q.shape
        turn, k = self.fit.turn_queries, self.fit.turn_keys(self, k, offset)
        clamped = self.config.sink_positions == "clamped" and self.fit.rope is not None
        if not clamped or offset + L <= capacity:
            return turn(self, q, offset), k, None
        near = max(0, capacity - offset)
        # Each query beyond becomes a sequence of one token, to share one position.
        far = q[:, :, near:].reshape(B, -1, 1, D)
        far = turn(self, far, capacity).reshape(B, H, L - near, D)
        q = turn(self, q, offset)
        return q, k, mx.concatenate([q[:, :, :near], far], axis=2) if near else far


def _add_tail(x: mx.array, tail: mx.array) -> mx.array:
    """x [B, H, L, D] with tail [B, H, T, D] added to its last T rows."""
    rest = x.shape[2] - tail.shape[2]
    if rest == 0:
        return x + tail
    head, last = mx.split(x, [rest], axis=2)  # whose gradient is one array, not two of zeros
    return mx.concatenate([head, last + tail], axis=2)
