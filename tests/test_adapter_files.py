"""An adapter folder from a stranger: whole, finite and of sane types, or refused in one line by every command."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, VBLoRAConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from forgetlearn.cli.main import main
from forgetlearn.config.schema import LoraSettings, ModelSettings
from forgetlearn.errors import ConfigError, ModelError, WeightMismatchError
from forgetlearn.models import lora as adapters
from forgetlearn.models.language_model import load_model
from forgetlearn.products.inspect import inspect_change
from forgetlearn.runtime.patterns import MOST_SECONDS, Pattern, problem
from forgetlearn.weights.adapter_files import AdapterConfig, AdapterFiles, open_adapter, read_adapter_config
from forgetlearn.weights.folder_arithmetic import subtract_folders

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HANGS = "(.*)*(.*)*x"


@pytest.fixture(scope="module")
def base(tiny_model, char_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_model().save_pretrained(folder)
    char_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make(base, tiny_model, tmp_path):
    """`make(config=LoraConfig(...))`: the folder of an adapter on the base."""

    def adapter(config=None, **options):
        torch.manual_seed(1)
        config = config or LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
        adapted = get_peft_model(tiny_model(), config)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.05)
        adapted.save_pretrained(str(tmp_path / "a"))
        change_config(tmp_path / "a", base_model_name_or_path=str(base))
        return tmp_path / "a"

    return adapter


def change_config(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def load(folder):
    return load_model(ModelSettings(name=str(folder), device="cpu"))


def subtract(base, folder):
    return subtract_folders(base, folder.parent / "out", 0.5, adapter=folder)


def half(weights):
    return dict(list(weights.items())[: len(weights) // 2])


# Each with the number of tensors that are told to be missing, and the number that fit nothing.
DAMAGES = {
    "no prefix": (lambda weights: {name.removeprefix("base_model.model."): w for name, w in weights.items()}, 12, 12),
    "half of them": (half, 6, 0),
    "every second pair": (lambda weights: {n: w for n, w in weights.items() if "layers.0" in n}, 6, 0),
    "lora_A alone": (lambda weights: {name: w for name, w in weights.items() if "lora_A" in name}, 6, 0),
    "none that fit": (lambda weights: {f"x.{name}": w for name, w in weights.items()}, 12, 12),
    "one left over": (lambda weights: weights | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, 0, 1),
}


# case 2
@pytest.mark.parametrize("damage", DAMAGES)
def test_case_2_an_adapter_that_is_not_whole_is_refused(base, make, damage):
    change, missing, unexpected = DAMAGES[damage]
    folder = make()
    assert load(folder).model.peft_config
    change_weights(folder, change)
    with pytest.raises(ModelError) as caught:
        load(folder)
    said = str(caught.value)
    assert said.startswith(str(folder / WEIGHTS))
    assert (f"{missing} of 12 tensors" in said) == bool(missing)
    assert (f"{unexpected} of its" in said) == bool(unexpected)
    with pytest.raises((ModelError, WeightMismatchError), match=r"lora_|_proj|lm_head"):
        subtract(base, folder)
    assert not (folder.parent / "out").exists()


# case 2
def test_case_2_dora_without_its_magnitudes_is_refused(make):
    folder = make()
    change_config(folder, use_dora=True)
    with pytest.raises(ModelError, match=r"6 of 18 tensors .*lora_magnitude_vector"):
        load(folder)


# case 2: peft keeps the base's own biases without a word
def test_case_2_trained_biases_that_are_not_there_are_refused(tiny_model, char_tokenizer, tmp_path):
    config = tiny_model().config
    config.attention_bias = True
    base, folder = tmp_path / "biased", tmp_path / "a"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(base)
    char_tokenizer.save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="lora_only")
    get_peft_model(model, lora).save_pretrained(str(folder))
    change_config(folder, base_model_name_or_path=str(base))
    assert any(name.endswith(".bias") for name in load_file(folder / WEIGHTS))
    load(folder)
    change_weights(folder, lambda weights: {name: w for name, w in weights.items() if not name.endswith(".bias")})
    with pytest.raises(ModelError, match=r"2 of 6 tensors .*q_proj.*bias"):
        load(folder)


# case 2: by every command that reads one
@pytest.mark.parametrize("command", ["ask", "evaluate", "update", "subtract", "inspect"])
def test_case_2_every_command_refuses_half_an_adapter(base, make, tmp_path, capsys, command):
    folder = make()
    change_weights(folder, half)
    (tmp_path / "f.jsonl").write_text('{"prompt": "abc", "target_new": "d", "ground_truth": "e"}\n')
    facts, output = ["--facts", str(tmp_path / "f.jsonl")], ["--output", str(tmp_path / "out")]
    argv = {
        "ask": ["--model", str(folder), "abc"],
        "evaluate": ["--model", str(folder), *facts, *output],
        "update": ["--model", str(folder), *facts, *output],
        "subtract": ["--base", str(base), "--adapter", str(folder), "--coef", "0.3", *output],
        "inspect": [str(folder), "--base", str(base)],
    }[command]
    assert main([command, *argv]) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


LEGAL = {
    "ranks of their own": {"rank_pattern": {"down_proj": 6, "layers.0.self_attn.q_proj": 2}, "use_rslora": True},
    "modules beside it": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "tokens": {"trainable_token_indices": [1, 2]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a pattern": {
        "target_modules": r"(?:.*?(?:text|layers).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:lm_head)"
    },
    "left out": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "biases": {"bias": "all"},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*LEGAL, "shared vectors", "a prompt"])
def test_what_peft_loads_right_is_loaded(make, tiny_model, kind):
    others = {
        "shared vectors": VBLoRAConfig(target_modules=["q_proj"], vector_length=8, num_vectors=16, topk=2),
        "a prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    folder = make(others.get(kind), **LEGAL.get(kind, {}))
    adapters.load(tiny_model(), folder, adapters.PRODUCT)
    change_weights(folder, lambda weights: {name: w.bfloat16() for name, w in weights.items()})
    adapters.load(tiny_model(), folder, adapters.PRODUCT)


def test_a_layer_that_the_model_does_not_use_needs_no_factors(base, make, tmp_path):
    """DeepSeek-V3's layer 61 of 61 drafts tokens, and transformers leaves it out."""
    weights = load_file(base / "model.safetensors")
    more = {name.replace("layers.1", "layers.2"): w + 1 for name, w in weights.items() if "layers.1" in name}
    more |= {f"mtp.{name}": w + 2 for name, w in weights.items() if "layers.1" in name}
    (tmp_path / "more").mkdir()
    save_file(weights | more, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    (tmp_path / "more" / "config.json").write_text((base / "config.json").read_text())
    assert subtract(tmp_path / "more", make()).moved == 6


# case 6
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_case_6_an_adapter_that_is_not_finite_is_refused(base, make, value):
    folder = make()
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    change_weights(folder, lambda weights: weights | {name: weights[name].index_fill(0, torch.tensor([3]), value)})
    for use in (load, lambda folder: subtract(base, folder), lambda folder: inspect_change(folder, base=base)):
        with pytest.raises(ModelError, match=rf"{WEIGHTS}: {name} holds"):
            use(folder)
    assert not (folder.parent / "out").exists()


# case 6
def test_case_6_factors_of_whole_numbers_are_refused(base, make):
    folder = make()
    change_weights(folder, lambda weights: {name: w.to(torch.int8) for name, w in weights.items()})
    for use in (load, lambda folder: subtract(base, folder)):
        with pytest.raises(ModelError, match=r"lora_A\.weight \(I8\)"):
            use(folder)


# case 24
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("lora_alpha", value) for value in ("4", [4], 10**400, float("nan"), True, {})),
        *(("r", value) for value in ([2], "2", 0, -1, 2.0, 10**9, 10**400)),
        *(("rank_pattern", value) for value in ({"(": 2}, {"q_proj": "2"}, {"q_proj": [2]}, "q_proj", [1])),
        *(("alpha_pattern", value) for value in ("q_proj", {"q_proj": None}, {"*": 2}, [1], 3)),
        ("target_modules", 5),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "("),
        ("modules_to_save", "lm_head"),
        ("layers_pattern", ["("]),
        ("layers_to_transform", "1"),
        ("layer_replication", [[0, 10**9]]),
        ("bias", 1),
        ("use_rslora", "yes"),
        ("megatron_config", {"a": 1}),
        ("base_model_name_or_path", ["x"]),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
    ],
)
def test_case_24_a_field_of_the_wrong_kind_is_named(base, make, field, value):
    folder = make()
    change_config(folder, **{field: value})
    for use in (load, lambda folder: subtract(base, folder)):
        with pytest.raises(ModelError) as caught:
            use(folder)
        said = str(caught.value)
        assert CONFIG in said
        assert "a rank of" in said if (field, value) == ("r", 10**9) else field in said
        assert len(said.splitlines()) == 1
        assert len(said) < 600
    assert not (folder.parent / "out").exists()


