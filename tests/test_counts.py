"""What is counted of one model whose sizes all differ, by hand; and what is known of chips."""

import subprocess
import sys
from dataclasses import replace

import pytest

from ahn_mlx import AHNError
from ahn_mlx.measure import chips, cost
from ahn_mlx.measure.cost import Beside, Shape
from ahn_mlx.model.config import AHNConfig

SHAPE = Shape(
    ahn=AHNConfig(memory="mamba2", window=300, sinks=10, fa_layer_ids=(1,)),
    layers=4,
    hidden=7,
    heads=6,
    kv_heads=2,
    head_dim=16,
    projections=1000,
    mlp=2000,
    gates=30,
    readout=50,
    vectors=11,
    memory_vectors=13,
    embedding=700,
    tied=False,
    experts=4000,
    taken=400,
    beside=Beside(windows=((100, 24), (1000, 8)), states=500, wide=200),
)


def looked_at(size, first=290, end=340):
    return sum(min(t + 1, size) for t in range(first, end))


def test_flops_of_reading_on():
    attended = looked_at(340) + 3 * looked_at(310) + looked_at(100) + looked_at(1000)
    read = {
        "projections": 2 * 1000 * 50,
        "attention": 4 * 6 * 16 * attended,
        "mlp": 2 * (2000 + 400) * 50,
        "head": 2 * 700,
        "recurrence": 2 * 3 * 500 * 50,
    }
    assert cost.flops(SHAPE, "window", 50, 290) == read
    # Of the tokens 290 to 339, 30 put another one out of three windows.
    memory = 2 * 30 * 50 + (2 * 50 + 2 * 2 * 3 * 6 * 16 * 16) * 30
    assert cost.flops(SHAPE, "ahn", 50, 290) == {**read, "memory": memory}
    behind = cost.flops(SHAPE, "ahn", 7, 1000)["memory"]
    assert behind == 2 * 30 * 7 + (2 * 50 + 2 * 2 * 3 * 6 * 16 * 16) * 7
    assert cost.flops(SHAPE, "ahn", 310)["memory"] == 2 * 30 * 310
    full = looked_at(340) * 4 + looked_at(100) + looked_at(1000)
    assert cost.flops(SHAPE, "full", 50, 290)["attention"] == 4 * 6 * 16 * full
    delta = replace(SHAPE, ahn=replace(SHAPE.ahn, memory="deltanet"))
    assert cost.flops(delta, "ahn", 1, 310)["memory"] == 2 * 30 + 2 * 50 + 2 * 3 * 3 * 6 * 16 * 16
    plain = replace(SHAPE, beside=Beside())
    assert "recurrence" not in cost.flops(plain, "ahn", 50)


def test_flops_as_the_paper_counts():
    counted = cost.flops(SHAPE, "ahn", 400)
    mixing = counted["projections"] + counted["attention"] + 2 * (30 + 50) * 400
    assert cost.paper_flops(SHAPE, "ahn", 400) == (mixing, mixing + counted["mlp"] + 4 * 700 * 400)
    assert cost.paper_flops(SHAPE, "window", 400)[0] == mixing - 2 * 80 * 400
    assert cost.paper_cache_bytes(SHAPE, "full", 400) == 4 * 2 * 4 * 2 * 16 * 400
    kept = 4 * 2 * 4 * 2 * 16 * 310
    assert cost.paper_cache_bytes(SHAPE, "window", 400) == kept
    assert cost.paper_cache_bytes(SHAPE, "ahn", 400) == kept + 4 * 3 * 6 * 16 * 16


def test_bytes_of_all_caches():
    """512 slots where all is kept, 310 behind a window; quantized, 4 bits and two numbers for 8."""
    kept = cost.cache_bytes(SHAPE, "ahn", 340, 2, kv_bits=4, kv_group_size=8)
    assert kept == {
        "keys, values": 2 * 2 * (512 * 16 * 2 + 3 * 310 * (8 + 8)),
        "gates": 3 * 6 * 310 * 2,
        "state": 3 * 6 * 16 * 16 * 4,
        "beside": (100 * 24 + 512 * 8 + 300) * 2 + 200 * 4,
    }
    plain = cost.cache_bytes(SHAPE, "window", 340, 4)
    assert plain["keys, values"] == 2 * 2 * (512 + 3 * 310) * 16 * 4
    assert (plain["gates"], plain["state"]) == (0, 0)
    full = cost.cache_bytes(SHAPE, "full", 340)["keys, values"]
    assert full == 2 * 2 * 4 * 512 * 16 * 2
    states = [cost.cache_bytes(SHAPE, "ahn", n)["state"] for n in (310, 311)]
    assert states == [0, 3 * 6 * 16 * 16 * 4]
    assert cost.cache_bytes(SHAPE, "ahn", 256)["keys, values"] == 2 * 2 * 4 * 256 * 16 * 2
    assert set(cost.cache_bytes(SHAPE, "ahn", 0).values()) == {0}


