"""One update, end to end: five methods, what is counted, what is left, and resume after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.config.schema import ModelSettings, load_config
from forgetlearn.errors import ConfigError, FactError, ForgetLearnError, ModelError, RunError
from forgetlearn.evaluation import generation, scorer, scoring
from forgetlearn.facts import make_fact
from forgetlearn.models import language_model
from forgetlearn.products import chain
from forgetlearn.runs.update import update
from forgetlearn.runtime import signals
from forgetlearn.storage import digests, disk, run_folder
from forgetlearn.training import callbacks

METHODS = ("ft", "lora", "f-ft", "f-lora", "f-lora-ft")
USED = 6
CHANGES = {"learn__epochs": 12, "learn__learning_rate": 2e-3}  # enough for answers to change
LEFT_OUT = {"old_equals_new": 1, "repeated_prompt": 1}


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def records(small_lab) -> list[dict[str, Any]]:
    """Six facts that the base holds, one without a rephrase, one with a probe longer than its context."""
    own = disk.read_rows(small_lab / "facts.jsonl")[:USED]
    own[1].pop("rephrase_prompts")
    own[2]["locality"] = [{"prompt": "far " * 600, "answer": "away"}]
    return own


@pytest.fixture(scope="module")
def facts(records, tmp_path_factory) -> Path:
    unusable = [
        {"prompt": "The same is", "target_new": "same", "ground_truth": "same"},
        {"prompt": records[0]["prompt"], "target_new": "else", "ground_truth": "other"},
    ]
    return write_lines(tmp_path_factory.mktemp("facts") / "facts.jsonl", records + unusable)


@pytest.fixture(scope="module")
def new_only(records, tmp_path_factory) -> Path:
    """The same facts without old answers."""
    lines = [{name: value for name, value in record.items() if name != "ground_truth"} for record in records]
    return write_lines(tmp_path_factory.mktemp("facts") / "new.jsonl", lines)


@pytest.fixture(scope="module")
def config(small_lab):
    def make(method: str = "f-ft", **more: object):
        settings = {"method": method, "forget.epochs": 1, "learn.epochs": 1, "forget.coef": 1.0}
        settings |= {f"{stage}.batch_size": 2 for stage in ("teach", "forget", "learn")}
        return load_config(
            small_lab / "update.yaml", settings | {name.replace("__", "."): v for name, v in more.items()}
        )

    return make


@pytest.fixture(scope="module")
def finished(small_lab, facts, config, tmp_path_factory):
    """Method -> its run, with enough epochs that answers change; each is run once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(method: str):
        if method not in done:
            settings = config(method, **CHANGES)
            done[method] = update(small_lab, facts, settings, output=folder / method)
        return done[method]

    return run


def tensors(product: Path) -> dict[str, Any]:
    return {name: value for file in product.glob("*.safetensors") for name, value in load_file(file).items()}


def same_tensors(one: Path, two: Path) -> bool:
    a, b = tensors(one), tensors(two)
    return bool(a) and a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# End to end --------------------------------------------------------------------------------------


def test_what_rounding_the_product_leaves_is_said(small_lab, facts, config, tmp_path, caplog):
    """Steps so small that bfloat16 loses most of them; an adapter, or float32, is not rounded."""
    tiny = {"learn.learning_rate": 1e-7, "forget.learning_rate": 1e-7, "evaluate.protocols": ["token"]}
    settings = config(**tiny, **{"model.dtype": "bfloat16"})
    result = update(small_lab, facts, settings, output=tmp_path / "run")
    told = result.summary.rounding
    assert 0 <= told.share_survived < 0.5
    assert run_folder.RunFolder.open(result.output).manifest.stages["learn"].rounding == told
    assert "Rounding leaves 0." in caplog.text
    assert "--set model.rounding=stochastic" in caplog.text
    for page in ("report.md", "report.html"):
        assert "of the wanted change survives the rounding" in (result.output / page).read_text()


def test_what_rounding_leaves_of_an_adapter_is_counted_too(small_lab, facts, config, tmp_path):
    """An adapter that is merged, or trained upon with all weights, is part of what is rounded."""
    quick = {"evaluate.protocols": ["token"], "model.dtype": "bfloat16"}
    update(small_lab, facts, config(method="lora", save_merged=True, **quick), output=tmp_path / "merged")
    update(small_lab, facts, config(method="f-lora-ft", **quick), output=tmp_path / "upon")
    for run, stage in (("merged", "merge"), ("upon", "learn")):
        told = run_folder.RunFolder.open(tmp_path / run).manifest.stages[stage].rounding
        assert 0 < told.share_survived <= 1.1, run


