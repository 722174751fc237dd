"""The coefficient is chosen on facts that are not scored, by what the search says, and again the same after a kill."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import Counter
from dataclasses import asdict

import pytest
import torch

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.comparison.grid import CompareSettings, fill
from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import make_fact, read_facts
from forgetlearn.method.core import forget
from forgetlearn.models.language_model import load_model
from forgetlearn.runs import coefficient
from forgetlearn.runs.coefficient import HIGHEST, LOWEST, Forgetter, Trial, choose_coefficient, forget_tuned, set_aside
from forgetlearn.runs.update import update
from forgetlearn.storage import disk, run_folder
from forgetlearn.training.finetune import StageLog
from forgetlearn.weights.task_vector import snapshot

USED, ASIDE = 10, 4


@pytest.fixture(scope="module")
def facts(small_lab):
    return read_facts(small_lab / "facts.jsonl", limit=USED)


@pytest.fixture(scope="module")
def config(small_lab):
    def make(**more):
        settings = {"method": "f-lora", "forget.coef": "auto", "forget.validation": ASIDE / USED}
        settings |= {"forget.epochs": 4, "forget.learning_rate": 2e-3, "learn.epochs": 4, "model.name": str(small_lab)}
        settings |= {f"{stage}.batch_size": 5 for stage in ("forget", "learn")}
        return load_config(
            small_lab / "update.yaml", settings | {name.replace("__", "."): v for name, v in more.items()}
        )

    return make


@pytest.fixture(scope="module")
def chosen(small_lab, facts, config, tmp_path_factory):
    """Search -> the run that it was made in; each is made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}
    own = coefficient.learn

    def run(search):
        if search not in done:
            method = {"cheap": "f-ft", "full": "f-lora"}[search]
            settings = config(forget__search=search, method=method)
            epochs = run.learned[search] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(coefficient, "learn", lambda *a, **o: (epochs.append(a[2].epochs), own(*a, **o))[1])
                done[search] = update(small_lab, facts, settings, output=folder / search)
        return done[search]

    run.learned = {}  # search -> the epochs of each trial
    return run


# Setting aside -----------------------------------------------------------------------------------


def test_what_is_set_aside_depends_on_content_and_seed_not_on_the_order(facts, config):
    aside = set_aside(list(facts), config())
    assert len(aside) == ASIDE
    assert aside == [fact for fact in facts if fact in aside]
    backwards = set_aside(list(reversed(list(facts))), config())
    assert {fact.id for fact in backwards} == {fact.id for fact in aside}
    others = {frozenset(fact.id for fact in set_aside(list(facts), config(seed=seed))) for seed in range(5)}
    assert len(others) > 1


# One fine-tuning for every coefficient -----------------------------------------------------------


@pytest.mark.parametrize("how", ["all weights", "lora"])
def test_the_forgotten_model_of_a_coefficient_is_what_forget_makes(small_lab, facts, config, how):
    settings = config().forget.model_copy(update={"coef": 0.7})
    lm, straight = load_model(str(small_lab)), load_model(str(small_lab))
    base = snapshot(lm.model)
    forgetter = Forgetter(lm)
    tuned, _log = forgetter.tune(facts, settings, how, seed=3)
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(lm.model).items())
    forget_tuned(lm, tuned, settings.model_copy(update={"coef": 2.0}), how)
    forgetter.reset()
    forget_tuned(lm, tuned, settings, how)
    forget(straight, facts, settings, how, seed=3)
    one, two = snapshot(lm.model), snapshot(straight.model)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


# The two searches, on curves whose answer is known -----------------------------------------------


class Curve(coefficient._Trying):
    """Scores that are a function of the coefficient."""

    def __init__(self, config, of):
        self.config, self.of, self.trials, self.learned = config, of, {}, None

    def _scores(self, coef):
        return {"reliability": None, "generality": None, "residue": None, "locality": self.of(coef)}


def test_cheap_takes_the_largest_coefficient_within_the_bound(config):
    curve = Curve(config(forget__max_locality_loss=2.0), lambda coef: 100 - 4 * (coef > 0.62) - 90 * (coef > 1.3))
    coef, why = coefficient._largest_within_bound(curve)
    assert 0.62 * math.exp(-coefficient.TOLERANCE) <= coef <= 0.62
    assert "costs 0.0 points" in why
    assert "it costs 4.0" in why
    looser = Curve(config(forget__max_locality_loss=5.0), curve.of)
    assert 1.3 * math.exp(-coefficient.TOLERANCE) <= coefficient._largest_within_bound(looser)[0] <= 1.3


