"""Greedy answers behind one protocol: vLLM by a stand-in, which answers with what transformers says.

tests/test_vllm.py runs vLLM itself.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from architectures import make_architecture
from forgetlearn.cli.main import main
from forgetlearn.comparison import grid
from forgetlearn.config.schema import EvaluateSettings, RunConfig
from forgetlearn.errors import ConfigError, MissingExtraError, ModelError
from forgetlearn.evaluation import generation
from forgetlearn.evaluation.scorer import Scorer
from forgetlearn.models.language_model import ModelSettings, wrap
from forgetlearn.runs import evaluate
from forgetlearn.runs.update import update

VLLM = EvaluateSettings(engine="vllm", max_new_tokens=6, batch_size=2)  # of transformers: vLLM gets all at once


class StandIn:
    """vLLM's offline API as far as it is used; answers come from a model in memory."""

    def __init__(self, lm):
        self.lm, self.calls = lm, []
        self.SamplingParams = self.TokensPrompt = dict
        self.lora = SimpleNamespace(request=SimpleNamespace(LoRARequest=lambda *given: given))

    def LLM(self, **options):  # noqa: N802
        return SimpleNamespace(generate=lambda *args, **more: self.generate(options, *args, **more))

    def generate(self, options, prompts, params, *, lora_request, use_tqdm):
        self.calls.append((options, params, lora_request))
        plain = generation.TransformersGenerator(self.lm)
        outputs = []
        for prompt, wanted in zip(prompts, params, strict=True):
            (ids,) = plain.generate([prompt["prompt_token_ids"]], [generation.Room(wanted["max_tokens"])])
            ended = set(ids) & set(wanted["stop_token_ids"])
            ids = [token for token in ids if token not in wanted["stop_token_ids"]]
            said = SimpleNamespace(token_ids=tuple(ids), finish_reason="stop" if ended else "length")
            outputs.append(SimpleNamespace(outputs=[said]))
        return outputs


@pytest.fixture
def vllm(lm, monkeypatch):
    stand_in = StandIn(lm)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.lora", stand_in.lora)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", stand_in.lora.request)
    return stand_in


@pytest.fixture
def named(lm):
    lm.settings = ModelSettings(name="some/model", revision="v1")
    return lm


def test_vllm_is_asked_greedily_once_for_all_and_says_what_transformers_says(named, vllm):
    prompts = ["Hello", "What?", "ab" * 9, "Who is it"]
    (ids,) = generation.TransformersGenerator(named).generate([named.encoder.prompt_ids("Hello")], [generation.Room(6)])
    named.encoder.end_ids = [ids[3]]  # so that this answer ends early
    plain = Scorer(named, VLLM.model_copy(update={"engine": "transformers"})).say(prompts)
    assert Scorer(named, VLLM).say(prompts) == plain
    assert {said.truncated for said in plain.values()} == {True, False}
    ((options, params, adapter),) = vllm.calls
    assert options["model"] == "some/model"
    assert (options["revision"], options["dtype"], adapter) == ("v1", "float32", None)
    assert options["max_model_len"] == len(named.encoder.prompt_ids("ab" * 9)) + 6
    assert params[0] == {"temperature": 0, "max_tokens": 6, "stop_token_ids": sorted({2, ids[3]}), "detokenize": False}


def test_each_prompt_has_its_own_room_in_the_context(named, vllm):
    named.encoder.max_length = 20
    Scorer(named, VLLM).say(["Hello", "x" * 15])
    ((options, params, _adapter),) = vllm.calls
    widths = [len(named.encoder.prompt_ids(prompt)) for prompt in ("Hello", "x" * 15)]
    assert [wanted["max_tokens"] for wanted in params] == [min(6, 20 - width) for width in widths]
    assert options["max_model_len"] <= 20


