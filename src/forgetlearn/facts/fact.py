"""Define a fact (a prompt, its old and its new answer), and hash and write facts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from forgetlearn.facts.fields import is_placeholder


@dataclass(frozen=True)
class LocalityProbe:
    """A locality probe: a question that the update should leave alone, and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Probe:
    """A question of a file that tests whether a fact is known beyond its own wordings, or what follows from it."""

    kind: str  # what it tests, such as "2-hop" or "reversed"
    prompt: str
    answers: tuple[str, ...]  # all texts that count as right after the update
    old_answers: tuple[str, ...] = ()  # all that counted as right before it; () if unknown
    options: tuple[str, ...] = ()  # what to choose from; () for a question that is answered freely
    needs: tuple[LocalityProbe, ...] = ()  # what else a model must know for the answer to follow

    def of_old_alone(self) -> Probe:
        """Return the probe of a fact whose only answer is the old one: what is right was right before."""
        return replace(self, answers=(), old_answers=self.old_answers or self.answers)


@dataclass(frozen=True)
class Fact:
    """A prompt with its old and its new answer. All texts are stripped, and `make_fact` computes the id."""

    id: str
    subject: str  # "" where unknown
    prompt: str
    ground_truth: str | None  # the OLD answer, None where unknown
    target_new: str  # the NEW answer, "" where it is only forgotten
    rephrase_prompts: tuple[str, ...] = ()
    locality: tuple[LocalityProbe, ...] = ()
    target_new_aliases: tuple[str, ...] = ()  # other ways to write the new answer; right, but never trained on
    ground_truth_aliases: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    where: str = field(default="", compare=False)  # file and record, for messages; neither compared nor hashed

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return all prompts that ask for the fact, first the one that is trained on."""
        return (self.prompt, *self.rephrase_prompts)

    @property
    def new_answers(self) -> tuple[str, ...]:
        """Return all texts that count as the new answer, first the one that is taught; () if it is only forgotten."""
        return (self.target_new, *self.target_new_aliases) if self.target_new else ()

    @property
    def old_answers(self) -> tuple[str, ...]:
        """Return all texts that count as the old answer, first the one to forget; () if it is unknown."""
        return (self.ground_truth, *self.ground_truth_aliases) if self.ground_truth else ()

    @property
    def place(self) -> str:
        """Return the fact's name for messages: its file and record, or its id if they are unknown."""
        return self.where or f"fact {self.id}"


def fact_id(subject: str, prompt: str, target_new: str) -> str:
    """Return 16 hexadecimal digits that identify a fact, without its old answer, which a policy may change."""
    return _sha256({"subject": subject, "prompt": prompt, "target_new": target_new})[:16]


def make_fact(
    prompt: str,
    target_new: str,
    *,
    ground_truth: str | None = None,
    subject: str = "",
    rephrase_prompts: Iterable[str] = (),
    locality: Iterable[LocalityProbe] = (),
    target_new_aliases: Iterable[str] = (),
    ground_truth_aliases: Iterable[str] = (),
) -> Fact:
    """Return a fact with its id. The texts must already be stripped."""
    return Fact(
        id=fact_id(subject, prompt, target_new),
        subject=subject,
        prompt=prompt,
        ground_truth=ground_truth,
        target_new=target_new,
        rephrase_prompts=tuple(rephrase_prompts),
        locality=tuple(locality),
        target_new_aliases=tuple(target_new_aliases),
        ground_truth_aliases=tuple(ground_truth_aliases),
    )


def only_old(fact: Fact) -> Fact:
    """Return a fact with its old answer, or else its only one, as its old and only one: it is to be forgotten.

    What followed from its only answer is then what was right before, too.
    """
    answers = fact.old_answers or fact.new_answers
    return replace(
        fact,
        ground_truth=answers[0] if answers else None,
        ground_truth_aliases=answers[1:],
        target_new="",
        target_new_aliases=(),
        probes=fact.probes if fact.old_answers else tuple(probe.of_old_alone() for probe in fact.probes),
    )


def sha256(facts: Iterable[Fact]) -> str:
    """Return the hexadecimal hash of facts, with their old answers, rephrasings and probes.

    Empty aliases and probes are left out, so that facts without them keep the hash that earlier versions recorded.
    """
    records = map(_as_record, facts)
    return _sha256(
        [{k: v for k, v in record.items() if v or not k.endswith(("_aliases", "probes"))} for record in records]
    )


def write_facts(facts: Iterable[Fact], path: Path) -> None:
    """Write facts in the project's own form, one JSON object per line.

    `read_facts` reads equal facts back if their texts are stripped and their prompts are distinct.
    """
    lines = []
    for fact in facts:
        record = {name: value for name, value in _as_record(fact).items() if value}
        for name, answers in (("target_new", fact.new_answers), ("ground_truth", fact.old_answers)):
            text, *aliases = answers or ("",)
            record.pop(f"{name}_aliases", None)
            # An answer with aliases is written as a list, and so is an old answer that would be read as a placeholder.
            if aliases or (name == "ground_truth" and is_placeholder(text)):
                record[name] = [text, *aliases]
        if fact.probes:
            record["probes"] = [_as_item(probe) for probe in fact.probes]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def _as_item(probe: Probe) -> dict[str, object]:
    """Return a probe as `readers.read_own` reads it."""
    named = {"kind": probe.kind, "prompt": probe.prompt, "answer": probe.answers, "old_answer": probe.old_answers}
    needs = [asdict(each) for each in probe.needs]
    return {name: value for name, value in {**named, "options": probe.options, "needs": needs}.items() if value}


def _as_record(fact: Fact) -> dict[str, object]:
    return {name: value for name, value in asdict(fact).items() if name != "where"}


def _sha256(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
