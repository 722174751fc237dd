"""The settings of a comparison, its cells, and the config of each cell's update."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from forgetlearn.config.base import Settings, no_repeats
from forgetlearn.config.methods import METHODS, PAPER_METHODS, PLAIN_METHODS, MethodName
from forgetlearn.config.recipes import set_by
from forgetlearn.config.schema import AUTO, Modules, Rows, RunConfig, TeachSection
from forgetlearn.errors import ConfigError, some

Budget = Literal["equal-epochs", "equal-steps"]
Variants = Mapping[str, "VariantSettings"]
WITH_ALL_WEIGHTS = tuple(name for name, method in METHODS.items() if method.subtracts_from_base and method.learns)


def _above_zero(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(value <= 0 for value in values):
        raise ValueError("a coefficient must be above 0; without forgetting the method is ft or lora")
    return values


class VariantSettings(Settings):
    """The settings that a variant changes. All variants share the fine-tuning on the old answers."""

    methods: tuple[MethodName, ...] = Field(
        (), description="Methods that it varies; unset: those of the comparison that forget with all weights."
    )
    modules: Modules = Field("all", description="As forget.modules.")
    rows: Rows = Field("all", description="As forget.rows.")
    learn_modules: Modules = Field("all", description="As learn.modules.")
    learn_rows: Rows = Field("all", description="As learn.rows.")
    coefs: tuple[float, ...] = Field((), description="Its own coefficients; unset: those of the comparison.")

    _forgets = field_validator("coefs")(_above_zero)

    @field_validator("methods")
    @classmethod
    def _fine_tune(cls, values: tuple[MethodName, ...]) -> tuple[MethodName, ...]:
        if fixed := [name for name in values if not METHODS[name].fine_tunes]:
            raise ValueError(f"{some(fixed)}: fine-tunes nothing, so a variant changes nothing. Leave it out")
        return values

    @property
    def learning(self) -> dict[str, object]:
        """The settings of `learn` that the variant changes, by name."""
        return {"modules": self.learn_modules, "rows": self.learn_rows}


class CompareSettings(Settings):
    """The methods, coefficients, seeds and epochs that are compared."""

    methods: tuple[MethodName, ...] = Field(PAPER_METHODS, min_length=1, description="docs/method.md describes them.")
    coefs: tuple[float, ...] = Field((0.1, 0.3, 1.0), min_length=1, description="Coefficients of forgetting.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Whole numbers.")
    epochs: tuple[int, ...] = Field((), description="Epochs of learning; unset: those of the config.")
    budgets: tuple[Budget, ...] = Field(
        ("equal-epochs",),
        min_length=1,
        description="equal-epochs: as the paper compares; equal-steps: plain methods also get the steps of forgetting.",
    )

    variants: dict[str, VariantSettings] = Field({}, description="More rows: a name, and what differs.")

    @field_validator("coefs", mode="before")
    @classmethod
    def _numbers(cls, values: object) -> object:
        if isinstance(values, (list, tuple)) and AUTO in values:
            raise ValueError(
                "auto sets facts aside that it does not score, and a table scores all rows on the same facts. "
                "Give numbers here; for auto run `forgetlearn update --coef auto`"
            )
        return values

    @field_validator("methods")
    @classmethod
    def _learn(cls, values: tuple[MethodName, ...]) -> tuple[MethodName, ...]:
        if only_forget := [name for name in values if not METHODS[name].learns]:
            raise ValueError(f"{some(only_forget)}: learns nothing, so no update can be compared; forget takes it")
        return values

    _repeats = field_validator("methods", "coefs", "seeds", "epochs", "budgets")(no_repeats)

    @field_validator("variants")
    @classmethod
    def _names_of_folders(cls, values: dict[str, VariantSettings]) -> dict[str, VariantSettings]:
        bad = [name for name in values if not re.fullmatch(r"[A-Za-z0-9_.+]+", name)]
        if bad:
            raise ValueError(f"{some(bad)}: a variant's name is made of letters, digits, '_', '.' and '+'")
        return values

    _forgets = field_validator("coefs")(_above_zero)


@dataclass(frozen=True)
class Cell:
    """One update of the comparison."""

    method: MethodName
    coef: float | None  # None if the method does not forget
    epochs: int
    seed: int
    budget: Budget
    variant: str = ""  # a key of CompareSettings.variants, or ""
    until_learned: bool = False  # `epochs` is then the most that it may take

    @property
    def label(self) -> str:
        """The name of the cell's row in the table, which it shares with the cells of other seeds."""
        if not METHODS[self.method].fine_tunes:  # it has no epochs
            return self.method
        coef = "" if self.coef is None else f"-coef{self.coef:g}"
        variant = f"-{self.variant}" if self.variant else ""
        length = "until-learned" if self.until_learned else f"{self.epochs}epochs"
        return f"{self.method}{variant}{coef}-{length}" + ("-equal-steps" if self.budget == "equal-steps" else "")

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.label}-seed{self.seed}"


