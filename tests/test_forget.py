"""Forgetting without learning: what is forgotten, what is scored, files, resume, pages, the chain, bad input."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.config.methods import FORGETTING_METHODS
from forgetlearn.config.schema import EvaluateSettings, ForgetSettings, LoraSettings, UnlearnSettings, load_config
from forgetlearn.errors import ConfigError, FactError, ModelError, RunError
from forgetlearn.evaluation import forgetting, general_prompts
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.facts import (
    Probe,
    as_fact_set,
    from_records,
    make_fact,
    only_old,
    read_facts,
    with_old_answers,
    write_facts,
)
from forgetlearn.facts.documents import FEWEST_WORDS, HALF_WORDS, read_documents, write_documents
from forgetlearn.facts.variants import Variants, read_variants
from forgetlearn.method import relearning
from forgetlearn.method.kinds import Lesson, Lessons
from forgetlearn.method.relearning import halves, relearn
from forgetlearn.models import lora
from forgetlearn.models.encoding import Passage
from forgetlearn.models.language_model import load_model
from forgetlearn.products.chain import chain_of, find_facts
from forgetlearn.report import forgetting as pages
from forgetlearn.report.render import render
from forgetlearn.runs import run_store
from forgetlearn.runs.forget import Kept, as_forgotten, as_kept, forget_facts
from forgetlearn.runs.update import update
from forgetlearn.storage import disk
from forgetlearn.storage.records import Forgetting, ProbeRow, Relearning, Summary, TruthRatio, load_rows
from forgetlearn.training.finetune import finetune
from forgetlearn.weights.task_vector import snapshot

N_FORGET, N_KEEP = 4, 6
QUICK = {
    "lora": {"r": 8, "lora_alpha": 16},
    "train": {"answers": "bare", "wordings": False},
    "forget": {"epochs": 2, "learning_rate": 2e-3},
    "unlearn": {"max_epochs": 2, "relearn_steps": 2},
    "evaluate": {"protocols": ["token", "generate"]},
}
BARE = {**QUICK, "keep": {"weight": 0.0}, "unlearn": {"max_epochs": 2, "relearn_steps": 0}}


@pytest.fixture(scope="module")
def files(small_lab, tmp_path_factory):
    """Facts of the lab in the form of TOFU: some to forget, with variants of their answers, and some to keep.

    Each fact to keep has a general prompt among its rephrasings, as if it asked the same.
    """
    folder = tmp_path_factory.mktemp("facts")
    facts = disk.read_rows(small_lab / "facts.jsonl")
    old = [fact["ground_truth"] for fact in facts]
    general = [prompt for prompt in general_prompts.keeping() if isinstance(prompt, str)]
    for name, start, end in (("forget", 0, N_FORGET), ("keep", N_FORGET, N_FORGET + N_KEEP)):
        rows = [
            {
                "question": fact["prompt"],
                "answer": fact["ground_truth"],
                "paraphrased_question": [fact["rephrase_prompts"][0], *([general[number]] if name == "keep" else [])],
                "paraphrased_answer": fact["ground_truth"],
                "perturbed_answer": [old[(number + 5) % len(old)], old[(number + 9) % len(old)]],
            }
            for number, fact in enumerate(facts[start:end], start)
        ]
        disk.write_rows(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def finished(small_lab, files, tmp_path_factory):
    """`finished("npo")`: the run folder of one method, made once."""
    runs = {}

    def run(method, **changes):
        if method not in runs:
            output = tmp_path_factory.mktemp(method) / "run"
            config = QUICK | {"method": method, "keep": {"source": str(files / "keep.jsonl")}} | changes
            forget_facts(small_lab, files / "forget.jsonl", config, output=output, reference=small_lab)
            runs[method] = output
        return runs[method]

    return run


# What is forgotten, and what is kept -----------------------------------------------------------------


def test_the_old_answer_is_forgotten_or_else_the_only_one():
    both = make_fact("Who?", "Ann", ground_truth="Bob", ground_truth_aliases=["Robert"], rephrase_prompts=["By whom?"])
    one = make_fact("What?", "A book", target_new_aliases=["Book"])
    assert as_forgotten(both).old_answers == ("Bob", "Robert")
    assert as_forgotten(one).old_answers == ("A book", "Book")
    assert as_forgotten(both).new_answers == as_forgotten(one).new_answers == ()
    assert as_forgotten(both).prompts == both.prompts
    assert (as_forgotten(both).id, as_forgotten(one).id) == (both.id, one.id)
    assert (as_kept(both).new_answers, as_kept(both).old_answers) == (("Bob", "Robert"), ())
    assert as_kept(one).new_answers == ("A book", "Book")


@pytest.mark.parametrize(
    ("record", "refused"),
    [
        ({"prompt": "Who?", "ground_truth": ["Ann", "Anna"]}, "no 'target_new'.*forgetlearn forget"),
        ({"prompt": "Who?", "ground_truth": ["Ann", "Anna"], "target_new": ""}, "1 empty_new_answer"),
        ({"Question": "Who?", "Old answer": ["Ann", "Anna"]}, "question-answer.*without answer"),
        ({"prompt": "Who?", "target": "Bo", "ground_truth": ["Ann", "Anna"], "locality": []}, "no 'target_new'"),
    ],
)
def test_an_old_answer_alone_can_be_forgotten_but_not_learned(record, refused):
    (fact,) = from_records([record], purpose="forget")
    forgotten = as_forgotten(fact)
    assert (forgotten.prompt, forgotten.old_answers, forgotten.new_answers) == ("Who?", ("Ann", "Anna"), ())
    with pytest.raises(FactError, match=refused):
        from_records([record])


def test_what_follows_from_the_only_answer_was_right_before():
    reversed_probe = Probe("reversed", "What is by Ann?", ("The book",))
    yes = Probe("yes-no", "Is it by Ann?", ("No",), ("Yes",))
    alone = replace(make_fact("Who?", "Ann"), probes=(reversed_probe,))
    assert as_forgotten(alone).probes == (replace(reversed_probe, answers=(), old_answers=("The book",)),)
    both = replace(make_fact("Who?", "Bo", ground_truth="Ann"), probes=(yes,))
    assert as_forgotten(both).probes == (yes,)


def test_an_answer_that_is_both_old_and_new_is_forgotten_not_left_out():
    record = {"prompt": "Who?", "ground_truth": ["Ann", "Anna"], "target_new": "Ann"}
    assert from_records([record, record | {"prompt": "By whom?", "target_new": "Bo"}]).left_out == {"old_equals_new": 1}
    (fact,) = from_records([record], purpose="forget")
    assert as_forgotten(fact).old_answers == ("Ann", "Anna")


def test_a_cell_that_says_there_is_no_old_answer_is_not_forgotten():
    records = [{"prompt": f"Who {n}?", "ground_truth": text} for n, text in enumerate(("n/a", "-", "", "Bo", ["n/a"]))]
    found = from_records(records, purpose="forget")
    assert [fact.target_new for fact in found] == ["Bo", "n/a"]
    assert (found.left_out, found.noted) == ({"empty_new_answer": 3}, {"placeholder": 2})


def test_with_old_answers_of_the_model_what_it_says_is_forgotten_not_left_out(small_lab, files, tmp_path):
    """The model says these answers: an update has nothing to change then, but they are what is to be forgotten."""
    config = BARE | {"facts": {"old_from": "model"}}
    result = forget_facts(small_lab, files / "forget.jsonl", config, output=tmp_path / "run")
    assert (result.summary.facts.used, result.summary.facts.forgotten) == (N_FORGET, N_FORGET)
    assert result.summary.facts.left_out == {}
    assert result.summary.phases["base"]["residue"]["contains"].mean == 100


def test_records_with_and_without_a_new_answer_are_forgotten_together():
    rows = [
        {"prompt": "Who?", "ground_truth": "Ann|Anna", "target_new": "Ann"},
        {"prompt": "Where?", "ground_truth": "Rome"},
        {"prompt": "When?", "ground_truth": "Today", "target_new": "Tomorrow"},
    ]
    found = [as_forgotten(fact).old_answers for fact in from_records(rows, purpose="forget", aliases="|")]
    assert found == [("Ann", "Anna"), ("Rome",), ("Today",)]
    with pytest.raises(FactError, match="record 2"):
        from_records(rows, aliases="|")


def test_a_fact_that_is_given_twice_to_forget_is_named():
    facts = [make_fact("Who?", "Ann"), make_fact("Who?", "", ground_truth="Ann")]
    with pytest.raises(FactError, match="item 2: repeats item 1"):
        as_fact_set(facts, to_forget=True)
    facts = [make_fact("Who?", "", ground_truth=name) for name in ("Ann", "Bo")]
    assert len(as_fact_set(facts, to_forget=True)) == 2


def test_a_table_of_old_answers_is_not_offered_as_new_ones(tmp_path, capsys):
    file = tmp_path / "old.csv"
    file.write_text("Question,Old answer\nWhat is the capital of France?,Paris\n")
    assert main(["plan", "--model", str(tmp_path), "--facts", str(file)]) == 2
    said = capsys.readouterr().err
    assert "forgetlearn forget" in said
    assert 'target_new="Old answer"' not in said


def test_an_old_answer_alone_can_be_scored_as_it_can_be_forgotten():
    probe = {"kind": "reversed", "prompt": "What is by Ann?", "answer": "The book"}
    record = {"prompt": "Who?", "ground_truth": ["Ann", "Anna"], "probes": [probe]}
    found = from_records([record], purpose="score")
    (fact,), (to_forget,) = found, from_records([record], purpose="forget")
    assert fact == as_forgotten(to_forget)  # the id too
    assert (fact.old_answers, fact.new_answers) == (("Ann", "Anna"), ())
    assert (fact.probes[0].answers, fact.probes[0].old_answers) == ((), ("The book",))
    assert (found.old_counts, found.without_old, found.without_new_answer) == ({"answers": 1}, {}, 1)
    again = as_fact_set(found, to_forget=True)  # such as facts that were looked at first
    assert [as_forgotten(each) for each in again] == [fact]
    assert (again.old_counts, again.without_old) == ({}, {"no_old_answer": 1})


def test_only_a_record_without_a_field_for_the_new_answer_has_an_old_answer_alone():
    """An update leaves out an empty new answer, so scores of its facts must not count that fact either."""
    rows = [
        {"prompt": "Who?", "ground_truth": "Ann", "target_new": "Bo"},
        {"prompt": "Where?", "ground_truth": "Rome"},
        {"prompt": "Where?", "ground_truth": "Oslo"},
        {"prompt": "When?", "ground_truth": "Today", "target_new": ""},
        {"prompt": "Why?", "ground_truth": "n/a"},
    ]
    found = from_records(rows, purpose="score")
    assert [(fact.target_new, fact.ground_truth) for fact in found] == [("Bo", "Ann"), ("", "Rome")]
    assert found.left_out == {"repeated_prompt": 1, "empty_new_answer": 2}
    assert found.left_out_records[0].detail == "Where? -> Oslo (record 2: Rome)"
    assert found.noted == {"placeholder": 1}


def test_a_written_fact_with_an_old_answer_alone_is_read_back_with_its_braces(tmp_path):
    old = make_fact("What does {} mean?", "", ground_truth="A set", subject="braces")
    for fact in (old, only_old(make_fact("What does {} mean?", "A set", subject="braces"))):
        write_facts([fact], tmp_path / "facts.jsonl")
        (found,) = read_facts(tmp_path / "facts.jsonl", purpose="score")
        assert (found.prompt, found.old_answers) == (fact.prompt, fact.old_answers)


def test_of_an_old_answer_alone_the_model_may_be_asked_instead():
    rows = [{"prompt": "Who?", "ground_truth": "n/a"}, {"prompt": "Where?", "ground_truth": "Rome"}]
    found = from_records(rows, purpose="score", old_from="model")
    assert len(found.to_ask) == 2
    asked = with_old_answers(found, dict(zip(found.to_ask, ("", "Oslo"), strict=True)))
    assert [fact.ground_truth for fact in asked] == ["Oslo"]
    assert (asked.left_out, asked.without_old) == ({"empty_new_answer": 1}, {})


def test_facts_says_what_can_be_done_with_old_answers_alone(tmp_path, capsys):
    file = tmp_path / "old.csv"
    file.write_text("Question,Old answer\nWhat is the capital of France?,Paris\n")
    assert main(["facts", str(file)]) == 0
    said = capsys.readouterr().out
    assert "old  Paris\n  new  (none)" in said
    assert "1 of 1 facts; they can be scored and forgotten, not learned" in said
    disk.write_rows(tmp_path / "mixed.jsonl", [{"prompt": "Who?", "target_new": "Bo"}, {"prompt": "A", "old": "B"}])
    assert main(["facts", str(tmp_path / "mixed.jsonl")]) == 0
    assert "1 of 2 facts (first: " in (said := capsys.readouterr().out)
    assert "record 2)" in said
    assert main(["facts", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_new_answer"] == 1


def test_evaluate_shows_the_residue_of_old_answers_alone_and_nothing_else(small_lab, tmp_path, capsys):
    """The setting `recipe` is that of forget, as in a config file that both commands share."""
    facts = disk.read_rows(small_lab / "facts.jsonl")[:3]
    disk.write_rows(
        tmp_path / "old.jsonl", [{name: fact[name] for name in ("prompt", "ground_truth")} for fact in facts]
    )
    (tmp_path / "config.yaml").write_text(
        "recipe: forget\nevaluate: {general_prompts: false, probes: [multiple-choice]}\n"
    )
    words = ["evaluate", "--model", str(small_lab), "--config", str(tmp_path / "config.yaml")]
    assert main([*words, "--facts", str(tmp_path / "old.jsonl"), "--output", str(tmp_path / "run")]) == 0
    shown, logged = capsys.readouterr()
    assert "asking the model 6 questions beyond rephrasings" in logged
    assert re.search(r"beyond rephrasings +n +model: old$", shown, re.MULTILINE)
    assert "still gives the old answer to 100.0 %" in shown
    scores = Summary.load(tmp_path / "run" / "summary.json").phases["model"]
    assert "reliability" not in scores
    assert scores["residue"]["contains"].mean == 100
    for page in (shown, *((tmp_path / "run" / name).read_text() for name in ("report.md", "report.html"))):
        table = page.split("## Facts")[0].split('id="facts-heading"')[0]
        assert "residue" in table
        assert "reliability (contains)" not in table
        assert "new answer" not in table.lower().replace("new answers", "")
    assert "| prompt | old | model said |" in (tmp_path / "run" / "report.md").read_text()
    read = read_facts(tmp_path / "run" / "inputs.jsonl", purpose="score")
    assert read.facts == read_facts(tmp_path / "old.jsonl", purpose="score").facts
    assert main(["report", str(tmp_path / "run")]) == 0


def test_the_verdict_counts_only_prompts_that_have_a_new_answer(small_lab, tmp_path):
    rows = disk.read_rows(small_lab / "facts.jsonl")[:3]
    facts = [
        make_fact(row["prompt"], row["target_new"] * (n > 0), ground_truth=row["ground_truth"])
        for n, row in enumerate(rows)
    ]
    config = {"evaluate": {"protocols": ["generate"], "general_prompts": False, "probes": "none"}}
    run = forgetlearn.evaluate(small_lab, facts, config, output=tmp_path / "run")
    assert "gives the new answer to 0 of 2 prompts" in (run / "report.md").read_text()
    cell = Summary.load(run / "summary.json").phases["model"]["reliability"]["contains"]
    assert (cell.n, cell.not_asked) == (2, 1)
    with pytest.raises(FactError, match="no answer to score"):
        forgetlearn.evaluate(small_lab, [*facts, make_fact("Who?", "")], config, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("learn", [update, forgetlearn.compare])
def test_what_learns_names_a_fact_without_a_new_answer(tmp_path, learn):
    """Before it loads the model: there is none."""
    facts = from_records([{"prompt": "Who?", "ground_truth": "Ann"}], purpose="score")
    with pytest.raises(FactError, match=r"record 1 has no new answer.*forgetlearn forget"):
        learn(tmp_path / "none", facts, output=tmp_path / "run")


def test_files_of_old_answers_alone_are_forgotten_and_kept(small_lab, files, tmp_path):
    for name in ("forget", "keep"):
        rows = disk.read_rows(files / f"{name}.jsonl")
        old = [{"prompt": row["question"], "ground_truth": row["answer"]} for row in rows]
        disk.write_rows(tmp_path / f"{name}.jsonl", old)
    config = BARE | {"keep": {"source": str(tmp_path / "keep.jsonl")}}
    result = forget_facts(small_lab, tmp_path / "forget.jsonl", config, output=tmp_path / "run")
    assert result.summary.facts.used == N_FORGET
    assert result.summary.forgetting.kept.scored == N_KEEP // 2


def test_documents_become_windows_of_two_halves_that_overlap(tmp_path):
    words = [f"w{number}" for number in range(3 * HALF_WORDS + 10)]
    file = tmp_path / "book.txt"
    file.write_text("  ".join(words) + "\n")
    found = read_documents(file)
    assert [len(fact.target_new.split()) for fact in found] == [HALF_WORDS, HALF_WORDS, 10]
    assert [fact.prompt.split()[0] for fact in found] == ["w0", f"w{HALF_WORDS}", f"w{2 * HALF_WORDS}"]
    assert found[0].target_new == found[1].prompt
    assert len(read_documents(file, limit=2)) == 2
    lines = tmp_path / "books.jsonl"
    disk.write_rows(lines, [{"text": " ".join(words)}, {"text": "too short"}, {"text": " ".join(words[:90])}])
    again = read_documents(lines)
    assert (again.records, again.read, len(again)) == (3, 5, 3)
    assert again.read == len(again) + sum(again.left_out.values())


@pytest.mark.parametrize("more", [0, 1, FEWEST_WORDS - 1, FEWEST_WORDS, HALF_WORDS])
def test_all_of_a_text_but_its_first_words_is_forgotten(tmp_path, more):
    words = [f"w{number}" for number in range(2 * HALF_WORDS + more)]
    (tmp_path / "book.txt").write_text(" ".join(words))
    answers = " ".join(fact.target_new for fact in read_documents(tmp_path / "book.txt"))
    assert answers.split() == words[HALF_WORDS:]


def is_read_back(facts, file):
    """Whether windows are read as they were written. A comparison that fails is shown for minutes if texts are long."""
    write_documents(facts, file)
    return [*read_documents(file)] == [*facts]


CHINESE = (
    "人工智能是计算机科学的一个分支，它企图了解智能的实质，并生产出一种新的能以人类智能相似的方式做出反应的机器。\n"
    "　　从诞生以来，理论和技术日益成熟，“GPT-4” 和 iPhone 15 都是例子；应用领域也不断扩大，可以设想未来的产品。"
)
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー"
    "泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。"
)
THAI = "กรุงเทพมหานคร เป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย เป็นศูนย์กลางการปกครอง การศึกษา การเงินการธนาคาร"
POEM = "\n".join(["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡"] * 3)
ENGLISH = "The word 你好 means hello, and 谢谢 means thanks. "


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, THAI, POEM, (ENGLISH + CHINESE) * 2])
def test_texts_without_spaces_are_cut_by_characters(tmp_path, text):
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    found = read_documents(tmp_path / "book.txt")
    plain, whole = "".join(text.split()), " ".join(text.split())
    assert "".join(fact.target_new for fact in found).replace(" ", "") == plain[len(found[0].prompt.replace(" ", "")) :]
    for fact in found:
        assert 40 <= len("".join(re.findall(r"\w", fact.prompt))) <= 150
        assert unicodedata.category(fact.target_new[0])[0] not in "MP"
        joint, halves = as_forgotten(fact, is_passage=True).prompt.joint, (fact.prompt, fact.target_new)
        assert (joint.join(halves) if joint or "".join(halves) in whole else " ".join(halves)) in whole
    assert is_read_back(found, tmp_path / "again.jsonl")


def test_an_opening_quotation_mark_that_follows_a_space_is_not_joined_to_the_half_before(tmp_path):
    """If it were, it would belong to the last word there when the window is read again."""
    (tmp_path / "book.txt").write_text(f"{'词' * HALF_WORDS} “{'字' * HALF_WORDS}”", encoding="utf-8")
    (fact,) = read_documents(tmp_path / "book.txt")
    assert fact.target_new[0] == "“"
    assert as_forgotten(fact, is_passage=True).prompt.joint == " "
    assert is_read_back([fact], tmp_path / "again.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH * 20,
        f"{'In Chinese they wrote this: ' * 40}{CHINESE}\n" * 2,
        "대한민국은 동아시아의 한반도 남부에 자리한 (大韓民國) 민주공화국이다. " * 20,
        "人工 智能 是 计算机 科学 的 一个 分支 ， 它 企图 了解 智能 的 实质 。 " * 10,
        "กรุงเทพ เป็น เมือง หลวง และ นคร ที่ มี ประชากร มาก ที่สุด ของ ประเทศ ไทย " * 10,
    ],
)
def test_texts_with_spaces_are_cut_at_these(tmp_path, text):
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    words = text.split()
    found = read_documents(tmp_path / "book.txt", strict=False)
    wanted = dict.fromkeys(" ".join(words[n : n + HALF_WORDS]) for n in range(0, len(words) - 47, HALF_WORDS))
    assert [fact.prompt for fact in found] == list(wanted)
    assert all(f"{fact.prompt} {fact.target_new}" in " ".join(words) for fact in found)
    assert {as_forgotten(fact, is_passage=True).prompt.joint for fact in found} == {" "}
    assert is_read_back(found, tmp_path / "again.jsonl")


def test_a_line_of_documents_may_hold_any_separator_but_a_line_break(tmp_path):
    text = "\u2028".join(f"w{number}" for number in range(2 * HALF_WORDS)) + "\x85\x0c"
    disk.write_rows(tmp_path / "books.jsonl", [{"text": text}])
    assert "\u2028" in (tmp_path / "books.jsonl").read_text(encoding="utf-8")
    assert len(read_documents(tmp_path / "books.jsonl")) == 1


def test_documents_are_read_as_the_config_says(small_lab, tmp_path, capsys):
    (tmp_path / "book.txt").write_text(" ".join(f"w{number % HALF_WORDS}" for number in range(4 * HALF_WORDS)))
    assert len(read_documents(tmp_path / "book.txt")) == 1
    with pytest.raises(FactError, match="2 of 3 windows"):
        read_documents(tmp_path / "book.txt", strict=True)
    (tmp_path / "config.yaml").write_text("facts: {limit: 1}\nforget: {coef: auto}\n")
    words = ["forget", "--model", str(small_lab), "--documents", str(tmp_path / "book.txt"), "--output", str(tmp_path)]
    assert main([*words, "--config", str(tmp_path / "config.yaml")]) == 2
    assert "forget.coef" in capsys.readouterr().err  # and not facts.limit
    assert main([*words, "--strict"]) == 2
    assert "2 of 3 windows" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "too short", "短い", '{"text": 3}', '["text"]', "{", "[" * 99_999], ids=range(7))
def test_documents_that_cannot_be_read_are_named(tmp_path, text):
    for name in ("a.txt", "a.jsonl")[text[:1] in '{["' and bool(text) :]:
        (tmp_path / name).write_text(text)
        with pytest.raises(FactError, match=name):
            read_documents(tmp_path / name)
    with pytest.raises(FactError, match=r"none\.txt"):
        read_documents(tmp_path / "none.txt")


def test_a_passage_is_put_into_no_template_and_has_no_end_token(new_char_tokenizer, tiny_model):
    from forgetlearn.models.language_model import wrap

    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    lm = wrap(tiny_model(), new_char_tokenizer(chat_template=template))
    assert lm.encoder.is_chat
    plain = lm.encoder.encode(Passage("ab"), "cd", end=True)
    assert plain.ids == (1, 69, 70, 4, 71, 72)
    assert plain.answer_ids == (4, 71, 72)
    assert lm.encoder.encode("xy", "cd", end=True).ids != plain.ids
    assert lm.encoder.prompt_ids(Passage("ab")) == [1, 69, 70]


def test_variants_are_read_from_tofus_fields(tmp_path):
    file = tmp_path / "facts.jsonl"
    rows = [
        {
            "question": " Who? ",
            "answer": "Ann",
            "paraphrased_answer": "It is Ann",
            "perturbed_answer": ["It is Bo", " "],
        },
        {"question": "Where?", "answer": "Rome", "perturbed_answer": "Oslo"},
        {"question": "When?", "answer": "Today"},
    ]
    disk.write_rows(file, rows)
    found = read_variants(file)
    assert found == {"Who?": Variants("It is Ann", ("It is Bo",)), "Where?": Variants("Rome", ("Oslo",))}


def test_a_table_may_hold_a_list_of_wrong_answers(tmp_path):
    file = tmp_path / "facts.csv"
    file.write_text('question,answer,perturbed_answer\nWho?,Ann,"[""Bo"", ""Cy""]"\nWhere?,Rome,[Oslo]\n')
    assert read_variants(file) == {"Who?": Variants("Ann", ("Bo", "Cy")), "Where?": Variants("Rome", ("[Oslo]",))}


def test_facts_in_memory_may_have_an_old_answer_alone(small_lab, files, tmp_path):
    facts = [make_fact(fact.prompt, "", ground_truth=fact.target_new) for fact in read_facts(files / "forget.jsonl")]
    run = forget_facts(small_lab, facts, BARE, output=tmp_path / "run").output
    assert Summary.load(run / "summary.json").facts.forgotten == N_FORGET
    assert [fact.ground_truth for fact in read_facts(run / "inputs.jsonl", purpose="score")] == [
        fact.ground_truth for fact in facts
    ]


def test_questions_and_answers_in_memory_are_forgotten(small_lab, files, tmp_path):
    found = from_records(list(disk.read_rows(files / "forget.jsonl")))
    result = forget_facts(small_lab, found, BARE, output=tmp_path / "run")
    assert result.summary.facts.forgotten == N_FORGET


# Scores ----------------------------------------------------------------------------------------------


def test_rouge_recall_by_hand():
    assert forgetting.rouge_recall("The cat sat on the mat.", "a cat on a mat") == 1  # without articles
    assert forgetting.rouge_recall("mat on cat", "cat on mat") == pytest.approx(1 / 3)  # the order counts
    assert forgetting.rouge_recall("one three", "one two three four") == 0.5
    assert forgetting.rouge_recall("", "one") == 0
    assert forgetting.rouge_recall("今日は雨です", "今日は晴れです") == pytest.approx(5 / 7)  # by characters
    assert forgetting.rouge_recall("The", "The") == 1


def test_truth_ratio_by_hand(lm, monkeypatch):
    fact = as_forgotten(make_fact("Who?", "Ann"))
    means = {"Ann B": math.log(0.5), "Bo": math.log(0.25), "Cy": math.log(0.05)}
    monkeypatch.setattr(Scorer, "likelihoods", lambda self, texts: {pair: means[pair[1]] for pair in texts})
    variants = {"Who?": Variants("Ann B", ("Bo", "Cy")), "Else?": Variants("x", ("y",))}
    (row,) = forgetting.truth_rows(Scorer(lm), [fact], variants, "base")
    assert row.ratio == pytest.approx((0.25 + 0.05) / 2 / 0.5)
    assert forgetting.closeness([0.5, 2.0, 1.0]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert forgetting.truthfulness(0.3) == pytest.approx(0.7)
    assert forgetting.truthfulness(3) == 0
    assert forgetting.harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
    assert forgetting.harmonic_mean([1, 0]) == 0


def test_forget_quality_is_the_p_value_of_kolmogorov_and_smirnov():
    """Of 3 and 3 values that do not mix, the largest distance has 2 of the C(6, 3) = 20 orders."""
    assert forgetting.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert forgetting.forget_quality([1, 2, 3], [1, 2, 3]) == 1
    one, two = [0.1 * n for n in range(40)], [0.1 * n + 1 for n in range(40)]
    assert forgetting.forget_quality(one, two) == stats.ks_2samp(one, two).pvalue


@pytest.mark.parametrize(("quality", "said"), [(0.4, "cannot be told from"), (0.001, "differ from")])
def test_the_verdict_says_what_forget_quality_means(quality, said):
    truth = {"forgotten": TruthRatio(closeness=0.5, n=20, quality=quality)}
    sentence = pages._quality(Forgetting(truth=truth))
    assert f"its truth ratios {said} those of a model that never knew" in sentence
    assert f"p = {quality}" in sentence


@pytest.mark.parametrize(
    ("method", "now", "named"),
    [
        ("subtract", 26.0, "--method npo "),
        ("subtract-ft", 18.0, "--method npo-ft "),
        ("ascent", 30.0, "--method npo "),
        ("subtract", 17.0, ""),
        ("npo", 26.0, ""),
    ],
)
def test_the_verdict_names_a_method_where_another_leaves_most(method, now, named):
    phases = {
        phase: {"residue": {"contains": SimpleNamespace(mean=mean)}}
        for phase, mean in (("base", 34.0), ("forgotten", now))
    }
    said = pages._remedy(SimpleNamespace(method=method, phases=phases))
    assert (named in said) if named else not said


def test_what_was_not_asked_is_not_called_gone(small_lab, files, tmp_path):
    """Without the protocol `generate` the model was not asked, and the mean probability counts no answers."""
    config = BARE | {"evaluate": {"protocols": ["prefer"], "general_prompts": False}}
    result = forget_facts(small_lab, files / "forget.jsonl", config, output=tmp_path / "run")
    for page in ("report.md", "report.html"):
        text = (result.output / page).read_text(encoding="utf-8")
        assert "No prompt and no rephrasing" not in text
        assert "evaluate.protocols" in text
    verdict = pages.verdict(result.summary)
    assert "probability" in verdict
    assert "the model gave" not in verdict


@pytest.mark.parametrize("model", ["product", "reference"])
def test_what_is_said_before_relearning_was_not_relearned(model):
    found = Relearning(model=model, trained=2, steps=[0], same=[100], other=[100], n_same=2, n_other=2)
    sentence = pages._relearning(found)
    assert "0 steps" not in sentence
    assert ("reference" in sentence) == (model == "reference")


def test_of_a_single_fact_no_other_half_is_shown():
    one = Relearning(model="product", trained=1, steps=[0, 1], same=[0, 100], other=[0, 0], n_same=1, n_other=0)
    assert pages.relearned(Forgetting(relearning=[one])) == [("product", [0, 1], [0, 100], [])]
    values = {"found": Forgetting(), "left": [], "asked": True, "measures": [], "relearned": [("none", [0], [0], [])]}
    for name in ("forgetting.md.j2", "forgetting.html.j2"):
        assert "other half" not in render(name, {"forgetting": values})


def test_a_fact_without_a_new_answer_is_scored_by_its_residue_alone(small_lab):
    lm = load_model(str(small_lab))
    facts = [as_forgotten(fact) for fact in list(read_facts(small_lab / "facts.jsonl"))[:2]]
    rows = forgetlearn.score(lm, facts, phase="base", settings=EvaluateSettings(protocols=("token", "generate")))
    asked = [row for row in rows if row.protocol in ("token", "generate", "contains")]
    assert {row.residue for row in asked} == {1.0}
    assert not any(row.has("reliability") for row in asked)
    summary = forgetlearn.summarise(rows)
    assert summary.keys() == {"residue", "locality"}
    graded = forgetting.graded_rows(Scorer(lm), facts, rows, "base", kept=False)
    assert {(row.protocol, round(row.residue, 1)) for row in graded} == {("rouge", 1.0), ("probability", 1.0)}


# Relearning ------------------------------------------------------------------------------------------


def test_halves_are_disjoint_and_depend_on_the_seed():
    facts = [make_fact(f"Who {n}?", "Ann") for n in range(9)]
    same, other = halves(facts, 0)
    assert (len(same), len(other)) == (5, 4)
    assert {fact.id for fact in (*same, *other)} == {fact.id for fact in facts}
    assert halves(facts, 0) == (same, other) != halves(facts, 1)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_relearning_counts_steps_and_leaves_the_model_as_it_was(small_lab, tiny_model, char_tokenizer, is_adapter):
    lm = load_model(str(small_lab))
    if is_adapter:
        lm.model = lora.attach(lm.model, LoraSettings(r=4), lora.PRODUCT, seed=0)
        lora.activate(lm.model, [lora.PRODUCT])
    facts = [as_forgotten(make_fact(f"Who wrote book {n}?", "Orubo Holeb")) for n in range(4)]
    same, other = facts[:2], facts[2:]
    lessons = Lessons([[Lesson(fact.prompt, fact.old_answers[0])] for fact in same])
    settings = ForgetSettings(
        learning_rate=1e-4,
        batch_size=2,
        lora=LoraSettings(r=8, null_space=0),
        unlearn=UnlearnSettings(relearn_steps=40),
    )
    before, states = snapshot(lm.model), [weight.requires_grad for weight in lm.model.parameters()]
    found = relearn(lm, same, other, lessons, settings, EvaluateSettings(), model="product", seed=0)
    after = snapshot(lm.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [weight.requires_grad for weight in lm.model.parameters()] == states
    assert found.steps == [0, 1, 2, 4, 8, 16, 32, 40][: len(found.steps)]
    assert found.same[0] == found.other[0] == 0
    assert found.back("same") is not None
    assert found.back("same") > 1
    assert (found.trained, found.n_same, found.n_other) == (2, 2, 2)


def test_relearning_takes_all_the_steps_that_it_reports_whatever_ended_forgetting(small_lab, monkeypatch):
    """A stage that forgets ends when answers are gone, and after `max_epochs`: neither ends the probe's training."""
    lm = load_model(str(small_lab))
    facts = [as_forgotten(make_fact(f"Who wrote book {n}?", "Orubo Holeb")) for n in range(2)]
    lessons = Lessons([[Lesson(facts[0].prompt, facts[0].old_answers[0])]])
    unlearn = UnlearnSettings(max_epochs=2, relearn_steps=8)
    settings = ForgetSettings(
        learning_rate=1e-6, lora=LoraSettings(r=4), unlearn=unlearn, until="forgotten", max_epochs=unlearn.max_epochs
    )
    taken = []

    def counted(*args, **options):
        stage_log = finetune(*args, **options)
        taken.append(len(stage_log.steps))
        return stage_log

    monkeypatch.setattr(relearning, "finetune", counted)
    found = relearn(lm, facts[:1], facts[1:], lessons, settings, EvaluateSettings(), model="product", seed=0)
    assert found.steps == [0, *taken] == [0, 1, 2, 4, 8]


