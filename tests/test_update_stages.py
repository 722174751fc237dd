"""What an update does is computed once from its config, and both tables of kinds agree."""

import pytest

from forgetlearn.config.methods import KINDS, METHODS
from forgetlearn.config.schema import RunConfig
from forgetlearn.config.stages import Stages, stage_seed
from forgetlearn.method.kinds import STAGE_KINDS


def stages_of(**settings):
    return Stages(RunConfig.model_validate(settings))


def test_every_kind_of_stage_has_a_row_and_a_class_and_every_method_names_such_kinds():
    assert KINDS.keys() == STAGE_KINDS.keys()
    assert {kind for method in METHODS.values() for kind in (method.forgets, method.learns) if kind} == KINDS.keys()


@pytest.mark.parametrize(
    ("settings", "stages", "changes_base", "product"),
    [
        ({"method": "ft"}, ["learn: all weights"], True, "model"),
        ({"method": "lora"}, ["learn: lora"], False, "adapter"),
        ({"method": "lora", "save_merged": True}, ["learn: lora"], True, "adapter"),
        ({"method": "f-lora"}, ["forget: lora", "learn: lora"], False, "adapter"),
        ({"method": "f-lora", "forget": {"coef": 0}}, ["learn: lora"], False, "adapter"),
        ({"method": "f-lora-ft"}, ["forget: lora", "learn: all weights"], True, "model"),
        ({"method": "ga"}, ["forget: ascent", "learn: all weights"], True, "model"),
        ({"method": "subtract"}, ["forget: lora"], False, "adapter"),
        ({"method": "npo-ft"}, ["forget: npo"], True, "model"),
        ({"method": "lora", "teach": {"epochs": 1}}, ["teach: all weights", "learn: lora"], True, "adapter"),
    ],
)
def test_the_stages_of_an_update_and_what_they_change(settings, stages, changes_base, product):
    found = stages_of(**settings)
    assert [f"{stage.name}: {stage.kind.name}" for stage in found] == stages
    assert (found.changes_base, found.product) == (changes_base, product)
    assert found.needs_old_answers == any(not stage.startswith("learn") for stage in stages)
    assert f"{found.last.name}: {found.last.kind.name}" == stages[-1]
    assert ("forgotten" in found.phases) == any(stage.startswith("forget") for stage in stages)


def test_stages_have_complete_settings_and_seeds_of_their_own():
    found = stages_of(method="f-ft", seed=5, train={"adam_beta2": 0.9}, forget={"epochs": 7, "coef": "auto"})
    assert (found.forget.settings.epochs, found.forget.settings.adam_beta2) == (7, 0.9)
    assert found.learn.settings.adam_beta2 == 0.9
    assert [stage.seed for stage in found] == [stage_seed(5, "forget"), 5]
    assert found.chooses_coefficient
    assert not stages_of(method="ft", forget={"coef": "auto"}).chooses_coefficient
