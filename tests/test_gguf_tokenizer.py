"""The tokenizer that is packed into a GGUF file: what it makes of texts, where it ends them,
and what is said of one that cannot be right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GDN, read_json
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import pre_tokenizers

from ahn_mlx import AHNError
from ahn_mlx.checkpoints import gguf
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.directory import read_tensors
from ahn_mlx.checkpoints.ggufile import GGUFile
from ahn_mlx.checkpoints.ggufmodels import NAMES
from ahn_mlx.checkpoints.tokenizer import gguf_tokenizer, load_tokenizer

ggml = pytest.importorskip("gguf")
TYPES = ggml.GGUFValueType

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5
KIND = {bool: TYPES.BOOL, int: TYPES.UINT32, str: TYPES.STRING, float: TYPES.FLOAT32}


def write(
    file: Path,
    added: list[tuple[str, int]] | tuple[()] = (),
    merged: tuple[str, ...] = ("a b",),
    pre: Any = "qwen2",
    rows: int | None = None,
    **entries: Any,
) -> Path:
    """A whole small model with the tokens of bytes, those that are merged, and those added.

    entries: more or other ones of tokenizer.ggml; None leaves one out."""
    made = [merge.replace(" ", "") for merge in merged]
    tokens = [*ALPHABET, *made, *(token for token, _ in added)]
    types = [NORMAL] * (256 + len(made)) + [kind for _, kind in added]
    packed = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    packed |= {"merges": list(merged), **entries}
    writer = ggml.GGUFWriter(file, "qwen2")
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(read_json(GDN / "base")["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    for key, value in packed.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, list | tuple):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value, KIND[type(value)])
    names = {ours: theirs for theirs, ours in NAMES.items()}
    for name, x in read_tensors(GDN / "base").items():
        value = np.array(x.astype(x.dtype))
        if name.startswith("model.embed_tokens"):
            value = np.resize(value, (rows or len(tokens), 64))
        stem, ending = name.rsplit(".", 1)
        block = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
        part = names[stem.split(".", 3)[3] if block else stem]
        writer.add_tensor(f"{block}{part}.{ending}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def converted(file: Path) -> tuple[TokenizerWrapper, dict[str, Any]]:
    """The tokenizer of the model that a file is converted to, and its config.json."""
    out = file.with_suffix("")
    convert(file, GDN / "ahn_only", out)
    config = read_json(out)
    return load_tokenizer(out, config), config


# --- what it makes of texts ---

# Merges that show where a text falls apart: digits one by one, by three or all; a large S
# after an apostrophe; a word that is a token and has no merges.
DIGITS = ("1 2", "12 3", "123 4")


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("llama3", "1234", ["123", "4"]),
        ("llama-v3", "1234", ["123", "4"]),
        ("gpt-2", "I'S", ["I", "'", "S"]),
        ("smollm", "I'S", ["I", "'", "S"]),
        ("qwen2", "I'S", ["I", "'S"]),
        ("llama-bpe", "I'S", ["I", "'S"]),
        ("qwen2", "xyz", ["x", "y", "z"]),
        ("llama-bpe", "xyz", ["xyz"]),
        ("llama-bpe", "xyzx", ["x", "y", "z", "x"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # one letter é
        *((pre, "e\u0301", ["e", "Ì", "ģ"]) for pre in ("gpt-2", "smollm", "llama-bpe")),
    ],
)
def test_texts_fall_apart_as_in_the_family(
    pre: str, text: str, expected: list[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "x.gguf", [("xyz", NORMAL)], (*DIGITS, "' S"), pre)
    tokenizer = gguf_tokenizer(file)
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_user_defined_tokens_stay_whole_and_are_text(tmp_path: Path) -> None:
    added = [("<|im_end|>", CONTROL), ("<think>", USER), ("[PAD9]", UNUSED), ("  ", USER)]
    file = write(tmp_path / "x.gguf", added, eos_token_id=257)
    tokenizer, _ = converted(file)
    for text in ("<think>", "ab<think>ab", "a  b"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("ab<think>ab") == [256, 258, 256]
    assert tokenizer.encode("a  b")[1] == 260
    assert tokenizer.encode("<|im_end|>") == [257]
    assert tokenizer.decode([256, 257, 258], skip_special_tokens=True) == "ab<think>"
    # No text is an unused token.
    assert 259 not in tokenizer.encode("[PAD9]")
    assert tokenizer.convert_ids_to_tokens([259]) == ["[PAD9]"]
    # A plain text stays plain where control tokens are not looked for.
    assert 258 in tokenizer.encode("<think><|im_end|>", split_special_tokens=True)
    assert 257 not in tokenizer.encode("<think><|im_end|>", split_special_tokens=True)


@pytest.mark.parametrize(
    ("pre", "entries", "expected"),
    [
        ("qwen2", {}, [256]),
        ("qwen2", {"add_bos_token": True}, [257, 256]),
        ("qwen2", {"add_bos_token": False}, [256]),
        ("qwen2", {"add_eos_token": True}, [256, 258]),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [257, 256, 258]),
        ("llama-bpe", {}, [257, 256]),
        ("llama-bpe", {"add_bos_token": False}, [256]),
    ],
)
def test_a_text_begins_as_the_file_says(
    pre: str, entries: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    added = [("<s>", CONTROL), ("</s>", CONTROL)]
    ids = {"bos_token_id": 257, "eos_token_id": 258}
    file = write(tmp_path / "x.gguf", added, pre=pre, **ids, **entries)
    for tokenizer in (gguf_tokenizer(file), converted(file)[0]):
        assert tokenizer.encode("ab") == expected
        assert tokenizer.encode("ab", add_special_tokens=False) == [256]


def test_tekken_keeps_a_mark_with_the_letters_behind_it(tmp_path: Path) -> None:
    """Not as GPT-2, which has 't as a word; capitals begin one."""
    merged = ("' t", "'t i", "'ti s", "a b", "ab C")
    tokenizer = gguf_tokenizer(write(tmp_path / "x.gguf", merged=merged, pre="tekken"))
    found = tokenizer.encode("'tisabC")
    assert tokenizer.convert_ids_to_tokens(found) == ["'tis", "ab", "C"]