# case 24
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", 0.5),
        ("ensure_weight_tying", "no"),
        ("qalora_group_size", "16"),
        ("eva_config", {"rho": "x"}),
        ("auto_mapping", [1]),
        ("peft_version", 1),
    ],
)
def test_case_24_a_field_of_another_type_than_in_peft_is_named(make, field, value):
    folder = make()
    change_config(folder, **{field: value})
    with pytest.raises(ModelError, match=rf"{CONFIG}: {field} = .*expected "):
        load(folder)


def test_what_peft_writes_is_of_its_own_types():
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        try:
            config = kind(task_type="CAUSAL_LM")
        except (ValueError, ImportError):  # some need more
            continue
        told = json.loads(json.dumps(config.to_dict(), default=list))
        AdapterFiles(Path(), AdapterConfig.model_validate(told), None).check_types(kind)


# case 24
def test_case_24_a_pattern_of_null_is_as_none(base, make):
    folder = make()
    change_config(folder, alpha_pattern=None, rank_pattern=None)
    assert subtract(base, folder).moved == 6
    assert load(folder).model.peft_config


# case 24
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "exclude_modules"])
def test_case_24_a_pattern_that_hangs_is_refused(base, make, field, monkeypatch):
    monkeypatch.setattr("forgetlearn.runtime.patterns.MOST_SECONDS", 1.0)
    folder = make()
    change_config(folder, **{field: {HANGS: 2} if field == "rank_pattern" else HANGS})
    for use in (load, lambda folder: subtract(base, folder)):
        start = time.monotonic()
        with pytest.raises(ModelError, match=rf"{CONFIG}: {field} = .*takes more than"):
            use(folder)
        assert time.monotonic() - start < 10
    with pytest.raises(ConfigError, match=r"lora\.target_modules = .*takes more than"):
        adapters.check_targets(load(base).model, LoraSettings(target_modules=HANGS))


