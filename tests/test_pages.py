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


def test_colours_are_those_of_the_scale_and_mixed_between_them():
    """Four steps of equal width; what lies beyond either end is the end."""
    said = {0: "#261448", 1: "#36528c", 2: "#21918c", 3: "#7ac850", 4: "#fde73c"}
    assert {n: pages.color(n / 4) for n in said} == said
    assert (pages.color(0.125), pages.color(0.875)) == ("#2e336a", "#bcd846")
    assert (pages.color(-0.5), pages.color(1.5)) == (said[0], said[4])


def test_a_bar_says_both_ends_and_the_middle():
    def marks(values, **others):
        text = pages.figure(a_map(values, **others), "")
        return re.findall("<span>([^<]*)</span>", text.split('class="scale"')[1])

    assert marks([[1, 100]]) == ["1", "50.5", "100"]
    assert marks([[1, 100]], logarithmic=True) == ["1", "10", "100"]
    assert marks([[0, 100]], logarithmic=True) == ["0", "50", "100"]
    assert marks([[NAN]]) == ["0", "0", "0"]
    assert marks([[-3000, NAN, np.inf, 5000]]) == ["-3,000", "1,000", "5,000"]
    (bar,) = re.findall("linear-gradient\\(90deg,([^)]*)", pages.figure(a_map([[1]]), ""))
    assert bar.split(",") == [pages.color(n / 8) for n in range(9)]


def test_cells_say_what_they_are():
    def cells(values, **others):
        drawn = Elements(text := pages.figure(a_map(values, **others), ""))
        titles = re.findall("<title>([^<]*)</title>", text)
        return list(zip((c["fill"] for c in drawn.of("rect")), titles, strict=True))

    said = ["layer 0, head 0: 2 degrees", "layer 0, head 1: 12.35 degrees"]
    assert cells([[2, 12.3456]]) == [(pages.color(0), said[0]), (pages.color(1), said[1])]
    assert cells([[7], [7]])[1] == (pages.color(0.5), "layer 1, head 0: 7 degrees")
    fills = [fill for fill, _ in cells([[0, 1e-12, 1e-6, 1]], logarithmic=True)]
    assert fills == [pages.color(x) for x in (0, 0, 0.5, 1)]
    heights = [pages.figure(a_map([[1]] * n), "").split("height:")[1][:3] for n in (1, 5, 6, 20)]
    assert heights == ["3.0", "3.0", "3.6", "12."]


def test_axes_say_their_first_and_last_names():
    def ends(kind, values):
        text = pages.figure(a_map(values), "").split(f'<div class="{kind}">')[1]
        return re.findall("<span>([^<]*)", text.split("</div>")[0])

    assert ends("rows", [[1], [2], [3]]) == ["layer 0", "2"]
    assert ends("cols", [[1], [2], [3]]) == ["head 0"]
    assert ends("cols", [[1, 2]]) == ["head 0", "1"]


def test_captions_name_unit_and_scale():
    plain = pages._caption(a_map([[1, 2], [3, 0]]))
    said = "Degrees by layer and head: least 0 in layer 1, head 1; most 3 in layer 1, head 0"
    assert plain == said + "."
    assert pages._caption(a_map([[1, 2], [3, 0]], logarithmic=True)) == (
        said + "; colours are logarithmic."
    )
    assert "blank" not in pages.figure(a_map([[1, NAN]]), "")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        *((0.0, "0"), (0.123456, "0.123"), (999.4, "999"), (1000.0, "1,000"), (-1234.0, "-1,230")),
        *(
            (123456.0, "123,000"),
            (999_999_999.0, "1,000,000,000"),
            (1e9, "1e+09"),
            (-2e9, "-2e+09"),
        ),
        *((1e-5, "1e-05"), (NAN, ""), (np.inf, ""), (-np.inf, "")),
    ],
)
def test_numbers_have_three_digits(number, said):
    assert pages._number(number) == said


def test_columns_of_numbers_stand_to_the_right():
    text = pages.table("x", ["n", "word", "none"], [["1,000", "a", ""], ["-2.5", "7", "3"]])
    assert re.findall("<th([^>]*)>n<", text) == [' scope="col" class="n"']
    assert re.findall("<t[hd]([^>]*)>(?:word|a|7)<", text) == [' scope="col"', "", ""]
    assert re.findall("<t[hd]([^>]*)>(?:none|3)<", text) == [' scope="col" class="n"', ' class="n"']
    assert re.findall("<th([^>]*)>-2.5<", text) == [' scope="row" class="n"']
    assert 'class="n"' not in pages.table("x", ["n"], [])


def test_a_bar_of_parts_leaves_out_what_there_is_none_of():
    text = pages.parts([("a<", 3000, "red"), ("b", 0, "blue"), ("c", 1, "green")], "All & sundry")
    assert 'aria-label="All &amp; sundry: a< 3,000, c 1"' in text
    assert re.findall('style="([^"]*)"', text) == [
        *("flex:3000;background:red", "flex:1;background:green"),
    ]
    assert pages.key("red") == '<span class="key" style="background:red"></span>'


@pytest.mark.parametrize(("columns", "heads"), [(64, 65), (65, 4)])
def test_the_table_of_64_columns_has_them_all(columns, heads):
    text = pages.figure(a_map([list(range(columns))]), "")
    assert len(re.findall('<th scope="col"', text)) == heads
