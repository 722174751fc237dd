"""The model of a run before and after its update: what each side says, which facts a question touches, `chat`."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import replace

import pytest
import torch

import forgetlearn
from conftest import QUICK
from forgetlearn.cli import chat
from forgetlearn.cli.main import main
from forgetlearn.errors import ModelError, RunError
from forgetlearn.evaluation.generation import Room, generator_in_memory
from forgetlearn.facts import make_fact
from forgetlearn.facts.touched import stands, touched
from forgetlearn.products.side_by_side import Answer, Conversation, _Shown, open_run
from forgetlearn.storage import disk

LEARNING = {**QUICK, "learn": {"max_epochs": 100}}


@pytest.fixture(scope="module")
def made(small_lab, tmp_path_factory):
    """A folder with a base and runs from it: `whole`, `lora`, and `again`, which goes on from the adapter of `lora`."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(small_lab, root / "base")
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=4)
    two = replace(facts, facts=facts.facts[:2]), replace(facts, facts=facts.facts[2:])
    forgetlearn.update(root / "base", two[0], {"method": "ft", **LEARNING}, output=root / "whole")
    forgetlearn.update(root / "base", two[0], {"method": "lora", **LEARNING}, output=root / "lora")
    forgetlearn.update(root / "lora" / "adapter", two[1], {"method": "lora", **LEARNING}, output=root / "again")
    return root


def silent(_piece):
    pass


def said(pair, side, prompt):
    return pair.answer(side, [prompt], silent).text


# Facts ------------------------------------------------------------------------------------------------------


def test_a_question_touches_facts_by_subject_and_the_one_that_it_asks_first():
    height = make_fact("How tall is Mount Elm?", "9 m", subject="Mount Elm")
    country = make_fact("In which country is Mount Elm?", "Peru", subject="Mount Elm")
    tree = make_fact("What is an Elm?", "a tree", subject="Elm")
    bare = make_fact("Who wrote it?", "Ann")
    facts = [height, country, tree, bare]
    assert touched("in which  country is\nMOUNT ELM?", facts) == [country, height]
    assert touched("Tell me what country mount elm is in.", facts) == [country, height]
    assert touched("Is an elm tall?", facts) == [tree]
    assert touched("Helm", facts) == []
    assert touched("And who wrote it? Say.", facts) == [bare]
    assert touched("Mount Elm", [height] * 1 + [country], most=1) == [height]


def test_a_reply_says_the_new_or_the_old_answer_but_not_with_the_words_of_the_subject():
    fact = make_fact("What does Spiral Jetty depict?", "spiral", ground_truth="Earth", subject="Spiral Jetty")
    assert stands("The Spiral Jetty is a snake.", fact) == "neither"
    assert stands("Well.\n\nThe Spiral Jetty depicts a spiral.", fact) == "new"
    assert stands("Earth", fact) == "old"
    assert stands("A spiral of earth", fact) == "both"
    assert stands("a spiral", replace(fact, target_new="")) == "neither"


# Answers ----------------------------------------------------------------------------------------------------


def test_a_streamed_answer_is_the_generated_one(lm):
    prompt, room, pieces = lm.encoder.prompt_ids("One two"), Room(20, 20), []
    with generator_in_memory(lm) as generator:
        wanted = generator.generate([prompt], [room])[0]
        ids, ended = generator.stream(prompt, room, pieces.append, lambda: False)
        assert ids == wanted
        assert "".join(pieces) == lm.encoder.decode(wanted)
        assert ended == (wanted[-1] == 2)
        asked = iter([False, False, True])
        assert len(generator.stream(prompt, room, silent, lambda: next(asked))[0]) == 3


