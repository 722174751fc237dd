"""Write the scores of a run to its folder: rows, summary, the facts that were used, the resolved config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import AUTO, RunConfig
from forgetlearn.evaluation import probe_scoring, scoring
from forgetlearn.facts import Fact, FactSet, documents, only_old, write_facts
from forgetlearn.report import run_page
from forgetlearn.storage import disk, records
from forgetlearn.storage.records import ProbeRow, Row, Summary, save_rows
from forgetlearn.storage.run_folder import FAILED, INPUTS, LESSONS, PROBES, RIGHT, ROWS, SUMMARY


@dataclass(frozen=True)
class Outcome:
    """The results of an update other than its scores. A result is None if it does not apply."""

    known: int | None = None  # facts whose old answer the base gave
    forgotten: int | None = None
    product: str | None = None
    choice: records.Choice | None = None
    nothing_forgotten: records.NothingForgotten | None = None
    rounding: records.Rounding | None = None  # how much of the change survived half precision
    taught: Sequence[records.Taught] = ()  # what each stage trained on
    lessons: Mapping[str, records.StageLessons] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    learning: records.Learning | None = None
    since_first: bool = False  # see `records.Summary`
    forgetting: records.Forgetting | None = None  # set if the run only forgets


def write_results(
    path: Path,
    config: RunConfig,
    facts: FactSet,
    rows: Mapping[str, list[Row]],
    outcome: Outcome | None = None,
    general: Mapping[str, Any] | None = None,
    probed: Mapping[str, list[ProbeRow]] | None = None,
) -> tuple[Summary, list[Row]]:
    """Write everything that a report is made from to `path`; return the summary and the rows that were written.

    Without `outcome`, the run only scores. `general` is the general ability by phase, `probed` are answers to probes by
    phase. Facts that the coefficient was chosen on get rows, marked `split: validation`, but do not count in the means.
    """
    aside = frozenset(outcome.choice.validation if outcome and outcome.choice else ())
    written = [_public(row, aside, facts) for own in rows.values() for row in own]
    save_rows(written, path / ROWS)
    if outcome and outcome.taught:
        save_rows(outcome.taught, path / LESSONS)
    forgot = bool(outcome and outcome.forgetting)
    with disk.naming(path / INPUTS):
        write_inputs = _write_forgotten if forgot else write_facts
        write_inputs(facts, path / INPUTS)
        if outcome:
            failed = {fact.id: fact for fact in _failed(facts, rows[list(rows)[-1]], only_old=forgot)}
            write = documents.write_documents if facts.reader == documents.READER else write_inputs  # to be read again
            write(failed.values(), path / FAILED)
            write((fact for fact in facts if fact.id not in failed), path / RIGHT)
    scored = {phase: [row for row in own if row.fact not in aside] for phase, own in rows.items()}
    summary = _summary(config, facts, scored, outcome, len(aside), general or {})
    if probed and any(probed.values()):
        save_rows([row for own in probed.values() for row in own], path / PROBES)
        summary = summary.model_copy(update={"probes": _summed(probed, aside, facts.used - len(aside))})
    summary.save(path / SUMMARY)
    disk.write_text(path / "config.yaml", run_page.as_yaml(config.model_dump(mode="json")))
    return summary, written


def _write_forgotten(facts: Iterable[Fact], path: Path) -> None:
    """Write facts that were only forgotten; an only answer is written as the old one, so that it is read as that."""
    write_facts((fact if fact.old_answers else replace(only_old(fact), probes=fact.probes) for fact in facts), path)


def _summed(probed: Mapping[str, list[ProbeRow]], aside: frozenset[str], n: int) -> dict[str, list[records.ProbeScore]]:
    """Return the scores of probes by phase, over the `n` facts that are not set aside."""
    return {
        phase: probe_scoring.summarise([row for row in own if row.fact not in aside], n)
        for phase, own in probed.items()
    }


def _failed(facts: FactSet, rows: list[Row], *, only_old: bool) -> Iterator[Fact]:
    """Yield the facts that are not right at the end: the new answer is not given, or an old one still is.

    With `only_old` there is no new answer, so a fact is right if no prompt gets the old one.
    """
    judge = run_page.judged_by(rows)
    own = {row.fact: row for row in rows if row.protocol == judge}
    for fact in facts:
        row = own.get(fact.id)
        if row is None or row.residue or (row.residue is None if only_old else run_page.state_of(row) != "new"):
            yield fact


def _public(row: Row, aside: frozenset[str], facts: FactSet) -> Row:
    """Return a row without its token ids, which only resume needs. Mark the row if its fact was set aside."""
    fields = {name: getattr(row, name) for name in row.model_fields_set if name != "predicted"}
    if row.fact in aside:
        fields["split"] = "validation"
    return Row(**fields, old_from=facts.old_sources.get(row.fact))


def _summary(
    config: RunConfig,
    facts: FactSet,
    scored: Mapping[str, list[Row]],
    outcome: Outcome | None,
    n_aside: int,
    general: Mapping[str, records.General],
) -> Summary:
    did = outcome or Outcome()
    counts = records.FactCounts(
        source=facts.source,
        reader=facts.reader,
        old_from=",".join(facts.old_from),
        old_answers=facts.old_counts,
        without_old=dict(facts.without_old),
        read=facts.read,
        used=facts.used,
        set_aside=n_aside,
        scored=facts.used - n_aside,
        left_out=dict(facts.left_out),
        left_out_probes=dict(facts.left_out_probes),
        known=did.known,
        forgotten=did.forgotten,
        not_read=list(facts.ignored_fields),
    )
    method, name = METHODS[config.method], config.method
    if did.nothing_forgotten:
        name = method.plain
    has_coef = outcome is not None and method.forgets and not did.nothing_forgotten
    summary = Summary(
        method="scores" if outcome is None else name,
        coef=_coef(config, did.choice) if has_coef else None,
        nothing_forgotten=did.nothing_forgotten,
        choice=did.choice,
        seed=config.seed,
        facts=counts,
        phases={phase: scoring.summarise(own) for phase, own in scored.items()},
        product=did.product,
        rounding=did.rounding,
    )
    found = {
        "general": dict(general),
        "lessons": dict(did.lessons),
        "kept": dict(did.kept),
        "rephrasings_trained": bool(outcome and config.learn.rephrasings),
        "learning": did.learning,
        "since_first": did.since_first,
        "forgetting": did.forgetting,
    }
    return summary.model_copy(update={name: value for name, value in found.items() if value})


def _coef(config: RunConfig, choice: records.Choice | None) -> float:
    """Return the coefficient that was used."""
    return choice.coef if choice and config.forget.coef == AUTO else config.forget.number


def learning_of(facts: Sequence[Fact], epochs: int | None, unlearned: Iterable[int]) -> records.Learning | None:
    """Return how far a learning stage came, given the places of what it did not learn: these facts come first in it."""
    if epochs is None:
        return None
    missed = (facts[place] for place in unlearned if place < len(facts))
    return records.Learning(epochs=epochs, unlearned={fact.id: fact.prompt for fact in missed})
