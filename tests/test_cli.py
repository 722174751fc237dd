"""The command: every command through `main(argv)`, its exit code and files; bad input gets one clear message."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forgetlearn.cli.main import main
from forgetlearn.lab import demo as demo_module
from forgetlearn.lab.build import LabSettings
from forgetlearn.runtime.signals import Interrupted
from forgetlearn.storage import disk

COMMANDS = ["facts", "lab", "update", "paper", "evaluate", "ask", "report", "demo", "settings"]
FEW = ["--limit", "2", "--set", "forget.epochs=1", "--set", "learn.epochs=2", "--set", "learn.batch_size=1"]


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    """As `main` wants it before transformers is imported; other tests have imported it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def told(capsys):
    """`told("facts", file)`: exit code, stdout and stderr of a command."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def refused(told, tmp_path):
    """`refused(words, *argv)`: the command ends with 2 and one message that has these words; no file changes."""

    def check(words: str, *argv: object) -> str:
        before = snapshot(tmp_path)
        code, out, err = told(*argv)
        assert code == 2, err
        assert words in " ".join(err.replace("│", " ").split()) or words in err, err  # in whatever box, wrapped
        assert "Traceback" not in err
        assert out == ""
        assert snapshot(tmp_path) == before
        return err

    return check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def lab_facts(small_lab) -> Path:
    return small_lab / "facts.jsonl"


@pytest.fixture(scope="module")
def updated(small_lab, lab_facts, tmp_path_factory) -> Path:
    """A run folder with an adapter."""
    output = tmp_path_factory.mktemp("cli") / "run"
    argv = ["update", "--model", small_lab, "--facts", lab_facts, "--config", small_lab / "update.yaml", *FEW]
    more = ["--set", "learn.learning_rate=2e-3", "--method", "f-lora", "--coef", "1", "--output", output]
    assert main([str(word) for word in (*argv, *more)]) == 0
    return output


# Help --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(told, command):
    code, out, err = told(command, "--help")
    assert (code, err) == (0, "")
    assert f"forgetlearn {command}" in " ".join(out.split())


@pytest.mark.slow
def test_without_a_terminal_progress_is_plain_lines(small_lab, lab_facts, tmp_path):
    given = ["--model", small_lab, "--facts", lab_facts, "--method", "f-ft", "--output", tmp_path / "run"]
    command = [sys.executable, "-m", "forgetlearn", "update", *FEW, *map(str, given)]
    done = subprocess.run(command, capture_output=True, check=True)  # not as text: that hides carriage returns
    stages = (
        "plan: .*",
        "scoring the base model",
        r"forgetting 2 facts \(all weights\)",
        "forgetting: 1 steps, .*",
        "scoring the forgotten model",
        r"learning 2 facts \(all weights\)",
        "learning: 4 steps, .*",
        "scoring the updated model",
        "took .*",
    )
    lines = done.stderr.decode().splitlines(keepends=True)
    assert len(lines) == len(stages)
    assert [line for line, stage in zip(lines, stages, strict=True) if not re.fullmatch(f"{stage}\n", line)] == []
    assert b"\r" not in done.stdout


def test_help_lists_every_command(told):
    code, out, _err = told("--help")
    assert code == 0
    assert [command for command in COMMANDS if f" {command} " not in out] == []


def test_prepared_products_are_few_unless_the_user_says_otherwise(told, monkeypatch):
    for given, used in ((None, "64"), ("9", "9")):
        monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
        if given:
            monkeypatch.setenv("LRU_CACHE_CAPACITY", given)
        told("--version")
        assert os.environ["LRU_CACHE_CAPACITY"] == used
    monkeypatch.delenv("LRU_CACHE_CAPACITY")


def test_version(told):
    assert told("--version") == (0, "0.1.0\n", "")


def test_help_and_facts_do_without_heavy_imports(lab_facts):
    code = (
        "import sys; from forgetlearn.cli.main import main\n"
        "assert main(['--help']) == main(['subtract', '--help']) == main(['settings']) == 0\n"
        "assert 'rich' not in sys.modules\n"  # as slow to import as all else that --help needs
        f"assert main(['facts', {str(lab_facts)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'numpy', 'scipy'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["lab", "--old-from", "pred", "--columns", "prompt=Q"], ["facts.old_from", "facts.columns"]),
        (["lab", "--facts", "FACTS", "--set", "n_facts=3"], ["n_facts"]),
        (["compare", "--epochs", "1,2", "--set", "learn.epochs=4"], ["learn.epochs", "--epochs"]),
        (["compare", "--slurm-set", "partition=gpu"], ["--slurm"]),
    ],
)
def test_what_a_command_would_ignore_is_refused(told, lab_facts, tmp_path, argv, named):
    argv = [str(lab_facts) if word == "FACTS" else word for word in argv]
    code, _out, err = told(*argv, "--output", str(tmp_path / "out"))
    assert code == 2
    assert [name for name in named if name not in err] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [("update", "--shard"), ("update", "--deepspeed"), ("ask", "--engine"), ("compare", "--slurm")],
)
def test_what_never_ran_on_its_real_counterpart_is_called_experimental(told, command, flag):
    code, out, _err = told(command, "--help")
    assert code == 0
    text = " ".join(out.split())
    assert "xperimental" in text[text.index(f" {flag} ") :][:150]


def test_settings(told):
    code, out, _err = told("settings")
    assert code == 0
    assert "forget.coef = 0.3\n" in out
    code, out, _err = told("settings", "--schema")
    assert json.loads(out)["properties"].keys() >= {"method", "seed", "forget", "learn"}


def test_settings_of_the_lab(told):
    code, out, _err = told("settings", "--lab")
    assert code == 0
    assert "hidden_size = 128\n    Width of the model." in out
    assert "forget.coef" not in out
    _code, out, _err = told("settings", "--lab", "--schema")
    assert json.loads(out)["properties"].keys() == LabSettings.model_fields.keys()
    assert "settings --lab" in told("lab", "--help")[1]


# Commands that go well ---------------------------------------------------------------------------


def test_facts(told, lab_facts):
    code, out, err = told("facts", lab_facts, "--limit", 5)
    assert (code, err) == (0, "")
    assert "24 records, 5 read, 5 used (reader own, --old-from answers)" in out
    assert out.count("  old  ") == 3


def test_facts_says_what_is_left_out(told, tmp_path):
    lines = [{"prompt": f"p{n}", "target_new": "a", "ground_truth": old, "colour": 1} for n, old in enumerate("abb")]
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, _err = told("facts", file)
    assert code == 0
    assert "3 read, 2 used" in out
    assert "left out: 1 fact (record 1), old_equals_new." in out
    assert "fields that are not read (number of values): colour (" in out
    assert "no fact has a rephrasing: " in out
    assert "no fact has a locality prompt: " in out
    assert "no fact has an old answer" not in out


def test_facts_as_json(told, lab_facts):
    code, out, _err = told("facts", lab_facts, "--limit", 2, "--json")
    found = json.loads(out)
    assert (code, found["reader"], found["read"], len(found["facts"])) == (0, "own", 2, 2)
    assert found["facts"][0].keys() >= {"id", "prompt", "ground_truth", "target_new", "rephrase_prompts", "locality"}


def test_real_files(told, shared_data):
    for name, reader in (("zsre.json", "zsre"), ("counterfact.json", "counterfact")):
        code, out, _err = told("facts", shared_data(name), "--limit", 300, "--json")
        found = json.loads(out)
        assert (code, found["reader"], len(found["facts"])) == (0, reader, 300)
        assert found["read"] == 300 + sum(found["left_out"].values())


def test_update(told, updated):
    names = {"config.yaml", "manifest.json", "facts.jsonl", "summary.json", "report.md", "report.html", "adapter"}
    assert names <= {path.name for path in updated.iterdir()}
    summary = disk.read_json(updated / "summary.json")
    assert (summary["method"], summary["coef"], summary["facts"]["used"]) == ("f-lora", 1.0, 2)


def test_update_prints_a_table_and_where_the_product_lies(told, small_lab, lab_facts, tmp_path):
    argv = ("update", "--model", small_lab, "--facts", lab_facts, "--config", small_lab / "update.yaml", *FEW)
    code, out, err = told("--quiet", *argv, "--method", "ft", "--seed", 3, "--output", tmp_path / "run")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["phase", "contains", "base", "updated"]
    assert f"product  {tmp_path}/run/model\n" in out
    assert f"report   {tmp_path}/run/report.html\n" in out
    assert disk.read_json(tmp_path / "run/summary.json")["seed"] == 3


def test_update_again(told, refused, small_lab, lab_facts, updated):
    argv = ["update", "--model", small_lab, "--facts", lab_facts, "--config", small_lab / "update.yaml", *FEW]
    argv += ["--set", "learn.learning_rate=2e-3", "--method", "f-lora", "--coef", 1, "--output", updated]
    before = snapshot(updated)
    err = refused("exists", *argv)
    assert "--resume" in err
    assert "--overwrite" in err
    refused("config.forget.coef = 1.0, now it is 0.5", *argv, "--resume", "--set", "forget.coef=0.5")
    assert told(*argv, "--resume")[0] == 0
    assert snapshot(updated) == before


def test_settings_win_in_their_order(told, refused, small_lab, lab_facts, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: f-loar\nseed: 4\nforget: {coef: 3}\n")
    argv = ["update", "--model", small_lab, "--facts", lab_facts, "--config", file, "--limit", 1]
    argv += ["--set", "learn.epochs=1", "--coef", "2", "--set", "forget.coef=0", "--output", tmp_path / "out/run"]
    refused("method = 'f-loar'", *argv)
    assert told(*argv, "--method", "f-ft")[0] == 0
    config = disk.read_json(tmp_path / "out/run/manifest.json")["config"]
    assert (config["method"], config["seed"], config["forget"]["coef"]) == ("f-ft", 4, 0.0)


def test_evaluate_an_adapter(told, small_lab, lab_facts, updated, tmp_path):
    argv = ("evaluate", "--model", updated / "adapter", "--facts", lab_facts, "--limit", 2)
    code, out, err = told(*argv, "--reference", small_lab, "--output", tmp_path / "scores")
    assert code == 0, err
    summary = disk.read_json(tmp_path / "scores/summary.json")
    assert list(summary["phases"]) == ["base", "updated"]
    assert summary["phases"]["updated"]["locality"]["agreement"]["mean"] < 100.0
    assert summary["phases"] == {
        name: scores
        for name, scores in disk.read_json(updated / "summary.json")["phases"].items()
        if name != "forgotten"
    }
    names = {path.name for path in (tmp_path / "scores").iterdir()}
    assert names == {"config.yaml", "manifest.json", "facts.jsonl", "inputs.jsonl", "summary.json"} | {
        "probes.jsonl",
        "report.md",
        "report.html",
    }
    assert "report   " in out


def test_evaluate_alone_has_no_agreement(told, small_lab, lab_facts, tmp_path):
    argv = ("evaluate", "--model", small_lab, "--facts", lab_facts, "--limit", 2, "--output", tmp_path / "scores")
    assert told(*argv, "--set", "evaluate.protocols=[prefer]")[0] == 0
    scores = disk.read_json(tmp_path / "scores/summary.json")["phases"]["model"]
    assert (scores["locality"].keys(), scores["reliability"].keys()) == ({"accuracy"}, {"prefer"})


def test_ask(told, small_lab, updated):
    fact = disk.read_rows(updated / "inputs.jsonl")[0]
    code, out, _err = told("ask", "--model", small_lab, fact["prompt"])
    assert (code, out) == (0, f"{fact['prompt']}\n  {fact['ground_truth']}\n")
    rows = disk.read_rows(updated / "facts.jsonl")
    said = next(r["said"] for r in rows if r["fact"] == fact["id"] and r["phase"] == "updated" and "said" in r)
    adapter = updated / "adapter"
    code, out, _err = told("ask", "--model", adapter, "--reference", small_lab, fact["prompt"], "Another?")
    assert code == 0
    assert out.startswith(f"{fact['prompt']}\n  {adapter}: {said}\n  {small_lab}: {fact['ground_truth']}\nAnother?\n")
    code, out, _err = told("ask", "--model", adapter, "--reference", small_lab, fact["prompt"], "--json")
    assert json.loads(out) == [
        {"prompt": fact["prompt"], str(adapter): said, str(small_lab): fact["ground_truth"]},
    ]


def test_process_prints_the_answer_and_nothing_else(small_lab, updated):
    fact = disk.read_rows(updated / "inputs.jsonl")[0]
    command = [sys.executable, "-m", "forgetlearn", "ask", "--model", str(updated / "adapter"), fact["prompt"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{fact['prompt']}\n  ")


def test_report(told, refused, updated, tmp_path):
    before = {name: (updated / name).read_bytes() for name in ("report.md", "report.html")}
    for name in before:
        (updated / name).unlink()
    assert told("report", updated) == (0, f"{updated}/report.html\n", "")
    assert {name: (updated / name).read_bytes() for name in before} == before
    refused("manifest.json", "report", tmp_path)
    (updated / "summary.json").rename(tmp_path / "summary.json")
    refused("the run is not finished", "report", updated)
    (tmp_path / "summary.json").rename(updated / "summary.json")


SMALL = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2", "epochs=2"]


def test_lab(told, refused, lab_facts, tmp_path):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    code, out, err = told("lab", "--facts", lab_facts, "--limit", 3, *settings, "--output", tmp_path / "lab")
    assert code == 0, err
    assert f"Next: forgetlearn update --model {tmp_path}/lab " in out
    assert {"config.json", "model.safetensors", "facts.jsonl", "lab.json", "update.yaml"} <= {
        path.name for path in (tmp_path / "lab").iterdir()
    }
    assert len(disk.read_rows(tmp_path / "lab/facts.jsonl")) == 3
    refused("--overwrite", "lab", "--output", tmp_path / "lab")
    refused("Did you mean 'epochs'", "lab", "--set", "epoch=1", "--output", tmp_path / "lab2")
    refused("n_facts = 0", "lab", "--limit", 0, "--output", tmp_path / "lab2")


def test_demo(told, refused, monkeypatch, tmp_path):
    class SmallSettings(LabSettings):
        hidden_size: int = 32
        intermediate_size: int = 64
        num_hidden_layers: int = 1
        num_attention_heads: int = 2
        epochs: int = 2

    monkeypatch.setattr(demo_module, "LabSettings", SmallSettings)
    code, out, err = told("--quiet", "demo", "--limit", 3, "--output", tmp_path / "demo")
    assert code == 0, err
    methods = ["ft", "lora", "f-ft", "f-lora", "f-lora-ft"]
    assert [line.split()[0] for line in out.splitlines()[2:8]] == ["original", *methods]
    assert sorted(path.name for path in (tmp_path / "demo").iterdir() if path.is_dir()) == sorted(methods)
    assert [line.split("|")[1].strip() for line in (tmp_path / "demo/demo.md").read_text().splitlines()[2:]] == [
        "original",
        *methods,
    ]
    refused("--overwrite", "demo", "--limit", 3, "--output", tmp_path / "demo")
    code, again, _err = told("--quiet", "demo", "--limit", 3, "--output", tmp_path / "demo", "--resume")
    assert (code, again) == (0, out)


def test_demo_refuses(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    refused("forgetlearn demo", "demo", "--overwrite", "--output", tmp_path / "mine")
    refused("n_facts = 0", "demo", "--limit", 0, "--output", tmp_path / "new")
    refused("seed = -1", "demo", "--seed", -1, "--output", tmp_path / "new")
    refused("n_facts = 20000", "demo", "--limit", 20000, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Bad input ---------------------------------------------------------------------------------------

GOOD = {"prompt": "The capital is", "target_new": "new", "ground_truth": "old"}


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


BAD_FACTS = {
    "empty": ("f.jsonl", b"", "is empty"),
    "not UTF-8": ("f.jsonl", b'{"prompt": "\xff"}', "UTF-8"),
    "not JSON": ("f.json", b"prompt: x", "not JSON"),
    "cut short": ("f.json", b'[{"prompt": "a", "target_new": "b"}, {"prom', "is cut short"),
    "cut short line": ("f.jsonl", lines(GOOD) + b'{"prompt": "a', "2"),
    "unknown form": ("f.jsonl", lines({"question": "a", "reply": "b"}), "question, reply"),
    "unknown suffix": ("f.txt", b"x", ".jsonl"),
    "record of the wrong type": ("f.json", json.dumps([GOOD, "text"]).encode(), "record 2"),
    "field of the wrong type": ("f.jsonl", lines(GOOD, {**GOOD, "target_new": {"a": 1}}), "record 2: 'target_new'"),
    "no prompt": ("f.jsonl", lines(GOOD, {**GOOD, "prompt": " "}), "record 2 has no prompt"),
    "no fact left": ("f.jsonl", lines({**GOOD, "ground_truth": "new"}), "can be used"),
    "no old answer": ("f.jsonl", lines({"prompt": "a", "target_new": "b"}), "--old-from model"),
    "longer than the context": ("f.jsonl", lines({**GOOD, "prompt": "far " * 600}), "the model's context is 512"),
}


@pytest.mark.parametrize("name", BAD_FACTS)
def test_bad_facts(refused, small_lab, tmp_path, name):
    file_name, content, words = BAD_FACTS[name]
    file = tmp_path / file_name
    file.write_bytes(content)
    err = refused(
        words, "update", "--model", small_lab, "--facts", file, "--method", "f-lora", "--output", tmp_path / "run"
    )
    assert err.startswith("FactError: ")
    assert len(err.splitlines()) <= 3
    if "old answer" not in name and "context" not in name:
        refused(words, "facts", file)
        refused(words, "evaluate", "--model", small_lab, "--facts", file, "--output", tmp_path / "run")


def test_missing_facts(refused, small_lab, tmp_path):
    file = tmp_path / "no.jsonl"
    refused("no.jsonl does not exist", "facts", file)
    refused("no.jsonl does not exist", "update", "--model", small_lab, "--facts", file, "--output", tmp_path / "run")
    refused("facts.source is not set", "update", "--model", small_lab, "--output", tmp_path / "run")


def test_strict(refused, small_lab, tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_bytes(lines(GOOD, {**GOOD, "prompt": "p", "ground_truth": "new"}))
    refused("old_equals_new", "facts", file, "--strict")
    refused("old_equals_new", "update", "--model", small_lab, "--facts", file, "--strict", "--output", tmp_path / "r")


def fake_model(folder: Path, config: dict | None, *files: str) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name in files:
        (folder / name).write_bytes(b"")
    return folder


MASKED = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
REMOTE = {"model_type": "own", "architectures": ["OwnModel"]}
REMOTE["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BAD_MODELS = {
    "not causal": (MASKED, ["model.safetensors"], "not a causal language model"),
    "pickled": (LLAMA, ["pytorch_model.bin"], "only pickled weights (pytorch_model.bin)"),
    "no weights": (LLAMA, [], "no weights"),
    "no config": (None, ["model.safetensors"], "no config.json"),
    "remote code": (REMOTE, ["model.safetensors"], "model.trust_remote_code=true"),
    "damaged": (LLAMA, ["model.safetensors"], "model.safetensors"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(refused, lab_facts, tmp_path, name):
    config, files, words = BAD_MODELS[name]
    model = fake_model(tmp_path / "model", config, *files)
    err = refused(words, "update", "--model", model, "--facts", lab_facts, "--output", tmp_path / "run")
    assert err.startswith("ModelError: ")
    assert len(err.splitlines()) == 1
    refused(words, "ask", "--model", model, "hello")
    refused(words, "evaluate", "--model", model, "--facts", lab_facts, "--output", tmp_path / "run")


def test_missing_model(refused, lab_facts, tmp_path):
    argv = ("--facts", lab_facts, "--output", tmp_path / "run")
    refused("does not exist", "update", "--model", tmp_path / "nowhere", *argv)
    refused("nobody/nothing", "update", "--model", "nobody/nothing", *argv)
    refused("model.name is not set", "update", *argv)
    refused("is a file", "ask", "--model", lab_facts, "hello")


def test_a_comparison_of_no_methods(refused, small_lab, lab_facts, tmp_path):
    argv = ("--model", small_lab, "--facts", lab_facts, "--output", tmp_path / "run")
    refused("methods = []: must name at least 1 of ft, lora, f-ft", "compare", "--methods", "", *argv)


def test_tokenizer_without_eos(refused, small_lab, lab_facts, tmp_path):
    lab = Path(shutil.copytree(small_lab, tmp_path / "lab"))
    config = disk.read_json(lab / "tokenizer_config.json")
    config.pop("eos_token")
    disk.write_json(lab / "tokenizer_config.json", config)
    (lab / "special_tokens_map.json").unlink(missing_ok=True)
    refused("no EOS token", "update", "--model", lab, "--facts", lab_facts, "--output", tmp_path / "run")


@pytest.mark.parametrize("prompt", ["", "  ", "far " * 600])
def test_prompt_that_cannot_be_asked(refused, small_lab, prompt):
    refused("FactError", "ask", "--model", small_lab, prompt)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--coef", "-0.1"], "forget.coef = -0.1: must be greater than or equal to 0"),
        (["--coef", "nan"], "forget.coef = 'nan': must be a finite number"),
        (["--coef", "inf"], "forget.coef = 'inf': must be a finite number"),
        (["--coef", "much"], "forget.coef = 'much': must be a valid number"),
        (["--method", "f-loar"], "must be 'ft', 'lora', 'f-ft', 'f-lora',"),
        (["--method", "f_lora"], "Did you mean 'f-lora'?"),
        (["--set", "forget.epoch=1"], "Did you mean 'forget.epochs'"),
        (["--set", "forget.epochs"], "expected NAME=VALUE"),
        (["--limit", "0"], "facts.limit = 0"),
        (["--limit", "few"], "'--limit'"),
        (["--old-from", "nobody"], "facts.old_from = 'nobody'"),
        (["--old-from", "model,answers"], "facts.old_from = 'model,answers'"),
        (["--old-from", "pred"], "has no 'pred'"),
        (["--config", "no.yaml"], "no.yaml: No such file"),
        (["--ouput", "x"], "No such option"),
        (["--prompt-template", "chat"], "model.prompt_template = chat"),
    ],
)
def test_bad_settings(refused, small_lab, lab_facts, tmp_path, argv, words):
    refused(words, "update", "--model", small_lab, "--facts", lab_facts, "--output", tmp_path / "run", *argv)


def test_all_bad_settings_at_once(refused, tmp_path):
    err = refused("ConfigError", "update", "--coef", "nan", "--method", "x", "--seed", -1, "--output", tmp_path / "run")
    assert [line.split(" = ")[0] for line in err.splitlines()] == ["ConfigError: method", "seed", "forget.coef"]


@pytest.mark.parametrize("command", ["update", "evaluate"])
def test_existing_output(refused, small_lab, lab_facts, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    argv = (command, "--model", small_lab, "--facts", lab_facts, "--output", tmp_path / "run")
    refused("exists", *argv)
    refused("not written by forgetlearn", *argv, "--overwrite")


def test_unknown_command(refused):
    refused("No such command", "unlearn")


def test_full_disk(refused, small_lab, lab_facts, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    (tmp_path / "run").mkdir()
    words = "manifest.json: cannot be written: No space left on device"
    refused(words, "update", "--model", small_lab, "--facts", lab_facts, "--output", tmp_path / "run")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["--debug", "facts", str(tmp_path / "no.json")])


def test_interrupt(told, monkeypatch, updated):
    def interrupt(_path):
        raise KeyboardInterrupt

    monkeypatch.setattr("forgetlearn.comparison.compare.write_run", interrupt)
    code, _out, err = told("report", updated)
    assert code == 130
    assert "--resume" in err


def test_a_signal_is_answered_with_the_command_that_goes_on(told, monkeypatch):
    def interrupt(*_given, **_settings):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("forgetlearn.runs.update.update", interrupt)
    command = ("update", "--facts", "my facts.json", "--output", "run", "--overwrite")
    code, _out, err = told(*command)
    assert code == 143
    assert err.splitlines()[-1] == "  forgetlearn update --facts 'my facts.json' --output run --resume"


# What is shown on a terminal ---------------------------------------------------------------------

NASTY = '<script>alert("x")</script> | \x1b[31mred\x07 \u202egnp'
PLAIN = '<script>alert("x")</script> | \\x1b[31mred\\x07 \\u202egnp'


def test_nothing_in_facts_steers_the_terminal(told, refused, tmp_path):
    file = tmp_path / "f.jsonl"
    probe = {"prompt": NASTY + "?", "answer": NASTY}
    record = {"prompt": NASTY, "target_new": NASTY, "ground_truth": "old\nline", "rephrase_prompts": [NASTY], NASTY: 1}
    file.write_bytes(lines({**record, "locality": [probe]}))
    code, out, _err = told("facts", file)
    assert code == 0
    assert out.count(PLAIN) == 6
    assert "old\\nline" in out
    assert "\x1b" not in out
    file.write_bytes(lines({NASTY: 1}))
    assert "\x1b" not in refused("f.jsonl", "facts", file)
    # Not ESC alone: typer drops colours by itself where the output is no terminal.
    assert "\x07" not in refused("does not exist", "ask", "--model", tmp_path / "\x1b[31mred\x07", "hello")


def test_nothing_in_answers_steers_the_terminal(told, small_lab, monkeypatch):
    monkeypatch.setattr("forgetlearn.runs.evaluate.ask", lambda prompts, config: dict.fromkeys(prompts, NASTY))
    code, out, _err = told("ask", "--model", small_lab, NASTY)
    assert (code, out) == (0, f"{PLAIN}\n  {PLAIN}\n")


def test_modules_that_forget_are_named_by_a_flag(small_lab, tmp_path, capsys):
    arguments = ["update", "--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--method", "f-ft"]
    assert main([*arguments, "--modules", "head,mpl", "--output", str(tmp_path / "out")]) == 2
    assert "forget.modules: 'mpl' matches nothing. There are all, embeddings" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
