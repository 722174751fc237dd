"""Reports: text of facts and models stays text, numbers are traceable, pages need nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from forgetlearn.cli.main import main
from forgetlearn.config.schema import load_config
from forgetlearn.errors import RunError
from forgetlearn.report import plots, run_page
from forgetlearn.storage import disk, run_folder
from forgetlearn.storage.records import Input, Row
from written_by_hand import change_manifest, fact_counts, seal

DRAWS = True  # looks at plots
NASTY = "<script>alert(\"x\")</script> & 'q' | `c` *b* [l](http://evil.example) \x1b[31mred\x07 \u202egnp"
CELL = {"mean": 78.44, "low": 75.1, "high": 81.5, "n": 2, "errored": 0, "not_asked": 0}
NOTHING = {"mean": None, "low": None, "high": None, "n": 0, "errored": 2, "not_asked": 0}


class Page(HTMLParser):
    """The text of a page, its elements, and everything that they refer to."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.scripts, self.references = "", 0, []
        self.feed(source)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _value in attrs)


def make_run(
    path: Path, *, said: str = "new", cell: dict | None = CELL, protocols: tuple = ("token", "generate", "contains")
) -> Path:
    """A finished run of two facts, made by hand; the first is nasty, the second has no old answer."""
    run = run_folder.RunFolder.create(path, load_config(None, {"model.name": "base"}).model_dump(mode="json"), {})
    inputs = [
        {"id": "a", "prompt": NASTY, "target_new": NASTY, "ground_truth": NASTY + "\nsecond line"},
        {"id": "b", "prompt": "The capital is", "target_new": "new"},
    ]
    phases = ("base", "updated")
    rows = [
        {
            "fact": fact,
            "phase": phase,
            "protocol": "generate",
            "said": text,
            "reliability": score,
            "residue": 0.0,
            "errors": e,
        }
        for phase in phases
        for fact, text, score, e in [("a", NASTY, 0.0, {"locality": NASTY}), ("b", said, 1.0, {})]
    ]
    quantities = ("reliability", "generality", "residue")
    scores = {quantity: dict.fromkeys(protocols, cell) for quantity in quantities}
    scores["locality"] = {"agreement": cell}
    facts = fact_counts(2, source=NASTY, read=3, known=1, forgotten=None, left_out={"old_equals_new": 1})
    summary = {"method": "f-lora", "coef": 0.3, "seed": 0, "facts": facts, "product": "adapter"}
    disk.write_rows(path / "facts.jsonl", rows)
    disk.write_rows(path / "inputs.jsonl", inputs)
    disk.write_json(path / "summary.json", summary | {"phases": dict.fromkeys(phases, scores)})
    (path / "logs").mkdir()
    disk.write_rows(path / "logs/learn.jsonl", [{"step": n, "loss": 1 / n} for n in range(1, 5)])
    run.finish()
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    path = make_run(tmp_path / "run")
    run_page.write_run(path)
    return path


