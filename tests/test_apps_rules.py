"""What an exported model holds, number by number: against tokenizers, the standard's characters
and the model itself."""

import hashlib
import itertools
import json
import os
import struct
import unicodedata
import zlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import byte_bpe, chat_tokenizer, make_base, memory_of, read_json, talking_model
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_batch import tiny
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from ahn_mlx import AHNError, load
from ahn_mlx.apps import export, tokenizer
from ahn_mlx.apps.export import export_app
from ahn_mlx.apps.tokenizer import CHARACTERS, NONE, byte_signs, pack_tokenizer
from ahn_mlx.checkpoints.card import Origin
from ahn_mlx.hub.published import MODELS
from ahn_mlx.model.pure import initial_state, pure_step
from ahn_mlx.ops import kernels
from ahn_mlx.reading.memoryfile import base_facts, tokenizer_identity
from ahn_mlx.reading.template import SYSTEM, Template
from embed import sections


def numbers(section):
    return np.frombuffer(section, "<u4")


def wrapped(bpe):
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=bpe))


# --- the file ---


def small(ignore_merges=False, composed=False, splitter=None):
    """Bytes, two merges, and three added tokens of which one is a control."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"ab": 256, "abb": 257}
    bpe = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "b")], ignore_merges=ignore_merges))
    bpe.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if composed:
        bpe.normalizer = normalizers.NFC()
    bpe.add_special_tokens([AddedToken("<s>", normalized=False, special=True)])
    bpe.add_tokens([AddedToken("<t\u00e9>", normalized=False)])
    return bpe


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_file_of_tables_is_laid_out_so(ignore_merges):
    bpe = small(ignore_merges)
    file = pack_tokenizer(wrapped(bpe))
    assert file[:8] == b"AHNTOK1\n"
    assert struct.unpack_from("<IIII", file, 8) == (ignore_merges << 9, 260, 13, 0)
    parts = sections(file)
    signs = byte_signs()
    tokens = []
    for i in range(260):
        word = bpe.id_to_token(i)
        tokens.append(word.encode() if i >= 258 else bytes(signs[c] for c in word))
    ends = numbers(parts[0])
    assert len(ends) == 261 and ends[0] == 0 and ends[-1] == len(parts[1])
    assert [parts[1][a:b] for a, b in itertools.pairwise(ends)] == tokens
    assert tokens[256:] == [b"ab", b"abb", b"<s>", "<t\u00e9>".encode()]
    of_byte = numbers(parts[2])
    assert len(of_byte) == 256 and [tokens[i] for i in of_byte] == [bytes([b]) for b in range(256)]
    a, b = of_byte[97], of_byte[98]
    rows = sorted([(a, b, 0, 256), (256, b, 1, 257)])
    assert numbers(parts[3]).reshape(-1, 4).tolist() == [list(map(int, row)) for row in rows]
    # Words by their bytes, for whoever looks them up whole.
    listed = [tokens[i] for i in numbers(parts[4])]
    assert listed == (sorted(tokens[:258]) if ignore_merges else [])
    assert numbers(parts[5]).tolist() == [258, 1, 259, 0]
    assert parts[10:] == [b"", b"", b""]


def test_each_thing_that_a_tokenizer_does_has_its_bit():
    def flags(bpe):
        return struct.unpack_from("<I", pack_tokenizer(wrapped(bpe)), 8)[0]

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = {n: p for p, n in tokenizer.PATTERNS.items()}
    assert set(words) == {1, 2}
    for number, pattern in words.items():
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), plain]
        )
        assert flags(small(splitter=splitter)) == number
    digits = pre_tokenizers.Digits(individual_digits=True)
    splitter = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert flags(small(splitter=splitter)) == 1 << 8
    assert flags(small(composed=True)) == 1 << 10
    assert all(sections(pack_tokenizer(wrapped(small(composed=True))))[10:])
    assert flags(small(True, True)) == 3 << 9


def test_bytes_have_the_signs_of_the_library():
    signs = byte_signs()
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(signs) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(signs.values()) == list(range(256))
    of = {b: c for c, b in signs.items()}
    for code in (*range(0x800), *range(0x800, 0x10000, 61), *range(0x10000, 0x110000, 4099)):
        if 0xD800 <= code < 0xE000:
            continue
        c = chr(code)
        ((said, _),) = plain.pre_tokenize_str(c)
        assert said == "".join(of[b] for b in c.encode())


# --- which tokenizers ---

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BARE = {**LEVEL, "use_regex": False}
QWEN2, LLAMA3 = tokenizer.PATTERNS


def split(regex, **more):
    found = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    return {**found, "invert": False, **more}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        (LEVEL, (0, False)),
        (sequence(LEVEL), (0, False)),
        (sequence(DIGITS, LEVEL), (0, True)),
        (sequence(split(QWEN2), BARE), (1, False)),
        (sequence(split(LLAMA3), BARE), (2, False)),
    ],
)
def test_splitters_that_a_reader_has(facts, found):
    assert tokenizer._splitter(facts) == found


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (None, "its splitter ends with None, not with plain bytes"),
        (sequence(), "its splitter ends with None, not with plain bytes"),
        (sequence(LEVEL, DIGITS), "its splitter ends with 'Digits', not with plain bytes"),
        ({**LEVEL, "add_prefix_space": True}, "its splitter ends with 'ByteLevel', not with plain"),
        (BARE, "it splits by 'ByteLevel'"),
        (sequence(DIGITS, BARE), "it splits by 'Digits and ByteLevel'"),
        (sequence({**DIGITS, "individual_digits": False}, LEVEL), "it splits by 'Digits and Byte"),
        (sequence(LEVEL, LEVEL), "it splits by 'ByteLevel and ByteLevel'"),
        (sequence(split(QWEN2), LEVEL), "it splits by 'Split and ByteLevel'"),
        (sequence(split("a+"), BARE), "it splits by {'Regex': 'a+'}"),
        (sequence(split(QWEN2, pattern={"String": QWEN2}), BARE), "it splits by {'String'"),
        (sequence(split(QWEN2, behavior="Removed"), BARE), "it splits by {'Regex'"),
        (sequence(split(QWEN2, invert=True), BARE), "it splits by {'Regex'"),
        (sequence(split(QWEN2), DIGITS, BARE), "it splits by 'Split and Digits and ByteLevel'"),
    ],
)
def test_splitters_that_no_reader_has(facts, said):
    with pytest.raises(AHNError) as error:
        tokenizer._splitter(facts)
    assert str(error.value).startswith(f"this tokenizer cannot be exported: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": "WordPiece"}, "it is 'WordPiece', not byte-level BPE"),
        ({"dropout": 0.1}, "it has dropout"),
        ({"continuing_subword_prefix": "##"}, "it has continuing_subword_prefix"),
        ({"end_of_word_suffix": "</w>"}, "it has end_of_word_suffix"),
        ({"byte_fallback": True}, "it has byte_fallback"),
    ],
)
def test_models_that_no_reader_has(changes, said):
    plain = {"type": "BPE", "dropout": None, "end_of_word_suffix": "", "byte_fallback": False}
    tokenizer._check_model(plain)
    with pytest.raises(AHNError, match=said):
        tokenizer._check_model({**plain, **changes})


def test_what_is_no_tokenizer_of_the_library():
    with pytest.raises(AHNError, match="exported: it is not one of the tokenizers library"):
        pack_tokenizer(SimpleNamespace(backend_tokenizer="another"))
    with pytest.raises(AHNError, match="exported: it is not one of the tokenizers library"):
        pack_tokenizer(SimpleNamespace())


def test_tokens_have_numbers_that_a_reader_can_hold():
    for number, said in ((1 << 24, "16,777,216"), (None, "-1")):
        facts = json.loads(byte_bpe().to_str())
        if number is None:
            facts["model"]["vocab"] = {}
        else:
            facts["model"]["vocab"]["zz"] = number
        made = wrapped(Tokenizer.from_str(json.dumps(facts)))
        with pytest.raises(AHNError, match=f"its tokens have numbers up to {said}$"):
            pack_tokenizer(made)


def test_one_token_is_a_tokenizer():
    facts = json.loads(byte_bpe().to_str())
    facts["model"]["vocab"] = {"a": 0}
    file = pack_tokenizer(wrapped(Tokenizer.from_str(json.dumps(facts))))
    assert struct.unpack_from("<I", file, 12) == (1,) and sections(file)[1] == b"a"


def test_numbers_between_are_empty_words():
    facts = json.loads(byte_bpe().to_str())
    facts["model"]["vocab"]["zz"] = 300
    file = pack_tokenizer(wrapped(Tokenizer.from_str(json.dumps(facts))))
    assert struct.unpack_from("<I", file, 12) == (301,)
    ends = numbers(sections(file)[0])
    assert len(ends) == 302 and ends[256] == ends[300] == 256 and ends[301] == 258


def test_a_byte_that_no_word_has():
    words = {i: bytes([i]) for i in range(256)} | {300: b"ab", 301: b""}
    assert tokenizer._bytes(words, None) == list(range(256))
    del words[7], words[200]
    found = tokenizer._bytes(words, None)
    assert found[7] == found[200] == NONE == 0xFFFFFFFF and found[8] == 8 and len(found) == 256
    with pytest.raises(AHNError, match="it has no token for the byte 0x07, but an unknown one"):
        tokenizer._bytes(words, "<unk>")
    with pytest.raises(AHNError, match="it has no token for the byte 0xff"):
        tokenizer._bytes({i: bytes([i]) for i in range(255)}, "<unk>")
    words |= {7: b"\x07", 200: b"\xc8"}
    assert tokenizer._bytes(words, "<unk>") == list(range(256))


def test_words_are_of_signs_or_are_themselves():
    found = tokenizer._words({"\u0120a": 3, "\u4e16": 4, "": 5, "a b": 6})
    assert found == {3: b" a", 4: "\u4e16".encode(), 5: b"", 6: b"a b"}


def test_merges_come_by_their_pair():
    vocab = {"a": 7, "b": 3, "ab": 9, "ba": 5, "abb": 1}
    words = tokenizer._words(vocab)
    merges = ["ab b", ["a", "b"], "b a"]
    rows = tokenizer._merges({"vocab": vocab, "merges": merges}, words)
    assert rows.tolist() == [[3, 7, 2, 5], [7, 3, 1, 9], [9, 3, 0, 1]] and rows.dtype == "<u4"
    for merge, absent in (("a c", "c"), ("c a", "c"), ("b b", "bb")):
        with pytest.raises(AHNError, match=f"its merges have '{absent}', which has no number"):
            tokenizer._merges({"vocab": vocab, "merges": [merge]}, words)
    assert not len(tokenizer._merges({"vocab": vocab, "merges": []}, words))


PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize("composed", [False, True])
def test_added_tokens(composed):
    one = {**PLAIN, "id": 3, "content": "<\u00e9>"}
    assert tokenizer._added([one, {**one, "id": 9}], composed) == {
        3: "<\u00e9>".encode(),
        9: "<\u00e9>".encode(),
    }
    assert tokenizer._added([], composed) == {}
    for asked in ("single_word", "lstrip", "rstrip"):
        with pytest.raises(AHNError, match=f"its token '<.*>' is {asked}$"):
            tokenizer._added([{**one, asked: True}], composed)
    normal = {**one, "normalized": True}
    if composed:
        with pytest.raises(AHNError, match=r"is normalized$"):
            tokenizer._added([normal], composed)
    else:
        assert tokenizer._added([normal], composed)
    with pytest.raises(AHNError, match="it has an empty token"):
        tokenizer._added([{**one, "content": ""}], composed)


# --- characters ---


def test_characters_are_all_that_there_are():
    known = set(map(ord, CHARACTERS))
    assert len(known) == len(CHARACTERS) and sorted(CHARACTERS) == CHARACTERS
    for code in range(0x110000):
        if code in known:
            continue
        # Surrogates, nothing at all, or for anyone's own use.
        assert unicodedata.category(chr(code)) in ("Cs", "Cn", "Co"), hex(code)
    assert not known & set(range(0xD800, 0xE000))


@pytest.mark.parametrize(
    ("codes", "runs"),
    [
        ([], []),
        ([0], [0, 0]),
        ([0, 1, 2, 5, 7, 8], [0, 2, 5, 5, 7, 8]),
        ([0xD7FF, 0xE000], [0xD7FF, 0xD7FF, 0xE000, 0xE000]),
        (
            [0x3FFFF, 0xE0000, 0xE0001, 0xE0FFF],
            [0x3FFFF, 0x3FFFF, 0xE0000, 0xE0001, 0xE0FFF, 0xE0FFF],
        ),
    ],
)
def test_runs_of_characters(codes, runs):
    matched = [ord(c) in codes for c in CHARACTERS]
    assert tokenizer._ranges(matched) == runs


def covered(runs):
    found = set()
    for first, last in zip(runs[::2], runs[1::2], strict=True):
        assert first <= last
        found |= set(range(first, last + 1))
    return found


def test_classes_are_those_of_the_standard():
    """Of what this Python's older Unicode has: letters, numbers and spaces by their category."""
    letters, digits_and_more, spaces, digits = map(covered, tokenizer._classes.__wrapped__())
    for code in map(ord, CHARACTERS):
        kind = unicodedata.category(chr(code))
        if kind == "Cn":
            continue
        assert (code in letters) == (kind[0] == "L"), hex(code)
        assert (code in digits_and_more) == (kind[0] == "N"), hex(code)
        assert (code in spaces) == (kind[0] == "Z" or code in (9, 10, 11, 12, 13, 0x85)), hex(code)
        assert (code in digits) == (kind[0] == "N"), hex(code)


