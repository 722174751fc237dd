"""Compute attention within each text of a packed row, without a mask and without work between texts.

transformers itself uses a mask over the whole row, quadratic in the row's length. Here, for attention alone, queries,
keys and values are laid out with one row per text, padded at the end. Attention is causal, so no text sees its padding.
The rest of a model treats each token by itself, so it stays packed.
Shapes: B texts of at most L tokens, T tokens in all, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

BY_TEXT = "forgetlearn_by_text"
PLACES = ("text_tokens", "token_places")  # arguments that a model passes on to `attend_by_text`
# Up to so many tokens, torch's flash attention computes gradients on a CPU faster in float32 than in bfloat16: with 9
# heads of width 64, 2 ms instead of 12 for 8 texts of 45 tokens, 8 instead of 12 for 2 texts of 200.
SHORT = 256


def attend_by_text(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    text_tokens: Tensor | None = None,
    token_places: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Return the output (1, T, H, D) of causal attention within each text; without the last two tensors, use sdpa.

    Padding repeats a text's last token. No real token attends to padding, so its gradients are exactly 0.
    """
    if text_tokens is None or token_places is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    rows = [_by_text(tensor, text_tokens) for tensor in (query, key, value)]
    options["is_causal"] = True
    if in_float32 := _is_faster_in_float32(*rows):
        rows = [row.float() for row in rows]
    with torch.autocast(query.device.type, enabled=False) if in_float32 else nullcontext():
        out, _ = sdpa_attention_forward(module, *rows, None, **options)
    return out.flatten(0, 1).index_select(0, token_places).unsqueeze(0).to(value.dtype), None


def _is_faster_in_float32(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if half precision is used to train on short texts (B, H, L, D) on the CPU."""
    halves = torch.is_autocast_enabled("cpu") or value.dtype.itemsize == 2
    is_trained = torch.is_grad_enabled() and any(rows.requires_grad for rows in (query, key, value))
    return query.device.type == "cpu" and halves and is_trained and query.shape[2] <= SHORT


def _by_text(packed: Tensor, text_tokens: Tensor) -> Tensor:
    """Lay (1, H, T, D) out as (B, H, L, D)."""
    tokens: Tensor = packed[0].transpose(0, 1).index_select(0, text_tokens.flatten())
    return tokens.view(*text_tokens.shape, *tokens.shape[1:]).transpose(1, 2)


def places(paths: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return the indices that turn a packed row (1, T) into one row per text (B, L) and back.

    `paths` lists the places in the row of each text's tokens; texts may share their first tokens. `text_tokens` (B, L)
    are indices into the row, padded by repeating a text's last token. `token_places` (T,) are indices into the
    flattened `text_tokens`. A token that several texts share is taken from the first text; it is the same in all of
    them, because the tokens before it are. `attention_mask` is a four-dimensional dummy that keeps transformers from
    building its own mask; it is never read.
    """
    longest = max(map(len, paths))
    text_tokens = [[*path, *path[-1:] * (longest - len(path))] for path in map(list, paths)]
    first: dict[int, int] = {}
    for start, path in zip(range(0, len(paths) * longest, longest), paths, strict=True):
        for place, token in enumerate(path, start):
            first.setdefault(token, place)
    return {
        "text_tokens": torch.tensor(text_tokens),
        "token_places": torch.tensor([first[token] for token in range(len(first))]),
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    }


@contextmanager
def by_text(model: nn.Module) -> Iterator[bool]:
    """Within the `with` block, make `model` attend text by text; yield False if its own attention is not sdpa.

    This applies only to rows with `places`. Other batches are computed as before.
    """
    inner = plain(model)
    if implementation(model) != "sdpa" or not hasattr(inner, "set_attn_implementation"):
        yield False
        return
    AttentionInterface.register(BY_TEXT, attend_by_text)
    AttentionMaskInterface.register(BY_TEXT, sdpa_mask)
    try:
        inner.set_attn_implementation(BY_TEXT)
        yield implementation(model) == BY_TEXT
    finally:
        inner.set_attn_implementation("sdpa")


def implementation(model: nn.Module) -> str | None:
    """Return the name of the model's attention: sdpa, eager, flash_attention_2, ..."""
    return getattr(getattr(plain(model), "config", None), "_attn_implementation", None)


def plain(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model itself, without any wrapper."""
    inner = getattr(model, "module", model)
    return getattr(inner, "get_base_model", lambda: inner)()