def test_cheap_where_every_coefficient_costs_too_much_or_none_does(config):
    assert coefficient._largest_within_bound(Curve(config(), lambda _coef: 100.0))[0] == HIGHEST
    coef, why = coefficient._largest_within_bound(Curve(config(), lambda _coef: 0.0))
    assert coef == LOWEST
    assert why.endswith("costs 100.0 points of locality (at most 1 are allowed), and it is the smallest that is tried")


@pytest.mark.parametrize("best", [0.1, 0.3, 0.6, 1.5])
def test_full_comes_close_to_the_top_of_a_curve_when_more_trials_are_asked_for(config, best):
    curve = Curve(config(forget__trials=7), lambda coef: 60 - 5 * math.log(coef / best) ** 2)
    coef, why = coefficient._best_after_learning(curve)
    assert coef == pytest.approx(best, rel=0.1)
    assert len(curve.trials) <= 7
    assert why.endswith(f"at {HIGHEST:g}")


@pytest.mark.parametrize("best", [LOWEST, HIGHEST])
def test_full_tries_both_ends_and_takes_the_better(config, best):
    curve = Curve(config(), lambda coef: 60 - 5 * math.log(coef / best) ** 2)
    assert coefficient._best_after_learning(curve)[0] == best
    assert list(curve.trials) == [LOWEST, HIGHEST]


def test_the_goal_is_the_mean_of_what_was_asked():
    assert Trial(1.0, {"reliability": 60.0, "generality": 30.0, "locality": 90.0, "residue": 1.0}).goal == 60
    assert Trial(1.0, {"reliability": 60.0, "generality": None, "locality": 90.0, "residue": None}).goal == 75


# In a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["cheap", "full"])
def test_the_facts_set_aside_are_updated_and_listed_but_not_scored(chosen, search):
    result = chosen(search)
    aside = set(result.summary["choice"]["validation"])
    assert len(aside) == ASIDE
    counts = result.summary["facts"]
    assert (counts["used"], counts["scored"], counts["set_aside"]) == (USED, USED - ASIDE, ASIDE)
    rows = disk.read_rows(result.output / "facts.jsonl")
    assert {row["fact"] for row in rows if row.get("split") == "validation"} == aside
    assert set(Counter(row["fact"] for row in rows).values()) == {21}  # 3 phases x 7 protocols
    for phase in result.summary["phases"].values():
        for cells in phase.values():
            assert all(cell["n"] + cell["errored"] + cell["not_asked"] == USED - ASIDE for cell in cells.values())
    updated = [row["reliability"] for row in rows if row["phase"] == "updated" and row["protocol"] == "token"]
    scored = [row for row in rows if "split" not in row and row["phase"] == "updated" and row["protocol"] == "token"]
    mean = 100 * sum(row["reliability"] for row in scored) / len(scored)
    assert result.summary["phases"]["updated"]["reliability"]["token"]["mean"] == pytest.approx(mean)
    assert len(updated) == USED


@pytest.mark.parametrize("search", ["cheap", "full"])
def test_the_result_is_that_of_the_chosen_number(chosen, small_lab, facts, tmp_path, search):
    result = chosen(search)
    config = load_config(result.output / "config.yaml", {"forget.coef": result.summary["coef"]})
    assert load_config(result.output / "config.yaml").forget.coef == "auto"
    plain = update(small_lab, facts, config, output=tmp_path / "plain")
    unmarked = [{name: value for name, value in row.items() if name != "split"} for row in result.rows]
    assert unmarked == plain.rows
    assert plain.summary["choice"] is None
    assert (plain.output / "logs/forget.jsonl").read_text() == (result.output / "logs/forget.jsonl").read_text()


