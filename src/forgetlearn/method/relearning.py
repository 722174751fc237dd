"""Train a forgotten model again on half of the facts, and count the steps until it says them: how deep they are gone.

The other half shows whether the facts were removed, or only hidden: it comes back too if they were hidden.
Source: Lynch et al. 2024, arXiv:2402.16835; Hu et al. 2024, arXiv:2406.13356.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from torch import nn

from forgetlearn.config.methods import KindName
from forgetlearn.config.schema import EvaluateSettings, ForgetSettings
from forgetlearn.evaluation import scoring
from forgetlearn.facts import Fact
from forgetlearn.method.kinds import STAGE_KINDS, Lessons
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel, width
from forgetlearn.storage.records import BACK, Relearning
from forgetlearn.training.finetune import finetune

log = logging.getLogger("forgetlearn")
HOW: KindName = "lora"
MOST_ASKED = 50  # facts of each half


def halves(facts: Sequence[Fact], seed: int) -> tuple[list[Fact], list[Fact]]:
    """Divide facts into the half that is trained on and the other half, at random."""
    shuffled = Random(seed).sample(list(facts), len(facts))
    middle = (len(facts) + 1) // 2
    return shuffled[:middle], shuffled[middle:]


def relearn(
    lm: LanguageModel,
    same: Sequence[Fact],
    other: Sequence[Fact],
    lessons: Lessons,
    settings: ForgetSettings,
    evaluate: EvaluateSettings,
    *,
    model: str,
    seed: int,
) -> Relearning:
    """Return how many of the old answers come back after 1, 2, 4, ... steps on `same`; `lessons` are its texts.

    Each number of steps starts from the model as it is, with a new adapter, which is removed again: the model is
    unchanged. The rate is that of `settings` for an adapter, constant from the first step.
    """
    asked = [*same[:MOST_ASKED], *other[:MOST_ASKED]]
    n_same = len(same[:MOST_ASKED])
    n_other = len(asked) - n_same
    steps: list[int] = []
    of_same: list[float] = []
    of_other: list[float] = []
    for step in (0, *_doubling(settings.unlearn.relearn_steps)):
        said = _asked_after(step, lm, asked, lessons, settings, evaluate, seed)
        steps.append(step)
        of_same.append(_percent(said[:n_same]))
        of_other.append(_percent(said[n_same:]))
        if of_same[-1] >= BACK and (of_other[-1] >= BACK or not n_other):
            break
    found = Relearning(
        model=model,
        trained=len(same),
        steps=steps,
        same=of_same,
        other=of_other,
        n_same=n_same,
        n_other=n_other,
    )
    log.info(
        "relearning (%s): the half that is trained on is back %s, the other half %s",
        *(model, found.when_back("same"), found.when_back("other") if n_other else "was not asked"),
    )
    return found


def _percent(said: Sequence[bool]) -> float:
    return 100 * sum(said) / len(said) if said else 0.0


def _doubling(most: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... and at last the most."""
    step = 1
    while step < most:
        yield step
        step *= 2
    if most:
        yield most


def _asked_after(
    steps: int,
    lm: LanguageModel,
    asked: Sequence[Fact],
    lessons: Lessons,
    settings: ForgetSettings,
    evaluate: EvaluateSettings,
    seed: int,
) -> list[bool]:
    """Return for each fact whether the model says its old answer after so many steps."""
    before, adapters = lm.model, lora.names(lm.model) if hasattr(lm.model, "peft_config") else []
    trained = [(name, weight.requires_grad) for name, weight in before.named_parameters()]
    try:
        if steps:
            _train(steps, lm, lessons, settings, seed)
        known = {fact.id for fact in scoring.known_facts(asked, scoring.ask(lm, asked, evaluate))}
    finally:
        if steps:
            lm.model = _without_adapter(lm.model, adapters)
            states = dict(trained)
            for name, weight in lm.model.named_parameters():
                weight.requires_grad_(states[name])
    return [fact.id in known for fact in asked]


def _train(steps: int, lm: LanguageModel, lessons: Lessons, settings: ForgetSettings, seed: int) -> None:
    """Attach an adapter "relearn" and train it for so many steps."""
    kind = STAGE_KINDS[HOW]
    constant = {"lr_scheduler_type": "constant", "until": "epochs", "epochs": steps, "weight_decay": 0.0}
    own, variant = kind.training(settings.model_copy(update=constant), width(lm.model))
    lm.model = kind.prepare(lm.model, own, "relearn", seed)
    texts = [tuple(lesson.encoded(lm.encoder) for lesson in each) for each in lessons.of_facts]
    variant = replace(variant, most_steps=steps)
    finetune(lm.model, texts, own, seed=seed, pad_id=lm.pad_id, device=lm.device, variant=variant)


def _without_adapter(model: nn.Module, others: Sequence[str]) -> nn.Module:
    """Return the model without the adapter "relearn"; the other adapters are active as before."""
    if not others:
        return lora.detach(model)
    model.delete_adapter("relearn")  # type: ignore[operator]
    lora.activate(model, others)
    return model
