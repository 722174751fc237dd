"""A model and facts to a row per fact and protocol, and rows to a summary whose counts add up.

Each distinct (prompt, answer) is read once, in rows where a beginning that several share stands once, and
each distinct prompt answered once, in batches sorted by length; rows are then computed from what was read,
without the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from tqdm.auto import tqdm

from forgetlearn.config.schema import EvaluateSettings, ForgetSettings
from forgetlearn.errors import FactError, ModelError
from forgetlearn.evaluation import metrics
from forgetlearn.evaluation.generation import Generator, Room, end_ids, generator
from forgetlearn.facts import matching
from forgetlearn.facts import Fact
from forgetlearn.models import attention
from forgetlearn.models.batches import (
    GPU_ROW_TOKENS,
    ROW_TOKENS,
    Layout,
    choose_layout,
    computing,
    read_logits,
    shared_rows,
)
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.runtime import processes, sharding

Pair = tuple[str, str]
Row = dict[str, Any]
K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)
QUANTITIES = ("reliability", "generality", "residue")
NO_ROOMS: Mapping[str, Room] = MappingProxyType({})
MARGIN_TOKENS = 8  # beyond an answer's own tokens: for its end, and for a model that splits it into more of them


@dataclass(frozen=True)
class Reading:
    """What a model predicts for each token of an answer that it is shown (teacher forcing)."""

    wanted: tuple[int, ...]
    predicted: tuple[int, ...]
    logprob: float | None  # mean natural log-probability per answer token; None where `prefer` is not asked for


@dataclass(frozen=True)
class Generated:
    """A model's free answer: greedy, up to its end token or the line break that ends its room."""

    text: str
    truncated: bool


@dataclass(frozen=True)
class Failure:
    """Why something could not be scored."""

    reason: str


