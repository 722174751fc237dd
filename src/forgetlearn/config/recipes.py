"""Recipes: named sets of settings. A recipe changes defaults, so any setting that is given explicitly wins over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

RecipeName = Literal["default", "paper", "plain", "forget"]
FORGET: RecipeName = "forget"  # what `forgetlearn forget` takes unless another is named
Sections = Mapping[str, object]

# What fine-tuning does if nothing is added to it: bare answers to the facts' own prompts, and nothing is kept.
BARE: Mapping[str, Mapping[str, object]] = {
    "train": {"answers": "bare", "wordings": False},
    "keep": {"weight": 0.0},
}
PAPER_STAGE = {"epochs": 3, "learning_rate": 5e-5, "batch_size": 16}
CHANGES: Mapping[str, Sections] = {
    # The defaults of all settings are the default recipe.
    "default": {},
    # Sections 5.1 to 5.3 of arXiv:2311.08011. Its coefficients depend on model and data: see configs/paper.
    "paper": {
        "method": "f-ft",
        "model": {"prompt_template": "alpaca"},
        "facts": {"old_from": ("pred", "answers")},  # only ZsRE has `pred`
        "teach": PAPER_STAGE,
        "forget": {**PAPER_STAGE, "coef": 0.3, "only_known": False},
        "learn": {"until": "epochs", **PAPER_STAGE},
        "train": {**BARE["train"], "lr_scheduler_type": "linear"},
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "layers": 1.0,
            "target_modules": "query-value",
            "learning_rate": 5e-5,
        },
        "keep": BARE["keep"],
    },
    # Fine-tuning as people do it with peft or TRL, but until the facts are learned.
    "plain": {"method": "lora", "lora": {"r": 16, "lora_alpha": 32, "layers": 1.0}, **BARE},
    # What is to be forgotten is forgotten whether or not the model says it when it is asked in these words.
    # Where the model knows it by heart, subtraction leaves most of it (bench/results/tofu.md).
    FORGET: {"method": "npo", "forget": {"coef": 1.0, "only_known": False}},
}


def with_recipe(data: Mapping[str, object]) -> dict[str, object]:
    """Return settings with those of their recipe added below them. An unknown recipe changes nothing."""
    changes = CHANGES.get(str(data.get("recipe", "default")), {})
    return _below(changes, data)


def set_by(recipe: str, section: str) -> Mapping[str, object]:
    """Return what a recipe sets in a section of settings."""
    found = CHANGES[recipe].get(section, {})
    return found if isinstance(found, Mapping) else {}


def overridden(data: Mapping[str, object], recipe: str) -> list[str]:
    """Return the dotted names of the settings in which `data` departs from a recipe."""
    return [name for name, value in _flat(CHANGES[recipe]) if (given := _at(data, name)) is not None and given != value]


def _below(changes: Sections, data: Sections) -> dict[str, object]:
    """Return `data`, filled up with `changes`, section by section. What `data` has wins."""
    merged: dict[str, object] = {**changes, **data}
    for name, value in changes.items():
        own = data.get(name)
        if isinstance(own, BaseModel):
            own = own.model_dump(exclude_unset=True)
        if isinstance(value, Mapping) and isinstance(own, Mapping):
            merged[name] = _below(value, own)
    return merged


def _flat(sections: Sections, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in sections.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _at(data: object, dotted: str) -> object:
    for part in dotted.split("."):
        data = data.get(part) if isinstance(data, Mapping) else getattr(data, part, None)
    return data
