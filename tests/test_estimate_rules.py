"""What `estimate` and `models` print, against what the counting functions say of the same."""

import json
import struct
from dataclasses import replace

import pytest
from checkpoints import GOLDEN, make_base
from click.testing import CliRunner

from ahn_mlx import AHNError
from ahn_mlx.checkpoints.baseconfig import read_config
from ahn_mlx.cli import cli, models
from ahn_mlx.cli import estimate as counting
from ahn_mlx.errors import AHNError as Refused
from ahn_mlx.hub.published import MODELS
from ahn_mlx.measure import chips, cost, ranks, speed
from ahn_mlx.model.config import AHNConfig

KINDS = ["full", "window", "ahn"]
MERGED = GOLDEN / "qwen2-gdn" / "merged"


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))


def run(*words):
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert done.exit_code == 0, done.exception or done.output
    return done


def counted(*words):
    return json.loads(run("estimate", *words, "--json").stdout)


def options(**more):
    common = {"name": "ahn-gdn-3b", "window": None, "sinks": None, "memory": None}
    common |= {"kv_bits": None, "weight_bits": "4", "ranks": 1, "pipeline": False}
    return {**common, **more}


# --- numbers of tokens ---


@pytest.mark.parametrize(
    ("typed", "tokens"),
    [
        *(("1", 1), ("0.001k", 1), ("1k", 1024), ("2 K", 2048), ("1.5m", 1_572_864), ("1p", 400)),
        *(("10_0,0", 1000), (str(10**12), 10**12), ("0.5p", 200), (3, 3), ("1.4", 1), ("1.6", 2)),
    ],
)
def test_a_number_of_tokens(typed, tokens):
    found = counting.Tokens().convert(typed, None, None)
    assert found == tokens and type(found) is int


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        *(
            (t, "must be from 1 to 1,000,000,000,000 tokens")
            for t in ("0.9", "-1", "0", 10**12 + 1)
        ),
        *((t, "is not a number of tokens, such as") for t in ("", "k", "1kk", "1e3", "1.", ".5")),
    ],
)
def test_what_is_no_number_of_tokens(typed, said):
    with pytest.raises(Exception, match=said):
        counting.Tokens().convert(str(typed), None, None)


# --- what is counted ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_bits", "weight_bits"), [(None, "4"), ("8", "0"), ("4", "8")])
def test_numbers_are_those_of_the_counts(kind, kv_bits, weight_bits):
    name, tokens = "ahn-gdn-3b", 50_000
    shape = cost.shape_by_name(name, MODELS[name].settings)
    words = ["--model", name, "--context", tokens, "--q-bits", weight_bits]
    found = counted(*words, *(["--kv-bits", kv_bits] if kv_bits else []))[kind]
    bits = {"4": 4.5, "8": 8.5, "0": 16}[weight_bits]
    quantized = None if kind == "full" or kv_bits is None else int(kv_bits)
    cache = cost.cache_bytes(shape, kind, tokens, kv_bits=quantized)
    weights = cost.weight_bytes(shape, bits)
    if kind != "ahn":  # which have no memory
        weights = cost.weight_bytes(replace(shape, gates=0, readout=0, memory_vectors=0), bits)
    assert found["prefill_flops"] == cost.flops(shape, kind, tokens)
    assert found["decode_flops"] == cost.flops(shape, kind, 1, before=tokens)
    assert found["weight_bytes"] == weights and found["cache_bytes"] == cache
    # All is read once, and the state is written again.
    assert found["decode_bytes"] == weights + sum(cache.values()) + cache["state"]
    for gb in (16, 32, 64, 128, 512):
        room = int(0.75 * gb * 1e9)
        rows = cost.rows_that_fit(sum(cache.values()), weights, room)
        assert found["rows"][str(gb)] == rows
    assert len(found["rows"]) == 5 and "rank" not in found


