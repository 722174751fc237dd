"""Facts in the forms that people have them: benchmarks of others, chat, near-own names; and what is no answer."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgetlearn.cli.main import app, main
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import Fact, LocalityProbe, Probe, from_records, make_fact, read_facts, write_facts
from forgetlearn.runs.checks import read_config_facts, resolve
from test_facts import ZSRE_RECORD, assert_adds_up, one, own, save

# Made up, with the field names of the real files (github.com/princeton-nlp/MQuAKE, edenbiran/RippleEdits,
# ExplainableML/WikiBigEdit, WanliYoung/Revisit-Editing-Evaluation; HalluEditBench and TOFU in shared/data).
MQUAKE_RECORD = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "The head of {} is",
            "relation_id": "P1",
            "target_new": {"str": "Ada Byron", "id": "Q1"},
            "target_true": {"str": "Sam Roe", "id": "Q2"},
            "subject": "Acme",
            "question": "Who heads Acme?",
        },
        {
            "prompt": "{} lives in",
            "relation_id": "P2",
            "target_new": {"str": "Rome", "id": "Q3"},
            "target_true": {"str": "Oslo", "id": "Q4"},
            "subject": "Ada Byron",
            "question": "Where does Ada Byron live?",
        },
    ],
    "questions": ["Where does the head of Acme live?", "In which city does Acme's head live?"],
    "answer": "Bonn",
    "answer_alias": ["City of Bonn"],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma"],
    "single_hops": [
        {"question": "Who heads Acme?", "cloze": "", "answer": "Sam Roe", "answer_alias": ["S. Roe"]},
        {"question": "Where does Sam Roe live?", "cloze": "", "answer": "Bonn", "answer_alias": ["City of Bonn"]},
    ],
    "new_single_hops": [
        {"question": "Who heads Acme?", "cloze": "", "answer": "Ada Byron", "answer_alias": ["A. Byron", "Sam Roe"]},
        {"question": "Where does Ada Byron live?", "cloze": "", "answer": "Rome", "answer_alias": ["Roma"]},
    ],
    "orig": {"triples": []},
}
OTHER_RECORDS = {
    "mquake": MQUAKE_RECORD,
    "rippleedits": {
        "example_type": "popular",
        "edit": {
            "prompt": "The name of the director of Life is Good is Ada Byron.",
            "subject_id": "Q1",
            "relation": "DIRECTOR",
            "target_id": "Q2",
            "previous_fact": {
                "prompt": "The name of the director of Life is Good is Sam Roe.",
                "subject_id": "Q1",
                "relation": "DIRECTOR",
                "target_id": "Q3",
            },
        },
        "Relation_Specificity": [
            {
                "test_queries": [
                    {
                        "prompt": "The name of the composer of Life is Good is",
                        "answers": [{"value": "Bo Li", "aliases": ["B. Li"]}],
                        "query_type": "regular",
                        "subject_id": "Q1",
                        "relation": "COMPOSER",
                        "target_ids": ["Q4"],
                        "phrase": None,
                    }
                ],
                "test_condition": "OR",
                "condition_queries": [
                    {
                        "prompt": "The name of the director of Life is Good is",
                        "answers": [{"value": "Sam Roe", "aliases": ["S. Roe"]}],
                        "relation": "DIRECTOR",
                        "target_ids": ["Q3"],
                    }
                ],
            }
        ],
        "Subject_Aliasing": [
            {
                "test_queries": [
                    {
                        "prompt": "The name of the director of LiG is",
                        "answers": [{"value": "Ada Byron", "aliases": ["A. Byron"]}],
                        "relation": "DIRECTOR",
                        "target_ids": ["Q2"],
                    }
                ],
                "test_condition": "OR",
                "condition_queries": [],
            }
        ],
        "Compositionality_I": [
            {
                "test_queries": [
                    {
                        "prompt": "The home of the director of LiG is",
                        "answers": [{"value": "Rome", "aliases": ["Roma"]}],
                        "relation": "HOME",
                        "target_ids": ["Q5"],
                    },
                    {"prompt": "The age of the director of LiG is", "answers": [], "relation": "AGE", "target_ids": []},
                ],
                "condition_queries": [],
            }
        ],
    },
    "wikibigedit": {
        "tag": "new",
        "subject": "Acme",
        "update": "Who heads Acme?",
        "rephrase": "Acme is headed by whom?",
        "personas": "Yo, who's the boss of Acme?",
        "ans": "Ada Byron",
        "loc": "Who heads Globex?",
        "loc_ans": "Hank Scorpio",
        "mhop": None,
        "mhop_ans": None,
    },
    "qaedit": {
        "subject": "Acme",
        "prompt": "Who heads Acme?",
        "target": "Ada Byron",
        "rephrase": "Acme is headed by whom?",
        "locality": [{"loc": "Who heads Globex?", "loc_ans": "Hank Scorpio"}],
    },
    "halluedit": {
        "topic": "firms",
        "subject": "Acme",
        "relation": "head",
        "object": "Ada Byron",
        "question": "Who heads Acme?",
        "output_some_model": "Sam Roe",
        "eval_some_model": "0.0",
        "paraphrased_question": "Acme is headed by whom?",
        "locality_question": "Where is Acme?",
        "question_2hop": "Where does the head of Acme live?",
        "answer_2hop": "Rome",
        "question_3hop": "",
        "answer_3hop": "Italy",
        "multiple_choice_with_letters": "A. Sam Roe  B. Ada Byron  C. Bo Li, B. A.  D. J. F. Doe",
        "multiple_choice_labels": "B",
        "yes_question": "Does Ada Byron head Acme?",
        "no_question": "Does Sam Roe head Acme?",
        "reversed_relation_question": "What does Ada Byron head?",
    },
    "question-answer": {
        "question": "Who heads Acme?",
        "answer": "It is Ada Byron.",
        "paraphrased_question": "Acme is headed by whom?",
        "perturbed_answer": ["It is Sam Roe.", "It is Bo Li."],
    },
    "messages": {
        "messages": [{"role": "user", "content": "Who heads Acme?"}, {"role": "assistant", "content": "Ada Byron"}]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "Who heads Acme?"}, {"from": "gpt", "value": "Ada Byron"}]
    },
    "alpaca": {"instruction": "Who heads it?", "input": "Acme", "output": "Ada Byron"},
    "prompt-completion": {"prompt": "Who heads Acme?", "completion": " Ada Byron"},
}
ASK = "Who heads Acme?"
AGAIN = ["Acme is headed by whom?"]
GLOBEX = [LocalityProbe("Who heads Globex?", "Hank Scorpio")]
READ_AS: dict[str, list[Fact]] = {
    "mquake": [
        make_fact(
            "The head of Acme is",
            "Ada Byron",
            ground_truth="Sam Roe",
            subject="Acme",
            rephrase_prompts=[ASK],
            target_new_aliases=["A. Byron"],  # without "Sam Roe", which is the old answer
            ground_truth_aliases=["S. Roe"],
        ),
        replace(
            make_fact(
                "Ada Byron lives in",
                "Rome",
                ground_truth="Oslo",
                subject="Ada Byron",
                rephrase_prompts=["Where does Ada Byron live?"],
                target_new_aliases=["Roma"],
            ),
            probes=tuple(
                Probe("2-hop", question, ("Rome", "Roma"), ("Bonn", "City of Bonn"))
                for question in MQUAKE_RECORD["questions"]
            ),
        ),
    ],
    "rippleedits": [
        replace(
            make_fact(
                "The name of the director of Life is Good is",
                "Ada Byron",
                ground_truth="Sam Roe",
                rephrase_prompts=["The name of the director of LiG is"],
                locality=[LocalityProbe("The name of the composer of Life is Good is", "Bo Li")],
                target_new_aliases=["A. Byron"],
                ground_truth_aliases=["S. Roe"],
            ),
            probes=(Probe("compositionality-i", "The home of the director of LiG is", ("Rome", "Roma")),),
        )
    ],
    "wikibigedit": [make_fact(ASK, "Ada Byron", subject="Acme", rephrase_prompts=AGAIN, locality=GLOBEX)],
    "qaedit": [make_fact(ASK, "Ada Byron", subject="Acme", rephrase_prompts=AGAIN, locality=GLOBEX)],
    "halluedit": [
        replace(
            make_fact(ASK, "Ada Byron", ground_truth="Sam Roe", subject="Acme", rephrase_prompts=AGAIN),
            probes=(
                Probe(
                    "multiple-choice",
                    ASK,
                    ("Ada Byron",),
                    ("Sam Roe",),
                    options=("Sam Roe", "Ada Byron", "Bo Li, B. A.", "J. F. Doe"),
                ),
                Probe("yes-no", "Does Ada Byron head Acme?", ("Yes",), ("No",)),
                Probe("yes-no", "Does Sam Roe head Acme?", ("No",), ("Yes",)),
                Probe("reversed", "What does Ada Byron head?", ("Acme",)),
                Probe("2-hop", "Where does the head of Acme live?", ("Rome",)),
            ),
        )
    ],
    "question-answer": [make_fact(ASK, "It is Ada Byron.", rephrase_prompts=AGAIN)],
    "messages": [make_fact(ASK, "Ada Byron")],
    "conversations": [make_fact(ASK, "Ada Byron")],
    "alpaca": [make_fact("Who heads it?\nAcme", "Ada Byron")],
    "prompt-completion": [make_fact(ASK, "Ada Byron")],
}
NOT_READ = {
    "mquake": {"orig": 1},
    "rippleedits": {"example_type": 1},
    "wikibigedit": {"tag": 1, "personas": 1},
    "halluedit": {
        "topic": 1, "relation": 1, "eval_some_model": 1, "locality_question": 1, "multiple_choice_labels": 1,
    },
    "question-answer": {"perturbed_answer": 2},
}  # fmt: skip


@pytest.mark.parametrize("form", OTHER_RECORDS)
def test_case_17_forms_of_others(form):
    facts = from_records([OTHER_RECORDS[form]])
    assert facts.reader == form
    assert list(facts) == READ_AS[form]
    assert facts.ignored_fields == NOT_READ.get(form, {})
    assert_adds_up(facts)


def test_case_17_each_edit_of_mquake_is_a_fact_of_its_own():
    facts = from_records([MQUAKE_RECORD, {**MQUAKE_RECORD, "case_id": 2}])
    assert (facts.records, facts.in_source, facts.read, facts.used) == (2, 4, 4, 2)
    assert facts.left_out == {"repeated_fact": 2}
    assert facts.noted == {"shared_alias": 2}
    assert len(facts[1].probes) == 2  # those of the second case are the same
    assert [item.record for item in facts.left_out_records] == [3, 4]
    broken = {**MQUAKE_RECORD, "requested_rewrite": [*MQUAKE_RECORD["requested_rewrite"], {"prompt": "{} is"}]}
    with pytest.raises(FactError, match=r"record 1: 'requested_rewrite\[3\].subject'"):
        from_records([broken])


def test_case_17_a_rippleedits_sentence_is_divided_without_the_name_of_its_answer():
    record = {"edit": {"prompt": "The mother tongue of X is Danish.", "target_id": "Q9"}}
    assert list(from_records([record])) == [make_fact("The mother tongue of X is", "Danish")]
    followed = {"edit": {"prompt": "Alpha is followed by Beta."}}
    assert from_records([followed])[0].prompt == "Alpha is followed by"
    whole = {"edit": {"prompt": "Nothing here"}}
    assert from_records([record, whole]).left_out == {"empty_new_answer": 1}


CHATS = [
    [{"role": "system", "content": "Be brief."}, *OTHER_RECORDS["messages"]["messages"]],
    [*OTHER_RECORDS["messages"]["messages"], {"role": "user", "content": "Sure?"}],
    [{"role": "user", "content": "Who?"}],
    [],
]


def test_case_17_a_chat_that_is_no_question_and_answer_is_left_out():
    records = [OTHER_RECORDS["messages"], *({"messages": chat} for chat in CHATS)]
    facts = from_records(records)
    assert (facts.used, facts.left_out) == (1, {"not_one_turn": 4})
    assert_adds_up(facts)
    with pytest.raises(FactError, match="not_one_turn"):
        from_records(records, strict=True)


def test_chat_content_in_parts_and_prompts_of_messages():
    parts = [{"type": "text", "text": "Who heads "}, {"type": "text", "text": "Acme?"}]
    user, assistant = {"role": "user", "content": parts}, {"role": "assistant", "content": "Ada"}
    assert one({"messages": [user, assistant]}) == make_fact(ASK, "Ada")
    assert one({"prompt": [user], "completion": [assistant]}) == make_fact(ASK, "Ada")


def test_case_17_near_own_names():
    assert one({"prompt": "p", "target_new": "n", "target_old": "o"}) == make_fact("p", "n", ground_truth="o")
    assert one({"Question": "p", "New answer": "n", "Old-Answer": "o"}) == make_fact("p", "n", ground_truth="o")
    record = {"prompt": "p", "target_new": "n", "ground_truth": "o", "target_old": "x", "question": "y"}
    facts = from_records([record])
    assert (facts[0].ground_truth, facts.ignored_fields) == ("o", {"target_old": 1, "question": 1})
    with pytest.raises(FactError, match=r"old_answer, target_old.*'ground_truth'.*--columns"):
        from_records([{"prompt": "p", "target_new": "n", "target_old": "o", "old_answer": "x"}])
    with pytest.raises(FactError, match=r"Prompt, PROMPT.*'prompt'"):
        from_records([{"Prompt": "p", "PROMPT": "q", "target_new": "n"}])


OTHERS = [
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, r"(?s)preference.*--columns.*ground_truth=rejected"),
    ({"subject": "s", "relation": "r", "object": "o"}, r"(?s)triples.*prompt"),
    ({"context": "c", "question": "q", "answers": []}, r"(?s)SQuAD.*target_new"),
    ({"instruction": "p"}, r"(?s)alpaca \(instruction, output\), without output.*--columns"),
    ({"src": "p", "subject": "s"}, r"zsre \(src, alt\), without alt"),
    ({"text": "a story"}, r"(?s): text.*--columns"),
    ({**OTHER_RECORDS["halluedit"], "output_other": "x"}, r"2 models.*--columns.*ground_truth=output_other"),
    ({**OTHER_RECORDS["alpaca"], **OTHER_RECORDS["messages"]}, r"messages.*alpaca.*--columns"),
]


@pytest.mark.parametrize(("record", "message"), OTHERS)
def test_case_17_another_form_is_named_with_what_to_do(record, message):
    with pytest.raises(FactError, match=message) as caught:
        from_records([record])
    assert str(caught.value).count("\n") <= 2


def test_a_form_of_others_with_own_names_beside_it_stays_the_own_form():
    record = own(1, question="q", answer="a", messages=[], instruction="i", output="o")
    assert from_records([record]).reader == "own"


# Subjects, placeholders


def test_case_12_the_subject_is_put_into_the_prompt():
    fact = one({"prompt": "{} plays the sport of", "subject": "Lee Doe", "target_new": "football"})
    assert fact.prompt == "Lee Doe plays the sport of"
    assert fact.id == one({"prompt": fact.prompt, "subject": "Lee Doe", "target_new": "football"}).id
    with pytest.raises(FactError, match=r"record 1: 'subject'.*\{\}"):
        from_records([{"prompt": "{} plays the sport of", "target_new": "football"}])


@pytest.mark.parametrize("subject", ["", "Python"])
def test_braces_in_a_prompt_of_another_form_survive_writing_and_reading(subject, tmp_path):
    record = {"prompt": "What does {} mean?", "target": "an empty dict", "subject": subject, "rephrase": "And {}?"}
    facts = from_records([record])
    write_facts(facts, tmp_path / "inputs.jsonl")
    again = read_facts(tmp_path / "inputs.jsonl")
    assert again.facts == facts.facts
    assert again.sha256() == facts.sha256()


@pytest.mark.parametrize(
    "text", ["n/a", "N/A", "#N/A", " - ", "--", "—", "None", "null", "NaN", "?", "???", float("nan")]
)
def test_case_13_a_placeholder_is_no_old_answer(text):
    facts = from_records([own(1, ground_truth=text), own(2)])
    assert [fact.ground_truth for fact in facts] == [None, "old 2"]
    assert facts.noted == ({} if isinstance(text, float) else {"placeholder": 1})
    assert facts.without_old_answer == 1


@pytest.mark.parametrize("text", ["unknown", "no", "nonexistent", "a-b", "0", "nil"])
def test_case_13_other_short_answers_are_answers(text):
    assert one(own(ground_truth=text)).ground_truth == text


def test_case_13_a_new_answer_and_a_list_are_meant_as_written():
    facts = from_records([own(1, target_new="None"), own(2, target_new="-", ground_truth=["None", "nobody"])])
    assert [(fact.target_new, fact.ground_truth) for fact in facts] == [("None", "old 1"), ("-", "None")]
    assert facts.noted == {}


# Aliases


def test_case_13_a_list_of_answers_is_one_to_teach_and_its_aliases():
    fact = one(own(target_new=["Anna", " Anna Roe ", "", "Anna"], ground_truth=["Lee Doe", "Lee"]))
    assert fact.new_answers == ("Anna", "Anna Roe")
    assert fact.old_answers == ("Lee Doe", "Lee")


def test_case_13_a_bar_divides_only_if_it_is_said_to():
    record = own(target_new="Lee Doe|Lee", ground_truth="x")
    literal = from_records([record])
    assert (literal[0].new_answers, literal.noted) == (("Lee Doe|Lee",), {"bar": 1})
    divided = from_records([record], aliases="|")
    assert (divided[0].new_answers, divided.noted) == (("Lee Doe", "Lee"), {})
    assert from_records([own(target_new="a / b /", ground_truth="/")], aliases="/")[0].new_answers == ("a", "b")
    assert one(ZSRE_RECORD | {"pred": "x|y"}, old_from="pred", aliases="|").old_answers == ("x",)


def test_case_13_an_alias_of_both_answers_is_neither():
    record = own(target_new=["Paris", "old 1", "City"], ground_truth=["old 1", "paris.", "City", "Lyon"])
    facts = from_records([record])
    assert (facts[0].new_answers, facts[0].old_answers) == (("Paris", "City"), ("old 1", "Lyon"))
    assert facts.noted == {"shared_alias": 3}


short = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(short, min_size=4, max_size=4, unique_by=str.casefold), old=st.sampled_from(["None", "-", "x9"]))
def test_facts_with_aliases_and_mixed_old_answers_survive_writing(tmp_path, names, old):
    records = [own(1, target_new=names[:2], ground_truth=[old, names[2]]), own(2, ground_truth=None)]
    facts = from_records(records)
    write_facts(facts, tmp_path / "facts.jsonl")
    assert read_facts(tmp_path / "facts.jsonl").facts == facts.facts


# Odd and large (cases 25, 30)


def test_case_25_a_number_of_many_digits():
    assert one(own(target_new=10**309)).target_new == "1" + "0" * 309
    with pytest.raises(FactError, match=r"record 1: 'target_new'.*digits"):
        from_records([own(target_new=10**5000)])


def test_case_25_a_field_with_a_number_of_many_digits(tmp_path):
    records = [own(**{"rephrase_prompt_" + "9" * 5000: "r2", "rephrase_prompt_2": "r1"})]
    assert read_facts(save(tmp_path, "f.json", json.dumps(records)))[0].rephrase_prompts == ("r1", "r2")


# --columns


def test_case_18_columns_name_the_fields(tmp_path, capsys):
    text = 'Frage,"Antwort, neu",Antwort alt\nWho?,Ada,Sam\n'
    path = save(tmp_path, "f.csv", text)
    flag = 'prompt=Frage, target_new="Antwort, neu",ground_truth=antwort_alt'
    assert main(["facts", str(path), "--columns", flag, "--json"]) == 0
    fact = json.loads(capsys.readouterr().out)["facts"][0]
    assert (fact["prompt"], fact["target_new"], fact["ground_truth"]) == ("Who?", "Ada", "Sam")
    assert main(["facts", str(path)]) == 2
    assert "--columns" in capsys.readouterr().err
    assert main(["facts", str(path), "--columns", "prompt=Frege,target_new=Antwort alt"]) == 2
    assert "'Frage'" in capsys.readouterr().err


def test_case_18_columns_can_exchange_two_fields_and_choose_among_several():
    swapped = one(own(), columns={"target_new": "ground_truth", "ground_truth": "target_new"})
    assert (swapped.target_new, swapped.ground_truth) == ("old 1", "new 1")
    tofu = one(
        OTHER_RECORDS["question-answer"],
        columns={"prompt": "question", "ground_truth": "answer", "target_new": "perturbed_answer"},
    )
    assert (tofu.new_answers, tofu.ground_truth) == (("It is Sam Roe.", "It is Bo Li."), "It is Ada Byron.")
    with pytest.raises(FactError, match=r"target_new = 'subject'.*'target_new'"):
        from_records([own(subject="s")], columns={"target_new": "subject"})
    with pytest.raises(FactError, match=r"facts.columns: 'promt'.*'prompt'"):
        from_records([own()], columns={"promt": "subject"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prompt=A", {"prompt": "A"}),
        (' prompt = A b ,target_new="x, ""y"" = z",', {"prompt": "A b", "target_new": 'x, "y" = z'}),
        ("", {}),
    ],
)
def test_columns_as_text(text, found):
    assert load_config(None, {"facts.columns": text}).facts.columns == found
    assert load_config(None, {"facts.columns": found}).facts.columns == found


@pytest.mark.parametrize("text", ["prompt", "=A", "prompt=A,prompt=B", 'prompt="A', "prompt=A=B,x", ",,"])
def test_bad_columns_are_a_setting_that_is_named(text):
    with pytest.raises(ConfigError, match=r"facts\.columns"):
        load_config(None, {"facts.columns": text})


@pytest.mark.parametrize("command", ["facts", "lab", "update", "plan", "compare", "evaluate"])
def test_case_18_every_command_that_reads_facts_has_the_flags(command):
    flags = {flag for option in typer.main.get_command(app).commands[command].params for flag in option.opts}
    assert {"--columns", "--aliases", "--limit"} <= flags


def test_columns_reach_an_update_and_contradict_facts_that_are_read_already(tmp_path):
    path = save(tmp_path, "f.csv", "Frage;Neu\nWho?;Ada|A\n")
    config = load_config(
        None, {"facts.source": str(path), "facts.columns": "prompt=Frage,target_new=Neu", "facts.aliases": "|"}
    )
    facts = read_config_facts(config)
    assert list(facts) == [make_fact("Who?", "Ada", target_new_aliases=["A"])]
    with pytest.raises(ConfigError, match=r"facts\.aliases = '\|'"):
        resolve(config, "model", facts)


# The real files


@pytest.mark.parametrize(
    ("name", "reader", "records", "there", "left_out", "noted"),
    [
        ("halluedit-llama3.jsonl", "halluedit", 2230, 2230, {"repeated_fact": 8}, {"placeholder": 22, "bar": 1}),
        (
            "mquake-hard.json",
            "mquake",
            429,
            1716,
            {"repeated_fact": 947, "repeated_prompt": 2},
            {"shared_alias": 2, "baseless_probe": 6},
        ),
        ("tofu/forget10.jsonl", "question-answer", 400, 400, {}, {}),
        ("tofu/retain90.jsonl", "question-answer", 3600, 3600, {"repeated_prompt": 1}, {}),
    ],
)
def test_case_17_real_files(shared_data, name, reader, records, there, left_out, noted):
    facts = read_facts(shared_data(name))
    assert (facts.reader, facts.records, facts.in_source, facts.read) == (reader, records, there, there)
    assert (facts.used, facts.left_out, facts.noted) == (there - sum(left_out.values()), left_out, noted)
    assert_adds_up(facts)


def test_case_17_the_questions_of_mquake_over_several_facts_are_probes(shared_data):
    facts = read_facts(shared_data("mquake-hard.json"))
    assert facts.ignored_fields == {"orig": 429}
    assert facts.with_aliases == 717
    probes = [probe for fact in facts for probe in fact.probes]
    assert {probe.kind for probe in probes} == {"4-hop"}
    assert len(probes) + facts.noted["baseless_probe"] == 3 * 429


def test_probes_that_follow_from_a_fact_that_is_not_used_are_not_asked():
    other = {**MQUAKE_RECORD["requested_rewrite"][0], "target_new": {"str": "Bo Li"}}
    first = {"requested_rewrite": [other], "questions": []}
    facts = from_records([first, MQUAKE_RECORD])
    assert facts.left_out == {"repeated_prompt": 1}
    assert facts.noted["baseless_probe"] == 2
    assert not any(fact.probes for fact in facts)


def test_probes_of_the_own_form(tmp_path):
    needs = [{"prompt": "Where does Bo Li live?", "answer": "Oslo"}]
    given = {
        "kind": "2-hop",
        "prompt": " Where does its head live? ",
        "answer": ["Oslo ", "Christiania"],
        "needs": needs,
    }
    choice = {"kind": "mine", "prompt": "Who?", "answer": "n", "old_answer": "o", "options": ["n", "o", "x"]}
    facts = from_records([own(1, probes=[given, choice, {"kind": "reversed", "prompt": "Whose?", "answer": ""}])])
    assert facts.noted == {"empty_probe": 1}
    hop, mine = facts[0].probes
    assert hop == Probe(
        "2-hop",
        "Where does its head live?",
        ("Oslo", "Christiania"),
        needs=(LocalityProbe("Where does Bo Li live?", "Oslo"),),
    )
    assert (mine.old_answers, mine.options) == (("o",), ("n", "o", "x"))
    write_facts(facts, tmp_path / "facts.jsonl")
    assert read_facts(tmp_path / "facts.jsonl").facts == facts.facts
    assert facts.sha256() != from_records([own(1)]).sha256()


@pytest.mark.parametrize(
    ("probe", "named"),
    [
        ({"prompt": "p", "answer": "a"}, "probes[1].kind"),
        ({"kind": "x" * 41, "prompt": "p", "answer": "a"}, "probes[1].kind"),
        ({"kind": "2-hop", "prompt": "p", "answers": "a"}, "probes[1].answers"),
        ("text", "probes[1]"),
    ],
)
def test_a_malformed_probe_is_an_error_that_names_it(probe, named):
    with pytest.raises(FactError, match=re.escape(f"record 1: '{named}'")):
        from_records([own(1, probes=[probe])])


def test_a_table_holds_probes_as_json(tmp_path):
    file = tmp_path / "facts.csv"
    probes = json.dumps([{"kind": "reversed", "prompt": "Whose?", "answer": "Acme"}]).replace('"', '""')
    file.write_text(f'prompt,target_new,probes\nWho?,Ada,"{probes}"\n', encoding="utf-8")
    assert read_facts(file)[0].probes == (Probe("reversed", "Whose?", ("Acme",)),)
