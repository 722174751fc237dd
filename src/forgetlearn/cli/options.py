"""Options of the commands. A flag for a setting takes its type and its help from the setting."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer

from forgetlearn.config import preflight
from forgetlearn.config.base import describe, locate, parse_assignments, read_yaml
from forgetlearn.config.schema import RunConfig, load_config, read_settings
from forgetlearn.models.module_names import parse

Command = Callable[..., None]
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
FLAGS: Mapping[str, str] = {
    "model.name": "--model",
    "facts.source": "--facts",
    "recipe": "--recipe",
    "method": "--method",
    "forget.coef": "--coef",
    "forget.modules": "--modules",
    "forget.validation": "--validation",
    "unlearn.relearn_steps": "--relearn",
    "seed": "--seed",
    "facts.old_from": "--old-from",
    "facts.limit": "--limit",
    "facts.strict": "--strict/--no-strict",
    "facts.columns": "--columns",
    "facts.aliases": "--aliases",
    "teach.epochs": "--teach-old",
    "learn.rephrasings": "--train-rephrasings",
    "train.answers": "--answers",
    "keep.source": "--keep",
    "model.prompt_template": "--prompt-template",
    "model.shard": "--shard",
    "train.deepspeed": "--deepspeed",
    "evaluate.max_damage": "--max-damage",
    "evaluate.probes": "--probes",
    "evaluate.general": "--general",
    "evaluate.tasks": "--tasks",
    "evaluate.engine": "--engine",
    "report_to": "--report-to",
}
READING = ("facts.old_from", "facts.limit", "facts.columns", "facts.aliases")  # how a file of facts is read
TRAINED_ON = ("recipe", "train.answers", "learn.rephrasings", "keep.source")  # what is trained on
INPUTS = ("model.name", "facts.source", *READING, "model.prompt_template")
# The default is shown unless it only says that nothing is set.
HELP = {
    name: description if default in ("null", "[]", "{}", "false") else f"{description} Default: {default}."
    for name, default, description in describe(RunConfig)
}

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags and --set win.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, NAME=VALUE; again for more. `forgetlearn settings` lists them."),
]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what forgetlearn wrote there.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Processes that the launcher should have started: others are an error."),
]


@dataclass(frozen=True)
class Given:
    """The settings on a command line: values by dotted name, and a file of settings."""

    values: Mapping[str, object]
    file: Path | None = None

    def flag(self, name: str) -> str | None:
        """Return the text of a setting given on the command line; None if it is not given there."""
        return str(self.values[name]) if name in self.values else None

    def or_recipe(self, name: str) -> Given:
        """Return the same settings, with this recipe unless a flag or the file names one."""
        in_file = read_yaml(self.file) if self.file else {}
        return Given({"recipe": in_file.get("recipe", name), **self.values}, self.file)

    @property
    def settings(self) -> dict[str, object]:
        """The settings that are given, by section: those of the file, with the flags' and --set's put over them."""
        return read_settings(self.file, self.values)

    def config(self, command: preflight.Command) -> RunConfig:
        """Return the config, merged from the file, the flags and --set, in this order.

        Raises:
            ConfigError: a setting is wrong, or is given for a command that does not use it.
        """
        return self.checked(command, load_config(self.file, self.values))

    def checked(self, command: preflight.Command, config: RunConfig) -> RunConfig:
        """Return a config, after it was checked as the command's; raise ConfigError as `config` does."""
        preflight.check(command, config, self.values)
        if command in ("update", "forget", "plan"):
            passed_over = () if command == "forget" else preflight.WARNED_BY_UPDATE
            preflight.warn_of_idle([config], self.values, passed_over=passed_over)
        return config


def takes(*names: str, files: bool = True) -> Callable[[Command], Command]:
    """Add the flags of these settings to a command, and, if `files`, also --config and --set.

    The command receives their values as its first argument, a `Given`.
    """
    flags = {
        name.replace(".", "__"): Annotated[_type_of(name), typer.Option(FLAGS[name], help=HELP[name])] for name in names
    }
    shared = {"from_file": ConfigOption, "assigned": SetOption} if files else {}

    def decorate(command: Command) -> Command:
        _given, *own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*_optional(flags), *(each.replace(kind=KEYWORD_ONLY) for each in own), *_optional(shared)]

        @functools.wraps(command)
        def run(from_file: Path | None = None, assigned: list[str] | None = None, **values: object) -> None:
            given = {name: values.pop(name.replace(".", "__")) for name in names}
            given = {name: value for name, value in given.items() if value is not None}
            if modules := given.get("forget.modules"):
                given["forget.modules"] = parse(str(modules))
            command(Given({**given, **parse_assignments(assigned or [])}, from_file), **values)

        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _optional(options: Mapping[str, object]) -> list[inspect.Parameter]:
    return [inspect.Parameter(name, KEYWORD_ONLY, default=None, annotation=option) for name, option in options.items()]


def _type_of(name: str) -> object:
    """Return the type of a setting's flag: the setting's own type if it is one number or a switch, else text."""
    _section, field = locate(RunConfig, tuple(name.split(".")))
    types = {field.annotation, *get_args(field.annotation)} if field else set()
    return next((number | None for number in (bool, int, float) if number in types), str | None)
