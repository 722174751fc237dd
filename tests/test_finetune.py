import contextlib
import copy
import gc
import math
import sys
import time
from unittest import mock

import pytest
import torch

import forgetlearn.training.finetune
import forgetlearn.training.trainer
from forgetlearn.config.schema import LoraSettings, StageSettings
from forgetlearn.errors import ConfigError, MissingExtraError, TrainingError
from forgetlearn.models import batches, lora
from forgetlearn.training import memory
from forgetlearn.training.finetune import check_deepspeed, facts_at_once, finetune
from forgetlearn.training.stage_checkpoints import StageIO
from forgetlearn.weights.task_vector import snapshot

SETTINGS = StageSettings(epochs=3, batch_size=4, learning_rate=1e-3)


def texts_of(lm, n=10):
    return [lm.encoder.encode(f"Prompt {'x' * index} is", f"answer {index}", end=True) for index in range(n)]


def trained(lm, settings=SETTINGS, seed=0, n=10, **options):
    model = copy.deepcopy(lm.model)
    log = finetune(model, texts_of(lm, n), settings, seed=seed, pad_id=0, **options)
    return snapshot(model), log


def distance(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (None, "ds.json"),
        ("[]", "JSON"),
        ('{"zero_optimization": {"stage": 3}}', "ZeRO stage 3"),
        ('{"bf16": {"enabled": true}}', "bf16"),
        ('{"zero_optimization": {"stage": 2}}', "gradient_clipping"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping"),
        ('{"gradient_clipping": "auto"}', None),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {}}, "gradient_clipping": "auto"}', None),
    ],
)
def test_what_deepspeed_may_not_be_asked_for(tmp_path, monkeypatch, written, named):
    file = tmp_path / "ds.json"
    if written:
        file.write_text(written)
    monkeypatch.setattr(forgetlearn.training.finetune.importlib.util, "find_spec", lambda _name: True)
    with pytest.raises(ConfigError, match=named) if named else contextlib.nullcontext():
        check_deepspeed(str(file))
    monkeypatch.setattr(forgetlearn.training.finetune.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises((ConfigError, MissingExtraError), match=r"forgetlearn\[deepspeed\]"):
        check_deepspeed(str(file))


def test_a_stage_learns_its_answers(lm):
    settings = StageSettings(epochs=150, batch_size=5, learning_rate=5e-3)
    model = lm.model
    log = finetune(model, texts_of(lm, 5), settings, seed=0, pad_id=0)
    assert log.layout == "shared_by_text"
    assert len(log.steps) == 150
    assert log.steps[0]["loss"] > 2
    assert log.final_loss < 0.05
    for text in texts_of(lm, 5):
        predicted = model(torch.tensor([text.ids])).logits.argmax(-1)[0, text.n_prompt_tokens - 1 : -1]
        assert tuple(predicted.tolist()) == text.answer_ids  # the end token too


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(lm):
    one, log_one = trained(lm)
    two, log_two = trained(lm)
    assert distance(one, two) == 0
    assert log_one.steps == log_two.steps
    assert distance(one, trained(lm, seed=1)[0]) > 0


def test_the_first_loss_is_the_mean_over_answer_tokens(lm):
    texts = texts_of(lm, 4)
    with torch.no_grad():
        total = count = 0.0
        for text in texts:
            logits = lm.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
            for position, token in zip(text.answer_positions, text.answer_ids, strict=True):
                total -= float(logits[position, token])
                count += 1
    _weights, log = trained(lm, SETTINGS.model_copy(update={"epochs": 1}), n=4)
    assert log.steps[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_packed_padded_and_single_train_the_same_weights(lm, monkeypatch):
    shared, log = trained(lm)
    assert log.batching() == {"layout": "shared_by_text", "attention": "sdpa, text by text"}
    monkeypatch.setattr("forgetlearn.models.batches.WORTH_SHARING", 1.0)
    packed, log = trained(lm)
    assert log.batching() == {"layout": "packed", "attention": "sdpa, text by text"}
    assert 0 < distance(packed, shared) < 1e-4
    monkeypatch.setattr("forgetlearn.models.batches._agrees_by_text", lambda *args: False)
    masked, log = trained(lm)
    assert log.batching() == {"layout": "packed", "attention": "sdpa"}
    assert 0 < distance(packed, masked) < 1e-4
    monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args: "padded")
    padded, _log = trained(lm)
    monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args: "single")
    single, _log = trained(lm)
    assert 0 < distance(packed, padded) < 1e-4
    assert distance(packed, single) < 1e-4
    monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args: "packed")
    monkeypatch.setattr("forgetlearn.training.trainer.MAX_PACKED_TOKENS", 1)
    too_long, _log = trained(lm)
    assert distance(too_long, packed) < 1e-4


