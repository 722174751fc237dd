"""Edit a model on one fact at a time, each on the model as it was, and report how often the edit succeeds; resumable.

    python bench/single_edits.py MODEL ../shared/data --output runs/single [--methods rome,memit] [--limit 50]

The old answer is the file's own. Columns, in percent with intervals (95 %) over facts: the new answer is likelier than
the old one (`prefer`), and is said word for word (`exact`), both to the prompt and in other words; the answers to the
file's unrelated probes that are predicted as before (`agreement`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from forgetlearn.config.base import validate
from forgetlearn.config.schema import RunConfig
from forgetlearn.evaluation import scoring
from forgetlearn.facts import read_facts
from forgetlearn.method.core import learn
from forgetlearn.runs.pipeline import HeldBase
from forgetlearn.storage.records import Row, load_rows, save_rows
from real_models import SETS, arguments, model_at

COLUMNS = (
    ("reliability", "prefer"),
    ("reliability", "exact"),
    ("generality", "prefer"),
    ("generality", "exact"),
    ("locality", "agreement"),
)


def main() -> None:
    parser = arguments(__doc__, ("zsre", "counterfact"))
    parser.add_argument("--methods", default="rome", help="rome, memit, alphaedit")
    parser.add_argument("--limit", type=int, default=50, help="facts of each file")
    args = parser.parse_args()
    lines = [f"| | {' | '.join(map(' '.join, COLUMNS))} | facts |", "|---|" + "---:|" * (len(COLUMNS) + 1)]
    for method in args.methods.split(","):
        for name in args.sets.split(","):
            for seed in args.seeds.split(","):
                config = validate(RunConfig, {"method": method, "recipe": "plain", "seed": int(seed)})
                rows = edited(args, config, name)
                scores = " | ".join(column(rows, *names) for names in COLUMNS)
                lines.append(f"| {name}, {method}, seed {seed} | {scores} | {len({row.fact for row in rows})} |")
    print("\n".join(lines))


def edited(args: argparse.Namespace, config: RunConfig, name: str) -> list[Row]:
    """Return the scores after the edit of each fact; those in the output folder are not made again."""
    facts = list(read_facts(args.data / SETS[name][0], limit=args.limit))
    folder = args.output / f"{name}-{config.method}-seed{config.seed}"
    files = {fact.id: folder / f"{number}.jsonl" for number, fact in enumerate(facts)}
    folder.mkdir(parents=True, exist_ok=True)
    if missing := [fact for fact in facts if not files[fact.id].is_file()]:
        evaluate = config.evaluate.model_copy(update={"protocols": ("prefer", "exact")})
        lm = model_at(args.model, config)
        reference = scoring.locality_predictions(scoring.score(lm, facts, phase="base", settings=evaluate))
        base = HeldBase(lm)
        for fact in missing:
            learn(lm, [fact], config.learning, config.method, seed=config.seed)
            rows = scoring.score(lm, [fact], phase="updated", settings=evaluate, reference=reference)
            save_rows(rows, files[fact.id])
            base.restore()
    return [row for file in files.values() for row in load_rows(Row, file)]


def column(rows: Sequence[Row], quantity: str, protocol: str) -> str:
    score = scoring.summarise(rows)[quantity][protocol]
    return f"{score.mean:.1f} [{score.low:.1f}, {score.high:.1f}]"


if __name__ == "__main__":
    main()
