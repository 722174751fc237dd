"""Compare one epoch of forgetlearn.training.finetune with TRL's SFTTrainer, a plain Trainer, and a floor.

    python bench/training.py --facts ../shared/data/zsre.json --limit 960 --pairs 3

All sides train all weights in float32 on prompts and new answers, with the loss on the answer only, in batches of 32 in
random order, with one thread. They draw the same batches and must end at the same loss. The unit is CPU milliseconds
per step, including set-up. SFTTrainer "as it comes" sets only the rate, the seed and float32, so it uses activation
checkpointing, which computes activations twice. Its padding_free mode runs without checkpointing. The floor runs
forward, backward, clipping and fused AdamW without Trainer, on the same packed rows, made beforehand, with the same
attention. It is also run without clipping and AdamW. TRL's sides are left out if TRL is not installed (pip install
'forgetlearn[bench]'), or with --without-trl. The last line is the ratio.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback

from common import arguments, machine, paired, ratio, resident, small_llama, spread, tokenizer_of
from forgetlearn.config.schema import StageSettings
from forgetlearn.facts import read_facts
from forgetlearn.models.batches import IGNORE, Batch, answer_logits, by_text, computing, pack, rows_for_training
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.training.finetune import finetune

STAGE = StageSettings(epochs=1, batch_size=32, learning_rate=1e-3, lr_scheduler_type="linear")
PADDED, OURS, FLOOR = "Trainer, right-padded, full logits", "forgetlearn.training.finetune", "floor: bare steps, packed"
BARER = "forward and backward alone, packed"
TRL, TRL_FREE = "TRL SFTTrainer, as it comes", "TRL padding_free, no checkpointing"
HAS_TRL = importlib.util.find_spec("trl") is not None
CPU = torch.device("cpu")


class Bench:
    """Runs the same epoch in several ways. Each writes its mean loss per step to `loss`."""

    def __init__(self, facts_file: Path, limit: int, with_trl: bool) -> None:
        self.with_trl = with_trl
        torch.set_num_threads(1)
        self.tokenizer = tokenizer_of(read_facts(facts_file))
        self.model = small_llama(self.tokenizer)
        self.start = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        encoder = Encoder(self.tokenizer, "plain")
        facts = read_facts(facts_file, limit=limit)
        self.texts = [encoder.encode(fact.prompt, fact.target_new, end=True) for fact in facts]
        self.n_steps = STAGE.epochs * math.ceil(len(self.texts) / STAGE.batch_size)
        self.batches: list[list[Encoded]] = []
        self.loss: dict[str, float] = {}

    def variants(self) -> dict[str, Callable[[], Callable[[], None]]]:
        trl = {TRL: lambda: self.trl(TRL), TRL_FREE: lambda: self.trl(TRL_FREE)} if self.with_trl else {}
        return {**trl, PADDED: self.padded, OURS: self.ours, FLOOR: self.floor, BARER: lambda: self.floor(False)}

    def _reset(self) -> None:
        self.model.load_state_dict(self.start)
        self.model.train()

    def padded(self) -> Callable[[], None]:
        """Return a run as a user of transformers would write it, with IGNORE as the label outside the answer."""
        self._reset()
        self.batches = []

        def collate(texts: list[Encoded]) -> dict[str, torch.Tensor]:
            self.batches.append(texts)
            width = max(len(text.ids) for text in texts)
            rows = [(text.ids, width - len(text.ids), text.n_prompt_tokens) for text in texts]
            pad = self.tokenizer.pad_token_id
            return {
                "input_ids": torch.tensor([[*ids, *[pad] * n] for ids, n, _ in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for ids, n, _ in rows]),
                "labels": torch.tensor([[IGNORE] * k + list(ids[k:]) + [IGNORE] * n for ids, n, k in rows]),
            }

        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                training = TrainingArguments(
                    **self._common(folder), dataloader_pin_memory=False, remove_unused_columns=False
                )
                trainer = Trainer(model=self.model, args=training, train_dataset=self.texts, data_collator=collate)
                trainer.remove_callback(PrinterCallback)
                self.loss[PADDED] = trainer.train().training_loss

        return run

    def trl(self, name: str) -> Callable[[], None]:
        """Return a run of SFTTrainer on token ids with a mask of the completion."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        model = small_llama(self.tokenizer)  # its own: SFTTrainer patches `forward` and leaves it so
        model.load_state_dict(self.start)
        rows = [
            {
                "input_ids": list(text.ids),
                "completion_mask": [0] * text.n_prompt_tokens + [1] * len(text.answer_ids),
            }
            for text in self.texts
        ]
        data = Dataset.from_list(rows)
        fast: dict[str, Any] = {"padding_free": True, "max_length": None, "gradient_checkpointing": False}

        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                config = SFTConfig(
                    **self._common(folder),
                    bf16=False,
                    completion_only_loss=True,
                    **(fast if name == TRL_FREE else {}),
                )
                trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=self.tokenizer)
                trainer.remove_callback(PrinterCallback)
                self.loss[name] = trainer.train().training_loss

        return run

    def _common(self, folder: str) -> dict[str, Any]:
        """Return the arguments that all trainers share."""
        return {
            "output_dir": folder,
            "num_train_epochs": STAGE.epochs,
            "learning_rate": STAGE.learning_rate,
            "per_device_train_batch_size": STAGE.batch_size,
            "warmup_steps": self._warmup(),
            "seed": 0,
            "data_seed": 0,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }

    def ours(self) -> Callable[[], None]:
        self._reset()

        def run() -> None:
            log = finetune(self.model, self.texts, STAGE, seed=0, pad_id=self.tokenizer.pad_token_id, device=CPU)
            assert log.batching() == {"layout": "packed", "attention": "sdpa, text by text"}, log.batching()
            self.loss[OURS] = statistics.mean(step["loss"] for step in log.steps)

        return run

    def floor(self, updates: bool = True) -> Callable[[], None]:
        """Return a run of only the arithmetic of these steps, on the batches that Trainer drew.

        Without updates no weight changes, so there is no loss to compare.
        """
        self._reset()
        rows = [by_text(pack(texts)) for texts in self.batches]

        def run() -> None:
            pad = self.tokenizer.pad_token_id
            with rows_for_training(self.model, self.texts, "packed", pad, CPU), computing(self.model, CPU):
                loss = self._bare_steps(rows, updates)
            if updates:
                self.loss[FLOOR] = loss

        return run

    def _bare_steps(self, rows: list[Batch], updates: bool) -> float:
        """Mean loss of one step per row."""
        weights = list(self.model.parameters())
        rate, betas = STAGE.learning_rate, (STAGE.adam_beta1, STAGE.adam_beta2)
        optimizer = torch.optim.AdamW(weights, lr=rate, betas=betas, weight_decay=0.0, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, self._warmup(), self.n_steps)
        losses = []
        for row in rows:
            logits = answer_logits(self.model, row.inputs, row.positions)[0]
            loss = functional.cross_entropy(logits, row.labels[0])
            loss.backward()
            if updates:
                torch.nn.utils.clip_grad_norm_(weights, STAGE.max_grad_norm)
                optimizer.step()
                schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def _warmup(self) -> int:
        return int(STAGE.warmup_ratio * self.n_steps)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], limit=960, pairs=3)
    parser.add_argument(
        "--alone", choices=(TRL, TRL_FREE, PADDED, OURS, FLOOR, BARER), help="run one once and print its peak memory"
    )
    parser.add_argument("--without-trl", action="store_true", help="leave TRL's sides out, though it is installed")
    args = parser.parse_args()
    with_trl = HAS_TRL and not args.without_trl
    bench = Bench(args.facts, args.limit, with_trl or str(args.alone).startswith("TRL"))
    if args.alone:
        print(f"{run_alone(bench, args.alone):.0f}")
        return
    for variant in bench.variants().values():  # once before timing, and for the losses
        variant()()
    losses = dict(bench.loss)
    apart = max(losses.values()) - min(losses.values())
    assert apart < 1e-3, f"the losses are not equal: {losses}"
    times = paired(bench.variants(), args.pairs)

    lengths = [len(text.ids) for text in bench.texts]
    answers = sum(len(text.answer_ids) for text in bench.texts)
    padded = sum(len(texts) * max(len(text.ids) for text in texts) for texts in bench.batches)
    print(machine())
    print(
        f"{len(bench.texts)} facts, {bench.n_steps} steps of {STAGE.batch_size}; {statistics.mean(lengths):.1f} tokens "
        f"a text, {100 * answers / sum(lengths):.0f} % of them answer; random batches are "
        f"{100 - 100 * sum(lengths) / padded:.0f} % padding; "
        f"{sum(p.numel() for p in bench.model.parameters()):,} parameters; {args.pairs} rounds"
    )
    print(f"{'':36}{'CPU ms / step':>14}{'peak RSS MB':>13}{'mean loss':>11}")
    for name, seconds in times.items():
        median = 1000 * statistics.median(seconds) / bench.n_steps
        loss = f"{losses[name]:11.5f}" if name in losses else ""
        print(f"{name:36}{median:14.0f}{peak_rss(args.facts, args.limit, name):13.0f}{loss}")
    print(f"losses are within {apart:.1e}")
    if not HAS_TRL:
        print("TRL is not installed, so it is not measured: pip install 'forgetlearn[bench]'")
    print(f"forgetlearn / floor: {spread(times[OURS], times[FLOOR])}")
    print(f"forgetlearn / {BARER}: {spread(times[OURS], times[BARER])}")
    for name in set(times) - {OURS, FLOOR, BARER}:
        print(f"{name} / forgetlearn: {spread(times[name], times[OURS])}")
    print(f"ratio {ratio(times[TRL if with_trl else PADDED], times[OURS]):.2f}")


def peak_rss(facts_file: Path, limit: int, name: str) -> float:
    """Peak resident memory in MB of a fresh process that runs one variant."""
    command = [sys.executable, __file__, "--facts", str(facts_file), "--limit", str(limit), "--alone", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def run_alone(bench: Bench, name: str) -> float:
    """Run one variant and nothing else in this process, and return its peak resident memory in MB."""
    if name in (FLOOR, BARER):  # which draw no batches themselves: in the order of the file, of the same size
        size = STAGE.batch_size
        bench.batches = [bench.texts[start : start + size] for start in range(0, len(bench.texts), size)]
    bench.variants()[name]()()
    # Not getrusage: its maximum includes the parent, from before this program was loaded.
    return resident("VmHWM") * 1e6 / 2**20


if __name__ == "__main__":
    main()
