"""Decide which texts each optimiser step of a stage shows.

Each epoch shows the facts in a new order, each fact in one of its wordings. Beside them, each step shows some of the
texts that are kept.

A stage can end when every fact is learned: the model predicted the whole answer when its own prompt was last shown, and
once in another wording. If wrong answers in other wordings counted too, many facts would seldom all be right at once,
and the stage would be much longer and change much more (docs/experiments.md). A learned fact rests every other epoch.
A stage that forgets ends in the same way: there, "right" and "learned" mean that the answer is gone (`objectives`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils.data import IterableDataset

from forgetlearn.config.schema import TrainSettings
from forgetlearn.models.batches import common_length
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.top_logprobs import TopLogprobs
from forgetlearn.runtime import processes

T = TypeVar("T")
Wordings = tuple[Encoded, ...]
# Tokens of kept texts in a step, as a share of the facts' tokens, so that a step takes at most 1.5 times as long.
KEPT_SHARE = 0.4
KEPT_SEED = 7_000_003  # the order of kept texts is drawn apart from that of facts


@dataclass(frozen=True)
class Kept:
    """Texts that the base wrote, with its most likely tokens at each token of their answers.

    The loss adds `weight` times the mean divergence (KL) of the model from the base at these tokens.
    """

    texts: tuple[Encoded, ...]
    tops: tuple[TopLogprobs, ...]
    weight: float

    def __bool__(self) -> bool:
        return bool(self.texts) and self.weight > 0

    def base(self, indices: Sequence[int]) -> TopLogprobs:
        """Return the base's most likely tokens at the answers of these texts, text after text."""
        tops = [self.tops[index] for index in indices] or [TopLogprobs(self.tops[0].ids[:0], self.tops[0].logprobs[:0])]
        return TopLogprobs(torch.cat([top.ids for top in tops]), torch.cat([top.logprobs for top in tops]))


@dataclass(frozen=True)
class MicroBatch:
    """The texts of one forward pass of all processes: of facts, given by their indices, and of kept texts.

    `n_kept_tokens` counts the answer tokens of all kept texts in the optimiser step, `n_facts` its facts.
    """

    facts: tuple[int, ...]
    texts: tuple[Encoded, ...]
    kept: tuple[int, ...] = ()
    n_kept_tokens: int = 0
    n_facts: int = 0


class Progress(BaseModel):
    """How far a schedule is: what a checkpoint needs to continue with the same steps."""

    model_config = ConfigDict(extra="forbid")

    epoch: int = 0
    step: int = 0  # steps done in this epoch
    kept: int = 0  # kept texts shown so far
    right: list[bool]  # for each fact: whether its answer was predicted when its own prompt was last shown
    reworded: list[bool]  # for each fact: whether it was ever predicted in another wording
    rested: list[bool]  # for each fact: whether the epoch before this one left it out
    seen: dict[int, bool] = {}  # the facts visited in this epoch, and whether they were predicted right