@pytest.mark.parametrize(("method", "resumed"), [("f-ft", False), ("f-lora", True), ("f-lora-ft", True)])
def test_what_the_best_trial_learned_is_the_product_to_the_bit(
    small_lab, facts, config, tmp_path, monkeypatch, method, resumed
):
    settings, output = config(forget__search="full", method=method, evaluate__every_phase=False), tmp_path / "out"

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("forgetlearn.runs.stages.learn", None)  # called, it fails: the trials have learned already
        if resumed:
            with patch.context() as inner:
                inner.setattr(coefficient, "learn_as_chosen", stop)
                with pytest.raises(KeyboardInterrupt):
                    update(small_lab, facts, settings, output=output)
            patch.setattr(coefficient, "learn", None)
        result = update(small_lab, facts, settings, output=output, resume=resumed)
    plain = update(
        small_lab,
        facts,
        load_config(output / "config.yaml", {"forget.coef": result.summary["coef"]}),
        output=tmp_path / "plain",
    )
    (weights,) = result.product.glob("*.safetensors")
    assert weights.read_bytes() == (plain.product / weights.name).read_bytes()
    assert sorted(file.name for file in result.product.iterdir()) == sorted(f.name for f in plain.product.iterdir())
    assert (output / "logs/learn.jsonl").read_text() == (plain.output / "logs/learn.jsonl").read_text()
    stages, of_plain = (disk.read_json(run.output / "manifest.json")["stages"]["learn"] for run in (result, plain))
    assert {name: stages[name] for name in ("facts", "steps", "layout", "final_loss")}.items() <= of_plain.items()
    assert not list(output.rglob("stages/**/*.safetensors"))


def test_the_log_of_what_the_best_trial_learned_is_kept_whole(tmp_path):
    log = StageLog(({"step": 1, "loss": 0.5},), "packed", "sdpa", {"share_survived": 0.9}, micro_batch_size=2)
    disk.write_json(tmp_path / "log.json", asdict(log))
    assert coefficient.read_stage_log(tmp_path / "log.json") == log


def test_the_best_trial_is_kept_wherever_it_is_tried(config, tmp_path):
    """The first, a middle and the last one; of equal ones the smallest coefficient, as it is chosen."""

    class Keeping(Curve):
        """Notes which coefficient the model is at when it is kept."""

        kept = math.nan

        def _scores(self, coef):
            self.now = coef
            return super()._scores(coef)

        def _keep(self, learned, folder):
            self.kept = self.now

    curves = [lambda coef, best=best: 60 - 5 * math.log(coef / best) ** 2 for best in (0.1, 0.3, 1.5)]
    for of in (*curves, lambda _coef: 60.0):
        curve = Keeping(config(forget__trials=7), of)
        curve.learned, curve.folder = object(), tmp_path
        assert coefficient._best_after_learning(curve)[0] == curve.kept


@pytest.mark.parametrize("search", ["cheap", "full"])
def test_it_says_what_it_chose_and_why(chosen, search):
    result = chosen(search)
    choice = result.summary["choice"]
    assert choice["why"].startswith(f"coef {choice['coef']:g} was chosen ({search} search on {ASIDE} facts set aside)")
    assert result.summary["coef"] == choice["coef"]
    stages = disk.read_json(result.output / "manifest.json")["stages"]
    assert (stages["coefficient"]["coef"], stages["coefficient"]["why"]) == (choice["coef"], choice["why"])
    for page in ("report.md", "report.html"):
        text = (result.output / page).read_text()
        assert choice["why"] in text
        assert f"over {USED - ASIDE} facts" in text
    assert not list(result.output.rglob("stages/**/*.safetensors"))


def test_cheap_trials_do_not_learn_and_full_ones_learn_as_the_update_does(chosen):
    full = chosen("full").summary["choice"]["trials"]
    assert chosen("cheap").summary["choice"]["trials"]
    assert len(full) == 2
    assert [trial["coef"] for trial in full] == sorted({trial["coef"] for trial in full})
    assert chosen.learned == {"cheap": [], "full": [4] * len(full)}


def test_killed_while_it_searches_it_ends_with_the_same_rows(chosen, small_lab, facts, config, tmp_path):
    settings, output = config(method="f-ft", forget__search="cheap"), tmp_path / "out"
    for wait in (0.5, 0.8):  # of the second or so that the stages up to the choice take
        child = os.fork()
        if child == 0:
            update(small_lab, facts, settings, output=output, resume=output.exists())
            os._exit(0)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    resumed = update(small_lab, facts, settings, output=output, resume=True)
    assert resumed.rows == chosen("cheap").rows
    assert resumed.summary == chosen("cheap").summary


