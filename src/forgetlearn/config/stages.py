"""The stages of an update, computed from its config before a model is loaded.

All code that needs to know whether an update teaches or forgets, with which settings and seed, or what it changes, uses
`Stages`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, TypeVar

from forgetlearn.config.methods import KINDS, METHODS, KindTraits, Method
from forgetlearn.config.schema import AUTO, ForgetSettings, RunConfig, StageSettings, TrainSettings, TuningSettings

StageName = Literal["teach", "forget", "learn"]
Phase = Literal["base", "forgotten", "updated"]
Settings = TypeVar("Settings", bound=TrainSettings, covariant=True)
# Each stage has its own random numbers, so that learning draws the same ones with or without forgetting before it.
SEED_OFFSETS = {"learn": 0, "forget": 1_000_003, "teach": 2_000_003}


def stage_seed(seed: int, stage: str) -> int:
    """Return the seed of a stage (`learn`, `forget`, `teach`) of a run with this seed."""
    return (seed + SEED_OFFSETS[stage]) % 2**32


@dataclass(frozen=True)
class Stage(Generic[Settings]):
    """One stage of an update, with all its settings."""

    name: StageName
    kind: KindTraits
    settings: Settings
    seed: int


@dataclass(frozen=True)
class Stages:
    """The stages of an update. A stage is None if the update does not have it."""

    config: RunConfig

    @property
    def method(self) -> Method:
        """The method that the config names."""
        return METHODS[self.config.method]

    @cached_property
    def teach(self) -> Stage[TrainSettings] | None:
        """The stage that first trains all weights on the old answers, so that the base holds them."""
        if self.config.teach.epochs == 0:
            return None
        return Stage("teach", KINDS["all weights"], self.config.teaching, self.seed("teach"))

    @cached_property
    def forget(self) -> Stage[ForgetSettings] | None:
        """The stage that forgets the old answers."""
        if self.method.forgets is None or self.config.forget.coef == 0:
            return None
        return Stage("forget", KINDS[self.method.forgets], self.config.forgetting, self.seed("forget"))

    @cached_property
    def learn(self) -> Stage[StageSettings]:
        """The stage that learns the new answers; only of a method that learns."""
        assert self.method.learns, f"{self.config.method} only forgets"
        return Stage("learn", KINDS[self.method.learns], self.config.learning, self.seed("learn"))

    @property
    def last(self) -> Stage[TuningSettings]:
        """The stage that makes the product."""
        if self.method.learns:
            return self.learn
        assert self.forget, "a method that only forgets has a coefficient"
        return self.forget

    def seed(self, stage: StageName) -> int:
        """Return the seed of a stage."""
        return stage_seed(self.config.seed, stage)

    def __iter__(self) -> Iterator[Stage[TrainSettings]]:
        learn = self.learn if self.method.learns else None
        yield from (stage for stage in (self.teach, self.forget, learn) if stage is not None)

    @property
    def needs_old_answers(self) -> bool:
        """True if a stage trains on old answers."""
        return self.teach is not None or self.forget is not None

    @property
    def chooses_coefficient(self) -> bool:
        """True if the coefficient of forgetting is searched for (forget.coef = auto)."""
        return self.forget is not None and self.forget.settings.coef == AUTO

    @property
    def changes_base(self) -> bool:
        """True if a stage, or the merging of the product, needs the base's own weights in float32."""
        return self.config.save_merged or any(stage.kind.changes_base for stage in self)

    @property
    def keeps_change(self) -> bool:
        """True if the product's exact change from the base is kept (keep_change); an adapter is that itself."""
        return self.config.keep_change and not self.method.makes_adapter

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that are scored, provided there is something to forget. The last one is the product's."""
        if not self.method.learns:
            return ("base", "forgotten")
        if self.forget is not None and self.config.evaluate.every_phase:
            return ("base", "forgotten", "updated")
        return ("base", "updated")

    @property
    def product(self) -> str:
        """Name of the folder inside the run folder that holds the updated model or adapter."""
        return "adapter" if self.method.makes_adapter else "model"
