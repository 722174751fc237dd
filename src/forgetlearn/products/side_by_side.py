"""Ask a model before and after a run's update: the same questions, each side in its own conversation.

If the product is an adapter on the base, one model in memory is both sides; otherwise there are two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from forgetlearn.config.base import validate
from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import FactError, RunError
from forgetlearn.evaluation.generation import Room, generator_in_memory
from forgetlearn.facts import Fact, only_old, read_facts
from forgetlearn.facts.matching import first_lines
from forgetlearn.facts.touched import touched
from forgetlearn.models import lora
from forgetlearn.models.language_model import LanguageModel, load_model
from forgetlearn.products.chain import Base, check_product, product_of
from forgetlearn.products.restore import check_base, finished_run, place_of_base, runs_of
from forgetlearn.storage.digests import is_recorded
from forgetlearn.storage.records import Summary
from forgetlearn.storage.run_folder import INPUTS, SUMMARY, RunFolder
from forgetlearn.weights.checkpoint_folder import ADAPTER

BASE = "base"
MOST_TOKENS = 256  # of an answer
Emit = Callable[[str], None]
Turns = Sequence[str]  # user, assistant, user, ...: a conversation


@dataclass(frozen=True)
class Answer:
    """What a model answered, and why the answer is over: it ended, it was cut off, it was stopped, or never began.

    `note` says more about the second and the last.
    """

    text: str
    ending: Literal["end", "limit", "stopped", "problem"]
    note: str = ""


@dataclass
class SideBySide:
    """The model of a run before its update (`base`) and after it (the name of its last phase), and the run's facts."""

    name: str  # of the run's folder
    models: Mapping[str, LanguageModel]  # by side, the base first
    facts: Sequence[Fact]
    most_tokens: int = MOST_TOKENS

    @property
    def sides(self) -> tuple[str, ...]:
        """The names of the two sides, the base first."""
        return tuple(self.models)

    def answer(self, side: str, turns: Turns, emit: Emit, stopped: Callable[[], bool] = lambda: False) -> Answer:
        """Return the greedy answer of one side to a conversation that ends with the user's turn.

        `emit` gets the text in pieces while it is generated; together they are the answer's text. `stopped` is asked
        after each token. KeyboardInterrupt stops the answer too.
        """
        lm = self.models[side]
        try:
            if not all(turn.strip() for turn in turns):
                raise FactError("A turn is empty. Give a question.")
            "".join(turns).encode()
            prompt = lm.encoder.prompt_ids(tuple(turns))
        except (FactError, UnicodeEncodeError) as error:  # the latter for half of a surrogate pair
            return Answer("", "problem", str(error))
        if lm.encoder.max_length and len(prompt) >= lm.encoder.max_length:
            problem = f"the conversation has {len(prompt)} tokens, and the model's context {lm.encoder.max_length}."
            return Answer("", "problem", f"{problem} Clear it, or ask something shorter.")
        # What a model of plain text writes on after a line is not part of its answer.
        room = Room(self.most_tokens, lines=1 if lm.encoder.writes_on else self.most_tokens)
        shown = _Shown(emit, room.lines)
        with self._as(side), generator_in_memory(lm) as generator:
            try:
                ids, ended = generator.stream(prompt, room, shown.add, stopped)
            except KeyboardInterrupt:
                return Answer(shown.text, "stopped")
        if ended or stopped():
            return Answer(shown.text, "end" if ended else "stopped")
        full = "" if len(ids) >= room.tokens else ": the model's context is full"
        return Answer(shown.text, "limit", f"cut off after {len(ids)} token{'s' * (len(ids) != 1)}{full}")

    def touched(self, question: str) -> list[Fact]:
        """Return the run's facts that a question touches, at most three; see `facts.touched`."""
        return touched(question, self.facts)

    @contextmanager
    def _as(self, side: str) -> Iterator[None]:
        """Let the model be this side: if one model is both, the base is that without its adapter."""
        models = list(self.models.values())
        if side == BASE and models[0] is models[1]:
            with lora.put_aside(models[0].model, lora.PRODUCT):
                yield
        else:
            yield


