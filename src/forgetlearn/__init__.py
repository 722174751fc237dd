"""Forget, then learn: change the facts that a language model holds.

One complete run, on a small model that is built here from a made-up world:

>>> import forgetlearn
>>> base = forgetlearn.build_lab(settings=forgetlearn.LabSettings(n_facts=20, epochs=2))
>>> facts = forgetlearn.read_facts(base / "facts.jsonl", limit=10)
>>> config = {"method": "f-lora", "forget": {"only_known": False}}
>>> result = forgetlearn.update(base, facts, config, output="runs/first")
>>> sorted(result.summary.phases)
['base', 'forgotten', 'updated']

`result.product` is a folder that `AutoModelForCausalLM.from_pretrained` or `PeftModel.from_pretrained`
loads. `runs/first/report.html` shows what the model answers now. You can also run the steps one by one.
For a model and a tokenizer in memory, use `forgetlearn.wrap(model, tokenizer)` instead of `load_model`:

>>> lm = forgetlearn.load_model(base)
>>> log = forgetlearn.forget(lm, facts, forgetlearn.ForgetSettings(coef=0.3), "all weights")
>>> log = forgetlearn.learn(lm, facts, forgetlearn.StageSettings(epochs=1), "all weights")
>>> rows = forgetlearn.score(lm, facts, phase="updated")
>>> forgetlearn.summarise(rows)["reliability"]["token"].n
10
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from forgetlearn._version import __version__ as __version__

if TYPE_CHECKING:
    from forgetlearn.comparison.cells import CompareSettings
    from forgetlearn.comparison.compare import compare, write_report
    from forgetlearn.config.methods import METHODS
    from forgetlearn.config.schema import ForgetSettings, RunConfig, StageSettings, TrainSettings, load_config
    from forgetlearn.errors import ForgetLearnError
    from forgetlearn.evaluation.scoring import score, summarise
    from forgetlearn.facts import Fact, FactSet, read_facts
    from forgetlearn.facts.documents import read_documents
    from forgetlearn.lab.build import LabSettings, build_lab
    from forgetlearn.lab.demo import run_demo as demo
    from forgetlearn.method.core import forget, learn
    from forgetlearn.models.language_model import LanguageModel, load_model, wrap
    from forgetlearn.planning.plan import plan_update as plan
    from forgetlearn.products.chain import chain_of as log
    from forgetlearn.products.export import export
    from forgetlearn.products.inspect import inspect_change as inspect
    from forgetlearn.products.publish import push, save
    from forgetlearn.products.restore import apply_run
    from forgetlearn.products.restore import undo_run as undo
    from forgetlearn.reproduction.paper import paper
    from forgetlearn.reproduction.plan import plan_paper
    from forgetlearn.reproduction.settings import PaperSettings
    from forgetlearn.runs.coefficient import choose_coefficient
    from forgetlearn.runs.evaluate import ask, evaluate
    from forgetlearn.runs.forget import forget_facts
    from forgetlearn.runs.stream import stream
    from forgetlearn.runs.update import update
    from forgetlearn.weights.folder_arithmetic import apply_vector, save_vector
    from forgetlearn.weights.folder_arithmetic import subtract_folders as subtract
    from forgetlearn.weights.streaming import Numbers
    from forgetlearn.weights.task_vector import TaskVector

# Public name -> where it is defined. Each is imported on first use, so that `import forgetlearn` is instant.
_PUBLIC = {
    "compare": "comparison.compare.compare",
    "write_report": "comparison.compare.write_report",
    "CompareSettings": "comparison.cells.CompareSettings",
    "METHODS": "config.methods.METHODS",
    "ForgetSettings": "config.schema.ForgetSettings",
    "RunConfig": "config.schema.RunConfig",
    "StageSettings": "config.schema.StageSettings",
    "TrainSettings": "config.schema.TrainSettings",
    "load_config": "config.schema.load_config",
    "ForgetLearnError": "errors.ForgetLearnError",
    "score": "evaluation.scoring.score",
    "summarise": "evaluation.scoring.summarise",
    "Fact": "facts.fact.Fact",
    "FactSet": "facts.fact_set.FactSet",
    "read_facts": "facts.read_facts",
    "read_documents": "facts.documents.read_documents",
    "LabSettings": "lab.build.LabSettings",
    "build_lab": "lab.build.build_lab",
    "demo": "lab.demo.run_demo",
    "forget": "method.core.forget",
    "learn": "method.core.learn",
    "LanguageModel": "models.language_model.LanguageModel",
    "load_model": "models.language_model.load_model",
    "wrap": "models.language_model.wrap",
    "plan": "planning.plan.plan_update",
    "log": "products.chain.chain_of",
    "export": "products.export.export",
    "inspect": "products.inspect.inspect_change",
    "push": "products.publish.push",
    "save": "products.publish.save",
    "apply_run": "products.restore.apply_run",
    "undo": "products.restore.undo_run",
    "paper": "reproduction.paper.paper",
    "plan_paper": "reproduction.plan.plan_paper",
    "PaperSettings": "reproduction.settings.PaperSettings",
    "choose_coefficient": "runs.coefficient.choose_coefficient",
    "ask": "runs.evaluate.ask",
    "evaluate": "runs.evaluate.evaluate",
    "forget_facts": "runs.forget.forget_facts",
    "stream": "runs.stream.stream",
    "update": "runs.update.update",
    "apply_vector": "weights.folder_arithmetic.apply_vector",
    "save_vector": "weights.folder_arithmetic.save_vector",
    "subtract": "weights.folder_arithmetic.subtract_folders",
    "Numbers": "weights.streaming.Numbers",
    "TaskVector": "weights.task_vector.TaskVector",
}

__all__ = [
    "METHODS",
    "CompareSettings",
    "Fact",
    "FactSet",
    "ForgetLearnError",
    "ForgetSettings",
    "LabSettings",
    "LanguageModel",
    "Numbers",
    "PaperSettings",
    "RunConfig",
    "StageSettings",
    "TaskVector",
    "TrainSettings",
    "__version__",
    "apply_run",
    "apply_vector",
    "ask",
    "build_lab",
    "choose_coefficient",
    "compare",
    "demo",
    "evaluate",
    "export",
    "forget",
    "forget_facts",
    "inspect",
    "learn",
    "load_config",
    "load_model",
    "log",
    "paper",
    "plan",
    "plan_paper",
    "push",
    "read_documents",
    "read_facts",
    "save",
    "save_vector",
    "score",
    "stream",
    "subtract",
    "summarise",
    "undo",
    "update",
    "wrap",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'forgetlearn' has no attribute {name!r}")
    module, _dot, attribute = _PUBLIC[name].rpartition(".")
    return getattr(importlib.import_module(f"forgetlearn.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
