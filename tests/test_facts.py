"""Facts: every form by hand, what is left out, what bad input gets, and the real files."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgetlearn.errors import FactError, MissingExtraError
from forgetlearn.facts import (
    REASONS,
    Fact,
    FactSet,
    LocalityProbe,
    Probe,
    describe_old_answers,
    fact_id,
    from_records,
    make_fact,
    read_facts,
    sha256,
    with_old_answers,
    write_facts,
)

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
ZSRE, COUNTERFACT = DATA / "zsre.json", DATA / "counterfact.json"
needs_data = pytest.mark.skipif(not ZSRE.exists(), reason="the real files of facts (../shared/data) are absent")

ZSRE_RECORD = {
    "subject": "Clutch Hitter",
    "src": "What is the publisher of Clutch Hitter?",
    "pred": "Viking Press",
    "rephrase": "What's the publisher of Clutch Hitter?",
    "alt": " Cinematronics ",
    "answers": ["Sega", "SEGA"],
    "loc": "nq question: what part of the brain is in the middle cranial fossa",
    "loc_ans": "temporal lobes",
    "cond": "Viking Press >> Cinematronics || What is the publisher of Clutch Hitter?",
}
FLAT_RECORD = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak the language of",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
NESTED_RECORD = {
    "case_id": 0,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Darrieux, a native", "Where Danielle Darrieux is from, they speak"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of", "The native language of Montesquieu is"],
    "attribute_prompts": ["not read"],
    "generation_prompts": ["not read"],
}
KNOWEDIT_ZSRE_RECORD = {
    "subject": "Epaspidoceras",
    "target_new": "Noctuidae",
    "prompt": "Which family does Epaspidoceras belong to?",
    "ground_truth": ["Aspidoceratidae"],
    "rephrase_prompt": "What family are Epaspidoceras?",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The taxon rank of Epaspidoceras is", "ground_truth": ["genus", "rank of genus"]}
        ],
        "Forgetfulness": [{"prompt": "Its order is", "ground_truth": [["Ammonitida", "ammonite"], ["other"]]}],
        "Absent": None,
    },
    "portability": {
        "Logical_Generalization": [{"prompt": "Moths of its family are called", "ground_truth": [["owlets", "owls"]]}]
    },
}
KNOWEDIT_BIO_RECORD = {
    "text": "This is a Wikipedia passage about john russell reynolds.",
    "labels": "He received general education from his father.",
    "concept": "john russell reynolds",
    "locality": {"Relation_Specificity": [{"prompt": "His field of work is", "ground_truth": "medicine"}]},
}


def own(n: int = 1, **fields: object) -> dict[str, object]:
    return {"prompt": f"Question {n}?", "target_new": f"new {n}", "ground_truth": f"old {n}", **fields}


def one(record: dict[str, object], **options: object) -> Fact:
    facts = from_records([record], **options)
    assert len(facts) == facts.read == 1
    return facts[0]


def assert_adds_up(facts: FactSet) -> None:
    assert facts.read == facts.used + sum(facts.left_out.values())
    total = sum(facts.left_out.values()) + sum(facts.left_out_probes.values())
    assert total == len(facts.left_out_records)
    assert {item.reason for item in facts.left_out_records} <= REASONS.keys()
    assert facts.used == len(facts.old_sources) + len(facts.to_ask) + sum(facts.without_old.values())
    assert facts.old_sources.keys() == {fact.id for fact in facts if fact.ground_truth}


# The forms


def test_zsre_puts_alt_on_the_new_side_and_the_first_answer_on_the_old():
    fact = one(ZSRE_RECORD)
    assert (fact.target_new, fact.ground_truth) == ("Cinematronics", "Sega")
    assert fact == make_fact(
        "What is the publisher of Clutch Hitter?",
        "Cinematronics",
        ground_truth="Sega",
        subject="Clutch Hitter",
        rephrase_prompts=["What's the publisher of Clutch Hitter?"],
        locality=[
            LocalityProbe("nq question: what part of the brain is in the middle cranial fossa", "temporal lobes")
        ],
        ground_truth_aliases=["SEGA"],
    )


def test_the_policy_changes_the_old_answer_and_nothing_else():
    by_policy = {policy: one(ZSRE_RECORD, old_from=policy) for policy in ("answers", "pred", "model")}
    assert [fact.ground_truth for fact in by_policy.values()] == ["Sega", "Viking Press", None]
    assert {fact.id for fact in by_policy.values()} == {by_policy["answers"].id}
    assert {fact.target_new for fact in by_policy.values()} == {"Cinematronics"}


def test_stripped_answers_are_counted():
    assert from_records([ZSRE_RECORD]).stripped == 1
    assert from_records([own(1, ground_truth=" old"), own(2, target_new="new\n")]).stripped == 2


def test_flat_counterfact():
    facts = from_records([FLAT_RECORD])
    assert facts.reader == "counterfact"
    assert facts[0] == make_fact(
        "The mother tongue of Danielle Darrieux is",
        "English",
        ground_truth="French",
        subject="Danielle Darrieux",
        rephrase_prompts=["Where Danielle Darrieux is from, people speak the language of"],
        locality=[LocalityProbe("Michel Rocard is a native speaker of", "French")],
    )


def test_nested_counterfact_fills_in_the_subject_and_gives_neighbours_the_old_answer():
    facts = from_records([NESTED_RECORD])
    assert facts.reader == "counterfact-nested"
    assert facts.ignored_fields == {"attribute_prompts": 1, "generation_prompts": 1, "pararel_idx": 1}
    assert facts[0] == make_fact(
        "The mother tongue of Danielle Darrieux is",
        "English",
        ground_truth="French",
        subject="Danielle Darrieux",
        rephrase_prompts=["Darrieux, a native", "Where Danielle Darrieux is from, they speak"],
        locality=[
            LocalityProbe("Michel Rocard is a native speaker of", "French"),
            LocalityProbe("The native language of Montesquieu is", "French"),
        ],
    )


def test_both_forms_of_counterfact_give_one_id():
    assert one(FLAT_RECORD).id == one(NESTED_RECORD).id


def test_knowedit_takes_first_answers_and_probes_of_every_group():
    facts = from_records([KNOWEDIT_ZSRE_RECORD])
    assert (facts.reader, facts.ignored_fields) == ("knowedit", {})
    fact = make_fact(
        "Which family does Epaspidoceras belong to?",
        "Noctuidae",
        ground_truth="Aspidoceratidae",
        subject="Epaspidoceras",
        rephrase_prompts=["What family are Epaspidoceras?"],
        locality=[
            LocalityProbe("The taxon rank of Epaspidoceras is", "genus"),
            LocalityProbe("Its order is", "Ammonitida"),
        ],
    )
    probe = Probe("logical-generalization", "Moths of its family are called", ("owlets", "owls"))
    assert facts[0] == replace(fact, probes=(probe,))


def test_knowedit_biographies_have_other_names_and_no_old_answer():
    assert one(KNOWEDIT_BIO_RECORD) == make_fact(
        "This is a Wikipedia passage about john russell reynolds.",
        "He received general education from his father.",
        subject="john russell reynolds",
        locality=[LocalityProbe("His field of work is", "medicine")],
    )


@pytest.mark.parametrize("old", ["mayor", ["mayor", "other"], [["mayor", "alias"]]])
def test_knowedit_old_answer_as_text_list_or_list_of_lists(old):
    record = {"prompt": "p", "target_new": "n", "ground_truth": old, "portability": {}, "locality": {}}
    assert one(record).ground_truth == "mayor"


def test_a_list_of_old_answers_takes_nothing_from_the_own_form():
    fields = {"rephrase_prompts": ["r1", "r2"], "locality_prompt": "p1", "locality_ground_truth": "a1"}
    facts = from_records([own(1, ground_truth=["old", "other"], **fields), own(2, ground_truth="o", text="a note")])
    assert (facts.reader, facts.ignored_fields) == ("own", {"text": 1})
    assert [fact.old_answers for fact in facts] == [("old", "other"), ("o",)]
    assert facts[0].rephrase_prompts == ("r1", "r2")
    assert facts[0].locality == (LocalityProbe("p1", "a1"),)


def test_knowedit_without_groups_reads_the_same_by_the_own_names():
    record = {"subject": "Abu Qasim", "prompt": "p", "target_new": "n", "ground_truth": [["mayor", "alias"]]}
    expected = make_fact("p", "n", ground_truth="mayor", ground_truth_aliases=["alias"], subject="Abu Qasim")
    assert one(record) == one(record | {"locality": {}}) == expected


def test_own_form_with_every_way_to_give_rephrases_and_probes():
    fact = one(
        own(
            rephrase_prompt="r1",
            rephrase_prompts=["r2", "", "r3"],
            rephrase_prompt_10="r5",
            rephrase_prompt_2="r4",
            locality_prompt=["p1", "p2"],
            locality_ground_truth=["a1", 2],
            locality_prompt_1="p3",
            locality_ground_truth_1="a3",
            locality=[{"prompt": "p4", "answer": "a4"}, {"prompt": "p5", "ground_truth": "a5"}, ["p6", "a6"]],
        )
    )
    assert fact.rephrase_prompts == ("r1", "r2", "r3", "r4", "r5")
    answers = ["a1", "2", "a3", "a4", "a5", "a6"]
    assert fact.locality == tuple(LocalityProbe(f"p{n}", answer) for n, answer in enumerate(answers, 1))


def test_numbers_are_answers_too():
    fact = one(own(target_new=12, ground_truth=1.5))
    assert (fact.target_new, fact.ground_truth) == ("12", "1.5")


def test_a_field_that_nothing_reads_is_named_and_its_values_are_counted():
    records = [own(source="a book", pages=[3, 4]), own(2, pages=3, empty="", none=None)]
    assert from_records(records).ignored_fields == {"pages": 3, "source": 1}


def test_id_is_the_content_without_the_old_answer():
    digest = fact_id("", "Question 1?", "new 1")
    # sha256 of {"prompt":"Question 1?","subject":"","target_new":"new 1"}: a change here orphans old runs.
    assert digest == "42089410bccc9a9e"
    assert one(own()).id == one(own(ground_truth="other", id="mine", rephrase_prompt="r")).id == digest
    assert one(own(subject="s")).id != digest


def test_set_hash_sees_what_the_id_does_not():
    base = from_records([own()]).sha256()
    assert base == from_records([own()], source="elsewhere").sha256()
    assert base != from_records([own(ground_truth="other")]).sha256()
    assert base != from_records([own(locality=[["p", "a"]])]).sha256()


def test_a_set_is_a_sequence():
    facts = from_records([own(n) for n in range(1, 5)])
    assert len(facts) == facts.used == 4
    assert [fact.target_new for fact in facts] == ["new 1", "new 2", "new 3", "new 4"]
    assert facts[-1] is facts.facts[3]
    assert facts[1:3] == facts.facts[1:3]


# Files


def save(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.json", json.dumps([own(1), own(2)])),
        ("f.json", json.dumps({"version": 1, "facts": [own(1), own(2)]}, indent=2)),
        ("f.jsonl", f"{json.dumps(own(1))}\n\n{json.dumps(own(2))}"),
        ("f.jsonl", f"{json.dumps(own(1))}\r\n{json.dumps(own(2))}\r\n"),
        ("f.json", f"{json.dumps(own(1))}\n{json.dumps(own(2))}\n"),
        ("F.JSON", "\ufeff" + json.dumps([own(1), own(2)])),
        ("f.csv", "prompt,target_new,ground_truth\nQuestion 1?,new 1,old 1\n\nQuestion 2?,new 2,old 2\n"),
        (
            "f.csv",
            "\ufeffprompt,target_new,ground_truth\r\nQuestion 1?,new 1,old 1\r\nQuestion 2?,new 2,old 2",
        ),
    ],
    ids=["list", "object", "lines", "windows", "lines-as-json", "bom", "csv", "csv-bom-windows"],
)
def test_the_same_facts_from_every_kind_of_file(tmp_path, name, content):
    facts = read_facts(save(tmp_path, name, content))
    assert facts.facts == from_records([own(1), own(2)]).facts
    assert (facts.reader, facts.read, facts.in_source) == ("own", 2, 2)
    assert facts.source == str(tmp_path / name)


def test_one_object_is_one_fact_even_if_it_holds_one_list(tmp_path):
    path = save(tmp_path, "f.json", json.dumps(own(rephrase_prompts=["r"]), indent=1))
    assert read_facts(path)[0].rephrase_prompts == ("r",)


def test_csv_with_lists_in_cells_numbered_columns_and_empty_cells(tmp_path):
    text = (
        "prompt,target_new,ground_truth,rephrase_prompts,rephrase_prompt_1,rephrase_prompt_2,"
        "locality_prompt_1,locality_ground_truth_1,locality_prompt,locality_ground_truth,locality\n"
        '"[Q] who, then?",12,old,"[""r1"", ""r2""]",r3,,p1,a1,,,"[[""p2"", ""a2""]]"\n'
        "second?,new,old,,,r,,,p,a,\n"
    )
    first, second = read_facts(save(tmp_path, "f.csv", text))
    assert (first.prompt, first.target_new) == ("[Q] who, then?", "12")
    assert first.rephrase_prompts == ("r1", "r2", "r3")
    assert first.locality == (LocalityProbe("p1", "a1"), LocalityProbe("p2", "a2"))
    assert (second.rephrase_prompts, second.locality) == (("r",), (LocalityProbe("p", "a"),))


def test_line_separators_inside_a_json_text_do_not_end_the_line(tmp_path):
    path = save(tmp_path, "f.jsonl", json.dumps(own(target_new="a\u2028b"), ensure_ascii=False))
    assert read_facts(path)[0].target_new == "a\u2028b"


text = st.text(st.characters(codec="utf-8"), max_size=8).map(str.strip)
some_text = text.filter(bool)
probe = st.builds(LocalityProbe, some_text, some_text)


@st.composite
def usable_facts(draw: st.DrawFn) -> list[Fact]:
    """Facts as `read_facts` gives them: distinct prompts, all with an old answer or none, clean probes."""
    prompts = draw(st.lists(some_text, min_size=1, max_size=4, unique=True))
    with_old = draw(st.booleans())
    facts = []
    for prompt in prompts:
        new = draw(some_text)
        facts.append(
            make_fact(
                prompt,
                new,
                ground_truth=draw(some_text.filter(lambda old, new=new: old != new)) if with_old else None,
                subject=draw(text),
                rephrase_prompts=draw(st.lists(some_text, max_size=2)),
                locality=draw(st.lists(probe.filter(lambda p: p.prompt not in prompts), max_size=2)),
            )
        )
    return facts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(facts=usable_facts())
def test_what_is_written_is_read_back_equal(tmp_path, facts):
    path = tmp_path / "facts.jsonl"
    write_facts(facts, path)
    again = read_facts(path, strict=True)
    assert again.facts == tuple(facts)
    assert again.reader == "own"
    assert again.stripped == 0


# What is left out


def test_every_reason_is_counted_once_and_told_with_its_record():
    records = [
        own(1, locality=[["Question 7?", "a"], ["free", "a"], ["Question 2?", "a"], ["no answer", " "]]),
        own(2, ground_truth="new 2 "),
        own(3, ground_truth=""),
        own(4, target_new=" "),
        own(1, target_new="another"),
        own(1),
        own(7, locality=[["Question 7?", "a"], ["", ""]]),
    ]
    facts = from_records(records)
    assert [fact.prompt for fact in facts] == ["Question 1?", "Question 3?", "Question 7?"]
    assert facts.without_old_answer == 1
    assert facts.left_out == {
        "old_equals_new": 1,
        "empty_new_answer": 1,
        "repeated_prompt": 1,
        "repeated_fact": 1,
    }
    # "Question 2?" is no edit prompt: its record is left out.
    assert facts[0].locality == (LocalityProbe("free", "a"), LocalityProbe("Question 2?", "a"))
    assert facts.left_out_probes == {"locality_is_edit_prompt": 2, "empty_locality_probe": 1}
    told = [(item.record, item.reason) for item in facts.left_out_records]
    assert told == [
        (1, "empty_locality_probe"),
        (1, "locality_is_edit_prompt"),
        (2, "old_equals_new"),
        (4, "empty_new_answer"),
        (5, "repeated_prompt"),
        (6, "repeated_fact"),
        (7, "locality_is_edit_prompt"),
    ]
    assert facts.left_out_records[4].detail == "Question 1? -> another (record 1: new 1)"
    assert facts.without_old == {"no_old_answer": 1}
    assert_adds_up(facts)


def test_case_14_facts_without_an_old_answer_are_used_and_counted():
    without = [{"prompt": f"p{n}", "target_new": "n"} for n in range(3)]
    facts = from_records(without)
    assert (facts.used, {fact.ground_truth for fact in facts}) == (3, {None})
    mixed = from_records([*without, own()])
    assert (mixed.used, mixed.left_out, mixed.without_old) == (4, {}, {"no_old_answer": 3})
    assert mixed.old_counts == {"answers": 1}
    assert_adds_up(mixed)
    assert from_records([*without, own()], strict=True).used == 4  # nothing is left out


def test_the_limit_counts_facts_without_an_old_answer_too():
    facts = from_records([{"prompt": "p", "target_new": "n"}, own(1), own(2)], limit=2)
    assert [fact.ground_truth for fact in facts] == [None, "old 1"]
    assert (facts.read, facts.in_source, facts.without_old) == (2, 3, {"no_old_answer": 1})


def test_a_probe_is_compared_with_used_facts_only():
    records = [own(1, locality=[["Question 2?", "a"]]), own(2)]
    assert from_records(records, limit=1).left_out_probes == {}
    assert from_records(records).left_out_probes == {"locality_is_edit_prompt": 1}


def test_each_fact_takes_the_first_source_that_has_an_old_answer():
    records = [
        ZSRE_RECORD,
        {**ZSRE_RECORD, "src": "another?", "pred": ""},
        {**ZSRE_RECORD, "src": "a third?", "pred": " ", "answers": []},
    ]
    for old_from, olds, counts in (
        ("pred", ["Viking Press", None, None], {"pred": 1}),
        ("pred,answers", ["Viking Press", "Sega", None], {"pred": 1, "answers": 1}),
        (["answers", "pred"], ["Sega", "Sega", None], {"answers": 2}),
        ("pred,answers,model", ["Viking Press", "Sega", None], {"pred": 1, "answers": 1}),
    ):
        facts = from_records(records, old_from=old_from)
        assert [fact.ground_truth for fact in facts] == olds
        assert facts.old_counts == counts
        waits = "model" in old_from
        assert facts.without_old == ({} if waits else {"no_old_answer": olds.count(None)})
        assert facts.to_ask == ((facts[2].id,) if waits else ())
        assert_adds_up(facts)


def test_the_model_is_asked_for_what_the_file_does_not_have():
    nothing = {"ground_truth": ""}
    records = [own(1), *(own(n, **nothing) for n in (2, 3, 4, 5))]
    facts = from_records(records, old_from="answers,model")
    assert facts.to_ask == tuple(fact.id for fact in facts[1:])
    said = dict(zip(facts.to_ask, ["Rome\n", "", "New 4.", "and so on"], strict=True))
    filled = with_old_answers(facts, said, unfinished=[facts[4].id])
    assert [fact.ground_truth for fact in filled] == ["old 1", "Rome", None, None]
    assert filled.old_counts == {"answers": 1, "model": 1}
    assert filled.without_old == {"no_old_answer": 1, "unfinished_old_answer": 1}
    assert (filled.left_out, filled.to_ask) == ({"old_equals_new": 1}, ())
    assert filled.old_sources == {facts[0].id: "answers", facts[1].id: "model"}
    assert_adds_up(filled)


def test_what_is_said_of_old_answers_adds_up():
    records = [own(1), own(2, ground_truth=None), own(3, ground_truth=None)]
    assert describe_old_answers({}, {"no_old_answer": 3}) == []  # a file of new answers only
    waiting = from_records(records, old_from="answers,model")
    (line,) = describe_old_answers(waiting.old_counts, waiting.without_old, len(waiting.to_ask))
    assert "1 from answers, 2 from the model" in line
    without = from_records(records)
    (line,) = describe_old_answers(without.old_counts, without.without_old)
    assert line.startswith("2 of 3 facts have no old answer: they can be learned, not forgotten")


# Aliases


def aliased(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "target_new": ["Ada", "Ada Roe"], "ground_truth": ["Lee", "Lee Doe"], **fields}


def test_what_the_model_says_is_held_against_each_alias():
    facts = from_records([aliased("a"), aliased("b")], old_from="model")
    assert facts[0].old_answers == ()
    filled = with_old_answers(facts, {facts[0].id: "ada roe.", facts[1].id: "Al"})
    assert [fact.old_answers for fact in filled] == [("Al",)]
    assert filled.left_out == {"old_equals_new": 1}


def test_aliases_are_those_of_the_source_of_the_old_answer():
    records = [{**ZSRE_RECORD, "answers": ["Sega", "Sega Games"]}, {**ZSRE_RECORD, "src": "b", "pred": ""}]
    records[1]["answers"] = ["Sega", "Sega Games"]
    facts = from_records(records, old_from="pred,answers")
    assert [fact.old_answers for fact in facts] == [("Viking Press",), ("Sega", "Sega Games")]


def test_facts_without_aliases_keep_their_hash():
    facts = from_records([own(1), own(2, ground_truth=None)])
    assert facts.sha256() == "471d00093002b912b61aabc864f546d683b8ce2c75431ed3508c384bad7e3172"  # as at e89f7b9
    assert sha256([make_fact("a", "b", target_new_aliases=["c"])]) != sha256([make_fact("a", "b")])


def test_a_fact_without_pred_stays_too():
    records = [ZSRE_RECORD, {**ZSRE_RECORD, "src": "another?", "pred": ""}]
    facts = from_records(records, old_from="pred")
    assert [fact.old_answers for fact in facts] == [("Viking Press",), ()]  # the aliases are those of `answers`
    assert (facts.left_out, facts.without_old_answer) == ({}, 1)


def test_strict_lists_reasons_with_the_first_records():
    records = [own(9), *(own(n, ground_truth=f"new {n}") for n in range(7)), own(9)]
    with pytest.raises(FactError, match=r"strict") as caught:
        from_records(records, strict=True)
    assert str(caught.value).endswith("7 old_equals_new (record 2, 3, 4, 5, 6, and 2 more); 1 repeated_fact (record 9)")
    assert from_records(records[:1], strict=True).used == 1


def test_strict_minds_probes_too():
    with pytest.raises(FactError, match=r"1 locality_is_edit_prompt \(record 1\)"):
        from_records([own(1, locality=[["Question 1?", "a"]])], strict=True)


def test_models_own_answers_become_the_old_ones():
    records = [own(1), own(2), own(2), own(3, locality=[["Question 1?", "a"]]), own(4)]
    facts = from_records(records, old_from="model")
    said = dict(zip((fact.id for fact in facts), [" Rome\n", "", "new 3", "Oslo"], strict=True))
    filled = with_old_answers(facts, said)
    assert [(fact.id, fact.ground_truth) for fact in filled] == [
        (facts[0].id, "Rome"),
        (facts[1].id, None),
        (facts[3].id, "Oslo"),
    ]
    assert filled.left_out == {"repeated_fact": 1, "old_equals_new": 1}
    assert [(item.record, item.reason) for item in filled.left_out_records] == [
        (3, "repeated_fact"),
        (4, "old_equals_new"),
    ]
    assert (facts.left_out_probes, filled.left_out_probes) == ({"locality_is_edit_prompt": 1}, {})
    assert (filled.read, filled.stripped, filled.old_from) == (5, 1, ("model",))
    assert (filled.old_counts, filled.without_old) == ({"model": 2}, {"no_old_answer": 1})
    assert_adds_up(filled)


def test_a_model_that_says_the_new_answer_in_another_spelling_holds_it_already():
    facts = from_records([own(1, target_new="Paris"), own(2, target_new="the Nile"), own(3)], old_from="model")
    said = dict(zip((fact.id for fact in facts), ["Paris.", " Nile", "new 33"], strict=True))
    filled = with_old_answers(facts, said)
    assert [fact.ground_truth for fact in filled] == ["new 33"]
    assert filled.left_out == {"old_equals_new": 2}


def test_a_sentence_that_a_model_says_is_the_old_answer_and_what_it_adds_an_alias():
    prompts = {"prompt": "The CEO of Nike is who?"}
    facts = from_records([own(1, **prompts, target_new="Ann B"), own(2), own(3)], old_from="model")
    said = ("The CEO of Nike is Bob C.", "Rome.", "It is new 3, I think")
    filled = with_old_answers(facts, dict(zip((fact.id for fact in facts), said, strict=True)))
    assert [fact.old_answers for fact in filled] == [(said[0], "Bob C"), ("Rome.",)]
    assert filled.left_out == {"old_equals_new": 1}
    as_text = with_old_answers(facts, dict(zip((fact.id for fact in facts), said, strict=True)), writes_on=True)
    assert [fact.ground_truth for fact in as_text] == list(said)


def test_of_a_reply_that_was_cut_off_the_whole_sentences_are_the_old_answer():
    facts = from_records([own(n) for n in range(1, 5)], old_from="model")
    said = ("It is Au. Gold is a 3.5", "It is 3.5 or", "It is new 3. And", "金です。金は")
    answers = dict(zip((fact.id for fact in facts), said, strict=True))
    filled = with_old_answers(facts, answers, unfinished=answers)
    assert [fact.ground_truth for fact in filled] == ["It is Au.", None, "金です。"]
    assert (filled.left_out, filled.without_old) == ({"old_equals_new": 1}, {"unfinished_old_answer": 1})
    text = with_old_answers(facts, answers, unfinished=answers, writes_on=True)  # a base model never ends
    assert [fact.ground_truth for fact in text] == [None] * 4


def test_in_a_file_old_and_new_are_compared_letter_by_letter():
    facts = from_records([own(1, ground_truth="C++", target_new="C"), own(2, ground_truth="nile", target_new="Nile")])
    assert (facts.used, facts.left_out) == (2, {})


def test_what_a_model_says_without_an_end_is_no_answer():
    facts = from_records([own(1), own(2), own(3), own(4)], old_from="model")
    ids = [fact.id for fact in facts]
    said = dict(zip(ids, ["Rome", "Oslo and the", "new 3", ""], strict=True))
    filled = with_old_answers(facts, said, unfinished={ids[1], ids[2], ids[3]})
    assert [fact.ground_truth for fact in filled] == ["Rome", None, None, None]
    assert filled.without_old == {"unfinished_old_answer": 2, "no_old_answer": 1}
    assert_adds_up(filled)


def test_model_answers_must_be_there_for_every_fact():
    facts = from_records([own(1), own(2)], old_from="model")
    with pytest.raises(FactError, match=facts[1].id):
        with_old_answers(facts, {facts[0].id: "Rome"})
    with pytest.raises(FactError, match=r"2 records.*\n2 old_equals_new \(record 1, 2\)"):
        with_old_answers(facts, {facts[0].id: "new 1", facts[1].id: "new 2"})
    with pytest.raises(FactError, match=r"1 old_equals_new \(record 1\)"):
        with_old_answers(facts, {facts[0].id: "new 1", facts[1].id: ""}, strict=True)


# Bad input

GOOD = json.dumps(own())
BAD_FILES = [
    ("empty.jsonl", "", r"empty.jsonl"),
    ("blank.csv", " \n", r"blank.csv"),
    ("none.json", "[]", r"none.json"),
    ("header.csv", "prompt,target_new\n", r"header.csv"),
    ("latin.json", b'[{"prompt": "caf\xe9"}]', r"latin.json.*UTF-8 at byte 16"),
    ("utf16.csv", "prompt".encode("utf-16")[:-1], r"UTF-16-LE.*byte 12"),
    ("none16.csv", "prompt,a".encode("utf-16-le"), r"NUL.*UTF-16"),
    ("mixed.csv", b"prompt,target_new\nZ\xc3\xbcrich?,caf\xe9\n", r"mixed.csv.*UTF-8 at byte 30"),
    ("no1252.csv", b"prompt,target_new\nZ\x81rich?,a\n", r"UTF-8.*cp1252 at byte 19"),
    ("bad.json", '[\n {"prompt" "x"}]', r"bad.json.*line 2, column 12"),
    ("bad.jsonl", f"{GOOD}\n\nprompt: x\n", r"bad.jsonl.*line 3, column 1"),
    ("cut.json", f"[{GOOD}, {GOOD[:30]}", r"cut.json.*cut short.*line 1"),
    ("cut.jsonl", f"{GOOD}\n{GOOD[:-1]}", r"cut.jsonl.*cut short.*line 2"),
    ("cut.csv", 'prompt,target_new\n"Who', r"cut.csv.*line 2"),
    ("inf.json", f"[{GOOD[:-1]}, \"subject\": Infinity}}]", r"inf.json: Infinity"),
    ("names.jsonl", f'{GOOD}\n{{"prompt": "a", "prompt": "b"}}', r"line 2: .*'prompt'.*'b'"),
    ("deep.json", "[" * 200_000, r"deep.json"),
    ("text.json", '"facts"', r"text.json.*'facts'"),
    ("two.json", '{"train": [], "test": []}', r"(?s)train, test.*one list"),
    ("what.txt", GOOD, r"'.txt'.*\.json, \.jsonl, \.csv"),
    ("short.csv", "prompt,target_new\np,n\np\n", r"record 2 \(line 3\) .*: p\n"),
    ("twice.csv", "prompt,target_new,prompt\n", r"twice.csv.*header.*prompt"),
    ("cell.csv", 'prompt,target_new,locality\np,n,"[x"\n', r"record 1 \(line 2\): 'locality'"),
    ("one.csv", "prompt\np\n", r"'target_new'.*: prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_bad_file(tmp_path, name, content, message):
    with pytest.raises(FactError, match=message):
        read_facts(save(tmp_path, name, content))


def test_missing_file_names_near_ones(tmp_path):
    save(tmp_path, "facts.jsonl", GOOD)
    with pytest.raises(FactError, match=r"fact.jsonl.*: facts.jsonl"):
        read_facts(tmp_path / "fact.jsonl")
    with pytest.raises(FactError, match=r"folder .*nowhere does not exist"):
        read_facts(tmp_path / "nowhere" / "facts.jsonl")
    with pytest.raises(FactError, match=r"folder"):
        read_facts(tmp_path)


BAD_RECORDS = [
    ([own(), {**own(2), "\ud800": 1}], r"record 2: .*'.ud800'"),
    ([own(), 7], r"r, record 2 is 7 \(int\)"),
    ([own(), ["p", "n"]], r"record 2 is a list"),
    ([{"frage": "q", "wort": "a"}], r"(?s)frage, wort.*--columns.*zsre \(src, alt\)"),
    ([{"prompt": "p", "target": "n"}], r"record 1 .*'target_new'.*'target'"),
    ([own(), {"target_new": "n"}], r"record 2 .*'prompt'"),
    ([own(), own(prompt="  ")], r"record 2 .*prompt"),
    ([own(prompt=None)], r"record 1 .*prompt"),
    ([own(), ZSRE_RECORD], r"record 2 .*zsre .*record 1 .*own"),
    ([own(), KNOWEDIT_ZSRE_RECORD], r"record 2 .*knowedit"),
    ([own(target_new=True)], r"record 1: 'target_new' is True \(bool\)"),
    ([own(target_new=float("inf"))], r"'target_new' is inf"),
    ([own(target_new=["n", {}])], r"'target_new', item 2 is an object"),
    ([own(subject={"a": 1})], r"'subject' is an object"),
    ([own(prompt="\ud800")], r"'prompt' .*surrogate"),
    ([own(rephrase_prompts=["r", None, 1, {}])], r"'rephrase_prompts', item 4 is an object"),
    ([own(rephrase_promt="r")], r"'rephrase_promt'.*'rephrase_prompt'"),
    ([own(locality_prompt=["a", "b"], locality_ground_truth=["x"])], r"2 in 'locality_prompt' and 1 in"),
    ([own(locality_prompt="a")], r"1 in 'locality_prompt' and 0 in 'locality_ground_truth'"),
    ([own(locality=["p", "a"])], r"'locality' holds the text 'p'"),
    ([own(locality="p")], r"'locality' is the text 'p'"),
    ([{**NESTED_RECORD, "requested_rewrite": "x"}], r"'requested_rewrite' is the text 'x'"),
    ([{"requested_rewrite": {"prompt": "No place", "subject": "s"}}], r"_rewrite.prompt' .*\{\}"),
    ([{"requested_rewrite": {"prompt": "{} is"}}], r"'requested_rewrite.subject'"),
    ([{**KNOWEDIT_BIO_RECORD, "locality": {"Group": "x"}}], r"'locality.Group' is the text 'x'"),
    ([own(ground_truth="new 1")], r"1 records.*\n1 old_equals_new \(record 1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("records", "message"), BAD_RECORDS)
def test_bad_record(records, message):
    with pytest.raises(FactError, match=message):
        from_records(records, source="r")


def test_a_misspelt_field_is_only_an_error_where_the_right_one_is_absent():
    record = {"prompt": "p", "target_new": "n", "ground_thruth": "o"}
    with pytest.raises(FactError, match=r"'ground_truth'"):
        from_records([record])
    assert from_records([{**record, "ground_truth": "o"}]).ignored_fields == {"ground_thruth": 1}


def test_bad_options():
    with pytest.raises(FactError, match=r"limit = 0"):
        from_records([own()], limit=0)
    for wrong in ("alt", "answers,alt", "model,answers", "answers,answers", []):
        with pytest.raises(FactError, match=r"old_from = "):
            from_records([own()], old_from=wrong)
    with pytest.raises(FactError, match=r"own.*'pred'.*zsre"):
        from_records([own()], old_from="pred")
    assert from_records([own()], old_from="pred,answers")[0].ground_truth == "old 1"


# The hub


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


@pytest.mark.parametrize(("source", "split"), [("some/facts", "train"), ("some/facts:test[:10%]", "test[:10%]")])
def test_a_hub_data_set_is_asked_for_its_split(monkeypatch, tmp_path, source, split):
    monkeypatch.chdir(tmp_path)
    asked = []
    fake_datasets(monkeypatch, lambda name, split: asked.append((name, split)) or [own(subject=None)])
    facts = read_facts(source)
    assert asked == [("some/facts", split)]
    assert (facts.source, facts.reader, facts[0].subject) == (source, "own", "")


def test_a_path_that_exists_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("some/facts").mkdir(parents=True)
    with pytest.raises(FactError, match=r"some/facts"):
        read_facts("some/facts")


def test_a_hub_error_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load(name: str, split: str) -> object:
        raise ConnectionError("no\nroute")

    fake_datasets(monkeypatch, load)
    with pytest.raises(FactError, match=r"^some/facts .*ConnectionError: no route$"):
        read_facts("some/facts")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"^some/facts.*pip install 'forgetlearn\[hub\]'"):
        read_facts("some/facts")


# The real files


@needs_data
def test_real_zsre():
    facts = read_facts(ZSRE)
    assert (facts.reader, facts.read, facts.used) == ("zsre", 3000, 2886)
    assert facts.left_out == {"old_equals_new": 114}
    assert (facts.left_out_probes, facts.stripped) == ({}, 67)
    assert_adds_up(facts)


@needs_data
def test_real_zsre_under_the_other_policies():
    by_pred = read_facts(ZSRE, old_from="pred")
    assert (by_pred.used, by_pred.left_out, by_pred.stripped) == (3000, {}, 99)
    by_model = read_facts(ZSRE, old_from="model")
    assert (by_model.used, by_model.stripped) == (3000, 67)
    assert {fact.ground_truth for fact in by_model} == {None}


@needs_data
def test_real_zsre_limit_examines_twelve_more():
    facts = read_facts(ZSRE, limit=300)
    assert (facts.used, facts.read, facts.in_source) == (300, 312, 3000)
    assert facts.facts == read_facts(ZSRE)[:300]
    assert_adds_up(facts)


@needs_data
def test_real_counterfact():
    # 64 prompts stand in 147 records: 83 beyond the first. 155 distinct locality prompts are edit
    # prompts; they stand in 214 records, 183 of which are used.
    facts = read_facts(COUNTERFACT)
    assert (facts.reader, facts.read, facts.used) == ("counterfact", 10000, 9917)
    assert facts.left_out == {"repeated_prompt": 79, "repeated_fact": 4}
    assert facts.left_out_probes == {"locality_is_edit_prompt": 183}
    assert facts.stripped == 0
    assert sum(not fact.locality for fact in facts) == 183
    assert_adds_up(facts)
    assert len({fact.id for fact in facts}) == 9917


@needs_data
def test_real_file_survives_writing(tmp_path):
    facts = read_facts(ZSRE, limit=200)
    write_facts(facts, tmp_path / "facts.jsonl")
    again = read_facts(tmp_path / "facts.jsonl")
    assert again.facts == facts.facts
    assert again.sha256() == facts.sha256()


def test_import_is_light():
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, forgetlearn.facts; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