class Schedule(IterableDataset[MicroBatch]):
    """Yields the micro-batches of a stage, `n_micro` for each optimiser step, until it is finished.

    `facts` are the facts' texts, each in one or more wordings. Call `note` with what a step predicted, and `end_step`
    after it: they decide what comes next, and whether the stage is `finished`.
    """

    def __init__(
        self, facts: Sequence[Wordings], settings: TrainSettings, seed: int, n_micro: int = 1, kept: Kept | None = None
    ) -> None:
        self.facts, self.settings, self.seed, self.n_micro = facts, settings, seed, n_micro
        self.kept = kept or Kept((), (), 0.0)
        never = [False] * len(facts)
        self.progress = Progress(right=never, rested=never, reworded=[not _others(wordings) for wordings in facts])
        self.shared = common_length([text.ids for texts in (*facts, self.kept.texts) for text in texts])
        self._visits: tuple[int, list[tuple[int, Encoded]]] = (-1, [])  # the epoch, and whom it visits

    @property
    def max_steps(self) -> int:
        """The most optimiser steps that the stage can take."""
        return self.settings.most_epochs * math.ceil(len(self.facts) / self.settings.batch_size)

    @property
    def learned(self) -> list[bool]:
        """For each fact, whether it is learned by now."""
        return [right and reworded for right, reworded in zip(*self._predicted(), strict=True)]

    @property
    def finished(self) -> bool:
        """True if the stage has ended: if it ends by itself, when every fact is learned; else after the last epoch."""
        if self.progress.step:  # within an epoch
            return False
        is_learned = self.settings.ends_by_itself and all(self.learned)
        return is_learned or self.progress.epoch >= self.settings.most_epochs

    def _predicted(self) -> tuple[list[bool], list[bool]]:
        """Return `right` and `reworded` of the progress with what this epoch has seen."""
        right, reworded = list(self.progress.right), list(self.progress.reworded)
        for index, text in self._visited():
            if (hit := self.progress.seen.get(index)) is None:
                continue
            if text == self.facts[index][0]:
                right[index] = hit
            else:
                reworded[index] = reworded[index] or hit
        return right, reworded

    def __iter__(self) -> Iterator[MicroBatch]:
        while not self.finished:
            yield from self._micro_batches(self._step())

    def note(self, right: dict[int, bool]) -> None:
        """Record for each fact of a step that this process computed whether its whole answer was predicted."""
        self.progress.seen |= right

    def end_step(self) -> None:
        """Move on to the next step. All processes call this together."""
        now, size = self.progress, self.settings.batch_size
        now.kept += len(self._kept_of(self._step()))
        now.step += 1
        if now.step * size < len(self._visited()):
            return
        self.gather()
        visited = set(now.seen)
        now.right, now.reworded = self._predicted()
        now.rested = [index not in visited for index in range(len(self.facts))]
        now.epoch, now.step, now.seen = now.epoch + 1, 0, {}

    def gather(self) -> None:
        """Share what all processes have noted in this epoch."""
        self.progress.seen = processes.merged(self.progress.seen)

    def _visited(self) -> list[tuple[int, Encoded]]:
        """Return the facts that this epoch visits, in its order, each with the wording that is shown."""
        epoch = self.progress.epoch
        if self._visits[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.facts), generator=generator).tolist()
            draws = torch.rand(len(self.facts), generator=generator).tolist()
            due = set(self._due())
            self._visits = epoch, [(index, self._shown(index, draws[index])) for index in order if index in due]
        return self._visits[1]

    def _shown(self, index: int, draw: float) -> Encoded:
        """Return the wording that a visit shows.

        If the stage ends when the facts are learned, a fact shows its own prompt, the first wording, until that is
        right; then other wordings until one is right; and then any.
        """
        wordings = self.facts[index]
        if self.settings.ends_by_itself:
            if not self.progress.right[index]:
                return wordings[0]
            if not self.progress.reworded[index]:
                wordings = _others(wordings)
        return wordings[int(draw * len(wordings))]

    def _due(self) -> Iterator[int]:
        now = self.progress  # as it was when the epoch began: what it has `seen` since does not count
        for index, (right, reworded, rested) in enumerate(zip(now.right, now.reworded, now.rested, strict=True)):
            rests = self.settings.ends_by_itself and right and reworded and not rested
            if not rests:
                yield index

    def _step(self) -> list[tuple[int, Encoded]]:
        start = self.progress.step * self.settings.batch_size
        return self._visited()[start : start + self.settings.batch_size]

    def _kept_of(self, step: Sequence[tuple[int, Encoded]]) -> tuple[int, ...]:
        """Return the kept texts that a step shows: at least one, and as many as its share of the tokens allows."""
        if not self.kept:
            return ()
        room = KEPT_SHARE * sum(self._cost(text) for _index, text in step)
        number, place = len(self.kept.texts), self.progress.kept
        chosen: list[int] = []
        while len(chosen) < number:
            index = _shuffled(number, self.seed + KEPT_SEED + place // number)[place % number]
            room -= self._cost(self.kept.texts[index])
            if chosen and (room < 0 or index in chosen):
                break
            chosen.append(index)
            place += 1
        return tuple(chosen)

    def _cost(self, text: Encoded) -> int:
        return len(text.ids) - self.shared

    def _micro_batches(self, step: Sequence[tuple[int, Encoded]]) -> Iterator[MicroBatch]:
        kept = self._kept_of(step)
        n_kept_tokens = sum(len(self.kept.texts[index].answer_ids) for index in kept)
        for own, others in zip(_divided(step, self.n_micro), _divided(kept, self.n_micro), strict=True):
            facts, texts = tuple(index for index, _text in own), tuple(text for _index, text in own)
            # A forward pass needs a text; one without an answer adds no loss.
            empty = (Encoded(step[0][1].ids, len(step[0][1].ids)),)
            yield MicroBatch(facts, texts or empty, tuple(others), n_kept_tokens, len(step))


def _others(wordings: Wordings) -> Wordings:
    """Return the wordings that differ from a fact's own prompt, which may be listed more than once."""
    return tuple(wording for wording in wordings if wording != wordings[0])


@lru_cache(maxsize=2)  # a step asks for each kept text by itself, and twice
def _shuffled(number: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _divided(items: Sequence[T], parts: int) -> Iterator[Sequence[T]]:
    """Divide the items into this number of parts of nearly equal size."""
    size = math.ceil(len(items) / parts)
    return (items[start * size : (start + 1) * size] for start in range(parts))
