"""When our kernels serve: they agree with the operations, or a warning says that they do not."""

import json
import re
import time
from pathlib import Path

import mlx.core as mx
import pytest
from emulator import EmulatedMetal
from emulator.toolchain import cache_dir
from kernel_clock import Clock
from test_golden import GOLDEN, VARIANTS, convert, follow, load_model, read, same_states

from ahn_mlx.measure import doctor
from ahn_mlx.measure.doctor import KERNELS
from ahn_mlx.model.pure import initial_state, pure_step
from ahn_mlx.ops import kernels
from ahn_mlx.ops.kernels import Sizes
from ahn_mlx.ops.window import DECODE

pytest_plugins = ["emulator.plugin"]

SIZES = Sizes(64, mx.float32)

# By every model that reads more than its window.
USED = {"ahn_memory_scan", "ahn_window_prefill", "ahn_window_decode", "ahn_window_decode_merge"}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No kernel built, no verdict known, and decoding not compiled: the emulator is no graph."""
    monkeypatch.setenv("AHN_MLX_TEST_CACHE", str(cache_dir()))  # objects stay what they are
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AHN_METAL", "1")  # the emulator would never be the faster
    monkeypatch.setattr(doctor, "TIMED", Sizes(16, mx.bfloat16))  # the emulator is slow
    kernels.kernel.cache_clear()
    kernels._agrees.cache_clear()
    kernels._CLOCK = kernels._Clock()
    mx.disable_compile()
    yield
    mx.enable_compile()
    kernels.kernel.cache_clear()
    kernels._agrees.cache_clear()
    kernels._CLOCK = kernels._Clock()


def follow_golden(variant, tmp_path):
    """A model that has computed what it should."""
    folder = GOLDEN / variant
    base = folder / "base" if (folder / "base").is_dir() else None
    convert(base, folder / ("ahn_only" if base else "merged"), tmp_path / "model")
    model = load_model(tmp_path / "model", dtype="float32")[0]
    golden = mx.load(str(folder / "golden.safetensors"))
    cache = model.make_cache()
    logits = read(model, cache, golden["input_ids"], 16)
    assert mx.abs(logits - golden["prefill_logits"]).max() < 1e-3
    same_states(cache, golden, "state_after_prefill")
    follow(model, cache, logits[-1], golden, "decode_tokens", "decode_logits")
    same_states(cache, golden, "state_after_decode")
    return model


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow) if v.startswith("qwen3") else v for v in VARIANTS],
)
def test_a_whole_model(emulated_metal, variant, tmp_path):
    model = follow_golden(variant, tmp_path)
    used = {name for name, _ in emulated_metal.calls}
    mamba2 = {"ahn_memory_step_mamba2", "ahn_memory_step_mamba2_finish"}
    assert used == USED | (mamba2 if model.ahn.memory == "mamba2" else {"ahn_memory_step_delta"})


def test_kernels_are_timed_while_a_step_is_traced(emulated_metal, monkeypatch, tmp_path):
    """Only MLX's own, which are the faster here, can be traced."""
    monkeypatch.delenv("AHN_METAL")
    mx.enable_compile()
    model = follow_golden("qwen2-gdn", tmp_path)
    assert {name for name, _ in emulated_metal.calls} == USED | {"ahn_memory_step_delta"}
    step = pure_step(model)
    window = (mx.zeros((1, 1), mx.int32), mx.array([40]), mx.array([1]), *initial_state(model))
    kernels._agrees.cache_clear()
    kernels._CLOCK = kernels._Clock()
    (tmp_path / "cache" / "ahn-mlx" / "kernels.json").unlink()
    emulated_metal.calls.clear()
    mx.export_function(str(tmp_path / "step.mlxfn"), step, *window)
    assert {name for name, _ in emulated_metal.calls} == {"ahn_memory_step_delta"}
    exported = mx.import_function(str(tmp_path / "step.mlxfn"))(*window)
    assert mx.allclose(exported[0], step(*window)[0], atol=1e-5)


@pytest.mark.parametrize("check", KERNELS, ids=lambda check: check.name)
def test_every_kernel_agrees(any_metal, check):
    before = mx.random.state[0].tolist()
    assert check.error(64, mx.float32) < 1e-5
    assert check.error(16, mx.bfloat16) < kernels.tolerance(mx.bfloat16)
    assert mx.random.state[0].tolist() == before


