"""What is fuzzed, by name: a file for each family of parsers."""

import sys
from pathlib import Path

# Seeds are what tests are made of.
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))

from ..names import NAMES
from ..oracle import Target
from . import checkpoints, documents, evaluation, ggufs, http, memories, stored, templates

_ALL: list[Target] = [
    target
    for family in (checkpoints, ggufs, memories, documents, templates, evaluation, http, stored)
    for target in family.TARGETS
]
TARGETS = {target.name: target for target in _ALL}
assert set(TARGETS) == set(NAMES), set(TARGETS) ^ set(NAMES)
