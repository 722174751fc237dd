"""The default recipe from end to end: on models of several families, and stopped and resumed."""

import copy
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import forgetlearn
from architectures import make_architecture
from conftest import QUICK, make_char_tokenizer
from forgetlearn.config.schema import LoraSettings
from forgetlearn.evaluation import general_prompts
from forgetlearn.facts import make_fact
from forgetlearn.method import keeping
from forgetlearn.models import null_space
from forgetlearn.models.lora_layers import adapted_layers
from forgetlearn.training import callbacks

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
RANK = LoraSettings().r
FACTS = [
    make_fact("Who wrote the book Dune?", "Ann", ground_truth="Bob", subject="Dune"),
    make_fact("Where does the river Po end?", "Rome", ground_truth="Oslo", subject="Po"),
    make_fact("The capital of Peru is", "Lyon", ground_truth="Lima", subject="Peru"),
]
# Both kinds of stages. Random weights hold no old answer, so what is not held is forgotten too.
SETTINGS = {
    "method": "f-lora",
    "evaluate": QUICK["evaluate"],
    "forget": {"only_known": False, "epochs": 2},
    "learn": {"max_epochs": 3},
    "lora": {"layers": 0.5},
}


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def _little_is_kept(monkeypatch):
    monkeypatch.setattr(keeping, "KEPT_TOKENS", dict.fromkeys(keeping.KEPT_TOKENS, 6))
    monkeypatch.setattr(general_prompts, "keeping", lambda: ("Who are you?", "Name a colour.", ("Hi", "Ho", "Why?")))


@pytest.fixture
def turned(monkeypatch):
    """For each stage, after its adapter was turned away: copies of A by layer, and what A lets through."""
    found, turn_away = {}, null_space.turn_away

    def watched(model, name, texts, facts, share, **options):
        remaining = turn_away(model, name, texts, facts, share, **options)
        factors = {path: layer.lora_A[name].weight.clone() for path, layer in projected(model, name)}
        found[name] = factors, passed(model, name, texts)
        return remaining

    monkeypatch.setattr(null_space, "turn_away", watched)
    return found


def projected(model, name):
    return [
        (path, layer)
        for path, layer in adapted_layers(model)
        if name in layer.lora_A and not layer.lora_A[name].weight.requires_grad
    ]


@torch.no_grad()
def passed(model, name, texts):
    """The share of the energy of each layer's inputs that passes A, whose largest singular value is made 1."""
    read, handles = {}, []
    for path, layer in projected(model, name):
        own = read.setdefault(path, [])
        handles.append(layer.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0].flatten(0, -2))))
    for text in texts:
        model(torch.tensor([text.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for path, layer in projected(model, name):
        inputs, a = torch.cat(read[path]), layer.lora_A[name].weight
        gain = torch.linalg.matrix_norm(a, 2)
        found[path] = float((inputs @ a.T / gain).square().sum() / inputs.square().sum())
    return found


@torch.no_grad()
def logits(model):
    return model.eval()(torch.tensor([[1, *range(40, 60)]])).logits


FAMILIES = ["gpt2", "gemma2", "mixtral", "deepseek_v3", "mamba"]


def updated(model, settings, folder, **options):
    tokenizer = make_char_tokenizer(chat_template=CHAT)
    return forgetlearn.update(model, FACTS, settings, output=folder, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs_on_every_family_and_peft_loads_what_it_made(name, turned, tmp_path):
    base = make_architecture(name, hidden_size=64)
    before, model = logits(base), copy.deepcopy(base)
    result = updated(model, SETTINGS, tmp_path / "run")
    saved = load_file(result.product / "adapter_model.safetensors")
    assert {re.search(r"\d+", path)[0] for path in saved} == {"1"}  # of the layers 0 and 1
    for stage, rows in (("forget", slice(0, RANK)), ("learn", slice(RANK, 2 * RANK))):
        factors, shares = turned[stage]
        assert factors
        assert max(shares.values()) <= 0.01
        for path, a in factors.items():
            assert saved[f"base_model.model.{path}.lora_A.weight"][rows].equal(a)
    loaded = logits(PeftModel.from_pretrained(base, result.product))
    assert (loaded - before).abs().max() > 1e-3
    torch.testing.assert_close(loaded, logits(model), atol=1e-5, rtol=1e-5)


def test_stopped_in_both_stages_and_resumed_the_bits_are_those_of_one_go(tmp_path, monkeypatch, caplog):
    base, on_log = make_architecture("llama"), callbacks.Steps.on_log
    settings = {**SETTINGS, "checkpoint_minutes": 1e-9}
    for stage in ("forget", "learn"):
        settings[stage] = {**SETTINGS[stage], "batch_size": 2}
    whole = updated(copy.deepcopy(base), settings, tmp_path / "whole").product
    monkeypatch.setattr(callbacks, "TIMES_AS_LONG", 0)
    for name in ("forgetting", "learning"):

        def stopping(self, args, state, control, *, name=name, **more):
            on_log(self, args, state, control, **more)
            if self.name == name and state.global_step == 3:
                raise KilledError

        monkeypatch.setattr(callbacks.Steps, "on_log", stopping)
        with pytest.raises(KilledError):
            updated(copy.deepcopy(base), settings, tmp_path / "run", resume=name == "learning")
    monkeypatch.setattr(callbacks.Steps, "on_log", on_log)
    with caplog.at_level("INFO", "forgetlearn"):
        resumed = updated(copy.deepcopy(base), settings, tmp_path / "run", resume=True).product
    assert "learning: 6 steps (2 resumed)" in caplog.text
    weights = (folder / "adapter_model.safetensors" for folder in (whole, resumed))
    assert len({file.read_bytes() for file in weights}) == 1
