"""How long does conversion take, and in how much memory, next to mlx_lm.convert?

Makes a random bfloat16 checkpoint of a published model's shape (6 GB for 3B), converts it,
and has mlx_lm convert the same base without the memory.

    python -m benchmarks conversion ahn-gdn-3b --scratch DIR
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

# isort: split
import click
import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models

from ahn_mlx.checkpoints.directory import INDEX
from ahn_mlx.checkpoints.safetensors import Layout, TensorWriter
from ahn_mlx.checkpoints.shards import by_layer
from ahn_mlx.hub.published import MODELS
from ahn_mlx.model.augment import build
from ahn_mlx.model.config import PUBLISHED_NAMES
from ahn_mlx.model.names import is_memory, published_name

IN_RELEASE = {name: release for release, name in PUBLISHED_NAMES.items()}


def make(path: Path, names: dict[str, tuple[int, ...]], config: dict) -> Path:
    """A checkpoint with random tensors, in two files."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    ordered = sorted(names, key=by_layer)
    weight_map = {}
    for i, part in enumerate((ordered[::2], ordered[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        weight_map.update(dict.fromkeys(part, file))
        layout = {name: Layout(mx.bfloat16, names[name]) for name in part}
        with TensorWriter(path / file, layout) as writer:
            for name in part:
                writer.put(name, mx.random.normal(names[name], mx.bfloat16))
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def measure(*command: str) -> tuple[float, float]:
    """Seconds, and peak memory in GB, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    code, usage = waited(process)
    assert code == 0, command
    scale = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * scale / 1e9


def waited(process: subprocess.Popen) -> tuple[int, resource.struct_rusage]:

    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage


@click.command()
@click.argument("name", default="ahn-gdn-3b")
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Filled, emptied.")
@click.option("--rounds", default=2, help="The best of each counts.")
def conversion(name: str, scratch: Path, rounds: int) -> None:
    """Print seconds and peak memory of both, quantized to 4 bits and not."""
    entry = MODELS[name]
    config = {**entry.base.config, "max_position_embeddings": 32768, "rope_theta": 1e6}
    model = build({**config, "ahn": entry.ahn.to_dict()})
    shapes = {published_name(k): tuple(x.shape) for k, x in tree_flatten(model.parameters())}
    plain = {k: shape for k, shape in shapes.items() if not is_memory(k)}
    memory = {k: shape for k, shape in shapes.items() if is_memory(k)}
    base = make(scratch / "base", plain, config)
    release = {"_ahn_implementation": IN_RELEASE[entry.memory], "sliding_window": 32640}
    ahn = make(scratch / "ahn", memory, {**config, **release})
    Tokenizer(models.BPE({"a": 0}, [])).save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    out = scratch / "out"
    try:
        for title, ours, theirs in (("4 bits", ["--q-bits", "4"], ["-q"]), ("as it is", [], [])):
            rows = []
            for _ in range(rounds):
                inputs = ("--base", str(base), "--ahn", str(ahn), "--out", str(out))
                ahn_mlx_run = measure("-m", "ahn_mlx", "convert", *inputs, *ours)
                shutil.rmtree(out)
                paths = ("--hf-path", str(base), "--mlx-path", str(out))
                rows.append((ahn_mlx_run, measure("-m", "mlx_lm", "convert", *paths, *theirs)))
                shutil.rmtree(out)
            for label, runs in zip(("ahn-mlx", "mlx_lm"), zip(*rows, strict=True), strict=True):
                seconds, peak = min(s for s, _ in runs), max(m for _, m in runs)
                print(f"{title:<9} {label:<8} {seconds:6.1f} s  peak {peak:.2f} GB")
    finally:
        shutil.rmtree(scratch)
