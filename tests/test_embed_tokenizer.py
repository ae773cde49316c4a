"""The tokenizer of the library in embed/ against `tokenizers`, for each splitter."""

import random
import struct

import numpy as np
import pytest
from checkpoints import CHATML, CONTROLS
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from ahn_mlx.apps.tokenizer import pack_tokenizer
from ahn_mlx.hub import zoo
from ahn_mlx.reading.tokens import Encoder
from embed import needs_tools, run, sections, tokenize

BOOK = (zoo.WEIGHTS.parent / "demo/pride-and-prejudice.txt").read_text()
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FOREIGN = (
    "\u6c49\u5b57\u4eec\u7684\u6545\u4e8b, \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 "
    "\ud55c\uad6d\uc5b4 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e0062\U000e007f "
    "na\u00efve "
)


def splitters():
    words = {
        "qwen2": CONTRACTIONS + REST.replace("NUMBER", r"\p{N}"),
        "llama3": CONTRACTIONS + REST.replace("NUMBER", r"\p{N}{1,3}"),
    }
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = {
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(p), "isolated"), plain])
        for name, p in words.items()
    }
    return {"gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False), **made}


@pytest.fixture(scope="module")
def trained():
    """Small tokenizers, trained with each splitter on several scripts."""
    found = {}
    for name, splitter in splitters().items():
        bpe = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
        bpe.pre_tokenizer, bpe.decoder = splitter, decoders.ByteLevel()
        if name == "qwen2":
            bpe.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=3000, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator([BOOK[:200_000], FOREIGN * 50], trainer)
        bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROLS])
        bpe.add_tokens([AddedToken("<tool>", normalized=False)])
        found[name] = TokenizerWrapper(
            PreTrainedTokenizerFast(
                tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=CHATML
            )
        )
    return found


@pytest.fixture(scope="module")
def smollm2():
    return zoo.smollm2_base()[1]


def fuzz(n: int, seed: int) -> list[str]:
    """Texts that splitters, composition and merges disagree on most easily."""
    rng = random.Random(seed)
    marks = "\u0301\u0323\u0308\u0345\u0334\u05b0\u0e38\u3099\u1dce\u0591\U0001d165"
    letters = (
        "aAzZ\u00e9\u00c5\u212b\u017fs\u0130\u1e9e\u00df\ufb01\u1100\u1161\u11a8\uac00\u304b\u4e2d"
    )
    blanks = " \n\r\t\u00a0\u2003\u3000\u0085\u200b\u2028"
    others = "'.,!-_\"<>=\u2014\U0001f600\u200d\ufe0f\u0000\u0004\u007f\ufffd\u0338"
    numbers = "0123456789\u0663\u00b2\u2167\u00bd\U0001d7d8"
    words = ["'s", "'S", "'LL", "'ve", "'\u017f", "Mr. ", "the ", "<tool>", "  \n", "\r\n"]
    pools = [marks, letters, blanks, others, numbers]
    texts = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.1:
                parts.append(rng.choice(words))
            elif kind < 0.16:
                code = rng.randrange(0x110000)
                parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "x")
            else:
                parts.append(rng.choice(rng.choice(pools)))
        texts.append("".join(parts))
    return texts


def check(tokenizer, texts, path):
    tables = path / "tokenizer.bin"
    tables.write_bytes(pack_tokenizer(tokenizer))
    encoder = Encoder(tokenizer)
    for text, (ids, said) in zip(texts, tokenize(tables, texts), strict=True):
        expected = encoder("", text)
        assert ids == expected, ascii(text)
        decoded = tokenizer.decode(ids)
        # An answer does not begin with the space of its first word.
        assert said == decoded.removeprefix(" "), ascii(text)


LONG = [BOOK[:120_000], FOREIGN * 20, "a" * 3000 + " " * 3000 + "\n" * 999, "\u0301" * 500]


@needs_tools
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3"])
def test_every_splitter_says_what_tokenizers_says(name, trained, tmp_path):
    check(trained[name], [*LONG, *fuzz(3000, 1)], tmp_path)


@needs_tools
def test_smollm2(smollm2, tmp_path):
    check(smollm2, [*LONG, *fuzz(3000, 2)], tmp_path)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3", "smollm2"])
