"""Loading: what is wrong is said in one line. Saving: what plain transformers loads again, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ModelError
from forgetlearn.models import language_model, onednn
from forgetlearn.models.encoding import Encoder
from forgetlearn.models.identity import weights_sha256
from forgetlearn.models.language_model import (
    as_language_model,
    context_length,
    load_model,
    parameter_count,
    wrap,
)
from forgetlearn.models.loading import pick_device
from hub_server import commit, serve


@pytest.fixture(scope="module")
def saved(tiny_model, char_tokenizer, tmp_path_factory) -> Path:
    """A saved tiny model; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("models") / "good"
    tiny_model().save_pretrained(folder)
    char_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(folder, **settings):
    return load_model(ModelSettings(name=str(folder), device="cpu", **settings))


def refused(folder, **settings) -> str:
    """The message with which a model is refused: one line, no traceback in it."""
    with pytest.raises(ModelError) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 400
    return message


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


class TestLoad:
    def test_a_folder(self, saved, tiny_model):
        lm = load(saved)
        assert lm.name == str(saved)
        assert set(lm.dtypes.values()) == {torch.float32}
        assert lm.device == torch.device("cpu")
        assert not lm.model.training
        assert lm.encoder.max_length == 256
        for name, weight in tiny_model().state_dict().items():
            assert torch.equal(lm.model.state_dict()[name], weight), name

    def test_no_name(self):
        with pytest.raises(ConfigError, match=r"model\.name is not set"):
            load_model(ModelSettings())

    def test_named_passed_in_or_ready(self, saved, tiny_model, char_tokenizer):
        assert as_language_model(saved, settings=ModelSettings(device="cpu")).name == str(saved)
        lm = as_language_model(tiny_model(), char_tokenizer)
        assert as_language_model(lm) is lm
        with pytest.raises(ModelError, match="tokenizer="):
            as_language_model(tiny_model())

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_dtype_auto_is_that_of_the_checkpoint(self, tiny_model, char_tokenizer, tmp_path, dtype):
        wrap(tiny_model().to(getattr(torch, dtype)), char_tokenizer).save(tmp_path)
        lm = load(tmp_path)
        assert set(lm.dtypes.values()) == {getattr(torch, dtype)}
        assert {weight.dtype for weight in lm.model.parameters()} == {getattr(torch, dtype)}

    def test_dtype_that_is_asked_for(self, saved):
        assert set(load(saved, dtype="bfloat16").dtypes.values()) == {torch.bfloat16}

    def test_tensors_without_a_place_are_told(self, damaged, caplog):
        load(damaged)
        assert "no place" not in caplog.text
        change_weights(damaged, lambda weights: weights.update({"model.layers.2.bias": torch.ones(3)}))
        load(damaged)
        assert "1 tensors in its files do not belong to the model" in caplog.text
        assert "model.layers.2.bias" in caplog.text