class Scorer:
    """Asks one model, in batches."""

    def __init__(self, lm: LanguageModel, settings: EvaluateSettings | None = None, name: str = "scoring") -> None:
        self.lm, self.name = lm, name
        self.settings = settings or EvaluateSettings()
        self.wants_logprobs = "prefer" in self.settings.protocols
        self.largest = self.settings.batch_size  # texts at once; less where memory has run out
        lm.to_device()

    def read(self, pairs: Iterable[Pair]) -> dict[Pair, Reading | Failure]:
        """A reading, or why there is none, for each distinct (prompt, answer)."""
        found: dict[Pair, Reading | Failure] = {}
        texts: dict[Pair, Encoded] = {}
        for pair, text in self.lm.encoder.encode_all(pairs).items():
            if isinstance(text, FactError):
                found[pair] = Failure(str(text))
            else:
                texts[pair] = text
        self.lm.model.eval()
        model = self.lm.model
        with sharding.no_gradients(model), computing(model, self.lm.device), attention.by_text(model):
            layout = self._layout(texts.values(), "shared")
            for batch in self._shown(self._batches(texts, layout), "reading"):
                readings = self._halving([texts[pair] for pair in batch], lambda some: self._read_batch(some, layout))
                found.update(zip(batch, readings, strict=True))
        return processes.merged(found)

    def say(self, prompts: Iterable[str], rooms: Mapping[str, Room] = NO_ROOMS) -> dict[str, Generated | Failure]:
        """Return the free answer to each distinct prompt, or a Failure that says why there is none.

        `rooms` says how long the answers to some prompts may be; others have one line of `max_new_tokens`.
        """
        found: dict[str, Generated | Failure] = {}
        ids: dict[str, Encoded] = {}
        context = self.lm.encoder.max_length
        for prompt in dict.fromkeys(prompts):
            try:
                encoded = self.lm.encoder.prompt_ids(prompt)
            except FactError as error:
                found[prompt] = Failure(str(error))
                continue
            if context and len(encoded) >= context:
                found[prompt] = Failure(f"the prompt is {len(encoded)} tokens, the model's context {context}")
            else:
                ids[prompt] = Encoded(tuple(encoded), len(encoded))
        plain = Room(self.settings.max_new_tokens)
        given = {prompt: rooms.get(prompt, plain) for prompt in ids}
        self.lm.model.eval()
        with generator(self.lm, self.settings) as engine:
            for batch in self._shown(self._prompt_batches(ids, given, engine), "answering"):
                asked = [(ids[prompt].ids, given[prompt]) for prompt in batch]
                answers = self._halving(asked, lambda some: self._say_batch(engine, some))
                found.update(zip(batch, answers, strict=True))
        return processes.merged(found)

    def _prompt_batches(
        self, ids: Mapping[str, Encoded], rooms: Mapping[str, Room], engine: Generator
    ) -> list[list[str]]:
        """Divide prompts into batches, those with more room apart: a batch takes as long as its longest answer.

        A prompt that nearly fills the context is asked by itself, for the longest of a batch limits the others.
        """
        if engine.batches_itself:
            return [list(ids)] if ids else []
        context, usual = self.lm.encoder.max_length, self.settings.max_new_tokens

        def fits(prompts: Sequence[str]) -> bool:
            widest, longest = max(len(ids[p].ids) for p in prompts), max(rooms[p].tokens for p in prompts)
            return not context or widest + longest <= context

        alone = {prompt for prompt in ids if not fits([prompt])}
        batches: list[list[str]] = []
        for has_more in (False, True):
            group = {p: ids[p] for p in ids if p not in alone and (rooms[p].tokens > usual) == has_more}
            if group:
                batches += self._batches(group, self._layout(group.values(), "padded"))
        together = [batch for batch in batches if fits(batch)]
        alone |= {prompt for batch in batches if not fits(batch) for prompt in batch}
        return [*together, *([prompt] for prompt in sorted(alone))]

    def _layout(self, texts: Iterable[Encoded], best: Literal["shared", "padded"]) -> Layout:
        return choose_layout(self.lm.model, _with_answers(texts), self.lm.pad_id, self.lm.device, best)

    def _batches(self, texts: Mapping[K, Encoded], layout: Layout) -> list[list[K]]:
        """Keys in batches: neighbours that share their beginnings, or texts of like length."""
        if layout in ("shared", "shared_by_text"):
            room = ROW_TOKENS.get(self.lm.device.type, GPU_ROW_TOKENS)
            return shared_rows(texts, self.settings.batch_size, room)
        size = 1 if layout == "single" else self.settings.batch_size
        order = sorted(texts, key=lambda key: len(texts[key].ids))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _shown(self, batches: list[list[K]], what: str) -> Iterator[list[K]]:
        """This process's batches, with a bar on a terminal.

        The batches are those of one process, so that each text is computed beside the same others.
        """
        own = processes.share(batches)
        total = sum(len(batch) for batch in own)
        with tqdm(total=total, desc=f"{self.name}: {what}", disable=processes.no_bar(), leave=False) as bar:
            for batch in own:
                yield batch
                bar.update(len(batch))

    def _halving(self, batch: list[T], run: Callable[[list[T]], list[R]]) -> list[R]:
        """What `run` gives for a batch, in halves where the device has no memory for the whole.

        Raises:
            ModelError: it has none for a single text, or the model is split over processes.
        """
        half = len(batch) // 2
        if len(batch) <= self.largest:
            try:
                return run(batch)
            except torch.OutOfMemoryError as error:
                # The parts of a split model are computed together: no process can go on alone with a half.
                if not half or sharding.is_sharded(self.lm.model):
                    raise ModelError(
                        f"{self.name}: {self.lm.device} has too little memory for {len(batch)} texts at once. Lower "
                        "evaluate.batch_size, or take a model in bfloat16 (--set model.dtype=bfloat16)."
                    ) from error
            self.largest = half
            log.warning("%s: out of memory with %d texts at once; going on with %d.", self.name, len(batch), half)
            if self.lm.device.type != "cpu":
                torch.accelerator.empty_cache()
        return [*self._halving(batch[:half], run), *self._halving(batch[half:], run)]

    def _read_batch(self, texts: Sequence[Encoded], layout: Layout = "padded") -> list[Reading | Failure]:
        logits, which = read_logits(self.lm.model, texts, layout, self.lm.pad_id, self.lm.device)
        wanted = torch.tensor([token for text in texts for token in text.answer_ids], device=logits.device)
        best = logits.argmax(dim=-1)
        asked = logits[which, wanted].float()
        # A NaN anywhere is the largest of its row, and makes the sum one.
        against = logits.float().logsumexp(dim=-1) if self.wants_logprobs else logits.gather(-1, best[:, None])[:, 0]
        logprobs = (asked - against[which]).cpu()
        finite = torch.isfinite(logprobs).tolist()
        numbers = zip(best[which].tolist(), logprobs.tolist(), finite, strict=True)
        return [self._reading(text, [next(numbers) for _token in text.answer_ids]) for text in texts]

    def _reading(self, text: Encoded, tokens: list[tuple[int, float, bool]]) -> Reading | Failure:
        predicted, logprobs, finite = zip(*tokens, strict=True)
        if not all(finite):
            return Failure("the model's logits are not finite")
        return Reading(text.answer_ids, predicted, sum(logprobs) / len(tokens) if self.wants_logprobs else None)

    def _say_batch(self, engine: Generator, asked: Sequence[tuple[tuple[int, ...], Room]]) -> list[Generated]:
        ends = end_ids(self.lm)
        prompts, rooms = zip(*asked, strict=True)
        said = engine.generate(prompts, rooms)
        return [self._cut(new, ends, room.lines) for new, room in zip(said, rooms, strict=True)]

    def _cut(self, ids: list[int], ends: list[int], lines: int = 1) -> Generated:
        """Return the answer up to its first end token or the end of its last allowed line."""
        stops = [index for index, token in enumerate(ids) if token in ends]
        body = self.lm.encoder.decode(ids[: stops[0]] if stops else ids).lstrip()
        text = matching.first_lines(body, lines)
        return Generated(text, truncated=not stops and body.count("\n") < lines)