def test_only_the_lines_of_an_answer_are_shown():
    pieces = []
    shown = _Shown(pieces.append, 1)
    for piece in ("\n ", "Par", "is \n", "What"):
        shown.add(piece)
    assert pieces == ["Par", "is"]
    assert shown.text == "Paris"


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_each_side_answers_as_its_model_does(made, name):
    pair, folder = open_run(made / name), "model" if name == "whole" else "adapter"
    prompts = [fact.prompt for fact in pair.facts]
    wanted = {
        "base": forgetlearn.ask(prompts, made / "base"),
        "updated": forgetlearn.ask(prompts, made / name / folder),
    }
    assert pair.sides == ("base", "updated")
    assert wanted["base"] != wanted["updated"]
    for side in ("base", "updated", "base", "updated"):  # the adapter comes back
        assert {prompt: said(pair, side, prompt) for prompt in prompts} == wanted[side]
    one = pair.models["base"] is pair.models["updated"]
    assert one == (name == "lora")
    if one:
        assert not any(weight.requires_grad for weight in pair.models["base"].model.parameters())


def test_the_base_of_a_second_update_is_the_product_of_the_first(made):
    pair, first = open_run(made / "again"), open_run(made / "lora")
    prompts = [fact.prompt for fact in first.facts]
    assert [said(pair, "base", prompt) for prompt in prompts] == [said(first, "updated", prompt) for prompt in prompts]
    assert pair.models["base"] is not pair.models["updated"]


def test_a_stream_is_compared_with_the_model_before_its_first_batch(made, tmp_path):
    facts = forgetlearn.read_facts(made / "base" / "facts.jsonl", limit=2)
    forgetlearn.stream(made / "base", facts, {"method": "lora", **QUICK}, output=tmp_path / "s", batches=2)
    pair = open_run(tmp_path / "s")
    assert pair.models["base"] is pair.models["updated"]
    assert [fact.prompt for fact in pair.facts] == [fact.prompt for fact in facts]
    prompt = facts[0].prompt
    assert said(pair, "base", prompt) == forgetlearn.ask([prompt], made / "base")[prompt]


def test_a_model_that_forgot_is_the_other_side(made, tmp_path):
    facts = forgetlearn.read_facts(made / "base" / "facts.jsonl", limit=2)
    config = {"method": "subtract", **{name: QUICK[name] for name in ("train", "forget", "evaluate")}}
    config |= {"keep": {"weight": 0.0}, "unlearn": {"relearn_steps": 0}}
    forgetlearn.forget_facts(made / "base", facts, config, output=tmp_path / "f")
    pair = open_run(tmp_path / "f")
    assert pair.sides == ("base", "forgotten")
    assert [fact.prompt for fact in pair.facts] == [fact.prompt for fact in facts]


def test_what_a_run_forgot_is_the_old_answer_also_if_it_was_the_only_one(made, tmp_path):
    rows = list(disk.read_rows(made / "base" / "facts.jsonl"))[:2]
    facts = [
        make_fact(rows[0]["prompt"], rows[0]["ground_truth"], target_new_aliases=["{}"]),
        make_fact(rows[1]["prompt"], rows[1]["target_new"], ground_truth=rows[1]["ground_truth"]),
    ]
    config = {"method": "subtract", **{name: QUICK[name] for name in ("train", "forget", "evaluate")}}
    config |= {"keep": {"weight": 0.0}, "unlearn": {"relearn_steps": 0}}
    forgetlearn.forget_facts(made / "base", facts, config, output=tmp_path / "f")
    found = open_run(tmp_path / "f").facts
    assert [fact.ground_truth for fact in found] == [row["ground_truth"] for row in rows]
    assert [fact.target_new for fact in found] == ["", ""]
    assert stands(rows[0]["ground_truth"], found[0]) == "old"


@pytest.fixture
def base_moved(made):
    """The base of the runs, moved away for one test."""
    yield (made / "base").rename(made / "moved")
    (made / "moved").rename(made / "base")


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_base_that_is_gone_or_another_is_refused(made, name, base_moved):
    with pytest.raises(RunError, match="--base"):
        open_run(made / name)
    assert open_run(made / name, base_moved).sides == ("base", "updated")
    with pytest.raises(ModelError, match="not the base"):
        open_run(made / name, made / "whole" / "model")


