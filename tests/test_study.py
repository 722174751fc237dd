"""The programs of the study (`make study`): every part of its config is a comparison that can be filled, and tables
say what the cells say."""

import json
import sys
from pathlib import Path

import pytest

from forgetlearn.comparison.grid import CompareSettings, cells_of
from forgetlearn.config.base import validate
from forgetlearn.config.schema import RunConfig, load_config
from forgetlearn.lab.build import LabSettings
from forgetlearn.storage import disk

DRAWS = True  # looks at plots
ROOT = Path(__file__).parents[1]
QUANTITIES = {"reliability": "token", "locality": "agreement"}
LAB = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "epochs": 40,
    "learning_rate": 0.01,
    "vocab_size": 400,
}
SMALL = """
files: [facts.jsonl]
tied: [true, false]
device: cpu
update: {forget.epochs: 3, learn.epochs: 6, forget.only_known: false, evaluate.protocols: [token, exact]}
chosen: [f-ft head 2]
plotted: [ft, f-ft head 2]
names: {f-ft head 2: "head, twice"}
parts:
  plain: &plain
    facts: {start: 1, limit: 4}
    base_seed: 0
    update: {learn.learning_rate: 0.003}
    lab: {LAB}
    compare: {methods: [ft, f-ft], coefs: [1], seeds: [0, 1], epochs: [3, 6]}
    variants: {tied: {head: {modules: head, coefs: [2]}}}
  plainer:
    <<: *plain
    tied: [true]
    label: faster
    update: {learn.learning_rate: 0.01}
    compare: {methods: [ft], coefs: [1], seeds: [0, 1], epochs: [6]}
    variants: {}
"""


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Runs bench/study.py with flags, on the bases of SMALL."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("FORGETLEARN_CACHE", str(tmp_path / "cache"))
    import study

    config = tmp_path / "small.yaml"
    config.write_text(
        SMALL.replace("LAB", json.dumps(LAB | {"epochs": 40, "learning_rate": 0.01, "vocab_size": 400})[1:-1])
    )

    def run(data, *flags):
        monkeypatch.setattr(
            sys, "argv", ["study.py", str(data), "--config", str(config), "--output", str(tmp_path / "out"), *flags]
        )
        study.main()

    return run


def rows_of(folder):
    """Means of the updated model, in percent."""
    summary = disk.read_json(folder / "summary.json")["phases"]["updated"]
    return {name: summary[name][protocol]["mean"] for name, protocol in QUANTITIES.items()}


def test_the_study_fills_goes_on_and_tabulates(study, tmp_path, small_lab, capsys):
    study(small_lab, "--only", "facts-tied-plain")  # another one begins like this
    assert not (tmp_path / "out" / "facts-tied-plainer").exists()
    study(small_lab, "--only", "facts-tied")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("facts-tied-plain", "facts-tied-plainer", "study.md", "study-plain.svg"),
    }
    text = (out / "study.md").read_text()
    assert "untied" not in text
    table = {}
    for line in text.split("`exact`")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        table[cells[0] if cells else ""] = cells
    assert {"ft", "ft faster", "f-ft 1", "head, twice"} <= table.keys()
    cells = out / "facts-tied-plain" / "cells"
    for label, name in (("f-ft 1", "f-ft-coef1"), ("head, twice", "f-ft-head-coef2")):
        ours, plain = ([rows_of(cells / f"{own}-6epochs-seed{seed}") for seed in (0, 1)] for own in (name, "ft"))
        for column, quantity in ((3, "reliability"), (5, "locality")):
            difference = sum(one[quantity] - two[quantity] for one, two in zip(ours, plain, strict=True)) / 2
            assert float(table[label][column].strip("*").split(" ")[0]) == pytest.approx(difference, abs=0.051), label
    filled = {path: path.stat().st_mtime_ns for path in out.glob("*/cells/*/manifest.json")}
    assert len(filled) == 12 + 2
    study(small_lab)  # the other base too; what is done is not done again
    assert filled.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*/cells/*/manifest.json")}.items()
    assert "facts-untied-plain" in (out / "study.md").read_text()
    (out / "study.md").unlink()
    capsys.readouterr()
    study(small_lab, "--tables", "--only", "facts-tied-plainer")
    assert "facts-untied-plain" in capsys.readouterr().out  # tables are of all that is there


def test_what_the_old_and_the_new_vector_share(study, monkeypatch, tmp_path, small_lab):
    import study_overlap

    output = tmp_path / "overlap.md"
    words = ["study_overlap.py", str(small_lab), "--config", str(tmp_path / "small.yaml"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "facts-tied-plain", "--seeds", "0,1"])
    study_overlap.main()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.read_text().splitlines()[2:]]
    numbers = {part: (count, *cells) for _base, part, count, *cells in rows}
    assert set(numbers) == {
        "head",
        "attention",
        "mlp",
        "norms",
        "head: old answers",
        "head: others",
        "head: in no fact",
    }
    counts = {part: int(told[0].replace(",", "")) for part, told in numbers.items()}
    assert counts["head: old answers"] + counts["head: others"] == counts["head"]
    assert counts["head: old answers"] % LAB["hidden_size"] == 0
    assert 0 < counts["head: in no fact"] < counts["head: others"]
    old, new, cosine, multiple = (float(cell.split(" ± ")[0]) for cell in numbers["mlp"][1:])
    assert multiple == pytest.approx(cosine * new / old, abs=0.05)
    assert old > 0


def test_a_base_that_the_study_does_not_have(study, small_lab, capsys):
    with pytest.raises(SystemExit):
        study(small_lab, "--only", "zsre")
    assert "no base of" in capsys.readouterr().err


def test_the_committed_tables_are_those_of_the_program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import study

    text = (ROOT / "bench" / "results" / "study.md").read_text(encoding="utf-8")
    assert text.startswith(f"{study.HEAD}\n\n## ")
    names = {base.name for base in study.bases_of(study.read_study(ROOT / "configs" / "study" / "study.yaml"))}
    names.add("zsre-tied-keep")  # facts to keep, measured at commit b367f76
    assert {line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")} <= names


@pytest.mark.parametrize(("name", "parts"), [("study.yaml", 18), ("gpu.yaml", 1)])
def test_every_part_of_the_committed_studies_can_be_compared(monkeypatch, name, parts):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from study import bases_of, read_study
    from study_tables import Row

    study = read_study(ROOT / "configs" / "study" / name)
    assert len(study["parts"]) == parts
    assert all(LabSettings(**dict(base.lab)) for base in bases_of(study))
    labels = set()
    for part in study["parts"].values():
        run = load_config(None, study["update"] | part["update"])
        assert isinstance(run, RunConfig)
        for tied in ("tied", "untied"):
            variants = part["variants"].get(tied, {})
            settings = validate(CompareSettings, part["compare"] | {"variants": variants})
            cells = cells_of(settings, run)
            assert cells
            labels |= {Row(cell, part.get("label", "")).label for cell in cells}
    told = {*study["chosen"], *study["plotted"], *(study["names"] if name == "study.yaml" else ())}
    assert not told - labels