def test_eight_small_batches_are_one_large_one(lm):
    settings = StageSettings(epochs=2, batch_size=8, learning_rate=1e-3)
    whole, log = trained(lm, settings, n=16)
    accumulated, small_log = trained(lm, settings.model_copy(update={"micro_batch_size": 1}), n=16)
    assert len(log.steps) == len(small_log.steps) == 4
    assert distance(whole, accumulated) < 1e-5
    assert [row["loss"] for row in log.steps] == pytest.approx([row["loss"] for row in small_log.steps], rel=1e-4)


def test_the_rate_rises_and_falls_as_asked(lm):
    settings = StageSettings(epochs=10, batch_size=10, learning_rate=1e-3, lr_scheduler_type="linear", warmup_ratio=0.2)
    rates = [row["learning_rate"] for row in trained(lm, settings)[1].steps]
    assert rates.index(max(rates)) == 2
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 2e-4
    one_step = StageSettings(epochs=1, batch_size=10, learning_rate=1e-3)
    assert trained(lm, one_step)[1].steps[0]["learning_rate"] == pytest.approx(1e-3)
    constant = settings.model_copy(update={"lr_scheduler_type": "constant"})
    assert {row["learning_rate"] for row in trained(lm, constant)[1].steps} == {1e-3}


def test_weight_decay_clipping_betas_and_epsilon_reach_the_optimiser(lm):
    plain, _log = trained(lm)
    optimiser = ({"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_epsilon": 1e-3})
    for change in ({"weight_decay": 0.5}, {"max_grad_norm": 1e-3}, *optimiser):
        assert distance(plain, trained(lm, SETTINGS.model_copy(update=change))[0]) > 1e-6, change


def test_mixed_precision_leaves_float32_weights_and_the_models_own_forward(lm):
    model = lm.model
    own = model.forward
    finetune(model, texts_of(lm), SETTINGS.model_copy(update={"dtype": "bfloat16"}), seed=0, pad_id=0)
    assert model.forward == own
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_an_adapter_learns_alike_over_a_base_held_in_bfloat16_which_gets_its_bits_back(lm, monkeypatch):
    settings = StageSettings(epochs=6, batch_size=4, learning_rate=1e-2)
    model = lora.attach(lm.model, LoraSettings(r=4), lora.LEARN, 0)
    start, base = lora.weights_of(model, lora.LEARN), snapshot(model)
    dtypes: set[object] = set()
    real = forgetlearn.training.trainer.answer_logits

    def noted(model, *others):
        dtypes.update((weight.dtype, weight.requires_grad) for weight in model.parameters())
        return real(model, *others)

    monkeypatch.setattr(forgetlearn.training.trainer, "answer_logits", noted)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        lora.set_weights(model, start)
        dtypes.clear()
        options = {"seed": 0, "pad_id": 0, "device": torch.device("cpu")}
        log = finetune(model, texts_of(lm), settings.model_copy(update={"dtype": dtype}), **options)
        assert dtypes == {(getattr(torch, dtype), False), (torch.float32, True)}
        losses[dtype] = log.final_loss
        now = snapshot(model)
        assert all(torch.equal(now[name], weight) for name, weight in base.items() if "lora_" not in name)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


