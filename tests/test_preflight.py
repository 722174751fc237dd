"""Case 3: in every command each setting is used, refused or named as unused. What is used is what the code reads."""

from __future__ import annotations

import functools
import json
from typing import Any, get_args

import pytest

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.comparison.grid import CompareSettings, fill
from forgetlearn.config import preflight, schema
from forgetlearn.config.base import Settings, describe, validate
from forgetlearn.config.schema import (
    ForgetSettings,
    LoraSettings,
    OptimisationSettings,
    RunConfig,
    StageSettings,
    TrainSettings,
    load_config,
)
from forgetlearn.errors import ConfigError
from forgetlearn.report import run_page
from forgetlearn.storage import disk

COMMANDS = get_args(preflight.Command)
# Read where these runs do not come: for lm-evaluation-harness and for models on the hub, which have tests of their own.
ELSEWHERE = {"evaluate.task_limit", "evaluate.task_folder", "model.revision"}
QUICK = {"forget.epochs": 1, "forget.only_known": False, "learn.epochs": 1, "evaluate.every_phase": True}
QUICK |= {"evaluate.protocols": ["token"], "facts.limit": 2}
OTHER = {  # where no value can be made from the type
    "method": "ft-c",
    "facts.old_from": ("pred",),
    "facts.columns": {"prompt": "Question"},
    "forget.coef": 0.5,
    "forget.modules": "mlp",
    "learn.modules": "mlp",
    "lora.target_modules": "q_proj",
    "evaluate.protocols": ("token",),
    "evaluate.tasks": ("arc_easy",),
    "report_to": ("tensorboard",),
    "memit.layers": (0,),
}


FORGETTING = {"method": "npo", "recipe": "forget"}  # for a command that takes no other


def place(name: str) -> tuple[type[Settings], str]:
    """The settings that hold a dotted name, and its last part."""
    *parents, last = name.split(".")
    kind: Any = RunConfig
    for parent in parents:
        kind = kind.model_fields[parent].annotation
    return kind, last


def another(name: str) -> Any:
    """A valid value of a setting that is not its default."""
    if name in OTHER:
        return OTHER[name]
    kind, last = place(name)
    field = kind.model_fields[last]
    default, types = field.default, {field.annotation, *get_args(field.annotation)}
    if bool in types:
        return not default
    if {int, float} & types:
        return next(n for n in ((0.5, 0.25) if float in types else (2, 4)) if n != default)
    if str in types:
        return "something"
    return next(choice for choice in get_args(field.annotation) if choice != default)


# What the engine reads a section's settings from.
COMPOSED = {
    schema.TeachSection: TrainSettings,
    schema.ForgetSection: ForgetSettings,
    schema.LearnSection: StageSettings,
}


class Reads(set[tuple[type, str]]):
    """Class and field of every setting that was read."""

    def of(self, name: str) -> bool:
        kind, last = place(name)
        kinds = {kind, *COMPOSED.values()} if kind is OptimisationSettings else {kind, COMPOSED.get(kind, kind)}
        return any((each, last) in self for each in kinds)


