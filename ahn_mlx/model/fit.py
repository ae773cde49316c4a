"""What an attention layer of mlx-lm does around its softmax, read off the layer itself.

No family is named here. A layer's projections, norms, RoPE, gates and the like give a few
readings of it; the one that is taken computes on random tokens what the layer computes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product
from operator import itemgetter
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import AHNError
from ..ops.window import Logits, attend
from ..platform import on_cuda

# What mlx-lm's files call the same thing; a name that is not here is looked for by its shape.
HEADS = ("n_heads", "num_attention_heads", "num_heads")
APART = ("q_proj", "k_proj", "v_proj")
FUSED = ("qkv_proj", "query_key_value", "q_k_v_proj", "Wqkv", "W_pack", "wqkv")
OUTPUT = ("o_proj", "out_proj", "dense", "wo")
SCALES = ("scale", "sm_scale", "softmax_scale", "scaling")
CAPS = ("attn_logit_softcapping",)
LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj")

# Where the random tokens stand: at the start, and where scores that grow with the position do.
PLACES = (0, 70_001)
TOLERANCE = 2e-3  # of the largest number; a GPU may multiply in 19 bits


@dataclass(frozen=True)
class Fit:
    """One reading of an attention layer. Names are those of its children, None: it has none.

    apart: of queries, keys and values. layout: of a fused projection, all queries, all keys, all
    values ("blocks"), or those of one key/value head together ("groups"); order: which of these
    comes first. wide_norm: over all heads at once. late_norm: after RoPE. cap: scores are
    cap * tanh(score / cap). sinks: a logit of each head that takes attention and gives nothing.
    gate: "wide", a number for each of a head's; "head", one for each head; "query", of the second
    half of each head's query projection.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    output: str
    apart: tuple[str, ...] = APART
    fused: str | None = None
    layout: str = "blocks"
    order: str = "qkv"
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
        inputs = (self.fused,) if self.fused else self.apart
        rest = (self.output, self.q_norm, self.k_norm, self.rope, self.sinks, self.gate_name)
        return tuple(name for name in (*inputs, *rest) if name is not None)

    def describe(self) -> str:
        """In a few words."""
        order = "" if self.order == "qkv" else f" {self.order}"
        norm = ("over all heads" if self.wide_norm else "per head") if self.q_norm else ""
        return ", ".join(
            words
            for words, there in (
                (f"{self.fused} ({self.layout}{order})", self.fused),
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
            q, k, v = (m[name](x) for name in self.apart)
            q = q.reshape(B, L, H, -1)
            if self.gate == "query":
                q = q[..., :D]
            return q, k.reshape(B, L, G, -1), v.reshape(B, L, G, -1)
        groups = 1 if self.layout == "blocks" else G
        y = m[self.fused](x).reshape(B, L, groups, (H + 2 * G) // groups, D)
        sizes = {"q": H // groups, "k": G // groups, "v": G // groups}
        parts, at = {}, 0
        for name in self.order:
            parts[name] = y[:, :, :, at : at + sizes[name]].reshape(B, L, -1, D)
            at += sizes[name]
        return parts["q"], parts["k"], parts["v"]

    def _norm(self, norm: nn.Module, x: mx.array) -> mx.array:
        """x [B, L, heads, D]."""
        if self.wide_norm:
            return norm(x.flatten(2)).reshape(x.shape)
        return norm(x)

    def turn(self, m: nn.Module, x: mx.array, offset: Any) -> mx.array:
        """x [B, heads, L, D] at the positions from `offset` on, a number or one for each row."""
        if self.rope is None:
            return x
        if on_cuda():  # where MLX writes rows that are one array broadcast over one another
            x = mx.contiguous(x)
        return m[self.rope](x, offset=offset)

    def turn_queries(self, m: nn.Module, q: mx.array, offset: Any) -> mx.array:
        return self._late(m, self.q_norm, self.turn(m, q, offset))

    def turn_keys(self, m: nn.Module, k: mx.array, offset: Any) -> mx.array:
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
            gate = m[self.apart[0]](x).reshape(*y.shape[:3], -1)[..., self.head_dim :]
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
    if latent := next((name for name in LATENT if name in attention), None):
        raise AHNError(f"its attention is latent ({latent}): it has no keys and values of heads")
    mine = attention.parameters()
    attention.update(tree_map_with_path(_random, mine))
    try:
        x = mx.random.normal((2, 6, hidden), key=mx.random.key(1))
        seen = [_Here(place) for place in PLACES]
        wanted = [_theirs(attention, x, here) for here in seen]
        for fit in _readings(attention, hidden, *_heads_of(seen[0])):
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
    """A cache that has read `offset` tokens and keeps none, but the shapes of what comes."""

    def __init__(self, offset: int):
        self.offset = offset
        self.shapes: list[tuple[int, ...]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shapes = [keys.shape, values.shape]
        return keys, values


def _heads_of(here: _Here) -> tuple[int, int]:
    """Key/value heads and their size, as the layer gave them to its cache."""
    if [len(shape) for shape in here.shapes] != [4, 4]:
        raise AHNError("its attention keeps no keys and values of heads")
    keys, values = here.shapes
    if keys != values:
        found = f"{values[1]} of {values[3]} and its keys {keys[1]} of {keys[3]}"
        raise AHNError(f"its values are {found}; a memory needs them alike")
    return keys[1], keys[3]


def _causal(L: int) -> mx.array:
    return mx.arange(L)[:, None] >= mx.arange(L)


# What a layer may raise that is called as it does not expect.
OTHERWISE = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)


def _theirs(attention: nn.Module, x: mx.array, here: _Here) -> mx.array:
    try:
        out = attention(x, _causal(x.shape[1]), here)
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


Some = list[dict[str, Any]]  # of fields of a Fit, one reading each


def _readings(attention: nn.Module, hidden: int, G: int, D: int) -> Iterator[Fit]:
    """From the likeliest on. G: key/value heads. D: their size."""
    numbers = [x for x in plain_facts(attention).values() if type(x) is float]
    scales = _each([_number(attention, SCALES), D**-0.5, 1.0, *numbers])
    cap = _number(attention, CAPS)
    caps: list[float | None] = [cap] if cap else [None, *(x for x in numbers if x > 1)]
    found = list(_projections(attention, hidden, G, D))
    if not found:
        raise AHNError("its attention has no projections of queries, keys and values")
    orders = ["".join(order) for order in permutations("qkv")]
    fused: Some = [{"layout": way, "order": o} for o in orders for way in ("blocks", "groups")]
    for scale, c, plain in product(scales, caps, found):
        one = replace(plain, scale=scale, cap=c)
        layouts: Some = fused if one.fused else [{}]
        rest = (_norms(attention, one), _ropes(attention), layouts, _gates(attention, one))
        for parts in product(*rest, _sinks(attention, one)):
            more: dict[str, Any] = {name: x for part in parts for name, x in part.items()}
            yield replace(one, **more)


def _projections(attention: nn.Module, hidden: int, G: int, D: int) -> Iterator[Fit]:
    """By name; if there are none of these, whatever is as wide."""
    rows = {name: _rows(child) for name, child in attention.items()}
    rows = {name: n for name, n in rows.items() if n}
    said = _number(attention, HEADS)
    outputs = [name for name in OUTPUT if name in rows]
    for output in outputs[:1] or [name for name in reversed(rows) if rows[name] == hidden]:
        rest = {name: n for name, n in rows.items() if name != output}
        if rest.keys() >= set(APART):
            trios: list[tuple[str, ...]] = [APART]
        else:
            trios = list(permutations(rest, 3))
        fit = Fit(n_heads=0, n_kv_heads=G, head_dim=D, scale=1.0, output=output)
        whole = [name for name in FUSED if name in rest] or list(rest)
        for name in () if rest.keys() >= set(APART) else whole:
            if (H := rest[name] // D - 2 * G) > 0 and rest[name] == (H + 2 * G) * D and H % G == 0:
                yield replace(fit, n_heads=H, fused=name)
        for trio in trios:
            q, k, v = (rest[name] for name in trio)
            H = said or q // D
            if k == v == G * D and q in (H * D, 2 * H * D) and H % G == 0:
                gate = None if q == H * D else "query"
                yield replace(fit, n_heads=H, apart=trio, gate=gate)


def _rows(child: Any) -> int:
    """How wide what a linear map gives is; 0 of what is none."""
    weight = child.get("weight") if isinstance(child, nn.Module) else None
    return int(weight.shape[0]) if weight is not None and weight.ndim == 2 else 0


def _norms(attention: nn.Module, fit: Fit) -> Some:
    """Of queries and keys, those that say so first; and none."""
    found: Some = []
    norms = [name for name, x in attention.items() if isinstance(x, nn.Module) and "norm" in name]
    norms = norms or [n for n, x in attention.items() if "norm" in type(x).__name__.lower()]
    pairs = list(permutations(norms, 2))
    pairs.sort(key=lambda pair: (pair[0][0] != "q") + (pair[1][0] != "k"))
    for q, k in pairs:
        weight = attention[q].get("weight")
        wide = weight is not None and weight.ndim == 1 and weight.size != fit.head_dim
        both = {"q_norm": q, "k_norm": k, "wide_norm": wide}
        found += [both, {**both, "late_norm": True}]
    return [*found, {}]


def _ropes(attention: nn.Module) -> Some:
    turns = [
        name
        for name, x in attention.items()
        if isinstance(x, nn.Module) and ("rope" in name or "rotary" in name or _is_rope(x))
    ]
    return [*({"rope": name} for name in turns), {"rope": None}]


def _is_rope(x: nn.Module) -> bool:
    kind = type(x).__name__.lower()
    return "rope" in kind or "rotary" in kind


def _gates(attention: nn.Module, fit: Fit) -> Some:
    """Linear maps that are left."""
    wide = {fit.n_heads * fit.head_dim: "wide", fit.n_heads: "head"}
    taken = (fit.output, fit.fused, *(() if fit.fused else fit.apart))
    left = [(name, _rows(x)) for name, x in attention.items() if name not in taken]
    found: Some = [{"gate": wide[n], "gate_name": name} for name, n in left if n in wide]
    return [*([] if fit.gate else found), {}]


def _sinks(attention: nn.Module, fit: Fit) -> Some:
    arrays = [name for name, x in attention.items() if isinstance(x, mx.array)]
    return [*({"sinks": n} for n in arrays if attention[n].shape == (fit.n_heads,)), {}]


def _number(attention: nn.Module, names: tuple[str, ...]) -> Any:
    found = (vars(attention).get(name) for name in names)
    return next((x for x in found if type(x) in (int, float)), None)


def _each(numbers: list[Any]) -> list[Any]:
    return list(dict.fromkeys(x for x in numbers if x is not None))
