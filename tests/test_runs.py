"""The run folder: nothing half written counts, nothing of others is replaced, no token is kept."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forgetlearn.errors import RunError
from forgetlearn.storage import digests, disk, provenance, run_folder
from forgetlearn.storage.run_folder import RunFolder

CONFIG = {"method": "f-ft", "forget": {"coef": 0.3, "epochs": 3}}
INPUTS = {"facts_sha256": "aa", "base_sha256": "bb"}


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG, INPUTS)


def write_weights(folder: Path) -> dict[str, int]:
    (folder / "w.safetensors").write_text("weights")
    return {"facts": 7}


# Stages ------------------------------------------------------------------------------------------


def test_new_run_says_what_it_was_begun_with(run):
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["config"], manifest["inputs"], manifest["stages"]) == (CONFIG, INPUTS, {})
    assert {"python", "forgetlearn", "torch", "transformers", "peft"} <= manifest["versions"].keys()
    assert names(run.path) == ["manifest.json"]


def test_stage_is_done_once(run):
    run.do("forget", write_weights)
    run.do("forget", lambda folder: pytest.fail("done again"))
    again = RunFolder.open(run.path)
    assert again.is_done("forget")
    assert not again.is_done("learn")
    assert again.manifest.stages["forget"].notes["facts"] == 7
    assert names(run.path) == ["manifest.json", "stages", "stages/forget", "stages/forget/w.safetensors"]


def test_a_stage_whose_files_were_damaged_is_done_again_and_all_after_it(run, caplog):
    for stage in ("probe", "forget", "learn"):
        run.do(stage, write_weights)
    (run.path / "stages/forget/w.safetensors").write_bytes(b"other")
    again = RunFolder.create(run.path, CONFIG, INPUTS, resume=True)
    assert [again.is_done(stage) for stage in ("probe", "forget", "learn")] == [True, False, False]
    assert "stages/forget/w.safetensors" in caplog.text
    assert "again: forget, learn" in caplog.text


def test_a_manifest_that_was_changed_is_refused(run):
    file = run.path / "manifest.json"
    file.write_text(file.read_text().replace('"f-ft"', '"f-fu"'))
    with pytest.raises(RunError, match=r"manifest\.json"):
        RunFolder.open(run.path)


def test_a_flipped_bit_of_a_manifest_is_refused(run):
    """Found by the faults: in the name of the hash it made a manifest that seemed to be of an earlier version."""
    file = run.path / "manifest.json"
    data, before = file.read_bytes(), RunFolder.open(run.path).manifest
    at = data.index(b'"sha256"')
    flips = [*itertools.product(range(at, at + 8), range(8)), *((place, place % 8) for place in range(0, len(data), 5))]
    unnoticed = []
    for place, bit in flips:
        changed = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        file.write_bytes(changed)
        with contextlib.suppress(RunError):
            if RunFolder.open(run.path).manifest != before:
                unnoticed.append(changed[place - 10 : place + 10])
    assert unnoticed == []


def test_results_that_were_changed_are_refused(run):
    (run.path / "facts.jsonl").write_text("{}\n")
    run.finish()
    run.check_results()
    (run.path / "facts.jsonl").write_text("{}\n\n")
    with pytest.raises(RunError, match=r"facts\.jsonl"):
        RunFolder.open(run.path).check_results()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Exception("Error while serializing: I/O error: Input/output error (os error 5)"), "Input/output error"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576"), "torch could not write all"),
    ],
)
def test_an_error_of_the_disk_from_a_library_names_the_path(tmp_path, error, told):
    with pytest.raises(RunError, match=f"x: .*{re.escape(told)}"), disk.naming(tmp_path / "x"):
        raise error


def test_failed_stage_leaves_nothing(run):
    def fail(folder):
        write_weights(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.do("forget", fail)
    assert names(run.path) == ["manifest.json", "stages"]
    assert not RunFolder.open(run.path).is_done("forget")


def test_stage_without_its_line_in_the_manifest_is_done_again(run, monkeypatch):
    monkeypatch.setattr(RunFolder, "_save", lambda run: None)
    run.do("learn", write_weights, folder="model")
    monkeypatch.undo()
    assert (run.path / "model/w.safetensors").is_file()
    again = RunFolder.create(run.path, CONFIG, INPUTS, resume=True)
    assert not again.is_done("learn")
    again.do("learn", lambda folder: (folder / "other").touch(), folder="model")
    assert names(run.path) == ["manifest.json", "model", "model/other"]


def test_resume_removes_what_a_kill_left_half_written(run):
    run.do("forget", write_weights)
    for left in (run.path / ".adapter.unfinished-x1", run.path / "stages/.learn.unfinished-x2"):
        left.mkdir()
        (left / "half.safetensors").touch()
    (run.path / ".summary.json.unfinished-x3").touch()
    RunFolder.create(run.path, CONFIG, INPUTS, resume=True)
    assert names(run.path) == ["manifest.json", "stages", "stages/forget", "stages/forget/w.safetensors"]


def test_folder_of_a_run_killed_before_its_manifest_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.manifest.json.unfinished-ab").write_text('{"half": ')
    RunFolder.create(tmp_path / "run", CONFIG, INPUTS, resume=True)
    assert names(tmp_path / "run") == ["manifest.json"]


def test_stage_weights_go_and_rows_stay(run):
    run.do("forget", lambda folder: [(folder / name).touch() for name in ("w.safetensors", "rows.jsonl")] and None)
    run.do("forget_too", lambda folder: [(folder / f"{name}.safetensors").touch() for name in "ab"] and None)
    run.do("learn", write_weights, folder="model")
    run.remove_stage_weights()
    assert names(run.path / "stages") == ["forget", "forget/rows.jsonl"]
    assert (run.path / "model/w.safetensors").is_file()


def test_finished_is_said_by_the_manifest(run, tmp_path):
    assert not run_folder.is_finished(run.path)
    run.finish()
    assert run_folder.is_finished(run.path)
    assert run_folder.is_run(run.path)
    assert not run_folder.is_run(tmp_path)
    assert 0 < run.manifest.peak_memory_gb < 100


# What may be written to --------------------------------------------------------------------------


def test_existing_folder_names_both_flags(run):
    with pytest.raises(RunError, match=r"--resume .* --overwrite"):
        RunFolder.create(run.path, CONFIG, INPUTS)


@pytest.mark.parametrize(
    ("config", "inputs", "named"),
    [
        (
            {"method": "f-ft", "forget": {"coef": 0.5, "epochs": 3}},
            INPUTS,
            r"config\.forget\.coef = 0\.3, now it is 0\.5",
        ),
        ({"method": "ft", "forget": {"coef": 0.5, "epochs": 3}}, INPUTS, r"'f-ft', now it is 'ft' \(and 1 more"),
        (CONFIG, {**INPUTS, "facts_sha256": "cc"}, r"inputs\.facts_sha256 = 'aa', now it is 'cc'"),
        (CONFIG, {**INPUTS, "base_sha256": None}, r"inputs\.base_sha256 = 'bb', now it is None"),
    ],
)
def test_resume_of_another_run_names_the_difference(run, config, inputs, named):
    before = (run.path / "manifest.json").read_bytes()
    with pytest.raises(RunError, match=named):
        RunFolder.create(run.path, config, inputs, resume=True)
    assert (run.path / "manifest.json").read_bytes() == before


def test_resume_compares_as_json_does(tmp_path):
    RunFolder.create(tmp_path / "run", {"protocols": ("token", "exact")}, INPUTS)
    RunFolder.create(tmp_path / "run", {"protocols": ("token", "exact")}, INPUTS, resume=True)


def test_overwrite_replaces_everything_of_the_old_run(run):
    run.do("learn", write_weights, folder="model")
    (run.path / "logs").mkdir()
    (run.path / "report.md").touch()
    new = RunFolder.create(run.path, {"method": "ft"}, INPUTS, overwrite=True)
    assert names(run.path) == ["manifest.json"]
    assert new.manifest.config == {"method": "ft"}


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "years of work"},
        {"manifest.json": '{"name": "a web page"}', "index.html": ""},
        {"manifest.json": "not JSON"},
        {"manifest.json": "[]"},
        {"lab.json": '{"bench": 3}'},
    ],
)
def test_overwrite_refuses_what_forgetlearn_did_not_write(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match="--overwrite"):
        RunFolder.create(tmp_path, CONFIG, INPUTS, overwrite=True)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_overwrite_refuses_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match="--overwrite"):
        run_folder.check_output(tmp_path / "run", resume=False, overwrite=True)


@pytest.mark.parametrize("read", ["model", "inputs.jsonl", "."])
def test_overwrite_refuses_a_folder_that_holds_what_is_read(run, read):
    with pytest.raises(RunError, match=re.escape(str(run.path))):
        run_folder.check_output(run.path, resume=False, overwrite=True, inputs=[None, run.path / read])


def test_a_folder_inside_what_is_read_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(RunError, match=r"base/new .*base"):
        run_folder.check_output(
            tmp_path / "base/new", resume=False, overwrite=False, inputs=["org/name", tmp_path / "base"]
        )


def test_an_output_that_is_a_file_and_both_flags_are_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file"):
        run_folder.check_output(tmp_path / "file", resume=False, overwrite=False)
    with pytest.raises(RunError, match=r"--resume .*--overwrite"):
        run_folder.check_output(run.path, resume=True, overwrite=True)


def test_resume_refuses_a_folder_without_a_run(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=re.escape(str(tmp_path))):
        run_folder.check_output(tmp_path, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"manifest\.json"),
        ('{"cut": ', r"manifest\.json"),
        ("[1]", "JSON object"),
        ("{}", "format"),
    ],
)
def test_open_says_what_is_wrong(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=message):
        RunFolder.open(tmp_path)


# Atomic writes -----------------------------------------------------------------------------------


def no_space(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    disk.write_json(file, {"n": 1})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match=f"{file}: .*No space left"):
        disk.write_json(file, {"n": 2})
    assert names(tmp_path) == ["summary.json"]
    assert disk.read_json(file) == {"n": 1}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Exception("I/O: No space left")])
def test_full_disk_leaves_the_old_folder(tmp_path, error):
    with disk.atomic_folder(tmp_path / "model") as folder:
        (folder / "old").touch()

    def fill():
        with disk.atomic_folder(tmp_path / "model") as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(RunError, match=r"model: .*No space left"):
        fill()
    assert names(tmp_path) == ["model", "model/old"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("old", "new"):
        with disk.atomic_folder(tmp_path / "deep/model") as folder:
            (folder / name).touch()
    assert names(tmp_path) == ["deep", "deep/model", "deep/model/new"]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB; only root can mount one."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("cannot mount a file system here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_real_full_disk(tiny_disk):
    import torch
    from safetensors.torch import save_file

    run = RunFolder.create(tiny_disk / "run", CONFIG, INPUTS)
    weights = {"w": torch.zeros(400_000)}
    with pytest.raises(RunError, match=r"model: .*No space left"):
        run.do("learn", lambda folder: save_file(weights, folder / "model.safetensors"), folder="model")
    with pytest.raises(RunError, match=r"facts\.jsonl: .*No space left"):
        disk.write_rows(run.path / "facts.jsonl", [{"said": "x" * 1_600_000}])
    assert names(tiny_disk) == ["run", "run/manifest.json"]
    assert RunFolder.open(run.path).manifest.stages == {}


def test_files_get_the_permissions_of_the_user(tmp_path):
    mask = os.umask(0o022)
    try:
        disk.write_text(tmp_path / "report.md", "x")
        with disk.atomic_folder(tmp_path / "model"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "report.md").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_rows_survive_every_character(tmp_path):
    rows = [{"said": 'a\u2028b\x85"\\\n'}, {"said": "日本 ü"}, {"said": None}]
    disk.write_rows(tmp_path / "rows.jsonl", rows)
    assert disk.read_rows(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize("text", ['{"a": 1}\n{"b": \n', '{"a": 1\n"b": 2}\n', '{"a": 1},{"b": 2}\n'])
def test_damaged_rows_are_an_error(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"rows\.jsonl"):
        disk.read_rows(tmp_path / "rows.jsonl")


def test_numbers_that_are_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        disk.write_json(tmp_path / "x.json", {"mean": float("nan")})
    assert names(tmp_path) == []


# What the manifest tells -------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub-token", "secret", "--seed", "1"], ["--hub-token", "***", "--seed", "1"]),
        (["--api-key=secret"], ["--api-key=***"]),
        (["--set", f"model.revision={TOKEN}"], ["--set", "model.revision=***"]),
        (["--model", "hf_models/llama", "--set", "evaluate.general_tokens=512"], None),
    ],
)
def test_command_line_hides_tokens(monkeypatch, words, shown):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/forgetlearn", "update", *words])
    assert provenance.command_line() == ["forgetlearn", "update", *(shown or words)]


def test_manifest_holds_no_token_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(sys, "argv", ["forgetlearn", "--token", TOKEN])
    run = RunFolder.create(tmp_path / "run", CONFIG, INPUTS)
    run.finish()
    assert TOKEN not in (run.path / "manifest.json").read_text()


def test_hash_sees_weights_config_and_tokenizer(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    seen = {digests.sha256_of(tmp_path)}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("other")
        seen.add(digests.sha256_of(tmp_path))
    assert len(seen) == 4
    (tmp_path / "notes.md").touch()
    assert digests.sha256_of(tmp_path) in seen


def test_resume_is_offered_only_for_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="--overwrite"):
        run_folder.check_output(tmp_path, resume=False, overwrite=False)
    (tmp_path / run_folder.MANIFEST).write_text("{}")
    with pytest.raises(RunError, match="--resume"):
        run_folder.check_output(tmp_path, resume=False, overwrite=False)


def test_weights_that_cannot_be_removed_are_named(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", {}, {})
    (tmp_path / "run/stages/forget").mkdir(parents=True)
    (tmp_path / "run/stages/forget/weights.safetensors").touch()

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("forgetlearn.storage.run_folder.shutil.rmtree", failing)
    with pytest.raises(RunError, match="stages/forget"):
        run.remove_stage_weights()


def test_a_folder_that_holds_no_run_says_which_one_does(run):
    with pytest.raises(RunError, match=r"does not exist.*--output"):
        RunFolder.open(run.path.parent / "nothing")
    (run.path / "adapter").mkdir()
    with pytest.raises(RunError, match=re.escape(f"{run.path} is one")):
        RunFolder.open(run.path / "adapter")
