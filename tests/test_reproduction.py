"""The paper on a tiny model: its figures as printed, shared work, resume to the same bytes, the page, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, FactError, ModelError, RunError
from forgetlearn.evaluation import general_ability
from forgetlearn.models.language_model import load_model
from forgetlearn.report import paper_page
from forgetlearn.report.paper_table import Measured, PaperReport, Sign, TextRow
from forgetlearn.reproduction import gather, published
from forgetlearn.reproduction.published import SETTINGS
from forgetlearn.reproduction.request import prepare
from forgetlearn.reproduction.settings import ORDER, PaperSettings, methods_of, same_depth
from forgetlearn.runs import pipeline
from forgetlearn.runs.update import update
from forgetlearn.storage import disk

ROOT = Path(__file__).parents[1]
QUICK = {
    "model": {"prompt_template": "plain"},
    "teach": {"epochs": 1},
    "forget": {"epochs": 1, "learning_rate": 2e-3, "batch_size": 2},
    "learn": {"epochs": 1, "learning_rate": 2e-3, "batch_size": 2},
    "facts": {"limit": 3},
    "evaluate": {"max_new_tokens": 4},
}
SEEDS = (0, 1)


@pytest.fixture(scope="module", autouse=True)
def _three_coefficients():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "COEFS", (0.1, 0.3, 0.9))
        yield


@pytest.fixture(scope="module")
def files(small_lab, tmp_path_factory):
    """The lab's facts in the forms of ZsRE and COUNTERFACT."""
    folder = tmp_path_factory.mktemp("facts")
    facts = disk.read_rows(small_lab / "facts.jsonl")
    zsre, flat = [], []
    for fact in facts:
        probe, rephrase = fact["locality"][0], fact["rephrase_prompts"][0]
        zsre.append(
            {"subject": fact["subject"], "src": fact["prompt"], "pred": fact["ground_truth"], "rephrase": rephrase}
            | {"alt": fact["target_new"], "answers": ["another"], "loc": probe["prompt"], "loc_ans": probe["answer"]}
            | {"cond": ""}
        )
        flat.append(
            {"subject": fact["subject"], "prompt": fact["prompt"], "ground_truth": fact["ground_truth"]}
            | {"target_new": fact["target_new"], "rephrase_prompt": rephrase}
            | {"locality_prompt": probe["prompt"], "locality_ground_truth": probe["answer"]}
        )
    for name, records in (("zsre", zsre), ("counterfact", flat)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return {name: folder / f"{name}.json" for name in ("zsre", "counterfact")}


@pytest.fixture(scope="module")
def done(small_lab, files, tmp_path_factory):
    """A reproduction of all parts but table 5, its folder, and how often each piece of work was done."""
    counts = {"tune_on_old": 0, "forget": 0, "learn": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            own = getattr(pipeline, name)

            def counted(*args, own=own, name=name, **options):
                counts[name] += 1
                return own(*args, **options)

            patch.setattr(pipeline, name, counted)
        output = tmp_path_factory.mktemp("paper") / "out"
        settings = PaperSettings(seeds=SEEDS)
        report = forgetlearn.paper(small_lab, **files, settings=settings, config=QUICK, output=output)
    return output, report, counts


# What the paper prints ----------------------------------------------------------------------------


def test_gains_are_those_of_version_2():
    scores = SETTINGS["llama-2-7b", "zsre"].scores
    gains = [round(ours - plain, 2) for ours, plain in zip(scores["f-ft"], scores["ft"], strict=True)]
    assert gains == [3.63, 6.84, 0.41]


def test_the_settings_are_those_of_the_shipped_configs():
    found = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "configs" / "paper").glob("*.yaml")}
    assert {f"{data}-{like}" for like, data in SETTINGS} == set(found)
    for (like, data), setting in SETTINGS.items():
        text = (ROOT / "configs" / "paper" / f"{data}-{like}.yaml").read_text()
        printed = {method: float(coef) for method, coef in re.findall(r"--method (\S+) --coef (\S+)", text)}
        config = found[f"{data}-{like}"]
        assert printed | {"f-ft": config["forget"]["coef"]} == setting.coefs
        rates = {config[section]["learning_rate"] for section in ("teach", "forget", "learn", "lora")}
        assert rates == {setting.learning_rate}