def test_bytes_of_weights_and_work():
    assert SHAPE.parameters == 1000 + 2000 + 4000 + 11 + 2 * 700 + 30 + 50 + 13
    assert SHAPE.memory_layers == 3
    tied = replace(SHAPE, tied=True)
    assert SHAPE.parameters - tied.parameters == 700
    assert cost.weight_bytes(SHAPE, 4.5) == 8400 * 4.5 / 8 + 2 * (93 + 11)
    assert cost.weight_bytes(SHAPE, 4.5, 4) == 8400 * 4.5 / 8 + 4 * 93 + 2 * 11
    assert cost.weight_bytes(tied, 4) == 7700 * 4 / 8 + 2 * (93 + 11)
    assert cost.idle_bytes(SHAPE, 4) == (4000 - 400) * 4 / 8
    # Of 100 tokens beside a window of 310: a tile of 256 queries, keys and values, the MLP.
    work = 256 * 6 * 410 + 2 * 2 * 16 * 410 + 100 * (6 * 7 + 3 * 20)
    assert cost.working_bytes(SHAPE, 7, 20, 100) == 2 * work
    assert cost.working_bytes(SHAPE, 7, 20, 100, 4) == 4 * work
    room = [cost.rows_that_fit(10, 5, (1 << 30) + 5 + n) for n in (-99, 0, 29, 30, 49, 50, 70)]
    assert room == [0, 0, 0, 1, 1, 2, 3]


def test_what_is_no_count():
    with pytest.raises(AHNError, match="kind must be one of full, window, ahn, not 'memory'"):
        cost.flops(SHAPE, "memory", 1)
    for tokens, before in ((-1, 0), (0, -1)):
        with pytest.raises(AHNError, match="must not be negative, not -1"):
            cost.flops(SHAPE, "ahn", tokens, before)
    with pytest.raises(AHNError, match="must not be negative"):
        cost.cache_bytes(SHAPE, "ahn", -1)
    assert cost.flops(SHAPE, "ahn", 0)["head"] == 1400


def test_chips_are_what_apple_says():
    """Written a second time, a line for each generation: GB/s, and cores of the GPU."""
    said = """
        m1: 68.25 200 400 800, 8 16 32 64
        m2: 100 200 400 800, 10 19 38 76
        m3: 100 150 400 819, 10 18 40 80
        m4: 120 273 546, 10 20 40
        m5: 153 307 614, 10 20 40
    """
    found = {}
    for line in said.split("\n")[1:-1]:
        name, rest = line.strip().split(": ")
        speeds, cores = (part.split() for part in rest.split(", "))
        for kind, speed, n in zip(("", "-pro", "-max", "-ultra"), speeds, cores, strict=False):
            found[name + kind] = (float(speed), int(n))
    assert {name: chip[:2] for name, chip in chips.CHIPS.items()} == found
    peaks = {name: chip.tflops for name, chip in chips.CHIPS.items() if chip.tflops}
    assert peaks == {"m1": 2.6, "m1-pro": 5.2, "m1-max": 10.4, "m1-ultra": 21, "m2": 3.6}


@pytest.mark.parametrize(
    ("system", "brand", "key"),
    [
        ("darwin", "Apple M1\n", "m1"),
        ("darwin", "Apple M4 Max\n", "m4-max"),
        ("darwin", "Apple M99\n", None),
        ("darwin", "Intel(R) Core(TM) i9", None),
        ("darwin", None, None),
        ("linux", "Apple M1\n", None),
    ],
)
def test_the_chip_of_this_mac(monkeypatch, system, brand, key):
    def says(command, capture_output, text, timeout):
        assert command[0] == "/usr/sbin/sysctl" and capture_output and text and timeout < 10
        if brand is None:
            raise OSError
        return subprocess.CompletedProcess(command, 0, stdout=brand)

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(subprocess, "run", says)
    assert chips.this_chip() == key


def test_the_memory_of_a_machine_and_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(chips, "LIMIT", tmp_path / "memory.max")
    whole = chips.machine_memory()
    assert whole > 1 << 28
    for text, expected in (("max\n", whole), ("12345\n", 12345), (f"{whole + 1}\n", whole)):
        chips.LIMIT.write_text(text)
        assert chips.machine_memory() == expected
