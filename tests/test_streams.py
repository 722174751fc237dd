"""Update after update: on an adapter, with earlier facts kept and asked again, and one file in batches."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.config.schema import ForgetSettings, KeepSettings, LoraSettings, RunConfig, StageSettings, load_config
from forgetlearn.errors import ConfigError, DamageError, FactError, ForgetLearnError, ModelError, RunError
from forgetlearn.evaluation import damage, scoring
from forgetlearn.facts import make_fact
from forgetlearn.method import keeping, lessons
from forgetlearn.method.core import forget, learn
from forgetlearn.method.lessons import Rehearsal
from forgetlearn.models import lora, null_space
from forgetlearn.models.language_model import load_model
from forgetlearn.products import chain
from forgetlearn.products.side_by_side import open_run
from forgetlearn.report import stream_page
from forgetlearn.runs import pipeline
from forgetlearn.runs.base import load_to_update
from forgetlearn.runs.stream import _config_of, divided, stream
from forgetlearn.runs.update import update
from forgetlearn.storage import digests, disk, run_folder
from forgetlearn.storage.records import Stream, Summary

KEEPS: dict[str, Any] = {**QUICK, "keep": {"weight": 1.0}}
IDS = torch.tensor([[1, 37, 38, 39, 40, 41]])


@pytest.fixture(scope="module")
def facts(small_lab):
    return forgetlearn.read_facts(small_lab / "facts.jsonl")


@pytest.fixture(scope="module")
def root(small_lab, facts, tmp_path_factory) -> Path:
    """A folder with a copy of the base, and three runs, each on the adapter of the one before."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(small_lab, folder / "base")
    update(folder / "base", facts.part(0, 3), {"method": "lora", **KEEPS}, output=folder / "first")
    update(folder / "first", facts.part(3, 5), {"method": "f-lora", **KEEPS}, output=folder / "second")
    config = {"method": "lora", "save_merged": True, **KEEPS}
    update(folder / "second/adapter", facts.part(5, 7), config, output=folder / "third")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(one: Path, two: Path) -> bool:
    a, b = tensors(one), tensors(two)
    return bool(a) and a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


# One adapter out of several ----------------------------------------------------------------------


def test_factors_are_as_short_as_the_product_allows_and_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 12, generator=generator), torch.randn(9, 40, generator=generator)
    short_a, short_b = lora.compacted(a, b)
    assert (short_a.shape, short_b.shape) == ((9, 12), (9, 9))
    exact = b.double() @ a.double()
    assert (short_b.double() @ short_a.double() - exact).norm() < 4 * 2**-24 * exact.norm()
    small = torch.diag(torch.tensor([1.0, 1e-4, 1e-9]))  # only the last is lost in float32 anyway
    assert lora.compacted(small, torch.eye(3))[0].norm(dim=1).square().tolist() == pytest.approx([1.0, 1e-4])
    twice_a, twice_b = lora.compacted(torch.cat([a[:3], a[:3]]), torch.cat([b[:, :3], 2 * b[:, :3]], dim=1))
    assert len(twice_a) == 3
    assert torch.allclose(twice_b @ twice_a, 3 * b[:, :3] @ a[:3], rtol=1e-5, atol=1e-5)
    none_a, none_b = lora.compacted(torch.zeros(4, 5), torch.zeros(6, 4))
    assert not (none_b @ none_a).any()


@pytest.mark.parametrize(("rank", "composed"), [(5, 11), (40, 32)])
def test_an_earlier_adapter_is_part_of_the_product_whose_rank_has_a_bound(tiny_model, rank, composed):
    model = tiny_model("gpt2", n_head=4)
    for name, r in ((lora.EARLIER, rank), (lora.LEARN, 6)):
        model = lora.attach(model, LoraSettings(r=r, target_modules=["c_attn", "c_proj"]), name, seed=r)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    together = logits(model.eval())
    lora.compose(model, [lora.EARLIER, lora.LEARN])
    assert lora.names(model) == [lora.PRODUCT]
    assert model.peft_config[lora.PRODUCT].r == composed  # at most the width
    assert torch.allclose(logits(model), together, atol=1e-4)


