"""What the tests share: small seeded models built in code, a one-token-per-character tokenizer, a lab.

No test touches the network or the user's own caches; one thread, so that sums are the same everywhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

# Before huggingface_hub is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
SMOLLM2 = Path(os.environ.get("FORGETLEARN_SMOLLM2", ROOT / "models" / "SmolLM2-135M-Instruct"))
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
# The facts' own prompts and bare answers, and nothing kept: nothing is asked of the base.
BARE = {"train": {"answers": "bare", "wordings": False}, "keep": {"weight": 0.0}}
# Settings of an update that is made for its files, not for its scores.
QUICK = {
    **BARE,
    "forget": {"epochs": 1, "only_known": False},
    "learn": {"epochs": 1},
    "evaluate": {"protocols": ["token"], "every_phase": False, "general_prompts": False},
}
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"


def pytest_configure(config):
    """Hide accelerators, unless tests with the mark `gpu` are asked for; Ctrl-C as in the foreground."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it from birth
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_own_cache(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    before = os.environ.get("FORGETLEARN_CACHE")
    # Of several workers (pytest -n) the first builds a lab base, and the others wait for it.
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    os.environ["FORGETLEARN_CACHE"] = str(shared / "cache" if shared else tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FORGETLEARN_CACHE")
    if before is not None:
        os.environ["FORGETLEARN_CACHE"] = before


@pytest.fixture(scope="module", autouse=True)
def _without_plots_and_fsync(request):
    """Leave out what takes a third of a small update and is not looked at: drawing, and waiting for the disk.

    A module with `DRAWS = True` gets real plots. The data that plots are made of are read all the same.
    """
    if getattr(request.module, "DRAWS", False) or request.path.parent.name == "faults":
        yield
        return

    def savefig(_figure, file, **_options):
        file.write('<svg viewBox="0 0 1 1"><g></g></svg>')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        patch.setattr("matplotlib.figure.Figure.subplots", lambda *_, **__: MagicMock())
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_general_prompts(request):
    """Ask three general prompts in each update, not all of them. A module with `ALL_PROMPTS = True` asks all."""
    from forgetlearn.evaluation import general_prompts

    if getattr(request.module, "ALL_PROMPTS", False):
        yield
        return
    few = general_prompts.measuring()[-3:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general_prompts, "measuring", lambda facts=(): few)
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_probes(request):
    """Make only probes that are read, not answered, in each update. A module with `ALL_PROBES = True` makes all."""
    from forgetlearn.evaluation import probes

    if getattr(request.module, "ALL_PROBES", False):
        yield
        return
    few = {name: probes.MADE[name] for name in (probes.CHOICE, "yes-no")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "MADE", few)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("zsre.json")`: a file of ../shared/data; skips the test where it is not there."""

    def path(name: str) -> Path:
        file = SHARED_DATA / name
        if not file.is_file():
            pytest.skip(f"no {file}: the shared data of the project are not on this machine")
        return file

    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a real chat model; for tests with the mark `real`. Do not write into it."""
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip(f"no {SMOLLM2}: make models fetches it, or FORGETLEARN_SMOLLM2 names its folder")
    return SMOLLM2


def make_char_tokenizer(*, bos: bool = True, eos: bool = False, **options: Any) -> Any:
    """One token per character: <pad> 0, <s> 1, </s> 2, <unk> 3, then id = 4 + ord(character) - 32.

    So " " is 4, "A" 37, "a" 69, newline 99. `eos=True` appends EOS to every text, as add_eos_token does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([PAD, BOS, EOS, UNK, *PRINTABLE])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    frame = f"{BOS} " * bos + "$A" + f" {EOS}" * eos
    specials = [(BOS, 1), (EOS, 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=specials)
    options = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@pytest.fixture(scope="session")
def char_tokenizer() -> Any:
    """See `make_char_tokenizer`. Do not change it: it is shared; `new_char_tokenizer(...)` makes another."""
    return make_char_tokenizer()


@pytest.fixture(scope="session")
def new_char_tokenizer() -> Callable[..., Any]:
    """`new_char_tokenizer(bos=True, eos=False, chat_template=..., eos_token=None, ...)`."""
    return make_char_tokenizer


def make_tiny_model(family: str = "llama", *, tied: bool = False, seed: int = 0, **overrides: Any) -> Any:
    """A two-layer causal language model, hidden 32, for the 100 ids of the character tokenizer.

    `family` is a transformers model type: llama, gpt2, qwen2, mistral, gemma2, opt, mamba, ...
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = 4
    common = {
        "vocab_size": 4 + len(PRINTABLE),
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    by_family = {
        "gpt2": {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": heads,
            "n_positions": 256,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        "opt": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "max_position_embeddings": 256,
            "dropout": 0.0,
        },
        "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
    }
    transformer = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    config = AutoConfig.for_model(family, **(common | by_family.get(family, transformer) | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Weights of a fresh model are so small that every logit is about 0: make a wrong mask show.
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """`tiny_model("llama", tied=False, seed=0, **config)`: a new two-layer model at every call."""
    return make_tiny_model


@pytest.fixture
def lm(char_tokenizer, tiny_model) -> Any:
    """A fresh untied tiny Llama with the character tokenizer, as a LanguageModel."""
    from forgetlearn.models.language_model import wrap

    return wrap(tiny_model(), char_tokenizer)


@pytest.fixture(scope="session")
def small_lab() -> Path:
    """The folder of a lab base that holds 24 made-up facts exactly: built once. Do not write into it."""
    import forgetlearn

    settings = forgetlearn.LabSettings(
        n_facts=24,
        epochs=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=800,
        learning_rate=5e-3,
        batch_size=32,
    )
    return forgetlearn.build_lab(settings=settings)
