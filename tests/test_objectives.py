"""The losses of forgetting, by hand on literal tensors, and in a stage: packed, in micro-batches, resumed."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from forgetlearn.config.schema import ForgetSettings
from forgetlearn.method.kinds import STAGE_KINDS
from forgetlearn.models.encoding import Encoded
from forgetlearn.training import callbacks
from forgetlearn.training.finetune import finetune
from forgetlearn.training.objectives import LEARN, Ascent, AscentUntilGone, Npo, OfStep, SimNpo
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.training.trainer import Variant
from forgetlearn.weights.task_vector import snapshot

# Two texts: answers of two tokens and of one. Each row of logits is log p of four tokens.
TEXTS = (Encoded((3, 0, 1), 1), Encoded((3, 2), 1))
P = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.2, 0.6]])
LABELS = torch.tensor([0, 1, 2])  # p 1/2 and 1/4 of the first text, 1/5 of the second
STEP = OfStep(TEXTS, n_tokens=6, n_texts=4)  # half of an optimiser step
FIRST, SECOND = math.log(1 / 8), math.log(1 / 5)  # log p of each answer


def logits():
    return P.log().requires_grad_()


def number(loss):
    return float(loss.detach())


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def test_learning_is_the_mean_over_tokens_and_ascent_its_negative():
    assert number(LEARN.loss(logits(), LABELS, STEP)) == pytest.approx(-(FIRST + SECOND) / 6)
    assert number(Ascent().loss(logits(), LABELS, STEP)) == pytest.approx((FIRST + SECOND) / 6)


def test_npo_is_the_papers_formula():
    before = {TEXTS[0]: math.log(1 / 2), TEXTS[1]: math.log(1 / 10)}
    found = Npo(beta=0.5).referring_to(before).loss(logits(), LABELS, STEP)
    ratios = [FIRST - math.log(1 / 2), SECOND - math.log(1 / 10)]
    assert number(found) == pytest.approx(sum(-2 / 0.5 * log_sigmoid(-0.5 * ratio) for ratio in ratios) / 4)


def test_simnpo_is_the_papers_formula():
    found = SimNpo(beta=2.5, gamma=0.3).loss(logits(), LABELS, STEP)
    means = [FIRST / 2, SECOND]  # over the tokens of each answer
    assert number(found) == pytest.approx(sum(-2 / 2.5 * log_sigmoid(-2.5 * mean - 0.3) for mean in means) / 4)


def test_npo_goes_over_into_ascent_and_leaves_unlikely_answers_alone():
    """At p = p before, its gradient is that of ascent per text; far below, it fades."""
    at_start, far_below = logits(), logits()
    Npo(0.1).referring_to({TEXTS[0]: FIRST, TEXTS[1]: SECOND}).loss(at_start, LABELS, STEP).backward()
    climbing = logits()
    (Ascent().loss(climbing, LABELS, STEP) * STEP.n_tokens / STEP.n_texts).backward()
    assert torch.allclose(at_start.grad, climbing.grad, atol=1e-6)
    Npo(0.1).referring_to({TEXTS[0]: FIRST + 100, TEXTS[1]: SECOND + 100}).loss(far_below, LABELS, STEP).backward()
    assert float(far_below.grad.norm()) < 0.001 * float(at_start.grad.norm())


@pytest.mark.parametrize("objective", [LEARN, Ascent(), AscentUntilGone(), Npo(before={}), SimNpo()])
def test_a_process_without_a_text_adds_no_loss(objective):
    rows = torch.zeros(1, 4, requires_grad=True)
    loss = objective.loss(rows[:0], LABELS[:0], OfStep((), 6, 4))
    assert loss.requires_grad
    assert number(loss) == 0


def test_an_answer_is_gone_if_it_is_not_predicted_and_unlikely():
    """The last token is the end token, which does not count."""

    def gone(*rows):
        text = Encoded((9, *([0] * len(rows))), 1)
        return Ascent().reached(torch.tensor(rows).log(), torch.zeros(len(rows), dtype=torch.long), [text])[0]

    end = [1.0, 0.0]
    assert gone([0.1, 0.9], end)  # 2.3 nats
    assert not gone([0.2, 0.8], end)  # not predicted, but likely: 1.6 nats
    assert gone([0.04, 0.96], [0.4, 0.6], end)  # 2.1 nats on average
    assert not gone([0.1, 0.05], end)  # predicted
    assert not gone([0.9, 0.1], [0.1, 0.9])  # said; that the text would go on does not matter


def test_ascent_until_gone_leaves_answers_alone_that_are_gone():
    rows = torch.tensor([[0.01, 0.99, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]).log().clamp(min=-50).requires_grad_()
    texts = (Encoded((3, 0), 1), Encoded((3, 0), 1))
    AscentUntilGone().loss(rows, torch.tensor([0, 0]), OfStep(texts, 2, 2)).backward()
    assert rows.grad[0].abs().sum() == 0
    assert rows.grad[1, 0] > 0


def test_forgetting_by_a_loss_is_slower_than_learning_and_coef_scales_it():
    settings = ForgetSettings(coef=0.5, learning_rate=1e-3)
    rates = {how: STAGE_KINDS[how].training(settings, 64)[0].learning_rate for how in ("ascent", "npo", "lora simnpo")}
    adapter = settings.lora_rate(64)
    assert rates == {how: pytest.approx(rate) for how, rate in zip(rates, (5e-4, 1.5e-4, 0.15 * adapter), strict=True)}


# In a stage ----------------------------------------------------------------------------------------

OBJECTIVES = {"ascent": AscentUntilGone(), "npo": Npo(), "simnpo": SimNpo()}
SETTINGS = ForgetSettings(epochs=3, batch_size=8, learning_rate=1e-3)


@pytest.fixture
def never_gone(monkeypatch):
    """An untrained model says nothing, so every answer would be gone from the beginning."""
    monkeypatch.setattr("forgetlearn.training.objectives.GONE_NATS", 100.0)


def texts_of(lm, n=16):
    return [lm.encoder.encode(f"Prompt {'x' * index} is", f"answer {index}", end=True) for index in range(n)]


def log_p(model, text):
    rows = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
    return sum(rows[at, token] for at, token in zip(text.answer_positions, text.answer_ids, strict=True))


def trained(lm, name, settings=SETTINGS, **options):
    model, texts = copy.deepcopy(lm.model), texts_of(lm)
    with torch.no_grad():
        objective = OBJECTIVES[name].referring_to({text: float(log_p(model, text)) for text in texts})
    log = finetune(model, texts, settings, seed=0, pad_id=0, variant=Variant(objective), **options)
    return snapshot(model), log


def distance(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("name", "of_text"),
    [
        ("ascent", lambda log_p, before, length: log_p),
        ("npo", lambda log_p, before, length: -2 / 0.1 * torch.nn.functional.logsigmoid(-0.1 * (log_p - before))),
        ("simnpo", lambda log_p, before, length: -2 / 4.5 * torch.nn.functional.logsigmoid(-4.5 / length * log_p)),
    ],
)
def test_the_first_step_follows_the_gradient_of_the_formula(lm, name, of_text, never_gone):
    texts = texts_of(lm)
    losses = []
    for text in texts:
        now = log_p(lm.model, text)
        losses.append(of_text(now, number(now), len(text.answer_ids)))
    divided = sum(len(text.answer_ids) for text in texts) if name == "ascent" else len(texts)
    wanted = torch.autograd.grad(sum(losses) / divided, [w for w in lm.model.parameters() if w.requires_grad])
    settings = ForgetSettings(epochs=1, batch_size=16, learning_rate=1e-3, max_grad_norm=1e9, warmup_ratio=0.0)
    _weights, log = trained(lm, name, settings)
    norm = math.sqrt(sum(float(each.square().sum()) for each in wanted))
    assert log.steps[0]["loss"] == pytest.approx(number(sum(losses)) / divided, rel=1e-4)
    assert log.steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_small_batches_and_other_layouts_train_the_same(lm, name, never_gone, monkeypatch):
    whole, log = trained(lm, name)
    small, small_log = trained(lm, name, SETTINGS.model_copy(update={"micro_batch_size": 2}))
    assert [row["loss"] for row in small_log.steps] == pytest.approx([row["loss"] for row in log.steps], rel=1e-4)
    assert distance(whole, small) < 1e-4
    for layout in ("padded", "single"):
        monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args, kind=layout: kind)
        assert distance(whole, trained(lm, name)[0]) < 1e-4


class KilledError(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_killed_and_resumed_the_bits_are_those_of_one_go(lm, name, never_gone, tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"until": "forgotten", "max_epochs": 4})
    whole, log = trained(lm, name, settings)
    assert len(log.steps) > 4
    monkeypatch.setattr(callbacks, "TIMES_AS_LONG", 0)  # a checkpoint after every step
    on_log = callbacks.Steps.on_log

    def killing(self, args, state, control, **kwargs):
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 4 and self.first_step < 4:
            raise KilledError

    points = StageIO("forget", tmp_path, minutes=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Steps, "on_log", killing)
        with pytest.raises(KilledError):
            trained(lm, name, settings, stage_io=points)
    again, resumed = trained(lm, name, settings, stage_io=points)
    assert distance(whole, again) == 0
    assert resumed.steps == log.steps


def test_a_stage_ends_when_all_answers_are_gone(lm):
    finetune(lm.model, texts_of(lm, 4), SETTINGS.model_copy(update={"epochs": 60}), seed=0, pad_id=0)
    settings = SETTINGS.model_copy(update={"until": "forgotten", "max_epochs": 60, "batch_size": 4})
    log = finetune(lm.model, texts_of(lm, 4), settings, seed=0, pad_id=0, variant=Variant(AscentUntilGone()))
    assert log.unlearned == ()
    assert 1 < log.epochs < 60
    with torch.no_grad():
        assert all(float(log_p(lm.model, text)) / len(text.answer_ids) < -1 for text in texts_of(lm, 4))
    short = finetune(lm.model, texts_of(lm, 4), SETTINGS, seed=0, pad_id=0, variant=Variant(LEARN, most_steps=2))
    assert len(short.steps) == 2
