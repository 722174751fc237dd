"""Methods that change no weight: a new fact stands in the prompt of what is asked, the fact's own or the nearest."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.comparison.cells import CompareSettings, cells_of
from forgetlearn.comparison.grid import fill
from forgetlearn.comparison.table import write_table
from forgetlearn.config.schema import EvaluateSettings, StageSettings, load_config
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError
from forgetlearn.evaluation import scoring
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.facts import make_fact, read_facts
from forgetlearn.facts.fact import LocalityProbe
from forgetlearn.method import in_context, lessons
from forgetlearn.method.core import learn
from forgetlearn.method.kinds import STAGE_KINDS
from forgetlearn.models.language_model import load_model, wrap
from forgetlearn.planning.plan import plan_update
from forgetlearn.report.comparison_page import verdict
from forgetlearn.runs.update import update
from forgetlearn.storage.disk import read_json
from forgetlearn.storage.records import Row, load_rows
from forgetlearn.weights.task_vector import snapshot

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS = EvaluateSettings(protocols=("token", "generate"), max_new_tokens=4)
FACTS = [
    make_fact(
        "Who rules Oz?",
        "Ann",
        ground_truth="Bob",
        rephrase_prompts=["Oz is ruled by"],
        locality=[LocalityProbe("Who swims?", "Eve")],
    ),
    make_fact("The king of Ur is", "Carl", ground_truth="Dan", rephrase_prompts=["Who is Ur's king?"]),
]
METHODS = ("in-context", "retrieval")


def asked(kind, lm, facts=FACTS, scored=None):
    return STAGE_KINDS[kind].asked(lm, facts, facts if scored is None else scored, SETTINGS)


def test_everything_that_is_asked_about_a_fact_stands_behind_the_fact(lm):
    first, second = asked("in context", lm)
    before = "New information: Who rules Oz? Ann\n\n"
    assert in_context.questions(first) == [before + end for end in ("Who rules Oz?", "Oz is ruled by", "Who swims?")]
    assert second.prompt == "New information: The king of Ur is Carl\n\nThe king of Ur is"
    assert [(fact.id, fact.new_answers, fact.old_answers) for fact in (first, second)] == [
        (fact.id, fact.new_answers, fact.old_answers) for fact in FACTS
    ]
    assert first.locality[0].answer == "Eve"


def test_retrieval_shows_the_nearest_of_all_facts_whichever_fact_is_asked_about(lm):
    """A fact's own prompt is nearest to itself, and a probe gets a fact too."""
    others = [make_fact(f"Where is the town number {number}?", f"at {number}") for number in range(12)]
    found = in_context.nearest(lm, [*others, *FACTS], [fact.prompt for fact in (*others, *FACTS)], SETTINGS)
    assert all(fact.prompt == prompt for prompt, fact in found.items())
    stranger = make_fact(
        "Who rules Oz?", "x", rephrase_prompts=[FACTS[1].prompt], locality=[LocalityProbe("Who?", "me")]
    )
    (shown,) = asked("retrieval", lm, scored=[stranger])
    assert shown.prompts == tuple(in_context.with_fact(fact, fact.prompt) for fact in FACTS)
    assert shown.locality[0].prompt in {in_context.with_fact(fact, "Who?") for fact in FACTS}
    (alone,) = asked("retrieval", lm, FACTS[:1])
    assert in_context.questions(alone) == in_context.questions(asked("in context", lm)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_a_direction_is_the_mean_of_the_unit_states_of_the_prompts_own_tokens(tiny_model, char_tokenizer, family):
    """Half of the two layers is the first. BOS stands before each prompt, and is no token of its own."""
    lm = wrap(tiny_model(family), char_tokenizer)
    prompts = ["Who rules Oz?", "Who rules", "The king of Ur is", "a"]
    found = Scorer(lm).directions(prompts)
    for prompt in prompts:
        ids = lm.encoder.prompt_ids(prompt)
        with torch.no_grad():
            states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, 1:]
        expected = torch.stack([state / state.norm() for state in states.double()]).mean(0)
        assert torch.allclose(found[prompt], expected, atol=1e-5)


