"""Check every text of the facts against the tokenizer before training starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from forgetlearn.errors import FactError
from forgetlearn.facts import Fact
from forgetlearn.models.encoding import Encoder, TextError

log = logging.getLogger("forgetlearn")


@dataclass(frozen=True)
class _Text:
    """A prompt and an answer of a fact, and the names of the two fields."""

    fact: Fact
    prompt_field: str
    prompt: str
    answer_field: str
    answer: str
    is_trained: bool = False

    def place(self, part: str) -> str:
        """Return a name for the prompt or the answer (`part`) in messages."""
        return f"{self.fact.place}, {self.prompt_field if part == 'prompt' else self.answer_field}"


def check_texts(encoder: Encoder, facts: Iterable[Fact]) -> None:
    """Raise FactError if texts of the facts cannot be trained on or read; the error names the first five.

    A text that is only scored may be too long: scoring counts it as errored. A warning counts the texts that the
    tokenizer can encode only with <unk>.
    """
    asked = [text for fact in facts for text in _texts_of(fact)]
    found = encoder.encode_all(((text.prompt, text.answer) for text in asked), end=True)
    problems: dict[str, None] = {}
    unknown: dict[str, str] = {}
    for text in asked:
        encoded = found[text.prompt, text.answer]
        if isinstance(encoded, TextError):
            problems[f"{text.place(encoded.part)}: {encoded}"] = None
        elif isinstance(encoded, FactError):
            if text.is_trained:
                problems[f"{text.fact.place}: {encoded}"] = None
        else:
            parts = {"prompt": encoded.ids[: encoded.n_prompt_tokens], "answer": encoded.answer_ids}
            for part in (part for part, ids in parts.items() if encoder.has_unknown(ids)):
                unknown.setdefault(getattr(text, part), text.place(part))
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FactError("\n".join(list(problems)[:5]) + more)
    if unknown:
        log.warning(
            "%d texts contain %s: the tokenizer has no token for a part of them, so the model can neither read nor say "
            "it; for example %r (%s)",
            *(len(unknown), encoder.tokenizer.unk_token, *next(iter(unknown.items()))),
        )


def _texts_of(fact: Fact) -> Iterator[_Text]:
    """Yield every pair of prompt and answer that is trained on or scored."""
    for field, answer in (("target_new", fact.target_new), ("ground_truth", fact.ground_truth)):
        if answer:
            yield _Text(fact, "prompt", fact.prompt, field, answer, is_trained=True)
    for field, aliases in (("target_new", fact.target_new_aliases), ("ground_truth", fact.ground_truth_aliases)):
        for alias in aliases:
            yield _Text(fact, "prompt", fact.prompt, field, alias)
    for prompt in fact.rephrase_prompts:
        yield _Text(fact, "rephrase_prompt", prompt, "target_new", fact.target_new or str(fact.ground_truth))
    for probe in fact.locality:
        yield _Text(fact, "locality_prompt", probe.prompt, "locality_ground_truth", probe.answer)
