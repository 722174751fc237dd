"""Facts to keep: what forgetting would take from them is taken out of what is subtracted.

projection   change' = change - (change . k / k . k) k         tensor by tensor; k is what fine-tuning on them adds
fisher       change' = change * F_forget / (F_forget + F_keep)  number by number; F is the mean squared gradient

Source of `fisher`: PerTA, Cai et al. 2026, arXiv:2601.22030, with its weights as independent code has them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from forgetlearn.config.schema import ForgetSettings, KeepBy
from forgetlearn.errors import FactError, some
from forgetlearn.facts import Fact, FactSet, read_facts, sha256
from forgetlearn.models.batches import answer_logits, fitting_threads, pad_left
from forgetlearn.models.encoding import Encoded
from forgetlearn.weights.task_vector import StateDict

log = logging.getLogger("forgetlearn")


def read_keep(settings: ForgetSettings, facts: FactSet) -> list[Fact]:
    """The facts to keep that the settings name (none: an empty list), what is to be kept of each as its old answer.

    That is its old answer in the file, or in a file without old answers its new one.

    Raises:
        FactError: the file cannot be read, holds no fact, or asks what one of `facts` is about to change.
    """
    if not settings.keep:
        return []
    kept = read_facts(settings.keep)
    if shared := asked_too(kept, facts):
        shown = [f"{fact.prompt!r}" + (f" ({fact.subject})" if fact.subject else "") for fact in shared]
        raise FactError(
            f"forget.keep = {settings.keep}: {len(shared)} of its {len(kept)} facts are asked by the facts to update, "
            f"in {facts.source}: {some(shown)}. A fact is changed or kept: take them out of one file."
        )
    asked = {probe.prompt for fact in facts for probe in fact.locality}
    if probed := sum(fact.prompt in asked for fact in kept):
        log.warning("%d facts to keep are locality probes too: locality then says how what was kept fares", probed)
    return [replace(fact, ground_truth=fact.ground_truth or fact.target_new) for fact in kept]


def asked_too(kept: Iterable[Fact], facts: Iterable[Fact]) -> list[Fact]:
    """Those of `kept` that have a prompt, or a rephrase of it, in common with one of `facts`."""
    changed = {text for fact in facts for text in (fact.prompt, *fact.rephrase_prompts)}
    return [fact for fact in kept if not changed.isdisjoint((fact.prompt, *fact.rephrase_prompts))]


def fingerprint(keep: Sequence[Fact]) -> dict[str, str]:
    """The hash of the facts to keep, as an entry of a run's inputs; none where there are none."""
    return {"keep_sha256": sha256(keep)} if keep else {}


def spared(
    base: StateDict, forgotten: Iterable[tuple[str, Tensor]], kept: StateDict, by: KeepBy
) -> Iterator[tuple[str, Tensor]]:
    """`forgotten`, name by name, with the change from `base` spared where the facts to keep need it.

    `kept` is what fine-tuning on them added (projection), or the weight of every number (fisher). A change that is
    orthogonal to it stays; one along it, or of weight 0, is not made.
    """
    for name, moved in forgotten:
        start = base[name].to(moved.device, moved.dtype)
        change, own = moved - start, kept[name].to(moved.device, moved.dtype)
        if by == "fisher":
            yield name, moved - (1 - own) * change  # so that a weight of 1 changes nothing, to the bit
            continue
        length = own.square().sum()
        yield name, moved - (change * own).sum() / length * own if length > 0 else moved


def fisher_weights(forget: StateDict, keep: StateDict) -> dict[str, Tensor]:
    """F_forget / (F_forget + F_keep), from 0 to 1; 0 where neither has a gradient. 3 and 1 give 0.75."""
    return {name: torch.nan_to_num(wanted / (wanted + keep[name])) for name, wanted in forget.items()}


def squared_gradients(model: nn.Module, texts: Sequence[Encoded], device: torch.device) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: per number the mean over texts of its squared gradient.

    The gradient is that of the mean log-probability of a text's answer tokens; the weights stay as they are. On the
    CPU, in float32.
    """
    sums = {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
    model.eval()
    with fitting_threads(model, device):
        for text in texts:
            batch = pad_left([text], pad_id=0)  # alone in its batch it has no padding
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            logits = answer_logits(model, inputs, batch.positions.to(device)).flatten(0, 1)
            model.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits.float(), batch.labels.flatten().to(device)).backward()
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    sums[name] += weight.grad.float().square().cpu()
    model.zero_grad(set_to_none=True)
    return {name: total / len(texts) for name, total in sums.items()}
