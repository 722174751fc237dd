"""What a stage of fine-tuning shows and saves while it runs: Trainer's callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import distributed
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from forgetlearn.errors import ConfigError, TrainingError
from forgetlearn.runtime import signals

log = logging.getLogger("forgetlearn")

LOGGED = ("loss", "grad_norm", "learning_rate", "tokens")
# A checkpoint that takes long is written less often, so that no more than a twentieth of the time goes to them.
TIMES_AS_LONG = 20
GO_ON, SAVE, STOP = 0, 1, 2


class Steps(TrainerCallback):  # type: ignore[misc]
    """Keeps the numbers of every step, shows a bar on a terminal, and stops at a loss that is not finite.

    One line of the log says at the end what the stage was. Rates are of this process's own time: after a resume of
    the steps since then.
    """

    def __init__(self, name: str, n_facts: int, n_tokens: int) -> None:
        self.name, self.n_facts, self.n_tokens = name, n_facts, n_tokens
        self.rows: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.bar: Any = None
        self.began, self.first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the rows from before a kill, which Trainer's state keeps."""
        before = [logs for logs in state.log_history if "loss" in logs]  # a kill
        self.rows, self.seconds = [_row(logs) for logs in before], [logs["seconds"] for logs in before]
        self.began, self.first_step = time.perf_counter(), state.global_step
        if state.global_step:
            log.info("%s: going on from step %d of %d", self.name, state.global_step, state.max_steps)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"{self.name} {self.n_facts} facts",
            unit="step",
            disable=None if state.is_world_process_zero else True,  # None: no bar where the output is no terminal
            leave=False,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Keep a step's numbers, and show them."""
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
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {self._rate(state):,.0f} tokens/s")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what the stage was."""
        self.bar.close()
        if not state.is_world_process_zero or not self.rows:
            return
        seconds, loss = time.perf_counter() - self.began, final_loss(self.rows)
        steps = f"{state.global_step} steps" + (f" ({self.first_step} of them before)" if self.first_step else "")
        log.info(
            f"{self.name}: {self.n_facts} facts, {steps}, {self._rate(state):,.0f} tokens/s, loss {loss:.3f}, "
            f"{seconds:.1f} s"
        )

    def _rate(self, state: Any) -> float:
        """Tokens of prompts and answers in a second, by the share of the stage's steps that were done here."""
        tokens: float = self.n_tokens * (state.global_step - self.first_step) / max(1, state.max_steps)
        return tokens / max(1e-9, time.perf_counter() - self.began)


def final_loss(rows: Sequence[Mapping[str, float]]) -> float:
    """Mean loss per answer token over the last tenth of the steps, in nats."""
    tail = rows[-max(1, len(rows) // 10) :]
    return sum(row["loss"] for row in tail) / len(tail)


def _row(logs: dict[str, float]) -> dict[str, float]:
    return {"step": logs["step"], **{name: float(logs[name]) for name in LOGGED if name in logs}}


class Saving(TrainerCallback):  # type: ignore[misc]
    """Asks Trainer for a checkpoint when one is due, and for one and an end when a signal waits."""

    def __init__(self, name: str, minutes: float) -> None:
        self.name, self.seconds = name, 60 * minutes if minutes else math.inf
        self.last, self.took = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, alone or with an end."""
        is_due = time.monotonic() - self.last >= max(self.seconds, TIMES_AS_LONG * self.took)
        wish = _highest(STOP if signals.requested() else SAVE if is_due else GO_ON, args)
        if wish == GO_ON:
            return
        control.should_save = True
        self.last = time.monotonic()
        if wish == STOP:
            signals.request()
            control.should_training_stop = True
            log.info("%s: stopping after step %d of %d", self.name, state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long it took."""
        now = time.monotonic()
        self.took, self.last = now - self.last, now


def _highest(wish: int, args: Any) -> int:
    """The highest wish of all processes: they save together or not at all."""
    if args.world_size == 1:
        return wish
    wishes = torch.tensor(wish, device=args.device)
    distributed.all_reduce(wishes, distributed.ReduceOp.MAX)
    return int(wishes)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError unless transformers can report to each of these.

    Raises:
        ConfigError: it does not know one, or the package of one is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ConfigError(f"report_to = {name!r}: transformers has no such tracker. It has {known}.")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(f"report_to = {name!r}: {' '.join(str(error).split())}") from None
