"""A comparison by jobs: submitit's local executor runs what it would give to Slurm."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

import forgetlearn
from forgetlearn.cli.main import main
from forgetlearn.comparison.cells import CompareSettings
from forgetlearn.comparison.grid import Comparison, begin
from forgetlearn.comparison.slurm import Job, Jobs, fill_on_cluster
from forgetlearn.comparison.table import write_table
from forgetlearn.config.schema import load_config
from forgetlearn.errors import ConfigError, RunError
from forgetlearn.facts import read_facts
from forgetlearn.storage import run_folder

SETTINGS = CompareSettings(methods=("ft",), seeds=(0, 1))


@pytest.fixture(scope="module")
def facts(small_lab):
    return read_facts(small_lab / "facts.jsonl", limit=4)


@pytest.fixture(scope="module")
def config(small_lab):
    return load_config(small_lab / "update.yaml", {"forget.epochs": 1, "learn.epochs": 1})


@pytest.mark.slow
def test_two_jobs_do_each_cell_once(small_lab, facts, config, tmp_path):
    jobs = Jobs(2, {"timeout_min": 3, "partition": "gpu"}, "local")
    cells = fill_on_cluster(jobs, small_lab, facts, SETTINGS, config, output=tmp_path / "out")
    (row,) = write_table(tmp_path / "out").rows
    assert row.label == "ft-1epochs"
    logs = [log.read_text() for log in (tmp_path / "out" / "jobs").glob("*.err")]
    assert len(logs) == 2
    assert [sum(f"{cell.name} (" in log for log in logs) for cell in cells] == [1, 1]
    # Nothing is submitted where nothing is open.
    assert fill_on_cluster(jobs, small_lab, facts, SETTINGS, config, output=tmp_path / "out", resume=True) == cells
    assert len(list((tmp_path / "out" / "jobs").glob("*.err"))) == 2


def test_jobs_that_fail_say_why_and_leave_a_folder_to_resume(small_lab, facts, config, tmp_path, monkeypatch):
    def begin_and_lose_the_base(*args, **options):
        begun, lm = begin(*args, **options)
        gone = config.model.model_copy(update={"name": str(tmp_path / "gone")})
        return replace(begun, config=begun.config.model_copy(update={"model": gone})), lm

    monkeypatch.setattr("forgetlearn.comparison.slurm.begin", begin_and_lose_the_base)
    with pytest.raises(RunError, match=r"(?s)2 of 2 cells.*ModelError: .*gone.*--resume"):
        fill_on_cluster(Jobs(cluster="local"), small_lab, facts, SETTINGS, config, output=tmp_path / "out")
    assert run_folder.is_run(tmp_path / "out")


def test_a_job_that_is_preempted_begins_again_with_the_same(config, facts, tmp_path):
    job = Job(Comparison(tmp_path, config, facts, []))
    assert job.checkpoint().function == job


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"partion": "gpu"}, "--slurm-set: .*partion"),
        ({"timeout_min": "long"}, "--slurm-set: .*timeout_min"),
    ],
)
def test_unknown_parameters_are_refused_before_anything_is_written(small_lab, facts, tmp_path, parameters, message):
    with pytest.raises(ConfigError, match=message):
        fill_on_cluster(Jobs(1, parameters, "local"), small_lab, facts, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_is_refused(small_lab, facts, tmp_path):
    with pytest.raises(ConfigError, match="a job"):
        fill_on_cluster(Jobs(cluster="local"), forgetlearn.load_model(small_lab), facts, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "hide", "message"),
    [
        ("--slurm", True, "pip install 'forgetlearn[slurm]'"),
        ("--slurm --slurm-set partition=gpu", False, "--workers"),
        ("--slurm-set partition=gpu", False, "--slurm"),
    ],
)
def test_the_command_without_submitit_or_slurm(small_lab, tmp_path, capsys, monkeypatch, flags, hide, message):
    if hide:
        monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setenv("PATH", "")
    words = f"compare --model {small_lab} --facts {small_lab}/facts.jsonl --output {tmp_path}/out {flags}"
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert not run_folder.is_run(tmp_path / "out")
