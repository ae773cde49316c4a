"""A byte-level BPE as one file of tables, for a reader in any language.

What regular expressions and Unicode say of a character is asked of `tokenizers` itself, so that
its version of Unicode is the one that counts. All numbers are little-endian, and nothing in the
file has to be computed again: it is searched where it lies.
"""

import json
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from ..errors import AHNError, show
from ..reading.tokens import Encoder

MAGIC = b"AHNTOK1\n"

# Surrogates are no characters, and in planes 4 to 13, and behind the tags, there are none.
RANGES = (range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))
CHARACTERS = [chr(c) for r in RANGES for c in r]

MOST = 1 << 24  # tokens

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns of the splitters that a reader has: 0 is GPT-2's, which ByteLevel brings.
PATTERNS = {
    _CONTRACTIONS + _WORDS % r"\p{N}": 1,  # Qwen2
    _CONTRACTIONS + _WORDS % r"\p{N}{1,3}": 2,  # Llama-3
}


class NoTable(AHNError):
    """A tokenizer of a kind that no app can read."""

    def __init__(self, what: str):
        super().__init__(f"this tokenizer cannot be exported: {what}")


def pack_tokenizer(tokenizer: TokenizerWrapper) -> bytes:
    """The file. Raises AHNError, by name, for what is no byte-level BPE with the splitter of
    GPT-2, Qwen2 or Llama-3."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise NoTable("it is not one of the tokenizers library")
    facts = json.loads(backend.to_str())
    splitter, digits = _splitter(facts["pre_tokenizer"])
    composed = _normalizer(facts["normalizer"])
    _check_model(facts["model"])
    added = _added(facts["added_tokens"], composed)
    words = _words(facts["model"]["vocab"])
    size = 1 + max([*words, *added], default=-1)
    if not 0 < size <= MOST:
        raise NoTable(f"its tokens have numbers up to {size - 1:,}")
    controls = Encoder(tokenizer).controls
    tokens = [added.get(i, words.get(i, b"")) for i in range(size)]
    whole = facts["model"]["ignore_merges"]
    listed = sorted((text, i) for i, text in words.items() if text) if whole else []
    sections = [
        _numbers(np.cumsum([0, *map(len, tokens)])),
        b"".join(tokens),
        _numbers(_bytes(words, facts["model"]["unk_token"])),
        _numbers(_merges(facts["model"], words)),
        _numbers([i for _, i in listed]),
        _numbers([x for i in sorted(added) for x in (i, i in controls)]),
        *map(_numbers, _classes()),
        *((_numbers(x) for x in _canonical()) if composed else (b"", b"", b"")),
    ]
    flags = splitter | digits << 8 | whole << 9 | composed << 10
    head = struct.pack("<IIII", flags, size, len(sections), 0)
    return MAGIC + head + b"".join(map(_section, sections))


def _section(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data + b"\0" * (-len(data) % 8)


def _numbers(values: Any) -> bytes:
    return np.asarray(values, dtype="<u4").tobytes()


# What the tokenizer is


def _splitter(facts: Any) -> tuple[int, bool]:
    """Number of the splitter, and whether each digit stands alone before it."""
    parts = facts["pretokenizers"] if facts and facts["type"] == "Sequence" else [facts or {}]
    kinds, last = [part.get("type") for part in parts], (parts or [{}])[-1]
    if not kinds or kinds[-1] != "ByteLevel" or last["add_prefix_space"]:
        raise NoTable(f"its splitter ends with {show(last.get('type'))}, not with plain bytes")
    if kinds in (["ByteLevel"], ["Digits", "ByteLevel"]) and last["use_regex"]:
        alone = len(parts) == 2
        if not alone or parts[0]["individual_digits"]:
            return 0, alone
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
        split = parts[0]
        number = PATTERNS.get(split["pattern"].get("Regex", ""))
        if number and split["behavior"] == "Isolated" and not split["invert"]:
            return number, False
        raise NoTable(f"it splits by {show(split['pattern'])}")
    raise NoTable(f"it splits by {show(' and '.join(map(str, kinds)))}")


def _normalizer(facts: Any) -> bool:
    """Whether texts are composed (NFC) first."""
    if facts and facts["type"] == "Sequence" and len(facts["normalizers"]) == 1:
        facts = facts["normalizers"][0]
    if facts and facts["type"] != "NFC":
        raise NoTable(f"its normalizer is {show(facts['type'])}")
    return bool(facts)


def _check_model(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        raise NoTable(f"it is {show(model['type'])}, not byte-level BPE")
    given = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for name in given:
        if model.get(name):
            raise NoTable(f"it has {name}")


def _added(tokens: list[dict[str, Any]], composed: bool) -> dict[int, bytes]:
    for token in tokens:
        asked = [name for name in ("single_word", "lstrip", "rstrip") if token[name]]
        if token["normalized"] and composed:
            asked.append("normalized")
        if asked:
            raise NoTable(f"its token {show(token['content'])} is {asked[0]}")
        if not token["content"]:
            raise NoTable("it has an empty token")
    return {token["id"]: token["content"].encode() for token in tokens}


def _words(vocab: dict[str, int]) -> dict[int, bytes]:
    """Bytes of each word; one that is not in the signs of bytes is its own text."""
    signs = byte_signs()
    return {
        i: bytes(signs[c] for c in word) if all(c in signs for c in word) else word.encode()
        for word, i in vocab.items()
    }


def byte_signs() -> dict[str, int]:
    """The sign that byte-level BPE has for each byte, and the byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _bytes(words: dict[int, bytes], unknown: str | None) -> list[int]:
    """Token of each byte, or NONE: the byte vanishes from texts. Raises NoTable if something
    else would stand for it."""
    found = {text[0]: i for i, text in words.items() if len(text) == 1}
    missing = [b for b in range(256) if b not in found]
    if missing and unknown is not None:
        raise NoTable(f"it has no token for the byte {missing[0]:#04x}, but an unknown one")
    return [found.get(b, NONE) for b in range(256)]


