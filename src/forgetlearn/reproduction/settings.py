"""The settings of a reproduction: its parts, and the config of each method on each data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import Field, field_validator

from forgetlearn.config.base import Settings, no_repeats
from forgetlearn.config.methods import MethodName
from forgetlearn.config.recipes import PAPER_STAGE
from forgetlearn.config.schema import RunConfig
from forgetlearn.errors import ConfigError
from forgetlearn.reproduction import published
from forgetlearn.reproduction.published import DataName, Like

PartName = Literal["table1", "table2", "table3", "table4", "table5", "figure4", "figure5", "figure6", "figure7"]
ORDER: tuple[PartName, ...] = get_args(PartName)
TABLE_OF: Mapping[Like, PartName] = {"llama-2-7b": "table1", "llama-7b": "table1", "bloom-7b": "table2"}
FIGURE_KINDS: Mapping[PartName, str] = {
    "figure4": "all weights",
    "figure5": "lora",
    "figure6": "all weights",
    "figure7": "lora",
}
FIRST_SEED_ONLY: tuple[PartName, ...] = ("table3", "table4", "table5")
WITH_METHODS: frozenset[PartName] = frozenset(("table1", "table2", "table3"))
METHOD_OF_KIND: Mapping[str, MethodName] = {"all weights": "f-ft", "lora": "f-lora"}


class PaperSettings(Settings):
    """What is reproduced: with the settings of which of the paper's models, over which seeds, and which parts."""

    like: Like = Field(
        "llama-2-7b", description="The paper's model whose coefficients, rates and figures are used; bloom-7b: table 2."
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Whole numbers, 0 or more.")
    only: tuple[PartName, ...] = Field((), description=f"Parts to reproduce: {', '.join(ORDER)}; unset: all.")
    methods: tuple[MethodName, ...] = Field((), description="Rows of tables 1 to 3; unset: all.")

    _repeats = field_validator("seeds", "only", "methods")(no_repeats)

    @field_validator("seeds")
    @classmethod
    def _in_range(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not all(0 <= value < 2**32 for value in values):
            raise ValueError("a seed is a whole number from 0 to 4294967295")
        return values

    @property
    def parts(self) -> tuple[PartName, ...]:
        """The parts to reproduce, in the paper's order; raise ConfigError for a table of another model."""
        own = TABLE_OF[self.like]
        for part in {"table1", "table2"} & {*self.only} - {own}:
            raise ConfigError(
                f"only = {part}: with --like {self.like} the table of scores is {own}. Give {own}, or another --like."
            )
        return tuple(part for part in ORDER if part in (self.only or {own, *ORDER[2:]}))

    @property
    def score_table(self) -> PartName:
        """The table with the scores of all methods, table1 or table2."""
        return TABLE_OF[self.like]

    def methods_on(self, data: DataName) -> list[MethodName]:
        """Return the methods to measure, in the paper's order; raise ConfigError for one that is not in its table."""
        printed = methods_of(self.like, data)
        if unknown := [method for method in self.methods if method not in printed]:
            raise ConfigError(
                f"methods = {unknown[0]}: not in the paper's {self.score_table}. Give some of {', '.join(printed)}."
            )
        return [method for method in printed if method in (self.methods or printed)]


def same_depth(layer: int, n_layers: int) -> int:
    """Return the layer at the same relative depth as a layer of the paper's LLaMA."""
    return layer * n_layers // published.LAYERS


def methods_of(like: Like, data: DataName) -> list[MethodName]:
    """Return the methods of the paper's table, in its order."""
    return [name for name in published.SETTINGS[like, data].scores if name != published.ORIGINAL]


def method_config(config: RunConfig, like: Like, data: DataName, method: MethodName, n_layers: int) -> RunConfig:
    """Return the config of a method with the paper's coefficient and rates, on a base that was taught before."""
    setting = published.SETTINGS[like, data]
    config = at_rate(config, setting.learning_rate)
    coef = {"coef": setting.coefs[method]} if method in setting.coefs else {}
    forget = config.forget.model_copy(update={"only_known": False, **coef})
    learn, train = config.learn.model_copy(update={"modules": "all", "rows": "all"}), config.train
    if method == "ft-c":
        usual = {**PAPER_STAGE, "learning_rate": setting.learning_rate}
        own = {name: value for name, value in published.FT_C.items() if getattr(learn, name) == usual[name]}
        learn = learn.model_copy(update={**own, "modules": f"layers.{same_depth(published.FT_C_LAYER, n_layers)}"})
        train = train.model_copy(update={"micro_batch_size": None})
    teach = config.teach.model_copy(update={"epochs": 0})
    changes: dict[str, object] = {"method": method, "teach": teach, "forget": forget, "learn": learn, "train": train}
    unset = {
        name: value for name, value in published.EDITING.get(method, {}).items() if getattr(config.edit, name) is None
    }
    changes["edit"] = config.edit.model_copy(update=unset)
    return config.model_copy(update=changes)


def at_rate(config: RunConfig, rate: float) -> RunConfig:
    """Return the config with the paper's rate for a data set, in every section that still has the recipe's."""
    changes: dict[str, object] = {}
    for name in ("teach", "forget", "learn", "lora"):
        section = getattr(config, name)
        if section.learning_rate == PAPER_STAGE["learning_rate"]:
            changes[name] = section.model_copy(update={"learning_rate": rate})
    return config.model_copy(update=changes)
