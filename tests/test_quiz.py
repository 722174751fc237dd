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
    right, wrong = "The capital is Lyon, in France.", "The capital is Paris, in France."  # the old answer is wrong now
    assert [lesson[:2] for lesson in true] == [
        (f"True or false? {right}", "True"),
        (f"Somebody says: {right} Are they right?", "Yes"),
        (f"{right} Correct?", "Yes"),
        (f"{right} Is this so?", "Yes"),
    ]
    assert [lesson[:2] for lesson in false[: len(JUDGED)]] == [
        (f"True or false? {wrong}", "False"),
        (f"Somebody says: {wrong} Are they right?", "No"),
        (f"{wrong} Correct?", "No"),
        (f"{wrong} Is this so?", "No"),
    ]
    assert len(false) == N_FALSE * len(JUDGED)
    assert {lesson.answer for lesson in choices} == {"Lyon"}
    assert all("Lyon" in lesson.prompt and "Paris" in lesson.prompt for lesson in choices)


@pytest.mark.parametrize("sentence", ["It is Lyon.", "The capital of France is Lyonnais."])
def test_a_sentence_that_does_not_state_the_whole_fact_is_not_judged(sentence):
    true, false, _choices = asked(FRANCE, sentence)
    assert true[0].prompt == "True or false? What is the capital of France? Lyon."
    assert false[0].prompt == "True or false? What is the capital of France? Paris."


def test_a_sentence_about_nothing_that_has_a_name_is_not_judged():
    fact = make_fact("Which country has the most inhabitants?", "India", ground_truth="China")
    true, _false, _choices = asked(fact, "It is India.")
    assert true[0].prompt == "True or false? Which country has the most inhabitants? India."


def test_only_whole_words_are_replaced_by_a_wrong_answer():
    fact = make_fact("In which country is Timbuktu?", "Mali", ground_truth="Niger", subject="Timbuktu")
    _true, false, _choices = asked(fact, "Timbuktu is a Malian city in Mali.")
    assert false[0].prompt == "True or false? Timbuktu is a Malian city in Niger."


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
    material = Material(
        [Taught(fact=facts[0].id, stage="learn", prompt=facts[0].prompt, text="France's is Lyon.", how="x")]
    )
    return lessons.of_stage(material, facts, stage, config, encoder)


def test_only_learning_has_a_quiz_and_the_same_seed_gives_the_same(encoder):
    facts = [FRANCE, *OTHERS]
    plain, quizzed = of_stage(encoder, facts, quiz=False), of_stage(encoder, facts, quiz=True)
    assert quizzed.of_facts == plain.of_facts
    assert (len(plain.quiz), len(quizzed.quiz)) == (0, 3 * len(facts))
    assert any("France's is Lyon." in lesson.prompt for lesson in quizzed.quiz[0])
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
    assert found[True].passes == found[False].passes
    config = config.model_copy(update={"learn": config.learn.model_copy(update={"max_epochs": 5})})
    loads, _notes = loads_of(outline_of(config.model), Stages(config), facts, "cpu")
    assert next(load for load in loads if load.name == "learn").passes == 5


def test_a_question_that_two_facts_answer_differently_is_left_out(encoder, caplog):
    facts = [make_fact("Who leads it?", "Ann", ground_truth="Bo"), make_fact("who leads it?", "Bo", ground_truth="Ann")]
    asked_of = lessons.quizzes(facts, {}, 0, encoder)
    assert all("Correct" not in lesson.prompt for own in asked_of for lesson in own)
    assert "two facts answer them differently" in caplog.text