def test_resumed_after_the_choice_nothing_is_tuned_or_searched_again(
    chosen, small_lab, facts, config, tmp_path, monkeypatch
):
    settings, output = config(forget__search="full"), tmp_path / "out"
    wanted = chosen("full").rows

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(coefficient, "forget_as_chosen", stop)
        with pytest.raises(KeyboardInterrupt):
            update(small_lab, facts, settings, output=output)
    monkeypatch.setattr(coefficient, "choose", None)  # called, it fails
    assert update(small_lab, facts, settings, output=output, resume=True).rows == wanted


@pytest.mark.parametrize("killed_in", ["finish", "remove_stage_weights"])
def test_killed_at_its_end_it_goes_on_and_leaves_no_stage_weights(
    chosen, small_lab, facts, config, tmp_path, monkeypatch, killed_in
):
    settings, output = config(method="f-ft", forget__search="cheap"), tmp_path / "out"

    def stop(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, killed_in, stop)
        with pytest.raises(KeyboardInterrupt):
            update(small_lab, facts, settings, output=output)
    assert update(small_lab, facts, settings, output=output, resume=True).rows == chosen("cheap").rows
    assert not list(output.rglob("stages/**/*.safetensors"))


def test_by_itself_it_chooses_what_the_run_chose_and_leaves_the_base(chosen, small_lab, facts, config):
    lm = load_model(str(small_lab))
    base = snapshot(lm.model)
    choice = forgetlearn.choose_coefficient(lm, facts, config(method="f-ft", forget__search="cheap"))
    found = chosen("cheap").summary["choice"]
    assert (choice.coef, list(choice.validation), choice.why) == (found["coef"], found["validation"], found["why"])
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(lm.model).items())


# What cannot be done -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "ft"}, "method ft subtracts nothing"),
        ({"method": "ga"}, "method ga subtracts nothing"),
        ({"forget__validation": 0.01}, "of 10 facts it sets 0 aside, which leaves none to choose on"),
        ({"forget__validation": 0.99}, "sets 10 aside, which leaves none to score"),
    ],
)
def test_it_is_refused_before_anything_is_written(small_lab, facts, config, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        update(small_lab, facts, config(**more), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0, 1, -0.1, "much"])
def test_a_share_is_between_0_and_1(config, share):
    with pytest.raises(ConfigError, match=r"forget\.validation"):
        config(forget__validation=share)


def test_cheap_needs_probes(small_lab, config):
    bare = [make_fact(f"Who is {name}?", "Ann", ground_truth="Bob") for name in "abcdef"]
    with pytest.raises(FactError, match="none of the 2 facts set aside has an unrelated probe"):
        choose_coefficient(load_model(str(small_lab)), bare, config(forget__search="cheap"))


def test_where_nothing_is_known_it_only_learns_and_scores_all(small_lab, config, tmp_path, caplog):
    path = tmp_path / "facts.jsonl"
    lines = (f'{{"prompt": "Who is {n}?", "target_new": "Ann", "ground_truth": "Bob"}}\n' for n in "abcde")
    path.write_text("".join(lines))
    result = update(small_lab, path, config(forget__search="full"), output=tmp_path / "out")
    assert "there is nothing to forget" in caplog.text
    assert (result.summary["coef"], result.summary["choice"]) == (0.0, None)
    assert result.summary["facts"]["scored"] == 5
    with pytest.raises(FactError, match="gives none of the old answers"):
        choose_coefficient(load_model(str(small_lab)), read_facts(path), config(forget__search="full"))


def test_compare_takes_numbers(small_lab, facts, config, tmp_path):
    with pytest.raises(ConfigError, match=r"update --coef auto"):
        validate(CompareSettings, {"coefs": ["0.3", "auto"]})
    with pytest.raises(ConfigError, match="Give numbers with --coefs"):
        fill(small_lab, facts, CompareSettings(coefs=(0.3,)), config(), output=tmp_path / "out")


def test_a_step_by_step_forget_needs_a_number(small_lab, facts, config):
    with pytest.raises(ConfigError, match="a number is needed"):
        forget(load_model(str(small_lab)), facts, config().forget, METHODS["f-ft"].forgets)


def test_the_command(small_lab, tmp_path, capsys):
    words = f"update --model {small_lab} --facts {small_lab}/facts.jsonl --limit 6 --method f-lora --coef auto"
    words += " --validation 0.5 --set forget.search=cheap --set forget.epochs=1 --set learn.epochs=1"
    assert main([*words.split(), "--output", str(tmp_path / "out")]) == 0
    assert "was chosen (cheap search on 3 facts set aside)" in capsys.readouterr().out