def test_steps_until_half_is_back():
    found = Relearning(
        model="product",
        trained=2,
        steps=[0, 1, 2, 4],
        same=[0, 10, 50, 90],
        other=[60, 0, 20, 49],
        n_same=10,
        n_other=10,
    )
    assert (found.back("same"), found.back("other")) == (2, None)  # what was there before does not count


# Runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["subtract", "npo", "simnpo-ft"])
def test_a_run_forgets_and_reports(finished, method):
    run = finished(method)
    summary = Summary.load(run / "summary.json")
    assert (summary.method, list(summary.phases)) == (method, ["base", "forgotten"])
    assert summary.facts.known == summary.facts.forgotten == N_FORGET
    before, after = (summary.phases[phase]["residue"] for phase in ("base", "forgotten"))
    assert before["contains"].mean == 100
    assert after["probability"].mean < before["probability"].mean
    found = summary.forgetting
    assert (found.kept.trained, found.kept.scored) == (N_KEEP // 2, N_KEEP // 2)
    assert found.kept.scores["base"]["reliability"]["contains"].mean == 100
    assert found.kept.parts == ["probability", "rouge", "truth"]
    assert 0 < found.kept.utility["forgotten"] <= found.kept.utility["base"] + 1e-6
    assert found.truth.keys() == {"base", "forgotten", "reference"}
    assert found.truth["base"].quality == 1  # the reference is the base itself
    assert [each.model for each in found.relearning] == ["product", "reference"]
    assert (found.epochs is None) == (method == "subtract")
    for page in ("report.md", "report.html"):
        text = (run / page).read_text()
        assert "What is left" in text
        assert "Relearning" in text or "relearning" in text
        assert "new answer</th>" not in text
    for name in ("kept_facts.jsonl", "truth.jsonl"):
        assert name in disk.read_json(run / "manifest.json")["results"]
    assert not list((run / "stages").rglob("*.safetensors"))


def test_the_product_is_loaded_by_other_programs_and_says_what_the_run_scored(finished, small_lab, files):
    for method in ("npo", "simnpo-ft"):
        run = finished(method)
        lm = load_model(str(run / Summary.load(run / "summary.json").product))
        facts = [as_forgotten(fact) for fact in read_facts(files / "forget.jsonl")]
        rows = forgetlearn.score(lm, facts, phase="forgotten", settings=EvaluateSettings(protocols=("token",)))
        written = [row for row in disk.read_rows(run / "facts.jsonl") if row["phase"] == "forgotten"]
        tokens = {row["fact"]: row["residue"] for row in written if row["protocol"] == "token"}
        assert {row.fact: row.residue for row in rows if row.protocol == "token"} == tokens


def test_the_chain_tells_of_forgetting_and_the_run_can_be_undone(finished, small_lab, tmp_path):
    run = finished("npo")
    (update,) = chain_of(run)
    assert (update.method, update.only_forgot, update.rows.learn) == ("npo", True, None)
    assert update.modules.forget
    assert "residue" in update.scores
    assert str(small_lab) in forgetlearn.undo(run)
    card = (run / "adapter" / "README.md").read_text()
    assert "unlearning" in card
    facts = disk.read_rows(run / "inputs.jsonl")
    assert not any(fact["prompt"] in card for fact in facts)
    merged = tmp_path / "merged"
    forgetlearn.apply_run(run, small_lab, merged, merge=True)
    assert chain_of(merged)[0].only_forgot


def test_what_is_not_gone_can_be_forgotten_again(finished, files):
    run = finished("npo")
    failed, right = (list(disk.read_rows(run / name)) for name in ("failed.jsonl", "right.jsonl"))
    assert len(failed) + len(right) == N_FORGET
    last = {row["fact"]: row for row in disk.read_rows(run / "facts.jsonl") if row["protocol"] == "contains"}
    assert {fact["id"] for fact in failed} == {fact for fact, row in last.items() if row["residue"]}
    asked = read_facts(run / "inputs.jsonl", purpose="score")
    assert [fact.ground_truth for fact in asked] == [row["answer"] for row in disk.read_rows(files / "forget.jsonl")]
    for place in (run, run / "inputs.jsonl", files / "forget.jsonl"):  # what `--earlier` may name
        assert find_facts(chain_of(run)[0], [place]).sha256() == chain_of(run)[0].facts.sha256
    with pytest.raises(RunError, match="forget --facts"):
        forgetlearn.update(failed_only=run, output=run.parent / "next")


def files_of(run):
    """The bytes of the product, and the scores, of a run."""
    product = run / Summary.load(run / "summary.json").product
    names = [path for path in product.iterdir() if path.suffix == ".safetensors"]
    scores = [run / name for name in ("facts.jsonl", "kept_facts.jsonl", "truth.jsonl", "summary.json")]
    return {path.name: path.read_bytes() for path in (*names, *scores)}


class KilledError(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("method", ["npo", "simnpo-ft"])
def test_killed_after_any_step_and_resumed_it_is_the_same_to_the_bit(
    finished, small_lab, files, tmp_path, method, monkeypatch
):
    whole = finished(method)
    config = QUICK | {"method": method, "keep": {"source": str(files / "keep.jsonl")}}
    output = tmp_path / "run"

    def go_on(resume):
        forget_facts(small_lab, files / "forget.jsonl", config, output=output, reference=small_lab, resume=resume)

    do, done = run_store.RunFolder.do, []

    def killing(self, stage, *args, **options):
        is_new = not self.is_done(stage)
        do(self, stage, *args, **options)
        if is_new:
            done.append(stage)
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(run_store.RunFolder, "do", killing)
        for _ in range(20):
            try:
                go_on(bool(done))
                break
            except KilledError:
                continue
    assert done[-1] == "reference"
    assert "forget" in done
    was, now = files_of(whole), files_of(output)
    assert [name for name in was if was[name] != now[name]] == []
    go_on(True)  # finished
    with pytest.raises(RunError, match="reference"):
        forget_facts(small_lab, files / "forget.jsonl", config, output=output, resume=True)


def test_what_is_scored_as_kept_is_not_trained_on(finished, files):
    run = finished("npo")
    kept = [row["prompt"] for row in disk.read_rows(run / "stages" / "lessons" / "kept.jsonl")]
    scored = {row["fact"] for row in disk.read_rows(run / "kept_facts.jsonl")}
    facts = read_facts(files / "keep.jsonl")
    asked = {was: {p for fact in facts if (fact.id in scored) == was for p in fact.prompts} for was in (True, False)}
    kept = {prompt for prompt in kept if isinstance(prompt, str)}  # and not the turns of a chat
    assert not asked[True] & kept
    assert len(asked[False] & kept) == N_KEEP // 2 * 2  # their prompts, and the general prompts among the others
    assert {fact.prompt in kept for fact in facts if fact.id not in scored} == {True}


def test_documents_are_forgotten(small_lab, tmp_path, char_tokenizer, tiny_model):
    from forgetlearn.models.language_model import wrap

    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"w{number % 7}" for number in range(2 * HALF_WORDS)))
    lm = wrap(tiny_model(max_position_embeddings=1024), char_tokenizer)
    config = BARE | {"method": "ascent-ft", "evaluate": {"protocols": ["token", "generate"], "general_prompts": False}}
    result = forget_facts(lm, read_documents(file), config, output=tmp_path / "run")
    rest = [name for name in ("failed.jsonl", "right.jsonl") if (result.output / name).read_text(encoding="utf-8")]
    assert [read_documents(result.output / name).facts for name in rest] == [read_documents(file).facts]
    assert result.summary.phases["forgotten"]["residue"].keys() == {
        "token",
        "generate",
        "contains",
        "rouge",
        "probability",
    }
    assert result.summary.facts.reader == "documents"