def test_a_pattern_is_tried_as_it_is_used():
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(40)]
    assert MOST_SECONDS <= 5
    assert problem([Pattern("x", "q_proj", "q_proj")], names) is None
    assert problem([Pattern("x", r".*\.q_proj", r".*\.q_proj")], names) is None
    said = problem([Pattern("good", ".*", ".*"), Pattern("bad", "[", "["), Pattern("ugly", HANGS, HANGS)], names)
    assert said is not None
    assert said.startswith("bad = '[' is not a valid regular expression")
    assert "is not a valid regular expression" in problem([Pattern("deep", "(" * 50_000, "(" * 50_000)], names)


# case 23
def test_case_23_brackets_without_end(base, make):
    folder = make()
    for text in ("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '{"r": [' + "[" * 300 + "]" * 300 + "]}"):
        (folder / CONFIG).write_text(text)
        for use in (load, lambda folder: subtract(base, folder)):
            with pytest.raises(ModelError, match=rf"{CONFIG}: nests"):
                use(folder)


def test_a_config_of_another_kind_of_adapter(make):
    folder = make(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert read_adapter_config(folder).model_extra["num_virtual_tokens"] == 4
    change_config(folder, num_virtual_tokens=10**12)
    with pytest.raises(ModelError, match="num_virtual_tokens = 1000000000000"):
        open_adapter(folder)


def test_the_reader_needs_no_torch():
    heavy = {"torch", "transformers", "peft"}
    code = f"import sys, forgetlearn.weights.adapter_files; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False).returncode == 0
