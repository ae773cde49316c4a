"""The architectures of GGUF files that mlx-lm runs: as which family, with which settings, and what
their tensors are called there.

Names are those of the package gguf, asked for each parameter of mlx-lm's own model; the
architectures of ours are written down, so that they need no package.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx.utils import tree_flatten

from ..errors import AHNError, show
from ..model.augment import build_base
from ..platform import pip_install

# GGUF's names of tensors -> mlx-lm's, of what is read without the package.
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
BARE = "sinks"  # an array of a layer's own
MAX_LAYERS = 1000  # so many names are made
PLAIN = ("llama", "qwen2", "qwen3")

EPSILON = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
LAYER_NORM = ("layer_norm_eps", "attention.layer_norm_epsilon")


class Architecture(NamedTuple):
    """family: mlx-lm's. permuted: query and key rows are in llama.cpp's order. offset: what the
    file has added to the weights of norms. epsilon, settings: entry of config.json -> key of the
    metadata; fixed: entries that no key says; there, lacks: entry -> tensor that is there if it is
    true, and if it is false. attending: entry of the layers that have key/value heads, if others
    have none. scaled_by_width: how many layers a model has whose scores are scaled by width over
    heads, and not by the size of a head."""

    family: str
    permuted: bool = False
    offset: float = 0.0
    partial: bool = False
    epsilon: tuple[str, str] = EPSILON
    settings: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}
    there: Mapping[str, str] = {}
    lacks: Mapping[str, str] = {}
    attending: str | None = None
    scaled_by_width: int | None = None


_TAKEN = {"num_experts_per_tok": "expert_used_count"}
_WIDTH = {"moe_intermediate_size": "expert_feed_forward_length"}
_EXPERTS = {"num_experts": "expert_count", **_TAKEN, **_WIDTH}
_WINDOW = {"sliding_window": "attention.sliding_window"}
ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", offset=1.0),
    "gemma2": Architecture(
        "gemma2",
        offset=1.0,
        settings={k: k for k in ("attn_logit_softcapping", "final_logit_softcapping")},
        scaled_by_width=46,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        offset=1.0,
        settings=_WINDOW,
        scaled_by_width=62,
    ),
    "command-r": Architecture(
        "cohere",
        epsilon=LAYER_NORM,
        settings={"logit_scale": "logit_scale"},
        there={
            "attention_bias": "blk.0.attn_q.bias",
            "use_qk_norm": "blk.0.attn_q_norm.weight",
        },
    ),
    "cohere2": Architecture(
        "cohere2",
        epsilon=LAYER_NORM,
        settings={**_WINDOW, "logit_scale": "logit_scale"},
        there={"attention_bias": "blk.0.attn_q.bias"},
    ),
    "glm4": Architecture("glm4", partial=True, there={"attention_bias": "blk.0.attn_q.bias"}),
    "gpt-oss": Architecture(
        "gpt_oss",
        settings={
            **{**_WINDOW, **_TAKEN, "num_local_experts": "expert_count"},
            "intermediate_size": "expert_feed_forward_length",
        },
    ),
    "granite": Architecture(
        "granite",
        permuted=True,
        settings={
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        fixed={"attention_bias": False, "mlp_bias": False},
    ),
    "lfm2": Architecture(
        "lfm2",
        epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
        settings={
            **{"conv_L_cache": "shortconv.l_cache", "block_dim": "embedding_length"},
            "block_ff_dim": "feed_forward_length",  # adjusted already
        },
        fixed={
            **{"block_auto_adjust_ff_dim": False, "block_multiple_of": 1},
            **{"block_ffn_dim_multiplier": 1.0, "conv_bias": False},
        },
        attending="full_attn_idxs",
    ),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", partial=True),
    "qwen2moe": Architecture(
        "qwen2_moe",
        settings={
            **_EXPERTS,
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        settings=_EXPERTS,
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "smollm3": Architecture("smollm3", permuted=True),
    "stablelm": Architecture(
        "stablelm",
        epsilon=LAYER_NORM,
        partial=True,
        fixed={"qk_layernorm": False},
        there={"use_qkv_bias": "blk.0.attn_q.bias"},
        lacks={"use_parallel_residual": "blk.0.ffn_norm.weight"},
    ),
    "starcoder2": Architecture(
        "starcoder2", epsilon=("norm_epsilon", "attention.layer_norm_epsilon")
    ),
}


def shaped(stem: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape as mlx-lm has it, which keeps axes of one that the file has dropped."""
    role = stem.rsplit(".", 1)[-1]
    if role == "conv" and len(shape) == 2:  # a filter for each channel
        return (*shape, 1)
    if role == "ffn_gate_inp_shexp" and len(shape) == 1:  # the gate of an expert
        return (1, *shape)
    return shape


def names_of(kind: str, config: dict[str, Any]) -> dict[str, str]:
    """GGUF's names of tensors -> mlx-lm's, both without the last part, which is theirs alike; but
    one of mlx-lm's that ends in BARE is whole. Raises AHNError if the package is missing that knows
    them."""
    layers = config["num_hidden_layers"]
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise AHNError(f"its block_count must be from 1 to {MAX_LAYERS}, not {show(layers)}")
    if kind in PLAIN:
        whole = ("token_embd", "output_norm", "output")
        return {
            **{name: NAMES[name] for name in whole},
            **{
                f"blk.{i}.{name}": f"model.layers.{i}.{theirs}"
                for i in range(layers)
                for name, theirs in NAMES.items()
                if name not in whole
            },
        }
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError:
        raise AHNError(
            f"holds a {show(kind)} model; {pip_install('gguf')}, which knows its tensors' names"
        ) from None
    known = get_tensor_name_map({name: a for a, name in MODEL_ARCH_NAMES.items()}[kind], layers)
    parameters: Any = tree_flatten(build_base(config).parameters())
    found = {}
    for name, _ in parameters:
        known_as = name.replace(".switch_mlp.", ".experts.")
        if stored := known.get_name(known_as.rpartition(".")[0]):
            found[stored] = name.rpartition(".")[0]
        elif stored := known.get_name(known_as):
            found[stored] = name
        else:
            raise AHNError(f"holds a {show(kind)} model, of whose {name} gguf knows no name")
    return found
