"""Linear layers through oneDNN: the same numbers, gradients too, and nothing left behind."""

import contextlib

import pytest
import torch
from torch import nn

from forgetlearn.models import onednn as linear
from forgetlearn.models.onednn import fast_linear_layers


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor where oneDNN is faster; counts the products that it computes."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    products = []
    multiply = linear._multiply
    monkeypatch.setattr(linear, "_slow_mkl", lambda: True)
    monkeypatch.setattr(linear, "_multiply", lambda *args: products.append(1) or multiply(*args))
    return products


def gradients(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * out).sum().backward()
    return [out.detach(), x.grad, *(weight.grad.clone() for weight in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_layer(onednn, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 256, bias=bias), torch.randn(2, 64, 128)
    plain = gradients(layer, x)
    with fast_linear_layers():
        fast = gradients(layer, x)
        with torch.inference_mode():
            assert torch.allclose(layer(x), plain[0], atol=1e-5)
    assert len(onednn) == 4  # forward, two gradients, and the forward without
    for one, other in zip(plain, fast, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_a_frozen_weight_keeps_no_input(onednn):
    layer, x = nn.Linear(128, 256, bias=False), torch.randn(128, 128, requires_grad=True)
    layer.requires_grad_(False)
    with fast_linear_layers():
        out = layer(x)
    assert out.grad_fn.saved_tensors[0] is None
    out.sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-4)


@pytest.mark.parametrize("what", ["small", "half precision", "autocast"])
def test_other_products_are_left_to_torch(onednn, what):
    layer, x = nn.Linear(128, 256), torch.randn(2 if what == "small" else 128, 128)
    if what == "half precision":
        layer, x = layer.bfloat16(), x.bfloat16()
    with fast_linear_layers(), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        layer(x)
    assert not onednn


def test_it_ends_with_the_block_and_can_be_switched_off(onednn, monkeypatch):
    plain = nn.Linear.forward
    with contextlib.suppress(KeyError), fast_linear_layers():
        assert nn.Linear.forward is not plain
        raise KeyError
    assert nn.Linear.forward is plain
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with fast_linear_layers():
        assert nn.Linear.forward is plain
