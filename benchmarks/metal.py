"""What a GPU launches for a layer, and what our Metal kernels move, counted on the emulator,
beside those of mlx-lm."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from tqdm import tqdm

from ahn_mlx.measure.doctor import KERNELS
from ahn_mlx.memory.forms import SCANS, STEPS
from ahn_mlx.ops import memory_kernels
from ahn_mlx.ops.kernels import Sizes
from ahn_mlx.ops.window import DECODE, PREFILL

from .measure import table

D = 128
TOKENS = 64
WINDOW, SINKS = TOKENS - 3, 3
# A state and a projection are read once whatever a kernel does; the table leaves them out.
STATES = ("state", "new_state", "state_in", "state_out", "projection")


def ours(dtype: mx.Dtype) -> list[tuple[str, str, int, Callable[[], Any]]]:
    """Kernel, unit of the row, units per call, and the call."""
    found = []
    sizes = Sizes(D, dtype, window=WINDOW, sinks=SINKS, chunk=TOKENS, clamped=True)
    for kind, check in SCANS.items():
        _, q, update, state, rates = check.example(sizes, TOKENS)
        heads, tokens = q.shape[1], update.evicts
        for splits in (1, 4):

            def scan(
                kind: str = kind,
                q: mx.array = q[:, :, -tokens:],
                update: Any = update,
                state: mx.array = state,
                rates: mx.array = rates,
                splits: int = splits,
            ) -> Any:
                return memory_kernels.scan(kind, q, update, state, rates, splits)

            found.append((f"{check.name}, P = {splits}", "token, head", heads * tokens, scan))
    for check in (*STEPS.values(), DECODE, PREFILL):
        args = check.example(sizes, TOKENS)
        heads = 4
        unit, n = {
            DECODE.name: ("key, K/V head", 2 * TOKENS),
            PREFILL.name: ("query, head", heads * TOKENS),
        }.get(check.name, ("head", heads))
        found.append((check.name, unit, n, lambda check=check, args=args: check.ours(*args)))
    return found


def theirs(emulated: Any) -> list[tuple[str, str, int, Callable[[], Any]]]:
    """mlx-lm's kernels on as many tokens, with one key head for two value heads as above."""
    from emulator import import_with_metal

    delta = import_with_metal("mlx_lm.models.gated_delta", emulated)
    ssm = import_with_metal("mlx_lm.models.ssm", emulated)

    def gated(name: str, rows: int, T: int) -> Callable[[], Any]:
        q, k = mx.random.normal((2, 1, T, 2, D))
        v, g, beta = mx.random.normal((1, T, 4, D)), *mx.random.uniform(shape=(2, 1, T, 4))
        return lambda: getattr(delta, name)(
            inputs=[q, k, v, g, beta, mx.zeros((1, 4, D, D)), T],
            template=[
                *(("InT", mx.float32), ("StT", mx.float32)),
                *(("Dk", D), ("Dv", D), ("Hk", 2), ("Hv", 4)),
            ],
            grid=(32, D // rows, 4),
            threadgroup=(32, 2 if rows > 1 else 4, 1),
            output_shapes=[v.shape, (1, 4, D, D)],
            output_dtypes=[mx.float32, mx.float32],
        )

    def update() -> Any:
        x, (B, C) = mx.random.normal((1, 1, 4, D)), mx.random.normal((2, 1, 1, 2, D))
        A_log, dt_bias, skip = mx.random.uniform(shape=(3, 4))
        dt, state = mx.random.normal((1, 1, 4)), mx.zeros((1, 4, D, D))
        return ssm.ssm_update_kernel(x, A_log, B, C, skip, dt, dt_bias, state, (1e-3, 100.0))

    packed, standard = "_gated_delta_kernel_packed", "_gated_delta_kernel"
    return [
        ("mlx-lm gated delta, packed", "token, head", 4 * TOKENS, gated(packed, 8, TOKENS)),
        ("mlx-lm gated delta, standard", "token, head", 4 * TOKENS, gated(standard, 1, TOKENS)),
        ("mlx-lm gated delta, packed, T = 1", "head", 4, gated(packed, 8, 1)),
        ("mlx-lm gated delta, standard, T = 1", "head", 4, gated(standard, 1, 1)),
        ("mlx-lm ssm update", "head", 4, update),
    ]


@click.command()
def metal() -> None:
    """Launches of a layer, and what each kernel moves.

    First the launches that a GPU would need for one Qwen2 layer; then bytes and shuffles per
    token, head or key, float32, D = 128, states left out, threadgroup memory also for tokens of
    16 bits. Needs a checkout and g++, no Metal: the kernels run on the emulator of the tests.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    launched()
    click.echo()
    moved()


def launched() -> None:
    """A table of launches: with a full window one token and a chunk, and a training step."""
    from launches import CHUNK, SEQUENCE, step, training

    def launches(memory: str | None, sinks: str, L: int, bits: int | None = None) -> list[str]:
        """With our kernels and without."""
        counted = (step(memory, sinks, ours, L, bits).total() for ours in (True, False))
        return [f"{n} ({n / plain[L]:.2f})" for n in counted]

    plain = {L: step(None, "", False, L).total() for L in (1, CHUNK)}
    rows = [["plain, rotating cache", "", f"{plain[1]}", "", f"{plain[CHUNK]}", ""]]
    cases = [(kind, sinks, None) for kind in STEPS for sinks in ("absolute", "clamped")]
    for kind, sinks, bits in tqdm([*cases, ("gated_deltanet", "clamped", 8)], leave=False):
        row = [*launches(kind, sinks, 1, bits), *launches(kind, sinks, CHUNK, bits)]
        trained = "" if bits else f"{training(kind, sinks).total():,}"
        name = f"{kind}, {sinks} sinks" + (", 8-bit window" if bits else "")
        rows.append([name, *row, trained])
    head = ["launches of a layer (times plain)", "one token, our kernels", "MLX's operations"]
    head += [f"{CHUNK:,} tokens, our kernels", "MLX's operations"]
    table([*head, f"training step, 30 layers, {SEQUENCE:,} tokens"], rows)


def moved() -> None:
    """A table of traffic."""
    from emulator import EmulatedMetal

    emulated = EmulatedMetal()
    emulated.mode = "count"
    dispatches = {check.name: str(check.dispatches) for check in KERNELS}
    rows = []
    with emulated.in_place():
        calls = ours(mx.float32) + theirs(emulated)
        half = {name: call for name, _, _, call in ours(mx.bfloat16)}
        for name, unit, n, call in tqdm(calls, leave=False):
            counted = counters(emulated, call)
            sums = []
            for what in ("read_per_threadgroup", "unique_read", "written_per_threadgroup"):
                bytes_ = sum(
                    c.total(what, without=[s for s in STATES if s in c.buffers]) for c in counted
                )
                sums.append(f"{bytes_ / n / 1024:.2f}")
            shuffles = sum(c.shuffles for c in counted) / n
            memory = [counted] + ([counters(emulated, half[name])] if name in half else [])
            sizes = " / ".join(f"{max(c.threadgroup_memory for c in x) / 1024:.1f}" for x in memory)
            calls_ = dispatches.get(name.split(",")[0], "1")
            rows.append([name, unit, *sums, f"{shuffles:.0f}", sizes, calls_])
    head = ["kernel", "per", "read, KB", "of that unique", "written, KB", "shuffles"]
    table([*head, "threadgroup memory, KB, float32 / 16 bits", "dispatches"], rows)


def counters(emulated: Any, call: Callable[[], Any]) -> list[Any]:
    """What was counted of each launch of a call."""
    emulated.calls.clear()
    mx.eval(call())
    return [result.counters for _, result in emulated.calls]