def test_html_shows_markup_as_text(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    shown = NASTY.replace("\x1b", "�").replace("\x07", "�").replace("\u202e", "�")
    assert page.text.count(shown) == 7  # prompt, old, new, two phases; an error; the source
    assert page.scripts == 1  # our own
    assert "second line" in page.text


def test_html_refers_to_nothing_outside(run):
    source = (run / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert all(reference.startswith("#") for reference in page.references), page.references
    assert "url(http" not in source
    assert "default-src 'none'" in source
    assert source.count("<svg") == 5  # a plot per quantity, and the training loss
    assert not re.findall(r"https?:", source.replace("http://evil.example", ""))  # not even a namespace


def test_markdown_shows_markup_as_text(run):
    source = (run / "report.md").read_text(encoding="utf-8")
    row = next(line for line in source.splitlines() if line.startswith("| &lt;script&gt;"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6  # a border more than prompt, old, new and two phases
    assert (
        "&lt;script&gt;alert(\"x\")&lt;/script&gt; &amp; 'q' \\| \\`c\\` \\*b\\* \\[l\\](`http://evil.example)`" in row
    )
    assert "second line |" in row
    assert "<script>" not in source


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_nothing_steers_a_terminal(run, name):
    text = (run / name).read_text(encoding="utf-8")
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_scripts_that_join_letters_are_kept(tmp_path):
    persian = "می\u200cخواهم"
    make_run(tmp_path / "run", said=f"{persian}\u00a0👩\u200d🔬")
    run_page.write_run(tmp_path / "run")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert persian in text
        assert "👩\u200d🔬" in text


def test_numbers_carry_protocol_interval_and_count(run):
    source = (run / "report.md").read_text(encoding="utf-8")
    assert "| reliability (contains) |" in source
    assert "(token)" not in source  # free answers were scored
    assert "| updated | 78.4 [75.1, 81.5] |" in source
    assert "over 2 facts" in source
    assert "3 records read" in source
    assert "left out, old\\_equals\\_new: 1" in source


def test_made_again_it_is_the_same(run):
    before = {name: (run / name).read_bytes() for name in ("report.md", "report.html")}
    for name in before:
        (run / name).unlink()
    run_page.write_run(run)
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("cell", "protocols", "sentence"),
    [
        (CELL, ("token", "generate"), "gives the new answer to 2 of 2 prompts, answers 78.4 % of unrelated tokens"),
        (CELL, ("token", "contains"), "gives the new answer to 2 of 2 prompts, answers 78.4 % of unrelated tokens"),
        (CELL, ("token",), "gives 78.4 % of the new answers' tokens"),
        (CELL, ("prefer",), "The updated model answers 78.4 % of unrelated tokens as before."),
        (NOTHING, ("token", "generate"), "The updated model was scored on 2 facts."),
    ],
)
def test_verdict(tmp_path, cell, protocols, sentence):
    make_run(tmp_path / "run", cell=cell, protocols=protocols)
    run_page.write_run(tmp_path / "run")
    assert sentence in run_page.load_page(tmp_path / "run").overview.verdict


def inputs(keys: str, **answers: str) -> list[Input]:
    return [Input.model_validate({"id": key, "prompt": "p", "target_new": "t"} | answers) for key in keys]


def test_states_of_facts():
    def row(fact, **more):
        told = {"fact": fact, "phase": "updated", "protocol": "generate", "said": "x", "errors": {}} | more
        return Row.model_validate(told)

    rows = [row("a", reliability=1.0), row("b", reliability=0.0, residue=1.0), row("c", reliability=0.0, residue=0.0)]
    rows.append(row("d", reliability=None, errors={"reliability": "too long"}))
    table = run_page.fact_table(inputs("abcd"), rows, ["base", "updated"])
    assert [fact.state for fact in table] == ["new", "old", "other", "errored"]
    assert table[0].said == {"base": None, "updated": "x"}


@pytest.mark.parametrize(
    ("protocols", "judge", "states"),
    [
        (("token", "prefer"), "token", ["new", "old", "other"]),
        (("prefer", "token", "exact"), "exact", ["new", "old", "other"]),
        (("exact", "generate", "contains"), "contains", ["new", "old", "other"]),
        ((), None, ["not asked"] * 3),
    ],
)
def test_without_free_answers_teacher_forced_ones_judge(protocols, judge, states):
    scores = {"a": (1.0, 0.5), "b": (0.5, 0.5), "c": (0.5, 0.0)}  # half of the new answer's tokens is not the answer
    rows = [
        Row(fact=fact, phase="updated", protocol=p, errors={}, reliability=score, residue=residue)
        for fact, (score, residue) in scores.items()
        for p in protocols
    ]
    assert run_page.judged_by(rows) == judge
    assert [fact.state for fact in run_page.fact_table(inputs("abc"), rows, ["updated"])] == states


def test_flags_and_other_answers_of_a_fact():
    row = {"fact": "a", "phase": "updated", "errors": {}}
    said = {"protocol": "generate", "said": "Rome", "reliability": 1.0, "residue": 0.5, "generality": 0.25}
    rows = [row | said | {"said_rephrased": ["Oslo", "Rome", "", "Oslo"]}]
    rows.append(row | {"protocol": "agreement", "locality": 0.9, "errors": {"locality": "too long"}})
    rows = [Row.model_validate(own) for own in rows]
    probes = [{"prompt": "Where is Bonn?", "answer": "Germany"}, {"prompt": "Who is he?", "answer": "Bo"}]
    asked = inputs("a", target_new="rome.", ground_truth="Oslo", locality=probes)
    (fact,) = run_page.fact_table(asked, rows, ["updated"])
    assert fact.probes == "Where is Bonn?; Who is he?"
    assert fact.flags == fact.shown_flags == ["residue", "broken", "errored"]
    assert fact.rephrased == "Oslo (2), (nothing)"
    assert fact.which == {"updated": "new"}
    assert [mark.text for mark in fact.marks] == ["●", "◐", "!", "◐"]


@pytest.mark.parametrize(
    ("said", "writes_on", "which"),
    [
        ("It is now New York.", False, "new"),
        ("It is York.", False, "old"),
        ("It is York.", True, None),
        ("York, and the next", True, "old"),
        ("It was York and is New York.", False, "new"),
        (None, False, None),
    ],
)
def test_which_answer_a_text_says(said, writes_on, which):
    row = Row(fact="a", phase="updated", protocol="generate", errors={}, said=said, writes_on=writes_on)
    (fact,) = run_page.fact_table(inputs("a", target_new="New York", ground_truth="York"), [row], ["updated"])
    assert fact.which == {"updated": which}


def test_running_mean_by_hand():
    assert plots.running_mean([0, 3, 6, 3, 0], 3) == [0, 3, 4, 3, 0]
    assert plots.running_mean([0, 3, 6, 3, 1], 5) == [0, 3, 2.6, 10 / 3, 1]
    assert plots.running_mean([], 3) == []


def test_a_long_run_has_a_small_plot(tmp_path):
    for count in (500, 20_000):
        disk.write_rows(tmp_path / "learn.jsonl", [{"step": n, "loss": n % 7} for n in range(1, count + 1)])
        plot = plots.plot_losses(tmp_path)
        assert len(plot) < 60_000
        assert f"in {count} steps" in plot


def test_plots_take_the_colours_of_the_page(run):
    plots = re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(plots))
    assert "reliability in percent, base, updated: contains 78.4, 78.4; generate 78.4, 78.4" in plots[0]


PAPERS = {"f-lora": "arXiv:2311.08011", "lora": "arXiv:2106.09685", "rome": "arXiv:2202.05262"}


@pytest.mark.parametrize("method", PAPERS)
def test_a_card_names_the_paper_of_its_method(run, method):
    page = run_page.load_page(run)
    summary = page.overview.summary.model_copy(update={"method": method})
    shown = run_page.card(replace(page, overview=replace(page.overview, summary=summary)), "adapter")
    assert f"Method: {method}, " in shown
    assert [paper for paper in PAPERS.values() if paper in shown] == [PAPERS[method]]


def test_card(run):
    (run / "adapter").mkdir()
    run_page.write_card(run / "adapter", run_page.load_page(run))
    text = (run / "adapter/README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert "library_name: peft" in text
    assert "78.4 [75.1, 81.5]" in text
    assert "base_model:" not in text  # a local folder is no id


def test_card_names_its_base_on_the_hub(run):
    change_manifest(run, lambda manifest: manifest["config"]["model"].update(base_model_id="org/base"))
    for product, relation in (("adapter", "adapter"), ("model", "finetune")):
        (run / product).mkdir()
        run_page.write_card(run / product, run_page.load_page(run))
        text = (run / product / "README.md").read_text(encoding="utf-8")
        assert f'base_model: "org/base"\nbase_model_relation: {relation}\n' in text


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "facts.jsonl", "inputs.jsonl"])
def test_damaged_run_names_the_file(run, name):
    (run / name).write_text('{"cut": ')
    with pytest.raises(RunError, match=re.escape(name)):
        run_page.write_run(run)
    (run / name).unlink()
    with pytest.raises(RunError, match=re.escape(str(run))):
        run_page.write_run(run)


def test_command_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["forgetlearn", "update", "--output", "my run; rm x"])
    make_run(tmp_path / "run")
    assert run_page.load_page(tmp_path / "run").context()["command"] == "forgetlearn update --output 'my run; rm x'"


