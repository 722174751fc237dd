"""Typed records of forgetlearn's own files: manifest, summary, rows, chain of updates.

Any of these files may come from a stranger. Each is checked here when it is read, and nowhere else, so code that uses a
loaded record need not check types again. Fields that a record does not declare, such as those of a later version, are
kept. Fields are declared in the order in which they are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from forgetlearn.errors import RunError, plain, shown
from forgetlearn.storage import disk

REMEDY = "Was it written by forgetlearn? Restore it from a backup."
R = TypeVar("R", bound="Record")
BACK = 50.0  # percent of the old answers that count as brought back


def _file_name(name: str) -> str:
    if name in ("", ".", "..") or name != PurePosixPath(name).name or "\\" in name or "\0" in name:
        raise ValueError("must be the name of a file or folder, without a path")
    return name


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a null character")
    return text


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    json.dumps(data, allow_nan=False)
    return data


Object = Annotated[dict[str, Any], AfterValidator(_finite)]
Text = Annotated[str, AfterValidator(_no_null)]
FileName = Annotated[str, AfterValidator(_file_name)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]
Percent = Annotated[float, Field(ge=-1e-3, le=100 + 1e-3)]
Nats = Annotated[float, Field(ge=-700, le=700)]  # exp(value) stays finite
Modules = Text | list[Text] | dict[str, Number]
Answer = str | Annotated[list[str], Field(min_length=1)]  # in a list, the first is taught and the others are aliases


class Record(BaseModel):
    """Base class of all records: immutable, without type conversion, finite numbers only."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False, defer_build=True)

    @classmethod
    def parse(cls, data: object, file: Path, inside: str = "") -> Self:
        """Return the record in `data`, which was read from `file`; `inside` is the field that held it, if any.

        Raise RunError, naming the file and the field, if a field is missing or has an invalid value.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RunError(_problem(error, data, file, inside)) from None

    @classmethod
    def load(cls, file: Path) -> Self:
        """Return the record in a JSON file; raise RunError if the file cannot be read or a field is invalid."""
        return cls.parse(disk.read_json(file), file)

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON data: the fields that were set, and those of later versions."""
        return self.model_dump(exclude_unset=True)

    def save(self, file: Path) -> None:
        """Write the record to a JSON file, which is replaced in one step."""
        disk.write_json(file, self.as_json())


@cache
def _rows_of(kind: type[R]) -> TypeAdapter[list[R]]:
    return TypeAdapter(list[kind])  # type: ignore[valid-type]


def load_rows(kind: type[R], file: Path) -> list[R]:
    """Return the records of a JSONL file, one per line; raise RunError, naming the row (from 1), if one is damaged."""
    lines = disk.read_lines(file)
    try:
        rows = _rows_of(kind).validate_json(f"[{','.join(lines)}]")
        if len(rows) == len(lines):
            return rows
    except ValidationError:
        pass
    data = disk.read_rows(file)  # takes twice as long, but its errors name the line
    try:
        return _rows_of(kind).validate_python(data)
    except ValidationError as error:
        raise RunError(_problem(error, data, file)) from None


def save_rows(rows: Iterable[Record], file: Path) -> None:
    """Write records to a JSONL file, one per line; the file is replaced in one step."""
    disk.write_rows(file, [row.as_json() for row in rows])


# Scores -------------------------------------------------------------------------------------------


class Score(Record):
    """A mean in percent over `n` facts, with its 95 % interval.

    The mean is None if nothing was scored. The interval is None if n is 1.
    """

    mean: Percent | None
    low: Percent | None
    high: Percent | None
    n: Count
    errored: Count

    @field_validator("n")
    @classmethod
    def _has_a_mean(cls, n: int, fields: ValidationInfo) -> int:
        if n and fields.data.get("mean", 0) is None:
            raise ValueError("but mean is null")
        return n


class Mean(Score):
    """A score in a summary; `n + errored + not_asked` is the number of facts."""

    not_asked: Count


class ProbeScore(Record):
    """How many facts a model answers by their new answers, and by their old ones, when a kind of probe asks."""

    probe: Text
    protocol: Text
    new: Mean
    old: Mean


Scores = dict[str, dict[str, Score]]  # quantity -> protocol -> score
Phase = dict[str, dict[str, Mean]]  # quantity -> protocol -> score


