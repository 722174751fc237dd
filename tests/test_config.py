"""Settings: where a value comes from, and a word about each that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import forgetlearn
from forgetlearn.comparison.grid import CompareSettings
from forgetlearn.config.base import MOST_BYTES, describe, parse_assignments, validate
from forgetlearn.config.methods import METHODS
from forgetlearn.config.schema import (
    ForgetSection,
    ForgetSettings,
    LoraSettings,
    RunConfig,
    StageSettings,
    TrainSettings,
    load_config,
)
from forgetlearn.errors import ConfigError
from forgetlearn.storage import disk

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def problems(overrides: dict[str, object], file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value).split("\n")


# Where a value comes from ------------------------------------------------------------------------


def test_the_defaults():
    config = load_config()
    assert (config.method, config.seed, config.forget.coef, config.forget.only_known) == ("lora", 0, 0.3, True)
    assert (config.learn.epochs, config.learn.learning_rate, config.teach.epochs) == (3, None, 0)
    assert config.learning.rate(2000) == pytest.approx(5e-5)
    assert config.learning.lora_rate(2000) == pytest.approx(5e-4)
    assert config.evaluate.protocols == ("token", "exact", "generate", "prefer")


def test_an_adapters_rate_has_a_limit_in_narrow_models_unless_it_is_chosen():
    assert load_config().learning.lora_rate(64) == 1.5e-3
    assert load_config(None, {"learn.learning_rate": 1e-3}).learning.lora_rate(64) == pytest.approx(1e-2)
    assert load_config(None, {"lora.learning_rate": 2e-3}).learning.lora_rate(64) == 2e-3


def test_a_rate_for_adapters_that_are_scaled_to_their_layers_is_used_unless_one_is_chosen():
    for overrides in ({}, {"lora.r": 8}):
        assert load_config(None, overrides).learning.with_scaled_adapter().lora_rate(8192) == 1.5e-3
    for overrides in ({"learn.learning_rate": 1e-5}, {"lora.learning_rate": 1e-4}):
        assert load_config(None, overrides).learning.with_scaled_adapter().lora_rate(8192) == pytest.approx(1e-4)


def test_file_wins_over_defaults_and_overrides_over_the_file(yaml_file):
    file = yaml_file("method: f-ft\nforget: {coef: 0.7, epochs: 5}\n")
    config = load_config(file, {"forget.coef": "1.5"})
    assert (config.method, config.forget.coef, config.forget.epochs, config.learn.epochs) == ("f-ft", 1.5, 5, 3)


def test_empty_file_is_the_defaults(yaml_file):
    assert load_config(yaml_file("# nothing\n")) == RunConfig()


def test_rate_of_yaml_1_1_is_a_number(yaml_file):
    file = yaml_file("learn: {learning_rate: 1e-4}\n")
    assert isinstance(yaml.safe_load(file.read_text())["learn"]["learning_rate"], str)  # the trap
    assert load_config(file).learn.learning_rate == 1e-4
    assert load_config(None, parse_assignments(["learn.learning_rate=2e-5"])).learn.learning_rate == 2e-5


def test_anchors_do_not_share(yaml_file):
    file = yaml_file("forget: &stage {epochs: 6, modules: {mlp: 2}}\nlearn: *stage\n")
    config = load_config(file, {"forget.epochs": 1, "learn.modules.mlp": 3})
    assert (config.forget.epochs, config.learn.epochs) == (1, 6)
    assert (config.forget.modules, config.learn.modules) == ({"mlp": 2}, {"mlp": 3})


def test_a_stage_has_its_own_settings_and_those_that_all_stages_share():
    config = load_config(None, {"teach.epochs": 2, "train.adam_epsilon": 1e-6, "lora.r": 4, "forget.batch_size": 4})
    shared = {stage.adam_epsilon for stage in (config.teaching, config.forgetting, config.learning)}
    assert shared == {1e-6}
    assert config.forgetting == ForgetSettings(adam_epsilon=1e-6, lora=LoraSettings(r=4), batch_size=4)
    assert config.learning == StageSettings(adam_epsilon=1e-6, lora=LoraSettings(r=4))
    assert config.teaching == TrainSettings(epochs=2, adam_epsilon=1e-6)


@pytest.mark.parametrize(("name", "value"), [("optim", "adamw_torch"), ("deepspeed", "zero.json"), ("warmup_ratio", 0)])
def test_a_setting_that_stages_share_is_refused_in_a_stage_with_its_place(name, value):
    for stage in ("teach", "forget", "learn"):
        (problem,) = problems({f"{stage}.{name}": value})
        assert problem.startswith(f"{stage}.{name}: ")
        assert f"'train.{name}'" in problem


def test_there_are_few_settings():
    assert len(list(describe(RunConfig))) <= 100


def test_what_is_written_is_read_back(yaml_file):
    config = load_config(None, {"model.prompt_template": "chat", "learn.learning_rate": 1e-5, "facts.limit": 3})
    assert load_config(yaml_file(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_sources_of_old_answers_are_a_list_or_a_text_with_commas(yaml_file):
    for written in ("answers, model", "[answers, model]"):
        config = load_config(yaml_file(f"facts: {{old_from: {written!r}}}".replace("'[", "[").replace("]'", "]")))
        assert config.facts.old_from == ("answers", "model")
        dumped = config.model_dump(mode="json")
        assert dumped["facts"]["old_from"] == "answers,model"
        assert load_config(yaml_file(yaml.safe_dump(dumped))) == config
    assert load_config().model_dump()["facts"]["old_from"] == "answers"  # as earlier versions recorded it
    for wrong in ("model,answers", "answers,answers", "answers,nobody", []):
        with pytest.raises(ConfigError, match=r"facts\.old_from"):
            load_config(None, {"facts.old_from": wrong})


def test_assignments_are_yaml():
    given = ["forget.epochs=6", "lora.target_modules=[q_proj, v_proj]", "facts.limit=", "model.name=a=b"]
    assert parse_assignments(given) == {
        "forget.epochs": 6,
        "lora.target_modules": ["q_proj", "v_proj"],
        "facts.limit": None,
        "model.name": "a=b",
    }


# Case 33
@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("+10", 10), ("1e2", 100), ("1.0e1", 10), ("100.", 100), ("'10'", 10)]
)
def test_case_33_a_number_is_a_plain_decimal(text, value, yaml_file):
    found = [
        load_config(None, parse_assignments([f"learn.epochs={text}"])),
        load_config(yaml_file(f"learn: {{epochs: {text}}}")),
    ]
    assert [config.learn.epochs for config in found] == [value, value]


@pytest.mark.parametrize("text", ["010", "0x10", "0o10", "0b1", "1:30", "1_000", "1e2_0", "1.5", "'010'", "2024-01-01"])
@pytest.mark.parametrize("name", ["learn.epochs", "seed", "facts.limit"])
def test_case_33_no_other_spelling_is_taken_for_a_number(name, text, yaml_file):
    for read in (
        lambda: load_config(None, parse_assignments([f"{name}={text}"])),
        lambda: load_config(None, {name: text.strip("'")}),  # as a flag gives it
        lambda: load_config(
            yaml_file(
                "".join(f"{part}: " + "{" for part in name.split(".")[:-1])
                + f"{name.split('.')[-1]}: {text}"
                + "}" * name.count(".")
            )
        ),
    ):
        with pytest.raises(ConfigError, match=rf"^{name} = "):
            read()


@pytest.mark.parametrize("text", ["010", "0x10", "1:30", "1_000", "2024-01-01", "no", "on", "y"])
def test_case_33_what_is_no_plain_number_is_text_where_text_is_wanted(text):
    assert load_config(None, parse_assignments([f"facts.source={text}"])).facts.source == text


def test_case_33_a_list_of_numbers_too():
    with pytest.raises(ConfigError, match="seeds"):
        validate(CompareSettings, {"seeds": ["010"]})
    assert validate(CompareSettings, {"seeds": ["10", "1e1"][:1], "coefs": ["1e-1", "2"]}).coefs == (0.1, 2.0)


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("on", True), ("True", True), ("no", False), ("off", False)]
)
def test_case_33_a_word_is_a_boolean_only_where_one_is_wanted(text, value):
    assert load_config(None, parse_assignments([f"save_merged={text}"])).save_merged is value
    with pytest.raises(ConfigError, match=r"^learn\.epochs = "):
        load_config(None, parse_assignments([f"learn.epochs={text}"]))


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_config().method = "ft"


# What is wrong -----------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(yaml_file):
    file = yaml_file("metod: f-ft\nlearn: {epochs: many}\n")
    told = problems({"forget.coef": -0.3, "method": "f-loar"}, file)
    assert len(told) == 4
    # The file is named for what stands in it, not for what a flag gave.
    assert {line.split(" ")[0].rstrip(":") for line in told if f"({file})" in line} == {"metod", "learn.epochs"}


METHODS_IN_WORDS = "'ft', 'lora', 'f-ft', 'f-lora', 'f-lora-ft', 'locft', 'ft-c' or 'ga'"


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("forget.coef", -0.1, ["forget.coef = -0.1"]),
        ("forget.coef", "nan", ["forget.coef = 'nan'"]),
        ("forget.coef", float("inf"), ["forget.coef = inf"]),
        ("forget.coef", "much", ["forget.coef = 'much'"]),
        ("forget.coef", True, ["forget.coef = True"]),
        ("facts.limit", True, ["facts.limit = True"]),
        ("forget.epochs", 0, ["forget.epochs = 0", "1"]),
        ("method", "f-loar", ["method = 'f-loar'", *(f"'{method}'" for method in METHODS)]),
        ("forget.epoch", 3, ["forget.epoch: ", "'forget.epochs'"]),
        ("forgt", {}, ["forgt: ", "'forget'"]),
        ("coef", 1, ["coef: ", "'forget.coef'"]),
        ("lora.alpha", 1, ["lora.alpha: ", "'lora.lora_alpha'"]),
        ("learn.lora", {}, ["learn.lora: ", "'lora'"]),
        ("learn.micro_batch_size", 1, ["learn.micro_batch_size: ", "'train.micro_batch_size'"]),
        ("learn.batch_size", 10, ["train.micro_batch_size = 4", "learn.batch_size = 10"]),
        ("evaluate.protocols", [], ["evaluate.protocols = []", "token, exact, generate, prefer"]),
        ("evaluate.protocols", ["tokens"], ["evaluate.protocols = 'tokens'", "'token'"]),
        ("forget", 3, ["forget = 3"]),
    ],
)
def test_a_problem_names_the_setting_its_value_and_what_is_near(name, value, named):
    (problem,) = problems({"train.micro_batch_size": 4 if name == "learn.batch_size" else None, name: value})
    assert [part for part in named if part not in problem] == []


def test_unknown_name_far_from_all_lists_what_is_known():
    (problem,) = problems({"forget.zzz": 1})
    assert [name for name in ("forget.zzz", *ForgetSection.model_fields) if name not in problem] == []


def test_setting_below_a_value():
    assert problems({"method": "ft", "method.name": "ft"}) == [
        "method.name: 'method' is a single value ('ft'), not a section of settings."
    ]


@pytest.mark.parametrize("assignment", ["forget.epochs", "=6", "forget.epochs={"])
def test_assignment_that_is_none(assignment):
    with pytest.raises(ConfigError, match=f"--set {assignment}"):
        parse_assignments([assignment])


@pytest.mark.parametrize(
    ("content", "message"), [(b"a: [1", "read as YAML"), (b"\xff\xfe", "as YAML in UTF-8"), (b"- a", "found a list")]
)
def test_file_that_is_no_config(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_file_that_might_never_end(tmp_path):
    with pytest.raises(ConfigError, match="/dev/zero"):
        load_config(Path("/dev/zero"))
    large = tmp_path / "large.yaml"
    large.write_text("#" * (MOST_BYTES + 1))
    with pytest.raises(ConfigError, match=r"large\.yaml"):
        load_config(large)


def test_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file"):
        load_config(tmp_path / "no.yaml")


def test_other_kinds_of_settings_name_their_own():
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        validate(StageSettings, {"epoch": 1})


def test_micro_batches_need_to_divide_only_the_batches_of_stages_that_run():
    given = {"train.micro_batch_size": 6, "learn.batch_size": 12}
    assert load_config(None, {**given, "method": "ft"}).learning.micro_batch_size == 6
    assert "forget.batch_size" in problems({**given, "method": "f-ft"})[0]
    assert "teach.batch_size" in problems({**given, "method": "ft", "teach.epochs": 1})[0]


# What is told about settings ---------------------------------------------------------------------


def test_every_setting_is_described():
    rows = {name: (default, text) for name, default, text in describe(RunConfig)}
    assert rows["forget.coef"][0] == "0.3"
    assert rows["facts.limit"][0] == "null"
    assert all(text for _default, text in rows.values())
    given = {re.sub(r"^(forget|learn|train)\.", "", name) for name in rows}
    assert set(ForgetSettings.model_fields) - {"lora", "unlearn"} <= given


# The paper's configs ------------------------------------------------------------------------------

# Sections 5.1 to 5.3 and A.2: coefficients of f-ft, f-lora, f-lora-ft; the rate; what LoRA adapts (5.8).
PAPER = {
    "zsre-llama-2-7b": ((0.3, 0.7, 3), 5e-5, "query-value"),
    "zsre-llama-7b": ((0.3, 0.7, 2), 5e-5, "query-value"),
    "zsre-bloom-7b": ((0.2, 0.1, 3), 5e-5, ["query_key_value"]),
    "counterfact-llama-2-7b": ((0.1, 1.5, 3), 5e-5, "query-value"),
    "counterfact-llama-7b": ((0.05, 1, 3), 1e-5, "query-value"),
}


def paper_config(file: Path, flags: str = "") -> RunConfig:
    """The config that `update --config FILE` gives with flags of the file's comments."""
    given: list[str] = []
    words = iter(flags.split())
    for flag in words:
        name = {"--method": "method=", "--coef": "forget.coef=", "--set": ""}[flag]
        given.append(name + next(words))
    return load_config(file, parse_assignments(given))


