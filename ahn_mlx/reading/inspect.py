"""A page on what a digested document left in a memory: plain HTML and SVG, nothing to load."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import AHNError
from ..memory import DeltaNet, Mamba2, Memory
from ..model.augment import memory_layers
from ..model.cache import AHNCache
from ..model.trace import BLOCK
from .session import Session

COLUMNS = 160  # of the map over the text; more would be narrower than a pixel
PASSAGES = 12

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b2733;background:#fff;margin:2em auto;
max-width:62em;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin:2em 0 .2em}p{margin:.3em 0;color:#46566a}
dl{display:grid;grid-template-columns:9em 1fr;gap:.1em 1em}dt{color:#46566a}dd{margin:0}
svg{width:100%;height:auto;margin-top:.5em}text{font:11px system-ui,sans-serif;fill:#46566a}
.maps{display:grid;grid-template-columns:1fr 1fr;gap:0 2em}
table{border-collapse:collapse}td,th{padding:.3em .8em .3em 0;text-align:left;
vertical-align:top;border-bottom:1px solid #dde3ea}td.n{text-align:right}
"""
MARK = '<meta name="generator" content="ahn-mlx inspect">'


class Layer(NamedTuple):
    """Of the memory in one layer, by head [H]: norm of the state; tokens until the decay has
    left 1/e (None: it does not decay); mean write strength; share of the output's squares
    that is the memory's. blocks: mean write strength by BLOCK of the text, NaN where none."""

    number: int
    norm: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any] | None
    strength: np.ndarray[Any, Any]
    share: np.ndarray[Any, Any]
    blocks: np.ndarray[Any, Any]


def measure(session: Session) -> list[Layer]:
    """Raises AHNError if nothing has left the window, or nothing was counted."""
    layers: list[Layer] = []
    for i, attention in memory_layers(session.model):
        cache = session.caches[i]
        assert isinstance(cache, AHNCache) and cache.trace is not None
        if cache.memory is None:
            raise AHNError(
                f"{session.tokens:,} tokens were read and all are still in the window of"
                f" {cache.window:,}; the memory is empty, digest a longer text"
            )
        if not cache.trace.strengths.size:
            raise AHNError("the text was read token by token, which is not counted; digest it")
        sums, counts = np.array(cache.trace.strengths)
        strength, local, memory = np.array(cache.trace.heads).astype(float)
        blocks = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        norm = np.array(mx.linalg.norm(cache.memory[0], axis=[-2, -1]))
        share = memory / np.maximum(local + memory, 1e-30)
        length = _length(attention.ahn, cache)
        layers.append(Layer(i, norm, length, strength / counts.sum(), share, blocks))
    if not layers:
        raise AHNError("no layer of the model has a memory; take one with fewer fa_layer_ids")
    return layers


def _length(memory: Memory, cache: AHNCache) -> np.ndarray[Any, Any] | None:
    """From the decays of the tokens in the window, which are written next."""
    assert cache.buffers is not None
    gates = cache.buffers[-1][0, :, cache.sinks : cache.capacity].astype(mx.float32)
    if isinstance(memory, DeltaNet):
        return None
    steps = isinstance(memory, Mamba2)
    decay = gates[..., 0] * memory.derive().rates[:, None] if steps else gates[..., 1]
    return np.array(1 / mx.maximum(-decay.mean(axis=-1), 1e-9))


def page(session: Session, name: str, text: str | None = None) -> str:
    """The report as HTML. text: what was digested first, to quote from it.

    Raises AHNError if that begins otherwise, or if nothing has left the window.
    """
    layers = measure(session)
    ids = None
    if text is not None:
        template = session.template
        fresh = Session(
            session.model,
            session.tokenizer,
            system=template.system if template else "",
            chat=template is not None,
        )
        ids = fresh.encode(text)
        if fresh.preview != session.preview:
            raise AHNError(f"--text is another text; the one digested begins {session.preview!r}")
    shares = np.mean([layer.share for layer in layers])
    facts = {
        "model": f"{session.origin['name']}, {session.model.ahn.memory}",
        "tokens": f"{session.tokens:,}",
        "window + sinks": f"{session.model.ahn.window:,} + {session.model.ahn.sinks:,}",
        "kept in memory": f"{session.nbytes / 1e6:.1f} MB",
        "memory's share": f"{shares:.1%} of the output, mean of all heads",
        "begins": session.preview,
    }
    rows = "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    title = html.escape(name)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{MARK}<title>{title}</title>'
        f"<style>{STYLE}</style><h1>What the memory holds of {title}</h1><dl>{rows}</dl>"
        f'<div class="maps">{_by_head(layers)}</div>{_over_text(layers)}'
        f"{_passages(session, layers, ids)}</html>\n"
    )
    # A file's name need not be UTF-8.
    return text.encode(errors="replace").decode()


def is_page(file: Path) -> bool:
    """Whether a file is a page that `page` has made."""
    with file.open("rb") as f:
        return MARK.encode() in f.read(1000)