def _with_answers(texts: Iterable[Encoded]) -> list[Encoded]:
    """Texts with at least one position to predict, for the layout check (a prompt alone has none)."""
    return [text if text.answer_ids or len(text.ids) < 2 else Encoded(text.ids, len(text.ids) - 1) for text in texts]


def score(
    lm: LanguageModel,
    facts: Iterable[Fact],
    *,
    phase: str,
    settings: EvaluateSettings | None = None,
    reference: Mapping[str, list[list[int]]] | None = None,
) -> list[Row]:
    """A row per fact and protocol: what the model knows in this phase.

    `reference` holds, per fact, the ids that the base predicts at the answer of each locality probe
    (`locality_predictions` of its rows); without it the model is its own reference.
    """
    settings = settings or EvaluateSettings()
    facts = list(facts)
    scorer = Scorer(lm, settings, phase)
    read = scorer.read(pair for fact in facts for pair in _all_pairs(fact))
    said: dict[str, Generated | Failure] = {}
    if "generate" in settings.protocols:
        said = scorer.say((p for fact in facts for p in _prompts(fact)), answer_rooms(lm, facts, settings))
    rows: list[Row] = []
    for fact in facts:
        rows += _teacher_forced_rows(fact, phase, read, settings)
        if "generate" in settings.protocols:
            rows += _generated_rows(fact, phase, said)
        rows += _locality_rows(fact, phase, read, (reference or {}).get(fact.id))
    return rows


def probe(lm: LanguageModel, facts: Iterable[Fact], settings: EvaluateSettings) -> list[Row]:
    """What the model says to each prompt, as rows for `known_facts`."""
    facts = list(facts)
    said = Scorer(lm, settings, "probe").say((fact.prompt for fact in facts), answer_rooms(lm, facts, settings))
    replies = {fact.id: said[fact.prompt] for fact in facts}
    return [
        {
            "fact": key,
            "protocol": "generate",
            "said": reply.text if isinstance(reply, Generated) else None,
            "truncated": isinstance(reply, Generated) and reply.truncated,
        }
        for key, reply in replies.items()
    ]


