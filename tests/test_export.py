"""Exports: GGUF read back is the same model, a GGUF adapter the same change, a Modelfile the same chat format."""

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.pytorch_utils import Conv1D

from conftest import QUICK, make_tiny_model
from forgetlearn.cli.main import main
from forgetlearn.config.schema import ModelSettings
from forgetlearn.errors import ConfigError, ModelError, RunError
from forgetlearn.facts import read_facts
from forgetlearn.models.gguf_architectures import ARCHITECTURES, rope_factors
from forgetlearn.models.gguf_tokenizer import SPLITTINGS, TEKKEN, tokenizer_fields
from forgetlearn.models.gguf_writer import DTYPES, ModelFile, write_adapter
from forgetlearn.models.language_model import load_model
from forgetlearn.products.export import export, modelfile
from forgetlearn.products.restore import apply_run
from forgetlearn.runs.evaluate import ask
from forgetlearn.runs.stream import stream
from forgetlearn.runs.update import update
from forgetlearn.weights.folder_arithmetic import merge_adapter
from forgetlearn.weights.streaming import Numbers

UNK, SPECIAL = "<unk>", ["<|end|>", "<|start|>"]
LETTERS = ["Ġ", "Ċ", *map(chr, range(33, 127))]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Merges across the places where one or another way to split text cuts it.
MERGES = [("a", "b"), ("1", "2"), ("12", "3"), ("123", "4"), ("Ġ", "a"), ("!", "!"), ("!!", "Ċ")]
TOKENS = [*SPECIAL, *LETTERS, *map("".join, MERGES)]
# What the architectures need beside the sizes of `make_tiny_model`: what transformers takes for granted in GGUF.
OWN = {
    "qwen3": {"head_dim": 128},
    "gemma2": {"tied": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "gpt2": {"tied": True, "n_positions": 1024},
}

LLAMA_3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}


def byte_level(pre=None, *, chat=CHAT, **options):
    """A byte-level BPE tokenizer of printable characters and a few merges."""
    bpe = models.BPE({token: i for i, token in enumerate(TOKENS)}, MERGES, **options)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[1], pad_token=SPECIAL[0]
    )
    made.chat_template = chat
    return made


def split_by(regex):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), level])


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


def tiny(family="llama", **settings):
    return make_tiny_model(family, vocab_size=len(TOKENS), **(OWN.get(family, {}) | settings))


def load(path):
    return load_model(ModelSettings(name=str(path), device="cpu"))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_architecture_is_read_back_with_equal_weights(family, tmp_path):
    model = tiny(family)
    ModelFile(save(tmp_path / "model", model), "f32").write(tmp_path / "model.gguf")
    again = load(tmp_path / "model.gguf").model
    wanted = {n: w for n, w in model.state_dict().items() if n in again.state_dict()}
    assert {n: torch.allclose(w, again.state_dict()[n], atol=1e-6) for n, w in wanted.items()} == dict.fromkeys(
        model.state_dict(), True
    )
    ids = torch.tensor([[5, 6, 7, 40, 41, 42, 43]])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-4)


def metadata(file):
    return gguf.GGUFReader(file).fields


