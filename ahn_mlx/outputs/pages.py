"""Pages of HTML and SVG that need no network: maps of numbers that say what they show.

A page is one column that fits a telephone, follows the reader's light or dark theme, and says in
words and in tables what its maps show in colours.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, Any]

STYLE = """
:root{color-scheme:light dark;--ink:#1b2733;--soft:#4a5a6b;--paper:#fff;--line:#d5dce4}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#a9b6c3;--paper:#14191f;
--line:#3a4653}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:0 auto;
max-width:64rem;padding:1.5rem 1rem 3rem;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.25rem;margin:2.5rem 0 .3rem}
p,li,figcaption,summary{max-width:46rem}p{margin:.4rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}
dt{color:var(--soft)}dd{margin:0}
figure{margin:0 0 1rem}blockquote{margin:.2rem 0 .8rem;color:var(--soft)}
.map{display:grid;grid-template-columns:max-content 1fr;gap:0 .5rem;margin-top:.8rem}
.map svg{display:block;width:100%;background:repeating-linear-gradient(45deg,var(--line) 0 1px,
transparent 1px 5px);outline:1px solid var(--line)}
.rows{display:flex;flex-direction:column;justify-content:space-between;text-align:right}
.cols,.scale{display:flex;justify-content:space-between;grid-column:2}
.rows,.cols,.scale,.parts{font-size:.8rem;color:var(--soft);font-variant-numeric:tabular-nums}
.bar{width:100%;max-width:20rem;margin-top:.6rem}
.bar i{display:block;height:.8rem}
.parts{display:flex;margin:.8rem 0 .4rem;color:var(--ink);border:1px solid var(--line)}
.parts span{min-width:.6rem;height:1.4rem}
.key{display:inline-block;width:.9rem;height:.9rem;margin-right:.4rem;vertical-align:-.1rem;
border:1px solid var(--line)}
.blank{background:repeating-linear-gradient(45deg,var(--line) 0 1px,transparent 1px 5px)}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.4rem 0}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}
th,td.n{white-space:nowrap;overflow-wrap:normal}td.n,th.n{text-align:right}td{min-width:3.5rem}
summary{cursor:pointer;color:var(--soft)}
"""

# From little to much, of rising brightness for every kind of colour vision.
COLORS = ((38, 20, 72), (54, 82, 140), (33, 145, 140), (122, 200, 80), (253, 231, 60))


def document(title: str, mark: str, body: str) -> str:
    """A whole page. title: plain text. mark: a <meta> element by which it is known again."""
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{mark}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>\n"
    )
    # A file's name need not be UTF-8.
    return text.encode(errors="replace").decode()


@dataclass(frozen=True)
class Map:
    """values [R, C], NaN where there is none, drawn as blank. rows, columns: what they are called
    in the singular, and each one's name. unit: of the numbers. logarithmic: of the colours."""

    title: str
    values: Numbers
    row: str
    rows: Sequence[str]
    column: str
    columns: Sequence[str]
    unit: str
    logarithmic: bool = False


