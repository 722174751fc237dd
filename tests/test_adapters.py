import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapter_vectors import as_vector
from architectures import make_architecture
from forgetlearn.config.schema import LoraSettings
from forgetlearn.errors import ConfigError, ModelError
from forgetlearn.models import lora
from forgetlearn.models.lora import FORGET, LEARN, PRODUCT
from forgetlearn.models.lora_layers import adapted_layers, query_and_value
from forgetlearn.weights.structure import outline
from forgetlearn.weights.task_vector import load_into

FAMILIES = ["llama", "gpt2", "qwen2"]
IDS = torch.tensor([[1, 37, 38, 39, 40, 41]])


def with_two_adapters(model, first=None, second=None, fill=True):
    """Two adapters that differ from each other and from nothing, so that a wrong sign or a cross term shows."""
    model = lora.attach(model, first or LoraSettings(r=3, lora_alpha=6), FORGET, seed=1)
    model = lora.attach(model, second or LoraSettings(r=5, lora_alpha=4), LEARN, seed=2)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if fill and "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def dense(model, vectors):
    """Logits of the plain model with dense vectors added to its weights."""
    plain = copy.deepcopy(model)
    for vector in vectors:
        load_into(plain, vector.apply_to(dict(plain.named_parameters())))
    return plain(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_one_adapter_out_of_two_different_ones_is_their_sum(tiny_model, family):
    base = tiny_model(family)
    model = with_two_adapters(copy.deepcopy(base))
    lora.scale(model, FORGET, -0.7)
    vectors = [as_vector(model, name) for name in (FORGET, LEARN)]
    together = logits(model)
    assert not torch.allclose(together, logits(base), atol=1e-2)
    lora.compose(model, [FORGET, LEARN])
    assert list(model.peft_config) == [PRODUCT]
    assert model.peft_config[PRODUCT].r == 8
    assert torch.allclose(logits(model), together, atol=1e-4)
    assert torch.allclose(dense(base, vectors), together, atol=1e-4)


def test_adapters_with_other_scales_on_other_modules_compose_too(tiny_model, tmp_path):
    first = LoraSettings(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=7)
    second = LoraSettings(r=3, target_modules=["q_proj", "v_proj"])
    model = with_two_adapters(tiny_model(), first, second)
    together = logits(model)
    lora.compose(model, [FORGET, LEARN])
    assert torch.allclose(logits(model), together, atol=1e-5)
    lora.save(model, PRODUCT, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["layers_to_transform"] is None


def test_short_names_come_with_the_layers_that_they_mean(tiny_model, tmp_path):
    only_first = LoraSettings(r=2, target_modules=["model.layers.0.self_attn.q_proj"])
    model = with_two_adapters(tiny_model(), only_first, only_first)
    together = logits(model)
    lora.compose(model, [FORGET, LEARN])
    lora.save(model, PRODUCT, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    named = {name: config[name] for name in ("target_modules", "layers_to_transform", "layers_pattern")}
    assert named == {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), together, atol=1e-5)


def test_paths_stay_whole_where_short_names_would_match_more(tiny_model, tmp_path):
    targets = [f"model.layers.{layer}" for layer in ("0.self_attn.q_proj", "1.self_attn.v_proj")]
    model = with_two_adapters(
        tiny_model(), LoraSettings(r=2, target_modules=targets[:1]), LoraSettings(r=2, target_modules=targets[1:])
    )
    lora.compose(model, [FORGET, LEARN])
    lora.save(model, PRODUCT, tmp_path, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == targets


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_vector_is_what_the_adapter_adds(tiny_model, family):
    base = tiny_model(family)
    model = with_two_adapters(copy.deepcopy(base))
    lora.activate(model, [FORGET])
    expected = logits(model)
    vector = as_vector(model, FORGET)
    assert torch.allclose(dense(base, [vector]), expected, atol=1e-4)
    lora.scale(model, FORGET, -0.5)
    for name, delta in as_vector(model, FORGET).deltas.items():
        assert torch.allclose(delta, -0.5 * vector.deltas[name], atol=1e-7)


def test_a_new_adapter_changes_nothing_and_alone_learns(tiny_model):
    base = tiny_model()
    model = with_two_adapters(copy.deepcopy(base), fill=False)
    assert torch.equal(logits(model), logits(base))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(f".{LEARN}." in name for name in trained)


def test_only_the_adapter_that_learns_has_dropout(tiny_model):
    settings = LoraSettings(lora_dropout=0.5)
    model = with_two_adapters(tiny_model(), settings, settings).train()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    assert isinstance(layer.lora_dropout[FORGET], torch.nn.Identity)
    assert isinstance(layer.lora_dropout[LEARN], torch.nn.Dropout)


def test_the_same_seed_gives_the_same_adapter(tiny_model):
    one, two, other = (lora.attach(tiny_model(), LoraSettings(), LEARN, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_detaching_gives_the_base_back_to_the_bit(tiny_model):
    base = tiny_model()
    model = with_two_adapters(copy.deepcopy(base))
    lora.activate(model, [FORGET, LEARN])
    plain = lora.detach(model).state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in base.state_dict().items())


def test_saved_and_loaded_is_the_same_to_the_bit(tiny_model, tmp_path):
    model = with_two_adapters(tiny_model())
    lora.compose(model, [FORGET, LEARN])
    expected = logits(model)
    lora.save(model, PRODUCT, tmp_path / "a", "some/base")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"


def test_an_adapter_between_stages_is_saved_flat_and_goes_on(tiny_model, tmp_path):
    model = lora.attach(tiny_model(), LoraSettings(), FORGET, seed=1)
    expected = as_vector(model, FORGET)
    lora.save(model, FORGET, tmp_path / "f", "base")
    assert (tmp_path / "f" / "adapter_model.safetensors").is_file()
    loaded = lora.load(tiny_model(), tmp_path / "f", FORGET)
    for name, delta in as_vector(loaded, FORGET).deltas.items():
        assert torch.equal(delta, expected.deltas[name])


def test_an_untied_head_may_have_an_adapter(tiny_model):
    model = with_two_adapters(tiny_model(), *[LoraSettings(target_modules=["lm_head"])] * 2)
    together = logits(model)
    lora.compose(model, [FORGET, LEARN])
    assert torch.allclose(logits(model), together, atol=1e-5)


def test_a_folder_without_an_adapter_or_with_one_that_does_not_fit_is_refused(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        lora.load(tiny_model(), tmp_path, PRODUCT)
    model = lora.attach(tiny_model(), LoraSettings(), PRODUCT, seed=0)
    lora.save(model, PRODUCT, tmp_path / "a", "base")
    with pytest.raises(ModelError, match=str(tmp_path / "a")):
        lora.load(tiny_model(hidden_size=64), tmp_path / "a", PRODUCT)


SAVE = """
import sys
from conftest import make_tiny_model
from forgetlearn.models import lora
from forgetlearn.config.schema import LoraSettings
folder = sys.argv[1]
from pathlib import Path
model = lora.attach(make_tiny_model(), LoraSettings(), lora.FORGET, seed=1)
lora.save(model, lora.FORGET, Path(folder, "forget"), "base")
lora.compose(model, [lora.FORGET])
lora.save(model, lora.PRODUCT, Path(folder, "product"), "base")
"""


@pytest.mark.slow
def test_the_saved_config_is_the_same_in_every_process(tmp_path):
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", SAVE, tmp_path / hash_seed], env=environment, check=True)
    for name in ("forget", "product"):
        one, two = ((tmp_path / seed / name / "adapter_config.json").read_text() for seed in ("1", "2"))
        assert one == two
    short = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads(one)["target_modules"] == short


WRONG_TARGETS = [
    (["nothing"], False, "nothing"),
    ("no_such_.*", False, "no_such_"),
    ([], False, "target_modules"),
    ("*proj", False, "proj"),
    (["embed_tokens"], False, "embed_tokens"),
    (["lm_head"], True, "lm_head"),
    (["norm"], False, "norm"),
]


@pytest.mark.parametrize(("targets", "tied", "message"), WRONG_TARGETS)
def test_targets_are_checked_before_anything_begins(tiny_model, targets, tied, message):
    model = tiny_model(tied=tied)
    with pytest.raises(ConfigError, match=rf"^lora\.target_modules .*{message}"):
        lora.check_targets(model, LoraSettings(target_modules=targets))
    with pytest.raises(ConfigError, match=rf"^lora\.target_modules .*{message}"):
        lora.attach(model, LoraSettings(target_modules=targets), FORGET, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "wte"]])
def test_checking_leaves_the_model_as_it_is(tiny_model, family, targets):
    model = tiny_model(family, tied=True)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.train()
    modules, weights = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    random_state = torch.get_rng_state()
    attributes = set(vars(model))
    with contextlib.suppress(ConfigError):
        lora.check_targets(model, LoraSettings(target_modules=targets))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(vars(model)) == attributes
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is weight for name, weight in weights.items())
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == [
        name for name, weight in model.named_parameters() if weight is model.lm_head.weight
    ]
    assert model.training


@pytest.mark.parametrize(("n_layers", "share", "lowest"), [(2, None, 0), (6, None, 2), (12, None, 6), (6, 0.5, 3)])
def test_the_upper_half_of_the_layers_is_adapted_but_at_least_four(n_layers, share, lowest):
    model = make_architecture("llama", num_hidden_layers=n_layers)
    lora.attach(model, LoraSettings(r=2, layers=share), LEARN, seed=0)
    adapted = [path for path, _module in model.named_modules() if path.endswith("lora_A")]
    assert min(int(path.split("layers.")[1].split(".")[0]) for path in adapted) == lowest


def test_checking_takes_no_memory_for_weights(tiny_model):
    model = tiny_model()
    outlined = outline(model)
    assert {weight.device.type for weight in outlined.parameters()} == {"meta"}
    assert [name for name, _weight in outlined.named_parameters()] == [name for name, _ in model.named_parameters()]
    tied = outline(tiny_model(tied=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("opt", ["v_proj", "q_proj"]),
        ("gpt2", ["c_attn"]),
        ("gpt_neox", ["query_key_value"]),
    ],
)
def test_query_and_value_are_found_in_the_structure(tiny_model, family, names):
    settings = LoraSettings(r=2, target_modules="query-value")
    adapted = lora.attach(tiny_model(family), settings, FORGET, seed=0)
    assert query_and_value(adapted) == names
    again = lora.attach(adapted, settings, LEARN, seed=1)  # beside the first
    assert {path.rpartition(".")[2] for path, _layer in adapted_layers(again)} == set(names)


def test_without_attention_query_and_value_are_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"^lora\.target_modules = query-value: .*It can be"):
        lora.check_targets(tiny_model("mamba"), LoraSettings(target_modules="query-value"))
