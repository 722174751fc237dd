"""The architectures that are written as GGUF: what llama.cpp calls each, its metadata, and how it stores the weights.

An architecture is a row of `ARCHITECTURES`. Each was written and read back by transformers with equal weights; a
model of another architecture, or with a setting that llama.cpp does not compute with, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetlearn.errors import ModelError, shown, some
from forgetlearn.weights.rounding import Array

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Fields = dict[str, int | float]  # metadata without the architecture's name in front


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a kind of model.

    name          its `general.architecture`
    fields        its metadata, computed from a model's config
    requires      settings of the config that llama.cpp takes for granted, each with the value that it must have
    rope_types    the kinds of rotary positions that it can be told of
    pairs         True if it rotates neighbouring rows of queries and keys, where transformers rotates two halves
    norm_offset   what it adds to the weights of norms
    """

    name: str
    fields: Callable[[Any], Fields]
    requires: Mapping[str, object] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default",)
    pairs: bool = False
    norm_offset: float = 0.0

    def as_stored(self, name: str, values: Array, config: PreTrainedConfig) -> Array:
        """Return a weight, or the rows of a LoRA factor B, as llama.cpp stores what it calls `name`."""
        if self.pairs and ".attn_q." in name:
            return in_pairs(values, config.num_attention_heads)
        if self.pairs and ".attn_k." in name:
            return in_pairs(values, config.num_key_value_heads)
        return values + np.float32(self.norm_offset) if name.endswith("norm.weight") else values


def in_pairs(rows: Array, n_heads: int) -> Array:
    """Return the rows of each head with row i of the first half followed by row i of the second: 0 4 1 5 2 6 3 7."""
    halves = rows.reshape(n_heads, 2, len(rows) // n_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _decoder(config: PreTrainedConfig) -> Fields:
    """Return the metadata that all decoders have."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }


def _rotary(config: PreTrainedConfig) -> Fields:
    """Return the metadata of decoders with rotary positions and RMS norms."""
    head = head_size(config)
    rope = config.rope_parameters
    return _decoder(config) | {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }


def _within_window(config: PreTrainedConfig) -> Fields:
    """Return the same with a context that a sliding window spans: llama.cpp's model has none, which is equal there."""
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    return _rotary(config) | {"context_length": min(window, config.max_position_embeddings)}


def _gemma2(config: PreTrainedConfig) -> Fields:
    return _rotary(config) | {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gpt2(config: PreTrainedConfig) -> Fields:
    return _decoder(config) | {
        "feed_forward_length": config.n_inner or 4 * config.hidden_size,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }


def head_size(config: PreTrainedConfig) -> int:
    """Return how many numbers a query of one head has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_SILU: dict[str, object] = {"hidden_act": "silu"}
_NO_WINDOW: dict[str, object] = {"use_sliding_window": False}
_NO_BIAS: dict[str, object] = {"attention_bias": False}
# By transformers' model_type.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", _rotary, {**_SILU, **_NO_BIAS, "mlp_bias": False}, rope_types=("default", "llama3"), pairs=True
    ),
    "mistral": Architecture("llama", _within_window, _SILU, pairs=True),
    "qwen2": Architecture("qwen2", _rotary, {**_SILU, **_NO_WINDOW}),
    "qwen3": Architecture("qwen3", _rotary, {**_SILU, **_NO_WINDOW, **_NO_BIAS}),
    "gemma2": Architecture("gemma2", _gemma2, {"hidden_activation": "gelu_pytorch_tanh", **_NO_BIAS}, norm_offset=1.0),
    "phi3": Architecture("phi3", _within_window, _SILU),
    "gpt2": Architecture(
        "gpt2",
        _gpt2,
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
}


def architecture_of(name: str, config: PreTrainedConfig) -> Architecture:
    """Return the architecture of a model; raise ModelError if llama.cpp, or this module, does not know all of it."""
    kind = ARCHITECTURES.get(config.model_type)
    if kind is None:
        raise ModelError(
            f"{name}: model_type = {shown(config.model_type)}: is not written as GGUF; {', '.join(ARCHITECTURES)} are. "
            "Write the merged model (--to merged) and convert it with llama.cpp's convert_hf_to_gguf.py."
        )
    odd = [
        f"{setting} = {shown(getattr(config, setting, None))}, expected {shown(value)}"
        for setting, value in kind.requires.items()
        if getattr(config, setting, None) != value
    ]
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in kind.rope_types:
        odd.append(f"rope_type = {shown(rope_type)}, expected {' or '.join(kind.rope_types)}")
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != head_size(config):
        odd.append(f"query_pre_attn_scalar = {shown(scale)}, expected head_dim ({head_size(config)})")
    if odd:
        raise ModelError(
            f"{name}: {some(odd)}: a GGUF file of {config.model_type} cannot say so, and would compute something "
            "else. Write the merged model instead (--to merged)."
        )
    return kind


def rope_factors(config: PreTrainedConfig) -> Array | None:
    """Return by how much each rotary frequency is divided, which llama.cpp reads as `rope_freqs`; None if by nothing.

    transformers ignores that tensor when it reads GGUF.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    size = head_size(config)
    plain = float(rope["rope_theta"]) ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    factors: Array = (plain / scaled.double().numpy()).astype(np.float32)
    return factors