def is_hangul(code):
    return 0xAC00 <= code <= 0xD7A3


def is_new(c):
    """Since 2002, which not every library knows; what there was then is composed for ever so."""
    return unicodedata.ucd_3_2_0.category(c) == "Cn"


def test_composition_is_that_of_the_standard():
    combining, rows, pairs = tokenizer._canonical.__wrapped__()
    rows, pairs = list(rows), np.array(pairs).reshape(-1, 3).tolist()
    decomposed, at = {}, 0
    while at < len(rows):
        code, n = rows[at : at + 2]
        decomposed[code] = "".join(map(chr, rows[at + 2 : at + 2 + n]))
        at += 2 + n
    assert at == len(rows) and list(decomposed) == sorted(decomposed)
    assert [p[:2] for p in pairs] == sorted(p[:2] for p in pairs)
    composed = {(a, b): c for a, b, c in pairs}
    for code in map(ord, CHARACTERS):
        c = chr(code)
        if is_new(c) or is_hangul(code):
            assert not is_hangul(code) or code not in decomposed
            continue
        apart = unicodedata.normalize("NFD", c)
        assert decomposed.get(code, c) == apart, hex(code)
        if apart != c and unicodedata.normalize("NFC", c) == c:
            first = unicodedata.normalize("NFC", apart[:-1])
            assert composed.pop((ord(first), ord(apart[-1]))) == code, hex(code)
    assert all(is_new(chr(c)) for c in composed.values())
    classes = dict(zip(combining[::2], combining[1::2], strict=True))
    assert list(classes) == sorted(classes)
    known = {c: unicodedata.combining(chr(c)) for c in map(ord, CHARACTERS)}
    # A mark that is decomposed into others is reordered as these.
    marks = {c for c, n in known.items() if n and c not in decomposed and not is_new(chr(c))}
    assert marks <= set(classes)
    assert all(is_new(chr(c)) for c in set(classes) - marks)
    by_class = sorted((known[c], classes[c]) for c in marks)
    for (a, x), (b, y) in itertools.pairwise(by_class):
        assert (a < b) == (x < y)
    assert min(classes.values()) == 1


