"""Attention within each text of a packed row: its layout by hand, and against each text alone."""

import pytest
import torch

from forgetlearn.models import attention
from forgetlearn.models.batches import answer_logits, row_by_text, row_inputs, rows_for_training
from forgetlearn.training.trainer import Collator, FactTrainer
from test_forward import CPU, TEXTS


def packed():
    row = row_by_text(TEXTS, "packed")
    return row_inputs(row), row.positions


def test_places_by_hand():
    places = attention.places([range(3), [3], range(4, 6)])
    assert places["text_tokens"].tolist() == [[0, 1, 2], [3, 3, 3], [4, 5, 5]]
    assert places["token_places"].tolist() == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "mistral"])
def test_logits_and_gradients_are_those_of_each_text_alone(tiny_model, family):
    model = tiny_model(family)
    alone = [model(torch.tensor([text.ids])).logits[0, list(text.answer_positions)] for text in TEXTS]
    torch.cat(alone).square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    with rows_for_training(model, TEXTS, "packed", 0, CPU) as (_layout, is_by_text):
        assert is_by_text
        together = answer_logits(model, *packed())[0]
        together.square().sum().backward()
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    for name, weight in model.named_parameters():
        assert torch.allclose(weight.grad, expected[name], rtol=1e-4, atol=1e-3), name


def test_what_is_not_packed_is_computed_as_before_and_the_models_own_attention_returns(tiny_model):
    model = tiny_model()
    ids, mask = torch.tensor([[0, 0, 1, 5], [1, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits[:, -1]
        with attention.by_text(model) as switched:
            assert switched
            assert torch.equal(model(ids, attention_mask=mask).logits[:, -1], before)
    assert attention.implementation(model) == "sdpa"


def test_it_is_left_alone_where_it_would_be_wrong_or_the_model_has_another_attention(tiny_model):
    sliding = tiny_model("mistral", sliding_window=4)  # the longest text has 9 tokens
    with rows_for_training(sliding, TEXTS, "packed", 0, CPU) as (_layout, is_by_text):
        assert not is_by_text
        assert attention.implementation(sliding) == "sdpa"
    eager = tiny_model(attn_implementation="eager")
    for model, layout in ((eager, "packed"), (tiny_model(), "padded")):
        with rows_for_training(model, TEXTS, layout, 0, CPU) as (_layout, is_by_text):
            assert not is_by_text


@pytest.mark.parametrize("autocasts", [False, True])
def test_training_on_short_texts_in_half_precision_attends_in_float32(tiny_model, monkeypatch, autocasts):
    sdpa, dtypes = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query, *others, **options):
        dtypes.append(query.dtype)
        return sdpa(query, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = tiny_model() if autocasts else tiny_model().bfloat16()
    inputs, positions = packed()
    with attention.by_text(model), torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        answer_logits(model, inputs, positions).float().square().sum().backward()
        assert set(dtypes) == {torch.float32}
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        if autocasts:
            return  # sdpa itself would cast, after `noted`
        for long in (True, False):
            dtypes.clear()
            monkeypatch.setattr(attention, "SHORT", 3 if long else 256)
            with torch.set_grad_enabled(long):
                answer_logits(model, inputs, positions)
            assert set(dtypes) == {torch.bfloat16}


def test_a_row_that_is_filled_up_has_the_same_logits_at_the_answers(tiny_model):
    model = tiny_model()
    with attention.by_text(model), torch.no_grad():
        lengths, logits = [], []
        for multiple in (1, 32):
            part = Collator("shared_by_text", 0, is_by_text=True, multiple=multiple)._part(TEXTS)
            lengths.append(part["input_ids"].shape[1])
            logits.append(FactTrainer._answer_logits(model, part))
    assert lengths == [lengths[0], 32]
    assert lengths[0] < 32
    assert torch.allclose(*logits, atol=1e-5)