class TestRefused:
    @pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "../nothing", "a/b/c"])
    def test_no_such_folder(self, name):
        assert refused(name).startswith(f"{name}: ")

    @pytest.mark.parametrize("name", ["./bse", "bse"])
    def test_a_folder_that_is_mistyped(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for other, file in (("base", "config.json"), ("bose", "notes.txt")):
            (tmp_path / other).mkdir()
            (tmp_path / other / file).touch()
        assert refused(name).endswith("Did you mean: base?")

    def test_a_place_that_may_not_be_listed(self, monkeypatch):
        def listed(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "iterdir", listed)
        assert "Did you mean" not in refused("./bse")

    @pytest.mark.parametrize("name", ["nothing", "some/nothing"])
    def test_hub_id_that_is_not_cached_while_offline(self, name):
        assert refused(name).startswith(f"{name}: is not a folder here, is not in the hub's cache, and the hub ")

    @pytest.mark.parametrize("name", ["not an id", "some/no id!"])
    def test_neither_a_folder_nor_an_id(self, name):
        assert refused(name).startswith(f"{name}: ")

    def test_a_file(self, saved):
        assert "is a file" in refused(saved / "model.safetensors")

    def test_empty_folder(self, tmp_path):
        assert "has no config.json" in refused(tmp_path)

    def test_no_weights(self, damaged):
        (damaged / "model.safetensors").unlink()
        assert "has no weights" in refused(damaged)

    @pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
    def test_only_pickled_weights(self, damaged, file):
        (damaged / "model.safetensors").rename(damaged / file)
        assert f"only pickled weights ({file})" in refused(damaged)

    def test_config_that_is_not_json(self, damaged):
        (damaged / "config.json").write_text("{")
        assert "config.json: cannot be read as JSON" in refused(damaged)

    def test_config_without_a_model_type(self, damaged):
        (damaged / "config.json").write_text("{}")
        assert "has no config.json that names a model_type" in refused(damaged)

    def test_not_a_causal_language_model(self, tmp_path):
        from transformers import BertConfig, BertForMaskedLM

        tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        BertForMaskedLM(BertConfig(vocab_size=9, **tiny)).save_pretrained(tmp_path)
        assert "BertForMaskedLM" in refused(tmp_path)

    def test_no_architecture_and_not_causal(self, damaged):
        (damaged / "config.json").write_text('{"model_type": "t5"}')
        assert "is not a causal language model" in refused(damaged)

    def test_remote_code(self, damaged):
        change_config(damaged, model_type="own", architectures=["Own"], auto_map={"AutoConfig": "own.Own"})
        (damaged / "own.py").write_text("raise SystemExit('this code must not run')")
        message = refused(damaged)
        assert "model.trust_remote_code=true" in message

    def test_known_config_with_own_architecture(self, damaged):
        change_config(damaged, architectures=["Own"], auto_map={"AutoModelForCausalLM": "own.Own"})
        (damaged / "own.py").write_text("raise SystemExit('this code must not run')")
        assert "model.trust_remote_code" in refused(damaged)

    def test_missing_tensors(self, damaged):
        change_weights(damaged, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        assert "model.layers.1.mlp.up_proj" in refused(damaged)

    def test_tensor_of_another_shape(self, damaged):
        change_weights(damaged, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
        assert "model.norm.weight: (31,), expected (32,)" in refused(damaged)

    def test_weights_that_are_cut_short(self, damaged):
        file = damaged / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        assert "model.safetensors" in refused(damaged)

    def test_a_shard_that_is_missing(self, tiny_model, char_tokenizer, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="30KB")
        char_tokenizer.save_pretrained(tmp_path)
        load(tmp_path)
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        assert shard.name in refused(tmp_path)

    def test_tokenizer_without_eos(self, damaged, new_char_tokenizer):
        new_char_tokenizer(eos_token=None).save_pretrained(damaged)
        assert "no EOS token" in refused(damaged)

    def test_no_tokenizer(self, damaged):
        for file in damaged.glob("*token*"):
            file.unlink()
        assert "has no tokenizer" in refused(damaged)

    def test_tokenizer_that_is_damaged(self, damaged):
        (damaged / "tokenizer.json").write_text("{}")
        assert "its tokenizer cannot be loaded" in refused(damaged)

    def test_tokenizer_of_another_model(self, tiny_model, char_tokenizer):
        with pytest.raises(ModelError, match=r"99.*49"):
            wrap(tiny_model(vocab_size=50), char_tokenizer)

    def test_chat_template_that_is_not_there(self, saved):
        assert "model.prompt_template = chat" in refused(saved, prompt_template="chat")


class TestAdapter:
    @pytest.fixture
    def adapter(self, saved, tiny_model, tmp_path) -> Path:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = get_peft_model(tiny_model(), config)
        adapted.peft_config["default"].base_model_name_or_path = str(saved)
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    def test_loads_on_its_base_with_the_base_s_tokenizer(self, adapter, saved, char_tokenizer):
        lm, base = load(adapter), load(saved)
        ids = torch.tensor([char_tokenizer("abc")["input_ids"]])
        with torch.no_grad():
            assert not torch.allclose(lm.model(ids).logits, base.model(ids).logits)
            with lm.model.disable_adapter():
                assert torch.equal(lm.model(ids).logits, base.model(ids).logits)
        assert lm.tokenizer.get_vocab() == base.tokenizer.get_vocab()
        assert not lm.model.training
        assert lm.name == str(adapter)

    def test_own_tokenizer_counts_first(self, adapter, new_char_tokenizer):
        new_char_tokenizer(chat_template="{{ messages[-1].content }}").save_pretrained(adapter)
        assert load(adapter).encoder.is_chat

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ('{"peft_type": "LORA"}', "base_model_name_or_path"),
            ("[]", "adapter_config.json"),
            ("{", "adapter_config.json"),
            ('{"base_model_name_or_path": "/no/base"}', "adapter_config.json: peft_type"),
            (
                '{"peft_type": "LORA", "base_model_name_or_path": "/no/base"}',
                "/no/base: ",
            ),
        ],
    )
    def test_config(self, adapter, config, message):
        (adapter / "adapter_config.json").write_text(config)
        assert message in refused(adapter)

    def test_pickled_adapter(self, adapter):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        assert "adapter_model" in refused(adapter)

    def test_adapter_of_another_model(self, adapter, saved, tiny_model, char_tokenizer, tmp_path):
        wrap(tiny_model(hidden_size=64), char_tokenizer).save(tmp_path / "wide")
        file = adapter / "adapter_config.json"
        file.write_text(file.read_text().replace(str(saved), str(tmp_path / "wide")))
        assert "does not fit" in refused(adapter)


class TestSave:
    @pytest.mark.parametrize("tied", [False, True])
    def test_comes_back_bit_for_bit(self, tiny_model, char_tokenizer, tmp_path, tied):
        model = tiny_model(tied=tied)
        wrap(model, char_tokenizer).save(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert ("lm_head.weight" in stored) is not tied
        back = load(tmp_path)
        assert (back.model.lm_head.weight is back.model.model.embed_tokens.weight) is tied
        for name, weight in model.state_dict().items():
            assert torch.equal(back.model.state_dict()[name], weight), name
        assert back.model.config.vocab_size == model.config.vocab_size == len(back.tokenizer)
        assert back.tokenizer.get_vocab() == char_tokenizer.get_vocab()
        assert back.tokenizer("A b\n")["input_ids"] == char_tokenizer("A b\n")["input_ids"]

    def test_chat_template_goes_with_it(self, tiny_model, new_char_tokenizer, tmp_path):
        tokenizer = new_char_tokenizer(chat_template="[{{ messages[-1].content }}]")
        wrap(tiny_model(), tokenizer).save(tmp_path)
        assert load(tmp_path).encoder.prompt_text("a") == Encoder(tokenizer).prompt_text("a") == "[a]"

    def test_is_written_in_the_dtype_of_its_weights(self, tiny_model, char_tokenizer, tmp_path):
        wrap(tiny_model().bfloat16(), char_tokenizer).save(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"

    def test_trained_weights_go_back_to_their_own_dtypes_and_buffers_stay(self, tiny_model, char_tokenizer):
        model = tiny_model()
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.data = weight.data.bfloat16()
        lm = wrap(model, char_tokenizer)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        frequencies = model.model.rotary_emb.inv_freq.clone()
        lm.to_float32()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        lm.to_own_dtypes()
        assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}
        assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)

    def test_generation_settings_that_contradict_each_other(self, damaged, tmp_path):
        # As Llama 2 was published: greedy, and a temperature. What was loaded must be saved again.
        file = damaged / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.9}))
        lm = load(damaged)
        lm.save(tmp_path / "again")
        assert load(tmp_path / "again").model.generation_config.temperature == 0.9

    def test_no_pickle_is_written(self, saved):
        assert {file.suffix for file in saved.iterdir()} <= {".json", ".safetensors", ".jinja"}


