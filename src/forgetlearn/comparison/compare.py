"""A comparison as one call: fill its cells, then write its table. Reports of runs and comparisons, written again."""

from __future__ import annotations

from pathlib import Path

from forgetlearn.comparison.cells import CompareSettings
from forgetlearn.comparison.grid import fill
from forgetlearn.comparison.table import write_table
from forgetlearn.facts import GivenFacts
from forgetlearn.report.run_page import write_run
from forgetlearn.report.table import Table
from forgetlearn.runs.checks import GivenConfig, GivenModel
from forgetlearn.storage.run_folder import RunFolder


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
    """Compare methods, coefficients, epochs and seeds on one base, and return the table, as `compare.json` has it.

    Each cell is a run folder in `output/cells/`; cells that are done already are not done again. `workers` processes
    share the work (the model must then be named, since each loads its own).

    Raises:
        ConfigError: a setting is wrong, or one that a comparison does not use.
        RunError: the folder was begun with other facts, another base or other settings.
    """
    fill(model, facts, settings, config, output=output, resume=resume, overwrite=overwrite, workers=workers)
    return write_table(Path(output))


def write_report(folder: str | Path) -> None:
    """Write the pages of a run or a comparison again from its folder, without the model.

    Raises:
        RunError: the folder holds neither, or a cell of the comparison is not done.
    """
    folder = Path(folder)
    if "compare" in RunFolder.open(folder).manifest.config:
        write_table(folder)
    else:
        write_run(folder)