class Row(Record):
    """A line of facts.jsonl: the scores of one fact in one phase under one protocol.

    A quantity is set if the protocol scores it. It is None if the fact was not asked or errored (`errors` says why).
    """

    model_config = ConfigDict(extra="ignore")

    fact: Text
    phase: Text
    protocol: Text
    errors: dict[str, str]
    reliability: Share | None = None
    generality: Share | None = None
    residue: Share | None = None
    locality: Share | None = None
    said: str | None = None
    said_rephrased: list[str | None] = []
    writes_on: bool = False  # an answer counts only at the beginning of `said`
    truncated: Count = 0  # number of answers cut off at the token limit
    predicted: list[list[int]] = []  # token ids for each locality probe; only in rows kept to resume a stage
    added_tokens: Number | None = None  # mean number that a context in the prompt adds to each question of the fact
    split: Text | None = None  # "validation" if forget.coef = auto was chosen on this fact
    old_from: Text | None = None

    def has(self, name: str) -> bool:
        """Return True if a field is set; a quantity is set if the row's protocol scores it."""
        return name in self.model_fields_set

    def score(self, quantity: str) -> float | None:
        """Return the score of a quantity, or None if it was not scored."""
        found: float | None = getattr(self, quantity)
        return found


class ProbeRow(Record):
    """A line of probes.jsonl: a question about a fact beyond its own wordings, and what the model answered.

    `score` is 1 if the answer is right after the update, `old` is 1 if it was right before it; None if that is unknown,
    or if nothing is right since the fact is only forgotten. Under the protocol `prefer` a row is about several
    questions: its prompt is empty. Under `absent`, an answer that gives none of `answers` is right.
    """

    fact: Text
    phase: Text
    probe: Text
    protocol: Text
    prompt: str | list[str]
    answers: list[str]
    said: str | None = None
    score: Share | None = None
    old: Share | None = None
    error: str = ""


class RetentionRow(Record):
    """A line of retention.jsonl: how well a fact of an earlier update still holds, under one protocol."""

    update: Count
    fact: Text
    protocol: Text
    said: str | None = None
    truncated: Count = 0
    retention: Share | None
    errors: dict[str, str]


class ProbeInput(Record):
    """An unrelated prompt of a fact in inputs.jsonl."""

    prompt: str


class Input(Record):
    """A line of inputs.jsonl: a fact. An answer that has aliases is a list."""

    id: Text
    prompt: str
    target_new: Answer = ""
    ground_truth: Answer | None = None
    locality: list[ProbeInput] = []

    @property
    def new(self) -> list[str]:
        """The new answer and its aliases; empty if there is no new answer."""
        new = self.target_new
        return new if isinstance(new, list) else [new] if new else []

    @property
    def old(self) -> list[str]:
        """The old answer and its aliases; empty if there is no old answer."""
        old = self.ground_truth
        return old if isinstance(old, list) else [old] if old else []


class Taught(Record):
    """A line of lessons.jsonl: what a stage trains a fact's prompt on, and how that text was made."""

    fact: Text
    stage: Text
    prompt: str
    text: str
    how: Text  # "sentence", made by asking the model; "own words", what it says by itself; or "bare", the answer alone
    why: Text = ""  # why it is bare, where a sentence was asked for
    others: list[str] = []  # sentences that end with the same answer, for other wordings


class Prompted(Record):
    """A record of a prompt: a question, or the turns of a chat."""

    prompt: str | list[str]

    @property
    def asked(self) -> str | tuple[str, ...]:
        """The prompt as a model is asked it."""
        return self.prompt if isinstance(self.prompt, str) else tuple(self.prompt)


class KeptText(Prompted):
    """A prompt to which training keeps the base's own answer."""

    text: str
    ends: bool  # False if the answer was cut off
    source: Text


class Step(Record):
    """A line of a stage's training log."""

    step: Count
    loss: Number


# The chain of updates -----------------------------------------------------------------------------


class UpdateFacts(Record):
    """A summary of an update's facts, without their texts."""

    source: Text
    used: Count
    known: Count | None
    forgotten: Count | None = None
    sha256: Text


class UpdateRows(Record):
    """The rows of the vocabulary that each stage could change."""

    forget: Text | None
    learn: Text | None


class UpdateModules(Record):
    """The modules that each stage could change."""

    forget: Modules | None
    learn: Modules | None


