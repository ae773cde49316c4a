"""What runs in the repository's own workflows: nothing that others can change meanwhile, and faults
of the code that there is."""

import re
import tomllib

import mutants
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


def test_faults_are_of_modules_and_tests_that_there_are() -> None:
    lists = REPO / "tests/mutations"
    count = len(mutants.listed(lists / "by_hand.txt"))  # which ends where a line is not once there
    assert f"{count} faults that somebody thought of" in (REPO / "docs/mutations.md").read_text()
    for room, modules in tomllib.loads((lists / "tests.toml").read_text()).items():
        for module, files in modules.items():
            assert (REPO / f"ahn_mlx/{room}/{module}.py").is_file(), module
            for name in files:
                assert (REPO / f"tests/test_{name.split()[0]}.py").is_file(), name
    for line in (lists / "equivalent.txt").read_text().splitlines():
        if line.startswith("# "):
            assert (REPO / line[2:]).is_file(), line
        elif line:
            assert " => " in line and "  # " in line, line