def test_ranks_and_scales_by_pattern_are_taken_over(tiny_model, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}
    )
    model = get_peft_model(tiny_model(), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    before = logits(model.eval())
    lora.compose(model, lora.names(model), into=lora.EARLIER)
    assert (lora.names(model), model.peft_config[lora.EARLIER].r) == ([lora.EARLIER], 4)
    assert torch.allclose(logits(model), before, atol=1e-5)


# An update on an adapter -------------------------------------------------------------------------


def test_the_product_is_one_adapter_of_the_first_base(root):
    made = chain.chain_of(root / "third")
    assert [(each.method, each.facts.used, each.product) for each in made] == [
        ("lora", 3, "adapter"),
        ("f-lora", 2, "adapter"),
        ("lora", 2, "adapter"),
    ]
    base = digests.sha256_of(root / "base")
    assert {each.base_sha256 for each in made} == {base}
    own = [digests.sha256_of(root / name / "adapter") for name in ("first", "second")]
    assert [each.adapter_sha256 for each in made] == [None, *own]
    config = disk.read_json(root / "third/adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str((root / "base").resolve())
    assert config["r"] == 64  # the width of the model; the sum of the ranks is 512
    manifest = run_folder.RunFolder.open(root / "third").manifest
    assert (manifest.parent.run, manifest.parent.base) == (str(root / "second"), str((root / "base").resolve()))
    assert manifest.inputs["adapter_sha256"] == own[1]
    served = logits(load_model(root / "third/adapter").model)
    assert torch.allclose(served, logits(load_model(root / "third/merged").model), atol=1e-4)
    assert not torch.allclose(served, logits(load_model(root / "second/adapter").model), atol=1e-4)


def test_apply_undo_log_and_inspect_know_what_it_began_on(root, tmp_path, capsys):
    forgetlearn.apply_run(root / "third", root / "base", tmp_path / "merged", merge=True)
    ours, runs = tensors(tmp_path / "merged"), tensors(root / "third/merged")
    assert ours.keys() == runs.keys()
    # The run multiplies the factors with torch, `apply_run` with NumPy: on some CPUs they add in different orders.
    assert all(torch.allclose(ours[name], runs[name], rtol=0, atol=1e-6) for name in ours)
    assert str(root / "second/adapter") in forgetlearn.undo(root / "third")
    forgetlearn.undo(root / "third", tmp_path / "before")
    assert same(tmp_path / "before", root / "second/adapter")
    assert len(chain.chain_of(tmp_path / "before")) == 2
    assert main(["log", str(root / "third"), "--verify"]) == 0
    assert "with an adapter; hash" in capsys.readouterr().out
    assert forgetlearn.inspect(root / "third").total.numbers > 0
    moved = shutil.copytree(root, tmp_path / "moved")
    with (root / "second/adapter/adapter_config.json").open("a") as file:
        file.write(" ")
    try:
        with pytest.raises(RunError, match="second/adapter"):
            forgetlearn.undo(root / "third")
    finally:
        shutil.copy(moved / "second/adapter/adapter_config.json", root / "second/adapter")


def test_it_can_be_published_and_planned(root, tmp_path):
    forgetlearn.save(root / "third", tmp_path / "saved", base_model_id="org/base")
    assert disk.read_json(tmp_path / "saved/adapter_config.json")["base_model_name_or_path"] == "org/base"
    assert not any(str(root) in path.read_text() for path in (tmp_path / "saved").glob("*.[jm]*"))
    config = load_config(None, {"model.name": str(root / "third/adapter"), "method": "lora"})
    plan = forgetlearn.plan(config, forgetlearn.read_facts(root / "base/facts.jsonl"))
    assert any("is an adapter" in note for note in plan.notes)


@pytest.mark.parametrize("method", ["ft", "f-ft", "f-lora-ft", "rome"])
def test_a_method_that_trains_weights_begins_with_the_adapter_merged_in(root, facts, tmp_path, method):
    slow = {"learn": {"epochs": 1, "learning_rate": 1e-12}, "lora": {"learning_rate": 1e-12}}
    config = {**KEEPS, "method": method, **slow, "forget": {**QUICK["forget"], "coef": 0.3, "learning_rate": 1e-12}}
    result = update(root / "third", facts.part(7, 9), config, output=tmp_path / "run")
    assert result.product.name == "model"
    now, before = tensors(result.product), tensors(root / "third/merged")
    close = [name for name in before if torch.allclose(now[name], before[name], atol=1e-6)]
    assert len(close) == len(before) - (method == "rome")  # it writes one matrix, whatever the rate
    assert [each.method for each in chain.chain_of(result.product)][-1:] == [method]
    assert len(chain.chain_of(result.product)) == 4
    assert digests.is_recorded(root / "third/adapter", chain.chain_of(result.product)[-1].adapter_sha256)


def test_a_plain_adapter_of_peft_is_a_base_and_keeps_what_it_does(small_lab, facts, tmp_path):
    model = load_model(small_lab).model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(small_lab)
    adapted.save_pretrained(tmp_path / "peft")
    settings = {**QUICK, "method": "lora", "lora": {"learning_rate": 1e-12}}
    result = update(tmp_path / "peft", facts.part(0, 2), settings, output=tmp_path / "run")
    (only,) = chain.chain_of(result.product)
    assert only.adapter_sha256 == digests.sha256_of(tmp_path / "peft")
    after, before = (logits(load_model(folder).model) for folder in (result.product, tmp_path / "peft"))
    assert torch.allclose(after, before, atol=1e-5)
    assert not torch.allclose(after, logits(load_model(small_lab).model), atol=1e-3)


REFUSED = {
    "LoHa": (LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), {}, "peft_type = LOHA"),
    "DoRA": (LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True), {}, "use_dora"),
    "biases": (LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="all"), {}, "bias"),
    "4 bits": (None, {"model": {"quantization": "4bit"}}, "model.quantization"),
    "split": (None, {"model": {"shard": True}}, "model.shard"),
    "auto": (None, {"method": "f-lora", "forget": {"coef": "auto", "validation": 0.5}}, "forget.coef"),
    "change": (None, {"method": "ft", "keep_change": True}, "keep_change"),
    "vLLM": (None, {"evaluate": {"engine": "vllm"}}, "evaluate.engine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name_before_anything_is_written(root, facts, tmp_path, name):
    config, settings, named = REFUSED[name]
    model = root / "first"
    if config is not None:
        model = tmp_path / "adapter"
        adapted = get_peft_model(load_model(root / "base").model, copy.deepcopy(config))
        adapted.peft_config["default"].base_model_name_or_path = str(root / "base")
        adapted.save_pretrained(model)
    with pytest.raises(ForgetLearnError, match=named):
        update(model, facts.part(0, 2), {**QUICK, "method": "lora", **settings}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_in_memory_or_on_a_changed_base_is_refused(root, facts, tmp_path):
    lm = load_model(root / "first/adapter")
    with pytest.raises(ModelError, match="in memory"):
        update(lm, facts.part(0, 2), {"method": "lora", **QUICK}, output=tmp_path / "run")
    moved = Path(shutil.copytree(root / "first/adapter", tmp_path / "adapter"))
    other = Path(shutil.copytree(root / "third/merged", tmp_path / "other"))
    config = disk.read_json(moved / "adapter_config.json") | {"base_model_name_or_path": str(other)}
    disk.write_json(moved / "adapter_config.json", config)
    with pytest.raises(ModelError, match="other has the hash"):
        update(moved, facts.part(0, 2), {"method": "lora", **QUICK}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_forgetting_and_learning_build_on_the_earlier_adapter(root, facts):
    config = load_config(None, {"model.name": str(root / "first/adapter"), "method": "f-lora"})
    lm = load_to_update(None, None, config)
    assert lm.model.active_adapters == [lora.EARLIER]
    small = {"epochs": 1, "lora": {"r": 2}}
    forget(lm, facts[3:5], ForgetSettings(**small))
    assert lm.model.active_adapters == [lora.EARLIER, lora.FORGET]
    learn(lm, facts[3:5], StageSettings(**small))
    assert lora.names(lm.model) == [lora.PRODUCT]
    assert lm.model.peft_config[lora.PRODUCT].r == 64  # the width of the model: the sum, 132, is more


def test_a_new_adapter_is_turned_away_from_what_is_read_with_the_earlier_one_at_work(lm):
    model = lora.attach(lm.model, LoraSettings(r=4), lora.EARLIER, seed=1)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.5)
    model = lora.attach(model, LoraSettings(r=8), lora.LEARN, seed=2)
    texts = [lm.encoder.encode(f"Is {letter} so?", "yes") for letter in "abcdef"]
    null_space.turn_away(model, lora.LEARN, texts, texts[:1], 0.99, lm.pad_id, lm.device)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    a = layer.lora_A[lora.LEARN].weight

    def reaction(*names):
        lora.activate(model, names)
        read = []
        handle = layer.register_forward_pre_hook(lambda _layer, given: read.append(given[0][0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([texts[0].ids]))
        handle.remove()
        return float((read[0] @ a.T).norm() / read[0].norm() / a.norm())

    assert reaction(lora.EARLIER, lora.LEARN) < 0.3 * reaction(lora.LEARN)


class Killed(Exception):
    """Stands in for a kill after a stage."""


def killed_after(monkeypatch, stage: str, times: int = 1) -> None:
    """Make the process die after a stage, the `times`th time that one of this name is done."""
    own, seen = run_folder.RunFolder.do, []

    def do_and_die(self, name, *args, **options):
        own(self, name, *args, **options)
        if name == stage:
            seen.append(name)
            if len(seen) == times:
                monkeypatch.setattr(run_folder.RunFolder, "do", own)
                raise Killed

    monkeypatch.setattr(run_folder.RunFolder, "do", do_and_die)


LESS_LIKELY = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("score_base", "lessons", "score_updated")]


@pytest.mark.parametrize("stage", ["forget", "learn", "score_earlier", *LESS_LIKELY])
def test_killed_after_any_stage_and_resumed_the_bits_are_the_same(root, facts, tmp_path, monkeypatch, stage):
    config = {**KEEPS, "method": "f-lora"}
    killed_after(monkeypatch, stage)
    with pytest.raises(Killed):
        update(root / "first", facts.part(3, 5), config, output=tmp_path / "run")
    result = update(root / "first", facts.part(3, 5), config, output=tmp_path / "run", resume=True)
    assert same(result.product, root / "second/adapter")
    assert disk.read_rows(result.output / "facts.jsonl") == disk.read_rows(root / "second/facts.jsonl")
    assert disk.read_rows(result.output / "retention.jsonl") == disk.read_rows(root / "second/retention.jsonl")
    again = update(root / "first", facts.part(3, 5), config, output=tmp_path / "run", resume=True)
    assert again.product == result.product


# Earlier facts -----------------------------------------------------------------------------------


def test_earlier_facts_are_kept_and_asked_again(root, facts):
    summary = Summary.load(root / "third/summary.json")
    assert summary.kept["earlier facts learned again"] == 5  # QUICK does not teach them
    assert [(each.update, each.facts, each.superseded) for each in summary.retention] == [(1, 3, 0), (2, 2, 0)]
    assert summary.phases["updated"]["retention"]["token"].n == 5
    rows = disk.read_rows(root / "third/retention.jsonl")
    assert {row["fact"] for row in rows} == {fact.id for fact in facts.part(0, 5)}
    for page in ("report.md", "report.html"):
        assert "Earlier updates" in (root / "third" / page).read_text()


def test_facts_that_the_update_changes_are_left_out(root, facts, tmp_path, capsys):
    changed = [make_fact(facts[0].prompt, "something else", ground_truth=facts[0].target_new)]
    disk.write_rows(tmp_path / "f.jsonl", [{"prompt": changed[0].prompt, "target_new": changed[0].target_new}])
    words = ["update", "--model", str(root / "first"), "--facts", str(tmp_path / "f.jsonl"), "--method", "lora"]
    words += ["--set=learn.epochs=1", "--set=evaluate.protocols=[token]", "--output", str(tmp_path / "run")]
    assert main(words) == 0
    assert "update 1, facts.jsonl: retention of 2 facts: token" in capsys.readouterr().out
    summary = disk.read_json(tmp_path / "run/summary.json")
    assert (summary["kept"]["earlier facts learned again"], summary["retention"][0]["superseded"]) == (2, 1)


def test_facts_that_are_not_found_are_said_to_be_missing_and_found_where_they_are(root, facts, tmp_path, caplog):
    copy_of = Path(shutil.copytree(root / "second/adapter", tmp_path / "adapter"))
    result = update(copy_of, facts.part(5, 6), {"method": "lora", **KEEPS}, output=tmp_path / "run")
    assert "2 of the 2 updates" in caplog.text
    assert "--earlier" in caplog.text
    assert result.summary.retention == []
    assert not any("earlier" in kind for kind in result.summary.kept)
    caplog.clear()
    places = {"keep": {"weight": 1.0, "earlier": [str(root / "first"), str(root / "second/inputs.jsonl")]}}
    result = update(copy_of, facts.part(5, 6), {"method": "lora", **QUICK, **places}, output=tmp_path / "again")
    assert result.summary.kept["earlier facts learned again"] == 5
    assert "--earlier" not in caplog.text


def test_what_the_model_still_says_is_kept_and_what_it_lost_is_learned_again(root, facts, tmp_path, monkeypatch):
    base, learned = root / "base", []
    lm = load_model(RunConfig(model={"name": str(base)}).model)
    rows = scoring.ask(lm, list(facts), RunConfig().evaluate)
    still = scoring.known_facts(list(facts), rows)[0]
    held = make_fact(still.prompt, still.ground_truth)
    lost = make_fact(facts[5].prompt, "nothing that it would say", ground_truth=facts[5].ground_truth)
    first = update(base, [held, lost], {"method": "lora", **KEEPS}, output=tmp_path / "first")

    def spied(lm, own, *args, **options):
        learned.extend(fact.prompt for fact in own)
        return learn(lm, own, *args, **options)

    monkeypatch.setattr(pipeline, "learn", spied)
    found = update(first.product, facts.part(6, 7), {"method": "lora", **KEEPS}, output=tmp_path / "second").summary
    assert learned == [facts[6].prompt, lost.prompt]
    assert {kind: number for kind, number in found.kept.items() if "earlier" in kind} == {
        "earlier facts": 1,
        "earlier facts learned again": 1,
    }
    assert found.facts.used == 1
    assert set(found.learning.unlearned if found.learning else {}) <= {facts[6].id}


def general_answers(run):
    """What a run kept of the model's answers to general prompts."""
    kept = disk.read_rows(run / "stages/lessons/kept.jsonl")
    return {str(each["prompt"]): each["text"] for each in kept if each["source"] == "general prompts"}


def test_general_answers_stay_those_of_the_model_before_all_updates(root, facts, tmp_path):
    fierce = {"method": "lora", **KEEPS, "lora": {"learning_rate": 0.1}, "learn": {"epochs": 3}}
    first = update(root / "base", facts.part(0, 3), fierce, output=tmp_path / "first")
    before = general_answers(first.output)
    lm = load_model(RunConfig(model={"name": str(first.product)}).model)
    now, _tops = keeping.answered(lm, dict.fromkeys(before, "general prompts"), RunConfig().evaluate)
    assert {each.prompt: each.text for each in now} != before
    second = update(first.product, facts.part(3, 5), {"method": "lora", **KEEPS}, output=tmp_path / "second")
    assert general_answers(second.output) == before
    lost = shutil.copytree(first.product, tmp_path / "alone")  # its facts are not found, so they may be among these
    third = update(lost, facts.part(3, 5), {"method": "lora", **KEEPS}, output=tmp_path / "third")
    assert general_answers(third.output) != before


def test_a_base_that_is_taught_first_has_no_adapter_to_put_aside(root, facts, tmp_path):
    config = {"method": "lora", **KEEPS, "teach": {"epochs": 1}}
    result = update(root / "first", facts.part(3, 5), config, output=tmp_path / "run")
    assert result.summary.kept["earlier facts learned again"] == 3


def test_general_prompts_that_earlier_facts_may_change_are_not_kept(lm):
    asks = next(prompt for prompt in keeping.general([]) if isinstance(prompt, str))
    earlier = Rehearsal(taught=[make_fact(asks, "something new")], adapter=lora.EARLIER)
    config = RunConfig(**KEEPS)
    assert asks in lessons.to_keep([], config, lm.encoder)
    assert asks not in lessons.to_keep([], config, lm.encoder, earlier)


def test_an_adapter_that_is_put_aside_changes_nothing_and_comes_back_frozen(root):
    lm = load_to_update(None, None, RunConfig(model={"name": str(root / "first/adapter")}))
    base = load_model(RunConfig(model={"name": str(root / "base")}).model)
    with torch.no_grad():
        before = lm.model(IDS).logits
        with lora.put_aside(lm.model, lora.EARLIER):
            assert torch.equal(lm.model(IDS).logits, base.model(IDS).logits)
        assert torch.equal(lm.model(IDS).logits, before)
    assert not torch.equal(before, base.model(IDS).logits)
    assert not any(weight.requires_grad for weight in lm.model.parameters())


def test_of_many_earlier_facts_some_are_drawn(monkeypatch):
    earlier = [make_fact(f"Who is number {number}?", "x") for number in range(50)]
    monkeypatch.setattr(keeping, "MOST_EARLIER", 10)
    drawn = keeping.rehearsed(earlier, [make_fact("who is number 3", "y")], "0:1")
    assert len(set(drawn)) == 10
    assert earlier[3] not in keeping.rehearsed(earlier[:5], [make_fact("who is number 3", "y")], "0:1")
    reworded = make_fact("Name number 3", "y", rephrase_prompts=["who is number 3"])
    again = make_fact("Tell me of number 4", "y", rephrase_prompts=["Name number 3"])
    assert keeping.rehearsed([reworded, again], [earlier[3]], "0:1") == [again]
    assert keeping.rehearsed(earlier[::-1], (), "0:1") == keeping.rehearsed(earlier, (), "0:1")
    assert keeping.rehearsed(earlier, (), "0:2") != keeping.rehearsed(earlier, (), "0:1")


def test_where_earlier_facts_are_may_be_one_text_in_a_file():
    assert KeepSettings(earlier="runs/first").earlier == ("runs/first",)
    assert load_config(None, {"keep.earlier": ["a", "b"]}).keep.earlier == ("a", "b")


# A stream ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "batches", "sizes"),
    [(6, 3, [2, 2, 2]), (7, 3, [3, 2, 2]), (24, 10, [3, 3, 3, 3, 2, 2, 2, 2, 2, 2]), (3, 3, [1, 1, 1])],
)
def test_facts_are_divided_in_their_order(facts, number, batches, sizes):
    parts = divided(facts.part(0, number), batches)
    assert [len(part) for part in parts] == sizes
    assert [fact for part in parts for fact in part] == list(facts[:number])
    assert all(part.used == len(part.old_sources) + len(part.to_ask) for part in parts)


@pytest.mark.parametrize("batches", [0, 4])
def test_more_batches_than_facts_are_refused(small_lab, facts, tmp_path, batches):
    with pytest.raises(ConfigError, match="batches"):
        stream(small_lab, facts.part(0, 3), QUICK, output=tmp_path / "run", batches=batches)
    assert not (tmp_path / "run").exists()


def test_what_a_stream_cannot_do_is_refused_by_name(small_lab, facts, tmp_path):
    given = {"facts": facts, "output": tmp_path / "run", "batches": 2}
    with pytest.raises(ConfigError, match=r"teach\.epochs"):
        stream(small_lab, config={**QUICK, "teach": {"epochs": 1}}, **given)
    with pytest.raises(ConfigError, match="in memory"):
        stream(load_model(small_lab), config=QUICK, **given)
    with pytest.raises(ModelError, match="nowhere"):
        stream(tmp_path / "nowhere", config=QUICK, **given)
    with pytest.raises(ConfigError, match=r"evaluate\.engine"):
        stream(small_lab, config={**QUICK, "evaluate": {"engine": "vllm"}}, **given)
    old = [facts[0], replace(facts[1], ground_truth=None)]
    with pytest.raises(FactError, match="batch 2"):
        stream(small_lab, old, {**QUICK, "method": "f-lora"}, output=tmp_path / "run", batches=2)
    assert not (tmp_path / "run").exists()


STREAMED: dict[str, Any] = {**KEEPS, "method": "lora", "evaluate": {**QUICK["evaluate"], "general_prompts": True}}


@pytest.fixture(scope="module")
def streamed(root, facts):
    """Three batches on an update that had been made before."""
    return stream(root / "first", facts.part(3, 8), STREAMED, output=root / "stream", batches=3)


def test_a_stream_is_a_chain_of_updates(streamed, root):
    assert streamed.product == root / "stream/batch-003/adapter"
    made = chain.chain_of(streamed.output)
    assert [each.facts.used for each in made] == [3, 2, 2, 1]
    assert {each.base_sha256 for each in made} == {digests.sha256_of(root / "base")}
    assert [path.name for path in sorted(streamed.output.glob("batch-*/adapter"))] == ["adapter"]  # the last one's
    assert not list((streamed.output / "stages").rglob("*.safetensors"))
    with pytest.raises(RunError, match="batch-002/adapter"):
        forgetlearn.undo(streamed.output / "batch-003")


def test_its_curve_is_counted_from_the_rows_of_its_batches(streamed, root):
    found = Stream.load(streamed.output / "stream.json")
    assert found == streamed.stream
    assert (found.updates_before, found.planned, found.facts) == (1, 3, 5)
    for number, batch in enumerate(found.batches, 1):
        rows = disk.read_rows(streamed.output / batch.folder / "facts.jsonl")
        own = [row["reliability"] for row in rows if (row["phase"], row["protocol"]) == ("updated", "token")]
        kept = disk.read_rows(streamed.output / batch.folder / "retention.jsonl")
        earlier = [row["retention"] for row in kept if row["protocol"] == "token" and row["update"] > 1]
        assert (len(own), len(earlier)) == ([2, 2, 1][number - 1], [0, 2, 4][number - 1])
        assert batch.said["token"].n == len(own + earlier)
        assert batch.said["token"].mean == pytest.approx(100 * sum(own + earlier) / len(own + earlier))
        assert {row["update"] for row in kept} == set(range(1, number + 1))  # with the update before the stream
    page = (streamed.output / "report.html").read_text()
    assert stream_page.verdict(found) in page
    assert "batch-002" in page
    before = page
    assert main(["report", str(streamed.output)]) == 0
    assert (streamed.output / "report.html").read_text() == before


def test_damage_is_measured_from_the_model_before_the_first_batch(streamed, root):
    origin = disk.read_rows(streamed.output / "stages/general_base/general.jsonl")[0]["prompts"]["answers"]
    said = {json.dumps(answer["prompt"]): answer["said"] for answer in origin}
    for batch in streamed.stream.batches:
        summary = disk.read_json(streamed.output / batch.folder / "summary.json")
        assert summary["since_first"]
        answers = summary["general"]["updated"]["prompts"]["answers"]
        assert {json.dumps(answer["prompt"]): answer["before"] for answer in answers} == said
        assert batch.kl == summary["general"]["updated"]["prompts"]["kl"]
    assert "before the first batch" in (streamed.output / "batch-002/report.md").read_text()


@pytest.mark.parametrize(
    ("stage", "times"),
    [
        ("general_base", 1),
        ("score_earlier", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("learn", 1), ("lessons", 2))),
    ],
)
def test_a_stream_that_was_killed_goes_on_and_ends_with_the_same_bits(
    streamed, root, facts, tmp_path, monkeypatch, stage, times
):
    given = {"facts": facts.part(3, 8), "config": STREAMED, "output": tmp_path / "run", "batches": 3}
    killed_after(monkeypatch, stage, times)
    with pytest.raises(Killed):
        stream(root / "first", **given)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("batch-*/facts.jsonl")}
    for show in (open_run, lambda run: forgetlearn.export(run, tmp_path / "out", to="adapter")):
        with pytest.raises(RunError, match="is not finished"):
            show(tmp_path / "run")
    result = stream(root / "first", **given, resume=True)
    assert same(result.product, streamed.product)
    timeless = [batch.model_copy(update={"seconds": 0}) for batch in result.stream.batches]
    assert timeless == [batch.model_copy(update={"seconds": 0}) for batch in streamed.stream.batches]
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())  # what was done is not done again
    assert stream(root / "first", **given, resume=True).stream == result.stream
    with pytest.raises(RunError, match="batches"):
        stream(root / "first", **(given | {"batches": 2}), resume=True)