class TestSmallThings:
    def test_pad_is_eos_where_there_is_none(self, tiny_model, new_char_tokenizer):
        assert wrap(tiny_model(), new_char_tokenizer()).pad_id == 0
        assert wrap(tiny_model(), new_char_tokenizer(pad_token=None)).pad_id == 2

    def test_pad_that_was_added_to_the_tokenizer_only(self, tiny_model, new_char_tokenizer):
        tokenizer = new_char_tokenizer(pad_token="[PAD]")
        assert tokenizer.pad_token_id == 100  # the model's embeddings end at 99
        assert wrap(tiny_model(), tokenizer).pad_id == 2

    def test_parameters_are_counted_once(self, tiny_model):
        untied, tied = parameter_count(tiny_model()), parameter_count(tiny_model(tied=True))
        assert untied - tied == 100 * 32

    @pytest.mark.parametrize(("family", "length"), [("llama", 256), ("gpt2", 256), ("mamba", None)])
    def test_context_length(self, tiny_model, family, length):
        assert context_length(tiny_model(family).config) == length

    def test_device_that_is_not_there(self):
        assert pick_device("cpu") == torch.device("cpu")
        if not torch.backends.mps.is_available():
            with pytest.raises(ConfigError, match=r"model\.device = mps"):
                pick_device("mps")


