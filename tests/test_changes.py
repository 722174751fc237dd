import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from forgetlearn.errors import ModelError, WeightMismatchError
from forgetlearn.storage import digests
from forgetlearn.weights import streaming
from forgetlearn.weights.checkpoint_folder import CheckpointFolder
from forgetlearn.weights.folder_arithmetic import open_change, save_vector, subtract_folders

LLAMA = ["q_proj", "v_proj", "down_proj"]


def save_adapter(model, folder, seed, **config):
    """A LoRA adapter whose B is not 0."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": LLAMA, "task_type": "CAUSAL_LM", **config}))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                weight.normal_(std=0.05)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def read(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def dense(model, folder):
    """What an adapter adds, as peft computes it: merged minus base, in float64."""
    adapted = PeftModel.from_pretrained(model, str(folder)).double()
    before = {name: weight.clone() for name, weight in adapted.get_base_model().named_parameters()}
    merged = adapted.merge_and_unload()
    adapted = {name: name.replace(".weight", ".base_layer.weight") for name, _weight in merged.named_parameters()}
    return {
        name: weight.detach() - before[adapted[name]]
        for name, weight in merged.named_parameters()
        if adapted[name] != name and adapted[name] in before
    }


PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
    "alpha_pattern": {"layers.1.*.v_proj": 3, "^nothing": 9},
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"r": 4, "lora_alpha": 8}),
        ("llama", {"r": 3, "lora_alpha": 10, "use_rslora": True, **PATTERNS}),
        ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_fc"]}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_stream_is_the_dense_difference_within_one_rounding(
    tmp_path, tiny_model, monkeypatch, family, config, dtype
):
    base = tiny_model(family).to(dtype)
    base.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    outputs = []
    for seed, piece in ((1, 1 << 17), (2, 40)):  # two different adapters, pieces of rows and of parts of rows
        monkeypatch.setattr(streaming, "PIECE", piece)
        save_adapter(tiny_model(family).to(dtype), tmp_path / f"a{seed}", seed, **config)
        delta = dense(tiny_model(family).double(), tmp_path / f"a{seed}")
        written = subtract_folders(tmp_path / "b", tmp_path / f"o{seed}", 0.7, adapter=tmp_path / f"a{seed}")
        assert written.moved == len(delta) > 0
        got = read(written.output)
        outputs.append(got)
        for name, weight in weights.items():
            if name not in delta:
                assert name not in got or torch.equal(got[name], weight)
                continue
            wanted = weight.double() - 0.7 * delta[name]
            assert torch.allclose(got[name].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7), name
            assert not torch.equal(got[name], weight)
    assert any(not torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


def test_whatever_else_an_adapter_holds_is_refused(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path / "b")
    for number, (config, message) in enumerate(
        [
            ({"use_dora": True}, "use_dora = True"),
            ({"bias": "all"}, "bias = .all."),
            ({"lora_bias": True}, "lora_bias"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
            ({"init_lora_weights": "olora"}, "init_lora_weights = .olora."),
            ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ]
    ):
        folder = tmp_path / f"a{number}"
        save_adapter(tiny_model(), folder, 0, **config)
        with pytest.raises(ModelError, match=message):
            subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, adapter=folder)
    folder = tmp_path / "plain"
    save_adapter(tiny_model(), folder, 0)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in [
        ({"use_some_new_thing": {"a": 1}}, "use_some_new_thing"),
        ({"peft_type": "IA3"}, "peft_type = IA3"),
        ({"r": 5}, r"r = 5 in its config"),
    ]:
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises((ModelError, WeightMismatchError), match=message):
            subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, adapter=folder)
    assert not (tmp_path / "o").exists()


def test_an_adapter_of_another_base_or_on_tied_weights_is_refused(tmp_path, tiny_model):
    save_adapter(tiny_model(), tmp_path / "a", 0)
    save_adapter(tiny_model(), tmp_path / "head", 0, target_modules=["lm_head"])
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_model(intermediate_size=96).save_pretrained(tmp_path / "wider")
    tied = tiny_model(tied=True)
    tied.save_pretrained(tmp_path / "tied")
    for base, adapter, message in [
        ("gpt2", "a", "_proj"),
        ("wider", "a", r"B \(32, 8\) and A \(8, 64\).*is \(32, 96\)"),
        ("tied", "head", r"lm_head\.weight"),
    ]:
        with pytest.raises(WeightMismatchError, match=message):
            subtract_folders(tmp_path / base, tmp_path / "o", 0.3, adapter=tmp_path / adapter)
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightMismatchError, match=r"lm_head.*embed_tokens"):
        subtract_folders(tmp_path / "tied", tmp_path / "o", 0.3, adapter=tmp_path / "head")
    torch.save({}, tmp_path / "gpt2" / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter_model"):
        subtract_folders(tmp_path / "tied", tmp_path / "o", 0.3, adapter=tmp_path / "gpt2")


def test_the_base_that_a_run_recorded_is_compared(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path / "b")
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    save_adapter(tiny_model(), tmp_path / "run" / "adapter", 0)
    recorded = {"inputs": {"base_sha256": digests.sha256_of(tmp_path / "b")}, "config": {"method": "lora"}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(recorded))
    assert subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, adapter=tmp_path / "run" / "adapter").moved
    with pytest.raises(ModelError, match="--any-base"):
        subtract_folders(tmp_path / "other", tmp_path / "o2", 0.3, adapter=tmp_path / "run" / "adapter")
    allowed = {"adapter": tmp_path / "run" / "adapter", "any_base": True}
    assert subtract_folders(tmp_path / "other", tmp_path / "o2", 0.3, **allowed).moved


def test_a_vector_that_does_not_fit_is_refused(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path / "b")
    tiny_model(seed=1).save_pretrained(tmp_path / "t")
    tiny_model(intermediate_size=96).save_pretrained(tmp_path / "wider")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    vector = save_vector(tmp_path / "b", tmp_path / "t", tmp_path / "v").output
    for base, message in (("wider", "differ in shape"), ("gpt2", "only in vector")):
        with pytest.raises(WeightMismatchError, match=message):
            subtract_folders(tmp_path / base, tmp_path / "o", 0.3, vector=vector)
    with pytest.raises(ModelError, match=r"vector\.safetensors"):
        subtract_folders(tmp_path / "b", tmp_path / "o", 0.3, vector=tmp_path / "t")
    save_file({"w": torch.ones(1)}, tmp_path / "vector.safetensors")
    with pytest.raises(ModelError, match=r"vector\.safetensors"):
        subtract_folders(tmp_path / "b", tmp_path.parent / "o", 0.3, vector=tmp_path / "vector.safetensors")


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_integers_on_one_side_are_refused(tmp_path, side):
    """Else such a tensor would count as one that did not move."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        dtype = torch.int8 if name == side else torch.float32
        save_file({"w": torch.ones(4, 4, dtype=dtype)}, tmp_path / name / "model.safetensors")
    with pytest.raises(WeightMismatchError, match=rf"w .*{side}"):
        open_change(CheckpointFolder(tmp_path / "base"), {"tuned": tmp_path / "tuned"})
