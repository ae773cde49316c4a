"""What an attention layer of mlx-lm does around its softmax, read off the layer itself.

No family is named here. A layer's projections, norms, RoPE, gates and the like give a few
readings of it; the one that is taken computes on random tokens what the layer computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import AHNError
from ..ops.window import Logits, attend

# What mlx-lm's files call the same thing.
HEADS = ("n_heads", "num_attention_heads", "num_heads")
KV_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads", *HEADS)
APART = ("q_proj", "k_proj", "v_proj")
FUSED = ("qkv_proj", "query_key_value", "q_k_v_proj", "Wqkv", "W_pack", "wqkv")
OUTPUT = ("o_proj", "out_proj", "dense", "wo")
Q_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
K_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
ROPES = ("rope", "rotary_emb")
SCALES = ("scale", "sm_scale", "softmax_scale", "scaling")
CAPS = ("attn_logit_softcapping",)
GATES = {"gate_proj": "wide", "g_proj": "head"}
LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj")

# Where the random tokens stand: at the start, and where scores that grow with the position do.
PLACES = (0, 70_001)
TOLERANCE = 2e-3  # of the largest number; a GPU may multiply in 19 bits


@dataclass(frozen=True)
class Fit:
    """One reading of an attention layer. Names are those of its children, None: it has none.

    layout: of a fused projection, all queries, all keys, all values ("blocks"), or those of one
    key/value head together ("groups"). wide_norm: over all heads at once. late_norm: after
    RoPE. cap: scores are cap * tanh(score / cap). sinks: a logit of each head that takes
    attention and gives nothing. gate: "wide", a number for each of a head's; "head", one for
    each head; "query", of the second half of each head's query projection.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    output: str
    fused: str | None = None
    layout: str = "blocks"
    q_norm: str | None = None
    k_norm: str | None = None
    wide_norm: bool = False
    late_norm: bool = False
    rope: str | None = None
    cap: float | None = None
    sinks: str | None = None
    gate: str | None = None
    gate_name: str | None = None

    @property
    def children(self) -> tuple[str, ...]:
        """What is taken over from the layer, by name."""
        inputs = (self.fused,) if self.fused else APART
        rest = (self.output, self.q_norm, self.k_norm, self.rope, self.sinks, self.gate_name)
        return tuple(name for name in (*inputs, *rest) if name is not None)

    def describe(self) -> str:
        """In a few words."""
        norm = ("over all heads" if self.wide_norm else "per head") if self.q_norm else ""
        return ", ".join(
            words
            for words, there in (
                (f"{self.fused} ({self.layout})", self.fused),
                (f"norm {norm}{' after RoPE' if self.late_norm else ''}", norm),
                ("no RoPE", self.rope is None),
                (f"{self.gate} gate", self.gate),
                ("soft cap", self.cap),
                ("learned sinks", self.sinks),
            )
            if there
        )

    def project(self, m: nn.Module, x: mx.array) -> tuple[mx.array, ...]:
        """x [B, L, C] -> q [B, H, L, D], k and v [B, Hkv, L, D], before RoPE; and the queries
        before their norm."""
        raw, k, v = self._heads(m, x)
        q = raw
        if self.q_norm and self.k_norm and not self.late_norm:
            q, k = self._norm(m[self.q_norm], raw), self._norm(m[self.k_norm], k)
        q, k, v, raw = (y.swapaxes(1, 2) for y in (q, k, v, raw))
        return q, k, v, raw

    def _heads(self, m: nn.Module, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, L, H, D], keys and values [B, L, Hkv, D]."""
        B, L, _ = x.shape
        H, G, D = self.n_heads, self.n_kv_heads, self.head_dim
        if self.fused is None:
            q, k, v = (m[name](x) for name in APART)
            q = q.reshape(B, L, H, -1)
            if self.gate == "query":
                q = q[..., :D]
            return q, k.reshape(B, L, G, -1), v.reshape(B, L, G, -1)
        y = m[self.fused](x)
        if self.layout == "blocks":
            y = y.reshape(B, L, H + 2 * G, D)
            return y[:, :, :H], y[:, :, H : H + G], y[:, :, H + G :]
        y = y.reshape(B, L, G, H // G + 2, D)
        return y[:, :, :, :-2].reshape(B, L, H, D), y[:, :, :, -2], y[:, :, :, -1]

    def _norm(self, norm: nn.Module, x: mx.array) -> mx.array:
        """x [B, L, heads, D]."""
        if self.wide_norm:
            return norm(x.flatten(2)).reshape(x.shape)
        return norm(x)

    def turn(self, m: nn.Module, x: mx.array, offset: Any = 0) -> mx.array:
        """x [B, heads, L, D] at the positions from `offset` on, a number or one for each row."""
        return x if self.rope is None else m[self.rope](x, offset=offset)

    def turn_queries(self, m: nn.Module, q: mx.array, offset: Any = 0) -> mx.array:
        return self._late(m, self.q_norm, self.turn(m, q, offset))

    def turn_keys(self, m: nn.Module, k: mx.array, offset: Any = 0) -> mx.array:
        return self._late(m, self.k_norm, self.turn(m, k, offset))

    def _late(self, m: nn.Module, name: str | None, x: mx.array) -> mx.array:
        if not self.late_norm or name is None:
            return x
        return self._norm(m[name], x.swapaxes(1, 2)).swapaxes(1, 2)

    def logits(self, m: nn.Module) -> Logits | None:
        """What is done with the scores beyond their scale."""
        if self.cap is None and self.sinks is None:
            return None
        return Logits(self.cap, None if self.sinks is None else m[self.sinks])

    def merge(self, m: nn.Module, heads: mx.array, x: mx.array) -> mx.array:
        """Heads [B, H, L, D], and the x that they came from -> [B, L, C]."""
        y = heads.swapaxes(1, 2)
        if self.gate == "query":
            gate = m[APART[0]](x).reshape(*y.shape[:3], -1)[..., self.head_dim :]
            y = y * mx.sigmoid(gate)
        elif self.gate_name is not None:
            gate = mx.sigmoid(m[self.gate_name](x))
            y = y * (gate.reshape(y.shape) if self.gate == "wide" else gate[..., None])
        return m[self.output](y.flatten(2))


def fit_of(attention: nn.Module, hidden: int) -> Fit:
    """The reading that computes what this layer computes. hidden: width of its input.

    Raises AHNError with what there is in it that has no place here.
    """
    key = _key(attention, hidden)
    if key not in _proven:
        _proven[key] = _prove(attention, hidden)
    return _proven[key]


_proven: dict[Any, Fit] = {}


def _key(attention: nn.Module, hidden: int) -> Any:
    """Layers of which all that readings depend on is the same."""
    parameters: Any = tree_flatten(attention.parameters())
    shapes = tuple((name, x.shape, x.dtype) for name, x in parameters)
    facts = tuple(sorted(plain_facts(attention).items(), key=itemgetter(0)))
    children = tuple((name, type(x)) for name, x in attention.items())
    return type(attention), hidden, shapes, facts, children


def plain_facts(attention: nn.Module) -> dict[str, Any]:
    """Numbers, words and the like that a layer knows of itself."""
    return {
        name: value
        for name, value in vars(attention).items()
        if isinstance(value, int | float | str | None) and name not in ("training", "_training")
    }


def _prove(attention: nn.Module, hidden: int) -> Fit:
    readings = list(_readings(attention))
    mine = attention.parameters()
    attention.update(tree_map_with_path(_random, mine))
    try:
        x = mx.random.normal((2, 6, hidden), key=mx.random.key(1))
        wanted = [_theirs(attention, x, place) for place in PLACES]
        for fit in readings:
            if _same(attention, fit, x, wanted):
                return fit
    finally:
        attention.update(mine)
    raise AHNError("its attention does something that is not known here")


def _random(name: str, x: mx.array) -> mx.array:
    """A stand-in that does not touch MLX's own random numbers, nor compute the model's."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return x
    noise = mx.random.uniform(-1, 1, x.shape, key=mx.random.key(crc32(name.encode())))
    return 1 + 0.3 * noise if x.ndim < 2 else noise * (6 / x.shape[-1]) ** 0.5


