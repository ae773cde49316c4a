"""From text to token ids, so that what a user gives stays text.

A control token (the end of a turn, the begin of a message) counts only where scaffolding says
it, the text of a chat template. In a document `<|im_end|>` is a few letters and signs.
"""

import json
import secrets
from functools import cached_property
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer

from ..checkpoints.tokenizer import unheard
from ..errors import AHNError, foreign, show
from .text import readable


class Encoder:
    """Token ids of scaffolding and content.

    begin: ids that the tokenizer puts before a text that begins (BOS); many put none.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self.tokenizer = tokenizer
        self.controls = _controls(tokenizer)
        self.begin = _begin(tokenizer)

    def __call__(self, *pieces: str) -> list[int]:
        """Ids of the pieces as one text. By turns they are scaffolding and content, and only
        scaffolding has control tokens.

        Raises AHNError if the tokenizer fails, or cannot tell the two apart.
        """
        pieces = tuple(readable(piece) for piece in pieces)
        ids = encode(self.tokenizer, "".join(pieces))
        meant = [i for piece in pieces[::2] for i in self._said(encode(self.tokenizer, piece))]
        if self._said(ids) == meant:
            return ids
        literal = self._literal
        if literal is not None:
            ids = literal.encode(
                "".join(piece if n % 2 else self._mark(piece) for n, piece in enumerate(pieces))
            )
        said = self._said(ids)
        if said != meant:
            quoted = next((i for i in said if i not in meant), said[0] if said else meant[0])
            raise AHNError(
                f"the text has {show(self.controls[quoted].content)}, which this tokenizer cannot"
                " take for anything but a control token; take it out of the text"
            )
        return ids

    def _said(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self.controls]

    def _mark(self, scaffolding: str) -> str:
        """Scaffolding with a stand-in for each control token."""
        assert self._literal is not None
        with foreign(_unread):
            found = self.tokenizer.backend_tokenizer.encode(scaffolding, add_special_tokens=False)
        parts, at = [], 0
        for i, (start, end) in zip(found.ids, found.offsets, strict=True):
            if i in self.controls:
                # Some tokens take white space around them along: theirs, and it stays.
                name = self.controls[i].content
                inner = scaffolding.find(name, start, end)
                if inner >= 0:
                    start, end = inner, inner + len(name)
                parts += [scaffolding[at:start], self._literal.stand_ins[i]]
                at = end
        return "".join([*parts, scaffolding[at:]])

    @cached_property
    def _literal(self) -> "_Literal | None":
        """None if the tokenizer is not of the kind that can be rebuilt."""
        try:
            # No backend, or one with parts in Python, or one that panics.
            with foreign(str), unheard():
                literal = _Literal.of(self.tokenizer.backend_tokenizer, self.controls)
                probe = "One, two\n\n  3 \u2013 \u00e9t\u00e9"
                same = literal.encode(probe) == encode(self.tokenizer, probe)
        except AHNError:
            return None
        return literal if same else None


class _Literal(NamedTuple):
    """A copy of a tokenizer which knows control tokens by other names only, that no text has."""

    tokenizer: Tokenizer
    stand_ins: dict[int, str]
    originals: dict[int | None, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, controls: dict[int, AddedToken]) -> "_Literal":
        nonce = secrets.token_hex(8)
        stand_ins = {i: f"<{nonce}x{i}>" for i in controls}
        facts = json.loads(tokenizer.to_str())
        for token in facts["added_tokens"]:
            token["special"] = token["id"] in controls
        _rename(facts["model"], {controls[i].content: name for i, name in stand_ins.items()})
        other = Tokenizer.from_str(json.dumps(facts))
        other.no_truncation()
        other.no_padding()
        other.encode_special_tokens = True  # as the text that they are
        # The words that a thread has met would stay with it when this copy is gone.
        if resize_cache := getattr(other.model, "_resize_cache", None):
            resize_cache(0)
        for i, name in stand_ins.items():
            was = controls[i]
            sides = {"lstrip": was.lstrip, "rstrip": was.rstrip, "normalized": was.normalized}
            other.add_tokens([AddedToken(name, special=False, **sides)])
        originals = {other.token_to_id(name): i for i, name in stand_ins.items()}
        return cls(other, stand_ins, originals)

    def encode(self, text: str) -> list[int]:
        # One text alone would be encoded with Python's lock held, and all threads wait.
        with foreign(_unread):
            (found,) = self.tokenizer.encode_batch([text], add_special_tokens=False)
        return [self.originals.get(i, i) for i in found.ids]


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """A vocabulary may list control tokens among its words, and find them in a text."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[names.get(word, word), score] for word, score in vocab]
        return
    model["vocab"] = {names.get(word, word): i for word, i in vocab.items()}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
    if pairs:
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]


def _controls(tokenizer: TokenizerWrapper) -> dict[int, AddedToken]:
    """Special tokens, those that end an answer, and names in brackets that the chat template
    speaks of, such as <think>."""
    template = tokenizer.chat_template or ""
    text = "".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    # What a model says for characters that it does not know is no control token.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unknown = getattr(getattr(backend, "model", None), "unk_token", tokenizer.unk_token)

    def counts(i: int, token: AddedToken) -> bool:
        name = token.content
        bracketed = f"{name[:1]}{name[-1:]}" in ("<>", "[]") and name in text
        ends = i in tokenizer.eos_token_ids
        return ends or (name != unknown and bool(token.special or bracketed))

    return {i: token for i, token in tokenizer.added_tokens_decoder.items() if counts(i, token)}


def _begin(tokenizer: TokenizerWrapper) -> list[int]:
    plain, whole = encode(tokenizer, "a"), encode(tokenizer, "a", add_special_tokens=True)
    for at in range(len(whole) - len(plain) + 1):
        if plain and whole[at : at + len(plain)] == plain:
            return whole[:at]
    return [i for i in whole[:1] if i == tokenizer.bos_token_id]


def encode(tokenizer: TokenizerWrapper, text: str, add_special_tokens: bool = False) -> list[int]:
    if not text:
        return []
    with foreign(_unread):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _unread(why: str) -> str:
    return f"the tokenizer cannot read this text ({why})"


def check_ids(ids: list[int], model: nn.Module) -> None:
    """Raise AHNError for a token that the model has no embedding of, where MLX would read
    whatever lies behind the table."""
    wrong = next((i for i in ids if not 0 <= i < model.args.vocab_size), None)
    if wrong is not None:
        raise AHNError(
            f"token {wrong} is not among the model's {model.args.vocab_size:,}; the tokenizer is"
            " another model's, or has tokens added that the model was not given"
        )
