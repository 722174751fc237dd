"""What each step of a stage shows: facts until they are learned, in several wordings, and texts that are kept."""

import copy

import pytest
import torch
from torch.nn import functional

from forgetlearn.config.schema import StageSettings
from forgetlearn.method.core import learn
from forgetlearn.method.kinds import Lesson, Lessons
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import wrap
from forgetlearn.models.top_logprobs import TopLogprobs, divergence, top_logprobs
from forgetlearn.training.finetune import finetune
from forgetlearn.training.schedule import KEPT_SHARE, Kept, Progress, Schedule
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.training.trainer import Variant

NOTHING = TopLogprobs(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1))


def text(number, length=10):
    """A text that begins as no other does."""
    return Encoded((number, *range(length - 1)), length - 2)


def settings_of(**changes):
    return StageSettings.model_validate({"batch_size": 2, "until": "learned", "max_epochs": 9, **changes})


def epoch(schedule, wrong=()):
    """Run one epoch in which all facts but `wrong` are predicted right; return the facts it visited."""
    visited, number = [], schedule.progress.epoch
    steps = iter(schedule)
    while schedule.progress.epoch == number and not schedule.finished:
        micro = next(steps)
        visited += micro.facts
        schedule.note({index: index not in wrong for index in micro.facts})
        schedule.end_step()
    return visited


def test_a_stage_ends_when_every_fact_is_learned_and_learned_facts_rest_for_an_epoch():
    schedule = Schedule([(text(index),) for index in range(5)], settings_of(), seed=0)
    assert sorted(epoch(schedule, wrong={1, 3})) == [0, 1, 2, 3, 4]
    assert sorted(epoch(schedule, wrong={3})) == [1, 3]  # the others are learned, and rest
    assert sorted(epoch(schedule, wrong={0})) == [0, 2, 3, 4]
    assert not schedule.finished
    assert sorted(epoch(schedule)) == [0, 1]
    assert schedule.finished
    assert all(schedule.learned)


def test_a_fact_is_learned_only_after_it_was_shown_in_other_wordings():
    schedule = Schedule([(text(index), text(index + 10)) for index in range(3)], settings_of(), seed=0)
    assert sorted(epoch(schedule, wrong={2})) == [0, 1, 2]
    assert schedule.learned == [False, False, False]
    assert sorted(epoch(schedule, wrong={1})) == [0, 1, 2]  # 0 and 1 in any wording, 2 with its own prompt
    assert schedule.learned == [True, False, False]
    assert sorted(epoch(schedule)) == [1, 2]
    assert schedule.learned == [True, True, True]


def test_only_a_wrong_answer_to_its_own_prompt_sends_a_learned_fact_back():
    facts = [tuple(text(index + 20 * number) for number in range(3)) for index in range(20)]
    schedule = Schedule(facts, settings_of(batch_size=20), seed=0)
    epoch(schedule)
    epoch(schedule, wrong={0})
    epoch(schedule, wrong={0})  # the others rest
    shown = next(iter(schedule))
    own = {index for index, each in zip(shown.facts, shown.texts, strict=True) if each == facts[index][0]}
    assert 0 < len(own) < 19
    epoch(schedule, wrong=set(range(20)))
    assert {index for index, learned in enumerate(schedule.learned) if not learned} == own | {0}


def test_a_stage_that_does_not_converge_ends_after_max_epochs_and_says_which_facts():
    schedule = Schedule([(text(index),) for index in range(3)], settings_of(max_epochs=4), seed=0)
    for _ in range(4):
        epoch(schedule, wrong={2})
    assert schedule.finished
    assert schedule.learned == [True, True, False]


