"""Adapted layers as one operation: the numbers of peft's own, in float32 and beside a base in bfloat16."""

import pytest
import torch

from forgetlearn.config.schema import LoraSettings
from forgetlearn.models import lora, lora_products
from forgetlearn.models.lora_products import fused_adapters

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])


def adapted(tiny_model, dtype=torch.float32, **settings):
    """Return a model with a frozen adapter and one that is trained, both with random factors."""
    model = tiny_model("qwen2").to(dtype)  # its queries, keys and values have biases
    for seed, name in enumerate((lora.FORGET, lora.LEARN)):
        model = lora.attach(model, LoraSettings(r=4, lora_alpha=6, layers=1, **settings), name, seed)
    torch.manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                weight.normal_(std=0.1)
    return model.train()


def gradients(model):
    """Return the loss and the gradients of the trained factors for one text."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def calls(monkeypatch):
    """Count the layers that are computed as one operation."""
    counted = []
    apply = lora_products._Adapted.apply
    monkeypatch.setattr(lora_products._Adapted, "apply", lambda *args: (counted.append(1), apply(*args))[1])
    return counted


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("frozen_a", [False, True])
def test_loss_and_gradients_are_those_of_peft(tiny_model, calls, dtype, tolerance, frozen_a):
    model = adapted(tiny_model, dtype)
    for name, weight in model.named_parameters():
        if frozen_a and "lora_A" in name:
            weight.requires_grad_(False)
    loss, expected = gradients(model)
    assert not calls
    with fused_adapters():
        fused, found = gradients(model)
    assert len(calls) == 14  # seven layers in each of two blocks
    assert fused == pytest.approx(loss, rel=tolerance)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert relative(gradient, expected[name]) < tolerance, name
    assert gradients(model)[0] == loss  # peft's class is as before


@pytest.mark.parametrize("why", ["dropout", "autocast", "no gradients", "put aside", "hook"])
def test_what_is_more_than_these_products_stays_pefts(tiny_model, calls, why):
    model = adapted(tiny_model, lora_dropout=0.5 if why == "dropout" else 0.0)
    layer = next(module for _path, module in lora.adapted_layers(model))
    with fused_adapters():
        if why == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                model(IDS)
        elif why == "no gradients":
            with torch.no_grad():
                model(IDS)
        elif why == "put aside":
            with model.disable_adapter():
                model(IDS)
        elif why == "hook":
            layer.lora_A[lora.LEARN].register_forward_hook(lambda *_: None)
            model(IDS)
        else:
            model(IDS)
    assert len(calls) == (13 if why == "hook" else 0)


def test_the_output_may_be_changed_in_place_and_may_be_empty(tiny_model, calls):
    layer = adapted(tiny_model).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    expected = layer(x).clamp(-0.1, 0.1)
    with fused_adapters():
        found = layer(x)
        found.clamp_(-0.1, 0.1)
        assert layer(x[:, :0]).shape == (2, 0, layer.out_features)
    assert len(calls) == 2
    assert torch.allclose(found, expected, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (found, expected)))
