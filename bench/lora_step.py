"""Compare steps of fine-tuning a real chat model: forgetlearn, TRL's SFTTrainer (with peft), and a bare loop.

    OMP_NUM_THREADS=1 python bench/lora_step.py MODEL --facts ../shared/data/zsre.json --limit 96 --pairs 3

MODEL is the folder of a chat model. All sides train on the same prompts and new answers in its chat template, in the
same batches of 8, with the loss on the answer alone, from the same adapter, and must end at the same loss within 2 %
(bfloat16 rounds). One thread. The unit is CPU milliseconds per optimiser step, the median over the steps of a run, so
that set-up does not count; `run` has the whole, set-up included.

TRL "as it comes" sets only the rate, the schedule, the seed and float32 or bfloat16: it checkpoints activations. The
floor is forward, backward, clipping and fused AdamW without Trainer, on the same rows, made beforehand, with the same
products and attention. `packed, peft` is the same loop on rows that share nothing, with peft's and transformers' own
products and sdpa. The last lines are the ratios.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import get_constant_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback

from common import arguments, machine, resident, spread
from forgetlearn.config.schema import LoraSettings, ModelSettings, StageSettings
from forgetlearn.facts import read_facts
from forgetlearn.models import attention, lora
from forgetlearn.models.batches import answer_logits, computing, row_by_text, row_inputs, rows_for_training
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import load_model
from forgetlearn.models.lora_products import fused_adapters
from forgetlearn.training.finetune import finetune
from forgetlearn.training.precision import row_multiple
from forgetlearn.training.trainer import Collator

What = Literal["lora", "all weights"]
Dtype = Literal["float32", "bfloat16"]
OURS, FLOOR, BARE = "forgetlearn", "floor: bare steps", "bare steps, packed, peft"
TRL, TRL_FREE = "TRL SFTTrainer, as it comes", "TRL padding_free, no checkpointing"
CPU = torch.device("cpu")


class Bench:
    """Runs the same epoch in several ways. Each run returns its seconds per step and its losses."""

    def __init__(self, folder: str, facts_file: Path, limit: int, batch: int) -> None:
        torch.set_num_threads(1)
        self.lm = load_model(ModelSettings(name=folder, dtype="float32", prompt_template="chat"))
        encoder = self.lm.encoder
        facts = read_facts(facts_file, limit=limit)
        self.texts = [encoder.encode(fact.prompt, fact.target_new, end=True) for fact in facts]
        self.stage = StageSettings(epochs=1, batch_size=batch, warmup_ratio=0.0)
        self.batches = list(_batches(self.texts, batch))
        self.losses: dict[str, list[float]] = {}

    def model(self, what: What, dtype: Dtype) -> nn.Module:
        """Return a copy of the model for a run; with LoRA, with a new adapter on a base in this dtype."""
        model = copy.deepcopy(self.lm.model)
        if what == "all weights":
            return model
        if dtype == "bfloat16":
            model.to(torch.bfloat16)
        return lora.attach(model, LoraSettings(), lora.LEARN, 0)

    def rate(self, what: What) -> float:
        width = self.lm.model.config.hidden_size
        return self.stage.lora_rate(width) if what == "lora" else self.stage.rate(width)

    def ours(self, what: What, dtype: Dtype) -> Callable[[], list[float]]:
        model = self.model(what, "float32")
        stage = self.stage.model_copy(update={"learning_rate": self.rate(what), "dtype": dtype})

        def run() -> list[float]:
            log = finetune(model, self.texts, stage, seed=0, pad_id=self.lm.pad_id, device=CPU)
            return [step["loss"] for step in log.steps]

        return run

    def trl(self, what: What, dtype: Dtype, free: bool) -> Callable[[], list[float]]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        model = self.model(what, "float32")
        rows = [
            {"input_ids": list(t.ids), "completion_mask": [0] * t.n_prompt_tokens + [1] * len(t.answer_ids)}
            for t in self.texts
        ]
        fast: dict[str, Any] = {"padding_free": True, "max_length": None, "gradient_checkpointing": False}

        def run() -> list[float]:
            with tempfile.TemporaryDirectory() as folder:
                config = SFTConfig(
                    output_dir=folder,
                    num_train_epochs=1,
                    learning_rate=self.rate(what),
                    lr_scheduler_type="constant_with_warmup",
                    per_device_train_batch_size=self.stage.batch_size,
                    seed=0,
                    data_seed=0,
                    save_strategy="no",
                    logging_steps=1,
                    use_cpu=True,
                    disable_tqdm=True,
                    report_to="none",
                    bf16=dtype == "bfloat16",
                    completion_only_loss=True,
                    **(fast if free else {}),
                )
                data = Dataset.from_list(rows)
                trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=self.lm.tokenizer)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]

        return run

    def floor(self, what: What, dtype: Dtype, bare: bool = False) -> Callable[[], list[float]]:
        model = self.model(what, dtype)

        def run() -> list[float]:
            if bare:
                with attention.by_text(model), self.precision(what, dtype):
                    return self.bare_steps(model, what, [self.packed(texts) for texts in self.batches])
            with (
                rows_for_training(model, self.texts, "packed", self.lm.pad_id, CPU) as (layout, is_by_text),
                computing(model, CPU),
                fused_adapters(),
                self.precision(what, dtype),
            ):
                multiple = row_multiple(model, self.stage.model_copy(update={"dtype": dtype}))
                collator = Collator(layout, self.lm.pad_id, is_by_text, multiple=multiple)
                return self.bare_steps(model, what, [collator._part(texts) for texts in self.batches])

        return run

    @staticmethod
    def packed(texts: list[Encoded]) -> dict[str, torch.Tensor]:
        row = row_by_text(texts, "packed")
        return {**row_inputs(row), "positions": row.positions}

    @staticmethod
    def precision(what: What, dtype: Dtype) -> Any:
        autocasts = what == "all weights" and dtype == "bfloat16"
        return torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext()

    def bare_steps(self, model: nn.Module, what: What, parts: list[dict[str, torch.Tensor]]) -> list[float]:
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        betas = (self.stage.adam_beta1, self.stage.adam_beta2)
        optimizer = torch.optim.AdamW(weights, lr=self.rate(what), betas=betas, weight_decay=0.0, fused=True)
        schedule = get_constant_schedule_with_warmup(optimizer, 0)
        losses = []
        for part, texts in zip(parts, self.batches, strict=True):
            inputs = {name: value for name, value in part.items() if name not in ("positions", "places")}
            logits = answer_logits(model, inputs, part["positions"]).flatten(0, 1)
            if "places" in part:
                logits = logits.index_select(0, part["places"])
            labels = torch.tensor([token for text in texts for token in text.answer_ids])
            loss = functional.cross_entropy(logits.float(), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, self.stage.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def variants(self, what: What, dtype: Dtype, with_trl: bool) -> dict[str, Callable[[], Callable[[], list[float]]]]:
        trl = {
            TRL: lambda: self.trl(what, dtype, False),
            TRL_FREE: lambda: self.trl(what, dtype, True),
        }
        return {
            OURS: lambda: self.ours(what, dtype),
            FLOOR: lambda: self.floor(what, dtype),
            **(trl if with_trl else {}),
            BARE: lambda: self.floor(what, dtype, bare=True),
        }


def _batches(texts: list[Encoded], size: int) -> Iterator[list[Encoded]]:
    """The batches that Trainer and forgetlearn draw with seed 0."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), size):
        yield [texts[index] for index in order[start : start + size]]


