"""A LLaMA-2-7B-shaped model of random weights on one GPU: rates of the stages, scoring, arithmetic, whole updates.

    python bench/gpu/update.py --facts ../shared/data/counterfact.json --output gpu.json
    python bench/gpu/update.py --facts ../shared/data/counterfact.json --shape tiny

One call of under ten minutes: every part has its share of --minutes, and prints its rows when it is done, so that
what is cut off costs its own row alone. A whole update that would not end in time takes fewer facts, and says so.
The memory is planned first (`plan_update`): all weights take the largest micro-batch that fits.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import machine, tokenizer_of
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.evaluation.scoring import score
from forgetlearn.facts import FactSet, read_facts
from forgetlearn.method.core import learn, subtract
from forgetlearn.models.encoding import Encoder
from forgetlearn.models.language_model import LanguageModel, wrap
from forgetlearn.planning.estimate import GB, Plan
from forgetlearn.planning.outline import Outline
from forgetlearn.planning.plan import EFFICIENCY, devices_here, measured_speed, plan_update
from forgetlearn.runs.update import update
from forgetlearn.weights.task_vector import snapshot

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
# Facts: all, of a timed stage, scored, scored one by one. Texts of a step, and seconds that a part may take at most.
SIZES = {"7b": (10000, 2048, 1000, 20), "tiny": (40, 32, 20, 4)}
BATCH = {"7b": 128, "tiny": 8}
SHARE = {"all weights": 0.12, "lora": 0.1, "scoring": 0.12, "arithmetic": 0.08, "f-lora": 0.28, "f-ft": 0.3}


def shape_of(name: str, tokenizer: Any, dtype: torch.dtype) -> LlamaConfig:
    """The config of a model of this shape, with a vocabulary that has room for the tokenizer's."""
    return LlamaConfig(
        vocab_size=max(32000 if name == "7b" else 0, len(tokenizer)),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
        **SHAPES[name],
    )