def test_experts_that_a_token_does_not_take_are_not_read():
    shape = cost.shape_by_name("ahn-gdn-3b", MODELS["ahn-gdn-3b"].settings)
    mixed = replace(shape, experts=1000 * 64, taken=125 * 64)
    found = counting._count(mixed, "window", 100, options())
    held = found["weight_bytes"] + sum(found["cache_bytes"].values())
    assert held - found["decode_bytes"] == 875 * 64 * 4.5 / 8


@pytest.mark.parametrize("pipeline", [False, True])
def test_of_several_ranks_the_one_that_has_most_is_counted(pipeline):
    name, tokens, count = "ahn-gdn-3b", 70_000, 2
    shape = cost.shape_by_name(name, MODELS[name].settings)
    words = ["--model", name, "--context", tokens, "--ranks", count]
    for kind, found in counted(*words, *(["--pipeline"] if pipeline else [])).items():
        if kind not in KINDS:
            continue
        parts = [ranks.part(shape, count, rank, pipeline) for rank in range(count)]
        held = []
        for part in parts:
            weights = cost.weight_bytes(part, 4.5)
            weights -= 0 if kind == "ahn" else 2 * part.memory_parameters
            held.append((weights, cost.cache_bytes(part, kind, tokens)))
        most = max(held, key=lambda pair: pair[0] + sum(pair[1].values()))
        assert found["rank"] == {
            "weight_bytes": most[0],
            "cache_bytes": most[1],
            "sent_bytes": ranks.sent(shape, kind, count, pipeline)._asdict(),
        }


def test_a_chip_is_called_in_letters_of_any_size():
    said = run("estimate", "--chip", "M4-Pro").stdout
    assert "bounds of an m4-pro (273 GB/s), not measured" in said


def test_the_curve_has_these_contexts():
    found = counted("--context", 16384, "--compare", "window,ahn")
    assert found["context"] == 16384 and list(found) == ["context", "window", "ahn", "curve"]
    contexts = ["4096", "16384", "32768", "65536", "131072", "262144", "1048576"]
    assert list(found["curve"]) == contexts
    assert found["curve"]["16384"] == {kind: found[kind] for kind in ("window", "ahn")}
    assert counted()["context"] == 131_072 and list(counted())[1:4] == KINDS


# --- what is counted of which model ---


def shape_of(**more):
    return counting._shape(options(**more))


def test_settings_that_were_typed_are_counted():
    plain = shape_of().ahn
    assert plain == MODELS["ahn-gdn-3b"].settings
    assert shape_of(window=9, sinks=2, memory="mamba2").ahn == replace(
        plain, window=9, sinks=2, memory="mamba2"
    )
    assert shape_of(sinks=0).ahn.sinks == 0  # which is a number
    base = shape_of(name="Qwen/Qwen2.5-3B-Instruct", window=9)
    assert base.ahn == AHNConfig(window=9) and base.parameters == shape_of().parameters


def test_a_directory_is_what_it_says_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = AHNConfig.from_dict(read_config(MERGED))
    (tmp_path / "ahn-gdn-3b").symlink_to(MERGED)
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen/Qwen2.5-3B-Instruct").symlink_to(MERGED)
    for name in ("ahn-gdn-3b", "Qwen/Qwen2.5-3B-Instruct", str(MERGED)):
        found = shape_of(name=name)
        assert found.layers == 3 and found.ahn == own
    assert shape_of(name=str(MERGED), window=5).ahn == replace(own, window=5)
    base = shape_of(name=str(GOLDEN / "qwen2-gdn" / "base"))
    assert base.ahn == AHNConfig() and base.layers == 3