def test_metadata_have_the_keys_that_the_package_gguf_knows(tmp_path):
    ModelFile(save(tmp_path / "model", tiny("gemma2")), "f16").write(tmp_path / "model.gguf")
    known = {
        value.replace("{arch}", "gemma2")
        for kind in vars(gguf.Keys).values()
        if isinstance(kind, type)
        for value in vars(kind).values()
        if isinstance(value, str)
    }
    found = metadata(tmp_path / "model.gguf")
    assert [key for key in found if not key.startswith("GGUF.") and key not in known] == []
    assert found["gemma2.attn_logit_softcapping"].contents() == 50.0
    assert found["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16


def test_a_sliding_window_bounds_the_context(tmp_path):
    folder = save(tmp_path / "model", tiny("mistral", sliding_window=64))
    assert ModelFile(folder).fields["llama.context_length"] == 64


def test_the_frequencies_of_llama_3_are_divided_as_transformers_divides_them(tmp_path):
    model = tiny(rope_parameters=LLAMA_3)
    file = ModelFile(save(tmp_path / "model", model), "f32")
    file.write(tmp_path / "model.gguf")
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    wanted = LlamaRotaryEmbedding(model.config).inv_freq.numpy()
    assert np.allclose(plain / stored["rope_freqs.weight"], wanted, rtol=1e-5)
    assert not np.allclose(plain, wanted)
    assert rope_factors(tiny().config) is None


# Tokenizers ---------------------------------------------------------------------------------------


def sentence_pieces(merged=("ab", "abc", "▁ab", "th", "the", "▁the"), *, drop=0):
    """A tokenizer of SentencePiece's kind, as Llama 2 has it: bytes, letters, and all ways to merge the pieces."""
    vocab = [UNK, "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(97, 123)), *merged]
    ids = {token: index for index, token in enumerate(vocab)}
    pairs = [(p[:i], p[i:]) for p in merged for i in range(1, len(p)) if p[:i] in ids and p[i:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, pairs[drop:], unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNK, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_a_tokenizer_is_read_back(make, tmp_path):
    tokenizer = make()
    rows = len(tokenizer) + 3  # as models have whose embedding is larger than the vocabulary
    ModelFile(save(tmp_path / "model", make_tiny_model(vocab_size=rows), tokenizer)).write(tmp_path / "model.gguf")
    lm = load(tmp_path / "model.gguf")
    again = lm.tokenizer
    for text in ("abc ab", "the cab\nthe end", "a 2026 é"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert again.chat_template == tokenizer.chat_template
    assert lm.model.config.vocab_size == rows
    types = metadata(tmp_path / "model.gguf")["tokenizer.ggml.token_type"].contents()
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3


def splitting(name):
    """The tokenizer that splits text in the way that llama.cpp calls `name`."""
    steps = SPLITTINGS[name].steps
    pre = split_by(steps[0]) if name not in ("gpt-2", "smollm") else None
    if name == "smollm":
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pre = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    return byte_level(pre, ignore_merges=SPLITTINGS[name].ignore_merges)


@pytest.mark.parametrize("name", SPLITTINGS)
def test_how_text_is_split_has_llama_cpps_name(name):
    assert tokenizer_fields(splitting(name), 200, "m")["tokenizer.ggml.pre"] == name
    if name in GGUF_PRE_TOKENIZER_SPLITS:  # then transformers splits by the same expression when it reads the file
        assert GGUF_PRE_TOKENIZER_SPLITS[name] == SPLITTINGS[name].steps[0]


def with_normalizer():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_odd_frame():
    tokenizer = byte_level()
    frame = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: byte_level(split_by("a+")), r"a\+"),
        (lambda: byte_level(split_by(TEKKEN)), "tekken"),  # but it does not take whole words first
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (with_normalizer, "Lowercase"),
        (with_odd_frame, "around a text"),
        (lambda: sentence_pieces(drop=1), "score"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(make, words):
    with pytest.raises(ModelError, match=words) as caught:
        tokenizer_fields(make(), 400, "some-model")
    assert "some-model" in str(caught.value)


def test_other_kinds_of_tokenizers_are_refused(char_tokenizer):
    with pytest.raises(ModelError, match="WordLevel"):
        tokenizer_fields(char_tokenizer, 100, "m")
    with pytest.raises(ModelError, match=f"id {len(TOKENS) - 1}"):
        tokenizer_fields(byte_level(), 50, "m")


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("opt", {}, "model_type = 'opt'.*llama"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
    ],
)
def test_what_gguf_cannot_say_is_refused(family, settings, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        ModelFile(save(tmp_path / "model", tiny(family, **settings)))


def test_rows_that_do_not_fill_blocks_are_named(tmp_path):
    folder = save(tmp_path / "model", tiny(intermediate_size=48))
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight.*q8_0"):
        ModelFile(folder, "q8_0")


def test_a_number_too_large_is_refused(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight.*f16"):
        ModelFile(save(tmp_path / "model", model), "f16").write(tmp_path / "model.gguf")


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(small_lab, tmp_path_factory):
    """The folder of a run that taught an adapter of the lab base new answers; do not write into it."""
    run = tmp_path_factory.mktemp("export") / "run"
    learn = {"learn": {"epochs": 12, "learning_rate": 5e-3}}
    update(small_lab, small_lab / "facts.jsonl", QUICK | learn | {"method": "lora"}, output=run)
    return run


@pytest.fixture(scope="module")
def prompts(small_lab):
    return [fact.prompt for fact in read_facts(small_lab / "facts.jsonl").facts]


@pytest.fixture(scope="module")
def answers(adapted, small_lab, prompts):
    """What the updated model answers; most of it is not what the base says."""
    found = ask(prompts, adapted / "adapter")
    base = ask(prompts, small_lab)
    assert sum(found[prompt] != base[prompt] for prompt in prompts) > len(prompts) / 2
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exported_model_answers_as_the_product(adapted, prompts, answers, dtype, tmp_path):
    said = export(adapted, tmp_path / "out", to="gguf", dtype=dtype)
    assert dtype in said
    # Computed in float32, as llama.cpp does: some of this model's activations are too large for float16.
    again = ask(prompts, config={"model": {"name": str(tmp_path / "out" / "model.gguf"), "dtype": "float32"}})
    same = sum(again[prompt] == answers[prompt] for prompt in prompts)
    assert same >= (0.95 if dtype == "q8_0" else 1) * len(prompts)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["forgetlearn.json", "model.gguf"]
    assert main(["log", str(tmp_path / "out"), "--verify"]) == 0


def tensors(file):
    return {tensor.name: tensor.data.astype(np.float32) for tensor in gguf.GGUFReader(file).tensors}


def test_an_adapter_in_gguf_adds_up_to_the_exported_model(adapted, small_lab, tmp_path):
    export(adapted, tmp_path / "adapter", to="adapter")
    export(adapted, tmp_path / "whole", to="gguf", dtype="f32")
    ModelFile(small_lab, "f32").write(tmp_path / "base.gguf")
    base, whole = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "whole" / "model.gguf")
    factors, fields = tensors(tmp_path / "adapter" / "adapter.gguf"), metadata(tmp_path / "adapter" / "adapter.gguf")
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    changed = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert {name for name in whole if not np.array_equal(whole[name], base[name])} == changed
    assert "blk.1.attn_q.weight" in changed
    for name in changed:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        scale = fields["adapter.lora.alpha"].contents() / len(a)  # as llama.cpp computes it
        assert np.allclose(base[name] + scale * b @ a, whole[name], atol=1e-5), name
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(small_lab.resolve())
    assert main(["log", str(tmp_path / "adapter"), "--verify"]) == 0


def test_what_llama_cpp_does_not_scale_by_is_in_the_factor(adapted, small_lab, tmp_path):
    adapter = shutil.copytree(adapted / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_adapter(small_lab, adapter, tmp_path / "plain.gguf")
    changed = config | {"use_rslora": True, "alpha_pattern": {"q_proj": 3 * config["lora_alpha"]}}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    write_adapter(small_lab, adapter, tmp_path / "scaled.gguf")
    plain, scaled = tensors(tmp_path / "plain.gguf"), tensors(tmp_path / "scaled.gguf")
    for name, times in {"blk.0.attn_q.weight": 3, "blk.0.attn_k.weight": 1}.items():
        wanted = times * config["r"] ** 0.5 * plain[f"{name}.lora_b"]
        assert np.allclose(scaled[f"{name}.lora_b"], wanted, rtol=1e-5)
        assert np.array_equal(scaled[f"{name}.lora_a"], plain[f"{name}.lora_a"])


def test_an_export_for_ollama_is_the_same_file_with_a_modelfile(adapted, tmp_path, capsys):
    assert main(["export", str(adapted), "--to", "ollama", "--output", str(tmp_path / "out"), "--dtype", "f16"]) == 0
    assert f"ollama create NAME -f {tmp_path / 'out' / 'Modelfile'}" in capsys.readouterr().out
    export(adapted, tmp_path / "gguf", to="gguf", dtype="f16")
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "gguf/model.gguf").read_bytes()
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert "PARAMETER temperature 0" in lines
    chain = json.loads((tmp_path / "out/forgetlearn.json").read_text())
    assert set(chain["updates"][-1]["files"]) == {"model.gguf", "Modelfile"}


def in_go(template, system, prompt):
    """What Go makes of a template of ours for a question."""
    found = re.fullmatch(
        r"(?:\{\{ if \.System \}\}(.*)\{\{ else \}\})?(.*?)(?:\{\{ end \}\})?(\{\{ \.Prompt .*)", template, re.DOTALL
    )
    begin = found[1] if system and found[1] is not None else found[2]
    return (
        (begin + found[3].partition("{{ .Response }}")[0])
        .replace("{{ .System }}", system)
        .replace("{{ .Prompt }}", prompt)
    )


@pytest.mark.parametrize("chat", [CHAT, "{{ bos_token }}" + CHAT, CHAT.replace("{% for", "{{ 'Be brief. ' }}{% for")])
def test_ollamas_template_says_what_the_chat_template_says(chat, tmp_path):
    tokenizer = byte_level(chat=chat)
    if "bos_token" in chat:  # then Ollama adds the begin token too
        frame = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
        tokenizer.backend_tokenizer.post_processor = frame
    folder = save(tmp_path / "model", tiny(), tokenizer)
    text = modelfile(folder)
    template = re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)[1]
    for system in ("", "You are a pirate."):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Why?"}]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert in_go(template, system, "Why?") == wanted.removeprefix("<|start|>" if "bos_token" in chat else "")
    assert template.endswith("{{ .Response }}<|end|>\n")
    assert 'PARAMETER stop "<|end|>"' in text


def test_a_chat_template_without_a_user_is_refused(tmp_path):
    folder = save(tmp_path / "model", tiny(), byte_level(chat="{{ raise_exception('no') }}"))
    with pytest.raises(ModelError, match="chat template"):
        modelfile(folder)


def test_a_merged_export_is_what_apply_writes(adapted, small_lab, tmp_path):
    export(adapted, tmp_path / "out", to="merged")
    apply_run(adapted, small_lab, tmp_path / "applied", merge=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "applied/model.safetensors").read_bytes()


def test_a_whole_model_needs_no_base_and_is_no_adapter(small_lab, prompts, tmp_path):
    run = tmp_path / "run"
    base = shutil.copytree(small_lab, tmp_path / "base")
    update(base, base / "facts.jsonl", QUICK | {"method": "ft"}, output=run)
    shutil.rmtree(base)
    export(run, tmp_path / "gguf", to="gguf")
    product = ask(prompts[:4], run / "model")
    assert ask(prompts[:4], tmp_path / "gguf") == product
    export(run, tmp_path / "merged", to="merged")
    assert ask(prompts[:4], tmp_path / "merged") == product
    with pytest.raises(ConfigError, match=r"--to adapter.*whole model"):
        export(run, tmp_path / "adapter", to="adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"to": "onnx"}, ConfigError, "--to onnx"),
        ({"to": "gguf", "dtype": "q4_0"}, ConfigError, "--dtype q4_0"),
        ({"to": "merged", "dtype": "f16"}, ConfigError, "--dtype f16"),
        ({"to": "adapter", "dtype": "q8_0"}, ConfigError, "--dtype q8_0"),
        ({"to": "gguf", "base": "other"}, ModelError, "is not the base"),
        ({"to": "adapter", "base": "other"}, ModelError, "is not the base"),
        ({"to": "gguf", "output": "taken"}, RunError, "--overwrite"),
    ],
)
def test_a_wrong_request_writes_nothing(adapted, options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "other", tiny())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words):
        export(adapted, **{"output": tmp_path / "out"} | options)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_what_forgetlearn_wrote_is_replaced(adapted, tmp_path):
    out = tmp_path / "out"
    export(adapted, out, to="gguf", dtype="f16")
    first = (out / "model.gguf").read_bytes()
    with pytest.raises(RunError, match="exists"):
        export(adapted, out, to="gguf", dtype="f32")
    export(adapted, out, to="gguf", dtype="f32", overwrite=True)
    assert (out / "model.gguf").read_bytes() != first
    (out / "forgetlearn.json").unlink()
    with pytest.raises(RunError, match="not written by forgetlearn"):
        export(adapted, out, to="gguf", overwrite=True)


def test_a_changed_product_or_a_lost_base_is_named(adapted, small_lab, tmp_path):
    base, run = shutil.copytree(small_lab, tmp_path / "base"), tmp_path / "run"
    update(base, base / "facts.jsonl", QUICK | {"method": "lora"}, output=run)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(RunError, match="--base"):
        export(run, tmp_path / "out", to="gguf")
    export(run, tmp_path / "out", to="gguf", base=tmp_path / "moved", dtype="bf16")
    with (run / "adapter/adapter_model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors"):
        export(run, tmp_path / "again", to="gguf", base=tmp_path / "moved")
    assert not (tmp_path / "again").exists()


def test_an_adapter_of_a_gguf_file_becomes_gguf_again(small_lab, prompts, tmp_path):
    base, run = tmp_path / "base.gguf", tmp_path / "run"
    ModelFile(small_lab, "f32").write(base)
    update(base, small_lab / "facts.jsonl", QUICK | {"method": "lora"}, output=run)
    export(run, tmp_path / "whole", to="gguf")
    assert ask(prompts[:6], tmp_path / "whole") == ask(prompts[:6], run / "adapter")
    export(run, tmp_path / "adapter", to="adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    export(run, tmp_path / "merged", to="merged")
    assert ask(prompts[:6], tmp_path / "merged") == ask(prompts[:6], run / "adapter")


def test_the_product_of_a_stream_is_that_of_its_last_update(small_lab, tmp_path):
    run = tmp_path / "run"
    stream(small_lab, small_lab / "facts.jsonl", QUICK | {"method": "lora"}, output=run, batches=2)
    export(run, tmp_path / "whole", to="gguf", dtype="f16")
    export(run / "batch-002", tmp_path / "last", to="gguf", dtype="f16")
    assert (tmp_path / "whole/model.gguf").read_bytes() == (tmp_path / "last/model.gguf").read_bytes()


def test_a_change_that_rounding_loses_is_reported(small_lab, tmp_path):
    base = tmp_path / "base"
    lm = load(small_lab)
    lm.model.bfloat16()
    lm.model.config.dtype = torch.bfloat16
    lm.save(base)
    tiny_step = {"learn": {"epochs": 1, "learning_rate": 1e-6}}
    update(base, small_lab / "facts.jsonl", QUICK | tiny_step | {"method": "lora"}, output=tmp_path / "run")
    said = export(tmp_path / "run", tmp_path / "bf16", to="gguf")
    assert "in bf16" in said
    assert "--to adapter" in said
    assert "--to adapter" not in export(tmp_path / "run", tmp_path / "f32", to="gguf", dtype="f32")


def make_adapter(model, folder):
    """Save a LoRA adapter with random factors for every matrix in the layers of a model."""
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=sorted(names - {"lm_head"})))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_adapter_of_every_architecture_adds_up(family, tmp_path):
    model = tiny(family)
    base, adapter = save(tmp_path / "base", model), make_adapter(model, tmp_path / "adapter")
    merge_adapter(adapter, base, tmp_path / "merged", numbers=Numbers())
    write_adapter(base, adapter, tmp_path / "adapter.gguf")
    for name in ("base", "merged"):
        ModelFile(tmp_path / name, "f32").write(tmp_path / f"{name}.gguf")
    base, whole, factors = (tensors(tmp_path / f"{name}.gguf") for name in ("base", "merged", "adapter"))
    changed = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert {name for name in whole if not np.array_equal(whole[name], base[name])} == changed
    for name in changed:
        added = 8 / 4 * factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        assert np.allclose(base[name] + added, whole[name], atol=1e-5), name


# llama.cpp itself ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp():
    """`llama_cpp(file, prompts, adapter=None)`: what llama.cpp says to each prompt, and its number of tokens."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp, llama.cpp in a wheel, is not installed: pip install xllamacpp")

    def say(file, prompts, adapter=None):
        asked = json.dumps([str(file), list(prompts), str(adapter or "")])
        done = subprocess.run([sys.executable, "-c", ASK], input=asked, capture_output=True, text=True, check=True)
        return dict(zip(prompts, json.loads(done.stdout.splitlines()[-1]), strict=True))

    return say


ASK = """
import json, sys, xllamacpp
file, prompts, adapter = json.load(sys.stdin)
asked = xllamacpp.CommonParams()
asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = file, 256, 1, False
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # its float16 would decide near ties
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    asked.lora_adapters = [lora]
server = xllamacpp.Server(asked)
greedy = {"max_tokens": 12, "temperature": 0}
found = [server.handle_completions(greedy | {"prompt": prompt}) for prompt in prompts]
print(json.dumps([(said["choices"][0]["text"], said["usage"]["prompt_tokens"]) for said in found]))
"""


def clear_answer(model, tokenizer, prompt):
    """What transformers says to a prompt in up to twelve tokens, as far as no other token is nearly as likely."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    asked = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, **asked)
    ties = [float(-logits[0].topk(2).values.diff()) < 0.02 for logits in found.logits]
    clear = found.sequences[0, ids.shape[1] :][: ties.index(True) if True in ties else None]
    return tokenizer.decode(clear).removesuffix(tokenizer.eos_token)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"), [*((family, {}) for family in ARCHITECTURES), ("llama", {"rope_parameters": LLAMA_3})]
)
def test_llama_cpp_computes_every_architecture_and_its_adapter_alike(family, settings, llama_cpp, tmp_path):
    model, tokenizer, prompts = tiny(family, **settings), byte_level(), ["abc ab", "the cab's", "Why, 2026?", "x\ny"]
    model.generation_config.eos_token_id = 0
    folder, adapter = save(tmp_path / "model", model), make_adapter(model, tmp_path / "adapter")
    ModelFile(folder, "f32").write(tmp_path / "model.gguf")
    write_adapter(folder, adapter, tmp_path / "adapter.gguf")
    for lora in (None, tmp_path / "adapter.gguf"):
        computed = PeftModel.from_pretrained(model, adapter) if lora else model
        wanted = {prompt: clear_answer(computed, tokenizer, prompt) for prompt in prompts}
        found = llama_cpp(tmp_path / "model.gguf", prompts, lora)
        assert {prompt: found[prompt][0][: len(wanted[prompt])] for prompt in prompts} == wanted
        assert sum(map(len, wanted.values())) > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPLITTINGS, "SentencePiece"])
