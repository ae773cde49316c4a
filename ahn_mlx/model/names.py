"""What the parameters of the memory are called: in the PyTorch release, and here."""

import re
from typing import TypeVar

from ..errors import AHNError, show

T = TypeVar("T")

# Where the memory is: in the PyTorch release beside the attention, here inside it.
_OURS = {"ahn.fn.": "self_attn.ahn.", "ahn_router.": "self_attn.router."}
_PUBLISHED = re.compile(r"(model\.layers\.\d+\.)(ahn\.fn\.|ahn_router\.)(.+)", re.DOTALL)
_MEMORY = re.compile(r"(model\.layers\.\d+\.)(self_attn\.ahn\.|self_attn\.router\.)(.+)", re.DOTALL)


def rename_published(weights: dict[str, T], fa_layer_ids: tuple[int, ...] = ()) -> dict[str, T]:
    """The names of the PyTorch release to ours; other names stay. Drops what no model uses:
    D of Gated DeltaNet, precomputed rotary frequencies, and the memory that the release
    gives even to layers that keep full attention."""
    renamed: dict[str, T] = {}
    unused = tuple(f"model.layers.{i}.{part}" for i in fa_layer_ids for part in _OURS)
    for published, value in weights.items():
        name = published
        if m := _PUBLISHED.fullmatch(published):
            if m[2] == "ahn.fn." and m[3] == "D":
                continue
            name = m[1] + _OURS[m[2]] + m[3]
        if published.startswith(unused) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name in renamed:
            raise AHNError(f"tensor {show(published)} is there under two names; remove one")
        renamed[name] = value
    return renamed


def published_name(name: str) -> str:
    """The PyTorch release's name of one of our parameters, as a user knows it."""
    m = _MEMORY.fullmatch(name)
    if m is None:
        return name
    return m[1] + {ours: theirs for theirs, ours in _OURS.items()}[m[2]] + m[3]


def is_router(name: str) -> bool:
    """Whether a tensor, by our name, belongs to a router."""
    found = _MEMORY.fullmatch(name)
    return found is not None and found[2] == "self_attn.router."


def is_memory(name: str) -> bool:
    """Whether a tensor, under either name, belongs to the memory and not to the base."""
    return bool(_PUBLISHED.fullmatch(name) or _MEMORY.fullmatch(name))
