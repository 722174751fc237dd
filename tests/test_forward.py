"""Batches by hand, and the three layouts against each other on several families of models."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from forgetlearn.errors import ModelError
from forgetlearn.models import attention
from forgetlearn.models.batches import (
    IGNORE,
    _mask,
    agree,
    answer_logits,
    choose_layout,
    computing,
    forward_parameters,
    lay_out,
    pack,
    pad_left,
    read_logits,
    share,
    shared_rows,
)
from forgetlearn.models.encoding import Encoded

CPU = torch.device("cpu")
SHORT = Encoded((1, 5, 6, 7), 3)  # answer 7
LONG = Encoded((1, 8, 9, 10, 11), 2)  # answer 9 10 11
TEXTS = [
    Encoded((1, 40, 41, 42), 3),
    Encoded((1, 50, 51, 52, 53, 54, 55, 56, 57), 4),
    Encoded((1, 60, 61, 62, 63, 64), 5),
    Encoded((1, 70), 1),
]


def flat(batch, model):
    with torch.no_grad():
        return answer_logits(model, batch.inputs, batch.positions)[batch.labels != IGNORE]


def one_by_one(model, texts):
    """The definition: a plain forward pass over the ids of each text, its logits at the answer positions."""
    with torch.no_grad():
        rows = [model(torch.tensor([text.ids])).logits[0, list(text.answer_positions)] for text in texts]
    return torch.cat(rows)


class TestByHand:
    def test_pack(self):
        batch = pack([SHORT, LONG])
        assert batch.inputs.keys() == {"input_ids", "position_ids"}
        assert batch.inputs["input_ids"].tolist() == [[1, 5, 6, 7, 1, 8, 9, 10, 11]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
        assert batch.positions.tolist() == [2, 5, 6, 7]
        assert batch.labels.tolist() == [[7, 9, 10, 11]]

    def test_pad_left(self):
        batch = pad_left([SHORT, LONG], pad_id=0)
        assert batch.inputs["input_ids"].tolist() == [[0, 1, 5, 6, 7], [1, 8, 9, 10, 11]]
        assert batch.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
        assert batch.inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
        assert batch.positions.tolist() == [1, 2, 3]
        assert batch.labels.tolist() == [[IGNORE, IGNORE, 7], [9, 10, 11]]

    def test_padding_with_eos_hides_no_eos_of_an_answer(self):
        batch = pad_left([Encoded((1, 5, 2), 2), LONG], pad_id=2)
        assert batch.inputs["input_ids"].tolist() == [[2, 2, 1, 5, 2], [1, 8, 9, 10, 11]]
        assert batch.inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
        assert batch.labels.tolist() == [[IGNORE, IGNORE, 2], [9, 10, 11]]

    def test_prompts_without_answers_have_no_labels(self):
        batch = pad_left([Encoded((1, 5), 2), Encoded((1,), 1)], pad_id=0)
        assert batch.positions.tolist() == []
        assert batch.labels.shape == (2, 0)
        assert batch.labels.dtype == torch.long

    def test_a_packed_row_that_would_be_too_long_is_padded(self):
        assert lay_out([SHORT, LONG], "packed", 0, 9).inputs["input_ids"].shape == (1, 9)
        assert lay_out([SHORT, LONG], "packed", 0, 8).inputs["input_ids"].shape == (2, 5)
        assert lay_out([SHORT, LONG], "padded", 0, 9).inputs["input_ids"].shape == (2, 5)


class TestLayoutsAgree:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox"])
    def test_packed_padded_and_one_by_one(self, tiny_model, family):
        model = tiny_model(family)
        wanted = one_by_one(model, TEXTS)
        assert wanted.std() > 0.1  # logits that are all alike would agree whatever the mask
        for batch in (pack(TEXTS), pad_left(TEXTS, 0), pad_left(TEXTS, 2)):
            torch.testing.assert_close(flat(batch, model), wanted, atol=1e-5, rtol=0)
        assert choose_layout(model, TEXTS, 0, CPU) == "packed"

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_both_kinds_of_attention(self, tiny_model, implementation):
        model = tiny_model(attn_implementation=implementation)
        torch.testing.assert_close(flat(pack(TEXTS), model), one_by_one(model, TEXTS), atol=1e-5, rtol=0)

    def test_a_cache_would_make_packing_wrong(self, tiny_model):
        # Why answer_logits turns the cache off. If this fails, transformers has changed: read engine.md.
        model = tiny_model()
        batch = pack(TEXTS)
        with torch.no_grad():
            logits = model(**batch.inputs, use_cache=True).logits[:, batch.positions]
        assert (logits[0] - one_by_one(model, TEXTS)).abs().max() > 0.1

    @pytest.mark.parametrize("family", ["mamba", "opt"])
    def test_families_that_cannot_be_packed(self, tiny_model, family):
        # A state that runs on into the next text; a mask that does not see where positions restart.
        model = tiny_model(family)
        wanted = one_by_one(model, TEXTS)
        assert (flat(pack(TEXTS), model) - wanted).abs().max() > 0.1
        torch.testing.assert_close(flat(pad_left(TEXTS, 0), model), wanted, atol=1e-5, rtol=0)
        assert choose_layout(model, TEXTS, 0, CPU) == "padded"

    def test_bfloat16_rounding_is_no_wrong_mask(self, tiny_model):
        model = tiny_model(num_hidden_layers=12).bfloat16()
        assert choose_layout(model, TEXTS, 0, CPU) == "packed"

    @pytest.mark.parametrize(
        ("dtype", "change", "agrees"),
        [
            (torch.bfloat16, 0.08, True),  # SmolLM2-135M, padded against alone
            (torch.bfloat16, 0.3, False),  # the least that a wrong mask changed
            (torch.float32, 1e-5, True),
            (torch.float32, 0.01, False),
        ],
    )
    def test_how_far_rounding_goes(self, dtype, change, agrees):
        random = torch.Generator().manual_seed(0)
        alone, noise = (torch.randn(4, 1000, generator=random) for _ in range(2))
        assert agree((alone + change * noise).to(dtype), alone.to(dtype)) is agrees


class TestAnswerLogits:
    def test_head_runs_at_answer_positions_only(self, tiny_model):
        model = tiny_model()
        seen = []
        model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
        flat(pack(TEXTS), model)
        assert seen == [(1, 1 + 5 + 1 + 1, 100)]

    def test_model_without_logits_to_keep(self, tiny_model):
        model = Old(tiny_model())
        assert "logits_to_keep" not in forward_parameters(model)
        wanted = one_by_one(model.inside, TEXTS)
        torch.testing.assert_close(flat(pack(TEXTS), model), wanted, atol=1e-5, rtol=0)
        assert choose_layout(model, TEXTS, 0, CPU) == "packed"

    def test_through_an_adapter(self, tiny_model):
        from peft import LoraConfig, get_peft_model

        model = tiny_model()
        wanted = one_by_one(model, TEXTS)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert "logits_to_keep" in forward_parameters(adapted)
        torch.testing.assert_close(flat(pack(TEXTS), adapted), wanted, atol=1e-5, rtol=0)


class Old(torch.nn.Module):
    """A model whose forward knows fewer arguments than today's."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return self.inside(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)


