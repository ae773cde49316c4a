"""Cards that someone else has written: what they say of origins is text of one line, or nothing."""

import pytest
import yaml
from checkpoints import GDN

from ahn_mlx.checkpoints import card
from ahn_mlx.checkpoints.convert import convert


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


def test_a_copy_in_the_cache_of_the_hub_is_of_its_repository(tmp_path):
    known = "models--Qwen--Qwen2.5-7B-Instruct/snapshots/0123"
    for place, expected in (
        ("models--me--it/snapshots/abc", card.Origin("base", "me/it", "abc", "mit")),
        ("mine/snapshots/abc", card.Origin("base", "abc", "", "mit")),
        ("models--me--it/other/abc", card.Origin("base", "abc", "", "mit")),
        (known, card.Origin("base", "Qwen/Qwen2.5-7B-Instruct", "0123", "mit")),
    ):
        (tmp_path / place).mkdir(parents=True)
        file = tmp_path / place / "README.md"
        file.write_text("---\nlicense: other\nlicense_name: mit\n---\n")
        assert card.origin("base", tmp_path / place) == expected
        file.write_text("---\nlicense: bsd\n---\n")
        assert card.origin("base", tmp_path / place).licence == "bsd"
        file.unlink()
        own = "apache-2.0" if place == known else ""
        assert card.origin("base", tmp_path / place).licence == own


def test_a_card_is_read_as_far_as_it_takes_no_time(tmp_path):
    def says(text: str) -> bool:
        (tmp_path / "README.md").write_text(text)
        return card.base_model(tmp_path) == "a/b"

    front = "---\nbase_model: a/b\n#{}\n---"
    for most, fits in ((32_768, True), (32_769, False)):
        text = front.format("x" * (most - len(front) + 2))
        assert len(text) == most and says(text) is fits
        assert says(text[:-3] + "--x") is False
    for most, fits in ((1 << 20, True), ((1 << 20) + 1, False)):
        assert says((front.format("") + "\n").ljust(most)) is fits
    for most, fits in ((512, True), (513, False)):
        assert says(f"---\nbase_model: a/b\nk: [{'{}, ' * (most - 1)}]\n---\n") is fits


def test_a_name_is_no_longer_than_a_line(tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: {'x' * 300}\n---\n")
    assert card.origin("base", tmp_path).licence == "x" * 200


def test_a_card_of_a_directory_whose_name_is_no_text(tmp_path):
    convert(GDN / "base", GDN / "ahn_only", tmp_path / "out")
    card.write_card(tmp_path / "out", "caf\u00e9 \udcff", [card.Origin("base", "mine")])
    text = (tmp_path / "out/README.md").read_bytes().decode()
    assert "# caf\u00e9 ?\n" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["tags"]) == ("mlx", ["mlx", "ahn"])
    assert front["pipeline_tag"] == "text-generation" and "base_model" not in front
