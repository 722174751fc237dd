"""An adapter that starts in the null space of what the model usually reads leaves that as it was."""

import pytest
import torch
from torch import nn

from architectures import make_architecture
from forgetlearn.config.schema import LoraSettings
from forgetlearn.models import lora, null_space
from forgetlearn.models.encoding import Encoded

CPU = torch.device("cpu")
KEPT = [Encoded((1, *range(10 + n, 18 + n)), 3) for n in range(3)]


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "mixtral"])
def test_whatever_b_learns_kept_texts_stay_and_others_change(name):
    model = lora.attach(make_architecture(name, hidden_size=64), LoraSettings(r=4, lora_alpha=4), lora.LEARN, 0)
    before, other = logits(model, KEPT[0].ids), [1, 90, 80, 70]
    other_before = logits(model, other)
    remaining = null_space.turn_away(model, lora.LEARN, KEPT, 1 - 1e-9, 0, CPU)
    assert 0 < remaining < 1
    trained = [path for path, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    plain = [path for path in trained if "experts" not in path]
    assert all("lora_B" in path for path in plain)
    for path, weight in model.named_parameters():
        if path in plain:
            nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    moved = (logits(model, KEPT[0].ids) - before).abs().mean()
    assert moved < 0.2 * (logits(model, other) - other_before).abs().mean()


@pytest.mark.parametrize("n_tokens", [50, 6])  # more than the width, and less
def test_the_rows_of_a_are_orthogonal_to_the_main_inputs(n_tokens):
    inputs = torch.randn(n_tokens, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(8)[:3]
    read, a = null_space._Inputs(8, n_tokens), torch.ones(2, 8)
    for part in inputs.split(2):
        read.add(part)
    main = read.main_directions(0.999999)
    null_space._project(a, main)
    assert main.shape == (8, 3)
    assert (a @ inputs.T).abs().max() < 1e-4
    assert a.norm() == pytest.approx(4)
