"""The general prompts that are shipped."""

from __future__ import annotations

import json

from forgetlearn.evaluation import general_prompts
from forgetlearn.facts import make_fact
from forgetlearn.models.encoding import turns_of

ALL_PROMPTS = True


def test_two_halves_of_the_same_kinds_have_no_prompt_twice():
    keeping, measuring = general_prompts.keeping(), general_prompts.measuring()
    assert len(keeping) == len(measuring) >= 48
    assert [len(turns_of(prompt)) for prompt in keeping] == [len(turns_of(prompt)) for prompt in measuring]
    prompts = (*keeping, *general_prompts.questions(), *measuring)
    normal = [" ".join(turns_of(prompt)).casefold().strip(" .?!") for prompt in prompts]
    assert len(set(normal)) == len(normal)
    assert all(turn == turn.strip() != "" for prompt in prompts for turn in turns_of(prompt))


def test_chats_and_several_languages_are_among_them():
    measuring = general_prompts.measuring()
    assert sum(len(turns_of(prompt)) == 3 for prompt in measuring) >= 3
    foreign = [prompt for prompt in measuring if isinstance(prompt, str) and not prompt.isascii()]
    assert len(foreign) >= 8


def test_every_line_holds_a_prompt_of_each_half_or_a_question_to_keep():
    rows = [json.loads(line) for line in general_prompts.FILE.read_text(encoding="utf-8").splitlines()]
    pairs, questions = [r for r in rows if "measure" in r], [r for r in rows if "measure" not in r]
    assert {tuple(row) for row in pairs} == {("kind", "keep", "measure")}
    assert {(row["kind"], tuple(row)) for row in questions} == {("question", ("kind", "keep"))}
    assert len(questions) == len(general_prompts.questions()) >= 40


def test_what_asks_a_fact_is_not_measured_as_general():
    prompt = next(prompt for prompt in general_prompts.measuring() if isinstance(prompt, str) and prompt.isascii())
    facts = [make_fact("Who?", "Ann", rephrase_prompts=[prompt.upper()])]
    assert general_prompts.measuring(facts) == tuple(own for own in general_prompts.measuring() if own != prompt)
