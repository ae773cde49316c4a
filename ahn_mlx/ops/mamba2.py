"""The selective state space recurrence of Mamba2, without skip and convolution.

Per head and token, with state M [value, key] and a = A < 0 (paper, appendix):

    kn = k / max(|k|, 1e-12)           qn = q / max(|q|, 1e-12)
    M <- exp(dt a) M + dt v kn^T
    o  = M qn

The sequential form is the test reference, the step form is one token, the chunked
form is state space duality: attention inside a chunk, the state between chunks. At once, on a
GPU, the states between chunks are one product, too.
"""

from typing import NamedTuple

import mlx.core as mx

from ..platform import on_cpu
from .chunks import chunk_size, decay_matrix, each, from_chunks, products, stacked, to_chunks

Result = tuple[mx.array, mx.array]


def ssd(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dt: mx.array,
    A: mx.array,
    state: mx.array | None = None,
) -> Result:
    """Write T tokens and read after each; chooses the fastest form.

    q: [B, T, H, D] raw queries; k, v: [B, T, Hkv, D] raw, Hkv divides H.
    dt: [B, T, H] step sizes after softplus; A: [H] negative decay rates.
    state: [B, H, D, D] float32 ([value, key]), zeros when None.
    Returns o [B, T, H, D] float32 and the state after the last token.
    """
    if state is None:
        B, _, H, D = q.shape
        state = mx.zeros((B, H, D, D), dtype=mx.float32)
    if q.shape[1] == 1:
        return step(q, k, v, dt, A, state)
    # Reading all chunks at once holds every state, and took twice as long on the CPU.
    return (chunked if on_cpu() else at_once)(q, k, v, dt, A, state)


def normalize(x: mx.array) -> mx.array:
    """x / max(|x|, 1e-12) over the last axis, float32; 0 stays 0."""
    D = x.shape[-1]
    return mx.fast.rms_norm(x.astype(mx.float32), None, 1e-24 / D) * D**-0.5


def sequential(
    q: mx.array, k: mx.array, v: mx.array, dt: mx.array, A: mx.array, state: mx.array
) -> Result:
    """The oracle: one token after the other, as in the equations above."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (mx.repeat(x.astype(mx.float32), group, axis=2) for x in (k, v))
    kn, qn, dt = normalize(k), normalize(q), dt.astype(mx.float32)
    M, outputs = state, []
    for t in range(T):
        M = mx.exp(dt[:, t] * A)[..., None, None] * M
        M = M + mx.einsum("bhv,bhk->bhvk", dt[:, t, :, None] * v[:, t], kn[:, t])
        outputs.append(mx.einsum("bhvk,bhk->bhv", M, qn[:, t]))
    return mx.stack(outputs, axis=1), M


@mx.compile
def step(
    q: mx.array, k: mx.array, v: mx.array, dt: mx.array, A: mx.array, state: mx.array
) -> Result:
    """One token (T = 1): o = exp(dt a) M qn + dt (kn . qn) v, from the old state."""
    B, _, H, D = q.shape
    Hkv = k.shape[2]
    heads = (B, Hkv, H // Hkv)
    both = stacked(k, q)
    kk, kq, qq = products(both)
    k_scale, q_scale = (mx.rsqrt(x + 1e-24) for x in (kk, qq))
    dt = dt.reshape(*heads, 1, 1).astype(mx.float32)
    decay = mx.exp(dt * A.reshape(*heads[1:], 1, 1).astype(mx.float32))
    write = k_scale * dt * v.reshape(B, Hkv, 1, D, 1).astype(mx.float32)
    M = state.reshape(*heads, D, D)
    read = M @ both[..., 1:, :].swapaxes(-1, -2)
    o = q_scale * (decay * read + kq * write)
    M = decay * M + write * both[..., :1, :]
    return o.reshape(B, 1, H, D), M.reshape(B, H, D, D)


class Chunks(NamedTuple):
    """What of N chunks of C tokens does not depend on the state, [B, Hkv, G, N, ...]. inside
    [C, D]: what each token reads of its own chunk; queries [C, D] of the state, added [value,
    key] to it; logs [1, 1]: of what is left of it, and carry, their exponentials."""

    inside: mx.array
    queries: mx.array
    added: mx.array
    logs: mx.array
    carry: mx.array


def _chunks(q: mx.array, k: mx.array, v: mx.array, dt: mx.array, A: mx.array, C: int) -> Chunks:
    """SSD form, in chunks of C tokens. With decay ratios
    L (i, j) = exp(a (dt_{j+1} + ... + dt_i)) in a chunk:

    o = exp(a (dt_1 + ... + dt_i)) M qn + (tril((qn kn^T) L) dt) v
    """
    Hkv = k.shape[2]
    G = q.shape[2] // Hkv
    kn = to_chunks(normalize(k), 1, C)  # [B, Hkv, 1, N, C, D]
    qn = to_chunks(normalize(q), G, C)
    dt = to_chunks(dt, G, C)
    g = dt * A.astype(mx.float32).reshape(Hkv, G, 1, 1)
    v = to_chunks(v, 1, C) * dt[..., None]  # [B, Hkv, G, N, C, D]
    ratio = decay_matrix(g)
    inside = ((qn @ kn.swapaxes(-1, -2)) * ratio) @ v
    logs = mx.cumsum(g, axis=-1)[..., None]
    since_start = mx.exp(logs)
    added = (v * ratio[..., -1, :, None]).swapaxes(-1, -2) @ kn  # [.., N, value, key]
    return Chunks(inside, qn * since_start, added, logs[..., -1:, :], since_start[..., -1:, :])


def chunked(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dt: mx.array,
    A: mx.array,
    state: mx.array,
    chunk: int | None = None,
) -> Result:
    """In chunks of at most so many tokens."""
    B, T, H, D = q.shape
    c = _chunks(q, k, v, dt, A, chunk_size(T, chunk))
    M = state.astype(mx.float32).reshape(B, k.shape[2], -1, D, D)
    outputs = []
    parts = zip(*map(each, (c.queries, c.inside, c.carry, c.added)), strict=True)
    for queries, own, carried, more in parts:
        outputs.append(queries @ M.swapaxes(-1, -2) + own)
        M = M * carried + more
    return from_chunks(mx.stack(outputs, axis=3), T), M.reshape(B, H, D, D)


def at_once(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    dt: mx.array,
    A: mx.array,
    state: mx.array,
    chunk: int | None = None,
) -> Result:
    """As chunked. The state after a chunk is the sum of what all have added, and of the first
    one, as it has decayed since."""
    B, T, H, D = q.shape
    c = _chunks(q, k, v, dt, A, chunk_size(T, chunk))
    first = state.astype(mx.float32).reshape(*c.added.shape[:3], 1, D * D)
    added = mx.concatenate([first, c.added.flatten(-2)], axis=3)
    decays = decay_matrix(mx.pad(c.logs[..., 0, 0], [(0, 0)] * 3 + [(1, 0)]))
    states = (decays @ added).reshape(*added.shape[:4], D, D)
    before, last = mx.split(states, [added.shape[3] - 1], axis=3)
    o = mx.addmm(c.inside, c.queries, before.swapaxes(-1, -2))
    return from_chunks(o, T), last.reshape(B, H, D, D)
