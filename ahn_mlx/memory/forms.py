"""What a memory does in an attention layer: by our Metal kernels where they agree with the
operations of MLX on this machine and are faster, by those operations elsewhere."""

from functools import partial
from typing import Any

import mlx.core as mx

from ..ops import kernels, memory_kernels
from ..ops.kernels import Check, Sizes, chosen
from ..ops.ring import Update
from ..ops.window_kernels import Shares, merge, whole
from . import MEMORIES, Memory
from .layers import Derived

Evicted = tuple[mx.array, ...]

HIDDEN = 32  # width of a hidden state in examples


def scan(
    memory: Memory,
    q: mx.array,
    update: Update,
    state: mx.array | None,
    rates: mx.array,
    gradients: bool,
) -> tuple[mx.array, mx.array]:
    """Write the T tokens that a chunk evicts, read after each.

    q: [B, H, T, D]; state: [B, H, D, D] float32 or None; rates: those of memory.derive();
    gradients: only by operations that have them. Returns o [B, T, H, D] float32, and the state.
    """
    sizes = Sizes.of(q, update.chunk[0], update.window, update.sinks)
    if not gradients and chosen(SCANS[memory.kind], sizes):
        return _scan_kernel(memory, q, update, state, rates)
    return _scan_ops(memory, q, update, state, rates, gradients)


def step(
    memory: Memory,
    q: mx.array,
    evicted: Evicted,
    state: mx.array | None,
    local: mx.array | Shares,
    z: mx.array,
    rates: mx.array,
    loudness: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Write L tokens, read after each, and add what was read to the local heads.

    q, local: [B, H, L, D]; evicted: keys, values [B, Hkv, L, D] and gates [B, H, L, G];
    z: [B, L, H], output gate before silu; rates: those of memory.derive(); loudness:
    [B, H, L, 1] of the router, or None. Returns heads, and the state.
    """
    # A kernel knows the heads of one process.
    divided = getattr(memory, "group", None) is not None
    single = q.shape[2] == 1 and not divided
    kernel = single and chosen(STEPS[memory.kind], Sizes.of(q, evicted[0]))
    if kernel:
        return _step_kernel(memory, q, evicted, state, local, z, rates, loudness)
    heads = merge(local, q.dtype) if isinstance(local, Shares) else local
    return _step_ops(memory, q, evicted, state, heads, z, rates, loudness)


def _scan_ops(
    memory: Memory,
    q: mx.array,
    update: Update,
    state: mx.array | None,
    rates: mx.array,
    gradients: bool = False,
) -> tuple[mx.array, mx.array]:
    k, v, gates = (x.swapaxes(1, 2) for x in update.evicted())
    return memory.scan(q.swapaxes(1, 2), k, v, gates, state, rates, gradients)


def _scan_kernel(
    memory: Memory, q: mx.array, update: Update, state: mx.array | None, rates: mx.array
) -> tuple[mx.array, mx.array]:
    return memory_kernels.scan(memory.kind, q, update, _or_empty(state, q), rates)


def _step_ops(
    memory: Memory,
    q: mx.array,
    evicted: Evicted,
    state: mx.array | None,
    local: mx.array,
    z: mx.array,
    rates: mx.array,
    loudness: mx.array | None,
) -> tuple[mx.array, mx.array]:
    k, v, gates = (x.swapaxes(1, 2) for x in evicted)
    o, state = memory.scan(q.swapaxes(1, 2), k, v, gates, state, rates)
    y = memory.gated(o, z, local.dtype)
    if loudness is not None:
        y = (y * loudness).astype(local.dtype)
    return mx.addmm(local, y, memory.o_proj.weight), state


def _step_kernel(
    memory: Memory,
    q: mx.array,
    evicted: Evicted,
    state: mx.array | None,
    local: mx.array | Shares,
    z: mx.array,
    rates: mx.array,
    loudness: mx.array | None,
) -> tuple[mx.array, mx.array]:
    local = local if isinstance(local, Shares) else whole(local)
    slot = kernels.zeros(q.shape[0])
    state = _or_empty(state, q)
    weights = (z, memory.norm_weight, memory.o_proj.weight)
    router = None if loudness is None else loudness.reshape(q.shape[:2])
    if memory.kind != "mamba2":
        return memory_kernels.delta_step(q, evicted, slot, state, local, *weights, router)
    return memory_kernels.mamba2_step(q, evicted, slot, state, local, *weights, rates, router)


def _or_empty(state: mx.array | None, q: mx.array) -> mx.array:
    B, H, _, D = q.shape
    return mx.zeros((B, H, D, D), dtype=mx.float32) if state is None else state


def _example(kind: str, sizes: Sizes) -> tuple[Memory, Derived, mx.array]:
    """A memory with random weights, what follows from them, and its state."""
    D, heads = sizes.D, sizes.heads
    memory = MEMORIES[kind](HIDDEN, heads, D)
    memory.o_proj.weight = mx.random.normal((heads, D, D)) * D**-0.5
    memory.set_dtype(sizes.dtype)
    return memory, memory.derive(), mx.random.normal((1, heads, D, D))


def _tokens(memory: Memory, derived: Derived, sizes: Sizes, n: int) -> tuple[Evicted, mx.array]:
    """Keys, values and gates of n tokens, and their output gates."""
    k, v = mx.random.normal((2, 1, sizes.kv_heads, n, sizes.D)).astype(sizes.dtype)
    h = mx.random.normal((1, n, HIDDEN)).astype(sizes.dtype)
    gates, z = memory.project(h, derived)
    return (k, v, gates.swapaxes(1, 2)), z


def _scan_example(kind: str, sizes: Sizes, before: int) -> tuple[Any, ...]:
    """What the ring keeps of the tokens before, a chunk, and queries for what leaves."""
    memory, derived, state = _example(kind, sizes)
    held = min(before, sizes.capacity)
    ring, chunk = (_tokens(memory, derived, sizes, n)[0] for n in (held, sizes.chunk))
    update = Update(ring, chunk, before, sizes.window, sizes.sinks)
    q = mx.random.normal((1, sizes.heads, update.evicts, sizes.D)).astype(sizes.dtype)
    return memory, q, update, state, derived.rates


def _step_example(kind: str, sizes: Sizes, before: int) -> tuple[Any, ...]:
    memory, derived, state = _example(kind, sizes)
    q, local = mx.random.normal((2, 1, sizes.heads, 1, sizes.D)).astype(sizes.dtype)
    token, z = _tokens(memory, derived, sizes, 1)
    loudness = mx.full((1, sizes.heads, 1, 1), 0.5)
    return memory, q, token, state, local, z, derived.rates, loudness


SCANS = {
    kind: Check(
        name=f"memory_scan {kind}",
        files=("memory_scan.metal",),
        dispatches=1,
        example=partial(_scan_example, kind),
        ours=_scan_kernel,
        theirs=_scan_ops,
    )
    for kind in MEMORIES
}

STEP_FILES = {
    "delta": ("memory_step_delta.metal",),
    "mamba2": ("memory_step_mamba2.metal", "memory_step_mamba2_finish.metal"),
}

STEPS = {
    kind: Check(
        name=f"memory_step {kind}",
        # Mamba2's norm spans all heads: another kernel finishes it.
        files=STEP_FILES["mamba2" if kind == "mamba2" else "delta"],
        dispatches=2 if kind == "mamba2" else 1,
        example=partial(_step_example, kind),
        ours=_step_kernel,
        theirs=_step_ops,
    )
    for kind in MEMORIES
}