def _by_head(layers: list[Layer]) -> str:
    numbers = [layer.number for layer in layers]
    maps = [
        ("State norm", "Frobenius norm of each head's state.", [x.norm for x in layers]),
        (
            "Share of the output",
            "Squares of the memory's part over all.",
            [x.share for x in layers],
        ),
        ("Write strength", "Mean over all tokens written.", [x.strength for x in layers]),
    ]
    lengths = [x.length for x in layers if x.length is not None]
    note = "Tokens until decay leaves 1/e."
    if lengths:
        maps.insert(1, ("Memory length", f"{note} Colours are logarithmic.", lengths))
    parts = [
        f"<section><h2>{title}</h2><p>{text}</p>"
        + heat_map(np.array(values), numbers, "head", title == "Memory length")
        + "</section>"
        for title, text, values in maps
    ]
    if not lengths:
        parts.append(
            f"<section><h2>Memory length</h2><p>{note} This memory has no decay.</p></section>"
        )
    return "".join(parts)


def relative(layers: list[Layer]) -> np.ndarray[Any, Any]:
    """[layers, blocks]: write strength over the mean of its layer."""
    blocks = np.stack([layer.blocks for layer in layers])
    means = np.nanmean(blocks, axis=1, keepdims=True)
    return np.asarray(blocks / np.where(means > 0, means, 1))


def _over_text(layers: list[Layer]) -> str:
    values = relative(layers)
    parts = np.array_split(np.arange(values.shape[1]), min(COLUMNS, values.shape[1]))
    with np.errstate(invalid="ignore"):
        sums, counts = (
            np.stack([f(values[:, p]).sum(axis=1) for p in parts], axis=1)
            for f in (np.nan_to_num, lambda x: ~np.isnan(x))
        )
        columns = sums / counts
    names = [f"token {p[0] * BLOCK:,}" for p in parts]
    tokens = f"{len(parts[0]) * BLOCK:,}"
    return (
        "<section><h2>Write strength over the text</h2><p>1 is the mean of the layer. One column"
        f" is {tokens} tokens; sinks and window have not been written.</p>"
        + heat_map(columns, [layer.number for layer in layers], names)
        + "</section>"
    )


def _passages(session: Session, layers: list[Layer], ids: list[int] | None) -> str:
    """The blocks written most strongly, in words if the text is there."""
    means = relative(layers).mean(axis=0)
    found = [int(b) for b in np.argsort(-np.nan_to_num(means))[:PASSAGES]]
    rows = []
    for b in found:
        quote = "" if ids is None else session.tokenizer.decode(ids[b * BLOCK : (b + 1) * BLOCK])
        rows.append(
            f'<tr><td class="n">{b * BLOCK:,}</td><td class="n">{means[b]:.3f}</td>'
            f"<td>{html.escape(quote)}</td></tr>"
        )
    hint = "" if ids else "<p>Give the text with --text to read them here.</p>"
    return (
        f"<section><h2>Written most strongly</h2>{hint}<table><tr><th>token</th><th>strength</th>"
        f"<th></th></tr>{''.join(rows)}</table></section>"
    )


def heat_map(
    values: np.ndarray[Any, Any],
    rows: Sequence[int],
    columns: str | list[str],
    logarithmic: bool = False,
) -> str:
    """values [R, C] as SVG; a cell says its number when pointed at. rows: layers' numbers.
    columns: a name for each, or one name for all that are counted."""
    R, C = values.shape
    names = [f"{columns} {c}" for c in range(C)] if isinstance(columns, str) else columns
    width, height = 560 / C if isinstance(columns, str) else 1180 / C, 12
    scaled = np.log(np.maximum(values, 1e-12)) if logarithmic else values
    # Squares of what a file says may be larger than any float.
    finite = scaled[np.isfinite(scaled)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    cells = []
    for r in range(R):
        for c in range(C):
            if not math.isfinite(scaled[r, c]):
                continue
            color = _color((scaled[r, c] - low) / (high - low) if high > low else 0.5)
            cells.append(
                f'<rect x="{50 + c * width:.1f}" y="{r * height}" width="{width:.1f}"'
                f' height="{height}" fill="{color}"><title>layer {rows[r]}, {names[c]}:'
                f" {values[r, c]:.4g}</title></rect>"
            )
    labels = [
        f'<text x="44" y="{r * height + 10}" text-anchor="end">{rows[r]}</text>'
        for r in range(0, R, 5)
    ]
    bottom, right = R * height + 14, 50 + C * width
    light, dark = (math.exp(x) if logarithmic else x for x in (low, high))
    legend = f"{light:.3g} (light) to {dark:.3g} (dark)"
    labels += [
        f'<text x="50" y="{bottom}">{names[0]}</text>',
        f'<text x="{right:.0f}" y="{bottom}" text-anchor="end">{names[-1]}</text>',
        f'<text x="{(50 + right) / 2:.0f}" y="{bottom}" text-anchor="middle">{legend}</text>',
        f'<text x="8" y="{R * height / 2}" transform="rotate(-90 8 {R * height / 2})">layer</text>',
    ]
    box = f"0 0 {right:.0f} {bottom + 6}"
    drawn = "".join(cells + labels)
    return f'<svg viewBox="{box}" role="img" shape-rendering="crispEdges">{drawn}</svg>'


# From light to dark, readable without colour vision.
LIGHT, DARK = (226, 238, 249), (8, 48, 107)


def _color(part: float) -> str:
    r, g, b = (round(a + (z - a) * part) for a, z in zip(LIGHT, DARK, strict=True))
    return f"#{r:02x}{g:02x}{b:02x}"