def test_yaml_of_config_is_read_back(run):
    config = json.loads((run / "manifest.json").read_text())["config"]
    import yaml

    assert yaml.safe_load(run_page.as_yaml(config)) == config


def write_again(run: Path, file: str, data: dict) -> None:
    """Write a record of a run with hashes that fit."""
    if file == "manifest.json":
        (run / file).write_text(seal(data), encoding="utf-8")
    else:
        disk.write_json(run / file, data)
        run_folder.RunFolder.open(run).finish()


@pytest.mark.parametrize("value", ["removed", None, "text", 10**400, [[]]])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        *(("manifest.json", field) for field in ("command", "config", "inputs", "versions", "machine", "stages")),
        *(("manifest.json", f"config.{field}") for field in ("model", "facts", "teach", "forget", "learn")),
        *(("summary.json", field) for field in ("method", "coef", "seed", "facts", "phases", "product")),
        *(("summary.json", f"facts.{field}") for field in ("source", "read", "used", "left_out", "known")),
        *(("summary.json", f"phases.base.reliability.token.{field}") for field in ("mean", "n", "not_asked")),
    ],
)
def test_case_27_a_strangers_run_is_reported_or_refused_by_name(tmp_path, capsys, file, field, value):
    run = make_run(tmp_path / "run")
    data = disk.read_json(run / file)
    *outer, last = field.split(".")
    inner = data
    for part in outer:
        inner = inner[part]
    if value == "removed":
        del inner[last]
    else:
        inner[last] = value
    write_again(run, file, data)
    may_be = {(None, "coef"), (None, "product"), (None, "known"), ("text", "method"), ("text", "machine")}
    may_be |= {("text", "product"), ("text", "source")}
    code = main(["report", str(run)])
    error = capsys.readouterr().err
    if str(value) != "[[]]" and (value, last) in may_be:
        assert code == 0
    else:
        assert code == 2
        assert str(run / file) in error
        assert ".".join(outer) in error
        assert last in error
        assert error.count("\n") <= 3


def test_an_interval_that_begins_at_zero_has_its_bar():
    assert plots._bars([(0.25, 0.0, 0.5), (0.5, None, None)]) == ([0.25, 0.5], [[0.25, 0.0], [0.25, 0.0]])