def test_config_of_what_was_named(tmp_path, monkeypatch):
    name = "ahn-dn-7b"
    found = counting.config_of(options(name=name))
    assert found["ahn"] == MODELS[name].settings.to_dict() and found["hidden_size"] == 3584
    found = counting.config_of(options(name="Qwen/Qwen2.5-7B-Instruct", sinks=3))
    assert found["ahn"] == {**AHNConfig().to_dict(), "sinks": 3} and found["hidden_size"] == 3584
    here = tmp_path / "x/ahn-mlx/models/me--mine"
    here.parent.mkdir(parents=True)
    here.symlink_to(MERGED)
    found = counting.config_of(options(name="me/mine", memory="deltanet"))
    assert found["num_hidden_layers"] == 3 and found["ahn"]["memory"] == "deltanet"
    asked = []

    def config_dir(repo):
        asked.append(repo)
        return GOLDEN / "qwen2-dn" / "merged"

    monkeypatch.setattr("ahn_mlx.hub.download.config_dir", config_dir)
    found = counting.config_of(options(name="you/yours"))
    assert asked == ["you/yours"] and found["ahn"]["memory"] == "deltanet"
    for none in ("me/mine/too", "nix", "a b/c", "me/", "/mine"):
        with pytest.raises(Refused, match="no model"):
            counting.config_of(options(name=none))
    assert asked == ["you/yours"]


# --- what is printed ---


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("words", [(), ("--ranks", 2), ("--compare", "ahn,full", "--kv-bits", "8")])
def test_the_tables_have_what_was_counted(words):
    words = ("--model", "ahn-gdn-3b", "--context", "128k", *words)
    found = counted(*words)
    curve = found.pop("curve")
    del found["context"]
    lines = run("estimate", *words).stdout.splitlines()
    assert lines[:3] == [
        "ahn-gdn-3b: 3,099M parameters, gated_deltanet,",
        "window 32,640 + 128 sinks; after 131,072 tokens",
        "",
    ]
    expected = [["", *found], None]

    def add(title, unit, number, of=found):
        expected.append([title, *(f"{number(c) / unit:,.3f}" for c in of.values())])

    add("prefill, PFLOP", 1e15, lambda c: sum(c["prefill_flops"].values()))
    for name in ("projections", "attention", "mlp", "head", "memory"):
        add(name, 1e15, lambda c, name=name: c["prefill_flops"].get(name, 0))
    add("decode, GFLOP/token", 1e9, lambda c: sum(c["decode_flops"].values()))
    add("weights, GB", 1e9, lambda c: c["weight_bytes"])
    add("cache, GB", 1e9, lambda c: sum(c["cache_bytes"].values()))
    for name in ("keys, values", "gates", "state"):
        add(name, 1e9, lambda c, name=name: c["cache_bytes"].get(name, 0))
    add("decode, GB/token", 1e9, lambda c: c["decode_bytes"])
    macs = (8, 16, 24, 32, 36, 48, 64, 96, 128, 256, 512)

    def fits(c):
        held = c["weight_bytes"] + sum(c["cache_bytes"].values())
        return str(next(gb for gb in macs if held <= 0.75 * gb * 1e9))

    expected.append(["fits Macs from, GB", *map(fits, found.values())])
    if "--ranks" in words:
        each = {kind: c["rank"] for kind, c in found.items()}
        expected.append(["each of 2 ranks", *("" for _ in found)])
        add("weights, GB", 1e9, lambda c: c["weight_bytes"], each)
        add("cache, GB", 1e9, lambda c: sum(c["cache_bytes"].values()), each)
        add("state", 1e9, lambda c: c["cache_bytes"]["state"], each)
        expected.append(["fits Macs from, GB", *map(fits, each.values())])
        add("gives, kB/token", 1e3, lambda c: c["sent_bytes"]["payload"], each)
        add("sends in a ring", 1e3, lambda c: c["sent_bytes"]["ring"], each)
    n = 3 + len(expected)
    assert [None if "---" in x else cells(x) for x in lines[3:n]] == expected
    assert lines[n : n + 2] == [
        "`ahn-mlx bench` measures this machine; then this says how long reading takes",
        "",
    ]
    assert lines[n + 2].startswith("By GB of a Mac: answers at a time")
    table = [cells(x) for x in lines[n + 3 : n + 10] if "---" not in x]
    servers = ["16", "32", "64", "128", "512"]
    assert table == [
        ["GB", *found],
        *([gb, *(f"{c['rows'][gb]:,}" for c in found.values())] for gb in servers),
    ]
    assert lines[n + 10 : n + 12] == [
        "",
        "By context: GB of cache, and GFLOP (GF) for one more token.",
    ]
    table = [cells(x) for x in lines[n + 12 :] if "---" not in x]
    assert table == [
        ["context", *(f"{kind} GB" for kind in found), *(f"{kind} GF" for kind in found)],
        *(
            [
                f"{int(at):,}",
                *(f"{sum(c['cache_bytes'].values()) / 1e9:.3f}" for c in each.values()),
                *(f"{sum(c['decode_flops'].values()) / 1e9:.2f}" for c in each.values()),
            ]
            for at, each in curve.items()
        ),
    ]


