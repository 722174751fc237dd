"""Build a lab base in about a minute: a small Llama that holds given facts, and its tokenizer.

With a lab base the whole method can be run and studied without a download. The base is trained on the old answers (to
prompts and rephrasings) and on the answers to the locality probes. Bases are cached by a hash of their inputs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from forgetlearn.config.base import Settings
from forgetlearn.config.recipes import BARE
from forgetlearn.config.schema import ModelSettings, StageSettings
from forgetlearn.errors import ConfigError, FactError
from forgetlearn.facts import Fact, FactSet, from_records, write_facts
from forgetlearn.lab.world import made_up_world
from forgetlearn.models import prompts
from forgetlearn.storage import disk, provenance, run_folder
from forgetlearn.storage.locks import claimed

if TYPE_CHECKING:
    from forgetlearn.models.language_model import LanguageModel

log = logging.getLogger("forgetlearn")
FORMAT = 7  # part of the cache key: raise it when the same settings build another base
EOS, PAD = "</s>", "<pad>"


class LabSettings(Settings):
    """Size, training and seed of a lab base. The defaults are the recipe of docs/experiments.md."""

    n_facts: int = Field(200, ge=1, description="Facts of the made-up world, when no facts are given.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the world, the weights and the order of facts.")
    implications: bool = Field(
        False, description="Whether the made-up world has questions over two hops and reversed ones, as probes."
    )
    hidden_size: int = Field(128, ge=8, description="Width of the model.")
    intermediate_size: int = Field(352, ge=8, description="Width inside the MLPs.")
    num_hidden_layers: int = Field(4, ge=1, description="Layers.")
    num_attention_heads: int = Field(4, ge=1, description="Attention heads.")
    vocab_size: int = Field(3000, ge=300, description="Most tokens of the BPE vocabulary.")
    tie_word_embeddings: bool = Field(True, description="One matrix for the input embeddings and the output head.")
    epochs: int = Field(40, ge=1, description="Passes over everything the base is to hold.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate.")
    batch_size: int = Field(32, ge=1, description="Texts per optimiser step.")
    prompt_template: str = Field("plain", description="As model.prompt_template; update.yaml then names it too.")


STAGE_SETTINGS = {"batch_size": 8, "learning_rate": 5e-4}  # with TRAIN_SETTINGS, for update.yaml
# The paper's method, on a base that answers in its facts' own words.
TRAIN_SETTINGS = {"adam_beta2": 0.98, **BARE["train"]}
LORA_SETTINGS = {"r": 8, "lora_alpha": 16, "layers": 1.0}  # half of four layers learns too little
UPDATE_TEXTS = 1800  # facts x epochs of a stage: about as many as it takes to learn the new answers


def build_lab(
    facts: FactSet | None = None,
    settings: LabSettings | None = None,
    *,
    vocabulary_from: FactSet | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
) -> Path:
    """Build a base that holds the old answers of `facts` (default: of a made-up world), and return its folder.

    The tokenizer is trained on the texts of `vocabulary_from` (default: `facts`). If `facts` are only part of a file,
    pass the whole file here: otherwise every rare name becomes one token, unlike in real models, and the base
    generalises less (docs/experiments.md).

    The folder holds a model that transformers can load, `facts.jsonl`, `update.yaml` with settings for `update`, and
    `lab.json`, which describes the base and says what share of the answers it gives exactly. Without `output`, return
    the folder in the cache (FORGETLEARN_CACHE, else ~/.cache/forgetlearn). On the CPU every machine builds the same
    base. Use `device="auto"` for a large base.

    Raises:
        ConfigError: hidden_size does not fit num_attention_heads, or the made-up world cannot have so many facts.
        FactError: no fact has an old answer.
        RunError: the output exists; or, with `overwrite`, it holds a file that facts were read from.
    """
    settings = settings or LabSettings()
    if settings.hidden_size % (2 * settings.num_attention_heads):
        raise ConfigError(
            f"hidden_size = {settings.hidden_size} must be a multiple of twice num_attention_heads "
            f"= {settings.num_attention_heads}."
        )
    if output is not None:
        reads = [given.source for given in (facts, vocabulary_from) if given is not None]
        run_folder.check_output(output, resume=False, overwrite=overwrite, inputs=reads, can_resume=False)
    if facts is None:
        facts = world_facts(settings)
    vocabulary_from = vocabulary_from or facts
    cached = disk.cache_folder() / f"lab-{_key(facts, vocabulary_from, settings, device)}"
    with disk.naming(cached.parent):
        cached.parent.mkdir(parents=True, exist_ok=True)
    with claimed(cached.with_name(f".{cached.name}.lock"), waits=True):  # a second process waits, and finds it built
        if not (cached / "lab.json").is_file():
            log.info("building a lab base that holds %d facts (once; kept in %s)", facts.used, cached.parent)
            with disk.atomic_folder(cached) as unfinished:
                _build(facts, vocabulary_from, settings, unfinished, device)
    if output is None:
        return cached
    output = Path(output)
    with disk.atomic_folder(output) as unfinished:
        shutil.copytree(cached, unfinished, dirs_exist_ok=True)
    return output


def world_facts(settings: LabSettings) -> FactSet:
    """Return the facts of the made-up world, which a lab base holds if no other facts are given."""
    records = made_up_world(settings.n_facts, settings.seed, implications=settings.implications)
    return from_records(records, source="made-up world")


def held_pairs(facts: FactSet) -> tuple[list[tuple[str, str]], int]:
    """Return the prompts and answers that the base is to hold, and how many others contradict one of these.

    Raises:
        FactError: no fact has an old answer.
    """
    pairs: dict[str, str] = {}
    contradictions = 0
    for prompt, answer in _wanted(facts):
        if pairs.setdefault(prompt, answer) != answer:
            contradictions += 1
    if not any(fact.ground_truth for fact in facts):
        raise FactError(f"{facts.source}: no fact has an old answer, so a lab base would have nothing to learn.")
    return list(pairs.items()), contradictions


def _wanted(facts: FactSet) -> Iterable[tuple[str, str]]:
    """Yield prompts of facts first, then locality probes, then rephrasings, then what follows from the facts.

    If two contradict each other, the first counts.
    """
    for fact in facts:
        if fact.ground_truth:
            yield fact.prompt, fact.ground_truth
    for fact in facts:
        yield from ((probe.prompt, probe.answer) for probe in fact.locality)
    for fact in facts:
        if fact.ground_truth:
            for prompt in fact.rephrase_prompts:
                yield prompt, fact.ground_truth
    for fact in facts:
        yield from ((known.prompt, known.answer) for probe in fact.probes for known in probe.needs)
    yield from implied(facts)


def implied(facts: Iterable[Fact]) -> Iterator[tuple[str, str]]:
    """Yield the questions whose answers follow from the old answers of facts, with these answers."""
    for fact in facts:
        for probe in fact.probes:
            if probe.old_answers and not probe.options:
                yield probe.prompt, probe.old_answers[0]


def _build(facts: FactSet, vocabulary_from: FactSet, settings: LabSettings, folder: Path, device: str) -> None:
    from forgetlearn.method.core import teach
    from forgetlearn.models.encoding import Encoder
    from forgetlearn.models.language_model import parameter_count, wrap

    pairs, contradictions = held_pairs(facts)
    tokenizer = train_tokenizer(_texts(vocabulary_from), settings)
    encoder = Encoder(tokenizer, settings.prompt_template)
    longest = max(len(encoder.encode(prompt, answer, end=True).ids) for prompt, answer in pairs)
    loading = ModelSettings.model_validate({"device": device, "prompt_template": settings.prompt_template})
    lm = wrap(_new_model(settings, tokenizer, longest), tokenizer, loading)
    stage = StageSettings(
        epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate, adam_beta2=0.98
    )
    stage_log = teach(lm, pairs, stage, seed=settings.seed)
    lm.save(folder)
    write_facts(facts, folder / "facts.jsonl")
    disk.write_text(folder / "update.yaml", _update_yaml(facts.used, settings.prompt_template))
    held = _share_held(lm, facts)
    for what, share in held.items():
        if share is not None and share < 0.99:
            log.warning("the lab base holds only %.1f %% of the %s; raise epochs or size", 100 * share, what)
    disk.write_json(
        folder / "lab.json",
        {
            "settings": settings.model_dump(),
            "facts": {"source": facts.source, "used": facts.used, "sha256": facts.sha256()},
            "texts": len(pairs),
            "contradictions": contradictions,
            "parameters": parameter_count(lm.model),
            "final_loss": stage_log.final_loss,
            "held": held,
            "versions": provenance.versions(),
        },
    )


def _texts(facts: FactSet) -> list[str]:
    """Return texts that together contain all words of the facts."""
    held = [f"{prompt} {answer}" for prompt, answer in dict(_wanted(facts)).items()]
    return held + [f" {fact.target_new}" for fact in facts]


def train_tokenizer(texts: list[str], settings: LabSettings) -> Any:
    """Train a byte-level BPE tokenizer on these texts; it can encode any other text too.

    It has no BOS token: with one, a base this small learns its facts less well (docs/experiments.md).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, padding_side="left")


