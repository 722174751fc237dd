"""Exports: GGUF that is read back is the same model, a GGUF adapter the same change, a Modelfile the same chat format."""

import importlib.util
import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

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
from forgetlearn.runs.update import update

SPECIAL = ["<|end|>", "<|start|>"]
LETTERS = ["Ġ", "Ċ", *map(chr, range(33, 127))]
CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = "abc ab 2026\nthe cab's <|end|>"
# What the architectures need beside the sizes of `make_tiny_model`: what transformers takes for granted in GGUF.
OWN = {
    "qwen3": {"head_dim": 128},
    "gemma2": {"tied": True, "query_pre_attn_scalar": 8, "sliding_window": 4096},
    "gpt2": {"tied": True, "n_positions": 1024},
}


def byte_level(pre=None, *, chat=CHAT, **options):
    """A byte-level BPE tokenizer of printable characters and one merge."""
    bpe = models.BPE({token: i for i, token in enumerate([*SPECIAL, *LETTERS, "ab"])}, [("a", "b")], **options)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], bos_token=SPECIAL[1])
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
    return make_tiny_model(family, vocab_size=104, **(OWN.get(family, {}) | settings))


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
