"""Measure what fine-tuning on old answers and fine-tuning on new answers have in common, for each part of the model.

    python bench/study_overlap.py ../shared/data [--only confirm] [--seeds 0,1,2] [--config FILE] [--output FILE.md]

For each base of the study's config, both task vectors start from the base itself, and use the same seed, all its facts
and its settings (for the new answers, the largest number of epochs of the part). Reported are their lengths relative to
the base, their cosine, and the multiple of the old vector that the new one contains, <new, old> / <old, old>. If
learning adds the same to the forgotten weights as to the base, forgetting with this coefficient removes everything that
the two vectors share.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from forgetlearn import load_model
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.config.stages import stage_seed
from forgetlearn.facts import FactSet
from forgetlearn.method import core
from forgetlearn.models import modules
from forgetlearn.storage import disk
from forgetlearn.weights import task_vector
from study import ROOT, bases_of, lab_of, named, read_study

PARTS = ("embeddings", "head", "attention", "mlp", "norms")
HEAD = "| base | part | numbers | old, % of base | new, % of base | cosine | new in units of old |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the files of facts")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "study" / "study.yaml")
    parser.add_argument("--only", default="confirm", help="bases whose name holds this")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/study/overlap.md"))
    args = parser.parse_args()
    study = read_study(args.config)
    wanted = named(list(bases_of(study)), args.only)
    if not wanted:
        parser.error(f"--only {args.only}: no base of {args.config} has this in its name")
    lines = [HEAD, "|---|---|" + "---:|" * 5]
    print("\n".join(lines))
    for base in wanted:
        part = study["parts"][base.part]
        folder, facts = lab_of(base, args.data)
        epochs = {"learn.epochs": max(part["compare"]["epochs"])}
        config = load_config(folder / "update.yaml", study["update"] | part["update"] | epochs)
        seen = [dict(shares(folder, facts, config, int(seed))) for seed in args.seeds.split(",")]
        for name in seen[0]:
            print(line := _line(base.name, name, torch.stack([own[name] for own in seen])), flush=True)
            lines.append(line)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    disk.write_text(args.output, "\n".join(lines) + "\n")


def shares(folder: Path, facts: FactSet, config: RunConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each part of the model, and five numbers: its size, both lengths, their cosine, and new in units of old."""
    lm = load_model(folder)
    lm.to_float32()
    base = task_vector.snapshot(lm.model)
    core.tune_on_old(lm, facts, config.forgetting, "all weights", seed=stage_seed(seed, "forget"))
    old = task_vector.snapshot(lm.model)
    task_vector.load_into(lm.model, base)
    core.learn(lm, facts, config.learning, "all weights", seed=stage_seed(seed, "learn"))
    new = task_vector.snapshot(lm.model)
    old_texts = [(fact.prompt, fact.ground_truth or "") for fact in facts]
    told = core.tokens_of(lm, old_texts + [(fact.prompt, fact.target_new) for fact in facts], "facts")
    answers = core.tokens_of(lm, old_texts, "answers")
    for name, where in _places(modules.groups(lm.model), base, answers, told).items():
        start, *moved = (
            torch.cat([weights[key][rows].double().flatten() for key, rows in where.items()])
            for weights in (base, old, new)
        )
        one, two = (weights - start for weights in moved)
        along, length = torch.dot(one, two), torch.linalg.vector_norm
        yield (
            name,
            torch.stack(
                [
                    torch.tensor(len(start)).double(),
                    *(length(vector) / length(start) for vector in (one, two)),
                    along / length(one) / length(two),
                    along / length(one) ** 2,
                ]
            ),
        )


def _places(
    groups: Mapping[str, list[str]], base: Mapping[str, Tensor], answers: set[int], told: set[int]
) -> dict[str, dict[str, Tensor | slice]]:
    """Return the weights and rows of each part. The head is also split by rows: old answers, others, in no fact."""
    found: dict[str, dict[str, Tensor | slice]] = {
        part: dict.fromkeys(groups[part], slice(None))
        for part in PARTS
        if part in groups and not (part == "embeddings" and groups[part] == groups["head"])
    }
    head = groups["head"][0]
    others, idle = torch.ones(2, len(base[head]), dtype=torch.bool)
    others[sorted(answers)] = False
    idle[sorted(told)] = False
    rows = {"old answers": ~others, "others": others, "in no fact": idle}
    return found | {f"head: {name}": {head: which} for name, which in rows.items()}


def _line(base: str, part: str, seen: Tensor) -> str:
    """Return a row of the table from numbers (S, 5): means and standard deviations over the seeds."""
    spread = seen.std(0) if len(seen) > 1 else torch.zeros(5)
    scales = (100, 100, 1, 1)
    cells = [
        f"{scale * mean:.2f} ± {scale * sd:.2f}"
        for scale, mean, sd in zip(scales, seen.mean(0)[1:], spread[1:], strict=True)
    ]
    return f"| {base} | {part} | {int(seen[0, 0]):,} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