def test_a_loss_that_is_not_finite_names_the_stage_and_the_step(lm):
    settings = StageSettings(epochs=2, batch_size=4, learning_rate=1e30, warmup_ratio=0)
    with pytest.raises(TrainingError, match=r"forgetting, step \d+ of 6: (loss|grad_norm) is (nan|inf)"):
        finetune(lm.model, texts_of(lm), settings, seed=0, pad_id=0, stage_io=StageIO("forgetting"))


def test_nothing_to_train_and_half_precision_are_refused(lm):
    with pytest.raises(ConfigError, match="0 facts"):
        finetune(lm.model, [], SETTINGS, seed=0, pad_id=0)
    with pytest.raises(ConfigError, match=r"model\.embed_tokens\.weight"):
        finetune(lm.model.bfloat16(), texts_of(lm), SETTINGS, seed=0, pad_id=0)
    lm.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="0 trainable"):
        finetune(lm.model.float(), texts_of(lm), SETTINGS, seed=0, pad_id=0)


def test_logits_are_made_at_answer_positions_only(lm, monkeypatch):
    """The output head sees answer tokens and nothing else: 26 % of the positions in real facts."""
    seen = []
    lm.model.lm_head.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape[:-1].numel()))
    monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args: "packed")
    texts = texts_of(lm, 4)
    monkeypatch.setattr("forgetlearn.models.batches.WORTH_SHARING", 1.0)
    finetune(lm.model, texts, StageSettings(epochs=1, batch_size=4), seed=0, pad_id=0)
    expected = sum(len(text.answer_ids) for text in texts)
    assert seen == 3 * [expected]  # two to see that attention by text is right, and the step


def test_the_final_loss_is_that_of_the_last_tenth():
    from forgetlearn.training.finetune import StageLog

    steps = tuple({"loss": float(20 - index)} for index in range(20))
    assert StageLog(steps, "packed").final_loss == 1.5
    assert math.isclose(StageLog(steps[:3], "packed").final_loss, 18.0)


def test_the_layout_is_chosen_by_a_check_at_the_start(lm, monkeypatch):
    monkeypatch.setattr(batches, "AGREEMENT_TOLERANCE", -1.0)
    assert trained(lm, SETTINGS.model_copy(update={"epochs": 1}))[1].layout == "single"


def test_several_gpus_are_not_spread_over_by_trainer(lm, monkeypatch):
    seen = []
    own = forgetlearn.training.trainer.FactTrainer.__init__

    def init(self, **options):
        seen.append((options["args"].n_gpu, options["args"].train_batch_size))
        own(self, **options)

    monkeypatch.setattr(forgetlearn.training.trainer.FactTrainer, "__init__", init)
    arguments = forgetlearn.training.finetune._arguments

    def with_two_gpus(*args, **options):
        made = arguments(*args, **options)
        made._setup_devices  # noqa: B018 (a property that reads the devices once)
        made._n_gpu = 2
        return made

    monkeypatch.setattr("forgetlearn.training.finetune._arguments", with_two_gpus)
    finetune(lm.model, texts_of(lm), SETTINGS, seed=0, pad_id=0)
    assert seen == [(1, 4)]


def test_activation_checkpointing_changes_no_bit_and_is_off_afterwards(lm):
    computed = []
    mlp = type(lm.model.model.layers[0].mlp)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _inputs: computed.append(module) if type(module) is mlp else None
    )
    try:
        plain, log = trained(lm)
        n_plain = len(computed)
        settings = SETTINGS.model_copy(update={"activation_checkpointing": True})
        finetune(lm.model, texts_of(lm), settings, seed=0, pad_id=0)
    finally:
        hook.remove()
    assert distance(plain, snapshot(lm.model)) == 0
    n_layers = len(lm.model.model.layers)
    assert len(computed) == 2 * n_plain + n_layers * len(log.steps)  # the backward pass computes each layer again
    assert not lm.model.is_activation_checkpointing


