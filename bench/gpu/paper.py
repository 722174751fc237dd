"""`forgetlearn paper` at LLaMA-2-7B size on one GPU: the seconds and the peak memory of each part.

    python bench/gpu/paper.py --zsre ../shared/data/zsre.json --scratch DIR --output gpu-paper.json
    python bench/gpu/paper.py --zsre ../shared/data/zsre.json --scratch DIR --model FOLDER

Without --model the weights are random, so only time and memory mean anything; with real weights the page in
DIR/paper does too. The optimiser is the first whose plan fits the device. DIR takes the model, the taught base and the
weights after fine-tuning on the old answers: 70 GB at this size. A part that is cut off by --minutes costs its own row
alone: repeated, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from update import SHAPES, at_most, random_model, shape_of  # puts bench/ on the path

from common import machine, tokenizer_of
from forgetlearn.errors import ForgetLearnError
from forgetlearn.facts import read_facts
from forgetlearn.planning.estimate import GB
from forgetlearn.reproduction.paper import paper
from forgetlearn.reproduction.plan import plan_paper
from forgetlearn.reproduction.settings import ORDER, PaperSettings

OPTIMISERS = ("adamw_torch", "adafactor")
PARTS = tuple(part for part in ORDER if part not in ("table2", "table5"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--zsre", type=Path, required=True)
    parser.add_argument("--counterfact", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of real weights")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the random weights")
    parser.add_argument("--limit", type=int, default=100, help="facts of each file")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}; {machine()}; {args.limit} facts, {args.model or f'random weights, shape {args.shape}'}")
    before = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {"rows": {}}
    found: dict[str, float | str] = before["rows"]
    done = {row.removesuffix(", s") for row in found}
    args.parts = ",".join(part for part in args.parts.split(",") if part not in done)
    for row, value in rows(args, device, found):
        part = row.removesuffix(", s")
        for ending in ("failed", "not begun", "so far, s"):
            found.pop(f"{part}: {ending}", None)  # by an earlier call
        found[row] = value
        print(f"{row:40} {value:,.3g}" if isinstance(value, float) else f"{row:40} {value}", flush=True)
        if args.output:
            args.output.write_text(json.dumps({"device": name, "machine": machine(), "rows": found}, indent=2))


def rows(
    args: argparse.Namespace, device: torch.device, before: Mapping[str, float | str]
) -> Iterator[tuple[str, float | str]]:
    """Yield the plan, then each part with its seconds and its peak memory, until the time is over.

    `before` has the rows of earlier calls: a part that was cut off goes on, and its seconds add up.
    """
    optimiser = before.get("optimiser")
    parts = tuple(part for part in args.parts.split(",") if part)
    ends = time.monotonic() + 60 * args.minutes
    if not parts:
        return

    def seconds_of(part: str) -> float:
        return float(before.get(f"{part}: so far, s", 0))

    asked: dict[str, Any] = {
        "model": args.model or random_folder(args, device),
        "zsre": args.zsre,
        "counterfact": args.counterfact,
        "config": {"facts": {"limit": args.limit}, "model": {} if args.model else {"prompt_template": "plain"}},
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory that is free decides what fits
    for tried in (optimiser,) if optimiser else OPTIMISERS:
        asked["config"]["train"] = {"optim": tried, "dtype": "bfloat16" if device.type == "cuda" else "float32"}
        plan = plan_paper(**asked, settings=PaperSettings(seeds=(0,), only=parts))
        if plan.fits is not False:
            break
    if not optimiser:  # later calls plan what is left
        yield "optimiser", str(tried)
        yield "planned peak, GB", plan.peak_bytes / GB
        yield "planned time, s", plan.seconds or "not known"
    for part in parts:
        left = ends - time.monotonic()
        if left <= 0:
            yield f"{part}: not begun", "the time is over"
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            with at_most(left):
                paper(
                    **asked,
                    settings=PaperSettings(seeds=(0,), only=(part,)),
                    output=args.scratch / "paper",
                    resume=True,
                )
        except (TimeoutError, ForgetLearnError, torch.OutOfMemoryError) as error:
            yield f"{part}: failed", f"{type(error).__name__}: {str(error).strip()[:100]}"
            yield f"{part}: so far, s", seconds_of(part) + time.perf_counter() - began
            continue
        yield f"{part}, s", seconds_of(part) + time.perf_counter() - began
        if device.type == "cuda":
            yield f"{part}: peak, GB", torch.cuda.max_memory_allocated() / GB


def random_folder(args: argparse.Namespace, device: torch.device) -> Path:
    """Return the folder of a model of random weights, and make it if it is not there."""
    folder: Path = args.scratch / f"random-{args.shape}"
    if not (folder / "tokenizer.json").is_file():
        tokenizer = tokenizer_of(read_facts(args.zsre, limit=10000), 32000)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        random_model(shape_of(args.shape, tokenizer, dtype), device).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
