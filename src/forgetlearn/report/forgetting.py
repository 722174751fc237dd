"""What the pages of a run say if it only forgets: what is not gone, what stayed, and how soon the rest comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from forgetlearn.facts import matching
from forgetlearn.report.render import Column, show_score
from forgetlearn.storage.records import BACK, Forgetting, Input, Relearning, Row, Summary

COLUMNS: tuple[Column, ...] = (
    ("residue", "contains"),
    ("residue", "generate"),
    ("residue", "rouge"),
    ("residue", "probability"),
    ("residue", "token"),
    ("locality", "agreement"),
)
MEANS = {
    "contains": "prompts that get their answer",
    "rouge": "share of the answer's words in the reply (ROUGE-L)",
    "probability": "probability of the answer, per token",
    "truth": "truth: how much likelier the right answer is than wrong ones",
}
Measure = tuple[str, list[str]]  # its name, and its value before and after
MOST_LEFT = 0.5  # of the answers that were said before
LEVEL = 0.05  # of the test of forget quality
FEW_STEPS = 16  # in so few, a person who has half of the facts brings them back at no cost


@dataclass(frozen=True)
class Left:
    """A prompt that still gets the answer that was to be forgotten, and what the model says."""

    prompt: str
    said: str


def shown_columns(summary: Summary) -> tuple[Column, ...]:
    """Return the columns that were scored, of those that make sense if nothing is learned."""
    protocols = {protocol for phase in summary.phases.values() for protocol in phase.get("residue", {})} | {"agreement"}
    return tuple(column for column in COLUMNS if column[1] in protocols)


def verdict(summary: Summary) -> str:
    """Return one paragraph: how many answers are still said, how much stayed, and how soon the facts come back."""
    found = summary.forgetting
    assert found is not None, "it only forgets"
    return " ".join(
        filter(
            None,
            (_residue(summary), _remedy(summary), _kept(found), _quality(found), *map(_relearning, found.relearning)),
        )
    )


def _residue(summary: Summary) -> str:
    before, now = (summary.phases[phase].get("residue", {}) for phase in ("base", "forgotten"))
    protocol = next((name for _, name in COLUMNS if now.get(name) and now[name].mean is not None), None)
    if protocol is None:
        return "Whether the answers are gone was not scored."
    shares = show_score(before.get(protocol)), show_score(now[protocol])
    if protocol == "probability":  # nothing was generated
        return f"The answers to forget had a probability per token of {shares[0]} % before, and have {shares[1]} % now."
    return (
        f"Of the answers to forget, the model gave {shares[0]} % before, and gives {shares[1]} % now, counted over "
        f"prompts and rephrasings ({protocol})."
    )


def _remedy(summary: Summary) -> str:
    """Name the method that forgets what a model knows by heart, if another left more than half of the answers."""
    scores = (summary.phases[phase].get("residue", {}).get("contains") for phase in ("base", "forgotten"))
    before, now = ((score and score.mean) or 0.0 for score in scores)
    other = "npo-ft" if summary.method.endswith("-ft") else "npo"
    if summary.method == other or not before or now <= MOST_LEFT * before:
        return ""
    return f"More than half of them are left, as of what a model knows by heart: --method {other} may go further."


def _kept(found: Forgetting) -> str:
    if found.kept is None:
        return ""
    phases = [found.kept.scores[phase]["reliability"] for phase in ("base", "forgotten")]
    protocol = next(name for name in MEANS if name in phases[0])
    shares = [show_score(own.get(protocol)) for own in phases]
    return (
        f"Of {found.kept.scored} facts that should stay and were not trained on, it gave {shares[0]} % before, and "
        f"gives {shares[1]} % now ({protocol})."
    )


def _quality(found: Forgetting) -> str:
    truth = found.truth.get("forgotten")
    if truth is None or truth.quality is None:
        return ""
    apart = "differ from" if truth.quality < LEVEL else "cannot be told from"
    return (
        f"Forget quality: its truth ratios {apart} those of a model that never knew (Kolmogorov-Smirnov test, p = "
        f"{truth.quality:.2g})."
    )


def _relearning(found: Relearning) -> str:
    """Say how soon half of the answers come back, in each half of the facts."""
    who = "A model that never knew them" if found.model == "reference" else "The forgotten model"
    if found.same[0] >= BACK:
        if found.model == "reference":
            return "The reference says at least half of the answers untrained: it is not a model that never knew them."
        return "At least half of the answers were not gone, so relearning was not tested."
    return f"{who}, trained on half of the facts, says half of these {found.when_back('same')}" + (
        f", and half of the others {found.when_back('other')}." if found.n_other else "."
    )


def warning(found: Forgetting) -> str | None:
    """Return a warning if a few steps of training on half of the facts bring the others back, else None."""
    product = next((each for each in found.relearning if each.model == "product"), None)
    back = product.back("other") if product and product.same[0] < BACK else None
    if back is None or back > FEW_STEPS:
        return None
    never = next((each.back("other") for each in found.relearning if each.model == "reference"), None)
    beside = f"; a model that never knew them says these after {never}" if never else ""
    return (
        f"The facts are hidden rather than removed: after {back} step{'s' * (back != 1)} of training on one half of "
        f"them, the model says half of the other half too{beside}."
    )


def measures(summary: Summary) -> list[Measure]:
    """Return a line per measure with its value before and after, beside the scores of the facts to forget."""
    found = summary.forgetting
    assert found is not None, "it only forgets"
    return [*_of_kept(found), *_of_truth(found)]


def _of_kept(found: Forgetting) -> Iterator[Measure]:
    if (kept := found.kept) is None:
        return
    before, after = (kept.scores[phase]["reliability"] for phase in ("base", "forgotten"))
    for name, words in MEANS.items():
        if name in before:
            yield f"kept facts: {words}, percent", [show_score(own.get(name), interval=True) for own in (before, after)]
    yield (
        f"kept facts: utility, the harmonic mean of {', '.join(kept.parts)}",
        [f"{kept.utility[phase]:.3f}" for phase in ("base", "forgotten")],
    )


def _of_truth(found: Forgetting) -> Iterator[Measure]:
    phases = [found.truth.get(phase) for phase in ("base", "forgotten")]
    if any(phases):
        cells = ["–" if own is None else f"{own.closeness:.3f}" for own in phases]
        yield "truth ratio, min(R, 1/R): 1 if right and wrong are alike", cells
    if any(own and own.quality is not None for own in phases):
        cells = ["–" if own is None or own.quality is None else f"{own.quality:.2g}" for own in phases]
        yield "forget quality, p of Kolmogorov-Smirnov", cells


def relearned(found: Forgetting) -> list[tuple[str, list[int], list[float], list[float]]]:
    """Return the curves of the relearning probe: the model, the steps, and the percent of each half that is said.

    There is no other half of a single fact.
    """
    return [(each.model, each.steps, each.same, each.other if each.n_other else []) for each in found.relearning]


def not_gone(inputs: Iterable[Input], rows: Iterable[Row]) -> list[Left]:
    """Return the prompts and rephrasings that still get the old answer, as `contains` judges; prompts come first."""
    said = {row.fact: row for row in rows if row.phase == "forgotten" and row.protocol == "generate"}
    own, rephrased = [], []
    for fact in inputs:
        if (row := said.get(fact.id)) is None:
            continue
        if _says(row.said, fact, row):
            own.append(Left(fact.prompt, row.said or ""))
        texts = [text for text in row.said_rephrased if _says(text, fact, row)]
        rephrased += [Left(f"{fact.prompt} (asked in other words)", text or "") for text in texts]
    return own + rephrased


def _says(said: str | None, fact: Input, row: Row) -> bool:
    return said is not None and bool(matching.says(said, fact.old, question=fact.prompt, at_start=row.writes_on))


def as_asked(inputs: Iterable[Input]) -> list[Input]:
    """Return the facts with the answer that was forgotten as their old and only one."""
    return [fact.model_copy(update={"ground_truth": fact.old or fact.new, "target_new": ""}) for fact in inputs]


def context(summary: Summary, inputs: Iterable[Input], rows: Iterable[Row]) -> Mapping[str, object] | None:
    """Return what the templates show of a run that only forgets; None if it learns."""
    if (found := summary.forgetting) is None:
        return None
    return {
        "found": found,
        "measures": measures(summary),
        "asked": "contains" in summary.phases["forgotten"].get("residue", {}),
        "left": not_gone(inputs, rows),
        "relearned": relearned(found),
        "warning": warning(found),
    }
