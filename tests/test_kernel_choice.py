"""Which of two forms serves: by a clock that only they move on, without any Metal."""

import itertools
import json
import threading
import time
from dataclasses import replace

import mlx.core as mx
import pytest
from emulator import EmulatedMetal
from kernel_clock import Clock

from ahn_mlx.ops import kernels, window
from ahn_mlx.ops.kernels import Sizes, chosen
from ahn_mlx.ops.ring import Place

SIZES = Sizes(64, mx.float32, heads=8, kv_heads=2, window=1000, sinks=64, chunk=300)

# On which every kernel is compared.
SMALL = Sizes(64, mx.float32).window


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A Mac where nothing is known yet; where its findings are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AHN_METAL", raising=False)
    another_process()
    with EmulatedMetal().in_place():
        yield tmp_path / "ahn-mlx" / "kernels.json"
    another_process()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def another_process():
    kernels._agrees.cache_clear()
    kernels._CLOCK = kernels._Clock()


def timed(clock):
    """The sizes that forms have run with since the last time, but for comparing them."""
    asked = {sizes for sizes in clock.asked if sizes.window != SMALL}
    clock.asked.clear()
    return asked


@pytest.mark.parametrize(("ours", "serves"), [(0.01, True), (0.03, False), (0.02, False)])
def test_the_faster_serves_and_of_two_alike_mlx(clock, ours, serves):
    assert chosen(clock.check(ours, 0.02), SIZES) is serves
    assert timed(clock) == {SIZES}  # at the sizes that were asked for


def test_calls_too_short_to_time_alone_are_timed_together(clock, recwarn):
    assert chosen(clock.check(1e-5, 2e-5), SIZES)
    assert not chosen(clock.check(0.0, 0.0, "no time at all"), SIZES)
    assert len(clock.asked) > 100 and not recwarn


@pytest.mark.parametrize(("ours", "theirs"), [(1e-5, 2e-5), (3e-5, 1e-5), (0.01, 0.02)])
def test_what_is_found_are_seconds_of_one_call(clock, ours, theirs):
    """And little of what all calls together take to begin."""
    clock.launch = 2e-5
    assert clock.check(ours, theirs).times(SIZES) == pytest.approx((ours, theirs), rel=0.1)


def test_a_round_that_is_disturbed_does_not_count(clock):
    check = clock.check(0.01, 0.02)
    lost = itertools.cycle([0.05, 0.0])

    def disturbed(x, sizes):
        clock.now += next(lost)
        return check.ours(x, sizes)

    assert chosen(replace(check, ours=disturbed), SIZES)


def test_forced_and_forbidden(clock, monkeypatch):
    slow, wrong = clock.check(9.0, 1.0), clock.check(1.0, 9.0, "wrong", lambda x, sizes: x + 1)
    monkeypatch.setenv("AHN_METAL", "0")
    assert not chosen(clock.check(1.0, 9.0), SIZES)
    assert not clock.asked  # not even compared
    monkeypatch.setenv("AHN_METAL", "1")
    assert chosen(slow, SIZES)
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert not chosen(wrong, SIZES)
    assert not timed(clock)
    monkeypatch.delenv("AHN_METAL")
    assert not chosen(slow, SIZES)


def test_the_faster_is_not_taken_where_it_differs(clock, recwarn):
    check = clock.check(0.01, 0.02, change=lambda x, sizes: 1.01 * x)
    for _ in range(3):
        assert not chosen(check, SIZES)
    (warning,) = recwarn
    assert "copy (head size 64, float32) is off by" in str(warning.message)
    assert not timed(clock)


def test_a_form_that_fails_at_the_sizes_asked_for(clock, recwarn):
    def change(x, sizes):
        if sizes.window != SMALL:
            raise RuntimeError("out of\nmemory")
        return x

    check = clock.check(0.01, 0.02, change=change)
    for _ in range(3):
        assert not chosen(check, SIZES)
    (warning,) = recwarn
    assert "could not be timed (out of memory); MLX's own operations serve" in str(warning.message)


def test_an_error_is_told_in_short(clock, recwarn):
    def change(x, sizes):
        raise RuntimeError("word " * 1000)

    assert not chosen(clock.check(0.01, 0.02, change=change), SIZES)
    (warning,) = recwarn
    assert str(warning.message).count("word") == 40


@pytest.mark.parametrize(("D", "serves"), [(8, False), (16, True), (128, True), (129, False)])
def test_of_the_head_sizes_that_there_are(clock, D, serves):
    assert chosen(clock.check(0.01, 0.02), SIZES._replace(D=D)) == serves


