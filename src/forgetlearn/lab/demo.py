"""The demo: every method of the paper on a made-up world, in one table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS, PAPER_METHODS
from forgetlearn.config.schema import load_config
from forgetlearn.errors import RunError
from forgetlearn.lab.build import LabSettings, build_lab, world_facts
from forgetlearn.report.render import Column, show_score
from forgetlearn.storage import disk
from forgetlearn.storage.records import Mean

log = logging.getLogger("forgetlearn")
COEF = 1.0  # on lab bases, forgetting is clearer than with the default (docs/experiments.md)


@dataclass(frozen=True)
class DemoResult:
    """The folder of the demo, and its table."""

    output: Path
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, list[Mean | None]], ...]  # name of the row, a cell for each column
    table: str


def run_demo(
    output: str | Path,
    *,
    methods: Iterable[str] = PAPER_METHODS,
    n_facts: int = 150,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> DemoResult:
    """Build a base that holds a made-up world, update it with each method, and compare.

    Raises:
        ConfigError: the world cannot have this number of facts.
        RunError: the output exists and neither `resume` nor `overwrite` is given.
    """
    from forgetlearn.report.run_page import overview
    from forgetlearn.runs.update import update

    settings = validate(LabSettings, {"n_facts": n_facts, "seed": seed})
    facts = world_facts(settings)
    output = Path(output)
    marker = output / "demo.json"
    if output.exists() and any(output.iterdir()):
        if not (resume or overwrite):
            raise RunError(f"{output} exists. Pass --resume to continue it, or --overwrite to replace it.")
        if not marker.is_file():
            raise RunError(f"{output} was not created by `forgetlearn demo`. Choose another folder.")
    with disk.naming(output):
        output.mkdir(parents=True, exist_ok=True)
    disk.write_json(marker, {"n_facts": n_facts, "seed": seed})
    base = build_lab(facts, settings)
    columns: tuple[Column, ...] = ()
    rows: list[tuple[str, list[Mean | None]]] = []
    for method in methods:
        log.info("updating with %s", method)
        changes = {"method": method, "seed": seed, "model.name": str(base)}
        if METHODS[method].forgets:
            changes["forget.coef"] = COEF
        config = load_config(base / "update.yaml", changes)
        result = update(base, base / "facts.jsonl", config, output=output / method, resume=resume, overwrite=overwrite)
        shown = overview(result.summary)
        columns, cells = shown.columns, dict(shown.table)
        rows = rows or [("original", cells["base"])]
        rows.append((method, cells["updated"]))
    table = comparison_table(columns, rows)
    disk.write_text(output / "demo.md", table)
    return DemoResult(output, columns, tuple(rows), table)


def comparison_table(columns: Sequence[Column], rows: Iterable[tuple[str, Sequence[Mean | None]]]) -> str:
    """Return a Markdown table: a line per method, a column per quantity with its protocol, in percent."""
    head = " | ".join(f"{quantity} ({protocol})" for quantity, protocol in columns)
    lines = [f"| | {head} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(map(show_score, cells))} |" for name, cells in rows]
    return "\n".join(lines) + "\n"
