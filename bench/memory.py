"""Compare the peak memory of f-ft with that of weights, gradients and two optimiser states, on a random Llama.

    python bench/memory.py --facts ../shared/data/zsre.json [--limit 64] [--pairs 3]

The Llama is the one of planned.py: 59 M parameters, float32. f-ft is measured without scores and without a run folder:
fine-tuning on the old answers, subtraction and learning, with one epoch of batches of 8 in each stage. The floor is the
least memory that such training needs. It is computed (16 bytes per parameter) and measured (the same model, a gradient
for each weight and one step of fused AdamW). Each side runs in a fresh process on the CPU with one thread. Its memory
is the peak of its resident set minus the resident set after the imports. The last line is the ratio of f-ft to the 16
bytes, as the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common import AS_THE_COMMAND, arguments, machine, random_llama, reset_peak, resident
from forgetlearn.config.schema import load_config
from forgetlearn.facts import Fact, read_facts
from forgetlearn.method.core import forget, learn
from forgetlearn.models.language_model import load_model
from planned import SETTINGS

BARE, METHOD = "bare: model, gradients, AdamW", "f-ft: forget and learn"
BYTES_A_PARAMETER = 16  # weight, gradient and two averages of the optimiser, in float32


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=64, pairs=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--alone", choices=(BARE, METHOD), help="run this once and print its memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.alone:
        print(json.dumps(run_alone(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_llama(args.facts, Path(folder) / "model")
        rounds = [{name: measured(args, model, name) for name in (BARE, METHOD)} for _ in range(args.pairs)]
    n_parameters = rounds[0][BARE]["n_parameters"]
    least = BYTES_A_PARAMETER * n_parameters / 1e6
    print(machine())
    print(f"{n_parameters:,.0f} parameters, {args.limit} facts, {args.pairs} rounds; MB of 1e6 bytes, imports left out")
    print(f"{'weights + gradients + two states':34}{least:8.0f}")
    for name in (BARE, METHOD):
        print(f"{name:34}{statistics.median(each[name]['mb'] for each in rounds):8.0f}")
    ratios = [each[METHOD]["mb"] / least for each in rounds]
    to_bare = statistics.median(each[METHOD]["mb"] / each[BARE]["mb"] for each in rounds)
    print(f"f-ft / bare as measured: {to_bare:.2f}")
    print(f"rounds {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"ratio {statistics.median(ratios):.2f}")


def measured(args: argparse.Namespace, model: Path, name: str) -> dict[str, float]:
    """Return the memory and the number of parameters of one side, measured in a fresh process."""
    own = ["--facts", str(args.facts), "--limit", str(args.limit), "--model", str(model), "--alone", name]
    command = [sys.executable, __file__, *own]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=AS_THE_COMMAND)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_alone(args: argparse.Namespace) -> dict[str, float]:
    """Return the peak memory of this process, which does nothing else, minus the memory of its imports."""
    facts = list(read_facts(args.facts, limit=args.limit))
    reset_peak()
    before = resident("VmRSS")
    n_parameters = bare(args.model) if args.alone == BARE else f_ft(args, facts)
    return {"mb": resident("VmHWM") - before, "n_parameters": n_parameters}


def bare(model_folder: Path) -> int:
    """Run one step of AdamW with made-up gradients; return the model's number of parameters."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    torch.optim.AdamW(weights, fused=True).step()
    return sum(weight.numel() for weight in weights)


def f_ft(args: argparse.Namespace, facts: list[Fact]) -> int:
    """Make a model forget and learn; return its number of parameters."""
    config = load_config(None, {"method": "f-ft", "model.name": str(args.model), **SETTINGS})
    lm = load_model(config.model)
    forget(lm, facts, config.forgetting, "all weights")
    learn(lm, facts, config.learning, "all weights")
    return sum(weight.numel() for weight in lm.model.parameters())


if __name__ == "__main__":
    main()