# Case 31
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_case_31_the_callers_mode_changes_nothing(lm, mode):
    plain, _log = trained(lm)
    model = copy.deepcopy(lm.model)
    with mode():
        finetune(model, texts_of(lm), SETTINGS, seed=0, pad_id=0)
        assert not torch.is_grad_enabled()
    assert distance(plain, snapshot(model)) == 0


def test_case_31_weights_that_were_made_in_inference_mode_are_refused_by_name(lm):
    with torch.inference_mode():
        model = copy.deepcopy(lm.model)
    with pytest.raises(ConfigError, match=r"weight: .*inference_mode"):
        finetune(model, texts_of(lm), SETTINGS, seed=0, pad_id=0)


# Case 30
def test_case_30_a_batch_size_of_a_billion_is_one_batch_of_all_and_takes_no_time(lm):
    began = time.monotonic()
    whole, _log = trained(lm, SETTINGS.model_copy(update={"batch_size": 10}))
    billion, _log = trained(lm, SETTINGS.model_copy(update={"batch_size": 1_000_000_000}))
    assert distance(whole, billion) == 0
    micro = StageSettings(batch_size=1_000_000_000, micro_batch_size=500_000_000)
    assert facts_at_once(micro) == 500_000_000
    assert time.monotonic() - began < 20
    with pytest.raises(ValueError, match="batch_size"):
        StageSettings(batch_size=10**30)


@pytest.mark.parametrize(("number", "most", "divisor"), [(12, 5, 4), (12, 12, 12), (7, 6, 1), (36, 6, 6), (1, 1, 1)])
def test_the_largest_divisor(number, most, divisor):
    assert forgetlearn.training.finetune._largest_divisor(number, most) == divisor


def test_another_optimiser_is_used_and_a_missing_one_says_how_to_get_it(lm, monkeypatch):
    plain, _log = trained(lm)
    assert distance(plain, trained(lm, SETTINGS.model_copy(update={"optim": "adafactor"}))[0]) > 1e-6
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"optim = adamw_8bit: .*forgetlearn\[8bit\]"):
        finetune(lm.model, texts_of(lm), SETTINGS.model_copy(update={"optim": "adamw_8bit"}), seed=0, pad_id=0)


def test_a_stage_leaves_no_gradients_and_no_optimiser_states(lm, monkeypatch):
    optimizers, real = [], memory.give_back
    monkeypatch.setattr(memory, "give_back", lambda model, optimizer: optimizers.append(optimizer))
    trained(lm)
    assert len(optimizers[0].state) == len(list(lm.model.parameters()))
    monkeypatch.setattr(
        memory, "give_back", lambda model, optimizer: (optimizers.append(optimizer), real(model, optimizer))
    )
    trained(lm)
    assert len(optimizers[1].state) == 0
    finetune(lm.model, texts_of(lm), SETTINGS, seed=0, pad_id=0)
    assert all(weight.grad is None for weight in lm.model.parameters())


def test_each_step_tells_its_tokens_and_its_seconds(lm):
    _weights, log = trained(lm, SETTINGS.model_copy(update={"micro_batch_size": 2}))
    lengths = [len(text.ids) for text in texts_of(lm)]
    assert sum(step["tokens"] for step in log.steps) == SETTINGS.epochs * sum(lengths)
    assert max(step["tokens"] for step in log.steps) <= sum(sorted(lengths)[-SETTINGS.batch_size :])
    assert len(log.seconds) == len(log.steps)
    assert all(seconds > 0 for seconds in log.seconds)