@pytest.fixture(scope="module")
def files(small_lab, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("A text that has nothing to do with the facts. " * 8)
    facts = small_lab / "facts.jsonl"
    return facts, text


def reproduce(file, config, kept, folder) -> None:
    """A reproduction of two parts of the paper, with the facts of a file in the form of ZsRE."""
    asked = {"alt": "target_new", "src": "prompt", "pred": "ground_truth"}
    asked |= dict.fromkeys(("rephrase", "loc", "loc_ans", "answers", "cond", "subject"), "prompt")
    records = [{new: fact[old] for new, old in asked.items()} for fact in disk.read_rows(file)]
    zsre = folder().with_suffix(".json")
    disk.write_text(zsre, json.dumps(records))
    settings = forgetlearn.PaperSettings(seeds=(0,), only=("table1", "table4"))
    own = config(recipe="paper", facts__source=None, model__prompt_template="plain", **kept)
    forgetlearn.paper(zsre=zsre, settings=settings, config=own, output=folder())


def forget_all(config, kept, folder) -> None:
    """Forget by subtraction and by the other losses."""
    two = {"recipe": "forget", "facts__limit": 2, "unlearn__max_epochs": 1, "unlearn__relearn_steps": 1}
    for each in (
        config(method="subtract", save_merged=True, facts__old_from="model", **kept, **two),
        config(method="subtract-ft", forget__coef=0.1, keep_change=True, **two),
        *(config(method=method, **two) for method in ("npo", "simnpo-ft")),
    ):
        forgetlearn.forget_facts(config=each, output=folder())


@pytest.fixture(scope="module")
def reads(small_lab, files, tmp_path_factory):
    """`reads("compare")`: what the command reads of the settings, from small runs of it."""
    file, text = files
    found: dict[str, Reads] = {}
    now: list[Reads] = []
    plain = Settings.__getattribute__

    def recording(self: Settings, name: str) -> Any:
        if now and name in type(self).model_fields:
            now[0].add((type(self), name))
        return plain(self, name)

    def config(**changes: Any) -> RunConfig:
        named = {key.replace("__", "."): value for key, value in changes.items()}
        given = {"model.name": str(small_lab), "facts.source": str(file)}
        return load_config(small_lab / "update.yaml", given | QUICK | named)

    def folder() -> Any:
        return tmp_path_factory.mktemp("run") / "out"

    kept = {"train__answers": "sentence", "train__wordings": True, "keep__weight": 1.0}
    until = {"learn__until": "learned", "learn__max_epochs": 1}
    auto = {"method": "f-ft", "forget__coef": "auto", "forget__validation": 0.5, "facts__limit": 4}
    updates = [
        config(method="f-lora", evaluate__general=str(text), save_merged=True, facts__old_from="model", **kept),
        config(method="f-ft", forget__coef=0.1, keep_change=True),
        config(**auto, forget__only_known=True),
        config(method="ft-c", teach__epochs=1, **until),
        *(config(method=method) for method in ("rome", "memit", "alphaedit")),
    ]
    cells = {"methods": ["f-ft", "f-lora", "ft-c", "rome", "memit", "alphaedit"], "coefs": [0.1], "seeds": [0]}
    scored = {"model.name": str(small_lab), "facts.source": str(file), "evaluate.general": str(text)}

    def run(command: str) -> None:
        if command == "compare":
            fill(settings=validate(CompareSettings, cells), config=config(**kept), output=folder())
            fill(
                settings=validate(CompareSettings, cells | {"methods": ["ft"]}), config=config(**until), output=folder()
            )
        elif command == "evaluate":
            forgetlearn.evaluate(config=load_config(None, scored), output=folder())
        elif command == "ask":
            forgetlearn.ask(["Who?"], config=load_config(None, {"model.name": str(small_lab)}))
        else:  # a plan speaks of an update
            for each in updates:
                forgetlearn.update(config=each, output=folder())

    def of(command: str) -> Reads:
        command = "update" if command == "plan" else command
        if command not in found:
            found[command] = Reads()
            now[:] = [found[command]]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Settings, "__getattribute__", recording, raising=False)
                patch.setattr(run_page, "write_run", lambda *_args, **_options: None)  # reads what was written alone
                others = {
                    "paper": functools.partial(reproduce, file, config, kept, folder),
                    "forget": functools.partial(forget_all, config, {**kept, "evaluate__general": str(text)}, folder),
                }
                others.get(command, functools.partial(run, command))()
            now.clear()
        return found[command]

    return of


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] if c in ("update", "plan") else []) for c in COMMANDS]
)
def test_case_3_each_setting_is_used_or_refused(command, reads):
    unread = []
    for name, *_ in describe(RunConfig):
        given = {name: another(name)}
        if command == "forget":
            given = {"recipe": "forget", name: FORGETTING.get(name, another(name))}
        config = load_config(None, given)
        if any(preflight.is_within(name, row.names) for row in preflight.UNUSED[command]):
            with pytest.raises(ConfigError, match=name):
                preflight.check(command, config, [name])
            continue
        preflight.check(command, config, [name])
        if not reads(command).of(name) and name not in ELSEWHERE:
            unread.append(name)
    assert not unread, "neither read by the command nor refused: use them, or add them to preflight.UNUSED"


FIVE = {
    "evaluate.general": "/none.txt",
    "evaluate.tasks": "[none]",
    "report_to": "[none]",
    "save_merged": "true",
    "keep_change": "true",
}


