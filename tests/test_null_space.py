"""An adapter that starts in the null space of what the model usually reads leaves that as it was."""

from functools import partial

import pytest
import torch
from torch import nn

from architectures import make_architecture
from forgetlearn.config.schema import LoraSettings
from forgetlearn.models import lora, null_space
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.lora_layers import adapted_layers

CPU = torch.device("cpu")
KEPT = [Encoded((1, *range(10 + n, 18 + n)), 3) for n in range(3)]


FACT = Encoded((1, 90, 80, 70), 2)


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "mixtral"])
def test_whatever_b_learns_kept_texts_stay_and_others_change(name):
    model = lora.attach(make_architecture(name, hidden_size=64), LoraSettings(r=4, lora_alpha=4), lora.LEARN, 0)
    before, other = logits(model, KEPT[0].ids), list(FACT.ids)
    other_before = logits(model, other)
    remaining = null_space.turn_away(model, lora.LEARN, KEPT, [FACT], 1 - 1e-9, 0, CPU)
    assert 0 < remaining < 1
    trained = [path for path, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    plain = [path for path in trained if "experts" not in path]
    assert all("lora_B" in path for path in plain)
    for path, weight in model.named_parameters():
        if path in plain:
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    moved = (logits(model, KEPT[0].ids) - before).abs().mean()
    assert moved < 0.2 * (logits(model, other) - other_before).abs().mean()


def reactions(model, texts):
    """The mean square of what each adapted layer's A and its own weight make of each token of the texts."""
    found = {layer: ([], []) for _path, layer in adapted_layers(model)}

    def watch(layer, own):
        bias = getattr(layer, "bias", None)
        return layer.register_forward_hook(
            lambda _layer, _given, out: own.append(
                (out if bias is None else out - bias).flatten(0, -2).square().mean(1)
            )
        )

    handles = [watch(layer.lora_A[lora.LEARN], own[0]) for layer, own in found.items()]
    handles += [watch(layer.get_base_layer(), own[1]) for layer, own in found.items()]
    for text in texts:
        logits(model, text.ids)
    for handle in handles:
        handle.remove()
    return {layer: tuple(torch.cat(parts) for parts in own) for layer, own in found.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
def test_a_reacts_to_the_facts_by_a_fixed_share_of_the_layers_output(name):
    model = lora.attach(make_architecture(name, hidden_size=64), LoraSettings(r=4), lora.LEARN, 0)
    facts = [FACT, Encoded((1, 81, 91, 61, 51, 41), 2)]
    texts = [Encoded(fact.ids[:-1], 1) for fact in facts]  # a shared row leaves out the last token
    before = reactions(model, texts)
    null_space.turn_away(model, lora.LEARN, KEPT, facts, 0.99, 0, CPU)
    after = reactions(model, texts)
    ratios = []
    for layer, (whole, own) in before.items():
        scaled = null_space.STRENGTH**2 * whole / (whole / own).log().mean().exp()  # the whole A at that strength
        ratios.append(after[layer][0] / scaled)
    assert torch.cat(ratios).mean() == pytest.approx(1, rel=0.05)


def test_a_model_with_rescaled_weights_that_computes_the_same_learns_the_same():
    """Families of models differ in the sizes of inputs and weights; Adam's steps must not mean more in one of them."""
    found = []
    for factor in (1, 8):
        base = make_architecture("llama", hidden_size=64)
        for layer in base.model.layers:
            for norm, block, names in (
                (layer.input_layernorm, layer.self_attn, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, layer.mlp, ("gate_proj", "up_proj")),
            ):
                norm.weight.data *= factor
                for name in names:
                    getattr(block, name).weight.data /= factor
        model = lora.attach(base, LoraSettings(r=4), lora.LEARN, 0)
        before = logits(model, FACT.ids)
        null_space.turn_away(model, lora.LEARN, KEPT, [FACT], 0.99, 0, CPU)
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        found.append((before, logits(model, FACT.ids)))
    (plain, learned), (plain_too, learned_too) = found
    assert torch.equal(plain, plain_too)
    assert not torch.allclose(learned, plain, rtol=0.1)
    assert torch.allclose(learned, learned_too, rtol=1e-3, atol=1e-4)


def test_a_layer_that_writes_nothing_gets_the_usual_scale():
    base = make_architecture("llama", hidden_size=64)
    silent = base.model.layers[-1].mlp.down_proj
    nn.init.zeros_(silent.weight)  # as in a block that was added to a model
    model = lora.attach(base, LoraSettings(r=4), lora.LEARN, 0)
    before = {layer: layer.lora_A[lora.LEARN].weight.norm() for _path, layer in adapted_layers(model)}
    null_space.turn_away(model, lora.LEARN, KEPT, [FACT], 0.99, 0, CPU)
    scales = {layer: float(layer.lora_A[lora.LEARN].weight.norm() / norm) for layer, norm in before.items()}
    (own,) = (scale for layer, scale in scales.items() if layer.get_base_layer().weight.abs().sum() == 0)
    others = [scale for layer, scale in scales.items() if layer.get_base_layer().weight.abs().sum() > 0]
    assert min(others) < own < max(others)


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


def test_what_texts_begin_with_counts_once_for_each_of_them():
    model = lora.attach(make_architecture("llama", hidden_size=64), LoraSettings(r=4), lora.LEARN, 0)
    layer = model.get_base_model().model.layers[-1].mlp.down_proj
    texts = [Encoded((1, 2, 3, 4, *range(10 + n, 15 + n)), 5) for n in (0, 10, 20)]
    energies = {}
    without_last = [Encoded(text.ids[:-1], 5) for text in texts]  # which a shared row leaves out
    for layout, given in (("shared", texts), ("padded", without_last)):
        found = null_space._Inputs(layer.in_features, 1000)
        for each in null_space._passes(model, given, layout, 0, CPU):
            with torch.no_grad():
                null_space._run(model, {layer: partial(null_space._add, found, each.counts)}, each)
        rows = torch.cat(found.parts)
        energies[layout] = rows if found.moments else rows.T @ rows
    assert torch.allclose(energies["shared"], energies["padded"], rtol=1e-3, atol=1e-5)
    assert energies["padded"].abs().max() > 0


def test_layers_that_read_the_same_share_a_null_space():
    model = lora.attach(make_architecture("llama", hidden_size=64), LoraSettings(r=4, layers=0.5), lora.LEARN, 0)
    layers = {layer: path.rsplit(".", 1)[-1] for path, layer in adapted_layers(model)}
    with torch.no_grad():
        groups = null_space._reading_alike(model, layers, KEPT[0], 0, CPU)
    names = [{layers[layer] for layer in group} for group in groups]
    assert names == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
