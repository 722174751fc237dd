"""Tiny random models of the architectures that transformers makes a causal language model of.

Sizes are set by name wherever a config has a setting of that name; `OWN` has what an architecture needs beside them.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LARGEST = 3_000_000  # parameters: what is still larger has sizes of its own that these do not reach
SIZES = {
    **{"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "max_position_embeddings": 256, "n_positions": 256},
    **{"intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "d_ff": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    **{"state_size": 8, "dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    **{"attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    **{"activation_dropout": 0.0, "hidden_dropout": 0.0, "decoder_layerdrop": 0.0, "layerdrop": 0.0},
}
_LATENT = {"num_key_value_heads": 4}
_GATED_DELTA = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
_SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
_CONV = {"layer_types": ["conv", "full_attention"]}
_ROTARY = {"rotary_dim": 4}
OWN = {
    **{"axk1": _LATENT, "axk2": _LATENT, "deepseek_v2": _LATENT, "deepseek_v32": _LATENT, "minicpm3": _LATENT},
    **{"glm4_moe_lite": _LATENT, "glm_moe_dsa": _LATENT, "youtu": _LATENT},
    "deepseek_v3": _LATENT | {"first_k_dense_replace": 1},
    **{"qwen3_next": _GATED_DELTA, "qwen3_5_text": _GATED_DELTA, "qwen3_5_moe_text": _GATED_DELTA},
    "bamba": _SSM | {"attn_layer_indices": [1]},
    "granitemoehybrid": _SSM | {"layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    **{"codegen": _ROTARY, "gptj": _ROTARY, "lfm3": _CONV, "lfm2_moe": _CONV},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "dots1": {"n_shared_experts": 1},
    "llama4_text": {"intermediate_size_mlp": 48},
}


class TooLarge(Exception):
    """An architecture that `SIZES` do not make small."""


def make_architecture(name: str, **settings: object) -> torch.nn.Module:
    """A model of this `model_type`, with random weights that are the same at every call."""
    kind = CONFIG_MAPPING[name]
    known = {key for one in kind.__mro__ for key in getattr(one, "__annotations__", {})} | set(kind.attribute_map)
    config = kind(**{key: value for key, value in SIZES.items() if key in known} | OWN.get(name, {}) | settings)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise TooLarge(f"{name}: {size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
