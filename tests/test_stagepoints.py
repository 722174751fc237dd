"""A stage that was cut short goes on from its newest whole checkpoint, to the same bits."""

import copy
import logging
import math
import os
import signal

import pytest
from safetensors.torch import load_file

from forgetlearn.config.schema import LoraSettings, StageSettings
from forgetlearn.errors import ConfigError, RunError
from forgetlearn.models import lora, modules
from forgetlearn.runtime import signals
from forgetlearn.training import callbacks, finetune, stage_checkpoints
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.training.trainer import Variant
from forgetlearn.weights.task_vector import snapshot

SETTINGS = StageSettings(epochs=3, batch_size=4, micro_batch_size=2, learning_rate=1e-3)
STEPS = 9  # three a pass


class KilledError(Exception):
    pass


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every step."""
    monkeypatch.setattr(callbacks, "TIMES_AS_LONG", 0)
    return 1e-9


@pytest.fixture
def stop_after(monkeypatch):
    """`stop_after(step, act)`: what happens when that step's numbers are there, before it is saved."""

    on_log = callbacks.Steps.on_log

    def arrange(step, act):
        def stopping(self, args, state, control, **kwargs):
            on_log(self, args, state, control, **kwargs)
            if state.global_step == step and self.first_step < step:
                act()

        monkeypatch.setattr(callbacks.Steps, "on_log", stopping)

    return arrange


def killed():
    raise KilledError


def train(lm, how, stage_io=None):
    """A stage from the same start as every other: its trained weights and its log."""
    model, variant = copy.deepcopy(lm.model), None
    if how == "lora":  # beside a frozen adapter, as in learning after forgetting
        model = lora.attach(model, LoraSettings(), lora.FORGET, 1)
        model = lora.attach(model, LoraSettings(lora_dropout=0.3), lora.LEARN, 0)
    elif how == "bounded":
        variant = Variant(max_change=2e-3)
    texts = [lm.encoder.encode(f"Prompt {'x' * index} is", f"answer {index}", end=True) for index in range(10)]
    with modules.only_rows_train(model, texts[0].ids, "facts" if how == "rows" else "all"):
        log = finetune.finetune(model, texts, SETTINGS, seed=0, pad_id=0, variant=variant, stage_io=stage_io)
    return snapshot(model), log


def kept(points, minutes):
    return StageIO(points=points, minutes=minutes)


def same(one, two):
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("how", ["all weights", "lora", "bounded", "rows"])
def test_cut_short_and_resumed_twice_the_bits_are_those_of_one_go(lm, tmp_path, often, stop_after, how):
    whole, log = train(lm, how)
    assert len(log.steps) == STEPS
    for step in (5, 7):  # in an epoch (after steps 3 and 6 one ends)
        stop_after(step, killed)
        with pytest.raises(KilledError):
            train(lm, how, kept(tmp_path, often))
        assert [path.name for path in tmp_path.iterdir()] == [f"step-0000000{step - 1}"]
    stop_after(math.inf, killed)
    resumed, resumed_log = train(lm, how, kept(tmp_path, often))
    assert same(whole, resumed)
    assert resumed_log.steps == log.steps
    assert not same(whole, snapshot(lm.model))


def test_only_what_is_trained_is_written(lm, tmp_path, often):
    train(lm, "lora", kept(tmp_path, often))
    weights = load_file(tmp_path / f"step-0000000{STEPS}" / stage_checkpoints.WEIGHTS)
    assert weights
    assert all(f"lora_{part}.{lora.LEARN}.weight" in name for name in weights for part in "AB" if part in name)


def test_a_damaged_checkpoint_is_named_and_passed_over(lm, tmp_path, often, caplog):
    def point(step):
        with stage_checkpoints.writing(tmp_path, step) as folder:
            stage_checkpoints.save_weights(lm.model, folder)
        return tmp_path / f"step-0000000{step}"

    older = point(3)
    aside = older.rename(tmp_path / "aside")
    for damage in ("cut", "changed", "gone", "marker"):
        newer = point(4)
        older = aside.rename(older)
        weights = newer / stage_checkpoints.WEIGHTS
        if damage == "cut":
            os.truncate(weights, 100)
        elif damage == "changed":
            weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        elif damage == "gone":
            weights.unlink()
        else:
            (newer / stage_checkpoints.MARKER).write_text("{}")
        caplog.clear()
        assert stage_checkpoints.newest(tmp_path) == older, damage
        assert str(newer) in caplog.text
        aside = older.rename(aside)
    assert stage_checkpoints.newest(tmp_path) is None


def test_a_checkpoint_that_was_not_finished_is_none(lm, tmp_path):
    with pytest.raises(KilledError), stage_checkpoints.writing(tmp_path, 1):
        raise KilledError
    assert stage_checkpoints.newest(tmp_path) is None
    assert stage_checkpoints.newest(tmp_path / "missing") is None


def test_another_number_of_processes_is_refused(lm, tmp_path, monkeypatch):
    with stage_checkpoints.writing(tmp_path, 1) as folder:
        stage_checkpoints.save_weights(lm.model, folder)
    monkeypatch.setattr(stage_checkpoints.processes, "world_size", lambda: 2)
    with pytest.raises(RunError, match=r"step-00000001 .* 1 .* 2"):
        stage_checkpoints.newest(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_ends_after_the_step_with_a_checkpoint(lm, tmp_path, stop_after, number):
    whole, log = train(lm, "all weights")
    stop_after(3, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with signals.handled(), pytest.raises(signals.Interrupted) as caught:
        train(lm, "all weights", kept(tmp_path, 0))
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    # The step in which it came has been saved before its numbers were there, so one more was done.
    assert stage_checkpoints.newest(tmp_path).name == "step-00000004"
    resumed, resumed_log = train(lm, "all weights", kept(tmp_path, 0))
    assert same(whole, resumed)
    assert resumed_log.steps == log.steps


def test_a_signal_elsewhere_ends_at_once_and_a_second_one_always():
    with pytest.raises(signals.Interrupted) as caught, signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    with signals.handled(), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signals._State.requested = None


def test_no_checkpoint_before_it_is_due(lm, tmp_path):
    train(lm, "all weights", kept(tmp_path / "none", 10))
    assert not (tmp_path / "none").exists()


def test_one_line_at_the_end_says_what_a_stage_was(lm, caplog):
    with caplog.at_level(logging.INFO, "forgetlearn"):
        _weights, log = train(lm, "all weights")
    (line,) = [record.getMessage() for record in caplog.records if " tokens/s" in record.getMessage()]
    assert line.startswith(f"fine-tuning: {STEPS} steps, ")
    assert f"loss {log.final_loss:.3f}" in line


def test_trackers_get_the_numbers_and_unknown_ones_are_refused(lm, tmp_path, monkeypatch):
    got = []

    class Tracker(callbacks.TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            got.append((args.run_name, logs.get("loss")))

    monkeypatch.setitem(callbacks.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    callbacks.check_trackers(("mine",))
    _weights, log = train(lm, "all weights", StageIO(trackers=("mine",), logs=tmp_path))
    assert [loss for _name, loss in got[:STEPS]] == [step["loss"] for step in log.steps]
    assert got[0][0] == "fine-tuning"
    with pytest.raises(ConfigError, match=r"report_to = 'tensorbord'.*tensorboard"):
        callbacks.check_trackers(("tensorbord",))
    with pytest.raises(ConfigError, match="report_to = 'wandb'"):
        callbacks.check_trackers(("wandb",))
