"""The chunk-parallel recurrences against MLX's and mlx-lm's, and against float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
from mlx_lm.models.ssm import ssm_attn

from ahn_mlx import ops

from .measure import plot, plots_option, table, take_turns

H, D = 16, 128


def delta_float64(q, k, v, g, beta):  # type: ignore[no-untyped-def]
    """Equations of ops/delta.py, one token after the other, [T, H, ...] -> [T, H, D]."""
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    M, out = np.zeros((H, D, D)), []
    for t in range(len(q)):
        M = np.exp(g[t])[:, None, None] * M
        change = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", M, k[t]))
        M = M + k[t][:, :, None] * change[:, None]
        out.append(np.einsum("hkv,hk->hv", M, q[t]) * D**-0.5)
    return np.stack(out)


def ssd_float64(q, k, v, dt, A):  # type: ignore[no-untyped-def]
    """Equations of ops/mamba2.py, likewise."""
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    M, out = np.zeros((H, D, D)), []
    for t in range(len(q)):
        M = np.exp(dt[t] * A)[:, None, None] * M
        M = M + (dt[t][:, None] * v[t])[:, :, None] * k[t][:, None]
        out.append(np.einsum("hvk,hk->hv", M, q[t]))
    return np.stack(out)


Forms = dict[str, Callable[[], mx.array]]


def forms(T: int) -> tuple[Forms, dict[str, np.ndarray]]:
    """Each form on the same random input, and exact outputs of ours."""
    q, k, v = (mx.random.normal((1, T, H, D)) for _ in range(3))
    g, beta = -0.1 * mx.random.uniform(shape=(1, T, H)), mx.random.uniform(shape=(1, T, H))
    A, zero, M = -mx.exp(mx.linspace(-2.0, 1.0, H)), mx.zeros((H,)), mx.zeros((1, H, D, D))
    # Theirs take normalised keys and queries; normalising is counted for ours.
    qn, kn = ops.delta.normalize(q, D**-0.5), ops.delta.normalize(k)
    qm, km = ops.mamba2.normalize(q), ops.mamba2.normalize(k)
    raw_dt = mx.log(mx.expm1(beta))  # mlx-lm applies softplus inside
    mx.eval(q, k, v, g, beta, A, M, qn, kn, qm, km, raw_dt)
    wide = [np.array(x[0], np.float64) for x in (q, k, v, g, beta)]
    exact = {
        "gated delta rule": delta_float64(*wide),
        "delta rule": delta_float64(*wide[:3], 0 * wide[3], wide[4]),
        "Mamba2": ssd_float64(*wide[:3], wide[4], np.array(A, np.float64)),
    }
    return {
        "gated delta rule": lambda: ops.gated_delta_rule(q, k, v, g, beta)[0],
        "delta rule": lambda: ops.delta_rule(q, k, v, beta)[0],
        "mx.fast.gated_delta_update": lambda: mx.fast.gated_delta_update(
            qn, kn, v, mx.exp(g), beta, M
        )[0],
        "Mamba2": lambda: ops.ssd(q, k, v, beta, A)[0],
        "mlx-lm ssm_attn": lambda: ssm_attn(
            v, mx.log(-A), km, qm, zero, raw_dt, zero, M, (0.0, 100.0)
        )[0],
    }, exact


@click.command()
@click.option("--lengths", default="512,2048", show_default=True, help="Tokens.")
@click.option("--rounds", default=5, show_default=True)
@plots_option
def recurrence(lengths: str, rounds: int, plots: Path) -> None:
    """Milliseconds for T tokens, 16 heads of 128, float32."""
    rows = []
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for T in (int(n) for n in lengths.split(",")):
        run, exact = forms(T)
        steps = {name: partial(lambda f: mx.eval(f()), form) for name, form in run.items()}
        ms = {name: 1e3 * t for name, t in take_turns(steps, rounds, str(T)).items()}
        for name, o in exact.items():
            theirs = "mlx-lm ssm_attn" if name == "Mamba2" else "mx.fast.gated_delta_update"
            error = np.abs(np.array(run[name]()[0]) - o).max() / np.abs(o).max()
            pair = [name, f"{ms[name]:.0f}", theirs, f"{ms[theirs]:.0f}"]
            rows.append([f"{T:,}", *pair, f"{ms[theirs] / ms[name]:.1f}x", f"{error:.0e}"])
        for name, t in ms.items():
            xs, ys = lines.setdefault(name, ([], []))
            xs.append(T)
            ys.append(t)
    table(["T", "ours", "ms", "theirs", "ms", "ratio", "ours, relative error to float64"], rows)
    plot(plots / "recurrence.png", lines, "tokens", "ms")
