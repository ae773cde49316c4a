"""GGUF files of other architectures than Llama's and Qwen's: what llama.cpp's converter would write
of a tiny random model is that model again, and its tokenizer is sentencepiece's."""

import io

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten, tree_map

from ahn_mlx.checkpoints import gguf
from ahn_mlx.checkpoints.ggufile import GGUFile
from ahn_mlx.checkpoints.ggufmodels import ARCHITECTURES, PLAIN
from ahn_mlx.errors import AHNError
from ahn_mlx.model.augment import build_base
from ahn_mlx.model.families import tiny_config

ggml = pytest.importorskip("gguf")
F32 = ggml.GGMLQuantizationType.F32
IDS = mx.array([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])

# What of a tiny config a file cannot say otherwise.
CONFIG = {
    "command-r": {"use_qk_norm": True, "attention_bias": False, "layer_norm_bias": False},
    "cohere2": {"num_hidden_layers": 4, "sliding_window_pattern": 4},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3": {
        **{"sliding_window_pattern": 6, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
    },
    "phi3": {"partial_rotary_factor": 0.5},
    "stablelm": {"qk_layernorm": False, "use_qkv_bias": True, "use_parallel_residual": True},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 4},
}
# Keys of the metadata, with the tiny model's values.
SAID = {
    "cohere2": {"attention.sliding_window": 6, "logit_scale": 0.0625},
    "command-r": {"logit_scale": 0.0625},
    "glm4": {"rope.dimension_count": 8},
    "gpt-oss": {
        **{"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96},
        "attention.sliding_window": 6,
    },
    "lfm2": {"shortconv.l_cache": 3},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attention.sliding_window": 6},
    "granite": {
        **{"attention.scale": 0.2, "embedding_scale": 1.5, "residual_scale": 0.5},
        "logit_scale": 2.0,
    },
    "phi3": {"rope.dimension_count": 8},
    "qwen2moe": {
        **{"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
        "expert_shared_feed_forward_length": 32,
    },
    "stablelm": {"rope.dimension_count": 8},
    "qwen3moe": {
        **{"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    },
}


def permuted(rows, heads):
    """llama.cpp's order of rows."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def random(model):
    mx.random.seed(5)
    model.update(
        tree_map(
            lambda x: (
                1 + 0.2 * mx.random.normal(x.shape)
                if x.ndim < 2
                else mx.random.normal(x.shape) * (1.5 / x.shape[-1]) ** 0.5
            ),
            model.parameters(),
        )
    )
    model.eval()
    return model


def written(arch, file):
    """The model, and a file of it."""
    known = ARCHITECTURES[arch]
    model = random(build_base({**tiny_config(known.family), **CONFIG.get(arch, {})}))
    writer = ggml.GGUFWriter(file, arch)
    for add, value in (
        (writer.add_embedding_length, 64),
        (writer.add_block_count, len(model.layers)),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, [0, 2, 0, 2] if arch == "lfm2" else 2),
        (writer.add_key_length, 16),
        (writer.add_context_length, 512),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_layer_norm_eps, 1e-5),
        (writer.add_rope_freq_base, 10_000.0),
    ):
        add(value)
    for key, value in SAID.get(arch, {}).items():
        add = writer.add_uint32 if type(value) is int else writer.add_float32
        add(f"{arch}.{key}", value)
    kinds = {name: kind for kind, name in ggml.MODEL_ARCH_NAMES.items()}
    names = ggml.get_tensor_name_map(kinds[arch], len(model.layers))
    for name, x in tree_flatten(model.parameters()):
        stem, ending = name.rsplit(".", 1)
        value = np.array(x)
        if arch in ("granite", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            value = permuted(value, 4 if stem.endswith("q_proj") else 2)
        if arch.startswith("gemma") and "norm" in stem:
            value = value + 1
        if "conv.conv" in stem or "shared_expert_gate" in stem:
            value = value.squeeze()
        known_as = stem.replace("switch_mlp", "experts")
        if ending == "sinks":
            known_as, ending = name, "weight"
        writer.add_tensor(f"{names.get_name(known_as)}.{ending}", value, raw_dtype=F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(PLAIN)))
def test_the_model_in_a_file_is_the_one_that_was_written(arch, tmp_path):
    model = written(arch, tmp_path / "a.gguf")
    file = GGUFile(tmp_path / "a.gguf")
    config, tensors = file.config(), file.expanded()
    assert file.sources().keys() == tensors.keys() == dict(tree_flatten(model.parameters())).keys()
    again = build_base(config)
    again.load_weights(list(tensors.items()), strict=True)
    again.eval()
    off = mx.abs(again(IDS) - model(IDS)).max() / mx.abs(model(IDS)).max()
    assert off.item() < 1e-5


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_of_a_family_scales_by_its_width(arch, layers, tmp_path):
    """As their makers have it; the others by the size of a head."""
    written(arch, tmp_path / "a.gguf")
    file = GGUFile(tmp_path / "a.gguf")
    file.metadata[f"{arch}.attention.key_length"] = np.uint32(8)
    for count, scale in ((layers - 1, 8), (layers, 64 // 4), (layers + 1, 8)):
        file.metadata[f"{arch}.block_count"] = np.uint32(count)
        assert file.config()["query_pre_attn_scalar"] == scale


@pytest.mark.parametrize("arch", ["mamba", "gpt2", "deepseek2", "llama4"])
def test_another_architecture_is_refused_by_name(arch, tmp_path):
    writer = ggml.GGUFWriter(tmp_path / "a.gguf", arch)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AHNError, match=f"holds a '{arch}' model, not one of llama, .*gemma2"):
        GGUFile(tmp_path / "a.gguf").config()


@pytest.mark.parametrize(
    "arch, key, value, match",
    [
        ("granite", "attention.head_count_kv", [2, 1], r"its layers have \[2, 1\] key/value heads"),
        ("lfm2", "attention.head_count_kv", [0, 2, 0, 1], "its layers have .* key/value heads"),
        ("glm4", "rope.dimension_sections", [4, 2, 2, 0], "in sections, as for pictures"),
    ],
)
def test_layers_that_mlx_lm_has_not_are_refused(arch, key, value, match, tmp_path, monkeypatch):
    written(arch, tmp_path / "a.gguf")
    file = GGUFile(tmp_path / "a.gguf")
    monkeypatch.setitem(file.metadata, f"{arch}.{key}", np.array(value))
    with pytest.raises(AHNError, match=match):
        file.config()


TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "Call me Ishmael. Some years ago -- never mind how long precisely -- in 1851 ...",
    "Das Auto f\u00e4hrt; l'\u00e9t\u00e9 est court. \u6211\u5011\u8aaa\u8a71 \u4f60\u597d",
    "for i in range(10):\n    print(i)  # ten",
)


@pytest.fixture(scope="module", params=[True, False])
def pieces(request):
    """A sentencepiece model with bytes, and the metadata of a file of it. As Llama's, which puts a
    space first, and as Gemma's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 9),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        character_coverage=0.98,
        user_defined_symbols=["<start_of_turn>"],
        minloglevel=9,
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(spm.vocab_size())
    kinds = [(spm.is_unknown, 2), (spm.is_control, 3), (spm.is_byte, 6)]
    types = [next((kind for is_one, kind in kinds if is_one(i)), 1) for i in ids]
    tokens = [spm.id_to_piece(i) for i in ids]
    types[tokens.index("<start_of_turn>")] = 4
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([spm.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(spm.bos_id()),
        "tokenizer.ggml.eos_token_id": np.uint32(spm.eos_id()),
        "tokenizer.ggml.unknown_token_id": np.uint32(spm.unk_id()),
        "tokenizer.ggml.add_bos_token": np.bool_(True),
        "tokenizer.ggml.add_space_prefix": np.bool_(request.param),
    }
    return spm, metadata


@pytest.mark.parametrize(
    "text", [*TEXT, "the  wisdom   of", " a", "a ", "na\u00efve \U0001f600 zebra", "\n\nNo", "x"]
)
def test_text_becomes_the_tokens_of_sentencepiece(pieces, text):
    spm, metadata = pieces
    tokenizer = gguf.load_tokenizer(metadata, spm.vocab_size())
    ids = tokenizer.encode(text)
    assert ids == [spm.bos_id(), *spm.encode(text)]
    assert tokenizer.decode(ids[1:]) == text
    said = tokenizer.detokenizer
    said.reset()
    for i in ids[1:]:
        said.add_token(i)
    said.finalize()
    if metadata["tokenizer.ggml.add_space_prefix"]:  # mlx-lm trims all, sentencepiece one
        assert said.text == text.lstrip(" ")
    else:
        assert said.text == text
    turn = spm.piece_to_id("<start_of_turn>")
    assert tokenizer.encode("<start_of_turn>", add_special_tokens=False) == [turn]


def test_a_sentencepiece_tokenizer_without_scores_is_refused(pieces):
    spm, metadata = pieces
    for wrong in (None, metadata["tokenizer.ggml.scores"][:-1], ["a"]):
        changed = {**metadata, "tokenizer.ggml.scores": wrong}
        with pytest.raises(AHNError, match="scores"):
            gguf.load_tokenizer(changed, spm.vocab_size())


def test_tekken_splits_words_as_its_file_says():
    signs = sorted(gguf.pre_tokenizers.ByteLevel.alphabet())
    merges = ["d o", "do n", "' t", "2 0", "H e", "He l"]
    tokens = [*signs, *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(len(tokens), np.int32),
        "tokenizer.ggml.merges": merges,
    }
    tokenizer = gguf.load_tokenizer(metadata, len(tokens))
    said = [tokens[i] for i in tokenizer.encode("don't 2024", add_special_tokens=False)]
    # No contractions of its own: the mark goes with the letters; digits stand alone.
    assert said == ["don", "'t", "\u0120", "2", "0", "2", "4"]
