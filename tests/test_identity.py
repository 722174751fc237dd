"""A base is known by the weights that are used, in memory too: the chain, a resume and the way back go by them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.comparison.grid import CompareSettings, fill
from forgetlearn.errors import ConfigError, ModelError, RunError
from forgetlearn.models.identity import identity_of, weights_sha256
from forgetlearn.models.language_model import wrap
from forgetlearn.products import chain
from forgetlearn.products.restore import apply_run, undo_run
from forgetlearn.storage import digests, disk, run_folder
from written_by_hand import change_manifest, forget_stages

FT = {"method": "ft", **QUICK}
FACTS = ("early", "late")


@pytest.fixture
def folder(tmp_path, tiny_model, char_tokenizer):
    """A folder with `base` and two files of facts."""
    tiny_model().save_pretrained(tmp_path / "base")
    char_tokenizer.save_pretrained(tmp_path / "base")
    for name in FACTS:
        rows = [{"prompt": f"Who leads {name} {n}?", "target_new": f"Ada {n}", "ground_truth": "Sam"} for n in range(2)]
        disk.write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def change(lm) -> None:
    """A change that no counter of versions sees."""
    with torch.no_grad():
        next(iter(lm.model.parameters())).data.mul_(1.01)


def inputs_of(run):
    return run_folder.RunFolder.open(run).manifest.inputs


def in_memory(lm):
    return identity_of(lm, in_memory=True)


class TestIdentity:
    def test_an_untouched_model_is_its_folder(self, folder):
        lm = forgetlearn.load_model(folder / "base")
        assert in_memory(lm) == identity_of(lm, in_memory=False) == {"base_sha256": digests.sha256_of(folder / "base")}

    @pytest.mark.parametrize("stored", ["float32", "bfloat16"])
    @pytest.mark.parametrize("loaded", ["auto", "float32", "bfloat16"])
    def test_the_dtype_that_it_is_loaded_and_trained_in_changes_nothing(self, folder, tiny_model, stored, loaded):
        tiny_model(tied=True).to(getattr(torch, stored)).save_pretrained(folder / "base")
        lm = forgetlearn.load_model(forgetlearn.config.schema.ModelSettings(name=str(folder / "base"), dtype=loaded))
        before = weights_sha256(lm)
        assert in_memory(lm)["base_sha256"]
        lm.to_float32()
        assert weights_sha256(lm) == before
        assert in_memory(lm)["base_sha256"]

    def test_any_change_is_another_identity(self, folder):
        lm = forgetlearn.load_model(folder / "base")
        before = weights_sha256(lm)
        change(lm)
        assert in_memory(lm) == {"base_sha256": None, "weights_sha256": weights_sha256(lm)}
        assert weights_sha256(lm) != before

    def test_names_and_places_of_numbers_count(self, lm):
        before = weights_sha256(lm)
        layers = lm.model.model.layers
        layers[0], layers[1] = layers[1], layers[0]
        assert weights_sha256(lm) != before
        layers[0], layers[1] = layers[1], layers[0]
        assert weights_sha256(lm) == before

    def test_tied_weights_count_once(self, tiny_model, char_tokenizer):
        tied, copied = (wrap(tiny_model(tied=True), char_tokenizer) for _ in range(2))
        assert weights_sha256(tied) == weights_sha256(copied)
        copied.model.lm_head.weight = torch.nn.Parameter(copied.model.lm_head.weight.clone())
        assert weights_sha256(tied) != weights_sha256(copied)

    def test_a_folder_of_the_name_that_is_another_model(self, folder, tiny_model, char_tokenizer):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        tiny_model(seed=1).save_pretrained(folder / "base")
        assert in_memory(wrap(model, char_tokenizer))["base_sha256"] is None


def test_case_4_a_model_updated_twice_in_memory_tells_of_both(folder):
    lm = forgetlearn.load_model(folder / "base")
    for name in FACTS:
        forgetlearn.update(lm, folder / f"{name}.jsonl", FT, output=folder / f"run-{name}")
    first, second = chain.chain_of(folder / "run-late")
    assert [first.facts.source, second.facts.source] == ["early.jsonl", "late.jsonl"]
    assert second.base_sha256 == digests.sha256_of(folder / "run-early/model") != first.base_sha256
    assert chain.runs_before(folder / "run-late")[1:] == [folder / "run-early"]
    # the same as the same two updates by folders
    for base, name in (("base", "early"), ("own-early/model", "late")):
        forgetlearn.update(folder / base, folder / f"{name}.jsonl", FT, output=folder / f"own-{name}")
    own, its = (folder / f"{run}-late/model/model.safetensors" for run in ("own", "run"))
    assert digests.sha256_of(own) == digests.sha256_of(its)


def test_case_4_a_bare_model_updated_twice_in_memory_tells_of_both(folder, char_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for name in FACTS:
        facts = folder / f"{name}.jsonl"
        forgetlearn.update(model, facts, FT, tokenizer=char_tokenizer, output=folder / f"run-{name}")
    assert len(chain.chain_of(folder / "run-late")) == 2


@pytest.mark.parametrize("method", ["ft", "lora"])
def test_case_4_changed_weights_are_not_their_folder(folder, capsys, method):
    lm = forgetlearn.load_model(folder / "base")
    change(lm)
    own = weights_sha256(lm)
    result = forgetlearn.update(lm, folder / "early.jsonl", FT | {"method": method}, output=folder / "run")
    assert inputs_of(folder / "run") | {"facts_sha256": 0} == {
        "facts_sha256": 0,
        "base_sha256": None,
        "weights_sha256": own,
    }
    (only,) = chain.chain_of(folder / "run")
    assert (only.base, only.base_sha256, only.weights_sha256) == (None, None, own)
    assert main(["log", str(folder / "run")]) == 0
    assert f"a model in memory, and what made it is not known; hash of its weights {own}" in capsys.readouterr().out
    if method == "lora":  # loaded on the folder it would be another model
        with pytest.raises(ModelError, match="in memory"):
            forgetlearn.load_model(result.product)
        with pytest.raises(ModelError, match=f"in memory.*{own}"):
            apply_run(folder / "run", folder / "base", folder / "out", merge=True)


def test_case_4_the_chain_of_the_folder_is_not_that_of_changed_weights(folder):
    forgetlearn.update(folder / "base", folder / "early.jsonl", FT, output=folder / "first")
    lm = forgetlearn.load_model(folder / "first/model")
    change(lm)
    forgetlearn.update(lm, folder / "late.jsonl", FT, output=folder / "second")
    assert len(chain.chain_of(folder / "second")) == 1
    assert run_folder.RunFolder.open(folder / "second").manifest.parent.run is None


@pytest.mark.parametrize("finished", [True, False])
def test_case_4_a_resume_with_other_weights_is_refused(folder, finished):
    lm = forgetlearn.load_model(folder / "base")
    forgetlearn.update(lm, folder / "early.jsonl", FT, output=folder / "run")
    if not finished:
        change_manifest(folder / "run", forget_stages("score_updated"))
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    other = forgetlearn.load_model(folder / "base")
    change(other)
    with pytest.raises(RunError, match="has other weights"):
        forgetlearn.update(other, folder / "early.jsonl", FT, output=folder / "run", resume=True)
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == before
    same = forgetlearn.load_model(folder / "base")
    forgetlearn.update(same, folder / "early.jsonl", FT, output=folder / "run", resume=True)
    assert run_folder.is_finished(folder / "run")


def test_case_4_a_run_in_memory_goes_on_with_the_same_weights(folder, lm, tiny_model, char_tokenizer):
    forgetlearn.update(lm, folder / "early.jsonl", FT, output=folder / "run")
    change_manifest(folder / "run", forget_stages("score_updated"))
    again = wrap(tiny_model(), char_tokenizer)
    forgetlearn.update(again, folder / "early.jsonl", FT, output=folder / "run", resume=True)
    other = wrap(tiny_model(seed=1), char_tokenizer)
    with pytest.raises(RunError, match="has other weights"):
        forgetlearn.update(other, folder / "early.jsonl", FT, output=folder / "run", resume=True)


def test_case_4_a_comparison_in_memory_is_not_mixed(folder):
    settings = CompareSettings(methods=("ft",), seeds=(0,))
    lm = forgetlearn.load_model(folder / "base")
    change(lm)
    words = {"settings": settings, "config": QUICK, "output": folder / "compared"}
    fill(lm, folder / "early.jsonl", **words)
    assert inputs_of(folder / "compared")["weights_sha256"]
    with pytest.raises(RunError, match=r"inputs\.base_sha256|weights_sha256"):
        fill(folder / "base", folder / "early.jsonl", **words, resume=True)


class TestCase21:
    def test_case_21_undo_and_keep_change_of_an_untouched_model(self, folder, char_tokenizer):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        config = FT | {"keep_change": True}
        forgetlearn.update(model, folder / "early.jsonl", config, tokenizer=char_tokenizer, output=folder / "run")
        assert "is the base, as it was" in undo_run(folder / "run")
        apply_run(folder / "run", folder / "base", folder / "again")
        assert digests.sha256_of(folder / "again") == digests.sha256_of(folder / "run/model")

    @pytest.mark.parametrize("bare", [True, False])
    def test_case_21_undo_of_what_no_folder_holds_says_what_to_do(self, folder, lm, capsys, bare):
        model, tokenizer = (lm.model, lm.tokenizer) if bare else (lm, None)
        forgetlearn.update(model, folder / "early.jsonl", FT, tokenizer=tokenizer, output=folder / "run")
        for flags in ([], ["--output", str(folder / "out")]):
            assert main(["undo", str(folder / "run"), *flags]) == 2
            error = capsys.readouterr().err
            assert "RunError" in error
            assert "model in memory" in error
            assert inputs_of(folder / "run")["weights_sha256"] in error
        assert not (folder / "out").exists()

    @pytest.mark.parametrize("bare", [True, False])
    def test_case_21_keep_change_of_what_no_folder_holds_is_refused_first(self, folder, lm, bare):
        model, tokenizer = (lm.model, lm.tokenizer) if bare else (lm, None)
        config = FT | {"keep_change": True}
        with pytest.raises(ConfigError, match=r"keep_change.*in memory.*Save it"):
            forgetlearn.update(model, folder / "early.jsonl", config, tokenizer=tokenizer, output=folder / "run")
        assert not (folder / "run").exists()
