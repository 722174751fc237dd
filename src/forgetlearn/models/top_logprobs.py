"""The likeliest next tokens of a base at given positions, and the divergence of a changed model from them.

Kept instead of all log-probabilities, they take a hundredth of the room, and no second model is in memory.

Shapes: N positions, V vocabulary, k kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# The probability of all tokens that are not kept is at least this: below, it is the rounding of float32 logits.
LEAST_REST = 1e-6


@dataclass(frozen=True)
class TopLogprobs:
    """The k likeliest tokens at each position, likeliest first: `ids` (N, k) int32, `logprobs` (N, k) float32."""

    ids: Tensor
    logprobs: Tensor


def top_logprobs(logits: Tensor, k: int) -> TopLogprobs:
    """Return the `k` likeliest tokens of logits (N, V), all if V is smaller, with their natural log-probabilities."""
    found, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return TopLogprobs(ids.int(), found.float() - logits.float().logsumexp(dim=-1, keepdim=True))


def divergence(base: TopLogprobs, logits: Tensor) -> Tensor:
    """Return KL(base || model) at each position (N,), in nats and float32, given the model's logits (N, V).

    The tokens that are not among the base's k likeliest count as one, so this is a lower bound of the divergence over
    all tokens; for a few dozen tokens the two hardly differ. It can be differentiated with respect to `logits`.
    """
    ids, before = base.ids.to(logits.device).long(), base.logprobs.to(logits.device)
    now = logits.gather(-1, ids).float() - logits.float().logsumexp(dim=-1, keepdim=True)
    kept = before.exp()
    rest = (1 - kept.sum(dim=-1)).clamp(min=LEAST_REST)
    rest_now = (1 - now.exp().sum(dim=-1)).clamp(min=LEAST_REST)
    return (kept * (before - now)).sum(dim=-1) + rest * (rest.log() - rest_now.log())


def agrees(base: TopLogprobs, logits: Tensor) -> Tensor:
    """Return, for each position (N,), whether the base's likeliest token is the model's too; a tie counts."""
    first = base.ids[:, :1].to(logits.device).long()
    return logits.gather(-1, first)[:, 0] >= logits.amax(dim=-1)


def save(texts: Sequence[TopLogprobs], file: Path) -> None:
    """Write the top log-probabilities of several texts to a safetensors file."""
    tensors = {
        "ids": torch.cat([text.ids for text in texts]).contiguous(),
        "logprobs": torch.cat([text.logprobs for text in texts]).contiguous(),
        "lengths": torch.tensor([len(text.ids) for text in texts]),
    }
    save_file(tensors, file)


def load(file: Path) -> list[TopLogprobs]:
    """Return what `save` wrote, text by text."""
    tensors = load_file(file)
    lengths = tensors["lengths"].tolist()
    pairs = zip(tensors["ids"].split(lengths), tensors["logprobs"].split(lengths), strict=True)
    return [TopLogprobs(ids, logprobs) for ids, logprobs in pairs]