def test_parts_are_below_what_they_are_parts_of():
    lines = run("estimate", "--ranks", 2, "--model", "ahn-gdn-3b").stdout.splitlines()
    titles = [line[2:].split("|")[0].rstrip() for line in lines[5:27]]
    below = [title for title in titles if title.startswith(" ")]
    assert [title.strip() for title in below if title.startswith("    ")] == ["state"]
    assert len(below) == 5 + 3 + 6 and below[0] == "  projections"


def test_what_layers_of_other_kinds_keep_has_its_rows():
    shape = cost.shape_by_name("ahn-gdn-3b", MODELS["ahn-gdn-3b"].settings)
    for beside, rows in (
        (cost.Beside(), []),
        (cost.Beside(windows=((512, 4096),)), ["beside"]),
        (cost.Beside(states=1000, wide=10), ["recurrence", "beside"]),
    ):
        mixed = replace(shape, beside=beside)
        given = options(context=9, chip=None)
        found = {kind: counting._count(mixed, kind, 9, given) for kind in KINDS}
        curve = {9: found}
        out = CliRunner()
        with out.isolation() as streams:
            counting._print(mixed, found, curve, given)
            said = streams[0].getvalue().decode()
        assert [w for w in ("recurrence", "beside") if f"|   {w}" in said] == rows


@pytest.mark.parametrize("chip", ["m1-max", "m4-pro"])
def test_times_are_bounds_or_what_was_measured(chip):
    words = ("--model", "ahn-gdn-3b", "--context", "1M")
    found = counted(*words)
    work = [sum(found[kind]["prefill_flops"].values()) for kind in KINDS]
    speed.record("ahn-gdn-3b", 2e12)
    lines = run("estimate", *words, "--chip", chip).stdout.splitlines()
    rows = {cells(line)[0]: cells(line)[1:] for line in lines if line.startswith("|")}
    assert rows["reads it in about"] == [f"{w / 2e12 / 3600:,.1f} h" for w in work]
    assert "about: at the 2,000.0 GFLOP/s that bench measured here" in lines
    bandwidth, peak = {"m1-max": (400, 10.4), "m4-pro": (273, None)}[chip]
    assert rows["tokens/s, at most"] == [
        f"{bandwidth * 1e9 / found[kind]['decode_bytes']:,.1f}" for kind in KINDS
    ]
    least = rows.get("reads it in at least")
    hours = [w / 10.4e12 / 3600 for w in work]
    said = [f"{hours[0]:.1f} h", *(f"{60 * h:.0f} min" for h in hours[1:])]
    assert least == (said if peak else None)
    limits = "400 GB/s, 10.4 TFLOP/s" if peak else "273 GB/s"
    assert f"at least, at most: bounds of an {chip} ({limits}), not measured" in lines
    assert not any("`ahn-mlx bench` measures" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (89.4, "89 s"), (90, "2 min")),
        *((5399, "90 min"), (5400, "1.5 h"), (36e6, "10,000.0 h"), (150.1, "3 min")),
    ],
)
def test_a_duration_has_the_unit_that_people_take(seconds, said):
    assert counting._duration(seconds) == said