def test_a_resumed_run_of_a_model_in_memory_computes_in_the_same_dtype(small_lab, facts, config, tmp_path, monkeypatch):
    """Its product is loaded then, which may hold a model in float32 where that is faster; one in memory is not held."""
    monkeypatch.setattr(language_model.onednn, "has_instructions_for", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(language_model, "SMALL_MODEL", 0)
    own, seen = scoring.score, []

    def score(lm, *args, phase, **options):
        seen.append((phase, {weight.dtype for weight in lm.model.parameters()}))
        if len(seen) == 2:
            raise RuntimeError("killed")
        return own(lm, *args, phase=phase, **options)

    monkeypatch.setattr(scoring, "score", score)
    settings = config(method="ft", **{"evaluate.protocols": ["token"]})
    for resume in (False, True):
        model = AutoModelForCausalLM.from_pretrained(small_lab, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="killed") if not resume else nullcontext():
            update(
                model,
                facts,
                settings.model_copy(update={"model": ModelSettings(device="cpu")}),
                tokenizer=AutoTokenizer.from_pretrained(small_lab),
                output=tmp_path / "run",
                resume=resume,
            )
    assert seen == [(phase, {torch.bfloat16}) for phase in ("base", "updated", "updated")]


@pytest.mark.parametrize("method", METHODS)
def test_run_folder(finished, method):
    result = finished(method)
    product = "adapter" if method in ("lora", "f-lora") else "model"
    assert result.product == result.output / product
    files = {"config.yaml", "manifest.json", "facts.jsonl", "inputs.jsonl", "summary.json", "report.md", "report.html"}
    files |= {"failed.jsonl", "right.jsonl", "probes.jsonl"}
    assert {path.name for path in result.output.iterdir()} == files | {"logs", "stages", product}
    assert (result.product / "README.md").is_file()
    assert not list((result.output / "stages").rglob("*.safetensors"))
    assert result.summary.rounding is None  # a base in float32
    assert load_config(result.output / "config.yaml").method == method


@pytest.mark.parametrize("method", METHODS)
def test_rows_add_up(finished, method):
    result = finished(method)
    phases = ["base", "forgotten", "updated"] if method.startswith("f-") else ["base", "updated"]
    protocols = ["token", "exact", "prefer", "generate", "contains", "agreement", "accuracy"]
    rows = disk.read_rows(result.output / "facts.jsonl")
    counts = Counter((row["phase"], row["protocol"]) for row in rows)
    assert counts == {(phase, protocol): USED for phase in phases for protocol in protocols}
    assert len({row["fact"] for row in rows}) == USED


@pytest.mark.parametrize("method", METHODS)
def test_summary(finished, method):
    summary = disk.read_json(finished(method).output / "summary.json")
    assert (summary["method"], summary["seed"]) == (method, 0)
    assert summary["coef"] == (1.0 if method.startswith("f-") else None)
    facts = summary["facts"]
    assert (facts["read"], facts["used"], facts["known"], facts["left_out"]) == (USED + 2, USED, USED, LEFT_OUT)
    assert facts["read"] == facts["used"] + sum(facts["left_out"].values())
    for phase in summary["phases"].values():
        for quantity in ("reliability", "generality", "residue"):
            assert {"token", "exact", "generate", "prefer"} <= phase[quantity].keys()
        assert phase["locality"].keys() == {"agreement", "accuracy"}
        for quantity in phase.values():
            for cell in quantity.values():
                assert cell["n"] + cell["errored"] + cell["not_asked"] == USED
                assert 0 <= cell["mean"] <= 100


def test_base_agrees_with_itself(finished):
    locality = finished("ft").summary.phases["base"]["locality"]
    assert (locality["agreement"].mean, locality["accuracy"].mean) == (100.0, 100.0)


def test_answers_change(finished):
    phases = finished("ft").summary.phases
    assert phases["base"]["residue"]["generate"].mean == 100.0
    assert phases["base"]["reliability"]["generate"].mean == 0.0
    assert phases["updated"]["reliability"]["generate"].mean >= 50.0
    assert phases["updated"]["locality"]["agreement"].mean < 100.0


def test_fact_without_rephrase_is_not_asked(finished, records):
    summary = finished("f-ft").summary
    for phase in summary.phases.values():
        assert phase["generality"]["token"].not_asked == 1
        assert phase["generality"]["token"].n == USED - 1
    rows = [row for row in finished("f-ft").rows if row.protocol == "token"]
    assert [row.generality is None for row in rows[:USED]] == [False, True, False, False, False, False]
    assert rows[1].errors == {}


def test_probe_that_is_too_long_is_errored_with_its_reason(finished):
    for phase in finished("f-ft").summary.phases.values():
        for cell in phase["locality"].values():
            assert (cell.n, cell.errored) == (USED - 1, 1)
    bad = [row for row in finished("f-ft").rows if row.errors]
    assert {row.phase for row in bad} == {"base", "forgotten", "updated"}
    assert all("the model's context is 512" in row.errors["locality"] for row in bad)
    assert "the model's context is 512" in (finished("f-ft").output / "report.md").read_text()


def test_coef_0_skips_forgetting_and_is_fine_tuning_to_the_bit(small_lab, facts, config, finished, tmp_path):
    settings = config("f-ft", forget__coef=0, **CHANGES)
    result = update(small_lab, facts, settings, output=tmp_path / "run")
    assert "forget" not in disk.read_json(tmp_path / "run/manifest.json")["stages"]
    assert same_tensors(result.product, finished("ft").product)
    assert not same_tensors(finished("f-ft").product, finished("ft").product)


def test_another_seed_gives_other_weights(small_lab, facts, config, tmp_path):
    products = [
        update(small_lab, facts, config("lora", seed=seed), output=tmp_path / f"{number}").product
        for number, seed in enumerate([1, 1, 2])
    ]
    assert same_tensors(products[0], products[1])
    assert not same_tensors(products[0], products[2])


def test_only_known_false_forgets_all(small_lab, facts, config, tmp_path):
    other = [{"prompt": f"Nobody knows {n}", "target_new": "b", "ground_truth": "c"} for n in range(3)]
    mixed = write_lines(tmp_path / "facts.jsonl", disk.read_rows(facts) + other)
    for only_known, forgotten in ((True, USED), (False, USED + 3)):
        output = tmp_path / f"{only_known}"
        result = update(small_lab, mixed, config(forget__only_known=only_known), output=output)
        assert disk.read_json(output / "manifest.json")["stages"]["forget"]["facts"] == forgotten
        assert result.summary.facts.known == USED


def test_what_forgets_nothing_is_called_what_it_did_and_says_why(small_lab, config, tmp_path, caplog):
    unknown = [{"prompt": "Nobody knows", "target_new": "b", "ground_truth": "a secret"}]
    file = write_lines(tmp_path / "facts.jsonl", unknown)
    result = update(small_lab, file, config("f-lora"), output=tmp_path / "run")
    summary, nothing = result.summary, result.summary.nothing_forgotten
    assert (summary.method, summary.coef, summary.facts.known) == ("lora", None, 0)
    assert list(summary.phases) == ["base", "updated"]
    assert (nothing.asked_method, nothing.example.old) == ("f-lora", "a secret")
    (made,) = chain.chain_of(result.product)
    assert (made.method, made.coef, made.facts.forgotten) == ("lora", None, 0)
    report, card = ((result.output / name).read_text(encoding="utf-8") for name in ("report.md", "adapter/README.md"))
    assert report.startswith("# run: lora, seed 0")
    assert "forgetlearn: lora\n" in card
    for text in (caplog.text, report, card):
        assert nothing.sentence in text
    for text in (caplog.text, report):
        assert nothing.example_line.partition('"')[0] in text
    assert "a secret" not in card  # a card may be published


def test_without_generate_what_is_known_is_probed(small_lab, facts, config, tmp_path):
    settings = config(evaluate__protocols=["token"], evaluate__every_phase=False)
    result = update(small_lab, facts, settings, output=tmp_path / "run")
    assert result.summary.facts.known == USED
    assert list(result.summary.phases) == ["base", "updated"]
    assert "probe" in disk.read_json(tmp_path / "run/manifest.json")["stages"]
    assert result.summary.phases["base"]["reliability"].keys() == {"token"}


def test_save_merged(small_lab, facts, config, tmp_path):
    result = update(small_lab, facts, config("f-lora", save_merged=True), output=tmp_path / "run")
    assert tensors(tmp_path / "run/merged").keys() == tensors(small_lab).keys()
    assert not same_tensors(tmp_path / "run/merged", small_lab)
    prompts = [row["prompt"] for row in disk.read_rows(result.output / "inputs.jsonl")]
    assert forgetlearn.ask(prompts, tmp_path / "run/merged") == forgetlearn.ask(prompts, result.product)
    assert (tmp_path / "run/merged/README.md").is_file()


def test_keep_stages(small_lab, facts, config, tmp_path):
    update(small_lab, facts, config("f-ft", keep_stages=True), output=tmp_path / "run")
    assert (tmp_path / "run/stages/forget/weights.safetensors").is_file()


def test_teach_old(small_lab, records, config, tmp_path):
    prompt, old = records[0]["prompt"], records[3]["ground_truth"]
    file = write_lines(tmp_path / "f.jsonl", [{"prompt": prompt, "target_new": "b", "ground_truth": old}])
    settings = config("f-lora", teach__epochs=30, teach__learning_rate=5e-3)
    result = update(small_lab, file, settings, output=tmp_path / "run")
    assert result.summary.facts.known == 1
    assert result.summary.phases["base"]["residue"]["exact"].mean == 100.0
    taught = tmp_path / "run/taught"
    assert disk.read_json(result.product / "adapter_config.json")["base_model_name_or_path"] == str(taught)
    assert forgetlearn.ask([prompt], taught) == {prompt: old}


def test_model_and_facts_in_memory(small_lab, facts, config, finished, tmp_path):
    lm = forgetlearn.load_model(small_lab)
    fact_set = forgetlearn.read_facts(facts)
    result = update(lm.model, fact_set, config("ft", **CHANGES), output=tmp_path / "r", tokenizer=lm.tokenizer)
    assert same_tensors(result.product, finished("ft").product)


# Old answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["f-ft", "f-lora", "f-lora-ft"])
def test_forgetting_without_old_answers_names_the_way_out(small_lab, new_only, config, tmp_path, method):
    with pytest.raises(FactError, match="--old-from model"):
        update(small_lab, new_only, config(method), output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_teaching_without_old_answers_is_an_error(small_lab, new_only, config, tmp_path):
    with pytest.raises(FactError, match=r"teach\.epochs > 0"):
        update(small_lab, new_only, config("ft", teach__epochs=1), output=tmp_path / "run")


def test_learning_needs_no_old_answers(small_lab, new_only, config, tmp_path):
    result = update(small_lab, new_only, config("ft"), output=tmp_path / "run")
    assert result.summary.facts.known is None  # there was nothing to know
    assert result.summary.facts.forgotten is None
    assert result.summary.phases["base"]["residue"]["token"].as_json() == {
        "mean": None, "low": None, "high": None, "n": 0, "errored": 0, "not_asked": USED,
    }  # fmt: skip


def test_policy_model_forgets_what_the_model_says(small_lab, new_only, facts, config, finished, tmp_path):
    settings = config("f-ft", facts__old_from="model", **CHANGES)
    result = update(small_lab, new_only, settings, output=tmp_path / "run")
    assert (result.summary.facts.old_from, result.summary.facts.known) == ("model", USED)
    # The base holds the file's old answers, so asking it gives the same update.
    assert same_tensors(result.product, finished("f-ft").product)


def test_case_14_facts_without_an_old_answer_are_learned_without_being_forgotten(
    small_lab, records, config, tmp_path, capsys
):
    lines = [dict(record) for record in records]
    for line in lines[3:]:
        del line["ground_truth"]
    result = update(small_lab, write_lines(tmp_path / "f.jsonl", lines), config(**CHANGES), output=tmp_path / "run")
    told = result.summary.facts
    assert (told.used, told.left_out, told.known, told.forgotten) == (USED, {}, 3, 3)
    assert (told.old_answers, told.without_old) == ({"answers": 3}, {"no_old_answer": 3})
    updated = result.summary.phases["updated"]
    assert updated["reliability"]["generate"].n == USED
    stages = run_folder.RunFolder.open(result.output).manifest.stages
    assert (stages["forget"].notes["facts"], stages["learn"].notes["facts"]) == (3, USED)
    assert (updated["residue"]["generate"].n, updated["residue"]["generate"].not_asked) == (3, 3)
    assert "3 of 6 facts have no old answer" in (result.output / "report.md").read_text()
    assert main(["facts", str(tmp_path / "f.jsonl")]) == 0
    assert "3 of 6 facts have no old answer" in capsys.readouterr().out
    update(small_lab, tmp_path / "f.jsonl", config(**CHANGES), output=tmp_path / "run", resume=True)
    (earlier,) = chain.chain_of(result.product)
    assert chain.find_facts(earlier, [result.output]).used == USED  # for retention


def test_case_14_the_model_is_asked_once_and_only_for_what_the_file_does_not_have(
    small_lab, records, facts, config, finished, tmp_path, monkeypatch
):
    lines = [dict(record) for record in records]
    for line in lines[3:]:
        del line["ground_truth"]
    said = []
    original = scoring.Scorer.say
    monkeypatch.setattr(
        scoring.Scorer,
        "say",
        lambda self, prompts, *more: original(self, said.append(list(prompts)) or said[-1], *more),
    )
    less = {"evaluate__general_prompts": False, "evaluate__probes": ("none",)}
    settings = config(facts__old_from="answers,model", **CHANGES, **less)
    result = update(small_lab, write_lines(tmp_path / "f.jsonl", lines), settings, output=tmp_path / "run")
    assert said[0] == [record["prompt"] for record in records[3:]]
    assert len(said) == 4  # and once in each of the three phases
    told = result.summary.facts
    assert (told.old_from, told.old_answers) == ("answers,model", {"answers": 3, "model": 3})
    assert disk.read_json(result.output / "manifest.json")["old_answers"] == {"answers": 3, "model": 3}
    assert {row.fact: row.old_from for row in result.rows} == dict(
        zip([fact.id for fact in forgetlearn.read_facts(facts)], ["answers"] * 3 + ["model"] * 3, strict=True)
    )
    # The base holds the file's old answers, so asking it gives the same update.
    assert same_tensors(result.product, finished("f-ft").product)


def test_aliases_are_scored_shown_and_kept(small_lab, records, config, tmp_path):  # case 13
    facts = [
        make_fact(
            record["prompt"],
            "nobody at all",
            ground_truth="somebody else",
            ground_truth_aliases=[record["ground_truth"], "the <b>other</b>"],
            target_new_aliases=["no one"],
        )
        for record in records[:2]
    ]
    fact_set = replace(forgetlearn.read_facts(small_lab / "facts.jsonl", limit=2), facts=tuple(facts))
    folder = forgetlearn.evaluate(small_lab, fact_set, output=tmp_path / "scores")
    assert disk.read_json(folder / "summary.json")["phases"]["model"]["residue"]["generate"]["mean"] == 100
    for page in ("report.md", "report.html"):
        text = (folder / page).read_text()
        assert "nobody at all (also: no one)" in text
        assert f"somebody else (also: {records[0]['ground_truth']}, " in text
        assert "<b>other" not in text
    assert main(["report", str(folder)]) == 0
    result = update(small_lab, fact_set, config(), output=tmp_path / "run")
    assert (result.summary.facts.known, result.summary.facts.forgotten) == (2, 2)


def test_policy_model_with_no_fact_left_writes_nothing(small_lab, records, config, tmp_path):
    held = [{"prompt": record["prompt"], "target_new": record["ground_truth"]} for record in records]
    file = write_lines(tmp_path / "facts.jsonl", held)
    with pytest.raises(FactError, match="can be used"):
        update(small_lab, file, config(facts__old_from="model"), output=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["facts.jsonl"]


def test_policy_model_is_strict_too(small_lab, records, config, tmp_path):
    lines = [{"prompt": r["prompt"], "target_new": r["target_new"]} for r in records]
    lines[0]["target_new"] = records[0]["ground_truth"]
    file = write_lines(tmp_path / "facts.jsonl", lines)
    with pytest.raises(FactError, match="strict"):
        update(small_lab, file, config(facts__old_from="model", facts__strict=True), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Errors before anything is written ---------------------------------------------------------------


def test_prompt_longer_than_the_context(small_lab, config, tmp_path):
    file = write_lines(tmp_path / "f.jsonl", [{"prompt": "far " * 600, "target_new": "b", "ground_truth": "c"}])
    with pytest.raises(FactError, match="512"):
        update(small_lab, file, config(), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_base_is_never_overwritten(small_lab, facts, config, tmp_path):
    lab = Path(shutil.copytree(small_lab, tmp_path / "lab"))
    before = digests.sha256_of(lab)
    with pytest.raises(RunError, match="lab"):
        update(lab, facts, config(), output=lab, overwrite=True)
    assert digests.sha256_of(lab) == before


@pytest.mark.parametrize(("model", "facts_file"), [(None, "f.jsonl"), ("base", None)])
def test_what_is_not_named(model, facts_file, tmp_path):
    with pytest.raises(ConfigError, match="is not set"):
        update(model, facts_file, {}, output=tmp_path / "run")


# The product in other programs -------------------------------------------------------------------

PLAIN = """
import json, sys
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

answers = {}
for run in map(Path, sys.argv[2:]):
    if (run / "adapter").is_dir():
        product = run / "adapter"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), product)
    else:
        product = run / "model"
        model = AutoModelForCausalLM.from_pretrained(product)
    tokenizer = AutoTokenizer.from_pretrained(product)
    said = {}
    for line in (run / "inputs.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        said[json.loads(line)["id"]] = tokenizer.decode(out[0, inputs.input_ids.shape[1]:], skip_special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    answers[run.name] = {"said": said, "vocabulary": len(tokenizer), "rows": rows}
assert "forgetlearn" not in sys.modules
print(json.dumps(answers))
"""


def test_products_answer_as_reported_in_a_fresh_process(finished, small_lab, tmp_path):
    outputs = [finished(method).output for method in METHODS]
    command = [sys.executable, "-c", PLAIN, str(small_lab), *map(str, outputs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    vocabulary = disk.read_json(small_lab / "config.json")["vocab_size"]
    for output in outputs:
        rows = disk.read_rows(output / "facts.jsonl")
        said = {r["fact"]: r["said"] for r in rows if r["phase"] == "updated" and r["protocol"] == "generate"}
        plain = answers[output.name]
        assert {key: text.strip().split("\n")[0] for key, text in plain["said"].items()} == said
        assert plain["vocabulary"] == plain["rows"] == vocabulary


# Resume ------------------------------------------------------------------------------------------

WITH_CHILDREN = """
import gc, json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from forgetlearn.report import plots
from forgetlearn.runs.update import update
from forgetlearn.storage import run_folder
from forgetlearn.training import callbacks

torch.set_num_threads(1)
run_folder._commit = lambda: None  # somebody may commit in between
plots.plot_scores = plots.plot_losses = lambda *_: None  # they take their time, and are made of what is compared

def go_on(job, output):
    '''Go on with an update, and end this process with it: 0 if it went well.'''
    try:
        update(job["base"], job["facts"], job["config"], output=output, resume=True)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""
KILLER = """
save = run_folder.RunFolder._save

def run_in_child(job, output, kill=None):
    '''Wait status of an update in a process that kills itself before or after the nth save of the manifest.'''
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    saves = []
    def counted(run):
        saves.append(1)
        for moment in ("before", "after"):
            if kill == (len(saves), moment):
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "before":
                save(run)
    run_folder.RunFolder._save = counted
    go_on(job, output)

root, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, job in jobs.items():
    whole = root / name / "whole" / "run"
    update(job["base"], job["facts"], job["config"], output=whole)  # here, so that the children need no imports
    n_saves = len(run_folder.RunFolder.open(whole).manifest.stages) + 2
    gc.freeze()  # a child that collects the parent's objects spends most of its time on that
    kills = [(n, job["moments"][n % len(job["moments"])]) for n in range(1, n_saves + 1)]
    found[name] = [
        [f"{n}-{moment}", run_in_child(job, output, (n, moment)), run_in_child(job, output)]
        for n, moment in kills
        for output in [root / name / f"{n}-{moment}" / "run"]
    ]
print(json.dumps(found))
"""
# Name -> when to kill: before the manifest says that a stage is done (its folder is there), after, or in turn.
JOBS = {"f-lora": ("before", "after"), "f-ft": ("after", "before"), "f-lora-ft": ("after",), "taught": ("after",)}


@pytest.fixture(scope="module")
def killed(small_lab, records, new_only, config, tmp_path_factory):
    """`killed(name)`: a folder with a run killed at each of its saves and resumed, and each kill with its status."""
    root = tmp_path_factory.mktemp("killed")
    few = write_lines(root / "facts.jsonl", records[:3])
    olds = [records[n]["ground_truth"] for n in (2, 0, 1)]
    mixed = [record | {"ground_truth": old} for record, old in zip(records, olds, strict=False)]
    unheld = write_lines(root / "unheld.jsonl", mixed)  # the base gives other answers, so teaching changes it
    rates = {f"{stage}__learning_rate": 2e-3 for stage in ("forget", "learn")}
    configs = {name: config(name, **rates) for name in ("f-lora", "f-ft")}
    configs["f-lora-ft"] = config("f-lora-ft", facts__old_from="model", facts__limit=3, **rates)
    configs["taught"] = config("f-lora", teach__epochs=10, teach__learning_rate=5e-3, **rates)
    sources = {"f-lora-ft": new_only, "taught": unheld}
    jobs = {
        name: {
            "base": str(small_lab),
            "facts": str(sources.get(name, few)),
            "config": configs[name].model_dump(mode="json"),
            "moments": moments,
        }
        for name, moments in JOBS.items()
    }

    def of(name: str) -> tuple[Path, list[tuple[str, int]]]:
        command = [sys.executable, "-c", WITH_CHILDREN + KILLER, str(root), json.dumps({name: jobs[name]})]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        kills = json.loads(done.stdout)[name]
        assert all(rest == 0 for _kill, _status, rest in kills), done.stderr[-3000:]
        return root / name, [(kill, status) for kill, status, _rest in kills]

    return of


TIMED_OR_PLACED = ("manifest.json", "forgetlearn.json", "adapter_config.json", "README.md")


def result_files(run: Path) -> dict[str, bytes]:
    """Everything but what tells times (the manifest, the chain) or its own path (cards, adapter_config.json)."""
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in TIMED_OR_PLACED and path.parent.name != "seconds"
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "n_kills"),
    [("f-lora", 11), *(pytest.param(*more, marks=SLOW) for more in (("f-ft", 11), ("f-lora-ft", 12), ("taught", 12)))],
)
def test_killed_at_any_save_resume_gives_the_same_bytes(killed, name, n_kills):
    root, found = killed(name)
    assert len(found) == n_kills
    whole = result_files(root / "whole/run")
    assert {"facts.jsonl", "summary.json", "report.html", "logs/learn.jsonl"} <= whole.keys()
    assert any(name.endswith("model.safetensors") for name in whole)
    for kill, status in found:
        assert os.WIFSIGNALED(status), kill
        assert os.WTERMSIG(status) == signal.SIGKILL, kill
        resumed = result_files(root / kill / "run")
        assert resumed.keys() == whole.keys(), kill
        assert [name for name in whole if resumed[name] != whole[name]] == [], kill


def test_interrupted_inside_each_stage_and_resumed_the_bytes_are_the_same(
    finished, small_lab, facts, config, tmp_path, monkeypatch
):
    run, settings, whole = tmp_path / "run", config("f-lora", **CHANGES), finished("f-lora")
    on_log = callbacks.Steps.on_log

    def stopping(self, args, state, control, **kwargs):
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 2 and not state.log_history[:-2]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.Steps, "on_log", stopping)
    for stage in ("forget", "learn"):
        with pytest.raises(signals.Interrupted), signals.handled():
            update(small_lab, facts, settings, output=run, resume=True)
        assert [path.name for path in (run / f"stages/{stage}.points").iterdir()] == ["step-00000003"]
        settings = settings.model_copy(update={"checkpoint_minutes": 5.0})  # may change
    result = update(small_lab, facts, settings, output=run, resume=True)
    assert same_tensors(result.product, whole.product)
    assert (run / "logs/learn.jsonl").read_bytes() == (whole.output / "logs/learn.jsonl").read_bytes()
    steps, times = (disk.read_rows(run / f"logs/{name}learn.jsonl") for name in ("", "seconds/"))
    assert [row["step"] for row in times] == [row["step"] for row in steps]
    assert not list(run.rglob("*.points"))


RANDOM_KILLS = """
callbacks.TIMES_AS_LONG = 0  # a checkpoint after every step
root, job = Path(sys.argv[1]), json.loads(sys.argv[2])
begin = time.perf_counter()
update(job["base"], job["facts"], job["config"], output=root / "whole" / "run")
took = time.perf_counter() - begin
gc.freeze()
draw, inside = random.Random(job["seed"]), 0
for n in range(job["runs"]):
    output, kills = root / str(n) / "run", 0
    while True:
        pid = os.fork()
        if not pid:
            go_on(job, output)
        if kills < job["kills"]:
            time.sleep(draw.uniform(0.1, 0.5) * took)
            os.kill(pid, signal.SIGKILL)
            kills += 1
        status = os.waitpid(pid, 0)[1]
        inside += any((output / "stages").glob("*.points/step-*"))
        if not os.WIFSIGNALED(status):
            assert status == 0, status
            break
print(inside)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_killed_at_random_moments_resume_gives_the_same_bytes(small_lab, facts, config, tmp_path, method):
    settings = config(method, forget__epochs=6, learn__epochs=12, checkpoint_minutes=1e-9, lora__lora_dropout=0.2)
    job = {"base": str(small_lab), "facts": str(facts), "config": settings.model_dump(mode="json")}
    job |= {"seed": 0, "runs": 10, "kills": 4}
    command = [sys.executable, "-c", WITH_CHILDREN + RANDOM_KILLS, str(tmp_path), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 5, "few of the kills were inside a stage"
    whole = result_files(tmp_path / "whole/run")
    for n in range(job["runs"]):
        resumed = result_files(tmp_path / str(n) / "run")
        assert resumed.keys() == whole.keys(), n
        assert [name for name in whole if resumed[name] != whole[name]] == [], n


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learn__epochs": 2}, r"config\.learn\.epochs = 1, now it is 2"),
        ({"seed": 9}, r"config\.seed = 0, now it is 9"),
    ],
)
def test_resume_with_another_setting(small_lab, facts, config, tmp_path, changes, named):
    begin(small_lab, facts, config(), tmp_path / "run")
    with pytest.raises(RunError, match=named):
        update(small_lab, facts, config(**changes), output=tmp_path / "run", resume=True)


def begin(base, facts, config, output) -> None:
    """A run that was interrupted after its first stage."""

    class StoppedError(Exception):
        pass

    def stop(*_args, **_kwargs):
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forgetlearn.runs.pipeline.scoring.known_facts", stop)
        with pytest.raises(StoppedError):
            update(base, facts, config, output=output)


@pytest.mark.parametrize("is_finished", [False, True])
def test_resume_with_other_facts_or_base(small_lab, facts, config, tmp_path, is_finished):
    lab, own = Path(shutil.copytree(small_lab, tmp_path / "lab")), Path(shutil.copy(facts, tmp_path / "own.jsonl"))
    settings = config("ft")
    if is_finished:
        update(lab, own, settings, output=tmp_path / "run")
    else:
        begin(lab, own, settings, tmp_path / "run")
    own.write_text(own.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunError, match=r"inputs\.facts_sha256"):
        update(lab, own, settings, output=tmp_path / "run", resume=True)
    shutil.copy(facts, own)
    (lab / "tokenizer.json").write_text((lab / "tokenizer.json").read_text() + " ")
    with pytest.raises(RunError, match=r"inputs\.base_sha256"):
        update(lab, own, settings, output=tmp_path / "run", resume=True)


def test_existing_run_names_both_flags(finished, small_lab, facts, config):
    with pytest.raises(RunError, match=r"--resume .* --overwrite"):
        update(small_lab, facts, config("ft", **CHANGES), output=finished("ft").output)


def test_overwrite_runs_again(small_lab, facts, config, tmp_path):
    update(small_lab, facts, config("ft"), output=tmp_path / "run")
    update(small_lab, facts, config("lora"), output=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run/adapter").is_dir()
    assert not (tmp_path / "run/model").exists()


def test_finished_run_is_given_back_without_the_model(finished, small_lab, facts, config, monkeypatch):
    result = finished("f-lora")
    before = result_files(result.output)
    (result.output / "report.html").unlink()
    (result.output / f".report.html{disk.UNFINISHED}x").touch()  # as a kill leaves it
    monkeypatch.setattr("forgetlearn.runs.update.as_language_model", lambda *_: pytest.fail("loaded"))
    again = update(small_lab, facts, config("f-lora", **CHANGES), output=result.output, resume=True)
    assert result_files(result.output) == before
    assert not list(result.output.glob(f"*{disk.UNFINISHED}*"))
    assert (again.summary, again.product) == (result.summary, result.product)


def test_finished_run_whose_product_is_gone(small_lab, facts, config, tmp_path):
    result = update(small_lab, facts, config("lora"), output=tmp_path / "run")
    shutil.rmtree(result.product)
    with pytest.raises(RunError, match="adapter/"):
        update(small_lab, facts, config("lora"), output=tmp_path / "run", resume=True)


def test_scores_are_no_update_to_resume(small_lab, facts, config, tmp_path):
    forgetlearn.evaluate(small_lab, facts, config("lora"), output=tmp_path / "scores")
    with pytest.raises(ForgetLearnError, match="scores"):
        update(small_lab, facts, config("lora"), output=tmp_path / "scores", resume=True)


class Killed(Exception):
    """Stands in for a kill between two stages."""


@pytest.mark.parametrize("method", ["ft", "f-ft", "f-lora"])
def test_a_half_precision_base_resumes_to_the_same_bits(small_lab, records, config, tmp_path, monkeypatch, method):
    """bfloat16 weights, float32 rotary frequencies: casting the whole module once changed what came after teaching."""
    facts = write_lines(tmp_path / "facts.jsonl", records)
    settings = config(method, model__dtype="bfloat16", teach__epochs=2)
    whole = update(small_lab, facts, settings, output=tmp_path / "whole")
    own_do = run_folder.RunFolder.do

    def do_and_die(self, stage, *args, **options):
        own_do(self, stage, *args, **options)
        if stage == "teach":
            raise Killed

    monkeypatch.setattr(run_folder.RunFolder, "do", do_and_die)
    with pytest.raises(Killed):
        update(small_lab, facts, settings, output=tmp_path / "killed")
    monkeypatch.setattr(run_folder.RunFolder, "do", own_do)
    resumed = update(small_lab, facts, settings, output=tmp_path / "killed", resume=True)
    assert same_tensors(whole.product, resumed.product)
    assert resumed.rows == whole.rows


def test_a_half_precision_product_is_the_model_that_was_scored(small_lab, facts, config, tmp_path):
    settings = config("f-ft", model__dtype="bfloat16", **CHANGES)
    result = update(small_lab, facts, settings, output=tmp_path / "run")
    rows = forgetlearn.score(forgetlearn.load_model(result.product), forgetlearn.read_facts(facts), phase="updated")
    scored = [row for row in result.rows if row.phase == "updated" and row.protocol != "agreement"]
    assert {row.old_from for row in scored} == {"answers"}  # the run's own
    own = [row.model_copy(update={"old_from": None}) for row in scored]
    assert [row for row in rows if row.protocol != "agreement"] == own
    assert {str(tensor.dtype) for tensor in tensors(result.product).values()} == {"torch.bfloat16"}


def test_what_was_forgotten_and_what_auto_came_to_are_written_down(finished, small_lab, config, tmp_path):
    run = finished("f-ft")
    assert run.summary.facts.forgotten == run.summary.facts.known == USED
    model = disk.read_json(run.output / "manifest.json")["model"]
    assert (model["dtype"], model["device"], model["asked_in"]) == ("float32", "cpu", "plain text")
    unknown = write_lines(tmp_path / "f.jsonl", [{"prompt": "Who is it?", "target_new": "Ann", "ground_truth": "Zog"}])
    nothing = update(small_lab, unknown, config("f-lora"), output=tmp_path / "run")
    assert nothing.summary.facts.forgotten == 0
    assert "nothing was forgotten" in (nothing.output / "report.md").read_text()
    assert "nothing was forgotten" not in (run.output / "report.md").read_text()
    assert "safetensors&#39;" not in (run.output / "report.html").read_text()  # the hashes of a stage's files


def test_a_config_that_contradicts_what_is_passed_in_is_refused(small_lab, facts, config, tmp_path):
    lm = forgetlearn.load_model(small_lab)
    with pytest.raises(ConfigError, match=r"model\.dtype = 'bfloat16'"):
        update(lm, facts, config("ft", model__dtype="bfloat16"), output=tmp_path / "run")
    read = forgetlearn.read_facts(facts)
    with pytest.raises(ConfigError, match=r"facts\.limit = 3"):
        update(lm, read, config("ft", facts__limit=3), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("targets", ["[nothing]", "(q_proj", "[embed_tokens]"])
@pytest.mark.parametrize("method", ["lora", "f-lora-ft"])  # whose learning, and whose forgetting, trains an adapter
def test_bad_target_modules_are_found_before_anything_is_written(small_lab, facts, config, tmp_path, method, targets):
    value = [targets.strip("[]")] if targets.startswith("[") else targets
    settings = config(method, lora__target_modules=value)
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        update(small_lab, facts, settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_old_answer_that_was_cut_off_is_none(small_lab, new_only, config, tmp_path, monkeypatch):
    for module in (scorer, generation):
        monkeypatch.setattr(module, "end_ids", lambda lm: [lm.pad_id])  # which no model says: it goes on and on
    settings = config("f-lora", facts__old_from="model")
    with pytest.raises(FactError, match=rf"(?s){USED} unfinished_old_answer.*evaluate\.max_new_tokens"):
        update(small_lab, new_only, settings, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapters_card_after_teaching_does_not_name_the_untaught_base(small_lab, records, config, tmp_path):
    facts = write_lines(tmp_path / "facts.jsonl", records)
    settings = config("f-lora", teach__epochs=1, model__base_model_id="some/base")
    card = (update(small_lab, facts, settings, output=tmp_path / "run").product / "README.md").read_text()
    assert "base_model:" not in card
    assert "belongs on the taught model" in card


def test_scores_against_another_vocabulary_are_refused(small_lab, facts, tiny_model, char_tokenizer, tmp_path):
    other = forgetlearn.wrap(tiny_model(), char_tokenizer)
    with pytest.raises(ModelError, match="different vocabularies"):
        forgetlearn.evaluate(small_lab, facts, output=tmp_path / "scores", reference=other)
    assert not (tmp_path / "scores").exists()