NONE = 0xFFFFFFFF


def _merges(model: dict[str, Any], words: dict[int, bytes]) -> np.ndarray:
    """[n, 4]: left, right, rank and what they become, sorted by left and right."""
    vocab = model["vocab"]
    rows: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        # Of two tokens with one number the library forgets one.
        if absent := next((x for x in (left, right, left + right) if x not in vocab), None):
            raise NoTable(f"its merges have {show(absent)}, which has no number of its own")
        rows[vocab[left], vocab[right]] = rank, vocab[left + right]
    return np.array([(*pair, *rows[pair]) for pair in sorted(rows)], dtype="<u4")


# What characters are


@cache
def _classes() -> list[list[int]]:
    """First and last code point of each run of letters, numbers and spaces; and of digits as the
    splitter of digits counts them."""
    text = "".join(CHARACTERS)
    classes = []
    for pattern in (r"\p{L}+", r"\p{N}+", r"\s+"):
        matched = [True] * len(text)
        for _, (start, end) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(
            text
        ):
            matched[start:end] = [False] * (end - start)
        classes.append(matched)
    # Runs that are digits and runs that are not, by turns; the first is not.
    runs = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(text)
    digits = [n % 2 == 1 for n, (_, (start, end)) in enumerate(runs) for _ in range(start, end)]
    return [_ranges(matched) for matched in (*classes, digits)]


def _ranges(matched: list[bool]) -> list[int]:
    """First and last code point of each run."""
    codes = np.array([ord(c) for c in CHARACTERS])[np.array(matched)]
    breaks = np.flatnonzero(np.diff(codes) > 1)
    firsts, lasts = np.r_[codes[:1], codes[breaks + 1]], np.r_[codes[breaks], codes[-1:]]
    return list(np.stack([firsts, lasts], axis=1).flat)


@cache
def _canonical() -> tuple[list[int], list[int], list[int]]:
    """Composition (NFC): (character, class) of those that are reordered; (character, n, its
    decomposition of n), sorted; (first, second, composed), sorted. Hangul is computed."""
    apart, together = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    parts = apart("\n".join(CHARACTERS)).split("\n")
    # Two of them stand for the line feed itself.
    parts = [*parts[:10], "\n", *parts[12:]]
    decomposed = {c: p for c, p in zip(CHARACTERS, parts, strict=True) if p != c and not _hangul(c)}
    composed = {}
    for c, p in decomposed.items():
        first, second = together(p[:-1]), p[-1]
        if len(p) > 1 and len(first) == 1 and together(first + second) == c:
            composed[ord(first), ord(second)] = ord(c)
    rows = [x for c, p in decomposed.items() for x in (ord(c), len(p), *map(ord, p))]
    pairs = [x for pair in sorted(composed) for x in (*pair, composed[pair])]
    return _combining(apart, decomposed), rows, pairs


def _hangul(c: str) -> bool:
    return 0xAC00 <= ord(c) < 0xD7A4


def _combining(apart: Callable[[str], str], decomposed: dict[str, str]) -> list[int]:
    """(character, class): numbers that sort marks as the standard's classes do."""
    low, high = "\u0334", "\u0345"  # of the first class and of the last
    signs = [c for c in CHARACTERS if not (c in decomposed or c == "\n" or _hangul(c))]

    def swapped(before: str, after: str) -> list[str]:
        lines = apart("\n".join(f"a{before}{c}{after}" for c in signs)).split("\n")
        return [c for c, x in zip(signs, lines, strict=True) if x != f"a{before}{c}{after}"]

    marks = sorted({*swapped("", low), *swapped(high, ""), low, high}, key=ord)
    # A mark belongs behind as many others as it lets pass.
    classes: dict[str, int] = {}
    for c in marks:
        lines = apart("\n".join(f"a{c}{other}" for other in marks)).split("\n")
        classes[c] = sum(x[1] != c for x in lines) + 1
    return [x for c in marks for x in (ord(c), classes[c])]
