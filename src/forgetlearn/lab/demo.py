"""The demo: every method of the paper on a made-up world, and an update of a chat model with facts that went stale."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS, PAPER_METHODS
from forgetlearn.config.schema import load_config
from forgetlearn.errors import RunError
from forgetlearn.lab.build import LabSettings, build_lab, world_facts
from forgetlearn.report.render import Column, show_score
from forgetlearn.storage import disk
from forgetlearn.storage.records import Input, Mean, load_rows
from forgetlearn.storage.run_folder import INPUTS

if TYPE_CHECKING:
    from forgetlearn.runs.update import UpdateResult

log = logging.getLogger("forgetlearn")
CHAT = "chat"  # the run folder of the chat model
COEF = 1.0  # on lab bases, forgetting is clearer than with the default (docs/experiments.md)


@dataclass(frozen=True)
class DemoResult:
    """The folder of the demo, its table, and the update of a chat model, if one was given."""

    output: Path
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, list[Mean | None]], ...]  # name of the row, a cell for each column
    table: str
    chat: UpdateResult | None = None


def run_demo(
    output: str | Path,
    *,
    methods: Iterable[str] = PAPER_METHODS,
    n_facts: int = 150,
    seed: int = 0,
    chat_model: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> DemoResult:
    """Build a base that holds a made-up world, update it with each method, and compare.

    Then update `chat_model`, if one is given, with a dozen facts that went stale, by the default recipe.

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
        # A lab model has never seen another form of question, and five updates of it would each ask them.
        changes = {"method": method, "seed": seed, "model.name": str(base), "evaluate.probes": "none"}
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
    chat = None
    if chat_model is not None:
        log.info("updating %s with facts that went stale", chat_model)
        with resources.as_file(resources.files("forgetlearn.lab") / "stale_facts.jsonl") as stale:
            config = load_config(None, {"seed": seed})
            chat = update(chat_model, stale, config, output=output / CHAT, resume=resume, overwrite=overwrite)
    return DemoResult(output, columns, tuple(rows), table, chat)


def conversation(chat: UpdateResult) -> Iterator[tuple[str, str, str]]:
    """Yield each question that an update changed, and what the model said to it before and after."""
    said = {(row.fact, row.phase): row.said or "" for row in chat.rows if row.protocol == "generate"}
    for fact in load_rows(Input, chat.output / INPUTS):
        yield fact.prompt, said.get((fact.id, "base"), ""), said.get((fact.id, "updated"), "")


def comparison_table(columns: Sequence[Column], rows: Iterable[tuple[str, Sequence[Mean | None]]]) -> str:
    """Return a Markdown table: a line per method, a column per quantity with its protocol, in percent."""
    head = " | ".join(f"{quantity} ({protocol})" for quantity, protocol in columns)
    lines = [f"| | {head} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(map(show_score, cells))} |" for name, cells in rows]
    return "\n".join(lines) + "\n"
