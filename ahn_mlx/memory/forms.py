"""What a memory does in an attention layer: by our Metal kernels where they agree with
the operations of MLX on this machine, by those operations elsewhere."""

from functools import partial
from typing import Any

import mlx.core as mx

from ..ops import kernels, memory_kernels
from ..ops.kernels import Check, usable
from ..ops.ring import Update
from . import MEMORIES, Memory

Evicted = tuple[mx.array, ...]


def scan(
    memory: Memory,
    q: mx.array,
    update: Update,
    state: mx.array | None,
    rates: mx.array | None,
    gradients: bool = False,
) -> tuple[mx.array, mx.array]:
    """Write the T tokens that a chunk evicts, read after each.

    q: [B, H, T, D]; state: [B, H, D, D] float32 or None; rates: those of memory.derive();
    gradients: only by operations that have them. Returns o [B, T, H, D] float32, and the state.
    """
    if not gradients and usable(SCANS[memory.kind], q.shape[-1], q.dtype):
        return _scan_kernel(memory, q, update, state, rates)
    return _scan_ops(memory, q, update, state, rates, gradients)


def step(
    memory: Memory,
    q: mx.array,
    evicted: Evicted,
    state: mx.array | None,
    local: mx.array,
    z: mx.array,
    rates: mx.array | None,
    loudness: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Write L tokens, read after each, and add what was read to the local heads.

    q, local: [B, H, L, D]; evicted: keys, values [B, Hkv, L, D] and gates [B, H, L, G];
    z: [B, L, H], output gate before silu; rates: those of memory.derive(); loudness: [B, H, L, 1] of the router, or None.
    Returns heads, and the state.
    """
    one = q.shape[2] == 1
    kernel = one and usable(STEPS[memory.kind], q.shape[-1], q.dtype)
    form = _step_kernel if kernel else _step_ops
    return form(memory, q, evicted, state, local, z, rates, loudness)


def _scan_ops(
    memory: Memory,
    q: mx.array,
    update: Update,
    state: mx.array | None,
    rates: mx.array | None,
    gradients: bool = False,
) -> tuple[mx.array, mx.array]:
    k, v, gates = (x.swapaxes(1, 2) for x in update.evicted())
    return memory.scan(q.swapaxes(1, 2), k, v, gates, state, rates, gradients)


def _scan_kernel(
    memory: Memory, q: mx.array, update: Update, state: mx.array | None, rates: mx.array | None
) -> tuple[mx.array, mx.array]:
    return memory_kernels.scan(memory.kind, q, update, _or_empty(state, q), rates)


def _step_ops(
    memory: Memory,
    q: mx.array,
    evicted: Evicted,
    state: mx.array | None,
    local: mx.array,
    z: mx.array,
    rates: mx.array | None,
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
    local: mx.array,
    z: mx.array,
    rates: mx.array | None,
    loudness: mx.array | None,
) -> tuple[mx.array, mx.array]:
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


def _example(kind: str, D: int, dtype: mx.Dtype, tokens: int) -> tuple[Any, ...]:
    """A memory with random weights, a ring of `tokens` slots and as many tokens more."""
    Hkv, H, C = 2, 4, 32
    memory = MEMORIES[kind](C, H, D)
    memory.o_proj.weight = mx.random.normal((H, D, D)) * D**-0.5
    memory.set_dtype(dtype)
    derived = memory.derive()
    runs = []
    for _ in range(2):
        k, v = mx.random.normal((2, 1, Hkv, tokens, D)).astype(dtype)
        gates, z = memory.project(mx.random.normal((1, tokens, C)).astype(dtype), derived)
        runs.append((k, v, gates.swapaxes(1, 2)))
    ring, chunk = runs
    update = Update(ring, chunk, offset=tokens, window=tokens - 3, sinks=3)
    q, local = mx.random.normal((2, 1, H, tokens, D)).astype(dtype)
    return memory, q, update, mx.random.normal((1, H, D, D)), derived.rates, local, z


def _scan_example(kind: str, D: int, dtype: mx.Dtype, tokens: int) -> tuple[Any, ...]:
    return _example(kind, D, dtype, tokens)[:5]


def _step_example(kind: str, D: int, dtype: mx.Dtype, tokens: int) -> tuple[Any, ...]:
    memory, q, update, state, rates, local, z = _example(kind, D, dtype, 4)
    token = tuple(x[:, :, :1] for x in update.chunk)
    heads, loudness = local[:, :, :1], mx.full((1, 4, 1, 1), 0.5)
    return memory, q[:, :, :1], token, state, heads, z[:, :1], rates, loudness


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

STEPS = {
    kind: Check(
        name=f"memory_step {kind}",
        files=(f"memory_step_{'mamba2' if kind == 'mamba2' else 'delta'}.metal",),
        # Mamba2's norm spans all heads: one elementwise operation finishes it.
        dispatches=2 if kind == "mamba2" else 1,
        example=partial(_step_example, kind),
        ours=_step_kernel,
        theirs=_step_ops,
    )
    for kind in MEMORIES
}
