"""What an update got wrong lies in failed.jsonl, and `--failed-only` goes on with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forgetlearn.cli.main import main
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, ModelError, RunError
from forgetlearn.facts import make_fact, read_facts
from forgetlearn.products import chain
from forgetlearn.products.restore import apply_run
from forgetlearn.runs import results
from forgetlearn.runs.failed_only import config_for_failed
from forgetlearn.runs.nothing_forgotten import why_nothing
from forgetlearn.runs.update import update
from forgetlearn.storage import disk
from forgetlearn.storage.records import Row
from forgetlearn.storage.run_folder import RunFolder
from written_by_hand import change_manifest

QUICK = {"learn.epochs": 1, "forget.epochs": 1, "evaluate.every_phase": False, "facts.limit": 3}


@pytest.fixture(scope="module")
def run(small_lab, tmp_path_factory) -> Path:
    """A run that learned too little."""
    config = load_config(small_lab / "update.yaml", QUICK | {"method": "f-ft"})
    output = tmp_path_factory.mktemp("runs") / "first"
    return update(small_lab, small_lab / "facts.jsonl", config, output=output).output


@pytest.mark.parametrize(
    ("reliability", "residue", "fails"),
    [(1.0, 0.0, False), (1.0, None, False), (1.0, 0.5, True), (0.0, 0.0, True), (None, None, True)],
)
def test_what_fails(reliability, residue, fails):
    fact = make_fact("p", "new", ground_truth="old")
    asked = {"fact": fact.id, "phase": "updated", "errors": {}}
    rows = [
        Row.model_validate(asked | {"protocol": "generate", "reliability": 0.0, "residue": 1.0}),
        Row.model_validate(asked | {"protocol": "contains", "reliability": reliability, "residue": residue}),
    ]
    assert list(results._failed([fact], rows, only_old=False)) == [fact] * fails


def test_a_run_goes_on_with_what_failed_on_what_it_made(run, small_lab, tmp_path, capsys):
    failed = read_facts(run / "failed.jsonl")
    assert failed.facts == read_facts(small_lab / "facts.jsonl", limit=3).facts
    shared = tmp_path / "shared.yaml"  # of the first run: other facts, read in another way
    shared.write_text(f"facts: {{source: gone.csv, columns: {{prompt: Q}}}}\nmodel: {{name: {small_lab}}}\n")
    options = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
    argv = ["update", "--failed-only", str(run), "--config", str(shared), *options, "--method", "ft"]
    assert main([*argv, "--output", str(tmp_path / "second")]) == 0
    second = RunFolder.open(tmp_path / "second")
    assert second.settings.model.name == str(run / "model")
    assert [made.facts.used for made in chain.chain_of(second.path)] == [3, 3]
    assert main([*argv, "--output", str(tmp_path / "third"), "--facts", str(small_lab / "facts.jsonl")]) == 2
    assert "facts.source" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_what_is_not_learned_is_named_and_learned_by_another_run(small_lab, tmp_path, capsys):
    held = read_facts(small_lab / "facts.jsonl", limit=3).facts
    new_answers = (held[0].ground_truth, held[1].ground_truth, held[2].target_new)
    given = [{"prompt": fact.prompt, "target_new": new} for fact, new in zip(held, new_answers, strict=True)]
    disk.write_rows(tmp_path / "facts.jsonl", given)
    argv = ["update", "--method=ft", "--set=learn.until=learned", "--set=train.wordings=false", "--set=keep.weight=0"]
    first = ["--model", str(small_lab), "--facts", str(tmp_path / "facts.jsonl"), "--set=learn.max_epochs=2"]
    assert main([*argv, *first, "--set=learn.learning_rate=1e-5", "--output", str(tmp_path / "first")]) == 0
    told = f"learned 2 of 3 facts in 2 epochs; not learned: {held[2].prompt!r}"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "first/report.md").read_text()
    failed = read_facts(tmp_path / "first/failed.jsonl").facts
    assert [fact.prompt for fact in failed] == [held[2].prompt]
    second = ["--failed-only", str(tmp_path / "first"), "--set=learn.learning_rate=2e-4", "--set=learn.max_epochs=99"]
    assert main([*argv, *second, "--output", str(tmp_path / "second")]) == 0
    assert disk.read_rows(tmp_path / "second/failed.jsonl") == []
    assert "not learned" not in capsys.readouterr().out
    assert [fact.prompt for fact in read_facts(tmp_path / "first/right.jsonl")] == [held[0].prompt, held[1].prompt]


def test_settings_are_the_runs_unless_given(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    again = config_for_failed(run, {"learn": {"batch_size": 3}}, None, None)
    assert (again.method, again.learn.epochs, again.learn.batch_size) == ("f-ft", 1, 3)
    assert not config_for_failed(run, None, None, None).evaluate.every_phase
    change_manifest(run, lambda manifest: manifest["config"]["learn"].update(until="learned"))
    assert config_for_failed(run, {}, None, None).learn.until == "learned"
    assert config_for_failed(run, {"learn": {"epochs": 7}}, None, None).learn.until == "epochs"
    assert config_for_failed(run, {"recipe": "plain"}, None, None).method == "lora"
    assert config_for_failed(run, load_config(None, {}), None, None).method == "lora"


def test_what_belongs_to_the_base_or_was_taught_is_not_taken_over(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    of_base = {"base_model_id": "org/base", "revision": "main"}
    change_manifest(run, lambda manifest: manifest["config"]["model"].update(of_base))
    change_manifest(run, lambda manifest: manifest["config"]["teach"].update(epochs=2))
    again = config_for_failed(run, {"teach": {"batch_size": 3}}, None, None)
    assert (again.model.base_model_id, again.model.revision, again.teach.epochs) == (None, None, 0)
    assert config_for_failed(run, {"model": {"base_model_id": "org/own"}}, None, None).model.base_model_id == "org/own"
    assert config_for_failed(run, {"teach": {"epochs": 1}}, None, None).teach.epochs == 1


def test_what_earlier_runs_got_right_is_kept(run, tmp_path, caplog):
    changed = shutil.copytree(run, tmp_path / "run")
    disk.write_rows(changed / "right.jsonl", [{"prompt": "Who is he?", "target_new": "x"}])
    RunFolder.open(changed).finish()
    right = str(changed / "right.jsonl")
    given = {"recipe": "default", "keep": {"facts": ["older.jsonl"]}}
    assert config_for_failed(changed, given, None, None).keep.facts == ("older.jsonl", right)
    assert config_for_failed(changed, {"recipe": "plain"}, None, None).keep.facts == ()
    assert "may change" in caplog.text


def test_the_command_takes_the_runs_settings(run, tmp_path):
    argv = ["update", "--failed-only", str(run), "--set", "learn.batch_size=1", "--output", str(tmp_path / "out")]
    assert main(argv) == 0
    config = RunFolder.open(tmp_path / "out").manifest.config
    assert (config["method"], config["learn"]["batch_size"]) == ("f-ft", 1)


def test_nothing_to_go_on_with_is_an_error(run, small_lab, tmp_path):
    def refused(error, match):
        with pytest.raises(error, match=match):
            update(failed_only=run, output=tmp_path / "out")

    was, done = (run / "failed.jsonl").read_text(encoding="utf-8"), RunFolder.open(run)
    (run / "failed.jsonl").write_text("")
    refused(RunError, r"failed\.jsonl")  # hash mismatch
    done.finish()
    refused(RunError, "no fact failed")
    (run / "failed.jsonl").unlink()
    done.finish()
    refused(RunError, "not a finished update")
    (run / "failed.jsonl").write_text(was, encoding="utf-8", newline="\n")
    done.finish()


def test_an_adapter_is_merged_first_and_its_base_would_begin_anew(small_lab, tmp_path, caplog):
    config = load_config(small_lab / "update.yaml", QUICK | {"method": "lora"})
    base = shutil.copytree(small_lab, tmp_path / "base")
    first = update(base, small_lab / "facts.jsonl", config, output=tmp_path / "first").output
    base.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"model\.name.*--merge"):
        update(failed_only=first, config=load_config(None, QUICK), output=tmp_path / "out")
    (tmp_path / "moved").rename(base)
    was = (base / "config.json").read_text()
    (base / "config.json").write_text(was + "\n")
    with pytest.raises(ModelError, match="is not the base of"):
        update(failed_only=first, config=load_config(None, QUICK), output=tmp_path / "out")
    assert not (first / "merged").exists()
    (base / "config.json").write_text(was)
    second = update(failed_only=first, config=load_config(None, QUICK), output=tmp_path / "second")
    assert RunFolder.open(second.output).settings.model.name == str(first / "merged")
    assert [made.facts.used for made in chain.chain_of(second.output)] == [3, 3]
    assert "begins without" not in caplog.text
    update(base, failed_only=first, config=load_config(None, QUICK), output=tmp_path / "third")
    assert "begins without what that learned" in caplog.text


def test_an_adapter_on_a_taught_base_is_merged_into_that(small_lab, tmp_path):
    config = load_config(small_lab / "update.yaml", QUICK | {"method": "lora", "teach.epochs": 1})
    first = update(small_lab, small_lab / "facts.jsonl", config, output=tmp_path / "first").output
    update(failed_only=first, config=load_config(None, QUICK), output=tmp_path / "second")
    apply_run(first, first / "taught", tmp_path / "by-hand", merge=True)
    merged, by_hand = (load_file(folder / "model.safetensors") for folder in (first / "merged", tmp_path / "by-hand"))
    assert all(weight.equal(by_hand[name]) for name, weight in merged.items())


KNOWN = make_fact("Capital?", "Lyon", ground_truth="Paris")
OTHER = make_fact("CEO?", "Ann", ground_truth="Bob")


@pytest.mark.parametrize(
    ("changes", "facts", "said", "why", "remedy", "example"),
    [
        ({}, [KNOWN, OTHER], ["", "Cy."], "none of the 2 old answers", "--old-from model", ("CEO?", "Bob", "Cy.")),
        ({}, [KNOWN], [""], "none of the 1 old answers", "--old-from model", ("Capital?", "Paris", "")),
        ({}, [KNOWN], [None], "none of the 1 old answers", "--old-from model", None),
        ({"facts.old_from": "model"}, [KNOWN], ["Bern"], "none", "Choose lora", ("Capital?", "Paris", "Bern")),
        ({"teach.epochs": 1}, [KNOWN], ["Bern"], "none", "--teach-old", ("Capital?", "Paris", "Bern")),
        ({}, [make_fact("p", "new")], ["old"], "no fact has an old answer", "--old-from model", None),
        ({"forget.coef": 0}, [KNOWN], ["Paris"], "forget.coef is 0", "coefficient", None),
    ],
)
def test_why_nothing_is_forgotten_and_what_to_do(changes, facts, said, why, remedy, example):
    asked = zip(facts, said, strict=True)
    rows = [Row(fact=fact.id, phase="base", protocol="generate", errors={}, said=text) for fact, text in asked]
    found = why_nothing(load_config(None, {"method": "f-lora", **changes}), facts, rows)
    assert found.asked_method == "f-lora"
    assert why in found.why
    assert remedy in found.remedy
    assert (found.example and (found.example.prompt, found.example.old, found.example.said)) == example
