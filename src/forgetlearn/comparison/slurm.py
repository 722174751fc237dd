"""A comparison on a Slurm cluster: jobs, submitted through submitit, that fill the cells of one shared folder."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetlearn.comparison.cells import Cell, CompareSettings
from forgetlearn.comparison.grid import Comparison, begin, check_named, help_fill
from forgetlearn.errors import ConfigError, RunError, missing_extra
from forgetlearn.facts import FactSet
from forgetlearn.runs.checks import GivenConfig

log = logging.getLogger("forgetlearn")
JOBS = "jobs"
DEFAULTS: Mapping[str, object] = {"name": "forgetlearn", "timeout_min": 240}  # submitit's own limit is 5 minutes
POLL_S = 1.0
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception|Interrupt): ")


@dataclass(frozen=True)
class Job:
    """What a job does. Cells that are done stay done, so a job that is preempted or out of time can be repeated."""

    comparison: Comparison

    def __call__(self) -> None:
        """Fill cells; progress goes to the job's log."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        help_fill(self.comparison)

    def checkpoint(self) -> Any:
        """Return the same job: submitit calls this before it puts a preempted job back into the queue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Jobs:
    """How many jobs to submit, to which cluster, and what each asks for.

    `parameters` are submitit's (`timeout_min`, `mem_gb`, `cpus_per_task`, `gpus_per_node`, ...) or Slurm's
    (`partition`, ...). The cluster `local` runs the same jobs as processes of this machine.
    """

    n: int = 1
    parameters: Mapping[str, object] = field(default_factory=dict)
    cluster: str = "slurm"


def fill_on_cluster(
    jobs: Jobs,
    model: str | Path | None = None,
    facts: FactSet | str | Path | None = None,
    settings: CompareSettings | None = None,
    config: GivenConfig = None,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
) -> list[Cell]:
    """Fill all cells of a comparison by jobs, and return when all are done.

    This process checks the input, submits and waits; if it is stopped, the jobs go on.

    Raises:
        ConfigError: submitit is not installed, this machine has no Slurm, or a parameter is unknown.
        RunError: the jobs ended before all cells were done; or see `grid.fill`.
    """
    check_named(model, "a job")
    with tempfile.TemporaryDirectory(prefix="forgetlearn-") as unused:  # some executors make their folder
        _executor(Path(unused), jobs)
    comparison, _ = begin(model, facts, settings, config, output=output, resume=resume, overwrite=overwrite)
    executor = _executor(comparison.path / JOBS, jobs)
    if comparison.open_cells():
        with executor.batch():
            submitted = [executor.submit(Job(comparison)) for _ in range(jobs.n)]
        log.info("%d jobs submitted, logs in %s; they keep running after this process ends", jobs.n, executor.folder)
        _wait(submitted, comparison)
    return comparison.cells


def _executor(folder: Path, jobs: Jobs) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise missing_extra("Jobs on a cluster", "slurm", error) from error
    shared = submitit.AutoExecutor._typed_parameters()
    wanted = {**DEFAULTS, **jobs.parameters}
    try:
        executor = submitit.AutoExecutor(folder.resolve(), cluster=jobs.cluster)
        executor.update_parameters(
            **{name if name in shared else f"slurm_{name}": value for name, value in wanted.items()}
        )
    except RuntimeError as error:
        raise ConfigError(
            f"Cannot submit jobs from this machine: {error}\nRun this on a machine of the cluster, or leave out "
            "--slurm: --workers shares the work among processes of this machine."
        ) from None
    except (NameError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"--slurm-set: {str(error).splitlines()[0]}\nGive submitit's names (timeout_min=600, mem_gb=32) or "
            "sbatch's (partition=gpu)."
        ) from None
    return executor


def _wait(jobs: Sequence[Any], comparison: Comparison) -> None:
    """Wait until no cell is open, or no job is left; then cancel the jobs that are still in the queue."""
    while comparison.open_cells() and not all(job.done() for job in jobs):
        time.sleep(POLL_S)
    for job in jobs:
        if job.state == "PENDING":
            job.cancel(check=False)
    failed = [error for error in (job.exception() for job in jobs if job.done()) if error]
    n_open = len(comparison.open_cells())
    if n_open:
        reason = f"; the first that failed reports: {_reason(failed[0])}" if failed else ""
        raise RunError(
            f"{comparison.path}: {n_open} of {len(comparison.cells)} cells are unfinished, and no job is running"
            f"{reason}\n"
            f"The jobs' logs are in {comparison.path / JOBS}. Continue with --resume."
        )
    if failed:
        log.warning("%d of %d jobs failed; the other jobs filled their cells", len(failed), len(jobs))


def _reason(error: Exception) -> str:
    """Return why a job failed: the error in its traceback, otherwise the first line that submitit gives."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if ERROR_LINE.match(line)]
    return (named[-1] if named else lines[0])[:300]
