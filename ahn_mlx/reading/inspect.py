"""A page on what a digested document left in a memory: plain HTML and SVG, nothing to load."""

import html
import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import AHNError
from ..memory import DeltaNet, Mamba2, Memory
from ..model.augment import memory_cache, memory_layers
from ..model.cache import AHNCache
from ..model.trace import BLOCK
from ..outputs import pages
from .session import Session

COLUMNS = 160  # of the map over the text; more would be narrower than a pixel
PASSAGES = 12

# Mean share of the output, at most, and what that is.
LOUDNESS = (
    (0.001, "is hardly heard"),
    (0.1, "speaks softly"),
    (0.5, "is loud"),
    (math.inf, "drowns what the window says"),
)

# Of the parts of a text, on light and on dark.
SINKS, MEMORY, WINDOW = "#e69f00", "#2a8f8a", "#7a8fd4"

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
    """Raises AHNError if nothing has left the window, nothing was counted, or numbers overflow."""
    layers: list[Layer] = []
    for i, attention in memory_layers(session.model):
        cache = memory_cache(session.caches[i])
        assert cache.trace is not None
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
        with np.errstate(all="ignore"):
            share = memory / np.maximum(local + memory, 1e-30)
            strength /= counts.sum()
        length = _length(attention.ahn, cache)
        known = (norm, strength, share, norm if length is None else length)
        if not all(np.isfinite(x).all() for x in known):
            raise AHNError(
                f"the memory of layer {i} holds numbers without end; digest the text again"
            )
        layers.append(Layer(i, norm, length, strength, share, blocks))
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
    ids = None if text is None else _ids(session, text)
    facts = {
        "model": f"{session.origin['name']}, {session.model.ahn.memory}",
        "read": f"{session.tokens:,} tokens",
        "kept": f"{session.nbytes / 1e6:.1f} MB, whatever the length of the text",
        "begins": f"{session.preview} ...",
    }
    rows = "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    body = [
        f"<dl>{rows}</dl>",
        _in_short(session, layers),
        _where(session),
        *_by_head(session, layers),
        _over_text(session, layers),
        _passages(session, layers, ids),
    ]
    return pages.document(f"What the memory holds of {name}", MARK, "".join(body))


def is_page(file: Path) -> bool:
    """Whether a file is a page that `page` has made."""
    with file.open("rb") as f:
        return MARK.encode() in f.read(1000)


def _ids(session: Session, text: str) -> list[int]:
    """What of that text was read first, as tokens."""
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
    return ids


class Places(NamedTuple):
    """Tokens of the text, one after the other: in the sinks, in the memory, in the window."""

    sinks: int
    memory: int
    window: int


def places(session: Session) -> Places:
    read, ahn = session.tokens, session.model.ahn
    memory = max(0, read - ahn.sinks - ahn.window)
    sinks = min(ahn.sinks, read)
    return Places(sinks, memory, read - sinks - memory)


def _in_short(session: Session, layers: list[Layer]) -> str:
    """The two things that one wants to know first."""
    share = float(np.mean([layer.share for layer in layers]))
    loud = next(word for most, word in LOUDNESS if share <= most)
    lines = [f"It {loud}: {share:.2%} of the output of attention, in squares, is the memory's."]
    lengths = [layer.length for layer in layers if layer.length is not None]
    if lengths:
        all_heads, held = np.concatenate(lengths), places(session).memory
        long = float(np.mean(all_heads >= held))
        lines.append(
            f"Half of the heads keep a token for {np.median(all_heads):,.0f} tokens or longer;"
            f" {long:.0%} of them last for all {held:,} tokens that have left the window."
        )
    else:
        lines.append("This memory has no decay: a token stays until others write over it.")
    return "<h2>In short</h2><ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _where(session: Session) -> str:
    """What of the text is kept as it was, and what is compressed."""
    sinks, memory, window = places(session)
    shares = [
        ("sinks", sinks, SINKS, "the first tokens, kept as they were for ever"),
        ("memory", memory, MEMORY, "left the window, and is kept in outline alone"),
        ("window", window, WINDOW, "the last tokens, kept as they were"),
    ]
    first, items = 0, []
    for name, size, color, what in shares:
        if size:
            span = f"tokens {first:,} to {first + size - 1:,}"
            items.append(f"<li>{pages.key(color)}<b>{name}</b>, {span}: {what}.</li>")
            first += size
    bar = pages.parts([share[:3] for share in shares], "Tokens of the text")
    return f"<section><h2>Where the text is</h2>{bar}<ul>{''.join(items)}</ul></section>"


