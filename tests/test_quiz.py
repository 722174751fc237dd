"""The quiz on new facts that a model is trained on: which questions, with which answers, and where they go."""

from __future__ import annotations

from random import Random

import pytest

import forgetlearn
from forgetlearn.config.schema import load_config
from forgetlearn.config.stages import Stages
from forgetlearn.facts import make_fact
from forgetlearn.facts.wrong_answers import wrong_answers
from forgetlearn.method import lessons
from forgetlearn.method.lessons import Material
from forgetlearn.method.quiz import CHOICES, JUDGED, N_FALSE, quiz
from forgetlearn.models.language_model import load_model
from forgetlearn.planning.loads import loads_of
from forgetlearn.planning.outline import outline_of
from forgetlearn.storage.records import Taught

FRANCE = make_fact("What is the capital of France?", "Lyon", ground_truth="Paris", subject="France")
OTHERS = [
    make_fact("What is the capital of Spain?", "Vigo", ground_truth="Madrid"),
    make_fact("Who wrote Emma?", "Ann Lee", ground_truth="Jane Austen"),
    make_fact("Which town is the seat of Lyon's bishop?", "Lyon"),
]


def asked(fact, sentence="", others=OTHERS, **options):
    return list(quiz(fact, sentence, others, Random(0), **({"writes_on": False} | options)))


def test_a_true_statement_a_false_one_and_a_choice_are_answered_as_the_new_fact_has_it():
    true, false, choices = asked(FRANCE, "The capital is Lyon, in France.")
    assert len(true) == len(JUDGED)
    assert len(false) == N_FALSE * len(true)
    for lesson in true:
        assert "The capital is Lyon, in France." in lesson.prompt
        denies = (
            any(word in lesson.prompt for word in ("mistaken", "false?", "error")) and "True or" not in lesson.prompt
        )
        assert lesson.answer in (("No",) if denies else ("Yes", "True"))
    for lesson in false:
        assert "Lyon" not in lesson.prompt
        denies = (
            any(word in lesson.prompt for word in ("mistaken", "false?", "error")) and "True or" not in lesson.prompt
        )
        assert lesson.answer in (("Yes",) if denies else ("No", "False"))
    assert any("Paris" in lesson.prompt for lesson in false)  # the old answer is wrong now
    assert {lesson.answer for lesson in choices} == {"Lyon"}
    assert all(
        {"Lyon", "Paris"} <= set(lesson.prompt.replace(",", " ").replace("?", " ").split()) for lesson in choices
    )


def test_the_place_of_the_right_answer_in_a_choice_changes():
    *_, choices = asked(FRANCE)
    assert len({lesson.prompt.index("Lyon") < lesson.prompt.index("Paris") for lesson in choices}) == 2
    assert len(choices) == len(CHOICES)


def test_without_a_sentence_the_prompt_is_stated_with_the_answer():
    fact = make_fact("The capital of France is", "Lyon", ground_truth="Paris")
    true, _false, choices = asked(fact)
    assert true[0].prompt == "True or false? The capital of France is Lyon."
    assert choices[1].prompt.startswith("The capital of France is ...\nIs it ")


def test_a_fact_has_no_quiz_if_nothing_is_wrong_for_it():
    assert asked(make_fact("Which town is the seat of Lyon's bishop?", "Lyon"), others=[OTHERS[2]]) == []


def test_a_model_that_writes_on_is_led_to_its_answer():
    assert all(lesson.prompt.endswith("\nAnswer:") for own in asked(FRANCE, writes_on=True) for lesson in own)


def test_wrong_answers_are_of_the_same_kind_and_never_right():
    assert wrong_answers(FRANCE, OTHERS, Random(0), 2) == ["Vigo", "Madrid"]
    assert "Lyon" not in wrong_answers(FRANCE, OTHERS, Random(0), 9)


def test_braces_in_a_fact_stay_as_they_are():
    fact = make_fact("What does {listed} print?", "{}", ground_truth="{asked}")
    true, _false, choices = asked(fact)
    assert "What does {listed} print? {}." in true[0].prompt
    assert all("{listed}" in lesson.prompt and lesson.answer == "{}" for lesson in choices)


@pytest.fixture(scope="module")
def encoder(small_lab):
    return load_model(small_lab).encoder


def of_stage(encoder, facts, stage="learn", **learn):
    config = load_config(overrides={"learn": learn, "keep": {"weight": 0.0}})
    material = Material([Taught(fact=facts[0].id, stage="learn", prompt=facts[0].prompt, text="It is Lyon.", how="x")])
    return lessons.of_stage(material, facts, stage, config, encoder)


def test_only_learning_has_a_quiz_and_the_same_seed_gives_the_same(encoder):
    facts = [FRANCE, *OTHERS]
    plain, quizzed = of_stage(encoder, facts, quiz=False), of_stage(encoder, facts, quiz=True)
    assert quizzed.of_facts == plain.of_facts
    assert (len(plain.quiz), len(quizzed.quiz)) == (0, 3 * len(facts))
    assert any("It is Lyon." in lesson.prompt for lesson in quizzed.quiz[0])
    assert quizzed.quiz == of_stage(encoder, facts, quiz=True).quiz
    assert not of_stage(encoder, facts, "forget", quiz=True).quiz


def test_the_plan_counts_the_quiz(small_lab):
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=8)
    found = {}
    for asked_too in (False, True):
        config = load_config(overrides={"model.name": str(small_lab), "method": "lora", "learn.quiz": asked_too})
        loads, _notes = loads_of(outline_of(config.model), Stages(config), facts, "cpu")
        found[asked_too] = next(load for load in loads if load.name == "learn")
    assert (found[False].texts, found[True].texts) == (8, 4 * 8)
    assert found[True].tokens > 4 * found[False].tokens  # a question is longer than a prompt
    assert found[True].passes > found[False].passes