def random_model(shape: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """A model of random weights, made on the device, in the config's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with device:
            return LlamaForCausalLM(shape)
    finally:
        torch.set_default_dtype(before)


class Bench:
    """The parts; each fills `rows`, name -> value and unit."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        n_facts, self.n_stage, self.n_scored, self.n_alone = SIZES[args.shape]
        self.facts = read_facts(args.facts, limit=args.limit or n_facts)
        self.tokenizer = tokenizer_of(self.facts, 32000)
        self.shape = shape_of(args.shape, self.tokenizer, self.half)
        self.rate = 0.0  # of matrix products, FLOP/s

    def row(self, name: str, value: float | str, unit: str = "") -> None:
        self.rows[name] = {"value": value, "unit": unit}
        shown = f"{value:,.3g}" if isinstance(value, float) else str(value)
        print(f"{name:52} {shown:>14} {unit}", flush=True)

    def clear(self) -> None:
        """Give back what the last part left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def model(self) -> LanguageModel:
        """A fresh one."""
        self.clear()
        return wrap(random_model(self.shape, self.device).eval(), self.tokenizer)

    def config(self, method: str, micro: int | None = None) -> RunConfig:
        size, dtype = BATCH[self.args.shape], "bfloat16" if self.device.type == "cuda" else "float32"
        settings = {"train.micro_batch_size": micro, "train.dtype": dtype}
        settings |= {"forget.batch_size": size, "learn.batch_size": size}
        settings |= {"forget.only_known": False, "forget.coef": 0.3, "method": method}
        settings |= {"train.answers": "bare", "train.wordings": False, "keep.weight": 0}
        settings |= {"evaluate.batch_size": 256, "evaluate.max_new_tokens": 8}
        return load_config(None, settings | {"forget.epochs": self.args.epochs, "learn.epochs": self.args.epochs})

    def fitting(self, method: str, facts: FactSet) -> tuple[RunConfig, Plan] | None:
        """The settings with the largest micro-batch whose plan fits this device; None where none does."""
        self.clear()  # the free memory is what is planned for
        outline = Outline("random weights", self.shape, Encoder(self.tokenizer, "plain"), self.half)
        size = BATCH[self.args.shape]
        for micro in (None, size // 2, size // 4, size // 8):
            config = self.config(method, micro)
            plan = plan_update(config, facts, outline=outline, devices=devices_here(config), rate="1")
            if plan.fits:
                return config, plan
        return None

    def speeds(self) -> None:
        speed = measured_speed(self.device, self.half, seconds=1)
        self.rate = speed.flops / EFFICIENCY
        self.row("matrix products", self.rate / 1e12, "TFLOP/s")
        self.row("copy on the device, read and write", (speed.bandwidth or 0) / GB, "GB/s")

    def stage(self, how: str) -> None:
        """One epoch of learning, timed after a short one."""
        facts = replace(self.facts, facts=self.facts.facts[: self.n_stage])
        chosen = self.fitting("lora" if how == "lora" else "ft", facts)
        if chosen is None:
            return self.row(f"{how}: not measured", "no micro-batch fits this device")
        config, plan = chosen
        settings = config.learning.model_copy(update={"epochs": 1})
        lm = self.model()
        batch = settings.batch_size
        learn(lm, facts.facts[:batch], settings, how)
        if how == "lora":
            lm = self.model()
        seconds = self.timed(lambda: learn(lm, facts.facts, settings, how))
        stage = next(stage for stage in plan.stages if stage.name == "learn")
        passes = config.learn.epochs
        self.row(f"{how}: batch, micro-batch", f"{batch}, {settings.micro_batch_size or batch}", "facts")
        self.row(f"{how}: training", stage.tokens / passes / seconds, "tokens/s")
        self.row(f"{how}: model FLOPs / matrix rate", 100 * (stage.flops or 0) / passes / seconds / self.rate, "%")
        self.row(f"{how}: planned peak", plan.peak_bytes / GB, "GB")
        return self.peak(how)

    def scoring(self) -> None:
        lm, facts = self.model(), self.facts.facts
        settings = self.config("ft").evaluate
        score(lm, facts[:8], phase="warm", settings=settings)
        together = self.timed(lambda: score(lm, facts[: self.n_scored], phase="base", settings=settings))
        alone = settings.model_copy(update={"batch_size": 1})
        single = self.timed(lambda: score(lm, facts[: self.n_alone], phase="base", settings=alone))
        n_scored, n_alone = min(self.n_scored, len(facts)), min(self.n_alone, len(facts))
        self.row("scoring, batches", n_scored / together, "facts/s")
        self.row(f"scoring one by one ({n_alone} facts)", n_alone / single, "facts/s")
        self.row("scoring: batches / one by one", n_scored / together / (n_alone / single), "times")

    def arithmetic(self) -> None:
        """The subtraction in memory: base (on the CPU) and tuned are read, the result is written, in float32."""
        lm = self.model()
        lm.to_float32()
        base = snapshot(lm.model)
        config = self.config("f-ft")
        seconds = self.timed(lambda: subtract(lm, base, (), config.forgetting, "all weights"))
        moved = 3 * 4 * sum(weight.numel() for weight in base.values())
        self.row("subtraction between the stages", moved / seconds / GB, "GB/s")

    def whole(self, method: str) -> None:
        """An update of all facts, or of as many as its share of the time allows."""
        chosen = self.fitting(method, self.facts)
        if chosen is None:
            return self.row(f"{method}: not run", "no micro-batch fits this device")
        config, plan = chosen
        facts = replace(self.facts, facts=self.facts.facts[: self.n_possible(method, plan)])
        lm = self.model()
        with tempfile.TemporaryDirectory(dir=self.args.scratch) as folder:
            free = shutil.disk_usage(folder).free
            if free < sum(plan.disk.values()):
                return self.row(f"{method}: not run", f"{free / GB:.0f} GB of disk are free", "")
            seconds = self.timed(lambda: update(lm, facts, config, output=Path(folder) / "run"))
            manifest = json.loads((Path(folder) / "run" / "manifest.json").read_text())
        self.row(f"{method}: update of {len(facts):,} facts, {self.args.epochs} epoch(s)", seconds, "s")
        for name, stage in manifest["stages"].items():
            self.row(f"{method}: {name}", stage["seconds"], "s")
        return self.peak(method)

    def n_possible(self, method: str, plan: Plan) -> int:
        """Facts whose update should end in its time, going by the rates that were measured before."""
        trained = self.rows.get("lora: training" if method == "f-lora" else "all weights: training")
        scored = self.rows.get("scoring, batches")
        if trained is None or scored is None:
            return len(self.facts) // 10
        tokens = sum(stage.tokens for stage in plan.stages if stage.trained) / len(self.facts)
        each = tokens / trained["value"] + 3 / scored["value"]
        return max(self.n_alone, min(len(self.facts), int(0.8 * self.seconds_of(method) / each)))

    def seconds_of(self, part: str) -> float:
        return 60 * self.args.minutes * SHARE[part]

    def timed(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self, name: str) -> None:
        if self.device.type == "cuda":
            self.row(f"{name}: measured peak", torch.cuda.max_memory_allocated() / GB, "GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--limit", type=int, help="facts; default: 10,000, tiny: 40")
    parser.add_argument("--epochs", type=int, default=1, help="of both stages in the whole updates")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default="", help="parts whose name holds this")
    parser.add_argument("--scratch", type=Path, help="where the run folders go for a while: 60 GB for f-ft")
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    args = parser.parse_args()
    bench = Bench(args)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    print(f"{name}; {machine()}; {len(bench.facts):,} facts, shape {args.shape}")
    bench.speeds()
    parts: dict[str, Callable[[], None]] = {
        "all weights": lambda: bench.stage("all weights"),
        "lora": lambda: bench.stage("lora"),
        "scoring": bench.scoring,
        "arithmetic": bench.arithmetic,
        "f-lora": lambda: bench.whole("f-lora"),
        "f-ft": lambda: bench.whole("f-ft"),
    }
    for part, run in parts.items():
        if args.only in part:
            try:
                with at_most(bench.seconds_of(part)):
                    run()
            except Exception as error:  # a part that fails costs its own rows alone
                bench.row(f"{part}: failed", f"{type(error).__name__}: {str(error).strip()[:100]}")
        if args.output:
            args.output.write_text(json.dumps({"device": name, "machine": machine(), "rows": bench.rows}, indent=2))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when the time is over."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
