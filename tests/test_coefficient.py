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
from forgetlearn.comparison.cells import CompareSettings
from forgetlearn.comparison.grid import fill
from forgetlearn.config.base import validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import read_facts
from forgetlearn.method.core import forget, forget_tuned, tune_on_old
from forgetlearn.method.kinds import STAGE_KINDS
from forgetlearn.models import lora
from forgetlearn.models.language_model import load_model
from forgetlearn.runs import coefficient, pipeline
from forgetlearn.runs.coefficient import HIGHEST, LOWEST, Trial, best_coefficient, choose_coefficient, set_aside
from forgetlearn.runs.pipeline import HeldBase
from forgetlearn.runs.run_store import RunStore
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
    """Method -> the run that chose a coefficient for it; each is made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}
    own = pipeline.learn

    def run(method):
        if method not in done:
            settings = config(method=method)
            epochs = run.learned[method] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pipeline, "learn", lambda *a, **o: (epochs.append(a[2].epochs), own(*a, **o))[1])
                done[method] = update(small_lab, facts, settings, output=folder / method)
        return done[method]

    run.learned = {}  # method -> the epochs of each trial
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
    settings = config().forgetting.model_copy(update={"coef": 0.7})
    lm, straight = load_model(str(small_lab)), load_model(str(small_lab))
    base = snapshot(lm.model)
    held = HeldBase(lm)
    tune_on_old(lm, facts, settings, how, seed=3)
    state = STAGE_KINDS[how].state(lm, lora.FORGET)
    tuned = {name: weight.clone() for name, weight in state.items()}
    held.restore()
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(lm.model).items())
    forget_tuned(lm, tuned, facts, settings.model_copy(update={"coef": 2.0}), how)
    held.restore()
    forget_tuned(lm, tuned, facts, settings, how)
    forget(straight, facts, settings, how, seed=3)
    one, two = snapshot(lm.model), snapshot(straight.model)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


# The search, on curves whose answer is known ------------------------------------------------------


class Curve(coefficient.Search):
    """Scores that are a function of the coefficient."""

    def __init__(self, of, folder=None):
        self.of, self.folder, self.trials = of, folder, {}

    def _scores(self, coef):
        return {"reliability": None, "generality": None, "residue": None, "locality": self.of(coef)}


@pytest.mark.parametrize("best", [0.1, 0.3, 0.6, 1.5])
def test_it_comes_close_to_the_top_of_a_curve_when_more_trials_are_asked_for(best):
    curve = Curve(lambda coef: 60 - 5 * math.log(coef / best) ** 2)
    coef, why = best_coefficient(curve.at, 7)
    assert coef == pytest.approx(best, rel=0.1)
    assert len(curve.trials) <= 7
    assert why.endswith(f"at {HIGHEST:g}")


@pytest.mark.parametrize("best", [LOWEST, HIGHEST])
def test_full_tries_both_ends_and_takes_the_better(best):
    curve = Curve(lambda coef: 60 - 5 * math.log(coef / best) ** 2)
    assert best_coefficient(curve.at, 2)[0] == best
    assert list(curve.trials) == [LOWEST, HIGHEST]


def test_the_goal_is_the_mean_of_what_was_asked():
    assert Trial(1.0, {"reliability": 60.0, "generality": 30.0, "locality": 90.0, "residue": 1.0}).goal == 60
    assert Trial(1.0, {"reliability": 60.0, "generality": None, "locality": 90.0, "residue": None}).goal == 75


# In a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_the_facts_set_aside_are_updated_and_listed_but_not_scored(chosen, method):
    result = chosen(method)
    aside = set(result.summary.choice.validation)
    assert len(aside) == ASIDE
    counts = result.summary.facts
    assert (counts.used, counts.scored, counts.set_aside) == (USED, USED - ASIDE, ASIDE)
    rows = disk.read_rows(result.output / "facts.jsonl")
    assert {row["fact"] for row in rows if row.get("split") == "validation"} == aside
    assert set(Counter(row["fact"] for row in rows).values()) == {21}  # 3 phases x 7 protocols
    for phase in result.summary.phases.values():
        for cells in phase.values():
            assert all(cell.n + cell.errored + cell.not_asked == USED - ASIDE for cell in cells.values())
    updated = [row["reliability"] for row in rows if row["phase"] == "updated" and row["protocol"] == "token"]
    scored = [row for row in rows if "split" not in row and row["phase"] == "updated" and row["protocol"] == "token"]
    mean = 100 * sum(row["reliability"] for row in scored) / len(scored)
    assert result.summary.phases["updated"]["reliability"]["token"].mean == pytest.approx(mean)
    assert len(updated) == USED


@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_the_result_is_that_of_the_chosen_number(chosen, small_lab, facts, tmp_path, method):
    result = chosen(method)
    config = load_config(result.output / "config.yaml", {"forget.coef": result.summary.coef})
    assert load_config(result.output / "config.yaml").forget.coef == "auto"
    plain = update(small_lab, facts, config, output=tmp_path / "plain")
    unmarked = [row.model_copy(update={"split": None}) for row in result.rows]
    assert unmarked == plain.rows
    assert plain.summary.choice is None
    assert (plain.output / "logs/forget.jsonl").read_text() == (result.output / "logs/forget.jsonl").read_text()


@pytest.mark.parametrize(("method", "resumed"), [("f-ft", False), ("f-lora", True), ("f-lora-ft", True)])
def test_what_the_best_trial_learned_is_the_product_to_the_bit(
    small_lab, facts, config, tmp_path, monkeypatch, method, resumed
):
    settings, output = config(method=method, evaluate__every_phase=False), tmp_path / "out"

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    own, calls = pipeline.learn, []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "learn", lambda *a, **o: (calls.append(a), own(*a, **o))[1])
        if resumed:
            with patch.context() as inner:
                inner.setattr(RunStore, "learned", stop)
                with pytest.raises(KeyboardInterrupt):
                    update(small_lab, facts, settings, output=output)
        result = update(small_lab, facts, settings, output=output, resume=resumed)
    assert len(calls) == 2  # in the trials alone
    plain = update(
        small_lab,
        facts,
        load_config(output / "config.yaml", {"forget.coef": result.summary.coef}),
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


def test_the_best_trial_is_kept_wherever_it_is_tried(tmp_path):
    """The first, a middle and the last one; of equal ones the smallest coefficient, as it is chosen."""

    class Keeping(Curve):
        """Notes which coefficient the model is at when it is kept."""

        kept = math.nan

        def _scores(self, coef):
            self.now = coef
            return super()._scores(coef)

        def _keep(self, folder):
            self.kept = self.now

    curves = [lambda coef, best=best: 60 - 5 * math.log(coef / best) ** 2 for best in (0.1, 0.3, 1.5)]
    for of in (*curves, lambda _coef: 60.0):
        curve = Keeping(of, tmp_path)
        assert best_coefficient(curve.at, 7)[0] == curve.kept


@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_it_says_what_it_chose_and_why(chosen, method):
    result = chosen(method)
    choice = result.summary.choice
    assert choice.why.startswith(f"coef {choice.coef:g} was chosen (on {ASIDE} facts set aside)")
    assert result.summary.coef == choice.coef
    stages = disk.read_json(result.output / "manifest.json")["stages"]
    assert (stages["coefficient"]["coef"], stages["coefficient"]["why"]) == (choice.coef, choice.why)
    for page in ("report.md", "report.html"):
        text = (result.output / page).read_text()
        assert choice.why in text
        assert f"over {USED - ASIDE} facts" in text
    assert not list(result.output.rglob("stages/**/*.safetensors"))


def test_trials_learn_as_the_update_does(chosen):
    trials = chosen("f-lora").summary.choice.trials
    assert len(trials) == 2
    assert [trial.coef for trial in trials] == sorted({trial.coef for trial in trials})
    assert chosen.learned["f-lora"] == [4] * len(trials)


def test_killed_while_it_searches_it_ends_with_the_same_rows(chosen, small_lab, facts, config, tmp_path):
    settings, output = config(method="f-ft"), tmp_path / "out"
    for wait in (0.5, 0.8):  # of the second or so that the stages up to the choice take
        child = os.fork()
        if child == 0:
            update(small_lab, facts, settings, output=output, resume=output.exists())
            os._exit(0)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    resumed = update(small_lab, facts, settings, output=output, resume=True)
    assert resumed.rows == chosen("f-ft").rows
    assert resumed.summary == chosen("f-ft").summary


def test_resumed_after_the_choice_nothing_is_tuned_or_searched_again(
    chosen, small_lab, facts, config, tmp_path, monkeypatch
):
    settings, output = config(), tmp_path / "out"
    wanted = chosen("f-lora").rows

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "tuned", stop)
        with pytest.raises(KeyboardInterrupt):
            update(small_lab, facts, settings, output=output)
    monkeypatch.setattr(coefficient.Search, "run", None)  # called, it fails
    assert update(small_lab, facts, settings, output=output, resume=True).rows == wanted


@pytest.mark.parametrize("killed_in", ["finish", "remove_stage_weights"])
def test_killed_at_its_end_it_goes_on_and_leaves_no_stage_weights(
    chosen, small_lab, facts, config, tmp_path, monkeypatch, killed_in
):
    settings, output = config(method="f-ft"), tmp_path / "out"

    def stop(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, killed_in, stop)
        with pytest.raises(KeyboardInterrupt):
            update(small_lab, facts, settings, output=output)
    assert update(small_lab, facts, settings, output=output, resume=True).rows == chosen("f-ft").rows
    assert not list(output.rglob("stages/**/*.safetensors"))


def test_by_itself_it_chooses_what_the_run_chose_and_leaves_the_base(chosen, small_lab, facts, config):
    lm = load_model(str(small_lab))
    base = snapshot(lm.model)
    choice = forgetlearn.choose_coefficient(lm, facts, config(method="f-ft"))
    found = chosen("f-ft").summary.choice
    assert (choice.coef, list(choice.validation), choice.why) == (found.coef, found.validation, found.why)
    assert all(torch.equal(base[name], weight) for name, weight in snapshot(lm.model).items())


# What cannot be done -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "ft"}, r"forget\.coef = auto: method ft "),
        ({"method": "ga"}, r"forget\.coef = auto: method ga "),
        ({"forget__validation": 0.01}, r"forget\.validation = 0\.01.* 0 aside"),
        ({"forget__validation": 0.99}, r"forget\.validation = 0\.99.* 10 aside"),
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


def test_where_nothing_is_known_it_only_learns_and_scores_all(small_lab, config, tmp_path, caplog):
    path = tmp_path / "facts.jsonl"
    lines = (f'{{"prompt": "Who is {n}?", "target_new": "Ann", "ground_truth": "Bob"}}\n' for n in "abcde")
    path.write_text("".join(lines))
    result = update(small_lab, path, config(), output=tmp_path / "out")
    assert "so nothing was forgotten" in caplog.text
    assert (result.summary.coef, result.summary.choice) == (None, None)
    assert result.summary.facts.scored == 5
    with pytest.raises(FactError, match="old answers"):
        choose_coefficient(load_model(str(small_lab)), read_facts(path), config())


def test_compare_takes_numbers(small_lab, facts, config, tmp_path):
    with pytest.raises(ConfigError, match=r"update --coef auto"):
        validate(CompareSettings, {"coefs": ["0.3", "auto"]})
    with pytest.raises(ConfigError, match=r"forget\.coef = auto"):
        fill(small_lab, facts, CompareSettings(coefs=(0.3,)), config(), output=tmp_path / "out")


def test_a_step_by_step_forget_needs_a_number(small_lab, facts, config):
    with pytest.raises(ConfigError, match=r"forget\.coef = auto"):
        forget(load_model(str(small_lab)), facts, config().forgetting, METHODS["f-ft"].forgets)


def test_the_command(small_lab, tmp_path, capsys):
    words = f"update --model {small_lab} --facts {small_lab}/facts.jsonl --limit 6 --method f-lora --coef auto"
    words += " --validation 0.5 --set forget.epochs=1 --set learn.epochs=1"
    assert main([*words.split(), "--output", str(tmp_path / "out")]) == 0
    assert "was chosen (on 3 facts set aside)" in capsys.readouterr().out