class Update(Record):
    """One of the updates that made a model."""

    when: Text
    method: Text
    coef: Number | None
    seed: Count
    base: Text | None
    base_sha256: Text | None
    weights_sha256: Text | None = None  # only for a base in memory
    adapter_sha256: Text | None = None  # of the adapter that the update began on, if it did
    taught_first: bool
    modules: UpdateModules
    rows: UpdateRows
    facts: UpdateFacts
    scores: Scores
    product: FileName
    files: dict[FileName, Text]

    @property
    def only_forgot(self) -> bool:
        """True if nothing was learned."""
        return self.modules.learn is None


class Chain(Record):
    """`forgetlearn.json`: the updates that made a model, oldest first."""

    updates: list[Update]
    sha256: Text


# A run's manifest ---------------------------------------------------------------------------------


class Rounding(Record):
    """How much of its change the product kept when it was stored in half precision."""

    share_changed: Share | None
    share_survived: float | None
    looked_at: Count


class Stage(Record):
    """A finished stage: its duration, the hashes of its files, and notes for people (any undeclared fields)."""

    seconds: Number
    files: dict[str, Text] = {}
    rounding: Rounding | None = None
    epochs: Count | None = None
    unlearned: list[Count] = []  # facts, by their place, that were not learned

    @property
    def notes(self) -> dict[str, Any]:
        """The notes, in the order in which they were written."""
        epochs = {"epochs": self.epochs} if self.epochs else {}
        return {
            **epochs,
            **(self.model_extra or {}),
            **({"rounding": self.rounding.as_json()} if self.rounding else {}),
        }


class ModelNotes(Record):
    """The details of a run's model that its pages show."""

    dtype: Text
    device: Text
    asked_in: Text
    parameters: Count


class Parent(Record):
    """What a run began on, the folder of the run that made that, if one did, and of an adapter the name of its base."""

    name: Text
    run: Text | None
    base: Text | None = None


class Manifest(Record):
    """`manifest.json` of a run folder."""

    format: Count
    command: list[Text]
    config: Object
    inputs: dict[str, Text | Count | None]
    versions: dict[str, Text]
    commit: Text | None
    machine: Text
    stages: dict[str, Stage]
    replaces: bool = False  # True while the folder holds an older run that is to be removed
    model: ModelNotes | None = None
    parent: Parent | None = None
    plan: Object = {}  # the plan that was made before the run
    lora: Text | None = None  # the modules that LoRA leaves unchanged, in words
    finished: bool = False
    results: dict[str, Text] = {}  # file name -> SHA-256
    peak_memory_gb: Number = 0


class Config(Record):
    """The recorded settings of a run that later commands read."""

    class Model(Record):
        """The settings of the base."""

        name: Text | None
        base_model_id: Text | None

    class Facts(Record):
        """The settings of the facts."""

        source: Text | None

    class Teach(Record):
        """The settings for teaching the old answers."""

        epochs: Count

    class Stage(Record):
        """The settings of forgetting or learning."""

        modules: Modules
        rows: Text = "all"

    model: Model
    facts: Facts
    teach: Teach
    forget: Stage
    learn: Stage


class ComparisonConfig(Record):
    """The recorded settings of a comparison. What is not declared here is checked by `validate`."""

    class Run(Record):
        """The settings that all cells share."""

        model: Config.Model

    run: Run
    compare: Object


# A run's results ----------------------------------------------------------------------------------


class Trial(Record):
    """A coefficient that was tried, and its scores."""

    coef: Number
    scores: dict[str, Percent | None]


class Choice(Record):
    """How the coefficient was chosen."""

    coef: Number
    validation: list[Text]
    trials: list[Trial]
    why: Text


class FactCounts(Record):
    """Counts of the records that were read, used, left out and scored."""

    source: Text
    reader: Text
    old_from: Text
    old_answers: dict[str, Count]
    without_old: dict[str, Count]
    read: Count
    used: Count
    set_aside: Count
    scored: Count
    left_out: dict[str, Count]
    left_out_probes: dict[str, Count]
    known: Count | None
    forgotten: Count | None
    not_read: list[Text]


class OnText(Record):
    """Perplexity on a text, and the KL divergence from the model of the phase before."""

    source: Text
    sha256: Text = ""
    tokens: Count
    windows: Count = 0
    loss: Nats = 0
    loss_low: Nats | None
    loss_high: Nats | None
    kl: Number | None
    kl_low: Number | None
    kl_high: Number | None
    perplexity: float


