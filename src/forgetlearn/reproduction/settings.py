"""The settings of a reproduction: its parts, and the config of each method on each data set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, field_validator
from torch import nn

from forgetlearn.config.base import Settings, no_repeats
from forgetlearn.config.methods import MethodName
from forgetlearn.config.recipes import PAPER_STAGE
from forgetlearn.config.schema import EditSettings, RunConfig
from forgetlearn.errors import ConfigError
from forgetlearn.models.language_model import LINEAR, layer_list, linear_shape
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
METHOD_OF_KIND: Mapping[str, MethodName] = {"all weights": "f-ft", "lora": "f-lora"}
QUERY, VALUE = re.compile(r"(^|_)w?q(uery)?(_|$)"), re.compile(r"(^|_)w?v(alue)?(_|$)")


class PaperSettings(Settings):
    """What is reproduced: with the settings of which of the paper's models, over which seeds, and which parts."""

    like: Like = Field(
        "llama-2-7b", description="The paper's model whose coefficients, rates and figures are used; bloom-7b: table 2."
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Whole numbers, 0 or more.")
    only: tuple[PartName, ...] = Field((), description=f"Parts to reproduce: {', '.join(ORDER)}; unset: all.")

    _repeats = field_validator("seeds", "only")(no_repeats)

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


@dataclass(frozen=True)
class Shape:
    """What the settings take from a model's structure: the number of layers, and LoRA's modules."""

    layers: int
    query_and_value: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Return the shape of a model, which may be without weights."""
        return cls(len(layer_list(model)[1]), query_and_value(model))

    def layer(self, number: int) -> int:
        """Return the layer at the same relative depth as a layer of the paper's LLaMA."""
        return number * self.layers // published.LAYERS


def query_and_value(model: nn.Module) -> list[str]:
    """Return the names of the modules that compute query and value, from the structure of the model's layers.

    If query, key and value are one matrix, it is that: the attention's module with the most outputs. The list is empty
    if no module of the layers is called attention.
    """
    found: dict[str, int] = {}
    for path, module in layer_list(model)[1].named_modules():
        if isinstance(module, LINEAR) and "att" in path.lower():
            found[path.rpartition(".")[2]] = linear_shape(module)[1]
    named = [name for name in found if QUERY.search(name.lower()) or VALUE.search(name.lower())]
    return named or [max(found, key=lambda name: found[name])] if found else []


def with_shape(config: RunConfig, shape: Shape) -> RunConfig:
    """Return the config with LoRA on query and value, whatever this model calls them, unless modules are given.

    Raises:
        ConfigError: the model has no attention to put LoRA on.
    """
    if config.lora.target_modules != RunConfig(recipe="paper").lora.target_modules:
        return config
    if not shape.query_and_value:
        raise ConfigError(
            "lora.target_modules: the paper adapts query and value, and this model has no modules called attention. "
            "Name the modules to adapt with --set lora.target_modules=[NAME,NAME]."
        )
    lora = config.lora.model_copy(update={"target_modules": shape.query_and_value})
    return config.model_copy(update={"lora": lora})


def methods_of(like: Like, data: DataName) -> list[MethodName]:
    """Return the methods of the paper's table, in its order."""
    return [name for name in published.SETTINGS[like, data].scores if name != published.ORIGINAL]


def method_config(config: RunConfig, like: Like, data: DataName, method: MethodName, shape: Shape) -> RunConfig:
    """Return the config of a method with the paper's coefficient and rates, on a base that was taught before."""
    setting = published.SETTINGS[like, data]
    config = at_rate(config, setting.learning_rate)
    coef = {"coef": setting.coefs[method]} if method in setting.coefs else {}
    forget = config.forget.model_copy(update={"only_known": False, **coef})
    learn, train = config.learn.model_copy(update={"modules": "all", "rows": "all"}), config.train
    if method == "ft-c":
        own = {"batch_size": 1, "learning_rate": published.FT_C_RATE}
        if config.learn.epochs == PAPER_STAGE["epochs"]:
            own["epochs"] = published.FT_C_EPOCHS
        learn = learn.model_copy(update={**own, "modules": f"layers.{shape.layer(published.FT_C_LAYER)}"})
        train = train.model_copy(update={"micro_batch_size": None})
    teach = config.teach.model_copy(update={"epochs": 0})
    changes: dict[str, object] = {"method": method, "teach": teach, "forget": forget, "learn": learn, "train": train}
    printed = published.EDITING.get(method, {})
    usual = EditSettings()  # by value, so that the settings that are recorded determine the result
    unset = {name: value for name, value in printed.items() if getattr(config.edit, name) == getattr(usual, name)}
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
