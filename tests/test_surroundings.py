"""Case 31: odd names, pipes, limits of the system, the caller's modes, facts in memory: used, or one clear message."""

from __future__ import annotations

import os

import pytest
import torch

import forgetlearn
from conftest import QUICK
from forgetlearn.cli.main import main
from forgetlearn.errors import FactError
from forgetlearn.facts import as_fact_set, read_facts
from forgetlearn.storage import disk

LATIN = os.fsdecode(b"caf\xe9")  # not UTF-8


@pytest.fixture
def facts(small_lab):
    return read_facts(small_lab / "facts.jsonl", limit=2)


def test_case_31_names_that_are_not_utf_8(small_lab, facts, tmp_path, capsys):
    file, output = tmp_path / f"{LATIN}.jsonl", tmp_path / "out"
    file.write_text("".join((small_lab / "facts.jsonl").read_text().splitlines(keepends=True)[:2]))
    quick = ["--set", "evaluate.protocols=[token]", "--set", "learn.epochs=1", "--method", "lora"]
    words = ["update", "--model", str(small_lab), "--facts", str(file), "--output", str(output), *quick]
    assert main(["facts", str(file)]) == 0
    assert main(words) == 2  # a run could not write down what it read
    assert "RunError: facts.source = " in capsys.readouterr().err
    words[4] = str(small_lab / "facts.jsonl")
    assert main([*words, "--output", str(tmp_path / LATIN)]) == 2
    assert "RunError: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {file.name}


def test_case_31_a_generator_of_facts_within_inference_mode(small_lab, facts, tmp_path):
    with torch.inference_mode():
        result = forgetlearn.update(small_lab, (fact for fact in facts), QUICK, output=tmp_path / "out")
    assert result.summary.facts.used == 2
    assert disk.read_json(result.output / "manifest.json")["inputs"]["facts_sha256"] == facts.sha256()


def test_case_31_a_list_of_facts_is_a_set_of_them(facts):
    given = as_fact_set(list(facts))
    assert (given.facts, given.sha256(), given.used) == (facts.facts, facts.sha256(), 2)
    assert as_fact_set(facts) is facts
    assert as_fact_set("file.jsonl") == "file.jsonl"
    for wrong, said in (
        ([facts[0], "x"], "item 2: a str"),
        ([facts[0]] * 2, "item 2: repeats item 1"),
        ([], "the list is empty"),
        (7, "item 1: a int"),
    ):
        with pytest.raises(FactError, match=said):
            as_fact_set(wrong)


@pytest.mark.timeout(60)
def test_case_31_a_pipe_or_a_device_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "facts.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for file in (tmp_path / "facts.jsonl", tmp_path / "zero.jsonl", "/dev/zero"):
        assert main(["facts", str(file)]) == 2
        assert f"FactError: {file} is a pipe or a device" in capsys.readouterr().err


def test_case_31_names_that_are_too_long(small_lab, tmp_path, capsys):
    long = tmp_path / ("x" * 300)
    for source in (f"{long}.jsonl", str(long), "x" * 300):
        assert main(["facts", source]) == 2
        assert capsys.readouterr().err.startswith("FactError: ")
    where = ["--model", str(small_lab), "--facts", str(small_lab / "facts.jsonl"), "--output", str(long)]
    for command in ("update", "evaluate", "compare"):
        assert main([command, *where]) == 2
        assert capsys.readouterr().err.startswith("RunError: ")
    assert not list(tmp_path.iterdir())


def test_case_31_a_name_as_long_as_a_name_may_be(tmp_path):
    name = "x" * 255
    with disk.atomic_folder(tmp_path / name) as folder:
        disk.write_text(folder / name, "text")
    assert (tmp_path / name / name).read_text() == "text"
    (tmp_path / f"{disk._beginning(tmp_path / name)}left").mkdir()
    disk.remove_unfinished(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_case_31_what_the_system_refuses_is_said_without_a_traceback(monkeypatch, small_lab, capsys, error):
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("forgetlearn.runs.evaluate.load_model", fail)
    assert main(["ask", "Who?", "--model", str(small_lab)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("MemoryError: ")
    assert "ulimit" in said


def test_other_errors_are_no_want_of_memory(monkeypatch, small_lab):
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("forgetlearn.runs.evaluate.load_model", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["ask", "Who?", "--model", str(small_lab)])