class TaskScore(Record):
    """A task's metric, in its own unit."""

    value: Number
    stderr: Number | None


class GeneralAnswer(Prompted):
    """A model's answer to a general prompt, and how far the model is there from the base's own answer."""

    said: str | None = None
    truncated: bool = False
    before: str | None = None  # what the base said
    tokens: Count = 0  # of the base's answer
    agreement: Share | None = None
    kl: Number | None = None  # nats per token
    error: str | None = None


class OnPrompts(Record):
    """Answers to the general prompts, and agreement (percent of tokens) and KL (nats per token) with the base's."""

    asked: Count
    compared: Count
    tokens: Count
    agreement: Percent | None = None
    agreement_low: Percent | None = None
    agreement_high: Percent | None = None
    kl: Number | None = None
    kl_low: Number | None = None
    kl_high: Number | None = None
    answers: list[GeneralAnswer]


class General(Record):
    """General ability in one phase."""

    prompts: OnPrompts | None = None
    text: OnText | None = None
    tasks: dict[str, dict[str, TaskScore]] = {}


class Retained(Record):
    """The scores of an earlier update's facts, asked again."""

    update: Count
    when: Text
    source: Text
    facts: Count
    superseded: Count
    scores: dict[str, Mean]


HOW = {"sentence": "as sentences", "own words": "in the model's own words", "bare": "as bare answers"}


class StageLessons(Record):
    """What a stage trained on: the number of facts by how their texts were made, and why some are bare."""

    how: dict[Text, Count]
    bare_because: dict[Text, Count] = {}
    quiz: bool = False  # it also trained on questions about them

    def in_words(self) -> str:
        """Return the counts as a text, such as "20 as sentences, 10 as bare answers (no reply says it: 8, ...)"."""
        reasons = ", ".join(f"{why}: {count}" for why, count in self.bare_because.items())
        counts = [f"{count} {HOW.get(how, how)}" for how, count in self.how.items()]
        quiz = "; and a quiz about them" if self.quiz else ""
        return ", ".join(counts) + (f" ({reasons})" if reasons else "") + quiz


class Learning(Record):
    """How far the learning stage came: passes over the facts, and the prompts of facts that it did not learn, by id."""

    epochs: Count
    unlearned: dict[Text, str] = {}


class Asked(Record):
    """A question, the old answer to it, and what the model says."""

    prompt: str
    old: str
    said: str


class NothingForgotten(Record):
    """Why a method that forgets has forgotten nothing, and what to do; the example is of an old answer not held."""

    asked_method: Text
    why: Text
    remedy: Text
    example: Asked | None = None

    @property
    def sentence(self) -> str:
        """The reason and the remedy, without the example."""
        return f"Asked for {self.asked_method}, but {self.why}, so nothing was forgotten. {self.remedy}"

    @property
    def example_line(self) -> str | None:
        """What the model says instead of an old answer; None without an example."""
        if (asked := self.example) is None:
            return None
        said = f'the model says "{asked.said}"' if asked.said else "the model says nothing"
        return f'not held, for example: asked "{asked.prompt}", {said}; the old answer is "{asked.old}"'


class TruthRow(Record):
    """A line of truth.jsonl: how likely wrong answers to a fact's prompt are, as a multiple of the right one."""

    fact: Text
    phase: Text
    ratio: Annotated[float, Field(ge=0)]


class TruthRatio(Record):
    """The truth ratios of the forgotten facts in a phase, and the test against a model that never knew them.

    `quality` is the p-value of a Kolmogorov-Smirnov test, None without such a model.
    """

    closeness: Share  # mean of min(ratio, 1 / ratio): 1 where right and wrong answers are equally likely
    n: Count
    quality: Share | None = None


class KeptFacts(Record):
    """The facts that should stay: how many were trained on, and the scores of the others by phase.

    `utility` is the harmonic mean of the shares that `parts` names.
    """

    source: Text
    trained: Count
    scored: Count
    scores: dict[Text, Phase]
    utility: dict[Text, Share]
    parts: list[Text]


