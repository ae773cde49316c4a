"""What a rank reads of a checkpoint: its part of each tensor. As a program, this is one of them."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ahn_mlx  # before MLX

# ruff: isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import REPO
from mlx.nn.layers.distributed import shard_inplace
from mlx.utils import tree_flatten
from several import CONFIG, environments, random_model, report, weights_of

from ahn_mlx.checkpoints.load import load_model
from ahn_mlx.checkpoints.safetensors import read_header, read_part
from ahn_mlx.model.division import Part
from ahn_mlx.model.ranks import Ranks, join

LARGE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 1, "vocab_size": 4001}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},
    "packed": {"quantization": {"group_size": 32, "bits": 4}},
}


def write(folder: Path, name: str) -> None:
    """A checkpoint whose weights are many times its header."""
    packed = CASES[name].get("quantization", {})
    model = random_model("mamba2", "absolute", packed.get("bits"), **LARGE)
    config = {**CONFIG, **LARGE, "ahn": model.ahn.to_dict(), **CASES[name]}
    weights = dict(tree_flatten(model.parameters()))
    if name == "bfloat16":
        weights = {n: x.astype(mx.bfloat16) for n, x in weights.items()}
        config["torch_dtype"] = name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def read_bytes() -> int:
    """That this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def loaded(folder: Path, ranks: Any, dtype: str | None) -> dict[str, Any]:
    """What loading a part took, and whether it is the one that is cut from the whole."""
    header = sum(x.end - x.begin for x in read_header(folder / "model.safetensors").values())
    mx.clear_cache()
    mx.reset_peak_memory()
    before, held = read_bytes(), mx.get_active_memory()
    part = load_model(folder, dtype=dtype, ranks=ranks)[0]
    read, peak = read_bytes() - before, mx.get_peak_memory() - held
    whole = load_model(folder, dtype=dtype)[0]
    weights = weights_of(whole)
    ranks.cut(whole)
    pairs = zip(tree_flatten(part.parameters()), tree_flatten(whole.parameters()), strict=True)
    same = all(a == b and mx.array_equal(x, y).item() for (a, x), (b, y) in pairs)
    share = weights_of(part)
    return {"same": same, "share": share / weights, "read": read / header, "peak": peak / share}


class Fused(nn.Module):
    """As models have it whose projections are in one matrix, each of which is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.rows = nn.Linear(8, 24), nn.Linear(8, 6)


class OfFused(Ranks):
    def cut(self, model: Any) -> None:
        shard_inplace(model.fused, "all-to-sharded", segments=3, group=self.group)
        shard_inplace(model.rows, "all-to-sharded", group=self.group)


if __name__ == "__main__":
    ranks = join()
    cases = {
        name: loaded(Path(sys.argv[1], name), ranks, None if name == "packed" else name)
        for name in CASES
    }
    print(json.dumps([cases, sorted(OfFused(ranks.group).parts(Fused()))]))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what a process reads")
def test_a_rank_reads_its_part_and_no_more(tmp_path):
    for name in CASES:
        write(tmp_path / name, name)
    command = [sys.executable, __file__, str(tmp_path)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(command, env=environment, cwd=REPO, **pipes)
        for environment in environments(2, tmp_path)
    ]
    ended = [[rank.returncode, *said] for rank in ranks for said in [rank.communicate(timeout=300)]]
    for _, said, _ in ended:
        assert said, report(ended)
        cases, fused = json.loads(said)
        for name, case in cases.items():
            print(name, case)
            assert case["same"] and case["share"] < 0.525, (name, case)
            assert case["read"] < 0.525, (name, case)
            assert case["peak"] < 1.05, (name, case)
        assert fused == ["rows.bias", "rows.weight"]


@pytest.mark.parametrize("shape", [(1 << 20, 7, 0), (1 << 20, 0, 7)])
def test_of_a_tensor_of_nothing_no_row_is_looked_for(shape, tmp_path, monkeypatch):
    """However many there are: each of them takes no byte of a file."""
    file = tmp_path / "x.safetensors"
    mx.save_safetensors(str(file), {"x": mx.zeros(shape)})
    looked = []

    class Counted(io.FileIO):
        def seek(self, *given):
            looked.append(given)
            return super().seek(*given)

    monkeypatch.setattr(Path, "open", lambda self, *given, **options: Counted(self))
    found = read_part(file, read_header(file)["x"], Part(1, 0, shape[1] // 2, shape[1] // 2))
    assert found.shape == (shape[0], shape[1] // 2, shape[2]) and len(looked) < 9


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_part_of_a_tensor_is_read_along_each_axis(tmp_path, axis):
    x = mx.arange(4 * 6 * 5).reshape(4, 6, 5).astype(mx.float16)
    file = tmp_path / "x.safetensors"
    mx.save_safetensors(str(file), {"a": x * 2, "x": x, "z": x})
    info = read_header(file)["x"]
    part = read_part(file, info, Part(axis, 1, 3, 3))
    expected = np.take(np.array(x), [1, 2], axis=axis)
    expected = np.concatenate([expected, np.zeros_like(np.take(expected, [0], axis=axis))], axis)
    assert part.dtype == mx.float16 and np.array_equal(np.array(part), expected)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(ahn_mlx.AHNError, match="ends too early"):
        read_part(file, info, Part(axis, 1, 3, 3))
