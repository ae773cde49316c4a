"""Cards that someone else has written: what they say of origins is text of one line, or nothing."""

import pytest

from ahn_mlx.checkpoints import card


@pytest.mark.parametrize(
    "sources",
    [
        "5",
        "[5]",
        "{part: base}",
        "[{part: base, repo: [a, b]}]",
        "[{part: base, repo: a, licence: {b: c}}]",
        "[{part: base, repo: a, other: b}]",
        "[{part: base, repo: a, revision: 5}]",
        "*nowhere",
        "",
    ],
)
def test_origins_of_another_kind_are_none(tmp_path, sources):
    (tmp_path / "README.md").write_text(f"---\nahn_sources: {sources}\n---\ntext\n")
    assert card.read_origins(tmp_path) == []


def test_names_are_one_line_that_can_be_printed(tmp_path):
    text = r"""
---
license_name: "mit\n---\nevil\e[2J"
ahn_sources:
- {part: base, repo: "a\nb\0", licence: "x\ty"}
---
"""
    (tmp_path / "README.md").write_text(text.lstrip())
    assert card.read_origins(tmp_path) == [card.Origin("base", "a b", "", "x y")]
    assert card.origin("base", tmp_path).licence == "mit --- evil[2J"


@pytest.mark.parametrize("data", [b"\xff\xfe\0", b"---\n- a\n---\n", b"---\n{[\n---\n", b"---\n"])
def test_a_card_that_is_none_says_nothing(tmp_path, data):
    (tmp_path / "README.md").write_bytes(data)
    assert card.read_origins(tmp_path) == [] and card.origin("base", tmp_path).licence == ""
