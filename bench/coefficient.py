"""Compare `coef: auto`, with both of its searches, with a grid of nine coefficients: how close, and in how much time.

    python bench/coefficient.py --start 300 --output runs/coefficient

There are six cases: f-ft, f-lora and f-lora-ft on ZsRE and on COUNTERFACT, each on a lab base of the facts START + 1 to
START + LIMIT, with 6 epochs per stage, one seed, protocol `token` and one thread. The grid is one `compare`, so its
base is scored, and fine-tuned on the old answers, only once. Auto is an `update`. Both are timed as a whole, in CPU
seconds, in this process. The measure is the mean of reliability, generality and locality, for auto and grid alike on
the facts that auto did not choose on. A fixed coefficient is shown as the baseline that a search has to beat.

The grid also shows how much depends on which facts are set aside. They are drawn anew DRAWS times, and the best
coefficient on each draw is compared with the best one on the other facts: how often is it within 1 point? This is done
once with all nine coefficients, and once with only the two ends of the full search.

Resumable: a finished grid or update is not run again, and an interrupted one starts again. For both searches, the last
line says in how many cases the search came within 1 point of the grid's best, and what share of its time it took.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import ROOT, machine
from forgetlearn.comparison.cells import CompareSettings
from forgetlearn.comparison.grid import CELLS, fill
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.facts import FactSet, read_facts
from forgetlearn.lab.build import LabSettings, build_lab
from forgetlearn.runs.coefficient import GOAL, HIGHEST, LOWEST
from forgetlearn.runs.update import update
from forgetlearn.storage import disk

METHODS = ("f-ft", "f-lora", "f-lora-ft")
GRID = (0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 3.0)
FIXED = (0.3, 1.0)
SEARCHES = ("auto",)
ENDS = (LOWEST, HIGHEST)
DRAWS = 200


@dataclass(frozen=True)
class Case:
    """A method on a data set, with the grid's scores by coefficient, and each search's score and coefficient."""

    name: str
    grid: dict[float, float]
    auto: dict[str, tuple[float, float]]  # search -> coefficient, score
    time: dict[str, float]  # search -> its share of the grid's CPU time
    facts: np.ndarray  # scores of the grid: coefficient, fact, quantity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--sets", default="zsre,counterfact")
    parser.add_argument("--start", type=int, default=0, help="usable facts of the file to pass over")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for name in args.sets.split(","):
        facts, base = lab_base(args.data / f"{name}.json", args)
        for method in METHODS:
            config = case_config(base, method, args.seed)
            cases.append(run_case(name, facts, config, args.output / f"{name}-{args.start}-seed{args.seed}" / method))
            print(f"{cases[-1].name} done", flush=True)
    print(machine())
    print(table(cases))
    for coefs in (GRID, ENDS):
        print(f"best of {', '.join(f'{c:g}' for c in coefs)} on the facts set aside: {ceiling(cases, coefs):.1f} cases")
    print(verdict(cases))


def lab_base(file: Path, args: argparse.Namespace) -> tuple[FactSet, Path]:
    """The facts, and a base that holds them."""
    facts = read_facts(file, limit=args.start + args.limit)
    facts = replace(facts, facts=facts[args.start :])
    return facts, build_lab(facts, LabSettings(seed=args.seed), vocabulary_from=read_facts(file))


def case_config(base: Path, method: str, seed: int) -> RunConfig:
    changes = {"method": method, "seed": seed, "model.name": str(base), "evaluate.protocols": ["token"]}
    return load_config(base / "update.yaml", changes | {"forget.epochs": 6, "learn.epochs": 6})


def run_case(data: str, facts: FactSet, config: RunConfig, folder: Path) -> Case:
    settings = CompareSettings(methods=(config.method,), coefs=GRID, seeds=(config.seed,))
    base = str(config.model.name)
    seconds = {"grid": timed(folder / "grid", lambda out: fill(base, facts, settings, config, output=out))}
    for search in SEARCHES:
        forget = config.forget.model_copy(update={"coef": "auto"})
        own = config.model_copy(update={"forget": forget})
        seconds[search] = timed(folder / search, lambda out, own=own: update(base, facts, own, output=out))
    summaries = {search: disk.read_json(folder / search / "run" / "summary.json") for search in SEARCHES}
    aside = set(summaries[SEARCHES[0]]["choice"]["validation"])
    kept = [index for index, fact in enumerate(facts) if fact.id not in aside]
    cells = {
        disk.read_json(path / "summary.json")["coef"]: path for path in (folder / "grid/run" / CELLS).glob("[!.]*")
    }
    table = np.array([scores(cells[coef], facts) for coef in GRID])
    auto = {search: goal(scores(folder / search / "run", facts)[kept]) for search in SEARCHES}
    return Case(
        f"{data} {config.method}",
        {coef: goal(own[kept]) for coef, own in zip(GRID, table, strict=True)},
        {search: (summaries[search]["coef"], auto[search]) for search in SEARCHES},
        {search: seconds[search] / seconds["grid"] for search in SEARCHES},
        table,
    )


def timed(folder: Path, work: Callable[[Path], Any]) -> float:
    """Return the CPU seconds of the work that writes this folder, from the note beside it if the work is done."""
    note = folder.with_suffix(".json")
    if not note.is_file():
        disk.remove_unfinished(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        with disk.atomic_folder(folder) as unfinished:
            work(unfinished / "run")
        disk.write_json(note, {"cpu_s": time.process_time() - start})
    return float(disk.read_json(note)["cpu_s"])


def scores(run: Path, facts: FactSet) -> np.ndarray:
    """Return the updated model's scores in percent: a line per fact, a column per score of GOAL; NaN if unscored."""
    rows = [row for row in disk.read_rows(run / "facts.jsonl") if row["phase"] == "updated"]
    found = {(row["fact"], protocol): row for row in rows for _q, protocol in GOAL if row["protocol"] == protocol}
    lines = [[found[fact.id, protocol][quantity] for quantity, protocol in GOAL] for fact in facts]
    return 100 * np.array(lines, dtype=float)