def test_a_mac_is_large_enough_for_three_quarters_of_its_memory():
    def fits(weights, state=0):
        return counting._fits({"weight_bytes": weights, "cache_bytes": {"a": state, "b": 1}})

    assert fits(6 * 10**9 - 1) == "8" and fits(6 * 10**9) == "16"
    assert fits(0, 384 * 10**9 - 1) == "512" and fits(0, 384 * 10**9) == "none"
    sizes = [fits(int(gb * 0.75e9) - 1) for gb in (8, 16, 24, 32, 36, 48, 64, 96, 128, 256, 512)]
    assert sizes == ["8", "16", "24", "32", "36", "48", "64", "96", "128", "256", "512"]


def test_the_papers_table_stands_as_in_the_documents():
    written = (GOLDEN.parent.parent / "docs/performance.md").read_text()
    printed = run("estimate", "--paper").stdout.splitlines()
    assert len(printed) == 11
    begin = written.splitlines().index(
        next(x for x in written.splitlines() if cells(x) == cells(printed[0]))
    )
    rows = [cells(line) for line in written.splitlines()[begin + 2 :]]
    for line in printed[2:]:
        assert cells(line) in rows


def test_a_table_is_one_to_the_eye(capsys):
    counting.print_table(["a", "bcd"], [["long", "1"], ["", "23456"]])
    assert capsys.readouterr().out.splitlines() == [
        "| a    | bcd   |",
        "| ---- | ----- |",
        "| long | 1     |",
        "|      | 23456 |",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "full,"], "--compare takes full, window, ahn, not 'full,'"),
        (["--ranks", "2"], "3 key/value heads cannot be divided among 2 ranks"),
        (["--out", "a.txt"], "a.txt: give a name that ends in .png, .svg, .pdf"),
    ],
)
def test_what_estimate_refuses(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["estimate", *words])
    error = done.exception
    assert isinstance(error, AHNError) and said in str(error) and not done.stdout


def test_a_picture_does_not_replace_the_model(tmp_path):
    base = make_base(tmp_path / "base")
    (base / "a.png").write_bytes(b"tEXtSoftware\0ahn-mlx")
    words = ["estimate", "--model", str(base), "-o"]
    done = CliRunner().invoke(cli, [*words, str(base / "a.png"), "--force"])
    assert "is what this command reads" in str(done.exception)
    (tmp_path / "b.png").write_bytes(b"not ours")
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "b.png")])
    assert "is there and is not a picture of ours; choose another name, or --force" in str(
        done.exception
    )
    run(*words, tmp_path / "b.png", "--force")
    assert (tmp_path / "b.png").read_bytes()[1:4] == b"PNG"


# --- the picture ---

LOOKS = {
    "full": ("full attention", "#D55E00", "-", "o"),
    "window": ("window alone", "#0072B2", "--", "s"),
    "ahn": ("window and memory", "#009E73", "-.", "^"),
}


