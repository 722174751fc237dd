"""Update a model batch after batch, by several recipes on the same facts, and print what is still said; resumable.

    python bench/streams.py lab --batches 10 --size 10 --output runs/streams [--rows default,plain] [--seeds 0,1,2]
    python bench/streams.py MODEL --facts ../shared/data/zsre.json --batches 10 --size 10 --output runs/streams

Each row is `update --batches` with the settings below and nothing else: the default recipe, which keeps earlier facts
and general answers, and plain fine-tuning with LoRA, which keeps nothing. With `lab`, the model is a lab base that
holds twice the facts. Columns: the percentage of the facts of all batches so far whose new answer is said (by
`contains`), of that batch and of those before it, and KL from the model before the first batch on general prompts, in
nats per token. Each recipe and seed has a table with a row per batch, and above it the CPU seconds (after a resume, of
the rest) and the rank of the last adapter; at the end come the last batches' means over seeds. Give OMP_NUM_THREADS=1:
several threads spend CPU seconds on waiting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from forgetlearn.facts import read_facts
from forgetlearn.lab.build import LabSettings, build_lab
from forgetlearn.report import stream_page
from forgetlearn.runs.stream import StreamResult, stream
from forgetlearn.storage import disk

ROWS: Mapping[str, Mapping[str, object]] = {"default": {}, "plain": {"recipe": "plain"}}
COLUMNS = ("batch", "facts", "said so far", "of it", "of earlier", "KL")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder of a model, or lab")
    parser.add_argument("--facts", type=Path, help="file of facts; with lab: the lab's own")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--size", type=int, default=10, help="facts of a batch")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    number = args.batches * args.size
    model = build_lab(settings=LabSettings(n_facts=2 * number)) if args.model == "lab" else Path(args.model)
    file = args.facts or model / "facts.jsonl"
    facts = read_facts(file, limit=number)
    if len(facts) < number:
        raise SystemExit(f"{file}: {len(facts)} usable facts, {number} are wanted. Lower --batches or --size.")
    ends: dict[str, list[list[str]]] = {}
    for row in args.rows.split(","):
        for seed in map(int, args.seeds.split(",")):
            output, began = args.output / f"{row}-seed{seed}", time.process_time()
            config = {**ROWS[row], "seed": seed}
            made = stream(model, facts, config, output=output, batches=args.batches, resume=output.is_dir())
            print(f"\n{row}, seed {seed}: {time.process_time() - began:.0f} CPU seconds, rank {rank(made)}")
            print(table(made), flush=True)
            ends.setdefault(row, []).append(cells(made)[-1])
    print("\nafter the last batch, mean over seeds")
    for row, own in ends.items():
        means = [mean([each[place] for each in own]) for place in range(2, len(COLUMNS))]
        told = ", ".join(f"{name} {value}" for name, value in zip(COLUMNS[2:], means, strict=True))
        print(f"{row}: {told} ({len(own)} seeds)")
    disk.write_rows(args.output / "ends.jsonl", [{"row": row, "ends": json.dumps(own)} for row, own in ends.items()])


def cells(made: StreamResult) -> list[list[str]]:
    """Return a row of texts per batch, as the command prints it."""
    judge = stream_page.judged_by(made.stream)
    return [[batch.folder, *stream_page.cells(batch, judge)] for batch in made.stream.batches]


def table(made: StreamResult) -> str:
    """Return the rows of a stream in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells(made)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rank(made: StreamResult) -> int | str:
    """Return the rank of the last product, if that is an adapter."""
    file = made.product / "adapter_config.json"
    return int(disk.read_json(file)["r"]) if file.is_file() else "none"


def mean(values: Sequence[str]) -> str:
    """Return the mean of numbers that were printed; a dash if one is missing."""
    return "–" if "–" in values else f"{statistics.fmean(map(float, values)):.3g}"


if __name__ == "__main__":
    main()
