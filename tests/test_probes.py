"""What is asked beyond rephrasings, how it is judged, and what a run shows of it."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest

from forgetlearn.cli.main import main
from forgetlearn.config.schema import EvaluateSettings, load_config
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.evaluation import probe_scoring, probes
from forgetlearn.evaluation.probes import Asked, Maker
from forgetlearn.evaluation.scorer import Failure, Generated, Reading, Scorer
from forgetlearn.facts import LocalityProbe, Probe, from_records, make_fact, write_facts
from forgetlearn.report import run_page
from forgetlearn.report.probes import matrix
from forgetlearn.runs.update import update
from forgetlearn.storage.records import ProbeRow, Row, Summary, load_rows

ALL_PROBES = True
ANN = make_fact("Who made it?", "Ann B", ground_truth="Cy", locality=(LocalityProbe("What is up?", "sky"),))
ROME = make_fact("Where is it?", "Rome", ground_truth="Oslo")
LIMA = make_fact("It lies in", "Lima")
FACTS = [ANN, ROME, LIMA]
HOP = Probe("2-hop", "Where does its maker live?", ("Bonn",), ("Rome",))
SETTINGS = EvaluateSettings()


def made(name, fact, lm, seed=0, facts=FACTS):
    return list(probes.MADE[name](Maker(facts, lm.encoder, seed), fact))


# What is asked


def test_a_multiple_choice_has_both_answers_and_wrong_ones(lm):
    letter, text = made("multiple-choice", ANN, lm)
    assert len(letter.shown) == 4
    assert {"Ann B", "Cy"} < set(letter.shown)
    assert set(letter.shown) - {"Ann B", "Cy"} < {"Rome", "Oslo", "Lima"}
    (right,), (old,) = letter.answers, letter.old_answers
    assert letter.shown[letter.options.index(right)] == "Ann B"
    assert letter.shown[letter.options.index(old)] == "Cy"
    assert all(
        f"\n{name}. {shown}\n" in letter.prompt for name, shown in zip(letter.options, letter.shown, strict=True)
    )
    assert (text.answers, text.old_answers, set(text.options)) == (("Ann B",), ("Cy",), set(letter.shown))


def test_the_order_of_options_depends_on_the_seed_alone(lm):
    orders = {made("multiple-choice", ANN, lm, seed)[0].shown for seed in range(20)}
    assert len(orders) > 5
    assert made("multiple-choice", ANN, lm, 3) == made("multiple-choice", ANN, lm, 3)


def test_wrong_options_are_of_the_same_kind_where_there_are_such(lm):
    asked = make_fact("What is the capital of Peru?", "Cusco")
    alike = [make_fact(f"What is the capital of X{n}?", f"City {n}") for n in range(3)]
    others = [make_fact(f"Which colour has Y{n}?", f"Hue {n}") for n in range(20)]
    (letter, _text) = made("multiple-choice", asked, lm, facts=[*others, asked, *alike])
    assert set(letter.shown) == {"Cusco", "City 0", "City 1", "City 2"}


def test_one_fact_alone_has_no_multiple_choice(lm):
    assert made("multiple-choice", LIMA, lm, facts=[LIMA]) == []
    assert len(made("multiple-choice", ROME, lm, facts=[ROME])[0].options) == 2  # the new and the old answer


def test_there_are_at_most_as_many_options_as_letters():
    probe = {"kind": "multiple-choice", "prompt": "Who?", "answer": "Ann"}
    for number in (26, 27):
        record = {"prompt": "Who?", "target_new": "Ann", "probes": [probe | {"options": ["Ann", *range(1, number)]}]}
        with nullcontext() if number == 26 else pytest.raises(FactError, match="27"):
            from_records([record])


def test_the_options_of_the_file_win(lm):
    options = ("Ann B", "Di", "Ed", "Cy")
    fact = replace(ANN, probes=(Probe("multiple-choice", "Made by whom?", ("Ann B",), ("Cy",), options),))
    letter, _text = made("multiple-choice", fact, lm)
    assert set(letter.shown) == set(options)
    assert letter.prompt.startswith("Made by whom?")


@pytest.mark.parametrize(("probe", "about_new", "about_old"), [("yes-no", "Yes", "No"), ("negation", "No", "Yes")])
def test_yes_and_no(lm, probe, about_new, about_old):
    new, old = made(probe, ANN, lm)
    assert ('"Ann B"' in new.prompt, '"Cy"' in old.prompt) == (True, True)
    assert (new.answers, old.answers) == ((about_new,), (about_old,))
    assert new.options == old.options == ("Yes", "No")
    _new, wrong = made(probe, LIMA, lm)  # without an old answer, the other question is about a wrong one
    assert wrong.answers == (about_old,)
    assert wrong.prompt.startswith('"It lies in ')


def test_neighbours_stand_behind_the_new_fact(lm):
    (asked,) = made("neighbours", ANN, lm)
    assert asked.prompt == "Who made it? Ann B. What is up?"
    assert (asked.options, asked.answers) == (("sky", "Ann B"), ("sky",))
    same = replace(ANN, locality=(LocalityProbe("Who else?", "Ann B"),))
    assert made("neighbours", same, lm) == []  # its answer is no other


def test_other_questions_on_the_subject_name_it_and_not_its_answer(lm):
    fact = make_fact("Where was Ada Roe born?", "Rome", subject="Ada Roe")
    asked = made("same-subject", fact, lm)
    assert len(asked) == len(probes.OTHER_QUESTIONS)
    assert all("Ada Roe" in each.prompt and each.answers == ("Rome",) and not each.options for each in asked)
    named = replace(fact, prompt="Where was Ada Roe of Rome born?", subject="Ada Roe of Rome")
    assert made("same-subject", named, lm) == []  # any reply that repeats the subject would give the answer
    assert made("same-subject", ROME, lm) == []  # it names nothing
    shared = replace(fact, subject="", rephrase_prompts=("Which place did Ada Roe come from?",))
    assert all("Ada Roe" in each.prompt for each in made("same-subject", shared, lm))


def test_a_long_prompt_leaves_half_of_the_context(lm):
    lm.encoder.max_length = 2000
    (asked,) = made("long-prompt", ROME, lm)
    assert asked.prompt.endswith(f"\n\n{ROME.prompt}")
    assert 0 < len(lm.encoder.prompt_ids(asked.prompt)) <= 1000 + len(ROME.prompt) + 2
    lm.encoder.max_length = 100
    assert made("long-prompt", ROME, lm) == []


def test_what_the_file_brings_is_asked_as_it_is(lm):
    yes = Probe("yes-no", "Did Ann make it?", ("Yes",), ("No",))
    own = Probe("mine", "Which?", ("a",), options=("a", "b"))
    fact = replace(ANN, probes=(HOP, yes, own))
    hop, choice, mine = Maker([fact], lm.encoder, 0).brought(fact)
    assert hop == Asked(fact.id, "2-hop", HOP.prompt, ("Bonn",), ("Rome",))
    assert (choice.prompt, choice.options) == ("Did Ann make it?", ("Yes", "No"))
    assert (mine.probe, mine.options) == ("mine", ("a", "b"))
    assert made("yes-no", fact, lm) == []


def test_only_what_is_wanted_and_can_be_judged_is_asked(lm):
    facts = [replace(ANN, probes=(HOP,)), ROME]

    def kinds(**settings):
        asked = probes.questions(facts, lm.encoder, EvaluateSettings(**settings), 0, {ROME.id: "It is in"})
        return {each.probe for each in asked}

    everything = kinds(probes=("all",))
    assert everything == {*probes.MADE, "multiple-choice-text", "2-hop", "completion"} - {"long-prompt", "same-subject"}
    assert kinds() == everything
    assert kinds(probes=("2-hop", "multiple-choice")) == {"2-hop", "multiple-choice", "multiple-choice-text"}
    assert kinds(probes=("none",)) == set()
    assert kinds(protocols=("prefer",)) == {
        each for each in everything if each not in ("2-hop", "completion", "second-turn")
    }
    assert kinds(protocols=("token",)) == set()


def test_by_default_each_kind_asks_about_some_facts_which_the_seed_draws(lm, monkeypatch):
    monkeypatch.setattr(probes, "ENOUGH", 4)
    plain = [make_fact(f"What is number {n}?", f"new {n}", ground_truth=f"old {n}") for n in range(9)]
    bring = [replace(fact, probes=(Probe("2-hop", f"And {fact.prompt}", ("x",)),)) for fact in plain[:5]]
    facts = [*bring, *plain[5:]]

    def about(chosen, seed=0):
        found: dict[str, set[str]] = {}
        for each in probes.questions(facts, lm.encoder, EvaluateSettings(probes=chosen), seed):
            found.setdefault(each.probe, set()).add(each.fact)
        return found

    some = about(("auto",))
    assert {len(own) for own in some.values()} == {4}
    assert some["yes-no"] == some["multiple-choice"] == some["second-turn"]
    assert some["2-hop"] <= {fact.id for fact in bring}
    assert some == about(("auto",))
    assert some != about(("auto",), seed=1)
    assert len(about(("all",))["yes-no"]) == len(facts)
    assert len(about(("yes-no",))["yes-no"]) == len(facts)


def test_a_kind_that_nothing_has_is_an_error():
    probes.check([replace(ANN, probes=(HOP,))], EvaluateSettings(probes=("2-hop",)))
    with pytest.raises(ConfigError, match=r"evaluate\.probes = 3-hop"):
        probes.check([replace(ANN, probes=(HOP,))], EvaluateSettings(probes=("3-hop",)))
    with pytest.raises(ConfigError, match=r"evaluate\.probes"):
        load_config(None, {"evaluate.probes": "all,2-hop"})


def test_a_statement_is_a_sentence_up_to_the_answer_at_its_end():
    assert probes.statement(ROME, "It is in Rome.") == "It is in"
    assert probes.statement(ROME, "Rome is where it is.") is None
    assert probes.statement(ROME, "Rome.") is None
    asks = replace(ROME, rephrase_prompts=("Its place is",))
    settings = EvaluateSettings(probes=("all",))
    assert probes.to_state([ROME, asks, LIMA], settings) == [ROME]  # the others come as unfinished sentences
    assert probes.to_state([ROME], SETTINGS) == []


# How it is judged


class Stub:
    """Answers every prompt by `says`, and finds the options in `likely` the likelier, the earlier they stand."""

    def __init__(self, monkeypatch, says="", likely=()):
        def read(_self, pairs):
            def logprob(option):
                return -float(likely.index(option)) if option in likely else -100.0

            return {pair: Reading((1,), (1,), logprob(pair[1])) for pair in pairs}

        monkeypatch.setattr(Scorer, "read", read)
        monkeypatch.setattr(
            Scorer,
            "say",
            lambda _self, prompts, rooms=None: {
                prompt: says if isinstance(says, Failure) else Generated(says, False) for prompt in prompts
            },
        )


def score_of(lm, asked):
    return probe_scoring.score(lm, asked, SETTINGS, "updated")


def test_free_answers_say_the_new_or_the_old_one(lm, monkeypatch):
    asked = [Asked(ANN.id, "2-hop", HOP.prompt, HOP.answers, HOP.old_answers)]
    for says, score, old in (("She lives in Bonn.", 1, 0), ("In Rome.", 0, 1), ("Nowhere", 0, 0)):
        Stub(monkeypatch, says)
        (row,) = score_of(lm, asked)
        assert (row.said, row.score, row.old, row.protocol) == (says, score, old, "contains")
    brought = replace(asked[0], probe="same-subject")  # a name of the file's own
    Stub(monkeypatch, "She lives in Bonn.")
    assert [(row.score, row.protocol) for row in score_of(lm, [brought])] == [(1, "contains")]
    Stub(monkeypatch, Failure("too long"))
    (row,) = score_of(lm, asked)
    assert (row.score, row.old, row.error) == (None, None, "too long")


def test_the_new_answer_is_wrong_in_reply_to_another_question(lm, monkeypatch):
    fact = make_fact("Where was Ada Roe born?", "Rome", ground_truth="Oslo", subject="Ada Roe")
    asked = made("same-subject", fact, lm)
    for says, score in (("In Rome, in 1902.", 0), ("In 1902.", 1)):
        Stub(monkeypatch, says)
        rows = score_of(lm, asked)
        assert {(row.score, row.old, row.protocol) for row in rows} == {(score, None, "absent")}
    (line,) = matrix({"updated": probe_scoring.summarise(rows, 1)}, rows, ["updated"])
    assert (line.new[0].mean, line.old[0].n, line.texts[0].right) == (100.0, 0, "anything but Rome")


def test_the_likeliest_option_is_chosen(lm, monkeypatch):
    asked = made("multiple-choice", ANN, lm)
    Stub(monkeypatch, likely=["Ann B", "Cy", *asked[0].answers])
    letter, text = score_of(lm, asked)
    assert (letter.score, letter.old, text.score, text.old) == (1, 0, 1, 0)
    assert letter.said == f"{asked[0].answers[0]}. Ann B"
    Stub(monkeypatch, likely=["Cy", "Ann B", *asked[0].old_answers])
    letter, text = score_of(lm, asked)
    assert (letter.score, letter.old, text.score, text.old) == (0, 1, 0, 1)


def test_a_leaning_to_yes_is_no_knowledge_by_choice_nor_by_prefer(lm, monkeypatch):
    Stub(monkeypatch, likely=["Yes", "No"])
    rows = score_of(lm, made("yes-no", ANN, lm))
    assert [(row.protocol, row.score) for row in rows] == [("choice", 1), ("choice", 0), ("prefer", 0)]


def test_yes_is_preferred_where_it_is_right(lm, monkeypatch):
    asked = made("yes-no", ANN, lm)
    leaning = {asked[0].prompt: -1.0, asked[1].prompt: -2.0}  # to no, but less where yes is right

    def read(_self, pairs):
        return {(p, o): Reading((1,), (1,), leaning[p] if o == "Yes" else 0.0) for p, o in pairs}

    monkeypatch.setattr(Scorer, "read", read)
    rows = score_of(lm, asked)
    assert [(row.protocol, row.score) for row in rows] == [("choice", 0), ("choice", 1), ("prefer", 1)]


def test_rephrasings_in_the_other_form_are_not_asked_again():
    fact = make_fact("Who made it?", "Ann", ground_truth="Cy", rephrase_prompts=("Its maker is", "By whom is it?"))
    said = {"said": "Ann", "said_rephrased": ["Cy", "Ann"]}
    row = Row(fact=fact.id, phase="base", protocol="generate", errors={}, **said)
    (found,) = probe_scoring.of_rephrasings([fact], [row], SETTINGS)
    assert (found.probe, found.prompt, found.said, found.score, found.old) == ("completion", "Its maker is", "Cy", 0, 1)
    asks = make_fact("Its maker is", "Ann", rephrase_prompts=("Who made it?",))
    row = Row(fact=asks.id, phase="base", protocol="generate", errors={}, said="x", said_rephrased=["Ann"])
    assert [found.probe for found in probe_scoring.of_rephrasings([asks], [row], SETTINGS)] == ["question"]


def row_of(fact, score, probe="2-hop", error="", old=None):
    named = {"fact": fact, "phase": "updated", "probe": probe, "protocol": "contains", "prompt": "p", "answers": ["a"]}
    return ProbeRow.model_validate({**named, "score": score, "error": error, "old": old})


def test_a_mean_is_over_facts_and_counts_add_up():
    rows = [row_of("1", 1.0), row_of("1", 0.0), row_of("2", 1.0, old=0.0), row_of("3", None, error="too long")]
    (found,) = probe_scoring.summarise(rows, 10)
    assert (found.new.mean, found.new.n, found.new.errored, found.new.not_asked) == (75.0, 2, 1, 7)
    assert (found.old.mean, found.old.n, found.old.errored, found.old.not_asked) == (0.0, 1, 1, 8)


# A run


@pytest.fixture(scope="module")
def probed(small_lab, tmp_path_factory):
    """A small update with all probes, of facts that bring some, and its folder."""
    folder = tmp_path_factory.mktemp("probed")
    facts = [replace(fact, probes=(HOP,)) for fact in load_facts(small_lab)[:6]]
    write_facts(facts, folder / "facts.jsonl")
    settings = {"evaluate.probes": "all", "learn.until": "epochs", "learn.epochs": 2, "method": "ft"}
    config = load_config(small_lab / "update.yaml", settings)
    return update(small_lab, folder / "facts.jsonl", config, output=folder / "run").output


def load_facts(lab):
    from forgetlearn.facts import read_facts

    return list(read_facts(lab / "facts.jsonl"))


def test_a_run_keeps_every_answer_and_their_sums(probed):
    rows = load_rows(ProbeRow, probed / "probes.jsonl")
    summary = Summary.load(probed / "summary.json")
    assert {row.phase for row in rows} == set(summary.probes) == {"base", "updated"}
    scores = {(each.probe, each.protocol): each for each in summary.probes["updated"]}
    assert {("2-hop", "contains"), ("multiple-choice", "choice"), ("yes-no", "prefer")} <= set(scores)
    for (probe, protocol), score in scores.items():
        own = {r.fact for r in rows if (r.phase, r.probe, r.protocol) == ("updated", probe, protocol)}
        assert score.new.n + score.new.errored == len(own)
        assert score.new.n + score.new.errored + score.new.not_asked == 6


def test_the_report_shows_the_matrix_and_the_texts(probed):
    html, markdown = ((probed / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "Beyond rephrasings" in html
    assert "| 2-hop | contains | 6 |" in markdown
    assert html.count(HOP.prompt) == 6
    written = (probed / "report.html").read_bytes()
    assert main(["report", str(probed)]) == 0
    assert (probed / "report.html").read_bytes() == written


def test_evaluate_asks_the_same_as_update(probed, small_lab, tmp_path, capsys):
    facts = str(probed.parent / "facts.jsonl")
    given = ["--model", str(probed / "model"), "--reference", str(small_lab), "--facts", facts]
    less = ["--set", "evaluate.general_prompts=false", "--probes", "2-hop,multiple-choice"]
    assert main(["evaluate", *given, *less, "--output", str(tmp_path / "scores")]) == 0
    assert "multiple-choice-text (choice)" in capsys.readouterr().out

    def answers(run):
        rows = load_rows(ProbeRow, run / "probes.jsonl")
        kinds = ("2-hop", "multiple-choice", "multiple-choice-text")
        return {(r.fact, r.phase, r.probe, str(r.prompt)): r.said for r in rows if r.probe in kinds}

    assert answers(tmp_path / "scores") == answers(probed)


def test_no_probes(small_lab, tmp_path):
    config = load_config(small_lab / "update.yaml", {"evaluate.probes": "none", "method": "ft", "learn.epochs": 1})
    found = update(small_lab, small_lab / "facts.jsonl", config, output=tmp_path / "run")
    assert found.summary.probes == {}
    assert not (tmp_path / "run" / "probes.jsonl").exists()


def test_an_unknown_kind_is_refused_before_anything_is_written(small_lab, tmp_path, capsys):
    given = ["--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--output", str(tmp_path / "run")]
    assert main(["update", *given, "--probes", "multiple-choise"]) == 2
    assert "multiple-choice" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_texts_of_probes_are_escaped(probed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(probed, run)
    page, script = run_page.load_page(run), "<script>alert(1)</script>"
    rows = [row.model_copy(update={"said": script, "prompt": script}) for row in page.probe_rows]
    run_page.write_run(run, replace(page, probe_rows=rows))
    assert "<script>alert" not in (run / "report.html").read_text(encoding="utf-8")
