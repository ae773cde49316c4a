"""What runs in the repository's own workflows: nothing that others can change meanwhile."""

import re

import pytest
import yaml
from checkpoints import REPO

FILES = sorted((REPO / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_actions_are_pinned_and_may_do_little(file) -> None:
    text = file.read_text(encoding="utf-8")
    found = re.findall(r"uses:\s*(.+)", text)
    assert found
    for action in found:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        wanted = {"id-token": "write"} if name == "publish" else None
        assert job.get("permissions") == wanted
    # What a stranger can name is never pasted into a shell.
    assert "${{ github.event" not in text and "${{ github.head_ref" not in text