def test_a_layer_is_found_by_its_relative_depth():
    assert [same_depth(published.FT_C_LAYER, layers) for layers in (32, 30, 2)] == [21, 19, 1]


def test_every_method_of_the_papers_tables_is_here():
    for like, data in SETTINGS:
        assert {*methods_of(like, data), published.ORIGINAL} == set(SETTINGS[like, data].scores)


def test_bloom_has_table_2_and_a_shipped_config_may_be_given(small_lab, files):
    config = load_config(ROOT / "configs" / "paper" / "zsre-llama-7b.yaml", {"model.prompt_template": "plain"})
    request = prepare(small_lab, zsre=files["zsre"], settings=PaperSettings(like="bloom-7b"), config=config)
    assert request.parts[0] == "table2"
    (data,) = request.data
    coefs = {method: own.forget.number for method, own in data.configs.items() if METHODS[method].forgets}
    assert coefs == {"f-lora": 0.1, "f-lora-ft": 3, "f-ft": 0.2}
    assert {own.teach.epochs for own in data.configs.values()} == {0}
    assert data.teaching.teach.epochs == 3


# One reproduction ---------------------------------------------------------------------------------


def test_all_parts_are_reported(done):
    output, report, _counts = done
    assert PaperReport.load(output / "paper.json") == report
    assert [table.data for table in report.scores] == ["ZsRE", "COUNTERFACT"]
    for table in report.scores:
        assert table.rows[0].method == "original"
        assert {row.method for row in table.rows} == set(SETTINGS["llama-2-7b", "zsre"].scores)
        assert all(row.ours["reliability"].n_seeds == len(SEEDS) for row in table.rows)
    assert {(row.method, edits) for row in report.times for edits in row.seconds} >= {("ft", 1), ("f-ft", 1)}
    assert next(row.ratios for row in report.times if row.method == "ft") == {1: 1.0}
    assert len(report.texts) == 3
    assert [len(each.points) for each in report.curves] == [4, 4]  # and the original
    original = report.curves[0].points[0]
    assert (original.coef, original.ours["reliability"].mean, original.ours["locality"].mean) == (0, 100, 100)
    assert report.not_measured == ["Table 5"]
    assert {sign.part for sign in report.signs} == {"table1", *(f"figure{number}" for number in (4, 5, 6, 7))}


def test_work_is_shared(done):
    _output, report, counts = done
    methods = [row.method for row in report.times]
    forget = [method for method in methods if METHODS[method].forgets]
    assert counts["tune_on_old"] == len(SEEDS) * 2 * 2  # on two data sets: all weights, and LoRA
    assert counts["forget"] == 2 * len(forget)  # by itself only where it is timed: one edit, after one to warm up
    assert counts["learn"] == len(SEEDS) * 2 * len(methods) + 2 * len(methods) + 1  # and once for table 4


def test_a_cell_is_an_update_of_the_taught_base(done, small_lab, files, tmp_path):
    output, _report, _counts = done
    request = prepare(small_lab, **files, settings=PaperSettings(seeds=SEEDS), config=QUICK)
    zsre = next(data for data in request.data if data.name == "zsre")
    taught = output / "zsre" / "seed1" / "shared" / "taught"
    config = zsre.configs["f-lora-ft"]
    model = config.model.model_copy(update={"name": str(taught)})
    whole = config.facts.model_copy(update={"limit": None})
    config = config.model_copy(update={"seed": 1, "model": model, "facts": whole})
    update(taught, zsre.facts, config, output=tmp_path / "run")
    cell = output / "zsre" / "seed1" / "cells" / "f-lora-ft-coef3-1epochs-seed1"
    assert (cell / "facts.jsonl").read_text() == (tmp_path / "run" / "facts.jsonl").read_text()


def test_ft_c_has_its_own_epochs_unless_some_are_given(small_lab, files):
    def learn(config):
        request = prepare(small_lab, zsre=files["zsre"], config=config)
        return request.data[0].configs["ft-c"].learn

    usual = learn({"facts": {"limit": 3}})
    assert (usual.modules, usual.epochs, usual.batch_size) == ("layers.1", 5, 1)
    assert learn(QUICK).epochs == QUICK["learn"]["epochs"]