def _new_model(settings: LabSettings, tokenizer: Any, longest: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_attention_heads,
        max_position_embeddings=max(512, 2 * longest),
        tie_word_embeddings=settings.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def _share_held(lm: LanguageModel, facts: FactSet) -> dict[str, float | None]:
    """Return the shares of answers that the base gives exactly, token for token: old ones, locality's and implied ones.

    Of implied answers to one question, the first is meant, because the base was trained on that.
    """
    from forgetlearn.evaluation.scorer import Reading, Scorer

    old = [(fact.prompt, fact.ground_truth) for fact in facts if fact.ground_truth]
    probes = [(probe.prompt, probe.answer) for fact in facts for probe in fact.locality]
    follow = list({prompt: (prompt, answer) for prompt, answer in reversed([*implied(facts)])}.values())
    read = Scorer(lm).read([*old, *probes, *follow])

    def share(pairs: list[tuple[str, str]]) -> float | None:
        readings = [read[pair] for pair in pairs]
        hits = [isinstance(r, Reading) and r.predicted == r.wanted for r in readings]
        return sum(hits) / len(hits) if hits else None

    return {"old answers": share(old), "locality answers": share(probes), "implied answers": share(follow)}


def _update_yaml(n_facts: int, prompt_template: str) -> str:
    """Return YAML settings for an update of all facts: the fewer facts, the more epochs."""
    stage = {"epochs": max(6, min(40, UPDATE_TEXTS // n_facts)), **STAGE_SETTINGS}
    settings: dict[str, Mapping[str, object]] = {"forget": {**stage}, "learn": {**stage}, "teach": STAGE_SETTINGS}
    settings |= {"train": TRAIN_SETTINGS, "keep": BARE["keep"], "lora": LORA_SETTINGS}
    if prompt_template != "plain":
        named = prompt_template in prompts.NAMED
        settings["model"] = {"prompt_template": prompt_template if named else str(Path(prompt_template).resolve())}
    body: str = yaml.safe_dump(settings, sort_keys=False)
    return "# Settings for `forgetlearn update` that suit this small base.\n" + body


def _key(facts: FactSet, vocabulary_from: FactSet, settings: LabSettings, device: str) -> str:
    parts = {
        "format": FORMAT,
        "settings": settings.model_dump(),
        "facts": facts.sha256(),
        **prompts.fingerprint(settings.prompt_template),
        "vocabulary_from": vocabulary_from.sha256(),
        "versions": {name: provenance.versions()[name] for name in ("torch", "transformers", "tokenizers")},
    }
    if device != "cpu":
        parts["device"] = device
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
