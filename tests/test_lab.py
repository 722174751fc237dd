import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, FactError, RunError
from forgetlearn.facts import from_records, read_facts
from forgetlearn.lab.build import LabSettings, build_lab, held_pairs, train_tokenizer, world_facts
from forgetlearn.storage import disk

TINY = LabSettings(
    n_facts=5,
    epochs=2,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=300,
)


def facts_of(*records):
    return from_records([{"prompt": p, "ground_truth": old, "target_new": "new"} | more for p, old, more in records])


def test_the_base_holds_what_it_is_to_hold(small_lab):
    built = json.loads((small_lab / "lab.json").read_text())
    assert built["held"] == {"old answers": 1.0, "locality answers": 1.0, "implied answers": None}
    model = AutoModelForCausalLM.from_pretrained(small_lab)
    tokenizer = AutoTokenizer.from_pretrained(small_lab)
    fact = read_facts(small_lab / "facts.jsonl")[0]
    ids = tokenizer(fact.prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == fact.ground_truth


def test_the_settings_beside_it_load(small_lab):
    config = load_config(small_lab / "update.yaml", {"forget.coef": 1})
    assert (config.forget.epochs, config.learn.epochs, config.teach.epochs) == (40, 40, 0)  # 24 facts
    assert config.learn.learning_rate == 5e-4
    assert config.learning.lora_rate(128) == pytest.approx(5e-3)


def test_it_is_built_once_and_the_same_seed_gives_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGETLEARN_CACHE", str(tmp_path / "one"))
    first = build_lab(settings=TINY)
    assert first.parent == disk.cache_folder()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert build_lab(settings=TINY) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    other_seed = build_lab(settings=TINY.model_copy(update={"seed": 1}))
    assert other_seed != first
    monkeypatch.setenv("FORGETLEARN_CACHE", str(tmp_path / "two"))
    again = build_lab(settings=TINY)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_an_output_is_a_copy_and_is_not_overwritten_unasked(tmp_path):
    folder = build_lab(settings=TINY, output=tmp_path / "base")
    assert {"model.safetensors", "tokenizer.json", "facts.jsonl", "update.yaml", "lab.json"} <= {
        file.name for file in folder.iterdir()
    }
    with pytest.raises(RunError, match="--overwrite"):
        build_lab(settings=TINY, output=tmp_path / "base")
    assert build_lab(settings=TINY, output=tmp_path / "base", overwrite=True) == folder


def test_an_output_that_holds_what_is_read_is_not_replaced(tmp_path):
    base = build_lab(settings=TINY, output=tmp_path / "base")
    own = read_facts(base / "facts.jsonl")
    other = facts_of(("A?", "a", {}))
    for facts, vocabulary in ((own, None), (other, own)):
        with pytest.raises(RunError, match=r"facts\.jsonl"):
            build_lab(facts, TINY, vocabulary_from=vocabulary, output=base, overwrite=True)
    assert read_facts(base / "facts.jsonl").facts == own.facts


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_asked(tied):
    model = AutoModelForCausalLM.from_pretrained(
        build_lab(settings=TINY.model_copy(update={"tie_word_embeddings": tied}))
    )
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied


def test_each_prompt_is_held_once_and_contradictions_are_counted():
    probe = {"prompt": "P?", "answer": "q"}
    facts = facts_of(("A?", "a", {"rephrase_prompts": ["A, please?", "P?"]}), ("B?", "b", {"locality": [probe, probe]}))
    pairs, contradictions = held_pairs(facts)
    assert pairs == [("A?", "a"), ("B?", "b"), ("P?", "q"), ("A, please?", "a")]
    assert contradictions == 1


def test_any_text_can_be_written_by_the_tokenizer():
    tokenizer = train_tokenizer(["The river is the Nile"], TINY)
    for text in ("Zürich 北京 🙂", "tabs\tand\nlines", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")


def test_facts_without_old_answers_and_impossible_sizes_are_refused():
    with pytest.raises(FactError, match="old answer"):
        held_pairs(from_records([{"prompt": "A?", "target_new": "b"}]))
    with pytest.raises(ConfigError, match="hidden_size = 18"):
        build_lab(settings=TINY.model_copy(update={"hidden_size": 18}))


def test_a_lab_base_is_to_hold_what_follows_from_its_facts():
    settings = LabSettings(n_facts=24, implications=True)
    facts = world_facts(settings)
    pairs = dict(held_pairs(facts)[0])
    bare = dict(held_pairs(world_facts(LabSettings(n_facts=24)))[0])
    assert pairs.items() > bare.items()
    hops = [probe for fact in facts for probe in fact.probes if probe.kind == "2-hop"]
    assert hops
    for probe in hops:
        assert pairs[probe.prompt] == probe.old_answers[0]
        assert all(pairs[need.prompt] == need.answer for need in probe.needs)