class _Here:
    """A cache that has read `offset` tokens and keeps none."""

    def __init__(self, offset: int):
        self.offset = offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def _causal(L: int) -> mx.array:
    return mx.arange(L)[:, None] >= mx.arange(L)


# What a layer may raise that is called as it does not expect.
OTHERWISE = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)


def _theirs(attention: nn.Module, x: mx.array, place: int) -> mx.array:
    try:
        out = attention(x, _causal(x.shape[1]), _Here(place))
        if not isinstance(out, mx.array):
            raise TypeError(f"it returns {type(out).__name__} and not one array")
        mx.eval(out)
    except OTHERWISE as e:
        raise AHNError(f"its attention is not called with x, mask and cache alone: {e}") from None
    return out


def _same(attention: nn.Module, fit: Fit, x: mx.array, wanted: list[mx.array]) -> bool:
    for place, theirs in zip(PLACES, wanted, strict=True):
        try:
            q, k, v, _ = fit.project(attention, x)
            q, k = fit.turn_queries(attention, q, place), fit.turn_keys(attention, k, place)
            mask, logits = _causal(x.shape[1]), fit.logits(attention)
            heads = attend(q, k, v, fit.scale, mask, logits=logits)
            ours = fit.merge(attention, heads, x)
            if ours.shape != theirs.shape:
                return False
            off = mx.abs(ours - theirs).max() / mx.abs(theirs).max()
            if not (off < TOLERANCE).item():  # a nan is not
                return False
        except OTHERWISE:
            return False
    return True


