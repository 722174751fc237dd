"""A base held in 4 bits while adapters are trained: what it is refused for, and that it learns."""

from __future__ import annotations

import pytest
import torch

import forgetlearn
from forgetlearn.comparison.grid import CompareSettings, fill
from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, MissingExtraError
from forgetlearn.models import language_model

FOUR_BITS = {"quantization": "4bit"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"method": "f-ft"}, "changes the base's own weights"),
        ({"method": "f-lora-ft"}, "changes the base's own weights"),
        ({"method": "f-lora", "save_merged": True}, "without teach.epochs and save_merged"),
        ({"method": "f-lora", "forget": {"coef": "auto"}}, "coef = auto"),
        ({"method": "f-lora", "model": {**FOUR_BITS, "shard": True}}, "cannot be quantised"),
    ],
)
def test_what_needs_the_bases_own_weights_is_refused(small_lab, tmp_path, config, says):
    config = {"model": FOUR_BITS, **config}
    with pytest.raises(ConfigError, match=says):
        forgetlearn.update(str(small_lab), small_lab / "facts.jsonl", config, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_refused(small_lab, tmp_path):
    config = {"model": FOUR_BITS}
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        fill(small_lab, small_lab / "facts.jsonl", CompareSettings(), config, output=tmp_path / "out")


def test_without_bitsandbytes_the_extra_is_named(small_lab, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"forgetlearn\[qlora\]"):
        language_model.load_model(ModelSettings(name=str(small_lab), **FOUR_BITS))


@pytest.mark.slow
def test_gradients_are_those_of_the_base_within_what_four_bits_cost_after_scoring_too(small_lab):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra qlora)")
    whole = language_model.load_model(ModelSettings(name=str(small_lab))).model
    small = language_model.load_model(ModelSettings(name=str(small_lab), **FOUR_BITS)).model
    ids = torch.tensor([[5, 6, 7, 8, 20, 33, 40]])

    def gradient(model):
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=inputs, use_cache=False).logits.square().mean().backward()
        return inputs.grad.flatten()

    with torch.no_grad():
        small.eval()(
            input_ids=ids, use_cache=False
        )  # bitsandbytes packs the weights anew here, unless it is kept from it
    assert torch.cosine_similarity(gradient(whole), gradient(small.train()), 0) > 0.98


@pytest.mark.slow
def test_an_adapter_on_a_base_in_four_bits_learns(small_lab, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra qlora)")
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
    config = forgetlearn.load_config(
        small_lab / "update.yaml",
        {"method": "f-lora", "model.name": str(small_lab), "model.quantization": "4bit", "learn.epochs": 60},
    )
    result = forgetlearn.update(None, facts, config, output=tmp_path / "out")
    assert result.summary.phases["base"]["residue"]["token"].mean > 80
    assert result.summary.phases["updated"]["reliability"]["token"].mean > 50
    assert (result.product / "adapter_model.safetensors").is_file()