@dataclass
class Conversation:
    """The turns of each side. A question that a side did not answer is not among them."""

    turns: dict[str, list[str]] = field(default_factory=dict)

    def asking(self, side: str, question: str) -> list[str]:
        """Return a side's turns, followed by a question."""
        return [*self.turns.get(side, []), question]

    def add(self, side: str, question: str, answer: Answer) -> None:
        """Remember a question and its answer, even if that was cut off."""
        if answer.text:
            self.turns[side] = [*self.asking(side, question), answer.text]


class _Shown:
    """The part of a growing reply that is shown: without white space around it, and of its first lines only."""

    def __init__(self, emit: Emit, lines: int) -> None:
        self.emit, self.lines = emit, lines
        self.raw = self.text = ""

    def add(self, piece: str) -> None:
        self.raw += piece
        shown = first_lines(self.raw, self.lines)
        if len(shown) > len(self.text):
            new, self.text = shown[len(self.text) :], shown
            self.emit(new)


def open_run(
    run: str | Path,
    base: str | Path | None = None,
    *,
    most_tokens: int = MOST_TOKENS,
    trust_remote_code: bool = False,
) -> SideBySide:
    """Load the model of a finished run, or of a stream of runs, before and after its update.

    The base is the one that the run recorded, or `base` (a folder, a GGUF file or a hub id); either is verified by its
    hash. With teaching, it is the taught model, as in the run's scores. Dtype, quantisation and prompt template are the
    run's; whether code of the model's repository may run is not for a folder to say.

    Raises:
        RunError: the run is not finished or made no product, or its base or product is gone or was changed.
        ModelError: `base` is not the run's base, or a model cannot be loaded.
    """
    runs = runs_of(run)
    first = finished_run(runs[0])
    last = finished_run(runs[-1]) if len(runs) > 1 else first
    product, origin = product_of(last.path), Base.of(first)
    check_product(product)
    root = _root(first, origin, base)
    recorded = validate(ModelSettings, first.manifest.config["model"], where=str(first.path))
    kept = {name: getattr(recorded, name) for name in ("dtype", "quantization", "prompt_template")}
    settings = ModelSettings(**kept, trust_remote_code=trust_remote_code)
    after = _last_phase(last)
    if not (product / ADAPTER).is_file():
        models = {BASE: _load(settings, _start(origin, root)), after: _load(settings, product)}
    else:
        updated = _load(settings, root)
        updated.model = lora.load(updated.model, product, lora.PRODUCT, device=updated.device)
        models = {BASE: _load(settings, _start(origin, root)) if origin.adapter else updated, after: updated}
    return SideBySide(Path(run).resolve().name, models, _facts(runs), most_tokens)


def _facts(runs: Sequence[Path]) -> list[Fact]:
    """Return the facts of runs; of a fact that several of them update, the last."""
    found: dict[str, Fact] = {}
    for run in runs:
        only_forgot = Summary.load(run / SUMMARY).forgetting is not None
        facts = read_facts(run / INPUTS, purpose="forget" if only_forgot else "learn")
        found |= {fact.prompt: only_old(fact) if only_forgot else fact for fact in facts}
    return list(found.values())


def _last_phase(run: RunFolder) -> str:
    return next(reversed(Summary.load(run.path / SUMMARY).phases))


def _root(run: RunFolder, origin: Base, base: str | Path | None) -> Path:
    """Return the folder of the weights that a run began on, under any adapter; raise as `open_run` does."""
    place = place_of_base(run, base)
    check_base(run, place, taught=True)
    adapter = Path(origin.adapter) if origin.adapter else None
    if adapter and not (adapter.is_dir() and is_recorded(adapter, origin.adapter_sha256)):
        raise RunError(f"{run.path}: the adapter {adapter} that it began on is gone or was changed.")
    return place


def _start(origin: Base, root: Path) -> Path:
    """Return the folder of the model that a run began on: its base, or the adapter of an earlier update."""
    return Path(origin.adapter) if origin.adapter else root


def _load(settings: ModelSettings, folder: Path) -> LanguageModel:
    lm = load_model(settings.model_copy(update={"name": str(folder)}))
    lm.model.eval()
    return lm
