"""Typed records of the files that forgetlearn writes and reads: manifest, summary, rows, chain of updates.

Any of these files may come from a stranger. Each kind is checked here, when it is read, and nowhere else: what passes
can be used without looking at types again. Fields that are not named here are kept and not looked at, so that files of
later versions are read too; those with a default were not written by every earlier version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from forgetlearn.errors import RunError, plain
from forgetlearn.storage import disk

REMEDY = "Was it written by forgetlearn? Restore it from a backup."
SHOWN = 60  # characters of a wrong value


def _file_name(name: str) -> str:
    if name in ("", ".", "..") or name != PurePosixPath(name).name or "\\" in name or "\0" in name:
        raise ValueError("must be the name of a file or folder, without a path")
    return name


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a null character")
    return text


def _as_json(data: dict[str, Any]) -> dict[str, Any]:
    json.dumps(data, allow_nan=False)
    return data


Object = Annotated[dict[str, Any], AfterValidator(_as_json)]  # whose numbers are finite


def _hashes_are_text(inputs: dict[str, Any]) -> dict[str, Any]:
    if odd := [name for name, value in inputs.items() if name.endswith("_sha256") and isinstance(value, int)]:
        raise ValueError(f"{odd[0]} must be text or null")
    return inputs


Text = Annotated[str, AfterValidator(_no_null)]
FileName = Annotated[str, AfterValidator(_file_name)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]
Percent = Annotated[float, Field(ge=-1e-3, le=100 + 1e-3)]
Nats = Annotated[float, Field(ge=-700, le=700)]  # exp of it is a number
Modules = Text | list[Text] | dict[str, Number]


class Record(BaseModel):
    """Base of all records: immutable, without type conversion, and with finite numbers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False, defer_build=True)


class Score(Record):
    """A mean in percent with its interval, over `n` facts; None where nothing was scored."""

    mean: Percent | None
    low: Percent | None
    high: Percent | None
    n: Count
    errored: Count

    @model_validator(mode="after")
    def _whole(self) -> Score:
        if (self.low is None) != (self.high is None) or (self.mean is None and self.low is not None):
            raise ValueError("mean, low and high must be numbers, or the interval null, or all three")
        return self


class Mean(Score):
    """A score of a summary, whose counts add up to all facts."""

    not_asked: Count


Scores = dict[str, dict[str, Score]]  # quantity -> protocol -> score


# The chain of updates -----------------------------------------------------------------------------


class UpdateFacts(Record):
    """A summary of an update's facts, without their texts."""

    source: Text
    used: Count
    known: Count | None
    sha256: Text


class UpdateRows(Record):
    """Which rows of the vocabulary each stage could change."""

    forget: Text | None = None
    learn: Text | None = None


class UpdateModules(Record):
    """Which modules each stage could change."""

    forget: Modules | None = None
    learn: Modules | None = None


class Update(Record):
    """One of the updates that made a model."""

    when: Text
    method: Text
    coef: Number | None
    seed: Count
    base: Text | None
    base_sha256: Text | None
    weights_sha256: Text | None = None
    taught_first: bool
    modules: UpdateModules = UpdateModules()
    rows: UpdateRows = UpdateRows()
    facts: UpdateFacts
    scores: Scores
    product: FileName
    files: dict[FileName, Text]


class Chain(Record):
    """`forgetlearn.json`: the updates that made a model, oldest first."""

    updates: list[Update]
    sha256: Text | None = None


# A run's manifest ---------------------------------------------------------------------------------


class Rounding(Record):
    """How much of its change a product kept when it was stored in half precision."""

    share_changed: Share | None
    share_survived: float | None
    looked_at: Count


class Stage(Record):
    """A finished stage: its seconds, the hashes of its files, and its notes."""

    seconds: Number = 0
    files: dict[str, Text] = {}
    rounding: Rounding | None = None


class ModelTold(Record):
    """The details of a run's model that pages show."""

    dtype: Text
    device: Text
    asked_in: Text
    parameters: Count


class Parent(Record):
    """The base of a run, and the run that made it if one did."""

    name: Text
    run: Text | None


class Manifest(Record):
    """`manifest.json` of a run folder."""

    format: Count = 1
    command: list[Text]
    config: Object
    inputs: Annotated[dict[str, Text | Count | None], AfterValidator(_hashes_are_text)]
    versions: dict[str, Text]
    commit: Text | None = None
    machine: Text
    stages: dict[str, Stage]
    model: ModelTold = Field(default=None, validate_default=False)  # type: ignore[assignment]
    parent: Parent | None = None
    results: dict[str, Text] = {}
    sha256: Text | None = None


class ModelConfig(Record):
    """The recorded settings that name the base."""

    name: Text | None
    base_model_id: Text | None


class FactsConfig(Record):
    """The recorded settings that name the source of the facts."""

    source: Text | None


class TeachConfig(Record):
    """The recorded settings of teaching the old answers."""

    epochs: Count


class StageConfig(Record):
    """The recorded settings of forgetting or learning that pages show."""

    modules: Modules
    rows: Text = "all"


class Config(Record):
    """The recorded settings of a run that are read again."""

    model: ModelConfig
    facts: FactsConfig
    teach: TeachConfig
    forget: StageConfig
    learn: StageConfig


class RunManifest(Manifest):
    """The manifest of an update, or of scores."""

    config: Config  # type: ignore[assignment]


class ComparedConfig(Record):
    """Those of a comparison's recorded settings that its page shows."""

    model: ModelConfig


class ComparisonConfig(Record):
    """The recorded settings of a comparison; `settings.validate` checks the rest of their contents."""

    run: ComparedConfig
    compare: Object


class ComparisonManifest(Manifest):
    """The manifest of a comparison."""

    config: ComparisonConfig  # type: ignore[assignment]