class RunsOn(Old):
    """Ignores that positions restart: a packed row is one long text to it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if attention_mask is None:
            position_ids = None
        return super().forward(input_ids, attention_mask, position_ids, use_cache)


class SeesPadding(RunsOn):
    """Takes padding for text as well."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids, None, None, use_cache)


class PacksButSeesPadding(Old):
    """Packs as it should, and takes padding for text."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if attention_mask is not None:
            attention_mask = position_ids = None
        return super().forward(input_ids, attention_mask, position_ids, use_cache)


class TestChooseLayout:
    @pytest.mark.parametrize(
        ("kind", "layout"),
        [(Old, "packed"), (RunsOn, "padded"), (SeesPadding, "single"), (PacksButSeesPadding, "single")],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_falls_back_from_what_is_wrong(self, tiny_model, kind, layout, dtype):
        model = kind(tiny_model().to(dtype))
        assert choose_layout(model, TEXTS, 0, CPU) == layout

    def test_many_texts_are_sampled_by_length(self, tiny_model):
        model = tiny_model()
        rows = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        texts = [Encoded((1, *range(10, 10 + n)), 1) for n in (9, 1, 2, 3, 4, 5, 6, 7, 8, 10)]
        choose_layout(model, texts, 0, CPU)
        assert rows == [2, 5, 8, 11, 4 * 11, 2 + 5 + 8 + 11]

    def test_nothing_to_compare(self, tiny_model):
        assert choose_layout(tiny_model(), [Encoded((1,), 1)], 0, CPU) == "single"

    def test_keeps_the_mode_of_the_model(self, tiny_model):
        model = tiny_model().train()
        choose_layout(model, TEXTS, 0, CPU)
        assert model.training

    def test_damaged_weights(self, tiny_model):
        model = tiny_model().train()
        with torch.no_grad():
            model.lm_head.weight[3] = float("nan")
        with pytest.raises(ModelError, match="not finite"):
            choose_layout(model, TEXTS, 0, CPU)
        assert model.training


def test_a_small_model_computes_with_one_thread_and_the_number_comes_back(tiny_model):
    torch.set_num_threads(2)
    try:
        with computing(tiny_model(), torch.device("cpu")):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# 5 6 7 8 and 5 6 9 share 5 6; 4 2 shares nothing. The answers are 7 8; 9; 2.
SHARING = [Encoded((5, 6, 7, 8), 2), Encoded((5, 6, 9), 2), Encoded((4, 2), 1)]


class TestSharedBeginnings:
    def test_a_beginning_stands_once(self):
        row = share(SHARING)
        assert row.input_ids.tolist() == [[5, 6, 7, 4]]  # the last token of a text predicts nothing
        assert row.position_ids.tolist() == [[0, 1, 2, 0]]
        assert row.paths == [[0, 1, 2], [3]]  # 5 6 is a part of the first
        assert row.positions.tolist() == [1, 2, 3]
        assert row.which.tolist() == [0, 1, 0, 2]  # 7 and 9 are predicted at the same place

    def test_rows_are_rounded_up_by_a_text_that_nobody_asks(self, tiny_model):
        row = share(SHARING, 3)
        assert row.input_ids.tolist() == [[5, 6, 7, 4, 5, 5]]
        assert row.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
        assert row.paths == [[0, 1, 2], [3], [4, 5]]
        assert (row.positions.tolist(), row.which.tolist()) == ([1, 2, 3], [0, 1, 0, 2])
        assert share(SHARING, 2).positions.tolist() == [1, 2, 3, 3]
        model, lengths = tiny_model(), []
        model.model.register_forward_pre_hook(
            lambda _, __, kw: lengths.append(kw["position_ids"].numel()), with_kwargs=True
        )
        model.lm_head.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
        for texts in (SHARING, TEXTS):
            read_logits(model, texts, "shared", 0, CPU)
        assert lengths == [32, 32, 32, 32]

    def test_a_token_sees_only_its_own_text(self):
        row = share([*SHARING, Encoded((5, 8, 8), 1)])
        assert row.paths == [[0, 1, 2], [3], [0, 4]]
        sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
        assert (_mask(row, torch.float32)[0, 0] == 0).int().tolist() == sees

    def test_long_texts_stand_in_rows_of_their_own(self):
        texts = {"long": Encoded(tuple(range(9)), 1), "a": Encoded((1, 2), 1), "b": Encoded((3, 2), 1)}
        assert shared_rows(texts, max_texts=9, max_tokens=99) == [["a", "b", "long"]]
        assert shared_rows(texts, max_texts=9, max_tokens=9) == [["a", "b"], ["long"]]

    def test_rows_keep_both_limits(self):
        texts = dict(enumerate(SHARING))
        assert shared_rows(texts, max_texts=9, max_tokens=4) == [[2, 0, 1]]
        assert shared_rows(texts, max_texts=2, max_tokens=4) == [[2, 0], [1]]
        assert shared_rows(texts, max_texts=9, max_tokens=2) == [[2], [0], [1]]  # too long a text stands alone
        assert shared_rows({}, 9, 9) == []

    @pytest.mark.parametrize(
        ("family", "by_text", "layout"),
        [
            ("llama", True, "shared_by_text"),
            ("llama", False, "shared"),
            ("gpt2", True, "shared_by_text"),
            ("qwen2", True, "shared_by_text"),
            ("gemma2", True, "shared"),  # its attention is eager
            ("opt", True, "shared_by_text"),
            ("mamba", True, "padded"),
        ],
    )
    @torch.no_grad()
    def test_logits_are_those_of_each_text_alone_or_it_is_not_chosen(self, family, by_text, layout, tiny_model):
        model, cpu = tiny_model(family), torch.device("cpu")
        texts = [Encoded((5, 6, 7, 8, 9, 10, 11), 3), Encoded((5, 6, 7, 20, 21), 3), Encoded((5, 30, 31), 1)]
        alone = torch.cat([read_logits(model, [text], "padded", 0, cpu)[0] for text in texts])
        with attention.by_text(model) if by_text else nullcontext():
            assert choose_layout(model, texts, 0, cpu, "shared") == layout
            logits, which = read_logits(model, texts, layout, 0, cpu)
        assert torch.allclose(logits[which], alone, atol=1e-4)

    def test_a_window_shorter_than_a_text_is_found_out(self, tiny_model):
        model = tiny_model("mistral", sliding_window=4)  # neither way knows of it
        with attention.by_text(model):
            assert choose_layout(model, TEXTS, 0, CPU, "shared") == "padded"

    def test_a_model_that_ignores_the_mask_is_found_out(self, tiny_model, monkeypatch):
        model = tiny_model()
        forward = model.forward

        def without(attention_mask, **inputs):
            return forward(attention_mask=attention_mask if attention_mask.dim() == 2 else None, **inputs)

        monkeypatch.setattr(model, "forward", without)
        assert choose_layout(model, TEXTS, 0, CPU, "shared") == "padded"
