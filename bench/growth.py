"""Measure how time and memory grow with the number of facts, for scoring and for one epoch of training.

    OMP_NUM_THREADS=1 python bench/growth.py --facts ../shared/data/zsre.json --counts 280,2800

Each count and each part runs in a fresh process with one thread. It measures CPU seconds, and how far the peak of
resident memory rises above its value after loading the facts, the tokenizer and the model. Every process loads the
facts of the largest count, so that only the work differs. Scoring uses a run's defaults, including free answers of at
most 32 tokens. The last line is the larger of the two ratios of time.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import AS_THE_COMMAND, ZSRE, machine, reset_peak, resident, small_llama, tokenizer_of
from forgetlearn.config.schema import EvaluateSettings, StageSettings
from forgetlearn.evaluation.scoring import score
from forgetlearn.facts import read_facts
from forgetlearn.models.language_model import wrap
from forgetlearn.training.finetune import finetune

PARTS = ("scoring", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, default=ZSRE)
    parser.add_argument("--counts", default="280,2800")
    parser.add_argument("--protocols", default=",".join(EvaluateSettings().protocols))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--alone", help="PART:COUNT, run in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = [int(count) for count in args.counts.split(",")]
    if args.alone:
        part, _colon, count = args.alone.partition(":")
        print(json.dumps(run_alone(part, int(count), max(counts), args)))
        return
    print(machine())
    print(f"{'':10}{'facts':>8}{'CPU s':>9}{'ms / fact':>11}{'loaded MB':>11}{'more MB':>9}")
    ratios = []
    for part in args.parts.split(","):
        seconds = []
        for count in counts:
            told = in_own_process(part, count, args)
            seconds.append(told["cpu_s"])
            print(
                f"{part:10}{count:8}{told['cpu_s']:9.2f}{1000 * told['cpu_s'] / count:11.2f}"
                f"{told['loaded_mb']:11.0f}{told['more_mb']:9.0f}",
                flush=True,
            )
        ratios.append(seconds[-1] / seconds[0])
        print(f"{part}: {counts[-1] / counts[0]:.0f} times the facts, {ratios[-1]:.2f} times the time")
    print(f"ratio {max(ratios):.2f}")


def in_own_process(part: str, count: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--facts", str(args.facts), "--counts", args.counts]
    command += ["--protocols", args.protocols, "--alone", f"{part}:{count}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=AS_THE_COMMAND)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def run_alone(part: str, count: int, most: int, args: argparse.Namespace) -> dict[str, float]:
    facts = list(read_facts(args.facts, limit=most))
    if len(facts) < most:
        raise SystemExit(f"{args.facts}: {len(facts)} usable facts, {most} are wanted. Lower --counts.")
    lm = wrap(small_llama(tokenizer := tokenizer_of(read_facts(args.facts))), tokenizer)
    chosen = facts[:count]

    def scoring() -> object:
        settings = EvaluateSettings(protocols=tuple(args.protocols.split(",")))
        return score(lm, chosen, phase="base", settings=settings)

    def training() -> object:
        texts = [lm.encoder.encode(fact.prompt, fact.target_new, end=True) for fact in chosen]
        stage = StageSettings(epochs=1, batch_size=32)
        return finetune(lm.model, texts, stage, seed=0, pad_id=lm.pad_id, device=lm.device)

    return measured({"scoring": scoring, "training": training}[part])


def measured(work: Callable[[], object]) -> dict[str, float]:
    gc.collect()
    reset_peak()
    loaded, start = resident("VmRSS"), time.process_time()
    result = work()
    seconds = time.process_time() - start
    del result
    return {"cpu_s": seconds, "loaded_mb": loaded, "more_mb": resident("VmHWM") - loaded}


if __name__ == "__main__":
    main()
