"""Scores of a run to its folder: rows, summary, the facts that were used, the resolved config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import AUTO, RunConfig
from forgetlearn.evaluation import scoring
from forgetlearn.evaluation.scoring import Row
from forgetlearn.facts import FactSet, write_facts
from forgetlearn.report import run_page
from forgetlearn.runs.coefficient import Choice
from forgetlearn.storage import disk


@dataclass(frozen=True)
class Done:
    """What an update did besides scoring; a count is None where it was not asked for."""

    known: int | None = None  # facts whose old answer the base gave
    forgotten: int | None = None
    product: str | None = None
    choice: Choice | None = None
    rounding: Mapping[str, Any] | None = None  # what storing the product in half precision left


def write_results(
    path: Path,
    config: RunConfig,
    facts: FactSet,
    rows: Mapping[str, list[Row]],
    done: Done | None = None,
    general: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary, after everything that a report is made from has been written to `path`; without `done`, of scores.

    `general` is what was measured of general ability, by phase. Facts that the coefficient was chosen on have rows,
    marked `split: validation`, but no part in the means.
    """
    aside = frozenset(done.choice.validation if done and done.choice else ())
    told = [
        {**_public(row, aside), "old_from": facts.old_sources.get(row["fact"])} for own in rows.values() for row in own
    ]
    disk.write_rows(path / "facts.jsonl", told)
    with disk.naming(path / "inputs.jsonl"):
        write_facts(facts, path / "inputs.jsonl")
    scored = {phase: [row for row in own if row["fact"] not in aside] for phase, own in rows.items()}
    summary = _summary(config, facts, scored, done, n_aside=len(aside)) | (
        {"general": dict(general)} if general else {}
    )
    disk.write_json(path / "summary.json", summary)
    disk.write_text(path / "config.yaml", run_page.as_yaml(config.model_dump(mode="json")))
    return summary


def _public(row: Row, aside: frozenset[str]) -> Row:
    """A row without the token ids that only resume needs, marked where its fact was set aside."""
    public = {name: value for name, value in row.items() if name != "predicted"}
    return public | {"split": "validation"} if row["fact"] in aside else public


def _summary(
    config: RunConfig, facts: FactSet, scored: Mapping[str, list[Row]], done: Done | None, n_aside: int
) -> dict[str, Any]:
    """What summary.json holds; a run that only scores has no method, coefficient or product."""
    did = done or Done()
    return {
        "method": config.method if done else "scores",
        "coef": _coef(config, did.choice) if done and METHODS[config.method].forgets else None,
        "choice": did.choice.as_dict() if did.choice else None,
        "seed": config.seed,
        "facts": {
            "source": facts.source,
            "reader": facts.reader,
            "old_from": ",".join(facts.old_from),
            "old_answers": facts.old_counts,
            "without_old": dict(facts.without_old),
            "read": facts.read,
            "used": facts.used,
            "set_aside": n_aside,
            "scored": facts.used - n_aside,
            "left_out": dict(facts.left_out),
            "left_out_probes": dict(facts.left_out_probes),
            "known": did.known,
            "forgotten": did.forgotten,
            "not_read": list(facts.ignored_fields),
        },
        "phases": {phase: scoring.summarise(own) for phase, own in scored.items()},
        "product": did.product,
        "rounding": did.rounding,
    }


def _coef(config: RunConfig, choice: Choice | None) -> float:
    """The coefficient that was used: 0 where one was to be chosen and there was nothing to forget."""
    if config.forget.coef != AUTO:
        return config.forget.number
    return choice.coef if choice else 0.0