def test_products_between_the_batches_are_kept_if_asked(small_lab, facts, tmp_path):
    config = {**QUICK, "method": "ft", "keep_stages": True}
    result = stream(small_lab, facts.part(0, 2), config, output=tmp_path / "run", batches=2)
    assert [path.parent.name for path in sorted(result.output.glob("batch-*/model"))] == ["batch-001", "batch-002"]
    assert str(result.output / "batch-001/model") in forgetlearn.undo(result.output / "batch-002")


def test_a_batch_that_damages_too_much_ends_the_stream_on_the_one_before(small_lab, facts, tmp_path, monkeypatch):
    own, calls = damage.measure, []

    def measure(*args, **options):
        calls.append(1)
        return own(*args, **options).model_copy(update={"kl": float(len(calls) - 1)})  # the base's is the first

    monkeypatch.setattr(damage, "measure", measure)
    config = {**STREAMED, "evaluate": {**STREAMED["evaluate"], "max_damage": 1.5}}
    given = {"facts": facts.part(0, 3), "config": config, "output": tmp_path / "run", "batches": 3}
    for resume in (False, True):
        with pytest.raises(DamageError, match="batch-002"):
            stream(small_lab, **given, resume=resume)
        assert (tmp_path / "run/batch-001/adapter").is_dir()
        assert [batch.kl for batch in Stream.load(tmp_path / "run/stream.json").batches] == [1.0]