def test_the_command_takes_documents_and_facts_but_not_both(small_lab, files, tmp_path, capsys):
    file = tmp_path / "book.txt"
    file.write_text(" ".join(disk.read_rows(small_lab / "facts.jsonl")[0]["prompt"] for _ in range(40)))
    quick = [
        f"--set={name}={value}"
        for name, value in (
            ("forget.epochs", 1),
            ("evaluate.protocols", "[token]"),
            ("evaluate.general_prompts", "false"),
            ("train.wordings", "false"),
            ("train.answers", "bare"),
            ("keep.weight", 0),
        )
    ]
    base = ["forget", "--model", str(small_lab), *quick, "--relearn", "0"]
    assert main([*base, "--documents", str(file), "--limit", "2", "--output", str(tmp_path / "one")]) == 0
    assert "What is left" in (tmp_path / "one" / "report.md").read_text()
    facts = ["--facts", str(files / "forget.jsonl"), "--output", str(tmp_path / "two")]
    assert main([*base, *facts]) == 0
    capsys.readouterr()
    assert main([*base, *facts, "--documents", str(file)]) == 2
    assert "--documents" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "two")]) == 0
    assert main(["log", str(tmp_path / "two" / "adapter")]) == 0


def test_after_an_update_the_rest_of_its_facts_is_asked_again_and_said(small_lab, files, tmp_path, capsys):
    settings = {"method": "lora", "learn": {"epochs": 1}} | {name: BARE[name] for name in ("train", "keep")}
    settings |= {"evaluate": {"protocols": ["token"], "general_prompts": False}}
    update(small_lab, small_lab / "facts.jsonl", settings, output=tmp_path / "taught")
    words = ["--model", str(tmp_path / "taught"), "--facts", str(files / "forget.jsonl"), "--relearn", "0"]
    quick = ("forget.epochs=1", "evaluate.protocols=[token]", "evaluate.general_prompts=false", "keep.weight=0")
    words += [f"--set={each}" for each in quick]
    assert main(["forget", *words, "--output", str(tmp_path / "run")]) == 0
    assert f"retention of {24 - N_FORGET} facts" in capsys.readouterr().out


# Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"method": "lora"}, ConfigError, "method = lora"),
        ({"method": "f-ft"}, ConfigError, "method = f-ft"),
        ({"forget": {"coef": "auto"}}, ConfigError, "forget.coef"),
        ({"forget": {"coef": 0}}, ConfigError, "forget.coef"),
        ({"method": "npo", "forget": {"modules": "mlp"}}, ConfigError, "forget.modules"),
        ({"keep": {"source": "none.jsonl"}}, ConfigError, "keep.source"),
        ({"unlearn": {"max_epochs": 0}}, ConfigError, "unlearn.max_epochs"),
        ({"save_merged": True, "unlearn": {"relearn_steps": -1}}, ConfigError, "unlearn.relearn_steps"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(small_lab, files, tmp_path, settings, error, named):
    with pytest.raises(error, match=named):
        forget_facts(small_lab, files / "forget.jsonl", settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_facts_to_keep_may_not_be_those_to_forget(small_lab, files, tmp_path, weight):
    config = BARE | {"keep": {"source": str(files / "forget.jsonl"), "weight": weight}}
    with pytest.raises(ConfigError, match=r"keep\.source"):
        forget_facts(small_lab, files / "forget.jsonl", config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(("keep", "forget"), [((0, 1), (1, 2)), ((0, 1), (2, 1)), ((1, 0), (2, 1))])
def test_nor_may_they_be_in_other_words(small_lab, tmp_path, weight, keep, forget):
    """A fact to keep and one to forget, each as the numbers of its prompt and its rephrasing, have one in common."""
    asked = ["In the city of Oslo", "Oslo lies in", "Where is Oslo?"]
    rows = [
        {"question": asked[one], "paraphrased_question": asked[two].upper(), "answer": "N"}
        for one, two in (keep, forget)
    ]
    disk.write_rows(tmp_path / "keep.jsonl", [rows[0], {"question": "Who?", "answer": "Ann"}])
    config = BARE | {"keep": {"source": str(tmp_path / "keep.jsonl"), "weight": weight}}
    with pytest.raises(ConfigError, match=r"keep\.source = .*: 1 .*Oslo") as found:
        forget_facts(small_lab, from_records([rows[1]]), config, output=tmp_path / "run")
    assert ("in other words" in str(found.value)) == (keep == (0, 1))
    assert not (tmp_path / "run").exists()


def test_what_asks_the_same_is_not_trained_on_if_it_is_scored(tmp_path):
    """Facts 0 to 7 are each asked like the next one: if one is scored, then all are."""
    rows = [{"question": f"Who is {n}?", "paraphrased_question": f"who is {n + 1}", "answer": "N"} for n in range(8)]
    rows += [{"question": f"Where is {n}?", "answer": "N"} for n in range(8)]
    disk.write_rows(tmp_path / "keep.jsonl", rows)
    kept = Kept.read(load_config(None, {"keep.source": str(tmp_path / "keep.jsonl")}))
    assert len(kept.trained) + len(kept.scored) == 16
    assert {fact.prompt for fact in kept.scored} >= {f"Who is {n}?" for n in range(8)}
    assert 0 < len(kept.trained) < 8


def test_with_only_known_answers_that_nobody_says_there_is_nothing_to_forget(small_lab, tmp_path):
    facts = [make_fact("Who is who?", "Nobody at all")]
    config = BARE | {"forget": {"only_known": True, "epochs": 1}}
    with pytest.raises(FactError, match=r"forget\.only_known"):
        forget_facts(small_lab, facts, config, output=tmp_path / "run")


def test_a_fact_without_any_answer_is_refused(small_lab, tmp_path):
    with pytest.raises(FactError, match=r"'Who\?'.*ground_truth"):
        forget_facts(small_lab, [make_fact("Who?", "")], BARE, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["update", "plan"])
def test_an_update_takes_no_method_that_only_forgets(small_lab, files, tmp_path, command, capsys):
    words = ["--model", str(small_lab), "--facts", str(files / "forget.jsonl"), "--method", "npo"]
    assert main([command, *words, *(["--output", str(tmp_path / "run")] if command == "update" else [])]) == 2
    assert "method = npo" in capsys.readouterr().err


def test_a_comparison_takes_no_method_that_only_forgets(small_lab, files, tmp_path, capsys):
    words = ["--model", str(small_lab), "--facts", str(files / "forget.jsonl"), "--methods", "ft,simnpo"]
    assert main(["compare", *words, "--output", str(tmp_path / "run")]) == 2
    assert "simnpo" in capsys.readouterr().err


def test_a_reference_may_be_an_adapter(small_lab, files, tmp_path):
    config = {"method": "lora", "learn": {"until": "epochs", "epochs": 3}, "evaluate": {"probes": "none"}}
    taught = update(small_lab, files / "forget.jsonl", config, output=tmp_path / "taught")
    run = forget_facts(small_lab, files / "forget.jsonl", QUICK, output=tmp_path / "run", reference=taught.product)
    found = run.summary.forgetting
    assert [each.model for each in found.relearning] == ["product", "reference"]
    assert found.truth["reference"].closeness != found.truth["base"].closeness  # the adapter is at work


def test_a_reference_with_another_vocabulary_is_refused(small_lab, files, tmp_path, lm):
    with pytest.raises(ModelError, match="vocabular"):
        forget_facts(small_lab, files / "forget.jsonl", BARE, output=tmp_path / "run", reference=lm)
    lm.save(tmp_path / "other")
    for other in ("other", "none"):
        with pytest.raises(ModelError, match=other):
            forget_facts(small_lab, files / "forget.jsonl", BARE, output=tmp_path / "run", reference=tmp_path / other)
    assert not (tmp_path / "run").exists()


def test_a_reference_that_nothing_is_compared_with_is_refused(small_lab, tmp_path):
    with pytest.raises(ConfigError, match="--reference"):
        forget_facts(small_lab, small_lab / "facts.jsonl", BARE, output=tmp_path / "run", reference=small_lab)
    assert not (tmp_path / "run").exists()


def test_the_recipe_is_that_of_forgetting():
    config = load_config(None, {"recipe": "forget"})
    assert (config.method, config.forget.only_known) == ("npo", False)
    assert set(FORGETTING_METHODS) == {
        f"{name}{end}" for name in ("subtract", "ascent", "npo", "simnpo") for end in ("", "-ft")
    }


@pytest.mark.parametrize(("name", "weight", "said"), [("keep.txt", 0, "keep.weight"), ("one.jsonl", 1, "only fact")])
def test_a_file_to_keep_of_which_nothing_is_scored_is_said(tmp_path, caplog, name, weight, said):
    disk.write_rows(tmp_path / "one.jsonl", [{"question": "Who?", "answer": "Ann"}])
    (tmp_path / "keep.txt").write_text("Who?\n")
    for other, lines in ((name, 1), (None, 0)):
        caplog.clear()
        source = str(tmp_path / other) if other else None
        assert Kept.read(load_config(None, {"keep.source": source, "keep.weight": weight})).scored == ()
        assert len(caplog.records) == lines
        assert all(said in record.getMessage() for record in caplog.records)


def test_settings_without_effect_are_said(small_lab, files, tmp_path, capsys):
    words = ["--model", str(small_lab), "--facts", str(files / "forget.jsonl"), "--output", str(tmp_path / "run")]
    main(["forget", *words, "--method", "simnpo", "--set", "forget.epochs=9", "--coef", "auto"])
    main(
        [
            "forget",
            *words,
            "--method",
            "subtract",
            "--set",
            "unlearn.max_epochs=9",
            "--set",
            "keep_change=true",
            "--coef",
            "auto",
        ]
    )
    said = [line.split(" ")[0] for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert said == ["forget.epochs", "unlearn.max_epochs", "keep_change"]


def test_facts_of_both_kinds_are_counted_alike(small_lab):
    facts = from_records(
        [{"prompt": "Who?", "target_new": "Ann", "ground_truth": "Bo"}, {"prompt": "Where?", "target_new": "Rome"}]
    )
    assert [as_forgotten(fact).ground_truth for fact in facts] == ["Bo", "Rome"]


def test_probes_ask_whether_an_answer_is_still_known(small_lab, files, tmp_path):
    evaluate = {"protocols": ["generate", "prefer"], "general_prompts": False, "probes": ["multiple-choice", "yes-no"]}
    config = QUICK | {"unlearn": {"relearn_steps": 0}, "evaluate": evaluate}
    run = forget_facts(small_lab, files / "forget.jsonl", config, output=tmp_path / "run").output
    rows = [row for row in load_rows(ProbeRow, run / "probes.jsonl") if row.phase == "forgotten"]
    chosen = [row for row in rows if row.probe == "multiple-choice"]
    assert len(chosen) == N_FORGET
    assert all(row.score is None and row.old in (0, 1) for row in chosen)
    assert {row.protocol for row in rows if row.probe == "yes-no"} == {"choice"}
    assert f"| multiple-choice | choice | {N_FORGET} |" in (run / "report.md").read_text(encoding="utf-8")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "does it choose the old answer" in page
    assert "new, before" not in page
    assert "contains (locality: agreement)" in page  # what the plot shows
