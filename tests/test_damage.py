"""Damage: the general prompts, asked before and after an update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import DamageError
from forgetlearn.evaluation import damage, general_prompts
from forgetlearn.report import damage as words
from forgetlearn.report.run_page import load_page, overview
from forgetlearn.storage.records import General, GeneralAnswer, OnPrompts, Summary

PROMPTS = ("Who?", ("Hi", "Hello", "What?"), "What is <b>this</b>?", "x" * 300, *(f"Is it {n}?" for n in range(4)))
MEASURED = {**QUICK["evaluate"], "general_prompts": True}


@pytest.fixture(autouse=True)
def _few_prompts(monkeypatch):
    monkeypatch.setattr(general_prompts, "measuring", lambda facts=(): PROMPTS)


def measured(lm, folder: Path, before: Path | None = None, **more) -> OnPrompts:
    folder.mkdir()
    return damage.measure(lm, EvaluateSettings(**more), folder, before)


def test_nothing_changed_is_no_damage_and_a_change_comes_worst_first(lm, tmp_path):
    base = measured(lm, tmp_path / "base")
    assert (base.asked, base.compared, base.kl) == (8, 0, None)
    same = measured(lm, tmp_path / "same", tmp_path / "base", batch_size=2)
    assert (same.agreement, same.kl) == (pytest.approx(100), pytest.approx(0, abs=1e-5))
    said = {str(answer.prompt): answer.said for answer in base.answers}
    assert {str(answer.prompt): answer.said for answer in same.answers} == said
    with torch.no_grad():
        lm.model.lm_head.weight.add_(0.05 * torch.randn(lm.model.lm_head.weight.shape))
    other = measured(lm, tmp_path / "other", tmp_path / "base")
    assert other.agreement < 100
    assert other.kl_low < other.kl < other.kl_high
    divergences = [answer.kl for answer in other.answers if answer.kl is not None]
    assert divergences == sorted(divergences, reverse=True)
    weighed = sum(answer.kl * answer.tokens for answer in other.answers if answer.kl is not None) / other.tokens
    assert other.kl == pytest.approx(weighed)


def test_the_answers_that_changed_most_are_told():
    answers = [
        GeneralAnswer(prompt=f"Who is {n}?", said=said, before="He.", tokens=1, agreement=0, kl=9 - n)
        for n, said in enumerate(("She.", "He.", "They.", "We.", "I."))
    ]
    found = OnPrompts(answers=answers, asked=5, compared=5, tokens=5)
    told = words.examples(found)
    assert [sentence.partition("?")[0] for sentence in told] == ["“Who is 0", "“Who is 2", "“Who is 3"]
    assert told[0] == "“Who is 0?” was answered “He.”, now “She.”."
    alone = OnPrompts(answers=[GeneralAnswer(prompt="p", said="x")], asked=1, compared=0, tokens=0)
    assert words.examples(None) == words.examples(alone) == []


def test_prompts_that_cannot_be_asked_are_counted(lm, tmp_path):
    measured(lm, tmp_path / "base")
    found = measured(lm, tmp_path / "now", tmp_path / "base")
    failed = [answer for answer in found.answers if answer.error]
    assert found.compared + len(failed) == found.asked
    (long,) = (answer for answer in failed if answer.prompt == "x" * 300)
    assert "300 tokens" in long.error or "context" in long.error
    assert found.answers[-1].error, "what the base could not answer comes last"


def update(small_lab, output, **evaluate):
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    config = {"method": "f-ft", **QUICK, "evaluate": {**MEASURED, **evaluate}}
    return forgetlearn.update(small_lab, facts, config, output=output)


@pytest.fixture(scope="module")
def updated(small_lab, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general_prompts, "measuring", lambda facts=(): PROMPTS)
        return update(small_lab, tmp_path_factory.mktemp("run") / "out")


def test_an_update_shows_what_changed(updated):
    found = updated.summary.general["updated"].prompts
    assert found.kl > 0
    assert found.compared > 0
    assert overview(updated.summary).measured == ["updated"]
    page, text = ((updated.output / name).read_text() for name in ("report.html", "report.md"))
    assert "What is &lt;b&gt;this&lt;/b&gt;?" in page
    assert "<b>this" not in page + text
    assert "3 more" in page
    assert f"{found.kl:.3g}" in text
    assert f"{found.kl:.3g}" in (updated.product / "README.md").read_text()
    assert load_page(updated.output).overview.prompts == found
    assert not list(updated.output.rglob(damage.LIKELIEST)), "what is kept to compare with is removed at the end"


def test_a_run_that_goes_on_before_the_last_measurement_has_the_same_bytes(updated, small_lab, tmp_path, monkeypatch):
    plain = damage.measure

    def killed(lm, settings, folder, before=None, prompts=()):
        if before:
            raise KeyboardInterrupt
        return plain(lm, settings, folder, before)

    monkeypatch.setattr(damage, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        update(small_lab, tmp_path / "run")
    monkeypatch.setattr(damage, "measure", plain)
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    config = {"method": "f-ft", **QUICK, "evaluate": MEASURED}
    forgetlearn.update(small_lab, facts, config, output=tmp_path / "run", resume=True)
    assert (tmp_path / "run/summary.json").read_bytes() == (updated.output / "summary.json").read_bytes()


def test_too_much_damage_is_an_error_and_the_product_is_put_aside(small_lab, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DamageError, match=r"evaluate\.max_damage = 0: .*rejected.*(keep\.weight|--keep)"):
        update(small_lab, run, max_damage=0)
    assert (run / "rejected/model/model.safetensors").is_file()
    assert not (run / "model").exists()
    assert load_page(run).manifest.finished
    shutil.move(run / "rejected/model", run / "model")  # as if it was killed just before
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    config = {"method": "f-ft", **QUICK, "evaluate": {**MEASURED, "max_damage": 0}}
    with pytest.raises(DamageError):
        forgetlearn.update(small_lab, facts, config, output=run, resume=True)
    assert not (run / "model").exists()


def test_little_damage_is_none(small_lab, tmp_path, capsys):
    flags = ["--model", small_lab, "--facts", small_lab / "facts.jsonl", "--limit", 2, "--output", tmp_path / "run"]
    quick = [f"--set={name}={value}" for name, value in (("learn.epochs", 1), ("evaluate.protocols", "[token]"))]
    assert main(["update", *map(str, flags), *quick, "--method", "lora", "--max-damage", "30"]) == 0
    assert (tmp_path / "run/adapter").is_dir()
    assert "general prompts, KL from before" in capsys.readouterr().out


def test_an_adapter_is_compared_with_its_own_base(small_lab, tmp_path):
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    config = {"method": "lora", **QUICK, "evaluate": MEASURED}
    result = forgetlearn.update(small_lab, facts, config, output=tmp_path / "run")
    again = forgetlearn.evaluate(result.product, facts, {"evaluate": MEASURED}, output=tmp_path / "again")
    found = Summary.load(again / "summary.json").general["model"].prompts
    assert found.kl == pytest.approx(result.summary.general["updated"].prompts.kl, rel=1e-3)
    alone = forgetlearn.evaluate(small_lab, facts, {"evaluate": MEASURED}, output=tmp_path / "alone")
    found = Summary.load(alone / "summary.json").general["model"].prompts
    assert (found.compared, found.kl) == (0, None)
    assert "General prompts" in (alone / "report.html").read_text()


@pytest.mark.parametrize(
    ("agreement", "kl", "bad"), [(99.0, 0.01, False), (85.0, 0.1, False), (84.9, 0.05, True), (90.0, 0.11, True)]
)
def test_bad_damage_is_a_warning(updated, agreement, kl, bad, capsys):
    answer = GeneralAnswer(prompt="The capital of France?", before="Paris", said="Lyon\n" + "x" * 200, kl=kl)
    found = OnPrompts(asked=2, compared=2, tokens=9, agreement=agreement, kl=kl, answers=[answer])
    assert words.is_bad(found) == bad
    general = {"updated": General(prompts=found)}
    shown = overview(updated.summary.model_copy(update={"general": general}))
    assert (shown.warning is not None) == bad
    if bad:
        assert "--keep FILE" not in shown.warning  # nothing was kept by this run
        assert "--keep FILE" in words.warning(found, kept=True)
    (sentence,) = shown.changed
    assert sentence.startswith("“The capital of France?” was answered “Paris”, now “Lyon xx")
    assert len(sentence.splitlines()) == 1


def test_without_probes_the_verdict_mentions_the_general_prompts(updated):
    phases = {"updated": {k: v for k, v in updated.summary.phases["updated"].items() if k != "locality"}}
    found = overview(updated.summary.model_copy(update={"phases": phases}))
    assert f"{found.prompts.agreement:.1f} % of the tokens of general prompts as before" in found.verdict
    assert "of unrelated tokens as before" in overview(updated.summary).verdict


def test_a_limit_needs_the_measurement(capsys):
    assert (
        main(
            [
                "plan",
                "--model",
                "x",
                "--facts",
                "y",
                "--set=evaluate.max_damage=1",
                "--set",
                "evaluate.general_prompts=false",
            ]
        )
        == 2
    )
    assert "general_prompts = true" in capsys.readouterr().err


def test_the_summary_has_every_answer(updated):
    data = json.loads((updated.output / "summary.json").read_text())["general"]["updated"]["prompts"]
    assert len(data["answers"]) == data["asked"] == len(PROMPTS)