LOAD_AND_SAY = """
import sys
from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ModelError
from forgetlearn.models.language_model import load_model
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        lm = load_model(ModelSettings(name=name, revision=revision or None, device="cpu"))
        said = f"loaded {type(lm.model).__name__}, context {lm.encoder.max_length}, chat {lm.encoder.is_chat}"
    except ModelError as error:
        said = str(error)
    print(f"{name}@{revision}" if revision else name, "->", said)
"""


@pytest.mark.parametrize(("rounding", "low", "high"), [("nearest", 0, 0.5), ("stochastic", 0.9, 1.1)])
def test_what_storing_trained_weights_in_bfloat16_leaves(tiny_model, char_tokenizer, rounding, low, high):
    lm = wrap(tiny_model().bfloat16(), char_tokenizer, ModelSettings(rounding=rounding))
    lm.to_float32()
    start = {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}
    torch.manual_seed(0)
    for weight in lm.model.parameters():
        weight.data += 1e-3 * weight.abs() * torch.randn_like(weight)
    lm.to_float32()  # what is in float32 already is not looked at again
    wanted = {name: weight.detach() - start[name] for name, weight in lm.model.named_parameters()}
    told = lm.to_own_dtypes(seed=3)
    done = {name: weight.detach().float() - start[name] for name, weight in lm.model.named_parameters()}
    along = sum(float((wanted[name] * done[name]).sum()) for name in start)
    assert told["share_survived"] == pytest.approx(along / sum(float((w * w).sum()) for w in wanted.values()), rel=1e-3)
    assert low < told["share_survived"] < high
    assert told["looked_at"] == sum(weight.numel() for weight in start.values())
    assert lm.to_own_dtypes() is None  # nothing is left to be rounded


def test_stochastic_rounding_needs_bfloat16(lm):
    with pytest.raises(ConfigError, match=r"model\.rounding"):
        wrap(lm.model, lm.tokenizer, ModelSettings(rounding="stochastic"))


