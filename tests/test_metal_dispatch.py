"""When our kernels serve: they agree with the operations, or a warning says that they do not."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from emulator.toolchain import cache_dir
from test_golden import GOLDEN, VARIANTS, convert, follow, load_model, read, same_states

from ahn_mlx.measure import doctor
from ahn_mlx.measure.doctor import KERNELS
from ahn_mlx.ops import kernels
from ahn_mlx.ops.window import DECODE

pytest_plugins = ["emulator.plugin"]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No kernel built, no verdict known, and decoding not compiled: the emulator is no graph."""
    monkeypatch.setenv("AHN_MLX_TEST_CACHE", str(cache_dir()))  # objects stay what they are
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "TIMED", 24)  # the emulator is slow
    kernels.kernel.cache_clear()
    kernels._agrees.cache_clear()
    mx.disable_compile()
    yield
    mx.enable_compile()
    kernels.kernel.cache_clear()
    kernels._agrees.cache_clear()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_model(emulated_metal, variant, tmp_path):
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
    used = {name for name, _ in emulated_metal.calls}
    step = "ahn_memory_step_mamba2" if model.ahn.memory == "mamba2" else "ahn_memory_step_delta"
    attention = {"ahn_window_prefill", "ahn_window_decode", "ahn_window_decode_merge"}
    assert used == {"ahn_memory_scan", step} | attention


@pytest.mark.parametrize("check", KERNELS, ids=lambda check: check.name)
def test_every_kernel_agrees(any_metal, check):
    before = mx.random.state[0].tolist()
    assert check.error(64, mx.float32) < 1e-5
    assert check.error(16, mx.bfloat16) < kernels.tolerance(mx.bfloat16)
    assert mx.random.state[0].tolist() == before


def test_a_broken_kernel_is_named_once_and_not_used(any_metal, monkeypatch, tmp_path):
    sound = kernels.source
    broken = {"window_decode_merge.metal": ("out / total", "out")}

    def source(file: str) -> str:
        return sound(file).replace(*broken.get(file, ("", "")))

    monkeypatch.setattr(kernels, "source", source)
    with pytest.warns(RuntimeWarning, match=r"window_decode \(head size 64, float32\) is off by"):
        assert not kernels.usable(DECODE, 64, mx.float32)
    assert not kernels.usable(DECODE, 64, mx.float32)  # and says nothing more
    verdicts = tmp_path / "cache" / "ahn-mlx" / "kernels.json"
    assert list(json.loads(verdicts.read_text()).values()) != [""]
    broken.clear()
    kernels.kernel.cache_clear()
    kernels._agrees.cache_clear()
    assert kernels.usable(DECODE, 64, mx.float32)  # other sources, another verdict


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
            assert not kernels.usable(DECODE, 64, mx.float32)


def test_a_verdict_is_found_once_per_machine(emulated_metal, tmp_path):
    assert kernels.usable(DECODE, 64, mx.float32)
    calls = len(emulated_metal.calls)
    assert calls
    kernels._agrees.cache_clear()  # as another process
    assert kernels.usable(DECODE, 64, mx.float32)
    assert len(emulated_metal.calls) == calls
    (tmp_path / "cache" / "ahn-mlx" / "kernels.json").write_text("not json")
    kernels._agrees.cache_clear()
    assert kernels.usable(DECODE, 64, mx.float32)
    assert len(emulated_metal.calls) > calls


def test_what_does_not_fit_or_is_switched_off(emulated_metal, monkeypatch):
    assert not kernels.usable(DECODE, 80, mx.float32)
    assert not kernels.usable(DECODE, 64, mx.int32)
    monkeypatch.setenv("AHN_METAL", "0")
    assert not kernels.usable(DECODE, 64, mx.float32)
    (line,) = doctor.examine_kernels()
    assert "switched off" in line.value
    assert not emulated_metal.calls


@pytest.mark.slow
def test_doctor_lists_every_kernel(any_metal):
    findings = doctor.examine_kernels()
    assert [f.name for f in findings] == [check.name for check in KERNELS]
    for finding in findings:
        assert finding.value.startswith("compiled, error "), finding
        assert "in float32 and" in finding.value and not finding.mend
    assert "2 dispatches" in findings[0].value and "1 dispatch," in findings[1].value


@pytest.mark.slow
def test_doctor_reports_what_is_broken(any_metal, monkeypatch):
    sound = kernels.source
    monkeypatch.setattr(kernels, "source", lambda file: sound(file).replace("out / total", "out"))
    finding = doctor.examine_kernels()[0]
    assert "is off by" in finding.value and finding.mend


def test_without_metal() -> None:
    if mx.metal.is_available():
        pytest.skip("there is Metal")
    (line,) = doctor.examine_kernels()
    assert line.value.startswith("no Metal device")
    assert not kernels.usable(DECODE, 64, mx.float32)
    assert Path(kernels._PLACES[1]).is_dir()


@pytest.mark.parametrize(
    "text", ["5", "[]", "null", "[" * 10**5, '{"a": null, "b": ["c"], "d": 1}']
)
def test_what_is_no_verdict_is_not_believed(tmp_path, text):
    (tmp_path / "kernels.json").write_text(text)
    assert kernels._read(tmp_path / "kernels.json") == {}
    (tmp_path / "kernels.json").write_text('{"a": null, "b": "is off", "c": ""}')
    assert kernels._read(tmp_path / "kernels.json") == {"b": "is off", "c": ""}
