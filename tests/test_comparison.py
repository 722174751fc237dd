"""The pages of a comparison: the verdict claims no more than was measured, and plots show the table's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from comparison_folder import NASTY, make_comparison
from forgetlearn.cli.main import main
from forgetlearn.comparison.grid import CompareSettings, cells_of
from forgetlearn.comparison.table import write_table
from forgetlearn.config.schema import RunConfig
from forgetlearn.report import comparison_page, plots
from forgetlearn.report.comparison_page import CellAnswers
from forgetlearn.report.table import Table, TableRow
from forgetlearn.storage.records import Input, Row

DRAWS = True  # looks at plots
SETTINGS = CompareSettings(
    methods=("ft", "f-ft", "f-lora"),
    coefs=(0.3, 1.0),
    seeds=(0, 1),
    epochs=(2, 5),
    budgets=("equal-epochs", "equal-steps"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_comparison(tmp_path_factory.mktemp("comparison") / "out", SETTINGS, 30)


@pytest.fixture(scope="module")
def data(folder):
    return write_table(folder)


def make_row(label, mean, difference=None, **more):
    """A row whose average differs from the baseline's by a mean, low, high and p-value."""
    method, coef = label.split("-coef")[0], label.split("-coef")[1:]
    row = {"label": label, "method": method, "variant": "", "coef": float(coef[0]) if coef else None, "epochs": 3}
    row |= {"budget": "equal-epochs", "overall": estimate(mean, mean - 1, mean + 1), "scores": {}}
    row |= {"forgotten": None, "against": {}}
    if difference:
        own = estimate(*difference[:3]) | {"p_value": difference[3]}
        against = {"label": "ft", "name": "ft", "overall": own, "differences": {"reliability.token": own}}
        row["against"] = {"equal-epochs": against}
    return TableRow.model_validate(row | more)


def make_table(*rows, **more):
    told = {"seeds": [0, 1], "overall": ["reliability.token"], "rows": list(rows), "unpaired": [], "curves": None}
    return Table.model_validate(told | more)


def estimate(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high, "n_seeds": 1, "n_facts": 2, "n_scores": 2}


PLAIN = make_row("ft", 50.0)


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        (
            (2.0, -1.0, 5.0, 0.2),
            "+2.0 [-1.0, +5.0] points against ft with as many epochs, an interval that includes zero",
        ),
        ((2.0, 0.1, 3.9, 0.03), "an interval without zero, but not by enough for the best of many"),
        ((2.0, 0.9, 3.1, 0.001), "which holds for all comparisons made here"),
        ((2.0, None, None, 0.001), "+2.0 points against ft with as many epochs, without an interval"),
    ],
)
def test_the_verdict_says_how_sure_it_is(difference, says):
    other = make_row("f-ft-coef0.3", 51.0, (1.0, -1.0, 3.0, 0.4))
    sentence, remarks = comparison_page.verdict(make_table(PLAIN, other, make_row("f-ft-coef1", 52.0, difference)))
    assert sentence.startswith("f-ft, coef 1 scores highest, 52.0 % on average of reliability: ")
    assert says in sentence
    assert any(remark.startswith("2 comparisons with plain fine-tuning were made") for remark in remarks)


def test_facts_that_a_row_did_not_learn_are_counted():
    other = make_row("f-ft-coef1", 52.0).model_copy(update={"unlearned": 2})
    _sentence, remarks = comparison_page.verdict(make_table(PLAIN, other))
    assert "f-ft, coef 1: 2 facts were not learned when learning ended." in remarks


def test_the_verdict_when_plain_fine_tuning_is_best():
    other = make_row("f-ft-coef1", 49.0, (-1.0, -3.0, 1.0, 0.3))
    sentence, _remarks = comparison_page.verdict(make_table(PLAIN, other))
    assert sentence.startswith("Plain fine-tuning scores highest, 50.0 % on average of reliability (ft)")
    assert "f-ft, coef 1, has 49.0 %: -1.0 [-3.0, +1.0] points against ft" in sentence


def test_the_verdict_without_baseline_or_scores():
    alone = make_table(make_row("f-lora-coef1", 49.0), seeds=[0], unpaired=[{"method": "f-lora", "plain": "lora"}])
    sentence, remarks = comparison_page.verdict(alone)
    assert "nothing was paired with plain fine-tuning" in sentence
    assert "one seed" in remarks[0]
    assert "f-lora is compared with lora, which is not among the methods here" in remarks[1]
    nothing = make_row("ft", 0.0, overall=None)
    assert "Reliability was not scored" in comparison_page.verdict(make_table(nothing))[0]