def test_roles_and_a_template_are_those_of_the_file(tmp_path: Path) -> None:
    added = [("<s>", CONTROL), ("</s>", CONTROL), ("<pad>", CONTROL), ("<unk>", UNKNOWN)]
    roles = {"bos": 257, "eos": 258, "padding": 259, "unknown": 260}
    entries = {f"{role}_token_id": i for role, i in roles.items()}
    file = write(tmp_path / "x.gguf", added, chat_template="{{ 1 }}", **entries)
    tokenizer = gguf_tokenizer(file)
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<s>", "</s>", "<pad>", "<unk>")
    assert tokenizer.chat_template == "{{ 1 }}"
    assert gguf_tokenizer(write(tmp_path / "y.gguf", chat_template="")).chat_template is None
    text = "a , b . It 's not n't !"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_has_no_token_and_no_bytes_is_one_unknown() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "\u2581", "a", "\u2581a"],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, NORMAL, NORMAL, 0],
        "tokenizer.ggml.scores": [0.0, 0.0, -3.0, -2.0, -1.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = gguf.load_tokenizer(metadata, 5)  # with a space before it, and a begin, unsaid
    assert tokenizer.encode("a xyz a") == [1, 4, 2, 0, 4]
    assert tokenizer.decode([4, 4]) == "a a"
    for wrong in ([0.0, 0.0, -3.0, -2.0, "x"], [0.0] * 4, [0.0] * 6, [True] * 5):
        with pytest.raises(AHNError, match="no scores, or not one for each token"):
            gguf.load_tokenizer({**metadata, "tokenizer.ggml.scores": wrong}, 5)


# --- where it ends them ---


@pytest.mark.parametrize(
    ("added", "roles", "expected"),
    [
        ([("<|a|>", CONTROL), ("<|b|>", CONTROL)], {"eos": 257}, [257]),
        ([("<|a|>", CONTROL), ("<|b|>", CONTROL)], {"eot": 258}, [258]),
        (
            [("<|a|>", CONTROL), ("<|b|>", CONTROL), ("<|c|>", CONTROL), ("<|d|>", CONTROL)],
            {"eos": 260, "eot": 257, "eom": 258, "bos": 259},
            [257, 258, 260],
        ),
        # Qwen's: eos is the end of a turn, and the end of a document has no role.
        ([("<|endoftext|>", CONTROL), ("<|im_end|>", CONTROL)], {"eos": 258}, [257, 258]),
        # Llama 3's.
        (
            [("<|end_of_text|>", CONTROL), ("<|eom_id|>", CONTROL), ("<|eot_id|>", CONTROL)],
            {"eos": 257},
            [257, 258, 259],
        ),
        ([("<end_of_turn>", USER), ("<|a|>", CONTROL)], {"eos": 258}, [257, 258]),
        # An ordinary token that only looks like one.
        ([("</s>", NORMAL), ("<|a|>", CONTROL)], {"eos": 258}, [258]),
        ([("<|im_end|>", CONTROL)], {}, [257]),
        ([("<|a|>", CONTROL)], {"eos": 257, "eot": 0xFFFFFFFF}, [257]),
        ([("<|a|>", CONTROL), ("<|file|>", CONTROL)], {"eos": 257, "fim_sep": 258}, [257, 258]),
        ([("<|a|>", CONTROL)], {}, None),
    ],
)
def test_every_end_is_known_to_config_and_tokenizer(
    added: list[tuple[str, int]], roles: dict[str, int], expected: Any, tmp_path: Path
) -> None:
    ids = {f"{role}_token_id": i for role, i in roles.items()}
    file = write(tmp_path / "x.gguf", added, **ids)
    assert GGUFile(file).config().get("eos_token_id") == expected
    tokenizer, config = converted(file)
    assert config.get("eos_token_id") == expected
    ends = set(expected or [])
    assert tokenizer.eos_token_ids == gguf_tokenizer(file).eos_token_ids == ends
    if ends:  # what closes a turn where only one can be asked for
        assert tokenizer.eos_token_id == roles.get("eos", min(ends))
    # An end is never shown.
    assert tokenizer.decode([256, *ends], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, [0]), (2, [2]), (-1, []), (0xFFFFFFFF, []), (np.int32(-1), []), (np.uint32(1), [1])],
)
def test_an_end_is_any_token_or_none(value: Any, expected: list[int]) -> None:
    assert gguf.end_ids({"tokenizer.ggml.eos_token_id": value}, 3) == expected


