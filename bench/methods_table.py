"""Run the paper's five methods on a file of facts, over several seeds. Each seed builds and updates its own lab base.

    python bench/methods_table.py FACTS --limit 300 --seeds 0,1,2 --output DIR

Resumable: a finished run is not run again. Prints a Markdown table of means over seeds with their standard errors, and
then what share of the facts the lab bases held.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from forgetlearn.config.schema import load_config
from forgetlearn.facts import read_facts
from forgetlearn.lab.build import LabSettings, build_lab
from forgetlearn.report.render import COLUMNS
from forgetlearn.runs.update import update
from forgetlearn.storage.disk import read_json
from forgetlearn.storage.records import Summary
from forgetlearn.storage.run_folder import is_finished

CELLS = (
    ("ft", None),
    ("f-ft", 0.3),
    ("f-ft", 1.0),
    ("lora", None),
    ("f-lora", 0.3),
    ("f-lora", 1.0),
    ("f-lora-ft", 0.3),
    ("f-lora-ft", 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("facts")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    facts = read_facts(args.facts, limit=args.limit)
    whole = read_facts(args.facts)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    scores: dict[tuple[str, float | None], list[dict]] = {cell: [] for cell in CELLS}
    held = []
    for seed in seeds:
        base = build_lab(facts, LabSettings(seed=seed, tie_word_embeddings=not args.untied), vocabulary_from=whole)
        held.append(read_json(base / "lab.json")["held"])
        for method, coef in CELLS:
            output = args.output / f"{method}-{coef}-seed{seed}"
            changes = {"method": method, "seed": seed, "forget.epochs": 6, "learn.epochs": 6}
            if coef is not None:
                changes["forget.coef"] = coef
            config = load_config(base / "update.yaml", changes)
            resume = output.exists()
            if resume and is_finished(output):
                summary = Summary.load(output / "summary.json")
            else:
                summary = update(base, facts, config, output=output, resume=resume).summary
            scores[method, coef].append(summary.phases["updated"])
            print(f"seed {seed} {method} {coef}", flush=True)
    print(table(scores))
    for seed, shares in zip(seeds, held, strict=True):
        print(
            f"seed {seed}: base holds " + ", ".join(f"{100 * share:.2f} % of {what}" for what, share in shares.items())
        )


def table(scores: dict[tuple[str, float | None], list[dict]]) -> str:
    lines = ["| | " + " | ".join(f"{q} ({p})" for q, p in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for (method, coef), phases in scores.items():
        cells = []
        for quantity, protocol in COLUMNS:
            means = [phase[quantity][protocol]["mean"] for phase in phases]
            spread = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0
            cells.append(f"{statistics.mean(means):.1f} ± {spread:.1f}")
        name = method if coef is None else f"{method}, coef {coef}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