def test_a_broken_kernel_is_named_once_and_not_used(any_metal, monkeypatch, tmp_path):
    sound = kernels.source
    broken = {"common.h": ("out / total", "out")}

    def source(file: str) -> str:
        return sound(file).replace(*broken.get(file, ("", "")))

    monkeypatch.setattr(kernels, "source", source)
    with pytest.warns(RuntimeWarning, match=r"window_decode \(head size 64, float32\) is off by"):
        assert not kernels.chosen(DECODE, SIZES)
    assert not kernels.chosen(DECODE, SIZES)  # and says nothing more
    verdicts = tmp_path / "cache" / "ahn-mlx" / "kernels.json"
    assert list(json.loads(verdicts.read_text()).values()) != [""]
    broken.clear()
    kernels.kernel.cache_clear()
    kernels._agrees.cache_clear()
    assert kernels.chosen(DECODE, SIZES)  # other sources, another verdict


def test_a_kernel_that_gives_nan_or_does_not_compile(any_metal, monkeypatch):
    sound = kernels.source
    for old, new, message in (
        ("out / total", "out * NAN", "is off by nan"),
        ("out / total", "no_such_variable", "failed"),
    ):
        monkeypatch.setattr(
            kernels, "source", lambda file, old=old, new=new: sound(file).replace(old, new)
        )
        kernels.kernel.cache_clear()
        kernels._agrees.cache_clear()
        with pytest.warns(RuntimeWarning, match=message):
            assert not kernels.chosen(DECODE, SIZES)


def test_a_verdict_is_found_once_per_machine(emulated_metal, tmp_path):
    assert kernels.chosen(DECODE, SIZES)
    calls = len(emulated_metal.calls)
    assert calls
    kernels._agrees.cache_clear()  # as another process
    assert kernels.chosen(DECODE, SIZES)
    assert len(emulated_metal.calls) == calls
    (tmp_path / "cache" / "ahn-mlx" / "kernels.json").write_text("not json")
    kernels._agrees.cache_clear()
    assert kernels.chosen(DECODE, SIZES)
    assert len(emulated_metal.calls) > calls


def test_what_does_not_fit_or_is_switched_off(emulated_metal, monkeypatch):
    assert not kernels.chosen(DECODE, Sizes(80, mx.float32))
    assert not kernels.chosen(DECODE, Sizes(64, mx.int32))
    monkeypatch.setenv("AHN_METAL", "0")
    assert not kernels.chosen(DECODE, SIZES)
    (line,) = doctor.examine_kernels()
    assert "switched off" in line.value
    assert not emulated_metal.calls


def test_doctor_lists_every_kernel(any_metal):
    sizes, *findings = doctor.examine_kernels()
    assert sizes.value.startswith("timed in bfloat16, 4 heads of 16, 2 of keys and values")
    assert [f.name for f in findings] == [check.name for check in KERNELS]
    for finding in findings:
        assert finding.value.startswith("compiled, error "), finding
        assert "in float32 and" in finding.value and not finding.mend
        assert re.search(r" ms, MLX's own \S+ ms; ours serves, by AHN_METAL=1$", finding.value)
    assert "2 dispatches" in findings[0].value and "1 dispatch," in findings[1].value


@pytest.mark.parametrize(("seconds", "serves"), [(1, "ours"), (3, "MLX's own")])
def test_doctor_says_which_serves(monkeypatch, seconds, serves):
    """Of two forms that take seconds by a clock of ours."""
    monkeypatch.delenv("AHN_METAL")
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(doctor, "KERNELS", (clock.check(seconds, 2),))
    with EmulatedMetal().in_place():
        text = doctor.examine_kernels()[1].value
    assert text.endswith(f"{seconds}e+03 ms, MLX's own 2e+03 ms; {serves} serves")


def test_doctor_reports_what_is_broken(any_metal, monkeypatch):
    sound = kernels.source
    monkeypatch.setattr(kernels, "source", lambda file: sound(file).replace("out / total", "out"))
    finding = doctor.examine_kernels()[1]
    assert "is off by" in finding.value and finding.mend


def test_without_metal() -> None:
    if mx.metal.is_available():
        pytest.skip("there is Metal")
    (line,) = doctor.examine_kernels()
    assert line.value.startswith("no Metal device")
    assert not kernels.chosen(DECODE, SIZES)
    assert Path(kernels._PLACES[1]).is_dir()
