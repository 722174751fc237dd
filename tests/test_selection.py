"""Names of parts of a model, told from its structure."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from forgetlearn.cli.main import main
from forgetlearn.config.schema import LoraSettings
from forgetlearn.errors import ConfigError
from forgetlearn.models import lora
from forgetlearn.models.module_names import parse, stored_groups
from forgetlearn.models.modules import factors_of, groups
from forgetlearn.weights.task_vector import subtracted

FAMILIES = ("llama", "gpt2", "opt", "gpt_neox")


def test_a_llama_by_name(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=False)
    found = groups(model)
    assert found["embeddings"] == ["model.embed_tokens.weight"]
    assert found["head"] == ["lm_head.weight"]
    assert found["vocabulary"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert found["attention"][:4] == [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    assert found["mlp"][:3] == [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert "model.layers.1.input_layernorm.weight" in found["norms"]
    assert "model.norm.weight" not in found["norms"]  # it is no part of a layer; a pattern reaches it
    assert factors_of(model, "*norm.weight").keys() >= {"model.norm.weight"}


def test_tied_embeddings_and_head_are_one(tiny_model):
    found = groups(tiny_model("llama", tie_word_embeddings=True))
    assert found["head"] == found["embeddings"] == found["vocabulary"] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_layer_add_up_in_every_family(tiny_model, family):
    model = tiny_model(family)
    found = groups(model)
    layers = [name for key, names in found.items() if key.startswith("layers.") for name in names]
    assert sorted(found["attention"] + found["mlp"] + found["norms"]) == sorted(layers)
    assert len(layers) == len(set(layers))
    assert set(layers).isdisjoint(found["vocabulary"])
    assert {name for name, _weight in model.named_parameters()} == set(found["all"])
    weights = dict(model.named_parameters())
    assert all(weights[name].dim() == 1 for name in found["norms"])
    for kind in ("attention", "mlp"):
        assert any(weights[name].dim() == 2 for name in found[kind])


def test_ranges_patterns_factors_and_what_two_names_share(tiny_model):
    model = tiny_model("llama")
    assert factors_of(model, "layers.0-1") == dict.fromkeys(groups(model)["layers.0"] + groups(model)["layers.1"], 1.0)
    assert list(factors_of(model, ("*.0.mlp.up*",))) == ["model.layers.0.mlp.up_proj.weight"]
    assert set(factors_of(model, "attention@layers.1")) == {
        f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"
    }
    both = factors_of(model, {"embeddings": 2.0, "layers.1": 0.5})
    assert both["model.embed_tokens.weight"] == 2.0
    assert both["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert "model.layers.0.mlp.up_proj.weight" not in both


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_an_adapter_does_not_change_the_names(tiny_model, targets):
    model = tiny_model("llama", tie_word_embeddings=False)
    before = groups(model)
    settings = LoraSettings(r=2, target_modules=targets)
    assert groups(lora.attach(model, settings, "forget", 0)) == before


def subtract(folder, modules):
    """The exit code of `subtract` on these modules, of the checkpoints `b` and `t` in a folder, to `o`."""
    words = ["subtract", "--coef", "0.3", "--modules", modules]
    for flag in ("base", "tuned", "output"):
        words += [f"--{flag}", str(folder / flag[0])]
    return main(words)


@pytest.mark.parametrize(
    ("text", "tied"),
    [("layers.1", False), ("*q_proj*=2,layers.0-1@*mlp*=0.5", False), ("attention=1.5,vocabulary=0.5", True)],
)
def test_a_part_of_a_checkpoint_is_subtracted_as_in_memory(tmp_path, tiny_model, text, tied):
    """From folders, told by names alone or by the model's structure: the same weights move by the same factors."""
    base, tuned = (tiny_model(seed=seed, tied=tied) for seed in (0, 1))
    for weight in tuned.parameters():
        weight.data += 0.1  # norms are 1 in both
    base.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    tuned.save_pretrained(tmp_path / "t")
    assert subtract(tmp_path, text) == 0
    own = factors_of(base, parse(text))
    wanted = dict(subtracted(*(dict(model.named_parameters()) for model in (base, tuned)), 0.3, own))
    found = {
        name: tensor for file in (tmp_path / "o").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    before = dict(base.named_parameters())
    assert {name for name in found if not torch.equal(found[name], before[name])} == own.keys()
    assert json.loads((tmp_path / "o/arithmetic.json").read_text())["factors"] == own


def test_parts_that_a_checkpoint_has_not(tmp_path, tiny_model, capsys):
    tiny_model().save_pretrained(tmp_path / "b")
    tiny_model(seed=1).save_pretrained(tmp_path / "t")
    for text, told in [
        ("layers.7", "'layers.7'"),
        ("layers.0=1,*mlp*=2", "'layers.0' and '*mlp*'"),
        ("layers.0=1,*mlp*", "--modules layers.0=1,*mlp*"),
        ("layers.0=nan", "= nan"),
        ("layers.0=1,layers.0=2", "--modules: layers.0"),
        ("nothing", "'nothing'"),
    ]:
        assert subtract(tmp_path, text) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_layers_of_names_alone_are_the_largest_stack(tiny_model):
    model = tiny_model()
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    told = groups(model)
    assert stored_groups(sizes) == {name: told[name] for name in ("all", "layers.0", "layers.1")}
    experts = {f"m.layers.{layer}.experts.{one}.w": 1 for layer in range(2) for one in range(8)}
    assert set(stored_groups(experts | {"vision.blocks.0.w": 3})) == {"all", "layers.0", "layers.1"}
    assert stored_groups({"w": 1}) == {"all": ["w"]}


def test_experts_are_not_layers_however_many_they_are():
    def layer():
        return nn.ModuleDict({"self_attn": nn.Linear(2, 2), "experts": nn.ModuleList(nn.Linear(2, 2) for _ in "abcd")})

    model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in "ab")})
    found = groups(model)
    assert [name for name in found if name.startswith("layers.")] == ["layers.0", "layers.1"]
    assert "layers.1.experts.3.weight" in found["layers.1"]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("atention", "'atention'.*embeddings"),
        ("layers.7", r"'layers.7'.*layers.0 to layers.1"),
        (("mlp", "mlp"), r"modules: mlp"),
        (("mlp", "layers.0"), "'mlp' and 'layers.0' .*model.layers.0.mlp"),
        (("embeddings", "head"), "embeddings.*head"),
        ("mlp@head", "'mlp@head'"),
    ],
)
def test_bad_names(tiny_model, modules, message):
    with pytest.raises(ConfigError, match=message):
        factors_of(tiny_model("llama", tie_word_embeddings=True), modules)