def test_the_front_by_hand():
    def row(label, reliability, locality):
        scores = {"reliability.token": estimate(reliability), "locality.agreement": estimate(locality)}
        return make_row(label, 0.0, scores=scores)

    rows = [row("ft", 80.0, 70.0), row("lora", 40.0, 90.0), row("f-ft-coef1", 79.0, 69.0), row("ga-coef1", 80.0, 60.0)]
    data = make_table(*rows, overall=["reliability.token", "locality.agreement"])
    front = comparison_page.front_of(data)
    assert [row.label for row in front] == ["ft", "lora"]
    ((x, y, lines, marked),) = comparison_page.trade_offs(data, front)
    assert (x, y) == ("reliability (token)", "locality (agreement)")
    assert [(point.x, point.y) for point in marked] == [(80.0, 70.0), (40.0, 90.0)]
    assert list(lines) == ["ft", "lora", "f-ft", "ga"]


def test_coefficient_curves_are_the_tables_numbers(data):
    panels = {panel.title: panel for panel in comparison_page.coefficient_panels(data)}
    lost = panels["old answers lost (contains)"]
    assert {line: [(coef, cell.mean) for coef, cell in points] for line, points in lost.lines.items()} == {
        "f-ft": [(0.3, pytest.approx(15)), (1.0, pytest.approx(50))],
        "f-lora": [(0.3, pytest.approx(15)), (1.0, pytest.approx(50))],
    }
    assert [cell.mean for _coef, cell in panels["locality (agreement)"].lines["f-ft"]] == pytest.approx([90, 90])
    rows = {row.label: row.scores for row in data.rows}
    learned = panels["reliability (contains)"]
    assert [cell for _coef, cell in learned.lines["f-ft"]] == [
        rows[f"f-ft-coef{coef}-5epochs"]["reliability.contains"] for coef in ("0.3", "1")
    ]
    assert learned.plain == {"ft": rows["ft-5epochs"]["reliability.contains"]}


def test_equal_steps_that_are_other_epochs_are_trained_once(data):
    labels = [cell.label for cell in cells_of(SETTINGS, RunConfig()) if cell.method == "ft" and cell.seed == 0]
    assert sorted(labels) == ["ft-2epochs", "ft-5epochs", "ft-8epochs-equal-steps"]  # 3 of forgetting: 5 is there
    rows = {row.label: row for row in data.rows}
    against = rows["f-ft-coef1-2epochs"].against
    assert {budget: entry.label for budget, entry in against.items()} == {
        "equal-epochs": "ft-2epochs",
        "equal-steps": "ft-5epochs",
    }


def test_what_cannot_be_paired_is_said(folder, data):
    assert [(each.method, each.plain) for each in data.unpaired] == [("f-lora", "lora")]
    assert not next(row for row in data.rows if row.method == "f-lora").against
    for name in ("compare.md", "report.html"):
        assert "which is not among the methods here" in (folder / name).read_text(encoding="utf-8")


def test_facts_across_cells():
    def asked(said, reliability, residue=0.0):
        row = Row(
            fact="f",
            phase="updated",
            protocol="generate",
            errors={},
            reliability=reliability,
            residue=residue,
            said=said,
        )
        return CellAnswers.of(Path(), [row]).by_fact

    answers = {"ft": [asked("Rome", 0.0, 1.0), asked("Oslo", 0.0)], "f-ft": [asked("Bern", 1.0), asked("", 0.0)]}
    line = comparison_page.fact_line(Input(id="f", prompt="p", target_new="t"), answers, {"ft": None, "f-ft": "ft"})
    assert [mark.text for mark in line.marks] == ["△○", "●○"]
    assert line.marks[1].title == "new in 1 of 2, said: Bern; (nothing)"
    assert line.flags == ["gained", "residue"]


def test_the_page_refers_to_nothing_and_shows_markup_as_text(folder, data):
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>document" not in source
    assert not re.findall(r"https?:", source)
    assert not re.findall(r"#0[a0]000\d", source)  # every colour is the page's
    assert NASTY not in source


def test_made_again_from_the_folder_it_is_the_same(folder, data, capsys):
    before = {name: (folder / name).read_bytes() for name in ("report.html", "compare.md", "compare.json")}
    for name in before:
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_one_method_one_coefficient_one_seed(tmp_path):
    settings = CompareSettings(methods=("f-ft",), coefs=(0.5,), seeds=(0,))
    write_table(make_comparison(tmp_path / "out", settings, 4))
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "No row has plain fine-tuning to be paired with." in source
    assert "With one seed" in source


def test_every_method_has_its_own_look():
    styles = plots.styles(["f-ft", "ft", "lora", "f-lora", "f-lora-ft", "locft", "ft-c", "ga"])
    assert len({style.colour for style in styles.values()}) == 8
    assert (styles["ft"].place, styles["lora"].place) == (0, 1)
