"""Rows of the table: which plain rows each method is compared with."""

from __future__ import annotations

from types import SimpleNamespace

from forgetlearn.comparison.grid import CompareSettings, cells_of
from forgetlearn.comparison.table import _baselines
from forgetlearn.config.schema import ForgetSettings, RunConfig


def baselines_of(forget_epochs: int) -> dict[str, dict[str, str]]:
    """Label of each row to the labels of the rows that it is compared with, by budget."""
    settings = CompareSettings(epochs=(2, 4), seeds=(0,), coefs=(1.0,), budgets=("equal-epochs", "equal-steps"))
    config = RunConfig(forget=ForgetSettings(epochs=forget_epochs))
    groups = [SimpleNamespace(first=cell) for cell in cells_of(settings, config)]
    return {
        group.first.label: {
            budget: plain.first.label for budget, plain in _baselines(group, groups, settings, config).items()
        }
        for group in groups
    }


def test_each_row_is_paired_with_plain_rows_of_its_epochs_and_of_its_steps():
    found = baselines_of(3)
    assert len(found) == 2 * 2 * 2 + 3 * 2
    for epochs in (2, 4):
        for method, plain in (("f-ft", "ft"), ("f-lora", "lora"), ("f-lora-ft", "ft")):
            assert found[f"{method}-coef1-{epochs}epochs"] == {
                "equal-epochs": f"{plain}-{epochs}epochs",
                "equal-steps": f"{plain}-{epochs + 3}epochs-equal-steps",
            }
    assert all(found[label] == {} for label in found if label.startswith(("ft-", "lora-")))


def test_a_plain_row_that_has_as_many_epochs_anyway_is_the_one_of_equal_steps():
    found = baselines_of(2)  # 2 of forgetting and 2 of learning are as many as the 4 of learning alone
    assert found["f-ft-coef1-2epochs"] == {"equal-epochs": "ft-2epochs", "equal-steps": "ft-4epochs"}
    assert found["f-ft-coef1-4epochs"] == {"equal-epochs": "ft-4epochs", "equal-steps": "ft-6epochs-equal-steps"}
