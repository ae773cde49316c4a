"""The tokenizer of a model directory or of a GGUF file."""

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as mlx_lm_load

from ..errors import AHNError
from .ggufile import GGUFile

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("vocab.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """That of a directory, which ends where config says. Raises AHNError without one."""
    if not any((path / name).is_file() for name in VOCABULARIES):
        # Without any vocabulary, transformers makes up an empty tokenizer.
        raise AHNError(f"{path}: no usable tokenizer; copy tokenizer.json from the base model")
    try:
        return mlx_lm_load(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as e:  # transformers raises many kinds for a missing tokenizer
        reason = " ".join(str(e).split())[:200]
        raise AHNError(f"{path}: no usable tokenizer ({reason}); copy the base's files") from None


def gguf_tokenizer(path: Path) -> TokenizerWrapper:
    """The tokenizer inside a GGUF file. Raises AHNError if there is none that we know."""
    return GGUFile(path).tokenizer()
