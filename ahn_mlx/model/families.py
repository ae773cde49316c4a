"""Which of mlx-lm's model files fit, found out by trying: each as a tiny model of its own kind.

A family's settings are those that its ModelArgs asks for; SMALL has a value for the names that
are common. Nothing here decides what fits: `augment` does.
"""

import dataclasses
import io
import pkgutil
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from ..errors import AHNError
from .augment import WRONG, augment, build_base, is_family, memory_layers
from .config import AHNConfig

LAYERS = 4

# Values for a tiny model, by the names that configs have: numbers first, with the names of each.
_NUMBERS: tuple[tuple[Any, str], ...] = (
    (LAYERS, "num_hidden_layers num_layers n_layer n_layers"),
    (64, "hidden_size n_embd block_dim"),
    (
        96,
        "intermediate_size intermediate_size_mlp block_ff_dim n_inner ffn_hidden_size"
        " ff_intermediate_size",
    ),
    (
        32,
        "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size"
        " expert_ffn_hidden_size block_multiple_of dim_model_base",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads swa_num_attention_heads num_experts"
        " num_local_experts n_routed_experts moe_num_experts linear_conv_kernel_dim mamba_d_conv"
        " conv_kernel conv1d_width mamba_dt_rank time_step_rank index_topk",
    ),
    (
        2,
        "num_key_value_heads n_kv_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"
        " linear_num_value_heads index_n_heads num_attention_groups num_experts_per_tok moe_topk"
        " moe_k zero_expert_num sliding_window_pattern full_attention_interval"
        " no_rope_layer_interval attn_layer_period expert_layer_period layer_group_size"
        " dense_attention_every_n_layers mamba_expand conv_window",
    ),
    (
        1,
        "num_shared_experts n_shared_experts num_shared_expert n_group topk_group n_groups"
        " group_norm_size mamba_n_groups decoder_sparse_step first_k_dense_replace num_dense_layers"
        " attn_layer_offset expert_layer_offset moe_layer_freq",
    ),
    (
        16,
        "head_dim v_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim"
        " mamba_d_head mamba_head_dim mamba_d_state state_size ssm_state_size kv_lora_rank"
        " q_lora_rank qk_nope_head_dim index_head_dim",
    ),
    (
        8,
        "rotary_dim qk_rope_head_dim mamba_n_heads mamba_num_heads attention_chunk_size"
        " a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim",
    ),
    (3, "conv_L_cache"),
    (6, "sliding_window sliding_window_size attention_window_size"),
    (100, "vocab_size"),
    (128, "mamba_d_ssm"),
    (512, "max_position_embeddings n_ctx n_positions block_size model_max_length"),
    (10_000, "rotary_emb_base"),
    (10_000.0, "rope_theta swa_rope_theta"),
    (
        1e-5,
        "rms_norm_eps layer_norm_eps layernorm_epsilon layer_norm_epsilon norm_eps norm_epsilon",
    ),
    (0.2, "attention_multiplier"),
    (0.5, "partial_rotary_factor rotary_pct residual_multiplier"),
    (1.0, "routed_scaling_factor block_ffn_dim_multiplier"),
    (1.4, "scale_depth"),
    (1.5, "embedding_multiplier"),
    (2.0, "logits_scaling scale_emb"),
    (20.0, "gegelu_limit"),
    (30.0, "logits_soft_cap"),
    (True, "tie_word_embeddings norm_topk_prob mamba_conv_bias qk_norm use_qk_norm"),
    (False, "mamba_proj_bias post_norm"),
)
SMALL: dict[str, Any] = {
    **{name: value for value, names in _NUMBERS for name in names.split()},
    "rope_scaling": None,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "no_rope_layers": [1, 0] * (LAYERS // 2),
    "hybrid_layer_pattern": [1, 0] * (LAYERS // 2),
    "is_moe_layer": [False, True] * (LAYERS // 2),
    "mlp_only_layers": [],
    "full_attn_idxs": [1, 3],
    "sliding_window_layers": [0, 2],
    "time_step_limit": [0.0, 10.0],
    "hidden_act": "silu",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "zero_expert_type": "identity",
    "attention_method": "MLA",
}
_ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
_YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
# Where a family has another meaning for one of these names, or wants a list.
BY_FAMILY: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "glm_moe_dsa": {"rope_parameters": _ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "llama": {"layer_types": None},
    "smollm3": {"layer_types": None},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "phi3": {"partial_rotary_factor": 1.0},
    "hunyuan": {
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0},
    },
    "kimi_linear": {
        "linear_attn_config": {
            **{"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4},
            **{"head_dim": 16, "short_conv_kernel_size": 4},
        }
    },
    "mellum": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    # Values narrower than keys, as in its real ones.
    "mimo_v2_flash": {"v_head_dim": 8, "swa_v_head_dim": 8, "moe_layer_freq": [0, 1, 0, 1]},
    "minicpm3": {"rope_scaling": {"type": "longrope", "factor": 1.0}},
    "nemotron-nas": {
        "block_configs": LAYERS * [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}}]
    },
    "nemotron_h": {
        "layer_types": None,
        "layers_block_type": ["mamba", "attention"] * (LAYERS // 2),
    },
    "olmo": {"d_model": 64, "mlp_hidden_size": 96, "embedding_size": 100},
    "openelm": {
        **{"num_transformer_layers": LAYERS, "model_dim": 64, "ffn_dim_divisor": 32},
        **{"num_query_heads": [4] * LAYERS, "num_kv_heads": [2] * LAYERS},
        **{"ffn_multipliers": [1.0] * LAYERS},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {
        "hidden_act": "gelu",
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "step3p5": {"moe_top_k": 2},
    "helium": {"tie_word_embeddings": False},
    "minicpm": {"tie_word_embeddings": False},
    "nemotron": {"hidden_act": "relu2"},
    "stablelm": {"qk_layernorm": True},
    "ministral3": {
        "rope_parameters": {
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
}


class Untold(AHNError):
    """No tiny model of a family can be made here: its real ones may fit."""


class Verdict(NamedTuple):
    """Of one family. fits: whether at least one of its layers gets a memory; None: that is not
    known. words: what is special about its attention, or why it does not fit."""

    family: str
    fits: bool | None
    words: str


def tiny_config(family: str) -> dict[str, Any]:
    """A config of a tiny model. Raises Untold if there is a setting that no value is known for,
    and AHNError if it is no text decoder."""
    if not is_family(family):
        raise AHNError(f"this mlx-lm has no model file {family}")
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            _, args = mlx_lm.utils._get_classes({"model_type": family})
    except (Exception, SystemExit) as e:
        why = " ".join(said.getvalue().split()) or e
        raise Untold(f"mlx-lm cannot import it: {why}") from None
    config: dict[str, Any] = {"model_type": family}
    known = SMALL | BY_FAMILY.get(family, {})
    unknown = []
    for field in dataclasses.fields(args):
        if field.name in known:
            config[field.name] = known[field.name]
        elif field.default is field.default_factory is dataclasses.MISSING:
            if field.name == "model_type":
                continue
            if field.type is bool:
                config[field.name] = False
            else:
                unknown.append(field.name)
    if "text_config" in unknown:
        raise AHNError("it is more than a text decoder (text_config); convert its text model")
    if unknown:
        raise Untold(f"it has settings that are not known here ({', '.join(unknown[:3])})")
    return config


def _tiny(family: str) -> nn.Module:
    config = tiny_config(family)
    try:
        return build_base(config)
    except AHNError as e:
        raise Untold(f"a tiny one cannot be made: {str(e).split(' model: ')[-1]}") from None


def judge(family: str) -> Verdict:
    """Whether it fits, by making one and running it."""
    try:
        base = _tiny(family)
        model = augment(base, AHNConfig(window=8, sinks=2))
        mx.eval(model(mx.array([[1, 2, 3]]), cache=model.make_cache()))
    except Untold as e:
        return Verdict(family, None, str(e)[:200])
    except AHNError as e:
        return Verdict(family, False, _shortly(str(e), family))
    except WRONG as e:
        return Verdict(family, False, f"a tiny one does not run: {e}"[:200])
    kinds = {attention.fit.describe() for _, attention in memory_layers(model)}
    words = [*sorted(kinds - {""})]
    if own := model.own_layers:
        caches = model.make_cache()
        others = sorted({type(caches[i]).__name__ for i in own})
        words.append(f"{len(own)} of {len(model.layers)} layers keep {', '.join(others)}")
    return Verdict(family, True, "; ".join(words))


def _shortly(error: str, family: str) -> str:
    """Without what the list says already."""
    error = error.split(" does not fit: ")[-1].split(" is not supported: ")[-1]
    return error.removeprefix(f"model family {family!r} ")[:200]


def families() -> list[str]:
    """The model files of this mlx-lm."""
    import mlx_lm.models

    found = pkgutil.iter_modules(mlx_lm.models.__path__)
    return sorted(m.name for m in found if not m.ispkg and is_family(m.name))