@pytest.mark.parametrize("value", [-2, 3, 0xFFFFFFFE, 1 << 32])
def test_an_end_beyond_all_tokens_is_refused(value: int) -> None:
    with pytest.raises(AHNError, match=rf"eos_token_id is {value}, not one of 3 tokens"):
        gguf.end_ids({"tokenizer.ggml.eos_token_id": value}, 3)


def test_an_end_that_the_embedding_lacks_is_none() -> None:
    tokens = ["a", "</s>", "<|im_end|>"]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1, 3, 3]}
    assert gguf.end_ids(metadata, 3) == [1, 2]
    assert gguf.end_ids(metadata, 2) == [1]


# --- what cannot be right ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"merges": ["a b", "zzz qqq"]}, "merge 2 of its tokenizer, 'zzz qqq', needs"),
        ({"merges": ["a b", "b"]}, "merge 2 of its tokenizer, 'b', is not two tokens"),
        ({"merges": ["a b c"]}, "merge 1 of its tokenizer, 'a b c', is not two"),
        ({"merges": ["a b", " "]}, "merge 2 of its tokenizer, ' ', needs ''"),
        ({"merges": [1, 2]}, "merge 1 of its tokenizer, 1, is not two tokens"),
        ({"merges": None}, "its tokenizer has no merges"),
        ({"token_type": None}, "has 257 tokens and types for 0 of them"),
        ({"token_type": [1, 1]}, "has 257 tokens and types for 2 of them"),
        ({"token_type": [1] * 258}, "has 257 tokens and types for 258 of them"),
        ({"token_type": [1] * 256 + [7]}, "a token of type 7"),
        ({"token_type": [1] * 256 + [-1]}, "a token of type -1"),
        ({"token_type": ["1"] * 257}, "a token of type '1'"),
        ({"rows": 300}, "has 257 tokens and its embedding 300"),
        ({"rows": 100}, "has 257 tokens and its embedding 100"),
        ({"tokens": [*ALPHABET, "a"]}, "the token 'a' twice"),
        ({"tokens": [1, 2, 3]}, "the token 1, which is no text"),
        ({"tokens": "abc"}, "has 0 tokens and its embedding"),
        ({"tokens": None}, "has 0 tokens and its embedding"),
        ({"bos_token_id": 257}, "bos_token_id is 257, not one of 257 tokens"),
        ({"padding_token_id": "a"}, "padding_token_id is 'a', not one"),
        ({"unknown_token_id": 1.5}, "unknown_token_id is 1.5, not one"),
        ({"add_bos_token": True}, "names no bos_token_id"),
        ({"add_eos_token": True}, "names no eos_token_id"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
        ({"chat_template": 7}, "its chat template is 7, not a text"),
        ({"chat_template": [1, 2]}, r"its chat template is \[1, 2\], not a text"),
        ({"pre": "mpt"}, "'gpt2/mpt' is none of .*needs the base's tokenizer.json"),
        ({"pre": "default"}, "'gpt2/default' is none of"),
        ({"pre": None}, "'gpt2/None' is none of"),
        ({"pre": 7}, "'gpt2/7' is none of"),
        ({"model": "llama"}, "its tokenizer has no scores"),
        ({"model": "bert"}, "'bert/qwen2' is none of"),
        ({"model": None}, "no usable tokenizer in it; the model needs the base's tokenizer.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    options: dict[str, Any], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "tokens" in options:
        options = {"rows": 257, **options}
    file = write(tmp_path / "x.gguf", **options)
    with pytest.raises(AHNError, match=match) as error:
        gguf_tokenizer(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
    # The weights are good for all that: the model is converted, and lacks a tokenizer.
    convert(file, GDN / "ahn_only", tmp_path / "out")
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"warning: {file}: ")
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("value", [257, "a", 2.5, True])
def test_an_end_that_is_no_token_is_refused(value: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "x.gguf", eot_token_id=value)
    for read in (gguf_tokenizer, lambda file: convert(file, GDN / "ahn_only", tmp_path / "out")):
        with pytest.raises(AHNError, match=f"{file}: its eot_token_id is") as error:
            read(file)
        assert "\n" not in str(error.value)


class PanicException(BaseException):
    """What Rust's panics are in Python, under a module that cannot be imported."""


@pytest.mark.parametrize("error", [Exception("odd\nmerges"), PanicException("index out\nof")])
def test_errors_of_tokenizers_are_ours(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    file = write(tmp_path / "x.gguf")
    monkeypatch.setattr(gguf.models, "BPE", fail)
    with pytest.raises(AHNError, match=r"x\.gguf: no usable tokenizer in it") as caught:
        gguf_tokenizer(file)
    assert "\n" not in str(caught.value)


def test_ctrl_c_is_no_error_of_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    file = write(tmp_path / "x.gguf")
    monkeypatch.setattr(gguf.models, "BPE", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf_tokenizer(file)


def test_a_token_is_at_most_a_thousand_characters_long(tmp_path: Path) -> None:
    for length in (1024, 1025):
        file = write(tmp_path / "x.gguf", [("z" * length, NORMAL)])
        if length == 1024:
            assert gguf_tokenizer(file).convert_ids_to_tokens([257]) == ["z" * 1024]
    with pytest.raises(AHNError, match="a token of 1,025 characters"):
        gguf_tokenizer(file)


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("model", "none of llama"),
        ("pre", "none of llama"),
        ("bos_token_id", "bos_token_id is"),
        ("add_bos_token", "add_bos_token is"),
        ("tokens", "token"),
        ("merges", "merge"),
        ("chat_template", "chat template is"),
        ("token_type", "types for 2"),
        ("add_space_prefix", ""),  # of sentencepiece's alone
    ],
)
@pytest.mark.parametrize("value", [[1, 2], [0.5, 1.5], [True, False]])
def test_what_should_be_one_value_is_an_array(
    key: str, match: str, value: list[Any], tmp_path: Path
) -> None:
    file = write(tmp_path / "x.gguf", **{key: value})
    if not match:
        assert gguf_tokenizer(file).encode("ab") == [256]
        return
    with pytest.raises(AHNError, match=match) as caught:
        gguf_tokenizer(file)
    assert "\n" not in str(caught.value)
