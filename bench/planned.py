"""Compare the planned with the measured peak memory and time of an update, on a lab base and on a random Llama.

    python bench/planned.py --facts ../shared/data/zsre.json [--model DIR] [--methods f-ft,f-lora] [--limit 64]

Without --model, the model is a Llama of 59 M random parameters. Every update runs in a fresh process on the CPU. Its
memory is the peak of its resident set, including Python and libraries. The last line is the worst ratio of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ZSRE, machine, random_llama, reset_peak, resident
from forgetlearn.config.schema import load_config
from forgetlearn.facts import read_facts
from forgetlearn.planning.estimate import GB
from forgetlearn.planning.plan import MEASURE, plan_update
from forgetlearn.runs.update import update

SETTINGS = {
    "forget.epochs": 1,
    "learn.epochs": 1,
    "forget.only_known": False,
    "forget.coef": 0.3,
    "train.answers": "bare",  # the base is asked for nothing to train on
    "train.wordings": False,
    "keep.weight": 0,
    "model.device": "cpu",
    "evaluate.protocols": ["token"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, default=ZSRE)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--methods", default="f-ft,f-lora")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="NAME=JSON, for every update")
    parser.add_argument("--alone", help="run this method once and print what it took")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(run_alone(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or random_llama(args.facts, Path(folder) / "model")
        print(machine())
        print(
            f"{'':10}{'planned MB':>11}{'measured MB':>12}{'ratio':>7}{'planned s':>11}{'measured s':>11}{'ratio':>7}"
        )
        ratios = []
        for method in args.methods.split(","):
            own = ["--alone", method, "--model", str(model), "--facts", str(args.facts), "--limit", str(args.limit)]
            own += [word for setting in args.settings for word in ("--set", setting)]
            done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=True)
            took = json.loads(done.stdout.splitlines()[-1])
            ratios.append(took["planned_mb"] / took["measured_mb"])
            print(
                f"{method:10}{took['planned_mb']:11.0f}{took['measured_mb']:12.0f}{ratios[-1]:7.2f}"
                f"{took['planned_s']:11.1f}{took['measured_s']:11.1f}{took['planned_s'] / took['measured_s']:7.2f}"
            )
    print(f"worst ratio {max(ratios, key=lambda ratio: abs(ratio - 1)):.2f}")


def run_alone(args: argparse.Namespace) -> dict[str, Any]:
    """Return the planned and the measured memory and time of one update, which runs in this process."""
    given = dict(setting.split("=", 1) for setting in args.settings)
    settings = SETTINGS | {name: json.loads(value) for name, value in given.items()}
    config = load_config(None, {"method": args.alone, "model.name": str(args.model), **settings})
    facts = read_facts(args.facts, limit=args.limit)
    plan = plan_update(config, facts, rate=MEASURE)
    reset_peak()  # it would include the measuring of the rate
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        update(args.model, facts, config, output=Path(output) / "run")
    seconds = time.perf_counter() - start
    return {
        "planned_mb": plan.peak_bytes / GB * 1000,
        "measured_mb": resident("VmHWM"),
        "planned_s": plan.seconds,
        "measured_s": seconds,
    }


if __name__ == "__main__":
    main()