def figure(drawn: Map, says: str, blank: str = "") -> str:
    """A section with a map, its colour bar and its numbers. says: what is to be seen in it.
    blank: why cells are."""
    low, high = _range(drawn)
    missing = not np.isfinite(drawn.values).all()
    note = f'<p><span class="key blank"></span>Blank: {blank}</p>' if missing and blank else ""
    return (
        f"<section><h2>{html.escape(drawn.title)}</h2><p>{says}</p>"
        f'<figure><div class="map">{_ends("rows", drawn.rows, drawn.row)}{_svg(drawn, low, high)}'
        f"{_ends('cols', drawn.columns, drawn.column)}</div>{_bar(drawn, low, high)}"
        f"<figcaption>{html.escape(_caption(drawn))}</figcaption></figure>{note}"
        f"{_numbers(drawn)}</section>"
    )


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain texts as a table; the first column names the row. Columns of numbers, as far as they
    can be read as such, stand to the right."""

    def kind(n: int) -> str:
        cells = [row[n].replace(",", "") for row in rows]
        return ' class="n"' if cells and all(map(_is_number, cells)) else ""

    kinds = [kind(n) for n in range(len(heads))]
    head = "".join(
        f'<th scope="col"{k}>{html.escape(x)}</th>' for k, x in zip(kinds, heads, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row"{kinds[0]}>{html.escape(row[0])}</th>'
        + "".join(f"<td{k}>{html.escape(x)}</td>" for k, x in zip(kinds[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def parts(shares: Sequence[tuple[str, int, str]], what: str) -> str:
    """One bar of several parts. shares: what each is called, its size and its colour."""
    shown = [(name, size, color) for name, size, color in shares if size]
    label = ", ".join(f"{name} {size:,}" for name, size, _ in shown)
    bar = "".join(
        f'<span style="flex:{size};background:{color}"></span>' for _, size, color in shown
    )
    return f'<div class="parts" role="img" aria-label="{html.escape(what)}: {label}">{bar}</div>'


def key(color: str) -> str:
    """A patch of colour for a legend."""
    return f'<span class="key" style="background:{color}"></span>'


def color(part: float) -> str:
    """Of a number from 0, little, to 1, much."""
    at = min(max(part, 0.0), 1.0) * (len(COLORS) - 1)
    n = min(int(at), len(COLORS) - 2)
    mixed = (a + (b - a) * (at - n) for a, b in zip(COLORS[n], COLORS[n + 1], strict=True))
    return "#" + "".join(f"{round(x):02x}" for x in mixed)


def _scaled(drawn: Map, values: Numbers) -> Numbers:
    return np.log(np.maximum(values, 1e-12)) if drawn.logarithmic else values


def _range(drawn: Map) -> tuple[float, float]:
    # Squares of what a file says may be larger than any float.
    finite = drawn.values[np.isfinite(drawn.values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _svg(drawn: Map, low: float, high: float) -> str:
    """Cells of whole units side by side, so that no seam is between them, stretched to fit."""
    R, C = drawn.values.shape
    scaled = _scaled(drawn, drawn.values)
    first, last = (float(_scaled(drawn, np.array(x))) for x in (low, high))
    cells = []
    for r in range(R):
        for c in range(C):
            if not math.isfinite(scaled[r, c]):
                continue
            part = (scaled[r, c] - first) / (last - first) if last > first else 0.5
            cells.append(
                f'<rect x="{c}" y="{r}" width="1" height="1" fill="{color(part)}">'
                f"<title>{drawn.row} {drawn.rows[r]}, {drawn.column} {drawn.columns[c]}:"
                f" {drawn.values[r, c]:.4g} {drawn.unit}</title></rect>"
            )
    return (
        f'<svg viewBox="0 0 {C} {R}" preserveAspectRatio="none" shape-rendering="crispEdges"'
        f' style="height:{max(R * 0.6, 3):.1f}rem" role="img"'
        f' aria-label="{html.escape(drawn.title)}. {html.escape(_caption(drawn))}">'
        f"{''.join(cells)}</svg>"
    )


def _ends(kind: str, names: Sequence[str], what: str) -> str:
    """The first and the last name of an axis."""
    shown = [f"{what} {names[0]}", *([names[-1]] if len(names) > 1 else [])]
    return f'<div class="{kind}">{"".join(f"<span>{x}</span>" for x in shown)}</div>'


def _bar(drawn: Map, low: float, high: float) -> str:
    """From least to most, with numbers at both ends and in the middle."""
    stops = ",".join(color(n / 8) for n in range(9))
    middle = math.sqrt(low * high) if drawn.logarithmic and low > 0 else (low + high) / 2
    marks = "".join(f"<span>{_number(x)}</span>" for x in (low, middle, high))
    return (
        f'<div class="bar" aria-hidden="true"><i style="background:linear-gradient(90deg,{stops})">'
        f'</i><div class="scale">{marks}</div></div>'
    )


def _caption(drawn: Map) -> str:
    """What the map shows, for whoever does not see it."""
    values = np.where(np.isfinite(drawn.values), drawn.values, np.nan)
    if np.isnan(values).all():
        return f"By {drawn.row} and {drawn.column}: no numbers."
    ends = []
    for name, place in (("least", np.nanargmin(values)), ("most", np.nanargmax(values))):
        r, c = divmod(int(place), values.shape[1])
        ends.append(
            f"{name} {_number(values[r, c])} in {drawn.row} {drawn.rows[r]},"
            f" {drawn.column} {drawn.columns[c]}"
        )
    scale = "; colours are logarithmic" if drawn.logarithmic else ""
    unit = drawn.unit[:1].upper() + drawn.unit[1:]
    return f"{unit} by {drawn.row} and {drawn.column}: {'; '.join(ends)}{scale}."


def _numbers(drawn: Map) -> str:
    """The numbers themselves; where there are many columns, of each row the spread."""
    values = np.where(np.isfinite(drawn.values), drawn.values, np.nan)
    if len(drawn.columns) <= 64:
        heads = [drawn.row, *(f"{drawn.column} {c}" for c in drawn.columns)]
        rows = [[str(n), *map(_number, row)] for n, row in zip(drawn.rows, values, strict=True)]
    else:
        heads = [drawn.column, f"mean of all {drawn.row}s", "least", "most"]
        rows = []
        for name, x in zip(drawn.columns, values.T, strict=True):
            seen = x[~np.isnan(x)]
            found = (seen.mean(), seen.min(), seen.max()) if seen.size else (np.nan,) * 3
            rows.append([name, *map(_number, found)])
    caption = f"{drawn.title}: {drawn.unit}"
    return f"<details><summary>The numbers</summary>{table(caption, heads, rows)}</details>"


def _number(x: float) -> str:
    """Three digits, which are enough to compare, or "" for none."""
    if not math.isfinite(x):
        return ""
    return f"{float(f'{x:.3g}'):,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.3g}"


def _is_number(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True