def test_what_is_computed_of_hangul():
    assert [tokenizer._hangul(chr(c)) for c in (0xABFF, 0xAC00, 0xD7A3, 0xD7A4, 0xD7A5)] == [
        *(False, True, True, False, False)
    ]


# --- export ---


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("exported"))
    return load(path, dtype="float32")


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def test_a_manifest_says_what_the_model_is(talking, tmp_path):
    model, tokens = talking
    out = tmp_path / "app"
    export_app(model, tokens, out, chunk=7)
    manifest = manifest_of(out)
    files = {}
    for name in ("model.mlxfn", "tokenizer.bin"):
        files[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    weights = (out / "weights.safetensors").read_bytes()
    n = int.from_bytes(weights[:8], "little")
    files["weights.safetensors"] = hashlib.sha256(weights[8 : 8 + n]).hexdigest()
    attention = model.layers[0].self_attn
    known = manifest.pop("identity")
    assert known["tokenizer"] == tokenizer_identity(tokens)
    assert known["memory"] == "gated_deltanet" and known["base"] == base_facts(model)
    assert {k: known["model"][k] for k in ("name", "dtype", "q_bits", "ahn")} == vars(model.origin)
    assert known["model"].keys() > {"name", "dtype", "q_bits", "ahn"}
    said = manifest.pop("sha256")
    template = Template(tokens)
    assert manifest.pop("template")["plain"] == json.loads(json.dumps(template.facts()))
    assert manifest == {
        **{"begin": [], "ends": sorted(t for t in tokens.eos_token_ids if t < 256)},
        **{"lengths": [1, 7], "files": files, "weights": zlib.adler32(weights[8 + n :])},
        **{"version": 2, "mlx": version("mlx"), "device": "cpu", "name": "model"},
        **{"window": 12, "sinks": 4, "vocabulary": model.args.vocab_size, "layers": 3},
        **{"heads": attention.n_heads, "kv_heads": attention.n_kv_heads},
        **{"head_dim": attention.head_dim, "gates": 2, "dtype": "float32"},
        **{"sources": manifest["sources"], "licence": manifest["licence"]},
    }
    whole = {k: v for k, v in manifest_of(out).items() if k != "sha256"}
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False).encode(errors="replace")
    assert said == hashlib.sha256(text).hexdigest()
    assert zlib.adler32(weights[8 + n :]) == export._sum_of(out / "weights.safetensors")


