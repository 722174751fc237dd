"""Compare the time of `forgetlearn compare` with that of the same updates as `forgetlearn update` commands.

    python bench/sharing.py --limit 60 --epochs 2

5 methods x 3 coefficients x 3 seeds are 33 updates. Both sides are commands in their own processes, with one thread, on
one lab base that is built before the clock starts. Only the first seed's updates are run one by one, and their time is
used for the other seeds too, since a seed changes the order of facts but not the amount of work. With `--every-seed`
all updates are run. Their scores must equal those of compare's cells. An update also writes its product (a model or an
adapter), while a cell writes only its scores and report. `--pairs` repeats both sides. The last line is the ratio of
CPU times, compare to one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from common import ZSRE, machine
from forgetlearn.comparison.cells import CompareSettings, cell_config, cells_of
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.facts import read_facts
from forgetlearn.lab.build import LabSettings, build_lab

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
START = [sys.executable, "-c", "import forgetlearn.runs.update, forgetlearn.report.run_page"]


@dataclass(frozen=True)
class Spent:
    """The time that processes took, including their children."""

    wall_s: float
    cpu_s: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def times(self, factor: float) -> Spent:
        return Spent(self.wall_s * factor, self.cpu_s * factor)


def spent_by(command: Sequence[str]) -> Spent:
    """Wall and CPU time of a command, from start to end.

    Raises:
        CalledProcessError: it failed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = Spent(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"{spent.wall_s:7.1f} s, {spent.cpu_s:7.1f} CPU s: {' '.join(command[-4:])}", file=sys.stderr, flush=True)
    return spent


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    base = lab_base(args.facts, args.limit)
    config = load_config(
        base / "update.yaml",
        {
            "model.name": str(base),
            "facts.source": str(base / "facts.jsonl"),
            "forget.epochs": args.epochs,
            "learn.epochs": args.epochs,
        },
    )
    settings = CompareSettings(seeds=tuple(range(args.seeds)))
    cells = cells_alone(config, settings, args.every_seed)
    compared, alone = [], []
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory(prefix="forgetlearn-bench-") as folder:
            compared.append(run_compare(Path(folder), config, settings))
            alone.append(run_alone(Path(folder), cells))
            check_equal_scores(Path(folder), cells)
    starts = [spent_by(START) for _ in range(3)]
    report(args, settings, config, compared, alone, statistics.median(start.cpu_s for start in starts))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, default=ZSRE)
    parser.add_argument("--limit", type=int, default=60, help="usable facts of the file")
    parser.add_argument("--epochs", type=int, default=2, help="of each stage (a lab base is made for 6)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every-seed", action="store_true", help="run every update one by one, scale nothing")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each side, one after the other")
    return parser.parse_args()


def lab_base(facts_file: Path, limit: int) -> Path:
    """A lab base that holds the facts; kept in the cache, so that it is built once."""
    return build_lab(read_facts(facts_file, limit=limit), LabSettings(), vocabulary_from=read_facts(facts_file))


def run_compare(folder: Path, config: RunConfig, settings: CompareSettings) -> Spent:
    (folder / "config.yaml").write_text(as_yaml(config))
    command = [sys.executable, "-m", "forgetlearn", "--quiet", "compare", "--config", str(folder / "config.yaml")]
    for name in ("methods", "coefs", "seeds"):
        command += [f"--{name}", ",".join(map(str, getattr(settings, name)))]
    return spent_by([*command, "--output", str(folder / "compared")])


def run_alone(folder: Path, cells: Mapping[str, RunConfig]) -> Spent:
    """Run each update as a command, and return the total time."""
    total = Spent(0, 0)
    for name, config in cells.items():
        file = folder / f"{name}.yaml"
        file.write_text(as_yaml(config))
        command = [sys.executable, "-m", "forgetlearn", "--quiet", "update", "--config", str(file)]
        total += spent_by([*command, "--output", str(folder / name)])
    return total


def cells_alone(config: RunConfig, settings: CompareSettings, every_seed: bool) -> dict[str, RunConfig]:
    """Return the configs of the updates that are run one by one, by name of the cell."""
    seeds = settings.seeds if every_seed else settings.seeds[:1]
    cells = [cell for cell in cells_of(settings, config) if cell.seed in seeds]
    return {cell.name: cell_config(config, cell, settings.variants) for cell in cells}


def as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check_equal_scores(folder: Path, names: Iterable[str]) -> None:
    """Raise AssertionError if the two sides have different scores."""
    for name in names:
        paths = (folder / "compared" / "cells" / name, folder / name)
        mine, other = (json.loads((path / "summary.json").read_text())["phases"] for path in paths)
        assert mine == other, f"{name}: compare and update have other scores"


def report(
    args: argparse.Namespace,
    settings: CompareSettings,
    config: RunConfig,
    compared: list[Spent],
    alone: list[Spent],
    start_s: float,
) -> None:
    n_cells, n_alone = len(cells_of(settings, config)), len(cells_alone(config, settings, args.every_seed))
    scaled = [spent.times(n_cells / n_alone) for spent in alone]
    print(machine())
    print(
        f"{args.limit} facts, {args.epochs} epochs a stage, {len(settings.methods)} methods x {len(settings.coefs)} "
        f"coefficients x {len(settings.seeds)} seeds = {n_cells} updates; {args.pairs} pair(s)"
    )
    print(f"one by one: {n_alone} updates were run, and scaled by {n_cells / n_alone:g}")
    print("equal scores in every phase of these updates on both sides")
    print(f"{'':28}{'wall s':>9}{'CPU s':>9}{'CPU s / update':>16}")
    for name, all_spent in (("forgetlearn compare", compared), ("forgetlearn update", scaled)):
        wall = statistics.median(spent.wall_s for spent in all_spent)
        cpu = statistics.median(spent.cpu_s for spent in all_spent)
        print(f"{name:28}{wall:9.0f}{cpu:9.0f}{cpu / n_cells:16.1f}")
    walls = statistics.median(a.wall_s / b.wall_s for a, b in zip(compared, scaled, strict=True))
    cpus = statistics.median(a.cpu_s / b.cpu_s for a, b in zip(compared, scaled, strict=True))
    bare = statistics.median(
        (a.cpu_s - start_s) / (b.cpu_s - n_cells * start_s) for a, b in zip(compared, scaled, strict=True)
    )
    print(f"starting a process (imports) takes {start_s:.1f} CPU s of each update; ratio without that: {bare:.2f}")
    print(f"wall ratio {walls:.2f}")
    print(f"ratio {cpus:.2f}")


if __name__ == "__main__":
    main()
