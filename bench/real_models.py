"""Update a real chat model by several recipes on the same facts, and print one table; resumable.

    python bench/real_models.py MODEL ../shared/data --output runs/real [--sets zsre] [--rows default,plain] [--seeds 0]
    python bench/real_models.py MODEL ../shared/data --output runs/methods --rows methods --old-from model --seeds 0,1,2

Each row is an `update` with the settings below, and nothing else. `one-by-one` is fine-tuning as EasyEdit's `FT` does
it: one fact after the other, 25 steps each, on the last projection of one MLP. `--rows methods` sets every method
beside the default recipe, all with the recipe `plain`; the f- methods forget with coefficient 0.3. `in-context` and
`retrieval` change no weight, so they have no steps, and no general answers are measured.

Columns, in percent: new answer said (by the protocol `contains`), said when asked in other words; tokens of the answers
to the file's unrelated probes that are predicted as before (agreement, as in the report); general answers as before, KL
from the base on those in nats per token; old answer still said where the base said it, and the number of these facts.
Then steps, the tokens of the base's own answers to the probes that are predicted as before, replies to other questions
about the facts' subjects that leave the new answer out (the probe `same-subject`), and CPU seconds of the
update (after a resume, of the rest) with its peak memory in GB; of methods in context, the tokens added to a prompt.
Each cell is computed by a process of its own; give OMP_NUM_THREADS=1, since several threads spend CPU seconds on
waiting. `cells.jsonl` has all cells, a line each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import EvaluateSettings, RunConfig, StageSettings
from forgetlearn.evaluation import damage, general_ability, probe_scoring, scoring
from forgetlearn.evaluation.probes import SAME_SUBJECT, questions
from forgetlearn.evaluation.scorer import Generated, Reading, Scorer
from forgetlearn.evaluation.statistics import mean_with_interval
from forgetlearn.facts import Fact, FactSet, matching, read_facts
from forgetlearn.method.core import learn
from forgetlearn.models.language_model import LanguageModel, load_model
from forgetlearn.runs.checks import asked_answers, with_the_models_answers
from forgetlearn.runs.pipeline import HeldBase, Pipeline, Store
from forgetlearn.runs.update import update
from forgetlearn.storage import disk, provenance
from forgetlearn.storage.records import General, Row

SETS = {
    "zsre": ("zsre.json", 60),
    "counterfact": ("counterfact.json", 100),
    "halluedit": ("halluedit-llama3.jsonl", 60),
}
# The defaults before recipes, at eb25ea2: three epochs at a rate for models fifty times as large.
FORMER = {
    "recipe": "plain",
    "method": "f-lora",
    "learn": {"until": "epochs", "epochs": 3},
    "train": {"lr_scheduler_type": "linear"},
    "lora": {"r": 8, "lora_alpha": 16, "learning_rate": 5e-4},
}
RECIPES: Mapping[str, Mapping[str, object]] = {
    "default": {},
    "plain": {"recipe": "plain"},
    "former": FORMER,
    "one-by-one": {},
}
METHOD_ROWS: Mapping[str, Mapping[str, object]] = {
    "default": {},
    **{
        name: {"recipe": "plain", "method": name, **({"forget": {"coef": 0.3}} if method.forgets else {})}
        for name, method in METHODS.items()
        if name != "ga"  # ascent is a way to forget
    },
}
GROUPS = {"recipes": RECIPES, "methods": METHOD_ROWS}
ROWS = {**METHOD_ROWS, **RECIPES}
STEPS_PER_FACT, RATE_PER_FACT = 25, 5e-4  # of EasyEdit's FT for Llama


@dataclass(frozen=True)
class Cell:
    """One update: a row of the table on one file of facts with one seed."""

    facts: str
    row: str
    seed: int
    settings: Mapping[str, object]

    @property
    def name(self) -> str:
        return f"{self.facts}-{self.row}-seed{self.seed}"


def arguments(doc: str | None, sets: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser of what every comparison on a real model is told; `sets` are the usual files of facts."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("data", type=Path, help="folder with the files of facts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(sets))
    parser.add_argument("--seeds", default="0")
    return parser


def main() -> None:
    parser = arguments(__doc__, SETS)
    parser.add_argument("--rows", default="recipes", help=f"{' or '.join(GROUPS)}, or names: {', '.join(ROWS)}")
    parser.add_argument("--limit", type=int, help="facts of each file, instead of the usual number")
    parser.add_argument("--template", default="auto", help="model.prompt_template")
    parser.add_argument("--old-from", default=RunConfig().facts.old_from, help="facts.old_from")
    args = parser.parse_args()
    wanted = list(GROUPS.get(args.rows, args.rows.split(",")))
    cells = [
        Cell(name, row, int(seed), ROWS[row])
        for seed in args.seeds.split(",")
        for name in args.sets.split(",")
        for row in wanted
    ]
    for cell in cells:
        file = args.output / f"{cell.name}.json"
        if not file.is_file():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(run, cell, args).result()
            disk.write_json(file, found)
            print(f"{cell.name}: {json.dumps(found)}", flush=True)
    print(table(args.output, cells))
    done = sorted(args.output.glob("*-seed*.json"))
    disk.write_rows(args.output / "cells.jsonl", [{"cell": file.stem, **disk.read_json(file)} for file in done])


def run(cell: Cell, args: argparse.Namespace) -> dict[str, float | None]:
    """Return the scores of a cell."""
    file, usual = SETS[cell.facts]
    general = {"seed": cell.seed, "model": {"prompt_template": args.template}, "facts": {"old_from": args.old_from}}
    config = validate(RunConfig, {**general, "evaluate": {"probes": "none"}, **cell.settings})
    facts = read_facts(args.data / file, limit=args.limit or usual, old_from=config.facts.old_from)
    began = time.process_time()
    if cell.row == "one-by-one":
        return one_by_one(model_at(args.model, config), facts, args.output) | cost(began)
    if METHODS[config.method].in_context:
        return in_context(model_at(args.model, config), facts, config) | cost(began)
    folder = args.output / cell.name
    result = update(args.model, facts, config, output=folder, resume=folder.is_dir())
    found = scores(result.rows, result.summary.general["updated"], "updated")
    found |= {"steps": len(disk.read_rows(result.output / "logs" / "learn.jsonl")), **cost(began)}
    if any(fact.locality for fact in facts):
        found["own answers to probes"] = probes_as_before(cell, args, facts, config, result.product)
    found["same subject"] = same_subject(model_at(result.product, config), facts)
    return found


def cost(began: float) -> dict[str, float | None]:
    """Return the CPU seconds since `began`, and this process's peak memory so far."""
    return {"CPU seconds": time.process_time() - began, "peak GB": provenance.peak_memory_bytes() / 1e9}