@pytest.mark.parametrize(
    ("window", "chunk", "lengths"),
    [
        (5, 512, [1, 5]),
        (100, 512, [1, 64, 100]),
        (100, 80, [1, 64, 80]),
        (100, 64, [1, 64]),
        (100, 1, [1]),
        (600, None, [1, 64, 512]),
    ],
)
def test_lengths_that_are_traced(window, chunk, lengths, tmp_path):
    model = tiny.__wrapped__()  # of its own, to be changed
    model.ahn = replace(model.ahn, window=window)
    more = {} if chunk is None else {"chunk": chunk}
    export_app(model, chat_tokenizer(), tmp_path / "app", **more)
    assert manifest_of(tmp_path / "app")["lengths"] == lengths
    assert export.CHUNK == 512


def test_what_is_traced_is_the_model(tmp_path):
    model = tiny()
    own = dict(tree_flatten(model.parameters()))
    export_app(model, chat_tokenizer(), tmp_path / "app", chunk=3)
    weights = mx.load(str(tmp_path / "app/weights.safetensors"))
    assert weights.keys() == own.keys()
    assert all(mx.array_equal(weights[k], own[k]) and weights[k].dtype == own[k].dtype for k in own)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[k] is own[k] for k in own)
    traced = mx.import_function(str(tmp_path / "app/model.mlxfn"))
    state = initial_state(model)
    step = pure_step(model, last=True)
    at = 0
    for ids in ([[5]], [[6, 7, 8]], [[9]]):
        given = (mx.array(ids, mx.int32), mx.array([at]), mx.array([len(ids[0])]))
        expected = step(*given, *state, **own)
        found = traced(*given, *state, **weights)
        for x, y in zip(found, expected, strict=True):
            assert mx.allclose(x, y, atol=1e-5)
        state, at = list(found[1:]), at + len(ids[0])
    with pytest.raises(ValueError):  # a length that was not asked for
        traced(mx.array([[1, 2]]), mx.array([0]), mx.array([2]), *state, **weights)


