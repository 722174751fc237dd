"""Run a comparison with one call, and write the report of a run or a comparison again."""

from __future__ import annotations

from pathlib import Path

from forgetlearn.comparison.cells import CompareSettings
from forgetlearn.comparison.grid import fill
from forgetlearn.comparison.table import write_table
from forgetlearn.facts import GivenFacts
from forgetlearn.report import paper_page, paper_table, stream_page
from forgetlearn.report.paper_table import PaperReport
from forgetlearn.report.run_page import write_run
from forgetlearn.report.table import Table
from forgetlearn.runs.checks import GivenConfig, GivenModel
from forgetlearn.storage.records import Stream
from forgetlearn.storage.run_folder import STREAM, RunFolder


def compare(
    model: GivenModel = None,
    facts: GivenFacts = None,
    settings: CompareSettings | None = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 1,
) -> Table:
    """Compare methods, coefficients, epochs and seeds on one base, and return the table that `compare.json` holds.

    Each cell is a run folder in `output/cells/`. Cells that are already done are kept. `workers` processes share the
    work. With more than one, `model` must be a folder or a hub id, because each process loads its own model.

    Raises:
        ConfigError: a setting is invalid, or is not supported by comparisons.
        RunError: `output` exists and `resume` and `overwrite` are unset, or it was begun with another base, other
            facts or other settings.
    """
    fill(model, facts, settings, config, output=output, resume=resume, overwrite=overwrite, workers=workers)
    return write_table(Path(output))


def write_report(folder: str | Path) -> Path:
    """Write the page of a run, a stream, a comparison or a reproduction again from its folder, and return it.

    Raises:
        RunError: the folder holds none of them, or the run, a cell or the reproduction is not finished.
    """
    folder = Path(folder)
    manifest = RunFolder.open(folder).manifest
    if "paper" in manifest.config:
        paper_page.write_page(folder, PaperReport.load(folder / paper_table.FILE), manifest)
        return folder / paper_page.PAGE
    if "compare" in manifest.config:
        write_table(folder)
    elif "batches" in manifest.config:
        stream_page.write_page(folder, Stream.load(folder / STREAM), manifest)
    else:
        write_run(folder)
    return folder / "report.html"