def test_case_3_compare_names_each_setting_that_it_does_not_use(small_lab, tmp_path, capsys):
    words = [part for name, value in FIVE.items() for part in ("--set", f"{name}={value}")]
    where = ["--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["compare", *where, *words]) == 2
    said = capsys.readouterr().err
    assert not [name for name in FIVE if name not in said]
    assert not (tmp_path / "out").exists()


def test_case_3_a_config_in_python_or_in_a_file_is_held_to_the_same(small_lab, tmp_path):
    with pytest.raises(ConfigError, match="save_merged"):
        fill(small_lab, small_lab / "facts.jsonl", None, {"save_merged": True}, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="keep_change"):
        forgetlearn.evaluate(small_lab, small_lab / "facts.jsonl", {"keep_change": True}, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["evaluate", "--output", "out", "--set", "learn.epochs=7"], "learn.epochs"),
        (["ask", "Who?", "--set", "facts.limit=3"], "facts.limit"),
        (["compare", "--output", "out", "--set", "method=ga"], "method"),
        (["compare", "--output", "out", "--set", "teach.batch_size=3"], "teach.batch_size"),
    ],
)
def test_case_3_settings_of_another_command_are_refused_where_they_are_given(argv, name, small_lab, capsys):
    assert main([*argv, "--model", str(small_lab)]) == 2
    assert f"{name}: not used by {argv[0]}" in capsys.readouterr().err


def test_a_config_that_commands_share_may_hold_more_and_that_is_said(caplog):
    config = load_config(
        None, {"learn.epochs": 7, "learn.batch_size": 4, "learn.rows": "facts", "train.optim": "adafactor", "seed": 3}
    )
    with caplog.at_level("INFO", "forgetlearn"):
        preflight.check("evaluate", config)
    assert "evaluate does not use these settings of the config: seed, learn.*, train.optim" in caplog.text


def test_what_has_no_effect_with_the_rest_is_said(caplog):
    given = {"method": "ft", "forget.epochs": 9, "lora.r": 4, "learn.epochs": 2}
    preflight.warn_of_idle([load_config(None, given)], given)
    assert [record.args[0] for record in caplog.records] == ["forget.epochs", "lora.r"]


def test_what_has_no_effect_on_any_row_of_a_comparison_is_said(caplog):
    given = {"edit.steps": 3, "lora.r": 4}
    configs = [load_config(None, {**given, "method": method}) for method in ("ft", "lora", "rome")]
    preflight.warn_of_idle(configs, given)
    assert not caplog.records
    configs = [load_config(None, {**given, "forget.rows": "facts", "method": method}) for method in ("ft", "lora")]
    preflight.warn_of_idle(configs, {**given, "forget.rows": "facts"})
    assert [record.args[0] for record in caplog.records] == ["forget.rows", "edit.steps"]


def test_settings_that_win_over_the_recipe_are_named_once(caplog):
    config = load_config(None, {"recipe": "paper", "learn.epochs": 9, "lora.lora_dropout": 0.1})
    with caplog.at_level("INFO", "forgetlearn"):
        preflight.check("update", config, ["learn.epochs"])  # as the command line does, before it calls update
        preflight.check("update", config)
        preflight.check("update", load_config(None, {"recipe": "paper"}))
        preflight.check("update", load_config(None, {"learn.epochs": 9}))
    assert [record.args for record in caplog.records] == [("paper", "learn.epochs")]


def test_settings_beside_a_recipe_may_be_objects_and_keep_the_rest_of_the_recipe():
    config = RunConfig(recipe="paper", lora=LoraSettings(r=4))
    assert config == RunConfig(recipe="paper", lora={"r": 4})
    assert (config.lora.r, config.lora.target_modules) == (4, "query-value")


def test_the_settings_of_a_recipe_are_not_the_users(caplog):
    with caplog.at_level("INFO", "forgetlearn"):
        preflight.check("evaluate", load_config(None, {"recipe": "plain"}))
        preflight.warn_of_idle([load_config(None, {"recipe": "plain"})], {"recipe": "plain"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"keep.weight": 0, "keep.source": "mine.txt"}, "keep.source"),
        ({"keep.weight": 0, "lora.null_space": 0.9}, "lora.null_space"),
        ({"model.shard": True, "lora.null_space": 0.9}, "lora.null_space"),
        ({"learn.epochs": 3, "learn.max_epochs": 9}, "learn.max_epochs"),
        ({"learn.epochs": 4, "learn.until": "learned"}, "learn.epochs"),
    ],
)
def test_what_stages_train_on_may_have_no_effect(given, name, caplog):
    preflight.warn_of_idle([load_config(None, given)], given)
    assert [record.args[0] for record in caplog.records] == [name]
