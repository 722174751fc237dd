"""What an update will take: by hand, against the same step on real tensors, and from headers alone."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Adafactor, PreTrainedConfig

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import ModelSettings, RunConfig, StageSettings, load_config
from forgetlearn.config.stages import Stages
from forgetlearn.errors import ConfigError, FactError, ModelError
from forgetlearn.evaluation import general_prompts
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.evaluation.scoring import pairs_to_read
from forgetlearn.facts import LocalityProbe
from forgetlearn.facts.subjects import subject_span
from forgetlearn.models import language_model, lora
from forgetlearn.models.batches import common_length
from forgetlearn.models.encoding import Encoded
from forgetlearn.models.language_model import load_model
from forgetlearn.planning import plan as planning
from forgetlearn.planning.estimate import (
    Answering,
    Asking,
    Devices,
    Load,
    Plan,
    Speed,
    Step,
    plan_lines,
    plan_stage,
    show_bytes,
    show_range,
    show_seconds,
    summary_line,
)
from forgetlearn.planning.loads import loads_of, spread_of
from forgetlearn.planning.outline import Outline, outline_of
from forgetlearn.planning.plan import plan_update
from forgetlearn.planning.trace import Skeleton, measure
from forgetlearn.training.finetune import finetune
from forgetlearn.weights.checkpoint_folder import Entry, header_bytes
from hub_server import serve

TEXTS = [Encoded(tuple(range(4, 4 + n)), n - 3) for n in (5, 9, 14)]
STAGE = StageSettings(epochs=2, batch_size=3)
ANSWERING = Answering(Step(8, 4000, 900, 30, 80), key_bytes=7, body_flops=800, head_flops=50)
LOAD = Load("learn", "all weights", 100, 1000, 3, 8, 4, 400, 100, 0, 400, 40, Step(20, 700, 6000, 50), states_bytes=800)


class TestByHand:
    def test_memory_on_one_device(self):
        stage = plan_stage(LOAD, Devices("cuda", None))
        runtime = stage.memory.pop("runtime")
        assert stage.memory == {"weights": 400, "kept": 0, "optimizer": 800, "gradients": 400, "activations": 300}
        assert stage.peak_bytes == 1900
        assert stage.host_bytes == 400  # the base, on the CPU
        assert runtime > 0
        assert plan_stage(LOAD, Devices("cpu", None)).memory["kept"] == 400  # where that is the device

    def test_states_and_the_base_lie_elsewhere_where_they_can(self):
        paged = plan_stage(replace(LOAD, paged=True), Devices("cuda", None))
        assert (paged.memory["optimizer"], paged.host_bytes) == (0, 800 + 400)
        assert plan_stage(replace(LOAD, paged=True), Devices("cpu", None)).memory["optimizer"] == 800
        on_disk = replace(LOAD, host_bytes=0, base_bytes=400)
        assert plan_stage(on_disk, Devices("cpu", None)).memory["kept"] == 0
        assert plan_stage(on_disk, Devices("cuda", None)).host_bytes == 400
        asks = replace(LOAD, asking=Asking(batches=1, most_read=10, most_held=30), answering=ANSWERING)
        assert plan_stage(asks, Devices("cuda", None)).memory["activations"] == 4000 * 10 // 8 + 7 * 20

    def test_memory_on_several(self):
        shared = plan_stage(LOAD, Devices("cuda", None, 4)).memory
        assert (shared["weights"], shared["buckets"]) == (400, 400)
        split = plan_stage(LOAD, Devices("cuda", None, 4, shard=True))
        assert [split.memory[part] for part in ("weights", "optimizer", "gradients", "activations")] == [
            *(100, 200, 100, 300),
        ]
        assert split.memory["gathered"] == 80
        assert split.host_bytes == 100

    def test_steps_and_seconds(self):
        stage = plan_stage(LOAD, Devices("cuda", None), Speed(1000, bandwidth=10000, latency=0.01))
        assert (stage.steps, stage.tokens) == (3 * 13, 3000)
        assert stage.flops == 6000 / 20 * 3000
        moved = 3 * 400 * 75 + 44 * 100 * 39
        assert stage.seconds == pytest.approx(900 + moved / 10000 + 50 * 75 * 0.01)
        assert plan_stage(LOAD, Devices("cuda", None, 4), Speed(1000)).seconds == pytest.approx(225)

    def test_devices_share_what_operations_make_and_each_updates_its_weights(self):
        moving, still = (replace(LOAD, step=replace(LOAD.step, made_bytes=made)) for made in (100_400, 0))
        speed = Speed(1e12, bandwidth=1000)
        one, four = (
            plan_stage(moving, Devices("cuda", None, number), speed).seconds
            - plan_stage(still, Devices("cuda", None, number), speed).seconds
            for number in (1, 4)
        )
        assert one == pytest.approx(4 * four)
        assert one == pytest.approx(3 * 100_000 * 3 * 1000 / 20 / 1000)

    def test_asking_is_one_pass_for_each_row_batch_and_token_of_an_answer(self):
        asking = Asking(2, 40, 2, 3, 16, 1, answer_tokens=12, answer_steps=5, context_tokens=100)
        load = replace(LOAD, trained=0, states_bytes=0, asking=asking, answering=ANSWERING)
        stage = plan_stage(load, Devices("cuda", None), Speed(1000, 10000, 0.01, weights_bandwidth=500))
        assert (stage.steps, stage.tokens) == (8, 68)
        flops = 6000 / 20 * 40 + 900 / 8 * 16 + 12 * (800 / 8 + 50)
        assert stage.flops == flops
        made = 80 / 8 * (16 + 12) + 7 * 100  # the traced row of texts made nothing
        passes = 8 * 400 / 500 + (50 * 2 + 30 * 6) * 0.01
        assert stage.seconds == pytest.approx(flops / 1000 + 3 * made / 10000 + passes)
        untraced = plan_stage(replace(load, answering=None), Devices("cuda", None), Speed(1000))
        assert (untraced.flops, untraced.seconds) == (None, None)

    def test_a_stage_that_ends_by_itself_has_a_range(self):
        stage = plan_stage(replace(LOAD, spread=(0.5, 2)), Devices("cuda", None), Speed(1000))
        plan = Plan("m", "ft", 100, 10, (stage,), {}, Devices("cuda", None), Speed(1000))
        assert stage.step_range == (20, 78)
        assert plan.seconds_range == (450, 1800)
        assert summary_line(plan).endswith("about 20 to 78 steps to learn, about 1.0 GB, about 8 to 30 min")
        assert (show_range(300, 310), show_range(40, 300)) == ("5 min", "40 s to 5 min")

    def test_forgetting_by_a_loss_may_take_every_pass(self):
        stage = Stages(RunConfig(method="npo", unlearn={"max_epochs": 30})).forget
        assert stage.settings.likely_epochs * spread_of(stage)[1] == pytest.approx(30)
        assert spread_of(stage)[0] < 1
        assert spread_of(Stages(RunConfig(method="subtract")).forget) == (1, 1)

    def test_what_could_not_be_traced_has_no_time(self):
        stage = plan_stage(replace(LOAD, step=None), Devices("cuda", None), Speed(1000))
        assert (stage.flops, stage.seconds) == (None, None)
        assert stage.memory["gradients"] == 400

    def test_words(self):
        assert (show_bytes(2.5e9), show_bytes(31e6), show_bytes(2.1e6)) == ("2.5 GB", "31 MB", "2.1 MB")
        assert (show_seconds(42), show_seconds(300), show_seconds(7200)) == ("42 s", "5 min", "2.0 h")
        stages = (plan_stage(LOAD, Devices("cuda", 1e9)),)
        for memory, said in ((1e9, "does not fit in 1.0 GB"), (1.05e9, "just fits in 1.1 GB"), (2e9, "fits in 2.0 GB")):
            plan = Plan("m", "ft", 100, 10, stages, {}, Devices("cuda", memory))
            assert f": {said}" in "\n".join(plan_lines(plan))


class TestTrace:
    """On tensors without numbers a step takes what it takes on real ones."""

    @pytest.mark.parametrize("how", ["all weights", "lora"])
    def test_as_on_real_tensors(self, tiny_model, how):
        real = tiny_model()
        skeleton = Skeleton(real.config, torch.float32)
        trained = skeleton.prepare(how, STAGE)
        if how == "lora":
            real = lora.attach(real, STAGE.lora, lora.LEARN, 0)
        own = [weight for weight in real.parameters() if weight.requires_grad]
        assert trained == sum(weight.numel() for weight in own)
        assert skeleton.weights_bytes == 4 * sum(weight.numel() for weight in real.parameters())
        there = measure(real, lambda: skeleton.loss(real, TEXTS, STAGE, 0).backward(), 28)
        assert all(weight.grad is not None for weight in own)
        found = skeleton.train_step(TEXTS, STAGE, 0)
        assert found.peak_bytes > 4 * trained
        assert found.peak_bytes == pytest.approx(there.peak_bytes, rel=0.02)  # a mask is made where none is needed
        assert (found.flops, found.tokens) == (there.flops, 28)

    def test_gradients_stay_between_accumulated_batches(self, tiny_model):
        skeleton = Skeleton(tiny_model().config, torch.float32)
        trained = skeleton.prepare("all weights", STAGE)
        once = skeleton.train_step(TEXTS, STAGE, 0)
        twice = skeleton.train_step(TEXTS, STAGE.model_copy(update={"micro_batch_size": 1}), 0)
        assert twice.peak_bytes > max(once.peak_bytes, 4 * trained)
        assert twice.flops == once.flops

    def test_learning_with_some_modules_trains_those(self, tiny_model):
        skeleton = Skeleton(tiny_model().config, torch.float32)
        assert skeleton.prepare("all weights", StageSettings(modules=("head",))) == 32 * 100
        assert Skeleton(tiny_model().config, torch.float32).prepare("one module", STAGE) == 32 * 64

    @pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
    def test_the_states_of_an_optimiser_are_those_that_it_makes(self, tiny_model, optim):
        model = tiny_model()
        kinds = {"adafactor": (Adafactor, {"relative_step": False}), "adamw_torch_fused": (torch.optim.AdamW, {})}
        kind, options = kinds[optim]
        optimizer = kind(model.parameters(), lr=1e-3, **options)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        made = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())
        assert Skeleton(model.config, torch.float32).states_bytes(optim) == made

    def test_states_in_8_bits_but_for_embeddings_and_small_weights(self, tiny_model):
        skeleton = Skeleton(
            tiny_model(vocab_size=200).config, torch.float32
        )  # the head has 6,400 numbers, layers 2,048
        numbers = sum(weight.numel() for weight in skeleton.model.parameters())
        assert skeleton.states_bytes("paged_adamw_8bit") == 8 * (numbers - 6400) + 2 * 6400 + 8 * 25

    def test_answers_take_keys_and_values(self, tiny_model):
        skeleton = Skeleton(tiny_model().config, torch.float32)
        layers, heads, width = 2, 2, 8
        a_token = 2 * layers * heads * width * 4
        found = skeleton.answering(3, 5)
        assert found.key_bytes == a_token
        assert found.bytes_of(3 * 5, 3 * 15) - found.bytes_of(3 * 5, 3 * 5) == 3 * 10 * a_token
        assert found.bytes_of(3 * 5, 3 * 5) > 3 * 5 * a_token
        assert found.prompts.made_bytes > found.prompts.peak_bytes
        assert found.head_flops == 2 * 32 * 100

    def test_a_row_of_scoring_reads_a_beginning_once(self, tiny_model):
        skeleton = Skeleton(tiny_model().config, torch.float32)
        assert skeleton.read_step(TEXTS).tokens == 32  # each text begins the next: 13, rounded up
        assert skeleton.read_step(TEXTS, shared=False).tokens == 3 * 14

    @pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
    def test_other_architectures(self, tiny_model, family):
        model = tiny_model(family)
        skeleton = Skeleton(model.config, torch.float32)
        assert skeleton.prepare("all weights", STAGE) == sum(weight.numel() for weight in model.parameters())
        assert skeleton.train_step(TEXTS, STAGE, 0).flops > 0
        assert skeleton.read_step(TEXTS).peak_bytes > 0


BARE = {"keep.weight": 0, "train.answers": "bare", "train.wordings": False}
FULL = {"train.answers": "sentence"}
STAGE_OF = {"kept answers": "ask", "own words": "ask", "general prompts": "general"}  # by a scorer's name


def config_of(folder, **changes):
    return load_config(None, {"model.name": str(folder), "method": "f-ft", "model.device": "cpu", **changes})


def _shared(texts):
    """The tokens that a step reads once for all its texts: none if they are few."""
    common = common_length([text.ids for text in texts])
    return common if common >= 0.2 * sum(len(text.ids) for text in texts) / len(texts) else 0


class TestPlan:
    @pytest.mark.parametrize(
        ("setting", "value", "stage"),
        [
            ("keep.weight", 0, "ask"),
            ("keep.weight", 0, "learn"),
            ("train.answers", "bare", "learn"),
            ("train.wordings", False, "learn"),
            ("evaluate.probes", ["none"], "probes"),
            ("evaluate.general_prompts", False, "general"),
            ("evaluate.protocols", ["token"], "score"),
        ],
    )
    def test_each_part_of_an_update_takes_its_time(self, small_lab, setting, value, stage):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
        whole, less = (
            plan_update(config_of(small_lab, method="ft", **FULL | changes), facts, rate=Speed(1e9))
            for changes in ({}, {setting: value})
        )
        took = [sum(each.seconds for each in plan.stages if each.name == stage) for plan in (whole, less)]
        assert took[1] < took[0]
        assert less.seconds < whole.seconds

    def test_it_logs_nothing_and_plans_without_prompts_that_cannot_be_asked(self, small_lab, caplog, monkeypatch):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=4)
        scored = LocalityProbe(next(iter(general_prompts.questions())), "x")  # an update says that it does not keep it
        facts = replace(facts, facts=(replace(facts.facts[0], locality=(scored,)), *facts.facts[1:]))
        outline = outline_of(config_of(small_lab).model)
        prompt_ids, odd = outline.encoder.prompt_ids, next(iter(general_prompts.measuring()))

        def refusing(prompt):
            if prompt == odd:
                raise FactError("the template refuses it")
            return prompt_ids(prompt)

        monkeypatch.setattr(outline.encoder, "prompt_ids", refusing)
        config = config_of(small_lab, **{"recipe": "forget", "method": "subtract"}, **FULL)
        with caplog.at_level("INFO"):
            plan = plan_update(config, facts, outline=outline, rate=Speed(1e9))
        assert caplog.records == []
        (general,) = [stage for stage in plan.stages if stage.name == "general"]
        assert general.texts == 2 * 2 * (len(general_prompts.measuring()) - 1)  # read and answered, twice

    def test_without_a_tokenizer_all_prompts_are_answered(self, small_lab):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=8)
        outline = replace(outline_of(config_of(small_lab).model), encoder=None)
        for size in (2, 8):
            config = config_of(small_lab, method="ft", **{"evaluate.batch_size": size, "evaluate.max_new_tokens": 10})
            (score,) = [load for load in loads_of(outline, Stages(config), facts, "cpu")[0] if load.name == "score"]
            number = len({prompt for fact in facts for prompt in fact.prompts})
            assert score.asking.prompts == 2 * number
            assert score.asking.answer_steps == 2 * 10 * math.ceil(number / size)
        config = config_of(small_lab, method="ft", **{"evaluate.protocols": ["token"]})
        assert loads_of(outline, Stages(config), facts, "cpu")[0][-1].asking.prompts == 0

    def test_the_model_is_asked_as_often_as_planned(self, small_lab, tmp_path, monkeypatch):
        asked = Counter()
        say, over = Scorer.say, Scorer._over

        def saying(self, prompts, rooms=None):
            prompts = list(dict.fromkeys(prompts))
            asked[STAGE_OF.get(self.name, "probes" if "probes" in self.name else "score"), "say"] += len(prompts)
            return say(self, prompts, rooms)

        def reading(self, texts, run):
            asked[STAGE_OF.get(self.name, "probes" if "probes" in self.name else "score"), "read"] += len(texts)
            return over(self, texts, run)

        monkeypatch.setattr(Scorer, "say", saying)
        monkeypatch.setattr(Scorer, "_over", reading)
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
        config = config_of(small_lab, **{"method": "ft", "learn.epochs": 1, "train.answers": "bare"})
        forgetlearn.update(small_lab, facts, config, output=tmp_path / "run")
        loads, _notes = loads_of(outline_of(config.model), Stages(config), facts, "cpu")
        planned = {load.name: load.asking for load in loads if not load.trained}
        assert list(planned) == ["score", "ask", "general", "probes"]
        for name in ("score", "probes"):
            assert (planned[name].texts, planned[name].prompts) == (asked[name, "read"], asked[name, "say"]), name
        assert planned["ask"].prompts == asked["ask", "say"] >= asked["ask", "read"] > 0  # if the model says anything
        # Of general prompts, the updated model answers only those where it differs.
        half = planned["general"].prompts // 2
        assert half <= asked["general", "say"] <= 2 * half
        assert asked["general", "read"] <= planned["general"].texts

    def test_counts_are_those_of_the_run(self, small_lab):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl")
        changes = {"forget.batch_size": 5, "forget.epochs": 2, "learn.epochs": 1, **BARE}
        plan = plan_update(config_of(small_lab, **changes), facts, rate="1")
        lm = forgetlearn.load_model(small_lab)
        assert plan.parameters == sum(weight.numel() for weight in lm.model.parameters())
        assert plan.inputs["stored"] == {"F32": plan.parameters}
        forget, learn, score, *_others = plan.stages
        texts = [lm.encoder.encode(fact.prompt, fact.target_new, end=True) for fact in facts]
        assert learn.tokens == sum(len(text.ids) for text in texts) - (len(facts) - learn.steps) * _shared(texts)
        log = finetune(lm.model, texts, StageSettings(epochs=1), seed=0, pad_id=0)
        assert learn.steps == len(log.steps)
        asked = len({pair for fact in facts for pair in pairs_to_read(fact)})  # distinct: facts share some probes
        asked += len({prompt for fact in facts for prompt in fact.prompts})
        assert (forget.steps, score.texts) == (10, 3 * asked)
        size = plan.parameters
        assert plan.disk == {"product": 4 * size, "between stages": 4 * size, "checkpoints": 24 * size}
        assert plan.seconds > 0

    def test_a_search_for_a_value_reads_from_the_subject_on(self, small_lab):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
        plan = plan_update(config_of(small_lab, **{"method": "rome", "edit.steps": 3, "edit.contexts": 1}), facts)
        encoder = forgetlearn.load_model(small_lab).encoder
        ends = [encoder.place_of(fact.prompt, subject_span(fact)[1]) for fact in facts]
        read = [len(encoder.encode(fact.prompt, fact.target_new).ids) for fact in facts]
        assert plan.stages[0].tokens == 3 * (1 + 2) * (sum(read) - sum(ends))  # bare, after a context, "X is a"
        assert sum(ends) > len(facts)

    def test_lora_keeps_what_it_adds(self, small_lab):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
        plan = plan_update(config_of(small_lab, **{"method": "f-lora", "lora.r": 2}), facts)
        forget, learn, *_asked = plan.stages
        assert learn.trained == forget.trained
        product, between, points = 4 * (learn.trained + forget.trained), 4 * forget.trained, 24 * learn.trained
        assert plan.disk == {"product": product, "between stages": between, "checkpoints": points}
        assert plan.seconds is None

    def test_a_base_held_in_bfloat16_for_an_adapter_on_the_cpu_takes_half_as_much_again(self, small_lab):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
        found = {}
        for dtype in ("float32", "bfloat16"):
            config = config_of(small_lab, **{"method": "lora", "train.dtype": dtype})
            for device in ("cpu", "cuda"):
                loads, _notes = loads_of(outline_of(config.model), Stages(config), facts, device)
                found[dtype, device] = next(load for load in loads if load.name == "learn")
        halves = found["bfloat16", "cpu"]
        assert [load.kept_bytes for load in found.values()] == [0, 0, halves.kept_bytes, 0]
        assert 2 * halves.kept_bytes == outline_of(config.model).skeleton().weights_bytes
        assert halves.step.peak_bytes < found["float32", "cpu"].step.peak_bytes
        assert halves.trained == found["float32", "cpu"].trained

    def test_what_does_not_fit_is_told_what_would(self, small_lab, capsys):
        flags = ["--model", str(small_lab), "--facts", f"{small_lab}/facts.jsonl", "--method", "f-lora", "--json"]
        assert main(["plan", *flags, "--memory", "0.1"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["fits"] is False
        assert plan["advice"] == ["nothing that was tried fits: take more or larger devices, or a smaller model"]
        assert main(["plan", *flags[:-1], "--memory", "80", "--rate", "12000tokens/s"]) == 0
        out = capsys.readouterr().out
        assert "fits in 80.0 GB" in out
        assert "at 12000 tokens/s of training, as given" in out

    def test_half_precision_is_offered_for_a_model_in_float32(self, small_lab):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
        config = config_of(small_lab, method="ft")
        needed = plan_update(config, facts, devices=Devices("cuda", 1e12)).peak_bytes
        advice = plan_update(config, facts, devices=Devices("cuda", needed - 1)).advice
        # What the model is asked takes the most memory here, so an adapter on a base in float32 does not fit either.
        assert [line.partition(":")[0] for line in advice if "lora" in line] == [
            "--method lora --set model.dtype=bfloat16"
        ]

    def test_a_large_model_from_its_headers(self, small_lab, tmp_path, capsys):
        """A file of 5 GB that is nearly all holes: nothing but its header is read."""
        config = json.loads((small_lab / "config.json").read_text())
        config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 1}
        config |= {"num_key_value_heads": 32, "vocab_size": 32000, "head_dim": 128, "dtype": "bfloat16"}
        folder = shutil.copytree(small_lab, tmp_path / "large")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").unlink()
        model = Skeleton(outline_of(config_of(small_lab).model).config.__class__(**config), torch.bfloat16).model
        entries = [
            Entry(name, "BF16", tuple(weight.shape), "", 0, 2 * weight.numel())
            for name, weight in model.named_parameters()
        ]
        header = header_bytes(entries, {"format": "pt"}, {entry.name: "BF16" for entry in entries})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(entry.n_bytes for entry in entries))
        flags = ["--model", str(folder), "--facts", f"{small_lab}/facts.jsonl", "--method", "f-ft", "--limit", "4"]
        assert main(["plan", *flags, "--memory", "6", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["parameters"] == sum(entry.n_entries for entry in entries) == plan["inputs"]["stored"]["BF16"]
        assert plan["host_bytes"] == 4 * plan["parameters"]
        assert not plan["fits"]
        assert plan["advice"][0].startswith("--method f-lora: ")

    def test_without_a_tokenizer_tokens_are_an_estimate_and_said_to_be_one(self, small_lab, tmp_path):
        folder = shutil.copytree(small_lab, tmp_path / "bare")
        for file in folder.glob("tokenizer*"):
            file.unlink()
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=4)
        plan = plan_update(config_of(folder), facts)
        assert any("tokenizer" in note for note in plan.notes)

    def test_only_facts_with_an_old_answer_are_forgotten(self, small_lab, tmp_path):  # case 14
        lines = [json.loads(line) for line in (small_lab / "facts.jsonl").read_text().splitlines()[:8]]
        for line in lines[5:]:
            del line["ground_truth"]
        (tmp_path / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for old_from, n_forgotten in (("answers", 5), ("answers,model", 8)):
            facts = forgetlearn.read_facts(tmp_path / "f.jsonl", old_from=old_from)
            plan = plan_update(config_of(small_lab, method="f-ft"), facts)
            assert [stage.texts for stage in plan.stages if stage.name in ("forget", "learn")] == [n_forgotten, 8]

    def test_an_update_without_old_answers_is_refused_as_update_refuses_it(self, small_lab, tmp_path, capsys):
        (tmp_path / "f.jsonl").write_text('{"prompt": "p", "target_new": "n"}')
        argv = ["--model", str(small_lab), "--facts", str(tmp_path / "f.jsonl"), "--method", "ft", "--teach-old", "1"]
        assert main(["plan", *argv]) == 2
        assert "old answers" in capsys.readouterr().err
        config = config_of(small_lab, **{"method": "ft", "teach.epochs": 1})
        plan = plan_update(config, forgetlearn.read_facts(tmp_path / "f.jsonl"))
        assert [stage.name for stage in plan.stages] == ["learn", "score", "ask", "general", "probes"]

    def test_what_is_wrong_is_said(self, small_lab, tmp_path):
        facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=4)
        with pytest.raises(ConfigError, match="--rate fast"):
            plan_update(config_of(small_lab), facts, rate="fast")
        with pytest.raises(ModelError, match="none"):
            plan_update(config_of(tmp_path / "none"), facts)
        with pytest.raises(ConfigError, match="target_modules"):
            plan_update(config_of(small_lab, **{"method": "lora", "lora.target_modules": ["nothing"]}), facts)


@pytest.mark.parametrize(("halves", "used"), [(1e9, 1e9), (9e12, 1e12)])
def test_faster_products_in_half_precision_are_not_counted_on(monkeypatch, halves, used):
    monkeypatch.setattr(
        planning, "_rate_of_layers", lambda dtype, _seconds: (halves if dtype == torch.bfloat16 else 1e12, 1e10)
    )
    cpu = torch.device("cpu")
    assert planning.measured_speed(cpu, torch.bfloat16, 0.001).flops == used
    assert planning.measured_speed(cpu, torch.float32, 0.001).flops == 1e12


def test_a_plan_counts_weights_in_float32_where_they_will_be_held_so(small_lab, tmp_path, monkeypatch):
    model = load_model(ModelSettings(name=str(small_lab), dtype="bfloat16"))
    model.save(tmp_path / "half")
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=6)
    monkeypatch.setattr(language_model.onednn, "has_instructions_for", lambda dtype: dtype == torch.float32)

    def weights(smallest: int, **settings) -> float:
        monkeypatch.setattr(language_model, "SMALL_MODEL", smallest)
        config = config_of(tmp_path / "half", **{"method": "lora", **settings})
        plan = plan_update(config, facts, devices=Devices("cpu", 1e12))
        return next(stage.memory["weights"] for stage in plan.stages if stage.name == "learn")

    stored = outline_of(config_of(tmp_path / "half").model).skeleton().weights_bytes
    assert weights(10**9) == weights(0, **{"model.dtype": "bfloat16"})
    assert weights(0) == weights(10**9) + stored


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", torch.bfloat16), ("in-context", torch.bfloat16), ("ft", torch.float32)]
)
def test_what_trains_all_weights_is_timed_in_float32(method, dtype):
    assert Outline("m", PreTrainedConfig(), None, torch.bfloat16).computes_in(METHODS[method].last) == dtype


def test_update_begins_and_ends_with_a_line(small_lab, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "forgetlearn")
    monkeypatch.setattr(planning, "SMALL_MODEL", 0)  # a small one is not traced
    monkeypatch.setattr(planning, "measured_speed", lambda *_: Speed(1e10))
    config = config_of(small_lab, **{"learn.epochs": 2, "method": "lora", "evaluate.protocols": ["exact"]})
    facts = forgetlearn.read_facts(small_lab / "facts.jsonl", limit=5)
    result = forgetlearn.update(small_lab, facts, config, output=tmp_path / "run")
    manifest = json.loads((result.output / "manifest.json").read_text())
    first = next(line for line in caplog.messages if line.startswith("plan: "))
    assert f"{len(facts)} facts, {manifest['stages']['learn']['steps']} steps to learn, about " in first
    assert manifest["plan"]["seconds"] > 0
    (last,) = [line for line in caplog.messages if line.startswith("took ")]
    assert f" (planned {show_range(*manifest['plan']['seconds_range'])}), at most " in last
    assert last.endswith(f"(planned {show_bytes(manifest['plan']['peak_memory_gb'] * 1e9)})")
    monkeypatch.setattr(planning, "SMALL_MODEL", 10**9)
    line, figures = planning.plan_line(forgetlearn.load_model(small_lab), facts, config)
    assert (line, figures) == (first.split(", about")[0], {})


@pytest.mark.slow
def test_from_the_hub_only_config_headers_and_tokenizer_are_fetched(small_lab, tmp_path):
    pickled = shutil.copytree(small_lab, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with serve({"some/model": small_lab, "some/pickled": pickled}) as hub:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        plans = {}
        for name in ("some/model", "some/pickled"):
            flags = ["--model", name, "--facts", f"{small_lab}/facts.jsonl", "--method", "f-ft", "--json"]
            command = [sys.executable, "-m", "forgetlearn", "plan", *flags]
            done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            plans[name] = json.loads(done.stdout)
        whole = (small_lab / "model.safetensors").stat().st_size
        fetched = [path for method, path in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert fetched  # by ranges: see the sizes in the cache
    cached = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size >= whole]
    assert not cached
    assert plans["some/model"]["inputs"]["stored"] == {"F32": plans["some/model"]["parameters"]}
    assert plans["some/pickled"]["parameters"] == plans["some/model"]["parameters"]
    assert "has no safetensors on the hub" in plans["some/pickled"]["notes"][0]


@pytest.mark.slow
def test_the_program_for_a_gpu_runs_tiny(shared_data, tmp_path):
    program = Path(__file__).parents[1] / "bench/gpu/update.py"
    flags = ["--facts", str(shared_data("counterfact.json")), "--shape", "tiny", "--output", str(tmp_path / "gpu.json")]
    subprocess.run([sys.executable, str(program), *flags], check=True, timeout=300, capture_output=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {"lora: training", "scoring, batches", "f-lora: learn", "f-ft: learn"} <= rows.keys()
    assert not [name for name in rows if "failed" in name or "not" in name]


@pytest.mark.slow
def test_the_program_that_reproduces_the_paper_on_a_gpu_runs_tiny(shared_data, tmp_path):
    program = Path(__file__).parents[1] / "bench/gpu/paper.py"
    flags = ["--zsre", str(shared_data("zsre.json")), "--scratch", str(tmp_path / "scratch"), "--shape", "tiny"]
    flags += ["--limit", "6", "--parts", "table1,table3", "--output", str(tmp_path / "gpu.json")]
    subprocess.run([sys.executable, str(program), *flags], check=True, timeout=300, capture_output=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {"planned time, s", "table1, s", "table3, s"} <= rows.keys()
    assert (tmp_path / "scratch/paper/paper.html").is_file()