def test_not_where_the_processor_is_the_device(clock, monkeypatch):
    check = clock.check(0.01, 0.02)
    for owner, name, found in (
        (mx, "default_device", mx.Device(mx.cpu)),
        (mx.metal, "is_available", False),
    ):
        with monkeypatch.context() as there:  # which ends before the emulator does
            there.setattr(owner, name, lambda found=found: found)
            assert not chosen(check, SIZES)
    assert chosen(check, SIZES)


@pytest.mark.parametrize("clamped", [False, True])
def test_a_kernel_is_tried_with_the_sinks_queries_that_it_will_have(clamped):
    sizes = SIZES._replace(clamped=clamped, chunk=1)
    assert (window._decode_example(sizes, 9)[3] is not None) == clamped
    assert (window._prefill_example(sizes, 9)[3] is not None) == clamped


def test_a_decoding_kernel_is_timed_for_the_slots_that_there_are(monkeypatch):
    asked = []
    monkeypatch.setattr(window, "chosen", lambda check, sizes: asked.append(sizes))
    sizes = Sizes(64, mx.float32, window=37, sinks=5, chunk=1, clamped=True)
    q, buffers, scale, far, sinks, filled, following, seen = window._decode_example(sizes, 100)
    other = mx.zeros(1)
    place = Place(*(other,) * 4, following, other, None, filled, seen)
    window.attend_to_all(q, buffers, scale, far, sinks, place)
    assert asked == [sizes]


def test_sizes_that_are_alike_are_timed_once(clock):
    check = clock.check(0.001, 0.002)
    assert chosen(check, SIZES) and timed(clock)
    for alike in ({"window": 1984}, {"window": 961}, {"sinks": 25}, {"chunk": 257}, {"chunk": 512}):
        assert chosen(check, SIZES._replace(**alike))
        assert not timed(clock), alike
    others = [{"D": 128}, {"dtype": mx.bfloat16}, {"heads": 16}, {"kv_heads": 8}, {"clamped": True}]
    for other in [*others, {"window": 960}, {"window": 1985}, {"chunk": 256}, {"chunk": 1}]:
        assert chosen(check, SIZES._replace(**other))
        assert timed(clock) == {SIZES._replace(**other)}
    assert not chosen(clock.check(0.002, 0.001, "another kernel"), SIZES)


def test_sizes_that_are_alike_to_another_process(clock, machine):
    check = clock.check(0.001, 0.002)
    assert chosen(check, SIZES) and timed(clock)
    another_process()
    assert chosen(check, SIZES._replace(window=1500)) and not timed(clock)
    machine.unlink()
    assert chosen(check, SIZES._replace(window=1600)) and not timed(clock)


def test_the_same_numbers_are_compared_every_time(clock):
    seen = []
    check = clock.check(1, 1, change=lambda x, sizes: seen.append(x.tolist()) or x)
    assert check.error(64, mx.float32) == check.error(64, mx.float32) == 0.0
    mx.random.seed(0)
    assert seen == 2 * [(2 * mx.random.normal((4,))).tolist() for _ in range(2)]


def test_a_long_chunk_is_timed_by_a_part(clock):
    check = clock.check(0.001, 0.002)
    assert chosen(check, SIZES._replace(chunk=2048))
    assert timed(clock) == {SIZES._replace(chunk=512)}
    assert chosen(check, SIZES._replace(chunk=4000)) and not timed(clock)


def test_found_once_per_machine(clock, machine, monkeypatch):
    fast, slow = clock.check(0.01, 0.02), clock.check(0.02, 0.01, "slow")
    assert chosen(fast, SIZES) and not chosen(slow, SIZES)
    clock.asked.clear()
    another_process()
    assert chosen(fast, SIZES) and not chosen(slow, SIZES)
    assert not clock.asked
    for what, value in (("device_name", "M9"), ("version", "9.9"), ("source", "other")):
        with monkeypatch.context() as changed:
            changed.setattr(kernels, what, lambda *_, value=value: value)
            another_process()
            assert chosen(fast, SIZES) and timed(clock) == {SIZES}, what
    kept = json.loads(machine.read_text())
    assert [0.01, 0.02] in [[round(t, 9) for t in found] for found in kept.values() if found]


@pytest.mark.parametrize(
    "spoil",
    ["no times", None, 1, "0.1 0.2", [0.1], [0.1, "0.2"], [0.1, float("nan")], [0, 0.1], {}],
    ids=repr,
)
def test_a_finding_that_is_none_costs_only_the_measuring(clock, machine, spoil):
    check = clock.check(0.01, 0.02)
    assert chosen(check, SIZES) and timed(clock)
    kept = json.loads(machine.read_text())
    if spoil == "no times":  # as before kernels were timed
        kept = {key: found for key, found in kept.items() if found == ""}
    else:
        kept = {key: found and spoil for key, found in kept.items()}
    machine.write_text(json.dumps(kept))
    another_process()
    assert chosen(check, SIZES) and timed(clock) == {SIZES}
    another_process()
    assert chosen(check, SIZES) and not timed(clock)


