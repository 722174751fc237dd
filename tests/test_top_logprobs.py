"""The likeliest tokens of a base, and the divergence of another model from them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from forgetlearn.models.top_logprobs import agrees, divergence, load, save, top_logprobs


def full_divergence(before, now):
    return functional.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def test_by_hand():
    before = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    now = torch.tensor([[0.2, 0.6, 0.15, 0.05]], requires_grad=True)
    top = top_logprobs(before + 3, 2)
    assert top.ids.tolist() == [[0, 1]]
    assert top.ids.dtype == torch.int32
    assert top.logprobs.exp().tolist()[0] == pytest.approx([0.5, 0.3])
    wanted = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.6)  # the rest is 0.2 in both
    assert divergence(top, now.log() - 7).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("k", [1, 8, 40, 100])
def test_it_is_a_lower_bound_and_exact_if_all_are_kept(k):
    torch.manual_seed(0)
    before, now = 3 * torch.randn(5, 40), 3 * torch.randn(5, 40)
    found, full = divergence(top_logprobs(before, k), now), full_divergence(before, now)
    assert (found <= full + 1e-5).all()
    assert (found > 0).all()
    if k >= 40:
        assert torch.allclose(found, full, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changed_and_no_gradient(dtype):
    torch.manual_seed(0)
    logits = (20 * torch.randn(6, 50)).to(dtype).requires_grad_()
    found = divergence(top_logprobs(logits.detach(), 10), logits)
    assert found.dtype == torch.float32
    assert found.abs().max() < 1e-5
    found.sum().backward()
    assert logits.grad.abs().max() < 1e-3


def test_the_gradient_is_that_of_the_full_divergence_where_little_is_left_out():
    torch.manual_seed(0)
    before, now = 4 * torch.randn(3, 60), (4 * torch.randn(3, 60)).requires_grad_()
    full_divergence(before, now).sum().backward()
    wanted, now.grad = now.grad, None
    divergence(top_logprobs(before, 50), now).sum().backward()
    assert torch.allclose(now.grad, wanted, atol=1e-3)


def test_certainty_gives_no_infinity():
    before, now = torch.tensor([[200.0, 0, 0, 0]]), torch.tensor([[0.0, 200, 0, 0]], requires_grad=True)
    found = divergence(top_logprobs(before, 1), now)
    found.sum().backward()
    assert found.item() == pytest.approx(200, rel=0.01)
    assert torch.isfinite(now.grad).all()


def test_a_tie_counts_as_agreement():
    top = top_logprobs(torch.tensor([[1.0, 2, 2], [3, 1, 0]]), 1)
    assert agrees(top, torch.tensor([[1.0, 2, 2], [1, 3, 0]])).tolist() == [True, False]


def test_texts_come_back_from_a_file(tmp_path):
    texts = [top_logprobs(torch.randn(n, 9), 4) for n in (3, 1, 2)]
    save(texts, tmp_path / "top.safetensors")
    for before, now in zip(texts, load(tmp_path / "top.safetensors"), strict=True):
        assert torch.equal(before.ids, now.ids)
        assert torch.equal(before.logprobs, now.logprobs)
