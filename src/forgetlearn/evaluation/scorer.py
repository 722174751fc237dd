"""Question one model in batches: read texts with teacher forcing, and generate free answers to prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import FactError, ModelError
from forgetlearn.evaluation.generation import Generator, Room, end_ids, generator
from forgetlearn.facts import matching
from forgetlearn.models import attention
from forgetlearn.models.batches import (
    Layout,
    choose_layout,
    computing,
    divided,
    read_logits,
    read_states,
)
from forgetlearn.models.encoding import Encoded, P
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.top_logprobs import TopLogprobs, agrees, divergence, top_logprobs
from forgetlearn.runtime import processes, sharding

Pair = tuple[str, str]
K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """A model's prediction of each token of a given answer (teacher forcing)."""

    wanted: tuple[int, ...]
    predicted: tuple[int, ...]
    logprob: float | None  # mean natural log-probability per answer token; None without the protocol `prefer`


@dataclass(frozen=True)
class Generated:
    """A model's free answer: greedy, up to its end token or the end of its room."""

    text: str
    truncated: bool
    writes_on: bool = False  # an answer counts only at the beginning of the text (`Encoder.writes_on`)


@dataclass(frozen=True)
class Difference:
    """How far a model is from a base at the tokens of one text."""

    n_tokens: int
    agreement: float  # share of the tokens where the base's likeliest token is the model's too
    kl: float  # mean of KL(base || model), nats per token


@dataclass(frozen=True)
class Failure:
    """The reason why a text or prompt could not be scored."""

    reason: str