@pytest.mark.parametrize("spoil", [None, 1, ["off"], {"a": 1}], ids=repr)
def test_a_verdict_that_is_none_costs_only_the_comparing(clock, machine, recwarn, spoil):
    check = clock.check(0.01, 0.02)
    assert chosen(check, SIZES)
    kept = json.loads(machine.read_text())
    machine.write_text(json.dumps({key: found or spoil for key, found in kept.items()}))
    clock.asked.clear()
    another_process()
    assert chosen(check, SIZES) and clock.asked and not timed(clock) and not recwarn


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "5", "null", "\udcff", '{"a": 1', "[" * 10**5]
)
def test_a_damaged_file_costs_only_the_measuring(clock, machine, text):
    check = clock.check(0.01, 0.02)
    machine.parent.mkdir()
    machine.write_bytes(text.encode(errors="surrogateescape"))
    assert chosen(check, SIZES) and timed(clock)
    another_process()
    assert chosen(check, SIZES) and not timed(clock)


def test_nowhere_to_keep_it(clock, machine):
    check = clock.check(0.01, 0.02)
    machine.parent.write_text("a file where the folder should be")
    assert chosen(check, SIZES) and timed(clock)
    assert chosen(check, SIZES) and not timed(clock)  # this process knows
    another_process()
    assert chosen(check, SIZES) and timed(clock)


def test_two_seconds_for_all(clock):
    """What there was no time for is MLX's own, and another process goes on."""
    checks = [clock.check(0.05, 0.06, f"kernel {n}") for n in range(20)]
    served, taken = [], []
    for check in checks:
        kernels._agrees(check, 64, mx.float32)
        before = clock.now
        served.append(chosen(check, SIZES))
        taken.append(clock.now - before)
    assert 1.5 <= sum(taken) <= 2.3
    n = served.index(False)
    assert n >= 4 and not any(served[n:]) and not any(taken[n:])
    clock.asked.clear()
    another_process()
    assert chosen(checks[0], SIZES) and not timed(clock)
    assert chosen(checks[n], SIZES) and timed(clock)


TRACED = {
    "compile": lambda f, x: mx.compile(f)(x),
    "compile with random numbers": lambda f, x: mx.compile(
        f, inputs=mx.random.state, outputs=mx.random.state
    )(x),
    "grad": lambda f, x: mx.grad(lambda x: 0.5 * (f(x) ** 2).sum())(x) / 2,
    "checkpoint": lambda f, x: mx.grad(lambda x: 0.5 * (mx.checkpoint(f)(x) ** 2).sum())(x) / 2,
    "vmap": lambda f, x: mx.vmap(f)(x),
}


@pytest.mark.parametrize("how", TRACED)
def test_first_asked_for_while_a_function_is_traced(clock, how):
    check = clock.check(0.01, 0.02)
    found = []

    def double(x):
        found.append(chosen(check, SIZES))
        return 2 * x

    mx.random.seed(5)
    expected = mx.random.normal((3,)).tolist()
    mx.random.seed(5)
    y = TRACED[how](double, mx.array([1.0, 2.0]))
    assert found[0] is True and timed(clock) == {SIZES}
    assert mx.allclose(y, mx.array([2.0, 4.0]))
    assert mx.random.normal((3,)).tolist() == expected  # nobody has drawn any


def test_first_asked_for_while_a_function_is_exported(clock, tmp_path):
    check = clock.check(0.01, 0.02)

    def double(x):
        return 2 * x if chosen(check, SIZES) else x

    file = str(tmp_path / "double.mlxfn")
    mx.export_function(file, double, mx.array([1.0]))
    assert mx.import_function(file)(mx.array([3.0]))[0].tolist() == [6.0]


def test_threads_wait_for_what_one_finds():
    """By the real clock: forms that sleep are never run side by side."""
    running, most, calls = 0, 0, 0

    def form(seconds):
        def run(x):
            nonlocal running, most, calls
            running, calls = running + 1, calls + 1
            most = max(most, running)
            time.sleep(seconds)
            running -= 1
            return x

        return run

    check = replace(Clock().check(0, 0), ours=form(0.001), theirs=form(0.02))
    check = replace(check, example=lambda sizes, before: (mx.random.normal((4,)),))
    found = []
    ask = [threading.Thread(target=lambda: found.append(chosen(check, SIZES))) for _ in range(4)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert found == [True] * 4 and most == 1
    before = calls
    assert chosen(check, SIZES) and calls == before
