"""Scores of a run to its folder: rows, summary, the facts that were used, the resolved config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetlearn import report, runs, scoring
from forgetlearn.config import RunConfig
from forgetlearn.facts import FactSet, write_facts
from forgetlearn.method import METHODS
from forgetlearn.scoring import Row


def write_results(
    path: Path,
    config: RunConfig,
    facts: FactSet,
    rows: Mapping[str, list[Row]],
    *,
    known: int | None = None,
    forgotten: int | None = None,
    product: str | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """The summary, after everything that a report is made from has been written to `path`."""
    runs.write_rows(path / "facts.jsonl", [_public(row) for phase in rows.values() for row in phase])
    with runs.naming(path / "inputs.jsonl"):
        write_facts(facts, path / "inputs.jsonl")
    summary = _summary(config, facts, rows, known=known, forgotten=forgotten, product=product, method=method)
    runs.write_json(path / "summary.json", summary)
    runs.write_text(path / "config.yaml", report.as_yaml(config.model_dump(mode="json")))
    return summary


def _public(row: Row) -> Row:
    """A row without the token ids that only resume needs."""
    return {name: value for name, value in row.items() if name != "predicted"}


def _summary(
    config: RunConfig,
    facts: FactSet,
    rows: Mapping[str, list[Row]],
    *,
    known: int | None,
    forgotten: int | None,
    product: str | None,
    method: str | None,
) -> dict[str, Any]:
    """What summary.json holds; a run that only scores has no method, coefficient or product."""
    forgets = method is not None and METHODS[method].forgets
    return {
        "method": method or "scores",
        "coef": config.forget.coef if forgets else None,
        "seed": config.seed,
        "facts": {
            "source": facts.source,
            "reader": facts.reader,
            "old_from": facts.old_from,
            "read": facts.read,
            "used": facts.used,
            "left_out": dict(facts.left_out),
            "left_out_probes": dict(facts.left_out_probes),
            "known": known,
            "forgotten": forgotten,
            "not_read": list(facts.ignored_fields),
        },
        "phases": {phase: scoring.summarise(phase_rows) for phase, phase_rows in rows.items()},
        "product": product,
    }
