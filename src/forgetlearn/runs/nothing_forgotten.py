"""Say why an update whose method forgets has forgotten nothing, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages
from forgetlearn.facts import Fact
from forgetlearn.storage.records import Asked, NothingForgotten, Row


def why_nothing(config: RunConfig, facts: Sequence[Fact], replies: Iterable[Row]) -> NothingForgotten:
    """Return the reason why no old answer of these facts is forgotten.

    `replies` are rows of the protocol `generate`, with what the model says instead.
    """
    stages = Stages(config)
    with_old = [fact for fact in facts if fact.ground_truth]
    example = None
    if stages.forget is None:
        why, remedy = "forget.coef is 0", "Give another coefficient to forget."
    elif not with_old:
        why, remedy = "no fact has an old answer", "Pass --old-from model to forget what the model says itself."
    else:
        example = _example(with_old, replies)
        why = f"the model gives none of the {len(with_old)} old answers"
        if stages.teach:
            remedy = "Teach them for longer (--teach-old)."
        elif "model" not in config.facts.old_from:
            remedy = "Pass --old-from model to forget what the model says instead."
        else:
            remedy = f"Choose {stages.method.plain}, which only learns."
    return NothingForgotten(asked_method=config.method, why=why, remedy=remedy, example=example)


def _example(facts: Iterable[Fact], replies: Iterable[Row]) -> Asked | None:
    """Return what the model says instead of an old answer; of several, prefer a fact whose question it answers."""
    said = {row.fact: row.said for row in replies if row.said is not None}
    asked = [fact for fact in facts if fact.id in said]
    fact = next((fact for fact in asked if said[fact.id]), asked[0] if asked else None)
    return Asked(prompt=fact.prompt, old=str(fact.ground_truth), said=said[fact.id]) if fact else None