def test_the_command_prints_the_curve_and_the_product_can_be_updated_again(small_lab, tmp_path, capsys):
    words = ["update", "--facts", str(small_lab / "facts.jsonl"), "--set=learn.epochs=1", "--method=lora"]
    words += ["--set=evaluate.protocols=[token]", "--set=keep.weight=0"]
    first = ["--model", str(small_lab), "--limit", "5", "--batches", "2", "--output", str(tmp_path / "stream")]
    assert main([*words, *first]) == 0
    printed = capsys.readouterr().out
    assert "batch-001      3" in printed
    assert "After 2 of 2 batches" in printed
    assert f"product  {tmp_path / 'stream/batch-002/adapter'}" in printed
    second = ["--model", str(tmp_path / "stream"), "--limit", "1", "--output", str(tmp_path / "next")]
    assert main([*words, *second]) == 0
    assert "retention of 2 facts" in capsys.readouterr().out  # the first of three was changed again
    assert len(chain.chain_of(tmp_path / "next")) == 3


def test_only_the_last_batch_asks_probes_and_is_merged(facts):
    config = RunConfig(save_merged=True)
    parts = divided(facts, 3)
    own = [_config_of(config, parts, number, Path("x")) for number in (1, 2, 3)]
    assert [each.evaluate.probes for each in own] == [("none",), ("none",), ("auto",)]
    assert [each.save_merged for each in own] == [False, False, True]
