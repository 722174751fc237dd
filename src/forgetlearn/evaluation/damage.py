"""Measure damage: ask general prompts before and after an update, and compare with what the base says.

The base answers each prompt in its own words, and its likeliest tokens at each place of that answer are kept. The
updated model reads the same answers, so that each of their tokens can be compared. Then it answers for itself, but for
prompts where it agrees with every token: its greedy answer is that of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.generation import Room
from forgetlearn.evaluation.scorer import Difference, Failure, Generated, Scorer
from forgetlearn.evaluation.statistics import mean_of
from forgetlearn.models import top_logprobs
from forgetlearn.models.encoding import Encoded, Encoder, Prompt
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.models.top_logprobs import TopLogprobs
from forgetlearn.runtime import processes
from forgetlearn.storage.records import GeneralAnswer, OnPrompts, load_rows, save_rows

ROOM = Room(tokens=24, lines=24)  # of an answer
N_LIKELIEST = 1024  # likeliest tokens of the base at each place; the others count as one
ANSWERS, LIKELIEST = "answers.jsonl", "answers.safetensors"


def measure(
    lm: LanguageModel,
    settings: EvaluateSettings,
    folder: Path,
    before: Path | None = None,
    prompts: Sequence[Prompt] = (),
) -> OnPrompts:
    """Ask prompts; return the answers and how far they are from those of a base.

    Unless prompts are given, they are the measuring half of the general prompts.
    `before` is the folder of an earlier call, for the base. Without it, nothing is compared, and `folder` gets what a
    later call needs. With it, the answers come worst first.
    """
    scorer, prompts = Scorer(lm, settings, "general prompts"), prompts or general_prompts.measuring()
    if before is None:
        replies = scorer.say(prompts, dict.fromkeys(prompts, ROOM))
        own = [_own_answer(prompt, replies[prompt]) for prompt in prompts]
        top = scorer.top(_texts(lm.encoder, own), N_LIKELIEST)
        processes.on_main(lambda: _keep(folder, own, list(top.values())))
        return OnPrompts(asked=len(prompts), compared=0, tokens=0, answers=own)
    base = load_rows(GeneralAnswer, before / ANSWERS)
    texts = _texts(lm.encoder, base)
    kept = top_logprobs.load(before / LIKELIEST) if texts else []
    differences = scorer.differences(texts, dict(zip(texts, kept, strict=True)))
    agreed = {p for p, found in differences.items() if isinstance(found, Difference) and found.agreement == 1}
    replies = scorer.say([prompt for prompt in prompts if prompt not in agreed], dict.fromkeys(prompts, ROOM))
    answers = [_compared(was, replies.get(was.asked), differences) for was in base]
    return _summed(sorted(answers, key=lambda answer: -_badness(answer)))


def _keep(folder: Path, answers: Sequence[GeneralAnswer], top: Sequence[TopLogprobs]) -> None:
    save_rows(answers, folder / ANSWERS)
    if top:
        top_logprobs.save(top, folder / LIKELIEST)


def _own_answer(prompt: Prompt, reply: Generated | Failure) -> GeneralAnswer:
    shown = prompt if isinstance(prompt, str) else list(prompt)
    if isinstance(reply, Failure):
        return GeneralAnswer(prompt=shown, error=reply.reason)
    return GeneralAnswer(prompt=shown, said=reply.text, truncated=reply.truncated)


def _texts(encoder: Encoder, answers: Sequence[GeneralAnswer]) -> dict[Prompt, Encoded]:
    """Return the prompts with a model's answers to them, and the end token of each answer that ended."""
    texts: dict[Prompt, Encoded] = {}
    for end in (True, False):
        pairs = [(answer.asked, answer.said) for answer in answers if answer.said and answer.truncated != end]
        encoded = encoder.encode_all(pairs, end=end)
        texts |= {prompt: text for (prompt, _said), text in encoded.items() if isinstance(text, Encoded)}
    return texts


def _compared(
    was: GeneralAnswer, reply: Generated | Failure | None, differences: Mapping[Prompt, Difference | Failure]
) -> GeneralAnswer:
    """Return a model's answer to a prompt beside the base's, and how far it is from the base there.

    Without a reply, the answer is that of the base.
    """
    now = was if reply is None else _own_answer(was.asked, reply)
    found = differences.get(was.asked, Failure(was.error or "the base's answer is empty or too long"))
    if isinstance(found, Failure):
        return now.model_copy(update={"before": was.said, "error": now.error or found.reason})
    numbers = {"tokens": found.n_tokens, "agreement": found.agreement, "kl": found.kl}
    return now.model_copy(update={"before": was.said, **numbers})


def _badness(answer: GeneralAnswer) -> float:
    """Return the divergence of an answer; an answer that only the base could give counts as the worst."""
    if answer.kl is not None:
        return answer.kl
    return math.inf if answer.before else -1.0


def _summed(answers: Sequence[GeneralAnswer]) -> OnPrompts:
    """Return the means over tokens, with intervals over prompts."""
    found = OnPrompts(asked=len(answers), compared=0, tokens=0, answers=list(answers))
    both = [(each.agreement, each.kl, each.tokens) for each in answers if each.agreement is not None]
    if not both:
        return found
    agreements, divergences, tokens = zip(*both, strict=True)
    agreement, low, high = mean_of([100 * share for share in agreements], tokens)
    kl, kl_low, kl_high = mean_of(divergences, tokens)
    return found.model_copy(
        update={
            "compared": len(both),
            "tokens": sum(tokens),
            "agreement": agreement,
            "agreement_low": None if low is None else max(0.0, low),
            "agreement_high": None if high is None else min(100.0, high),
            "kl": kl,
            "kl_low": None if kl_low is None else max(0.0, kl_low),
            "kl_high": kl_high,
        }
    )