def cells_of(settings: CompareSettings, config: RunConfig) -> list[Cell]:
    """Return all cells, in an order that keeps cells with the same fine-tuning on old answers together."""
    cells = []
    epochs = settings.epochs or (config.learning.most_epochs,)
    until_learned = config.learn.until == "learned" and not settings.epochs
    for seed, method, n_epochs in itertools.product(settings.seeds, settings.methods, epochs):
        if not METHODS[method].fine_tunes and n_epochs != max(epochs):  # once, to be compared with the longest learning
            continue
        cells += [
            Cell(method, coef, n_epochs, seed, "equal-epochs", until_learned=until_learned)
            for coef in _coefs(method, settings.coefs)
        ]
        cells += [
            Cell(method, coef, n_epochs, seed, "equal-epochs", name, until_learned)
            for name, variant in settings.variants.items()
            if method in (variant.methods or WITH_ALL_WEIGHTS)
            for coef in _coefs(method, variant.coefs or settings.coefs)
        ]
        in_all = n_epochs + config.forget.epochs
        if "equal-steps" in settings.budgets and method in PLAIN_METHODS and in_all not in epochs:
            cells.append(Cell(method, None, in_all, seed, "equal-steps"))
    return sorted(cells, key=lambda cell: (cell.seed, METHODS[cell.method].forgets or "", cell.coef or 0))


def _coefs(method: MethodName, coefs: tuple[float, ...]) -> Sequence[float | None]:
    return coefs if METHODS[method].forgets else (None,)


def check_names(settings: CompareSettings, cells: Sequence[Cell]) -> None:
    """Raise ConfigError if two cells would have the same name, or a variant names a method that is not compared."""
    for name, variant in settings.variants.items():
        wanted = variant.methods or WITH_ALL_WEIGHTS
        missing = [method for method in wanted if method not in settings.methods]
        if missing:
            raise ConfigError(
                f"variants.{name}: varies {some(missing)}, which is not compared here. "
                f"Add it to --methods, or name the variant's methods out of {', '.join(settings.methods)}."
            )
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{some(twice)}: more than one row of the table would have this name. Give the variant another name, or "
            "leave out the coefficient that repeats."
        )


def without_teaching(config: RunConfig) -> RunConfig:
    """Return the config without the teaching that its recipe asks for: a comparison takes the base as it is."""
    of_recipe = set_by(config.recipe, "teach").get("epochs", 0)
    return config.model_copy(update={"teach": TeachSection()}) if config.teach.epochs == of_recipe else config


def cell_config(config: RunConfig, cell: Cell, variants: Variants) -> RunConfig:
    """Return the config of a cell's update."""
    forgetting: dict[str, object] = {} if cell.coef is None else {"coef": cell.coef}
    learning: dict[str, object] = {} if cell.until_learned else {"until": "epochs", "epochs": cell.epochs}
    if cell.variant:
        variant = variants[cell.variant]
        forgetting |= {name: getattr(variant, name) for name in ("modules", "rows")}
        learning |= variant.learning
    forget, learn = config.forget.model_copy(update=forgetting), config.learn.model_copy(update=learning)
    return config.model_copy(update={"method": cell.method, "seed": cell.seed, "forget": forget, "learn": learn})
