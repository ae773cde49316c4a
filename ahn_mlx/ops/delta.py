"""The gated delta rule (Gated DeltaNet) and, without decay, the delta rule (DeltaNet).

Per head and token, with state M [key, value] (paper, section 3):

    kn = k / sqrt(|k|^2 + 1e-6)        qn = q / sqrt(|q|^2 + 1e-6) / sqrt(D)
    M <- exp(g) M
    M <- M + kn (beta (v - M^T kn))^T
    o  = M^T qn

The sequential form reads like that and is the test reference; the step form is
one token; the chunked form is the WY representation, many tokens by matrix products, the
states between chunks one after the other. The form at once has the same products, all chunks of
each in one launch: it holds every state, for gradients on a GPU and for CUDA.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..platform import on_cpu, on_cuda
from . import linear
from .chunks import (
    causal,
    chunk_size,
    decay_matrix,
    each,
    from_chunks,
    products,
    stacked,
    to_chunks,
)

Result = tuple[mx.array, mx.array]


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    gradients: bool = False,
) -> Result:
    """Write T tokens and read after each; chooses the fastest form for the device.

    q: [B, T, H, D] raw queries; k, v: [B, T, Hkv, D] raw, Hkv divides H.
    g: [B, T, H] log decay (<= 0); beta: [B, T, H] write strength in (0, 1).
    state: [B, H, D, D] float32 ([key, value]), zeros when None. gradients: they are needed.
    Returns o [B, T, H, D] float32 and the state after the last token.
    """
    return _choose(q, k, v, g, beta, state, gradients)


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    gradients: bool = False,
) -> Result:
    """As gated_delta_rule, without decay."""
    return _choose(q, k, v, None, beta, state, gradients)


def _choose(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    state: mx.array | None,
    gradients: bool,
) -> Result:
    if state is None:
        B, _, H, D = q.shape
        state = mx.zeros((B, H, D, D), dtype=mx.float32)
    if q.shape[1] == 1:
        return step(q, k, v, g, beta, state)
    if on_cpu():
        return chunked(q, k, v, g, beta, state)
    # MLX's own is a loop over tokens on CUDA, and its gradient is one everywhere.
    return (at_once if gradients or on_cuda() else mlx_fast)(q, k, v, g, beta, state)


def normalize(x: mx.array, scale: float = 1.0) -> mx.array:
    """scale * x / sqrt(|x|^2 + 1e-6) over the last axis, float32."""
    D = x.shape[-1]
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6 / D) * (scale * D**-0.5)


def sequential(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    state: mx.array,
) -> Result:
    """The oracle: one token after the other, as in the equations above."""
    B, T, H, D = q.shape
    group = H // k.shape[2]
    k, v = (mx.repeat(x.astype(mx.float32), group, axis=2) for x in (k, v))
    kn, qn = normalize(k), normalize(q, D**-0.5)
    M, outputs = state, []
    for t in range(T):
        if g is not None:
            M = mx.exp(g[:, t].astype(mx.float32))[..., None, None] * M
        recalled = mx.einsum("bhkv,bhk->bhv", M, kn[:, t])
        change = beta[:, t].astype(mx.float32)[..., None] * (v[:, t] - recalled)
        M = M + mx.einsum("bhk,bhv->bhkv", kn[:, t], change)
        outputs.append(mx.einsum("bhkv,bhk->bhv", M, qn[:, t]))
    return mx.stack(outputs, axis=1), M


@mx.compile
def step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    state: mx.array,
) -> Result:
    """One token (T = 1). Key and query read the old state in one product, and their lengths
    and k . q are another; what else there is, are few elementwise operations:

    d = beta (v - exp(g) M^T kn);  o = exp(g) M^T qn + (kn . qn) d;  M <- exp(g) M + kn d^T
    """
    B, _, H, D = q.shape
    Hkv = k.shape[2]
    heads = (B, Hkv, H // Hkv)
    scalars = (*heads, 1, 1)
    both = stacked(k, q)
    M = state.reshape(*heads, D, D)
    read = both @ M
    kk, kq, qq = products(both)
    k_scale, q_scale = mx.rsqrt(kk + 1e-6), mx.rsqrt(qq + 1e-6) * D**-0.5
    recalled, answer = read[..., :1, :], read[..., 1:, :]
    if g is not None:
        decay = mx.exp(g.reshape(scalars).astype(mx.float32))
        recalled, answer, M = decay * recalled, decay * answer, decay * M
    new = v.reshape(B, Hkv, 1, 1, D).astype(mx.float32)
    d = beta.reshape(scalars).astype(mx.float32) * (new - k_scale * recalled)
    change = k_scale * d
    o = q_scale * (answer + kq * change)
    M = M + both[..., :1, :].swapaxes(-1, -2) * change
    return o.reshape(B, 1, H, D), M.reshape(B, H, D, D)


class Chunks(NamedTuple):
    """What of N chunks of C tokens does not depend on the state, [B, Hkv, G, N, ...]; G or Hkv
    may be 1. values [C, D]: what each token adds to an empty state; forgets [C, D]: times the
    state, what it adds beside. keys [D, C] of what is added, as they are at the end of the chunk.
    queries [C, D] of the state, weights [C, C] of what is added. carry [1, 1]: what is left of
    the state, or None for all.
    """

    values: mx.array
    forgets: mx.array
    keys: mx.array
    queries: mx.array
    weights: mx.array
    carry: mx.array | None


def _chunks(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    C: int,
    inverse: Callable[[mx.array], Any],
) -> Chunks:
    """WY form, in chunks of C tokens. With decay ratios
    L (i, j) = exp(g_{j+1} + ... + g_i) in a chunk:

    A = tril(beta_i (kn_i . kn_j) L_ij, -1);  X = (I + A)^-1
    U = X (beta v) - X (beta exp(g_1 + ... + g_i) kn) M      what each token adds
    o = exp(g_1 + ... + g_i) qn M + tril((qn kn^T) L) U
    """
    D = q.shape[-1]
    G = q.shape[2] // k.shape[2]
    kn = to_chunks(normalize(k), 1, C)  # [B, Hkv, 1, N, C, D]
    qn = to_chunks(normalize(q, D**-0.5), G, C)
    v = to_chunks(v, 1, C)
    beta = to_chunks(beta, G, C)[..., None]
    knT = kn.swapaxes(-1, -2)
    read = qn @ knT
    overlap = beta * (kn @ knT)
    write_keys, read_keys, carry = -beta * kn, qn, None  # what is forgotten is added
    if g is None:
        read = mx.where(causal(C), read, 0.0)
        overlap = mx.where(causal(C, -1), overlap, 0.0)
        left = kn
    else:
        g = to_chunks(g, G, C)
        ratio = decay_matrix(g)
        read = read * ratio
        overlap = mx.where(causal(C, -1), overlap * ratio, 0.0)
        since_start = mx.exp(mx.cumsum(g, axis=-1))[..., None]
        write_keys, read_keys = write_keys * since_start, qn * since_start
        carry = since_start[..., -1:, :]
        left = kn * ratio[..., -1, :, None]  # what is left of each key at the end
    X = inverse(overlap)
    return Chunks(X @ (beta * v), X @ write_keys, left.swapaxes(-1, -2), read_keys, read, carry)


def chunked(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    state: mx.array,
    chunk: int | None = None,
) -> Result:
    """In chunks of at most so many tokens; by operations that can be exported."""
    B, T, H, D = q.shape
    c = _chunks(q, k, v, g, beta, chunk_size(T, chunk), halved_inverse)
    M = state.astype(mx.float32).reshape(B, k.shape[2], -1, D, D)
    carries = [None] * c.values.shape[3] if c.carry is None else each(c.carry)
    parts = zip(*map(each, c[:-1]), carries, strict=True)
    outputs = []
    for value, forget, key, query, weights, carried in parts:
        U = mx.addmm(value, forget, M)
        outputs.append(mx.addmm(query @ M, weights, U))
        M = mx.addmm(M if carried is None else M * carried, key, U)
    return from_chunks(mx.stack(outputs, axis=3), T), M.reshape(B, H, D, D)


def at_once(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    state: mx.array,
    chunk: int | None = None,
) -> Result:
    """As chunked. A chunk makes (carry I + keys forgets) M + keys values of a state."""
    B, T, H, D = q.shape
    c = _chunks(q, k, v, g, beta, chunk_size(T, chunk), unit_lower_inverse)
    M = state.astype(mx.float32).reshape(B, k.shape[2], -1, D, D)
    eye = identity(D) if c.carry is None else c.carry * identity(D)
    befores, M = linear.states(mx.addmm(eye, c.keys, c.forgets), c.keys @ c.values, M)
    U = mx.addmm(c.values, c.forgets, befores)
    o = mx.addmm(c.queries @ befores, c.weights, U)
    return from_chunks(o, T), M.reshape(B, H, D, D)


@mx.custom_function
def unit_lower_inverse(A: mx.array) -> mx.array:
    """(I + A)^-1 for strictly lower triangular A [..., C, C], C a power of two. What lies above
    has no gradient that means anything.

    Blocks are inverted together and joined in pairs. Eight rows use the finite Neumann
    product; more would cancel when keys repeat (its terms grow as binomials).
    """
    return halved_inverse(A) if on_cpu() else joined_inverse(A)


@unit_lower_inverse.vjp
def _(A: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    turned = inverse.swapaxes(-1, -2)
    return -(turned @ cotangent @ turned)


def halved_inverse(A: mx.array) -> mx.array:
    """As few products as there can be."""
    C = A.shape[-1]
    if C <= 8:
        return _neumann(A)
    h = C // 2
    low, high = halved_inverse(mx.stack([A[..., :h, :h], A[..., h:, h:]]))
    joint = -(high @ (A[..., h:, :h] @ low))
    top = mx.concatenate([low, mx.zeros_like(low)], axis=-1)
    return mx.concatenate([top, mx.concatenate([joint, high], axis=-1)], axis=-2)


def joined_inverse(A: mx.array) -> mx.array:
    """As few launches: products of whole matrices, with what is not in the blocks masked."""
    C = A.shape[-1]
    size = min(8, C)
    inverse = _neumann(mx.where(_blocks(C, size), A, 0.0), size)
    while size < C:
        beside = mx.where(_beside(C, size), A, 0.0)
        inverse = mx.addmm(inverse, inverse @ beside, inverse, alpha=-1.0)
        size *= 2
    return inverse


def _neumann(A: mx.array, size: int = 8) -> mx.array:
    """(I + A)^-1 of diagonal blocks of this size, or of fewer rows."""
    eye = identity(A.shape[-1])
    inverse, power = eye - A, A
    for _ in range(max(0, int(math.log2(min(size, A.shape[-1]))) - 1)):
        power = power @ power
        inverse = inverse @ (eye + power)
    return inverse


@cache
def _blocks(C: int, size: int) -> mx.array:
    """Bool [C, C]: row and column are of one block."""
    of = np.arange(C) // size
    return mx.array(of[:, None] == of)


@cache
def _beside(C: int, size: int) -> mx.array:
    """Bool [C, C]: they are of one block of twice the size, but not of this."""
    beside = _blocks(C, 2 * size) & ~_blocks(C, size)
    mx.eval(beside)
    return beside


@cache
def identity(C: int) -> mx.array:
    """[C, C], float32."""
    return mx.array(np.eye(C, dtype=np.float32))


def mlx_fast(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array | None,
    beta: mx.array,
    state: mx.array,
) -> Result:
    """MLX's own update, with Metal a kernel: linear decays, state [value, key], as many key heads
    as queries."""
    D = q.shape[-1]
    group = q.shape[2] // k.shape[2]
    kn = mx.repeat(normalize(k), group, axis=2)
    vn = mx.repeat(v.astype(mx.float32), group, axis=2)
    beta = beta.astype(mx.float32)
    decay = mx.ones_like(beta) if g is None else mx.exp(g.astype(mx.float32))
    o, M = mx.fast.gated_delta_update(
        normalize(q, D**-0.5), kn, vn, decay, beta, state.swapaxes(-1, -2)
    )
    return o, M.swapaxes(-1, -2)