@contextmanager
def steps_timed() -> Iterator[list[float]]:
    """Yield a list that gets the CPU seconds at which each optimiser step ends."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    try:
        yield ends
    finally:
        hook.remove()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=96, pairs=3)
    parser.add_argument("model", help="folder of a chat model")
    parser.add_argument("--batch", type=int, default=8, help="texts in a step")
    parser.add_argument("--what", choices=("lora", "all weights"), action="append", help="what is trained (both)")
    parser.add_argument("--only", action="append", help="sides to run, by the beginnings of their names")
    parser.add_argument("--without-trl", action="store_true")
    args: argparse.Namespace = parser.parse_args()
    with_trl = importlib.util.find_spec("trl") is not None and not args.without_trl
    bench = Bench(args.model, args.facts, args.limit, args.batch)
    whats: list[What] = args.what or ["lora", "all weights"]
    steps: dict[tuple[str, str, str], list[float]] = {}
    wholes: dict[tuple[str, str, str], list[float]] = {}
    losses: dict[tuple[str, str, str], float] = {}
    cases = [
        (what, dtype, name, prepare)
        for what in whats
        for dtype in ("float32", "bfloat16")
        for name, prepare in bench.variants(what, dtype, with_trl).items()
        if not args.only or name.startswith(tuple(args.only))
    ]
    for number in range(args.pairs):
        for what, dtype, name, prepare in cases if number % 2 == 0 else reversed(cases):
            run = prepare()
            gc.collect()
            with steps_timed() as ends:
                start = time.process_time()
                found = run()
                wholes.setdefault((what, dtype, name), []).append(time.process_time() - start)
            each = [end - before for before, end in pairwise(ends)]
            steps.setdefault((what, dtype, name), []).append(statistics.median(each))
            losses[what, dtype, name] = statistics.mean(found)
            print(f"{what}, {dtype}, {name}: {1000 * statistics.median(each):.0f} ms", file=sys.stderr)
            del run

    lengths = [len(text.ids) for text in bench.texts]
    print(machine())
    print(
        f"{len(lengths)} texts of {statistics.mean(lengths):.1f} tokens, steps of {args.batch}: "
        f"{args.batch * statistics.mean(lengths):.0f} tokens; {args.pairs} rounds; {resident('VmHWM'):.0f} MB"
    )
    print(f"{'':14}{'':10}{'':36}{'CPU ms / step':>14}{'tokens/s':>10}{'run, s':>8}{'mean loss':>11}")
    for (what, dtype, name), each in steps.items():
        median = statistics.median(each)
        print(
            f"{what:14}{dtype:10}{name:36}{1000 * median:14.0f}{args.batch * statistics.mean(lengths) / median:10.0f}"
            f"{statistics.median(wholes[what, dtype, name]):8.1f}{losses[what, dtype, name]:11.4f}"
        )
    for what in whats:
        own = [losses[key] for key in losses if key[0] == what]
        print(f"{what}: mean losses are within {max(own) - min(own):.1e}")
        assert max(own) - min(own) < 0.02 * max(own), f"the losses are not equal: {losses}"
        for dtype in ("float32", "bfloat16"):
            ours = steps.get((what, dtype, OURS))
            for name in (FLOOR, BARE, TRL_FREE, TRL):
                other = steps.get((what, dtype, name))
                if other and ours and name == FLOOR:
                    print(f"{what}, {dtype}: {OURS} / {name}: {spread(ours, other)}")
                elif other and ours:
                    print(f"{what}, {dtype}: {name} / {OURS}: {spread(other, ours)}")
        halves, whole = (steps.get((what, dtype, OURS)) for dtype in ("bfloat16", "float32"))
        if halves and whole:
            print(f"{what}: {OURS} float32 / bfloat16: {spread(whole, halves)}")


if __name__ == "__main__":
    main()
