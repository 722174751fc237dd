"""Ask the paper's question on a real model: does forgetting first gain anything? Resumable.

    python bench/forgetting_first.py MODEL ../shared/data --output runs/forgetting --seeds 0,1,2 [--part 0/2]

The model learns the facts until they are learned, after forgetting with coefficient 0 (none), 0.3 or 1: as it is (old
answers: what it says) or taught the old answers first, as in the paper; keeping everything else (the default recipe) or
keeping nothing (`plain`). What the base says is asked once for all rows. Two processes share the work with --part 0/2
and --part 1/2.

Columns, in percent: new answer said, said in other words (by the protocol `contains`), unrelated probes as before
(agreement), old answer still said where the base said it, and the number of these facts; how often the old answer is
preferred in multiple choice, and how often it is said when the new one is denied. Then epochs of learning. Intervals
(95 %) are over seeds; in the second table over all pairs of a cell with the same cell without forgetting.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from forgetlearn.config.base import validate
from forgetlearn.config.schema import RunConfig
from forgetlearn.evaluation.statistics import mean_of
from forgetlearn.facts import read_facts
from forgetlearn.method.core import old_pairs, teach
from forgetlearn.runs.checks import asked_answers, with_the_models_answers
from forgetlearn.runs.pipeline import HeldBase, Pipeline, Store, Tuned
from forgetlearn.storage import disk
from forgetlearn.storage.records import Row, load_rows, save_rows
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import StateDict
from real_models import SETS, arguments, brought_back, filled, finished, in_markdown, model_at, scores

COEFS = (0.0, 0.3, 1.0)
FILES = ("zsre", "counterfact")
TEACH = {"epochs": 5}
MOST_TOKENS = 48  # of an answer; with the usual 32, half of this model's answers have no end, so cannot be forgotten


@dataclass(frozen=True)
class Cell:
    """One update of a model."""

    facts: str
    taught: bool
    keeps: bool
    coef: float
    seed: int

    @property
    def row(self) -> str:
        forgets = f"coefficient {self.coef:g}" if self.coef else "no forgetting"
        return (
            f"{self.facts}, {'taught' if self.taught else 'as it is'}, {'kept' if self.keeps else 'plain'}, {forgets}"
        )

    @property
    def name(self) -> str:
        return f"{self.row} {self.seed}".replace(", ", "-").replace(" ", "-")

    @property
    def base(self) -> str:
        """The name of what is asked of this cell's base; only teaching depends on the seed."""
        kind = f"taught{self.seed}" if self.taught else "as-it-is"
        return f"base-{self.facts}-{kind}-{'kept' if self.keeps else 'plain'}"

    def config(self) -> RunConfig:
        settings: dict[str, object] = {
            "recipe": "default" if self.keeps else "plain",
            "method": "f-lora" if self.coef else "lora",
            "seed": self.seed,
            "forget": {"coef": self.coef, "only_known": not self.taught},
            "facts": {"old_from": "answers" if self.taught else "model"},
            "evaluate": {
                "protocols": ["generate"],
                "general_prompts": False,
                "every_phase": False,
                "max_new_tokens": MOST_TOKENS,
            },
        }
        return validate(RunConfig, settings)