@pytest.mark.parametrize("large", [False, True])
def test_a_small_model_trains_while_the_collector_rests(lm, monkeypatch, large):
    monkeypatch.setattr(memory, "LARGE_BYTES", 0 if large else memory.LARGE_BYTES)
    seen = []
    monkeypatch.setattr(
        "forgetlearn.training.objectives.functional.cross_entropy",
        lambda *a, **k: seen.append(gc.get_freeze_count()) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        trained(lm)
    assert (seen[0] > 0) is not large
    assert gc.get_freeze_count() == 0


def test_where_the_c_library_cannot_trim_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(memory.ctypes, "CDLL", mock.Mock(side_effect=TypeError("LoadLibrary() argument 1 must be str")))
    memory.trim()


def test_trimming_a_large_models_memory_leaves_the_bits(lm, monkeypatch):
    plain, calls, real = trained(lm)[0], [], memory.trim
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    monkeypatch.setattr(memory, "trim", lambda: (calls.append(1), real()))
    assert distance(plain, trained(lm)[0]) == 0
    assert 1 + 2 <= len(calls) < 1 + 2 + 4  # the first step, before and after; hardly any other


def test_memory_is_trimmed_at_the_first_step_and_when_it_has_grown_since_the_second(monkeypatch):
    seen, trims, sizes = [], [], iter([50, 100, 105, 111, 100])
    monkeypatch.setattr(memory, "LARGE_BYTES", 0)
    monkeypatch.setattr(memory, "trim", lambda: trims.append(len(seen)))
    monkeypatch.setattr(memory.psutil, "Process", lambda: mock.Mock(memory_info=lambda: mock.Mock(rss=next(sizes))))
    watch = memory.Watch(torch.nn.Linear(2, 2))
    for _step in range(5):
        seen.append(1)
        watch.on_pre_optimizer_step(None, None, None)
    assert trims == [1, 4]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_says_what_to_lower(lm, monkeypatch, caplog, error):
    monkeypatch.setattr("forgetlearn.training.objectives.functional.cross_entropy", mock.Mock(side_effect=error))
    monkeypatch.setattr("forgetlearn.training.finetune.choose_layout", lambda *args: "padded")
    with pytest.raises(TrainingError, match=r"forgetting.*\nSet activation_checkpointing"):
        finetune(lm.model, texts_of(lm), SETTINGS, seed=0, pad_id=0, stage_io=StageIO("forgetting"))
    # Halved down to one fact at a time, and then there is nothing more to halve.
    assert [record.args[1] for record in caplog.records if "micro_batch_size" in record.getMessage()] == [2, 1]


def out_of_memory_at(n, monkeypatch):
    """Let the nth loss run out of memory; the list that comes back has an entry for each loss that was begun."""
    real, calls = torch.nn.functional.cross_entropy, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == n:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return real(*args, **options)

    monkeypatch.setattr("forgetlearn.training.objectives.functional.cross_entropy", counted)
    return calls


def test_out_of_memory_before_the_first_step_halves_the_micro_batch(lm, monkeypatch):
    start = {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}
    wanted_log = finetune(lm.model, texts_of(lm), SETTINGS.model_copy(update={"micro_batch_size": 2}), seed=0, pad_id=0)
    wanted = {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}
    lm.model.load_state_dict(start, strict=False)
    lm.model.requires_grad_(True)
    out_of_memory_at(1, monkeypatch)
    log = finetune(lm.model, texts_of(lm), SETTINGS, seed=0, pad_id=0)
    assert (log.micro_batch_size, wanted_log.micro_batch_size) == (2, None)
    assert log.batching()["micro_batch_size"] == 2
    assert all(torch.equal(weight, wanted[name]) for name, weight in lm.model.named_parameters())


def test_out_of_memory_after_a_step_does_not_begin_again(lm, monkeypatch):
    calls = out_of_memory_at(3, monkeypatch)
    with pytest.raises(TrainingError, match=r"micro_batch_size \(4"):
        finetune(lm.model, texts_of(lm), SETTINGS, seed=0, pad_id=0)
    assert len(calls) == 3
