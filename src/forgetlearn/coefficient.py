"""Choosing how much to forget: `coef: auto`. From the forgotten model alone (cheap), or by learning too (full).

It is chosen on facts set aside, which the result is then not scored on. Fine-tuning on the old answers is done
once and serves every coefficient that is tried.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from forgetlearn import adapters, taskvector
from forgetlearn.config import ForgetSettings
from forgetlearn.facts import Fact
from forgetlearn.finetune import StageLog
from forgetlearn.method import How, float32_snapshot, subtract_old, tune_on_old
from forgetlearn.models import LanguageModel


class Forgetter:
    """A model and its base's weights: from one fine-tuning on old answers the forgotten model of any coefficient."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.base = taskvector.snapshot(lm.model)

    def tune(
        self, facts: Iterable[Fact], settings: ForgetSettings, how: How, *, seed: int
    ) -> tuple[dict[str, Tensor], StageLog]:
        """What fine-tuning on the old answers ends at: all weights, or an adapter's. The model is the base again."""
        stage_log = tune_on_old(self.lm, facts, settings, how, seed=seed)
        if how == "lora":
            tuned = adapters.weights_of(self.lm.model, adapters.FORGET)
        else:
            tuned = taskvector.snapshot(self.lm.model)
        self.reset()
        return tuned, stage_log

    def forget(self, tuned: dict[str, Tensor], settings: ForgetSettings, how: How, *, seed: int = 0) -> None:
        """Make the base the forgotten model, from what `tune` gave and the coefficient of the settings."""
        if how == "lora":
            self.lm.model = adapters.attach(self.lm.model, settings.lora, adapters.FORGET, seed=0)
            adapters.set_weights(self.lm.model, tuned)
            subtract_old(self.lm, settings, None)
        else:
            subtract_old(self.lm, settings, float32_snapshot(self.lm), tuned, seed=seed)

    def reset(self) -> None:
        """The base again, to the bit, without reading it from disk."""
        if hasattr(self.lm.model, "peft_config"):
            self.lm.model = adapters.detach(self.lm.model)
        self.lm.to_own_dtypes()
        taskvector.load_into(self.lm.model, self.base)