class Scorer:
    """Shows texts to one model and asks it questions, in batches."""

    def __init__(self, lm: LanguageModel, settings: EvaluateSettings | None = None, name: str = "scoring") -> None:
        self.lm, self.name = lm, name
        self.settings = settings or EvaluateSettings()
        self.wants_logprobs = "prefer" in self.settings.protocols
        self.largest = self.settings.batch_size  # texts at once; lowered if memory runs out
        lm.to_device()

    def read(self, pairs: Iterable[tuple[P, str]]) -> dict[tuple[P, str], Reading | Failure]:
        """Return the model's reading of each distinct (prompt, answer), with teacher forcing."""
        encoded = self.lm.encoder.encode_all(pairs)
        found: dict[tuple[P, str], Reading | Failure] = {
            pair: Failure(str(text)) for pair, text in encoded.items() if isinstance(text, FactError)
        }
        texts = {pair: text for pair, text in encoded.items() if isinstance(text, Encoded)}
        return found | self._over(texts, lambda some, layout: self._read_batch([texts[key] for key in some], layout))

    def top(self, texts: Mapping[K, Encoded], k: int) -> dict[K, TopLogprobs]:
        """Return the model's `k` likeliest tokens at each token of the texts' answers.

        Raises:
            ModelError: the model's logits are not finite.
        """

        def top(logits: Tensor, _key: K) -> TopLogprobs:
            found = top_logprobs(logits, k)
            if not torch.isfinite(found.logprobs).all():
                raise ModelError("The model's logits are not finite (NaN or infinite). Are its weights damaged?")
            return TopLogprobs(found.ids.cpu(), found.logprobs.cpu())

        return self._each(texts, top)

    def likelihoods(self, texts: Mapping[K, Encoded]) -> dict[K, float]:
        """Return the mean natural log-probability per token of the texts' answers."""

        def mean(logits: Tensor, key: K) -> float:
            wanted = torch.tensor(texts[key].answer_ids, device=logits.device)
            return float(logits.float().log_softmax(dim=-1).gather(-1, wanted[:, None]).mean())

        return self._each(texts, mean)

    def differences(self, texts: Mapping[K, Encoded], base: Mapping[K, TopLogprobs]) -> dict[K, Difference | Failure]:
        """Return how far the model is from a base, at the texts' answers; `base` is what `top` returned of it."""

        def difference(logits: Tensor, key: K) -> Difference | Failure:
            kl = float(divergence(base[key], logits).mean())
            if not math.isfinite(kl):
                return Failure("the model's logits are not finite")
            return Difference(len(logits), float(agrees(base[key], logits).float().mean()), max(kl, 0.0))

        return self._each(texts, difference)

    def directions(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Return a vector (D,) for each distinct prompt, to compare prompts by; leave out prompts that are too long.

        It is the mean over the prompt's own tokens, without those of a template, of the hidden states after half of the
        layers. Each is scaled to length 1 first, because a few tokens have states so long that they would outweigh all
        others.
        """
        texts: dict[str, Encoded] = {}
        for prompt in dict.fromkeys(prompts):
            ids, own = self.lm.encoder.prompt_ids(prompt), self.lm.encoder.own_places(prompt)
            text = Encoded((*ids[: own.stop], ids[-1]), own.start + 1)  # its answer's positions are `own`
            if not self.lm.encoder.max_length or len(text.ids) <= self.lm.encoder.max_length:
                texts[prompt] = text

        def mean(states: Tensor, _prompt: str) -> Tensor:
            return torch.nn.functional.normalize(states.double(), dim=-1).mean(dim=0).cpu()

        return self._each(texts, mean, read_states)

    def _each(
        self,
        texts: Mapping[K, Encoded],
        use: Callable[[Tensor, K], R],
        read: Callable[..., tuple[Tensor, Tensor]] = read_logits,
    ) -> dict[K, R]:
        """Return the result of `use` for each text, given what `read` computes at its answer (N, ...), and its key."""

        def run(keys: list[K], layout: Layout) -> list[R]:
            own = [texts[key] for key in keys]
            found, which = read(self.lm.model, own, layout, self.lm.pad_id, self.lm.device)
            parts = which.split([len(text.answer_ids) for text in own])
            return [use(found[part], key) for key, part in zip(keys, parts, strict=True)]

        return self._over(texts, run)

    def _over(self, texts: Mapping[K, Encoded], run: Callable[[list[K], Layout], list[R]]) -> dict[K, R]:
        """Return the result of `run` for each text, computed in batches of keys, by all processes together."""
        found: dict[K, R] = {}
        model = self.lm.model.eval()
        with sharding.no_gradients(model), computing(model, self.lm.device), attention.by_text(model):
            layout = self._layout(texts.values(), "shared")
            for batch in self._shown(self._batches(texts, layout), "reading"):
                found.update(zip(batch, self._halving(batch, lambda some: run(some, layout)), strict=True))
        everyones = processes.merged(found)
        return {key: everyones[key] for key in texts}  # in the order that was given, not that of the batches

    def say(self, prompts: Iterable[P], rooms: Mapping[P, Room] | None = None) -> dict[P, Generated | Failure]:
        """Return the free answer to each distinct prompt.

        `rooms` limits the answers to some prompts; the others get one line of at most `max_new_tokens`.
        """
        found: dict[P, Generated | Failure] = {}
        texts: dict[P, Encoded] = {}
        context = self.lm.encoder.max_length
        for prompt in dict.fromkeys(prompts):
            try:
                ids = self.lm.encoder.prompt_ids(prompt)
            except FactError as error:
                found[prompt] = Failure(str(error))
                continue
            if context and len(ids) >= context:
                found[prompt] = Failure(f"the prompt is {len(ids)} tokens, the model's context {context}")
            else:
                texts[prompt] = Encoded(tuple(ids), len(ids))
        usual, ends = Room(self.settings.max_new_tokens), end_ids(self.lm)
        given = {prompt: (rooms or {}).get(prompt, usual) for prompt in texts}
        self.lm.model.eval()
        with generator(self.lm, self.settings) as engine:

            def answer(some: list[P]) -> list[Generated | Failure]:
                replies = engine.generate([texts[prompt].ids for prompt in some], [given[prompt] for prompt in some])
                return [self._cut(ids, ends, given[prompt].lines) for prompt, ids in zip(some, replies, strict=True)]

            for batch in self._shown(self._prompt_batches(texts, given, engine), "answering"):
                # One that batches by itself gets all prompts in one call, whatever batch_size is: each call starts it.
                answers = answer(batch) if engine.batches_itself else self._halving(batch, answer)
                found.update(zip(batch, answers, strict=True))
        return processes.merged(found)

    def _prompt_batches(self, ids: Mapping[P, Encoded], rooms: Mapping[P, Room], engine: Generator) -> list[list[P]]:
        """Divide prompts into batches with similar room, because a batch takes as long as its longest answer.

        A prompt that nearly fills the context gets its own batch, because the longest prompt of a batch limits all
        its answers.
        """
        if engine.batches_itself:
            return [list(ids)] if ids else []
        context, usual = self.lm.encoder.max_length, self.settings.max_new_tokens

        def fits(prompts: Sequence[P]) -> bool:
            widest, longest = max(len(ids[p].ids) for p in prompts), max(rooms[p].tokens for p in prompts)
            return not context or widest + longest <= context

        alone = {prompt for prompt in ids if not fits([prompt])}
        batches: list[list[P]] = []
        for has_more in (False, True):
            group = {p: ids[p] for p in ids if p not in alone and (rooms[p].tokens > usual) == has_more}
            if group:
                batches += self._batches(group, self._layout(group.values(), "padded"))
        together = [batch for batch in batches if fits(batch)]
        alone |= {prompt for batch in batches if not fits(batch) for prompt in batch}
        return [*together, *([prompt] for prompt in ids if prompt in alone)]

    def _layout(self, texts: Iterable[Encoded], best: Literal["shared", "padded"]) -> Layout:
        # The check needs an answer to predict. A prompt alone has none, so its last token is taken as the answer.
        checked = [t if t.answer_ids or len(t.ids) < 2 else Encoded(t.ids, len(t.ids) - 1) for t in texts]
        return choose_layout(self.lm.model, checked, self.lm.pad_id, self.lm.device, best)

    def _batches(self, texts: Mapping[K, Encoded], layout: Layout) -> list[list[K]]:
        return divided(texts, layout, self.settings.batch_size, self.lm.device)

    def _shown(self, batches: list[list[K]], what: str) -> Iterator[list[K]]:
        """Yield this process's batches, with a progress bar in a terminal.

        Batches are the same as in a single process, so that each text is computed beside the same others.
        """
        own = processes.share(batches)
        total = sum(len(batch) for batch in own)
        with tqdm(total=total, desc=f"{self.name}: {what}", disable=processes.no_bar(), leave=False) as bar:
            for batch in own:
                yield batch
                bar.update(len(batch))

    def _halving(self, batch: list[T], run: Callable[[list[T]], list[R]]) -> list[R]:
        """Run a batch, in halves if the device runs out of memory; later batches then start smaller."""
        half = len(batch) // 2
        if len(batch) <= self.largest:
            try:
                return run(batch)
            except torch.OutOfMemoryError as error:
                # All processes compute a sharded model together, so none of them can go on alone with half a batch.
                if not half or sharding.is_sharded(self.lm.model):
                    raise ModelError(
                        f"{self.name}: {self.lm.device} has too little memory for {len(batch)} texts at once. Lower "
                        "evaluate.batch_size, or take a model in bfloat16 (--set model.dtype=bfloat16)."
                    ) from error
            self.largest = half
            log.warning("%s: out of memory with %d texts at once; continuing with %d.", self.name, len(batch), half)
            if self.lm.device.type != "cpu":
                torch.accelerator.empty_cache()
        return [*self._halving(batch[:half], run), *self._halving(batch[half:], run)]

    def _read_batch(self, texts: Sequence[Encoded], layout: Layout = "padded") -> list[Reading | Failure]:
        logits, which = read_logits(self.lm.model, texts, layout, self.lm.pad_id, self.lm.device)
        wanted = torch.tensor([token for text in texts for token in text.answer_ids], device=logits.device)
        best = logits.argmax(dim=-1)
        asked = logits[which, wanted].float()
        # argmax picks a NaN in a row, and logsumexp of the row is then NaN, so the check below finds it either way.
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

    def _cut(self, ids: list[int], ends: list[int], lines: int = 1) -> Generated:
        """Return the answer up to its first end token or the end of its last allowed line."""
        stops = [index for index, token in enumerate(ids) if token in ends]
        body = self.lm.encoder.decode(ids[: stops[0]] if stops else ids).lstrip()
        text = matching.first_lines(body, lines)
        truncated = not stops and body.count("\n") < lines
        return Generated(text, truncated, self.lm.encoder.writes_on)