def commented_flags(file: Path) -> dict[str, str]:
    """Method to the flags that the file's comments give for it."""
    comments = "\n".join(re.findall(r"^#(.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE))
    found = re.findall(r"--method (\S+)((?:\s+--(?:set|coef) \S+)*)", comments)
    return {method: f"--method {method}{more}" for method, more in found}


def test_the_papers_configs_are_there():
    assert [file.stem for file in CONFIGS] == sorted(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_has_the_papers_settings(name):
    file = ROOT / "configs" / "paper" / f"{name}.yaml"
    (f_ft, f_lora, f_lora_ft), rate, targets = PAPER[name]
    flags = commented_flags(file)
    assert set(flags) == {"ft", "lora", "f-lora", "f-lora-ft"} | ({"ft-c"} if "llama" in name else set())
    coefs = {"f-ft": f_ft, "f-lora": f_lora, "f-lora-ft": f_lora_ft}
    for method in ("f-ft", "ft", "lora", "f-lora", "f-lora-ft"):
        config = paper_config(file, flags.get(method, ""))
        assert config.method == method
        assert config.forget.coef == coefs.get(method, f_ft)
        assert config.facts.old_from == (("pred",) if name.startswith("zsre") else ("answers",))
        assert config.model.prompt_template == "alpaca"
        assert not config.forget.only_known
        assert (config.train.answers, config.train.wordings, config.keep.weight) == ("bare", False, 0)
        for stage in (config.teaching, config.forgetting, config.learning):
            assert (stage.epochs, stage.learning_rate, stage.batch_size, stage.micro_batch_size) == (3, rate, 16, 4)
        for adapted in (config.forgetting, config.learning):
            assert adapted.lora.target_modules == targets
            assert adapted.lora_rate(4096) == rate


@pytest.mark.parametrize("name", [name for name in PAPER if "llama" in name])
def test_ft_c_of_the_paper_trains_one_layer_in_five_steps_a_fact(name):
    file = ROOT / "configs" / "paper" / f"{name}.yaml"
    learn = paper_config(file, commented_flags(file)["ft-c"]).learn
    assert (learn.modules, learn.epochs, learn.batch_size, learn.learning_rate) == ("layers.21", 5, 1, 5e-5)


def test_the_old_answer_of_the_papers_zsre_is_pred(shared_data, tiny_model, char_tokenizer):
    """Which side is old shows in the scores: with `answers` in its place the same update has other means."""
    source = shared_data("zsre.json")
    records = json.loads(source.read_text(encoding="utf-8"))[:100]
    # Without the wrapper, which is long for a tokenizer of characters; rates for a model of 20,000 weights.
    places = {"model.prompt_template": "plain", "evaluate.protocols": ["token"]}
    for stage in ("forget", "learn"):
        places |= {f"{stage}.epochs": 1, f"{stage}.learning_rate": 5e-3, "train.micro_batch_size": 16}
    means = {}
    for old in ("pred", "answers"):
        config = load_config(ROOT / "configs/paper/zsre-llama-2-7b.yaml", places)
        facts = forgetlearn.read_facts(source, old_from=old, limit=100)
        if (old,) == config.facts.old_from:
            assert [fact.prompt for fact in facts] == [record["src"] for record in records]  # none is left out
            assert [fact.ground_truth for fact in facts] == [record["pred"].strip() for record in records]
            assert [fact.target_new for fact in facts] == [record["alt"].strip() for record in records]
        lm = forgetlearn.wrap(tiny_model(), char_tokenizer, config.model)
        forgetlearn.forget(lm, facts, config.forgetting, "all weights")
        forgetlearn.learn(lm, facts, config.learning, "all weights")
        scores = forgetlearn.summarise(forgetlearn.score(lm, facts, phase="updated", settings=config.evaluate))
        means[old] = {name: scores[name]["token"].mean for name in ("reliability", "generality", "residue")}
    assert config.facts.old_from == ("pred",)
    assert all(means["pred"][name] != means["answers"][name] for name in means["pred"])


@pytest.mark.parametrize("name", ["zsre-llama-2-7b", "counterfact-llama-7b"])
def test_a_paper_config_runs_on_a_lab_base_in_the_place_of_its_model(small_lab, tmp_path, name):
    """With another model, other facts, and the epochs and rates that suit a small base."""
    lab_like = {"teach.epochs": 6, "forget.epochs": 6, "learn.epochs": 40}
    lab_like |= {f"{stage}.learning_rate": 5e-3 for stage in ("teach", "forget", "learn")}
    lab_like |= {"lora.learning_rate": 1e-2}
    places = {"model.name": str(small_lab), "facts.source": str(small_lab / "facts.jsonl"), "facts.limit": 6}
    places |= {"model.base_model_id": None, "facts.old_from": "answers", "model.prompt_template": "plain"}
    config = load_config(ROOT / f"configs/paper/{name}.yaml", {**lab_like, **places})
    result = forgetlearn.update(config=config, output=tmp_path / "run")
    facts = result.summary.facts
    assert facts.used == 6
    assert facts.known > 0
    stages = disk.read_json(result.output / "manifest.json")["stages"]
    assert stages["forget"]["facts"] == stages["learn"]["facts"] == 6
    assert result.summary.phases["updated"]["reliability"]["token"].mean > 50