# A run's results ----------------------------------------------------------------------------------


class Trial(Record):
    """A coefficient that was tried."""

    coef: Number
    scores: dict[str, Percent | None]


class Choice(Record):
    """How the coefficient was chosen."""

    coef: Number
    validation: list[Text]
    trials: list[Trial]
    why: Text


class FactCounts(Record):
    """Counts of the records that were read: used, left out, scored."""

    source: Text
    reader: Text
    old_from: Text
    read: Count
    used: Count
    set_aside: Count = 0
    scored: Count = 0
    left_out: dict[str, Count]
    left_out_probes: dict[str, Count]
    known: Count | None
    forgotten: Count | None = None
    old_answers: dict[str, Count] = {}
    without_old: dict[str, Count] = {}
    not_read: list[Text] = []

    @model_validator(mode="after")
    def _whole(self) -> FactCounts:
        if len({"old_answers", "without_old"} & self.model_fields_set) == 1:
            raise ValueError("old_answers and without_old must both be there, or neither")
        return self


class OnText(Record):
    """Perplexity on a text, and how far the model is from the one before."""

    source: Text
    tokens: Count
    loss_low: Nats | None
    loss_high: Nats | None
    perplexity: float
    kl: Number | None
    kl_low: Number | None
    kl_high: Number | None

    @model_validator(mode="after")
    def _whole(self) -> OnText:
        if (self.loss_low is None) != (self.loss_high is None) or (self.kl_low is None) != (self.kl_high is None):
            raise ValueError("an interval must have both ends, or neither")
        return self


class TaskScore(Record):
    """A task's metric, in its own unit."""

    value: Number
    stderr: Number | None


class General(Record):
    """General ability in one phase."""

    text: OnText = Field(default=None, validate_default=False)  # type: ignore[assignment]
    tasks: dict[str, dict[str, TaskScore]] = {}


class Retained(Record):
    """One of the updates before the last, asked again."""

    update: Count
    when: Text
    source: Text
    facts: Count
    superseded: Count
    scores: dict[str, Score]


class Summary(Record):
    """`summary.json` of a run folder."""

    method: Text
    coef: Number | None
    choice: Choice | None = None
    seed: Count
    facts: FactCounts
    phases: dict[str, dict[str, dict[str, Mean]]]
    product: FileName | None
    rounding: Rounding | None = None
    general: dict[str, General] = {}
    retention: list[Retained] = []

    @model_validator(mode="after")
    def _counts_of_choice(self) -> Summary:
        if self.choice is not None and not {"set_aside", "scored"} <= self.facts.model_fields_set:
            raise ValueError("facts.set_aside and facts.scored are missing, though a coefficient was chosen")
        return self


class Row(Record):
    """A line of `facts.jsonl`: what one fact scored in one phase by one protocol."""

    fact: Text
    phase: Text
    protocol: Text
    errors: dict[str, str]
    reliability: Share | None = None
    generality: Share | None = None
    locality: Share | None = None
    residue: Share | None = None
    said: str | None = None
    said_rephrased: list[str | None] = []


class Input(Record):
    """A line of `inputs.jsonl`: a fact; an answer with its aliases is a list."""

    id: Text
    prompt: str
    target_new: str | Annotated[list[str], Field(min_length=1)]
    ground_truth: str | Annotated[list[str], Field(min_length=1)] | None = None


class Step(Record):
    """A line of a stage's log."""

    step: Count
    loss: Number


# Reading ------------------------------------------------------------------------------------------

ROWS: dict[type[Record], TypeAdapter[Any]] = {}


def check(kind: type[Record], data: Any, file: Path) -> None:
    """Raise RunError, naming the field and its value, if the data from `file` is not a record of this kind."""
    try:
        kind.model_validate(data)
    except ValidationError as error:
        raise RunError(_problem(error, data, file)) from None


def read(kind: type[Record], file: Path) -> dict[str, Any]:
    """Read the record in a JSON file, including fields that its kind does not define.

    Raises:
        RunError: the file cannot be read, or a field of it is missing or has a value that it cannot have.
    """
    data = disk.read_json(file)
    check(kind, data, file)
    return data


def read_rows(kind: type[Record], file: Path) -> list[dict[str, Any]]:
    """Read the records in the lines of a JSONL file, as `read` does; messages count rows from 1."""
    rows: list[dict[str, Any]] = disk.read_rows(file)
    try:
        ROWS.setdefault(kind, TypeAdapter(list[kind])).validate_python(rows)  # type: ignore[valid-type]
    except ValidationError as error:
        raise RunError(_problem(error, rows, file)) from None
    return rows


def _problem(error: ValidationError, data: Any, file: Path) -> str:
    """Return one message: the first problem, and the number of others."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = first["loc"]
    row = f"row {int(place[0]) + 1}: " if isinstance(data, list) and place else ""
    field = ".".join(str(part) for part in _in_data(place, data)[1 if row else 0 :])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "missing":
        said = "is missing"
    else:
        expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = expected if first["type"] == "value_error" else f"expected {expected}"
        said = f"is {_shown(first['input'])}, {expected}" if field else expected
    return f"{file}: {row}{plain(field)[:200]} {said}{more}. {REMEDY}".replace("  ", " ")


def _in_data(place: tuple[int | str, ...], data: Any) -> list[int | str]:
    """Return pydantic's location of a problem without the parts that name variants of a type."""
    found: list[int | str] = []
    for part in place:
        if isinstance(data, Mapping):
            found.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            found.append(part)
            data = data[part] if part < len(data) else None
    return found


def _shown(value: object) -> str:
    """Format a value for a message, in one short line."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a huge number"
    if isinstance(value, (Mapping, list)):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value)
    return plain(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
