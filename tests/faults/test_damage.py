"""Damaged files: cut short or a bit flipped, what reads them gives the undamaged result or says what is wrong."""

from __future__ import annotations

import random
import shutil

import pytest

from faults.harness import CRASHED, DAMAGES, OK, contents, differences, in_child, with_fault
from forgetlearn.errors import ForgetLearnError
from forgetlearn.products import publish
from forgetlearn.products.restore import apply_run, undo_run
from forgetlearn.report import run_page
from forgetlearn.runs.evaluate import evaluate
from forgetlearn.storage import run_folder
from forgetlearn.weights.folder_arithmetic import subtract_folders
from forgetlearn.weights.streaming import Numbers

REBUILT = ("report.md", "report.html")  # written anew by whoever reads the run
UNREAD = (".md", ".lock", ".writer.json")  # cards are for people, who may edit them


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def killed_after_stage(job, stage: str, log) -> None:
    """The job's folder as a kill just after a stage leaves it."""
    own = run_folder.RunFolder._save

    def act() -> None:
        def save(run):
            own(run)
            if stage in run.manifest.stages:
                raise KeyboardInterrupt

        run_folder.RunFolder._save = save
        job.act()

    job.clear()
    assert in_child(act, log).code == CRASHED


def damaged_resumes(job, log, tally, prepare, draw) -> None:
    """Damage each file of an unfinished run in turn, and resume."""
    job.clear()
    outcome = in_child(job.act, log)
    assert outcome.code == OK, outcome.said
    whole = job.result()
    prepare()
    kept = shutil.copytree(job.place, log.parent / "kept")
    with tally.no_loss() as lost:
        for name in [path.relative_to(kept) for path in sorted((kept / "out").rglob("*")) if path.is_file()]:
            for how, damage in DAMAGES.items():
                shutil.rmtree(job.place)
                shutil.copytree(kept, job.place)
                if (job.place / name).stat().st_size == 0 or name.name == ".lock":
                    continue
                damage(job.place / name, draw)
                outcome = in_child(job.act, log)
                tally.add("damaged files")
                when = f"{job.name}, {name} {how}"
                if outcome.code == CRASHED:
                    lost.append(f"{when}: no message, but {outcome.said}")
                differ = differences(job.result(), whole) if outcome.code == OK else []
                if [file for file in differ if not file.endswith(UNREAD)]:
                    lost.append(f"{when}: resumed, and differs: {differ}")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("stage", ["score_base", "forget", "learn"])
@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_a_run_damaged_before_it_is_resumed(jobs, log, tally, method, stage):
    job = jobs(method)
    damaged_resumes(job, log, tally, lambda: killed_after_stage(job, stage, log), random.Random(stage))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_comparison_damaged_before_it_is_resumed(jobs, log, tally):
    job = jobs("compare")

    def prepare() -> None:
        shutil.rmtree(next((job.place / "out/cells").glob("f-lora*")))

    damaged_resumes(job, log, tally, prepare, random.Random(0))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_checkpoint_inside_a_stage_is_damaged(jobs, log, tally):
    job = jobs("f-lora")

    def prepare() -> None:
        for at in range(60, 400, 7):  # a kill that leaves a checkpoint of learning
            job.clear()
            in_child(with_fault(job, at, None), log)
            if list((job.place / "out/stages/learn.points").glob("step-*/complete.json")):
                return
        pytest.fail("no kill left a checkpoint")

    damaged_resumes(job, log, tally, prepare, random.Random(1))


def readers(run, base, out):
    """What reads a finished run: name to an act that gives something to compare."""
    return {
        "report": lambda: run_page.write_run(run),
        "apply": lambda: apply_run(run, base, out),
        "undo": lambda: undo_run(run, out),
        "save": lambda: publish.save(run, out, base_model_id="org/base"),
        "evaluate": lambda: evaluate(
            next(folder for folder in (run / "model", run / "adapter") if folder.is_dir()),
            run / "inputs.jsonl",
            {"evaluate": {"protocols": ["token"]}},
            output=out,
        ),
    }