def test_with_a_chat_template_the_fact_stands_in_the_users_turn(tiny_model, new_char_tokenizer):
    lm = wrap(tiny_model(), new_char_tokenizer(chat_template=CHAT))
    (shown, _other) = asked("in context", lm)
    assert lm.encoder.prompt_text(shown.prompt) == f"<user>{shown.prompt}</s><assistant>"
    own = lm.encoder.own_places("Who?")
    assert lm.encoder.decode(lm.encoder.prompt_ids("Who?")[own.start : own.stop]) == "Who?"
    assert in_context.questions(asked("retrieval", lm, FACTS[:1])[0]) == in_context.questions(shown)
    assert not [row for row in scoring.score(lm, [shown], phase="updated", settings=SETTINGS) if row.errors]


@pytest.mark.parametrize("template", [None, CHAT])
def test_the_tokens_added_are_those_of_the_fact(tiny_model, new_char_tokenizer, template):
    """A token per character."""
    lm = wrap(tiny_model(), new_char_tokenizer(chat_template=template))
    shown = asked("in context", lm)
    rows = scoring.score(lm, shown, phase="updated", settings=SETTINGS)
    counted = {row.fact: row.added_tokens for row in in_context.with_cost(rows, lm.encoder, FACTS, shown)}
    expected = [len(f"New information: {fact.prompt} {fact.target_new}\n\n") for fact in FACTS]
    assert counted == {fact.id: float(count) for fact, count in zip(FACTS, expected, strict=True)}
    assert all(row.added_tokens is None for row in in_context.with_cost(rows, lm.encoder, FACTS, FACTS))


@pytest.mark.parametrize("kind", ["in context", "retrieval"])
def test_a_question_too_long_behind_its_fact_is_an_errored_row(lm, kind):
    """The model's context is 256 tokens; the fact alone fits, and behind itself it does not."""
    long = make_fact("Who " + "x" * 150 + "?", "Ann", locality=[LocalityProbe("y" * 300, "Bob")])
    (shown,) = asked(kind, lm, [long])
    rows = scoring.score(lm, [shown], phase="updated", settings=SETTINGS)
    summary = scoring.summarise(rows)
    assert {mean.errored for mean in (*summary["reliability"].values(), *summary["locality"].values())} == {1}
    assert {mean.n for mean in (*summary["reliability"].values(), *summary["locality"].values())} == {0}


@pytest.mark.parametrize("kind", ["in context", "retrieval"])
def test_no_weight_changes(lm, kind):
    base, dtypes = snapshot(lm.model), {weight.dtype for weight in lm.model.parameters()}
    log = learn(lm, FACTS, StageSettings(), kind)
    asked(kind, lm)
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(lm.model).items())
    assert {weight.dtype for weight in lm.model.parameters()} == dtypes
    assert (log.steps, log.epochs) == ((), None)


