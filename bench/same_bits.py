"""Hash the products, rows and scores of fixed runs, so that a refactoring can prove that it changed none of them.

    python bench/same_bits.py --output /tmp/bits --write before.json      on the old code
    python bench/same_bits.py --output /tmp/bits2 --against before.json   on the new code

Runs the commands `lab`, `update` (every method), `compare`, `subtract`, `vector`, `apply --merge` and `demo` on made-up
facts with fixed seeds and one thread. Hashes every tensor, every row of facts.jsonl, every mean of summary.json and the
tables. If anything differs, lists the differences and exits with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

METHODS = ("ft", "lora", "f-ft", "f-lora", "f-lora-ft", "locft", "ft-c", "ga")
QUICK = ["--set", "learn.epochs=2", "--set", "forget.epochs=2", "--limit", "12"]


def run(*words: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "forgetlearn", "--quiet", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensors(file: Path) -> dict[str, str]:
    """Return a hash of each tensor's bytes. The text of the header may change."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: digest(raw[start + t["data_offsets"][0] : start + t["data_offsets"][1]]) for name, t in header.items()
    }


def scores(summary: object) -> object:
    """Return the numbers of a summary, without versions, times and paths."""
    if isinstance(summary, dict):
        return {key: scores(value) for key, value in sorted(summary.items()) if key in KEPT or isinstance(value, dict)}
    return summary


KEPT = {"mean", "n", "errored", "not_asked", "low", "high"}


def found_in(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found[str(file.relative_to(folder))] = tensors(file)
    for file in sorted(folder.rglob("facts.jsonl")):
        found[str(file.relative_to(folder))] = digest(file.read_bytes())
    for file in sorted(folder.rglob("summary.json")):
        phases = json.loads(file.read_text(encoding="utf-8")).get("phases", {})
        found[str(file.relative_to(folder))] = scores(phases)
    for file in sorted(folder.rglob("table.json")):
        found[str(file.relative_to(folder))] = scores(json.loads(file.read_text(encoding="utf-8")))
    return found


def everything(output: Path) -> dict[str, object]:
    shutil.rmtree(output, ignore_errors=True)
    base = output / "base"
    run("lab", "--output", base, "--limit", 40)
    facts = ["--facts", base / "facts.jsonl", "--config", base / "update.yaml"]
    for method in METHODS:
        coef = ["--coef", "0.5"] if method.startswith("f-") else []
        run("update", "--model", base, *facts, "--method", method, *coef, *QUICK, "--output", output / method)
    run("compare", "--model", base, *facts, "--methods", "ft,f-ft,f-lora", "--coefs", "0.3,1", "--seeds", "0,1", *QUICK,
        "--output", output / "compare")  # fmt: skip
    run("update", "--model", base, *facts, "--method", "f-ft", "--coef", "auto", *QUICK, "--output", output / "auto")
    run("subtract", "--base", base, "--tuned", output / "ft/model", "--coef", "0.3", "--output", output / "subtracted")
    run("subtract", "--base", base, "--adapter", output / "lora/adapter", "--coef", "0.3", "--output", output / "less")
    run("vector", "--base", base, "--tuned", output / "ft/model", "--output", output / "vector")
    run("apply", output / "f-lora", "--base", base, "--merge", "--output", output / "merged")
    run("demo", "--limit", 30, "--output", output / "demo")
    return {folder.name: found_in(folder) for folder in sorted(output.iterdir()) if folder.is_dir()}


def flat(value: object, name: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    return {name: value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the runs; replaced.")
    parser.add_argument("--write", type=Path, help="Write the hashes to this file.")
    parser.add_argument("--against", type=Path, help="Compare with a file written before.")
    flags = parser.parse_args()
    now = flat(everything(flags.output))
    if flags.write:
        flags.write.write_text(json.dumps(now, indent=1), encoding="utf-8")
    print(f"{len(now)} hashes and numbers")
    if flags.against:
        before = json.loads(flags.against.read_text(encoding="utf-8"))
        differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        print(f"{len(before)} before, {len(differ)} differ")
        print("\n".join(differ[:20]))
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
