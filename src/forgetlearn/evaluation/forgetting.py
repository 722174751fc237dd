"""Measure what is left of forgotten facts, and what became of those that should stay.

ROUGE-L recall and the mean probability of an answer's tokens are graded, where `contains` says yes or no. The truth
ratio compares wrong answers with the right one: a model that knows nothing prefers neither.
Source: Maini et al. 2024, TOFU, arXiv:2401.06121.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.facts import Fact, matching
from forgetlearn.facts.variants import Variants
from forgetlearn.models.encoding import Encoded
from forgetlearn.storage.records import Row, TruthRow

ROUGE, PROBABILITY, TRUTH = "rouge", "probability", "truth"  # protocols of rows
QUANTITY = {False: "residue", True: "reliability"}  # of an answer that is forgotten, or kept


def graded_rows(scorer: Scorer, facts: Sequence[Fact], rows: Sequence[Row], phase: str, *, kept: bool) -> list[Row]:
    """Return a row per fact for ROUGE-L and one for the probability of its answer to its own prompt.

    `rows` are those of the protocol `generate`, with what the model said; without them, ROUGE-L is not scored.
    """
    answers = {fact.id: (fact.new_answers if kept else fact.old_answers)[0] for fact in facts}
    said = {row.fact: row.said for row in rows if row.protocol == "generate" and row.said is not None}
    likely = probabilities(scorer, [(fact.prompt, answers[fact.id]) for fact in facts])
    found = []
    for fact in facts:
        scores = {PROBABILITY: likely.get((fact.prompt, answers[fact.id]))}
        if said:
            own = said.get(fact.id)
            scores[ROUGE] = None if own is None else rouge_recall(own, answers[fact.id])
        found += [
            Row.model_validate(
                {"fact": fact.id, "phase": phase, "protocol": name, "errors": {}, QUANTITY[kept]: score}
                | ({"errors": {QUANTITY[kept]: "the answer could not be read"}} if score is None else {})
            )
            for name, score in scores.items()
        ]
    return found


def probabilities(scorer: Scorer, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Return p(answer | prompt)^(1 / length), the geometric mean over tokens; without pairs that cannot be encoded."""
    encoded = scorer.lm.encoder.encode_all(pairs)
    texts = {pair: text for pair, text in encoded.items() if isinstance(text, Encoded)}
    return {pair: math.exp(mean) for pair, mean in scorer.likelihoods(texts).items()}


def rouge_recall(reply: str, answer: str) -> float:
    """Return the share of the answer's words that the reply has, in the same order (ROUGE-L recall).

    Source: Lin 2004. Words are those of `matching.normalise`, without articles; see `matching.UNSPACED` too.
    """
    wanted, found = (matching.UNSPACED.sub(r" \1 ", matching.normalise(text)).split() for text in (answer, reply))
    if not wanted:
        return float(reply.strip() == answer.strip())
    longest = [0] * (len(found) + 1)  # common subsequence with the beginnings of what was found
    for word in wanted:
        before = longest
        longest = [0]
        for place, other in enumerate(found):
            longest.append(before[place] + 1 if word == other else max(longest[place], before[place + 1]))
    return longest[-1] / len(wanted)


def truth_rows(scorer: Scorer, facts: Iterable[Fact], variants: Mapping[str, Variants], phase: str) -> list[TruthRow]:
    """Return the truth ratio of each fact whose answer has variants: the mean over wrong answers, over the right one.

    Each answer's probability is p^(1 / length). A fact of which a text cannot be encoded is left out.
    """
    asked = [(fact, own) for fact in facts if (own := variants.get(fact.prompt))]
    pairs = [(fact.prompt, text) for fact, own in asked for text in (own.reworded, *own.wrong)]
    likely = probabilities(scorer, pairs) if pairs else {}
    rows = []
    for fact, own in asked:
        right = likely.get((fact.prompt, own.reworded))
        wrong = [likely.get((fact.prompt, text)) for text in own.wrong]
        if right and None not in wrong:
            ratio = sum(each for each in wrong if each is not None) / len(wrong) / right
            rows.append(TruthRow(fact=fact.id, phase=phase, ratio=min(ratio, 1e12)))
    return rows


def closeness(ratios: Sequence[float]) -> float:
    """Return the mean of min(ratio, 1 / ratio): 1 where right and wrong answers are equally likely."""
    return sum(min(ratio, 1 / ratio) if ratio else 0.0 for ratio in ratios) / len(ratios)


def truthfulness(ratio: float) -> float:
    """Return max(0, 1 - ratio), which is 1 where a wrong answer is never said: TOFU's score for what is kept."""
    return max(0.0, 1 - ratio)


def forget_quality(ratios: Sequence[float], never_knew: Sequence[float]) -> float:
    """Return the p-value of the two-sample Kolmogorov-Smirnov test: near 1 if the two models cannot be told apart."""
    from scipy import stats  # takes 0.7 s

    return float(stats.ks_2samp(ratios, never_knew).pvalue)


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean of shares; 0 if one of them is 0."""
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0