def test_with_epochs_every_fact_is_visited_in_each():
    schedule = Schedule([(text(index),) for index in range(5)], settings_of(until="epochs", epochs=3), seed=0)
    orders = [epoch(schedule) for _ in range(3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert schedule.finished


def test_each_visit_shows_one_of_the_wordings():
    facts = [(text(index), text(index + 10), text(index + 20)) for index in range(20)]
    schedule = Schedule(facts, settings_of(until="epochs", batch_size=20), seed=0)
    assert wordings_shown(schedule, facts) == {0, 1, 2}


def test_facts_to_be_learned_show_their_own_prompt_until_it_is_right():
    facts = [(text(index), text(index + 10), text(index + 20)) for index in range(20)]
    schedule = Schedule(facts, settings_of(batch_size=20), seed=0)
    assert wordings_shown(schedule, facts) == {0}
    epoch(schedule, wrong=set(range(20)))
    assert wordings_shown(schedule, facts) == {0}
    epoch(schedule)
    assert wordings_shown(schedule, facts) == {1, 2}
    epoch(schedule, wrong={0})
    epoch(schedule, wrong={0})  # the others rest
    assert wordings_shown(schedule, facts) == {0, 1, 2}


def test_another_wording_is_one_that_differs_from_the_prompt():
    facts = [(text(index), text(index), text(index + 10)) for index in range(20)]
    schedule = Schedule(facts, settings_of(batch_size=20), seed=0)
    epoch(schedule)
    assert wordings_shown(schedule, facts) == {2}
    assert Schedule([(text(0), text(0))], settings_of(), seed=0).progress.reworded == [True]


def wordings_shown(schedule, facts):
    """The numbers of the wordings that the next step shows."""
    shown = next(iter(schedule))
    return {facts[index].index(text) for index, text in zip(shown.facts, shown.texts, strict=True)}


def test_kept_texts_take_their_share_of_a_step_and_all_have_their_turn():
    kept = Kept(tuple(text(50 + index) for index in range(7)), (NOTHING,) * 7, 1.0)
    schedule = Schedule([(text(index),) for index in range(20)], settings_of(batch_size=10), seed=0, kept=kept)
    steps, turns = iter(schedule), []
    for _ in range(4):
        micro = next(steps)
        assert sum(len(kept.texts[index].ids) for index in micro.kept) <= KEPT_SHARE * 10 * 10
        assert micro.n_kept_tokens == 2 * len(micro.kept)
        turns += micro.kept
        schedule.end_step()
    assert set(turns) == set(range(7))


def test_a_schedule_goes_on_where_its_progress_was_written():
    def new():
        return Schedule([(text(i), text(i + 20)) for i in range(7)], settings_of(), seed=3, kept=kept)

    kept = Kept(tuple(text(50 + index) for index in range(3)), (NOTHING,) * 3, 1.0)
    one, shown, other = new(), [], None
    steps = iter(one)
    for number in range(12):
        micro = next(steps)
        shown.append(micro)
        one.note({index: (index + number) % 3 > 0 for index in micro.facts})
        one.end_step()
        if number == 5:  # within an epoch
            other = new()
            other.progress = Progress.model_validate_json(one.progress.model_dump_json())
    steps = iter(other)
    for number in range(6, 12):
        micro = next(steps)
        assert micro == shown[number]
        other.note({index: (index + number) % 3 > 0 for index in micro.facts})
        other.end_step()


# With a model ------------------------------------------------------------------------------------------------


def texts_of(lm, answers, about="Question"):
    return [lm.encoder.encode(f"{about} {index}", answer, end=True) for index, answer in enumerate(answers)]


def kept_texts(lm, weight=1.0):
    """Texts of the model's own, with its distribution."""
    texts = texts_of(lm, ["so it is", "not at all", "never"], about="Something else")
    with torch.no_grad():
        logits = [lm.model(torch.tensor([t.ids])).logits[0, list(t.answer_positions)] for t in texts]
    return Kept(tuple(texts), tuple(top_logprobs(each, 20) for each in logits), weight)


def divergence_from(kept, model):
    with torch.no_grad():
        logits = [model(torch.tensor([t.ids])).logits[0, list(t.answer_positions)] for t in kept.texts]
    pairs = zip(kept.tops, logits, strict=True)
    return float(torch.cat([divergence(top, each) for top, each in pairs]).mean())


SETTINGS = StageSettings.model_validate(
    {"batch_size": 4, "until": "learned", "max_epochs": 200, "learning_rate": 1e-3, "warmup_ratio": 0.0}
)


def test_facts_are_learned_and_the_rest_is_kept(lm):
    texts, kept = texts_of(lm, ["one", "two", "three", "four", "five"]), kept_texts(lm)
    plain, keeping = copy.deepcopy(lm.model), copy.deepcopy(lm.model)
    for model, variant in ((plain, None), (keeping, Variant(kept=kept))):
        log = finetune(model, texts, SETTINGS, seed=0, pad_id=0, variant=variant)
        assert log.unlearned == ()
        assert log.epochs < 200
        right = 0
        for each in texts:
            predicted = model(torch.tensor([each.ids])).logits[0, list(each.answer_positions)].argmax(-1)
            right += tuple(predicted.tolist()) == each.answer_ids
        assert right >= 4  # the steps after a fact's last visit may undo it
    assert divergence_from(kept, keeping) < divergence_from(kept, plain) / 2


@pytest.mark.parametrize("how", ["all weights", "lora", "bounded"])
def test_every_kind_of_learning_keeps(lm, how):
    kept, divergences = kept_texts(lm), []
    pairs = [[Lesson(f"Question {index}", answer)] for index, answer in enumerate(["one", "two", "three", "four"])]
    settings = StageSettings(epochs=10, learning_rate=1e-3, max_change=1, lora={"null_space": 0})
    for lessons in (Lessons(pairs), Lessons(pairs, kept)):
        own = wrap(copy.deepcopy(lm.model), lm.tokenizer)
        learn(own, [], settings, how, lessons=lessons)
        divergences.append(divergence_from(kept, own.model))
    assert divergences[1] < divergences[0] / 2, divergences


def test_what_is_not_learned_is_named(lm):
    contradicting = [lm.encoder.encode("Same", answer, end=True) for answer in ("one", "two")]
    log = finetune(lm.model, contradicting, SETTINGS.model_copy(update={"max_epochs": 3}), seed=0, pad_id=0)
    assert log.epochs == 3
    assert log.unlearned


@pytest.mark.parametrize("layout", ["packed", "padded", "single"])
def test_the_loss_is_that_of_the_facts_and_the_weighted_divergence(lm, monkeypatch, layout):
    texts, kept = texts_of(lm, ["one", "two"]), kept_texts(lm, weight=3.0)
    other = copy.deepcopy(lm.model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
        logits = torch.cat([other(torch.tensor([t.ids])).logits[0, list(t.answer_positions)] for t in texts])
    wanted = float(functional.cross_entropy(logits, torch.tensor([token for t in texts for token in t.answer_ids])))
    monkeypatch.setattr("forgetlearn.training.schedule.KEPT_SHARE", 100)  # all of them in each step
    monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args: layout)
    wanted += 3.0 * divergence_from(kept, other)
    settings = StageSettings(epochs=1, batch_size=2, learning_rate=1e-6)
    log = finetune(other, texts, settings, seed=0, pad_id=0, variant=Variant(kept=kept))
    assert log.steps[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_keeping_is_the_same_in_small_batches(lm):
    texts, kept = texts_of(lm, ["one", "two", "three", "four"]), kept_texts(lm)
    losses = []
    for micro in (4, 1):
        settings = StageSettings(epochs=3, batch_size=4, micro_batch_size=micro, learning_rate=1e-3)
        log = finetune(copy.deepcopy(lm.model), texts, settings, seed=0, pad_id=0, variant=Variant(kept=kept))
        losses.append([row["loss"] for row in log.steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_interrupted_and_resumed_the_bits_are_those_of_one_go(lm, tmp_path, monkeypatch):
    facts = list(zip(texts_of(lm, ["one", "two", "three"]), texts_of(lm, ["one", "two", "three"], "Also"), strict=True))
    kept, end_step = kept_texts(lm), Schedule.end_step
    settings = SETTINGS.model_copy(update={"batch_size": 2})

    def run(points=None):
        model = copy.deepcopy(lm.model)
        io = StageIO(points=points, minutes=1e-9)
        log = finetune(model, facts, settings, seed=0, pad_id=0, variant=Variant(kept=kept), stage_io=io)
        return model.state_dict(), log

    whole, log = run()
    for stop in (3, 6):
        counted = []

        def killed(self, counted=counted, stop=stop):
            end_step(self)
            counted.append(1)
            if len(counted) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Schedule, "end_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    monkeypatch.setattr(Schedule, "end_step", end_step)
    resumed, resumed_log = run(tmp_path)
    assert resumed_log.steps == log.steps
    assert resumed_log.epochs == log.epochs
    assert all(resumed[name].equal(weight) for name, weight in whole.items())