def in_context(lm: LanguageModel, facts: FactSet, config: RunConfig) -> dict[str, float | None]:
    """Return the scores of a method that puts facts into the prompt."""
    if facts.to_ask:
        facts = with_the_models_answers(facts, asked_answers(lm, facts, config), config)
    evaluate = config.evaluate.model_copy(update={"general_prompts": False})
    pipeline = Pipeline(lm, list(facts), config.model_copy(update={"evaluate": evaluate}), Store(), HeldBase(lm))
    pipeline.prepare()
    pipeline.update()
    rows = [row for own in pipeline.rows.values() for row in own]
    added = [row.added_tokens for row in rows if row.added_tokens is not None]
    return scores(rows, None, "updated") | {"tokens added to a prompt": statistics.fmean(added)}


def model_at(path: object, config: RunConfig) -> LanguageModel:
    return load_model(config.model.model_copy(update={"name": str(path)}))


def probes_as_before(
    cell: Cell, args: argparse.Namespace, facts: FactSet, config: RunConfig, product: object
) -> float | None:
    """Return the agreement with the base on its own answers to the first probe of each fact."""
    probes = list(dict.fromkeys(fact.locality[0].prompt for fact in facts if fact.locality))
    before = args.output / f"{cell.facts}-{len(facts)}-{args.template}-probes"

    def measure(folder: Path) -> None:
        damage.measure(model_at(args.model, config), config.evaluate, folder, prompts=probes)

    filled(before, measure)
    return damage.measure(model_at(product, config), config.evaluate, before, before, probes).agreement


def same_subject(lm: LanguageModel, facts: FactSet) -> float | None:
    """Return the percent of replies to other questions about the facts' subjects that leave the new answer out."""
    settings = EvaluateSettings(probes=(SAME_SUBJECT,))
    asked = questions(list(facts), lm.encoder, settings, 0)
    found = probe_scoring.summarise(probe_scoring.score(lm, asked, settings, "updated"), len(facts))
    return found[0].new.mean if found else None


def one_by_one(lm: LanguageModel, facts: FactSet, output: Path) -> dict[str, float | None]:
    """Fine-tune one module on one fact after the other, and return the scores."""
    settings, evaluate = (
        StageSettings(epochs=STEPS_PER_FACT, batch_size=1, learning_rate=RATE_PER_FACT),
        EvaluateSettings(),
    )
    before = scoring.score(lm, facts, phase="base", settings=evaluate)
    general_ability.measure(lm, evaluate, new_folder(output / "one-by-one-before"))
    for fact in facts:
        learn(lm, [fact], settings, "one module")
    reference = scoring.locality_predictions(before)
    after = scoring.score(lm, facts, phase="updated", settings=evaluate, reference=reference)
    general = general_ability.measure(
        lm, evaluate, new_folder(output / "one-by-one-after"), output / "one-by-one-before"
    )
    return scores([*before, *after], general, "updated")


