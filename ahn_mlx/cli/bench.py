"""ahn-mlx bench: what a model really takes on this machine, beside what was counted."""

import json
import time
from typing import Any

import click

from ..errors import AHNError
from ..measure.chips import CHIPS
from .command import Command, Word
from .estimate import CHIP, CHIP_HELP, print_table
from .options import (
    check_numbers,
    json_option,
    load_model,
    loading_options,
    needs_memory,
    no_effect,
    quiet_option,
)
from .terminal import progress_bar, warn_slow


@click.command(cls=Command)
@no_effect("chip", when=lambda options: options["as_json"], why="with --json, which has no bounds")
@click.argument("name", cls=Word, metavar="MODEL")
@loading_options
@click.option("--context", default=2048, show_default=True, help="Tokens read first.")
@click.option("--tokens", default=32, show_default=True, help="Tokens decoded.")
@click.option("--chip", type=CHIP, metavar="NAME", help=CHIP_HELP)
@json_option
@quiet_option
@needs_memory
def bench(**options: Any) -> None:
    """Read random tokens, decode some, and print what was measured beside what was counted.

    \b
    ahn-mlx bench
    ahn-mlx bench ahn-gdn-3b --context 65536 --chip m4-pro
    """
    check_numbers(options)
    for name in ("context", "tokens"):
        if options[name] < 1:
            raise AHNError(f"--{name} must be at least 1, not {options[name]}")
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ..measure import cost, speed
    from ..model.augment import dtype_of
    from ..reading.generate import prefill_step

    warn_slow()
    model, _ = load_model(options)
    shape = cost.shape_of({**vars(model.args), "ahn": model.ahn.to_dict()})
    context, tokens = options["context"], options["tokens"]
    dtype = dtype_of(model)
    cache = model.make_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    with progress_bar(context, "reading", "tokens") as bar:
        for at in range(0, context, prefill_step()):
            n = min(prefill_step(), context - at)
            model(mx.random.randint(0, 256, (1, n)), cache=cache)
            mx.eval([c.state for c in cache])
            bar.update(n)
    read = time.perf_counter() - start
    # What one token leaves behind for the next is made in the first step.
    y = mx.argmax(model(mx.array([[5]]), cache=cache)[:, -1:], axis=-1)
    mx.eval(y)
    start = time.perf_counter()
    for _ in range(tokens):
        y = mx.argmax(model(y, cache=cache)[:, -1:], axis=-1)
        mx.eval(y)
    decoded = (time.perf_counter() - start) / tokens
    parameters: Any = tree_flatten(model.parameters())
    weights = sum(x.nbytes for _, x in parameters)
    counted_cache = sum(cost.cache_bytes(shape, "ahn", context + tokens + 1, dtype.size).values())
    idle = cost.idle_bytes(shape, 8 * weights / shape.parameters)
    moved = weights - idle + counted_cache
    prefill = sum(cost.flops(shape, "ahn", context).values())
    step = sum(cost.flops(shape, "ahn", 1, before=context).values())
    speed.record(options["name"], prefill / read)
    if options["as_json"]:
        facts = {
            "model": options["name"],
            "context": context,
            "tokens": tokens,
            "prefill_seconds": read,
            "prefill_flops": prefill,
            "decode_seconds_per_token": decoded,
            "decode_flops_per_token": step,
            "decode_bytes_per_token": moved,
            "cache_bytes": _held(cache),
            "counted_cache_bytes": counted_cache,
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        click.echo(json.dumps(facts))
        return
    rows = [
        ["prefill, tokens/s", f"{context / read:,.1f}", ""],
        ["prefill, GFLOP/s", f"{prefill / read / 1e9:,.1f}", ""],
        ["decode, tokens/s", f"{1 / decoded:,.1f}", ""],
        ["decode, GFLOP/s", f"{step / decoded / 1e9:,.1f}", ""],
        ["decode, GB/s", f"{moved / decoded / 1e9:,.1f}", ""],
        ["cache, MB", f"{_held(cache) / 1e6:,.2f}", f"{counted_cache / 1e6:,.2f}"],
        ["peak memory, MB", f"{mx.get_peak_memory() / 1e6:,.1f}", f"{moved / 1e6:,.1f} at least"],
    ]
    if options["chip"]:
        chip = CHIPS[options["chip"]]
        rows[2][2] = f"{1e9 * chip.bandwidth / moved:,.1f} at most"
        rows[4][2] = f"{chip.bandwidth:,.1f} at most"
        if chip.tflops:
            rows[1][2] = f"{1e3 * chip.tflops:,.1f} at most"
    print_table([f"{options['name']}, {context:,} tokens read", "measured", "counted"], rows)


def _held(cache: list[Any]) -> int:
    """Bytes of sinks, window, gates and state, without the copy of what leaves next."""
    from mlx.utils import tree_flatten

    from ..reading.caches import each

    arrays: Any = tree_flatten([c.state for c in each(cache)])
    return sum(x.nbytes for _, x in arrays if hasattr(x, "nbytes"))