def test_distances_are_norms_of_what_fine_tuning_added(done):
    output, report, _counts = done
    figure4, figure5 = report.distances
    moved = []
    for seed in SEEDS:
        shared = output / "zsre" / f"seed{seed}" / "shared"
        base = dict(load_model(shared / "taught").model.named_parameters())
        tuned = load_file(shared / f"old-all-weights-seed{seed}" / "weights.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        moved.append(float((tuned[name] - base[name].detach()).norm()))
    own = next(each for each in figure4.matrices if (each.layer, each.matrix) == (0, "mlp.up_proj"))
    assert own.ours.mean == pytest.approx(sum(moved) / len(moved), rel=1e-4)
    assert {each.matrix for each in figure5.matrices if each.ours.mean} == {"self_attn.q_proj", "self_attn.v_proj"}


def snapshot(folder):
    """All files that hold results, but the times, by their path in the folder."""
    names = ("paper.json", "paper.html", "facts.jsonl", "rows.jsonl", "distances.jsonl", "weights.safetensors")
    found = {file.relative_to(folder): file for file in folder.rglob("*") if file.name in names}
    return {path: file.read_bytes() for path, file in found.items() if "seconds-" not in str(path)}


def test_what_is_done_is_not_done_again(done, small_lab, files, monkeypatch):
    output, report, _counts = done
    before = snapshot(output)
    monkeypatch.setattr(pipeline, "learn", None)  # called, it fails
    monkeypatch.setattr("forgetlearn.reproduction.workspace.load_model", None)
    settings = PaperSettings(seeds=SEEDS, only=("figure6",))
    again = forgetlearn.paper(small_lab, **files, settings=settings, config=QUICK, output=output, resume=True)
    assert again == report
    assert snapshot(output) == before


def test_rows_can_be_chosen_and_others_added_later(small_lab, files, tmp_path):
    given = {"zsre": files["zsre"], "config": QUICK | {"facts": {"limit": 2}}, "output": tmp_path / "out"}

    def run(*methods, **more):
        settings = PaperSettings(seeds=(0,), only=("table1", "table3", "figure7"), methods=methods)
        return forgetlearn.paper(small_lab, **given, **more, settings=settings)

    first = run("ft", "f-ft")
    both = run("lora", resume=True)

    def measured(report):
        return [row.method for row in report.scores[0].rows if row.ours.get("reliability")]

    assert measured(first) == ["original", "ft", "f-ft"]
    assert "Table 1 on ZsRE: lora, f-lora" in first.not_measured[0]
    assert {sign.what.split(":")[0] for sign in first.signs if sign.part == "table1"} == {"f-ft over ft"}
    assert [row.method for row in first.times] == ["ft", "f-ft"]
    assert {*measured(both)} == {"original", "ft", "f-ft", "lora"}
    assert both.scores[0].rows[0] == first.scores[0].rows[0]
    settings = PaperSettings(seeds=(0,), only=("figure6",))
    again = forgetlearn.paper(small_lab, **given, settings=settings, resume=True)
    assert (again.scores, again.times) == (both.scores, both.times)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(small_lab, files, tmp_path, monkeypatch):
    settings = PaperSettings(seeds=(0,), only=("table1", "table4", "figure6"))
    monkeypatch.setattr("sys.argv", ["forgetlearn"])

    def run(folder):
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        config = QUICK | {"facts": {"limit": 2}}
        forgetlearn.paper(small_lab, zsre=files["zsre"], settings=settings, config=config, output="out", resume=True)

    run(tmp_path / "whole")
    waits, kills = iter((0.2, 0.5, 0.9, 1.3)), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                run(tmp_path / "killed")
                os._exit(0)
            except BaseException:
                os._exit(1)
        if (wait := next(waits, None)) is not None:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
    os.chdir(tmp_path)
    assert kills >= 2
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.unfinished-*"))


def test_table_5_measures_the_three_models(small_lab, files, tmp_path, monkeypatch):
    def simple_evaluate(wrapped, **_options):
        own = wrapped["pretrained"]
        norm = float(torch.cat([weight.detach().flatten().double() for weight in own.parameters()]).norm())
        return {"results": {"gsm8k": {"acc,none": norm, "acc_stderr,none": 0.01, "acc,strict": 0.1}}}

    manager = types.SimpleNamespace(all_tasks=["gsm8k"])
    harness = (
        types.SimpleNamespace(simple_evaluate=simple_evaluate),
        types.SimpleNamespace(TaskManager=lambda include_path: manager),
        types.SimpleNamespace(HFLM=lambda **given: given),
    )
    monkeypatch.setattr(general_ability, "_harness", lambda: harness)
    config = QUICK | {"evaluate": {"tasks": ["gsm8k"], "max_new_tokens": 4}}
    settings = PaperSettings(seeds=(0,), only=("table5",))
    report = forgetlearn.paper(small_lab, zsre=files["zsre"], settings=settings, config=config, output=tmp_path / "out")
    row, _strict = report.tasks
    assert row.paper == {"base": 2.35, "forgotten": 2.5, "updated": 1.44}
    assert len({score.value for score in row.ours.values()}) == 3
    assert [sign.what for sign in report.signs] == ["gsm8k (acc), updated over original"]
    config["evaluate"]["tasks"] = ["gsm9k"]
    with pytest.raises(FactError, match="gsm9k"):
        forgetlearn.paper(small_lab, zsre=files["zsre"], settings=settings, config=config, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Signs and the page -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paper", "low", "high", "verdict"),
    [
        (3.6, 0.5, 4.0, "confirmed"),
        (3.6, -4.0, -0.5, "contradicted"),
        (3.6, -1.0, 4.0, "open"),
        (-2.0, -4.0, -1.0, "confirmed"),
        (3.6, None, None, "open"),
    ],
)
def test_a_sign_is_confirmed_contradicted_or_open(paper, low, high, verdict):
    mean = 2.0 if low is None else (low + high) / 2
    assert gather.verdict_of(paper, Measured(mean=mean, low=low, high=high)) == verdict


def test_the_page_escapes_what_models_and_files_say(done, tmp_path):
    output, report, _counts = done
    nasty = '<script>alert("x")</script>'
    text = TextRow(prompt=nasty, old=nasty, new="n", said=dict.fromkeys(("base", "forgotten", "updated"), nasty))
    sign = Sign(
        part="table1",
        data="ZsRE",
        what="a",
        unit="points",
        paper=1,
        verdict="open",
        ours=Measured(mean=1, low=None, high=None),
    )
    changed = report.model_copy(update={"model": nasty, "texts": [text], "signs": [sign]})
    from forgetlearn.storage.run_folder import RunFolder

    paper_page.write_page(tmp_path, changed, RunFolder.open(output).manifest)
    page = (tmp_path / "paper.html").read_text()
    assert nasty not in page
    assert "&lt;script&gt;alert" in page
    assert not re.search(r'(src|href)="(?!#)', page)


def test_report_writes_the_page_again(done, capsys):
    output, _report, _counts = done
    before = (output / "paper.html").read_bytes()
    (output / "paper.html").unlink()
    assert main(["report", str(output)]) == 0
    assert (output / "paper.html").read_bytes() == before
    assert "paper.html" in capsys.readouterr().out


# Plan and bad input -------------------------------------------------------------------------------


def test_a_plan_counts_shared_work_once(small_lab, files):
    settings = PaperSettings(seeds=SEEDS, only=("table4", "figure5", "figure6"))
    plan = forgetlearn.plan_paper(small_lab, zsre=files["zsre"], settings=settings, config=QUICK, memory_gb=4, rate="1")
    times = {work.what: work.times for work in plan.work}
    assert times["ZsRE: teach old answers"] == times["ZsRE: tune on old answers, all weights"] == 2
    assert times["f-ft: learn again"] == 1
    assert sum("tune on old answers" in work.what for work in plan.work) == 2
    assert plan.fits
    assert plan.seconds == sum(work.times * work.seconds for work in plan.work)


def test_the_command_plans_and_writes_nothing(small_lab, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--only", "figure4", "--limit", "2", "--prompt-template", "plain", "--memory", "80", "--plan"]
    assert main(["paper", "--model", str(small_lab), "--zsre", str(files["zsre"]), *flags]) == 0
    assert "teach old answers" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only", "tabel1"], "Did you mean 'table1'"),
        (["--only", "table2"], "table1"),
        (["--only", "table1,table1"], "more than once"),
        (["--like", "llama-3"], "like"),
        (["--like", "bloom-7b", "--counterfact", "CF"], "counterfact"),
        (["--only", "table5"], "lm-eval"),
        (["--set", "recipe=plain"], "recipe"),
        (["--set", "forget.coef=0.5"], "forget.coef"),
        (["--set", "save_merged=true"], "save_merged"),
        (["--seeds", "-1"], "seeds"),
        (["--methods", "ft,locft"], "locft"),
        (["--rate", "400"], "--plan"),
    ],
)
def test_bad_input_names_the_setting(small_lab, files, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    words = [str(files["counterfact"]) if word == "CF" else word for word in flags]
    where = ["--model", str(small_lab), "--zsre", str(files["zsre"]), "--output", str(tmp_path / "out")]
    assert main(["paper", *where, *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_without_its_file_is_refused(small_lab, files):
    with pytest.raises(ConfigError, match="--zsre"):
        prepare(small_lab, counterfact=files["counterfact"], config=QUICK)
    with pytest.raises(ConfigError, match="table1"):
        prepare(small_lab, settings=PaperSettings(only=("table1",)), config=QUICK)


def test_a_model_without_attention_needs_target_modules(files, tiny_model, char_tokenizer, tmp_path):
    tiny_model("mamba").save_pretrained(tmp_path / "mamba")
    char_tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ConfigError, match=r"lora\.target_modules"):
        prepare(tmp_path / "mamba", zsre=files["zsre"], config=QUICK)


def test_only_the_methods_that_run_have_to_fit_the_model(files, tiny_model, char_tokenizer, tmp_path):
    tiny_model("mixtral", num_local_experts=2).save_pretrained(tmp_path / "experts")
    char_tokenizer.save_pretrained(tmp_path / "experts")

    def asked(**settings):
        return prepare(tmp_path / "experts", zsre=files["zsre"], settings=PaperSettings(**settings), config=QUICK)

    with pytest.raises(ModelError, match=r"(?s)rome: mixtral.*--methods"):
        asked()
    assert asked(only=("table1", "figure6"), methods=("ft", "f-ft")).data[0].methods == ["ft", "f-ft"]
    assert asked(only=("figure6",)).parts == ("figure6",)
    with pytest.raises(ConfigError, match="figure6 has no rows"):
        asked(only=("figure6",), methods=("ft",))


def test_a_rate_of_an_edit_that_is_given_is_taken_even_if_it_is_the_usual_one(small_lab, files):
    for edit, rates in (({}, (5e-3, 5e-2)), ({"learning_rate": 0.5}, (0.5, 0.5))):
        (data,) = prepare(small_lab, zsre=files["zsre"], config={**QUICK, "edit": edit}).data
        assert tuple(data.configs[method].edit.learning_rate for method in ("rome", "memit")) == rates


def test_another_model_or_other_settings_are_named(done, small_lab, files):
    output, _report, _counts = done

    def again(**changes):
        given = {"settings": PaperSettings(seeds=SEEDS), "config": QUICK} | changes
        forgetlearn.paper(small_lab, **files, **given, output=output, resume=True)

    with pytest.raises(RunError, match=r"paper\.seeds"):
        again(settings=PaperSettings(seeds=(0,)))
    with pytest.raises(RunError, match=r"run\.learn\.epochs"):
        again(config=QUICK | {"learn": {"epochs": 2}})
    with pytest.raises(RunError, match="--counterfact"):
        forgetlearn.paper(
            small_lab, zsre=files["zsre"], settings=PaperSettings(seeds=SEEDS), config=QUICK, output=output, resume=True
        )
    with pytest.raises(RunError, match="--resume"):
        forgetlearn.paper(small_lab, **files, config=QUICK, output=output)


def test_all_parts_have_a_table_or_a_figure():
    assert set(PaperSettings().parts) | set(PaperSettings(like="bloom-7b").parts) == set(ORDER)
    assert "table1" not in PaperSettings(like="bloom-7b").parts