def test_where_kernels_run_there_is_a_model_without_them(tmp_path, monkeypatch):
    seen = []
    trace = export._trace

    def noting(file, model, state, lengths):
        seen.append((file.name, os.environ.get("AHN_METAL"), lengths))
        trace(file, model, state, lengths)

    monkeypatch.setattr(export, "_trace", noting)
    model = tiny()
    export_app(model, chat_tokenizer(), tmp_path / "a")
    assert seen == [("model.mlxfn", None, [1, 5])]
    has = SimpleNamespace(available=lambda: True, without=kernels.without)
    monkeypatch.setattr(export, "kernels", has)
    monkeypatch.setattr(export, "on_cpu", lambda: False)
    seen.clear()
    tried = []
    evaluate = mx.eval

    def noting_eval(*arrays):
        tried.extend(x[0].shape for x in arrays if isinstance(x, tuple) and x)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", noting_eval)
    export_app(model, chat_tokenizer(), tmp_path / "b")
    assert seen == [("model.mlxfn", None, [1, 5]), ("plain.mlxfn", "0", [1, 5])]
    names = ["model.mlxfn", "plain.mlxfn", "tokenizer.bin", "weights.safetensors"]
    assert list(manifest_of(tmp_path / "b")["files"]) == names
    assert manifest_of(tmp_path / "b")["device"] == "gpu"
    # Each length is computed once before it is traced: kernels are compared then.
    assert tried.count((1, model.args.vocab_size)) == 4


def test_a_chunk_of_nothing_is_refused(talking, tmp_path):
    with pytest.raises(AHNError, match="--chunk must be at least 1, not 0"):
        export_app(*talking, tmp_path / "app", chunk=0)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_name_is_exported(tmp_path):
    export_app(tiny(), chat_tokenizer(), tmp_path / "app")
    manifest = manifest_of(tmp_path / "app")
    assert manifest["name"] == "" and manifest["sources"] == [] and manifest["licence"] == ""
    known = manifest["identity"]["model"]
    assert {k: known[k] for k in ("name", "dtype", "q_bits", "ahn")} == {
        **{"name": "", "dtype": None, "q_bits": None, "ahn": None}
    }
    assert manifest["ends"] == []  # 258 is beyond its vocabulary of 64


