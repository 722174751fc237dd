"""A base of 111 M parameters that holds 3,000 facts, made from scratch, and the methods compared on it.

    python bench/gpu/study.py --facts ../shared/data/counterfact.json --output runs/gpu-study
    python bench/gpu/study.py --facts ../shared/data/counterfact.json --shape tiny --output runs/tiny

On a GPU where there is one. Resumable: the base is kept in the cache, cells that are done are not done again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from forgetlearn.compare import CompareSettings, fill
from forgetlearn.comparison import verdict
from forgetlearn.config import load_config
from forgetlearn.disk import read_json
from forgetlearn.facts import read_facts
from forgetlearn.lab import LabSettings, build_lab
from forgetlearn.settings import validate
from forgetlearn.table import write_table

SHAPES = {
    "111m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "vocab_size": 16000,
        "learning_rate": 5e-4,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 800, "epochs": 10},
}
COMPARED = {
    "111m": {"methods": ["ft", "lora", "f-ft", "f-lora", "f-lora-ft"], "coefs": [0.3, 1.0], "seeds": [0, 1, 2]},
    "tiny": {"methods": ["ft", "f-ft"], "coefs": [1.0], "seeds": [0]},
}
LIMIT = {"111m": 3000, "tiny": 24}
UPDATE = {"111m": {"forget.learning_rate": 1e-4, "learn.learning_rate": 1e-4}, "tiny": {}}
QUICK = {"forget.epochs": 1, "learn.epochs": 1, "evaluate.protocols": ["token"], "forget.only_known": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="111m")
    parser.add_argument("--limit", type=int, help="facts; default 3,000, tiny: 24")
    parser.add_argument("--methods", help="separated by commas")
    parser.add_argument("--coefs", help="separated by commas")
    parser.add_argument("--seeds", help="separated by commas")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    whole = read_facts(args.facts)
    limit = args.limit or LIMIT[args.shape]
    facts = replace(whole, facts=whole.facts[:limit])
    start = time.perf_counter()
    vocabulary_from = facts if args.shape == "tiny" else whole
    base = build_lab(facts, LabSettings(**SHAPES[args.shape]), vocabulary_from=vocabulary_from, device="auto")
    built = read_json(base / "lab.json")
    print(f"{base}: {built['parameters']:,} parameters, holds {built['held']}, {time.perf_counter() - start:.0f} s")
    settings = UPDATE[args.shape] | (QUICK if args.shape == "tiny" else {})
    config = load_config(base / "update.yaml", settings)
    named = {name: getattr(args, name).split(",") for name in ("methods", "coefs", "seeds") if getattr(args, name)}
    wanted = validate(CompareSettings, COMPARED[args.shape] | named)
    fill(base, base / "facts.jsonl", wanted, config, output=args.output, resume=args.output.exists())
    print(verdict(write_table(args.output))[0])
    print(f"{args.output / 'compare.md'}, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
