"""Callbacks of Trainer that log a stage, show its progress and ask for checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import distributed
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from forgetlearn.errors import ConfigError, TrainingError
from forgetlearn.runtime import processes, signals

log = logging.getLogger("forgetlearn")

LOGGED = ("loss", "grad_norm", "learning_rate", "tokens")
# Slow checkpoints are written less often, so that they take at most a twentieth of the time.
TIMES_AS_LONG = 20
GO_ON, SAVE, STOP = 0, 1, 2


class Steps(TrainerCallback):  # type: ignore[misc]
    """Records the numbers of every step, shows a progress bar in a terminal, and stops at a loss that is not finite.

    At the end, it logs the stage in one line. After a resume, the rate counts only the steps since then.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.bar = tqdm(disable=True)
        self.began, self.first_step = 0.0, 0

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Restore the rows of the steps before a resume, which Trainer's state keeps."""
        before = [logs for logs in state.log_history if "loss" in logs]
        self.rows, self.seconds = [_row(logs) for logs in before], [logs["seconds"] for logs in before]
        self.began, self.first_step = time.perf_counter(), state.global_step
        if state.global_step:
            log.info("%s: resuming at step %d of %d", self.name, state.global_step, state.max_steps)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=processes.no_bar(),
            leave=False,
        )

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        """Record a step's numbers and show them; raise TrainingError if one is not finite."""
        if "loss" not in logs:
            return
        row = _row({**logs, "step": state.global_step})
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{self.name}, step {state.global_step} of {state.max_steps}: {bad[0]} is {row[bad[0]]}. "
                "Lower the learning rate, or train in float32."
            )
        self.rows.append(row)
        self.seconds.append(logs["seconds"])
        self.bar.update(state.global_step - self.bar.n)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {self._rate():,.0f} tokens/s")

    def on_train_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Log the stage in one line."""
        self.bar.close()
        if state.is_world_process_zero and self.rows:
            steps = f"{state.global_step} steps" + (f" ({self.first_step} resumed)" if self.first_step else "")
            log.info(
                f"{self.name}: {steps}, {self._rate():,.0f} tokens/s, "
                f"loss {final_loss(self.rows):.3f}, {time.perf_counter() - self.began:.1f} s"
            )

    def _rate(self) -> float:
        """Return tokens of prompts and answers per second, over the steps that this process has done."""
        tokens = sum(row["tokens"] for row in self.rows[self.first_step :])
        return tokens / max(1e-9, time.perf_counter() - self.began)


def final_loss(rows: Sequence[Mapping[str, float]]) -> float:
    """Return the mean loss per answer token over the last tenth of the steps (at least one step), in nats."""
    tail = rows[-max(1, len(rows) // 10) :]
    return sum(row["loss"] for row in tail) / len(tail)


def _row(logs: dict[str, float]) -> dict[str, float]:
    return {"step": logs["step"], **{name: float(logs[name]) for name in LOGGED if name in logs}}


class Saving(TrainerCallback):  # type: ignore[misc]
    """Asks Trainer for a checkpoint when one is due, and for a checkpoint and a stop after a signal."""

    def __init__(self, name: str, minutes: float) -> None:
        self.name, self.seconds = name, 60 * minutes if minutes else math.inf
        self.last, self.took = time.monotonic(), 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for a checkpoint, or for a checkpoint and a stop. All processes follow the most urgent wish."""
        is_due = time.monotonic() - self.last >= max(self.seconds, TIMES_AS_LONG * self.took)
        wish = _highest(STOP if signals.requested() else SAVE if is_due else GO_ON, args.device)
        if wish == GO_ON:
            return
        control.should_save = True
        self.last = time.monotonic()
        if wish == STOP:
            signals.request()
            control.should_training_stop = True
            log.info("%s: stopping after step %d of %d", self.name, state.global_step, state.max_steps)

    def on_save(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Record how long the checkpoint took."""
        now = time.monotonic()
        self.took, self.last = now - self.last, now


def _highest(wish: int, device: torch.device) -> int:
    """Return the highest wish of all processes. Each step waits for it, so a small tensor is sent, not an object."""
    if processes.world_size() == 1:
        return wish
    wishes = torch.tensor(wish, device=device)
    distributed.all_reduce(wishes, distributed.ReduceOp.MAX)
    return int(wishes)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError if transformers does not know one of these trackers, or if its package is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"report_to = {name!r}: transformers has no such tracker. It has {known}.")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(f"report_to = {name!r}: {' '.join(str(error).split())}") from None
