"""What the layers below the first trained one make of a text is computed once per text, and changes no number."""

import copy
from functools import partial

import pytest
import torch

from forgetlearn.config.schema import LoraSettings, StageSettings
from forgetlearn.models import attention, frozen_layers, lora
from forgetlearn.models.batches import row_by_text
from forgetlearn.models.language_model import layer_list
from forgetlearn.training.finetune import finetune
from forgetlearn.weights.task_vector import snapshot

EPOCHS = 4
SETTINGS = StageSettings(epochs=EPOCHS, batch_size=4, learning_rate=1e-3)
SIZES = {"num_hidden_layers": 6}


def texts_of(lm, n=10, alike=True):
    starts = ["Prompt" if alike else chr(ord("a") + index) for index in range(n)]
    return [lm.encoder.encode(f"{start} {'x' * i} is", f"answer {i}", end=True) for i, start in enumerate(starts)]


def train(model, texts, settings=SETTINGS):
    """Return the trained weights, the losses, and how often the lowest and the highest layer were computed."""
    model = lora.attach(copy.deepcopy(model), LoraSettings(layers=0.5), lora.LEARN, 0)
    layers = layer_list(model)[1]
    calls = {0: 0, len(layers) - 1: 0}
    for number in calls:
        layers[number].input_layernorm.register_forward_hook(
            lambda *_, number=number: calls.update({number: calls[number] + 1})
        )
    log = finetune(model, texts, settings, seed=0, pad_id=0)
    return snapshot(model), [step["loss"] for step in log.steps], list(calls.values())


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "mistral"])
def test_losses_and_weights_are_those_of_all_layers(tiny_model, lm, monkeypatch, family, alike):
    model, texts = tiny_model(family, **SIZES), texts_of(lm, alike=alike)
    weights, losses, (lowest, highest) = train(model, texts)
    monkeypatch.setattr(frozen_layers, "_fits", lambda *_: False)
    expected, wanted, (every_time, same) = train(model, texts)
    steps = 3 * EPOCHS
    assert every_time == same
    assert lowest == every_time - steps + 5  # four passes of the check, and one group of all ten texts
    assert highest == same + 2  # of the check
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert all(torch.allclose(weights[name], expected[name], atol=1e-5) for name in expected)


def prepared(model, lm, dtype=torch.float32):
    return lora.attach(model.to(dtype), LoraSettings(layers=0.5), lora.LEARN, 0), texts_of(lm)


def used(model, texts):
    """Return whether a stage would compute the lower layers once."""
    lay_out = partial(row_by_text, layout="shared_by_text")
    with (
        attention.by_text(model),
        frozen_layers.computed_once(model.train(), texts, lay_out, torch.device("cpu")) as states,
    ):
        return states is not None


def test_they_are_used_where_the_lower_layers_stay_as_they_are(tiny_model, lm):
    assert used(*prepared(tiny_model(**SIZES), lm))
    assert used(*prepared(tiny_model(**SIZES), lm, torch.bfloat16))


def test_layers_that_are_random_in_training_are_computed_each_time(tiny_model, lm):
    sizes = {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model, texts = prepared(tiny_model("gpt2", n_layer=6, resid_pdrop=0.1, **sizes), lm)
    state = torch.get_rng_state()
    assert not used(model, texts)
    assert torch.equal(torch.get_rng_state(), state)
    assert used(*prepared(tiny_model("gpt2", n_layer=6, resid_pdrop=0.0, **sizes), lm))


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.up_proj", "norm"])
def test_a_trained_weight_below_or_outside_the_layers_leaves_nothing_to_skip(tiny_model, lm, name):
    model, texts = prepared(tiny_model(**SIZES), lm)
    assert frozen_layers.first_trained(model) == 3
    for path, weight in model.named_parameters():
        if f"model.{name}.weight" in path:
            weight.requires_grad_(True)
    assert frozen_layers.first_trained(model) == 0
    assert not used(model, texts)


def test_a_model_that_reads_more_than_their_states_keeps_computing_them(tiny_model, lm):
    model, texts = prepared(tiny_model(**SIZES), lm)
    layers = layer_list(model)[1]
    seen = {}
    model.register_forward_pre_hook(lambda *_: seen.clear())
    layers[1].mlp.register_forward_hook(lambda _module, _given, out: seen.update(out=out.detach()))

    def reads(_module, _given, out):
        return out + seen.get("out", 0)  # as layers that share keys and values with lower ones

    layers[4].mlp.register_forward_hook(reads)
    assert not used(model, texts)


def test_states_too_large_for_the_model_are_not_kept(tiny_model, lm, monkeypatch):
    model, texts = prepared(tiny_model(**SIZES), lm)
    monkeypatch.setattr(frozen_layers, "LEAST_BYTES", 10)
    monkeypatch.setattr(frozen_layers, "OF_WEIGHTS", 1e-9)
    assert not used(model, texts)


def test_the_models_own_forward_passes_return(tiny_model, lm):
    model, texts = prepared(tiny_model(**SIZES), lm)
    own = layer_list(model)[1][1].forward = layer_list(model)[1][1].forward
    assert used(model, texts)
    assert vars(layer_list(model)[1][1])["forward"] is own
    assert all("forward" not in vars(layer_list(model)[1][number]) for number in (0, 2, 3, 4))
