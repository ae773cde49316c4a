"""What a model costs, counted without its weights: FLOPs and bytes.

Shapes are those of the model that `build` makes of a config; those of models that have a name
are written down, so that nothing need be imported for them. Bytes are those of real caches.

Two ways to count. The honest one: a prompt needs one row of logits, looking up an embedding
is no arithmetic, tokens that stay in the window cost the memory nothing but their gates.
The paper's (its efficiency table): every weight matrix, the embedding's and the head's
included, is applied to every token, and a recurrence costs nothing.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import AHNError
from ..hub.published import MODELS, counts
from ..model.config import AHNConfig
from ..model.names import is_memory

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

KINDS = ("full", "window", "ahn")

# State elements are multiplied and added so often per token: recall, write and read; Mamba2
# writes and reads.
PASSES = {"gated_deltanet": 3, "deltanet": 3, "mamba2": 2}
GATES = {"gated_deltanet": 2, "deltanet": 1, "mamba2": 1}  # per token and head
STEP = 256  # slots by which caches grow
SPARE = 1 << 30  # bytes of a server for what a chunk computes with, and all that is no row


class Beside(NamedTuple):
    """What layers with a window or a recurrence of their own keep, whatever was read.

    windows: of each its size in tokens, and numbers for one of them. states: numbers of all
    recurrences; wide: those of them that are always float32.
    """

    windows: tuple[tuple[int, int], ...] = ()
    states: int = 0
    wide: int = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Weights: number of elements, of all layers together.

    layers: those whose attention sees all tokens, or has a memory instead. hidden: width of what
    goes from layer to layer. projections: q, k, v and o. mlp: all else of the layers that each
    token takes. experts: of which a token takes `taken`. gates: what the memory computes for each
    token. readout: what it computes where it is read. vectors: norms and biases. tied: the head is
    the embedding. beside: caches of layers of other kinds.
    """

    ahn: AHNConfig
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    projections: int
    mlp: int
    gates: int
    readout: int
    vectors: int
    memory_vectors: int
    embedding: int
    tied: bool
    experts: int = 0
    taken: int = 0
    beside: "Beside" = field(default_factory=lambda: Beside())

    @property
    def memory_layers(self) -> int:
        return self.layers - len(self.ahn.fa_layer_ids)

    @property
    def parameters(self) -> int:
        """Of base and memory."""
        head = 0 if self.tied else self.embedding
        base = self.projections + self.mlp + self.experts + self.vectors + self.embedding + head
        return base + self.memory_parameters

    @property
    def memory_parameters(self) -> int:
        return self.gates + self.readout + self.memory_vectors


def shape_by_name(name: str, ahn: AHNConfig) -> Shape:
    """Of a model that has a name, with other AHN settings perhaps."""
    base = MODELS[name].base
    published = next(e.ahn for e in MODELS.values() if (e.base, e.memory) == (base, ahn.memory))
    special = ("fa_layer_ids", "router", "query_projection", "window_gain")
    if any(getattr(ahn, field) != getattr(published, field) for field in special):
        return shape_of({**base.config, "ahn": ahn.to_dict()})
    found, config = counts(name, ahn.memory), base.config
    tied = config["tie_word_embeddings"]
    return Shape(
        ahn=ahn,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        projections=found.projections,
        mlp=found.mlp,
        gates=found.gates,
        readout=found.readout,
        vectors=found.vectors,
        memory_vectors=found.memory_vectors,
        embedding=found.embedding if tied else found.embedding // 2,
        tied=tied,
    )