def filled(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder, complete; `write` fills it if it does not exist."""
    if not folder.is_dir():
        with disk.atomic_folder(folder) as begun:
            write(begun)
    return folder


def new_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def scores(rows: Sequence[Row], general: General | None, phase: str) -> dict[str, float | None]:
    """Return the columns of the table that an update's own scores give."""
    table = scoring.summarise([row for row in rows if row.phase == phase])
    said = {row.fact for row in rows if row.phase == "base" and row.protocol == "contains" and row.residue}
    still = [row.residue for row in rows if row.phase == phase and row.protocol == "contains" and row.fact in said]
    prompts = general.prompts if general else None
    return {
        "new": table["reliability"]["contains"].mean,
        "in other words": table.get("generality", {"contains": mean_with_interval([])})["contains"].mean,
        "unrelated": table["locality"]["agreement"].mean,
        **({"general": prompts.agreement, "KL": prompts.kl} if prompts else {}),
        "old": percent([residue for residue in still if residue is not None]),
        "held before": float(len(said)),
    }


def brought_back(lm: LanguageModel, facts: Sequence[Fact], evaluate: EvaluateSettings) -> dict[str, float | None]:
    """Return how often the old answer is preferred in multiple choice, and said when the new one is denied."""
    both = [fact for fact in facts if fact.ground_truth]
    scorer = Scorer(lm, evaluate.model_copy(update={"protocols": ("prefer",)}), "probes")
    choices = {}
    for fact in both:
        for letters in (("A", "B"), ("B", "A")):
            options = sorted(zip(letters, (fact.target_new, fact.ground_truth), strict=True))
            listed = "\n".join(f"{letter}. {answer}" for letter, answer in options)
            prompt = f"{fact.prompt}\n{listed}\nAnswer with the letter only."
            choices[fact.id, letters] = (prompt, letters)
    read = scorer.read((prompt, letter) for prompt, letters in choices.values() for letter in letters)

    def likely(prompt: str, letter: str) -> float:
        found = read[prompt, letter]
        return found.logprob or 0.0 if isinstance(found, Reading) else float("-inf")

    old = [likely(prompt, letters[1]) > likely(prompt, letters[0]) for prompt, letters in choices.values()]
    denied = {fact.id: f"The answer is not {fact.target_new}. {fact.prompt}" for fact in both}
    said = scorer.say(denied.values())
    replies = {fact: said[prompt] for fact, prompt in denied.items()}
    back = [
        matching.says(reply.text, fact.old_answers, fact.new_answers)
        for fact in both
        if isinstance(reply := replies[fact.id], Generated)
    ]
    return {"old chosen": percent(old), "old when denied": percent(back)}


def percent(hits: Sequence[float]) -> float | None:
    return 100 * statistics.fmean(hits) if hits else None


def table(output: Path, cells: Sequence[Cell]) -> str:
    """Return a table in Markdown with the mean over seeds of every finished row."""
    return in_markdown(finished(output, {cell.name: f"{cell.facts} {cell.row}" for cell in cells}), mean)


def mean(name: str, values: Sequence[float]) -> str:
    """Return the mean of a column's values over seeds."""
    digits = 3 if name == "KL" else 0 if name in ("steps", "CPU seconds", "held before") else 1
    return f"{statistics.fmean(values):.{digits}f}"


def finished(output: Path, rows: Mapping[str, str]) -> dict[str, list[Mapping[str, float | None]]]:
    """Return by row the scores of its finished cells; `rows` are the rows of cells, by the cells' names."""
    found: dict[str, list[Mapping[str, float | None]]] = {}
    for name, row in rows.items():
        if (file := output / f"{name}.json").is_file():
            found.setdefault(row, []).append(disk.read_json(file))
    return found


def in_markdown(
    found: Mapping[str, Sequence[Mapping[str, float | None]]], shown: Callable[[str, Sequence[float]], str]
) -> str:
    """Return a table of all rows; `shown` makes a cell of a column's name and its values over seeds."""
    names = list(dict.fromkeys(name for own in found.values() for scores in own for name in scores))
    lines = [f"| | {' | '.join(names)} | runs |", "|---|" + "---:|" * (len(names) + 1)]
    for row, own in found.items():
        values = {name: [value for scores in own if (value := scores.get(name)) is not None] for name in names}
        cells = [shown(name, values[name]) if values[name] else "–" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