def answer_rooms(lm: LanguageModel, facts: Iterable[Fact], settings: EvaluateSettings) -> dict[str, Room]:
    """Return the room of each prompt whose accepted answers need more than one line of `max_new_tokens`."""
    rooms: dict[str, Room] = {}
    for fact in facts:
        answers = (*fact.new_answers, *fact.old_answers)
        lines = max(map(matching.lines_of, answers))
        # Only an answer with that many bytes can have that many tokens, so that most are not tokenised here.
        long = [answer for answer in answers if len(answer.encode()) + MARGIN_TOKENS > settings.max_new_tokens]
        found = lm.encoder.encode_all((fact.prompt, answer) for answer in long) if long else {}
        lengths = [len(text.answer_ids) + MARGIN_TOKENS for text in found.values() if isinstance(text, Encoded)]
        room = Room(max([settings.max_new_tokens, *lengths]), lines)
        if room == Room(settings.max_new_tokens):
            continue
        for prompt in _prompts(fact):
            other = rooms.get(prompt, room)
            rooms[prompt] = Room(max(room.tokens, other.tokens), max(room.lines, other.lines))
    return rooms


def locality_predictions(rows: Iterable[Row]) -> dict[str, list[list[int]]]:
    """Per fact, the ids predicted at the locality probes: the reference for later phases."""
    return {row["fact"]: row["predicted"] for row in rows if row["protocol"] == "agreement" and "predicted" in row}


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """quantity -> protocol -> mean in percent with its interval and counts, for the rows of one phase."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for quantity in (*QUANTITIES, "locality"):
        for protocol in dict.fromkeys(row["protocol"] for row in rows if quantity in row):
            own = [row for row in rows if row["protocol"] == protocol]
            errored = [row for row in own if quantity in row["errors"]]
            scores = [row[quantity] for row in own if row[quantity] is not None]
            mean = metrics.mean_with_interval(
                scores, errored=len(errored), not_asked=len(own) - len(errored) - len(scores)
            )
            table.setdefault(quantity, {})[protocol] = asdict(mean)
    return table


def known_facts(facts: Iterable[Fact], rows: Iterable[Row]) -> list[Fact]:
    """Facts whose old answer the model gives when it is asked (rows of the `generate` protocol)."""
    said: dict[str, str] = {row["fact"]: row["said"] or "" for row in rows if row["protocol"] == "generate"}
    return [fact for fact in facts if matching.matches(said.get(fact.id, ""), fact.old_answers)]


def held_facts(facts: Iterable[Fact], base_rows: Sequence[Row], ask: Callable[[], list[Row]]) -> list[Fact]:
    """Facts whose old answer the base gives: from its rows where `generate` was scored, else from `ask` (a probe)."""
    was_asked = any(row["protocol"] == "generate" for row in base_rows)
    return known_facts(facts, base_rows if was_asked else ask())


def facts_to_forget(facts: Iterable[Fact], known: Iterable[Fact], settings: ForgetSettings) -> list[Fact]:
    """Facts whose old answer is forgotten: those that the base gives it for, or all that have one."""
    return list(known) if settings.only_known else [fact for fact in facts if fact.ground_truth]


def _prompts(fact: Fact) -> tuple[str, ...]:
    return (fact.prompt, *fact.rephrase_prompts)


def _pairs(fact: Fact) -> dict[str, list[Pair]]:
    """Return the pairs to read for each quantity: the answer that is taught or forgotten, without its aliases."""
    return {
        "reliability": [(fact.prompt, fact.target_new)],
        "generality": [(prompt, fact.target_new) for prompt in fact.rephrase_prompts],
        "residue": [(prompt, fact.ground_truth) for prompt in _prompts(fact)] if fact.ground_truth else [],
    }


def _all_pairs(fact: Fact) -> Iterator[Pair]:
    for pairs in _pairs(fact).values():
        yield from pairs
    for probe in fact.locality:
        yield (probe.prompt, probe.answer)


def _row(fact: Fact, phase: str, protocol: str, scores: Mapping[str, list[float | Failure]]) -> Row:
    """A row with the mean per quantity; None where nothing was asked, and the reason where it failed."""
    row: Row = {"fact": fact.id, "phase": phase, "protocol": protocol, "errors": {}}
    for quantity, values in scores.items():
        failures = [value.reason for value in values if isinstance(value, Failure)]
        numbers = [value for value in values if not isinstance(value, Failure)]
        row[quantity] = sum(numbers) / len(numbers) if numbers and not failures else None
        if failures:
            row["errors"][quantity] = failures[0]
    return row


def _teacher_forced_rows(
    fact: Fact, phase: str, read: Mapping[Pair, Reading | Failure], settings: EvaluateSettings
) -> Iterator[Row]:
    rules = {"token": metrics.token_accuracy, "exact": metrics.exact_match}
    for protocol, rule in rules.items():
        if protocol in settings.protocols:
            yield _row(
                fact,
                phase,
                protocol,
                {quantity: [_apply(rule, read[pair]) for pair in pairs] for quantity, pairs in _pairs(fact).items()},
            )
    if "prefer" in settings.protocols:
        yield _row(fact, phase, "prefer", _preferences(fact, read))


def _apply(rule: Callable[[Sequence[int], Sequence[int]], float], reading: Reading | Failure) -> float | Failure:
    return reading if isinstance(reading, Failure) else rule(reading.predicted, reading.wanted)


def _preferences(fact: Fact, read: Mapping[Pair, Reading | Failure]) -> dict[str, list[float | Failure]]:
    """Is the new answer more likely than the old one (residue: the other way round)? Each without its aliases."""

    def compare(prompt: str, first: str, second: str) -> float | Failure:
        one, two = read[prompt, first], read[prompt, second]
        if isinstance(one, Failure):
            return one
        if isinstance(two, Failure):
            return two
        assert one.logprob is not None, "read without `prefer`"
        assert two.logprob is not None, "read without `prefer`"
        return metrics.preference(one.logprob, two.logprob)

    old, new = fact.ground_truth, fact.target_new
    if not old:
        return {quantity: [] for quantity in QUANTITIES}
    return {
        "reliability": [compare(fact.prompt, new, old)],
        "generality": [compare(prompt, new, old) for prompt in fact.rephrase_prompts],
        "residue": [compare(prompt, old, new) for prompt in _prompts(fact)],
    }


def _generated_rows(fact: Fact, phase: str, said: Mapping[str, Generated | Failure]) -> Iterator[Row]:
    def judge(rule: Callable[[str, str], float], prompt: str, answers: Sequence[str]) -> float | Failure:
        reply = said[prompt]
        return reply if isinstance(reply, Failure) else matching.matches(reply.text, answers, rule)

    accepted = {"reliability": fact.new_answers, "generality": fact.new_answers, "residue": fact.old_answers}
    for protocol, rule in (("generate", matching.same_text), ("contains", matching.contains)):
        scores = {
            quantity: [judge(rule, prompt, accepted[quantity]) for prompt, _taught in pairs]
            for quantity, pairs in _pairs(fact).items()
        }
        row = _row(fact, phase, protocol, scores)
        if protocol == "generate":
            replies = [said[prompt] for prompt in _prompts(fact)]
            texts = [reply.text if isinstance(reply, Generated) else None for reply in replies]
            row |= {"said": texts[0], "said_rephrased": texts[1:]}
            row["truncated"] = sum(isinstance(reply, Generated) and reply.truncated for reply in replies)
        yield row


def _locality_rows(
    fact: Fact, phase: str, read: Mapping[Pair, Reading | Failure], reference: list[list[int]] | None
) -> Iterator[Row]:
    readings = [read[probe.prompt, probe.answer] for probe in fact.locality]
    predicted = [list(reading.predicted) if isinstance(reading, Reading) else [] for reading in readings]
    before = predicted if reference is None else reference
    agreement: list[float | Failure] = [
        reading if isinstance(reading, Failure) else _agreement(reading, was)
        for reading, was in zip(readings, before, strict=True)
    ]
    yield _row(fact, phase, "agreement", {"locality": agreement}) | {"predicted": predicted}
    accuracy = [_apply(metrics.token_accuracy, reading) for reading in readings]
    yield _row(fact, phase, "accuracy", {"locality": accuracy})


def _agreement(reading: Reading, before: list[int]) -> float | Failure:
    if len(before) != len(reading.predicted):
        return Failure("the base could not be read at this probe")
    return metrics.token_accuracy(reading.predicted, before)
