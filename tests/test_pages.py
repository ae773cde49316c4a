"""Pages that say in words and tables what they show in colours."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ahn_mlx.outputs import pages

NAN = np.nan
VOID = {"meta", "rect"}


def a_map(values, **others) -> pages.Map:
    values = np.array(values, dtype=float)
    rows, columns = ([str(n) for n in range(size)] for size in values.shape)
    return pages.Map("Heat", values, "layer", rows, "head", columns, "degrees", **others)


class Elements(HTMLParser):
    """Every element with its attributes; all that are opened are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_cells_lie_side_by_side_and_blanks_are_left_out():
    drawn = Elements(pages.figure(a_map([[1, 2, NAN], [4, np.inf, 5]]), "Says.", "nothing there"))
    cells = [(c["x"], c["y"], c["width"], c["height"]) for c in drawn.of("rect")]
    # In whole units: fractions would be rounded apart.
    assert cells == [(x, y, "1", "1") for x, y in ("00", "10", "01", "21")]
    assert drawn.of("svg")[0]["viewbox"] == "0 0 3 2"
    fills = [c["fill"] for c in drawn.of("rect")]
    assert fills[0] == pages.color(0) and fills[-1] == pages.color(1)


def test_brighter_is_more():
    def brightness(part):
        return sum(
            w * int(pages.color(part)[n : n + 2], 16)
            for w, n in zip((0.2126, 0.7152, 0.0722), (1, 3, 5), strict=True)
        )

    found = [brightness(n / 50) for n in range(51)]
    assert found == sorted(found) and found[-1] - found[0] > 150
    assert pages.color(-1) == pages.color(0) and pages.color(2) == pages.color(1)


def test_logarithmic_colours():
    drawn = Elements(pages.figure(a_map([[1, 10, 100]], logarithmic=True), "Says."))
    assert [c["fill"] for c in drawn.of("rect")] == [pages.color(x) for x in (0, 0.5, 1)]


def test_what_is_said_of_blanks_is_said_only_where_there_are_some():
    assert "nobody wrote" in pages.figure(a_map([[1, NAN]]), "", "nobody wrote")
    assert "nobody wrote" not in pages.figure(a_map([[1, 2]]), "", "nobody wrote")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1, 2000], [NAN, 3]], "least 1 in layer 0, head 0; most 2,000 in layer 0, head 1"),
        ([[NAN]], "no numbers"),
        ([[5]], "least 5 in layer 0, head 0; most 5"),
    ],
)
def test_a_map_is_said_in_words(values, said):
    drawn = Elements(text := pages.figure(a_map(values), "Says."))
    assert said in drawn.of("svg")[0]["aria-label"] and said in text.split("<figcaption>")[1]
    assert drawn.of("svg")[0]["role"] == "img"


def test_the_numbers_can_be_read_as_a_table():
    text = pages.figure(a_map([[1.25, NAN], [2, 30_000]]), "Says.")
    heads, first, second = re.findall("<tr>(.*?)</tr>", text)
    assert re.findall(">([^<]+)<", heads) == ["layer", "head 0", "head 1"]
    assert re.findall(">([^<]+)<", first) == ["0", "1.25"]
    assert re.findall(">([^<]+)<", second) == ["1", "2", "30,000"]
    assert 'scope="row"' in first and 'scope="col"' in heads and "<caption>" in text


def test_of_many_columns_the_table_says_the_spread():
    values = np.arange(200.0).reshape(2, 100)
    values[:, 7] = NAN
    rows = re.findall("<tr>(.*?)</tr>", pages.figure(a_map(values), "Says."))
    assert len(rows) == 101
    assert re.findall(">([^<]+)<", rows[4]) == ["3", "53", "3", "103"]
    assert re.findall(">([^<]+)<", rows[8]) == ["7"]


def test_a_page_is_for_telephones_both_themes_and_no_network():
    body = pages.table("a<b", ["x", "y"], [["<i>", "&"]]) + pages.parts([("a", 3, "red")], "All")
    text = pages.document("a<b>\udce4", "<meta name=mark>", body)
    drawn = Elements(text.split(">", 1)[1])
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in drawn.of(
        "meta"
    )
    assert "prefers-color-scheme:dark" in text and 'lang="en"' in text
    assert not re.search(r"(src|href|url)\s*[=(]|@import|<script", text)
    assert "&lt;i&gt;" in text and "<i>" not in text and "a&lt;b&gt;?" in text
    text.encode()
