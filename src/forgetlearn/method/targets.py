"""Find the output at a fact's subject that makes the model say the new answer: the value that ROME and MEMIT write.

A change `delta` is added to what a module returns at the subject's last token, and is optimised on the loss of the new
answer, alone and after several sampled contexts. Sources: section 3.1 of arXiv:2202.05262, section 4.2 of
arXiv:2210.07229.
Shapes: N facts, R texts, T tokens, K answer positions, D width of the module's output, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from forgetlearn.config.schema import EditSettings
from forgetlearn.errors import FactError
from forgetlearn.evaluation.generation import generator_in_memory
from forgetlearn.facts import Fact
from forgetlearn.facts.subjects import subject_span
from forgetlearn.method.reading import first_output, hooked
from forgetlearn.models.batches import (
    IGNORE,
    agree,
    answer_logits,
    computing,
    forward_parameters,
    pad_left,
    plain_cache,
)
from forgetlearn.models.encoding import Encoded, Encoder
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.training.stage_checkpoints import SavedParts

STARTS = ("The", "Therefore", "Because", "I", "You")  # of sampled contexts, as in MEMIT's code
CONTEXT_TOKENS = (10, 5)  # lengths of sampled contexts, in turn
ENOUGH = 0.05  # nats; a fact whose loss is below this is not optimised further, as in the authors' code
ROWS_AT_ONCE = 64  # texts in a forward pass
Past = list[tuple[Tensor, Tensor]]  # keys and values (R, H, T, D), by layer
Change = Callable[[Tensor, Tensor], Tensor]  # gets the output (R, T, D) of a module and places (R,); returns the output


@dataclass(frozen=True)
class Text:
    """A text, and the place of the subject's last token in it."""

    text: Encoded
    place: int

    @property
    def up_to_subject(self) -> tuple[int, ...]:
        """The ids up to the subject's last token."""
        return self.text.ids[: self.place + 1]

    @property
    def tail(self) -> Encoded:
        """The text from the subject's last token on: all that a step of the search reads."""
        return Encoded(self.text.ids[self.place :], self.text.n_prompt_tokens - self.place)


@dataclass(frozen=True)
class Request:
    """What is to be written: the prompt with the new answer, bare and after contexts, and "{subject} is a"."""

    fact: Fact
    bare: Text
    after_contexts: tuple[Text, ...]
    essence: Text  # ends with a token that is not read

    @property
    def trained(self) -> tuple[Text, ...]:
        """The texts whose answers are learned."""
        return (self.bare, *self.after_contexts)


def requests(encoder: Encoder, facts: Iterable[Fact], contexts: Sequence[str]) -> list[Request]:
    """Return a request for each fact. A context after which the prompt cannot be encoded is left out.

    Raises:
        FactError: a prompt does not name its subject, or cannot be encoded with its answer.
    """
    return [_request(encoder, fact, contexts) for fact in facts]


def _request(encoder: Encoder, fact: Fact, contexts: Sequence[str]) -> Request:
    start, end = subject_span(fact)
    after_contexts = []
    for context in contexts:
        try:
            after_contexts.append(_text(encoder, f"{context}. {fact.prompt}", fact.target_new, len(context) + 2 + end))
        except FactError:
            continue
    about = f"{fact.prompt[start:end]} is a"
    ids = encoder.prompt_ids(about)
    essence = Text(Encoded((*ids, ids[-1]), len(ids)), encoder.place_of(about, len(about) - len(" is a")))
    return Request(fact, _text(encoder, fact.prompt, fact.target_new, end), tuple(after_contexts), essence)


def _text(encoder: Encoder, prompt: str, answer: str, end: int) -> Text:
    return Text(encoder.encode(prompt, answer), encoder.place_of(prompt, end))


def contexts(lm: LanguageModel, number: int, seed: int) -> list[str]:
    """Return the beginnings of texts that the model samples, to put before prompts."""
    starts = [lm.encoder.text_ids(start) for start in STARTS]
    found: list[str] = []
    with generator_in_memory(lm) as sampler:
        while len(found) < number:
            turn = len(found) // len(STARTS)
            said = sampler.sample(starts, CONTEXT_TOKENS[turn % len(CONTEXT_TOKENS)], seed + turn)
            texts = (lm.encoder.decode([*start, *own]) for start, own in zip(starts, said, strict=True))
            found += [" ".join(text.split()).rstrip(".") for text in texts]
    return found[:number]


@dataclass(frozen=True)
class Found:
    """Changes (N, D) of a module's output at the subjects, and the loss (N,) of each new answer at its end, in nats."""

    deltas: Tensor
    losses: Tensor


