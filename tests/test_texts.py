"""Texts that a tokenizer or a model cannot take, and prompt templates, through whole commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.config.schema import load_config
from forgetlearn.errors import FactError, RunError
from forgetlearn.models.prompts import ALPACA
from forgetlearn.storage import disk

GOOD = {
    "prompt": "Who leads Acme?",
    "target_new": "Ann",
    "ground_truth": "Sam",
    "rephrase_prompt": "The head of Acme?",
    "locality_prompt": "What is up?",
    "locality_ground_truth": "the sky",
}


@pytest.fixture(scope="module")
def base(tiny_model, new_char_tokenizer, tmp_path_factory) -> Path:
    """A saved model whose tokenizer has one token more than the model has embeddings."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = new_char_tokenizer()
    tokenizer.add_tokens(["Zork"])
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(file: Path, *records: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


# case 22, case 15
@pytest.mark.parametrize("command", ["update", "plan", "compare"])
def test_case_22_and_15_every_command_refuses_such_texts_before_training(base, tmp_path, capsys, command):
    bad = [GOOD | {"prompt": f"Who leads {n}?", field: f"x {n} Zork"} for n, field in enumerate(GOOD)]
    facts = write(tmp_path / "facts.jsonl", GOOD, *bad, GOOD | {"prompt": "Who leads all?", "target_new": "A </s> B"})
    output = [] if command == "plan" else ["--output", str(tmp_path / "out")]
    assert main([command, "--model", str(base), "--facts", str(facts), *output]) == 2
    told = capsys.readouterr().err.partition("FactError: ")[2].splitlines()
    assert [line.split(":")[0].split(", ")[2] for line in told[:5]] == list(GOOD)[:5]
    assert told[0].startswith(f"{facts}, record 2, prompt: ")
    assert all("'Zork' (id 100)" in line for line in told[:5])
    assert told[5:] == ["and 2 more"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["Zork", "</s>"])
def test_case_22_and_15_ask_refuses_and_evaluate_counts(base, tmp_path, capsys, bad):
    assert main(["ask", f"What is {bad}?", "--model", str(base)]) == 2
    assert f"'{bad}'" in capsys.readouterr().err.partition("FactError: ")[2]
    facts = write(tmp_path / "f.jsonl", GOOD, GOOD | {"prompt": f"Who leads {bad}?"})
    path = forgetlearn.evaluate(base, facts, output=tmp_path / "scores")
    cells = disk.read_json(path / "summary.json")["phases"]["model"]["reliability"]
    assert {(cell["n"], cell["errored"]) for cell in cells.values()} == {(1, 1)}


def test_case_22_text_for_general_ability(base, tmp_path):
    facts = write(tmp_path / "f.jsonl", GOOD)
    (tmp_path / "text.txt").write_text("Once there was a Zork in the wood. " * 20)
    config = QUICK | {"method": "ft", "evaluate": {"general": str(tmp_path / "text.txt"), "general_tokens": 99}}
    with pytest.raises(FactError, match=r"evaluate\.general.*'Zork'"):
        forgetlearn.update(base, facts, config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# case 16
@pytest.mark.parametrize(("ends", "written"), [(None, 2), ([7], [7, 2]), ([2, 7], [2, 7])])
def test_case_16_the_product_ends_its_answers_in_plain_generate(base, tmp_path, caplog, ends, written):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    GenerationConfig(eos_token_id=ends, do_sample=True, temperature=0.5).save_pretrained(folder)
    result = forgetlearn.update(
        folder, write(tmp_path / "f.jsonl", GOOD), QUICK | {"method": "ft"}, output=tmp_path / "run"
    )
    warned = [record.getMessage() for record in caplog.records if "generation settings name" in record.getMessage()]
    assert len(warned) == (ends != written)
    assert all("</s> (id 2)" in message for message in warned)
    product = AutoModelForCausalLM.from_pretrained(result.product).generation_config
    assert (product.eos_token_id, product.do_sample, product.temperature) == (written, True, 0.5)


@pytest.fixture(scope="module")
def alpaca_lab() -> Path:
    """A lab base that was built, and is to be asked, in Alpaca's wrapper."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "prompt_template": "alpaca"}
    training = {"epochs": 150, "batch_size": 8, "learning_rate": 1e-2}
    return forgetlearn.build_lab(settings=forgetlearn.LabSettings(n_facts=2, **sizes, **training))


def test_a_prompt_template_is_the_same_in_every_stage_and_command(alpaca_lab, tmp_path, capsys):
    """Alpaca's by name, and the same text from a file: the same weights, rows and answers."""
    file = tmp_path / "template.txt"
    file.write_text(ALPACA, encoding="utf-8")
    assert load_config(alpaca_lab / "update.yaml").model.prompt_template == "alpaca"
    assert disk.read_json(alpaca_lab / "lab.json")["held"]["old answers"] == 1
    found = {}
    for name in ("alpaca", str(file)):
        settings = {
            "forget": {"epochs": 1},
            "learn": {"epochs": 1},
            "method": "f-ft",
            "model": {"prompt_template": name},
        }
        result = forgetlearn.update(
            alpaca_lab, alpaca_lab / "facts.jsonl", settings, output=tmp_path / f"run{len(found)}"
        )
        residue = result.summary.phases["base"]["residue"]
        assert residue["token"].mean == residue["generate"].mean == 100
        assert result.summary.facts.forgotten == 2
        assert f"asked in prompt template {name}" in (result.output / "report.md").read_text()
        fact = forgetlearn.read_facts(alpaca_lab / "facts.jsonl")[0]
        assert main(["ask", fact.prompt, "--model", str(alpaca_lab), "--prompt-template", name]) == 0
        said = capsys.readouterr().out
        assert str(fact.ground_truth) in said
        found[name] = result.rows, said, (result.product / "model.safetensors").read_bytes()
    assert found["alpaca"] == found[str(file)]


def test_a_run_does_not_go_on_with_another_text_in_the_template(small_lab, tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("Q: {prompt}\nA:", encoding="utf-8")
    settings = QUICK | {"method": "ft", "model": {"prompt_template": str(file)}, "facts": {"limit": 2}}

    def run() -> None:
        forgetlearn.update(small_lab, small_lab / "facts.jsonl", settings, output=tmp_path / "run", resume=True)

    run()
    run()  # finished
    file.write_text("Question: {prompt}\nA:", encoding="utf-8")
    with pytest.raises(RunError, match="prompt_template_sha256"):
        run()
