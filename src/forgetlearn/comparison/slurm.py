"""Run a comparison on a Slurm cluster: jobs submitted through submitit fill the cells of one shared folder."""

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
DEFAULTS: Mapping[str, object] = {"name": "forgetlearn", "timeout_min": 240}  # submitit's default is 5 minutes
POLL_S = 1.0
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception|Interrupt): ")


@dataclass(frozen=True)
class Job:
    """The work of one job. Finished cells are kept, so a job that is preempted or times out can be repeated."""

    comparison: Comparison

    def __call__(self) -> None:
        """Fill cells, and write the progress to the job's log."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        help_fill(self.comparison)

    def checkpoint(self) -> Any:
        """Return the same job; submitit calls this to put a preempted job back into the queue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Jobs:
    """The number of jobs to submit, the cluster, and the resources that each job requests.

    `parameters` are submitit's (`timeout_min`, `mem_gb`, `cpus_per_task`, `gpus_per_node`, ...) or Slurm's
    (`partition`, ...). The cluster `local` runs the jobs as processes on this machine.
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
    """Submit jobs that fill all cells of a comparison, wait until the cells are done, and return them.

    If this process is stopped, the jobs keep running.

    Raises:
        ConfigError: submitit is not installed, this machine has no Slurm, or a parameter is unknown.
        RunError: the jobs ended before all cells were done; see `compare` for others.
    """
    check_named(model, "a job")
    with tempfile.TemporaryDirectory(prefix="forgetlearn-") as unused:  # some executors create their folder
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
    """Wait until all cells are done or all jobs have ended, then cancel the jobs that are still in the queue.

    Raise RunError if a cell is not done.
    """
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
    """Return why a job failed: the last error in its traceback, or else the first line of submitit's message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if ERROR_LINE.match(line)]
    return (named[-1] if named else lines[0])[:300]