@pytest.fixture(scope="module")
def hub_folders(saved, new_char_tokenizer, tmp_path_factory) -> dict[str, Path]:
    pickled = Path(shutil.copytree(saved, tmp_path_factory.mktemp("hub") / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    chat = Path(shutil.copytree(saved, tmp_path_factory.mktemp("hub") / "chat"))
    change_config(chat, max_position_embeddings=64)
    new_char_tokenizer(chat_template="{{ messages[-1].content }}").save_pretrained(chat)
    return {"some/model": saved, "some/model@chat": chat, "single": saved, "some/pickled": pickled}


def from_the_hub(url: str, home: Path, *names: str, **env: str) -> dict[str, str]:
    """What a fresh process says about each name, with its hub at `url`."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    clean = {key: value for key, value in clean.items() if not key.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_AND_SAY, *names]
    done = subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Retrying in" not in done.stderr  # the client's six tries take 23 s
    said = dict(line.split(" -> ") for line in done.stdout.splitlines())
    assert list(said) == list(names), done.stdout  # one line each
    return {name: text.strip() for name, text in said.items()}


class TestHub:
    def test_by_id(self, hub_folders, tmp_path):
        with serve(hub_folders, gated=frozenset({"some/gated"})) as hub:
            said = from_the_hub(
                hub.url,
                tmp_path,
                *("some/model", "single", "some/missing", "missing", "some/gated", "some/pickled"),
                *("some/model@chat", "some/model@v9"),
            )
            asked = hub.requests.copy()
        nothing = "is neither a folder nor a model on the hub that can be read (private: set HF_TOKEN)."
        assert said == {
            "some/model": "loaded LlamaForCausalLM, context 256, chat False",
            "single": "loaded LlamaForCausalLM, context 256, chat False",
            "some/missing": f"some/missing: {nothing}",
            "missing": f"missing: {nothing}",
            "some/gated": "some/gated: is gated. Ask for access on its page, then set HF_TOKEN "
            "(or run `hf auth login`).",
            "some/pickled": "some/pickled: has no safetensors weights. Pickled weights can run code when they "
            "are read; convert them first.",
            "some/model@chat": "loaded LlamaForCausalLM, context 64, chat True",
            "some/model@v9": "some/model: has no such revision on the hub.",
        }
        assert ("GET", f"/some/model/resolve/{commit('some/model@main')}/model.safetensors") in asked
        # No pickle was fetched, and nobody was asked to convert one (with the user's token).
        assert not [path for _, path in asked if path.endswith(".bin") or "/commits" in path]

        # The cache is enough when the hub is gone.
        offline = from_the_hub(hub.url, tmp_path, "some/model", "some/missing")
        assert offline == {
            "some/model": "loaded LlamaForCausalLM, context 256, chat False",
            "some/missing": "some/missing: is not a folder here, is not in the hub's cache, and the hub cannot be "
            "reached. Check the name, the network and HF_HUB_OFFLINE, or download the model first.",
        }


@pytest.fixture
def without_half(monkeypatch):
    """A CPU without instructions for half precision, on which no model is too small to matter."""
    monkeypatch.setattr(language_model.onednn, "has_instructions_for", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(language_model, "SMALL_MODEL", 0)


def test_weights_are_held_in_float32_where_half_precision_is_slow(saved, without_half, tmp_path, caplog):
    load(saved, dtype="bfloat16").save(tmp_path / "half")
    caplog.clear()
    with caplog.at_level("INFO", "forgetlearn"):
        lm = load(tmp_path / "half")
    assert ["bfloat16" in line for line in caplog.messages] == [True]
    assert {weight.dtype for weight in lm.model.parameters()} == {torch.float32}
    assert set(lm.dtypes.values()) == {torch.bfloat16}
    lm.to_own_dtypes()
    assert {weight.dtype for weight in lm.model.parameters()} == {torch.float32}
    start = {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}
    lm.to_float32()
    for weight in lm.model.parameters():
        weight.data += 1e-3 * weight.abs()
    told = lm.to_own_dtypes()
    assert told["looked_at"] == sum(weight.numel() for weight in start.values())
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in lm.model.parameters())
    lm.save(tmp_path / "again")
    assert {weight.dtype for weight in lm.model.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    again = dict(load(tmp_path / "again").model.named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in lm.model.named_parameters())
    assert weights_sha256(load(tmp_path / "half")) == weights_sha256(load(tmp_path / "half", dtype="bfloat16"))


def test_weights_stay_in_half_precision_if_float32_does_not_fit_or_half_is_asked_for(
    saved, without_half, tmp_path, monkeypatch, caplog
):
    half = load(saved, dtype="bfloat16")
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    half.save(tmp_path)
    monkeypatch.setattr(language_model.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    assert {weight.dtype for weight in load(tmp_path).model.parameters()} == {torch.bfloat16}
    assert [line.count("slow") for line in caplog.messages] == [1, 1]


def test_instructions_are_named_as_torch_names_them(monkeypatch):
    for of_cpu, halves in (
        ({"avx2": True}, (False, False)),
        ({"avx512_bf16": True, "amx_bf16": False}, (True, False)),
        ({"architecture": "aarch64", "bf16": True, "fp16_arith": True}, (True, True)),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda of_cpu=of_cpu: of_cpu)
        found = [onednn.has_instructions_for(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        assert found == [True, *halves]