def goal(own: np.ndarray) -> float:
    """Mean of the three quantities, each a mean over these facts."""
    return float(np.nanmean(own, axis=0).mean())


def table(cases: list[Case]) -> str:
    head = ["case", "best of grid", *(f"{search}: score" for search in SEARCHES), *(f"fixed {c:g}" for c in FIXED)]
    head += ["within 1 point", *(f"{search}: time" for search in SEARCHES)]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for case in cases:
        best = max(case.grid.values())
        at = next(coef for coef, score in case.grid.items() if score == best)
        near = sum(score >= best - 1 for score in case.grid.values())
        cells = [case.name, f"{best:.1f} at {at:g}"]
        cells += [f"{score:.1f} at {coef:g} ({score - best:+.1f})" for coef, score in case.auto.values()]
        cells += [f"{case.grid[coef]:.1f} ({case.grid[coef] - best:+.1f})" for coef in FIXED]
        cells += [f"{near} of {len(GRID)}", *(f"{case.time[search]:.2f}" for search in SEARCHES)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def ceiling(cases: list[Case], coefs: tuple[float, ...]) -> float:
    """Return in how many cases the best of `coefs` on a fifth of the facts is within 1 point of the best on the others.

    This is a mean over draws of the fifth.
    """
    tried, near = [GRID.index(coef) for coef in coefs], []
    for draw in range(DRAWS):
        for case in cases:
            order = np.random.default_rng(draw).permutation(case.facts.shape[1])
            aside, kept = np.split(order, [len(order) // 5])
            chosen = max(tried, key=lambda index, case=case, aside=aside: goal(case.facts[index][aside]))
            rest = [goal(own[kept]) for own in case.facts]
            near.append(rest[chosen] >= max(rest) - 1)
    return len(cases) * float(np.mean(near))


def verdict(cases: list[Case]) -> str:
    parts = []
    for search in SEARCHES:
        near = sum(case.auto[search][1] >= max(case.grid.values()) - 1 for case in cases)
        share = statistics.mean(case.time[search] for case in cases)
        parts.append(f"{search} within 1 point {near} of {len(cases)}, time ratio {share:.2f}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