def try_readers(job, kept, names, log, tally, draw, which) -> None:
    """Damage each file of a finished run in turn, and let each reader read it."""
    run, base = job.place / "out", job.inputs / "base"

    def outcome_of(name):
        out = job.place / "read"
        shutil.rmtree(out, ignore_errors=True)
        act = job.act if name == "resume" else readers(run, base, out)[name]
        outcome = in_child(act, log)
        found = contents(out) if out.is_dir() else {}
        pages = {page: (run / page).read_bytes() for page in REBUILT} if name in ("report", "resume") else {}
        return outcome, {**found, **pages}

    def restore():
        shutil.rmtree(job.place)
        shutil.copytree(kept, job.place)

    wanted = {}
    for reader in which:
        restore()
        outcome, wanted[reader] = outcome_of(reader)
        assert outcome.code == OK, outcome.said
    with tally.no_loss() as lost:
        for name in names:
            for how, damage in DAMAGES.items():
                restore()
                damage(job.place / name, draw)
                tally.add("damaged files")
                for reader in which:
                    outcome, found = outcome_of(reader)
                    if outcome.code == CRASHED:
                        lost.append(f"{reader} with {name} {how}: no message, but {outcome.said}")
                    differ = [file for file in differences(found, wanted[reader]) if not file.endswith("README.md")]
                    if outcome.code == OK and differ:
                        lost.append(f"{reader} with {name} {how}: not noticed; differs: {differ}")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("method", ["f-ft", "f-lora"])
def test_a_finished_run_is_damaged(jobs, log, tally, method):
    job = jobs(method)
    job.clear()
    assert in_child(job.act, log).code == OK
    kept = shutil.copytree(job.place, log.parent / "kept")
    files = [path.relative_to(kept) for path in sorted((kept / "out").rglob("*")) if path.is_file()]
    names = [file for file in files if file.name not in REBUILT and "stages" not in file.parts]
    which = ["resume", "report", "apply", "save"] + ["undo"] * (method == "f-ft") + ["evaluate"] * (method == "f-lora")
    try_readers(job, kept, names, log, tally, random.Random(method), which)


def test_a_few_files_of_a_checkpoint_are_damaged_before_it_is_subtracted(inputs, tmp_path, tally):
    damaged_checkpoints(inputs, tmp_path, tally, n=1)


@pytest.mark.slow
def test_a_checkpoint_is_damaged_before_it_is_subtracted(inputs, tmp_path, tally):
    damaged_checkpoints(inputs, tmp_path, tally, n=30)


def damaged_checkpoints(inputs, tmp_path, tally, n: int) -> None:
    """A cut shard or index, and a bit flipped in a header: an error and no output, or the same weights.

    A bit flipped among the numbers of a checkpoint that no run wrote can be told by nobody: those are left out.
    """
    draw, out = random.Random(2), tmp_path / "out"
    numbers = Numbers(threads=1)
    subtract_folders(inputs / "base", tmp_path / "whole", 0.5, tuned=inputs / "tuned", numbers=numbers)
    whole = {name: data for name, data in contents(tmp_path / "whole").items() if name.endswith(".safetensors")}
    files = sorted(path.name for path in (inputs / "base").glob("*.safetensors*"))
    with tally.no_loss() as lost:
        for side in ("base", "tuned"):
            for name in files:
                for how in ("cut", "flipped") * n:
                    shutil.rmtree(tmp_path / side, ignore_errors=True)
                    file = shutil.copytree(inputs / side, tmp_path / side) / name
                    if how == "cut":
                        DAMAGES["cut"](file, draw)
                    else:
                        _flip_in_header(file, draw)
                    tally.add("damaged files")
                    both = {"base": inputs / "base", "tuned": inputs / "tuned"} | {side: tmp_path / side}
                    try:
                        subtract_folders(both["base"], out, 0.5, tuned=both["tuned"], numbers=numbers, overwrite=True)
                    except ForgetLearnError:
                        if out.exists():
                            lost.append(f"{side}/{name} {how}: refused, and left a folder")
                        continue
                    there = {file: data for file, data in contents(out).items() if file.endswith(".safetensors")}
                    if differ := _other_numbers(there, whole):
                        lost.append(f"{side}/{name} {how}: not noticed; differs: {differ}")
                    shutil.rmtree(out)


def _flip_in_header(file, draw) -> None:
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
    data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _other_numbers(there, whole) -> list[str]:
    """Files whose tensors differ: the header goes along as the base has it."""
    tensors = [
        {name: data[8 + int.from_bytes(data[:8], "little") :] for name, data in files.items()}
        for files in (there, whole)
    ]
    return differences(*tensors)