class SharedStore(Store):
    """Keeps what was asked of a base, and what was fine-tuned on the old answers, in a folder that other cells read."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        self.folder, self.seed = folder, seed

    def rows(self, step: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """Return the rows of a step: those of the base from the folder, if another cell computed them."""
        if step not in ("old_answers", "score_base", "probe"):
            return compute()
        found = self.files(step, lambda folder: save_rows(compute(), folder / "rows.jsonl"))
        return load_rows(Row, found / "rows.jsonl")

    def tuned(self, tune: Callable[[StageIO], Tuned]) -> StateDict:
        """Return the weights that are fine-tuned on the old answers: both coefficients subtract the same."""
        file = "weights.safetensors"
        found = self.files(f"tuned-{self.seed}", lambda folder: save_file(tune(self.stage_io)[0], folder / file))
        weights: StateDict = load_file(found / file)
        return weights

    def files(self, step: str, write: Callable[[Path], None]) -> Path:
        """Return the folder of a step, complete."""
        return filled(self.folder / step, write)


def main() -> None:
    parser = arguments(__doc__, FILES)
    parser.add_argument("--limit", type=int, default=60, help="facts of each file")
    parser.add_argument("--coefs", default=",".join(f"{coef:g}" for coef in COEFS), help="0 is no forgetting")
    parser.add_argument("--part", default="0/1", help="which cells this process computes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    seeds, coefs = [int(seed) for seed in args.seeds.split(",")], [float(coef) for coef in args.coefs.split(",")]
    cells = [
        Cell(facts, taught, keeps, coef, seed)
        for seed, keeps, taught, facts, coef in product(
            seeds, (True, False), (False, True), args.sets.split(","), coefs
        )
    ]
    own, parts = (int(number) for number in args.part.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // parts))
    for number, cell in enumerate(cells):
        file = args.output / f"{cell.name}.json"
        if not file.is_file() and number // len(coefs) % parts == own:
            disk.write_json(file, run(cell, args))
    print(in_markdown(finished(args.output, {cell.name: cell.row for cell in cells}), with_interval))
    print()
    print(in_markdown(gains(args.output, cells), with_interval))


def gains(output: Path, cells: Sequence[Cell]) -> dict[str, list[Mapping[str, float | None]]]:
    """Return by coefficient what the scores of finished cells differ by from those without forgetting."""
    found: dict[str, list[Mapping[str, float | None]]] = {}
    for cell in cells:
        both = finished(output, {replace(cell, coef=0.0).name: "without", cell.name: "with"})
        if cell.coef and len(both) == 2:
            (before,), (after,) = both["without"], both["with"]
            shared = [name for name in before if before[name] is not None and after.get(name) is not None]
            own = {name: float(after[name] or 0) - float(before[name] or 0) for name in shared}
            found.setdefault(f"coefficient {cell.coef:g} minus none", []).append(own)
    return found


def run(cell: Cell, args: argparse.Namespace) -> Mapping[str, float | None]:
    """Return the scores of a cell."""
    config = cell.config()
    facts = read_facts(args.data / SETS[cell.facts][0], limit=args.limit, old_from=config.facts.old_from)
    model = taught_model(cell, args) if cell.taught else Path(args.model)
    lm = model_at(model, config)
    store = SharedStore(args.output / cell.base, cell.seed)
    if facts.to_ask:
        said = store.rows("old_answers", lambda: asked_answers(lm, facts, config))
        facts = with_the_models_answers(facts, said, config)
    pipeline = Pipeline(lm, list(facts), config, store, HeldBase(lm))
    pipeline.prepare()
    pipeline.update()
    found = scores([row for rows in pipeline.rows.values() for row in rows], None, "updated")
    learned = store.logs["learn"]
    assert learned is not None, "every cell learns"
    return found | brought_back(lm, list(facts), config.evaluate) | {"epochs": float(learned.epochs or 0)}


def taught_model(cell: Cell, args: argparse.Namespace) -> Path:
    """Return the folder of the model that was taught the old answers, with all weights."""

    def write(folder: Path) -> None:
        config = validate(RunConfig, {"seed": cell.seed, "teach": TEACH})
        lm = model_at(args.model, config)
        facts = list(read_facts(args.data / SETS[cell.facts][0], limit=args.limit))
        teach(lm, old_pairs(facts), config.teaching, seed=cell.seed)
        lm.save(folder)

    return filled(args.output / f"taught-{cell.facts}-{cell.seed}", write)


def with_interval(_name: str, values: Sequence[float]) -> str:
    """Return the mean of a column's values over seeds, and its interval if there are several."""
    mean, low, high = mean_of(values, [1] * len(values))
    return f"{mean:.1f}" if low is None else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
