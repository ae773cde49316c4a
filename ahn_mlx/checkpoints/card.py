"""Model cards: the README.md of a converted directory, and what it says about origins.

The front matter is what the hub's pages read; its `ahn_sources` also tells us which
revisions a directory was made from.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..model.config import AHNConfig
from .baseconfig import read_config
from .directory import check_member

CARD = "README.md"
MAX_CARD = 1 << 20  # bytes
MAX_FRONT = 1 << 15  # of its front matter, which takes long to read
MAX_LISTS = 1 << 9  # [ and { in it, each of which takes as long as there are

# Licences of bases, for when a copy has no card.
LICENCES = {
    "Qwen/Qwen2.5-3B-Instruct": "qwen-research",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-14B-Instruct": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
}

TEXT = """\
# {title}

An [Artificial Hippocampus Network](https://arxiv.org/abs/2510.07318) for
[MLX](https://github.com/ml-explore/mlx): it reads texts of any length in constant memory.

| | |
|---|---|
{rows}

    pip install ahn-mlx
    ahn-mlx generate book.txt "How does it end?" --model {title}

With that package installed, mlx-lm runs this directory or repository too, with
`--trust-remote-code`.
"""


class Origin(NamedTuple):
    """Where a part of a model is from. revision: a commit, or empty if it is not known."""

    part: str
    repo: str
    revision: str = ""
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.repo} at {self.revision}" if self.revision else self.repo


def origin(part: str, path: Path) -> Origin:
    """What a directory is a copy of: a repository if it lies in huggingface-hub's cache,
    where models--ORG--NAME/snapshots/COMMIT is one, else just its own name."""
    path = path.resolve()
    repo, revision = path.name, ""
    owner = path.parent.parent.name
    if path.parent.name == "snapshots" and owner.startswith("models--"):
        repo, revision = owner.removeprefix("models--").replace("--", "/"), path.name
    data = _front_matter(path)
    licence = data.get("license_name") or data.get("license") or LICENCES.get(repo, "")
    return Origin(part, repo, revision, _line(licence) if isinstance(licence, str) else "")


def read_origins(directory: Path) -> list[Origin]:
    """What write_card has recorded; nothing if there is no such card."""
    try:
        found = [Origin(**fields) for fields in _front_matter(directory)["ahn_sources"]]
    except (KeyError, TypeError):
        return []
    if not all(isinstance(field, str) for origin in found for field in origin):
        return []
    return [Origin(*map(_line, origin)) for origin in found]


def base_model(directory: Path) -> str:
    """The first repository that a card names as the base, or ""."""
    named = _front_matter(directory).get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return _line(first) if isinstance(first, str) else ""


def write_card(directory: Path, title: str, origins: list[Origin]) -> None:
    """Describe the model in `directory`, which has its config.json already."""
    text = card(directory, title, origins)
    # A directory's name need not be UTF-8.
    (directory / CARD).write_text(text, encoding="utf-8", errors="replace")


def card(directory: Path, title: str, origins: list[Origin]) -> str:
    """The text of README.md. title: the name that runs it."""
    config = read_config(directory)
    ahn, quantization = AHNConfig.from_dict(config), config.get("quantization")
    licences = {o.licence for o in origins}
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "ahn"],
        license=licences.pop() if len(licences) == 1 and "" not in licences else "other",
        base_model=[o.repo for o in origins if o.revision] or None,
        ahn_sources=[o._asdict() for o in origins],
    )
    packed = (
        f"{quantization['bits']} bits in groups of {quantization['group_size']}; memory is not"
        if quantization
        else "none"
    )
    rows = [
        *((o.part, str(o)) for o in origins),
        ("kind of memory", ahn.memory),
        ("window", f"{ahn.window:,} tokens and {ahn.sinks:,} sinks"),
        ("quantization", packed),
        *((f"licence of the {o.part}", o.licence or "see there") for o in origins),
    ]
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    return f"---\n{data.to_yaml()}\n---\n\n{TEXT.format(title=title, rows=table)}"


def _line(text: str) -> str:
    """Names of licences and repositories come from anyone: one line of what can be printed."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _front_matter(path: Path) -> dict[str, Any]:
    file = path / CARD
    if not file.is_file() or file.stat().st_size > MAX_CARD:
        return {}
    check_member(file)
    with file.open("rb") as f:
        begin = f.read(MAX_FRONT).decode("utf-8-sig", "replace")
    front = REGEX_YAML_BLOCK.search(begin)
    if front and front[2].count("[") + front[2].count("{") > MAX_LISTS:
        return {}
    try:
        found = yaml.safe_load(front[2]) if front else None
    except Exception:  # someone else's YAML; a card is no reason to fail
        return {}
    return found if isinstance(found, dict) else {}