class Search:
    """Finds changes of the output of the module `path`, each at most `clamp` times as long as the output.

    The model's weights do not change, and need no gradients.
    """

    def __init__(self, lm: LanguageModel, path: str, settings: EditSettings, clamp: float) -> None:
        self.lm, self.path, self.settings, self.clamp = lm, path, settings, clamp
        self.continues: bool | None = None  # the model can continue from keys and values; None: not tried yet

    def together(self, wanted: Sequence[Request]) -> Found:
        """Return the changes of facts that are optimised in the same passes. None of them affects another."""
        with computing(self.lm.model, self.lm.device):
            chunk = _Chunk(self.lm, wanted, self.path, may_continue=self.continues is not False)
            if self.continues is None and chunk.has_beginnings:
                self.continues = chunk.agrees_with_whole_texts()
            if not self.continues:
                chunk.past = None
            return chunk.optimised(self.settings, self.clamp)

    def all(self, wanted: Sequence[Request], saved: SavedParts) -> Found:
        """Return the changes of all facts, part by part. What was `saved` is not optimised again."""
        size = max(1, ROWS_AT_ONCE // (max(len(request.trained) for request in wanted) + 1))
        found = {name: tensor.to(self.lm.device) for name, tensor in saved.found.items()}
        for part in saved.parts(len(wanted), size, "fact"):
            new = self.together([wanted[index] for index in part])
            both = {"deltas": new.deltas, "losses": new.losses}
            found = {name: torch.cat([found[name], tensor]) if found else tensor for name, tensor in both.items()}
            saved.save(part, found)
        return Found(found["deltas"], found["losses"])


class _Chunk:
    """Facts that are optimised together.

    What stands before the subject's last token does not see the change, so its keys and values are computed once.
    """

    def __init__(self, lm: LanguageModel, wanted: Sequence[Request], path: str, *, may_continue: bool) -> None:
        self.lm, self.path, self.n_facts = lm, path, len(wanted)
        self.texts = [text for request in wanted for text in (*request.trained, request.essence)]
        owner = [index for index, request in enumerate(wanted) for _ in (*request.trained, request.essence)]
        self.bare = [owner.index(index) for index in range(self.n_facts)]
        self.owner = torch.tensor(owner, device=lm.device)  # the fact of each text
        essences = [text is wanted[index].essence for text, index in zip(self.texts, owner, strict=True)]
        self.essence = torch.tensor(essences, device=lm.device)
        trained = torch.zeros(self.n_facts, len(owner), device=lm.device)
        trained[self.owner, torch.arange(len(owner), device=lm.device)] = (~self.essence).float()
        self.shares = trained / trained.sum(1, keepdim=True)  # of each text in its fact's mean loss (N, R)
        self.past = self._past() if may_continue else None

    @property
    def has_beginnings(self) -> bool:
        """True if anything stands before a subject's last token."""
        return any(text.place for text in self.texts)

    @torch.no_grad()
    def agrees_with_whole_texts(self) -> bool:
        """Return True if the model gets the same logits when it continues from the keys and values."""
        if self.past is None:
            return False
        everything = list(range(len(self.texts)))
        whole, _ = self._logits(everything, None)
        continued, labels = self._logits(everything, self.past)
        real = labels != IGNORE
        return agree(continued[real], whole[real])

    @torch.no_grad()
    def _past(self) -> Past | None:
        """Return the keys and values of what stands before the subjects' last tokens."""
        beginnings = [text.text.ids[: text.place] for text in self.texts]
        accepted = forward_parameters(self.lm.model)
        if not self.has_beginnings or not {"past_key_values", "use_cache"} <= accepted:
            return None
        inputs = _inputs(beginnings, self.lm)
        inputs["attention_mask"][:, -1] = 1  # a row of padding alone would give no numbers
        given = {name: value for name, value in inputs.items() if name in accepted}
        cache = plain_cache(self.lm.model(**given, use_cache=True))
        return None if cache is None else [(layer.keys, layer.values) for layer in cache.layers]

    def optimised(self, settings: EditSettings, clamp: float) -> Found:
        """Return the changes, after at most `settings.most_steps` steps of Adam."""
        with torch.enable_grad():
            before, first = self._unchanged()
            lengths = before.norm(dim=1)
            deltas = torch.zeros_like(before, requires_grad=True)
            adam = torch.optim.Adam([deltas], lr=settings.rate)
            losses = torch.full((self.n_facts,), torch.inf, device=self.lm.device)
            waiting = torch.ones(self.n_facts, dtype=torch.bool, device=self.lm.device)
            for step in range(settings.most_steps):
                answers, drift = self._losses(deltas, waiting, first)
                total = answers + settings.kl_factor * drift
                total = total + settings.weight_decay * deltas.norm(dim=1) / lengths.square()
                losses = torch.where(waiting, answers.detach(), losses)
                waiting = waiting & (total.detach() >= ENOUGH)
                if not waiting.any() or step == settings.most_steps - 1:
                    break
                adam.zero_grad()
                (gradient,) = torch.autograd.grad(total[waiting].sum(), deltas)
                deltas.grad = gradient
                finished = deltas.detach().clone()
                adam.step()
                with torch.no_grad():
                    longest = clamp * lengths / deltas.norm(dim=1).clamp(min=torch.finfo(deltas.dtype).tiny)
                    deltas.mul_(longest.clamp(max=1).unsqueeze(1))
                    deltas.copy_(torch.where(waiting.unsqueeze(1), deltas, finished))
        return Found(deltas.detach(), losses)

    @torch.no_grad()
    def _unchanged(self) -> tuple[Tensor, Tensor]:
        """Return outputs (N, D) at the subjects of bare prompts, and log-probabilities (N, V) after essences."""
        seen: list[Tensor] = []

        def look(out: Tensor, places: Tensor) -> Tensor:
            seen.append(out[torch.arange(len(out), device=out.device), places].float())
            return out

        own = sorted([*self.bare, *self.essence.nonzero().flatten().tolist()])
        logits, _ = self._logits(own, self.past, look)
        is_bare = torch.tensor([index in set(self.bare) for index in own], device=self.lm.device)
        return seen[0][is_bare], logits[~is_bare, -1].float().log_softmax(-1)

    def _losses(self, deltas: Tensor, waiting: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of each answer (N,) and the divergence after each essence (N,); 0 if not waiting."""
        own = waiting[self.owner].nonzero().flatten()
        owner, essence = self.owner[own], self.essence[own]

        def change(out: Tensor, places: Tensor) -> Tensor:
            rows = torch.arange(len(out), device=out.device)
            return out.index_put((rows, places), deltas[owner].to(out.dtype), accumulate=True)

        logits, labels = self._logits(own.tolist(), self.past, change)
        said = logits.float().log_softmax(-1)
        real = labels != IGNORE
        by_token = -said.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * real
        answers = self.shares[:, own] @ (by_token.sum(1) / real.sum(1))
        now, before = said[essence][:, -1], first[owner[essence]]
        drift = functional.kl_div(before, now, log_target=True, reduction="none").sum(-1)
        return answers, torch.zeros_like(answers).index_put((owner[essence],), drift)

    def _logits(self, rows: Sequence[int], past: Past | None, change: Change | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (R, K, V) and labels (R, K) of texts. `change` sees the module's output and the places."""
        texts = [self.texts[row] for row in rows]
        read = [text.tail if past else text.text for text in texts]
        batch = pad_left(read, self.lm.pad_id)
        given = {name: value.to(self.lm.device) for name, value in batch.inputs.items()}
        width = given["input_ids"].shape[1]
        starts = [width - len(own.ids) for own in read]
        places = torch.tensor(
            [start + (0 if past else text.place) for start, text in zip(starts, texts, strict=True)],
            device=self.lm.device,
        )
        if past:
            given = {**given, **self._continuing(rows, past, given)}

        def hook(_module: nn.Module, _read: object, returned: object) -> object:
            out = first_output(returned)
            assert change is not None
            changed = change(out.reshape(len(rows), width, -1), places).reshape(out.shape)
            return (changed, *returned[1:]) if isinstance(returned, tuple) else changed

        with hooked(self.lm.model, {self.path: hook} if change else {}):
            logits = answer_logits(self.lm.model, given, batch.positions.to(self.lm.device))
        return logits, batch.labels.to(self.lm.device)

    def _continuing(self, rows: Sequence[int], past: Past, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the inputs that differ if texts continue from the keys and values of their beginnings."""
        lengths = torch.tensor([self.texts[row].place for row in rows], device=self.lm.device)
        width_before = past[0][0].shape[-2]
        before = torch.arange(width_before, device=lengths.device) >= width_before - lengths.unsqueeze(1)
        mask = torch.cat([before.to(given["attention_mask"].dtype), given["attention_mask"]], dim=1)
        cache = DynamicCache([(keys[list(rows)], values[list(rows)]) for keys, values in past])
        positions = (given["position_ids"] + lengths.unsqueeze(1)) * given["attention_mask"]
        return {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}


def _inputs(ids: Sequence[Sequence[int]], lm: LanguageModel) -> dict[str, Tensor]:
    batch = pad_left([Encoded(tuple(own), len(own)) for own in ids], lm.pad_id)
    return {name: value.to(lm.device) for name, value in batch.inputs.items()}
