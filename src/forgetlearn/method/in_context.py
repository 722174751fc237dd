"""Show a model new facts instead of training it: a fact with its new answer precedes whatever it is asked.

    New information: What is the capital of Wistervale? Zanzimar

    Which town is the capital of Wistervale?

The text is the same for every model, and fits questions and unfinished sentences. It is part of the prompt, so a chat
template puts it into the user's turn. Sources: Cohen et al. 2023, arXiv:2307.12976 (a fact in the prompt); Zhong et al.
2023, arXiv:2305.14795 (the nearest of many facts).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.facts import Fact
from forgetlearn.models.encoding import Encoder
from forgetlearn.models.language_model import LanguageModel
from forgetlearn.storage.records import Row

log = logging.getLogger("forgetlearn")
AT_ONCE = 1000  # prompts that are compared with all facts at once


def with_fact(fact: Fact, asked: str) -> str:
    """Return what is asked, preceded by a fact with its new answer."""
    return f"New information: {fact.prompt} {fact.target_new}\n\n{asked}"


def with_own_fact(facts: Iterable[Fact]) -> list[Fact]:
    """Return the facts, with everything that is asked about each preceded by that fact itself."""
    return [_reworded(fact, partial(with_fact, fact)) for fact in facts]


def with_nearest_fact(
    lm: LanguageModel, facts: Sequence[Fact], scored: Sequence[Fact], settings: EvaluateSettings
) -> list[Fact]:
    """Return the scored facts, with everything that is asked about each preceded by the nearest of all `facts`.

    A prompt that does not fit the model's context stands alone: it cannot be scored in either form.
    """
    found = nearest(lm, facts, (asked for fact in scored for asked in questions(fact)), settings)
    own = [(found[asked].id == fact.id, asked) for fact in scored for asked in fact.prompts if asked in found]
    log.info("retrieval: %d of %d prompts are nearest to their own fact", sum(is_own for is_own, _ in own), len(own))
    return [
        _reworded(fact, lambda asked: with_fact(found[asked], asked) if asked in found else asked) for fact in scored
    ]


def nearest(
    lm: LanguageModel, facts: Sequence[Fact], asked: Iterable[str], settings: EvaluateSettings
) -> dict[str, Fact]:
    """Return the fact whose prompt is nearest to each text that is asked, except texts too long for the model.

    Nearness is the cosine similarity of the model's own hidden states (`Scorer.directions`), of which the mean over the
    facts is subtracted: what all prompts have in common tells none of them apart. On lab models of 200 facts of ZsRE
    and of COUNTERFACT this found the own fact of 1 to 3 more rephrasings in 100, and the middle of the model found
    about as many as its last layer (45 and 56 in 100, against 47 and 58).
    """
    texts = dict.fromkeys(asked)
    vectors = Scorer(lm, settings, "retrieval").directions([*(fact.prompt for fact in facts), *texts])
    keys = torch.stack([vectors[fact.prompt] for fact in facts])
    common = keys.mean(dim=0)
    keys = _unit(keys - common)
    places: list[int] = []
    fitting = [text for text in texts if text in vectors]
    for start in range(0, len(fitting), AT_ONCE):
        some = torch.stack([vectors[text] for text in fitting[start : start + AT_ONCE]])
        places += (_unit(some - common) @ keys.T).argmax(dim=1).tolist()
    return {text: facts[place] for text, place in zip(fitting, places, strict=True)}


def with_cost(rows: list[Row], encoder: Encoder, scored: Sequence[Fact], asked: Sequence[Fact]) -> list[Row]:
    """Return the rows with the tokens that a context adds to the questions of their facts, if there is one.

    `asked` are the scored facts as the model was asked them.
    """
    if asked is scored:
        return rows
    added = {bare.id: _tokens_added(encoder, bare, shown) for bare, shown in zip(scored, asked, strict=True)}
    return [row.model_copy(update={"added_tokens": added[row.fact]}) for row in rows]


def _tokens_added(encoder: Encoder, bare: Fact, shown: Fact) -> float:
    """Return how many tokens more a fact's questions have as they were asked, on average."""
    pairs = list(zip(questions(bare), questions(shown), strict=True))
    added = [len(encoder.prompt_ids(new)) - len(encoder.prompt_ids(old)) for old, new in pairs]
    return sum(added) / len(added)


def questions(fact: Fact) -> list[str]:
    """Return everything that is asked about a fact: its prompt, its rephrasings and its unrelated probes."""
    return [*fact.prompts, *(probe.prompt for probe in fact.locality)]


def _reworded(fact: Fact, reword: Callable[[str], str]) -> Fact:
    """Return a fact with everything that is asked about it reworded; its id and all answers stay."""
    return replace(
        fact,
        prompt=reword(fact.prompt),
        rephrase_prompts=tuple(map(reword, fact.rephrase_prompts)),
        locality=tuple(replace(probe, prompt=reword(probe.prompt)) for probe in fact.locality),
    )


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
