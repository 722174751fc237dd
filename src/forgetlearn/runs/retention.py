"""Score whether a model's earlier updates still hold, by asking their facts again.

A fact is superseded if a later update has the same prompt. Superseded facts are counted, but not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import FactError, RunError
from forgetlearn.evaluation.scoring import score, summarise
from forgetlearn.facts import Fact, FactSet
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.products.chain import chain_of, find_facts, runs_before
from forgetlearn.storage import records
from forgetlearn.storage.records import Mean, RetentionRow, Row, Summary, Update, save_rows
from forgetlearn.storage.run_folder import SUMMARY

log = logging.getLogger("forgetlearn")

ROWS = "retention.jsonl"


@dataclass(frozen=True)
class Earlier:
    """An update before the last one, its number (from 1), and those of its facts that should still hold."""

    number: int
    update: Update
    facts: tuple[Fact, ...]
    superseded: int


@dataclass(frozen=True)
class Retained:
    """Scores of the earlier updates: over all their facts (by protocol), for each update, and in rows."""

    overall: dict[str, Mean]
    updates: list[records.Retained]
    rows: list[RetentionRow]


def earlier_updates(model: str | Path, now: FactSet, places: Sequence[str | Path] = ()) -> list[Earlier]:
    """Return the updates before a model's last one, with their facts.

    The facts are looked for in `places` (run folders or files of facts), then in the run folders that made the model,
    and are recognised by their hash. `now`, the facts being scored, stands in for
    the last update's facts if those are not found: a prompt that it repeats counts as updated again.

    Raises:
        RunError: there is no earlier update.
        FactError: the facts of an earlier update are not found.
    """
    chain = chain_of(model)
    if len(chain) < 2:
        made = "one update" if chain else "no update that it tells of"
        raise RunError(f"{model}: {made} made it, so there is no earlier update to check. Omit --retention.")
    looked = [*map(Path, places), *runs_before(Path(model))]
    sets = [_facts_of(number, update, looked) for number, update in enumerate(chain[:-1], 1)]
    last = find_facts(chain[-1], looked)
    if last is None and now.sha256() != chain[-1].facts.sha256:
        log.warning(
            "the %d facts of the last update (%s) were not found; the %d facts that are scored now stand in for them: "
            "earlier facts with one of their prompts count as changed again. --earlier names the right ones",
            *(chain[-1].facts.used, chain[-1].facts.source, now.used),
        )
    later = {fact.prompt for fact in last or now}
    found: list[Earlier] = []
    for number in range(len(sets), 0, -1):
        facts = sets[number - 1]
        if chain[number - 1].only_forgot:
            log.info("update %d only forgot: it has no new answers that could be retained", number)
            later |= {fact.prompt for fact in facts}
            continue
        kept = tuple(fact for fact in facts if fact.prompt not in later)
        found.insert(0, Earlier(number, chain[number - 1], kept, facts.used - len(kept)))
        later |= {fact.prompt for fact in facts}
    return found


def _facts_of(number: int, update: Update, looked: Sequence[Path]) -> FactSet:
    facts = find_facts(update, looked)
    if facts is None:
        raise FactError(
            f"The {update.facts.used} facts of update {number} ({update.when}, {update.facts.source}) are in none of: "
            f"{', '.join(map(str, looked)) or 'no folder is known'}.\nA run keeps them in inputs.jsonl: pass --earlier "
            "with that run's folder, that file, or the file of facts."
        )
    return facts


def score_earlier(lm: LanguageModel, earlier: Sequence[Earlier], settings: EvaluateSettings) -> Retained:
    """Score whether the model still gives the new answers of earlier updates."""
    every: list[Row] = []
    rows: list[RetentionRow] = []
    updates = []
    for one in earlier:
        asked = [replace(fact, rephrase_prompts=(), locality=()) for fact in one.facts]
        own = score(lm, asked, phase="retention", settings=settings) if asked else []
        every += own
        rows += [_row(one.number, row) for row in own if row.has("reliability")]
        updates.append(
            records.Retained(
                update=one.number,
                when=one.update.when,
                source=one.update.facts.source,
                facts=len(asked),
                superseded=one.superseded,
                scores=summarise(own).get("reliability", {}),
            )
        )
    return Retained(summarise(every).get("reliability", {}), updates, rows)


def _row(number: int, row: Row) -> RetentionRow:
    answer = {name: getattr(row, name) for name in ("said", "truncated") if row.has(name)}
    errors = {"retention": row.errors["reliability"]} if "reliability" in row.errors else {}
    kept = {"update": number, "fact": row.fact, "protocol": row.protocol, **answer}
    return RetentionRow.model_validate(kept | {"retention": row.reliability, "errors": errors})


def write(path: Path, phase: str, found: Retained, summary: Summary) -> Summary:
    """Write the rows, add retention to the summary (for the phase and for each update), and return the summary."""
    phases = summary.phases | {phase: summary.phases[phase] | {"retention": found.overall}}
    summary = summary.model_copy(update={"phases": phases, "retention": found.updates})
    summary.save(path / SUMMARY)
    save_rows(found.rows, path / ROWS)
    return summary
