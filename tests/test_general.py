"""General ability: perplexity and divergence against their definitions, and in the report of an update."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.config.schema import EvaluateSettings
from forgetlearn.errors import FactError, MissingExtraError
from forgetlearn.evaluation import general_ability, statistics
from forgetlearn.storage import disk
from forgetlearn.storage.records import TaskScore

TEXT = "The sun went down behind the hills, and nobody in the village said a word about it. " * 12


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def settings(**more) -> EvaluateSettings:
    return EvaluateSettings(**more)


def test_perplexity_is_that_of_the_models_own_loss(lm):
    found = general_ability.score_text(lm, TEXT, settings(general_tokens=100))
    ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"][:101]])  # BOS and 100 tokens
    with torch.no_grad():
        loss = float(lm.model(input_ids=ids, labels=ids).loss)
    assert found.tokens == 100
    assert found.windows == 1
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found.loss_low, found.kl) == (None, None)


def test_windows_cover_the_text_once(lm):
    lm.encoder.max_length = 64
    found = general_ability.score_text(lm, TEXT, settings(general_tokens=200))
    assert (found.tokens, found.windows) == (200, 4)  # 63 + 63 + 63 + 11: each after BOS
    assert found.loss_low < found.loss < found.loss_high


def test_divergence_is_zero_from_itself_and_positive_from_another(lm, tmp_path):
    asked = settings(general_tokens=150)
    general_ability.score_text(lm, TEXT, asked, keep=tmp_path)
    same = general_ability.score_text(lm, TEXT, asked, before=tmp_path)
    assert same.kl == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        before = _log_probs(lm, 150)
        lm.model.lm_head.weight.mul_(0.5)
        now = _log_probs(lm, 150)
    other = general_ability.score_text(lm, TEXT, asked, before=tmp_path)
    wanted = (before.exp() * (before - now)).sum(-1).mean()
    assert other.kl == pytest.approx(float(wanted), rel=1e-4)
    assert other.kl > 0.01


def _log_probs(lm, n_tokens):
    ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"][: n_tokens + 1]])
    return lm.model(input_ids=ids).logits[0, :-1].log_softmax(-1)


def test_a_mean_of_windows_weighs_them_by_their_tokens():
    mean, low, high = statistics.mean_of([1.0, 3.0], [30, 10])
    assert mean == pytest.approx(1.5)
    assert low < mean < high
    equal = statistics.mean_of([1.0, 2.0, 6.0], [5, 5, 5])
    half = 4.302653 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert equal == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-5)


def test_update_measures_before_and_after(small_lab, text_file, tmp_path):
    config = {"method": "f-ft", **QUICK, "evaluate": {**QUICK["evaluate"], "general": str(text_file)}}
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2)
    result = forgetlearn.update(small_lab, facts, config, output=tmp_path / "run")
    base, updated = (result.summary.general[phase].text.as_json() for phase in ("base", "updated"))
    assert base["kl"] is None
    assert updated["kl"] > 0
    assert updated["source"] == "text.txt"
    assert not list((tmp_path / "run").rglob("window-*")), "the base's probabilities are not kept"
    for page in ("report.md", "report.html"):
        told = (tmp_path / "run" / page).read_text()
        assert f"{base['perplexity']:.4g}" in told
        assert "KL from the model before" in told

    again = forgetlearn.evaluate(
        result.product, facts, {"evaluate": config["evaluate"]}, output=tmp_path / "again", reference=small_lab
    )
    found = disk.read_json(again / "summary.json")["general"]
    assert found["updated"]["text"]["kl"] == pytest.approx(updated["kl"], rel=1e-3)


@pytest.mark.parametrize(("written", "says"), [(None, "No such file"), (b"", "empty"), (b"a \xff", "byte 2")])
def test_a_text_that_cannot_be_used(written, says, small_lab, tmp_path, capsys):
    file = tmp_path / "text.txt"
    if written is not None:
        file.write_bytes(written)
    flags = ["--model", small_lab, "--facts", small_lab / "facts.jsonl", "--output", tmp_path / "out"]
    assert main(["evaluate", *map(str, flags), "--general", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_text_than_before_is_refused(lm, text_file, tmp_path):
    asked = settings(general=str(text_file), general_tokens=50)
    general_ability.measure(lm, asked, tmp_path)
    text_file.write_text(TEXT.upper())
    with pytest.raises(FactError, match=r"evaluate\.general = .*text\.txt"):
        general_ability.measure(lm, asked, tmp_path, before=tmp_path)


def test_tasks_without_the_harness_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"forgetlearn\[lm-eval\]"):
        general_ability.check(settings(tasks=("hellaswag",)))


def test_tasks_are_the_harnesss_own_numbers(lm, monkeypatch):
    """Against a stand-in with its interface; tests/test_general.py has the harness itself under `slow`."""
    asked = {}

    def simple_evaluate(model, **given):
        asked.update(given)
        told = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc,strict": 0.25, "acc_stderr,strict": "N/A"}
        return {"results": {"arc": told}}

    manager = types.SimpleNamespace(all_tasks=["arc"])
    evaluator = types.SimpleNamespace(simple_evaluate=simple_evaluate)
    tasks = types.SimpleNamespace(TaskManager=lambda include_path: manager)
    models = types.SimpleNamespace(HFLM=lambda **given: given)
    monkeypatch.setattr(general_ability, "_harness", lambda: (evaluator, tasks, models))
    found = general_ability.score_tasks(lm, settings(tasks=("arc",), task_limit=7))
    acc, strict = TaskScore(value=0.5, stderr=0.1), TaskScore(value=0.25, stderr=None)
    assert found == {"arc": {"acc": acc, "acc (strict)": strict}}
    assert (asked["tasks"], asked["limit"]) == (["arc"], 7)
    with pytest.raises(FactError, match=r"evaluate\.tasks: .*'ark'"):
        general_ability.score_tasks(lm, settings(tasks=("ark",)))


@pytest.mark.slow
def test_a_task_of_ones_own_with_the_harness_itself(lm, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm-eval)")
    (tmp_path / "data.jsonl").write_text('{"q": "Two and two are", "a": " four"}\n{"q": "The sky is", "a": " blue"}\n')
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    found = general_ability.score_tasks(lm, settings(tasks=("own",), task_folder=str(tmp_path)))
    assert found["own"]["acc"].value in (0.0, 0.5, 1.0)
    assert found["own"]["perplexity"].value > 1