def test_llama_cpp_makes_the_same_tokens(name, llama_cpp, tmp_path):
    tokenizer = sentence_pieces() if name == "SentencePiece" else splitting(name)
    model = make_tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    if name == "SentencePiece":
        with torch.no_grad():
            model.lm_head.weight[:259] = 0  # bytes are no text
    ModelFile(save(tmp_path / "model", model, tokenizer), "f32").write(tmp_path / "model.gguf")
    prompts = ["abc the", "ab  the abc", "xthe ab"] if name == "SentencePiece" else ["1234 a!!\n", "x 12a ab!!\n\n b12"]
    wanted = {prompt: clear_answer(model, tokenizer, prompt) for prompt in prompts}
    found = llama_cpp(tmp_path / "model.gguf", prompts)
    assert {prompt: found[prompt][0][: len(wanted[prompt])] for prompt in prompts} == wanted
    assert {prompt: found[prompt][1] for prompt in prompts} == {p: len(tokenizer(p)["input_ids"]) for p in prompts}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0"])  # activations of this model are too large for float16
def test_llama_cpp_gives_the_answers_of_the_product(adapted, prompts, answers, dtype, llama_cpp, tmp_path):
    export(adapted, tmp_path / "out", to="gguf", dtype=dtype)
    found = llama_cpp(tmp_path / "out" / "model.gguf", prompts)
    same = sum(found[prompt][0].strip() == answers[prompt] for prompt in prompts)
    assert same >= (0.95 if dtype == "q8_0" else 1) * len(prompts)