def test_sixty_thousand_texts(name, trained, smollm2, tmp_path):
    tokenizer = smollm2 if name == "smollm2" else trained[name]
    check(tokenizer, [BOOK, *fuzz(60_000, 3)], tmp_path)


@needs_tools
@pytest.mark.slow
def test_every_character_alone_and_between_letters(trained, tmp_path):
    """All of Unicode, in texts of 256 characters with something between them."""
    codes = [c for c in range(0x20000) if not 0xD800 <= c < 0xE000]
    texts = []
    for between in ("", "a", " 1"):
        runs = (codes[i : i + 256] for i in range(0, len(codes), 256))
        texts += [between.join(map(chr, run)) for run in runs]
    for name in ("gpt2", "qwen2"):
        check(trained[name], texts, tmp_path)


def joined(head: bytes, parts: list[bytes]) -> bytes:
    return head + b"".join(struct.pack("<Q", len(p)) + p + b"\0" * (-len(p) % 8) for p in parts)


# Section, number in it, and what it becomes, of the numbers and of how many tokens there are.
WRONG = {
    "its words overlap": (0, 3, lambda x, size: x[4] + 1),
    "its words are cut": (0, -1, lambda x, size: x[-1] + 1),
    "a byte is no word": (2, 97, lambda x, size: size),
    "a merge is of no words": (3, 1, lambda x, size: size),
    "a word is not there": (4, 0, lambda x, size: size),
    "a token is not there": (5, 0, lambda x, size: size),
    "a range is wrong": (6, 2, lambda x, size: x[1]),  # begins where the one before ends
    "a range is wrong (falls)": (7, 3, lambda x, size: x[2] - 1),
    "a range is wrong (far)": (8, -1, lambda x, size: 0x110000),
    "a decomposition is cut": (11, 1, lambda x, size: 65),
    "a decomposition is of no characters": (11, 2, lambda x, size: 0x110000),
    "a composition is no character": (12, 2, lambda x, size: 0x110000),
}


@needs_tools
@pytest.mark.parametrize("said", WRONG)
def test_tables_that_contradict_themselves(said, trained, tmp_path):
    section, at, becomes = WRONG[said]
    # Words are listed where merges may be ignored, characters composed where they are.
    file = pack_tokenizer(trained["llama3" if section == 4 else "qwen2"])
    parts = sections(file)
    numbers = np.frombuffer(parts[section], "<u4").copy()
    numbers[at] = becomes(numbers, struct.unpack_from("<I", file, 12)[0])
    tables = tmp_path / "tokenizer.bin"
    assert joined(file[:24], parts) == file
    tables.write_bytes(
        joined(file[:24], [*parts[:section], numbers.tobytes(), *parts[section + 1 :]])
    )
    done = run("ahn-probe", "tokenize", tables, input=struct.pack("<I", 1) + b"a")
    assert done.returncode != 0 and not done.stdout
    assert f"is damaged, {said.split(' (')[0]};" in done.stderr.decode()


@needs_tools
def test_a_table_that_is_cut(trained, tmp_path):
    """In the middle of a number, of a row or of the file."""
    file = pack_tokenizer(trained["qwen2"])
    parts = sections(file)
    tables = tmp_path / "tokenizer.bin"
    for section, less in [
        (0, 1),
        (0, 4),
        (2, 4),
        (3, 8),
        (5, 4),
        (6, 4),
        (10, 4),
        (11, 4),
        (12, 8),
    ]:
        cut = [*parts[:section], parts[section][:-less], *parts[section + 1 :]]
        tables.write_bytes(joined(file[:24], cut))
        done = run("ahn-probe", "tokenize", tables, input=struct.pack("<I", 1) + b"a")
        assert done.returncode != 0 and "cut; export it again" in done.stderr.decode(), section
    for end in (0, 8, 23, 30, len(file) // 2, len(file) - 8):
        tables.write_bytes(file[:end])
        done = run("ahn-probe", "tokenize", tables, input=struct.pack("<I", 1) + b"a")
        assert done.returncode != 0 and "is damaged, it " in done.stderr.decode(), end