def test_where_the_parts_of_a_model_are(tmp_path, monkeypatch):
    def places(**origin):
        plain = {"name": "", "ahn": None}
        return export._places(SimpleNamespace(origin=SimpleNamespace(**{**plain, **origin})))

    monkeypatch.setattr(export, "find", lambda name: Path("found", name))
    monkeypatch.setattr(export, "find_base", lambda name: Path("base", name))
    assert export._places(SimpleNamespace()) == []
    assert places(name="ahn-gdn-smollm2-135m") == []
    assert places(name="ahn-gdn-3b") == [Path("found/ahn-gdn-3b")]
    assert places(name="a", ahn="b") == [Path("base/a"), Path("b")]
    assert places(name="ahn-gdn-smollm2-135m", ahn="b") == [
        Path("base/ahn-gdn-smollm2-135m"),
        Path("b"),
    ]


def test_sources_and_licences(tmp_path):
    ours = "ahn-gdn-smollm2-135m"
    repo = MODELS[ours].base.repo
    assert export._origins(ours) == [
        Origin("base", repo, "", "apache-2.0"),
        Origin("memory", ours, "", "apache-2.0"),
    ]
    assert export._origins("me/mine") == export._origins("") == []
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    model, tokens = load(base, ahn=memory)
    state = initial_state(model)
    found = export._of_model(model, tokens, state, [base, memory])
    assert found["name"] == "base" and found["gates"] == model.layers[0].self_attn.ahn.gate_count
    cards = [o for place in (base, memory) for o in export.read_origins(place)]
    assert found["sources"] == [o._asdict() for o in cards]
    assert read_json(base)["vocab_size"] == found["vocabulary"]
    model.origin = SimpleNamespace(name=ours, dtype=None, q_bits=None, ahn=None)
    found = export._of_model(model, tokens, state, [])
    assert [o["part"] for o in found["sources"]] == ["base", "memory"]
    assert found["licence"] == "apache-2.0" and found["name"] == ours


TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}[assistant]"
KEEPS = TRIMS.replace(" | trim", "")
ALONE = KEEPS.replace("in messages", "in messages if m.role in ('user', 'assistant')")


@pytest.mark.parametrize(
    ("text", "strip"), [(TRIMS, True), (KEEPS, False), (ALONE, None), (None, 0)]
)
def test_a_template_in_its_parts(text, strip):
    tokens = chat_tokenizer(text)
    found = export._template(tokens)
    if text is None:
        assert found is None
        return
    assert found["plain"] == Template(tokens).facts()
    if strip is None:
        assert found["system"] is None
        return
    assert found["system"].pop("strip") is strip
    assert found["system"] == Template(tokens, f" {SYSTEM} ").facts()
    assert found["system"]["start"][:2] == ["[system]", None]


def test_a_path_that_is_no_text_can_be_said():
    found = export._with_hash({"name": "a\udce9", "b": 1})
    text = '{"b": 1, "name": "a?"}'
    assert found == {"b": 1, "name": "a?", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert (
        export._with_hash({"name": "\u00e9"})["sha256"]
        == hashlib.sha256('{"name": "\u00e9"}'.encode()).hexdigest()
    )


def test_sums_of_files(tmp_path):
    file = tmp_path / "a.safetensors"
    body = bytes(range(256)) * 70_000  # more than is read at once
    file.write_bytes(struct.pack("<Q", 5) + b"12345" + body)
    assert export._sum_of(file) == zlib.adler32(body)
    assert export._hash_of(file) == hashlib.sha256(b"12345").hexdigest()
    other = tmp_path / "a.bin"
    other.write_bytes(file.read_bytes())
    assert export._hash_of(other) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_are_counted_while_they_are_written(tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **about):
            self.about, self.n = about, 0
            bars.append(self)

        def update(self, n):
            self.n += n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed = True

    monkeypatch.setattr(export, "tqdm", Bar)
    model = tiny()
    export._write_weights(tmp_path / "a.safetensors", model)
    (bar,) = bars
    size = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    assert bar.n == size and bar.closed
    assert bar.about == {
        **{"total": size, "desc": "weights", "unit": "B", "unit_scale": True, "delay": 1},
        "disable": None,
    }
