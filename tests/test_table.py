"""Rows of the table: which plain rows each method is compared with."""

from __future__ import annotations

from forgetlearn.compare import CompareSettings, cells_of
from forgetlearn.config import ForgetSettings, RunConfig
from forgetlearn.table import _baselines, _Group


def baselines_of(forget_epochs: int) -> dict[str, list[str]]:
    """Label of each row to the labels of the rows that it is compared with."""
    settings = CompareSettings(epochs=(2, 4), seeds=(0,), coefs=(1.0,), budgets=("equal-epochs", "equal-steps"))
    config = RunConfig(forget=ForgetSettings(epochs=forget_epochs))
    groups = [_Group([cell]) for cell in cells_of(settings, config)]
    return {
        group.first.label: [plain.first.label for plain in _baselines(group.first, groups, forget_epochs)]
        for group in groups
    }


def test_each_row_is_paired_with_plain_rows_of_its_epochs_and_of_its_steps():
    found = baselines_of(3)
    assert len(found) == 2 * 2 * 2 + 3 * 2
    for epochs in (2, 4):
        for method, plain in (("f-ft", "ft"), ("f-lora", "lora"), ("f-lora-ft", "ft")):
            of_steps = f"{plain}-{epochs + 3}epochs-equal-steps"
            assert sorted(found[f"{method}-coef1-{epochs}epochs"]) == [f"{plain}-{epochs}epochs", of_steps]
    assert all(found[label] == [] for label in found if label.startswith(("ft-", "lora-")))


def test_plain_rows_with_as_many_epochs_for_another_reason_are_no_baselines():
    found = baselines_of(2)  # 2 of forgetting and 2 of learning are as many as the 4 of learning alone
    assert sorted(found["f-ft-coef1-2epochs"]) == ["ft-2epochs", "ft-4epochs-equal-steps"]
    assert sorted(found["f-ft-coef1-4epochs"]) == ["ft-4epochs", "ft-6epochs-equal-steps"]
