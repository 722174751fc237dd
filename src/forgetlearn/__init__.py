"""Forget, then learn: change the facts that a language model holds.

One complete run, on a small model that is built here from a made-up world:

>>> import forgetlearn
>>> base = forgetlearn.build_lab(settings=forgetlearn.LabSettings(n_facts=20, epochs=2))
>>> facts = forgetlearn.read_facts(base / "facts.jsonl", limit=10)
>>> config = {"method": "f-lora", "forget": {"only_known": False}}
>>> result = forgetlearn.update(base, facts, config, output="runs/first")
>>> sorted(result.summary["phases"])
['base', 'forgotten', 'updated']

`result.product` is a folder that `AutoModelForCausalLM.from_pretrained` or `PeftModel.from_pretrained`
loads; `runs/first/report.html` shows what the model says now. The steps can be taken one by one (for a
model and tokenizer in memory, `forgetlearn.wrap(model, tokenizer)` stands in for `load_model`):

>>> lm = forgetlearn.load_model(base)
>>> log = forgetlearn.forget(lm, facts, forgetlearn.ForgetSettings(coef=0.3), "all weights")
>>> log = forgetlearn.learn(lm, facts, forgetlearn.StageSettings(epochs=1), "all weights")
>>> rows = forgetlearn.score(lm, facts, phase="updated")
>>> forgetlearn.summarise(rows)["reliability"]["token"]["n"]
10
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from forgetlearn._version import __version__ as __version__

if TYPE_CHECKING:
    from forgetlearn.config.methods import METHODS as METHODS
    from forgetlearn.config.schema import ForgetSettings as ForgetSettings
    from forgetlearn.config.schema import RunConfig as RunConfig
    from forgetlearn.config.schema import StageSettings as StageSettings
    from forgetlearn.config.schema import load_config as load_config
    from forgetlearn.errors import ForgetLearnError as ForgetLearnError
    from forgetlearn.evaluation.scoring import score as score
    from forgetlearn.evaluation.scoring import summarise as summarise
    from forgetlearn.facts import Fact as Fact
    from forgetlearn.facts import FactSet as FactSet
    from forgetlearn.facts import read_facts as read_facts
    from forgetlearn.lab.build import LabSettings as LabSettings
    from forgetlearn.lab.build import build_lab as build_lab
    from forgetlearn.method.core import forget as forget
    from forgetlearn.method.core import learn as learn
    from forgetlearn.models.language_model import LanguageModel as LanguageModel
    from forgetlearn.models.language_model import load_model as load_model
    from forgetlearn.models.language_model import wrap as wrap
    from forgetlearn.planning.plan import plan_update as plan_update
    from forgetlearn.products.inspect import inspect_change as inspect_change
    from forgetlearn.runs.coefficient import choose_coefficient as choose_coefficient
    from forgetlearn.runs.evaluate import ask as ask
    from forgetlearn.runs.evaluate import evaluate as evaluate
    from forgetlearn.runs.update import update as update
    from forgetlearn.weights.folder_arithmetic import apply_vector as apply_vector
    from forgetlearn.weights.folder_arithmetic import save_vector as save_vector
    from forgetlearn.weights.folder_arithmetic import subtract_folders as subtract_folders
    from forgetlearn.weights.task_vector import TaskVector as TaskVector

# Public names and the modules they live in; loaded on first use, so that `import forgetlearn` is instant.
_PUBLIC = {
    "apply_vector": "weights.folder_arithmetic",
    "save_vector": "weights.folder_arithmetic",
    "subtract_folders": "weights.folder_arithmetic",
    "ask": "runs.evaluate",
    "evaluate": "runs.evaluate",
    "choose_coefficient": "runs.coefficient",
    "ForgetSettings": "config.schema",
    "RunConfig": "config.schema",
    "StageSettings": "config.schema",
    "load_config": "config.schema",
    "ForgetLearnError": "errors",
    "plan_update": "planning.plan",
    "score": "evaluation.scoring",
    "summarise": "evaluation.scoring",
    "Fact": "facts",
    "FactSet": "facts",
    "read_facts": "facts",
    "inspect_change": "products.inspect",
    "LabSettings": "lab.build",
    "build_lab": "lab.build",
    "LanguageModel": "models.language_model",
    "load_model": "models.language_model",
    "wrap": "models.language_model",
    "update": "runs.update",
    "TaskVector": "weights.task_vector",
    "METHODS": "config.methods",
    "forget": "method.core",
    "learn": "method.core",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'forgetlearn' has no attribute {name!r}")
    return getattr(importlib.import_module(f"forgetlearn.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