class Relearning(Record):
    """How many steps of training on half of the facts bring them back, and the other half with them.

    The shares are of prompts that get their old answer after each number of `steps`; 0 is before.
    """

    model: Text  # "product", or "reference": a model that never knew the facts
    trained: Count  # facts
    steps: list[Count]
    same: list[Percent]  # the half that is trained on
    other: list[Percent]
    n_same: Count  # asked
    n_other: Count

    def back(self, half: str) -> int | None:
        """Return after how many steps at least half of the prompts get their answer; None if they never do."""
        shares = self.same if half == "same" else self.other
        return next((step for step, share in zip(self.steps, shares, strict=True) if step and share >= BACK), None)

    def when_back(self, half: str) -> str:
        """Return `back` in words, such as "after 4 steps"."""
        if not self.steps[-1]:
            return "without training"
        back = self.back(half)
        return f"not within {self.steps[-1]} steps" if back is None else f"after {back} step{'s' * (back != 1)}"


class Forgetting(Record):
    """What a run that only forgets measured, other than the scores of the facts."""

    epochs: Count | None = None  # of a method with a loss of its own
    not_gone: Count | None = None  # answers that were still likely when it ended
    kept: KeptFacts | None = None
    truth: dict[Text, TruthRatio] = {}
    reference: Text | None = None
    relearning: list[Relearning] = []


class Summary(Record):
    """`summary.json` of a run folder; a run that only scores has no coefficient and no product.

    If nothing was forgotten, `method` is what the run did: the plain method that learns in the same way.
    """

    method: Text
    coef: Number | None
    nothing_forgotten: NothingForgotten | None = None
    choice: Choice | None = None
    seed: Count
    facts: FactCounts
    phases: dict[str, Phase]
    product: FileName | None
    rounding: Rounding | None = None
    general: dict[str, General] = {}
    probes: dict[str, list[ProbeScore]] = {}  # by phase
    since_first: bool = False  # general ability "before" is that of the model before the first batch of a stream
    retention: list[Retained] = []
    lessons: dict[Text, StageLessons] = {}  # by stage
    kept: dict[Text, Count] = {}  # number of kept texts, by where their prompts come from
    rephrasings_trained: bool = False
    learning: Learning | None = None
    forgetting: Forgetting | None = None  # set if nothing was learned

    @property
    def last_phase(self) -> Phase:
        """The scores of the product: those of the last phase."""
        return self.phases[next(reversed(self.phases))]


# A stream of updates ------------------------------------------------------------------------------


class Batch(Record):
    """An update of a stream: how many facts of all batches so far the model says after it, by protocol."""

    folder: FileName
    facts: Count
    said: dict[str, Mean]  # facts of this batch and of those before it
    new: dict[str, Mean]  # facts of this batch
    earlier: dict[str, Mean]  # facts of the batches before it
    kl: Number | None = None  # nats per token from the model before the first batch, on the general prompts
    kl_low: Number | None = None
    kl_high: Number | None = None
    agreement: Percent | None = None  # of the tokens of its answers to the general prompts
    seconds: Number


class Stream(Record):
    """`stream.json`: one file of facts as several updates, each on the product of the one before."""

    method: Text
    model: Text
    source: Text
    facts: Count
    planned: Count  # number of batches
    updates_before: Count  # that had made the model before the first batch
    product: Text | None = None  # of the last batch that is done, from the stream's folder
    batches: list[Batch]


# Messages -----------------------------------------------------------------------------------------


def _problem(error: ValidationError, data: object, file: Path, inside: str = "") -> str:
    """Return a message that describes the first problem and counts the others."""
    problems = error.errors(include_url=False)
    first = problems[0]
    place = first["loc"]
    row = f"row {int(place[0]) + 1}: " if isinstance(data, list) and place else ""
    field = ".".join(filter(None, [inside, *(str(part) for part in _in_data(place, data)[1 if row else 0 :])]))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "missing":
        problem = "is missing"
    else:
        expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = expected if first["type"] == "value_error" else f"expected {expected}"
        problem = f"is {shown(first['input'])}, {expected}" if field else expected
    return f"{file}: {row}{plain(field)[:200]} {problem}{more}. {REMEDY}".replace("  ", " ")


def _in_data(place: tuple[int | str, ...], data: object) -> list[int | str]:
    """Return pydantic's location of a problem, without the parts that name a member of a union type."""
    found: list[int | str] = []
    for part in place:
        if isinstance(data, Mapping):
            found.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            found.append(part)
            data = data[part] if part < len(data) else None
    return found
