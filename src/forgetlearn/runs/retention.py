"""Score whether a model's earlier updates still hold, by asking their facts again.

A fact is superseded if a later update has the same prompt. Superseded facts are counted, but not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import FactError, RunError, some
from forgetlearn.evaluation.scoring import score, summarise
from forgetlearn.facts import Fact, FactSet
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.products.chain import Base, chain_of, find_facts, read_first, runs_before
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

    def as_input(self) -> list[object]:
        """Return what identifies these facts in a run's inputs."""
        return [self.number, [fact.id for fact in self.facts]]


@dataclass(frozen=True)
class Past:
    """What came before an update: earlier updates with their facts, and where the model before them all was measured.

    `origin` is a folder that `general_ability.measure` wrote; damage is then measured from that model, not the base.
    `adapter` names the base's adapter if it is all that the earlier updates left, and their facts are known.
    """

    earlier: Sequence[Earlier] = ()
    origin: Path | None = None
    adapter: str | None = None


NO_PAST = Past()


@dataclass(frozen=True)
class Retained:
    """Scores of the earlier updates: over all their facts (by protocol), for each update, and in rows."""

    overall: dict[str, Mean]
    updates: list[records.Retained]
    rows: list[RetentionRow]


def earlier_updates(model: str | Path, now: FactSet, places: Sequence[str | Path] = ()) -> list[Earlier]:
    """Return the updates before a model's last one, with their facts.

    The facts are looked for in `places` (run folders or files of facts), then in the run folders that made the model,
    and are recognised by their hash. `now`, the facts being scored, stands in for the last update's facts if those are
    not found: a prompt that it repeats counts as updated again.

    Raises:
        RunError: there is no earlier update.
        FactError: the facts of an earlier update are not found.
    """
    chain = chain_of(model)
    if len(chain) < 2:
        made = "one update" if chain else "no recorded update"
        raise RunError(f"{model}: {made} made it, so there is no earlier update to check. Omit --retention.")
    looked = [*map(Path, places), *runs_before(Path(model))]
    sets, missing = _facts_of(chain[:-1], looked)
    if missing:
        raise FactError(
            f"{_named(missing[0], chain)} are in none of: {', '.join(map(str, looked)) or 'no folder is known'}.\n"
            "A run keeps them in inputs.jsonl: pass --earlier with that run's folder, that file, or the file of facts."
        )
    last = find_facts(chain[-1], looked)
    if last is None and now.sha256() != chain[-1].facts.sha256:
        log.warning(
            "the %d facts of the last update (%s) were not found; the %d facts that are scored now stand in for them: "
            "earlier facts with one of their prompts count as changed again. --earlier names the right ones",
            *(chain[-1].facts.used, chain[-1].facts.source, now.used),
        )
    return _still_to_hold(chain, sets, last or now)


def past_of(base: Base, now: FactSet, places: Sequence[str | Path] = (), origin: Path | None = None) -> Past:
    """Return the updates that made the base of an update, with those of their facts that `now` does not change.

    Facts are found as in `earlier_updates`. Updates whose facts are not found are left out, with a warning.
    """
    chain = base.chain()
    looked = [*map(Path, places), *runs_before(Path(base.adapter or str(base.name)))]
    sets, missing = _facts_of(chain, looked)
    if missing:
        log.warning(
            "the facts of %d of the %d updates that made this model are not found, so they are neither kept nor asked "
            "again. %s are in none of: %s. Pass --earlier with each run's folder, its inputs.jsonl, or the file of "
            "facts",
            *(len(missing), len(chain), _named(missing[0], chain), some(looked) or "no folder is known"),
        )
    all_learned = bool(chain) and not missing and not any(update.only_forgot for update in chain)
    is_theirs = bool(base.adapter) and all_learned and chain[0].adapter_sha256 is None
    return Past(_still_to_hold(chain, sets, now), origin, lora.EARLIER if is_theirs else None)


def _facts_of(chain: Sequence[Update], looked: Sequence[Path]) -> tuple[dict[int, FactSet], list[int]]:
    """Return the facts of updates by their number (from 1), and the numbers of those that are not found."""
    read = cache(read_first)  # each place is looked into for many updates
    found = {number: find_facts(update, looked, read) for number, update in enumerate(chain, 1)}
    sets = {number: facts for number, facts in found.items() if facts is not None}
    return sets, [number for number in found if number not in sets]


def _named(number: int, chain: Sequence[Update]) -> str:
    update = chain[number - 1]
    return f"The {update.facts.used} facts of update {number} ({update.when}, {update.facts.source})"


def _still_to_hold(chain: Sequence[Update], sets: Mapping[int, FactSet], now: FactSet) -> list[Earlier]:
    """Return the updates in order, with those of their facts whose prompt no later update has, nor `now`."""
    later = {fact.prompt for fact in now}
    found: list[Earlier] = []
    for number in sorted(sets, reverse=True):
        facts = sets[number]
        if chain[number - 1].only_forgot:
            log.info("update %d only forgot: it has no new answers that could be retained", number)
            later |= {fact.prompt for fact in facts}
            continue
        kept = tuple(fact for fact in facts if fact.prompt not in later)
        found.insert(0, Earlier(number, chain[number - 1], kept, facts.used - len(kept)))
        later |= {fact.prompt for fact in facts}
    return found


def ask(lm: LanguageModel, earlier: Sequence[Earlier], settings: EvaluateSettings) -> list[Row]:
    """Return a row per fact of earlier updates and protocol: whether the model still gives its new answer."""
    facts = [replace(fact, rephrase_prompts=(), locality=()) for one in earlier for fact in one.facts]
    return score(lm, facts, phase="retention", settings=settings) if facts else []


def retained(earlier: Sequence[Earlier], rows: Sequence[Row]) -> Retained:
    """Return the scores that `ask` found, over all facts and for each update."""
    by_fact: dict[str, list[Row]] = {}
    for row in rows:
        by_fact.setdefault(row.fact, []).append(row)
    updates, listed = [], []
    for one in earlier:
        own = [row for fact in one.facts for row in by_fact[fact.id]]
        listed += [_row(one.number, row) for row in own if row.has("reliability")]
        updates.append(
            records.Retained(
                update=one.number,
                when=one.update.when,
                source=one.update.facts.source,
                facts=len(one.facts),
                superseded=one.superseded,
                scores=summarise(own).get("reliability", {}),
            )
        )
    return Retained(summarise(rows).get("reliability", {}), updates, listed)


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