def shape_of(config: dict[str, Any]) -> Shape:
    """Count a config.json with AHN fields. Raises AHNError as build does."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ..model.augment import build, memory_layers, shape_of_attention

    model = build(config)
    model.set_dtype(mx.bfloat16)  # then what is wider is so always
    groups = ("projections", "mlp", "gates", "readout", "vectors", "memory_vectors", "head")
    found = dict.fromkeys((*groups, "embedding", "experts"), 0)
    shares, beside = _try(model)
    taken = 0
    parameters: Any = tree_flatten(model.parameters())
    for name, x in parameters:
        if (share := shares.get(name.rpartition(".")[0])) is not None:
            found["experts"] += x.size
            taken += int(x.size * share)
        else:
            found[_group(name, x)] += x.size
    head = found.pop("head")
    if head:
        found["mlp"] += head - found["embedding"]  # where they are not of one size
    attention = shape_of_attention(model)
    return Shape(
        ahn=model.ahn,
        layers=len([*memory_layers(model)]) + len(model.ahn.fa_layer_ids),
        hidden=model.args.hidden_size,
        heads=attention.n_heads,
        kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        tied=not head,
        taken=taken,
        beside=beside,
        **found,
    )


def _try(model: "nn.Module") -> tuple[dict[str, float], Beside]:
    """What one token takes of each map of experts, by name, and what layers of other kinds keep.
    Nothing is computed."""
    import mlx.core as mx
    from mlx_lm.models.cache import ArraysCache, RotatingKVCache
    from mlx_lm.models.switch_layers import SwitchLinear

    from ..reading.caches import each, held

    class Noting(SwitchLinear):
        def __call__(self, x: mx.array, indices: mx.array, *more: Any, **named: Any) -> mx.array:
            self.__dict__["taken"] = indices.shape[-1] / self.weight.shape[0]
            return super().__call__(x, indices, *more, **named)

    maps = {name: m for name, m in model.named_modules() if type(m) is SwitchLinear}
    for m in maps.values():
        m.__class__ = Noting
    caches = model.make_cache()
    model(mx.zeros((1, 1), dtype=mx.int32), cache=caches)
    shares = {name: m.__dict__.get("taken", 0.0) for name, m in maps.items()}
    rings = [c for c in each(caches) if isinstance(c, RotatingKVCache)]
    windows = tuple((c.max_size, sum(x.size // x.shape[2] for x in held(c))) for c in rings)
    states = [x for c in each(caches) if isinstance(c, ArraysCache) for x in held(c)]
    wide = sum(x.size for x in states if x.dtype == mx.float32)
    return shares, Beside(windows, sum(x.size for x in states), wide)


def _group(name: str, x: "mx.array") -> str:
    ours = is_memory(name)
    if x.ndim < 2:
        return "memory_vectors" if ours else "vectors"
    if ours:
        # The output's projection, and what reads with a query of its own.
        reads = any(part in name for part in (".o_proj.", ".q_proj."))
        return "readout" if reads else "gates"
    if ".self_attn." in name:
        return "projections"
    if ".layers." in name:
        return "mlp"
    return "embedding" if ".embed_tokens." in name else "head"


def pairs(kind: str, tokens: int, capacity: int) -> int:
    """Query-key pairs that are visible while `tokens` tokens are read."""
    seen = tokens if kind == "full" else min(tokens, capacity)
    return seen * (seen + 1) // 2 + (tokens - seen) * capacity


def flops(shape: Shape, kind: str, tokens: int, before: int = 0) -> dict[str, int]:
    """FLOPs of reading `tokens` tokens after `before` others, for one row of logits.

    kind: "full", "window" (nothing remembers what leaves) or "ahn". A multiplication and an
    addition are two. Elementwise operations, norms and softmax are not counted. A recurrence of
    the base counts as one of a memory that forgets.
    """
    _check(kind, tokens, before)
    end, capacity = before + tokens, shape.ahn.capacity
    full = shape.layers if kind == "full" else len(shape.ahn.fa_layer_ids)
    seen = {k: pairs(k, end, capacity) - pairs(k, before, capacity) for k in ("full", "window")}
    attended = full * seen["full"] + (shape.layers - full) * seen["window"]
    for size, _ in shape.beside.windows:
        attended += pairs("window", end, size) - pairs("window", before, size)
    counted = {
        "projections": 2 * shape.projections * tokens,
        "attention": 4 * shape.heads * shape.head_dim * attended,
        "mlp": 2 * (shape.mlp + shape.taken) * tokens,
        "head": 2 * shape.embedding,
    }
    if recurrent := shape.beside.states:
        counted["recurrence"] = 2 * PASSES["gated_deltanet"] * recurrent * tokens
    if kind == "ahn":
        evicted = max(0, end - max(before, capacity))
        states = shape.memory_layers * shape.heads * shape.head_dim**2
        recurrence = 2 * PASSES[shape.ahn.memory] * states
        counted["memory"] = 2 * shape.gates * tokens + (2 * shape.readout + recurrence) * evicted
    return counted


def paper_flops(shape: Shape, kind: str, tokens: int) -> tuple[int, int]:
    """FLOPs as the paper counts: of mixing (attention and its projections), of all."""
    counted = flops(shape, kind, tokens)
    mixing = counted["projections"] + counted["attention"]
    if kind == "ahn":
        mixing += 2 * (shape.gates + shape.readout) * tokens
    return mixing, mixing + counted["mlp"] + 2 * 2 * shape.embedding * tokens


def cache_bytes(
    shape: Shape,
    kind: str,
    tokens: int,
    number: int = 2,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> dict[str, int]:
    """Bytes of all caches after `tokens` tokens: keys and values, gates, state.

    number: bytes of one that is not quantized. The state is float32. Beside: of layers with a
    window or a recurrence of their own.
    """
    _check(kind, tokens, 0)
    found = {"keys, values": 0, "gates": 0, "state": 0}
    if shape.beside != Beside():
        found["beside"] = 0
    if not tokens:
        return found
    full = shape.layers if kind == "full" else len(shape.ahn.fa_layer_ids)
    slots = -(-tokens // STEP) * STEP
    held = min(slots, shape.ahn.capacity)
    plain = number * shape.head_dim
    row = plain
    if kv_bits is not None:  # and a scale and a bias for each group
        row = kv_bits * shape.head_dim // 8 + 2 * number * (shape.head_dim // kv_group_size)
    rest = shape.layers - full
    found["keys, values"] = 2 * shape.kv_heads * (full * slots * plain + rest * held * row)
    if "beside" in found:
        own = sum(min(slots, size) * each for size, each in shape.beside.windows)
        narrow, wide = shape.beside.states - shape.beside.wide, shape.beside.wide
        found["beside"] = number * (own + narrow) + 4 * wide
    if kind == "ahn":
        found["gates"] = rest * shape.heads * held * GATES[shape.ahn.memory] * number
        if tokens > shape.ahn.capacity:
            found["state"] = rest * 4 * shape.heads * shape.head_dim**2
    return found


def paper_cache_bytes(shape: Shape, kind: str, tokens: int) -> int:
    """As the paper counts: four bytes per element, no gates."""
    held = tokens if kind == "full" else min(tokens, shape.ahn.capacity)
    elements = 2 * shape.layers * shape.kv_heads * shape.head_dim * held
    if kind == "ahn":
        elements += shape.memory_layers * shape.heads * shape.head_dim**2
    return 4 * elements


def weight_bytes(shape: Shape, bits: float, memory_bytes: int = 2) -> int:
    """Bytes of all weights: matrices of the base at `bits` per element, the rest 16 bits."""
    head = 0 if shape.tied else shape.embedding
    base = shape.projections + shape.mlp + shape.experts + shape.embedding + head
    rest = memory_bytes * shape.memory_parameters + 2 * shape.vectors
    return int(base * bits / 8) + rest


def idle_bytes(shape: Shape, bits: float) -> int:
    """Bytes of the weights that a token leaves alone: experts that it does not take."""
    return int((shape.experts - shape.taken) * bits / 8)


def working_bytes(shape: Shape, hidden: int, wide: int, step: int, number: int = 2) -> int:
    """About what reading takes beside weights and cache: what `step` tokens are in one layer, a
    second copy of its window, and scores of one tile.

    hidden, wide: sizes of the model and its MLP. number: bytes of one.
    """
    held = shape.ahn.capacity + step
    tile = 256 * shape.heads * held * number
    window = 2 * shape.kv_heads * held * shape.head_dim * number
    return step * (6 * hidden + 3 * wide) * number + window + tile


def rows_that_fit(row: int, weights: int, machine: int) -> int:
    """How many rows a server has room for in so many bytes: those that answer, as many that
    wait, and one that reads a document. row: bytes of one."""
    return max(0, ((machine - weights - SPARE) // row - 1) // 2)


def _check(kind: str, tokens: int, before: int) -> None:
    if kind not in KINDS:
        raise AHNError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if tokens < 0 or before < 0:
        raise AHNError(f"a context must not be negative, not {min(tokens, before)}")
