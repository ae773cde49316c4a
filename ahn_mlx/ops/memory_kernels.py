"""Launches of the memories' Metal kernels; each kernel's file says what it does."""

from collections.abc import Sequence

import mlx.core as mx

from . import kernels
from .ring import Update
from .window_kernels import Shares

Result = tuple[mx.array, mx.array]

SIMDGROUPS = 16  # per threadgroup of a step
STAGED = 16  # tokens per block of a scan
THREADGROUPS = 64  # that a scan should at least have, to fill a GPU

KINDS = ("gated_deltanet", "deltanet", "mamba2")


def delta_step(
    q: mx.array,
    evicted: tuple[mx.array, ...],
    slot: mx.array,
    state: mx.array,
    local: Shares,
    z: mx.array,
    norm: mx.array,
    projection: mx.array,
    router: mx.array | None = None,
) -> Result:
    """One token of Gated DeltaNet (two gates) or DeltaNet (one), in one dispatch.

    q: [B, H, 1, D]. evicted: keys, values [B, Hkv, slots, D], gates [B, H, slots, G].
    slot: [B] int32, which of them. state: [B, H, D, D] float32. local: what the memory's output
    is added to. z: [B, 1, H], output gate before silu. norm: [D]. projection: [H, D, D].
    router: [B, H] or None. Returns heads [B, H, 1, D] like q, and the state.
    """
    k, v, gates = evicted
    heads, new_state = _launch(
        "memory_step_delta",
        {"q": q, "k": k, "v": v, "gates": gates, "slot": slot, "state": state}
        | {"local": local.parts, "stats": local.stats, "z": z, "norm": norm}
        | {"projection": projection, "router": _loudness(router, q)},
        {"heads": (q.shape, q.dtype), "new_state": (state.shape, mx.float32)},
        [("SPLITS", local.parts.shape[2])],
    )
    return heads, new_state


def mamba2_step(
    q: mx.array,
    evicted: tuple[mx.array, ...],
    slot: mx.array,
    state: mx.array,
    local: Shares,
    z: mx.array,
    norm: mx.array,
    projection: mx.array,
    rates: mx.array,
    router: mx.array | None = None,
) -> Result:
    """One token of Mamba2, in two dispatches. As delta_step, with norm [H D] and rates A [H]."""
    k, v, gates = evicted
    B, H, _, D = q.shape
    projected, squares, new_state = _launch(
        "memory_step_mamba2",
        {"q": q, "k": k, "v": v, "gates": gates, "slot": slot, "state": state, "z": z}
        | {"rates": rates.astype(mx.float32), "norm": norm, "projection": projection},
        {
            "projected": ((B, H, 1, D), mx.float32),
            "squares": ((B, H, 1, 1), mx.float32),
            "new_state": (state.shape, mx.float32),
        },
    )
    inputs = {"projected": projected, "squares": squares, "router": _loudness(router, q)}
    inputs |= {"local": local.parts, "stats": local.stats}
    (heads,) = kernels.kernel("memory_step_mamba2_finish", tuple(inputs), ("heads",))(
        inputs=list(inputs.values()),
        template=[("T", q.dtype), ("D", D), ("H", H), ("SPLITS", local.parts.shape[2])],
        grid=(D, B * H, 1),
        threadgroup=(D, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return heads, new_state


def _loudness(router: mx.array | None, q: mx.array) -> mx.array:
    return kernels.ones(q.shape[:2]) if router is None else router.astype(mx.float32)


def scan(
    kind: str,
    q: mx.array,
    update: Update,
    state: mx.array,
    rates: mx.array | None = None,
    splits: int | None = None,
    offsets: tuple[int, ...] | None = None,
) -> Result:
    """Write the T tokens that `update` evicts and read after each.

    kind: "gated_deltanet", "deltanet" or "mamba2", which takes rates A [H]. q: [B, H, T, D].
    state: [B, H, D, D] float32. splits: threadgroups per head, 1, 2 or 4; by default as
    many as fill a GPU. offsets: tokens before the chunk in each row; by default the update's
    in all. Returns o [B, T, H, D] float32, and the state.
    """
    B, H, T, D = q.shape
    if splits is None:
        fits = [p for p in (1, 2, 4) if 4 * D // p >= 4 * STAGED]
        splits = next((p for p in fits if B * H * p >= THREADGROUPS), fits[-1])
    ring = update.chunk if update.ring is None else update.ring
    offsets = offsets or (update.offset,) * B
    L = update.chunk[0].shape[2]
    inputs = {
        "q": q,
        **dict(zip(("ring_k", "ring_v", "ring_gates"), ring, strict=True)),
        **dict(zip(("chunk_k", "chunk_v", "chunk_gates"), update.chunk, strict=True)),
        "first": mx.array([offset + L - T - update.window for offset in offsets]),
        "offset": mx.array(offsets),
        "state": state,
        "rates": mx.zeros(H) if rates is None else rates.astype(mx.float32),
    }
    call = kernels.kernel("memory_scan", tuple(inputs), ("o", "new_state"))
    o, new_state = call(
        inputs=list(inputs.values()),
        template=[
            ("T", q.dtype),
            ("D", D),
            ("H", H),
            ("HKV", ring[0].shape[1]),
            ("G", ring[2].shape[3]),
            ("KIND", KINDS.index(kind)),
            ("P", splits),
            ("BT", STAGED),
            ("W", update.window),
            ("S", update.sinks),
        ],
        grid=(4 * D // splits, splits, B * H),
        threadgroup=(4 * D // splits, 1, 1),
        output_shapes=[(B, T, H, D), state.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return o, new_state


def _launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    more: Sequence[tuple[str, int]] = (),
) -> list[mx.array]:
    q, k, gates = inputs["q"], inputs["k"], inputs["gates"]
    B, H, _, D = q.shape
    template = [
        ("T", q.dtype),
        ("D", D),
        ("H", H),
        ("HKV", k.shape[1]),
        ("G", gates.shape[3]),
        ("SG", SIMDGROUPS),
        *more,
    ]
    call = kernels.kernel(name, tuple(inputs), tuple(outputs))
    return call(
        inputs=list(inputs.values()),
        template=template,
        grid=(32 * SIMDGROUPS, B * H, 1),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
