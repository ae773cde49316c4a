"""A Llama-architecture GGUF file as an mlx-lm model and its tokenizer.

llama.cpp stores each head's query and key rows in another order and packs the tokenizer
and chat template into the file's metadata; both are undone here. Quantized tensors are
expanded: on the CPU, quantized products are ten times slower than OpenBLAS.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..errors import AHNError

GROUP = 32  # values per scale in Q4_0, Q4_1 and Q8_0
CONTROL = 3  # token type of special tokens

# GGUF's names of tensors -> mlx-lm's.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# Names of pre-tokenizers in GGUF -> how a text falls into words.
SPLITS = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def load_llama(file: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The float32 model and the file's metadata. Raises AHNError on a damaged file."""
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
        tensors, metadata = loaded
        config = _config(metadata, tied="output.weight" not in tensors)
        base = llama.Model(llama.ModelArgs.from_dict(config))
        weights = _weights(tensors, config)
        base.load_weights(list(weights.items()), strict=True)
    except (RuntimeError, ValueError, KeyError) as e:
        reason = " ".join(str(e).split())[:200]
        raise AHNError(f"{file}: not a Llama model that MLX can read ({reason})") from None
    return base, metadata


def _config(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """What mlx-lm's llama reads from a config.json."""

    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        # The file's float32 has digits that the value was not written with.
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{number('rope.freq_base'):.6g}"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
    }


def _weights(tensors: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name in tensors:
        stem, kind = name.rsplit(".", 1)
        if kind != "weight" or stem == "rope_freqs":
            continue
        value = _expand(tensors, stem)
        *block, part = stem.split(".")  # blk.3.attn_q
        if part in heads:
            value = unpermute(value, heads[part])
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{NAMES[part]}.weight"] = value
    return weights


def _expand(tensors: dict[str, mx.array], stem: str) -> mx.array:
    weight = tensors[f"{stem}.weight"]
    if weight.dtype != mx.uint32:
        return weight.astype(mx.float32)
    scales = tensors[f"{stem}.scales"].astype(mx.float32)
    biases = tensors[f"{stem}.biases"].astype(mx.float32)
    # 32 // bits values per word, GROUP values per scale.
    bits = weight.shape[-1] * 32 // (scales.shape[-1] * GROUP)
    return mx.dequantize(weight, scales, biases, group_size=GROUP, bits=bits)


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """From RoPE pairs (2i, 2i + 1), as stored, to pairs (i, i + D/2), as in mlx-lm."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [H, D/2, 2, in]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def load_tokenizer(metadata: dict[str, Any]) -> TokenizerWrapper:
    """The byte-level BPE tokenizer in a file's metadata, with its chat template."""
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind[0] != "gpt2" or kind[1] not in SPLITS:
        known = ", ".join(f"gpt2/{name}" for name in SPLITS)
        raise AHNError(f"GGUF tokenizer {'/'.join(kind)} is not supported; only {known}")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[kind[1]])
    if kind[1] == "qwen2":
        bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])

    def token(role: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if number is None else tokens[number.item()]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=token("bos"),
        eos_token=token("eos"),
        pad_token=token("padding"),
        unk_token=token("unknown"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
    # A chat turn ends with eos, a document with <|endoftext|>, under either role.
    ends = {tokenizer.eos_token_id, tokenizer.unk_token_id, bpe.token_to_id("<|endoftext|>")}
    return TokenizerWrapper(
        tokenizer, BPEStreamingDetokenizer, eos_token_ids=sorted(i for i in ends if i is not None)
    )
