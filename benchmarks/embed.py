"""The C library against Python: time to open a model, and of one token of an answer."""

import subprocess
import tempfile
import time
from pathlib import Path

import click
import mlx.core as mx

import ahn_mlx
from ahn_mlx.apps.export import export_app
from ahn_mlx.hub.published import DEFAULT

from .decode import stepper
from .measure import table


@click.command()
@click.option("--build", type=click.Path(path_type=Path), required=True, help="CMake's directory.")
@click.option("--tokens", default=50, show_default=True, help="Decoded per turn.")
@click.option("--rounds", default=5, show_default=True, help="Turns; the least counts.")
def embed(build: Path, tokens: int, rounds: int) -> None:
    """Milliseconds per token of the default model with a full window, by turns.

    Configure with -DAHN_TESTS=ON. On Linux start it with LD_PRELOAD=libopenblas.so.0, so that
    both sides compute with the same matrix product.
    """
    model, tokenizer = ahn_mlx.load(DEFAULT)
    cache = model.make_cache()
    for _ in range(3):
        mx.eval(model(mx.full((1, 400), 5), cache=cache))
    step = stepper(model, cache, tokens)
    python, library, opening = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "app"
        export_app(model, tokenizer, app)
        for _ in range(rounds):
            start = time.perf_counter()
            step()
            python.append((time.perf_counter() - start) / tokens)
            # Its last number; opening is what the sample takes that does nothing else.
            said = _run(build / "ahn-probe", "decode", app, tokens)
            library.append(float(said.split()[-1]))
            start = time.perf_counter()
            _run(build / "ahn-sample", app)
            opening.append(time.perf_counter() - start)
    rows = [
        ["token, Python", f"{1e3 * min(python):.1f} ms", "1.00"],
        ["token, C library", f"{1e3 * min(library):.1f} ms", f"{min(library) / min(python):.2f}"],
        ["open the model, C library", f"{min(opening):.2f} s", ""],
    ]
    table(["what", "least", "ratio"], rows)


def _run(*words: object) -> str:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout
