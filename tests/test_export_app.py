"""What `export-app` refuses, by name, and what it leaves behind: all of it or nothing."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import byte_bpe, chat_tokenizer, make_base, memory_of, talking_model
from click.testing import CliRunner
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_batch import tiny
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ahn_mlx import AHNError, load
from ahn_mlx.apps import tokenizer as tables
from ahn_mlx.apps.export import _written, export_app
from ahn_mlx.apps.tokenizer import CHARACTERS, pack_tokenizer
from ahn_mlx.cli import cli
from embed import sections

FILES = ["manifest.json", "model.mlxfn", "tokenizer.bin", "weights.safetensors"]


@pytest.fixture
def talking(tmp_path):
    return load(talking_model("qwen2-gdn", tmp_path), dtype="float32")


def test_what_is_written(talking, tmp_path):
    model, tokenizer = talking
    weight = model.layers[0].self_attn.q_proj.weight
    export_app(model, tokenizer, tmp_path / "app", chunk=5)
    assert sorted(p.name for p in (tmp_path / "app").iterdir()) == FILES
    manifest = json.loads((tmp_path / "app/manifest.json").read_text())
    assert manifest["lengths"] == [1, 5] and manifest["window"] == model.ahn.window
    assert manifest["identity"]["model"]["name"] == str(tmp_path / "model")
    weights = mx.load(str(tmp_path / "app/weights.safetensors"))
    assert mx.array_equal(weights["model.layers.0.self_attn.q_proj.weight"], weight)
    # The model is as it was.
    assert model.layers[0].self_attn.q_proj.weight is weight
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_force_replaces_an_exported_model_and_nothing_else(talking, tmp_path):
    model, tokenizer = talking
    out = tmp_path / "app"
    export_app(model, tokenizer, out)
    with pytest.raises(AHNError, match="--force replaces a model"):
        export_app(model, tokenizer, out)
    export_app(model, tokenizer, out, chunk=3, force=True)
    assert json.loads((out / "manifest.json").read_text())["lengths"] == [1, 3]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(AHNError, match="other than a model"):
        export_app(model, tokenizer, out, force=True)
    with pytest.raises(AHNError, match="overlaps the input"):
        export_app(model, tokenizer, tmp_path / "model", force=True)


def refuse(model, tokenizer, tmp_path, words):
    with pytest.raises(AHNError, match=words):
        export_app(model, tokenizer, tmp_path / "app")
    assert not list(tmp_path.glob("*app*"))


def test_full_attention_is_refused(tmp_path):
    refuse(tiny(fa_layer_ids=(0,)), chat_tokenizer(), tmp_path, "layers 0 keep full attention")


@pytest.mark.parametrize(
    "template, words",
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "just once|changes"),
        ("{{ raise_exception('no') }}", "failed"),
    ],
)
def test_templates_that_cannot_be_taken_apart(template, words, tmp_path):
    refuse(tiny(), chat_tokenizer(template), tmp_path, words)


def wrapped(bpe: Tokenizer) -> TokenizerWrapper:
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=bpe))


def unigram():
    return Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))


def with_splitter():
    bpe = byte_bpe()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    return bpe


def with_prefix():
    bpe = byte_bpe()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return bpe


def with_normalizer():
    bpe = byte_bpe()
    bpe.normalizer = normalizers.NFKC()
    return bpe


def with_stripping():
    bpe = byte_bpe()
    bpe.add_tokens([AddedToken("<x>", rstrip=True, normalized=False)])
    return bpe


@pytest.mark.parametrize(
    "make, words",
    [
        (unigram, "splitter ends with None"),
        (with_splitter, "Whitespace"),
        (with_prefix, "not with plain bytes"),
        (with_normalizer, "normalizer is 'NFKC'"),
        (with_stripping, "'<x>' is rstrip"),
    ],
)
def test_other_tokenizers_are_refused_by_name(make, words):
    with pytest.raises(AHNError, match=words):
        pack_tokenizer(wrapped(make()))


def test_what_a_character_is_stands_in_the_tables():
    """Of each class its runs, against the library asked about one character alone."""
    runs = [
        np.frombuffer(x, "<u4").reshape(-1, 2)
        for x in sections(pack_tokenizer(chat_tokenizer()))[6:10]
    ]
    chance = np.random.default_rng(1)
    codes = [*range(0x20, 0x250), *chance.choice(list(map(ord, CHARACTERS)), 400).tolist()]
    for code in (*codes, 0x0663, 0x2168, 0xBD, 0x4E00, 0x3000, 0x1F600, 0xA0, 0x10FFFF):
        c = chr(code)
        expected = [
            pre_tokenizers.Split(Regex(p), "removed").pre_tokenize_str(c) == []
            for p in (r"\p{L}", r"\p{N}", r"\s")
        ]
        digits = pre_tokenizers.Digits(individual_digits=True)
        expected.append(len(digits.pre_tokenize_str(f"a{c}b")) == 3)
        found = [bool(((x[:, 0] <= code) & (code <= x[:, 1])).any()) for x in runs]
        assert found == expected, hex(code)


def test_normalizers_merges_and_tokens_at_their_edges():
    nfc = {"type": "NFC"}
    assert tables._normalizer(None) is False and tables._normalizer(nfc) is True
    assert tables._normalizer({"type": "Sequence", "normalizers": [nfc]}) is True
    for other in ({"type": "NFD"}, {"type": "Sequence", "normalizers": [nfc, nfc]}):
        with pytest.raises(AHNError, match="its normalizer is"):
            tables._normalizer(other)
    vocab = {"a": 0, "b": 1, "ab": 2, "abb": 3}
    words = tables._words(vocab)
    spelled = [
        tables._merges({"vocab": vocab, "merges": m}, words).tolist()
        for m in (["a b", "ab b"], [["a", "b"], ["ab", "b"]])
    ]
    assert spelled[0] == spelled[1] == [[0, 1, 0, 2], [2, 1, 1, 3]]
    with pytest.raises(AHNError, match="its merges have 'ba', which has no number of its own"):
        tables._merges({"vocab": vocab, "merges": ["b a"]}, words)
    plain_token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    assert tables._added([{**plain_token, "id": 4, "content": "<x>"}], True) == {4: b"<x>"}
    with pytest.raises(AHNError, match="it has an empty token"):
        tables._added([{**plain_token, "id": 4, "content": ""}], False)
    for asked in ("single_word", "lstrip", "rstrip", "normalized"):
        with pytest.raises(AHNError, match=f"its token '<x>' is {asked}"):
            tables._added([{**plain_token, "id": 4, "content": "<x>", asked: True}], True)


def test_the_command(tmp_path):
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    out = tmp_path / "app"
    done = CliRunner().invoke(
        cli, ["export-app", "--model", str(base), "--ahn", str(memory), "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "wrote" in done.output and sorted(p.name for p in out.iterdir()) == FILES
    done = CliRunner().invoke(cli, ["export-app", "-o", str(tmp_path / "b"), "--chunk", "0"])
    assert done.exit_code != 0 and "--chunk" in str(done.exception or done.output)


def test_only_what_the_disk_refuses_is_said_of_the_disk(tmp_path):
    """MLX says neither which error it was nor that it is the disk's, but for a word."""
    file = tmp_path / "model.mlxfn"
    with pytest.raises(RuntimeError, match="shapes"), _written(file):
        raise RuntimeError("[matmul] shapes do not match")
    assert not file.exists()
    with pytest.raises(OSError, match="MLX could not write"), _written(file):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")
    with pytest.raises(IsADirectoryError), _written(tmp_path):
        raise RuntimeError("[write] Unable to write 8 bytes to file.")
