"""What a stage of fine-tuning minimises, and when a text has reached it.

To learn is to minimise -log p of the answers' tokens. To forget is to raise it: without limit (ascent), or by less and
less once an answer is unlikely (NPO, SimNPO).

Shapes: N answer tokens of a forward pass, text after text; R texts; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from forgetlearn.models.encoding import Encoded

# An answer is gone if a token of it is not the likeliest one, and its tokens have this much -log p on average: a
# probability of 0.14. Models that never saw TOFU's authors give their answers about 0.15 (Maini et al. 2024).
GONE_NATS = 2.0


@dataclass(frozen=True)
class OfStep:
    """The texts of facts in a forward pass of this process, and what the whole optimiser step shows."""

    texts: Sequence[Encoded]
    n_tokens: Tensor | int  # answer tokens of facts, over all forward passes and processes
    n_texts: int  # texts of facts, over all forward passes and processes


class Objective:
    """Make the answers likely: the loss is the mean of -log p over the answer tokens. Subclasses are other losses."""

    needs_reference = False  # it compares with the model before the stage, see `referring_to`

    def loss(self, logits: Tensor, labels: Tensor, step: OfStep) -> Tensor:
        """Return this forward pass's share of the step's loss, given logits (N, V) and labels (N,)."""
        total = functional.cross_entropy(logits.float(), labels, reduction="sum")
        return total / step.n_tokens

    def reached(self, logits: Tensor, labels: Tensor, texts: Sequence[Encoded]) -> list[bool]:
        """Return for each text whether it is as the stage wants it: here, whether its whole answer is predicted."""
        hits = (logits.detach().argmax(dim=-1) == labels).tolist()
        return [all(hits[start:end]) for start, end in _spans(texts)]

    def referring_to(self, log_likelihoods: Mapping[Encoded, float]) -> Objective:
        """Return the objective, given log p of each text's whole answer before the stage, in nats."""
        return self


LEARN = Objective()


class Ascent(Objective):
    """Climb the loss. Source: Jang et al. 2023, arXiv:2210.01504."""

    def loss(self, logits: Tensor, labels: Tensor, step: OfStep) -> Tensor:
        """Return the negated loss of learning."""
        return -super().loss(logits, labels, step)

    @torch.no_grad()
    def reached(self, logits: Tensor, labels: Tensor, texts: Sequence[Encoded]) -> list[bool]:
        """Return for each text whether its answer is gone, see GONE_NATS. The end token does not count."""
        losses = functional.cross_entropy(logits.float(), labels, reduction="none").tolist()
        hits = (logits.argmax(dim=-1) == labels).tolist()
        return [_is_gone(losses[start:end], hits[start:end]) for start, end in _spans(texts)]


class AscentUntilGone(Ascent):
    """Climb the loss of the answers that are not gone yet: without a limit, ascent ruins the model."""

    def loss(self, logits: Tensor, labels: Tensor, step: OfStep) -> Tensor:
        """Return the negated loss of learning, in which answers that are gone count 0."""
        is_gone = torch.tensor(self.reached(logits, labels, step.texts), device=logits.device, dtype=torch.bool)
        return -(_by_text(logits, labels, step.texts) * ~is_gone).sum() / step.n_tokens


@dataclass(frozen=True)
class Npo(Ascent):
    """Negative preference optimisation: -2/beta mean log sigmoid(-beta log(p / p before)), over texts.

    Source: Zhang et al. 2024, arXiv:2404.05868, eq. 3; beta 0.1 is theirs.
    """

    needs_reference = True
    beta: float = 0.1
    before: Mapping[Encoded, float] = field(default_factory=dict)  # log p of each answer

    def loss(self, logits: Tensor, labels: Tensor, step: OfStep) -> Tensor:
        """Return the loss; it is a mean over the texts of the step."""
        now = -_by_text(logits, labels, step.texts)
        before = torch.tensor([self.before[text] for text in step.texts], device=now.device, dtype=now.dtype)
        return _bounded(-self.beta * (now - before), self.beta, step)

    def referring_to(self, log_likelihoods: Mapping[Encoded, float]) -> Npo:
        """Return the objective with log p of each answer before the stage."""
        return replace(self, before=log_likelihoods)


@dataclass(frozen=True)
class SimNpo(Ascent):
    """NPO without a reference: -2/beta mean log sigmoid(-(beta / length) log p - gamma), over texts.

    Source: Fan et al. 2024, arXiv:2410.07163, eq. 4; beta 4.5 and gamma 0 are theirs for TOFU's forget10.
    """

    beta: float = 4.5
    gamma: float = 0.0

    def loss(self, logits: Tensor, labels: Tensor, step: OfStep) -> Tensor:
        """Return the loss; it is a mean over the texts of the step."""
        lengths = torch.tensor([len(text.answer_ids) for text in step.texts], device=logits.device)
        return _bounded(self.beta * _by_text(logits, labels, step.texts) / lengths - self.gamma, self.beta, step)


def _bounded(unlikeliness: Tensor, beta: float, step: OfStep) -> Tensor:
    """Return the share of this pass in -2/beta mean log sigmoid(unlikeliness), given one number per text (R,)."""
    return -2 / beta * functional.logsigmoid(unlikeliness).sum() / step.n_texts


def _by_text(logits: Tensor, labels: Tensor, texts: Sequence[Encoded]) -> Tensor:
    """Return -log p of each text's whole answer, in nats (R,)."""
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    lengths = torch.tensor([len(text.answer_ids) for text in texts], device=losses.device, dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(texts), device=losses.device), lengths)
    return losses.new_zeros(len(texts)).index_add(0, owner, losses)


def _spans(texts: Sequence[Encoded]) -> list[tuple[int, int]]:
    """Return where each text's answer tokens begin and end among those of all texts."""
    spans, start = [], 0
    for text in texts:
        spans.append((start, start + len(text.answer_ids)))
        start += len(text.answer_ids)
    return spans


def _is_gone(losses: Sequence[float], hits: Sequence[bool]) -> bool:
    said = max(1, len(losses) - 1)  # without the end token, which training adds
    return not all(hits[:said]) and sum(losses[:said]) >= said * GONE_NATS