@pytest.mark.parametrize("method", METHODS)
def test_update_refuses_and_names_compare(small_lab, tmp_path, capsys, method):
    where = ["--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--method", method]
    for command in (["update", "--output", str(tmp_path / "out")], ["plan"]):
        assert main([*command, *where]) == 2
        assert f"method = {method}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"compare --methods {method}"):
        update(small_lab, small_lab / "facts.jsonl", {"method": method}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_what_a_comparison_does_has_no_stage_that_trains(small_lab):
    config = load_config(None, {"model.name": str(small_lab), "method": "retrieval"})
    assert not Stages(config).changes_base
    plan = plan_update(config, read_facts(small_lab / "facts.jsonl", limit=3))
    assert [(stage.name, stage.trained) for stage in plan.stages] == [("score", 0), ("general", 0), ("probes", 0)]
    assert plan.disk == {}


# In a comparison -------------------------------------------------------------------------------------------


def test_a_comparison_asks_once_however_many_epochs_it_compares():
    settings = CompareSettings(methods=("ft", *METHODS), seeds=(0, 1), epochs=(1, 4))
    cells = [cell for cell in cells_of(settings, load_config()) if cell.method in METHODS]
    assert [(cell.name, cell.epochs) for cell in cells] == [
        (f"{method}-seed{seed}", 4) for seed in (0, 1) for method in METHODS
    ]


@pytest.fixture(scope="module")
def filled(small_lab, tmp_path_factory):
    """A comparison of both methods and `ft` on eight facts with two seeds; its settings, facts and config."""
    facts = read_facts(small_lab / "facts.jsonl", limit=8)
    config = load_config(None, {"model.name": str(small_lab)} | QUICK)
    settings = CompareSettings(methods=("ft", *METHODS), seeds=(0, 1))
    output = tmp_path_factory.mktemp("compare") / "out"
    fill(small_lab, facts, settings, config, output=output)
    return output, settings, facts, config


def test_what_is_scored_is_the_base_behind_the_fact(filled, small_lab):
    output, _settings, facts, config = filled
    lm = load_model(str(small_lab))
    base = scoring.locality_predictions(load_rows(Row, output / "shared" / "base" / "rows.jsonl"))
    for method, kind in zip(METHODS, ("in context", "retrieval"), strict=True):
        shown = asked(kind, lm, facts.facts)
        wanted = scoring.score(lm, shown, phase="updated", settings=config.evaluate, reference=base)
        wanted = in_context.with_cost(wanted, lm.encoder, facts.facts, shown)
        for seed in (0, 1):
            rows = load_rows(Row, output / "cells" / f"{method}-seed{seed}" / "facts.jsonl")
            found = [row for row in rows if row.phase == "updated"]
            assert [row.as_json() | {"old_from": None} for row in found] == [
                {key: value for key, value in row.as_json().items() if key != "predicted"} | {"old_from": None}
                for row in wanted
            ]


def test_the_table_and_its_pages_say_what_it_costs(filled, small_lab, capsys):
    output, _settings, facts, _config = filled
    table = write_table(output)
    added = {row.label: row.added_tokens for row in table.rows}
    encoder = load_model(str(small_lab)).encoder
    longer = []  # by fact, each of which counts once, whatever is asked about it
    for fact in facts:
        lengths = [
            [len(encoder.prompt_ids(text)) for text in (asked, in_context.with_fact(fact, asked))]
            for asked in in_context.questions(fact)
        ]
        longer.append(sum(shown - bare for bare, shown in lengths) / len(lengths))
    assert added["ft-1epochs"] is None
    assert added["in-context"] == pytest.approx(sum(longer) / len(longer))
    assert all(list(row.against) == ["equal-epochs"] for row in table.rows if row.method in METHODS)
    unscored = table.rows[0].model_copy(update={"overall": None})
    sentence, remarks = verdict(table.model_copy(update={"rows": [unscored, table.rows[1]]}))
    assert "against ft, an interval" in sentence  # with no word about epochs
    assert remarks[0].startswith("Against ft, in points")
    for page in ("compare.md", "report.html"):
        text = (output / page).read_text()
        assert f"{added['in-context']:.1f}" in text
        assert f"{added['retrieval']:.1f}" in text
    assert json.loads((output / "compare.json").read_text())["rows"][1]["added_tokens"] == added["in-context"]
    folder = output / "cells" / "in-context-seed0"
    assert main(["report", str(folder)]) == 0
    summary = read_json(folder / "summary.json")
    assert (summary["method"], summary["product"]) == ("in-context", None)
    assert "lessons" not in summary


def test_without_a_method_that_trains_the_base_is_asked_for_nothing_to_train_on(small_lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "make_material", None)
    facts = read_facts(small_lab / "facts.jsonl", limit=2)
    config = load_config(None, {"model.name": str(small_lab), "evaluate.protocols": ["token"]})
    settings = CompareSettings(methods=METHODS, seeds=(0,))
    assert len(fill(small_lab, facts, settings, config, output=tmp_path / "out")) == 2
    table = write_table(tmp_path / "out")
    assert [each.method for each in table.unpaired] == list(METHODS)


def test_resume_makes_a_lost_cell_again_with_the_same_bytes(filled, small_lab, monkeypatch):
    output, settings, facts, config = filled
    folder = output / "cells" / "retrieval-seed1"
    before = {name: (folder / name).read_bytes() for name in ("facts.jsonl", "summary.json")}
    folder.rename(output.parent / "lost")
    monkeypatch.setattr(scoring, "score", None)  # what other seeds asked is not asked again
    fill(small_lab, facts, settings, config, output=output, resume=True)
    assert before == {name: (folder / name).read_bytes() for name in before}
