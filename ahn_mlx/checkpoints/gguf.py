"""What GGUF files have beside tensors: their rows' order, the tokens that end a text, and the
tokenizer and chat template that are packed into the metadata."""

from functools import partial
from statistics import mode
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import AHNError, foreign, show

SPACE = "\u2581"  # sentencepiece's
LONGEST = 1 << 10  # characters of a token, whose every part is looked for

# Types of tokens. The others are undefined (0), normal (1), unused (5) and bytes (6): text
# becomes one of them by merges alone.
UNKNOWN, CONTROL, USER_DEFINED, LAST_TYPE = 2, 3, 4, 6

# Tokens that end a text, as llama.cpp knows them: by role, and by what they are called,
# for a file names one of a role and models have more.
END_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
END_TOKENS = {
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>"),
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
}


class Style(NamedTuple):
    """How a family's text becomes tokens, as in its tokenizer.json."""

    words: list[Any]  # pre-tokenizers
    normalizer: Any = None
    whole_words: bool = False  # a word that is a token needs no merges
    bos: bool = False  # whether a text begins with BOS where the file does not say


def _words(digits: str) -> list[Any]:
    return [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + "|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


# Of Mistral: capitals begin a word, contractions are none.
_TEKKEN = [
    pre_tokenizers.Split(
        Regex(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "isolated",
    ),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = Style(_words(r"\p{N}{1,3}"), whole_words=True, bos=True)

# Names of pre-tokenizers in GGUF, those whose tokenizer.json is known to the letter.
STYLES = {
    "gpt-2": Style([_GPT2]),
    "smollm": Style([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "qwen2": Style(_words(r"\p{N}"), normalizers.NFC()),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": Style(_TEKKEN, whole_words=True, bos=True),
}


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """From RoPE pairs (2i, 2i + 1), as stored, to pairs (i, i + D/2), as in mlx-lm."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [H, D/2, 2, in]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def end_ids(metadata: dict[str, Any], count: int) -> list[int]:
    """The tokens that end a text, of `count` in all. Raises AHNError on an id that is none."""
    ids = {i for role in END_ROLES if (i := _role(metadata, role, count)) is not None}
    tokens, types = _listed(metadata, "tokens"), _listed(metadata, "token_type")
    for i, (token, kind) in enumerate(zip(tokens[:count], types, strict=False)):
        # An ordinary token with such a text is written by ordinary texts.
        if kind in (CONTROL, USER_DEFINED) and token in END_TOKENS:
            ids.add(i)
    return sorted(ids)


def load_tokenizer(metadata: dict[str, Any], count: int) -> TokenizerWrapper:
    """The tokenizer in a file's metadata, byte-level BPE or sentencepiece's, for a model of `count`
    tokens, with its chat template. Raises AHNError, without the file's name, if there is none or
    it is not of a family that is known."""
    pieces = entry(metadata, "tokenizer.ggml.model") == "llama"
    style = Style([], bos=True) if pieces else _style(metadata)
    tokens, types = _tokens(metadata, count)
    spaced = entry(metadata, "tokenizer.ggml.add_space_prefix", True) is not False
    with foreign(_unusable):
        if pieces:
            table = _pieces(tokens, types, _merges_by_score(metadata, tokens, types), spaced)
        else:
            table = _bpe(tokens, style, _merges(metadata, set(tokens)))
    ends = end_ids(metadata, count)
    roles = {role: _role(metadata, role, count) for role in ("bos", "eos", "padding", "unknown")}
    if roles["eos"] is None and ends:
        roles["eos"] = ends[0]
    adds = {role: _adds(metadata, role) for role in ("bos", "eos")}
    for role, added in adds.items():
        if added and roles[role] is None:
            raise AHNError(f"it adds a token to every text, but names no {role}_token_id")
    if adds["bos"] is None:
        adds["bos"] = style.bos and roles["bos"] is not None
    names = {role: None if i is None else tokens[i] for role, i in roles.items()}
    template = entry(metadata, "tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise AHNError(f"its chat template is {show(template)}, not a text")
    with foreign(_unusable):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_with_added(table, tokens, types, ends),
            bos_token=names["bos"],
            eos_token=names["eos"],
            pad_token=names["padding"],
            unk_token=names["unknown"],
            add_bos_token=adds["bos"],
            add_eos_token=bool(adds["eos"]),
            chat_template=template or None,
            clean_up_tokenization_spaces=False,
        )
        streaming = partial(SPMStreamingDetokenizer, trim_space=spaced)
        detokenizer = streaming if pieces else BPEStreamingDetokenizer
        return TokenizerWrapper(tokenizer, detokenizer, eos_token_ids=ends)


def _unusable(why: str) -> str:
    return f"no usable tokenizer in it ({why})"


def _style(metadata: dict[str, Any]) -> Style:
    kinds = [entry(metadata, f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    if kinds[0] == "gpt2" and isinstance(kinds[1], str) and kinds[1] in STYLES:
        return STYLES[kinds[1]]
    kind = ""
    if kinds[0] is not None:
        known = ", ".join(("llama", *(f"gpt2/{name}" for name in STYLES)))
        kind = f", {show('/'.join(map(str, kinds)))} is none of {known}"
    raise AHNError(f"no usable tokenizer in it{kind}; the model needs the base's tokenizer.json")


def _bpe(tokens: list[str], style: Style, merges: list[tuple[str, str]]) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=style.whole_words))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(style.words)
    if style.normalizer is not None:
        bpe.normalizer = style.normalizer
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _pieces(
    tokens: list[str], types: list[int], merges: list[tuple[str, str]], spaced: bool
) -> Tokenizer:
    """As sentencepiece: spaces are letters, and what has no token becomes bytes. spaced: one is
    put before a text."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next(
        (token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None
    )
    bpe = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    replaced = normalizers.Replace(" ", SPACE)
    first = [normalizers.Prepend(SPACE)] if spaced else []
    bpe.normalizer = normalizers.Sequence([*first, replaced])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return bpe


def _merges_by_score(
    metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> list[tuple[str, str]]:
    """Pairs that make a piece, those of high scores first."""
    scores = _listed(metadata, "scores")
    if len(scores) != len(tokens) or not all(type(x) in (int, float) for x in scores):
        raise AHNError("its tokenizer has no scores, or not one for each token")
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind <= 1}
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    return [
        (token[:n], token[n:])
        for token in (tokens[i] for i in ranked if types[i] <= 1)
        for n in range(1, len(token))
        if token[:n] in normal and token[n:] in normal
    ]


def _with_added(bpe: Tokenizer, tokens: list[str], types: list[int], ends: list[int]) -> Tokenizer:
    """Tokens that text becomes as a whole."""
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} | set(ends)
    whole = special | {i for i, kind in enumerate(types) if kind == USER_DEFINED}
    bpe.add_tokens(
        [AddedToken(tokens[i], normalized=False, special=i in special) for i in sorted(whole)]
    )
    return bpe


def _tokens(metadata: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Every token and its type."""
    tokens, types = _listed(metadata, "tokens"), _listed(metadata, "token_type")
    if tokens and not isinstance(tokens[0], str):
        raise AHNError(f"its tokenizer has the token {show(tokens[0])}, which is no text")
    if len(tokens) != count:
        raise AHNError(f"its tokenizer has {len(tokens):,} tokens and its embedding {count:,}")
    if long := next((token for token in tokens if len(token) > LONGEST), None):
        raise AHNError(f"its tokenizer has a token of {len(long):,} characters, {show(long)}")
    if len(types) != count:
        raise AHNError(f"its tokenizer has {count:,} tokens and types for {len(types):,} of them")
    if odd := [kind for kind in types if type(kind) is not int or not 0 <= kind <= LAST_TYPE]:
        raise AHNError(f"its tokenizer has a token of type {show(odd[0])}, which is not known")
    if len(set(tokens)) != count:
        raise AHNError(f"its tokenizer has the token {show(mode(tokens))} twice")
    return tokens, types


def _merges(metadata: dict[str, Any], tokens: set[str]) -> list[tuple[str, str]]:
    if "tokenizer.ggml.merges" not in metadata:
        raise AHNError("its tokenizer has no merges")
    merges = []
    for i, merge in enumerate(_listed(metadata, "merges")):
        parts = merge.split(" ") if isinstance(merge, str) else ()
        if len(parts) != 2:
            raise AHNError(f"merge {i + 1} of its tokenizer, {show(merge)}, is not two tokens")
        if odd := [t for t in (*parts, "".join(parts)) if t not in tokens]:
            raise AHNError(
                f"merge {i + 1} of its tokenizer, {show(merge)}, needs {show(odd[0])}, "
                "which is no token"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _listed(metadata: dict[str, Any], key: str) -> list[Any]:
    """A list of the tokenizer's; empty if it has none."""
    value = entry(metadata, f"tokenizer.ggml.{key}")
    return value if isinstance(value, list) else []


def _role(metadata: dict[str, Any], role: str, count: int) -> int | None:
    """The id of the token with this role, if one has it."""
    value = entry(metadata, f"tokenizer.ggml.{role}_token_id")
    if value is None or value == -1 or value == 0xFFFFFFFF:  # how llama.cpp writes none
        return None
    if type(value) is not int or not 0 <= value < count:
        raise AHNError(f"its {role}_token_id is {show(value)}, not one of {count:,} tokens")
    return value


def _adds(metadata: dict[str, Any], role: str) -> bool | None:
    """Whether a text gets this token; None if the file does not say."""
    value = entry(metadata, f"tokenizer.ggml.add_{role}_token")
    if not isinstance(value, bool | None):
        raise AHNError(f"its add_{role}_token is {show(value)}, not true or false")
    return value


def entry(metadata: dict[str, Any], name: str, default: Any = None) -> Any:
    """A value of the metadata as Python has it; an array that is compared with one is many."""
    value = metadata.get(name, default)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