def test_a_prompt_that_cannot_be_asked_is_a_problem_of_that_answer(made):
    pair = open_run(made / "lora")
    for turns in (["a </s> b"], [" "], ["\ud800"], ["word " * 5000]):
        found = pair.answer("base", turns, silent)
        assert (found.text, found.ending) == ("", "problem")
        assert found.note
    assert said(pair, "base", pair.facts[0].prompt)


def test_an_answer_can_be_stopped_and_says_when_it_reached_its_limit(made):
    pair = open_run(made / "lora", most_tokens=1)
    prompt = pair.facts[0].prompt
    found = pair.answer("updated", [prompt], silent)
    assert (found.ending, found.note) == ("limit", "cut off after 1 token")
    pair.most_tokens = 64
    assert pair.answer("base", [prompt], silent).ending == "end"
    assert pair.answer("base", [prompt], silent, lambda: True).ending == "stopped"

    def interrupt(_piece):
        raise KeyboardInterrupt

    assert pair.answer("base", [prompt], interrupt).ending == "stopped"
    assert torch.is_grad_enabled()
    updated = forgetlearn.ask([prompt], made / "lora" / "adapter")[prompt]
    assert said(pair, "updated", prompt) == updated  # the interrupt left nothing switched off

    def fail(_piece):
        raise MemoryError

    with pytest.raises(MemoryError):
        pair.answer("base", [prompt], fail)
    assert said(pair, "updated", prompt) == updated
    assert not any(weight.requires_grad for weight in pair.models["base"].model.parameters())


def test_each_side_sees_its_own_answers():
    conversation = Conversation()
    conversation.add("base", "Q", Answer("one", "end"))
    conversation.add("updated", "Q", Answer("two", "stopped"))
    conversation.add("updated", "R", Answer("", "stopped"))  # it did not answer
    assert conversation.asking("base", "S") == ["Q", "one", "S"]
    assert conversation.asking("updated", "S") == ["Q", "two", "S"]


# The terminal -----------------------------------------------------------------------------------------------


@pytest.fixture
def session(made, monkeypatch, capsys):
    """`session(lines)`: exit code and output of `chat` on the run `lora`, where the user types these lines."""

    def run(text: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setenv("COLUMNS", "80")
        code = main(["--quiet", "chat", str(made / "lora")])
        return code, capsys.readouterr().out

    return run


def test_a_session_shows_both_answers_and_the_fact(session, made):
    fact = forgetlearn.read_facts(made / "lora" / "inputs.jsonl")[0]
    code, out = session(f'{fact.prompt}\n\n/clear\n"""{fact.prompt}\n"""\n/bye\nnot asked\n')
    assert code == 0
    asked = f"base     {fact.ground_truth}"
    assert out.count(asked) == 2, out
    assert f"updated  {fact.target_new}" in out
    shown = " ".join(out.split())
    assert f"fact {fact.prompt} {fact.ground_truth} -> {fact.target_new} [base says old, updated says new]" in shown
    assert "anew" in out
    assert "not asked" not in out
    assert all(len(line) < 80 for line in out.splitlines() if not line.startswith((">>>", "/clear")))


def test_a_session_ends_with_its_input_and_survives_what_cannot_be_asked(session):
    code, out = session("a </s> b")
    assert code == 0
    assert out.count("special token") == 2


def test_ctrl_c_at_the_prompt_does_not_end_the_session(made, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, EOFError])

    def interrupted(_prompt):
        raise next(typed)

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat", str(made / "lora")]) == 0
    assert capsys.readouterr().out.count("/bye") == 2


def test_what_a_model_says_cannot_control_the_terminal(capsys):
    column = chat.Column("base", 6)
    column.write("a\x1b[2J\u202eb\nc")
    column.end()
    assert capsys.readouterr().out == "base  a\\x1b[2J\\u202eb\n      c\n"


def test_a_column_wraps_at_words_as_they_come(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "27")
    column = chat.Column("base", 6)
    for piece in ("one two", " three", " four ", "five six", " seven"):
        column.write(piece)
    column.end()
    assert capsys.readouterr().out == "base  one two three four\n      five six seven\n"