def test_case_11_each_answer_has_its_own_room(named, vllm):
    settings = VLLM.model_copy(update={"engine": "transformers"})
    rooms = {"Hello": generation.Room(30), "What?": generation.Room(17, lines=3)}
    prompts = ["Hello", "What?", "ab" * 9, "Who is it"]
    found = Scorer(named, settings).say(prompts, rooms)
    assert found == Scorer(named, settings.model_copy(update={"batch_size": 1})).say(prompts, rooms)
    assert found == {p: Scorer(named, settings).say([p], rooms)[p] for p in prompts}
    assert found == Scorer(named, VLLM).say(prompts, rooms)
    assert [wanted["max_tokens"] for wanted in vllm.calls[0][1]] == [30, 17, 6, 6]
    usual = Scorer(named, settings).say(prompts)
    assert {p: found[p] for p in prompts[2:]} == {p: usual[p] for p in prompts[2:]}
    assert len(found["Hello"].text) > len(usual["Hello"].text)


def test_more_room_stays_within_the_context(named, vllm):
    named.encoder.max_length = 24
    rooms = {"Hello": generation.Room(15), "x" * 12: generation.Room(9)}  # each fits, but not beside the other
    settings = VLLM.model_copy(update={"engine": "transformers"})
    found = Scorer(named, settings).say(rooms, rooms)
    assert found == Scorer(named, VLLM).say(rooms, rooms)
    assert found == {p: Scorer(named, settings).say([p], rooms)[p] for p in rooms}


def test_an_adapter_goes_by_a_lora_request_on_its_base(named, vllm, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "the/base", "r": 12, "rank_pattern": {"q_proj": 20}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    named.settings = ModelSettings(name=str(tmp_path))
    Scorer(named, VLLM).say(["Hello"])
    ((options, _params, adapter),) = vllm.calls
    assert adapter == ("product", 1, str(tmp_path))
    assert (options["model"], options["enable_lora"], options["max_lora_rank"]) == ("the/base", True, 32)
    config["rank_pattern"] = {"q_proj": 600}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=r"600.* 512"):
        Scorer(named, VLLM).say(["Hello"])


def test_half_of_the_memory_that_is_free_goes_to_vllm_on_a_cpu(named, vllm, monkeypatch):
    monkeypatch.setattr(generation.psutil, "virtual_memory", lambda: SimpleNamespace(available=8, total=32))
    Scorer(named, VLLM).say(["Hello"])
    assert vllm.calls[0][0]["gpu_memory_utilization"] == 0.5 * 8 / 32  # a share of the total: more than is free fails


@pytest.mark.parametrize("error", [ValueError("LlamaForX is not known\nsecond line"), RuntimeError()])
def test_an_engine_that_does_not_start_is_an_error_that_says_why(named, vllm, monkeypatch, error):
    def refuse(**options):
        raise error

    monkeypatch.setattr(vllm, "LLM", refuse)
    with pytest.raises(ModelError, match=r"vllm.*some/model: (LlamaForX is not known|RuntimeError)\n"):
        Scorer(named, VLLM).say(["Hello"])


def test_a_model_in_memory_is_refused(lm, vllm):
    with pytest.raises(ModelError, match=r"evaluate\.engine = vllm"):
        Scorer(lm, VLLM).say(["Hello"])
    with pytest.raises(ConfigError, match=r"evaluate\.engine = vllm.*passed in"):
        evaluate.ask(["Hello"], lm, {"evaluate": {"engine": "vllm"}})


@pytest.mark.parametrize(("command", "name"), [(update, "update"), (grid.fill, "compare")])
def test_commands_that_change_weights_refuse_it(command, name, vllm, tmp_path):
    config = RunConfig(evaluate=VLLM, model=ModelSettings(name="some/model"))
    with pytest.raises(ConfigError, match=f"evaluate.engine = vllm: {name}"):
        command(config=config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(vllm, monkeypatch):
    monkeypatch.setattr(generation.processes, "launched", lambda: 2)
    with pytest.raises(ConfigError, match=r"evaluate\.engine = vllm.*torchrun"):
        generation.check_engine(VLLM)


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"forgetlearn\[vllm\]"):
        generation.check_engine(VLLM, ("some/model",))


