"""The made-up world keeps its promises: counted over whole worlds, small, large and largest."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import chain

import pytest

from forgetlearn.errors import ConfigError
from forgetlearn.lab import world
from forgetlearn.lab.world import MAX_FACTS, RELATIONS, Relation, made_up_world

PATTERNS = [
    (relation, re.compile(re.escape(phrasing).replace(r"\{\}", "(.+)")))
    for relation in RELATIONS
    for phrasing in relation.phrasings
]
KNOWN = {name: kind for kind in world._POOL_SIZE for name in world._names(kind)}


@pytest.fixture(scope="module", params=[(1, 0), (11, 5), (13, 1), (200, 0), (200, -3), (5000, 7)], ids=str)
def records(request):
    return made_up_world(*request.param)


def read(prompt: str) -> tuple[Relation, str]:
    """The relation and the subject that a prompt asks about: exactly one reading has a known subject."""
    found = [(relation, match[1]) for relation, pattern in PATTERNS if (match := pattern.fullmatch(prompt))]
    readings = [(relation, name) for relation, name in found if KNOWN.get(name) == relation.subject]
    assert len(readings) == 1, prompt
    return readings[0]


def pairs(records):
    """Every prompt of every probe, with its answer."""
    return [(probe["prompt"], probe["answer"]) for record in records for probe in record["locality"]]


def asked(record):
    return [record["prompt"], *record["rephrase_prompts"]]


def test_every_record_is_readable(records):
    for record in records:
        assert list(record) == [
            "subject", "prompt", "ground_truth", "target_new", "rephrase_prompts", "locality",
        ]  # fmt: skip
        assert 2 <= len(record["rephrase_prompts"]) <= 3
        assert 1 <= len(record["locality"]) <= 2
        assert all(list(probe) == ["prompt", "answer"] for probe in record["locality"])
        single = [record[key] for key in ("subject", "prompt", "ground_truth", "target_new")]
        for text in chain(single, record["rephrase_prompts"], *(p.values() for p in record["locality"])):
            assert isinstance(text, str)
            assert text
            assert text == " ".join(text.split())


def test_prompt_and_rephrasings_ask_one_thing_of_the_subject(records):
    for record in records:
        readings = {read(prompt) for prompt in asked(record)}
        assert len(readings) == 1
        assert readings.pop()[1] == record["subject"]


def test_answers_are_two_of_the_right_kind_in_at_most_three_words(records):
    for record in records:
        relation, _ = read(record["prompt"])
        answers = [record["ground_truth"], record["target_new"]]
        assert answers[0] != answers[1]
        assert all(KNOWN[answer] == relation.answer and len(answer.split()) <= 3 for answer in answers)


def test_a_prompt_belongs_to_one_fact(records):
    counts = Counter(prompt for record in records for prompt in asked(record))
    assert set(counts.values()) == {1}
    facts = Counter(read(record["prompt"]) for record in records)
    assert set(facts.values()) == {1}


def test_probes_share_the_relation_and_phrasing_but_never_a_subject_that_changes(records):
    changing = {record["subject"] for record in records}
    for record in records:
        relation, _ = read(record["prompt"])
        for probe in record["locality"]:
            probed, neighbour = read(probe["prompt"])
            assert probed == relation
            assert neighbour not in changing
            assert probe["prompt"].replace(neighbour, record["subject"]) == record["prompt"]
            assert KNOWN[probe["answer"]] == relation.answer


def test_probes_never_repeat_an_edit_and_agree_with_one_another(records):
    assert not {prompt for prompt, _ in pairs(records)} & set(chain.from_iterable(map(asked, records)))
    truth = {}
    for prompt, answer in pairs(records):
        assert truth.setdefault(read(prompt), answer) == answer


def test_no_fact_is_probed_twice_by_one_record(records):
    for record in records:
        assert len({probe["prompt"] for probe in record["locality"]}) == len(record["locality"])


@pytest.mark.parametrize("n_facts", [1, 11, 12, 200])
def test_relations_have_equal_shares(n_facts):
    shares = Counter(read(record["prompt"])[0].name for record in made_up_world(n_facts, seed=2))
    assert sum(shares.values()) == n_facts
    assert len(shares) == min(n_facts, len(RELATIONS))
    assert max(shares.values()) - min(shares.values()) <= 1


def test_every_phrasing_serves_as_prompt_and_answers_repeat():
    big = made_up_world(1000)
    used = {record["prompt"].replace(record["subject"], "{}") for record in big}
    assert used == {phrasing for relation in RELATIONS for phrasing in relation.phrasings}
    for kind, size in world._POOL_SIZE.items():
        both = {record[key] for record in big for key in ("ground_truth", "target_new")}
        assert len([answer for answer in both if KNOWN[answer] == kind]) == size


def test_the_table_has_no_duplicates_and_mixes_questions_with_sentences_to_end():
    phrasings = [phrasing for relation in RELATIONS for phrasing in relation.phrasings]
    assert (len(RELATIONS), len(phrasings), len(set(phrasings))) == (12, 55, 55)
    for relation in RELATIONS:
        questions = sum(phrasing.endswith("?") for phrasing in relation.phrasings)
        assert len(relation.phrasings) >= 4
        assert 2 <= questions <= len(relation.phrasings) - 2
        assert all(phrasing.count("{}") == 1 for phrasing in relation.phrasings)


def test_no_name_is_spelled_twice_within_or_across_kinds():
    assert len(KNOWN) == sum(len(world._names(kind)) for kind in world._POOL_SIZE)


def test_after_an_indefinite_article_comes_a_consonant():
    articles = {r.answer for r in RELATIONS for phrasing in r.phrasings if phrasing.endswith(" a")}
    assert articles == {"profession"}
    assert not [word for word in world._names("profession") if word[0] in "aeiou"]


def test_the_largest_world_is_whole():
    largest = made_up_world(MAX_FACTS)
    assert len({record["prompt"] for record in largest}) == MAX_FACTS == 10_000
    assert not {record["subject"] for record in largest} & {read(prompt)[1] for prompt, _ in pairs(largest)}


@pytest.mark.parametrize("n_facts", [0, -1, MAX_FACTS + 1])
def test_a_size_out_of_bounds_is_refused_and_the_maximum_named(n_facts):
    with pytest.raises(ConfigError, match=rf"n_facts = {n_facts}: .*{MAX_FACTS}") as caught:
        made_up_world(n_facts)
    assert isinstance(caught.value, ValueError)


def test_the_world_of_seed_0_is_pinned():
    text = json.dumps(made_up_world(), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "4f8cd6b0762952edbcd9ad709a044eeb5974c659ddaf6e3609ed161cc3eebc50"
    )


def test_seeds_differ_and_the_same_seed_does_not():
    worlds = [json.dumps(made_up_world(50, seed)) for seed in (0, 1, -1, 2)]
    assert len(set(worlds)) == 4
    assert worlds[1] == json.dumps(made_up_world(50, 1))


def test_the_module_needs_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import forgetlearn.lab.world; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "sys.exit(str(new - sys.stdlib_module_names - {'forgetlearn'} or ''))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == ""


@pytest.fixture(scope="module")
def implied():
    return made_up_world(200, 3, implications=True)


def probes(records, kind):
    return [(record, probe) for record in records for probe in record["probes"] if probe["kind"] == kind]


def test_implications_change_nothing_else(implied):
    bare = [{name: value for name, value in record.items() if name != "probes"} for record in implied]
    assert bare == made_up_world(200, 3)


def test_a_reversed_question_accepts_all_that_have_the_new_answer_and_no_other(implied):
    having = {}
    for record in implied:
        relation, _subject = read(record["prompt"])
        having.setdefault((relation.name, record["target_new"]), set()).add(record["subject"])
        for probe in record["locality"]:
            having.setdefault((relation.name, probe["answer"]), set()).add(read(probe["prompt"])[1])
    found = probes(implied, "reversed")
    assert len(found) == 200
    for record, probe in found:
        relation, subject = read(record["prompt"])
        assert probe["prompt"] == relation.back.format(record["target_new"])
        assert probe["answer"][0] == subject
        assert having[relation.name, record["target_new"]] <= set(probe["answer"])
        before = probe.get("old_answer", [])
        assert not set(before) & set(probe["answer"])
        assert all(KNOWN[name] == relation.subject for name in [*probe["answer"], *before])


def test_a_question_over_two_hops_follows_from_the_fact_and_what_it_needs(implied):
    edited = {prompt for record in implied for prompt in asked(record)}
    truth = {}
    for record, probe in probes(implied, "2-hop"):
        relation, subject = read(record["prompt"])
        new, old = ((read(each["prompt"]), each["answer"]) for each in probe["needs"])
        assert (new[0][1], old[0][1]) == (record["target_new"], record["ground_truth"])
        assert new[0][0] == old[0][0]
        assert (new[1], old[1]) == (probe["answer"], probe["old_answer"])
        assert new[1] != old[1]
        second = new[0][0]
        assert probe["prompt"] == (second.about or second.phrasings[0]).format(relation.noun.format(subject))
        for need in probe["needs"]:
            assert need["prompt"] not in edited
            assert truth.setdefault(need["prompt"], need["answer"]) == need["answer"]
    assert len(probes(implied, "2-hop")) >= 80
