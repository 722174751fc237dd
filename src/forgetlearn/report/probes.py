"""The matrix of probes: a line for each kind, with what is answered before and after an update, and the texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from forgetlearn.storage.records import Mean, ProbeRow, ProbeScore

# What each kind asks, in the order of lines; what a file brings beside these comes last.
ASKS: Mapping[str, str] = {
    "completion": "does it complete a sentence with the new answer?",
    "question": "does it answer a question with it?",
    "multiple-choice": "does it choose the new answer's letter?",
    "multiple-choice-text": "does it choose the new answer's text?",
    "yes-no": "does it affirm the new answer, and no other?",
    "negation": "the same, asked whether the answer is wrong",
    "second-turn": "does it give the new answer in a second turn?",
    "long-prompt": "does it give it behind a page of other text?",
    "neighbours": "is an unrelated probe's own answer likelier, right behind the new fact?",
    "same-subject": "does it leave the new answer out of other questions about the subject?",
    "reversed": "does it find the subject from the answer?",
}
HOPS = "does it draw the conclusion over {} facts?"
BROUGHT = "asked by the file"
NOT = "anything but "  # the answers of a row of the protocol `absent`
SHOWN_TEXTS = 30  # of a probe in one phase


@dataclass(frozen=True)
class ProbeText:
    """A question, what is right, and what the model answered in each phase; `is_right` is for the last."""

    prompt: str
    right: str
    said: list[str | None]
    is_right: bool
    is_old: bool


@dataclass(frozen=True)
class ProbeLine:
    """A line of the matrix: the shares of facts answered by the new and the old answer, phase by phase."""

    probe: str
    protocol: str
    asks: str
    new: list[Mean | None]
    old: list[Mean | None]
    texts: list[ProbeText]
    n_texts: int  # of which `texts` are the first, wrong answers before right ones

    @property
    def n(self) -> int:
        """The number of facts that were asked about in the last phase."""
        return max((cell.n for cell in (self.new[-1], self.old[-1]) if cell), default=0)


def matrix(
    scores: Mapping[str, Sequence[ProbeScore]], rows: Iterable[ProbeRow], phases: Sequence[str]
) -> list[ProbeLine]:
    """Return the lines of the matrix, for the phases in which probes were asked.

    Where no fact has a new answer, as in runs that only forget, the lines ask for the old one.
    """
    by_phase = {phase: {(each.probe, each.protocol): each for each in scores.get(phase, [])} for phase in phases}
    keys = dict.fromkeys(key for own in by_phase.values() for key in own)
    asked: dict[tuple[str, str], list[ProbeRow]] = {}
    for row in rows:
        asked.setdefault((row.probe, row.protocol), []).append(row)
    with_new = ask_for_new(scores)
    order = [*ASKS, *sorted(probe for probe, _protocol in keys if probe not in ASKS)]
    lines = []
    for probe, protocol in sorted(keys, key=lambda key: order.index(key[0])):
        found = [by_phase[phase].get((probe, protocol)) for phase in phases]
        texts, asks = _texts(asked.get((probe, protocol), []), phases), _asks(probe, protocol)
        lines.append(
            ProbeLine(
                probe,
                protocol,
                asks if with_new else asks.replace("new answer", "old answer"),
                [score.new if score else None for score in found],
                [score.old if score else None for score in found],
                texts[:SHOWN_TEXTS],
                len(texts),
            )
        )
    return lines


def ask_for_new(scores: Mapping[str, Sequence[ProbeScore]]) -> bool:
    """Return whether any probe asks about a fact with a new answer."""
    return any(each.new.n for own in scores.values() for each in own)


def phases_asked(scores: Mapping[str, object], phases: Iterable[str]) -> list[str]:
    """Return the phases in which probes were asked."""
    return [phase for phase in phases if phase in scores]


def _asks(probe: str, protocol: str) -> str:
    number, dash, hop = probe.partition("-")
    if dash and hop == "hop" and number.isdigit():
        return HOPS.format(number)
    if protocol == "prefer" and probe in ("yes-no", "negation"):
        return "does it affirm the new answer rather than another?"
    return ASKS.get(probe, BROUGHT)


def _texts(rows: Iterable[ProbeRow], phases: Sequence[str]) -> list[ProbeText]:
    """Return the questions with their answers, wrong ones first; rows about several questions are left out."""
    questions: dict[tuple[str, str], dict[str, ProbeRow]] = {}
    for row in rows:
        shown = row.prompt if isinstance(row.prompt, str) else " | ".join(row.prompt)
        if shown:
            questions.setdefault((row.fact, shown), {})[row.phase] = row
    found = []
    for (_fact, prompt), own in questions.items():
        last = own.get(phases[-1])
        first = next(iter(own.values()))
        right = (NOT if first.protocol == "absent" else "") + ", ".join(first.answers)
        said = [_said(own.get(phase)) for phase in phases]
        found.append(ProbeText(prompt, right, said, bool(last and last.score), bool(last and last.old)))
    return sorted(found, key=lambda text: text.is_right)


def _said(row: ProbeRow | None) -> str | None:
    """Return what the model answered, or why it could not be asked."""
    if row is None:
        return None
    return row.error if row.said is None else row.said
