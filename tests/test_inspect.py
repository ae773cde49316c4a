"""The page on a memory: its numbers against direct ones, and the page in a browser."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import talking_model
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ahn_mlx import AHNError, load_model
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.trace import BLOCK
from ahn_mlx.outputs.pages import COLORS
from ahn_mlx.reading import inspect as report
from ahn_mlx.reading.session import Session

TEXT = "It is a far, far better thing that I do, than I have ever done. " * 8
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module", params=["qwen2-gdn", "qwen2-dn", "qwen2-mamba2"])
def loaded(request, tmp_path_factory):
    path = talking_model(request.param, tmp_path_factory.mktemp(request.param))
    model, _ = load_model(path, dtype="float32")
    return model, load_tokenizer(path), path


def read(loaded, step: int) -> Session:
    model, tokenizer, path = loaded
    session = Session(model, tokenizer, origin={"name": str(path)}, step=step)
    session.read(TEXT)
    return session


def test_numbers_are_those_of_the_equations(loaded):
    session = read(loaded, 16)
    model = session.model
    ids = Session(model, session.tokenizer).encode(TEXT)
    x = model.model.embed_tokens(mx.array([ids]))
    for layer, found in zip(model.layers, report.measure(session), strict=True):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        cache = AHNCache(model.ahn.window, model.ahn.sinks)
        heads = attention.heads(h, cache)
        gates = np.array(attention.ahn.project(h, attention.ahn.derive())[0])[0]
        written = gates[cache.sinks : len(ids) - cache.window, :, 0]
        np.testing.assert_allclose(found.strength, written.mean(axis=0), rtol=1e-4)
        first = np.arange(cache.sinks, len(ids) - cache.window) // BLOCK
        blocks = [written[first == b].mean() for b in range(first[-1] + 1)]
        np.testing.assert_allclose(found.blocks, blocks, rtol=1e-4)
        norms = np.sqrt((np.array(cache.memory)[0] ** 2).sum(axis=(1, 2)))
        np.testing.assert_allclose(found.norm, norms, rtol=1e-3)
        weight = attention.ahn.o_proj.weight
        attention.ahn.o_proj.weight = mx.zeros_like(weight)
        local = attention.heads(h, AHNCache(cache.window, cache.sinks))[:, :, cache.capacity :]
        attention.ahn.o_proj.weight = weight
        said = heads[:, :, cache.capacity :] - local
        squares = [np.array((part**2).sum(axis=(0, 2, 3))) for part in (said, local)]
        np.testing.assert_allclose(found.share, squares[0] / sum(squares), rtol=1e-3)
        last = gates[len(ids) - cache.window :]
        if attention.ahn.kind == "deltanet":
            assert found.length is None
        elif attention.ahn.kind == "mamba2":
            decay = last[..., 0] * np.exp(np.array(attention.ahn.A_log))
            np.testing.assert_allclose(found.length, 1 / decay.mean(axis=0), rtol=1e-4)
        else:
            np.testing.assert_allclose(found.length, -1 / last[..., 1].mean(axis=0), rtol=1e-4)
        x = x + attention.merge(heads, h)
        x = x + layer.mlp(layer.post_attention_layernorm(x))


def test_the_same_whatever_the_steps_and_after_a_file(loaded, tmp_path):
    model, tokenizer, _ = loaded
    one = read(loaded, 16)
    assert one.tail.ids
    one.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", model, tokenizer)
    other = read(loaded, 8)
    for a, b in zip(report.measure(one), report.measure(again), strict=True):
        np.testing.assert_equal(a, b)
    trimmed = [report.measure(s)[0].blocks for s in (one, other)]
    whole = min(len(blocks) for blocks in trimmed) - 1
    np.testing.assert_allclose(trimmed[0][:whole], trimmed[1][:whole], rtol=1e-5)


def test_numbers_without_end_are_said(loaded):
    session = read(loaded, 16)
    cache = session.caches[1]
    trace = cache.trace
    strengths, heads = np.array(trace.strengths), np.array(trace.heads)
    for number in (np.inf, np.nan):
        heads[2, 1] = number  # of what the memory says
        cache.trace = trace._replace(heads=mx.array(heads))
        with pytest.raises(AHNError, match="the memory of layer 1 holds numbers without end"):
            report.measure(session)
    strengths[1] = 0  # what is counted as nothing
    cache.trace = trace._replace(strengths=mx.array(strengths))
    with pytest.raises(AHNError, match="the memory of layer 1 holds numbers without end"):
        report.measure(session)


LOUD = (
    *(((0.0, 0.0), "is hardly heard"), ((0.0, 0.002), "is hardly heard")),
    *(((0.001, 0.0011), "speaks softly"), ((0.05, 0.15), "speaks softly")),
    *(((0.1, 0.11), "is loud"), ((0.3, 0.7), "is loud")),
    *(((0.5, 0.51), "drowns what the window says"), ((1.0, 1.0), "drowns what")),
)


def test_how_loud_a_memory_is_in_words(loaded):
    session, none = read(loaded, 16), np.zeros(1)
    held = report.places(session).memory
    lengths = (np.array([1, held]), np.array([held - 1, 9 * held]))
    for shares, loud in LOUD:
        layers = [
            report.Layer(n, none, lengths[n], none, np.array([share]), none)
            for n, share in enumerate(shares)
        ]
        said = report._in_short(session, layers)
        assert f"It {loud}" in said and f"{sum(shares) / 2:.2%} of the output" in said
        assert f"for {held - 0.5:,.0f} tokens or longer; 50% of them last for all {held:,} " in said
    forgets = [layer._replace(length=None) for layer in layers]
    assert "has no decay" in report._in_short(session, forgets)
    assert "has no decay" not in report._in_short(session, [layers[0], forgets[1]])


def test_quotes_only_from_the_text_that_was_read(loaded):
    session = read(loaded, 16)
    assert "far better thing" in report.page(session, "a<b>", TEXT).split("most strongly")[1]
    assert "a&lt;b&gt;" in report.page(session, "a<b>")
    with pytest.raises(AHNError, match="--text is another text"):
        report.page(session, "a", "Call me Ishmael. " + TEXT)


@pytest.mark.parametrize("options", [{}, {"system": "Be brief."}, {"chat": False}])
def test_what_is_quoted_are_the_tokens_that_were_read(loaded, options):
    model, tokenizer, _ = loaded
    session = Session(model, tokenizer, step=16, **options)
    ids = session.encode(TEXT)
    session.read_ids(ids)
    assert report._ids(session, TEXT) == ids
    with pytest.raises(AHNError, match="--text is another text; the one digested begins"):
        report._ids(session, "x" + TEXT)


def test_places_are_where_tokens_are(loaded):
    session = read(loaded, 16)
    window, sinks = session.model.ahn.window, session.model.ahn.sinks
    total = len(Session(session.model, session.tokenizer).encode(TEXT))
    expected = (sinks, total - sinks - window, window)
    assert total % 16 and report.places(session) == expected
    page = report.page(session, "a")
    assert f"tokens {sinks:,} to {total - window - 1:,}: left the window" in page
    titles = ("How long it remembers", "Share of the output", "How strongly it writes")
    assert all(page.count(title) for title in (*titles, "How much is stored"))
    assert f"tokens {total - window:,} to {total - 1:,}: the last tokens" in page


def test_the_map_over_the_text_is_blank_where_nothing_was_written(loaded):
    session = read(loaded, 16)
    layers = report.measure(session)
    values, names = report.over_text(layers, session.tokens)
    ends = [tuple(int(x.replace(",", "")) for x in name.split(" to ")) for name in names]
    assert ends[0][0] == 0 and ends[-1][1] == session.tokens - 1
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(ends))
    sinks, memory, _ = report.places(session)
    for (first, end), column in zip(ends, values.T, strict=True):
        written = first < sinks + memory and end >= sinks
        assert np.isfinite(column).all() == written == np.isfinite(column).any()


def test_the_map_is_relative_to_its_layer(loaded):
    layers = report.measure(read(loaded, 16))
    values = report.relative(layers)
    for layer, row in zip(layers, values, strict=True):
        strengths = layer.blocks[np.isfinite(layer.blocks)]
        assert 0 < strengths.mean() < 1
        found = row[np.isfinite(row)]
        assert np.allclose(found, strengths / strengths.mean(), rtol=1e-5)


def test_nothing_written_yet(loaded):
    model, tokenizer, _ = loaded
    session = Session(model, tokenizer, step=4)
    session.read("Hi")
    with pytest.raises(AHNError, match="all are still in the window"):
        report.measure(session)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    "loaded",
    ["qwen2-mamba2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2-gdn", "qwen2-dn"))],
    indirect=True,
)
def test_in_a_browser(loaded, tmp_path):
    read(loaded, 16).save(tmp_path / "book.ahn")
    (tmp_path / "book.txt").write_text(TEXT)
    options = ["--memory", "book.ahn", "--text", "book.txt", "-o", "report.html"]
    command = [sys.executable, "-m", "ahn_mlx", "inspect", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href|url)\s*[=(]|@import", page)
    dom, picture = browse(tmp_path)
    assert dom.count("<svg") == page.count("<svg") >= 4
    assert "far better thing" in dom
    # Drawn, not only there: the brightest cell of a map is on the picture.
    bright = np.abs(picture[..., :3] * 255 - np.array(COLORS[-1])).max(axis=-1) < 2
    assert bright.sum() > 20


def browse(directory: Path) -> tuple[str, np.ndarray]:
    """What the page becomes in a headless browser, and a picture of it."""
    from matplotlib.image import imread

    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-background-networking", f"--user-data-dir={directory / 'profile'}"]
    options += ["--window-size=1000,1400", f"--screenshot={directory / 'shot.png'}", "--dump-dom"]
    url = (directory / "report.html").as_uri()
    done = subprocess.run([BROWSER, *options, url], capture_output=True, text=True, timeout=100)
    return done.stdout, imread(directory / "shot.png")