def test_ask_by_the_command(named, vllm, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda settings: named)
    command = ["ask", "Hello", "--model", "some/model", "--json"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--engine", "vllm"]) == 0
    assert capsys.readouterr().out == plain
    assert len(vllm.calls) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral", "gpt_neox", "gemma2"])
def test_a_common_beginning_is_computed_once_and_answers_stay(name, char_tokenizer):
    lm = wrap(make_architecture(name), char_tokenizer)
    start = list(range(10, 30))
    prompts = [start + [40 + n] * (1 + 3 * n) for n in range(4)]
    with generation.generator(lm, EvaluateSettings()) as engine:
        alone = [engine.generate([prompt], [generation.Room(12)])[0] for prompt in prompts]
        together = engine.generate(prompts, [generation.Room(12)] * 4)
    assert [ids[: len(own)] for ids, own in zip(together, alone, strict=True)] == alone
    assert all(set(ids[len(own) :]) <= {lm.pad_id} for ids, own in zip(together, alone, strict=True))
    assert engine._start[0] == tuple(start)
    assert (engine._start[1] is None) == (name in ("mistral", "gemma2"))  # their windows keep only the last tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral", "gemma2", "falcon_mamba"])
def test_answers_that_have_ended_leave_the_batch_and_the_others_stay_the_same(name, char_tokenizer, monkeypatch):
    lm = wrap(make_architecture(name), char_tokenizer)
    prompts = [[10 + 7 * n, 20, 30 + n][: 2 + n % 2] for n in range(6)]
    rooms = [generation.Room(tokens, lines=99) for tokens in (3, 40, 9, 16, 17, 1)]
    sizes, generate = [], lm.model.generate

    def counted(**options):
        sizes.append(len(options["input_ids"]))
        return generate(**options)

    with generation.generator(lm, EvaluateSettings()) as engine:
        engine.ends = []
        alone = [engine.generate([prompt], [room])[0] for prompt, room in zip(prompts, rooms, strict=True)]
        monkeypatch.setattr(lm.model, "generate", counted)
        together = engine.generate(prompts, rooms)
    assert [len(ids) for ids in alone] == [3, 40, 9, 16, 17, 1]
    assert together == alone
    assert sizes == ([6, 4, 2, 1] if engine._drops else [6, 6])
    assert engine._drops == (name in ("llama", "gpt2", "bloom"))


def test_sampling_stops_when_few_of_a_batch_go_on(lm):
    with generation.generator_in_memory(lm) as sampler:
        sampler.ends = list(range(lm.model.config.vocab_size // 4))  # every fourth draw ends an answer
        said = sampler.sample([[7, 8, 9]] * 40, 200, seed=0)
        sampler.ends = [lm.pad_id]
        whole = sampler.sample([[7, 8, 9]] * 4, 5, seed=0)

    longest = max(map(len, said))
    assert 3 < longest < 9  # 0.75 ** 5 is less than a quarter
    assert sum(len(ids) == longest for ids in said) < 10
    assert [len(ids) for ids in whole] == [5] * 4


def test_a_frozen_head_is_not_copied_for_each_prompt(lm):
    """torch multiplies a slice batch by batch (bmm) if the matrix is frozen, and copies the matrix for each row."""
    lm.model.bfloat16().requires_grad_(False)
    prompts = [lm.encoder.prompt_ids(f"a {'x' * n}") for n in range(4)]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with generation.generator_in_memory(lm) as generator, torch.profiler.profile(activities=kinds) as seen:
        generator.generate(prompts, [generation.Room(2)] * 4)
    assert not [event.key for event in seen.key_averages() if event.key == "aten::bmm"]
    assert not lm.model.lm_head._forward_pre_hooks