def _readings(attention: nn.Module) -> Iterator[Fit]:
    """From the likeliest on."""
    plain = _plain(attention)
    q_norm, k_norm = (_first(attention, names) for names in (Q_NORMS, K_NORMS))
    norms: list[dict[str, Any]] = [{}]
    if q_norm and k_norm:
        weight = attention[q_norm].get("weight")
        wide = weight is not None and weight.ndim == 1 and weight.size != plain.head_dim
        both = {"q_norm": q_norm, "k_norm": k_norm, "wide_norm": wide}
        norms = [both, {**both, "late_norm": True}, {}]
    rope = _first(attention, ROPES)
    ropes = [{"rope": rope}, {"rope": None}] if rope else [{"rope": None}]
    layouts = [{"layout": "blocks"}, {"layout": "groups"}] if plain.fused else [{}]
    sinks = attention.get("sinks")
    logits: dict[str, Any] = {"cap": _number(attention, CAPS)}
    logits["sinks"] = "sinks" if isinstance(sinks, mx.array) else None
    gates: list[dict[str, Any]] = [{}]
    if plain.gate is None and (name := _first(attention, tuple(GATES))):
        gates = [{"gate": GATES[name], "gate_name": name}, {}]
    for norm, turned, layout, gate in product(norms, ropes, layouts, gates):
        yield replace(plain, **norm, **turned, **layout, **gate, **logits)


def _plain(attention: nn.Module) -> Fit:
    """Sizes and projections. Raises AHNError where there are none."""
    latent = _first(attention, LATENT)
    if latent:
        raise AHNError(f"its attention is latent ({latent}): it has no keys and values of heads")
    heads, kv_heads = (_number(attention, names) for names in (HEADS, KV_HEADS))
    output, fused = _first(attention, OUTPUT), _first(attention, FUSED)
    missing = [name for name in APART if name not in attention]
    if missing and not fused:
        raise AHNError(f"its attention has no {missing[0]}")
    if output is None:
        raise AHNError("its attention has no o_proj")
    gate = None
    if not missing:
        q, k, v = (_rows(attention[name]) for name in APART)
        if heads is None:
            raise AHNError("its attention does not say how many heads it has")
        D = k // int(kv_heads or heads)
        if k != v:
            raise AHNError(f"its values are {v} wide and its keys {k}; a memory needs them alike")
        if q == 2 * heads * D:
            gate = "query"
        elif q != heads * D:
            raise AHNError(f"its queries are {q} wide, not {int(heads)} heads of {D}")
        fused = None
    else:
        if heads is None:
            raise AHNError("its attention does not say how many heads it has")
        D = _rows(attention[fused]) // int(heads + 2 * (kv_heads or heads))
    scale = _number(attention, SCALES)
    return Fit(
        n_heads=int(heads),
        n_kv_heads=int(kv_heads or heads),
        head_dim=int(D),
        scale=D**-0.5 if scale is None else scale,
        output=output,
        fused=fused,
        gate=gate,
    )


def _rows(linear: nn.Module) -> int:
    weight = linear.get("weight")
    if weight is None:
        raise AHNError(f"its projections are {type(linear).__name__}, which has no weight")
    return int(weight.shape[0])


def _first(attention: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(attention.get(name), nn.Module)), None)


def _number(attention: nn.Module, names: tuple[str, ...]) -> Any:
    found = (vars(attention).get(name) for name in names)
    return next((x for x in found if type(x) in (int, float)), None)