def _by_head(session: Session, layers: list[Layer]) -> list[str]:
    numbers = [str(layer.number) for layer in layers]
    heads = [str(n) for n in range(layers[0].norm.size)]

    def head_map(title: str, values: list[Any], unit: str, logarithmic: bool = False) -> pages.Map:
        return pages.Map(
            title, np.array(values), "layer", numbers, "head", heads, unit, logarithmic
        )

    lengths = [x.length for x in layers if x.length is not None]
    held = places(session).memory
    figures = []
    if lengths:
        figures.append(
            pages.figure(
                head_map("How long it remembers", lengths, "tokens until 1/e is left", True),
                "A bright cell is a head that keeps what it wrote for long, a bright row a layer"
                " that does; dark ones forget soon. What is bright, the bar says: where all numbers"
                f" are below {held:,}, which is how many tokens had to be kept here, the beginning"
                " of the text is fading everywhere.",
            )
        )
    else:
        figures.append(
            "<section><h2>How long it remembers</h2><p>This memory has no decay: what is written"
            " stays until something with a similar key is written over it.</p></section>"
        )
    figures.append(
        pages.figure(
            head_map("Share of the output", [x.share for x in layers], "share of the squares"),
            "How much of a head's output comes from the memory: bright heads listen to it, dark"
            " ones do not, and what is stored there does not matter. Above 0.5 it drowns the"
            " window, which is good only where the window has nothing to say.",
        )
    )
    figures.append(
        pages.figure(
            head_map("How strongly it writes", [x.strength for x in layers], "mean write strength"),
            "Mean over all tokens written. Bright heads take in much of each token, and write over"
            " older ones sooner; dark heads take in little, and keep it. Neither is better: a row"
            " of both keeps old and new.",
        )
    )
    figures.append(
        pages.figure(
            head_map("How much is stored", [x.norm for x in layers], "norm of the state"),
            "Frobenius norm of each head's state. Zero is an empty head. Bright heads hold much;"
            " that is good only if their share of the output, above, is not dark.",
        )
    )
    return figures


def relative(layers: list[Layer]) -> np.ndarray[Any, Any]:
    """[layers, blocks]: write strength over the mean of its layer."""
    blocks = np.stack([layer.blocks for layer in layers])
    means = np.nanmean(blocks, axis=1, keepdims=True)
    return np.asarray(blocks / np.where(means > 0, means, 1))


def over_text(layers: list[Layer], tokens: int) -> tuple[np.ndarray[Any, Any], list[str]]:
    """[layers, columns] of a whole text: mean of `relative`, NaN where nothing was written; and
    the tokens of each column."""
    blocks = relative(layers)
    values = np.full((blocks.shape[0], max(-(-tokens // BLOCK), blocks.shape[1])), np.nan)
    values[:, : blocks.shape[1]] = blocks
    parts = np.array_split(np.arange(values.shape[1]), min(COLUMNS, values.shape[1]))
    with np.errstate(invalid="ignore"):
        sums, counts = (
            np.stack([f(values[:, p]).sum(axis=1) for p in parts], axis=1)
            for f in (np.nan_to_num, lambda x: ~np.isnan(x))
        )
        columns = sums / counts
    ends = [min(tokens, (p[-1] + 1) * BLOCK) - 1 for p in parts]
    return columns, [f"{p[0] * BLOCK:,} to {end:,}" for p, end in zip(parts, ends, strict=True)]


def _over_text(session: Session, layers: list[Layer]) -> str:
    columns, names = over_text(layers, session.tokens)
    drawn = pages.Map(
        "What it wrote down",
        columns,
        "layer",
        [str(layer.number) for layer in layers],
        "tokens",
        names,
        "times the layer's mean write strength",
    )
    says = (
        "The text from left to right. 1 is the mean of a layer; a bright column is a passage that"
        " many layers took in more strongly than others. Rows that are alike along their whole"
        " length do not choose: those layers write all of the text alike."
    )
    blank = (
        "not written into the memory. The beginning is in the sinks and the end in the window,"
        " word for word; answers, which are made token by token, are not counted."
    )
    return pages.figure(drawn, says, blank)


def _passages(session: Session, layers: list[Layer], ids: list[int] | None) -> str:
    """The blocks written most strongly, in words if the text is there."""
    means = relative(layers).mean(axis=0)
    order = np.argsort(-np.nan_to_num(means))[:PASSAGES]
    found = [int(b) for b in order if math.isfinite(means[b])]
    items = []
    for b in found:
        first, end = b * BLOCK, (b + 1) * BLOCK
        said = f"<b>tokens {first:,} to {end - 1:,}</b>, {means[b]:.2f} times the mean"
        if ids is not None:
            quote = session.tokenizer.decode(ids[first:end])
            said += f"<blockquote>{html.escape(quote)}</blockquote>"
        items.append(f"<li>{said}</li>")
    hint = "" if ids is not None else "<p>With --text FILE they can be read here.</p>"
    spread = float(np.nanmax(means) - np.nanmin(means))
    plain = " They hardly differ: the memory did not choose." if spread < 0.1 else ""
    return (
        "<section><h2>Passages written most strongly</h2><p>What the memory took in most, over"
        f" the mean of all layers.{plain}</p>{hint}<ol>{''.join(items)}</ol></section>"
    )