@pytest.mark.parametrize("kinds", [KINDS, ["ahn"]])
def test_a_picture_of_costs_by_context(kinds, tmp_path, drawn):
    words = ("--model", "ahn-gdn-3b", "--compare", ",".join(kinds))
    done = run("estimate", *words, "-o", tmp_path / "a.png")
    assert done.stderr == f"wrote {tmp_path / 'a.png'}\n"
    curve = counted(*words)["curve"]
    figure, how = drawn[-1]
    assert how["dpi"] == 150 and how["format"] == "png"
    size = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert size == (1650, 675)
    assert figure.get_suptitle() == "ahn-gdn-3b, by how many tokens it has read"
    assert [axes.get_title() for axes in figure.axes] == [
        "memory for its cache",
        "work for one more token",
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == ["GB", "GFLOP"]
    left, right = (axes.get_position() for axes in figure.axes)
    assert left.x1 < right.x0 and left.y0 == pytest.approx(right.y0)  # side by side
    for axes, key in zip(figure.axes, ("cache_bytes", "decode_flops"), strict=True):
        assert axes.get_xlabel() == "tokens read"
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.xaxis.get_transform().base == 2
        ticks = [t.get_text() for t in axes.get_xticklabels()]
        assert ticks == ["4k", "16k", "32k", "64k", "128k", "256k", "1M"]
        assert list(axes.get_xticks()) == [int(n) for n in curve]
        assert not list(axes.get_xticks(minor=True)) and not list(axes.get_yticks(minor=True))
        assert axes.yaxis.get_major_formatter()(1000.0, 0) == "1000"
        assert axes.margins()[1] == 0.15
        assert all(x.get_visible() and x.get_alpha() == 0.3 for x in axes.get_xgridlines())
        ends = {}
        for kind, line in zip(kinds, axes.lines, strict=True):
            values = [sum(at[kind][key].values()) / 1e9 for at in curve.values()]
            assert list(line.get_xdata()) == [int(n) for n in curve]
            assert list(line.get_ydata()) == values
            style = (line.get_color(), line.get_linestyle(), line.get_marker())
            assert style == LOOKS[kind][1:]
            ends[kind] = values[-1]
        for kind, text in zip(kinds, axes.texts, strict=True):
            assert (text.get_text(), text.get_color()) == LOOKS[kind][:2]
            assert text.xy == (1_048_576, ends[kind]) and text.get_ha() == "right"
            lowest = len(kinds) > 1 and ends[kind] == min(ends.values())
            assert text.xyann == ((4, -16) if lowest else (4, 9))
            assert text.anncoords == "offset points"


@pytest.mark.parametrize(
    ("tokens", "said"), [(4096, "4k"), (1024**2 - 1024, "1023k"), (1024**2, "1M"), (3 << 20, "3M")]
)
def test_contexts_as_the_picture_names_them(tokens, said):
    assert counting._short(tokens) == said


# --- models ---


def rows_of(*words):
    return {
        row["name"]: row for row in json.loads(run("models", *words, "--json").stdout)["models"]
    }


def test_what_is_known_of_a_published_model(tmp_path):
    row = rows_of()["ahn-gdn-7b"]
    shape = cost.shape_by_name("ahn-gdn-7b", MODELS["ahn-gdn-7b"].settings)
    base, memory = shape.parameters - shape.memory_parameters, shape.memory_parameters
    weights = cost.weight_bytes(shape, 4.5)
    cache = sum(cost.cache_bytes(shape, "ahn", 32640 + 128 + 1, models.NUMBER).values())
    work = cost.working_bytes(shape, 3584, 18944, 2048, models.NUMBER)
    assert row == {
        "name": "ahn-gdn-7b",
        "base": "Qwen/Qwen2.5-7B-Instruct",
        "kind": "gated_deltanet",
        "base_parameters": base,
        "memory_parameters": memory,
        "download_bytes": 2 * (base + memory),
        "disk_bytes": weights,
        "memory_bytes": weights + cache + work,
        "on_this_machine": [],
        "fits": weights + cache + work <= 0.75 * chips.machine_memory(),
    }
    whole = json.loads(run("models", "--json").stdout)
    assert whole["directory"] == str(tmp_path / "x/ahn-mlx/models")
    assert whole["machine_bytes"] == chips.machine_memory()
    assert [row["name"] for row in whole["models"]] == list(MODELS)


def test_numbers_are_as_wide_as_this_machine_computes():
    assert {"darwin": 2}.get(__import__("sys").platform, 4) == models.NUMBER


def test_ours_takes_the_room_of_its_package(tmp_path):
    row = rows_of()["ahn-gdn-smollm2-135m"]
    shape = cost.shape_by_name(row["name"], MODELS[row["name"]].settings)
    weights = cost.weight_bytes(shape, 8 * models.NUMBER)
    cache = sum(cost.cache_bytes(shape, "ahn", 1024 + 64 + 1, models.NUMBER).values())
    work = cost.working_bytes(shape, 576, 1536, 2048, models.NUMBER)
    assert row["memory_bytes"] == weights + cache + work and row["download_bytes"] is None
    for place in row["on_this_machine"]:
        assert place["path"].endswith(".gguf") and place["bits"] is None
        assert place["bytes"] == row["disk_bytes"] > 9 * 10**7
    assert bool(row["on_this_machine"]) == (row["disk_bytes"] is not None)


@pytest.fixture
def kept(tmp_path):
    """Models on this machine."""
    place = tmp_path / "x/ahn-mlx/models"
    place.mkdir(parents=True)
    (place / "me--mine--too").symlink_to(MERGED)
    for name, size in (("ahn-gdn-3b", 7), ("ahn-gdn-3b-8bit", 5), ("odd-xbit", 3)):
        (place / name).mkdir()
        (place / name / "a").write_bytes(b"x" * size)
        (place / name / "b").write_bytes(b"x")
        (place / name / "within").mkdir()
    return place


def test_what_is_on_this_machine(kept):
    rows = rows_of()
    assert rows["ahn-gdn-3b"]["on_this_machine"] == [
        {"path": str(kept / "ahn-gdn-3b"), "bits": None, "bytes": 8},
        {"path": str(kept / "ahn-gdn-3b-8bit"), "bits": 8, "bytes": 6},
    ]
    assert list(rows)[len(MODELS) :] == ["me/mine--too", "odd-xbit"]
    odd = rows["odd-xbit"]  # no config.json
    assert odd == {
        **{"name": "odd-xbit", "base": None, "kind": None, "base_parameters": None},
        **{"memory_parameters": None, "download_bytes": None, "memory_bytes": None},
        **{"disk_bytes": 4, "fits": None},
        "on_this_machine": [{"path": str(kept / "odd-xbit"), "bits": None, "bytes": 4}],
    }
    own = rows["me/mine--too"]
    config = read_config(MERGED)
    shape = cost.shape_of({**config, "ahn": AHNConfig.from_dict(config).to_dict()})
    size = sum(f.stat().st_size for f in MERGED.iterdir() if f.is_file())
    sizes = config["hidden_size"], config["intermediate_size"]
    cache = sum(cost.cache_bytes(shape, "ahn", shape.ahn.capacity + 1, models.NUMBER).values())
    assert own["disk_bytes"] == size and own["kind"] == "gated_deltanet" and own["base"] is None
    assert own["memory_parameters"] == shape.memory_parameters
    assert own["base_parameters"] == shape.parameters - shape.memory_parameters
    work = cost.working_bytes(shape, *sizes, 2048, models.NUMBER)
    assert own["memory_bytes"] == size + cache + work


def test_a_base_without_a_size_of_its_mlp_has_four_times_the_hidden():
    shape = cost.shape_by_name("ahn-gdn-3b", MODELS["ahn-gdn-3b"].settings)
    plain, given = (
        models._needs(shape, {"hidden_size": 2048, **more}, 5)
        for more in ({}, {"intermediate_size": 8192})
    )
    assert plain == given > models._needs(shape, {"hidden_size": 2048}, 4)


def test_the_list_is_a_table(kept):
    lines = run("models").stdout.splitlines()
    head = "name                     weights  download    disk"
    assert lines[0].startswith(head) and lines[0].endswith("memory  fits  here")
    assert all(line == line.rstrip() for line in lines)
    found = {line.split()[0]: line for line in lines if line and line[0] != " "}
    assert found["ahn-gdn-3b"].endswith("yes, 8bit")
    assert found["odd-xbit"].split() == ["odd-xbit", "?", "-", "0.0", "GB", "-", "?", "yes"]
    numbers = found["ahn-gdn-7b"].split()
    row = rows_of()["ahn-gdn-7b"]
    assert numbers[1] == "7.6B" and numbers[2:4] == [f"{row['download_bytes'] / 1e9:.1f}", "GB"]
    assert found["ahn-dn-smollm2-135m"].split()[1] == "136M"
    # Numbers end where their title does; who is here begins there.
    at = lines[0].index("here")
    assert all(line[at - 2 : at] == "  " for line in lines[1:16] if len(line) > at)
    assert found["ahn-gdn-7b"][: lines[0].index("weights") + 7].endswith("7.6B")
    n = lines.index("")
    assert lines[n + 1 : n + 4] == [
        "disk, memory: with a base of 4 bits and a full window; memory is an estimate.",
        f"fits: into 75% of the {chips.machine_memory() / 1e9:.0f} GB that this machine has.",
        f"converted models are in {kept}",
    ]
    assert len(lines) == n + 4


def test_a_name_of_24_characters_has_a_line_of_its_own(kept):
    for size in (23, 24):
        (kept / ("n" * size)).mkdir()
    lines = run("models").stdout.splitlines()
    at = lines.index("n" * 24)
    assert lines[at + 1].startswith(" " * 23 + "  ") and lines[at + 1].split()[0] == "?"
    assert lines[at - 1].startswith("n" * 23 + "  ") and "?" in lines[at - 1]


def test_one_model_and_what_to_do_with_it(kept):
    lines = run("models", "ahn-gdn-3b").stdout.splitlines()
    assert lines[1].startswith("ahn-gdn-3b ") and lines[2] == ""
    assert lines[-1] == "ahn-mlx estimate ahn-gdn-3b  # counts what it costs" and len(lines) == 7
    lines = run("models", "ahn-gdn-7b").stdout.splitlines()
    assert lines[-2] == "ahn-mlx pull ahn-gdn-7b  # downloads and converts it" and len(lines) == 8
    done = CliRunner().invoke(cli, ["models", "ahn-gdn-3"])
    assert str(done.exception) == "no model 'ahn-gdn-3'; did you mean ahn-gdn-3b?"


@pytest.mark.parametrize(("weights", "said"), [(10**9, "1.0B"), (999_499_999, "999M")])
def test_weights_are_in_millions_or_billions(weights, said):
    row = dict.fromkeys(("download_bytes", "disk_bytes", "memory_bytes", "fits"))
    row |= {"name": "a", "base_parameters": weights - 5, "memory_parameters": 5}
    found = models._cells({**row, "on_this_machine": []})
    assert found == ("a", said, "-", "-", "-", "?", "-")
    here = [{"bits": None}, {"bits": 4}]
    found = models._cells({**row, "disk_bytes": 1.26e9, "fits": False, "on_this_machine": here})
    assert found == ("a", said, "-", "1.3 GB", "-", "no", "yes, 4bit")


def test_pull_and_rm_do_as_they_are_told(kept, monkeypatch):
    asked = []

    def pull(*words):
        asked.append(words)
        return "got it"

    monkeypatch.setattr("ahn_mlx.hub.download.pull", pull)
    assert run("pull", "ahn-gdn-3b").stdout == "got it\n"
    run("pull", "ahn-gdn-3b", "--q-bits", "0", "--revision", "a", "--base-revision", "b")
    run("pull", "me/mine", "--revision", "v1")
    assert asked == [
        ("ahn-gdn-3b", None, None, None),
        ("ahn-gdn-3b", 0, "a", "b"),
        ("me/mine", None, "v1", None),
    ]
    for option in ("--q-bits", "--revision", "--base-revision"):
        done = CliRunner().invoke(cli, ["pull", "ahn-gdn-smollm2-135m", option, "4"])
        assert f"{option} has no effect on ahn-gdn-smollm2-135m, which comes" in str(done.exception)
    assert sorted(run("rm", "ahn-gdn-3b").stdout.splitlines()) == [
        f"removed {kept / 'ahn-gdn-3b'}",
        f"removed {kept / 'ahn-gdn-3b-8bit'}",
    ]
    assert not (kept / "ahn-gdn-3b").exists()
