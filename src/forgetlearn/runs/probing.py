"""Ask a model about facts beyond their own wordings, as `evaluate.probes` says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from forgetlearn.config.schema import RunConfig
from forgetlearn.evaluation import probe_scoring, probes
from forgetlearn.facts import Fact
from forgetlearn.method import own_words
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.storage.records import ProbeRow, Row

log = logging.getLogger("forgetlearn")


def state(lm: LanguageModel, facts: Sequence[Fact], config: RunConfig, replies: Iterable[Row]) -> dict[str, str]:
    """Return unfinished sentences that the new answers complete, by fact, as the model states these facts.

    `replies` are its free answers to the facts' prompts. Empty unless the probe `completion` needs such sentences.
    """
    asked = probes.to_state(facts, config.evaluate)
    if not asked:
        return {}
    log.info("asking the model to state %d facts, for the probe %s", len(asked), probes.COMPLETION)
    said = {row.fact: row.said or "" for row in replies}
    made = own_words.new_sentences(lm, asked, said, config.evaluate)
    found = {fact.id: probes.statement(fact, made[fact.id].text or "") for fact in asked}
    return {fact: text for fact, text in found.items() if text}


def ask(
    lm: LanguageModel, facts: Sequence[Fact], config: RunConfig, rows: Sequence[Row], stated: Mapping[str, str]
) -> list[ProbeRow]:
    """Return the model's answers to all probes. `rows` are its scores in this phase, `stated` what `state` returned."""
    evaluate, phase = config.evaluate, rows[0].phase
    asked = probes.questions(facts, lm.encoder, evaluate, config.seed, stated)
    known = probe_scoring.of_rephrasings(facts, rows, evaluate)
    if asked:
        name = "model" if phase == "model" else f"{phase} model"
        log.info("asking the %s %d questions beyond rephrasings", name, len(asked))
    return [*known, *probe_scoring.score(lm, asked, evaluate, phase)]
